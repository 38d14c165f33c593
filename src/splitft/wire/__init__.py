"""What travels between client and server: named tensors as checked bytes, rounded as the user chose."""

from splitft.wire.codecs import CODECS, Codec, codec_of
from splitft.wire.frame import MAX_FRAME_BYTES, Announced, Frame, open_frame
from splitft.wire.parts import Encoded, Entry, Part
from splitft.wire.passage import Memory, Passage
from splitft.wire.streams import Streams

__all__ = [
    "CODECS", "MAX_FRAME_BYTES", "Announced", "Codec", "Encoded", "Entry", "Frame", "Memory", "Part",
    "Passage", "Streams", "codec_of", "open_frame",
]  # fmt: skip
