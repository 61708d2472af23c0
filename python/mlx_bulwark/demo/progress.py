"""Keeps the person at the terminal informed, and in control."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a clock beside the text while one long call runs.

    The clock's own thread does all the writing: a Ctrl-C inside a progress bar of tqdm could leave its lock taken.
    """
    done, began = threading.Event(), time.monotonic()

    def tick() -> None:
        while True:
            line = f"{text} ... {time.monotonic() - began:.0f} s"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
            if done.wait(1.0):
                break
        print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)

    clock = threading.Thread(target=tick, daemon=True)
    try:
        clock.start()
        yield
    finally:
        done.set()
        if clock.ident is not None:
            clock.join()


class Stop:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.pressed = False
        self.held = False  # then the first Ctrl-C waits for `check`, so that no step is torn; a second acts at once

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was."""
        if self.pressed:
            raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Remember Ctrl-C: raised inside a callback of the interpreter, KeyboardInterrupt alone would be lost."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        again, stop.pressed = stop.pressed, True
        if again or not stop.held:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
