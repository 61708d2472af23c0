"""The audit log: JSON lines in a hash chain, on the disk before `AuditLog.append` returns.

A chain alone shows no truncation and no rewriting: who can write the file can write another. So heads, the count of
lines and the hash of the last, are signed and kept elsewhere, and a verification is told of one as its ``anchor``.
"""

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .keys import read_private, read_verifier
from .strict_json import ProvenanceError, decode, encode

FORMAT, VERSION = "mlx-bulwark audit log", 1
HEAD_FORMAT = "mlx-bulwark audit log head"
MAX_LINE = 1 << 20
MAX_FILE = 64 << 20
START = "0" * 64
WITHOUT_ANCHOR = "consistent; truncation or rewriting cannot be excluded"


@dataclass(frozen=True)
class Head:
    """End of a log: ``count`` lines, headers of files included, the last of which has the hash ``chain``."""

    count: int
    chain: str


@dataclass(frozen=True)
class LogVerification:
    """Result of `AuditLog.verify`.

    Attributes:
        verdict: in words; without an anchor never more than that the log is consistent.
        head: end of what is consistent.
        findings: what is not as it was written, by file and line.
        torn: bytes of a last line without its end, which nobody was told is written.
    """

    verdict: str
    head: Head
    findings: list[str] = field(default_factory=list)
    torn: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; a torn line is not."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return {
            "kind": "audit_log",
            "ok": self.ok,
            "verdict": self.verdict,
            "count": self.head.count,
            "chain": self.head.chain,
            "torn": self.torn,
            "findings": self.findings,
        }


class AuditLog:
    """An append-only log that several threads and processes may write to.

    Args:
        path: the file, made or continued. Beside it lie ``path.lock`` and, when it grew, ``path.1``, ``path.2``, ...,
            the oldest first.
        max_bytes: size at which a new file is begun, whose header carries the hash on.

    Raises:
        ProvenanceError: the file ends with something that is no line of a log.
        OSError: the file cannot be written.

    Example:
        >>> import os, tempfile
        >>> log = AuditLog(os.path.join(tempfile.mkdtemp(), "audit.jsonl"))
        >>> log.append("training.start", model="mlp").count
        2
        >>> log.access("train.npz", purpose="training").count
        3
        >>> anchor = log.head()
        >>> AuditLog.verify(log.path).verdict
        'consistent; truncation or rewriting cannot be excluded'
        >>> AuditLog.verify(log.path, anchor=anchor).verdict
        'consistent with the anchor'

    Source: Schneier and Kelsey, Secure Audit Logs to Support Computer Forensics, 1999.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE) -> None:
        if max_bytes < 1:
            raise ValueError(f"[AuditLog] max_bytes must be positive but is {max_bytes}")
        self.path = os.path.abspath(path)
        self._max_bytes = max_bytes
        self._threads = threading.Lock()
        self._known: tuple[int, int, Head] | None = None  # inode, size and head after our last line
        with self._locked() as file:
            self._end(file)

    def append(self, kind: str, /, **fields: Any) -> Head:
        """Write a line; when this returns, it is on the disk.

        Args:
            kind: what happened, such as ``"data.access"``.
            **fields: what JSON can hold. Give no secrets: the log is there to be read.

        Returns:
            The head that ends with this line.

        Raises:
            ProvenanceError: a field is not JSON, or the line is longer than 1 MiB.
            OSError: the line cannot be written; it may be found written all the same.
        """
        if not isinstance(kind, str) or not kind:
            raise ValueError(f"[append] kind must be a word but is {kind!r}")
        _check_fields(fields)
        with self._locked() as file:
            size, head = self._end(file)
            if size >= self._max_bytes and head.count:
                file, size, head = self._rotate(file, head)
            return self._write(file, size, head, _event(kind, fields))

    def access(self, data: str | os.PathLike[str], **fields: Any) -> Head:
        """Write down that data was read: `append` with the kind ``"data.access"``."""
        return self.append("data.access", data=os.fspath(data), **fields)

    def head(self) -> Head:
        """Count and hash of the log as it is now."""
        with self._locked() as file:
            return self._end(file)[1]

    def signed_head(self, key: str | os.PathLike[str]) -> dict[str, Any]:
        """The head, signed, to be kept where who writes the log cannot write.

        Args:
            key: file of an Ed25519 or HMAC key, of `new_key`.

        Returns:
            What `verify` takes as ``anchor``; it holds no key.
        """
        return sign_head(self.head(), key)

    @staticmethod
    def verify(
        path: str | os.PathLike[str],
        *,
        anchor: "Head | dict[str, Any] | str | os.PathLike[str] | None" = None,
        key: str | os.PathLike[str] | None = None,
    ) -> LogVerification:
        """Find every edit, deletion, reordering and, given an anchor, truncation.

        Args:
            path: the log. Rotated files beside it are verified with it. It may be in use.
            anchor: a head that was kept elsewhere: as such, as `signed_head` returned it, or a file that holds it.
            key: file of the key that the anchor is to be verified by: the public one, or the HMAC key.

        Returns:
            What was found.

        Raises:
            ProvenanceError: the anchor is no anchor, or is not signed by the key.
            OSError: a file cannot be read.
        """
        kept = None if anchor is None else read_anchor(anchor, key)
        return _verify(os.path.abspath(path), kept)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The current file, to which nobody else writes meanwhile."""
        # Opened for each line: a lock on a descriptor that fork handed on does not keep parent and child apart.
        with self._threads, contextlib.ExitStack() as stack:
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._open_file = file
            try:
                yield file
            finally:
                os.close(self._open_file)

    def _end(self, file: int) -> tuple[int, Head]:
        """Size and head of the file, which is begun or repaired where it must be."""
        found = os.fstat(file)
        if self._known and self._known[:2] == (found.st_ino, found.st_size):
            return found.st_size, self._known[2]
        size, line = _last_line(file, found.st_size)
        torn = os.pread(file, found.st_size - size, size)
        if torn:
            os.ftruncate(file, size)
        if line is None:
            head, size = self._begin(file)
        else:
            head = _head_of(line, self.path)
        if torn:
            head = self._write(file, size, head, _event("log.repair", _dropped(torn)))
            size = os.fstat(file).st_size
        self._known = (found.st_ino, size, head)
        return size, head

    def _begin(self, file: int) -> tuple[Head, int]:
        """Write the header, which goes on from the last of the rotated files."""
        rotated = _rotated(self.path)
        head = Head(0, START)
        if rotated:
            with open(rotated[-1], "rb") as f:
                line = _last_line(f.fileno(), os.fstat(f.fileno()).st_size)[1]
            if line is None:
                raise ProvenanceError(f"[AuditLog] {rotated[-1]} must end with a line of a log but does not")
            head = _head_of(line, rotated[-1])
        header = {"format": FORMAT, "version": VERSION, "file": len(rotated) + 1}
        head = self._write(file, 0, head, header)
        _sync_directory(self.path)
        return head, os.fstat(file).st_size

    def _rotate(self, file: int, head: Head) -> tuple[int, int, Head]:
        os.rename(self.path, f"{self.path}.{len(_rotated(self.path)) + 1}")
        os.close(file)
        self._open_file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        head, size = self._begin(self._open_file)
        return self._open_file, size, head

    def _write(self, file: int, size: int, head: Head, content: dict[str, Any]) -> Head:
        content = {"n": head.count + 1, **content}
        chain = _chain(head.chain, content)
        line = encode({**content, "chain": chain})
        if len(line) > MAX_LINE:
            raise ProvenanceError(f"[append] line must have at most {MAX_LINE} bytes but has {len(line)}")
        self._known = None
        if os.pwrite(file, line, size) != len(line):
            os.ftruncate(file, size)
            raise OSError(f"[append] {self.path} must take a whole line but did not; is the disk full?")
        _sync(file)
        self._known = (os.fstat(file).st_ino, size + len(line), Head(head.count + 1, chain))
        return self._known[2]


def sign_head(head: Head, key: str | os.PathLike[str]) -> dict[str, Any]:
    """A head with its signature."""
    private = read_private(key)
    content = {"format": HEAD_FORMAT, "count": head.count, "chain": head.chain}
    if isinstance(private, bytes):
        return {**content, "hmac": hmac.new(private, encode(content), hashlib.sha256).hexdigest()}
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not isinstance(private, Ed25519PrivateKey):
        raise ProvenanceError(f"[sign_head] {os.fspath(key)} must be an Ed25519 or HMAC key but is another")
    return {**content, "ed25519": private.sign(encode(content)).hex()}


def read_anchor(anchor: "Head | dict[str, Any] | str | os.PathLike[str]", key: str | os.PathLike[str] | None) -> Head:
    """The head of an anchor, whose signature holds if there is a key."""
    if isinstance(anchor, Head):
        content: Any = {"format": HEAD_FORMAT, "count": anchor.count, "chain": anchor.chain}
    elif isinstance(anchor, dict):
        content = anchor
    else:
        content = decode(Path(anchor).read_bytes(), f"[verify] anchor {os.fspath(anchor)}", max_bytes=MAX_LINE)
    signatures = {k: v for k, v in content.items() if k in ("hmac", "ed25519")} if isinstance(content, dict) else {}
    head = {k: v for k, v in content.items() if k not in signatures} if isinstance(content, dict) else {}
    if (
        sorted(head) != ["chain", "count", "format"]
        or head["format"] != HEAD_FORMAT
        or type(head["count"]) is not int
        or not isinstance(head["chain"], str)
        or not re.fullmatch("[0-9a-f]{64}", head["chain"])
        or head["count"] < 1
    ):
        raise ProvenanceError("[verify] anchor must be the head of a log but is not")
    if key is not None:
        _check_signature(head, signatures, key)
    return Head(head["count"], head["chain"])


def _check_signature(head: dict[str, Any], signatures: dict[str, Any], key: str | os.PathLike[str]) -> None:
    verifier = read_verifier(key)
    refused = ProvenanceError(f"[verify] anchor must be signed by {os.fspath(key)} but is not")
    if isinstance(verifier, bytes):
        expected = hmac.new(verifier, encode(head), hashlib.sha256).hexdigest()
        if list(signatures) != ["hmac"] or not hmac.compare_digest(expected, str(signatures["hmac"])):
            raise refused
        return
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signature = signatures.get("ed25519")
    whole = list(signatures) == ["ed25519"] and isinstance(signature, str) and re.fullmatch("[0-9a-f]{128}", signature)
    if not whole or not isinstance(verifier, Ed25519PublicKey):
        raise refused
    try:
        verifier.verify(bytes.fromhex(str(signature)), encode(head))
    except InvalidSignature:
        raise refused from None


def lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Whole lines of a log and of its rotated files, as they were written; verify the log first."""
    for file in (*_rotated(os.path.abspath(path)), os.path.abspath(path)):
        if not os.path.exists(file):
            continue
        with open(file, "rb") as f:
            while (line := f.readline(MAX_LINE + 1)).endswith(b"\n"):
                yield decode(line, f"[log] {file}", max_bytes=MAX_LINE)


def _verify(path: str, anchor: Head | None) -> LogVerification:
    rotated, head, at_anchor = _rotated(path), Head(0, START), False
    findings: list[str] = []
    torn = 0
    if not os.path.exists(path) and not rotated:
        raise FileNotFoundError(2, os.strerror(2), path)
    files = [*rotated, *([path] if os.path.exists(path) else [])]
    for number, file in enumerate(files, 1):
        with open(file, "rb") as f:
            row = 0
            while line := f.readline(MAX_LINE + 1):
                row += 1
                if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                    torn = len(line)
                    if file != path:
                        findings.append(f"{file}, line {row}: it has no end, and a newer file follows")
                    break
                try:
                    head = _follow(head, line, number if row == 1 else None)
                except ProvenanceError as e:
                    findings.append(f"{file}, line {row}: {e}")
                    return LogVerification("tampered with", head, findings)
                if anchor and head.count == anchor.count:
                    at_anchor = True
                    if not hmac.compare_digest(head.chain, anchor.chain):
                        findings.append(f"{file}, line {row}: it is not the line that the anchor names")
                        return LogVerification("rewritten: the anchor is of another log", head, findings)
    if anchor and not at_anchor:
        findings.append(f"{path}: it ends after {head.count} lines, but the anchor is of {anchor.count}")
        return LogVerification("truncated", head, findings, torn)
    if findings:
        return LogVerification("tampered with", head, findings, torn)
    return LogVerification("consistent with the anchor" if anchor else WITHOUT_ANCHOR, head, findings, torn)


def _follow(head: Head, line: bytes, header_of: int | None) -> Head:
    """The head after a line, which must follow from the one before."""
    content = decode(line, "it", max_bytes=MAX_LINE)
    if not isinstance(content, dict) or "chain" not in content:
        raise ProvenanceError("it is no line of a log")
    chain = content.pop("chain")
    if content.get("n") != head.count + 1:
        raise ProvenanceError(f"it should be line {head.count + 1} of the log but is {content.get('n')!r}")
    if chain != _chain(head.chain, content):
        raise ProvenanceError("its hash does not follow from the line before")
    if header_of is not None:
        expected = {"n": head.count + 1, "format": FORMAT, "version": VERSION, "file": header_of}
        if content != expected:
            raise ProvenanceError(f"it should be the header of file {header_of}")
    elif sorted(content) != ["fields", "kind", "n", "time"]:
        raise ProvenanceError(f"it has the names {sorted(content)}")
    return Head(head.count + 1, chain)


def _chain(previous: str, content: dict[str, Any]) -> str:
    return hashlib.sha256(previous.encode() + b" " + encode(content)).hexdigest()


def _event(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
    return {"time": now, "kind": kind, "fields": fields}


def _dropped(torn: bytes) -> dict[str, Any]:
    return {"dropped_bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}


def _check_fields(fields: dict[str, Any]) -> None:
    try:
        raw = encode(fields)
        decode(raw, "fields", max_bytes=MAX_LINE)
    except (TypeError, ValueError, RecursionError) as e:
        raise ProvenanceError(f"[append] fields must be what JSON can hold but are not: {e}") from None


def _last_line(file: int, size: int) -> tuple[int, bytes | None]:
    """Where whole lines end, and the last of them."""
    start, tail = size, b""
    while start > 0 and tail.count(b"\n") < 2:
        if len(tail) > 3 * MAX_LINE:
            raise ProvenanceError("[AuditLog] file must end with lines of a log but does not")
        step = min(1 << 16, start)
        start -= step
        tail = os.pread(file, step, start) + tail
    whole, newline, _ = tail.rpartition(b"\n")
    if not newline:
        return 0, None
    return start + len(whole) + 1, whole.rpartition(b"\n")[2] + b"\n"


def _head_of(line: bytes, path: str) -> Head:
    content = decode(line, f"[AuditLog] last line of {path}", max_bytes=MAX_LINE)
    try:
        count, chain = content["n"], content["chain"]
        if type(count) is not int or not re.fullmatch("[0-9a-f]{64}", chain):
            raise TypeError
    except (TypeError, KeyError):
        raise ProvenanceError(f"[AuditLog] {path} must end with a line of a log but does not") from None
    return Head(count, chain)


def _rotated(path: str) -> list[str]:
    """Older files, the oldest first; a gap ends the list, and the chain shows it."""
    found: list[str] = []
    while os.path.exists(file := f"{path}.{len(found) + 1}"):
        found.append(file)
    return found


def _sync(file: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves it in the drive's cache
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)
    else:
        os.fsync(file)


def _sync_directory(path: str) -> None:
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
