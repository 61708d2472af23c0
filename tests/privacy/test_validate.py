import json

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRALinear


def engine():
    return bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)


class Token(nn.Module):
    """Owns a parameter beside its layers."""

    def __init__(self, *layers):
        super().__init__()
        self.token = mx.zeros((4,))
        self.layers = list(layers)

    def __call__(self, x):
        x = x + self.token
        for f in self.layers:
            x = f(x)
        return x


def statuses(model):
    return {r.path: r.status for r in engine().validate(model).layers}


def test_private_and_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))
    model.layers[0].freeze()
    model.layers[3].freeze(keys=["weight"], recurse=False)
    report = engine().validate(model)
    assert statuses(model) == {"layers.0": "frozen", "layers.2": "private", "layers.3": "private"}
    assert report.is_valid
    assert (report.trainable_parameters, report.frozen_parameters) == (8 + 2, 20 + 8)


def test_all_problems_at_once():
    quantized = nn.QuantizedLinear(64, 8)
    quantized.unfreeze()
    switched = QuantizedSwitchLinear(64, 4, 2)
    switched.unfreeze()
    model = Token(nn.Dropout(0.5), nn.BatchNorm(4), quantized, nn.QQLinear(64, 64), switched, nn.Linear(4, 4))
    report = engine().validate(model)
    found = {r.path: r.reason for r in report.refused}
    assert list(found) == ["", "layers.1", "layers.2", "layers.3", "layers.4"]
    for path, says in {
        "": "it owns token, has no rule, and",
        "layers.1": "GroupNorm",
        "layers.2": "trainable weight must be floating",
        "layers.3": "across the batch",
        "layers.4": "must be floating",
    }.items():
        assert says in found[path], found[path]
    assert statuses(model)["layers.5"] == "private"


def test_prints_and_exports():
    report = engine().validate(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm(2)))
    text = str(report).splitlines()
    assert text[0].split() == ["status", "layer", "type", "trained", "how", "or", "why"]
    assert text[1].split()[:4] == ["private", "layers.0", "Linear", "10"]
    assert text[-1] == "not valid: 1 refused; 14 trained and 4 frozen parameters"
    exported = json.loads(report.to_json())
    assert not exported["is_valid"]
    assert exported["layers"][1]["status"] == "refused"


def test_nothing_to_train():
    report = engine().validate(nn.Linear(4, 2).freeze())
    assert [r.reason for r in report.refused] == ["it has no trainable parameters"]
    assert not engine().validate(nn.ReLU()).is_valid


class Tuple(nn.Module):
    """MLX's own walk does not see what is in a tuple, and the loss does."""

    def __init__(self):
        super().__init__()
        self.layers = (nn.BatchNorm(4),)
        self.head = nn.Linear(4, 2)

    def __call__(self, x):
        return self.head(self.layers[0](x))


class Normalised(nn.Embedding):
    """Its weight is not what it trains."""

    def __init__(self):
        super().__init__(5, 4)
        self.direction = self.pop("weight")

    @property
    def weight(self):
        return self.direction / mx.linalg.norm(self.direction, axis=1, keepdims=True)


def test_a_layer_that_trains_something_else_has_no_rule():
    model = Normalised()
    (layer,) = engine().validate(model).layers
    assert "vmap" in layer.reason
    batch = mx.array([[0, 1], [2, 2], [4, 0]])
    engine().check(model, batch, lambda m, x: m(x)[..., 0].sum(axis=1))


@pytest.mark.parametrize(
    "model",
    [
        Tuple(),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4, track_running_stats=False).eval()),
        Token(nn.Linear(4, 4), nn.Dropout(0.1)),
        Token(nn.Linear(4, 64), LoRALinear.from_base(nn.QuantizedLinear(64, 4))),
    ],
)
def test_what_is_refused_does_not_run(model):
    e = engine()
    assert not e.validate(model).is_valid
    with pytest.raises(bw.PrivacyError):
        e.value_and_grad(model, lambda m, x: m(x).sum(axis=1))(model, mx.ones((3, 4)))


def test_eval_mode_batch_norm_is_private():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4))
    model.layers[1].eval()
    assert engine().validate(model).is_valid
    engine().check(model, mx.random.normal((3, 4)), lambda m, x: m(x).square().sum(axis=1))


def test_shared_layers_are_listed_once():
    layer = nn.Linear(4, 4)
    assert len(engine().validate(nn.Sequential(layer, nn.ReLU(), layer)).layers) == 1


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 1), (48, 16), (64, 32), (20, 4)])
def test_batch_norm_becomes_group_norm(channels, groups):
    norm = nn.BatchNorm(channels, eps=1e-3)
    norm.weight = mx.arange(channels) + 0.5
    norm.freeze(keys=["bias"], recurse=False)
    model = nn.Sequential(nn.Linear(3, channels), norm)
    (done,) = engine().fix(model)
    fixed = model.layers[1]
    assert (done.path, "BatchNorm" in done.before, "GroupNorm" in done.after) == ("layers.1", True, True)
    assert (type(fixed), fixed.num_groups, fixed.eps, fixed.pytorch_compatible) == (nn.GroupNorm, groups, 1e-3, True)
    np.testing.assert_array_equal(np.array(fixed.weight), np.arange(channels) + 0.5)
    assert set(fixed.trainable_parameters()) == {"weight"}
    assert engine().validate(model).is_valid
    assert engine().fix(model) == ()
    engine().check(model, mx.random.normal((3, 6, 3)), lambda m, x: m(x).square().sum(axis=(1, 2)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.BatchNorm(8, affine=False)
        self.blocks = [{"norm": shared, "more": (nn.BatchNorm(4), nn.ReLU())}, shared]
        self.table = nn.QuantizedEmbedding(10, 64)


def test_fixes_reach_everything_and_keep_what_is_shared():
    model = Nested()
    model.unfreeze()
    model.blocks[0]["more"][0].eval()
    done = engine().fix(model)
    assert sorted(f.path for f in done) == ["blocks.0.more.0", "blocks.0.norm", "blocks.1", "table"]
    first = model.blocks[0]
    assert type(first["norm"]) is nn.GroupNorm
    assert first["norm"] is model.blocks[1]
    assert not first["more"][0].training
    assert type(first["more"]) is tuple
    assert "weight" not in model.table.trainable_parameters()


def test_a_batch_norm_alone_cannot_be_fixed():
    with pytest.raises(bw.PrivacyError, match=r"\[fix\] model"):
        engine().fix(nn.BatchNorm(4))


def test_quantized_experts_are_refused_when_trained():
    model = nn.Sequential(nn.Linear(4, 4), QuantizedSwitchLinear(64, 4, 2))
    assert statuses(model)["layers.1"] == "frozen"
    model.layers[1].unfreeze(keys=["scales"])
    (refused,) = engine().validate(model).refused
    assert "quantized experts have no rule" in refused.reason
    assert statuses(nn.Sequential(nn.Linear(4, 4), SwitchLinear(4, 4, 2)))["layers.1"] == "private"
