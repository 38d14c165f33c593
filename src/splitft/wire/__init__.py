"""What travels between client and server: named tensors as checked bytes, rounded as the user chose."""

from splitft.wire.codecs import CODECS, Cast
from splitft.wire.frame import MAX_FRAME_BYTES, Announced, Frame, open_frame
from splitft.wire.parts import Encoded, Entry, Part

__all__ = [
    "CODECS", "MAX_FRAME_BYTES", "Announced", "Cast", "Encoded", "Entry", "Frame", "Part", "open_frame",
]  # fmt: skip
