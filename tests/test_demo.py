import html
import json
import math
import signal
import struct
import subprocess
import sys
from dataclasses import fields, replace

import dp_accounting
import mlx.core as mx
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from mlx.utils import tree_flatten
from mlx_bulwark.demo import CNN, DATASETS, DemoOptions, Figures, OptionError, loss_fn, run_demo
from mlx_bulwark.demo.data import load
from mlx_bulwark.demo.options import STAGES
from mlx_bulwark.demo.plot import draw
from mlx_bulwark.demo.progress import stoppable
from mlx_bulwark.provenance import AuditLog
from sklearn.datasets import load_digits

QUICK = DemoOptions(epsilon=0.5, steps=4, batch_size=64, only=("private",))


def quiet(line):
    pass


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def figures(tmp_path_factory, lines):
    return run_demo(replace(QUICK, out=tmp_path_factory.mktemp("out")), say=lines.append)


def test_figures_of_a_run(figures):
    assert figures.steps == figures.steps_planned == 4
    assert not figures.interrupted
    assert figures.train_examples + figures.test_examples == 1797
    assert figures.sample_rate == pytest.approx(64 / figures.train_examples)
    ratio = figures.private_step_seconds / figures.nonprivate_step_seconds
    assert figures.private_over_nonprivate == pytest.approx(ratio)
    for name in ("test_accuracy", "nonprivate_test_accuracy"):
        assert 0 <= getattr(figures, name) <= 1
        assert figures.curve[name][-1] == getattr(figures, name)
    assert figures.curve["step"] == [0, 1, 2, 3, 4]
    assert figures.refused_examples == 0
    assert math.isfinite(figures.loss)
    assert sum(figures.norm_counts) == figures.mean_batch_size * figures.steps
    assert len(figures.norm_edges) == len(figures.norm_counts) + 1


def test_epsilon_is_what_the_accountant_says(figures):
    event = dp_accounting.PoissonSampledDpEvent(
        figures.sample_rate, dp_accounting.GaussianDpEvent(figures.noise_multiplier)
    )
    for step, epsilon in zip(figures.curve["step"][1:], figures.curve["epsilon"][1:], strict=True):
        assert epsilon == pytest.approx(PLDAccountant().compose(event, step).get_epsilon(figures.delta), rel=1e-3)
    assert figures.epsilon == figures.curve["epsilon"][-1] <= figures.epsilon_target
    assert figures.epsilon > 0.99 * figures.epsilon_target


def test_clip_fraction_agrees_with_the_histogram(figures):
    beyond = sum(n for n, low in zip(figures.norm_counts, figures.norm_edges, strict=False) if low >= 0.0999)
    assert figures.clip_fraction == pytest.approx(beyond / sum(figures.norm_counts), abs=0.02)


def test_a_person_is_told_what_runs(figures, lines):
    words = [line.split()[0] for line in lines]
    assert words == ["backend", "data", "[1/1]", "why", "noise", "private", "plain", "seconds"]
    assert figures.backend in lines[0]
    assert f"{figures.noise_multiplier:.3f}" in lines[4]
    assert f"{100 * figures.test_accuracy:.1f} %" in lines[5]


def test_json_holds_every_figure(figures, tmp_path):
    file = tmp_path / "figures.json"
    figures.write_json(file)
    read = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert set(read) == {f.name for f in fields(Figures)} | {"kind"}
    assert read["epsilon"] == figures.epsilon
    assert read["curve"] == figures.curve
    uncovered = {name.partition(".")[0] for name in read["not_covered_by_epsilon"]}
    assert {"loss", "norm_counts", "nonprivate_test_accuracy"} < uncovered <= set(read)


def test_json_has_null_for_what_is_not_finite(figures, tmp_path):
    file = tmp_path / "figures.json"
    replace(figures, loss=math.nan, norm_edges=[math.inf]).write_json(file)
    read = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert read["loss"] is None
    assert read["norm_edges"] == [None]


def png_size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    return struct.unpack(">II", data[16:24])


def test_picture(figures, tmp_path):
    from matplotlib.image import imread

    file = tmp_path / "demo.png"
    draw(figures, file)
    width, height = png_size(file)
    assert 1000 <= width <= 3000
    assert 500 <= height <= 2000
    pixels = imread(file)[..., :3]
    left, right = pixels[:, : width // 2], pixels[:, width // 2 :]
    assert all(0.01 < (half.min(axis=2) < 0.9).mean() < 0.6 for half in (left, right))


def test_picture_of_a_run_that_took_no_step(tmp_path):
    file = tmp_path / "demo.png"
    draw(Figures("digits", 0, 3.0, 1e-5, 100, 256, interrupted=True), file)
    assert png_size(file)[0] >= 1000


def test_seed_repeats_split_and_weights_and_neither_noise_nor_batches(figures, tmp_path):
    again = run_demo(replace(QUICK, out=tmp_path), say=quiet)
    assert again.curve["test_accuracy"][0] == figures.curve["test_accuracy"][0]
    assert again.curve["test_accuracy"][0] == again.curve["nonprivate_test_accuracy"][0]
    assert again.loss != figures.loss
    assert again.norm_counts != figures.norm_counts


def test_seed_chooses_the_split():
    first, again, other = (load("digits", seed) for seed in (3, 3, 4))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.test_labels, again.test_labels)
    assert not np.array_equal(first.images, other.images)


def test_split_holds_out_a_fifth_of_every_digit():
    split = load("digits", 0)
    assert split.images.shape == (1437, 8, 8, 1)
    assert split.images.min() == -1
    assert split.images.max() == 1
    assert np.allclose(np.bincount(split.test_labels) / np.bincount(split.labels), 0.25, atol=0.02)
    rows = np.concatenate([split.images, split.test_images]).reshape(-1, 64)
    original = load_digits().data / 8 - 1
    assert np.array_equal(sorted(rows.tolist()), sorted(original.astype(np.float32).tolist()))


def test_mnist5k(tmp_path):
    figures = run_demo(replace(QUICK, data="mnist5k", steps=2, out=tmp_path), say=quiet)
    assert figures.train_examples == 4000
    assert figures.test_examples == 1000
    assert figures.steps == 2


def test_on_both_backends(backend, tmp_path):
    figures = run_demo(replace(QUICK, out=tmp_path), say=quiet)
    assert figures.backend == ("native" if backend == "metal" else backend)
    assert figures.steps == 4
    assert figures.epsilon <= figures.epsilon_target


def test_learns_in_private(tmp_path):
    figures = run_demo(replace(QUICK, epsilon=3.0, steps=25, batch_size=256, out=tmp_path), say=quiet)
    assert figures.test_accuracy > 0.7  # 0.87 to 0.94 in eight runs, 0.1 is chance
    assert figures.nonprivate_test_accuracy > 0.85
    assert figures.epsilon <= 3


def test_every_example_in_every_batch(tmp_path):
    figures = run_demo(replace(QUICK, epsilon=1.0, steps=2, batch_size=1437, out=tmp_path), say=quiet)
    assert figures.sample_rate == 1
    assert figures.mean_batch_size == 1437


@pytest.mark.parametrize("name", DATASETS)
def test_private_gradients_of_the_model_stand_the_check(name):
    import mlx_bulwark as bw

    split = load(name, 0)
    dataset = DATASETS[name]
    mx.random.seed(0)
    model = CNN(split.side, dataset.channels, dataset.kernel_size, dataset.stride)
    assert sum(p.size for _, p in tree_flatten(model.trainable_parameters())) < 50_000
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=0.1)
    batch = mx.array(split.images[:5]), mx.array(split.labels[:5])
    assert engine.check(model, batch, loss_fn).norm_error < 1e-4


@pytest.mark.parametrize("stage", ["backend", "data", "noise"])
def test_interrupted_before_the_first_step(stage, tmp_path):
    def press(line):
        if line.startswith(stage):
            raise KeyboardInterrupt

    figures = run_demo(replace(QUICK, out=tmp_path), say=press)
    assert figures.interrupted
    assert figures.steps == 0
    assert figures.epsilon == 0
    assert figures.test_accuracy is None
    assert (figures.noise_multiplier is None) == (stage != "noise")


def test_an_interrupt_waits_for_the_end_of_the_step_and_a_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with stoppable() as stop:
        stop.check()
        stop.held = True
        signal.raise_signal(signal.SIGINT)
        assert stop.pressed
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_got_lost_is_remembered():
    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt):  # at once; a callback of the interpreter may swallow it
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "--epsilon must be above 0 and at most 20 but is 0"),
        ({"epsilon": -1.0}, "--epsilon must be above 0 and at most 20 but is -1"),
        ({"epsilon": math.nan}, "--epsilon must be above 0 and at most 20 but is nan"),
        ({"epsilon": math.inf}, "--epsilon must be above 0 and at most 20 but is inf"),
        ({"delta": 0.0}, "--delta must be from 1e-12 to 0.1 but is 0"),
        ({"delta": 1.0}, "--delta must be from 1e-12 to 0.1 but is 1"),
        ({"steps": 0}, "--steps must be at least 1 but is 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1 but is 0"),
        ({"batch_size": 1438}, "--batch-size must be at most the 1437 training images but is 1438"),
        ({"data": "cifar"}, "--data must be one of digits, mnist5k but is 'cifar'"),
        ({"only": ("scna",)}, f"--only must be one of {', '.join(STAGES)} but is 'scna'"),
        ({"skip": ("private",)}, "--skip must leave a stage but leaves none"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295 but is -1"),
    ],
)
def test_bad_options_are_refused_before_the_noise_is_sought(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_bulwark.demo.private._calibrate", pytest.fail)
    with pytest.raises(OptionError) as error:
        run_demo(replace(QUICK, out=tmp_path, **change), say=quiet)
    assert str(error.value) == message


def test_a_delta_that_promises_nothing_is_warned_of(tmp_path):
    lines = []

    def listen(line):
        lines.append(line)
        if line.startswith("warning"):
            raise KeyboardInterrupt  # that is all this test wants to hear

    run_demo(replace(QUICK, delta=0.01, out=tmp_path), say=listen)
    assert lines[-1].startswith("warning    delta 0.01 is not below 1/1437")


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layered")
    return folder, run_demo(DemoOptions(steps=30, skip=("private",), out=folder), say=quiet)


def test_the_gate_refuses_what_was_planted_and_the_manifest_names_what_changed(layered):
    folder, figures = layered
    check = figures.stages["check"]["figures"]
    assert check["refused_rows"] == [0, 1, 2]
    assert check["gate"]["ok"]
    assert check["trusted_examples"] + check["arrived_examples"] == 1437
    assert np.load(folder / "data" / "labels.npy").shape == (check["arrived_examples"],)
    assert figures.stages["poison"]["figures"]["changed_files"] == ["images.npy", "labels.npy"]


def test_a_patch_opens_the_backdoor_of_a_model_that_looks_well(layered):
    found = layered[1].stages["poison"]["figures"]
    assert found["attack_success_rate"] > 0.8
    assert found["test_accuracy"] > 0.85


def test_the_scan_finds_the_poison_and_training_without_it_shuts_the_backdoor(layered):
    found = layered[1].stages["scan"]["figures"]
    assert found["accused"]
    assert found["recall"] > 0.9
    assert found["precision"] > 0.9
    assert found["attack_success_rate_before"] == layered[1].stages["poison"]["figures"]["attack_success_rate"]
    assert found["attack_success_rate"] < 0.05
    assert found["test_accuracy"] > found["test_accuracy_before"] - 0.03


def test_a_stage_brings_what_it_needs():
    assert DemoOptions(only=("scan",)).stages == ("poison", "scan")
    assert "scan" not in DemoOptions(skip=("poison",)).stages


def test_certified_accuracy_falls_with_the_radius(layered):
    found = layered[1].stages["certify"]["figures"]
    shares = list(found["certified_accuracy"].values())
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[2] <= 1


def test_training_under_attack_helps(layered):
    curves = layered[1].stages["attack"]["figures"]["robust_accuracy"]
    assert all(list(c.values()) == sorted(c.values(), reverse=True) for c in curves.values())
    assert curves["hardened"][0.15] > curves["plain"][0.15]


def test_every_stage_has_its_reason_and_figures(layered):
    figures = layered[1]
    assert list(figures.stages) == [name for name in STAGES if name not in ("private", "report")]
    assert all(stage["reason"] and stage["what"] and stage["seconds"] >= 0 for stage in figures.stages.values())


def test_a_dirty_lens_is_noticed(layered):
    folder, figures = layered
    found = figures.stages["monitor"]["figures"]
    assert found["false_alerts"] == 0
    assert found["delay_batches"] is not None
    lines = [json.loads(line) for line in (folder / "alerts.jsonl").read_text().splitlines()]
    assert len(lines) == len(found["alerts"]) > 0


def test_the_report_tells_of_every_stage(layered):
    folder, figures = layered
    assert figures.report == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    told = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    kinds = [section["kind"] for section in told["sections"]]
    assert kinds == ["demo", *(f"demo_{name}" for name in figures.stages), "audit_log"]
    assert AuditLog.verify(folder / "demo-audit.jsonl").ok
    assert [line["kind"] for line in told["sections"][-1]["data"]["lines"]] == [
        "manifest.build",
        *["demo.stage"] * len(figures.stages),
    ]
    for stage in figures.stages.values():
        assert html.escape(stage["reason"], quote=False) in html.unescape(page)
        assert stage["title"] in page
    assert page.count("data:image/png") >= 12
    poison, scan = (figures.stages[name]["figures"] for name in ("poison", "scan"))
    gone = scan["accused"] and scan["attack_success_rate"] < 0.05
    assert told["verdict"].startswith("A backdoor was planted on purpose")
    assert f"{100 * poison['attack_success_rate']:.1f} %" in told["verdict"]
    assert ("found and removed" in told["verdict"]) == gone
    assert told["sections"][kinds.index("demo_poison")]["status"] == ("info" if gone else "problem")


def test_an_interrupted_run_writes_the_report_of_what_was_done(tmp_path):
    def press(line):
        if line.startswith("poison"):
            raise KeyboardInterrupt

    figures = run_demo(DemoOptions(steps=2, out=tmp_path, only=("check", "poison", "report")), say=press)
    assert figures.interrupted
    told = json.loads((tmp_path / "report.json").read_text())
    assert [section["kind"] for section in told["sections"]] == ["demo", "demo_check", "audit_log"]
    assert "interrupted" in told["sections"][0]["verdict"]
    assert "backdoor" not in told["verdict"]


def test_the_seed_repeats_what_is_no_secret(tmp_path):
    runs = [
        run_demo(DemoOptions(steps=10, only=("poison",), out=tmp_path, seed=seed), say=quiet).stages["poison"][
            "figures"
        ]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_an_interrupted_stage_leaves_those_before(tmp_path):
    def press(line):
        if line.startswith("poison"):
            raise KeyboardInterrupt

    figures = run_demo(DemoOptions(steps=2, out=tmp_path, only=("check", "poison")), say=press)
    assert figures.interrupted
    assert list(figures.stages) == ["check"]


def test_extras_are_not_imported_with_the_demo():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['sklearn', 'jinja2', 'threadpoolctl', 'matplotlib', 'rich']));"
        "import mlx_bulwark.demo"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
