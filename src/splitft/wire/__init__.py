"""What travels between client and server: named tensors as checked bytes, rounded as the user chose."""

from splitft.wire.codecs import CODECS, Cast
from splitft.wire.frame import MAX_FRAME_BYTES, Frame

__all__ = ["CODECS", "MAX_FRAME_BYTES", "Cast", "Frame"]
