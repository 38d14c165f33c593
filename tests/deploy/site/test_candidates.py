"""With `wire: auto` a site tries and chooses only codecs that its data owner allows."""

from __future__ import annotations

import pytest

from splitft.config import from_mapping
from splitft.deploy.site.policy import candidates_of, refusals
from splitft.errors import ForbiddenError, ProtocolError
from splitft.run.codec_choice import GRADIENT, HIDDEN, check_choice, check_trial
from splitft.specs import SiteSpec, WireSpec

AUTO = WireSpec(hidden="auto", gradient="auto")


def configured(**sections):
    return from_mapping({"clients": {"count": 2, "cuts": [1, 2]}, "wire": "auto", **sections})


def site(**allows) -> SiteSpec:
    return SiteSpec.model_validate({"allows": allows, "text": {"source": "python-docs"}})


def test_without_a_word_of_its_owner_a_site_has_all_candidates():
    found = candidates_of(site(), configured())
    assert (found.hidden, found.gradient, found.exact) == (HIDDEN, GRADIENT, "fp32")


def test_a_site_compares_with_the_widest_codec_that_its_owner_allows():
    found = candidates_of(site(hidden=["int4", "bf16"], gradient=["int8"]), configured())
    assert (found.hidden, found.gradient, found.exact) == (("int4", "bf16"), ("int8",), "bf16")


def test_a_codec_with_options_counts_by_its_name():
    assert candidates_of(site(hidden=["principal"]), configured()).hidden == ("principal", "principal:bits=3")


def test_codecs_that_remember_are_no_candidates_with_batches_in_flight():
    found = candidates_of(site(), configured(training={"micro_batches": 2, "in_flight": 2, "batch_size": 4}))
    assert (found.hidden, found.gradient) == (("int4", "int8", "bf16"), ("int4", "int8", "bf16"))


def test_a_role_whose_codec_the_run_names_has_that_one_alone():
    found = candidates_of(site(), configured(wire={"hidden": "auto", "gradient": "fp8"}))
    assert found.gradient == ("fp8",)


def test_a_site_whose_owner_allows_no_candidate_declines():
    assert refusals(site(hidden=["int8"]), configured(), None) == ()
    (reason,) = refusals(site(hidden=["fp64"]), configured(), None)
    assert reason.startswith("wire.hidden is auto, and this site allows none of its candidates")


@pytest.mark.parametrize("hidden", ["auto", "topk", "temporal", "x" * 60])
def test_the_server_takes_no_other_codec_from_a_site(hidden):
    with pytest.raises(ProtocolError, match="cannot be tried"):
        check_trial(hidden, AUTO)
    with pytest.raises(ProtocolError, match="cannot be chosen for hidden"):
        check_choice(hidden, "int8", AUTO)
    with pytest.raises(ProtocolError, match="cannot be chosen for gradient"):
        check_choice("int8", "temporal", AUTO)


@pytest.mark.fault(
    "a server says that a site had chosen a codec which its owner forbids", "the site declines"
)
def test_a_server_cannot_choose_for_a_site_what_its_owner_forbids():
    found = candidates_of(site(hidden=["int8"]), configured())
    found.check("int8", "int4")
    with pytest.raises(ForbiddenError, match=r"'bf16'; this site has the choice of int8 \(allows.hidden\)"):
        found.check("bf16", "int4")
    with pytest.raises(ForbiddenError, match="gradient in the codec 'fp32'"):
        found.check("int8", "fp32")


def test_a_run_that_names_its_codecs_lets_no_site_choose():
    with pytest.raises(ProtocolError):
        check_trial("int8", WireSpec())
    with pytest.raises(ProtocolError):
        check_choice("bf16", "bf16", WireSpec())
    check_choice("int4", "bf16", WireSpec(hidden="auto"))
