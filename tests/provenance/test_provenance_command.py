import json
import os
import sys

import pytest
from mlx_bulwark.provenance import AuditLog

pytest.importorskip("typer")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    from mlx_bulwark import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("a")
    app = cli._app()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlx-bulwark", *arguments])
        with pytest.raises(SystemExit) as end:
            app(prog_name="mlx-bulwark")
        out = capsys.readouterr()
        told = json.loads(out.out) if "--json" in arguments and out.out else out.out
        return int(end.value.code or 0), told, out.err

    return call


def test_build_verify_and_find(run, tmp_path):
    code, told, _ = run("manifest", "build", "data", "--out", "m.json", "--source", "here", "--json")
    assert (code, told["files"]) == (0, 1)
    assert run("manifest", "verify", "m.json", "data")[0] == 0
    (tmp_path / "data" / "a").write_text("b")
    code, told, _ = run("manifest", "verify", "m.json", "data", "--json", "--audit-log", "log")
    assert (code, told["findings"][0]["kind"]) == (1, "changed")
    assert (len(told["root"]), told["source"], told["signature"]) == (64, "here", None)
    code, told, _ = run("log", "show", "log", "--json")
    assert (code, told["lines"][0]["kind"]) == (0, "manifest.verify")


def test_another_schema_is_a_finding_and_none_a_notice(run, tmp_path):
    (tmp_path / "s.json").write_text("{}")
    run("manifest", "build", "data", "--out", "m.json", "--schema", "s.json")
    code, told, _ = run("manifest", "verify", "m.json", "data", "--json")
    assert (code, [n["kind"] for n in told["notices"]]) == (0, ["schema"])
    assert "notice: schema" in run("manifest", "verify", "m.json", "data", "--same-commit")[1]
    assert run("manifest", "verify", "m.json", "data", "--schema", "s.json")[0] == 0
    (tmp_path / "s.json").write_text("{ }")
    code, told, _ = run("manifest", "verify", "m.json", "data", "--schema", "s.json", "--json")
    assert (code, told["findings"][0]["kind"]) == (1, "schema")


def test_sign_and_verify(run, tmp_path):
    pytest.importorskip("model_signing")
    run("manifest", "build", "data", "--out", "m.json")
    assert run("manifest", "sign", "m.json", "--out", "m.sig", "--key", "key", "--new-key")[0] == 0
    signed = ("manifest", "verify", "m.json", "data", "--signature", "m.sig", "--key", "key.pub")
    assert run(*signed)[0] == 0
    assert run(*signed, "--json")[1]["signature"] == "verified, by key.pub"
    (tmp_path / "m.sig").write_text("{}")
    code, told, error = run(*signed, "--json")
    assert code == 1
    assert "must be a signature" in error
    assert told["ok"] is False


def test_diff(run, tmp_path):
    run("manifest", "build", "data", "--out", "a.json")
    (tmp_path / "data" / "b").write_text("b")
    run("manifest", "build", "data", "--out", "b.json")
    assert run("manifest", "diff", "a.json", "a.json")[0] == 0
    assert run("manifest", "diff", "a.json", "b.json", "--json")[:2] == (
        1,
        {"added": ["b"], "removed": [], "changed": [], "renamed": []},
    )


def test_log_verify_with_a_signed_anchor(run, tmp_path):
    log = AuditLog(tmp_path / "log")
    log.append("a")
    log.append("b")
    assert run("log", "verify", "log")[:2] == (0, "3 lines: consistent; truncation or rewriting cannot be excluded\n")
    assert run("log", "head", "log", "--key", "key", "--new-key", "hmac", "--out", "anchor")[0] == 0
    anchored = ("log", "verify", "log", "--anchor", "anchor", "--key", "key", "--json")
    assert run(*anchored)[1]["verdict"] == "consistent with the anchor"
    raw = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    (tmp_path / "log").write_bytes(b"".join(raw[:-1]))
    assert run("log", "verify", "log")[0] == 0
    code, told, _ = run(*anchored)
    assert (code, told["verdict"]) == (1, "truncated")


@pytest.mark.parametrize(
    "arguments",
    [
        ("manifest", "build", "data"),
        ("manifest", "build", "data", "--out", "m", "--algorithm", "md5"),
        ("manifest", "verify", "m.json", "data", "--key", "k"),
        ("manifest", "verify", "m.json", "data", "--signature", "k"),
        ("manifest", "sign", "m.json", "--out", "x", "--new-key"),
        ("log", "verify"),
        ("log", "verify", "log", "--key", "k"),
        ("log", "frobnicate"),
    ],
)
def test_misuse_is_2(run, arguments):
    assert run(*arguments)[0] == 2


def test_what_is_not_there_is_1(run):
    assert run("manifest", "verify", "none.json", "data")[0] == 1
    assert run("log", "verify", "none")[0] == 1
    assert run("log", "head", "none", "--key", "k", "--out", "o")[0] == 1
    assert not os.path.exists("none")
