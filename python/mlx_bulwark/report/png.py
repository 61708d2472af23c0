"""Small images as PNG data URIs, without an imaging library."""

import base64
import struct
import zlib
from typing import Any

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_PIXELS = 1 << 20


def data_uri(image: Any, bounds: tuple[float, float] = (0.0, 1.0)) -> str:
    """Encode an image.

    Args:
        image: ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]``, any real dtype; uint8 is taken as it is.
        bounds: Values of black and white.

    Returns:
        str: ``data:image/png;base64,...``.

    Raises:
        ValueError: The shape is no image's, or it has more than a million pixels.
    """
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise ValueError(f"[data_uri] image must be [H, W] or [H, W, 1, 3 or 4] but has shape {list(pixels.shape)}")
    height, width, channels = pixels.shape
    if height * width > MOST_PIXELS:
        raise ValueError(f"[data_uri] image must have at most {MOST_PIXELS:,} pixels but has {height * width:,}")
    if pixels.dtype != np.uint8:
        low, high = bounds
        scaled = np.nan_to_num((pixels.astype(np.float64) - low) / ((high - low) or 1.0))
        pixels = np.round(255 * scaled.clip(0, 1)).astype(np.uint8)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(_SIGNATURE + chunks).decode()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
