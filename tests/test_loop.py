"""What a worker does before it is READY. Real workers are in `test_zygote`."""

from __future__ import annotations

from pool.config import Placement
from pool.sample import Recipe
from pool.shm.control import WarmUp, WorkerOrder
from pool.worker.loop import _warm_up
from tests.rig import NumpyModel, identity

FLOATS = identity(("x", "float32", (None, 3)))


def test_signatures_that_run_the_same_function_are_warmed_up_once():
    class Twins(NumpyModel):
        def runs(self, signature):
            return "the same" if signature in ("serving_default", "twin") else signature

    model = Twins()
    signatures = [FLOATS, *(identity(("x", "float32", (None, 3)), name=name) for name in ("twin", "other"))]
    order = WorkerOrder(
        model="m", index=0, backend="", path="", weights=(), placement=Placement(), slots=1, slot_bytes=4096,
        allowed_batch_sizes=(), warm_up=tuple(WarmUp(one, Recipe(), (1, 4)) for one in signatures),
    )  # fmt: skip
    _warm_up(order, model)
    sizes = [[(1, 3)], [(4, 3)]]
    want = [(name, size) for name in ("serving_default", "other") for size in sizes]
    assert model.bound == want
    assert len(model.seen) == len(want)
