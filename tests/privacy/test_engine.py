import copy
import multiprocessing
import os
import pickle

import mlx.core as mx
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.privacy.gradients import clipped_sums
from scipy import stats
from training import Net, loss_fn, no_loss


def make(seed=0, N=64):
    mx.random.seed(seed)
    rng = np.random.default_rng(seed)
    return Net(), rng.standard_normal((N, 6)).astype(np.float32), rng.integers(0, 3, N)


def engine(N=64, batch_size=16, noise_multiplier=1.0, max_grad_norm=1.0, **more):
    return bw.PrivacyEngine(
        N, batch_size=batch_size, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, **more
    )


def flat(model):
    return np.concatenate([np.array(p).ravel() for _, p in tree_flatten(model.parameters())]).astype(np.float64)


def moves(e, model, x, y, loss, steps, batches=None):
    """What each of `steps` updates with learning rate 1 adds to the parameters."""
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss)
    out, before = [], flat(model)
    for b in batches or e.batches((x, y), steps=steps):
        _, grads = f(model, b)
        optimizer.update(model, grads)
        if b.last:
            after = flat(model)
            out.append(before - after)
            before = after
    return np.array(out)


def test_without_noise_it_is_clipped_sgd(backend):
    model, x, y = make()
    e = engine(batch_size=64, noise_multiplier=0.0, max_grad_norm=0.5)
    sums = clipped_sums(model, loss_fn, (mx.array(x), mx.array(y)), None, 0.5, "flat", {}).sums
    expected = np.concatenate([np.array(sums[k]).ravel() for k, _ in tree_flatten(model.parameters())]) / 64
    (move,) = moves(e, model, x, y, loss_fn, 1)
    np.testing.assert_allclose(move, expected, atol=1e-6)
    assert e.epsilon(1e-5) == np.inf
    assert e.steps == 1


def test_noise_has_the_accounted_deviation(backend):
    # Gradients are zero, so a move is noise over the expected batch size; parameters start at zero to be exact.
    # Both tests are two-sided at 1e-5.
    model, x, y = make()
    model.apply(mx.zeros_like)
    e = engine(noise_multiplier=1.7, max_grad_norm=0.3)
    noise = moves(e, model, x, y, no_loss, 60).ravel() * 16 / (1.7 * 0.3)
    n = noise.size
    assert stats.chi2.cdf((noise**2).sum(), n) == pytest.approx(0.5, abs=0.5 - 5e-6)
    assert abs(noise.mean()) * np.sqrt(n) < 4.42
    assert e.steps == 60


def test_noise_comes_once_with_accumulation(backend):
    # The same logical batches in one and in many physical pieces: noise and steps must be those of one.
    model, x, y = make()
    model.apply(mx.zeros_like)
    e = engine(noise_multiplier=2.0, max_grad_norm=1.0)
    batches = e.batches((x, y), steps=60, microbatch_size=3)
    noise = moves(e, model, x, y, no_loss, 60, batches).ravel() * 16 / 2.0
    assert e.steps == 60
    assert stats.chi2.cdf((noise**2).sum(), noise.size) == pytest.approx(0.5, abs=0.5 - 5e-6)


def test_accumulated_pieces_are_the_whole(backend):
    moved = []
    for size in (5, 64):
        model, x, y = make()
        e = engine(batch_size=64, noise_multiplier=0.0, max_grad_norm=0.1)
        moved.append(moves(e, model, x, y, loss_fn, 2, e.batches((x, y), steps=2, microbatch_size=size)))
        assert e.steps == 2
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-6)


def test_the_denominator_is_the_expected_batch_size(backend):
    model, x, y = make()
    e = engine(batch_size=10, noise_multiplier=0.0)
    optimizer = e.wrap(optim.SGD(1.0))
    before = flat(model)
    _, grads = e.value_and_grad(model, loss_fn)(model, mx.array(x[:3]), mx.array(y[:3]))
    sums = np.concatenate([np.array(grads._sums[k]).ravel() for k, _ in tree_flatten(model.parameters())])
    optimizer.update(model, grads)
    np.testing.assert_allclose(before - flat(model), sums / 10, atol=1e-6)


def test_an_empty_batch_is_pure_noise_and_charged(backend):
    model, x, y = make()
    e = engine(batch_size=0.001)
    m = moves(e, model, x, y, loss_fn, 3)
    assert e.steps == 3
    assert (m != 0).mean() > 0.99
    f, optimizer = e.value_and_grad(model, loss_fn), e.wrap(optim.SGD(1.0))
    losses, grads = f(model, mx.zeros((0, 6)), mx.zeros((0,), mx.int32))
    optimizer.update(model, grads)
    assert losses.shape == (0,)
    assert e.steps == 4


def test_no_two_steps_share_noise(backend):
    model, x, y = make()
    model.apply(mx.zeros_like)
    m = moves(engine(), model, x, y, no_loss, 40)
    other = moves(engine(), model, x, y, no_loss, 3)
    m = np.concatenate([m, other])
    # within a step too: leaves must not share a piece of the stream
    values = np.round(m, 12).ravel()
    assert len(np.unique(values)) > 0.99 * values.size
    r = np.corrcoef(m)
    np.fill_diagonal(r, 0)
    assert abs(r).max() * np.sqrt(m.shape[1]) < 5.5  # 903 pairs; a false alarm once in 30,000 runs


def test_a_compiled_step_never_repeats_its_noise(backend):
    model, x, y = make()
    model.apply(mx.zeros_like)
    e = engine(steps=12)
    optimizer = e.wrap(optim.SGD(1.0))
    step = e.compiled_step(model, optimizer, no_loss)
    seen, before = [], flat(model)
    for b in e.batches((x, y), microbatch_size=24):
        mx.eval(step(b), model.state, optimizer.state, e.state)
        if b.last:
            seen.append(before - flat(model))
            before = flat(model)
    assert e.steps == 12
    assert len(seen) == 12
    r = np.corrcoef(np.array(seen))
    np.fill_diagonal(r, 0)
    assert abs(r).max() * np.sqrt(seen[0].size) < 5.2
    noise = np.concatenate(seen) * 16
    assert stats.chi2.cdf((noise**2).sum(), noise.size) == pytest.approx(0.5, abs=0.5 - 5e-6)


def test_compiled_and_eager_steps_agree(backend):
    results = []
    for compiled in (False, True):
        model, x, y = make()
        e = engine(batch_size=64, noise_multiplier=0.0, max_grad_norm=0.5)
        optimizer = e.wrap(optim.Adam(0.01))
        step, f = e.compiled_step(model, optimizer, loss_fn), e.value_and_grad(model, loss_fn)
        for b in e.batches((x, y), steps=3, microbatch_size=40):
            if compiled:
                losses = step(b)
            else:
                losses, grads = f(model, b)
                optimizer.update(model, grads)
            mx.eval(losses, model.state, optimizer.state, e.state)
        results.append(flat(model))
        assert e.steps == 3
    np.testing.assert_allclose(results[0], results[1], atol=2e-5)


def test_compile_without_the_engine_state_is_refused(backend):
    model, x, y = make()
    e = engine()
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss_fn)

    def step(x, y):
        losses, grads = f(model, x, y)
        optimizer.update(model, grads)
        return losses

    state = [model.state, optimizer.state]
    with pytest.raises(bw.PrivacyError, match=r"engine.state must be among the inputs and outputs"):
        mx.compile(step, inputs=state, outputs=state)(mx.array(x), mx.array(y))


def test_a_user_compiled_step(backend):
    model, x, y = make()
    e = engine()
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss_fn)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, e.state]

    def step(x, y, mask):
        losses, grads = f(model, x, y, mask=mask)
        optimizer.update(model, grads)
        return losses

    compiled = mx.compile(step, inputs=state, outputs=state)
    for b in e.batches((x, y), steps=4, microbatch_size=64):
        mx.eval(compiled(*b.data, b.mask), state)
    assert e.steps == 4


def test_pieces_in_a_users_compiled_step_are_refused(backend):
    model, x, y = make()
    e = engine()
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss_fn)
    with pytest.raises(bw.PrivacyError, match="last=False must be outside"):
        mx.compile(lambda x, y: optimizer.update(model, f(model, x, y, last=False)[1]))(mx.array(x), mx.array(y))


def test_padding_has_loss_zero(backend):
    model, x, y = make()
    losses, _ = engine().value_and_grad(model, loss_fn)(
        model, mx.array(x[:4]), mx.array(y[:4]), mask=mx.array([True, False, True, False])
    )
    assert ((np.array(losses) != 0) == [True, False, True, False]).all()


def test_a_nan_example_is_counted_and_harmless(backend):
    model, x, y = make()
    x[5] = np.nan
    e = engine(batch_size=64, noise_multiplier=0.0)
    optimizer = e.wrap(optim.SGD(1.0))
    (batch,) = e.batches((x, y), steps=1)
    _, grads = e.value_and_grad(model, loss_fn)(model, batch)
    optimizer.update(model, grads)
    assert grads.num_refused.item() == 1
    assert np.isfinite(flat(model)).all()


def test_gradients_are_opaque_and_spent_once(backend):
    model, x, y = make()
    e = engine()
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss_fn)
    _, grads = f(model, mx.array(x), mx.array(y))
    with pytest.raises(TypeError, match="ClippedGradients"):
        optimizer.update(model, grads._sums)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        optim.SGD(1.0).update(model, grads)
    with pytest.raises(bw.PrivacyError, match="the engine that wraps"):
        engine().wrap(optim.SGD(1.0)).update(model, grads)
    optimizer.update(model, grads)
    with pytest.raises(bw.PrivacyError, match="used before"):
        optimizer.update(model, grads)
    assert e.steps == 1


def test_planned_steps_are_not_passed(backend):
    model, x, y = make()
    e = engine(steps=2)
    assert len(moves(e, model, x, y, loss_fn, 2)) == 2
    before = flat(model)
    with pytest.raises(bw.PrivacyError, match="within the 2 planned"):
        moves(e, model, x, y, loss_fn, 1, e.batches((x, y), steps=1))
    assert (flat(model) == before).all()
    assert e.steps == 2


def test_the_key_is_secret():
    e = engine()
    key = e.state["noise"]["key"]
    assert not (np.array(key) == np.array(engine().state["noise"]["key"])).any()
    shown = f"{e!r} {e.state!r} {e.state['noise']!r} {e.state} {vars(e)}"
    assert not any(str(word) in shown for word in key.tolist())
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="must not be copied"):
            copied(e)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_does_not_repeat_noise():
    e = engine()

    def child(queue):
        try:
            e._books.refuse_fork()
            queue.put("went on")
        except bw.PrivacyError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert "fork" in queue.get(timeout=30)
    process.join()


def test_epsilon_follows_the_steps(backend):
    model, x, y = make()
    e = bw.PrivacyEngine.for_epsilon(2.0, 1e-4, 64, steps=5, batch_size=16, max_grad_norm=1.0)
    spent = [e.epsilon()]
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss_fn)
    for b in e.batches((x, y)):
        optimizer.update(model, f(model, b)[1])
        if b.last:
            spent.append(e.epsilon())
    assert spent[0] == 0
    assert (np.diff(spent) > 0).all()
    assert spent[-1] <= 2.0
    assert spent[-1] > 1.99
    assert spent[-1] == bw.compute_epsilon(e.noise_multiplier, 0.25, 5, 1e-4)


def test_momentum_and_schedules_pass_through(backend):
    model, x, y = make()
    e = engine()
    optimizer = e.wrap(optim.Adam(learning_rate=optim.step_decay(0.1, 0.5, 1)))
    f = e.value_and_grad(model, loss_fn)
    for b in e.batches((x, y), steps=3, microbatch_size=64):
        optimizer.update(model, f(model, b)[1])
    assert optimizer.learning_rate.item() == pytest.approx(0.1 * 0.5**2)
    assert optimizer.state is optimizer.optimizer.state
    optimizer.learning_rate = 0.3
    assert optimizer.optimizer.learning_rate.item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must"),
        ({"batch_size": 65}, "sample_rate must"),
        ({"batch_size": None}, "sample_rate or batch_size"),
        ({"sample_rate": 0.5}, "sample_rate or batch_size"),
        ({"N": 0}, "dataset_size must"),
        ({"clipping": "hard"}, "clipping must"),
        ({"accountant": "gdp"}, "accountant must"),
    ],
)
def test_refused(more, says):
    with pytest.raises(ValueError, match=says):
        engine(**more)


def test_another_model_is_refused(backend):
    model, x, y = make()
    f = engine().value_and_grad(model, loss_fn)
    with pytest.raises(bw.PrivacyError, match="must be the one"):
        f(make()[0], mx.array(x), mx.array(y))
