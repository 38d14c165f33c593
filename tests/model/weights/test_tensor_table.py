"""The bytes of each tensor, against the library that wrote the file; and headers that lie."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitft.errors import ModelError
from splitft.model.weights.tensor_table import header_bytes, parse_header, table_of

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.zeros(0, 5),
    "e": torch.tensor([True, False]),
    "f": torch.arange(4).to(torch.float8_e4m3fn),
}


def test_the_bytes_at_each_place_are_those_of_the_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    data, table = path.read_bytes(), table_of(path)
    assert set(table) == set(TENSORS)
    for name, tensor in load_file(path).items():
        place = table[name]
        assert place.shape == tuple(tensor.shape)
        assert data[place.start : place.stop] == bytes(tensor.flatten().view(torch.uint8).tolist())


def file_with(entry: object) -> tuple[bytes, int]:
    header = json.dumps({"x": entry}).encode()
    return header, 8 + len(header) + 16


@pytest.mark.hostile("a published header of weights lies", "the model is refused and the file named")
@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        7,
        None,
    ],
)
def test_a_header_that_lies_is_refused(entry):
    with pytest.raises(ModelError, match=r"m/x\.safetensors is not a readable safetensors file"):
        parse_header(*file_with(entry), "m/x.safetensors")
    good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    assert parse_header(*file_with(good), "m/x.safetensors")["x"].size == 16


@pytest.mark.parametrize("header", [b"[]", b"7", b"{", b"\xff\xfe", b'"x"', b"null"])
def test_a_header_that_is_no_table_is_refused(header):
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        parse_header(header, 100, "x")


@pytest.mark.parametrize("first", [b"", b"1234567", bytes(8), b"\xff" * 8, (2**40).to_bytes(8, "little")])
def test_a_header_of_no_or_absurd_length_is_refused(first):
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        header_bytes(first, "x")
