"""Keeps the person at the terminal informed, and in control."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a clock beside the text while one long call runs."""
    done = threading.Event()
    with tqdm(desc=text, bar_format="{desc} ... {elapsed}", leave=False) as bar:

        def tick() -> None:
            while not done.wait(1.0):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()


class Stop:
    """Whether Ctrl-C was pressed, asked between steps."""

    pressed = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was."""
        if self.pressed:
            raise KeyboardInterrupt


@contextmanager
def between_steps() -> Iterator[Stop]:
    """Hold the first Ctrl-C back to where `Stop.check` is called, so that no step is torn; a second acts at once."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.check()
        stop.pressed = True

    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
