"""Requests on their way through pipelines, without processes: any order of events, one right answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from math import inf

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool import wire
from pool.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelError,
    Overloaded,
    PoolError,
    TooLarge,
    Unavailable,
    WireError,
)
from pool.front import pipeline as front_pipeline
from pool.front.clients import Client
from pool.front.parts import Parts
from pool.front.pipelines import Pipelines
from pool.front.slots import Account, Ticket, Turn
from pool.pipelines import PipelineConfig, StepConfig
from pool.signature import Signature, TensorSpec
from pool.wire import PredictMeta, TensorMeta
from tests.rig import Collector, NumpyModel, Rig, generation


def signature(inputs, outputs, batched=True):
    specs = [
        tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items())
        for tensors in (inputs, outputs)
    ]
    return Signature("serving_default", *specs, batched, "" if batched else "so")


ROW = {"x": ("float32", (None, 2))}
SIGNATURES = {
    "double": signature(ROW, {"y": ("float32", (None, 2))}),
    "plus": signature(ROW, {"y": ("float32", (None, 2)), "name": ("string", (None,))}),
    "shout": signature({"word": ("string", (None,))}, {"loud": ("string", (None,))}),
    "cut": signature(
        {"n": ("int64", ()), "x": ("float32", (2,))}, {"rows": ("float32", (None, 2))}, batched=False
    ),
    "sum": signature({"y": ("float32", (None, 2))}, {"sum": ("float32", (2,))}, batched=False),
}


def strings(values):
    return np.array(values, object)


FUNCTIONS = {
    "double": lambda _, a: [a[0] * 2],
    "plus": lambda _, a: [a[0] + 1, strings([b"%d" % int(row[0] + 1) for row in a[0]])],
    "shout": lambda _, a: [strings([item.upper() + b"!" for item in a[0]])],
    "cut": lambda _, a: [np.arange(int(a[0]), dtype=np.float32)[:, None] + a[1]],
    "sum": lambda _, a: [a[0].sum(axis=0)],
}


def step(model, name=None, **inputs):
    return StepConfig(model=model, name=name, inputs=inputs)


PIPELINES = {
    "there": PipelineConfig(
        steps=(step("double", x="request.x"), step("plus", x="double.y"), step("shout", word="plus.name")),
        outputs={"y": "plus.y", "loud": "shout.loud", "back": "request.x"},
    ),
    # The other way round: each holds what the other one wants.
    "back": PipelineConfig(steps=(step("plus", x="request.x"), step("double", x="plus.y"))),
    "cascade": PipelineConfig(
        steps=(
            step("cut", n="request.n", x="request.x"),
            step("double", x="cut.rows"),
            step("sum", y="double.y"),
        )
    ),
}


def want(name, inputs):
    x = inputs["x"]
    if name == "there":
        loud = [b"%d!" % int(row[0]) for row in x * 2 + 1]
        return {"y": x * 2 + 1, "loud": strings(loud), "back": x}
    if name == "back":
        return {"y": (x + 1) * 2}
    rows = np.arange(int(inputs["n"]), dtype=np.float32)[:, None] + x
    return {"sum": (rows * 2).sum(axis=0)}


class House:
    """Generations, one worker each, pipelines over them: an engine without processes."""

    def __init__(self, configs=PIPELINES, **settings):
        self.is_stopping = False
        self.lost = {}
        self.advanced = []
        self.sink = Collector()
        self.asked = {}
        self.client = Client(b"", -1, 0)
        keys = {"max_batch_size": 4, "slots": 2, "max_rows_bytes": 1024} | settings
        self.rigs = {}
        for name, each in SIGNATURES.items():
            self.rigs[name] = Rig(generation(each, **keys), NumpyModel(FUNCTIONS[name]))
        self.pipelines = Pipelines(self, tuple(configs))
        self.pipelines.serve(self.pipelines.wire(configs, self.generations))

    @property
    def generations(self):
        return {name: rig.generation for name, rig in self.rigs.items()}

    # What pipelines ask of an engine.

    def advance(self, generation, _now):
        self.advanced.append(generation)

    def reason_lost(self, generation):
        return self.lost.get(generation)

    def freed(self):
        self.pipelines.waiting.feed()

    # A client's part.

    def ticket(self, id_, route, rows, deadline=inf, priority=None):
        account = self.client.account(route.generation)
        key = route.key if priority is None else route.keys[priority]
        turn = Turn(self.pipelines.clock())
        return Ticket(self.sink, self.client, id_, route, rows, deadline, turn, key, account)

    def parts(self, route, counts):
        table = b"".join([wire.PART.pack(i, 0, n) for i, n in enumerate(counts)])
        columns = wire.split_parts(table, sum(counts))
        turn, account = Turn(self.pipelines.clock()), self.client.account(route.generation)
        return Parts(self.sink, self.client, route, turn, route.key, account, table, columns, turn.started)

    def ask(self, id_, name, inputs, outputs=None, **keywords):
        """Admit a request; raises what it is refused with."""
        pipeline = self.pipelines.served[name]
        takes = pipeline.wiring.signature
        batched = takes.batched
        metas, frames = [], []
        for key, value in inputs.items():
            array = np.asarray(value)
            dtype = takes.input(key).dtype
            metas.append(TensorMeta(key, dtype, array.shape[1:] if batched else array.shape))
            frames.append(bytes(wire.encode_tensor(array, dtype)))
        route = pipeline.resolve(PredictMeta(name, None, None, tuple(metas), outputs))
        rows = len(next(iter(inputs.values()))) if batched else 1
        ticket = self.ticket(id_, route, rows, **keywords)
        pipeline.place(ticket, frames, self.pipelines.clock())
        self.asked[id_] = (name, inputs)
        return ticket

    # A worker's part.

    def start(self, model):
        """Give a batch to the model's worker, unless none waits."""
        return self.rigs[model].start()

    def finish(self, model, slot, error=None):
        """Answer a batch: as its model does, or with an error; the slot is given back."""
        rig = self.rigs[model]
        if error is None:
            rig.finish(slot)
        else:
            for ticket in rig.batcher.finish(slot, rig.now):
                ticket.is_settled = True
                ticket.sink.send_error(ticket, error)
            rig.batcher.release(slot)
        self.freed()

    def run_batch(self, model):
        """Run the one batch that the model's worker can take now."""
        (slot,) = self.start(model)
        self.finish(model, slot)

    def run(self):
        """Run what there is until nothing moves."""
        while any(self._run_one(name) for name in self.rigs):
            pass

    def _run_one(self, name):
        started = self.start(name)
        for slot in started:
            self.finish(name, slot)
        return bool(started)

    def check(self):
        """All is answered, rightly or with an error, and nothing is left anywhere."""
        assert not self.pipelines.executions
        assert set(self.sink.answers) == set(self.asked)
        for rig in self.rigs.values():
            assert rig.batcher.is_idle
        assert not self.client.has_rows
        for metrics in self.pipelines.metrics.values():
            assert metrics.under_way == 0
            assert not self.pipelines.waiting.of(metrics.model)
        assert not self.pipelines.waiting._queues, "or a generation that is no more would be kept"
        for id_, answer in self.sink.answers.items():
            if not isinstance(answer, PoolError):
                self.check_answer(id_, answer)

    def check_answer(self, id_, answer):
        name, inputs = self.asked[id_]
        expected = want(name, inputs)
        assert answer.keys() <= expected.keys()
        for key, value in answer.items():
            assert np.array_equal(value, expected[key]), (id_, key)

    def close(self):
        self.pipelines.waiting.stop()
        for rig in self.rigs.values():
            rig.close()


def scene(act, **settings):
    """Run `act(house)`, which may be a coroutine function, in an event loop of its own."""

    async def main():
        house = House(**settings)
        try:
            outcome = act(house)
            if outcome is not None:
                await outcome
        finally:
            house.close()

    asyncio.run(main())


def rows(n, start=0):
    return {"x": np.arange(start, start + 2 * n, dtype=np.float32).reshape(n, 2)}


def crops(n, start=0.0):
    return {"n": np.int64(n), "x": np.array([start, start + 1], np.float32)}


# -- one request -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("there", rows(1)),
        ("there", rows(3)),
        ("there", rows(0)),
        ("there", rows(7)),  # more than a batch
        ("back", rows(8)),  # all that there is
        ("cascade", crops(0)),
        ("cascade", crops(1)),
        ("cascade", crops(100)),  # more than all slots hold
    ],
)
def test_a_request_goes_through_all_steps(name, inputs):
    def act(house):
        house.ask(1, name, inputs)
        house.run()
        house.check()
        assert not isinstance(house.sink.answers[1], PoolError)

    scene(act)


def test_only_outputs_wanted_are_sent_in_the_order_wanted():
    def act(house):
        house.ask(1, "there", rows(2), outputs=("back", "y"))
        house.run()
        assert list(house.sink.answers[1]) == ["back", "y"]
        house.check()

    scene(act)


def test_users_share_the_batches_of_every_step():
    def act(house):
        for i in range(4):
            house.ask(i, "there", rows(1, i))
        house.run()
        house.check()
        for name in ("double", "plus", "shout"):
            assert house.rigs[name].batches == [4]

    scene(act)


def test_pipelines_and_direct_requests_share_batches_too():
    def act(house):
        rig = house.rigs["double"]
        house.ask(1, "there", rows(2))
        rig.place("direct", rows(1, 50))
        house.run()
        house.check()
        assert rig.batches == [3]
        assert np.array_equal(rig.sink.answers["direct"]["y"], rows(1, 50)["x"] * 2)

    scene(act)


def test_models_are_told_of_rows_once_in_the_next_turn():
    async def act(house):
        for i in range(3):
            house.ask(i, "there", rows(1))
        assert house.advanced == []
        await asyncio.sleep(0)
        assert house.advanced == [house.generations["double"]]
        house.run()
        house.check()

    scene(act)


# -- refusals --------------------------------------------------------------------------------------


def test_the_first_step_refuses_as_its_model_does():
    def act(house):
        house.ask(1, "there", rows(8))
        with pytest.raises(Overloaded, match="step 'double' of pipeline 'there': no room for 1 rows") as e:
            house.ask(2, "there", rows(1))
        assert e.value.retry_after_ms == 10
        with pytest.raises(TooLarge, match="step 'double' of pipeline 'there': request of 9 rows"):
            house.ask(3, "there", rows(9))
        house.run()
        house.check()

    scene(act)


def test_no_more_requests_than_configured_and_not_all_of_them_to_one():
    few = {"back": PipelineConfig(steps=PIPELINES["back"].steps, max_requests=3)}

    def act(house):
        house.ask(1, "back", rows(1))
        house.ask(2, "back", rows(1))
        with pytest.raises(Overloaded, match="this client has 2 requests of at most 2 in pipeline 'back'"):
            house.ask(3, "back", rows(1))
        house.client = other = Client(b"", -1, 0)
        house.ask(4, "back", rows(1))
        with pytest.raises(Overloaded, match="'back' has 3 requests under way, as many as it may"):
            house.ask(5, "back", rows(1))
        house.run()
        house.check()
        assert not other.has_rows

    scene(act, configs=few)


def test_what_is_wrong_with_a_request_is_told_before_anything_runs():
    def act(house):
        with pytest.raises(InvalidInput, match=r"inputs \['x'\] are missing"):
            house.ask(1, "cascade", {"n": np.int64(1)})
        with pytest.raises(InvalidInput, match=r"input 'x' has rows of shape \[3\]; wanted \[2\]"):
            house.ask(1, "there", {"x": np.ones((1, 3), np.float32)})
        route = house.pipelines.served["cascade"].resolve(
            PredictMeta("c", None, None, (TensorMeta("n", "int64", ()), TensorMeta("x", "float32", (2,))))
        )
        place = house.pipelines.served["cascade"].place
        with pytest.raises(InvalidInput, match="2 rows for pipeline 'cascade', which is not batched"):
            place(house.ticket(1, route, 2), [bytes(16), bytes(16)], 0.0)
        with pytest.raises(WireError, match="tensor frame 1 has 7 bytes; wanted 8"):
            place(house.ticket(1, route, 1), [bytes(8), bytes(7)], 0.0)
        house.check()

    scene(act)


def test_what_only_a_later_step_takes_is_looked_at_at_the_door():
    both = {
        "both": PipelineConfig(
            steps=(step("double", x="request.x"), step("plus", x="request.late")),
            outputs={"a": "double.y", "b": "plus.y"},
        )
    }

    def act(house):
        pipeline = house.pipelines.served["both"]
        metas = tuple(TensorMeta(name, "float32", (2,)) for name in ("x", "late"))
        route = pipeline.resolve(PredictMeta("both", None, None, metas))
        with pytest.raises(WireError, match="tensor frame 1 has 7 bytes; wanted 8"):
            pipeline.place(house.ticket(1, route, 1), [bytes(8), bytes(7)], 0.0)
        house.check()

    scene(act, configs=both)


def test_settings_that_change_hold_for_the_next_request():
    def act(house):
        house.ask(1, "there", rows(3))
        house.run()
        double = house.generations["double"]
        double.apply(msgspec.structs.replace(double.config, max_inflight_rows=2))
        house.pipelines.forget()  # as the engine does
        with pytest.raises(TooLarge, match="model 'm' takes at most 2 of one client"):
            house.ask(2, "there", rows(3))
        house.ask(3, "there", rows(2))
        house.run()
        house.check()

    scene(act)


def test_shapes_without_end_are_not_all_remembered(monkeypatch):
    wide = signature({"x": ("float32", (None, None))}, {"y": ("float32", (None, None))})
    monkeypatch.setattr(front_pipeline, "_REMEMBERED_MAX", 3)

    def act(house):
        house.rigs["double"].close()
        house.rigs["double"] = Rig(
            generation(wide, max_batch_size=4, slots=2, max_rows_bytes=1024), NumpyModel(FUNCTIONS["double"])
        )
        pipeline = {"p": PipelineConfig(steps=(step("double", x="request.x"),))}
        house.pipelines.serve(house.pipelines.wire(pipeline, house.generations))
        served = house.pipelines.served["p"]
        for width in (*range(1, 9), 1):
            x = np.full((2, width), width, np.float32)
            house.ask(width if width not in house.asked else "again", "p", {"x": x})
            house.run()
            assert max(len(served._routes), len(served._replies)) <= 3
        assert set(house.sink.answers) == {*range(1, 9), "again"}
        for id_, answer in house.sink.answers.items():
            width = 1 if id_ == "again" else id_
            assert np.array_equal(answer["y"], np.full((2, width), 2 * width, np.float32))

    scene(act)


def test_a_bundle_is_admitted_one_by_one():
    def act(house):
        pipeline = house.pipelines.served["back"]
        route = pipeline.resolve(PredictMeta("back", None, None, (TensorMeta("x", "float32", (2,)),)))
        counts = [2, 7, 3, 9]
        x = rows(sum(counts))["x"]
        refused = pipeline.place_all(house.parts(route, counts), [x.tobytes()], 0.0)
        assert [(type(e), ids) for e, ids in refused] == [(Overloaded, [1]), (TooLarge, [3])]
        house.asked = {0: ("back", {"x": x[:2]}), 2: ("back", {"x": x[9:12]})}
        house.run()
        house.check()

    scene(act)


def test_a_defect_refuses_one_request_of_a_bundle(monkeypatch):
    def act(house):
        pipeline = house.pipelines.served["back"]
        route = pipeline.resolve(PredictMeta("back", None, None, (TensorMeta("x", "float32", (2,)),)))
        parts = house.parts(route, [1, 1, 1])
        plus, count = house.generations["plus"], iter(range(3))
        place = plus.fill

        def fail_second(*arguments):
            if next(count) == 1:
                raise ZeroDivisionError
            return place(*arguments)

        monkeypatch.setattr(plus, "fill", fail_second)
        x = rows(3)["x"]
        ((error, ids),) = pipeline.place_all(parts, [x.tobytes()], 0.0)
        assert isinstance(error, InternalError)
        assert ids == [1]
        house.asked = {i: ("back", {"x": x[i : i + 1]}) for i in (0, 2)}
        monkeypatch.undo()
        house.run()
        house.check()

    scene(act)


# -- what goes wrong on the way --------------------------------------------------------------------


def test_an_error_names_its_step_and_ends_its_own_requests():
    def act(house):
        house.ask(1, "there", rows(1))
        house.ask(2, "back", rows(1))
        house.run_batch("double")
        (slot,) = house.start("plus")
        assert len(slot.tickets) == 2
        house.finish("plus", slot, ModelError("of the model"))
        for id_, name in ((1, "there"), (2, "back")):
            error = house.sink.answers[id_]
            assert isinstance(error, ModelError)
            assert error.message == f"step 'plus' of pipeline '{name}': of the model"
        house.check()
        assert house.pipelines.metrics["there"].steps["plus"].errors == 1

    scene(act)


def test_one_part_that_fails_withdraws_the_others():
    def act(house):
        house.ask(1, "cascade", crops(20))
        house.run_batch("cut")
        assert house.pipelines.waiting.of("cascade") == {"double": 1}
        (slot,) = house.start("double")
        house.finish("double", slot, ModelError("no"))
        house.check()  # also the part that another slot holds
        assert isinstance(house.sink.answers[1], ModelError)

    scene(act)


def test_inputs_of_a_step_that_do_not_agree_end_its_request():
    crooked = signature(
        {"x": ("float32", (None, 2)), "z": ("float32", (None, 2))}, {"y": ("float32", (None, 2))}
    )
    pipeline = {
        "p": PipelineConfig(
            steps=(step("cut", n="request.n", x="request.x"), step("plus", x="cut.rows", z="request.z"))
        )
    }

    def act(house):
        house.rigs["plus"].close()
        house.rigs["plus"] = Rig(
            generation(crooked, max_batch_size=4, slots=2, max_rows_bytes=1024),
            NumpyModel(FUNCTIONS["double"]),
        )
        house.pipelines.serve(house.pipelines.wire(pipeline, house.generations))
        house.ask(1, "p", crops(3) | {"z": np.ones((2, 2), np.float32)})
        house.run()
        error = house.sink.answers[1]
        assert isinstance(error, InvalidInput)
        assert error.message == (
            "step 'plus' of pipeline 'p': its inputs must have equally many rows; got 'x' of shape [3, 2], "
            "'z' of shape [2, 2]"
        )
        house.check()

    scene(act)


def test_a_defect_after_a_step_is_for_its_own_request(monkeypatch, caplog):
    """And not for those whose rows were in the same batch."""

    def act(house):
        first, second = (house.ask(i, "there", rows(1, i)) for i in (1, 2))
        (execution,) = (e for e in house.pipelines.executions if e.whole is first)

        def fail(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(execution, "_leave", fail)
        house.run()
        house.check()
        assert isinstance(house.sink.answers[1], InternalError)
        assert (
            house.sink.answers[1].message
            == "step 'double' of pipeline 'there': ZeroDivisionError after the step"
        )
        assert not isinstance(house.sink.answers[2], PoolError)
        assert second.is_settled

    scene(act)
    caplog.clear()  # its traceback has views of a slot


def test_an_answer_that_cannot_be_sent_is_one_error(monkeypatch, caplog):
    """And the room that the request took is given back."""

    def act(house):
        send = house.sink.send_frames

        def fail_first(ticket, *rest):
            if ticket.id == 1:
                raise ZeroDivisionError
            send(ticket, *rest)

        monkeypatch.setattr(house.sink, "send_frames", fail_first)
        for i in (1, 2):
            house.ask(i, "there", rows(1, i))
        house.run()
        house.check()
        error = house.sink.answers[1]
        assert isinstance(error, InternalError)
        assert error.message == "step 'shout' of pipeline 'there': ZeroDivisionError after the step"
        assert not isinstance(house.sink.answers[2], PoolError)

    scene(act)
    caplog.clear()  # its traceback has views of a slot


def test_what_is_withdrawn_is_freed_without_the_garbage_collector():
    def act(house):
        gc.disable()
        try:
            house.ask(1, "there", rows(6))
            (execution,) = house.pipelines.executions
            (slot,) = house.start("double")
            execution.withdraw()
            freed = weakref.ref(execution)
            del execution
            house.finish("double", slot)
            house.run()
            del slot
            assert freed() is None
        finally:
            gc.enable()
        del house.asked[1]
        house.check()

    scene(act)


def test_a_row_that_no_slot_holds_ends_its_request():
    long = {"there": PipelineConfig(steps=(step("shout", word="request.s"),))}

    def act(house):
        with pytest.raises(TooLarge, match="step 'shout' of pipeline 'there': row 1 of the request has more"):
            house.ask(1, "there", {"s": [b"a", b"x" * 5000]})
        house.check()

    scene(act, configs=long)


def test_what_killed_a_worker_is_refused_at_its_step():
    def act(house):
        plus = house.generations["plus"]
        house.ask(1, "there", rows(1))
        house.run_batch("double")
        (slot,) = house.start("plus")
        (ticket,) = slot.tickets
        plus.poison.remember(ticket.route.layout.number, plus.read_rows(slot, ticket), "it died", 0.0)
        house.finish("plus", slot, ModelError("first"))
        house.pipelines.clock = lambda: 1.0  # within the time that it is remembered
        house.ask(2, "there", rows(1))
        house.run()
        assert "step 'plus' of pipeline 'there': the same request came before" in str(house.sink.answers[2])
        house.ask(3, "there", rows(1, 8))
        house.run()
        house.check()
        assert not isinstance(house.sink.answers[3], PoolError)

    scene(act)


def test_a_model_without_workers_fails_who_waits_and_who_comes():
    def act(house):
        house.ask(1, "cascade", crops(30))
        house.ask(2, "there", rows(1))
        house.run_batch("cut")
        assert house.pipelines.waiting.of("cascade") == {"double": 1}
        double = house.generations["double"]
        error = Unavailable("model 'double' is failed")
        house.lost[double] = error.message
        for ticket in house.rigs["double"].batcher.drop_waiting():
            ticket.sink.send_error(ticket, error)
        house.pipelines.waiting.drop(error, double)
        with pytest.raises(Unavailable, match="step 'double' of pipeline 'there': model 'double' is failed"):
            house.ask(3, "there", rows(1))
        house.ask(4, "back", rows(1))
        house.run()
        house.check()
        assert {type(answer) for answer in house.sink.answers.values()} == {Unavailable}

    scene(act)


def test_hundreds_that_wait_for_a_model_without_workers_are_told_one_after_the_other():
    """Not one within the other: each that ends has those that wait looked at again."""
    count = 300

    def act(house):
        fill(house, "plus")
        for i in range(count):
            house.ask(i, "there", rows(1, i))
            house.run_batch("double")
        assert house.pipelines.waiting.of("there") == {"plus": count}
        house.lost[house.generations["plus"]] = "model 'plus' is failed"
        house.freed()
        assert {type(answer) for answer in house.sink.answers.values()} == {Unavailable}
        house.run()
        house.check()

    scene(act)


def test_no_step_begins_once_the_server_stops():
    def act(house):
        house.ask(1, "there", rows(1))
        (slot,) = house.start("double")
        house.is_stopping = True
        house.finish("double", slot)
        assert isinstance(house.sink.answers[1], Unavailable)
        house.check()

    scene(act)


def test_parts_whose_shapes_differ_do_not_join():
    growing = signature({"x": ("float32", (None, 2))}, {"y": ("float32", (None, None))})

    def act(house):
        pipeline = {"p": PipelineConfig(steps=(step("double", x="request.x"),))}
        house.rigs["double"].close()
        rig = house.rigs["double"] = Rig(
            generation(growing, max_batch_size=4, slots=2, max_rows_bytes=1024),
            NumpyModel(lambda _, a: [np.zeros((len(a[0]), len(rig.batches) + 1), np.float32)]),
        )
        house.pipelines.serve(house.pipelines.wire(pipeline, house.generations))
        house.ask(1, "p", rows(6))
        house.run()
        assert "in several batches and gave row shapes [(1,)] and [(2,)]" in str(house.sink.answers[1])
        house.check()

    scene(act)


def test_a_defect_at_the_door_is_for_whoever_asks_and_leaves_nothing(monkeypatch):
    def act(house):
        plus = house.generations["plus"]

        def fail(*_):
            raise ZeroDivisionError

        fill = plus.fill

        def fill_once(*arguments):
            monkeypatch.setattr(plus, "fill", fail)
            return fill(*arguments)

        monkeypatch.setattr(plus, "fill", fill_once)
        with pytest.raises(ZeroDivisionError):
            house.ask(1, "back", rows(6))
        monkeypatch.undo()
        house.run()
        house.check()

    scene(act)


# -- waiting ---------------------------------------------------------------------------------------


def fill(house, model, count=8):
    """Direct requests of as many clients take all of an arena."""
    for i in range(count):
        house.rigs[model].account = Account()
        house.rigs[model].place(("direct", i), rows(1))


def park(house):
    """A request waits for room in its second step's model."""
    fill(house, "plus")
    house.ask(1, "there", rows(2))
    house.run_batch("double")
    assert house.pipelines.waiting.of("there") == {"plus": 1}


def test_whoever_finds_no_room_waits_and_holds_no_slot():
    def act(house):
        park(house)
        assert house.rigs["double"].batcher.is_idle
        house.run()
        house.check()
        assert house.pipelines.metrics["there"].steps["plus"].waited == 1

    scene(act)


def test_rows_come_to_a_model_when_they_find_room_in_it():
    """Or what one waited in vain would be in the times of those that came much later."""

    def act(house):
        park(house)
        later = house.pipelines.clock() + 100
        house.pipelines.clock = lambda: later
        (execution,) = house.pipelines.executions
        house.run_batch("plus")
        (part,) = (ticket for _, ticket in house.rigs["plus"].batcher.unsettled() if ticket.sink is execution)
        assert part.turn.started == part.turn.ended == later
        house.run()
        house.check()

    scene(act)


def test_they_get_room_by_arrival_and_priority():
    def act(house):
        fill(house, "plus")
        for id_, priority in ((1, 2), (2, 1), (3, 1), (4, 0)):
            house.ask(id_, "there", rows(4, id_), priority=priority)
            house.run_batch("double")
        order = []
        send = house.sink.send_frames
        house.sink.send_frames = lambda ticket, *rest: (order.append(ticket.id), send(ticket, *rest))
        house.run()
        assert order == [4, 2, 3, 1]
        house.check()

    scene(act)


def test_one_that_may_have_no_more_rows_does_not_stop_the_next():
    def act(house):
        first, second = house.client, Client(b"", -1, 0)
        fill(house, "double")
        for house.client, n in ((first, 8), (second, 3)):
            house.ask(n, "cascade", crops(n))
            house.run_batch("cut")
        assert house.pipelines.waiting.of("cascade") == {"double": 2}
        for waiting in (2, 1):  # then the first one has as many rows as it may, and still waits
            house.run_batch("double")
            assert house.pipelines.waiting.of("cascade") == {"double": waiting}
        (execution,) = (e for e in house.pipelines.executions if e.waits_at)
        assert execution.whole.client is first
        house.run()
        house.check()

    scene(act, max_inflight_rows=4)


def test_a_defect_while_one_waits_is_its_own(monkeypatch):
    """And not that of whoever gave the slot back, nor of those behind it."""

    def act(house):
        fill(house, "plus")
        for id_ in (1, 2):
            house.ask(id_, "there", rows(2, id_))
            house.run_batch("double")
        assert house.pipelines.waiting.of("there") == {"plus": 2}
        plus = house.generations["plus"]
        place = plus.fill

        def fail_once(*_):
            monkeypatch.setattr(plus, "fill", place)
            raise ZeroDivisionError

        monkeypatch.setattr(plus, "fill", fail_once)
        house.run_batch("plus")
        assert house.pipelines.waiting.of("there") == {}
        house.run()
        house.check()
        assert isinstance(house.sink.answers[1], InternalError)
        assert "step 'plus' of pipeline 'there': ZeroDivisionError" in str(house.sink.answers[1])
        assert not isinstance(house.sink.answers[2], PoolError)

    scene(act)


def test_a_deadline_passes_while_it_waits():
    async def act(house):
        fill(house, "plus")
        now = house.pipelines.clock()
        for id_, deadline in ((1, now + 0.05), (2, now + 0.02), (3, inf)):
            house.ask(id_, "there", rows(1), deadline=deadline)
        house.run_batch("double")
        assert house.pipelines.waiting.of("there") == {"plus": 3}
        while house.pipelines.waiting.of("there") != {"plus": 1}:
            await asyncio.sleep(0.001)
        assert list(house.sink.answers) == [2, 1]
        error = house.sink.answers[1]
        assert isinstance(error, DeadlineExceeded)
        assert error.message.startswith("step 'plus' of pipeline 'there': no answer within the request's")
        house.run()
        house.check()

    scene(act)


def test_what_would_be_too_late_is_refused_at_the_door():
    def act(house):
        for rig in house.rigs.values():
            rig.batcher.expect = lambda _now, batcher=rig.batcher: setattr(batcher, "_expected_s", 1.0)
        now = house.pipelines.clock()
        with pytest.raises(Overloaded, match="pipeline 'back' would answer in about 2000 ms; the request"):
            house.ask(1, "back", rows(1), deadline=now + 1.5)
        house.check()

    scene(act)


# -- any order of events ---------------------------------------------------------------------------

EVENTS = ("ask", "ask", "ask", "start", "start", "finish", "finish", "finish", "fail", "withdraw", "drop")


@settings(max_examples=80)
@given(
    data=st.data(),
    slots=st.integers(1, 3),
    share=st.sampled_from([1, 3, 1 << 20]),
    count=st.integers(1, 60),
)
def test_exactly_one_right_answer_and_nothing_left_in_any_order(data, slots, share, count):
    """Two pipelines use the same two models the other way round, and a third multiplies rows."""

    def act(house):
        running = []
        withdrawn = set()
        ids = iter(range(1, 1000))
        clients = [house.client, Client(b"", -1, 0)]
        for _ in range(count):
            event = data.draw(st.sampled_from(EVENTS))
            if event == "ask":
                name = data.draw(st.sampled_from(sorted(PIPELINES)))
                n = data.draw(st.integers(0, 9))
                house.client = data.draw(st.sampled_from(clients))
                with contextlib.suppress(Overloaded, TooLarge):
                    house.ask(next(ids), name, crops(n, n) if name == "cascade" else rows(n, n))
            elif event == "start":
                model = data.draw(st.sampled_from(sorted(SIGNATURES)))
                if all(model != busy for busy, _ in running):
                    running += [(model, slot) for slot in house.start(model)]
            elif event in ("finish", "fail") and running:
                model, slot = running.pop(data.draw(st.integers(0, len(running) - 1)))
                house.finish(model, slot, ModelError("told to") if event == "fail" else None)
            elif event == "withdraw" and house.pipelines.executions:
                execution = data.draw(st.sampled_from(list(house.pipelines.executions)))
                withdrawn.add(execution.whole.id)
                execution.withdraw()
            elif event == "drop":
                house.pipelines.waiting.drop(Cancelled("dropped"))
        # No event was needed but that what runs ends, and that workers take what there is.
        for model, slot in running:
            house.finish(model, slot)
        house.run()
        assert not withdrawn & house.sink.answers.keys(), "answered though nobody waits"
        for id_ in withdrawn:
            del house.asked[id_]
        house.check()
        assert not any(client.has_rows for client in clients)

    scene(act, slots=slots, max_inflight_rows=share)
