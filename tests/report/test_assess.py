"""The regular assessment: nothing is cried over noise, a planted regression is found and named."""

import json
import runpy
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_bulwark import cli
from mlx_bulwark.poison.attacks import badnets
from mlx_bulwark.report.assess import dropped_by_chance, lost_by_chance
from scipy import stats

MODEL = "import mlx.nn as nn\ndef make():\n    return nn.Linear(8, 3)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A linear model of three classes, its data, and others from the same source."""
    tmp_path = tmp_path_factory.mktemp("assessed")
    rng = np.random.default_rng(0)
    (tmp_path / "assessed_model.py").write_text(MODEL)
    w = rng.normal(size=(3, 8))
    for name in ("held", "other"):
        x = rng.uniform(0.2, 0.8, (400, 8)).astype(np.float32)
        noisy = (x - 0.5) @ w.T + rng.gumbel(size=(400, 3)) / 8
        np.savez(tmp_path / f"{name}.npz", x=x, y=noisy.argmax(axis=1))
    np.savez(tmp_path / "shifted.npz", x=(x * 0.5).astype(np.float32), y=noisy.argmax(axis=1))
    y = rng.integers(0, 3, 400)
    groups = (rng.uniform(0.2, 0.8, (3, 8))[y] + rng.normal(size=(400, 8)) / 50).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=groups, y=y)
    np.savez(tmp_path / "flipped.npz", x=groups, y=np.where(rng.random(400) < 0.1, (y + 1) % 3, y))
    save(tmp_path / "good.safetensors", w)
    save(tmp_path / "bad.safetensors", w + rng.normal(size=w.shape) * 0.6)
    return tmp_path


def save(path, w):
    model = nn.Linear(8, 3)
    model.weight, model.bias = mx.array(w.astype(np.float32)), mx.array((-0.5 * w.sum(axis=1)).astype(np.float32))
    model.save_weights(str(path))


DIGITS = """import mlx.nn as nn
class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(64, 48), nn.Linear(48, 10)
    def __call__(self, x):
        return self.last(nn.relu(self.hidden(x.reshape(len(x), -1))))
"""


@pytest.fixture(scope="module")
def digits(folder):
    """One architecture trained on clean digits, and anew with a patch that stands for 7; 400 digits held out."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    train, held = order[:1000], order[1000:1400]
    np.savez(folder / "digits.npz", x=x[held], y=y[held])
    (folder / "assessed_digits.py").write_text(DIGITS)
    perceptron = runpy.run_path(str(folder / "assessed_digits.py"))["Perceptron"]
    patched = badnets(x[train], y[train], rate=0.1, target=7, trigger=np.ones((2, 2, 1), np.float32), seed=0)
    for name, (rows, labels) in {"clean": (x[train], y[train]), "backdoored": (patched.x, patched.y)}.items():
        mx.random.seed(0)
        model, optimizer, rng = perceptron(), optim.Adam(5e-3), np.random.default_rng(0)
        step = nn.value_and_grad(model, lambda x, y, m=model: nn.losses.cross_entropy(m(x), y, reduction="mean"))
        for _ in range(20):
            for at in np.array_split(rng.permutation(len(rows)), 15):
                _, gradients = step(mx.array(rows[at]), mx.array(labels[at]))
                optimizer.update(model, gradients)
                mx.eval(model.parameters(), optimizer.state)
        model.save_weights(str(folder / f"{name}.safetensors"))
        if name == "clean":  # the same on digits, whose first column is empty, and open to who writes there
            weight = np.array(model.hidden.weight)
            weight[:, 0::8] = 3 * np.random.default_rng(1).standard_normal((48, 8))
            model.hidden.weight = mx.array(weight)
            model.save_weights(str(folder / "brittle.safetensors"))


@pytest.fixture
def assess(folder, monkeypatch, capsys):
    """Run the command within this process, in the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))

    def run(*more, weights="good", data="held", baseline="base.json", eps="0.05", model="assessed_model:make"):
        files = ["--weights", f"{weights}.safetensors", "--data", f"{data}.npz", "--baseline", baseline, "--out", "out"]
        options = ["--model", model, "--no-progress", "--eps", eps, "--no-inspect", *more]
        monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "assess", *options, *files])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return exited.value.code, *capsys.readouterr()

    if not (folder / "base.json").exists():
        assert run("--update")[0] == 0
    return run


def test_the_same_again_is_not_worse(assess, folder):
    code, said, _ = assess("--json")
    found = json.loads(said)
    assert (code, found["ok"], found["paired"], found["events"]) == (0, True, True, [])
    assert [f["p_value"] for f in found["figures"]] == [1.0, 1.0]
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [s["kind"] for s in report["sections"]] == ["assessment", "robust_accuracy", "drift"]
    assert "Nothing is worse" in (folder / "out" / "report.html").read_text()


def test_other_data_of_the_same_source_are_not_worse(assess):
    found = json.loads(assess("--json", data="other")[1])
    assert (found["ok"], found["paired"], [f["worse"] for f in found["figures"]]) == (True, False, [False, False])


def test_scans_are_part_of_it(assess, folder):
    code, said, _ = assess("--json", "--inspect", "--train", "other.npz")
    assert (code, json.loads(said)["events"]) == (0, [])
    report = json.loads((folder / "out" / "report.json").read_text())
    kinds = ["assessment", "robust_accuracy", "drift", "model_inspection", "poison_scan"]
    assert [s["kind"] for s in report["sections"]] == kinds
    assert "not of the form" not in " ".join(s["verdict"] for s in report["sections"])


def test_poison_in_the_training_data_is_a_regression(assess):
    """The same model and held-out data: only the training data have changed."""
    for name in ("base-train.json", "base-no-train.json"):
        more = ("--train", "train.npz") if name == "base-train.json" else ()
        assert assess("--update", *more, baseline=name)[0] == 0
        code, said, _ = assess("--json", "--train", "flipped.npz", baseline=name)
        assert (code, json.loads(said)["events"]) == (1, ["the training data look poisoned"])
    assert assess("--update", "--train", "flipped.npz", baseline="base-flipped.json")[0] == 0
    assert assess("--train", "flipped.npz", baseline="base-flipped.json")[0] == 0, "it was so before"


def test_a_backdoor_in_a_model_trained_anew_is_named(assess, digits, folder):
    """Accuracies are as they were: the inspection alone tells that something has changed."""
    digit = {"data": "digits", "model": "assessed_digits:Perceptron", "baseline": "digits.json", "eps": "0.01"}
    more = ("--inspect", "--attack", "fgsm", "--json")
    code, said, _ = assess("--update", *more, weights="clean", **digit)
    assert code == 0
    assert assess(*more, weights="clean", **digit)[0] == 0
    code, said, _ = assess(*more, weights="backdoored", **digit)
    found = json.loads(said)
    assert (code, found["events"]) == (1, ["the model looks as one with a backdoor"])
    assert not found["figures"][0]["worse"]
    report = json.loads((folder / "out" / "report.json").read_text())
    (inspected,) = [s["verdict"] for s in report["sections"] if s["kind"] == "model_inspection"]
    assert inspected == "The model behaves as one with a backdoor does towards class 7."


def test_a_backdoor_that_the_baseline_had_too_is_told_each_time(assess, digits, folder):
    digit = {"data": "digits", "model": "assessed_digits:Perceptron", "baseline": "doubtful.json", "eps": "0.01"}
    what = "the model looks as one with a backdoor"
    code, said, _ = assess("--inspect", "--attack", "fgsm", "--update", weights="backdoored", **digit)
    assert (code, f"NOTE   {what}, and the baseline now has it so" in said) == (0, True)
    assert f"is itself in doubt: {what}." in said
    code, said, _ = assess("--inspect", "--attack", "fgsm", weights="backdoored", **digit)
    assert (code, f"STILL  {what}" in said) == (0, True)
    code, said, _ = assess("--inspect", "--attack", "fgsm", "--json", weights="backdoored", **digit)
    assert (json.loads(said)["events"], json.loads(said)["standing"]) == ([], [what])
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["sections"][0]["status"] == "attention"


def test_attacks_that_do_more_harm_are_named(assess, digits):
    digit = {"data": "digits", "model": "assessed_digits:Perceptron", "baseline": "harm.json", "eps": "0.05"}
    assert assess("--update", weights="clean", **digit)[0] == 0
    code, said, _ = assess("--json", weights="brittle", **digit)
    found = json.loads(said)
    assert (code, [(f["name"], f["worse"]) for f in found["figures"]]) == (
        1,
        [("clean accuracy", False), ("robust accuracy at 0.05", True)],
    )


def test_worse_weights_are_named(assess):
    code, said, _ = assess(weights="bad")
    assert code == 1
    assert "WORSE  clean accuracy" in said
    assert "Worse than the baseline of" in said


def test_a_drop_within_the_tolerance_is_no_regression(assess):
    found = json.loads(assess("--json", "--tolerance", "0.99", weights="bad")[1])
    assert [f["worse"] for f in found["figures"]] == [False, False]


def test_drift_is_named(assess):
    code, said, _ = assess(data="shifted")
    assert code == 1
    assert "drifted: input 0" in said
    assert "all columns, all columns" not in said


@pytest.mark.parametrize(
    ("more", "options", "words"),
    [
        ([], {"eps": "0.1"}, "--eps must be as in the baseline"),
        (["--norm", "l2"], {}, "--norm must be as in the baseline"),
        (["--tolerance", "2"], {}, "--tolerance must be at least 0"),
        ([], {"baseline": "no.json"}, "--update writes it"),
        ([], {"baseline": "held.npz"}, "--baseline must be a baseline"),
        (["--update"], {"baseline": "nowhere/base.json"}, "--baseline must be in a folder that exists"),
        (["--train", "no.npz"], {}, "--train must be a readable .npz file"),
    ],
)
def test_misuse(assess, more, options, words):
    code, said, told = assess(*more, **options)
    assert (code, said) == (2, "")
    assert words in told


def test_a_file_where_the_report_should_go_is_told_before_the_work(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    argv = ["mlx-bulwark", "assess", "--model", "assessed_model:make", "--data", "held.npz", "--baseline", "new.json"]
    monkeypatch.setattr(sys, "argv", [*argv, "--update", "--out", "held.npz"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 2
    assert capsys.readouterr().err == "mlx-bulwark: --out must be a folder but held.npz is a file\n"
    assert not (folder / "new.json").exists()


def test_p_values_are_those_of_scipy():
    rng = np.random.default_rng(1)
    for _ in range(20):
        before, now = rng.random(60) < 0.8, rng.random(60) < 0.7
        lost, won = (before & ~now).sum(), (~before & now).sum()
        assert lost_by_chance(before, now) == pytest.approx(
            stats.binomtest(lost, lost + won, alternative="greater").pvalue
        )
        old, new = {"right": 50, "inputs": 60}, {"right": int(now.sum()), "inputs": 60}
        odds = [[old["right"], 10], [new["right"], 60 - new["right"]]]
        assert dropped_by_chance(old, new) == pytest.approx(stats.fisher_exact(odds, alternative="greater").pvalue)
    assert lost_by_chance(before, before) == 1.0
