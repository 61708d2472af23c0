"""Nearest neighbours by brute force: ours, faiss and scikit-learn, on the same rows and threads.

``knn``: rows against themselves, where ours computes each product once; ``queries``: as many rows against others. Peers
find one neighbour more where a row finds itself. Peak memory is what a call adds, over the n x m matrix in float32 that
none of it holds. Growth is the slope of the logarithm of time; that of scoring is fitted as in the suite ``tails``.
"""

import math

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np

from benchmarks.tails import exponent

N, D, K = 20_000, 128, 10
CHECKED = 100  # rows whose neighbours are held against float64


def run(bench):
    rows, others = normals(N, D), normals(N, D, 1)
    for case, queries in (("knn_20kx20k_d128_k10", None), ("queries_20kx20k_d128_k10", others)):
        compare(bench, case, rows, queries)
    case = "knn_20kx20k_d128_k10"
    share = bench.peak_memory(step, N, D, K) / (4 * N * N)
    bench.check(case, share <= 0.1)
    bench.row(f"{case}/peak_memory_over_matrix", share, "x", peer="n x m floats", better="lower")
    growth(bench)
    growth_of_scoring(bench)
    duplicates(bench)


def compare(bench, case, rows, queries):
    """``queries`` against ``rows``, or rows against themselves."""
    y = mx.array(rows)
    x = y if queries is None else mx.array(queries)
    contestants = {"ours": lambda: bw.knn(x, None if queries is None else y, K)}
    asked, most = (rows, K + 1) if queries is None else (queries, K)
    if faiss := bench.peer("faiss"):
        faiss.omp_set_num_threads(bench.threads)
        index = faiss.IndexFlatL2(D)
        index.add(rows)
        contestants["faiss"] = lambda: index.search(asked, most)
        bench.check(case, lambda: right(contestants["faiss"]()[1][:, most - K :], asked, rows, queries is None))
    if bench.peer("sklearn"):
        from sklearn.neighbors import NearestNeighbors

        fitted = NearestNeighbors(n_neighbors=most, algorithm="brute", n_jobs=bench.threads).fit(rows)
        contestants["sklearn"] = lambda: fitted.kneighbors(asked)
    bench.check(case, lambda: right(np.array(contestants["ours"]().indices), asked, rows, queries is None))
    times = bench.compare(contestants)
    if "faiss" in times:
        peer = "faiss IndexFlatL2"
        bench.row(f"{case}/vs_faiss", times.ratio("faiss", "ours"), "x", peer=peer, better="higher")
    if "sklearn" in times:
        peer = "scikit-learn, brute"
        bench.row(f"{case}/vs_sklearn", times.ratio("sklearn", "ours"), "x", peer=peer, better="higher")
    bench.row(f"{case}/time", times["ours"].median * 1e3, "ms", better="lower")
    bench.row(f"{case}/pairs", N * N / times["ours"].median / 1e9, "G/s", better="higher")


def growth(bench):
    """Exponents of time in the rows and in the columns."""
    for case, shapes in {
        "growth_in_n_d64": [(n, 64) for n in (4000, 8000, 16_000, 32_000)],
        "growth_in_d_n8k": [(8000, d) for d in (64, 128, 256, 512)],
    }.items():
        arrays = {shape: mx.array(normals(*shape)) for shape in shapes}
        small = arrays[shapes[0]]
        bench.check(
            case, lambda x=small: right(np.array(bw.knn(x, k=K).indices), np.array(x), np.array(x), itself=True)
        )
        f = {str(shape): lambda x=x: bw.knn(x, k=K) for shape, x in arrays.items()}
        times = bench.compare(f, rounds=3)
        sizes = [math.prod(shape) for shape in shapes]
        slope = np.polyfit(np.log(sizes), np.log([times[str(shape)].median for shape in shapes]), 1)[0]
        bench.row(f"{case}/exponent", slope, "", better="lower")


def growth_of_scoring(bench):
    """More and more rows against a reference that stays: linear but for what a call costs at any size."""
    case, reference = "growth_in_queries_m8k_d64", mx.array(normals(8000, 64, 1))
    sizes = [500, 2000, 8000] if bench.quick else [4000, 16_000, 64_000]
    queries = {n: mx.array(normals(n, 64)) for n in sizes}
    found = exponent(sizes, lambda n: bw.knn(queries[n], reference, K))
    few = queries[sizes[0]]
    bench.check(
        case, right(np.array(bw.knn(few, reference, K).indices), np.array(few), np.array(reference), itself=False)
    )
    bench.check(case, bench.quick or found < 1.05)
    bench.row(f"{case}/exponent", found, "", better="lower")


def duplicates(bench):
    """A hundred copies of each row: more are equally near than any bound of a product can tell apart."""
    case, copies = "duplicates_8kx8k_d64_k10", 100
    rows = np.repeat(normals(8000 // copies, 64), copies, 0)
    x, plain = mx.array(rows), mx.array(normals(8000, 64))
    bench.check(case, lambda: (np.array(bw.knn(x, k=K).distances) == 0).all())
    times = bench.compare({"copies": lambda: bw.knn(x, k=K), "plain": lambda: bw.knn(plain, k=K)})
    bench.row(f"{case}/time_over_distinct", times.ratio("copies", "plain"), "x", peer="distinct rows", better="lower")


def step(n, d, k):
    x = mx.array(normals(n, d))
    mx.eval(bw.knn(x[:100], k=k))
    return lambda: bw.knn(x, k=k)


def right(indices, queries, rows, itself):
    """Whether the first queries have the neighbours that float64 finds."""
    rows = rows.astype(np.float64)
    for i, query in enumerate(queries[:CHECKED].astype(np.float64)):
        distances = np.square(rows - query).sum(1)
        if itself:
            distances[i] = np.inf
        if sorted(indices[i]) != sorted(np.argsort(distances)[:K]):
            return False
    return True


def normals(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d), np.float32)
