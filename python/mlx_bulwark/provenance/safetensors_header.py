"""The header of a safetensors file, read without trusting it."""

import json
import os
from typing import Any

from .strict_json import ProvenanceError

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Number of tensors and metadata of a model file; no tensor is read, and nothing is run.

    Args:
        path: a .safetensors file.

    Returns:
        ``tensors``, their number, ``bytes`` of their data, and ``metadata``, text by text.

    Raises:
        ProvenanceError: the header does not fit the file.

    Example:
        >>> import tempfile, os, mlx.core as mx
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> mx.save_safetensors(path, {"w": mx.zeros((2, 3))}, {"base": "none"})
        >>> header = read_header(path)
        >>> header["tensors"], header["bytes"], header["metadata"]["base"]
        (1, 24, 'none')

    Source: the safetensors format, https://github.com/huggingface/safetensors.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ProvenanceError(f"[safetensors] {os.fspath(path)!r} must hold its header but says {length} bytes")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata is not text")
        ends = [_end(tensor, size - 8 - length) for tensor in header.values()]
    except RecursionError:
        raise ProvenanceError(f"[safetensors] {os.fspath(path)!r} has a header that is nested too deeply") from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ProvenanceError(f"[safetensors] {os.fspath(path)!r} has a header that cannot be: {e}") from None
    return {"tensors": len(header), "bytes": max(ends, default=0), "metadata": metadata}


def _end(tensor: dict[str, Any], available: int) -> int:
    start, end = tensor["data_offsets"]
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= available:
        raise ValueError("a tensor lies outside of the file")
    return end
