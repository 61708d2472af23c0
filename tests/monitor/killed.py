"""Raises alerts in children that are killed: ``python killed.py FOLDER SEED ALERTS MICROSECONDS``.

A child of a fork opens the state file and raises one alert after the other, from the last that it was told of; its
parent kills it after a random time, and begins another one, until a child came to its end by itself. ``told`` gets the
number of each alert after ``raise_alerts`` has returned: what is in there must never be lost.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from mlx_bulwark.monitor import Alert, Cooldown, DeliveryError, FileSink, Outbox, State

DEADLINE = 60.0  # seconds: a child that does not end is an error, not a test that hangs


class FailsHalfOfTheTime:
    """Passes alerts on, half of the time; half of its failures come after the alert has arrived."""

    def __init__(self, sink, seed):
        self.name, self._sink, self._random = sink.name, sink, random.Random(seed)

    def deliver(self, alert):
        fate = self._random.random()
        if fate < 0.25:
            raise DeliveryError("before")
        self._sink.deliver(alert)
        if fate < 0.5:
            raise DeliveryError("after")


class Receiver:
    """What is at the other end of a webhook: it writes down every id that comes."""

    name = "webhook"

    def __init__(self, path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def deliver(self, alert):
        os.write(self._file, f"{alert.id}\n".encode())


def alert(number):
    return Alert("warning", "stream", f"alert {number}", {"number": number}, time=float(number))


def child(folder, seed, alerts):
    now = [time.time()]

    def clock():  # waits pass at once
        now[0] += 1000.0
        return now[0]

    sinks = [FileSink(folder / "alerts.jsonl"), Receiver(folder / "got")]
    sinks = [FailsHalfOfTheTime(sink, seed) for sink in sinks]
    state = State(folder / "monitor.sqlite")
    outbox = Outbox(state, sinks, cooldown=Cooldown(0), clock=clock, seed=seed)
    told = os.open(folder / "told", os.O_RDWR | os.O_APPEND | os.O_CREAT)
    begun = len(os.read(told, 1 << 20).split())
    for number in range(begun, alerts):
        outbox.raise_alerts([alert(number)])
        os.write(told, f"{number}\n".encode())
        outbox.deliver()
    while any(box["waiting"] for box in state.pending().values()):
        outbox.deliver()
    state.close()


def killed(child, seed, most):
    """Run ``child(seed)`` in forks that are killed within ``most`` seconds, until one ends by itself; 0 kills none."""
    moments, kills, began = random.Random(seed), 0, time.monotonic()
    while time.monotonic() - began < DEADLINE:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(seed * 1000 + kills)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        until, status = time.monotonic() + (moments.uniform(0, most) if most else DEADLINE), None
        while status is None and time.monotonic() < until:
            ended, found = os.waitpid(pid, os.WNOHANG)
            status = found if ended else None
            time.sleep(0.0002)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        if status == 0:
            print(kills)
            return
        if not os.WIFSIGNALED(status):
            raise SystemExit("a child failed")
        kills += 1
        most *= 1.05  # so that it ends also on a slow machine
    raise SystemExit("it did not end")


if __name__ == "__main__":
    folder, seed, alerts, most = sys.argv[1:]
    killed(lambda seed: child(Path(folder), seed, int(alerts)), int(seed), float(most) * 1e-6)
