"""The log loses nothing that was acknowledged, and shows every change that it can show."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from mlx_bulwark.provenance import AuditLog, Head, ProvenanceError, new_key
from mlx_bulwark.provenance.audit_log import lines

CAUTIOUS = "consistent; truncation or rewriting cannot be excluded"


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for i in range(20):
        log.append("test", number=i, text="päivää" * (i % 3))
    return log


def raw_lines(log):
    with open(log.path, "rb") as f:
        return f.read().splitlines(keepends=True)


def rewrite(log, changed):
    with open(log.path, "wb") as f:
        f.write(b"".join(changed))


def test_without_an_anchor_no_more_is_said_than_is_known(log):
    result = AuditLog.verify(log.path)
    assert result.ok
    assert result.verdict == CAUTIOUS
    assert result.head == log.head() == Head(21, result.head.chain)
    rewrite(log, raw_lines(log)[:-3])
    assert AuditLog.verify(log.path).verdict == CAUTIOUS


def test_truncation_is_found_by_the_anchor(log):
    anchor = log.head()
    rewrite(log, raw_lines(log)[:-3])
    result = AuditLog.verify(log.path, anchor=anchor)
    assert not result.ok
    assert result.verdict == "truncated"
    assert "ends after 18 lines" in result.findings[0]


def test_lines_behind_the_anchor_are_fine(log):
    anchor = log.head()
    log.append("later")
    assert AuditLog.verify(log.path, anchor=anchor).verdict == "consistent with the anchor"


def test_rewriting_is_found_by_the_anchor(log, tmp_path):
    anchor = log.head()
    other = AuditLog(tmp_path / "other.jsonl")
    for i in range(30):
        other.append("test", number=-i)
    assert AuditLog.verify(other.path).ok
    assert AuditLog.verify(other.path, anchor=anchor).verdict.startswith("rewritten")


@pytest.mark.parametrize("change", ["edit", "delete", "reorder", "repeat", "header"])
def test_changes_are_found_without_an_anchor(log, change):
    rows = raw_lines(log)
    if change == "edit":
        rows[5] = rows[5].replace(b'"number":4', b'"number":5')
    elif change == "delete":
        del rows[5]
    elif change == "reorder":
        rows[5], rows[6] = rows[6], rows[5]
    elif change == "repeat":
        rows.insert(5, rows[5])
    else:
        del rows[0]
    rewrite(log, rows)
    result = AuditLog.verify(log.path)
    assert result.verdict == "tampered with"
    assert "line" in result.findings[0]


def test_1000_random_edits_of_an_anchored_log_are_found(log):
    anchor, raw, rng, made, missed = log.head(), b"".join(raw_lines(log)), random.Random(3), 0, 0
    while made < 1000:
        i, kind, byte = rng.randrange(len(raw)), rng.randrange(3), bytes([rng.randrange(256)])
        edited = [raw[:i] + byte + raw[i + 1 :], raw[:i] + byte + raw[i:], raw[:i] + raw[i + 1 :]][kind]
        if edited == raw:
            continue
        made += 1
        rewrite(log, [edited])
        missed += AuditLog.verify(log.path, anchor=anchor).ok
    assert missed == 0


def test_a_torn_line_is_repaired_and_is_no_tampering(log):
    head = log.head()
    with open(log.path, "ab") as f:
        f.write(b'{"chain":"12')
    result = AuditLog.verify(log.path, anchor=head)
    assert result.ok
    assert result.torn == 12
    again = AuditLog(log.path)
    assert again.head().count == head.count + 1
    last = list(lines(log.path))[-1]
    assert (last["kind"], last["fields"]["dropped_bytes"]) == ("log.repair", 12)
    assert AuditLog.verify(log.path, anchor=head).torn == 0


def test_cut_at_any_byte_it_reopens_with_every_whole_line(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("a")
    log.append("b")
    raw = b"".join(raw_lines(log))
    for size in range(len(raw) + 1):
        rewrite(log, [raw[:size]])
        AuditLog(log.path).append("after")
        result = AuditLog.verify(log.path)
        assert result.ok
        whole = max(1, raw[:size].count(b"\n"))
        torn = not raw[:size].endswith(b"\n") and size > 0
        assert result.head.count == whole + 1 + torn


@pytest.mark.parametrize("max_bytes", [1, 1000])
def test_rotation_carries_the_chain_on(tmp_path, max_bytes):
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=max_bytes)
    for i in range(20):
        log.append("test", number=i)
    anchor = log.head()
    assert os.path.exists(f"{log.path}.2")
    assert [line["fields"]["number"] for line in lines(log.path) if "fields" in line] == list(range(20))
    assert AuditLog.verify(log.path, anchor=anchor).ok
    os.unlink(f"{log.path}.1")
    assert not AuditLog.verify(log.path).ok


def test_a_crash_between_rename_and_the_new_file_is_survived(log):
    anchor = log.head()
    os.rename(log.path, f"{log.path}.1")
    AuditLog(log.path).append("after")
    assert AuditLog.verify(log.path, anchor=anchor).ok


@pytest.mark.parametrize("kind", ["hmac", "ed25519"])
def test_signed_heads(log, tmp_path, kind):
    if kind == "ed25519":
        pytest.importorskip("cryptography")
    new_key(tmp_path / "key", kind)
    new_key(tmp_path / "other", kind)
    public = tmp_path / ("key" if kind == "hmac" else "key.pub")
    anchor = log.signed_head(tmp_path / "key")
    assert AuditLog.verify(log.path, anchor=anchor, key=public).verdict == "consistent with the anchor"
    with pytest.raises(ProvenanceError, match="must be signed by"):
        AuditLog.verify(log.path, anchor=anchor, key=tmp_path / "other")
    for name, value in (("count", 3), ("chain", "0" * 64), (kind, "0" * len(anchor[kind]))):
        with pytest.raises(ProvenanceError, match="must be signed by"):
            AuditLog.verify(log.path, anchor={**anchor, name: value}, key=public)
    with pytest.raises(ProvenanceError, match="must be signed by"):
        AuditLog.verify(log.path, anchor=log.head(), key=public)
    secret = (tmp_path / "key").read_text().split("\n")[1]
    assert secret not in json.dumps(anchor)
    assert secret.encode() not in b"".join(raw_lines(log))


def test_fields_that_are_not_json_are_refused_and_nothing_is_written(log):
    head = log.head()
    for value in (b"x", float("nan"), object(), "\ud800", "x" * (1 << 20), 10**30):
        with pytest.raises(ProvenanceError):
            log.append("test", value=value)
    assert log.head() == head


def test_fields_may_have_any_name(log):
    log.append("test", kind="k", chain="c", n=1, self=2)
    assert list(lines(log.path))[-1]["fields"] == {"kind": "k", "chain": "c", "n": 1, "self": 2}
    assert AuditLog.verify(log.path).ok


WRITER = """
import os, sys, types
folder = sys.argv[3]
package = types.ModuleType("provenance")
package.__path__ = [folder]
sys.modules["provenance"] = package  # without MLX, which takes a second to load
from provenance.audit_log import AuditLog
log = AuditLog(sys.argv[1], max_bytes=20000)
i = 0
while i < int(sys.argv[4]):
    log.append("test", writer=sys.argv[2], number=i)
    os.write(1, b"%d\\n" % i)
    i += 1
"""


def start(path, writer, count):
    import mlx_bulwark.provenance

    folder = os.path.dirname(mlx_bulwark.provenance.__file__)
    arguments = [sys.executable, "-S", "-c", WRITER, path, writer, folder, str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE)


def test_several_processes_append_in_turn(tmp_path):
    path = str(tmp_path / "audit.jsonl")
    writers = [start(path, str(w), 60) for w in range(4)]
    for w in writers:
        w.communicate(timeout=60)
    assert AuditLog.verify(path).ok
    assert os.path.exists(f"{path}.1")
    numbers = {str(w): [] for w in range(4)}
    for line in lines(path):
        if "fields" in line:
            numbers[line["fields"]["writer"]].append(line["fields"]["number"])
    assert all(found == list(range(60)) for found in numbers.values())


def kill_writers(path, rounds, seed):
    """Start four writers, kill each at a random moment of its own; what they were told is there."""
    rng, acknowledged = random.Random(seed), 0
    for turn in range(rounds):
        writers = [start(path, f"{turn}.{w}", 10**9) for w in range(4)]
        writers[0].stdout.readline()  # the log is running
        for w in rng.sample(writers, 4):  # the others write on
            time.sleep(rng.random() * 0.02)
            w.send_signal(signal.SIGKILL)
        told = {f"{turn}.{i}": w.communicate()[0].splitlines() for i, w in enumerate(writers)}
        there = {
            (line["fields"].get("writer"), line["fields"].get("number")) for line in lines(path) if "fields" in line
        }
        for writer, numbers in told.items():
            for number in numbers if writer != f"{turn}.0" else [b"0", *numbers]:
                assert (writer, int(number)) in there
                acknowledged += 1
        AuditLog(path)  # reopens, and repairs
        assert AuditLog.verify(path).ok
    return acknowledged


def test_kill_9_loses_nothing_acknowledged(tmp_path):
    assert kill_writers(str(tmp_path / "audit.jsonl"), rounds=8, seed=4) > 8


@pytest.mark.slow
def test_kill_9_at_many_moments(tmp_path):
    """With those above, 200 moments."""
    assert kill_writers(str(tmp_path / "audit.jsonl"), rounds=42, seed=5) > 42
