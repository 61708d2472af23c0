import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten

N = 600


class Net(nn.Module):
    """Activations of a row outweigh what does not grow with the rows."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(8, 64), nn.Dropout(0.1), nn.Linear(64, 64), nn.Linear(64, 3)]

    def __call__(self, x):
        for layer in self.layers:
            x = mx.tanh(layer(x))
        return x


def loss_fn(model, x):
    return model(x).reshape(x.shape[0], -1).sum(axis=1)


def make(**more):
    mx.random.seed(0)
    x = np.random.default_rng(0).standard_normal((N, 30, 8)).astype(np.float32)
    e = bw.PrivacyEngine(N, batch_size=300, noise_multiplier=1.0, max_grad_norm=1.0, **more)
    return e, Net(), e.wrap(optim.Adam(1e-3)), x


def beside_what_is_held(size):
    """Budget for this test alone: other tests of the process may have left arrays."""
    gc.collect()
    return mx.get_active_memory() + size


def peak_of_training(e, model, optimizer, batches, compiled):
    step, f = e.compiled_step(model, optimizer, loss_fn), e.value_and_grad(model, loss_fn)
    mx.eval(model.state, optimizer.state)
    mx.clear_cache()
    mx.reset_peak_memory()
    for b in batches:
        if compiled:
            losses = step(b)
        else:
            losses, gradients = f(model, b)
            optimizer.update(model, gradients)
            del gradients
        mx.eval(losses, model.state, optimizer.state, e.state)
    return mx.get_peak_memory()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mebibytes", [3, 8])
def test_training_stays_within_the_budget_and_uses_it(backend, compiled, mebibytes, capsys):
    if backend == "metal-sim":
        pytest.skip("memory of the simulator is its own")
    size = mebibytes * 2**20
    budget = beside_what_is_held(size)
    e, model, optimizer, x = make()
    batches = e.batches(x, steps=3, max_memory=budget, training=(model, optimizer, loss_fn))
    assert f"microbatch_size {batches.microbatch_size}: peak of" in capsys.readouterr().out
    peak = peak_of_training(e, model, optimizer, batches, compiled)
    assert peak <= budget
    assert peak > budget - size + size / 3
    assert e.steps == 3
    too_large = e.batches(x, steps=2, microbatch_size=3 * batches.microbatch_size)
    assert peak_of_training(e, model, optimizer, too_large, compiled) > budget


def test_a_step_that_is_no_line_is_measured_until_it_fits():
    # from 41 rows on a step takes 8 MiB more, of which the two small sizes know nothing
    def jumping(model, x):
        more = mx.full((1448, 1448), x[0, 0, 0]).sum() if x.shape[0] > 40 else mx.array(0.0)
        return loss_fn(model, x) + mx.stop_gradient(0 * more)

    budget = beside_what_is_held(5 * 2**20)
    e, model, optimizer, x = make()
    batches = e.batches(x, steps=1, max_memory=budget, training=(model, optimizer, jumping))
    assert 35 <= batches.microbatch_size <= 40


def test_trial_steps_leave_no_trace():
    budget = beside_what_is_held(8 * 2**20)
    e, model, optimizer, x = make(steps=3, delta=1e-6)
    mx.random.seed(7)
    mx.eval(mx.random.normal((3,)))
    before = {k: np.array(p) for k, p in tree_flatten(model.parameters())}
    key, generator = np.array(e.state["noise"]["counter"]), np.array(mx.random.state[0])
    e.batches(x, max_memory=budget, training=(model, optimizer, loss_fn))
    assert all((before[k] == np.array(p)).all() for k, p in tree_flatten(model.parameters()))
    assert (key == np.array(e.state["noise"]["counter"])).all()
    assert (generator == np.array(mx.random.state[0])).all()
    assert e.steps == 0
    assert e.epsilon() == 0
    assert "layers" not in optimizer.state


@pytest.mark.parametrize(
    "more",
    [
        {"sampling": "shuffle"},
        {"sampling": "cyclic_poisson", "cycle_length": 2, "noise": "banded", "steps": 4},
        {"clipping": "adaptive"},
    ],
)
def test_every_kind_of_engine_can_be_measured(more):
    e, model, optimizer, x = make(**more)
    before = e.batches(x, steps=1).microbatch_size
    batches = e.batches(x, steps=1, max_memory=2**33, training=(model, optimizer, loss_fn))
    assert batches.microbatch_size == before
    for b in batches:
        _, gradients = e.value_and_grad(model, loss_fn)(model, b)
        optimizer.update(model, gradients)
    assert e.steps == 1


def test_an_engine_with_discrete_noise_can_be_measured():
    budget = beside_what_is_held(2**21)
    e, model, optimizer, x = make(noise="discrete")
    training = (model, optimizer, loss_fn)
    assert e.batches(x, steps=1, max_memory=budget, training=training).microbatch_size >= 4


def test_a_large_budget_gives_the_usual_size():
    e, model, optimizer, x = make()
    batches = e.batches(x, steps=1, max_memory=2**33, training=(model, optimizer, loss_fn))
    assert batches.microbatch_size == e.batches(x, steps=1).microbatch_size


def test_units_and_copies_are_never_divided():
    budget = beside_what_is_held(3 * 2**20)
    e, model, optimizer, x = make()
    batches = e.batches(
        x, steps=1, max_memory=budget, training=(model, optimizer, loss_fn), augment=lambda x: x, multiplicity=5
    )
    assert 5 <= batches.microbatch_size < 200


def test_refused():
    e, model, optimizer, x = make()
    with pytest.raises(ValueError, match="max_memory must hold a step of 1 rows, about"):
        e.batches(x, steps=1, max_memory=1000, training=(model, optimizer, loss_fn))
    with pytest.raises(ValueError, match="max_memory must come with training"):
        e.batches(x, steps=1, max_memory=2**30)
    with pytest.raises(ValueError, match="max_memory must come with training"):
        e.batches(x, steps=1, max_memory=2**30, microbatch_size=3, training=(model, optimizer, loss_fn))
