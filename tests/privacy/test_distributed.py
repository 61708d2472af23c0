"""Several real processes on the loopback interface, by MLX's ring."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
import ranks
from mlx_bulwark.privacy.banded import strategy
from scipy import stats
from scipy.linalg import toeplitz

RANKS = 3
SCRIPT = Path(__file__).with_name("ranks.py")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(scenario, folder, size):
    """Start the processes of a scenario."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, scenario, folder],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes, seconds=120):
    """Exit codes and outputs; whoever is left is killed."""
    until = time.monotonic() + seconds
    try:
        return [(p.wait(max(0.1, until - time.monotonic())), p.stdout.read()) for p in processes]
    finally:
        end(processes)


def end(processes):
    for p in processes:
        p.kill()
        p.wait()
        p.stdout.close()


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What each rank of a run found."""
    folder = tmp_path_factory.mktemp("ranks")
    for code, output in finish(start("figures", folder, RANKS)):
        assert code == 0, output
    names = ("without_noise", "with_noise", "counted", "refusals", "checked", "resumed", "with_a_key_file", "discrete")
    return {n: [dict(np.load(folder / f"{n}{r}.npz")) for r in range(RANKS)] for n in names}


@pytest.fixture(scope="module")
def one_process():
    return ranks.without_noise()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ranks.WITHOUT_NOISE)
def test_without_noise_ranks_equal_one_process(figures, one_process, name, compiled):
    for found in figures["without_noise"]:
        # Adam divides by the root of tiny second moments: rounding of the sums is magnified
        np.testing.assert_allclose(found[f"{name} {compiled}"], one_process[f"{name} {compiled}"], atol=2e-5)
        np.testing.assert_allclose(found[f"{name} {compiled} norm"], one_process[f"{name} {compiled} norm"], rtol=1e-6)
        first = figures["without_noise"][0]
        np.testing.assert_array_equal(found[f"{name} {compiled}"], first[f"{name} {compiled}"])


@pytest.mark.parametrize("compiled", [True, False])
def test_variance_of_all_ranks_is_the_accounted_one(figures, compiled):
    # chi-square of 90,300 values; keys are fixed, and of others a false alarm once in a million
    moves = [found[f"moves {compiled}"] for found in figures["with_noise"]]
    for other in moves[1:]:
        np.testing.assert_array_equal(moves[0], other)
    z = moves[0] / (3.0 * 0.2 / (0.5 * ranks.N))
    low, high = stats.chi2.interval(1 - 1e-6, z.size)
    assert low < (z.astype(np.float64) ** 2).sum() < high


def test_what_leaves_a_rank_is_noised_by_its_own_share(figures):
    # 180,600 values a rank; keys are fixed
    sent = [
        found["sent"].astype(np.float64) / (3.0 * 0.2 / math.sqrt(len(figures["with_noise"])))
        for found in figures["with_noise"]
    ]
    for z in sent:
        assert z.shape == (6, 30_100)
        low, high = stats.chi2.interval(1 - 1e-6, z.size)
        assert low < (z**2).sum() < high
    everything = np.stack([z.ravel() for z in sent])
    correlation = np.corrcoef(everything) - np.eye(len(sent))
    assert np.abs(correlation).max() * math.sqrt(everything.shape[1]) < 5


def test_banded_noise_of_all_ranks_is_correlated_as_in_one_process(figures):
    # Each step's noise is a row of the inverse strategy times independent normals: covariance between steps within 6
    # standard errors of 30,100 values.
    z = figures["with_noise"][0]["banded"].astype(np.float64)
    for other in figures["with_noise"][1:]:
        np.testing.assert_array_equal(z, other["banded"].astype(np.float64))
    coefficients = strategy(4, 6)
    inverse = np.linalg.inv(sum(c * np.eye(6, k=-k) for k, c in enumerate(coefficients)))
    expected = inverse @ inverse.T
    spread = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / z.shape[1])
    assert (np.abs(z @ z.T / z.shape[1] - expected) < 6 * spread).all()


def test_steps_are_counted_once(figures):
    assert [int(found["steps"]) for found in figures["with_noise"]] == [6] * RANKS


def test_examples_of_all_shards_take_part_as_accounted(figures):
    for other in figures["counted"][1:]:
        for name, counts in figures["counted"][0].items():
            np.testing.assert_array_equal(counts, other[name])
    counts = figures["counted"][0]
    assert set(np.unique(counts["poisson"])) == {0, 1}
    # 8 steps of 48 coins: 6 standard deviations, a false alarm once in 500 million
    for name, expected in (("poisson", 0.3), ("cyclic_poisson", 0.25)):
        assert abs(counts[name].mean() - expected) < 6 * math.sqrt(expected / counts[name].size)
    for group in counts["cyclic_poisson"].T:  # all steps of an example are of one group
        assert len({step % 4 for step in np.flatnonzero(group)}) <= 1
    for epoch in counts["shuffle"].reshape(3, 4, 48):
        np.testing.assert_array_equal(epoch.sum(0), 1)
        np.testing.assert_array_equal(epoch.sum(1), 12)


def test_refusals_come_on_all_ranks(figures):
    for found in figures["refusals"]:
        settings, full, empty, other, shapes, frozen, shuffled, ledger, memory, little = found["messages"]
        assert settings.startswith("PrivacyError [distributed] settings must be the same on all ranks but rank 1")
        assert full.startswith("ValueError [batches] data must be this rank's shard")
        assert empty.startswith("ValueError [batches] data must be this rank's shard")
        assert shapes.startswith("PrivacyError [distributed] shapes of the parameters, and frozen parameters must be")
        assert frozen.startswith("PrivacyError [distributed] shapes of the parameters, and frozen parameters must be")
        assert shuffled.startswith("ValueError [batches] batch_size and dataset_size must be multiples")
        assert other.startswith("ValueError [batches] data must be the shard that this rank had before but is another")
        assert other.endswith("on ranks [0, 1]")
        assert ledger.startswith("PrivacyError [ledger] ")
        assert "must be in use by one engine at a time" in ledger
        assert memory.startswith("PrivacyError [batches] max_memory must hold a step of 1 rows")
        assert little.startswith("ValueError [PrivacyEngine] noise_multiplier must be at least 0.00")


def test_each_rank_finds_a_batch_that_fits_its_memory(figures):
    sizes = [int(found["microbatch_size"]) for found in figures["refusals"]]
    assert all(1 <= size <= ranks.N // RANKS + 1 for size in sizes)


def test_a_run_of_ranks_goes_on_with_the_same_noise_and_partition(figures):
    # The released noise is the inverse strategy times the normals of all ranks' keys: those of both sessions.
    found = figures["with_a_key_file"]
    T, C = 8, toeplitz(np.pad(strategy(4, 8), (0, 4)), np.zeros(8))
    z = sum(normals(f["key"], T) for f in found) / math.sqrt(RANKS)
    for f in found:
        np.testing.assert_array_equal(f["moves"], found[0]["moves"])
        np.testing.assert_array_equal(f["groups"][0], f["groups"][1])
        assert int(f["sessions"]) == 1
        assert int(f["mode"]) == 0o600
    np.testing.assert_allclose(found[0]["moves"], np.linalg.solve(C, z), atol=5e-5)
    assert len({tuple(f["key"]) for f in found}) == RANKS
    assert len({tuple(f["groups"][0][:8]) for f in found}) > 1


def test_key_files_that_do_not_belong_together_are_refused_on_all_ranks(figures):
    for found in figures["with_a_key_file"]:
        size, one_lost, shared, repeated = found["messages"]
        assert f"ranks must be {RANKS + 1}, as " in size
        assert "must be there on all ranks or on none" in one_lost
        assert "runs of the noise key files must be the same on all ranks but rank 1" in shared
        assert "ledger must hold the steps that were taken under" in repeated


def normals(key, T):
    return np.stack([np.array(bw.gaussian((300,), 1.0, mx.array(key), t << 40)) for t in range(T)]).astype(np.float64)


def test_discrete_noise_of_all_ranks_is_the_accounted_one_on_the_grid(figures, one_process_discrete):
    found = figures["discrete"]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0]["noise"], other["noise"])
    steps = found[0]["noise"].astype(np.float64) * 2**20  # the clipping norm is 1
    np.testing.assert_array_equal(steps, np.rint(steps))
    z = found[0]["noise"].astype(np.float64) / 3.0
    low, high = stats.chi2.interval(1 - 1e-6, z.size)
    assert low < (z**2).sum() < high
    np.testing.assert_array_equal(found[0]["sums"], one_process_discrete)  # integers add up exactly


@pytest.fixture(scope="module")
def one_process_discrete():
    return ranks.discrete_sums()


def test_check_finds_noise_that_ranks_share(figures):
    # engine.check raises a false alarm once in a million calls
    for found in figures["checked"]:
        sound, same_keys = found["messages"]
        assert sound == "sound"
        assert "accounted standard deviation" in same_keys
        assert f"has {math.sqrt(RANKS):.1f}" in same_keys


def test_books_are_the_first_rank_s_and_all_ranks_continue_them(figures):
    first, *others = figures["resumed"]
    for other in others:
        np.testing.assert_array_equal(first["spent"], other["spent"])
        assert list(other["files"]) == []
    steps, epsilon = first["spent"][::2], first["spent"][1::2]
    np.testing.assert_array_equal(steps, [ranks.STEPS, 2 * ranks.STEPS] * 2)
    expected = [bw.compute_epsilon(3.0, 1.0, n, 1e-5) for n in (ranks.STEPS, 2 * ranks.STEPS)]
    np.testing.assert_allclose(epsilon, expected * 2, rtol=1e-9)
    assert list(first["files"]) == ["ledger.jsonl", "state.json"]


@pytest.mark.parametrize(("scenario", "size"), [("exits", 2), ("exits_compiled", 3)])
def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path, scenario, size):
    *others, (killed, _) = finish(start(scenario, tmp_path, size))
    assert killed == -signal.SIGKILL
    ledger = tmp_path / "ledger.jsonl"
    assert ledger.read_text().count("noise_multiplier") == 3  # charged, though its update was not made
    for rank, (code, output) in enumerate(others):
        if code == 1:  # MLX's ring did not notice, which was seen on a busy machine: the timeout did
            assert f"rank {rank} has waited 20 seconds for the {size - 1} others" in output
            continue
        assert code == 0, output
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        assert f"all {size} ranks must take part in every step but one was lost, says rank {rank}" in seen["error"]
        assert seen["steps"] == seen["steps_then"] == 3
        assert seen["kept"]
        for refused in ("again", "collective"):
            assert "ranks must all be there but one was lost" in seen[refused]
        assert bw.ledger_epsilon(ledger, 1e-5) == pytest.approx(seen["epsilon"], rel=1e-12)


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(tmp_path):
    waiting, stopped = start("stops", tmp_path, 2)
    try:
        assert waiting.wait(120) == 1
        assert "rank 0 has waited 4 seconds for the 1 others" in waiting.stdout.read()
        assert (tmp_path / "ledger.jsonl").read_text().count("noise_multiplier") == 3
        assert stopped.poll() is None
    finally:
        end([waiting, stopped])


def test_a_group_of_one_is_no_group():
    engine = bw.PrivacyEngine(8, sampling="full", noise_multiplier=1.0, max_grad_norm=1.0, group=mx.distributed.init())
    assert engine._ranks is None
