"""What bench/peers makes of what load generators, servers and clocks say."""

import contextlib
import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.peers import doors, environments, report, workloads
from bench.peers.ceilings import naked
from bench.peers.load import LoadFailed, read_h2load, read_perf_analyzer, read_pool
from bench.peers.summary import better_waits, contenders, medians, ratio, recovery, share, spread, unmeasured
from bench.peers.systems import SYSTEMS, EndedEarly
from bench.peers.trees import spent_us

H2LOAD = """\
finished in 510ms, 8.00 req/s, 1.72KB/s
requests: 5 total, 5 started, 5 done, 4 succeeded, 1 failed, 0 errored, 0 timeout
status codes: 4 2xx, 0 3xx, 0 4xx, 1 5xx
"""
H2LOAD_LOG = "".join(
    f"1700000000000000\t{status}\t{us}\n"
    for status, us in ((200, 1000), (200, 2000), (500, 9), (200, 3000), (200, 4000))
)

PERF_CSV = (
    "Concurrency,Inferences/Second,Client Send,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
    "16,3192.85,0,0,4114,9000,11000,13596\n"
)


def row(**fields):
    defaults = {
        "workload": "mlp",
        "system": "mosec",
        "server": "mosec",
        "wait_ms": 0.0,
        "workers": 1,
        "in_flight": 64,
        "requests_per_s": 100.0,
        "p50_ms": 1.0,
        "p99_ms": 2.0,
        "cpu_us": 10.0,
        "failures": 0,
        "round": "0",
    }
    return defaults | fields


def told(*rounds, **fields):
    """The row that rounds come to; they are dicts of what differs, the first is the round of all."""
    (found,) = medians(row(**fields, **each, round=str(number)) for number, each in enumerate(rounds))
    return found


# -- load generators ---------------------------------------------------------------------------------


def test_h2load_counts_good_answers_by_its_log():
    load = read_h2load(H2LOAD, H2LOAD_LOG)
    assert load == (5, pytest.approx(1000.0, rel=1e-3), 2.5, pytest.approx(3.97), 1)


def test_a_rate_is_that_of_the_middle():
    starts = [0, *range(5_000_000, 5_500_000, 5_000), 9_000_000]  # one long before, one long after
    log = "".join(f"{at}\t200\t500\n" for at in starts)
    assert read_h2load(H2LOAD, log).requests_per_s == pytest.approx(200)


def test_h2load_without_a_good_answer_has_no_percentiles():
    load = read_h2load(H2LOAD, "1\t-1\t5\n")
    assert load.requests_per_s == 0
    assert math.isnan(load.p50_ms)
    assert load.failures == 1


def test_h2load_that_did_not_run_is_no_zero():
    with pytest.raises(LoadFailed, match="cannot connect"):
        read_h2load("cannot connect", "")


def test_perf_analyzer_is_read_from_its_file_and_its_counts_from_what_it_prints():
    load = read_perf_analyzer("    Request count: 3000\n    Request count: 460\n", PERF_CSV)
    assert load == (3460, 3192.85, 4.114, 13.596, 0)
    with pytest.raises(LoadFailed, match="No valid requests"):
        read_perf_analyzer("No valid requests", "")


def test_pool_bench_is_read_behind_whatever_it_says_first():
    document = {"requests_per_s": 9.0, "steady_per_s": 10.0, "p50_ms": 1.0, "p99_ms": 2.0}
    document["errors"] = {"OVERLOADED": 3}
    assert read_pool(f"a warning\n{json.dumps(document)}", 50) == (50, 10.0, 1.0, 2.0, 3)
    with pytest.raises(LoadFailed, match="no server"):
        read_pool("pool: UNAVAILABLE: no server", 50)


# -- ways in -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300))
def test_grpc_requests_are_what_the_protocol_says(floats):
    grpc = np.array(floats, np.float32)
    fields = dict(doors._fields(doors.grpc_request(grpc)))
    assert fields[1] == b"model"
    assert fields[7] == grpc.tobytes()
    tensor = dict(doors._fields(fields[5]))
    assert tensor[1] == b"x"
    assert tensor[2] == b"FP32"
    sizes, at = [], 0
    while at < len(tensor[3]):
        size, at = doors._read_varint(tensor[3], at)
        sizes.append(size)
    assert sizes == [1, len(floats)]


def test_grpc_answers_are_raw_or_lists_of_floats():
    payload = np.arange(40, dtype=np.float32).tobytes()
    assert doors.grpc_answer(doors._field(1, b"model") + doors._field(6, payload)) == payload
    contents = doors._field(5, doors._field(6, payload))
    assert doors.grpc_answer(doors._field(5, doors._field(1, b"y") + contents)) == payload
    with pytest.raises(ValueError, match="no output"):
        doors.grpc_answer(doors._field(1, b"model"))


def test_a_grpc_body_has_its_length_in_front():
    _, body = doors.V2_GRPC.encode(np.zeros(4, np.float32))
    compressed, size = struct.unpack_from(">BI", body)
    assert (compressed, size) == (0, len(body) - 5)


def test_tritons_binary_answers_are_cut_behind_their_header():
    payload = np.array([1.5, -2.0], np.float32).tobytes()
    header = json.dumps({"outputs": [{"name": "y", "parameters": {"binary_data_size": len(payload)}}]})
    assert doors.V2_HTTP.decode(header.encode() + payload) == payload


# -- rounds ------------------------------------------------------------------------------------------


def test_rounds_are_told_by_their_medians_and_all_their_failures():
    found = told(*({"requests_per_s": rate, "failures": 1} for rate in (1e6, 10.0, 1000.0, 20.0)))
    assert (found["requests_per_s"], found["failures"], found["rounds"]) == (20.0, 4, 3)
    assert found["by_round"]["requests_per_s"] == {"0": 1e6, "1": 10.0, "2": 1000.0, "3": 20.0}


def test_who_was_only_in_the_round_of_all_is_told_by_that():
    found = told({"requests_per_s": 7.0})
    assert (found["requests_per_s"], found["rounds"]) == (7.0, 1)


def test_a_recovery_that_mostly_never_came_is_never():
    never = [{"recovery_s": value, "lost": 0} for value in (1.0, None, 1.0, None)]
    assert told(*never)["recovery_s"] is None
    assert told(*never, *({"recovery_s": value, "lost": 0} for value in (2.0, 3.0)))["recovery_s"] == 3.0


def rates(*values):
    return told(*({"requests_per_s": value} for value in values))


def test_a_ratio_is_the_median_of_those_within_head_to_head_rounds():
    # Medians would say 0.9, for the machine was slower in two rounds that one of them was lucky in.
    assert ratio(rates(1.0, 100, 200, 90), rates(9.0, 50, 100, 100), "requests_per_s") == 2.0


def test_a_ratio_with_who_was_only_in_the_round_of_all_is_of_that():
    assert ratio(rates(30.0, 100.0, 200.0), rates(10.0), "requests_per_s") == 3.0
    assert ratio(rates(30.0), told({"p50_ms": 1.0}), "gb_per_s") is None


def test_what_never_came_took_for_ever():
    def recoveries(*values):
        return told(*({"recovery_s": value, "lost": 0} for value in values))

    own, other = recoveries(None, 1.0, 1.0, 1.0), recoveries(1.0, 2.0, None, None)
    assert ratio(own, other, "recovery_s") == 0.0
    assert ratio(other, own, "recovery_s") == math.inf
    assert ratio(recoveries(None), recoveries(None), "recovery_s") is None


def test_shares_and_spreads_are_medians_of_rounds_too():
    own = told(
        *({"requests_per_s": rate, "p50_ms": p50} for rate, p50 in ((1.0, 1.0), (90.0, 1.0), (40.0, 4.0)))
    )
    ceilings = {"1": {"bare": {"requests_per_s": 100.0, "other_ms": 2.0}}}
    ceilings["2"] = {"bare": {"requests_per_s": 50.0, "other_ms": 2.0}}
    assert share(own, ceilings, "bare", "requests_per_s") == pytest.approx(0.85)
    assert share(own, ceilings, "bare", "p50_ms", "other_ms") == pytest.approx(1.25)
    assert share(own, ceilings, "echo", "requests_per_s") is None
    assert spread(own) == pytest.approx(1.25)


def test_the_better_wait_is_the_faster_one_and_for_one_request_the_quicker():
    rows = [
        row(wait_ms=2.0, requests_per_s=200.0),
        row(wait_ms=0.0, requests_per_s=100.0),
        row(wait_ms=2.0, in_flight=1, requests_per_s=300.0, p50_ms=2.5),
        row(wait_ms=0.0, in_flight=1, requests_per_s=200.0, p50_ms=0.5),
    ]
    assert [found["wait_ms"] for found in better_waits(medians(rows))] == [2.0, 0.0]


def test_contenders_lead_at_some_number_of_requests():
    rows = [
        row(server="pool", requests_per_s=9e9),
        row(server="fast", requests_per_s=300.0),
        row(server="slow", requests_per_s=1.0),
        row(server="quick", in_flight=1, p50_ms=0.1),
        row(server="fast", in_flight=1, p50_ms=0.2),
        row(server="slow", in_flight=1, p50_ms=9.0, requests_per_s=1e6),
    ]
    assert contenders(rows, 1, "pool") == [("quick", 0.0), ("fast", 0.0)]


def test_who_failed_once_and_was_measured_is_not_absent():
    rows = [
        row(system="ray", in_flight=0, error="no answer within 120 s"),
        row(system="ray", in_flight=1, error="ended with exit code 1"),
        row(system="mosec"),
        row(system="mosec", in_flight=0, error="ended with exit code 1"),
    ]
    assert unmeasured(rows) == {"ray": "no answer within 120 s"}


# -- kills -------------------------------------------------------------------------------------------


def log_of(rates, failures=()):
    """Answers at so many a second, second by second, from 0 s on; and failures at instants."""
    entries = [(second + i / rate, 1) for second, rate in enumerate(rates) for i in range(rate)]
    return "".join(f"{at} {ok} 0.1\n" for at, ok in sorted([*entries, *((at, 0) for at in failures)]))


def test_full_service_is_back_when_its_rate_is():
    took, lost = recovery(log_of([100] * 5 + [50] * 3 + [100] * 5, (5.1, 6.0, 1.0)), 5.0, 5.5, 13.0)
    assert took == pytest.approx(2.8, abs=0.1)  # four fifths of that second are at the full rate
    assert lost == 2


def test_a_rate_that_never_falls_needs_no_recovery():
    assert recovery(log_of([100] * 12), 5.0, 5.0, 12.0) == (0.0, 0)


def test_full_service_is_not_back_before_the_worker_is():
    assert recovery(log_of([100] * 12), 5.0, 8.0, 12.0) == (3.0, 0)
    assert recovery(log_of([100] * 12), 5.0, math.inf, 12.0) == (None, 0)
    rates = log_of([100] * 5 + [50] + [100] * 7)
    assert recovery(rates, 5.0, 8.0, 13.0)[0] == pytest.approx(3.0, abs=0.1)


def test_a_rate_that_stays_low_never_recovers():
    assert recovery(log_of([100] * 5 + [50] * 8), 5.0, 5.1, 13.0) == (None, 0)


def test_a_server_that_never_answered_has_not_recovered():
    assert recovery("1.0 0 10.0\n7.0 0 10.0\n", 5.0, 5.1, 13.0) == (None, 1)


# -- tables ------------------------------------------------------------------------------------------


def results(rows, ceilings=None):
    measured = {
        "commit": "C",
        "ceilings": ceilings or {},
        "ceilings_by_round": {"0": ceilings or {}},
        "rows": medians(rows),
        "errors": [],
    }
    return {
        "machine": "M",
        "system": "S",
        "libraries": "L",
        "date": "D",
        "rounds": 5,
        "absent": {"ray": "does not install: no wheel"},
        "workloads": {measured["rows"][0]["workload"]: measured},
    }


def test_goals_are_told_against_the_best_peer_and_only_where_measured():
    rows = [
        row(system="pool", in_flight=256, requests_per_s=1000.0, cpu_us=5.0),
        row(system="mosec", in_flight=256, requests_per_s=200.0, cpu_us=20.0),
        row(system="Flask", in_flight=256, requests_per_s=100.0, cpu_us=10.0),
    ]
    found = {cells[0]: cells[1:] for cells in report.goals(results(rows)) if cells}
    assert found == {
        "MLP, 256 in flight: requests/s": ["5.00x (mosec)", "at least 4.00"],
        "MLP, 256 in flight: server CPU per request": ["0.50x (Flask)", "at most 0.33 (missed)"],
        "MLP, 256 in flight: share of the naked loop": ["not measured", "at least 0.70"],
    }


def test_large_requests_are_compared_where_each_is_at_its_best():
    rows = [
        row(workload="large", system=system, in_flight=level, gb_per_s=value)
        for system, values in (("pool", (8.0, 12.0)), ("Triton gRPC, shared memory", (3.0, 2.0)))
        for level, value in zip((1, 2), values, strict=True)
    ]
    found = report.goals(results(rows, {"memcpy": {"gb_per_s": 16.0}}))
    assert [cells for cells in found if cells] == [
        ["25 MB requests: GB/s against Triton's shared memory", "4.00x (Triton gRPC, shared memory)",
         "at least 1.50"],
        ["  share of memcpy", "0.75", "at least 0.50"],
    ]  # fmt: skip


def test_a_share_is_of_the_faster_loop_with_the_frames_of_pools_client_and_others_have_no_goal():
    ceilings = {"naked loop bundled, line": 800.0, "naked loop bundled": 640.0, "naked loop": 500.0}
    ceilings |= {"bare": 2000.0, "echo": 400.0}
    ceilings = {name: {"requests_per_s": rate, "client_cpu_us": 1.0} for name, rate in ceilings.items()}
    found = report.goals(results([row(system="pool", in_flight=256, requests_per_s=400.0)], ceilings))
    assert [cells for cells in found if cells] == [
        ["MLP, 256 in flight: share of the naked loop", "0.50", "at least 0.70 (missed)"],
        ["  share of the naked loop past ZeroMQ", "0.50", ""],
        ["  share of the naked loop through ZeroMQ", "0.62", ""],
        ["  share of the naked loop through ZeroMQ, one row a message", "0.80", ""],
        ["  share of the model alone, on one core", "0.20", ""],
        ["  share of a naked ROUTER with one row a message", "1.00", ""],
    ]


def test_the_table_has_every_system_and_tells_who_is_absent():
    rows = [row(system="pool", in_flight=256), row(system="mosec", in_flight=256, failures=7)]
    text = report.render(results(rows, {"bare": {"requests_per_s": 400.0}}))
    assert "| mosec | 1 | 100 (2) | 10 | 25% | 7 |" in text
    assert "- ray: does not install: no wheel" in text
    assert "commits C (mlp)" in text
    assert text.startswith("<!-- peers")


def test_ceilings_are_medians_of_their_rounds():
    rounds = [{"bare": {"requests_per_s": value}} for value in (3.0, 1.0, 2.0)]
    assert report.median_of(rounds) == {"bare": {"requests_per_s": 2.0}}


# -- ceilings ----------------------------------------------------------------------------------------

X = np.arange(64, dtype=np.float32).reshape(8, 8)
MODEL = """\
from pool.python import model

calls = 0


@model(inputs={"x": "float32 [any, 8]"}, outputs={"y": "float32 [any, 2]"})
def answer(x):
    global calls
    calls += 1
    return x[:, :2] * (2 if calls < %s else 3)
"""


def loop_round(folder, right_calls):
    """The naked loop around a model that doubles, as often as is said."""
    file = folder / "model.py"
    file.write_text(MODEL % right_calls)
    return naked(f"{file}:answer", X, X[:, :2] * 2, 16, 4, 0.1, "python")


def test_the_naked_loop_answers_in_both_forms_both_ways_and_tells_what_each_process_took(tmp_path):
    found = loop_round(tmp_path, 10**9)
    loops = ["naked loop, line", "naked loop bundled, line", "naked loop", "naked loop bundled"]
    assert list(found) == loops
    for figures in found.values():
        assert figures.keys() == {"requests_per_s", "client_cpu_us", "front_cpu_us", "worker_cpu_us"}
        assert figures["requests_per_s"] > 0


@pytest.mark.parametrize("right_calls", [0, 100])  # of a loop's first answers, at most 48 calls, or none
def test_a_naked_loop_that_does_not_compute_is_no_ceiling(tmp_path, right_calls):
    with pytest.raises(LoadFailed, match="a wrong answer"):
        loop_round(tmp_path, right_calls)


# -- systems -----------------------------------------------------------------------------------------


def test_every_peer_pins_every_package_it_asks_for():
    for name in {system.environment for system in SYSTEMS if system.environment} | {"base", "triton-client"}:
        assert all(environments.versions(name).values()), name


def test_a_process_that_began_meanwhile_counts_whole():
    assert spent_us({1: 1.0, 2: 5.0}, {1: 1.5, 3: 0.25}) == pytest.approx(750_000)


@pytest.mark.parametrize(("ends", "starts"), [(0, 1), (2, 3), (3, 3)])
def test_a_server_that_ends_before_it_is_ready_is_started_again(monkeypatch, ends, starts):
    tried = []

    @contextlib.contextmanager
    def running(*_):
        tried.append("start")
        if len(tried) <= ends:
            raise EndedEarly("ended with exit code 1 before it was ready")
        yield "server"
        tried.append("end")

    monkeypatch.setattr(workloads, "running", running)
    expected = pytest.raises(EndedEarly) if ends == 3 else contextlib.nullcontext()
    with expected, workloads._started(None, None) as server:
        assert server == "server"
        assert tried == ["start"] * starts
    assert tried == ["start"] * starts + ["end"] * (ends < 3)
