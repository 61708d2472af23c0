"""Maximum mean discrepancy and its permutation test: ours beside plain MLX ops that hold the kernel's matrices.

Rows of the suite ``gate``. The reference computes the kernel of x, of y and between the two, an array each,
and multiplies them by the matrix of zeros and ones that tells which rows a permutation calls x: it uses symmetry and
computes each value once, as ours does. Peak memory is what a call adds, over the n x m matrix of one of these arrays.
"""

import math

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np

D, PERMUTATIONS = 64, 100


def discrepancy(bench):
    n = 2000 if bench.quick else 20_000
    case = f"mmd_{n // 1000}kx{n // 1000}k_d{D}"
    x, y = normals(n, 0), normals(n, 1)
    width = bw.mmd(x[:500], y[:500]).bandwidths[0]
    for name, permutations in ((case, PERMUTATIONS), (f"{case}_statistic_alone", 0)):
        chosen = dealt(n, permutations)
        contestants = {
            "ours": lambda b=permutations: bw.mmd(x, y, bandwidth=width, permutations=b),
            "unfused": lambda a=chosen: unfused(x, y, width, a),
        }
        bench.check(name, lambda c=contestants: same(c["ours"](), c["unfused"]()))
        times = bench.compare(contestants, rounds=1 if n > 10_000 else 3)  # of half a minute each
        ratio = times.ratio("unfused", "ours")
        bench.row(f"{name}/vs_unfused_reference", ratio, "x", peer="plain MLX ops", better="higher")
        bench.row(f"{name}/time", times["ours"].median * 1e3, "ms", better="lower")
    share = bench.peak_memory(step, n, PERMUTATIONS) / (4 * n * n)
    bench.row(f"{case}/peak_memory_over_matrix", share, "x", peer="n x m floats", better="lower")
    # with twice the rows, flat memory is twice as large, a matrix four times
    growth = bench.peak_memory(step, n, PERMUTATIONS) / bench.peak_memory(step, n // 2, PERMUTATIONS)
    bench.row(f"{case}/peak_memory_over_half_as_many", growth, "x", better="lower")


def unfused(x, y, width, chosen):
    """The statistic and that of each permutation; ``chosen`` [n + m, permutations] holds zeros and ones."""
    n, m = len(x), len(y)
    a, b = chosen[:n], chosen[n:]
    xx, yy, xy = kernel(x, x, width), kernel(y, y, width), kernel(x, y, width)
    xx, yy = (k * (1 - mx.eye(len(k))) for k in (xx, yy))
    products = [(a, xx @ a), (b, yy @ b), (2 * a, xy @ b)]
    inside = sum((left * right).sum(axis=0) for left, right in products)
    by_row = mx.concatenate([xx.sum(axis=1) + xy.sum(axis=1), yy.sum(axis=1) + xy.sum(axis=0)])
    across = by_row @ chosen
    sums = [k.sum(axis=1).sum() for k in (xx, xy, yy)]
    whole = sums[0] + 2 * sums[1] + sums[2]

    def unbiased(within, between, others):
        return within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * between / (n * m)

    found = unbiased(*sums), unbiased(inside, across - inside, whole - 2 * across + inside)
    mx.eval(*found)
    return found


def kernel(x, y, width):
    squares = x.square().sum(axis=1)[:, None] + y.square().sum(axis=1) - 2 * (x @ y.T)
    k = mx.exp(squares * (-0.5 / width**2))
    mx.eval(k)  # one at a time: of the matrices that it comes from, none is left
    return k


def same(ours, reference):
    """Statistics of 1e-4 are differences of means around 0.6, added up in float32 by the reference."""
    near = abs(ours.statistic - reference[0].item()) < 1e-5
    return near and (not len(ours.permuted) or abs(ours.permuted.std() - np.array(reference[1]).std()) < 1e-5)


def dealt(n, permutations):
    generator = np.random.default_rng(0)
    chosen = np.zeros((2 * n, permutations), np.float32)
    for b in range(permutations):
        chosen[generator.choice(2 * n, n, replace=False, shuffle=False), b] = 1
    return mx.array(chosen)


def normals(n, seed):
    return mx.array(np.random.default_rng(seed).standard_normal((n, D), np.float32))


def step(n, permutations):
    x, y = normals(n, 0), normals(n, 1)
    width = math.sqrt(D)
    bw.mmd(x[:300], y[:300], bandwidth=width, permutations=permutations)
    return lambda: mx.array(bw.mmd(x, y, bandwidth=width, permutations=permutations).statistic)
