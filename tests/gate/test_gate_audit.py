"""The gate writes what it found to an audit log, before the data pass or not."""

import json

import numpy as np
import pytest
from mlx_bulwark import gate
from mlx_bulwark.gate import Field, GateError, Schema
from mlx_bulwark.provenance import AuditLog

UNIT = Schema(name="unit", fields={"x": Field(low=0, high=1)})


def lines(path):
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [e["fields"] for e in events if e.get("kind") == "gate.validate"]


def test_what_passes_and_what_does_not(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    UNIT.validate(np.array([0.5, 1.0]), audit_log=log)
    with pytest.raises(GateError):
        UNIT.validate(np.array([0.5, 7.0, np.nan]), audit_log=log)
    good, bad = lines(tmp_path / "audit.jsonl")
    assert (good["policy"], good["rows"], good["bad_rows"], good["broken"]) == ("raise", 2, 0, {})
    assert (bad["rows"], bad["bad_rows"], bad["broken"]) == (3, 2, {"range": 1, "missing": 1})
    assert AuditLog.verify(log.path, anchor=log.head()).ok


@pytest.mark.parametrize("guard", [gate.stream, gate.dataset])
def test_a_line_a_batch(tmp_path, guard):
    log = AuditLog(tmp_path / "audit.jsonl")
    batches = [np.array([0.1, 0.2]), np.array([5.0, 0.3])]
    list(guard(batches, UNIT, policy="drop", quarantine=tmp_path / "q.jsonl", audit_log=log))
    found = [(e["first_row"], e["rows"], e["bad_rows"]) for e in lines(tmp_path / "audit.jsonl")]
    assert found == [(0, 2, 0), (2, 2, 1)]


class Full:
    def append(self, kind, /, **fields):
        raise OSError("no space left")


def test_no_line_no_data():
    with pytest.raises(OSError, match="no space left"):
        UNIT.validate(np.array([0.5]), audit_log=Full())
