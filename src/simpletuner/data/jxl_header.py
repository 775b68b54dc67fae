"""Size of a JPEG XL image from its header; the plugin of Pillow decodes the whole image for it.

The fields are those of ISO/IEC 18181-1 (SizeHeader, ImageMetadata) and 18181-2 (the boxes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

CODESTREAM_START = b"\xff\x0a"
CONTAINER_START = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
MAX_BOXES = 1000  # before the codestream; a usual file has three or four
HEADER_BYTES = 32
# ratio -> width as a fraction of the height; 0 is a width of its own
RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


@dataclass
class _Bits:
    """Bits of a codestream, the lowest of each byte first."""

    value: int
    left: int

    def take(self, count: int) -> int:
        if count > self.left:
            raise ValueError("the header is cut off")
        bits = self.value & ((1 << count) - 1)
        self.value >>= count
        self.left -= count
        return bits

    def take_size(self) -> int:
        return 1 + self.take((9, 13, 18, 30)[self.take(2)])


def read_jxl_size(stream: BinaryIO) -> tuple[int, int]:
    """Return (width, height) after orientation; the stream is left at its start.

    Raises ValueError where there is no such header.
    """
    try:
        start = _read_codestream(stream)
    finally:
        stream.seek(0)
    if start[:2] != CODESTREAM_START:
        raise ValueError("there is no codestream")
    bits = _Bits(int.from_bytes(start[2:], "little"), 8 * (len(start) - 2))
    is_small = bits.take(1)
    height = 8 * (1 + bits.take(5)) if is_small else bits.take_size()
    ratio = bits.take(3)
    if ratio:
        numerator, denominator = RATIOS[ratio]
        width = height * numerator // denominator
    else:
        width = 8 * (1 + bits.take(5)) if is_small else bits.take_size()
    all_default = bits.take(1)
    has_more = 0 if all_default else bits.take(1)
    orientation = 1 + bits.take(3) if has_more else 1
    return (height, width) if orientation >= 5 else (width, height)


def _read_codestream(stream: BinaryIO) -> bytes:
    """Return the first bytes of the codestream, which may be inside boxes."""
    start = stream.read(len(CONTAINER_START))
    if start != CONTAINER_START:
        return start + stream.read(HEADER_BYTES)
    for _ in range(MAX_BOXES):
        head = stream.read(8)
        if len(head) < 8:
            break
        length, kind, used = int.from_bytes(head[:4], "big"), head[4:], 8
        if length == 1:
            length, used = int.from_bytes(stream.read(8), "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            stream.read(4 if kind == b"jxlp" else 0)  # the number of the part
            return stream.read(HEADER_BYTES)
        if length < used:  # to the end of the file, or damaged
            break
        stream.seek(length - used, 1)
    raise ValueError("there is no codestream")
