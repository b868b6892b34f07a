"""Ctrl-C at the right moment: never in the middle of a file, and never lost.

Python raises KeyboardInterrupt between any two instructions. Where those are a callback of HDF5, or run while an object
is taken down, the exception is dropped or the file is left half-written.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back, however often it comes, and let it through once at the end; a block, or a function's decorator.

    Python interrupts the main thread alone: elsewhere this does nothing, as where Ctrl-C is ignored. Uses may be nested.
    """
    before = signal.getsignal(signal.SIGINT)
    held = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        held = True

    if before in (None, signal.SIG_IGN) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Listen to Ctrl-C until it comes, for a process that ignores it otherwise; the main thread alone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)         # what follows it must not be interrupted again
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
