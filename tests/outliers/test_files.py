import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import outlier_data as data
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from mlx_bulwark.outliers import ECOD, HBOS, KNN, Ensemble, RobustZ, score_file

NAMES = ["a", "b", "c", "d", "e"]


def table(x):
    return pa.table({name: column for name, column in zip(NAMES, x.T, strict=True)})


def arrow_file(x, path):
    with pa.ipc.new_file(path, table(x).schema) as f:
        f.write_table(table(x), max_chunksize=77)


def arrow_stream(x, path):
    with pa.ipc.new_stream(path, table(x).schema) as f:
        f.write_table(table(x), max_chunksize=77)


WRITERS = {
    "x.npy": lambda x, path: np.save(path, x),
    "fortran.npy": lambda x, path: np.save(path, np.asfortranarray(x)),
    "double.npy": lambda x, path: np.save(path, x.astype(np.float64)),
    "x.parquet": lambda x, path: pyarrow.parquet.write_table(table(x), path, row_group_size=130),
    "one_group.parquet": lambda x, path: pyarrow.parquet.write_table(table(x), path),
    "x.arrow": arrow_file,
    "stream.arrow": arrow_stream,
    "x.feather": arrow_file,
    "x.csv": lambda x, path: pyarrow.csv.write_csv(table(x), path),
}


@pytest.mark.parametrize("chunk_rows", [1, 33, 100, 1000])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_scores_as_its_rows(tmp_path, name, chunk_rows):
    if chunk_rows == 1 and name != "x.parquet":
        pytest.skip("one is enough")
    x = data.rows(301)
    WRITERS[name](x, tmp_path / name)
    detector = ECOD().fit(x[:100])
    done = score_file(detector, tmp_path / name, tmp_path / "scores.npy", chunk_rows=chunk_rows, progress=False)
    expected = detector.score_samples(x)
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), expected)
    assert (done.rows, done.resumed, done.outliers) == (301, 0, (detector.predict(x) == -1).sum())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "scores.npy"])


def test_half_precision_and_integers(tmp_path):
    x = np.round(data.rows(50))
    for dtype in (np.float16, np.int32, np.uint8):
        np.save(tmp_path / "x.npy", np.abs(x).astype(dtype))
        detector = RobustZ().fit(np.abs(x))
        score_file(detector, tmp_path / "x.npy", tmp_path / "s.npy", progress=False)
        np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), detector.score_samples(np.abs(x)))


def test_scores_as_csv(tmp_path):
    x = data.rows(70)
    np.save(tmp_path / "x.npy", x)
    detector = Ensemble([ECOD(), KNN()]).fit(x)
    score_file(detector, tmp_path / "x.npy", tmp_path / "s.csv", chunk_rows=32, progress=False)
    found = pyarrow.csv.read_csv(tmp_path / "s.csv").to_pydict()
    assert found["row"] == list(range(70))
    assert found["score_samples"] == detector.score_samples(x).tolist()
    assert found["predict"] == detector.predict(x).tolist()


def test_columns_are_found_by_name(tmp_path):
    x = data.rows(50)
    words = table(x).append_column("name", pa.array(["x"] * 50))
    shuffled = words.select(["name", "c", "a", "e", "b", "d"])
    pyarrow.parquet.write_table(shuffled, tmp_path / "x.parquet")
    named = ECOD().fit(table(x).to_pandas())
    score_file(named, tmp_path / "x.parquet", tmp_path / "s.npy", progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), named.training_scores_)
    unnamed = ECOD().fit(x)
    with pytest.raises(ValueError, match=r"has 1 columns that are not: 'name' \(string\); choose others by columns"):
        score_file(unnamed, tmp_path / "x.parquet", tmp_path / "t.npy", progress=False)
    score_file(unnamed, tmp_path / "x.parquet", tmp_path / "t.npy", columns=NAMES, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), named.training_scores_)
    with pytest.raises(ValueError, match=r"must have the columns a, z but has no z"):
        score_file(unnamed, tmp_path / "x.parquet", tmp_path / "t.npy", columns=["a", "z"], progress=False)
    with pytest.raises(ValueError, match=r"must have the detector's 5 columns but has 2"):
        score_file(unnamed, tmp_path / "x.parquet", tmp_path / "t.npy", columns=["a", "b"], progress=False)
    np.save(tmp_path / "x.npy", x[:, ::-1])
    score_file(unnamed, tmp_path / "x.npy", tmp_path / "u.npy", columns=list("43210"), progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "u.npy"), named.training_scores_)
    with pytest.raises(ValueError, match=r"must be numbers below 5 but are 7, x"):
        score_file(unnamed, tmp_path / "x.npy", tmp_path / "u.npy", columns=["1", "7", "x"], progress=False)


def test_bad_rows_are_named_by_their_place_in_the_file(tmp_path):
    x = data.rows(300)
    detector = ECOD().fit(x)
    x[222, 3] = np.nan
    message = (
        r"^\[ECOD\] X must have no NaN and no inf but has 1 NaN, in 1 of 100 rows: column 3 \(1, first in row 222\)"
    )
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=message):
        score_file(detector, tmp_path / "x.npy", tmp_path / "s.npy", chunk_rows=100, progress=False)
    missing = table(x).set_column(3, "d", pa.array([None if np.isnan(v) else v for v in x[:, 3].tolist()]))
    pyarrow.parquet.write_table(missing, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message.replace("column 3", "column 'd'")):
        score_file(detector, tmp_path / "x.parquet", tmp_path / "t.npy", chunk_rows=100, progress=False)
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize(
    ("file", "out", "options", "message"),
    [
        ("x.npy", "s.txt", {}, r"out must end in .npy or .csv but is .*s.txt"),
        ("x.txt", "s.npy", {}, r"path must end in one of .npy, .parquet, .arrow, .feather, .csv but is .*x.txt"),
        ("flat.npy", "s.npy", {}, r"must hold numbers of shape \[n, d\] but has shape \[7\]"),
        ("words.npy", "s.npy", {}, r"must hold numbers of shape \[n, d\] but has shape \[2, 1\] and dtype <U1"),
        ("empty.npy", "s.npy", {}, r"must have rows but is empty"),
        ("cut.npy", "s.npy", {}, r"cut.npy must hold the \d+ bytes that it declares but has \d+"),
        ("more.npy", "s.npy", {}, r"more.npy must hold the \d+ bytes that it declares but has \d+"),
        ("objects.npy", "s.npy", {}, r"objects.npy must hold numbers or text but holds Python objects"),
        ("junk.npy", "s.npy", {}, r"junk.npy cannot be read"),
        ("header.npy", "s.npy", {}, r"header.npy must have a header of at most 1048576 bytes but declares 4294967295"),
        ("x.npy", "s.npy", {"chunk_rows": 0}, r"chunk_rows must be 1 or more but is 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(tmp_path, file, out, options, message):
    np.save(tmp_path / "x.npy", data.rows(20))
    np.save(tmp_path / "flat.npy", np.zeros(7))
    np.save(tmp_path / "words.npy", np.array([["a"], ["b"]]))
    np.save(tmp_path / "empty.npy", np.zeros((0, 5)))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-1])
    (tmp_path / "more.npy").write_bytes(whole + b"0")
    (tmp_path / "junk.npy").write_bytes(b"junk")
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x02\x00" + b"\xff" * 100)
    np.save(tmp_path / "objects.npy", np.array([[None]], object), allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        score_file(ECOD().fit(data.rows(20)), tmp_path / file, tmp_path / out, progress=False, **options)


def test_neighbours_are_asked_for_novelty(tmp_path):
    np.save(tmp_path / "x.npy", data.rows(20))
    with pytest.raises(ValueError, match=r"\[score_file\] detector must have novelty=True but is KNN\(\)"):
        score_file(KNN().fit(data.rows(20)), tmp_path / "x.npy", tmp_path / "s.npy", progress=False)
    with pytest.raises(FileNotFoundError):
        score_file(ECOD().fit(data.rows(20)), tmp_path / "y.npy", tmp_path / "s.npy", progress=False)


# Interruptions


def interrupted(monkeypatch, detector, *arguments, after, **options):
    """Score until the third block, then Ctrl-C."""
    blocks, plain = [], type(detector)._scores_of

    def count(self, x):
        blocks.append(len(x))
        if len(blocks) > after:
            raise KeyboardInterrupt
        return plain(self, x)

    with monkeypatch.context() as m:
        m.setattr(type(detector), "_scores_of", count)
        with pytest.raises(KeyboardInterrupt):
            score_file(detector, *arguments, progress=False, **options)


@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "stream.arrow", "x.csv"])
@pytest.mark.parametrize("out", ["s.npy", "s.csv"])
def test_an_interrupted_call_is_resumed(tmp_path, monkeypatch, name, out):
    x = data.rows(301)
    WRITERS[name](x, tmp_path / name)
    detector = ECOD().fit(x[:100])
    call = (tmp_path / name, tmp_path / out)
    interrupted(monkeypatch, detector, *call, after=2, chunk_rows=50)
    assert not call[1].exists()
    blocks, plain = [], ECOD._scores_of
    monkeypatch.setattr(ECOD, "_scores_of", lambda self, x: blocks.append(len(x)) or plain(self, x))
    done = score_file(detector, *call, chunk_rows=50, progress=False)
    assert (done.resumed, blocks) == (100, [50, 50, 50, 50, 1])
    whole = score_file(detector, call[0], tmp_path / f"whole{call[1].suffix}", chunk_rows=50, progress=False)
    assert whole.outliers == done.outliers
    assert call[1].read_bytes() == whole.path.read_bytes()


def test_another_job_starts_anew(tmp_path, monkeypatch):
    x = data.rows(200)
    np.save(tmp_path / "x.npy", x)
    call = (tmp_path / "x.npy", tmp_path / "s.npy")
    changes = [
        lambda: (ECOD().fit(x[:99]), {}),
        lambda: (ECOD().fit(x[:100]), {"chunk_rows": 40}),
        lambda: (np.save(tmp_path / "x.npy", x), ECOD().fit(x[:100]), {})[1:],
    ]
    for change in changes:
        interrupted(monkeypatch, ECOD().fit(x[:100]), *call, after=1, chunk_rows=50)
        detector, options = change()
        with pytest.warns(UserWarning, match="is of another detector, file or chunk_rows: starting anew"):
            done = score_file(detector, *call, progress=False, **({"chunk_rows": 50} | options))
        assert done.resumed == 0
        np.testing.assert_array_equal(np.load(call[1]), detector.score_samples(x))


def test_progress_is_shown(tmp_path, capsys):
    np.save(tmp_path / "x.npy", data.rows(200))
    score_file(HBOS().fit(data.rows(20)), tmp_path / "x.npy", tmp_path / "s.npy", chunk_rows=50)
    assert re.search(r"100%.*200/200", capsys.readouterr().err)


# Ranks


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_ranks(scenario, folder, size=2):
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("scoring_ranks.py"), scenario, folder],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert [p.returncode for p in processes] == [0] * size, outputs
    return outputs


def test_ranks_equal_one(tmp_path, monkeypatch):
    x = data.rows(1001)
    np.save(tmp_path / "x.npy", x)
    detector = Ensemble([KNN(), ECOD()]).fit(x[:200])
    detector.save(tmp_path / "detector")
    one = score_file(detector, tmp_path / "x.npy", tmp_path / "one.npy", chunk_rows=100, progress=False)
    outputs = run_ranks("scores", tmp_path)
    assert (tmp_path / "two.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()
    assert "1.00k/1.00k" in outputs[0][1]
    assert "rows" not in outputs[1][1]  # one progress bar
    interrupted(monkeypatch, detector, tmp_path / "x.npy", tmp_path / "half.npy", after=3, chunk_rows=100)
    for output, _ in run_ranks("resumes", tmp_path):
        assert output.split() == ["300", "1001", str(one.outliers)]
    assert (tmp_path / "half.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()


def test_a_rank_that_finds_bad_rows_ends_all(tmp_path):
    x = data.rows(1001)
    ECOD().fit(x[:200]).save(tmp_path / "detector")
    x[350, 2] = np.inf  # chunk 3, of rank 1
    np.save(tmp_path / "bad.npy", x)
    first, second = (output for output, _ in run_ranks("refuses", tmp_path))
    assert first == "0 RuntimeError [score_file] all ranks must be able to read their rows but rank 1 is not\n"
    assert second.startswith("1 ValueError [ECOD] X must have no NaN and no inf but has 1 inf, in 1 of 100 rows")
    assert "first in row 350" in second


# Memory

LIMIT = """
import pathlib, re, resource, sys
from mlx_bulwark.outliers import load, score_file
folder = sys.argv[1]
done = score_file(load(f"{folder}/detector"), f"{folder}/x.npy", f"{folder}/s.npy", progress=False)
status = pathlib.Path("/proc/self/status")
if status.exists():  # what getrusage says includes the process that started this one
    print(done.rows, int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) << 10)
else:
    print(done.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_million_rows_stay_under_2_gib(tmp_path):
    rng = np.random.default_rng(0)
    block = rng.normal(size=(100_000, 32)).astype(np.float32)
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (10_000_000, 32))
    for i in range(100):
        x[i * 100_000 : (i + 1) * 100_000] = block
    del x
    detector = RobustZ().fit(block)
    detector.save(tmp_path / "detector")
    done = subprocess.run([sys.executable, "-c", LIMIT, tmp_path], capture_output=True, text=True, check=True)
    rows, peak = map(int, done.stdout.split())
    assert rows == 10_000_000
    assert peak < 2 << 30
    scores = np.load(tmp_path / "s.npy", mmap_mode="r")
    np.testing.assert_array_equal(scores[-100_000:], detector.training_scores_)
