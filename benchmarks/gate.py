"""A schema's ranges and missing values over [10M, 32] float32, against pandera.

Both judge the same rules of the same numbers, each in its own container: pandera a dataframe, in its fastest form (one
``in_range`` a column, not nullable), the gate an MLX array. Two more rows give the gate the NumPy array and the very
dataframe, both read where they lie. Before anything is timed both must agree on planted
numbers, and find clean ones clean.
"""

import mlx.core as mx
import numpy as np
from mlx_bulwark.gate import Field, Schema

from benchmarks import mmd, provenance

COLUMNS = 32
NAMES = [f"c{j}" for j in range(COLUMNS)]
ARRAY = Schema(
    fields={"x": Field(dtype="float32", shape=(COLUMNS,), axis=0, low=(0.0,) * COLUMNS, high=(1.0,) * COLUMNS)}
)
TABLE = Schema(fields={name: Field(dtype="float32", shape=(), low=0, high=1) for name in NAMES})


def run(bench):
    check(bench)
    provenance.hashing(bench)
    mmd.discrepancy(bench)


def check(bench):
    rows = 200_000 if bench.quick else 10_000_000
    x = numbers(rows)
    device = mx.array(x)
    case = "check_10Mx32"
    contestants = {"numpy": lambda: ARRAY.check(x), "mlx": lambda: ARRAY.check(device)}
    bench.check(case, lambda: finds_what_is_planted(x[:100_000].copy()))
    pandera, pandas = bench.peer("pandera.pandas"), bench.peer("pandas")
    if pandera and pandas:
        frame = pandas.DataFrame({name: x[:, j] for j, name in enumerate(NAMES)})
        frames = frame_schema(pandera)
        contestants |= {"frame": lambda: TABLE.check(frame), "pandera": lambda: frames.validate(frame, lazy=True)}
        bench.check(case, lambda: agrees_with_pandera(pandas, frames, x[:100_000].copy()))
    bench.check(case, all(f().ok for name, f in contestants.items() if name != "pandera"))
    times = bench.compare(contestants, rounds=3 if bench.quick else 5)
    bench.row(f"{case}/time", times["mlx"].median, "s", better="lower")
    bench.row(f"{case}/throughput", x.nbytes / times["mlx"].median / 1e9, "GB/s", better="higher")
    if "pandera" in times:
        bench.row(f"{case}/vs_pandera", times.ratio("pandera", "mlx"), "x", peer="pandera", better="higher")
        bench.row(f"{case}/numpy_vs_pandera", times.ratio("pandera", "numpy"), "x", peer="pandera", better="higher")
        bench.row(f"{case}/frame_vs_pandera", times.ratio("pandera", "frame"), "x", peer="pandera", better="higher")
    bench.row(f"{case}/memory", bench.peak_memory(checking, rows, steps=2) / 1e6, "MB", better="lower")


def numbers(rows):
    return np.random.default_rng(0).random((rows, COLUMNS), np.float32)


def checking(rows):
    """The numbers are there before; what is measured is what the check takes beside them."""
    x = numbers(rows)
    ARRAY.check(x[:1000])
    return lambda: mx.array(len(ARRAY.check(x).results))


def frame_schema(pandera):
    check = pandera.Check.in_range(0, 1)
    return pandera.DataFrameSchema({name: pandera.Column("float32", check, nullable=False) for name in NAMES})


def finds_what_is_planted(x):
    x[7, 3], x[9, 31], x[11, 0], x[50_000, 5] = 1.5, -0.25, np.nan, np.nan
    report = ARRAY.check(x)
    return (report.counts["range"], report.counts["missing"]) == (2, 2)


def agrees_with_pandera(pandas, frames, x):
    from pandera.errors import SchemaErrors

    x[7, 3], x[9, 31], x[11, 0], x[50_000, 5] = 1.5, -0.25, np.nan, np.nan
    frame = pandas.DataFrame({name: x[:, j] for j, name in enumerate(NAMES)})
    try:
        frames.validate(frame, lazy=True)
    except SchemaErrors as e:
        found = sorted({(int(c["index"]), c["column"]) for c in e.failure_cases.to_dict("records")})
        report = TABLE.check(frame)
        return sorted((row, r.where) for r in report.findings for row in r.rows) == found
    return False
