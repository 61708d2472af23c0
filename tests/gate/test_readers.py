"""Files that are not trusted: what is right is read, and a malformed file raises an error that names it, no more."""

import io
import json
import os
import resource
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.gate import ReadError, read
from safetensors.numpy import save_file

X = np.arange(24, dtype=np.float32).reshape(6, 4)
LIMIT = 1 << 22


def write(folder, kind):
    """One good file of a kind."""
    path = folder / f"good.{kind}"
    if kind == "npy":
        np.save(path, X)
    elif kind == "npz":
        np.savez_compressed(path, x=X, y=np.arange(6))
    elif kind == "csv":
        path.write_text("a,b,name\n1,2.5,Zoë\n2,,b\n3,inf,\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps({"x": X.tolist(), "name": ["a", None]}))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"a": i, "b": str(i)}) + "\n" for i in range(5)))
    elif kind == "parquet":
        pq.write_table(pa.table({"a": [1, 2, 3], "b": [1.5, None, 2.5], "c": ["x", "y", None]}), path)
    else:
        save_file({"x": X, "y": np.arange(6)}, path)
    return path


KINDS = ("npy", "npz", "csv", "json", "jsonl", "parquet", "safetensors")


@pytest.mark.parametrize("kind", ["npy", "npz", "json", "safetensors"])
def test_arrays_come_back(tmp_path, kind):
    found = read(write(tmp_path, kind))
    np.testing.assert_array_equal(found["x"], X)
    if kind in ("npz", "safetensors"):
        np.testing.assert_array_equal(found["y"], np.arange(6))


def test_tables_come_back(tmp_path):
    table = read(write(tmp_path, "csv"))
    assert table["a"].dtype == np.int64
    np.testing.assert_array_equal(table["b"], [2.5, np.nan, np.inf])
    assert table["name"].tolist() == ["Zoë", "b", None]
    table = read(write(tmp_path, "parquet"))
    np.testing.assert_array_equal(table["b"], [1.5, np.nan, 2.5])
    assert read(write(tmp_path, "jsonl"))["a"].tolist() == list(range(5))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_every_shape_of_npy(tmp_path, shape, order):
    x = np.asarray(np.random.default_rng(0).normal(size=shape), order=order)
    np.save(tmp_path / "x.npy", x)
    np.testing.assert_array_equal(read(tmp_path / "x.npy")["x"], x)


def test_bfloat16(tmp_path):
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"x": mx.array([1.5, -2.0], mx.bfloat16)})
    x = read(tmp_path / "x.safetensors")["x"]
    assert x.dtype == mx.bfloat16
    assert x.tolist() == [1.5, -2.0]


def zipped(path, members, **kwargs):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def npy_bytes(shape=(2,), descr="<f8", data=b"\0" * 16, version=b"\x01\x00"):
    head = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(head)) + head + data


def safetensors_bytes(head, data=b""):
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def lying_zip():
    """The directory declares 16 bytes where a megabyte comes out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_bytes((131072,), data=b"\0" * (1 << 20)))
    raw = bytearray(buffer.getvalue())
    real = archive.infolist()[0].file_size
    for at in (raw.find(b"PK\x01\x02") + 24, 22):
        assert struct.unpack_from("<I", raw, at)[0] == real
        struct.pack_into("<I", raw, at, 144)
    return bytes(raw)


HOSTILE = {
    "pickle.npy": npy_bytes(descr="|O"),
    "declares_more.npy": npy_bytes((10,)),
    "declares_less.npy": npy_bytes((1,)),
    "huge.npy": npy_bytes((1 << 60,)),
    "overflow.npy": npy_bytes((1 << 40, 1 << 40)),
    "negative.npy": npy_bytes((-2,)),
    "version.npy": npy_bytes(version=b"\x09\x00"),
    "header.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31),
    "code.npy": npy_bytes(descr="__import__('os').system('true')"),
    "deep.npy": npy_bytes(descr="<f8")[:10] + b"(" * 300,
    "empty.npy": b"",
    "bomb.npz": {"x.npy": npy_bytes((1 << 23,), data=b"\0" * (1 << 26))},
    "lying.npz": lying_zip(),
    "up.npz": {"../x.npy": npy_bytes()},
    "absolute.npz": {"/etc/x.npy": npy_bytes()},
    "drive.npz": {"C:\\x.npy": npy_bytes()},
    "text.npz": {"x.py": b"import os"},
    "pickle.npz": {"x.npy": npy_bytes(descr="|O")},
    "notzip.npz": b"PK\x03\x04 and no more",
    "ragged.csv": "a,b\n1,2\n3\n",
    "twice.csv": "a,a\n1,2\n",
    "quote.csv": 'a,b\n1,"2\n',
    "bytes.csv": b"a\n\xff\xfe\n",
    "zero.csv": "a\n1\x002\n",
    "long.csv": "a\n" + "9" * (1 << 21),
    "empty.csv": "",
    "deep.json": "[" * 100_000,
    "scalar.json": "7",
    "ragged.json": '{"x": 3}',
    "rows.json": "[1, 2]",
    "digits.json": '{"x": [' + "9" * 5000 + "]}",
    "bytes.json": b"\xff",
    "broken.jsonl": '{"a": 1}\n{"a":\n',
    "magic.parquet": b"PAR1" + b"\0" * 40 + b"PAR1",
    "footer.parquet": b"PAR1" + struct.pack("<I", 1 << 30) + b"PAR1",
    "empty.parquet": b"",
    "length.safetensors": struct.pack("<Q", 1 << 62),
    "list.safetensors": safetensors_bytes([1]),
    "overlap.safetensors": safetensors_bytes(
        {k: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for k in "ab"}, b"1234"
    ),
    "hole.safetensors": safetensors_bytes({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, b"1234"),
    "beyond.safetensors": safetensors_bytes({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, b"1234"),
    "shape.safetensors": safetensors_bytes({"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}}, b"1234"),
    "dtype.safetensors": safetensors_bytes({"a": {"dtype": "PY", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "rest.safetensors": safetensors_bytes({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"1234"),
    "deep.safetensors": safetensors_bytes(b"[" * 5000),
    "data.pkl": b"\x80\x04.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_their_name(tmp_path, name):
    path, content = tmp_path / name, HOSTILE[name]
    if isinstance(content, dict):
        zipped(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = set(os.listdir(tmp_path))
    with pytest.raises(ReadError, match=name):
        read(path, max_bytes=LIMIT)
    assert set(os.listdir(tmp_path)) == before


def test_bombs_cost_no_memory(tmp_path):
    bomb = npy_bytes((1 << 24,), data=b"\0" * (1 << 27))
    zipped(tmp_path / "bomb.npz", {"x.npy": bomb})
    del bomb
    pq.write_table(pa.table({"a": pa.array(np.zeros(1 << 26, np.int8))}), tmp_path / "bomb.parquet")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb.npz", "bomb.parquet"):
        with pytest.raises(ReadError, match="bytes"):
            read(tmp_path / name, max_bytes=LIMIT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10


def test_links_and_devices(tmp_path):
    write(tmp_path, "npy")
    (tmp_path / "link.npy").symlink_to(tmp_path / "good.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    for name in ("link.npy", "pipe.npy", "folder.npy"):
        with pytest.raises(ReadError, match=name):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.npy")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return folder, {kind: write(folder, kind).read_bytes() for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_does_more_than_raise(good, kind, data):
    """Cut, edited, repeated and foreign bytes: an error that names the file, or arrays within the limit."""
    folder, files = good
    raw = bytearray(files[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        what = data.draw(st.sampled_from(["cut", "set", "insert", "repeat", "delete"]))
        if what == "cut":
            del raw[at:]
        elif what == "set":
            raw[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        elif what == "insert":
            raw[at:at] = data.draw(st.binary(max_size=8))
        elif what == "repeat":
            raw[at:at] = raw[at : at + 64]
        else:
            del raw[at : at + data.draw(st.integers(1, 8))]
    path = folder / f"damaged.{kind}"
    path.write_bytes(raw)
    try:
        arrays = read(path, max_bytes=LIMIT)
    except ReadError as e:
        assert "damaged" in str(e)  # noqa: PT017  # most damage is refused, some is harmless
    else:
        assert sum(a.nbytes for a in arrays.values()) <= 16 * LIMIT


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(raw=st.binary(max_size=300))
def test_random_bytes(good, kind, raw):
    path = good[0] / f"random.{kind}"
    path.write_bytes(raw)
    try:
        read(path, max_bytes=LIMIT)
    except ReadError as e:
        assert "random" in str(e)  # noqa: PT017  # random bytes may be a table
