"""What lies under a folder, without following any link; and names that look like others."""

import os
import stat
import unicodedata
from collections.abc import Collection
from typing import NamedTuple

from .strict_json import ProvenanceError

# Letters of Cyrillic and Greek that are drawn as Latin ones.
_LOOKALIKES = str.maketrans(
    "асеорхуіјѕԁһӏԛԝвкмнтαεικνορτυχ",
    "aceopxyijsdhlqwbkmhtaeikvoptux",
)


class Found(NamedTuple):
    """A tree: regular files, links by what they say, and what is neither, all by path from the root."""

    files: list[str]
    links: dict[str, str]
    special: dict[str, str]


def walk(root: str, ignore: Collection[str] = ()) -> Found:
    """All that lies under a folder. Ignored are exactly the paths that are given, with what is below them."""
    found, folders = Found([], {}, {}), [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if path in ignore:
                    continue
                if entry.is_symlink():
                    found.links[path] = os.readlink(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_file(follow_symlinks=False):
                    found.files.append(path)
                else:
                    found.special[path] = _kind(entry.stat(follow_symlinks=False).st_mode)
    return found


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((name for test, name in kinds.items() if test(mode)), "no regular file")


def leaves_root(root: str, path: str) -> bool:
    """Whether a link, followed to its end, points out of the folder."""
    top = os.path.realpath(root)
    end = os.path.realpath(os.path.join(root, path))
    return end != top and not end.startswith(top.rstrip("/") + "/")


def check_path(path: object) -> str:
    """A path of a manifest; refused is what could lead out of the root or be two things at once."""
    if not isinstance(path, str) or not path:
        raise ProvenanceError(f"path {path!r} must be a name but is not")
    if "\0" in path:
        raise ProvenanceError(f"path {path!r} must hold no NUL but does")
    if path.startswith("/"):
        raise ProvenanceError(f"path {path!r} must be relative but is absolute")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ProvenanceError(f"path {path!r} must stay below the root and be plain but has an empty, '.' or '..' part")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ProvenanceError(f"path {path!r} must be UTF-8 but is not") from None
    return path


def look(path: str) -> str:
    """What a name looks like: equal for names that differ in case, in Unicode form, or in letters drawn alike."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())
    visible = "".join(c for c in folded if unicodedata.category(c) != "Cf")
    return visible.translate(_LOOKALIKES)


def differ_in_case_only(a: str, b: str) -> bool:
    """Whether two different names are one where case is not told apart."""
    return a != b and a.casefold() == b.casefold()
