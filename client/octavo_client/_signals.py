"""Ctrl-C while this thread is inside gRPC.

Python runs signal handlers in the main thread, between any two of its instructions. One that raises in the middle of
grpcio's own code leaves a lock held or an event lost, and the call can never be closed. So Ctrl-C is noted while a
thread drives a call, wakes it, and is raised once it is out.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

# The functions beneath those of the module, which look for names of handlers and take ten times as long.
_get_handler: Callable[[int], Any] = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_set_handler: Callable[[int, Any], Any] = getattr(signal.signal, "__wrapped__", signal.signal)

_ASIDE = {signal.SIGINT, signal.SIGKILL, signal.SIGSTOP}
_OTHERS = [number for number in signal.Signals if number not in _ASIDE]


def others_may_raise() -> bool:
    """Whether the program handles a signal that is not Ctrl-C, or Ctrl-C in a way of its own, which may raise."""
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt) and interrupt is not signal.default_int_handler:
        return True
    return any(callable(signal.getsignal(number)) for number in _OTHERS)


class Interrupts:
    """Puts Ctrl-C off while a `with` block runs in the main thread; elsewhere it does nothing.

    Attributes:
        wake: Called in a thread of its own when Ctrl-C comes, to end what the block waits for.
    """

    __slots__ = ("_handler", "_is_noted", "wake")

    def __init__(self) -> None:
        self.wake: Callable[[], object] | None = None
        self._handler: Any = None
        self._is_noted = False

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and _get_handler(signal.SIGINT) is signal.default_int_handler:
            self._handler = _set_handler(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            _set_handler(signal.SIGINT, self._handler)
            if self._is_noted:
                self._handler(signal.SIGINT, None)

    def waits_for(self, wake: Callable[[], object]) -> None:
        """Say how to end what the block is about to wait for; it is ended at once if Ctrl-C has come already."""
        self.wake = wake
        if self._is_noted:
            wake()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._is_noted = True
        if self.wake is not None:
            # Not here: this may be in the middle of what `wake` would do.
            threading.Thread(target=self.wake, name="octavo-interrupt", daemon=True).start()
