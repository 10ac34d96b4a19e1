"""Where the time of one prediction went. Client process; pure."""

from __future__ import annotations

import msgspec

from pool.client.conversion import Array
from pool.wire import TimelineMeta


class Timeline(msgspec.Struct, frozen=True):
    """The stages of one prediction, in order and without a gap, in nanoseconds.

    What the server did is told by its own clock. On one machine that is the client's clock too, and the ways
    there and back are what lies between. Else only how long both took together is known, and each is
    given half of it.

    Attributes:
        send_ns: Checking and encoding the inputs, until the request was handed to the connection.
        inbound_ns: Until the server began to read it; with making the connection, if there was none.
        receive_ns: Until the rows lay in the server's shared memory.
        queue_ns: Until the batch was given to a worker.
        run_ns: Until the worker's answer was heard.
        reply_ns: Until the answer was handed to the server's socket.
        outbound_ns: Until the caller had its arrays.
        model_ns: The part of `run_ns` in which the model ran; the rest is waking worker and server.
        batch_rows: Rows that ran together; 0 if the request was split over several batches.
        worker: The worker's index; -1 if several ran it.
        is_one_clock: Whether client and server read the same clock.
    """

    send_ns: int
    inbound_ns: int
    receive_ns: int
    queue_ns: int
    run_ns: int
    reply_ns: int
    outbound_ns: int
    model_ns: int
    batch_rows: int
    worker: int
    is_one_clock: bool

    @property
    def stages(self) -> dict[str, int]:
        """Name -> nanoseconds, in order; they add up to `total_ns`."""
        return {name: getattr(self, f"{name}_ns") for name in _STAGES}

    @property
    def total_ns(self) -> int:
        """From the call to its return; of the last attempt, if there were several.

        The first call for a model asks for its signature beforehand, which is not part of it.
        """
        return sum(self.stages.values())


_STAGES = ("send", "inbound", "receive", "queue", "run", "reply", "outbound")


class Answer(dict[str, Array]):
    """What a prediction gives that was asked for its time line: the outputs, as ever, and that.

    Attributes:
        timeline: None if the server does not tell it.
    """

    timeline: Timeline | None = None


def assemble(began_ns: int, handed_ns: int, ended_ns: int, server: TimelineMeta) -> Timeline:
    """The time line of a prediction.

    Args:
        began_ns: When the call began, by the client's monotonic clock.
        handed_ns: When the request was handed to the connection.
        ended_ns: When the answer was decoded.
        server: The server's part.
    """
    served_ns = server.receive_ns + server.queue_ns + server.run_ns + server.reply_ns
    sent_ns = server.received_ns + served_ns
    is_one_clock = handed_ns <= server.received_ns and sent_ns <= ended_ns
    if is_one_clock:
        inbound_ns, outbound_ns = server.received_ns - handed_ns, ended_ns - sent_ns
    else:
        way_ns = ended_ns - handed_ns - served_ns
        inbound_ns, outbound_ns = way_ns // 2, way_ns - way_ns // 2
    return Timeline(
        send_ns=handed_ns - began_ns,
        inbound_ns=inbound_ns,
        receive_ns=server.receive_ns,
        queue_ns=server.queue_ns,
        run_ns=server.run_ns,
        reply_ns=server.reply_ns,
        outbound_ns=outbound_ns,
        model_ns=server.model_ns,
        batch_rows=server.batch_rows,
        worker=server.worker,
        is_one_clock=is_one_clock,
    )


def answer_with_timeline(
    outputs: dict[str, Array], began_ns: int, handed_ns: int, ended_ns: int, server: TimelineMeta | None
) -> Answer:
    """The outputs with their time line; see `assemble`."""
    answer = Answer(outputs)
    if server is not None:
        answer.timeline = assemble(began_ns, handed_ns, ended_ns, server)
    return answer
