"""What a monitor says: alerts whose ids follow from what they say, and the cool-down that keeps them few."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, get_args

import numpy as np

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
ID_DIGITS = 32  # hexadecimal: 128 bits, so that no two alerts share an id by chance


@dataclass(frozen=True)
class Alert:
    """One alert.

    Its id is a hash of severity, source, message and details, not of the time: an alert that is found again after a
    crash has the id that it had, so that whoever receives both knows them for one. What tells two occurrences of a
    condition apart, such as the number of the batch, belongs in ``details``.

    Args:
        severity: ``"info"``, ``"warning"`` or ``"critical"``.
        source: What it is about, such as ``"accuracy"``.
        message: A sentence for a person.
        details: JSON values by name; ``"rule"`` names the rule that was broken. Numbers of NumPy become Python's, those
            that are not finite become words.
        time: Seconds since 1970.

    Attributes:
        id: 32 hexadecimal digits.

    Raises:
        ValueError: The severity is none, source or message are empty, or the details are not JSON.

    Example:
        >>> from mlx_bulwark.monitor import Alert
        >>> alert = Alert("warning", "accuracy", "it fell to 0.91", {"rule": "cusum", "batch": 7}, time=0.0)
        >>> alert.id == Alert("warning", "accuracy", "it fell to 0.91", {"batch": 7, "rule": "cusum"}, time=9.0).id
        True
    """

    severity: Severity
    source: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    time: float = field(default_factory=time.time)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"[Alert] severity must be one of {', '.join(SEVERITIES)} but is {self.severity!r}")
        if not self.source or not self.message:
            raise ValueError(f"[Alert] source and message must be words but are {self.source!r} and {self.message!r}")
        details = plain(dict(self.details))
        said = json.dumps([self.severity, self.source, self.message, details], sort_keys=True, allow_nan=False)
        object.__setattr__(self, "details", details)
        object.__setattr__(self, "time", float(self.time))
        object.__setattr__(self, "id", hashlib.sha256(said.encode()).hexdigest()[:ID_DIGITS])

    @property
    def rule(self) -> str:
        """The rule that was broken; empty where the details name none."""
        return str(self.details.get("rule", ""))

    def to_json(self) -> dict[str, Any]:
        """Return the alert as JSON values, the time also as ISO 8601 in UTC."""
        told = {name: getattr(self, name) for name in ("id", "time", "severity", "source")}
        at = datetime.fromtimestamp(self.time, timezone.utc).isoformat(timespec="milliseconds")
        return told | {"at": at, "message": self.message, "details": dict(self.details)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Alert":
        """Return the alert that ``to_json`` told.

        Args:
            content: JSON values.

        Raises:
            ValueError: A field is missing, or the id is not that of what the alert says.
        """
        try:
            names = ("severity", "source", "message", "details", "time")
            alert = cls(**{name: content[name] for name in names})
            said = content["id"]
        except (KeyError, TypeError) as e:
            raise ValueError(f"[Alert.from_json] content must be an alert but is not: {e}") from None
        if said != alert.id:
            raise ValueError(f"[Alert.from_json] id must be that of what the alert says, {alert.id}, but is {said!r}")
        return alert


def plain(value: Any) -> Any:
    """A value as JSON has it; numbers that are not finite as words, since an alert about them must not be lost."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"[Alert] details must be JSON values but have a {type(value).__name__}")


@dataclass
class _Held:
    since: float
    severity: Severity
    held: int


class Cooldown:
    """Let the first alert of a condition pass, and hold back its repetitions for a while.

    A condition is a source and a rule. An alert that is more severe than the one that passed passes at once, and so
    does every ``escalate_after``-th that would be held back, one severity higher: a condition that stays is worse than
    one that was.

    Args:
        seconds: How long repetitions are held back, from the alert that passed; 0 holds none back.
        escalate_after: Repetitions after which the severity rises; None never raises it.
        clock: Seconds; the wall clock, so that a restart does not end the wait.

    Raises:
        ValueError: ``seconds`` is negative or ``escalate_after`` is below 1.

    Example:
        >>> from mlx_bulwark.monitor import Alert, Cooldown
        >>> now = [0.0]
        >>> cooldown = Cooldown(60, escalate_after=2, clock=lambda: now[0])
        >>> alerts = [Alert("warning", "accuracy", "low", {"batch": i}) for i in range(3)]
        >>> [passed.severity if (passed := cooldown.admit(a)) else None for a in alerts]
        ['warning', None, 'critical']
    """

    def __init__(
        self, seconds: float = 300.0, *, escalate_after: int | None = 10, clock: Callable[[], float] = time.time
    ) -> None:
        if not seconds >= 0:
            raise ValueError(f"[Cooldown] seconds must be 0 or more but is {seconds}")
        if escalate_after is not None and escalate_after < 1:
            raise ValueError(f"[Cooldown] escalate_after must be 1 or more but is {escalate_after}")
        self.seconds, self.escalate_after, self._clock = float(seconds), escalate_after, clock
        self._held: dict[tuple[str, str], _Held] = {}

    def admit(self, alert: Alert) -> Alert | None:
        """Return what is to be told: the alert, the alert one severity higher, or None.

        Args:
            alert: An alert.
        """
        key, now = (alert.source, alert.rule), self._clock()
        last = self._held.get(key)
        if last is None or not 0 <= now - last.since < self.seconds:  # a clock that was set back must not silence us
            self._held[key] = _Held(now, alert.severity, 0)
            self._forget(now)
            return alert
        last.held += 1
        rank = SEVERITIES.index(alert.severity)
        if self.escalate_after is not None and last.held % self.escalate_after == 0 and rank + 1 < len(SEVERITIES):
            details = dict(alert.details) | {"repeated": last.held}
            alert = Alert(SEVERITIES[rank + 1], alert.source, alert.message, details, alert.time)
        if SEVERITIES.index(alert.severity) <= SEVERITIES.index(last.severity):
            return None
        last.severity = alert.severity
        return alert

    def _forget(self, now: float) -> None:
        """Keep what still holds something back: sources may be without number."""
        self._held = {k: v for k, v in self._held.items() if 0 <= now - v.since < self.seconds}

    def state(self) -> dict[str, Any]:
        """Return what is held back, as JSON values."""
        return {"held": [[*key, v.since, v.severity, v.held] for key, v in self._held.items()]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned.

        Args:
            state: JSON values.
        """
        self._held = {(s, r): _Held(since, severity, held) for s, r, since, severity, held in state["held"]}
