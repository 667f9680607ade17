"""What a signal does for a while."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals_call(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM call `handler` with their number; then what they did before is theirs again."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
