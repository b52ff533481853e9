"""One Decode stream: takes steps in their order and answers them, several in flight, in the order of completion.

A switch of threads costs as much as all else that Python does for a step of one session. So the thread that reads also
answers, and where the engine is idle runs the launch, for a client that waits for each answer before it sends more, and
says so. The steps of one that does not are answered by a second thread, while the first reads on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import grpc

from octavo_server import codec, status
from octavo_server.engine import Engine
from octavo_server.errors import OctavoError, Reason, mismatch
from octavo_server.shared_memory import IN_RESULT, AnswerPlace, StreamMemory
from octavo_server.step import StepAnswer

log = logging.getLogger(__name__)

Respond = Callable[[bytes | None], None]
"""Sends a response and waits until it has gone; None ends the call with the status that its context was given."""

_Mailbox = SimpleQueue[tuple[int, StepAnswer, AnswerPlace] | None]
"""Step ids, answers and where they go; None wakes the thread that waits, for the stream is over."""


class StepStream:
    """Feeds the engine from a stream's requests, in their order, and sends the results.

    No more is read while `max_steps_in_flight` steps are unanswered or their results unsent, so a slow reader holds up
    only itself.

    Args:
        engine: Runs the steps.
        requests: Messages of the stream, unparsed.
        context: The call.
        respond: Sends results; one thread at a time.
        max_steps_in_flight: Steps accepted before a result goes out.
        count_refusals: Told of every answer.
        memory: What the stream may share with its client.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        respond: Respond,
        max_steps_in_flight: int,
        count_refusals: Callable[[StepAnswer], None],
        memory: StreamMemory,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._context = context
        self._respond = respond
        self._count_refusals = count_refusals
        self._memory = memory
        self._slots = threading.Semaphore(max_steps_in_flight)
        self._own_answers: _Mailbox = SimpleQueue()
        self._answers: _Mailbox = SimpleQueue()
        self._sender: threading.Thread | None = None
        self._is_sending = threading.Lock()
        self._lock = threading.Lock()
        self._num_unsent = 0
        self._end: OctavoError | None = None
        self._is_over = False

    def run(self) -> None:
        """Answer steps until the client has sent its last and has every answer, or is gone."""
        if not self._context.add_callback(self._cancel):
            return
        try:
            for data in self._requests:
                self._take(data, time.monotonic())
        except grpc.RpcError:
            return  # The client is gone; `_cancel` has been told.
        finally:
            self._answers.put(None)
        if self._sender is not None:
            self._sender.join()
        with self._lock:
            self._finish(None)

    def end(self, error: OctavoError) -> None:
        """End the stream with an error, once every answer that is there has gone out."""
        with self._lock:
            self._end = error
            if self._num_unsent == 0:
                self._finish(error)

    def _cancel(self) -> None:
        self._is_over = True
        self._own_answers.put(None)
        self._answers.put(None)
        self._slots.release()

    def _take(self, data: bytes, arrived_at: float) -> None:
        """Submit a step; answer it as well, if its client waits for that."""
        with self._lock:
            self._num_unsent += 1
        if self._submit(data, arrived_at):
            own = self._own_answers.get()
            if own is not None:
                self._send(*own)

    def _submit(self, data: bytes, arrived_at: float) -> bool:
        """Submit a step; returns whether its answer comes to `_own_answers`, else to `_answers`."""
        step_id, answers = 0, self._own_answers
        try:
            if codec.asks_for_region(data):
                self._post(codec.encode_region(self._memory.open()))
                return False
            step, tensors = codec.parse_step(data)
            step_id, is_awaited = step.step_id, step.waits_for_answer
            if not is_awaited:
                self._slots.acquire()
                answers = self._answers
                self._ensure_sender()
            region = self._memory.region
            request = codec.read_step(step, tensors, region)
            place = codec.read_place(step, tensors, request, region)
            self._engine.submit(
                request,
                lambda answer: answers.put((step_id, answer, place)),
                lambda: self._is_over,
                arrived_at,
                client=self,
                may_lead=is_awaited,
            )
        except OctavoError as error:
            answers.put((step_id, StepAnswer(error=error), IN_RESULT))
        except Exception:
            # A defect of ours; the stream must not fall silent for it.
            log.exception("a step of %d bytes could not be taken", len(data))
            defect = mismatch(Reason.MALFORMED_MESSAGE, "step", "one that can be taken", "another")
            answers.put((step_id, StepAnswer(error=defect), IN_RESULT))
        return answers is self._own_answers

    def _ensure_sender(self) -> None:
        if self._sender is None:
            name = "octavo-stream-sender"
            self._sender = threading.Thread(target=self._run_sender, name=name, daemon=True)
            self._sender.start()

    def _run_sender(self) -> None:
        try:
            self._send_answers()
        except Exception:
            # A defect of ours; the client is told by the end of the call, rather than left to wait.
            log.exception("an answer could not be sent")
            self._context.cancel()  # type: ignore[no-untyped-call]

    def _send_answers(self) -> None:
        """Send what `_answers` brings until all that was read is answered and no more is to come."""
        has_read_all = False
        while not (has_read_all and self._num_unsent == 0):
            item = self._answers.get()
            if self._is_over:
                return
            if item is None:
                has_read_all = True
            else:
                self._send(*item)
                self._slots.release()

    def _send(self, step_id: int, answer: StepAnswer, place: AnswerPlace) -> None:
        self._count_refusals(answer)
        self._post(codec.encode_response(step_id, answer, place))

    def _post(self, response: bytes) -> None:
        with self._is_sending:
            self._respond(response)
        with self._lock:
            self._num_unsent -= 1
            if self._end is not None and self._num_unsent == 0:
                self._finish(self._end)

    def _finish(self, error: OctavoError | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        if error is not None:
            status.set_status(self._context, error)
        self._respond(None)
