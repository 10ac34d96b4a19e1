"""The worker: one model replica that runs slots in place. A fork of the zygote.

It loads the model, runs sample batches, says READY and sleeps on its doorbell. Whatever rings is run by the
`Runner`, and rung back.
"""

from __future__ import annotations

import gc
import os
import socket

from pool.backends import Model, find_backend
from pool.errors import ModelError, ModelLoadError, PoolError
from pool.sample import sample_inputs
from pool.shm import doorbell, weights
from pool.shm.arena import Arena
from pool.shm.control import WorkerOrder
from pool.shm.doorbell import Message, Ring
from pool.shm.loans import Borrowed
from pool.worker.fronts import serve_fronts
from pool.worker.runner import Runner, SharedRunner


def run_worker(order: WorkerOrder, doorbell_fd: int, loans_fd: int, arena_fd: int, *others: int) -> int:
    """Load the model, say READY, and run batches until the front closes the doorbell.

    Args:
        order: What to do.
        doorbell_fd: The worker's end.
        loans_fd: Of the socket over which regions come.
        arena_fd: The arena.
        others: The socket over which other fronts join, if the order says that they may; the weights' memfd,
            if they are shared.

    Returns:
        The process's exit code: 1 if the model does not load, which the front was told why.
    """
    joins_fd = others[0] if order.is_shared else None
    weights_fds = others[1:] if order.is_shared else others
    sock = socket.socket(fileno=doorbell_fd)
    sock.setblocking(True)
    try:
        model = _load(order, weights_fds[0] if weights_fds else None)
        arena = Arena.attach(arena_fd, order.slots, order.slot_bytes)
        signatures = {signature.name: signature for signature in model.signatures}
        signatures.update({w.signature.name: w.signature for w in order.warm_up})
        _warm_up(order, model)
    except PoolError as e:
        doorbell.ring(sock, Message(Ring.LOAD_ERROR, text=e.message))
        return 1
    gc.collect()
    gc.freeze()
    doorbell.ring(sock, Message(Ring.READY))
    borrowed = Borrowed(socket.socket(fileno=loans_fd))
    if joins_fd is not None:

        def make_runner(arena: Arena, borrowed: Borrowed) -> Runner:
            return SharedRunner(model, arena, signatures, order.allowed_batch_sizes, borrowed, order.split_s)

        joins = socket.socket(fileno=joins_fd)
        return serve_fronts(sock, make_runner(arena, borrowed), joins, make_runner, order.awake_s)
    runner = Runner(model, arena, signatures, order.allowed_batch_sizes, borrowed, order.split_s)
    waiter = doorbell.Waiter(sock, order.awake_s)
    while True:
        message = waiter.next()
        if message is None or message.kind == Ring.DRAIN:
            return 0
        if message.kind == Ring.GIVE_BACK:
            runner.give_back(message.generation)
        else:
            doorbell.ring(sock, runner.run(message))


def _load(order: WorkerOrder, weights_fd: int | None) -> Model:
    backend = find_backend(order.backend)
    backend.prepare(order.placement)
    shared = None
    if weights_fd is not None:
        shared = weights.map_private(weights_fd, order.weights)
        os.close(weights_fd)
    return backend.load(order.path, shared, order.is_lean)


def _warm_up(order: WorkerOrder, model: Model) -> None:
    """Run sample batches: the framework allocates, plans and compiles now, not on the first user."""
    warm: set[tuple[str, int]] = set()
    for warm_up in order.warm_up:
        signature = warm_up.signature
        for rows in warm_up.rows:
            what = (model.runs(signature.name), rows)
            if what in warm:
                continue
            warm.add(what)
            sample = sample_inputs(signature, rows, recipe=warm_up.recipe)
            try:
                model.bind(signature.name, [sample[spec.name] for spec in signature.inputs])()
            except ModelError as e:
                raise ModelLoadError(
                    f"canary of {signature.name!r} with {rows} rows failed, though the loader's went well: "
                    f"{e.message}"
                ) from None
