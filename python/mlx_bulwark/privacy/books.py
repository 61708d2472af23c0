"""What has been spent: runs of steps, each under one event."""

import math
import os

from .events import Accountant, Event, Run, composed_epsilon, releases_of
from .taps import PrivacyError


class Books:
    """Counts steps and the events they were charged under.

    The steps are counted where they happen: here for eager and compiled steps of the engine, and in the engine's state
    by a compiled step of the user's own, where no Python runs.
    """

    def __init__(self, event: Event, accountant: Accountant, planned_steps: int | None) -> None:
        self.event, self.accountant, self.planned_steps = event, accountant, planned_steps
        self._closed: list[Run] = []  # runs of events that are over
        self._closed_steps = 0
        self._process = os.getpid()

    def runs(self, steps: int) -> tuple[Run, ...]:
        """Return the composition of the first ``steps`` steps, all that were charged."""
        return (*self._closed, Run(self.event, steps - self._closed_steps))

    def change_event(self, event: Event, steps: int) -> None:
        """Charge the steps after the first ``steps`` under another event."""
        if event == self.event:
            return
        if steps > self._closed_steps:
            self._closed.append(Run(self.event, steps - self._closed_steps))
            self._closed_steps = steps
        self.event = event

    def epsilon(self, steps: int, delta: float) -> float:
        """Epsilon of the first ``steps`` steps."""
        return composed_epsilon(releases_of(self.runs(steps)), delta, self.accountant)

    def admit(self, steps: int) -> None:
        """Refuse the step after the first ``steps`` where it is not planned. Nothing is spent by asking."""
        self.refuse_fork()
        if steps >= (math.inf if self.planned_steps is None else self.planned_steps):
            raise PrivacyError(
                f"[update] steps must stay within the {self.planned_steps} planned ones but the next would be "
                f"step {steps + 1}"
            )

    def refuse_fork(self) -> None:
        """Refuse to go on in a forked process: it holds the same key and counter."""
        if os.getpid() != self._process:
            raise PrivacyError(
                "[PrivacyEngine] engine must stay in the process that made it but was carried into a fork, where it "
                "would repeat the parent's noise"
            )
