"""What the client believes a session holds, so that a caller need not count positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from octavo_client._errors import (
    GONE,
    InterruptedCall,
    PositionMismatch,
    RefusedError,
)
from octavo_client._types import Model, SessionState


class Mirror:
    """A session's lengths: what the server confirmed, and what is in flight on top of it.

    Steps of one (session, layer) are answered in the order in which they were placed. One caller at a time.

    Args:
        state: The session as the server reported it.
        model: Its model.

    Attributes:
        is_stale: Whether a step's fate is unknown, so that the lengths must be asked for before they are relied on.
        is_closed: Whether the caller closed the session, so that it takes no more steps.
        is_gone: Whether the server confirmed that.
    """

    def __init__(self, state: SessionState, model: Model) -> None:
        self.session_id = state.session_id
        self.handle = state.handle
        self.model = model
        self.is_stale = False
        self.is_closed = False
        self.is_gone = False
        self._may_be_gone = False
        self._stored = list(state.lengths)
        self._ends = list(state.lengths)
        self._num_in_flight = [0] * model.num_layers

    @property
    def lengths(self) -> tuple[int, ...]:
        """[num_layers] tokens stored, once everything in flight is applied."""
        return tuple(self.length(layer) for layer in range(self.model.num_layers))

    @property
    def stored(self) -> tuple[int, ...]:
        """[num_layers] tokens that the server confirmed."""
        return tuple(self._stored)

    def length(self, layer: int) -> int:
        """Return the tokens of a layer, once everything in flight is applied."""
        return self._ends[layer] if self._num_in_flight[layer] else self._stored[layer]

    def begin(self, layer: int, end: int) -> None:
        """Note an append that is now in flight and ends at position `end`."""
        self._num_in_flight[layer] += 1
        self._ends[layer] = end

    def settle(self, layer: int, end: int, error: BaseException | None) -> None:
        """Note the outcome of the layer's oldest append in flight.

        Args:
            layer: The layer.
            end: Where the append ends.
            error: None when it is stored; a RefusedError when it is not; anything else leaves its fate unknown.
        """
        self._num_in_flight[layer] -= 1
        if error is None:
            self._stored[layer] = end
        elif isinstance(error, PositionMismatch) and error.length >= 0:
            self._stored[layer] = error.length
        elif not isinstance(error, RefusedError):
            self.is_stale = True

    def refresh(self, lengths: Sequence[int]) -> None:
        """Take over what the server reports; appends in flight stay on top."""
        self._stored = list(lengths)
        self.is_stale = False

    @contextmanager
    def truncating(self) -> Iterator[None]:
        """Distrust the lengths when the truncate inside fails: an attempt without an answer may have been applied."""
        try:
            yield
        except BaseException:
            self.is_stale = True
            raise

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Note the outcome of the close inside, so that one that failed can be repeated."""
        try:
            yield
        except GONE:
            if not self._may_be_gone:
                raise
        except InterruptedCall as error:
            self._may_be_gone |= error.may_be_applied
            raise
        self.is_gone = True
