"""The pages of a real server: what is counted is told; what dashboard and alerts ask for is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pool import Client, ModelError, ModelNotFound, WorkerLost
from pool.backends.drill import Fault
from pool.front.metrics import STAGES
from tests.raw import Raw, await_that, drill

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = """
[models.one]
backend = "drill"
path = "{path}"
max_batch_size = 4
workers = 2

[models.two]
backend = "drill"
path = "{path}"

[pipelines.both]
outputs = {{ y = "two.y" }}

[[pipelines.both.steps]]
model = "one"
inputs = {{ x = "request.x", fault = "request.fault", argument = "request.argument" }}

[[pipelines.both.steps]]
model = "two"
inputs = {{ x = "one.y", fault = "request.fault", argument = "request.argument" }}
"""


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers are replaced within a test; `start_server` sees to it that the server ends in order."""
    return


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exposition")
    (folder / "drill.toml").write_text("version = 3\n")
    text = MODELS.format(path=folder)
    with start_server(folder, text, server='metrics = "127.0.0.1:*"') as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.endpoint) as client:
        yield client


@pytest.fixture(scope="module")
def page(client):
    """Gives status, content type and text of a path."""
    address = client.status()["front"]["metrics"]

    def get(path):
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=20) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as e:
            with e:
                return e.code, e.headers["Content-Type"], e.read().decode()

    return get


@pytest.fixture(scope="module")
def scrape(page):
    """Gives all samples as Prometheus reads them: (name, labels) -> value. Never older than the call."""

    def read():
        status, kind, text = page("/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=0.0.4")
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def get():
        first, samples = read(), {}

        def is_made_anew():  # a text is told again for a quarter of a second
            samples.update(read())
            return samples["pool_uptime_seconds",] != first["pool_uptime_seconds",]

        await_that(is_made_anew)
        return samples

    return get


def inputs(rows=1, fault=Fault.NONE):
    return {
        "x": np.zeros((rows, 4), np.float32),
        "fault": np.full(rows, fault, np.int32),
        "argument": np.zeros(rows, np.float32),
    }


def test_every_answer_is_counted_once(client, scrape):
    before = scrape()
    for rows in (1, 1, 2, 4):
        client.predict("one", inputs(rows))
    client.predict("one", inputs(9))  # three batches
    for _ in range(2):
        with pytest.raises(ModelError):
            client.predict("one", inputs(1, Fault.RAISE))
    with pytest.raises(ModelNotFound):
        client.predict("no such model", inputs())
    after = scrape()

    def rose(*key):
        return after[key] - before.get(key, 0.0)

    assert rose("pool_requests_total", "OK", "one") == 5
    assert rose("pool_requests_total", "MODEL_ERROR", "one") == 2
    assert rose("pool_requests_total", "OK", "two") == 0
    assert rose("pool_admitted_requests_total") == 7
    # Two that raised ran too; the split request is one here, and three batches there.
    assert rose("pool_batch_rows_count", "one") == 9
    assert rose("pool_batch_rows_sum", "one") == 19
    assert rose("pool_batch_rows_bucket", "1.0", "one") == 5
    assert rose("pool_batch_rows_bucket", "2.0", "one") == 6
    assert rose("pool_batch_rows_bucket", "+Inf", "one") == 9
    closed = {reason: rose("pool_batches_closed_total", "one", reason) for reason in ("full", "idle_worker")}
    assert closed == {"full": 3, "idle_worker": 6}
    assert rose("pool_stage_seconds_count", "one", "receive") == 7
    for stage in ("queue", "run", "reply", "total"):
        assert rose("pool_stage_seconds_count", "one", stage) == 7
    assert sum(rose("pool_worker_busy_seconds_total", "one", index) for index in "01") > 0


def test_the_stages_add_up(client, scrape):
    before = scrape()
    for _ in range(20):
        client.predict("one", inputs(3))
    after = scrape()
    keys = {stage: ("pool_stage_seconds_sum", "one", stage) for stage in STAGES}
    seconds = {stage: after[key] - before[key] for stage, key in keys.items()}
    assert min(seconds.values()) >= 0  # with a worker idle, nothing waits
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, rel=1e-6)


def test_what_is_of_no_model_is_counted_without_a_name(server, scrape):
    before = scrape()
    with Raw(server.endpoint) as raw:
        raw.socket.send(bytes(30))
        raw.send(drill("of this name there is none"))
        assert {error.code for error in raw.collect(2).values()} == {"MALFORMED", "MODEL_NOT_FOUND"}
    after = scrape()
    for code in ("MALFORMED", "MODEL_NOT_FOUND"):
        key = ("pool_requests_total", code, "")
        assert after[key] - before.get(key, 0.0) == 1


def test_what_happens_to_workers_is_counted(client, scrape):
    with pytest.raises(WorkerLost):
        client.predict("two", inputs(1, Fault.EXIT))
    with pytest.raises(WorkerLost, match="came before"):
        client.predict("two", inputs(1, Fault.EXIT))
    await_that(lambda: client.ready("two"))
    after = scrape()
    assert after["pool_worker_restarts_total", "crashed", "two"] >= 1
    assert after["pool_worker_restarts_total", "crashed", "one"] == 0
    assert after["pool_retried_runs_total", "two"] == 1
    assert after["pool_blamed_requests_total", "two"] == 1
    assert after["pool_poison_refusals_total", "two"] == 1
    assert after["pool_poison_remembered", "two"] == 1


def test_the_state_of_things_is_told(client, scrape):
    samples = scrape()
    status = client.status()
    assert samples["pool_model_info", "drill", "one", "3"] == 1
    assert samples["pool_model_ready", "one"] == 1
    assert samples["pool_workers", "one", "ready"] == samples["pool_workers_wanted", "one"] == 2
    assert samples["pool_arena_slots", "one", "free"] == status["models"]["one"]["slots"]
    assert samples["pool_arena_bytes", "one"] == status["models"]["one"]["arena_bytes"]
    assert samples["pool_clients",] >= 1
    for key in (("", "front", ""), ("", "zygote", "drill"), ("one", "worker", "0"), ("one", "worker", "1")):
        pss, uss = (samples[(f"pool_process_{kind}_bytes", *key)] for kind in ("pss", "uss"))
        assert pss >= uss > 0
        assert ("pool_process_cpu_seconds_total", *key) in samples


def test_no_process_is_told_twice(start_server, tmp_path):
    """While a model that was loaded again finishes what it had admitted, two workers have the same place."""
    (tmp_path / "drill.toml").write_text("")
    text = f'[models.one]\nbackend = "drill"\npath = "{tmp_path}"\nmax_batch_size = 4\n'
    with (
        start_server(tmp_path, text, server='metrics = "127.0.0.1:*"') as server,
        Client(server.endpoint) as client,
        Client(server.endpoint) as other,
        ThreadPoolExecutor(1) as thread,
    ):
        address = client.status()["front"]["metrics"]
        (worker,) = client.status()["models"]["one"]["workers"]
        os.kill(worker["pid"], signal.SIGSTOP)
        try:
            slow = thread.submit(other.predict, "one", inputs())
            await_that(lambda: client.status()["models"]["one"]["workers"][0]["state"] == "busy")
            server.config.write_text(server.config.read_text().replace("size = 4", "size = 8"))
            os.kill(server.process.pid, signal.SIGHUP)
            await_that(lambda: client.status()["models"]["one"]["max_batch_size"] == 8)
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as page:
                lines = page.read().decode().splitlines()
        finally:
            os.kill(worker["pid"], signal.SIGCONT)
        slow.result()
        samples = [line.rpartition(" ")[0] for line in lines if line[:1] != "#"]
        assert len(samples) == len(set(samples))
        assert sum('role="worker"' in sample and "uss_bytes" in sample for sample in samples) == 1


def test_live_and_ready(page):
    assert page("/live") == (200, "text/plain; charset=utf-8", "live\n")
    assert page("/ready")[::2] == (200, "one ready\ntwo ready\nboth ready\n")
    assert page("/ready/two")[::2] == (200, "two ready\n")
    assert page("/ready/three")[0] == 404
    assert page("/")[0] == 404


def test_not_ready_is_503(client, page):
    pid = client.status()["models"]["two"]["workers"][0]["pid"]
    os.kill(pid, signal.SIGKILL)
    await_that(lambda: page("/ready/two")[::2] == (503, "two not ready\n"))
    await_that(lambda: page("/ready")[0] == 200)


NAMES = re.compile(r"\bpool_[a-z_]+")


def told(page):
    """Names that a query may use: of samples, and of metrics that have none at present."""
    text = page("/metrics")[2]
    names = {match.group() for line in text.splitlines() if line[:1] != "#" and (match := NAMES.match(line))}
    return names | {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_the_dashboard_asks_for_what_there_is(page):
    dashboard = json.loads((CONFIGS / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [
        variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable
    ]
    wanted = set(NAMES.findall(" ".join(queries)))
    names = told(page)
    assert wanted <= names
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in wanted}
    missing = {re.sub("_(bucket|count|sum)$", "", name) for name in names} - shown
    assert missing <= {"pool_build_info", "pool_model_info"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_alerts_ask_for_what_there_is(page):
    text = (CONFIGS / "alerts.yml").read_text()
    wanted = set(NAMES.findall(text))
    assert len(wanted) > 5
    assert wanted <= told(page)


def test_every_metric_is_documented(page):
    text = (CONFIGS.parent / "docs" / "operations.md").read_text()
    for line in page("/metrics")[2].splitlines():
        if line.startswith("# TYPE"):
            assert f"`{line.split()[2].removesuffix('_total')}`" in text, line


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_likes_the_text_and_the_rules(page):
    text = page("/metrics")[2]
    subprocess.run(["promtool", "check", "metrics"], input=text.encode(), check=True, capture_output=True)
    rules = str(CONFIGS / "alerts.yml")
    subprocess.run(["promtool", "check", "rules", rules], check=True, capture_output=True)


def test_each_alert_has_a_section_of_the_run_book():
    text = (CONFIGS / "alerts.yml").read_text()
    alerts = re.findall(
        r"- alert: (\w+)\n(?:(?!- alert:).*\n)*?          runbook: docs/runbook.md#(\S+)\n", text
    )
    assert [name for name, _ in alerts] == re.findall(r"- alert: (\w+)", text)
    book = (CONFIGS.parent / "docs/runbook.md").read_text()
    headings = re.findall(r"^## (.+)$", book, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {anchor for _, anchor in alerts} <= anchors
    assert set(re.findall(r"\]\(#([^)]+)\)", book)) == anchors, "its own table names each section"
    assert all(f"`{name}`" in book for name, _ in alerts)
