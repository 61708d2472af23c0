"""One process of a distributed test: `python ranks.py SCENARIO FOLDER` runs the function of that name."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
from fixed_keys import fix_keys
from mlx.utils import tree_flatten
from mlx_bulwark.privacy import state

N, STEPS = 53, 2


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, 6)).astype(np.float32), rng.integers(0, 3, N)


def shard(arrays, group):
    return tuple(a[group.rank() :: group.size()] for a in arrays)


def make_model(seed=0):
    mx.random.seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def loss_fn(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")


def flat(model):
    return np.concatenate([np.array(p).ravel() for _, p in tree_flatten(model.parameters())])


def train(engine, model, arrays, compiled, loss_fn=loss_fn, steps=STEPS, optimizer=None, **options):
    """Parameters after every logical step."""
    optimizer = engine.wrap(optimizer or optim.Adam(0.05))
    step = engine.compiled_step(model, optimizer, loss_fn) if compiled else None
    loss_and_grad = None if compiled else engine.value_and_grad(model, loss_fn)
    after = [flat(model)]
    for batch in engine.batches(arrays, steps=steps, **options):
        if compiled:
            losses = step(batch)
        else:
            losses, gradients = loss_and_grad(model, batch)
            optimizer.update(model, gradients)
        mx.eval(losses, model.state, optimizer.state, engine.state)
        if batch.last:
            after.append(flat(model))
    return np.stack(after)


# Settings whose runs must not depend on the number of ranks.
WITHOUT_NOISE = {
    "full": {"sampling": "full", "max_grad_norm": 0.7},
    "automatic": {"sampling": "full", "max_grad_norm": 0.7, "clipping": "automatic"},
    "per_layer": {"sampling": "full", "max_grad_norm": 0.7, "clipping": "per_layer"},
    "adaptive": {"sampling": "full", "max_grad_norm": 0.1, "clipping": "adaptive"},
}


def without_noise(group=None):
    found = {}
    for name, settings in WITHOUT_NOISE.items():
        for compiled in (True, False):
            engine = bw.PrivacyEngine(N, noise_multiplier=0.0, group=group, **settings)
            arrays = shard(data(), group) if group else data()
            model = make_model(group.rank() if group else 0)  # ranks begin with other weights: those of rank 0 count
            found[f"{name} {compiled}"] = train(engine, model, arrays, compiled, microbatch_size=20)
            found[f"{name} {compiled} norm"] = np.array(engine.state["max_grad_norm"])
    return found


def with_noise(group):
    """Updates of zero gradients, and all that left this rank meanwhile."""
    model, sent = nn.Linear(300, 100), []
    all_sum = mx.distributed.all_sum

    def recording(x, **options):
        sent.append(x)
        return all_sum(x, **options)

    engine = bw.PrivacyEngine(N, sample_rate=0.5, noise_multiplier=3.0, max_grad_norm=0.2, group=group)
    x = shard((np.zeros((N, 300), np.float32),), group)
    moves = {}
    for compiled in (True, False):
        optimizer = engine.wrap(optim.SGD(1.0))
        run = engine.compiled_step if compiled else lambda m, _, loss: engine.value_and_grad(m, loss)
        step = run(model, optimizer, lambda m, x: 0 * m(x).sum(1))
        mx.distributed.all_sum = recording
        before, moved = flat(model), []
        for batch in engine.batches(x, steps=3):
            if compiled:
                mx.eval(step(batch))
            else:
                optimizer.update(model, step(model, batch)[1])
            mx.eval(model.state, optimizer.state, engine.state)
            if batch.last:
                moved.append(before - flat(model))
                before = flat(model)
        mx.distributed.all_sum = all_sum
        moves[f"moves {compiled}"] = np.stack(moved)
    mx.random.seed(0)
    banded = bw.PrivacyEngine(
        N,
        sampling="cyclic_poisson",
        cycle_length=4,
        sample_rate=0.25,
        noise="banded",
        noise_multiplier=3.0,
        max_grad_norm=0.2,
        steps=6,
        group=group,
    )
    after = train(banded, model, x, True, lambda m, x: 0 * m(x).sum(1), steps=6, optimizer=optim.SGD(1.0))
    moves["banded"] = (after[:-1] - after[1:]) * banded.expected_batch_size / (3.0 * 0.2)
    return {**moves, "sent": np.stack([np.array(s) for s in sent]), "steps": engine.steps}


def counted(group):
    """How often each example takes part over all ranks, by gradients that are one-hot."""
    found = {}
    for sampling, options in (
        ("poisson", {"sample_rate": 0.3}),
        ("cyclic_poisson", {"sample_rate": 0.25, "cycle_length": 4}),
        ("shuffle", {"batch_size": 12}),
    ):
        n = 48
        ids = shard((np.arange(n),), group)
        steps = 12 if sampling == "shuffle" else 8
        engine = bw.PrivacyEngine(n, sampling=sampling, noise_multiplier=0.0, max_grad_norm=1e6, group=group, **options)
        model = nn.Embedding(n, 1)
        after = train(engine, model, ids, True, lambda m, i: m(i)[:, 0], steps, optim.SGD(1.0), microbatch_size=5)
        found[sampling] = np.round((after[:-1] - after[1:]) * engine.expected_batch_size)
    return found


def refusals(group, folder):
    rank, settings = group.rank(), {"batch_size": 10, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "group": group}
    messages = []

    def refused(f, *arguments, **options):
        try:
            f(*arguments, **options)
            messages.append("nothing")
        except (bw.PrivacyError, ValueError) as e:
            messages.append(f"{type(e).__name__} {e}")

    refused(bw.PrivacyEngine, N, **{**settings, "noise_multiplier": 1.0 + 1e-12 * rank})
    engine = bw.PrivacyEngine(N, **settings)
    refused(engine.batches, data(), steps=1)
    refused(engine.batches, np.zeros(N if rank else 0), steps=1)
    engine.batches(shard(data(), group), steps=1)
    moved = len(shard(data(), group)[0]) + {0: 1, 1: -1}.get(rank, 0)
    refused(engine.batches, np.zeros(moved), steps=1)
    refused(engine.value_and_grad, nn.Linear(3, 3 + rank), loss_fn)
    model = make_model(rank)
    model.layers[0].freeze()
    refused(engine.value_and_grad, model, loss_fn)
    shuffled = bw.PrivacyEngine(N, sampling="shuffle", **settings)
    refused(shuffled.batches, shard(data(), group), steps=1)
    first = bw.PrivacyEngine(N, ledger=folder / "in use", **settings)
    refused(bw.PrivacyEngine, N, ledger=folder / "in use", **settings)
    first.close()
    model = make_model()
    training = (model, engine.wrap(optim.SGD(0.1)), loss_fn)
    refused(engine.batches, shard(data(), group), steps=1, max_memory=64, training=training)
    batches = engine.batches(shard(data(), group), steps=1, max_memory=1 << 30, training=training)
    little = bw.PrivacyEngine(N, noise="discrete", **{**settings, "noise_multiplier": 1e-4})
    model = make_model()
    gradients = little.value_and_grad(model, loss_fn)(model, *shard(data(), group))[1]
    refused(little.wrap(optim.SGD(0.1)).update, model, gradients)
    return {"messages": np.array(messages), "microbatch_size": batches.microbatch_size}


def checked(group):
    """What engine.check says of sound ranks, and of ranks whose keys are the same."""
    messages, keys = [], state.random_key
    for sound in (True, False):
        calls = itertools.count()
        state.random_key = keys if sound else lambda calls=calls: bw.key_from_seed(next(calls))
        engine = bw.PrivacyEngine(N, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0, group=group)
        try:
            engine.check(make_model(), tuple(a[:2] for a in data()), loss_fn)
            messages.append("sound")
        except bw.PrivacyError as e:
            messages.append(str(e))
    state.random_key = keys
    return {"messages": np.array(messages)}


def resumed(group, folder):
    """Two sessions: the ledger and the saved state are the first rank's alone; the others have no such files."""
    rank, found = group.rank(), []
    mine = folder / f"files{rank}"
    mine.mkdir()
    settings = {"sampling": "full", "noise_multiplier": 3.0, "max_grad_norm": 1.0, "group": group, "delta": 1e-5}
    for ledger in (mine / "ledger.jsonl", None):
        for session in range(2):
            engine = bw.PrivacyEngine(N, ledger=ledger, **settings)
            if session and not ledger:
                engine.load_state(mine / "state.json")
            train(engine, make_model(), shard(data(), group), session == 0)
            found += [engine.steps, engine.epsilon()]
            engine.save_state(mine / "state.json")
            engine.close()
    return {"spent": np.array(found), "files": np.array(sorted(f.name for f in mine.iterdir()))}


def with_a_key_file(group, folder):
    """Banded noise over two sessions of a run, and key files that do not belong together."""
    rank = group.rank()
    mine = folder / f"keys{rank}"
    mine.mkdir()
    key_file = mine / f"key.{rank}"
    x = shard((np.zeros((N, 300), np.float32),), group)

    def begin(ledger="ledger"):
        return bw.PrivacyEngine(
            N,
            sampling="cyclic_poisson",
            cycle_length=4,
            sample_rate=0.25,
            noise="banded",
            noise_multiplier=3.0,
            max_grad_norm=0.2,
            steps=8,
            ledger=mine / ledger,
            noise_key_file=mine / "key",
            group=group,
        )

    def no_loss(m, x):
        return 0 * m(x).sum(1)

    moves, groups = [], []
    for session in range(2):
        engine, model = begin(), nn.Linear(300, 1, bias=False)
        after = train(engine, model, x, session == 0, no_loss, 5 - 2 * session, optim.SGD(1.0))
        moves.append((after[:-1] - after[1:]) * engine.expected_batch_size / (3.0 * 0.2))
        groups.append(engine._sampler.groups)
        engine.close()
    written, messages = key_file.read_text(), []

    def refused(ledger="ledger"):
        try:
            begin(ledger)
            messages.append("nothing")
        except bw.PrivacyError as e:
            messages.append(str(e))
        key_file.write_text(written)

    content = json.loads(written)
    key_file.write_text(json.dumps({**content, "ranks": group.size() + 1}))
    refused()
    if rank == 1:
        key_file.unlink()
    refused()
    os.chmod(key_file, 0o600)
    if rank == 1:
        key_file.write_text(json.dumps({**content, "run": "another"}))
    refused()
    refused("another ledger")
    return {
        "moves": np.concatenate(moves),
        "groups": np.stack(groups),
        "sessions": len({run.session for run in engine.runs}),
        "key": np.array(content["key"], np.uint32),
        "mode": key_file.stat().st_mode & 0o777,
        "messages": np.array(messages),
    }


def discrete_sums(group=None):
    """The released mean of a step without noise."""
    engine = bw.PrivacyEngine(
        N, sampling="full", noise="discrete", noise_multiplier=0.0, max_grad_norm=1.0, group=group
    )
    model = make_model()
    rows = shard(data(), group) if group else data()
    released = engine._release(engine.value_and_grad(model, loss_fn)(model, *rows)[1])
    return np.concatenate([np.array(released[p]).ravel() for p in sorted(released)]) * N


def discrete(group):
    settings = {"sampling": "full", "noise": "discrete", "noise_multiplier": 3.0, "max_grad_norm": 1.0}
    engine, model = bw.PrivacyEngine(64, group=group, **settings), nn.Linear(100, 20)
    rows = mx.zeros((2, 100))
    f = engine.value_and_grad(model, lambda m, x: 0 * m(x).sum(1))
    released = [engine._release(f(model, rows)[1]) for _ in range(3)]
    noise = np.stack([np.concatenate([np.array(r[p]).ravel() for p in sorted(r)]) for r in released])
    return {"noise": noise * 64, "sums": discrete_sums(group)}


def figures(folder, group):
    for scenario in (resumed, refusals, with_a_key_file):
        np.savez(folder / f"{scenario.__name__}{group.rank()}.npz", **scenario(group, folder))
    for scenario in (checked, counted, with_noise, discrete):
        np.savez(folder / f"{scenario.__name__}{group.rank()}.npz", **scenario(group))
    np.savez(folder / f"without_noise{group.rank()}.npz", **without_noise(group))


def lost(folder, group, how, compiled):
    """The last rank is lost in its third step; the others write down what they see."""
    last = group.rank() == group.size() - 1
    engine = bw.PrivacyEngine(
        N,
        batch_size=10,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        delta=1e-5,
        ledger=folder / "ledger.jsonl",
        group=group,
        group_timeout=100.0,
    )
    model, steps = make_model(), 0

    def loss(model, x, y):
        if last and not compiled and steps == 2:
            os.kill(os.getpid(), how)
        return loss_fn(model, x, y)

    optimizer = engine.wrap(optim.SGD(0.1))
    f = engine.value_and_grad(model, loss)
    step = engine.compiled_step(model, optimizer, loss) if compiled else None
    seen = {}
    try:
        for batch in engine.batches(shard(data(), group), steps=10):
            if compiled and last and steps == 2:
                os.kill(os.getpid(), how)
            before = flat(model)
            if compiled:
                step(batch)
            else:
                optimizer.update(model, f(model, batch)[1])
            mx.eval(model.state, optimizer.state, engine.state)
            steps += batch.last
            if steps == 2:  # not before: the first steps are traced, which may take long on a busy machine
                engine._ranks.timeout = 4.0 if how == signal.SIGSTOP else 20.0
    except bw.PrivacyError as e:
        seen = {"error": str(e), "steps": engine.steps, "kept": bool((flat(model) == before).all())}
        try:
            optimizer.update(model, f(model, *shard(data(), group))[1])
        except bw.PrivacyError as e:
            seen["again"] = str(e)
        try:
            engine.batches(shard(data(), group), steps=1)  # another collective, for which nobody would come
        except bw.PrivacyError as e:
            seen |= {"collective": str(e), "steps_then": engine.steps, "epsilon": engine.epsilon()}
    (folder / f"seen{group.rank()}.json").write_text(json.dumps(seen))


def exits(folder, group):
    lost(folder, group, signal.SIGKILL, compiled=False)


def exits_compiled(folder, group):
    lost(folder, group, signal.SIGKILL, compiled=True)


def stops(folder, group):
    lost(folder, group, signal.SIGSTOP, compiled=True)


if __name__ == "__main__":
    group = mx.distributed.init(backend="ring", strict=True)
    fix_keys(group.rank())
    globals()[sys.argv[1]](Path(sys.argv[2]), group)
