"""Images as PNG files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor


def write_png(path: Path, image: Tensor) -> None:
    """An image as a PNG file (ISO/IEC 15948), lossless.

    Args:
        path: of the file.
        image: uint8, grey ``(H, W)`` or colours ``(3, H, W)``; or int32 ``(3, H, W)``, colours of 16 bits, from 0 to
            65535.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    H, W = image.shape[-2:]
    colour = 2 if image.dim() == 3 else 0
    pixels = (image.permute(1, 2, 0) if colour else image.unsqueeze(2)).cpu()
    bits = 8 if image.dtype == torch.uint8 else 16
    if bits == 16:  # the high byte first
        pixels = torch.stack([pixels >> 8, pixels & 255], dim=-1).to(torch.uint8)
    header = struct.pack(">IIBBBBB", W, H, bits, colour, 0, 0, 0)  # not interlaced
    lines = pixels.reshape(H, -1)
    lines = torch.cat([lines.new_zeros(H, 1), lines], dim=1)  # each begins with its filter: 0, none
    data = zlib.compress(lines.numpy().tobytes())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
