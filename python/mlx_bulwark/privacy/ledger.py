"""The ledger: a file of JSON lines, one durably written before each update is released.

A line holds the step, the sampling scheme and the mechanism with their settings, and nothing that depends on the data.
Lines are chained by checksums, so that one that was changed, lost or moved is found; who wants to forge a whole ledger
can, and the last lines can be cut off unseen: keep it where only the training can write.
"""

import fcntl
import hashlib
import json
import math
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .accounting import check_delta
from .events import ADJACENCY, Accountant, Discrete, Event, Run, composed_epsilon, releases_of
from .taps import PrivacyError

if TYPE_CHECKING:
    from ..provenance.manifest import AppendsLines

FORMAT, VERSION = "mlx-bulwark ledger", 1


class Entries(NamedTuple):
    """What a ledger holds: ``size`` bytes of whole lines, the last of which has the checksum ``chain``."""

    runs: tuple[Run, ...]
    steps: int
    size: int
    chain: str


def ledger_epsilon(path: str | os.PathLike[str], delta: float, accountant: Accountant | None = None) -> float:
    """Epsilon of all steps in a ledger file.

    Args:
        path: the file that a `PrivacyEngine` was given as ``ledger``. It may be in use.
        delta: probability of the (epsilon, delta) guarantee, in (0, 1).
        accountant: ``"pld"`` or ``"rdp"``. Default: ``"pld"``; ``"rdp"`` where noise is discrete.

    Returns:
        Epsilon under the adjacency of the sampling scheme.

    Raises:
        PrivacyError: a line was changed, lost or moved; the message gives its number.
        OSError: the file cannot be read.

    Example:
        >>> import os, tempfile, mlx_bulwark as bw
        >>> path = os.path.join(tempfile.mkdtemp(), "ledger.jsonl")
        >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0, ledger=path)
        >>> bw.ledger_epsilon(path, delta=1e-5)
        0.0
    """
    epsilon = spent_by(path, delta, accountant)["epsilon"]
    return math.inf if epsilon is None else float(epsilon)


def spent_by(
    path: str | os.PathLike[str], delta: float, accountant: str | None = None, points: int = 1
) -> dict[str, Any]:
    """What a ledger says, for the command ``mlx-bulwark budget``; an infinite epsilon is None.

    The curve of what was spent has ``points`` beside 0, each of which takes as long as the accounting of the last.
    """
    if accountant not in (None, "pld", "rdp"):
        raise ValueError(f"[ledger_epsilon] accountant must be 'pld' or 'rdp' but is {accountant!r}")
    entries = read_ledger(path)
    discrete = any(isinstance(run.event.mechanism, Discrete) for run in entries.runs)
    chosen: Accountant = "rdp" if accountant == "rdp" or (accountant is None and discrete) else "pld"
    check_delta("ledger_epsilon", delta)
    curve = _curve(entries.runs, delta, chosen, points)
    epsilon = curve["epsilon"][-1]
    adjacencies = dict.fromkeys(run.event.sampling.adjacency for run in entries.runs)
    return {
        "kind": "privacy",
        "epsilon": epsilon if epsilon < math.inf else None,
        "delta": delta,
        "accountant": chosen,
        "adjacency": "; ".join(adjacencies) or ADJACENCY,
        "steps": entries.steps,
        "torn": os.path.getsize(path) > entries.size,
        "curve": curve if epsilon < math.inf else None,
        "runs": [{"steps": run.steps, "session": run.session, **run.event.to_json()} for run in entries.runs],
    }


def _curve(runs: tuple[Run, ...], delta: float, accountant: Accountant, points: int) -> dict[str, list[float]]:
    """What was spent by some of the steps, the last among them."""
    total = sum(run.steps for run in runs)
    steps = sorted({total * i // points for i in range(points + 1)})
    spent = [composed_epsilon(releases_of(_first(runs, step)), delta, accountant) for step in steps]
    return {"step": [float(step) for step in steps], "epsilon": spent}


def _first(runs: tuple[Run, ...], steps: int) -> tuple[Run, ...]:
    """The first so many steps."""
    kept = []
    for run in runs:
        if steps <= 0:
            break
        kept.append(run._replace(steps=min(run.steps, steps)))
        steps -= run.steps
    return tuple(kept)


def read_ledger(path: str | os.PathLike[str]) -> Entries:
    """Read and verify a ledger. A last line without its end was never followed by an update, and is left out."""
    whole, _, _ = Path(path).read_bytes().rpartition(b"\n")
    size = len(whole) + 1 if whole else 0
    runs: list[Run] = []
    chain, steps = "", 0
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            entry = json.loads(line)
            if entry.pop("chain") != (chain := _chain(chain, entry)):
                raise ValueError("its checksum does not follow from the line before")
            if number == 1:
                _check_header(entry)
                continue
            if not isinstance(session := entry.pop("session"), int):
                raise ValueError(f"session {session!r} is not a number")
            if entry.pop("step") != (steps := steps + 1):
                raise ValueError(f"it should be step {steps}")
            run = Run(Event.from_json(entry), 1, session)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise PrivacyError(f"[ledger] {path} must be as it was written but line {number} is not: {e}") from None
        runs.append(run)
        if len(runs) > 1 and runs[-2]._replace(steps=1) == run:
            runs[-2:] = [run._replace(steps=runs[-2].steps + 1)]
    return Entries(tuple(runs), steps, size, chain)


class Ledger:
    """An open ledger file, held by this process alone."""

    def __init__(self, path: str | os.PathLike[str], audit_log: "AppendsLines | None" = None) -> None:
        self.path = os.fspath(path)
        self._audit_log = audit_log
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._close = weakref.finalize(self, os.close, self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise PrivacyError(
                f"[ledger] {self.path} must be in use by one engine at a time but is by another, here or in another "
                "process"
            ) from None
        entries = read_ledger(self.path)
        self.runs, self.steps, self._size, self._chain = entries
        self.session = self.runs[-1].session + 1 if self.runs else 0
        if not entries.size:
            self._write({"format": FORMAT, "version": VERSION})
            _sync_directory(self.path)

    def append(self, event: Event) -> None:
        """Write the line of the next step; when this returns, it is on the disk."""
        entry = {"step": self.steps + 1, "session": self.session, **event.to_json()}
        if self._audit_log is not None:
            # First, so that the ledger holds no step that the log does not know of.
            self._audit_log.append("privacy.step", ledger=os.path.abspath(self.path), follows=self._chain, **entry)
        self._write(entry)
        self.steps += 1

    def close(self) -> None:
        """Let go of the file."""
        self._close()

    @property
    def closed(self) -> bool:
        """Whether the file was let go of."""
        return not self._close.alive

    def _write(self, entry: dict[str, Any]) -> None:
        chain = _chain(self._chain, entry)
        line = json.dumps({**entry, "chain": chain}).encode() + b"\n"
        os.ftruncate(self._file, self._size)  # a line that was torn
        if os.pwrite(self._file, line, self._size) != len(line):
            raise OSError(f"[ledger] {self.path} must take a whole line but did not; is the disk full?")
        _sync(self._file)
        self._size, self._chain = self._size + len(line), chain


def _chain(previous: str, entry: dict[str, Any]) -> str:
    return hashlib.sha256(f"{previous} {json.dumps(entry, sort_keys=True)}".encode()).hexdigest()[:16]


def _check_header(entry: dict[str, Any]) -> None:
    if entry != {"format": FORMAT, "version": VERSION}:
        raise ValueError(f"it should name {FORMAT!r}, version {VERSION}")


def _sync(file: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves it in the drive's cache
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)
    else:
        os.fsync(file)


def _sync_directory(path: str) -> None:
    directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
