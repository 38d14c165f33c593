"""Codecs: tensors as named, typed parts, rounded as the user chose."""

from splitft.codecs.codec import Codec, codec_of, place_to_decode, place_to_encode
from splitft.codecs.encoded import CodecContext, Encoded, Memory, StoredPart, TensorEntry
from splitft.specs.codecs import CODECS, CodecKind, CodecOption

__all__ = [
    "CODECS",
    "Codec",
    "CodecContext",
    "CodecKind",
    "CodecOption",
    "Encoded",
    "Memory",
    "StoredPart",
    "TensorEntry",
    "codec_of",
    "place_to_decode",
    "place_to_encode",
]
