"""Digests of files on all cores, and the Merkle root over what was found."""

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from .strict_json import ProvenanceError

Algorithm = Literal["sha256", "blake3"]
ALGORITHMS = ("sha256", "blake3")
BUFFER = 1 << 20
RACY = 100_000_000  # nanoseconds: a file that changed this shortly before could change again under the same time stamp


def hasher(algorithm: str) -> Callable[..., Any]:
    """The constructor of a hash."""
    if algorithm == "sha256":
        return hashlib.sha256
    if algorithm != "blake3":
        raise ValueError(f"[provenance] algorithm must be one of {', '.join(ALGORITHMS)} but is {algorithm!r}")
    try:
        from blake3 import blake3
    except ImportError:
        raise ImportError('algorithm="blake3" needs blake3; pip install "mlx-bulwark[provenance]" brings it') from None
    return blake3


def file_digest(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Digest of one regular file.

    Args:
        path: the file; a link or anything else that is no regular file is refused.
        algorithm: ``"sha256"`` or ``"blake3"``.

    Returns:
        Hexadecimal digits.

    Raises:
        ProvenanceError: it is no regular file.
        OSError: it cannot be read.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a")
        >>> _ = path.write_bytes(b"abc")
        >>> file_digest(path)[:16]
        'ba7816bf8f01cfea'

    Source: FIPS 180-4; the BLAKE3 paper, 2020.
    """
    return _digest(path, hasher(algorithm), bytearray(BUFFER))[0]


def _digest(path: str | os.PathLike[str], new: Callable[..., Any], buffer: bytearray) -> tuple[str, int, list[int]]:
    # A pipe with no writer would block the open, and a link could have been put there since the folder was listed.
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = os.fstat(file)
        if not stat.S_ISREG(before.st_mode):
            raise ProvenanceError(f"[provenance] {os.fspath(path)!r} must be a regular file but is not")
        digest, size, view = new(), 0, memoryview(buffer)
        while count := os.readv(file, [buffer]):
            digest.update(view[:count])
            size += count
        after = _identity(os.fstat(file))
    finally:
        os.close(file)
    return digest.hexdigest(), size, after if after == _identity(before) else []


def _identity(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


class HashCache:
    """Digests by size, times and inode in a file of JSON lines, appended to while files are hashed.

    An interrupted run that is started again with the same file hashes only what is left. Who can write to the file, or
    set clocks back, decides what is believed: it is for unchanged data of one's own, and used on request only.
    """

    def __init__(self, path: str | os.PathLike[str], algorithm: str) -> None:
        self._algorithm = algorithm
        self._known: dict[str, tuple[list[int], str]] = {}
        self._lock = threading.Lock()
        content = Path(path).read_bytes() if os.path.exists(path) else b""
        for line in content.split(b"\n"):
            try:
                name, used, identity, digest = json.loads(line)
            except ValueError:  # the line that an interrupted run did not finish
                continue
            if used == algorithm:
                self._known[name] = (identity, digest)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # open as long as this object
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def find(self, path: str) -> tuple[str, int] | None:
        """Digest and size of a file that is as it was."""
        found = os.lstat(path)
        identity, digest = self._known.get(path, ([], ""))
        return (digest, found.st_size) if identity == _identity(found) and stat.S_ISREG(found.st_mode) else None

    def add(self, path: str, identity: list[int], digest: str) -> None:
        """Remember a digest, unless the file was just written."""
        if identity and max(identity[1:3]) < time.time_ns() - RACY:
            with self._lock:
                self._file.write(json.dumps([path, self._algorithm, identity, digest]).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def hash_files(
    paths: Sequence[str],
    *,
    algorithm: str = "sha256",
    threads: int | None = None,
    progress: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> list[tuple[str, int] | Exception]:
    """Digest and size of each file, or the error that it gave, in the order of ``paths``."""
    new = hasher(algorithm)
    known = None if cache is None else HashCache(cache, algorithm)
    bar = _bar(paths) if progress else None
    local = threading.local()

    def one(path: str) -> tuple[str, int] | Exception:
        try:
            found = known.find(path) if known else None
            if found is None:
                if not hasattr(local, "buffer"):
                    local.buffer = bytearray(BUFFER)
                digest, size, identity = _digest(path, new, local.buffer)
                found = (digest, size)
                if known:
                    known.add(path, identity, digest)
        except (OSError, ProvenanceError) as e:
            return e
        if bar is not None:
            bar.update(found[1])
        return found

    def some(numbers: range) -> list[tuple[str, int] | Exception]:
        return [one(paths[i]) for i in numbers]

    workers = threads or _cores()
    piece = max(1, min(64, len(paths) // (8 * workers)))
    pieces = [range(i, min(i + piece, len(paths))) for i in range(0, len(paths), piece)]
    pool = ThreadPoolExecutor(workers)
    try:
        return [found for batch in pool.map(some, pieces) for found in batch]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for files that nobody will ask for
        if bar is not None:
            bar.close()
        if known:
            known.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bar(paths: Iterable[str]) -> Any:
    from tqdm import tqdm

    total = sum(os.lstat(path).st_size for path in paths if os.path.lexists(path))
    return tqdm(total=total, unit="B", unit_scale=True, desc="hashing")


def merkle_root(leaves: Sequence[bytes], algorithm: str = "sha256") -> str:
    """Root of the Merkle tree over a list of byte strings.

    Leaves are hashed behind a byte 0 and nodes behind a byte 1, so that no list can be given out for another.

    Args:
        leaves: what the tree is over, in its order.
        algorithm: ``"sha256"``, which makes it the tree of RFC 6962, or ``"blake3"``.

    Returns:
        Hexadecimal digits.

    Example:
        >>> merkle_root([])[:16]
        'e3b0c44298fc1c14'
        >>> merkle_root([b""])[:16]
        '6e340b9cffb37a98'

    Source: RFC 6962, section 2.1.
    """
    new = hasher(algorithm)
    level = [new(b"\0" + leaf).digest() for leaf in leaves]
    if not level:
        return str(new(b"").hexdigest())
    # RFC 6962 splits at the largest power of two; level by level, with an odd last node carried up, that is the same.
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        level = [new(b"\1" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)] + odd
    return str(level[0].hex())
