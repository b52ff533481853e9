"""One Decode stream: reads steps while answers go out, several in flight, results in the order of completion."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import grpc

from octavo import v1
from octavo_server import codec, status
from octavo_server.engine import Engine
from octavo_server.errors import OctavoError, Reason, mismatch
from octavo_server.shared_memory import IN_RESULT, AnswerPlace, StreamMemory, answer_place
from octavo_server.step import StepAnswer

log = logging.getLogger(__name__)


class StepStream:
    """Feeds the engine from a stream's requests, in their order, and yields the results.

    The handler's thread yields results; a thread of the stream's own reads requests, and stops reading while
    `max_steps_in_flight` steps are unanswered or their results unsent, so a slow reader holds up only itself.

    Args:
        engine: Runs the steps.
        requests: Messages of the stream, unparsed.
        context: The call.
        max_steps_in_flight: Steps accepted before a result goes out.
        memory: What the stream may share with its client.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        max_steps_in_flight: int,
        memory: StreamMemory,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._context = context
        self._memory = memory
        self._slots = threading.Semaphore(max_steps_in_flight)
        self._responses: SimpleQueue[v1.DecodeResponse | None] = SimpleQueue()
        self._num_read = 0
        self._has_read_all = False
        self._is_cancelled = False
        self._end: OctavoError | None = None

    def run(self) -> Iterator[bytes]:
        """Yield results until the client has sent its last step and has every answer, or is gone."""
        if not self._context.add_callback(self._cancel):
            return
        reader = threading.Thread(target=self._read, name="octavo-stream-reader", daemon=True)
        reader.start()
        num_sent = 0
        while not (self._has_read_all and num_sent == self._num_read):
            response = self._responses.get()
            if self._is_cancelled:
                return
            if response is not None:
                num_sent += 1
                self._slots.release()
                yield response.SerializeToString()
            elif self._end is not None:
                status.abort(self._context, self._end)

    def end(self, error: OctavoError) -> None:
        """End the stream with an error, once every answer that is there has gone out."""
        self._end = error
        self._responses.put(None)

    def _cancel(self) -> None:
        self._is_cancelled = True
        self._responses.put(None)
        self._slots.release()

    def _read(self) -> None:
        try:
            for data in self._requests:
                arrived_at = time.monotonic()
                self._slots.acquire()
                self._num_read += 1
                self._submit(data, arrived_at)
        except grpc.RpcError:
            return  # The client is gone; `_cancel` has been told.
        finally:
            self._has_read_all = True
            self._responses.put(None)

    def _submit(self, data: bytes, arrived_at: float) -> None:
        step_id = 0
        try:
            message = codec.parse(v1.DecodeRequest, data)
            if message.HasField("region"):
                self._responses.put(v1.DecodeResponse(region=self._memory.open()))
                return
            step = message.step
            step_id = step.step_id
            region = self._memory.region
            request = codec.read_step(step, region)
            place = answer_place(step, request.tensors, region)
            self._engine.submit(
                request,
                lambda answer: self._respond(step_id, answer, place),
                lambda: self._is_cancelled,
                arrived_at,
            )
        except OctavoError as error:
            self._respond(step_id, StepAnswer(error=error))
        except Exception:
            # A defect of ours; the stream must not fall silent for it.
            log.exception("a step of %d bytes could not be taken", len(data))
            defect = mismatch(Reason.MALFORMED_MESSAGE, "step", "one that can be taken", "another")
            self._respond(step_id, StepAnswer(error=defect))

    def _respond(self, step_id: int, answer: StepAnswer, place: AnswerPlace = IN_RESULT) -> None:
        response = v1.DecodeResponse()
        codec.write_answer(response.result, step_id, answer, place)
        self._responses.put(response)
