"""The commands and the page of a monitor."""

import http.client
import json
import subprocess
import sys
import threading
from html.parser import HTMLParser

import pytest
from mlx_bulwark import cli
from mlx_bulwark.monitor import Alert, Outbox, State
from mlx_bulwark.monitor.serve import serve
from prometheus_client.parser import text_string_to_metric_families

EVIL = "<script>alert('x')</script>&\"'"


@pytest.fixture
def state(tmp_path):
    """A state file with two open alerts, one of them critical, and a figure whose label came from outside."""
    path = tmp_path / "monitor.sqlite"
    written = State(path)
    outbox = Outbox(written, [Nowhere()])
    outbox.raise_alerts([Alert("critical", "accuracy", f"accuracy fell {EVIL}", {"rule": "cusum"}, time=0.0)])
    outbox.raise_alerts([Alert("warning", EVIL, "drift", time=1.0)])
    outbox.deliver()
    point = {"series": EVIL, "batch": 1, "time": 0.0, "label": EVIL, "value": 0.5, "standardised": -4.0, "size": 100}
    written.add_points([point | {"signals": [EVIL]}, point | {"value": None, "signals": []}], 10)
    window = {"rows": 500, "reference_rows": 1000}
    written.keep(
        {
            "counters": {"batches": 3, "not_finite": 1},
            "settings": {"series": {"accuracy": {"baseline": 0.9}}, "windows": {"inputs": window, "outliers": window}},
            "tests": {"inputs": {"test": "ks", "p_value": 1e-9, "effect": 0.4, "psi": 0.5, "drift": True}},
        }
    )
    written.close()
    return path


class Nowhere:
    name = "webhook"

    def deliver(self, alert):
        raise OSError(EVIL)


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as e:
        cli._app()(["monitor", *map(str, arguments)])
    said = capsys.readouterr()
    return e.value.code, said.out, said.err


def test_status(state, capsys):
    code, out, _ = command(capsys, "status", "--state", state)
    assert code == 1
    assert "0 info, 1 warning, 1 critical" in out
    assert "last error: OSError" in out
    code, out, _ = command(capsys, "status", "--state", state, "--json")
    found = json.loads(out)
    assert (code, found["kind"], found["counters"]["batches"]) == (1, "monitor", 3)
    assert found["outbox"]["webhook"]["waiting"] == 2


def test_acknowledged_alerts_are_no_longer_open(state, capsys):
    code, out, _ = command(capsys, "alerts", "--state", state, "--json")
    first, second = json.loads(out)
    assert code == 0
    assert Alert.from_json(first).severity == "critical"
    assert command(capsys, "acknowledge", first["id"], "--state", state)[0] == 0
    assert command(capsys, "status", "--state", state)[0] == 0
    code, out, _ = command(capsys, "alerts", "--state", state, "--open")
    assert second["id"] in out
    assert first["id"] not in out
    assert command(capsys, "alerts", "--state", state, "--last", "1", "--json")[1].count('"id"') == 1
    code, _, error = command(capsys, "acknowledge", "nobody", "--state", state)
    assert code == 2
    assert "no alert has the id nobody" in error


@pytest.mark.parametrize("name", ["status", "alerts", "serve"])
def test_misuse(name, tmp_path, capsys):
    code, _, error = command(capsys, name, "--state", tmp_path / "none")
    assert code == 2
    assert error.startswith(f"mlx-bulwark: {tmp_path / 'none'} cannot be ")
    assert "No such state file" in error
    (tmp_path / "other").write_text("a,b\n")
    code, _, error = command(capsys, name, "--state", tmp_path / "other")
    assert code == 2
    assert "is not" in error
    assert not (tmp_path / "none").exists()


@pytest.fixture
def server(state):
    made = serve(state, "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def ask(server, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]

    def handle_data(self, data):
        self.text += data


def test_page(server):
    status, headers, text = ask(server, "/")
    page = Page()
    page.feed(text)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "script" not in page.tags
    assert page.addresses == ["data:,"], "nothing is asked of anywhere"
    assert page.tags.count("h1") == 1
    assert [t for t in page.tags if t == "svg"] == ["svg"]
    assert EVIL in page.text
    assert "1 critical alert open" in page.text
    assert "not full yet" in page.text


def test_other_paths(server, state, capsys):
    status, headers, text = ask(server, "/status")
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    told = json.loads(command(capsys, "status", "--state", state, "--json")[1])
    assert json.loads(text) | {"time": 0} == told | {"time": 0}
    assert ask(server, "/healthz")[::2] == (200, "ok\n")
    assert ask(server, "/../etc/passwd")[0] == 404
    assert ask(server, "/", method="POST")[0] == 501
    assert ask(server, "/", method="HEAD")[::2] == (200, "")
    status, _, text = ask(server, "/metrics")
    assert status == 200
    samples = {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert samples["bulwark_alerts_total", "critical", "accuracy"] == 1
    assert samples["bulwark_outbox_waiting", "webhook"] == 2
    assert samples["bulwark_window_p_value", "inputs"] == 1e-9
    assert samples["bulwark_batches_total",] == 3


def test_names_that_point_here_by_trickery_are_refused(server):
    assert ask(server, "/status", host="evil.example:80")[0] == 421
    assert ask(server, "/status", host="localhost:80")[0] == 200


def test_state_that_went_away(server, state):
    state.unlink()
    status, _, text = ask(server, "/healthz")
    assert status == 503
    assert text == "the state cannot be read: FileNotFoundError\n"


def test_serve_tells_its_address_and_ends(state):
    program = [sys.executable, "-m", "mlx_bulwark.cli", "monitor", "serve", "--state", state, "--port", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line
        address = line.split("http://127.0.0.1:")[1].rstrip("/\n")
        connection = http.client.HTTPConnection("127.0.0.1", int(address), timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        connection.close()
        process.send_signal(2)
        assert process.wait(20) == 130
