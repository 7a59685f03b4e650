"""Pictures as PNG (ISO/IEC 15948), the same bytes for the same picture."""

import struct
import zlib
from pathlib import Path

import numpy as np

from dcryo.data.atomic import replacing


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """Write a picture (H, W, 3) uint8 of red, green and blue, the first row at the top."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 1:] = picture.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes(), 9), b"IEND": b""}
    with replacing(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in parts.items():
            file.write(struct.pack(">I", len(content)) + name + content)
            file.write(struct.pack(">I", zlib.crc32(name + content)))
