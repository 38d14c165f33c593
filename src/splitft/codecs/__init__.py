"""Codecs: named tensors as checked bytes, rounded as the user chose."""

from splitft.codecs.encoded import Encoded, StoredPart, TensorEntry
from splitft.codecs.passage import CodecContext, Memory
from splitft.codecs.registry import CODECS, Codec, codec_of

__all__ = ["CODECS", "Codec", "CodecContext", "Encoded", "Memory", "StoredPart", "TensorEntry", "codec_of"]
