"""The privacy engine's ledger writes each step to an audit log."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark.provenance import AuditLog
from mlx_bulwark.provenance.audit_log import lines


def train(engine, steps):
    model = nn.Linear(3, 2)
    mx.eval(model.parameters())
    data = np.zeros((100, 3), np.float32), np.zeros(100, np.int32)
    optimizer = engine.wrap(optim.SGD(0.1))
    loss_and_grad = engine.value_and_grad(model, lambda m, x, y: nn.losses.cross_entropy(m(x), y, reduction="none"))
    for batch in engine.batches(data, steps=steps):
        _, gradients = loss_and_grad(model, batch)
        optimizer.update(model, gradients)


SETTINGS = {"batch_size": 10, "noise_multiplier": 1.0, "max_grad_norm": 1.0}


def test_each_step_is_in_the_log_before_it_is_in_the_ledger(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    engine = bw.PrivacyEngine(100, **SETTINGS, ledger=tmp_path / "ledger.jsonl", audit_log=log)
    train(engine, 3)
    steps = [line["fields"] for line in lines(log.path) if line.get("kind") == "privacy.step"]
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[0]["noise_multiplier"] == 1.0
    chains = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert all(s["follows"] in chain for s, chain in zip(steps, chains, strict=False))
    assert AuditLog.verify(log.path, anchor=log.head()).ok
    engine.close()


def test_a_log_that_cannot_be_written_stops_the_step(tmp_path):
    class Full:
        def append(self, kind, /, **fields):
            raise OSError("disk full")

    engine = bw.PrivacyEngine(100, **SETTINGS, ledger=tmp_path / "ledger.jsonl", audit_log=Full())
    with pytest.raises(OSError, match="disk full"):
        train(engine, 1)
    assert bw.ledger_epsilon(tmp_path / "ledger.jsonl", 1e-5) == 0
    engine.close()


def test_a_log_wants_a_ledger(tmp_path):
    with pytest.raises(ValueError, match="must come with a ledger"):
        bw.PrivacyEngine(100, **SETTINGS, audit_log=AuditLog(tmp_path / "log"))
