"""What disks and copies do to files: flipped bits, cut ends, lost or foreign parts, zeros."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def mutations(draw: st.DrawFn, written: bytes) -> bytes:
    """Draw a harmed version of a file; it differs from what was written."""
    place = draw(st.integers(0, len(written) - 1))
    length = draw(st.integers(1, 600))
    flipped = written[place] ^ 1 << draw(st.integers(0, 7))
    foreign = draw(st.binary(min_size=1, max_size=40))
    mutated = draw(
        st.sampled_from(
            [
                written[:place] + bytes([flipped]) + written[place + 1 :],
                written[:place],
                written[:place] + foreign + written[place:],
                written[:place] + foreign + written[place + len(foreign) :],
                written[:place] + written[place + length :],
                written[:place] + bytes(min(length, len(written) - place)) + written[place + length :],
                bytes(len(written)),
            ]
        )
    )
    return mutated if mutated != written else written + b"\n"
