"""Reading C++ text: matching brackets, splitting at commas, taking text out without moving lines."""

import re

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def after_bracket(text: str, at: int) -> int:
    """Return the index behind the bracket that closes the one at `at`."""
    opening, depth = text[at], 0
    while at < len(text):
        if text[at] == '"':
            at = re.compile(r'"(?:\\.|[^"\\])*"').match(text, at).end()
            continue
        depth += (text[at] == opening) - (text[at] == CLOSING[opening])
        at += 1
        if depth == 0:
            return at
    raise ValueError("a bracket is not closed")


def split_commas(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if text[start:].strip():
        parts.append(text[start:])
    return parts


def blank(text: str) -> str:
    """Nothing, in as many lines: what stands behind keeps its line."""
    return "\n" * text.count("\n")


def line_at(text: str, at: int) -> tuple[str, int]:
    """Return file and line of an index into preprocessed text, by its line markers."""
    markers = list(re.finditer(r'^# (\d+) "([^"]*)".*\n', text[:at], re.M))
    if not markers:
        return "?", text.count("\n", 0, at) + 1
    last = markers[-1]
    return last[2], int(last[1]) + text.count("\n", last.end(), at)
