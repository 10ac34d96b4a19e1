"""Whether clients come and go: the ROUTER's monitor. Runs in the front, on its event loop."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import zmq

from pool.front.clients import Client, Clients
from pool.front.gate import Gate

_EVENT = struct.Struct("=HI")  # which, and the descriptor
_ACCEPTED, _DISCONNECTED = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_DISCONNECTED)
_NOBLOCK = int(zmq.NOBLOCK)
_ADDRESS = "inproc://connections"  # the context is the endpoint's own


class Connections:
    """Tells `Clients` what the monitor says, and whose a message is.

    Args:
        router: Not bound yet.
        clients: The records to keep.
        gate: Told of descriptors.
        bar: Asked about the address of a client: why it may not use the server; empty if it may.
        on_gone: Called when clients are gone and nothing else is about to look.
    """

    def __init__(
        self,
        router: zmq.Socket[bytes],
        clients: Clients,
        gate: Gate,
        bar: Callable[[str], str],
        on_gone: Callable[[], None],
    ) -> None:
        self._router = router
        self._clients = clients
        self._gate = gate
        self._bar = bar
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        # ZeroMQ's I/O thread waits when the monitor's queue is full, and all traffic with it. A limit of 0
        # is none: the queue is read at every turn, and each connection adds two events at most.
        self._monitor: zmq.Socket[bytes] = router.context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.setsockopt(zmq.LINGER, 0)
        router.monitor(_ADDRESS, _ACCEPTED | _DISCONNECTED)
        self._monitor.connect(_ADDRESS)
        self._fd = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._look)
        self._loop.call_soon(self._look)

    def close(self) -> None:
        """Stop listening; the ROUTER is about to close."""
        # First: an event that nobody takes would have ZeroMQ's I/O thread wait for ever.
        self._router.disable_monitor()
        self._loop.remove_reader(self._fd)
        self._monitor.close()

    def _look(self) -> None:
        if not self._monitor.closed:
            self._read()
            self._gate.disconnected()
            if self._clients.gone:
                self._on_gone()

    def _read(self) -> None:
        """Read all events there are: the descriptor tells of changes only."""
        recv, clients = self._monitor.recv, self._clients
        while True:
            try:
                event, fd = _EVENT.unpack(recv(_NOBLOCK))
            except zmq.Again:
                return
            recv(_NOBLOCK)  # the endpoint
            if event == _ACCEPTED:
                clients.accepted(fd)
                self._gate.accepted(fd)
            elif event == _DISCONNECTED:
                clients.disconnected(fd)

    def meet(self, identity: bytes, frame: Any) -> Client | None:
        """Whose message it is, if its identity is not among `Clients.numbered`.

        Args:
            identity: Its first frame.
            frame: Another one, as ZeroMQ has it.

        Returns:
            None if its connection has ended.
        """
        self._read()
        try:
            fd, address = frame.get(zmq.SRCFD), frame.get("Peer-Address")
        except zmq.ZMQError:
            return None  # ZeroMQ found the peer gone when it accepted the connection
        return self._clients.meet(identity, fd, address, self._bar)
