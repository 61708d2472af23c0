"""Building and verifying manifests, beside hashing the same files and nothing else; rows of the suite ``gate``.

The bare hash is one `hashlib.sha256` a file over all cores, read in pieces of the same size into one buffer a thread,
by names that are already known. Ours lists the folder, refuses what is no regular file, and makes the Merkle tree.
Files are in the page cache for both. ``audit_log`` is the time of one line that is on the disk: the disk decides it.
"""

import hashlib
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mlx_bulwark.provenance import AuditLog, Manifest

CASES = {"sha256": (48, 4 << 20), "sha256_10k_files": (10_000, 4 << 10)}


def hashing(bench):
    for case, (count, size) in CASES.items():
        folder = Path(tempfile.mkdtemp())
        try:
            one(bench, case, folder, count // 8 if bench.quick else count, size)
        finally:
            shutil.rmtree(folder)
    with tempfile.TemporaryDirectory() as folder:
        lines(bench, folder)


def one(bench, case, folder, count, size):
    content, names = np.random.default_rng(0).bytes(size), []
    for i in range(count):
        part = folder / f"{i % 100:02d}"
        part.mkdir(exist_ok=True)
        names.append(part / f"{i:05d}")
        names[-1].write_bytes(content[8:] + i.to_bytes(8, "little"))
    manifest = Manifest.build(folder)
    bench.check(f"{case}", sorted(bare(names, bench.threads)) == sorted(e["digest"] for e in manifest.files))
    bench.check(f"{case}", manifest.verify(folder).ok)
    contestants = {
        "bare": lambda: bare(names, bench.threads),
        "build": lambda: Manifest.build(folder, threads=bench.threads),
        "verify": lambda: manifest.verify(folder, threads=bench.threads),
    }
    times = bench.compare(contestants)
    gigabytes = count * size / 1e9
    bench.row(f"{case}/over_bare_hash", times.ratio("build", "bare"), "x", peer="hashlib", better="lower")
    bench.row(f"{case}/verify_over_bare_hash", times.ratio("verify", "bare"), "x", peer="hashlib", better="lower")
    bench.row(f"{case}/build", gigabytes / times["build"].median, "GB/s", better="higher")


def bare(names, threads):
    local = threading.local()

    def digest(name):
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(1 << 20)
        found, view = hashlib.sha256(), memoryview(local.buffer)
        with open(name, "rb", buffering=0) as f:
            while count := f.readinto(view):
                found.update(view[:count])
        return found.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(digest, names))


def lines(bench, folder):
    log = AuditLog(Path(folder) / "audit.jsonl")
    before = log.head().count
    time = bench.time(lambda: log.append("test", number=1))
    bench.check("audit_log", AuditLog.verify(log.path, anchor=log.head()).ok and log.head().count > before)
    bench.row("audit_log/append", time.median * 1e3, "ms", better="lower")
