"""`Client` against a scripted server: the calls, and every way a conversation can go wrong."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pool import AsyncClient, Client, Retry, wire
from pool.client import dial
from pool.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    Unavailable,
    WireError,
    WorkerLost,
)
from pool.wire import Flag, Header, Kind
from tests.scripted_server import (
    ScriptedServer,
    answer_properly,
    in_turn,
    never,
    on_predict,
    refuse,
    result,
    rows,
    scripted_server,
)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def endpoint():
    # Not tmp_path: its name may be longer than the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="pool-") as directory:
        yield f"ipc://{directory}/s"


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture(params=["ipc", "tcp", "tcp6"])
def any_endpoint(request, endpoint):
    if request.param == "tcp6" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    return {"ipc": endpoint, "tcp": "tcp://127.0.0.1:*", "tcp6": "tcp://[::1]:*"}[request.param]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def python(script: str, *arguments: str, **kwargs) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out


# -- calls -----------------------------------------------------------------------------------------


def test_all_calls(any_endpoint):
    with scripted_server(any_endpoint) as server, Client(server.endpoint) as client:
        assert client.live()
        assert client.ready()
        assert client.ready("m")
        assert client.models() == {"m": {"version": 7, "ready": True, "signatures": ["serving_default"]}}
        assert client.status() == {"models": {}, "front": {"pid": 1}}
        assert client.signature("m").signature("pair").inputs[0].name == "a"
        np.testing.assert_array_equal(client.predict("m", rows(2))["y"], rows(2))
        outputs = client.predict("m", {"a": [1, 2], "b": [["x", "y"]] * 2}, signature="pair")
        assert outputs["a"].tolist() == [1, 2]
        assert outputs["b"].tolist() == [[b"x", b"y"]] * 2
        np.testing.assert_array_equal(client.predict("m", rows(2), signature="whole")["x"], rows(2))
        assert client.predict("m", rows(0))["y"].shape == (0, 3)
        with pytest.raises(ModelNotFound, match="no model 'other'; wanted 'm'"):
            client.predict("other", rows(1))
        with pytest.raises(ModelNotFound):
            client.ready("other")


def test_large_tensors_come_back_whole_and_writable(any_endpoint):
    array = np.random.default_rng(1).integers(0, 255, (2, 3_000_000), np.uint8)
    with scripted_server(any_endpoint) as server, Client(server.endpoint) as client:
        got = client.predict("m", array, signature="large")["x"]
        np.testing.assert_array_equal(got, array)
        got += 1


def test_the_signature_is_asked_for_once_and_a_refusal_costs_no_message(endpoint):
    with scripted_server(endpoint) as server, Client(endpoint) as client:
        client.predict("m", rows(1))
        client.predict("m", rows(1))
        assert server.kinds() == [Kind.SIGNATURE, Kind.PREDICT, Kind.PREDICT]
        with pytest.raises(InvalidInput, match="wanted float32"):
            client.predict("m", rows(1).astype(np.float64))
        assert len(server.requests) == 3
        client.predict("m", rows(1).astype(np.float64), cast="same_kind")
        assert server.kinds()[3:] == [Kind.SIGNATURE, Kind.PREDICT]  # it might have changed meanwhile


def test_a_refusal_by_the_server_makes_the_client_ask_again(endpoint):
    with (
        scripted_server(endpoint, refuse(InvalidInput("wanted float64"))) as server,
        Client(endpoint) as client,
    ):
        for _ in range(2):
            with pytest.raises(InvalidInput, match="wanted float64"):
                client.predict("m", rows(1))
        assert server.kinds() == [Kind.SIGNATURE, Kind.PREDICT] * 2


def test_errors_carry_their_advice(endpoint):
    with scripted_server(endpoint, refuse(Overloaded("full", retry_after_ms=30))), Client(endpoint) as client:
        with pytest.raises(Overloaded, match="full") as caught:
            client.predict("m", rows(1))
        assert caught.value.retry_after_ms == 30
        assert caught.value.retryable


def test_the_server_is_told_what_remains_of_the_timeout(endpoint):
    with scripted_server(endpoint) as server, Client(endpoint, timeout=math.inf) as client:
        client.predict("m", rows(1))
        client.predict("m", rows(1), timeout=30)
        assert [each.millis for each in server.requests] == [0, 0, 30_000]


def test_threads_share_a_client(endpoint):
    with scripted_server(endpoint) as server, Client(endpoint) as client:

        def call(worker: int) -> None:
            for i in range(50):
                array = rows(1 + i % 3) + np.float32(100 * worker)
                np.testing.assert_array_equal(client.predict("m", array)["y"], array)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(call, range(8)))
        assert server.kinds().count(Kind.PREDICT) == 400
        assert len(client._idle) <= 8
        idle = len(client._idle)
        for _ in range(20):
            client.live()
        assert len(client._idle) == idle  # the last one used is used again


# -- time ------------------------------------------------------------------------------------------


def test_a_late_reply_is_not_taken_for_the_next(endpoint):
    def late(header, tensors):
        if header.millis < 1000:
            return None
        # The reply nobody waits for any more, then this one's.
        old = Header(Kind.PREDICT, header.id - 1, header.meta, rows=header.rows)
        return [result(old, [bytes(12)]), result(header, tensors)]

    with scripted_server(endpoint, on_predict(late)) as server, Client(endpoint) as client:
        client.signature("m")
        with pytest.raises(DeadlineExceeded, match=rf"no answer from {endpoint} within 0\.05 s"):
            client.predict("m", rows(1), timeout=0.05)
        np.testing.assert_array_equal(client.predict("m", rows(1))["y"], rows(1))
        assert server.kinds().count(Kind.PREDICT) == 2
        assert len(client._idle) == 1


@pytest.mark.parametrize("timeout", [0, -1, math.nan])
def test_no_time_left_is_no_call(endpoint, timeout):
    with Client(endpoint) as client, pytest.raises(DeadlineExceeded, match="wanted more than 0 s"):
        client.predict("m", rows(1), timeout=timeout)
    with pytest.raises(DeadlineExceeded):
        Client(endpoint, timeout=timeout)


def test_an_interrupted_call_leaves_a_client_that_works(endpoint):
    script = """
import sys
from pool import Client
from tests.scripted_server import rows
with Client(sys.argv[1]) as client:
    try:
        client.predict("m", rows(1))
    except KeyboardInterrupt:
        print(client.live(), len(client._idle))
"""
    with scripted_server(endpoint, on_predict(never)) as server:
        process = python(script, endpoint)
        server.predicted.acquire()
        process.send_signal(signal.SIGINT)
        assert output_of(process) == "True 1\n"


# -- servers that are not there, or not any more ---------------------------------------------------


def test_nobody_at_the_endpoint(endpoint):
    other = endpoint + "2"
    with Client([endpoint, other], connect_timeout=0.05) as client:
        assert client.live() is False
        assert client.ready() is False
        with pytest.raises(
            Unavailable, match=rf"no pool server answered at {endpoint}, {other} within 0\.05 s"
        ):
            client.predict("m", rows(1))
        with pytest.raises(DeadlineExceeded, match=r"no pool server answered at .* within 0\.01 s"):
            client.predict("m", rows(1), timeout=0.01)


def test_a_server_that_starts_late_is_waited_for(endpoint):
    with Client(endpoint) as client, ThreadPoolExecutor(1) as threads:
        early = threads.submit(client.live)
        with scripted_server(endpoint):
            assert early.result()


def test_the_first_endpoint_that_answers_is_used(endpoint):
    nobody, second, third = (endpoint + str(i) for i in range(3))
    with scripted_server(second) as used, scripted_server(third), Client([nobody, second]) as client:
        assert client.live()
        assert used.kinds() == [Kind.LIVE]


def test_a_peer_that_does_not_speak_zeromq():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with Client(address, connect_timeout=0.1) as client, pytest.raises(Unavailable, match=address):
            client.predict("m", rows(1))


def test_a_server_that_goes_away_mid_call(any_endpoint):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(scripted_server(any_endpoint, on_predict(never)))
        client = stack.enter_context(Client(server.endpoint, timeout=math.inf))
        threads = stack.enter_context(ThreadPoolExecutor(1))
        call = threads.submit(client.predict, "m", rows(1))
        server.predicted.acquire()
        server.stop()
        with pytest.raises(Unavailable, match="went away before it answered") as caught:
            call.result()
        assert server.endpoint in caught.value.message


def test_a_server_that_is_killed_mid_call(endpoint):
    script = """
import sys
from tests.scripted_server import ScriptedServer, on_predict
server = ScriptedServer(sys.argv[1], on_predict(lambda header, tensors: print("predicted", flush=True)))
"""
    process = python(script, endpoint)
    try:
        with Client(endpoint, timeout=math.inf) as client, ThreadPoolExecutor(1) as threads:
            call = threads.submit(client.predict, "m", rows(1))
            assert process.stdout.readline() == "predicted\n"
            process.kill()
            with pytest.raises(Unavailable, match="went away"):
                call.result()
    finally:
        process.kill()
        process.communicate()


def test_what_the_server_said_before_it_went_away_counts(any_endpoint):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(scripted_server(any_endpoint, on_predict(never), linger_ms=10_000))
        client = stack.enter_context(Client(server.endpoint))
        threads = stack.enter_context(ThreadPoolExecutor(1))
        call = threads.submit(client.predict, "m", rows(1))
        server.predicted.acquire()
        server.say(result(server.requests[-1], [rows(1).tobytes()]))
        server.stop()
        np.testing.assert_array_equal(call.result()["y"], rows(1))


def test_a_restarted_server_is_found_again(any_endpoint):
    with scripted_server(any_endpoint) as server, Client(server.endpoint) as client:
        client.predict("m", rows(1))
        server.stop()
        with scripted_server(server.endpoint) as again:
            outputs = None
            while outputs is None:
                # Unavailable: sent before the end of the old connection was heard of.
                with contextlib.suppress(Unavailable):
                    outputs = client.predict("m", rows(1))
            np.testing.assert_array_equal(outputs["y"], rows(1))
            assert again.kinds() == [Kind.PREDICT]


# -- trying again ----------------------------------------------------------------------------------

QUICK = Retry(first_pause=0.001, longest_pause=0.002)
STOPPING = Unavailable("the server is stopping")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Let no pause of a busy machine decide which endpoint is used."""
    monkeypatch.setattr(dial, "_AVOID_S", 3600.0)
    monkeypatch.setattr(dial, "_GRACE_S", 3600.0)


@contextlib.contextmanager
def client_of_two(
    prefix: str, first_answer, **kwargs
) -> Iterator[tuple[Client, ScriptedServer, ScriptedServer]]:
    """A client connected to the first of two servers; the second, which came later, answers properly."""
    endpoints = [prefix + "1", prefix + "2"]
    with scripted_server(endpoints[0]) as first, Client(endpoints, **kwargs) as client:
        client.signature("m")
        first.answer = first_answer
        with scripted_server(endpoints[1]) as second:
            yield client, first, second


def test_without_a_policy_nothing_is_tried_again(endpoint):
    with scripted_server(endpoint, refuse(Overloaded("full"))) as server, Client(endpoint) as client:
        with pytest.raises(Overloaded, match=r"^full$"):
            client.predict("m", rows(1))
        assert server.kinds().count(Kind.PREDICT) == 1


def test_what_was_refused_is_tried_again_with_what_remains_of_the_time(endpoint):
    full = refuse(Overloaded("full", retry_after_ms=20))
    with scripted_server(endpoint, in_turn(full, full, answer_properly)) as server:
        with Client(endpoint, retry=QUICK, timeout=30) as client:
            np.testing.assert_array_equal(client.predict("m", rows(1), priority=2)["y"], rows(1))
        predicts = [each for each in server.requests if each.kind is Kind.PREDICT]
        assert len(predicts) == len({each.id for each in predicts}) == 3
        first, second, third = (each.millis for each in predicts)
        assert 30_000 - 20 >= first - 20 >= second >= third + 20
        assert [each.priority for each in predicts] == [2, 2, 2]


def test_the_signature_is_asked_for_again_too(endpoint):
    left = [Unavailable("model 'm' is loading")] * 2

    def loading(header, tensors):
        return [[wire.encode_error(header.id, left.pop())]] if left else answer_properly(header, tensors)

    with scripted_server(endpoint, loading) as server, Client(endpoint) as client:
        client.predict("m", rows(1), retry=QUICK)
        assert server.kinds() == [Kind.SIGNATURE] * 3 + [Kind.PREDICT]


def test_a_call_that_fails_after_all_says_how_often_it_was_tried(endpoint):
    with (
        scripted_server(endpoint, refuse(Overloaded("full", retry_after_ms=1))) as server,
        Client(endpoint, retry=QUICK) as client,
    ):
        with pytest.raises(Overloaded, match=r"^full; gave up after 5 attempts over [\d.]+ s$") as caught:
            client.predict("m", rows(1))
        assert caught.value.retry_after_ms == 1
        assert isinstance(caught.value.__cause__, Overloaded)
        with pytest.raises(Overloaded, match=r"^full$"):
            client.predict("m", rows(1), retry=Retry(attempts=1))
        assert server.kinds().count(Kind.PREDICT) == 6


def test_only_what_may_succeed_later_is_tried_again(endpoint):
    lost = refuse(WorkerLost("killed by SIGSEGV"))
    with (
        scripted_server(endpoint, in_turn(lost, lost, answer_properly)) as server,
        Client(endpoint) as client,
    ):
        with pytest.raises(WorkerLost, match=r"^killed by SIGSEGV$"):
            client.predict("m", rows(1), retry=QUICK)
        client.predict("m", rows(1), retry=Retry(first_pause=0.001, worker_lost=True))
        assert server.kinds().count(Kind.PREDICT) == 3


def test_advice_beyond_the_deadline_ends_the_call_at_once(endpoint):
    script = refuse(Overloaded("full", retry_after_ms=30_000))
    with scripted_server(endpoint, script) as server, Client(endpoint, retry=QUICK, timeout=20) as client:
        with pytest.raises(Overloaded, match=r"^full$"):
            client.predict("m", rows(1))
        assert server.kinds().count(Kind.PREDICT) == 1


def test_attempts_end_with_the_timeout(endpoint):
    endless = Retry(attempts=1_000_000, first_pause=0.01, longest_pause=0.01)
    with scripted_server(endpoint, refuse(Overloaded("full"))) as server, Client(endpoint) as client:
        client.signature("m")
        with pytest.raises((Overloaded, DeadlineExceeded), match="gave up after") as caught:
            client.predict("m", rows(1), timeout=0.2, retry=endless)
        assert isinstance(caught.value.__cause__, Overloaded)
        left = [each.millis for each in server.requests if each.kind is Kind.PREDICT]
        assert left == sorted(left, reverse=True)
        assert 1 <= left[-1] < left[0] <= 200


def test_closing_ends_the_pause(endpoint):
    slow = Retry(first_pause=3600, longest_pause=3600)
    full = refuse(Overloaded("full", retry_after_ms=3_600_000))
    with scripted_server(endpoint, full) as server, ThreadPoolExecutor(1) as threads:
        client = Client(endpoint, timeout=math.inf, retry=slow)
        call = threads.submit(client.predict, "m", rows(1))
        server.predicted.acquire()
        while not client._idle:  # until the refusal is there
            time.sleep(0.001)
        client.close()
        with pytest.raises(Cancelled, match="the client is closed; gave up after 2 attempts"):
            call.result()


# -- several servers -------------------------------------------------------------------------------


def test_a_server_that_stops_is_left_for_another(endpoint):
    with client_of_two(endpoint, refuse(STOPPING), retry=QUICK) as (client, first, second):
        for _ in range(3):
            np.testing.assert_array_equal(client.predict("m", rows(1))["y"], rows(1))
        assert first.kinds() == [Kind.SIGNATURE, Kind.PREDICT]
        assert second.kinds() == [Kind.PREDICT] * 3


def test_without_a_policy_the_next_call_goes_elsewhere(endpoint):
    with client_of_two(endpoint, refuse(STOPPING)) as (client, first, second):
        with pytest.raises(Unavailable, match=r"^the server is stopping$"):
            client.predict("m", rows(1))
        client.predict("m", rows(1))
        assert second.kinds() == [Kind.PREDICT]
        assert first.kinds() == [Kind.SIGNATURE, Kind.PREDICT]


def test_a_server_that_is_gone_is_left_for_another(endpoint):
    with (
        ThreadPoolExecutor(1) as threads,
        client_of_two(endpoint, on_predict(never), retry=QUICK) as (client, first, second),
    ):
        call = threads.submit(client.predict, "m", rows(1))
        first.predicted.acquire()
        first.stop()
        np.testing.assert_array_equal(call.result()["y"], rows(1))
        assert second.kinds() == [Kind.PREDICT]


def test_a_server_that_is_unavailable_is_used_if_there_is_no_other(endpoint, monkeypatch):
    monkeypatch.setattr(dial, "_GRACE_S", 0.01)
    endpoints = [endpoint + "2", endpoint]
    with scripted_server(endpoint, refuse(STOPPING)) as server, Client(endpoints, retry=QUICK) as client:
        with pytest.raises(Unavailable, match="stopping; gave up after 5 attempts"):
            client.predict("m", rows(1))
        assert server.kinds() == [Kind.SIGNATURE] + [Kind.PREDICT] * 5
        server.answer = answer_properly
        client.predict("m", rows(1))


def test_where_all_are_unavailable_calls_do_not_hurry_from_one_to_the_next(endpoint):
    with client_of_two(endpoint, refuse(STOPPING), retry=QUICK) as (client, first, second):
        second.answer = refuse(STOPPING)
        for _ in range(4):
            with pytest.raises(Unavailable, match="gave up after 5 attempts"):
                client.predict("m", rows(1))
        assert first.kinds().count(Kind.PREDICT) + second.kinds().count(Kind.PREDICT) == 20
        assert len(client._idle) == 2


def test_both_clients_are_called_alike():
    for name in ("__init__", "predict", "signature", "models", "status", "live", "ready"):
        plain, other = (inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient))
        assert plain == other
    assert Client.predict.__doc__.partition("Args:")[2] == AsyncClient.predict.__doc__.partition("Args:")[2]


# -- servers that talk nonsense --------------------------------------------------------------------


NONSENSE = {
    "no header": lambda _: [[b"HTTP/1.1 400 Bad Request\r\n\r\n"]],
    "empty": lambda _: [[b""]],
    "another version": lambda header: [[b"pl\x02" + wire.encode_error(header.id, Overloaded("x"))[3:]]],
    "a request": lambda header: [[wire.encode_header(Header(Kind.LIVE, header.id, b""))]],
    "no meta": lambda header: [[wire.encode_header(Header(Kind.RESULT, header.id, b"")), b""]],
    "no tensor": lambda header: [[*result(header, [])]],
    "a tensor too many": lambda header: [result(header, [bytes(12), b""])],
    "a tensor too short": lambda header: [result(header, [bytes(11)])],
    "an answer to something else": lambda header: [
        [wire.encode_header(Header(Kind.INFO, header.id, wire.encode_info({"live": True})))]
    ],
    "whole rows": lambda header: [
        [
            wire.encode_header(
                Header(
                    Kind.RESULT, header.id, b"\x92\x07\x91\x93\xa1y\xa4int8\x91\x02", rows=1, flags=Flag.WHOLE
                )
            ),
            b"abc",
        ]
    ],
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_error_and_the_next_call_works(endpoint, name):
    script = on_predict(lambda header, _: NONSENSE[name](header))
    with scripted_server(endpoint, script), Client(endpoint, timeout=30) as client:
        for _ in range(2):
            with pytest.raises(WireError):
                client.predict("m", rows(1))
            assert client.live()


def test_strange_ids_are_nobody_s(endpoint):
    def strange(header, tensors):
        other = Header(Kind.PREDICT, header.id + 1000, header.meta, rows=header.rows)
        return [[wire.encode_error(0, WireError("?"))], result(other, [bytes(12)]), result(header, tensors)]

    with scripted_server(endpoint, on_predict(strange)), Client(endpoint) as client:
        for i in range(3):
            np.testing.assert_array_equal(client.predict("m", rows(1) + np.float32(i))["y"], rows(1) + i)


# -- life and death of a client --------------------------------------------------------------------


def test_closing_cancels_calls_in_other_threads(endpoint):
    with scripted_server(endpoint, on_predict(never)) as server, ThreadPoolExecutor(2) as threads:
        client = Client(endpoint)
        calls = [threads.submit(client.predict, "m", rows(1)) for _ in range(2)]
        for _ in calls:
            server.predicted.acquire()
        client.close()
        for call in calls:
            with pytest.raises(Cancelled, match="the client was closed"):
                call.result()
        client.close()
        with pytest.raises(Cancelled, match="the client is closed"):
            client.live()


def test_a_client_that_was_never_used_closes(endpoint):
    Client(endpoint).close()


def test_no_file_stays_open(endpoint):
    with scripted_server(endpoint, on_predict(never)) as server:
        before = open_files()
        with Client(endpoint) as client:
            client.live()
            with pytest.raises(DeadlineExceeded):
                client.predict("m", rows(1), timeout=0.05)
        with Client(endpoint + "2", connect_timeout=0.01) as client:
            assert not client.live()
        server.stop()
        assert open_files() <= before


def test_bad_arguments(endpoint):
    with pytest.raises(ConfigError, match="wanted ipc:///absolute/path or tcp://host:port"):
        Client("localhost:5600")
    with pytest.raises(ConfigError, match="empty list"):
        Client([])
    with pytest.raises(InvalidInput, match="cast is 'unsafe'"):
        Client(endpoint, cast="unsafe")


def test_the_default_endpoint_is_used(endpoint, monkeypatch):
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(Path(endpoint.removeprefix("ipc://")).parent))
    with scripted_server(endpoint.removesuffix("/s") + "/pool.sock"), Client() as client:
        assert client.live()


def test_a_client_works_on_both_sides_of_a_fork(endpoint):
    script = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons on fork with threads, which is the point
from pool import Client
from tests.scripted_server import rows
client = Client(sys.argv[1])
client.predict("m", rows(1))
child = os.fork()
for _ in range(50):
    assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()
client.close()
if child == 0:
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with scripted_server(endpoint):
        assert output_of(python(script, endpoint)) == "0\n"


def test_a_process_that_forgets_to_close_ends(endpoint):
    script = """
import sys, threading
from pool import Client
from tests.scripted_server import rows
client = Client(sys.argv[1])
threading.Thread(target=lambda: client.predict("m", rows(1)), daemon=True).start()
client.live()
"""
    with scripted_server(endpoint, on_predict(never)):
        assert output_of(python(script, endpoint)) == ""


def test_importing_the_client_is_light():
    script = """
import sys
import pool
assert not {"numpy", "zmq", "msgspec", "asyncio"} & {*sys.modules}
from pool import AsyncClient, Client
heavy = {"tensorflow", "keras", "uvloop", "psutil", "rich", "ml_dtypes", "multiprocessing"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
print(sorted(name for name in sys.modules if name.startswith("pool.")))
"""
    heavy, own = output_of(python(script)).splitlines()
    assert heavy == "[]"
    assert "pool.front" not in own
    assert "pool.config" not in own


def test_unknown_public_name():
    import pool

    with pytest.raises(AttributeError, match="module 'pool' has no attribute 'Nope'"):
        _ = pool.Nope


def test_threads_of_a_closing_client_do_not_meet_a_crash(endpoint):
    with scripted_server(endpoint), ThreadPoolExecutor(4) as threads:
        client = Client(endpoint)
        started = threading.Barrier(5)

        def call() -> int:
            started.wait()
            done = 0
            with contextlib.suppress(Cancelled):
                while True:
                    client.predict("m", rows(1))
                    done += 1
            return done

        calls = [threads.submit(call) for _ in range(4)]
        started.wait()
        client.predict("m", rows(1))
        client.close()
        for each in calls:
            assert each.result() >= 0
