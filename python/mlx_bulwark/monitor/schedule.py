"""When a held-out set is due again: after so many batches, or so much time."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any


class Schedule:
    """Says when something is due, without a thread: it is asked after each batch.

    What fell due several times while nobody asked is due once. After a restart the wait goes on where it stood.

    Args:
        every: Batches, or a ``timedelta``.
        clock: Seconds since 1970.

    Raises:
        ValueError: ``every`` is not above 0.

    Example:
        >>> from mlx_bulwark.monitor import Schedule
        >>> schedule = Schedule(3)
        >>> [schedule.due(batches) for batches in range(1, 8)]
        [False, False, True, False, False, True, False]
    """

    def __init__(self, every: int | timedelta, *, clock: Callable[[], float] = time.time) -> None:
        if isinstance(every, bool) or not isinstance(every, (int, timedelta)):
            raise ValueError(f"[Schedule] every must be batches or a timedelta but is {every!r}")
        self.every = every.total_seconds() if isinstance(every, timedelta) else every
        if not self.every > 0:
            raise ValueError(f"[Schedule] every must be above 0 but is {every}")
        self._by_time, self._clock = isinstance(every, timedelta), clock
        self._last = clock() if self._by_time else 0.0

    def due(self, batches: int) -> bool:
        """Whether it is due now; if so the next wait begins.

        Args:
            batches: So far, since the state began.
        """
        now = self._clock() if self._by_time else float(batches)
        if now < self._last:  # the clock was set back
            self._last = now
        if now - self._last < self.every:
            return False
        self._last = now
        return True

    def state(self) -> dict[str, Any]:
        """Return what ``load`` takes, as JSON values."""
        return {"last": self._last, "by_time": self._by_time}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned, unless that counted in another unit.

        Args:
            state: JSON values.
        """
        if state["by_time"] == self._by_time:
            self._last = float(state["last"])
