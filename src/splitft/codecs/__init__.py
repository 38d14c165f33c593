"""Codecs: named tensors as checked bytes, rounded as the user chose."""

from splitft.codecs.encoded import Encoded, Entry, Part
from splitft.codecs.passage import Memory, Passage
from splitft.codecs.registry import CODECS, Codec, codec_of

__all__ = ["CODECS", "Codec", "Encoded", "Entry", "Memory", "Part", "Passage", "codec_of"]
