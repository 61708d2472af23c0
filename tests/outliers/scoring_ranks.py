"""One process of a distributed test: `python scoring_ranks.py SCENARIO FOLDER` runs the function of that name."""

import sys
import warnings
from pathlib import Path

import mlx.core as mx
from mlx_bulwark.outliers import load, score_file


def scores(folder, group):
    score_file(load(folder / "detector"), folder / "x.npy", folder / "two.npy", chunk_rows=100, group=group)


def resumes(folder, group):
    done = score_file(load(folder / "detector"), folder / "x.npy", folder / "half.npy", chunk_rows=100, group=group)
    print(done.resumed, done.rows, done.outliers, flush=True)


def refuses(folder, group):
    try:
        score_file(
            load(folder / "detector"), folder / "bad.npy", folder / "bad_scores.npy", chunk_rows=100, group=group
        )
    except (ValueError, RuntimeError) as e:
        print(group.rank(), type(e).__name__, e, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    globals()[sys.argv[1]](Path(sys.argv[2]), mx.distributed.init(backend="ring", strict=True))
