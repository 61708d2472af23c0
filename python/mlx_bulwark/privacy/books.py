"""What has been spent, what may be: runs of steps, each under one event, the plan, the target and the ledger."""

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .accounting import MOST_STEPS, calibrate, check_delta, check_epsilon, most_steps
from .events import Accountant, Banded, Event, Run, composed_epsilon, integer_rdp_epsilon, joined, releases_of
from .ledger import Ledger
from .plan import Plan
from .taps import PrivacyError

FORMAT, VERSION = "mlx-bulwark engine state", 1
AHEAD = 1024  # steps that are looked at together where none are planned
FAR = 1 << 16  # most steps that are planned from a schedule without an end


class Books:
    """Counts steps and the events they were charged under.

    A step that was charged stays charged. The steps are counted here, except where a compiled step of the user's own
    runs and no Python does: that counts them in the engine's state, which `refresh` reads.
    """

    def __init__(
        self,
        plan: Plan,
        accountant: Accountant,
        *,
        planned_steps: int | None = None,
        delta: float | None = None,
        target_epsilon: float | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.plan = plan
        self.accountant, self.planned_steps = accountant, planned_steps
        self.delta, self.target_epsilon = delta, target_epsilon
        self.ledger = ledger
        self._closed: tuple[Run, ...] = ledger.runs if ledger else ()
        self._closed_steps = self.steps = ledger.steps if ledger else 0
        self.session = ledger.session if ledger else 0
        self.session_start = self.steps
        self._admitted = 0  # the target is known to hold for so many steps
        self.event = plan.event_at(self.steps)
        self._process = os.getpid()

    def rehearsal(self) -> "Books":
        """Books for steps that are thrown away: the next step's event again and again, without limits or a ledger."""
        mechanism = self.event.mechanism
        plan = replace(self.plan, noise_multiplier=mechanism.noise_multiplier, max_grad_norm=mechanism.max_grad_norm)
        return Books(plan, self.accountant)

    @property
    def needs_python(self) -> bool:
        """Whether something must happen before each step that a compiled function cannot do."""
        return self.plan.scheduled or self.ledger is not None or self.target_epsilon is not None

    @property
    def runs(self) -> tuple[Run, ...]:
        """The composition of all steps that were charged."""
        return joined([*self._closed, Run(self.event, self.steps - self._closed_steps, self.session)])

    def epsilon(self, delta: float) -> float:
        """Epsilon of all steps that were charged."""
        return composed_epsilon(releases_of(self.runs), delta, self.accountant)

    def remaining(self) -> int | None:
        """Return how many more steps the plan and the target allow; None where nothing limits them."""
        limits = []
        if self.planned_steps is not None:
            limits.append(max(0, self.planned_steps - self.steps))
        if self.target_epsilon is not None:
            endless = FAR if self.plan.scheduled else MOST_STEPS
            limits.append(self._affordable(limits[0] if limits else endless))
        return min(limits, default=None)

    def admit(self) -> None:
        """Refuse the next step where it must not happen. Nothing is spent by asking."""
        self.refuse_fork()
        if self.ledger is not None and self.ledger.closed:
            raise PrivacyError("[update] engine must be open but was closed, and its ledger with it")
        if self.planned_steps is not None and self.steps >= self.planned_steps:
            raise PrivacyError(
                f"[update] steps must stay within the {self.planned_steps} planned ones but the next would be "
                f"step {self.steps + 1}"
            )
        if self.target_epsilon is not None and self.steps >= self._admitted:
            ahead = AHEAD if self.planned_steps is None else self.planned_steps - self.steps
            self._admitted = self.steps + self._affordable(ahead)
            if self.steps >= self._admitted:
                raise PrivacyError(
                    f"[update] epsilon must stay within the target {self.target_epsilon:g} at delta {self.delta:g} "
                    f"but step {self.steps + 1} would pass it"
                )

    def charge(self) -> None:
        """Count the next step; with a ledger, its line is on the disk first."""
        if self.ledger is not None:
            self.ledger.append(self.event)
        self.steps += 1

    def advance(self) -> bool:
        """Turn to the event of the next step; tell whether it is another than before."""
        return self.plan.scheduled and self.change_event(self.plan.event_at(self.steps))

    def change_event(self, event: Event) -> bool:
        """Charge the steps from now on under another event; tell whether it is another."""
        if event == self.event:
            return False
        if isinstance(self.event.mechanism, Banded) and self.steps > self.session_start:
            raise PrivacyError("[PrivacyEngine] banded noise must keep its scale for the whole run but would change")
        if event.releases(0, 1) != self.event.releases(0, 1) and not self.plan.scheduled:
            self._admitted = 0
        self._closed, self._closed_steps, self.event = self.runs, self.steps, event
        return True

    def resume_session(self, session: int, first: int) -> None:
        """Go on in the last session of the ledger, which began after ``first`` steps, under its own key."""
        last = self._closed[-1] if self._closed else None
        if self.steps == first and self.session == session:
            return
        if last is None or last.session != session or last.event != self.event or self.steps - last.steps != first:
            raise PrivacyError(
                "[PrivacyEngine] noise_key_file must be of the run that the ledger ends with, with the same settings, "
                "but is not"
            )
        self.session, self.session_start = session, first
        if self.ledger is not None:  # of several ranks the first has it
            self.ledger.session = session

    def refuse_fork(self) -> None:
        """Refuse to go on in a forked process: it holds the same key and counter."""
        if os.getpid() != self._process:
            raise PrivacyError(
                "[PrivacyEngine] engine must stay in the process that made it but was carried into a fork, where it "
                "would repeat the parent's noise"
            )

    def spent(self) -> dict[str, Any]:
        """All steps that were charged, for JSON."""
        runs = [{"steps": r.steps, "session": r.session, **r.event.to_json()} for r in self.runs if r.steps]
        return {"steps": self.steps, "runs": runs}

    def follow(self, spent: dict[str, Any]) -> None:
        """Take over the steps of other books, which were charged in earlier sessions."""
        if spent == self.spent():
            return
        self._take_over(tuple(_saved_run(dict(r)) for r in spent["runs"]))

    def _take_over(self, runs: tuple[Run, ...]) -> None:
        self._closed, self._closed_steps = runs, sum(r.steps for r in runs)
        self.session = runs[-1].session + 1 if runs else 0
        self.steps = self.session_start = self._closed_steps
        self.event = self.plan.event_at(self.steps)

    def save(self, path: str | os.PathLike[str], dataset_size: int, found_norm: float | None) -> None:
        """Write what was spent, and a norm that was found, to a JSON file; a crash leaves the old file or the new."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "dataset_size": dataset_size,
            "accountant": self.accountant,
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "planned_steps": self.planned_steps,
            "found_norm": found_norm,
            **self.spent(),
        }
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}.new")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)

    def load(self, path: str | os.PathLike[str], dataset_size: int) -> float | None:
        """Take over what was spent; where there is a ledger, it knows more, and must know no less.

        Returns the clipping norm that had been found.
        """
        runs, found_norm = _saved_runs(path, dataset_size)
        if self.ledger is not None:
            if not _begins_with(self.runs, runs):
                raise PrivacyError(
                    f"[load_state] ledger must hold the steps of {os.fspath(path)} but does not: lines are lost, or it "
                    "is another run's"
                )
            return found_norm
        if self.steps:
            raise PrivacyError(f"[load_state] engine must have taken no step but has taken {self.steps}")
        self._take_over(runs)
        return found_norm

    def _affordable(self, most: int) -> int:
        target, delta = self.target_epsilon, self.delta
        assert target is not None
        assert delta is not None
        spent = self.runs

        def ahead(k: int) -> list[Run]:
            if self.plan.scheduled:
                return [*spent, *self.plan.runs(self.steps, k, self.session)]
            return [*spent, Run(self.event, k, self.session)]

        return _most_steps(target, delta, self.accountant, ahead, self.planned_steps or AHEAD, most)


def steps_for(epsilon: float, delta: float, accountant: Accountant, runs: Callable[[int, int], list[Run]]) -> int:
    """Most steps of ``runs(first, count)`` that stay within a target."""
    check_epsilon("for_epsilon", epsilon)
    check_delta("for_epsilon", delta)
    return _most_steps(epsilon, delta, accountant, lambda k: runs(0, k), AHEAD, MOST_STEPS)


def noise_for(epsilon: float, delta: float, accountant: Accountant, runs: Callable[[float], list[Run]]) -> float:
    """Smallest scale at which ``runs(scale)`` stays within a target."""
    check_delta("for_epsilon", delta)
    return calibrate(epsilon, delta, accountant, lambda scale: releases_of(runs(scale)))


def _most_steps(
    target: float,
    delta: float,
    accountant: Accountant,
    runs: Callable[[int], list[Run]],
    guess: int,
    most: int,
) -> int:
    if not most:
        return 0
    releases = functools.lru_cache(lambda k: releases_of(joined(runs(k))))
    if accountant == "pld":  # RDP's answer is close, and quick
        guess = most_steps(target, lambda k: integer_rdp_epsilon(releases(k), delta), guess, most)
    return most_steps(target, lambda k: composed_epsilon(releases(k), delta, accountant), guess, most)


def _saved_runs(path: str | os.PathLike[str], dataset_size: int) -> tuple[tuple[Run, ...], float | None]:
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it should name {FORMAT!r}, version {VERSION}")
        runs = tuple(_saved_run(dict(r)) for r in content["runs"])
        if sum(r.steps for r in runs) != content["steps"]:
            raise ValueError("its runs do not add up to its steps")
        size, norm = content["dataset_size"], content["found_norm"]
        if norm is not None and not (isinstance(norm, float) and 0 < norm < math.inf):
            raise ValueError(f"{norm!r} is no clipping norm")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise PrivacyError(f"[load_state] {os.fspath(path)} must be a saved engine state but is not: {e}") from None
    if size != dataset_size:
        raise PrivacyError(f"[load_state] dataset_size must be {size}, as saved, but is {dataset_size}")
    return runs, norm


def _saved_run(entry: dict[str, Any]) -> Run:
    steps, session = entry.pop("steps"), entry.pop("session")
    if not (isinstance(steps, int) and isinstance(session, int) and steps > 0):
        raise ValueError(f"{steps!r} steps of session {session!r} are no run")
    return Run(Event.from_json(entry), steps, session)


def _begins_with(runs: tuple[Run, ...], start: tuple[Run, ...]) -> bool:
    *whole, last = start or [None]
    if last is None:
        return True
    return (
        len(runs) >= len(start)
        and list(runs[: len(whole)]) == whole
        and runs[len(whole)]._replace(steps=last.steps) == last
        and runs[len(whole)].steps >= last.steps
    )
