"""Alerts, cool-down, the state file and the sinks."""

import contextlib
import hashlib
import hmac
import http.server
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.monitor import (
    Alert,
    Cooldown,
    DeliveryError,
    FileSink,
    LoggingSink,
    Outbox,
    PrometheusSink,
    State,
    StateError,
    WebhookSink,
    verify_webhook,
)
from mlx_bulwark.monitor.state import acknowledge

HERE = Path(__file__).parent
SECRET = b"0123456789abcdef"


class Clock:
    def __init__(self, now=1_700_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def alert(number=0, severity="warning", **details):
    return Alert(severity, "accuracy", "it fell", {"rule": "cusum", "number": number} | details, time=1.0)


def test_id_follows_from_what_is_said():
    assert alert(1).id == Alert("warning", "accuracy", "it fell", {"number": 1, "rule": "cusum"}, time=2.0).id
    others = [
        alert(2),
        alert(1, severity="critical"),
        Alert("warning", "loss", "it fell", {"rule": "cusum", "number": 1}),
        Alert("warning", "accuracy", "it rose", {"rule": "cusum", "number": 1}),
    ]
    assert len({a.id for a in [alert(1), *others]}) == 5
    said = json.dumps(["warning", "accuracy", "it fell", {"number": 1, "rule": "cusum"}])
    assert alert(1).id == hashlib.sha256(said.encode()).hexdigest()[:32]


def test_details_are_json_whatever_they_hold():
    found = alert(a=np.float32(1.5), b=np.arange(2), c=float("nan"), d=(1, -float("inf")), e={"f": np.bool_(True)})
    assert found.details["a"] == 1.5
    assert found.details["b"] == [0, 1]
    assert found.details["c"] == "nan"
    assert found.details["d"] == [1, "-inf"]
    assert found.details["e"] == {"f": True}
    again = Alert.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert again.id == found.id
    assert hash(again) == hash(found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bad", "a", "b"), "severity must be one of info, warning, critical"),
        (("info", "", "b"), "source and message must be words"),
        (("info", "a", "b", {"x": object()}), "details must be JSON values but have a object"),
    ],
)
def test_alerts_that_are_none(arguments, words):
    with pytest.raises(ValueError, match=words):
        Alert(*arguments)


@pytest.mark.parametrize("change", [{"message": "all is well"}, {"severity": "info"}, {"id": "0" * 32}])
def test_changed_alerts_are_refused(change):
    with pytest.raises(ValueError, match="id must be that of what the alert says"):
        Alert.from_json(alert().to_json() | change)


def test_cooldown_holds_back_by_source_and_rule():
    clock = Clock()
    cooldown = Cooldown(60, escalate_after=None, clock=clock)
    assert cooldown.admit(alert(0)) == alert(0)
    assert cooldown.admit(alert(1)) is None
    assert cooldown.admit(alert(2, rule="shewhart")) is not None
    assert cooldown.admit(alert(3, severity="critical")).severity == "critical", "worse news must not wait"
    assert cooldown.admit(alert(4, severity="critical")) is None
    assert cooldown.admit(alert(5)) is None
    clock.now += 59.9
    assert cooldown.admit(alert(6)) is None
    clock.now += 0.2
    assert cooldown.admit(alert(7)) == alert(7)


def test_what_stays_gets_worse():
    cooldown = Cooldown(60, escalate_after=3, clock=Clock())
    told = [cooldown.admit(alert(i, severity="info")) for i in range(14)]
    assert [(i, a.severity) for i, a in enumerate(told) if a] == [(0, "info"), (3, "warning")]
    assert told[3].details["repeated"] == 3
    worse = [cooldown.admit(alert(i)) for i in range(14, 20)]
    assert [a.severity for a in worse if a] == ["critical"]


def test_cooldown_with_a_clock_that_was_set_back():
    clock = Clock()
    cooldown = Cooldown(60, clock=clock)
    cooldown.admit(alert(0))
    clock.now -= 10_000
    assert cooldown.admit(alert(1)) is not None


def test_cooldown_forgets_and_goes_on():
    clock = Clock()
    cooldown = Cooldown(60, clock=clock)
    for i in range(1000):
        clock.now += 1
        cooldown.admit(alert(i, rule=str(i)))
    assert len(cooldown.state()["held"]) <= 60
    again = Cooldown(60, clock=clock)
    again.load(json.loads(json.dumps(cooldown.state())))
    assert again.admit(alert(1, rule="999")) is None
    assert again.state()["held"][-1][-1] == 1


def test_state_is_written_by_one_process(tmp_path):
    state = State(tmp_path / "s.sqlite")
    program = "import sys; from mlx_bulwark.monitor import State; State(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", program, tmp_path / "s.sqlite"], capture_output=True, text=True)
    assert "StateError: [State] path must be written by one monitor but another one writes" in other.stderr
    with pytest.raises(StateError, match="another one writes"):
        State(tmp_path / "s.sqlite")
    reader = State(tmp_path / "s.sqlite", read_only=True)
    Outbox(state).raise_alerts([alert(0)])
    assert [a for a, _ in reader.alerts()] == [alert(0)]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.keep({"a": 1})
    reader.close()
    state.close()
    State(tmp_path / "s.sqlite").close()


def test_state_in_a_fork(tmp_path):
    program = """
import os, sys
from mlx_bulwark.monitor import State, StateError
state = State(sys.argv[1])
if not os.fork():
    try:
        state.kept()
    except StateError as e:
        os.write(1, str(e).encode())
    state.close()
    os._exit(0)
os.wait()
try:
    State(sys.argv[1])
except StateError:
    os.write(1, b" held")
"""
    child = subprocess.run([sys.executable, "-c", program, tmp_path / "s"], capture_output=True, text=True, check=True)
    assert "carried into a fork" in child.stdout
    assert child.stdout.endswith("held")


@pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at as one" * 20, None])
def test_files_that_are_no_state(tmp_path, content):
    path = tmp_path / "s.sqlite"
    if content is None:
        database = sqlite3.connect(path)
        database.executescript("CREATE TABLE a (b); PRAGMA user_version = 7")
        database.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(StateError, match=r"must be a monitor's state but|must be of format 1 but"):
            State(path, read_only=read_only)
    assert path.read_bytes()[100:] == before[100:], "what is somebody else's must stay"
    with pytest.raises(FileNotFoundError):
        State(tmp_path / "none.sqlite", read_only=True)


def test_transactions_hold_together(tmp_path):
    state = State(tmp_path / "s")

    def dies():
        with state.transaction(durable=True):
            state.add_alert(alert(0), ["file"])
            state.keep({"a": 1})
            raise KeyError

    with pytest.raises(KeyError):
        dies()
    assert state.alerts() == []
    assert state.kept() == {}
    assert state.pending() == {}
    with pytest.raises(RuntimeError, match="must be durable"), state.transaction():
        state.add_alert(alert(0), ["file"])
    state.close()


def test_acknowledged_by_another_process(tmp_path):
    state = State(tmp_path / "s")
    Outbox(state).raise_alerts([alert(0), alert(1, rule="b")])
    assert acknowledge(tmp_path / "s", [alert(0).id, "nobody"], 5.0) == ["nobody"]
    acknowledge(tmp_path / "s", [alert(0).id], 6.0)
    assert [(a.details["number"], at) for a, at in state.alerts()] == [(0, 5.0), (1, None)]
    assert [a.details["number"] for a, _ in state.alerts(open_only=True)] == [1]
    assert state.count_alerts() == {("warning", "accuracy"): 2}
    state.close()


def test_series_are_bounded(tmp_path):
    state = State(tmp_path / "s")
    for i in range(50):
        point = {"series": "a", "batch": i, "time": 0.0, "value": i / 7, "size": 1, "signals": [["shewhart", 1]]}
        state.add_points([point, point | {"series": "b"}], keep=10)
    assert [p["batch"] for p in state.points("a")] == list(range(40, 50))
    assert len(state.points()) == 20
    assert state.points("b")[-1]["signals"] == [["shewhart", 1]]
    state.close()


def lines(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_file_has_each_alert_once(tmp_path):
    sink, other = FileSink(tmp_path / "a.jsonl"), FileSink(tmp_path / "a.jsonl", name="b")
    for i in range(5):
        sink.deliver(alert(i))
        other.deliver(alert(i))
        FileSink(tmp_path / "a.jsonl").deliver(alert(i))
    assert lines(tmp_path / "a.jsonl") == [alert(i).id for i in range(5)]
    assert Alert.from_json(json.loads((tmp_path / "a.jsonl").read_text().splitlines()[3])) == alert(3)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400))
def test_torn_last_line(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "a.jsonl"
    for i in range(2):
        FileSink(path).deliver(alert(i))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    sink = FileSink(path)
    for i in range(3):
        sink.deliver(alert(i))
    assert sorted(lines(path)) == sorted(alert(i).id for i in range(3))


def test_file_that_was_moved_away(tmp_path):
    sink = FileSink(tmp_path / "a.jsonl")
    sink.deliver(alert(0))
    (tmp_path / "a.jsonl").rename(tmp_path / "a.1")
    sink.deliver(alert(1))
    assert lines(tmp_path / "a.jsonl") == [alert(1).id]


def test_log(caplog):
    with caplog.at_level(logging.INFO):
        LoggingSink().deliver(alert(severity="critical"))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mlx_bulwark.monitor", "CRITICAL")
    assert record.getMessage() == f"accuracy: it fell [{alert(severity='critical').id}]"


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        status, headers = self.server.answers.pop(0) if self.server.answers else (204, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.do_POST()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.answers = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/hooks/T0KEN"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_webhook_signs_what_it_sends(receiver):
    sink = WebhookSink(receiver.url, secret=SECRET, headers={"Authorization": "Bearer x"}, clock=Clock())
    sink.deliver(alert(0))
    ((path, headers, body),) = receiver.got
    assert path == "/hooks/T0KEN"
    assert Alert.from_json(json.loads(body)) == alert(0)
    assert headers["Idempotency-Key"] == alert(0).id
    assert headers["Authorization"] == "Bearer x"
    stamp, signature = headers["X-Bulwark-Timestamp"], headers["X-Bulwark-Signature"]
    assert stamp == "1700000000"
    assert signature == "sha256=" + hmac.new(SECRET, b"1700000000." + body, "sha256").hexdigest()
    assert verify_webhook(SECRET, stamp, body, signature, clock=Clock())
    for changed in [
        (b"f" * 16, stamp, body, signature),
        (SECRET, "1700000001", body, signature),
        (SECRET, stamp, body + b" ", signature),
        (SECRET, stamp, body, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        (SECRET, stamp, body, "\udcff"),
        (SECRET, "-1", body, signature),
    ]:
        assert not verify_webhook(*changed, clock=Clock())
    assert not verify_webhook(SECRET, stamp, body, signature, clock=Clock(1_700_000_301.0)), "an old one was replayed"


@pytest.mark.parametrize(
    ("status", "headers", "retry_after"),
    [(500, {}, None), (503, {"Retry-After": "7"}, 7.0), (429, {"Retry-After": "soon"}, None), (404, {}, None)],
)
def test_webhook_that_answers_no(receiver, status, headers, retry_after):
    receiver.answers.append((status, headers))
    with pytest.raises(DeliveryError, match=f"^status {status}$") as e:
        WebhookSink(receiver.url).deliver(alert())
    assert e.value.retry_after == retry_after


def test_webhook_follows_no_redirect(receiver):
    receiver.answers.append((302, {"Location": "/elsewhere"}))
    with pytest.raises(DeliveryError, match="status 302"):
        WebhookSink(receiver.url).deliver(alert())
    assert [path for path, _, _ in receiver.got] == ["/hooks/T0KEN"]


def test_webhook_that_never_answers(tmp_path):
    """Its timeout ends the wait, the alert is kept and tried again; nobody else waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as deaf, contextlib.closing(State(tmp_path / "s")) as state:
        sink = WebhookSink(f"http://127.0.0.1:{deaf.getsockname()[1]}/", timeout=0.1)
        clock, other = Clock(), Flaky(0, "other")
        outbox = Outbox(state, [sink, other], clock=clock)
        outbox.raise_alerts([alert()])
        for _ in range(2):
            began = time.monotonic()
            outbox.deliver()
            assert 0.1 <= time.monotonic() - began < 5.0
            waiting = state.pending()["webhook"]
            assert waiting["waiting"] == 1
            assert "TimeoutError" in waiting["error"]
            deaf.settimeout(5.0)
            deaf.accept()[0].close()
            outbox.deliver()
            deaf.settimeout(0.0)
            with pytest.raises(BlockingIOError):
                deaf.accept()  # it is not asked again before its time
            clock.now += 1000.0
        assert other.got == [alert()]


def test_webhook_that_is_not_there(receiver, tmp_path, caplog):
    port = receiver.server_port + 1 if receiver.server_port < 65535 else 1024
    sink = WebhookSink(f"http://127.0.0.1:{port}/hooks/T0KEN", secret=b"S3CRET-S3CRET-S3CRET", timeout=1.0)
    state = State(tmp_path / "s")
    outbox = Outbox(state, [sink])
    outbox.raise_alerts([alert()])
    with caplog.at_level(logging.DEBUG):
        assert outbox.deliver() == 0
    waiting = state.pending()["webhook"]
    assert waiting["waiting"] == 1
    assert f"at http://127.0.0.1:{port}" in waiting["error"]
    state.close()
    everything = b"".join(p.read_bytes() for p in tmp_path.iterdir()) + (repr(sink) + caplog.text).encode()
    assert b"T0KEN" not in everything
    assert b"S3CRET" not in everything


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("http://example.org/x", {}, "url must be https but is http://example.org; allow_http=True"),
        ("http://localhost.example.org/x", {}, "url must be https"),
        ("ftp://example.org/T0KEN", {}, "must begin with https:// and a host but does not"),
        ("https://u:p@example.org/", {}, "must have no password"),
        ("https://example.org/", {"secret": "short"}, "secret must have 16 bytes or more but has 5"),
        ("https://example.org/", {"timeout": 0}, "timeout must be above 0"),
    ],
)
def test_webhooks_that_are_refused(url, options, words):
    with pytest.raises(ValueError, match=words) as e:
        WebhookSink(url, **options)
    assert "T0KEN" not in str(e.value)
    WebhookSink("http://example.org/", allow_http=True)


class Flaky:
    def __init__(self, failures, name="flaky", error=None):
        error = error or DeliveryError("no")
        self.name, self.failures, self.error, self.tried, self.got = name, failures, error, [], []

    def deliver(self, alert):
        self.tried.append(alert)
        if self.failures:
            self.failures -= 1
            raise self.error
        self.got.append(alert)


def test_retries_wait_longer_each_time(tmp_path):
    clock, sink = Clock(), Flaky(6)
    state = State(tmp_path / "s")
    outbox = Outbox(state, [sink], first_wait=1, longest_wait=8, clock=clock, seed=0)
    outbox.raise_alerts([alert()])
    waits, last = [], clock.now
    while not sink.got:
        before = len(sink.tried)
        outbox.deliver()
        if len(sink.tried) > before:
            waits.append(clock.now - last)
            last = clock.now
        clock.now += 0.01
    for found, most in zip(waits[1:], [1, 2, 4, 8, 8, 8], strict=True):
        assert most / 2 - 0.02 <= found <= most + 0.02
    assert len(set(waits[4:])) == 3, "without jitter all that failed together comes back together"
    assert outbox.deliver() == 0
    assert state.pending()["flaky"]["waiting"] == 0
    state.close()


def test_a_sink_that_fails_does_not_stop_others_nor_is_it_asked_in_vain(tmp_path):
    clock, bad, good = Clock(), Flaky(10**9, error=RuntimeError("p4ssword")), Flaky(0, "good")
    state = State(tmp_path / "s")
    outbox = Outbox(state, [bad, good], cooldown=Cooldown(0), clock=clock)
    outbox.raise_alerts([alert(i) for i in range(50)])
    assert outbox.deliver() == 50
    assert [a.details["number"] for a in good.got] == list(range(50)), "in the order they were raised"
    assert len(bad.tried) == 1
    assert state.pending()["flaky"]["error"] == "RuntimeError"
    state.close()


def test_an_alert_that_is_never_taken_does_not_hold_up_the_rest(tmp_path):
    class Picky(Flaky):
        def deliver(self, alert):
            self.failures = alert.details["number"] == 0
            super().deliver(alert)

    clock, sink = Clock(), Picky(0)
    state = State(tmp_path / "s")
    outbox = Outbox(state, [sink], cooldown=Cooldown(0), clock=clock, seed=0)
    outbox.raise_alerts([alert(i) for i in range(5)])
    for _ in range(20):
        outbox.deliver()
        clock.now += 0.6
    assert [a.details["number"] for a in sink.got] == [1, 2, 3, 4]
    assert state.pending()["flaky"]["waiting"] == 1
    state.close()


def test_receiver_says_when(tmp_path):
    clock, sink = Clock(), Flaky(1, error=DeliveryError("busy", retry_after=100.0))
    state = State(tmp_path / "s")
    outbox = Outbox(state, [sink], clock=clock)
    outbox.raise_alerts([alert()])
    outbox.deliver()
    clock.now += 99
    assert outbox.deliver() == 0
    clock.now += 2
    assert outbox.deliver() == 1
    state.close()


def test_the_same_alert_is_raised_once(tmp_path):
    state = State(tmp_path / "s")
    sink = Flaky(0)
    outbox = Outbox(state, [sink], cooldown=Cooldown(0))
    assert outbox.raise_alerts([alert(0), alert(0)]) == 1
    assert outbox.raise_alerts([alert(0)]) == 0
    assert outbox.deliver() == 1
    assert len(sink.got) == 1
    state.close()


def test_cooldown_goes_on_after_a_restart(tmp_path):
    clock = Clock()
    for number, new in enumerate([1, 0, 0]):
        state = State(tmp_path / "s")
        assert Outbox(state, clock=clock).raise_alerts([alert(number)]) == new
        state.close()


def test_names_of_sinks_differ(tmp_path):
    state = State(tmp_path / "s")
    with pytest.raises(ValueError, match="sinks must have names that differ but have file, file"):
        Outbox(state, [FileSink(tmp_path / "a"), FileSink(tmp_path / "b")])
    state.close()


def test_prometheus_counts():
    sink = PrometheusSink()
    for i in range(3):
        sink.deliver(alert(i))
    assert sink.registry.get_sample_value("bulwark_alerts_total", {"severity": "warning", "source": "accuracy"}) == 3


@pytest.mark.parametrize("seed", range(2))
def test_none_lost_and_none_doubled_by_kills(tmp_path, seed):
    """Sinks that fail half of the time, and a process that is killed at random moments until it is through."""
    alerts = 100
    program = [sys.executable, HERE / "killed.py", tmp_path, str(seed), str(alerts), "15000"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": ""})
    kills = int(done.stdout)
    said = [Alert("warning", "stream", f"alert {i}", {"number": i}).id for i in range(alerts)]
    written = lines(tmp_path / "alerts.jsonl")
    got = (tmp_path / "got").read_text().split()
    assert sorted(written) == sorted(said), f"{kills} kills"
    assert set(got) == set(said)
    assert len(got) > len(said), "a webhook is at least once: nothing was repeated, so nothing was tested"
    assert kills >= 5
