"""A codec of a plug-in works wherever a built-in one does: configuration, messages, schedule, deployment."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from splitft.adapters import AdapterState, Factors
from splitft.codecs import CODECS, Codec, CodecContext, CodecKind, CodecOption, Encoded, StoredPart, codec_of
from splitft.codecs.rotation import sizes
from splitft.config import from_mapping
from splitft.deploy.unsupported import check_deployable
from splitft.errors import ConfigError, DeployError, PluginError
from splitft.protocol import AdapterUpload, LastHidden, MessageSerializer
from splitft.protocol.codec_state import CodecState
from splitft.schedule.codec_cost import codec_seconds
from splitft.specs import CodecChoice, SiteSpec, WireSpec
from splitft.specs.codecs import ROLES, Speed


@dataclass(frozen=True)
class Steps:
    """Multiples of 2^-bits in 16 bits."""

    bits: float = 4
    name: str = "steps"

    def bytes_for(self, shape):
        rows, width = sizes(shape)
        return 2.0 * rows * width

    def layout(self, shape, parameters):
        return {"codes": StoredPart(torch.int16, shape)}

    def encode(self, tensor, context):
        codes = (tensor.detach() * 2**self.bits).round().to(torch.int16)
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), {"codes": codes})

    def decode(self, encoded, dtype, context):
        return (encoded.parts["codes"].double() / 2**self.bits).to(dtype)

    def error_bound(self, encoded, context):
        rows, width = sizes(encoded.shape)
        return torch.full((rows,), 2.0 ** -(self.bits + 1) * width**0.5)


KIND = CodecKind(
    Steps,
    options={"bits": CodecOption(lambda bits: bits <= 10, "at most 10")},
    roles=frozenset(ROLES),
    flattens_adapters=True,
    speeds={"hidden": Speed(4e9, 2e9)},
)


@pytest.fixture
def add():
    added = []

    def add_(kind: CodecKind, name: str = "steps") -> None:
        added.append(name)
        CODECS.add(name, kind)

    yield add_
    for name in added:
        CODECS._things.pop(name, None)


def test_a_configuration_names_it_with_its_options(add):
    with pytest.raises(ConfigError, match=r"wire\.hidden: found 'steps:bits=3'; give fp64"):
        from_mapping({"wire": {"hidden": "steps:bits=3"}})
    add(KIND)
    wire = from_mapping({"wire": {"hidden": "steps:bits=3", "adapter": {"codec": "steps"}}}).wire
    assert (wire.hidden, wire.adapter) == ("steps:bits=3", "steps")
    assert SiteSpec.model_validate({"allows": {"hidden": ["steps"]}}).allows.hidden == ("steps",)
    for given, message in [
        ("steps:bits=11", "steps: bits is 11; give at most 10"),
        ("steps:share=2", "steps has no option 'share'; it has bits"),
        ("step", "principal | steps | auto; did you mean steps?"),
    ]:
        with pytest.raises(ConfigError) as caught:
            from_mapping({"wire": {"hidden": given}})
        assert message in str(caught.value)
    assert "steps" in WireSpec.model_json_schema()["properties"]["adapter"]["pattern"]


def test_a_role_that_it_does_not_serve_is_refused(add):
    add(replace(KIND, roles=frozenset({"gradient"})))
    assert WireSpec(gradient="steps").gradient == "steps"
    for role in ("hidden", "adapter"):
        with pytest.raises(ConfigError, match=f"wire.{role}: found 'steps'; give fp64"):
            from_mapping({"wire": {role: "steps"}})


def test_messages_travel_in_it_and_factors_as_one_row(add):
    add(KIND)
    serializer = MessageSerializer(
        4, torch.float32, torch.float32, WireSpec(hidden="steps:bits=6", adapter="steps:bits=8")
    )
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = serializer.from_bytes(serializer.to_bytes(LastHidden(step=1, hidden=hidden)))
    assert torch.equal(found.hidden, (hidden * 64).round() / 64)
    upload = AdapterUpload(
        client="a", round=1, adapters=AdapterState({(0, "q"): Factors(hidden[:2], hidden[:, :2])})
    )
    ends = CodecState(), CodecState()
    frame = serializer.pack(upload, ends[0])
    assert frame.tensors["adapters/0.q.A"].parts["codes"].shape == (1, 8)
    received = serializer.receive(frame.to_bytes(), state=ends[1])
    assert torch.equal(received.message.adapters[0, "q"].A, (hidden[:2] * 256).round() / 256)
    assert received.payload_bytes == {"adapters/0.q.A": 16, "adapters/0.q.B": 12}


def test_the_schedule_charges_its_speed_and_nothing_without_one(add):
    add(KIND)
    assert codec_seconds("steps:bits=3", "hidden") == (1e-9, 2e-9)
    assert codec_seconds("steps", "gradient") == (0.0, 0.0)


@pytest.mark.parametrize("memory", ["sender", "both"])
def test_a_codec_that_remembers_is_deployed_where_messages_have_an_order(add, memory):
    add(replace(KIND, memory=memory))
    sections = {"wire": {"hidden": "steps", "gradient": "bf16"}}
    check_deployable(from_mapping(sections))
    training = {"batch_size": 4, "micro_batches": 2, "in_flight": 2}
    with pytest.raises(DeployError, match=r"wire\.hidden: steps"):
        check_deployable(from_mapping({**sections, "training": training}))
    check_deployable(from_mapping({**sections, "training": {**training, "in_flight": 1}}))


def test_example_ids_are_sent_if_it_needs_them(add):
    add(KIND)
    assert not WireSpec(hidden="steps").needs_example_ids
    add(replace(KIND, needs_example_ids=True))
    assert WireSpec(hidden="steps").needs_example_ids


def test_a_text_is_parsed_once_until_a_codec_is_added(add, monkeypatch):
    add(KIND)
    codec: Codec = codec_of("steps:bits=3")
    monkeypatch.setattr(CodecChoice, "parse", lambda text: pytest.fail("parsed again"))
    assert codec_of("steps:bits=3") is codec
    monkeypatch.undo()
    add(replace(KIND, make=lambda bits: Steps(bits + 1)))
    assert codec_of("steps:bits=3") == Steps(4)


@pytest.mark.parametrize("name", ["other", "a-name-of-twenty-one"])
def test_a_name_that_no_frame_could_carry_is_refused(add, name):
    add(CodecKind(lambda: Steps(name=name if len(name) > 19 else "steps")), name)
    with pytest.raises(PluginError, match="at most 19 letters"):
        codec_of(name)


def test_it_keeps_the_bound_that_it_states():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    codec, context = Steps(), CodecContext()
    encoded = codec.encode(rows, context)
    error = (codec.decode(encoded, torch.float32, context) - rows).norm(dim=1)
    assert bool((error <= codec.error_bound(encoded, context)).all())
