"""One Decode stream: takes steps in their order and answers them, several in flight, in the order of completion.

A step is submitted where its message arrives, and its answer sent where it is made; neither waits for the client. One
that waits for each answer before it sends more says so, and has its step run where it arrives, if the engine is idle
and launches are short: handing it to another thread would take longer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from octavo_server import codec
from octavo_server.engine import Engine
from octavo_server.errors import OctavoError, Reason, mismatch
from octavo_server.shared_memory import IN_RESULT, AnswerPlace, StreamMemory
from octavo_server.step import StepAnswer, StepOrigin
from octavo_server.step_log import step_names
from octavo_server.step_watch import StepWatch
from octavo_server.stream_call import StreamCall
from octavo_server.tenant import Tenant
from octavo_server.traffic import StreamTraffic

log = logging.getLogger(__name__)

SHORT_LAUNCH_S = 500e-6
"""Launches that may run where messages arrive, and hold up others: not much longer than switching threads takes."""


class StepStream:
    """Feeds the engine from a stream's messages, in their order, and sends the results.

    No more than one is read while `max_steps_in_flight` steps are unanswered or their results unsent, so a slow reader
    holds up only itself.

    Args:
        engine: Runs the steps.
        tenant: Whose stream it is.
        call: The stream.
        max_steps_in_flight: Steps accepted before a result goes out.
        watch: Looks at steps and answers.
        memory: What the stream may share with its client.
        traffic: Counts bytes.
    """

    def __init__(
        self,
        engine: Engine,
        tenant: Tenant,
        call: StreamCall,
        max_steps_in_flight: int,
        watch: StepWatch,
        memory: StreamMemory,
        traffic: StreamTraffic,
    ) -> None:
        self._engine = engine
        self._origin = StepOrigin(tenant, lambda: self._is_over, is_stream=True)
        self._call = call
        self._max_unsent = max_steps_in_flight
        self._watch = watch
        self._memory = memory
        self._traffic = traffic
        self._lock = threading.Lock()
        self._num_unsent = 0
        self._held: tuple[bytes, float] | None = None
        self._has_read_all = self._is_over = False
        self._end: OctavoError | None = None

    def run(self) -> None:
        """Answer steps until the client has sent its last and has every answer, or is gone."""
        try:
            self._call.run(self)
        finally:
            self._engine.sessions.end_stream(self._origin)

    def end(self, error: OctavoError) -> None:
        """End the stream with an error, once every answer that is there has gone out; what comes now is dropped."""
        with self._lock:
            self._end = error
            self._finish_if_done()

    def on_message(self, data: bytes) -> bool:
        """Take a step; one for which there is no room is held until there is, and nothing read until then."""
        arrived_at = time.monotonic()
        with self._lock:
            self._traffic.received_bytes += len(data)
            if self._end is not None:
                return False  # else a client that sends on would never let the stream end
            if self._num_unsent == self._max_unsent:
                self._held = data, arrived_at
                return False
            self._num_unsent += 1
        self._submit(data, arrived_at)
        return True

    def on_sent(self) -> None:
        """Note that an answer has gone out."""
        with self._lock:
            held, self._held = None if self._end else self._held, None
            if held is None:
                self._num_unsent -= 1
                self._finish_if_done()
        if held is not None:
            self._submit(*held)
            self._call.read_on()

    def on_end(self) -> None:
        """Note that the client has sent its last step."""
        with self._lock:
            self._has_read_all = True
            self._finish_if_done()

    def on_over(self) -> None:
        """Note that nobody waits for answers any more."""
        self._is_over = True

    def _submit(self, data: bytes, arrived_at: float) -> None:
        step_id = step_key = 0
        place = IN_RESULT

        def respond(made: StepAnswer) -> None:
            self._answer(step_id, step_key, made, place)

        answer: Callable[[StepAnswer], None] = respond
        try:
            if codec.asks_for_region(data):
                self._send(codec.encode_region(self._memory.open()))
                return
            step, tensors = codec.parse_step(data)
            step_id, step_key = step.step_id, step.step_key
            region = self._memory.region
            request = codec.read_step(step, tensors, region)
            place = codec.read_place(step, tensors, request, region)
            tracing = self._watch.tracing
            if tracing is not None:
                request, answer = tracing.watch_step(step, request, arrived_at, answer)
            self._engine.submit(
                request,
                answer,
                self._origin,
                arrived_at,
                lead_s=SHORT_LAUNCH_S if step.waits_for_answer else 0.0,
            )
        except OctavoError as error:
            answer(StepAnswer(error=error))
        except Exception:
            # A defect of ours; the stream must not fall silent for it.
            log.exception(
                "a step of %d bytes could not be taken",
                len(data),
                extra=step_names(step_id, step_key),
            )
            defect = mismatch(Reason.MALFORMED_MESSAGE, "step", "one that can be taken", "another")
            answer(StepAnswer(error=defect))

    def _answer(self, step_id: int, step_key: int, answer: StepAnswer, place: AnswerPlace) -> None:
        try:
            self._watch.on_answer(step_id, step_key, answer)
            self._send(codec.encode_response(step_id, answer, place))
        except Exception:
            # A defect of ours, and not the engine's; the client is told rather than left to wait.
            log.exception("an answer could not be sent", extra=step_names(step_id, step_key))
            self._call.cancel()

    def _send(self, message: bytes) -> None:
        with self._lock:
            self._traffic.sent_bytes += len(message)
        self._call.send(message)

    def _finish_if_done(self) -> None:
        is_last = self._has_read_all or self._end is not None
        if is_last and self._num_unsent == 0 and not self._is_over:
            self._is_over = True
            self._call.finish(self._end)
