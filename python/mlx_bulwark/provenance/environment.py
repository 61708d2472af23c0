"""What code ran: installed distributions verified against their own records, lockfile and preprocessing code."""

import base64
import csv
import hashlib
import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, NamedTuple

from .hashing import file_digest, hash_files
from .manifest import AppendsLines, Finding, Verification
from .strict_json import ProvenanceError

IMPORTED = (".py", ".pth", ".so", ".pyd", ".dylib")


class _Installed(NamedTuple):
    name: str
    version: str
    record: bytes | None
    files: dict[str, str | None]  # by full path, the SHA-256 that RECORD has


def capture_environment(
    *,
    lockfile: str | os.PathLike[str] | None = None,
    code: Iterable[str | os.PathLike[str]] = (),
    site: Iterable[str | os.PathLike[str]] | None = None,
) -> dict[str, Any]:
    """Write down what code runs here, for `Manifest.build` as ``environment``.

    Args:
        lockfile: the file that the environment was installed from.
        code: files of the preprocessing, told by the paths that are given.
        site: folders to look for distributions in. Default: those of ``sys.path``.

    Returns:
        Version of Python, digests of lockfile and code, and of each distribution its version and the SHA-256 of its
        RECORD, None where it has none.

    Raises:
        OSError: a file cannot be read.

    Example:
        >>> import numpy as np
        >>> environment = capture_environment()
        >>> environment["distributions"]["numpy"]["version"] == np.__version__
        True

    Source: the format of RECORD, PEP 376 and PEP 427.
    """
    installed = {
        i.name: {"version": i.version, "record": None if i.record is None else hashlib.sha256(i.record).hexdigest()}
        for i in _installed(site)
    }
    return {
        "python": platform.python_version(),
        "lockfile": None if lockfile is None else {"path": os.fspath(lockfile), "digest": file_digest(lockfile)},
        "code": {os.fspath(path): file_digest(path) for path in code},
        "distributions": installed,
    }


def verify_environment(
    captured: dict[str, Any] | None = None,
    *,
    site: Iterable[str | os.PathLike[str]] | None = None,
    threads: int | None = None,
    progress: bool = False,
    audit_log: AppendsLines | None = None,
) -> Verification:
    """Compare installed files with the records of their distributions, and these with what was captured.

    Found are files that changed or are missing, modules that no distribution names, and distributions that came, went
    or changed. Bytecode is not looked at: ``python -B`` with ``PYTHONPYCACHEPREFIX`` on an empty folder reads none.

    Args:
        captured: what `capture_environment` returned. Default: only files and records are compared.
        site: folders to look for distributions in. Default: those of ``sys.path``.
        threads: Default: one a core.
        progress: whether to show a bar.
        audit_log: gets a line.

    Returns:
        What was found, by paths of files and names of distributions.

    Raises:
        ProvenanceError: what was captured is no environment.
    """
    installed = list(_installed(site))
    listed = {path: (i.name, digest) for i in installed for path, digest in i.files.items() if digest}
    there = [path for path in listed if os.path.isfile(path)]
    # An installer may have put a link to its cache in the place of a file; what counts is what Python would read.
    found = hash_files([os.path.realpath(path) for path in there], threads=threads, progress=progress)
    findings = [
        Finding("missing", path, f"{listed[path][0]} lists it, but it is not there")
        for path in sorted(set(listed) - set(there))
    ]
    for path, result in zip(there, found, strict=True):
        name, expected = listed[path]
        if isinstance(result, Exception):
            findings.append(Finding("unreadable", path, str(result)))
        elif result[0] != expected:
            findings.append(Finding("changed", path, f"it is not what {name} lists"))
    findings += _unowned(installed)
    if captured is not None:
        findings += _since(captured, installed)
    result_all = Verification(sorted(findings, key=lambda f: (f.path, f.kind)), len(there))
    if audit_log is not None:
        audit_log.append("environment.verify", ok=result_all.ok, findings=len(findings))
    return result_all


def _installed(site: Iterable[str | os.PathLike[str]] | None) -> Iterator[_Installed]:
    found = distributions() if site is None else distributions(path=[os.fspath(s) for s in site])
    seen = set()
    for each in found:
        name = str(each.metadata["Name"] or "").lower().replace("_", "-")
        if name and name not in seen:  # the first on the path is the one that is imported
            seen.add(name)
            record = each.read_text("RECORD")
            yield _Installed(name, each.version, None if record is None else record.encode(), _files(each, record))


def _files(each: Distribution, record: str | None) -> dict[str, str | None]:
    files: dict[str, str | None] = {}
    for row in csv.reader((record or "").splitlines()):
        if row:
            path = os.path.abspath(str(each.locate_file(row[0])))
            method, _, digest = row[1].partition("=") if len(row) > 1 else ("", "", "")
            files[path] = _hexadecimal(digest) if method == "sha256" else None
    return files


def _hexadecimal(digest: str) -> str:
    try:
        return base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()
    except ValueError:
        return f"not base64: {digest}"


def _unowned(installed: list[_Installed]) -> list[Finding]:
    """What Python would import or run at its start, lying beside distributions without being listed by one."""
    owned = {path for i in installed for path in i.files}
    tops = {str(Path(path).parents[1]) for path in owned if path.endswith(".dist-info/RECORD")}
    found = {
        os.path.join(folder, name)
        for top in tops
        for folder, _, names in os.walk(top)
        for name in names
        if name.endswith(IMPORTED)
    }
    return [Finding("extra", path, "no distribution lists it") for path in sorted(found - owned)]


def _since(captured: dict[str, Any], installed: list[_Installed]) -> list[Finding]:
    try:
        before, now = dict(captured["distributions"]), {i.name: i for i in installed}
        findings = [Finding("missing", n, "it was installed and is not") for n in sorted(set(before) - set(now))]
        findings += [Finding("extra", n, "it is installed and was not") for n in sorted(set(now) - set(before))]
        for name in sorted(set(before) & set(now)):
            record = now[name].record
            digest = None if record is None else hashlib.sha256(record).hexdigest()
            if before[name]["version"] != now[name].version:
                message = f"version {now[name].version} is installed, not {before[name]['version']}"
                findings.append(Finding("changed", name, message))
            elif before[name]["record"] != digest:
                findings.append(Finding("changed", name, "its RECORD is another, though the version is the same"))
        if captured["python"] != platform.python_version():
            message = f"version {platform.python_version()} runs, not {captured['python']}"
            findings.append(Finding("changed", "python", message))
        named = dict(captured["code"])
        if captured["lockfile"] is not None:
            named[captured["lockfile"]["path"]] = captured["lockfile"]["digest"]
    except (KeyError, TypeError, ValueError) as e:
        raise ProvenanceError(f"[verify_environment] captured must be an environment but is not: {e!r}") from None
    return findings + [f for path, digest in named.items() for f in _file(path, digest)]


def _file(path: str, digest: str) -> list[Finding]:
    try:
        same = file_digest(path) == digest
    except (OSError, ProvenanceError) as e:
        return [Finding("missing", path, f"it cannot be read: {e}")]
    return [] if same else [Finding("changed", path, "its content is not what it was")]
