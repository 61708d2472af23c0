"""The manifest: what a tree of files holds, where it came from, and whether it is still so."""

import itertools
import os
import subprocess
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .hashing import ALGORITHMS, hash_files, hasher, merkle_root
from .safetensors_header import read_header
from .strict_json import ProvenanceError, decode, encode
from .tree import Found, check_path, differ_in_case_only, leaves_root, look, walk

FORMAT, VERSION = "mlx-bulwark manifest", 1
MAX_BYTES = 1 << 30
_FIELDS = ("algorithm", "environment", "files", "git_commit", "ignored", "licence", "parents", "root", "schema")


class AppendsLines(Protocol):
    """What a log must do: `AuditLog`, or anything with its ``append``."""

    def append(self, kind: str, /, **fields: Any) -> Any:
        """Write a line."""


class Finding(NamedTuple):
    """One thing that is not as it should be.

    Attributes:
        kind: ``"changed"``, ``"missing"``, ``"extra"``, ``"case-rename"``, ``"unicode-twin"``, ``"link"``,
            ``"special"``, ``"unreadable"``, ``"schema"`` or ``"git-commit"``; of an environment and a
            lineage also others.
        path: the file, from the root; of a schema the file that was given, of a commit nothing.
        message: what is wrong with it.
    """

    kind: str
    path: str
    message: str


@dataclass(frozen=True)
class Verification:
    """Result of a verification: ``ok`` where there are no findings.

    Attributes:
        findings: what is not as it should be, in the order of paths.
        checked: number of files that were compared.
        notices: what should be known and is no finding: a schema that was not compared, another git commit.
    """

    findings: list[Finding] = field(default_factory=list)
    checked: int = 0
    notices: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all is as it should be."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        told = {name: [f._asdict() for f in getattr(self, name)] for name in ("findings", "notices")}
        return {"kind": "manifest", "ok": self.ok, "checked": self.checked, **told}


class Diff(NamedTuple):
    """Paths that two manifests differ in; ``renamed`` holds pairs of old and new names of the same content."""

    added: list[str]
    removed: list[str]
    changed: list[str]
    renamed: list[tuple[str, str]]


@dataclass(frozen=True)
class Manifest:
    """What a tree of files holds: digests, sizes, a Merkle root over them, and where they came from.

    Made by `build` or `load`. Two builds over the same files give the same bytes: there is no time stamp.

    Attributes:
        files: an entry for each file, in the order of paths: ``path``, ``size`` in bytes and ``digest``; of a model
            file also its ``safetensors`` header; of a link within the tree ``path`` and ``link``.
        algorithm: ``"sha256"`` or ``"blake3"``.
        root: Merkle root (RFC 6962) whose leaves are the entries of ``files`` as canonical JSON.
        source: where the data came from.
        licence: its licence.
        parents: digest and root of each manifest that this data was made from.
        schema: SHA-256 of the schema that the data was checked against.
        git_commit: commit of the checkout that the files lie in.
        ignored: paths that were left out.
        environment: what `capture_environment` found.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "data")
        >>> folder.mkdir()
        >>> _ = (folder / "a.csv").write_text("x,y\\n1,2\\n")
        >>> manifest = Manifest.build(folder, source="https://example.org/a", licence="CC-BY-4.0")
        >>> manifest.verify(folder).ok
        True
        >>> _ = (folder / "a.csv").write_text("x,y\\n1,3\\n")
        >>> manifest.verify(folder).findings
        [Finding(kind='changed', path='a.csv', message='its content is not what it was')]

    Source: RFC 6962 for the tree; Gebru et al., Datasheets for Datasets, 2018, for what to say of data.
    """

    files: list[dict[str, Any]]
    algorithm: str
    root: str
    source: str | None = None
    licence: str | None = None
    parents: list[dict[str, str]] = field(default_factory=list)
    schema: str | None = None
    git_commit: str | None = None
    ignored: list[str] = field(default_factory=list)
    environment: dict[str, Any] | None = None

    @classmethod
    def build(
        cls,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        source: str | None = None,
        licence: str | None = None,
        parent: "Manifest | Sequence[Manifest] | None" = None,
        root: str | os.PathLike[str] | None = None,
        algorithm: str = "sha256",
        schema: str | os.PathLike[str] | None = None,
        environment: dict[str, Any] | None = None,
        ignore: Iterable[str] = (),
        threads: int | None = None,
        progress: bool = False,
        cache: str | os.PathLike[str] | None = None,
        audit_log: AppendsLines | None = None,
    ) -> "Manifest":
        """Hash files and folders.

        Args:
            paths: a folder, or files and folders.
            source: where the data came from.
            licence: its licence, best as an SPDX identifier.
            parent: manifest, or manifests, of the data that this data was made from.
            root: folder that paths are told from. Default: the folder, or what the paths have in common.
            algorithm: ``"sha256"`` or ``"blake3"``.
            schema: file of the schema that the data was checked against.
            environment: what `capture_environment` returned.
            ignore: paths from the root to leave out, with what is below them; they are written down.
            threads: Default: one a core.
            progress: whether to show a bar.
            cache: file of digests by size, times and inode: unchanged files are not read again, and an interrupted
                build goes on. Trusts who can write to it.
            audit_log: gets a line.

        Returns:
            The manifest.

        Raises:
            ProvenanceError: a link leaves the root, something is no regular file, or a name is not UTF-8.
            OSError: a file cannot be read.

        Warns:
            UserWarning: names that differ in case or Unicode form alone: some file systems keep one of them.
        """
        hasher(algorithm)
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise ValueError("[Manifest.build] paths must have an element but are empty")
        top = _top([os.path.abspath(p) for p in given]) if root is None else os.path.abspath(root)
        ignored = sorted({check_path(p) for p in ignore})
        found = _together([os.path.abspath(p) for p in given], top, ignored)
        _refuse(found, top)
        names = sorted(found.files, key=str.encode)
        digests = hash_files(
            [os.path.join(top, name) for name in names],
            algorithm=algorithm,
            threads=threads,
            progress=progress,
            cache=cache,
        )
        entries = [_entry(top, name, digest) for name, digest in zip(names, digests, strict=True)]
        entries += [{"path": path, "link": target} for path, target in found.links.items()]
        entries.sort(key=lambda entry: str(entry["path"]).encode())
        _warn_of_twins([entry["path"] for entry in entries])
        parents = [parent] if isinstance(parent, Manifest) else list(parent or [])
        manifest = cls(
            entries,
            algorithm,
            _root(entries, algorithm),
            source,
            licence,
            [{"digest": p.digest, "root": p.root} for p in parents],
            None if schema is None else _plain_digest(schema),
            _git_commit(top),
            ignored,
            environment,
        )
        if audit_log is not None:
            audit_log.append("manifest.build", manifest=manifest.digest, root=manifest.root, files=len(entries))
        return manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's file: its name among parents."""
        return str(hasher("sha256")(self.to_bytes()).hexdigest())

    def to_bytes(self) -> bytes:
        """The manifest's file, byte by byte: canonical JSON, one line for each value."""
        content = {name: getattr(self, name) for name in (*_FIELDS, "source")}
        return encode({"format": FORMAT, "version": VERSION, **content}, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        temporary = f"{os.fspath(path)}.{os.getpid()}.new"
        Path(temporary).write_bytes(self.to_bytes())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Manifest":
        """Read a file.

        Args:
            path: what `save` wrote.

        Returns:
            The manifest.

        Raises:
            ProvenanceError: it is not as it was written: the message says why.
            OSError: it cannot be read.
        """
        with open(path, "rb") as f:
            return cls.from_bytes(f.read(MAX_BYTES + 1), os.fspath(path))

    @classmethod
    def from_bytes(cls, raw: bytes, name: str = "manifest") -> "Manifest":
        """Read a manifest that was written by `to_bytes`; errors call it ``name``."""
        content = decode(raw, f"[Manifest] {name}", indent=1, max_bytes=MAX_BYTES)
        try:
            return cls._checked(content)
        except (ProvenanceError, TypeError, KeyError, AttributeError) as e:
            why = f"{type(e).__name__} {e}" if isinstance(e, (KeyError, AttributeError)) else e
            raise ProvenanceError(f"[Manifest] {name} must be a manifest but is not: {why}") from None

    @classmethod
    def _checked(cls, content: Any) -> "Manifest":
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise ProvenanceError(f"it should name {FORMAT!r}, version {VERSION}")
        if sorted(content) != sorted((*_FIELDS, "source", "format", "version")):
            raise ProvenanceError(f"its fields are {sorted(content)}")
        if content["algorithm"] not in ALGORITHMS:
            raise ProvenanceError(f"algorithm {content['algorithm']!r} is none of {', '.join(ALGORITHMS)}")
        for entry in content["files"]:
            _check_entry(entry)
        names = [entry["path"].encode() for entry in content["files"]]
        if any(a >= b for a, b in itertools.pairwise(names)):
            raise ProvenanceError("paths are not in order, or one stands twice")
        for path in content["ignored"]:
            check_path(path)
        if not all(isinstance(p, dict) and sorted(p) == ["digest", "root"] for p in content["parents"]):
            raise ProvenanceError("parents are not told by digest and root")
        if content["root"] != _root(content["files"], content["algorithm"]):
            raise ProvenanceError("its Merkle root is not that of its files")
        return cls(**{name: content[name] for name in (*_FIELDS, "source")})

    def verify(
        self,
        root: str | os.PathLike[str],
        *,
        schema: str | os.PathLike[str] | None = None,
        same_commit: bool = False,
        ignore: Iterable[str] = (),
        threads: int | None = None,
        progress: bool = False,
        cache: str | os.PathLike[str] | None = None,
        audit_log: AppendsLines | None = None,
    ) -> Verification:
        """Compare a folder with the manifest; every file is named that is not as it was.

        Nothing is kept from one verification to the next, unless ``cache`` is given.

        Args:
            root: the folder that paths are told from.
            schema: file of the schema that the data is held against now; another one than the manifest's is a finding.
            same_commit: whether another git commit than the manifest's is a finding. It is a notice otherwise: the
                digests say already that the files are the same.
            ignore: further paths to leave out, of this verification alone.
            threads: Default: one a core.
            progress: whether to show a bar.
            cache: as of `build`; an attacker who can set times, or write to it, hides a change from it.
            audit_log: gets a line.

        Returns:
            What was found.

        Raises:
            OSError: the folder cannot be read.
        """
        top = os.path.abspath(root)
        left_out = {*self.ignored, *(check_path(p) for p in ignore)}
        found = walk(top, left_out)
        expected = {e["path"]: e for e in self.files if not _below(e["path"], left_out)}
        there = [p for p in found.files if "digest" in expected.get(p, {})]
        digests = hash_files(
            [os.path.join(top, p) for p in there],
            algorithm=self.algorithm,
            threads=threads,
            progress=progress,
            cache=cache,
        )
        findings = _compare(expected, found, dict(zip(there, digests, strict=True)), top)
        findings += self._other_schema(schema)
        commit = self._other_commit(top)
        findings += commit if same_commit else []
        notices = self._unread_schema(schema) + ([] if same_commit else commit)
        result = Verification(sorted(findings, key=lambda f: (f.path, f.kind)), len(there), notices)
        if audit_log is not None:
            audit_log.append("manifest.verify", manifest=self.digest, ok=result.ok, findings=len(findings))
        return result

    def _other_schema(self, schema: str | os.PathLike[str] | None) -> list[Finding]:
        if schema is None:
            return []
        path = os.fspath(schema)
        if self.schema is None:
            return [Finding("schema", path, "the manifest names no schema")]
        try:
            same = _plain_digest(schema) == self.schema
        except OSError as e:
            return [Finding("schema", path, f"it could not be read: {e.strerror or e}")]
        return [] if same else [Finding("schema", path, "it is another schema than the data was checked against")]

    def _unread_schema(self, schema: str | os.PathLike[str] | None) -> list[Finding]:
        if schema is not None or self.schema is None:
            return []
        return [Finding("schema", "", f"the data was checked against {self.schema}; no schema was given to compare")]

    def _other_commit(self, top: str) -> list[Finding]:
        if self.git_commit is None or (commit := _git_commit(top)) == self.git_commit:
            return []
        now = f"the checkout is at {commit}" if commit else "there is no checkout"
        return [Finding("git-commit", "", f"the manifest was built at {self.git_commit}; {now}")]

    def diff(self, newer: "Manifest") -> Diff:
        """What changed from this manifest to a newer one.

        Args:
            newer: a manifest by the same algorithm.

        Returns:
            Added, removed and changed paths, and renamed pairs.

        Raises:
            ValueError: the algorithms differ, so that digests say nothing.
        """
        if self.algorithm != newer.algorithm:
            raise ValueError(f"[diff] algorithms must be the same but are {self.algorithm} and {newer.algorithm}")
        a, b = ({e["path"]: (e.get("digest"), e.get("link")) for e in m.files} for m in (self, newer))
        added, removed = [p for p in b if p not in a], [p for p in a if p not in b]
        places: dict[Any, list[str]] = {}
        for path in added:
            places.setdefault(b[path], []).append(path)
        renamed = [(path, places[a[path]].pop(0)) for path in removed if places.get(a[path])]
        old, new = {p for p, _ in renamed}, {p for _, p in renamed}
        return Diff(
            [p for p in added if p not in new],
            [p for p in removed if p not in old],
            [p for p in a if p in b and a[p] != b[p]],
            renamed,
        )


def _top(paths: list[str]) -> str:
    if len(paths) == 1:
        return paths[0] if os.path.isdir(paths[0]) else os.path.dirname(paths[0])
    common = os.path.commonpath(paths)
    return common if os.path.isdir(common) else os.path.dirname(common)


def _together(paths: list[str], top: str, ignored: list[str]) -> Found:
    """What lies under all the paths, told from the root."""
    files: set[str] = set()
    links: dict[str, str] = {}
    special: dict[str, str] = {}
    for path in paths:
        inside = "" if path == top else os.path.relpath(path, top)
        if inside == ".." or inside.startswith("../"):
            raise ProvenanceError(f"[Manifest.build] {path!r} must lie below root {top!r} but does not")
        if inside and os.path.islink(path):
            links[inside] = os.readlink(path)
        elif os.path.isdir(path):
            below = [p[len(inside) + 1 :] if inside else p for p in ignored if not inside or p.startswith(inside + "/")]
            found = walk(path, below)
            prefix = f"{inside}/" if inside else ""
            files |= {prefix + p for p in found.files}
            links |= {prefix + p: target for p, target in found.links.items()}
            special |= {prefix + p: kind for p, kind in found.special.items()}
        elif os.path.isfile(path) or not os.path.lexists(path):
            files.add(inside)
        else:
            special[inside] = "no regular file"
    return Found([p for p in files if p not in ignored], links, special)


def _refuse(found: Found, top: str) -> None:
    for path in (*found.files, *found.links, *found.special):
        check_path(path)
    for path, target in sorted(found.links.items()):
        if leaves_root(top, path):
            raise ProvenanceError(f"[Manifest.build] link {path!r} must stay below {top!r} but points to {target!r}")
    for path, kind in sorted(found.special.items()):
        raise ProvenanceError(f"[Manifest.build] {path!r} must be a regular file but is {kind}")


def _entry(top: str, name: str, found: tuple[str, int] | Exception) -> dict[str, Any]:
    if isinstance(found, Exception):
        raise found
    entry: dict[str, Any] = {"path": name, "digest": found[0], "size": found[1]}
    if name.endswith(".safetensors"):
        entry["safetensors"] = read_header(os.path.join(top, name))
    return entry


def _root(entries: list[dict[str, Any]], algorithm: str) -> str:
    return merkle_root([encode(entry) for entry in entries], algorithm)


def _warn_of_twins(paths: list[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        first = seen.setdefault(look(path), path)
        if first != path:
            warnings.warn(
                f"[Manifest.build] {first!r} and {path!r} look the same; some file systems keep one of them",
                stacklevel=3,
            )


def _plain_digest(path: str | os.PathLike[str]) -> str:
    return str(hasher("sha256")(Path(path).read_bytes()).hexdigest())


def _git_commit(folder: str) -> str | None:
    """Commit of the checkout, if any. Nothing that the checkout's own settings name is run by rev-parse."""
    try:
        out = subprocess.run(
            ["git", "-C", folder, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def _check_entry(entry: Any) -> None:
    check_path(entry["path"])
    if sorted(entry) == ["link", "path"]:
        if not isinstance(entry["link"], str) or entry["link"].startswith("/"):
            raise ProvenanceError(f"link {entry['path']!r} must stay below the root but points to {entry['link']!r}")
        return
    if sorted(entry) not in (["digest", "path", "size"], ["digest", "path", "safetensors", "size"]):
        raise ProvenanceError(f"{entry['path']!r} has the fields {sorted(entry)}")
    size, digest = entry["size"], entry["digest"]
    if type(size) is not int or not 0 <= size < 2**63:
        raise ProvenanceError(f"size of {entry['path']!r} must be a number of bytes but is {size!r}")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ProvenanceError(f"digest of {entry['path']!r} must be 64 hexadecimal digits but is {digest!r}")


def _below(path: str, folders: set[str]) -> bool:
    parts = path.split("/")
    return any("/".join(parts[:i]) in folders for i in range(1, len(parts) + 1))


def _compare(
    expected: dict[str, dict[str, Any]], found: Found, digests: dict[str, tuple[str, int] | Exception], top: str
) -> list[Finding]:
    findings = [Finding("special", path, f"it is {kind}") for path, kind in found.special.items()]
    held = {e["digest"]: p for p, e in reversed(expected.items()) if "digest" in e}
    for path, digest in digests.items():
        if isinstance(digest, Exception):
            findings.append(Finding("unreadable", path, str(digest)))
        elif digest[0] != expected[path]["digest"]:
            other = held.get(digest[0])
            what = f"it holds what {other!r} should hold" if other else "its content is not what it was"
            findings.append(Finding("changed", path, what))
        elif digest[1] != expected[path]["size"]:
            findings.append(Finding("changed", path, f"it has {digest[1]} bytes, not {expected[path]['size']}"))
    for path, target in found.links.items():
        if leaves_root(top, path):
            findings.append(Finding("link", path, f"it is a link out of the root, to {target!r}"))
        elif path in expected and expected[path].get("link") != target:
            findings.append(Finding("link", path, f"it is a link to {target!r}, which it was not"))
    return findings + _names(expected, found, {f.path for f in findings})


def _names(expected: dict[str, dict[str, Any]], found: Found, told: set[str]) -> list[Finding]:
    """Names that are missing or new; a new name that looks like an old one is told as what it is."""
    there = {*found.files, *found.links, *found.special}
    missing = [p for p in expected if p not in there]
    looks = {look(p): p for p in [*(p for p in expected if p in there), *missing]}
    findings, explained = [], set()
    for path in there - set(expected) - told:
        twin = looks.get(look(path))
        if twin is None:
            findings.append(Finding("extra", path, "the manifest does not name it"))
        elif differ_in_case_only(twin, path):
            findings.append(Finding("case-rename", path, f"it differs in case alone from {twin!r}"))
        else:
            findings.append(Finding("unicode-twin", path, f"it looks like {twin!r} but is another name: {path!a}"))
        explained.add(twin)
    for path in missing:
        what = "it is not there under this name" if path in explained else "it is not there"
        findings.append(Finding("missing", path, what))
    for path in found.files:
        if "link" in expected.get(path, {}):
            findings.append(Finding("changed", path, "it was a link and is a file"))
    return findings
