"""Takes barriers out of Metal text, to see whether somebody notices."""

import re

from .scan import after_bracket, blank


def barriers(text: str) -> list[tuple[int, int]]:
    """Return where the calls of threadgroup_barrier and simdgroup_barrier stand."""
    comment_or_call = r"//[^\n]*|/\*.*?\*/|\b(?:threadgroup|simdgroup)_barrier\s*(?=\()"
    found = re.finditer(comment_or_call, text, re.S)
    return [(m.start(), after_bracket(text, m.end())) for m in found if not m[0].startswith("/")]


def without(text: str, call: tuple[int, int]) -> str:
    """Take a call out; what stands around it keeps its line."""
    start, end = call
    return text[:start] + blank(text[start:end]) + text[end:]
