"""JSON that has one form only: whoever changes a byte changes the content or leaves the form, and both are found."""

import json
import math
from typing import Any

DIGITS = 20  # of an integer; sizes of files have 19 at most


class ProvenanceError(ValueError):
    """A manifest, a signature, a log or what they describe is not what it must be."""


def encode(value: Any, *, indent: int | None = None) -> bytes:
    """Canonical bytes: sorted names, UTF-8, a newline at the end, no space that is not of ``indent``."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, separators=separators, ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode() + b"\n"


def decode(raw: bytes, what: str, *, indent: int | None = None, max_bytes: int) -> Any:
    """The value of canonical bytes; anything else is refused with the reason."""
    if len(raw) > max_bytes:
        raise ProvenanceError(f"{what} must have at most {max_bytes} bytes but has {len(raw)}")
    try:
        if b"\0" in raw:
            raise ValueError("it holds a NUL byte")
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        if encode(value, indent=indent) != raw:
            raise ValueError("its bytes are not those that its content is written as")
    except RecursionError:
        raise ProvenanceError(f"{what} must be as it was written but is not: it is nested too deeply") from None
    except ValueError as e:
        raise ProvenanceError(f"{what} must be as it was written but is not: {e}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:DIGITS]} is too large")
    return value


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
