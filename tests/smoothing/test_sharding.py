"""Data sets that several real processes certify, by MLX's ring on the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from mlx_bulwark.smoothing import CertifiedTable

SCRIPT = Path(__file__).with_name("sharded.py")


def run(folder, size, stop=0):
    sockets = [socket.socket() for _ in range(size)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
    for s in sockets:
        s.close()
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, str(stop)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [(p.wait(60), p.stdout.read()) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
            p.stdout.close()


def test_ranks_share_a_data_set_and_go_on_in_other_numbers(tmp_path):
    for code, output in run(tmp_path, 3, stop=2):  # each rank is interrupted in its third input
        assert code == 130, output
    parts = [CertifiedTable.read_csv(tmp_path / f"t.rank{rank}.csv") for rank in range(3)]
    kept = {row.index: row for part in parts for row in part.rows}
    assert 3 <= len(kept) <= 6
    assert sum(len(part.rows) for part in parts) == len(kept)  # no input was done twice
    for code, output in run(tmp_path, 2):
        assert code == 0, output
    table = CertifiedTable.read_csv(tmp_path / "t.csv")
    assert table.column("index").tolist() == list(range(11))
    assert all(table.rows[index] == row for index, row in kept.items())
    np.testing.assert_array_equal(table.column("label"), [1] * 5 + [0] * 6)
    for rank in range(2):
        seen = np.load(tmp_path / f"seen{rank}.npz")
        np.testing.assert_array_equal(seen["radius"], table.column("radius"))  # every bit, on every rank
    assert not (tmp_path / "t.rank0.csv").exists()
    assert not (tmp_path / "t.rank1.csv").exists()
