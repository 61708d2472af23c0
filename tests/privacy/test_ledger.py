"""The ledger: written before the update, verified line by line, held by one."""

import json
import os
import subprocess
import sys

import mlx_bulwark as bw
import pytest
from mlx_bulwark.privacy import schedules
from mlx_bulwark.privacy.ledger import read_ledger
from training import data, engine, train


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_line_for_each_step_and_nothing_of_the_data(tmp_path, backend, compiled):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path, max_grad_norm=schedules.step(1.0, 0.5, 2))
    train(e, 4, compiled=compiled, microbatch_size=8)
    header, *steps = lines(path)
    assert header == {"format": "mlx-bulwark ledger", "version": 1, "chain": header["chain"]}
    for n, line in enumerate(steps, 1):
        line.pop("chain")
        assert line == {
            "step": n,
            "session": 0,
            "sampling": "poisson",
            "sample_rate": 0.25,
            "mechanism": "gaussian",
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0 if n <= 2 else 0.5,
        }
    assert len(steps) == 4
    assert read_ledger(path).runs == e.runs
    assert bw.ledger_epsilon(path, 1e-3) == e.epsilon(1e-3)
    assert bw.ledger_epsilon(path, 1e-3, "rdp") == bw.compute_epsilon(1.0, 0.25, 4, 1e-3, "rdp")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("compiled", [False, True])
def test_the_line_is_on_the_disk_before_the_update(tmp_path, monkeypatch, compiled):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path)
    events = []
    fsync = os.fsync

    def seen(file):
        fsync(file)
        events.append(("line", len(lines(path)) - 1))

    monkeypatch.setattr(os, "fsync", seen)
    import mlx_bulwark.privacy.optimizer as module

    released = module.PrivateOptimizer.update

    def update(self, model, gradients):
        released(self, model, gradients)
        events.append(("update", e.steps))

    if compiled:  # Python sees a compiled update once, when it is traced: after its line too
        monkeypatch.setattr(module.PrivateOptimizer, "update", update)
        train(e, 1, compiled=True, microbatch_size=64)
        assert events == [("line", 1), ("update", 1)]
    else:
        monkeypatch.setattr(module.PrivateOptimizer, "update", update)
        train(e, 3, microbatch_size=64)
        assert events == [x for n in (1, 2, 3) for x in (("line", n), ("update", n))]


@pytest.mark.parametrize("compiled", [False, True])
def test_no_line_no_update(tmp_path, monkeypatch, compiled):
    e = engine(ledger=tmp_path / "ledger.jsonl")
    train(e, 2, compiled=compiled)
    counter = e.state["noise"]["counter"].tolist()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        train(e, 1, compiled=compiled)
    assert e.steps == 2
    assert e.state["noise"]["counter"].tolist() == counter
    monkeypatch.undo()
    train(e, 1, compiled=compiled)
    assert read_ledger(tmp_path / "ledger.jsonl").steps == 3


def test_a_continued_ledger_counts(tmp_path):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path)
    train(e, 5)
    e.close()
    with pytest.raises(bw.PrivacyError, match="was closed"):
        train(e, 1)
    second = engine(ledger=path, noise_multiplier=2.0)
    assert (second.steps, second.epsilon(1e-3)) == (5, e.epsilon(1e-3))
    train(second, 3)
    assert [r.steps for r in second.runs] == [5, 3]
    assert bw.ledger_epsilon(path, 1e-3) == second.epsilon(1e-3) > e.epsilon(1e-3)


def test_an_older_checkpoint_keeps_what_was_spent(tmp_path):
    path, state = tmp_path / "ledger.jsonl", tmp_path / "engine.json"
    e = engine(ledger=path)
    train(e, 2)
    e.save_state(state)
    train(e, 6)
    e.close()
    back = engine(ledger=path)
    back.load_state(state)
    assert back.steps == 8
    assert back.epsilon(1e-3) == e.epsilon(1e-3)


def test_a_ledger_that_lacks_steps_of_the_state_is_refused(tmp_path):
    e = engine(ledger=tmp_path / "one")
    train(e, 3)
    e.save_state(tmp_path / "engine.json")
    for other in (engine(ledger=tmp_path / "empty"), engine(ledger=tmp_path / "other", noise_multiplier=5.0)):
        if other.noise_multiplier == 5.0:
            train(other, 4)
        with pytest.raises(bw.PrivacyError, match="lines are lost"):
            other.load_state(tmp_path / "engine.json")


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_torn_last_line_is_tolerated(tmp_path, cut):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path)
    train(e, 3)
    e.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_ledger(path).steps == 2
    resumed = engine(ledger=path)
    assert resumed.steps == 2
    train(resumed, 2)
    assert read_ledger(path).steps == 4


def test_a_ledger_of_a_torn_header_begins_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"form')
    train(engine(ledger=path), 1)
    assert read_ledger(path).steps == 1


def forge_sigma(text):
    text[2] = text[2].replace('"noise_multiplier": 1.0', '"noise_multiplier": 9.0')


def garble(text):
    text[2] = "\0" * 30


def lose(text):
    del text[2]


def swap(text):
    text[2], text[3] = text[3], text[2]


def double(text):
    text.insert(2, text[1])


def forge_the_last(text):
    text[-1] = text[-1].replace('"sample_rate": 0.25', '"sample_rate": 0.01')


@pytest.mark.parametrize(
    ("forge", "line"), [(forge_sigma, 3), (garble, 3), (lose, 3), (swap, 3), (double, 3), (forge_the_last, 6)]
)
def test_a_changed_line_is_refused_with_its_number(tmp_path, forge, line):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path)
    train(e, 5)
    e.close()
    text = path.read_text().splitlines()
    forge(text)
    path.write_text("\n".join(text) + "\n")
    before = path.read_bytes()
    for use in (lambda: bw.ledger_epsilon(path, 1e-3), lambda: engine(ledger=path)):
        with pytest.raises(bw.PrivacyError, match=f"line {line} is not"):
            use()
    assert path.read_bytes() == before


def test_another_file_is_not_taken_for_a_ledger(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(bw.PrivacyError, match="line 1 is not"):
        engine(ledger=path)
    assert path.read_text() == "hello\n"


def test_one_engine_at_a_time(tmp_path):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path)
    with pytest.raises(bw.PrivacyError, match="in use by one engine"):
        engine(ledger=path)
    settings = f"batch_size=3, noise_multiplier=1, max_grad_norm=1, ledger={str(path)!r}"
    code = f"import mlx_bulwark as bw; bw.PrivacyEngine(9, {settings})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "in use by one engine at a time" in other.stderr
    assert len(e.batches(data(), steps=1)) == 1
    e.close()
    engine(ledger=path)


def test_a_lost_ledger_directory_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        engine(ledger=tmp_path / "missing" / "ledger.jsonl")


def test_a_resumed_cycle_has_new_groups_and_is_not_joined(tmp_path):
    # one step and one more of another partition: an example may take part in both
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):
        e = engine(ledger=path, batch_size=8, sampling="cyclic_poisson", cycle_length=4)
        train(e, 1)
        e.close()
    assert [(r.steps, r.session) for r in read_ledger(path).runs] == [(1, 0), (1, 1)]
    assert bw.ledger_epsilon(path, 1e-3) == bw.compute_epsilon(1.0, 0.5, 2, 1e-3)


def test_budget_command(tmp_path, monkeypatch, capsys):
    from mlx_bulwark.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "budget", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path, noise_multiplier=schedules.step(1.0, 2.0, 2))
    train(e, 3)
    assert run(path, "--delta", "1e-3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epsilon"], found["steps"], found["adjacency"]) == (e.epsilon(1e-3), 3, e.adjacency)
    assert [(r["steps"], r["noise_multiplier"]) for r in found["runs"]] == [(2, 1.0), (1, 2.0)]
    assert found["curve"]["step"] == [0, 1, 2, 3]
    alone = [bw.compute_epsilon(1.0, e.sample_rate, steps, 1e-3) for steps in (1, 2)]
    assert found["curve"]["epsilon"] == [0, *alone, e.epsilon(1e-3)]
    assert run(path, "--delta", "1e-3", "--accountant", "rdp") == 0
    out = capsys.readouterr().out
    assert f"epsilon {bw.ledger_epsilon(path, 1e-3, 'rdp'):.6g} at delta 0.001 after 3 steps (rdp" in out
    assert "add or remove one example" in out
    path.write_bytes(path.read_bytes()[:-3])
    assert run(path) == 0
    out = capsys.readouterr().out
    assert "after 2 steps" in out
    assert "torn" in out
    assert run(path, "--delta", 2) == 2
    assert run(path, "--accountant", "gdp") == 2
    assert run(tmp_path / "none") == 1
    path.write_text(path.read_text().replace("1.0", "9.0"))
    assert run(path) == 3
    assert "line 2" in capsys.readouterr().err


def test_a_discrete_ledger_is_accounted_by_rdp(tmp_path):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path, noise="discrete")
    train(e, 2)
    assert bw.ledger_epsilon(path, 1e-3) == e.epsilon(1e-3)


def test_nothing_of_a_long_torn_line_is_left(tmp_path):
    path = tmp_path / "ledger.jsonl"
    e = engine(ledger=path)
    train(e, 1)
    e.close()
    path.write_bytes(path.read_bytes() + b"\0" * 4096)
    train(engine(ledger=path), 1)
    assert path.read_bytes().endswith(b"}\n")
    assert read_ledger(path).steps == 2
