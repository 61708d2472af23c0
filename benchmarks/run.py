"""Runs benchmark suites: ``python benchmarks/run.py [SUITE ...] [--device gpu] [--json FILE] [--quick]``.

A suite is a file ``benchmarks/<suite>.py`` with a function ``run(bench)``:

    def run(bench):
        torch = bench.peer("torch")  # None where it is not installed
        contestants = {"ours": lambda: bw.gaussian((n,), 1.0, key, 0)}
        if torch:
            contestants["torch"] = lambda: torch.randn(n)
        bench.check("gaussian", lambda: moments_are_right(contestants["ours"]()))
        times = bench.compare(contestants)
        bench.row("gaussian/throughput", n / times["ours"].median / 1e9, "G/s", better="higher")
        if torch:
            bench.row("gaussian/vs_torch_randn", times.ratio("torch", "ours"), "x", peer="torch.randn", better="higher")

The part of a row's name before its last slash is its case. A row is written only when ``bench.check`` of its case ran
and held; otherwise the run ends with status 1 and says which case it was. Rows reach the JSON file as they are
released, so that a run that dies keeps what it has measured.

``--device gpu`` runs the suites on an Apple GPU, without the peers, which are measured on the CPU. Its JSON file holds
the machine beside the rows, so that it can be sent in as it is.
"""

import argparse
import ctypes
import gc
import importlib
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SUITE_LIMIT = 600.0  # seconds, of a suite that has no SECONDS of its own
BLAS = "libopenblas.so.0"
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BULWARK_NUM_THREADS")


class Timing(NamedTuple):
    """Seconds of one contestant."""

    median: float
    low: float
    high: float
    rounds: int


class Timings(dict[str, Timing]):
    """One ``Timing`` a contestant."""

    def ratio(self, numerator: str, denominator: str) -> float:
        """Ratio of two medians; ``ratio("peer", "ours")`` is how many times faster ours is."""
        return self[numerator].median / self[denominator].median


@dataclass
class Bench:
    """What a suite's ``run`` gets."""

    suite: str
    quick: bool = False
    on_change: Callable[[], None] = lambda: None
    device: str = "cpu"
    chip_bandwidth: float | None = None  # GB/s, as published
    threads: int = THREADS
    data: Path | None = None  # folder of data sets, for the suites that want one
    problems: list[str] = field(default_factory=list)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _checks: dict[str, bool] = field(default_factory=dict)
    _missing: set[str] = field(default_factory=set)

    def row(self, name: str, value: float, unit: str, *, better: str, peer: str | None = None) -> None:
        """Report a figure.

        Args:
            name: ``"case/metric"``; the suite's name is put before it.
            value: The figure.
            unit: Its unit; ``"x"`` for a ratio.
            better: ``"lower"`` or ``"higher"``.
            peer: What it is compared with.
        """
        if better not in ("lower", "higher"):
            raise ValueError(f"[bench] better must be 'lower' or 'higher' but is {better!r}")
        if "/" not in name or name.startswith(f"{self.suite}/"):
            raise ValueError(f"[bench] name must be 'case/metric', without the suite, but is {name!r}")
        if not math.isfinite(value):
            self._problem(f"{name} must be a finite figure but is {value}")
            return
        full = f"{self.suite}/{name}"
        self._rows.append({"name": full, "value": float(value), "unit": unit, "peer": peer, "better": better})
        if self._checks.get(_case(full)):
            self._print(self._rows[-1])
            self.on_change()

    def check(self, case: str, holds: bool | Callable[[], Any]) -> bool:
        """Open the gate of a case: its rows are written only when each of its checks held.

        Args:
            case: The part of the rows' names between the suite and the metric.
            holds: The result, or a function that returns it or raises; a function that returns None has held.

        Returns:
            Whether it held.
        """
        full = f"{self.suite}/{case}"
        try:
            result = holds() if callable(holds) else holds
            ok = result is None or bool(result)
            why = "its correctness check failed"
        except Exception as e:
            ok, why = False, f"its correctness check raised {type(e).__name__}: {e}"
        first = full not in self._checks
        self._checks[full] = ok and self._checks.get(full, True)
        if not ok:
            self._problem(f"{case}: {why}; its rows are not written")
        elif first:
            for r in self._rows:
                if _case(r["name"]) == full:
                    self._print(r)
        self.on_change()
        return ok

    def time(self, f: Callable[[], Any], *, rounds: int | None = None) -> Timing:
        """Time one function; see ``compare``."""
        return self.compare({"": f}, rounds=rounds)[""]

    def compare(self, contestants: dict[str, Callable[[], Any]], *, rounds: int | None = None) -> Timings:
        """Time functions against each other, interleaved round by round so that a busy machine hits all alike.

        Args:
            contestants: Name -> function without arguments. MLX arrays in what it returns are evaluated inside the
                timed part; anything else must be finished when the function returns.
            rounds: How many rounds; by default what fits into some ten seconds, 5 to 31 (``--quick``: 3).

        Returns:
            Timings: Seconds of one call, a contestant.
        """
        import mlx.core as mx

        # A GPU idles while Python waits for each call: give it all of them, and wait once.
        evaluate = mx.async_eval if self.device == "gpu" else mx.eval

        def seconds(f: Callable[[], Any], calls: int) -> float:
            mx.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                evaluate(f())
            mx.synchronize()
            return (time.perf_counter() - start) / calls

        for f in contestants.values():  # caches fill, functions compile
            seconds(f, 1)
        once = {name: seconds(f, 1) for name, f in contestants.items()}
        calls = {name: max(1, round(0.005 / max(t, 1e-7))) for name, t in once.items()}
        if rounds is None:
            a_round = sum(once[name] * calls[name] for name in contestants)
            rounds = 3 if self.quick else max(5, min(31, round(10 / a_round)))
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        gc.collect()
        gc.disable()
        try:
            for i in range(rounds):
                order = list(contestants)
                for name in order[i % len(order) :] + order[: i % len(order)]:
                    time.sleep(
                        0.01
                    )  # OpenMP's threads spin for milliseconds after their work, into the next one's time
                    samples[name].append(seconds(contestants[name], calls[name]))
        finally:
            gc.enable()
        return Timings({n: Timing(statistics.median(s), min(s), max(s), rounds) for n, s in samples.items()})

    def peer(self, module: str) -> Any:
        """Import a peer; where it is not installed say so once and return None: its rows are skipped."""
        try:
            if self.device == "gpu":
                raise ImportError("it would run on the CPU")
            peer = importlib.import_module(module)
        except ImportError as e:
            if module not in self._missing:
                print(f"  {self.suite}: no {module} ({e}): rows with this peer are skipped")
                self._missing.add(module)
            return None
        if module == "torch":
            peer.set_num_threads(THREADS)
        return peer

    def bandwidth(self) -> float:
        """Bytes a second that all cores together read from memory, measured once in this run; published of a GPU."""
        return self.chip_bandwidth * 1e9 if self.chip_bandwidth else _limits.bandwidth

    def peak_memory(self, setup: Callable[..., Callable[[], Any]], *arguments: Any, steps: int = 3) -> int:
        """Resident-set peak (of a GPU: MLX's peak) of a function in a child process of its own, less its floor.

        Args:
            setup: A function at the top level of the suite; it gets ``arguments`` and returns the step, a function
                without arguments. What it imports, loads and builds is the floor.
            arguments: JSON values.
            steps: How often the step runs.

        Returns:
            int: Bytes.
        """
        call = json.dumps(
            {
                "module": setup.__module__,
                "setup": setup.__name__,
                "args": arguments,
                "steps": steps,
                "device": self.device,
            }
        )
        child = subprocess.run([sys.executable, __file__, "--child", call], capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"[bench] the child process of {setup.__name__} failed:\n{child.stderr}")
        return int(child.stdout.splitlines()[-1])

    def released(self) -> list[dict[str, Any]]:
        """Rows whose case passed."""
        return [r for r in self._rows if self._checks.get(_case(r["name"]))]

    def close(self) -> None:
        """Name every case that has rows but was never checked."""
        for case in dict.fromkeys(_case(r["name"]) for r in self._rows):
            if case not in self._checks:
                self._problem(f"{case.partition('/')[2]}: no correctness check ran; its rows are not written")

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self.suite}/{text}")
        print(f"  FAILED {self.suite}/{text}")

    def _print(self, row: dict[str, Any]) -> None:
        print(f"{row['name']:<52}{row['value']:>12.5g}  {row['unit']:<8}{row['peer'] or '':<24}", flush=True)


def _case(name: str) -> str:
    return name.rpartition("/")[0]


class _Limits:
    @cached_property
    def bandwidth(self) -> float:
        import numpy as np

        pieces = np.split(np.ones(THREADS * (32 << 20), np.float32), THREADS)
        best = math.inf
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in range(10):
                for read in (np.max, lambda p: np.dot(p, p)):  # either is the faster one on some machine
                    start = time.perf_counter()
                    list(pool.map(read, pieces))
                    best = min(best, time.perf_counter() - start)
        return sum(p.nbytes for p in pieces) / best


_limits = _Limits()


def _resident(entry: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"^{entry}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _child(call: dict[str, Any]) -> None:
    import mlx.core as mx

    on_gpu = call["device"] == "gpu"
    mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
    step = getattr(importlib.import_module(call["module"]), call["setup"])(*call["args"])
    gc.collect()
    mx.clear_cache()
    floor = mx.get_active_memory() if on_gpu else _resident_floor()
    mx.reset_peak_memory()
    for _ in range(call["steps"]):
        mx.eval(step())
    print((mx.get_peak_memory() if on_gpu else _resident("VmHWM")) - floor)


def _resident_floor() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        return _resident("VmRSS")
    except OSError:
        return _resident("VmHWM")


def _has_blas() -> bool:
    try:
        ctypes.CDLL(BLAS)
    except OSError:
        return False
    return True


def _environment() -> dict[str, str]:
    """The same number of threads for everybody, and on Linux the same fast BLAS."""
    changes = dict.fromkeys(THREAD_VARIABLES, str(THREADS))
    preload = os.environ.get("LD_PRELOAD", "")
    if sys.platform == "linux" and BLAS not in preload and _has_blas():
        changes["LD_PRELOAD"] = f"{BLAS} {preload}".strip()
    # Its idle threads wait in a loop, and take a core from whoever works next: for 2^4 cycles, not 2^26.
    changes["OPENBLAS_THREAD_TIMEOUT"] = "4"
    return changes


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def _header(machine: dict[str, Any]) -> None:
    cores = f"instruction set {machine['instruction_set']}, {THREADS} threads"
    print(f"{machine['chip']}, {cores}, backend {machine['backend']} on the {machine['device'].upper()}")
    print(", ".join(_version(p) for p in ("mlx-bulwark", "mlx", "numpy", "torch", "opacus")))
    if machine["device"] == "gpu":
        print(f"memory bandwidth of the chip, as published: {machine['bandwidth']:g} GB/s")
    if sys.platform != "linux":
        print("BLAS: the system's")
    elif BLAS in os.environ.get("LD_PRELOAD", ""):
        print(f"BLAS: {BLAS} preloaded for everybody in this process")
    else:
        print("BLAS: the one inside the MLX wheel, SLOW by more than ten times: `apt install libopenblas0-pthread`")
    print()


def _machine(device: str, bandwidth: float | None) -> dict[str, Any]:
    """What the rows were measured on; bandwidth in GB/s."""
    from mlx_bulwark import doctor

    report = doctor.examine(checks=False)
    if device == "gpu":
        from benchmarks import chips

        name = str(report.gpu.get("device_name", report.chip))
        bandwidth = bandwidth or chips.bandwidth(name, os.cpu_count() or 0)
        if bandwidth is None:
            sys.exit(f"benchmarks/run.py: the memory bandwidth of {name} is not known here: give it by --bandwidth")
    return {k: v for k, v in asdict(report).items() if k != "checks"} | {"device": device, "bandwidth": bandwidth}


def suites() -> list[str]:
    """Names of the suites that stand beside this file."""
    return sorted(p.stem for p in HERE.glob("*.py") if "def run(bench" in p.read_text() and p.stem != "run")


def run(
    names: list[str], *, quick: bool, json_file: Path | None, machine: dict[str, Any], data: Path | None = None
) -> list[str]:
    """Run suites, print their tables and write the JSON; return what went wrong."""
    done: list[Bench] = []

    def write() -> None:
        if json_file:
            rows = [r for b in done for r in b.released()]
            part = json_file.with_name(json_file.name + ".part")
            content = {"machine": machine, "rows": rows} if machine["device"] == "gpu" else rows
            part.write_text(json.dumps(content, indent=1) + "\n")
            part.replace(json_file)

    write()  # a path that cannot be written fails before an hour of work
    for name in names:
        bench = Bench(name, quick, write, machine["device"], machine["bandwidth"], data=data)
        done.append(bench)
        print(f"{name:<52}{'value':>12}  {'unit':<8}{'peer'}", flush=True)
        start, suite = time.perf_counter(), None
        try:
            suite = importlib.import_module(f"benchmarks.{name}")
            suite.run(bench)
        except Exception as e:
            traceback.print_exc()
            bench._problem(f"the suite raised {type(e).__name__}: {e}")
        bench.close()
        write()
        seconds = time.perf_counter() - start
        limit = getattr(suite, "SECONDS", SUITE_LIMIT)
        if seconds > limit:
            bench._problem(f"the suite must end within {limit:.0f} s but took {seconds:.0f} s")
        print(f"{name}: {seconds:.1f} s\n", flush=True)
    return [p for b in done for p in b.problems]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="Measure mlx-bulwark against its peers.")
    parser.add_argument("suite", nargs="*", help="which suites to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of the suites and end")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs; figures are rough")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where MLX computes (default: cpu)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the GPU's memory, if its chip is not known")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data sets, for outliers_quality; without: skipped")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args()
    known = suites()
    if options.list:
        print("\n".join(known))
        return 0
    if unknown := sorted(set(options.suite) - set(known)):
        parser.error(f"no suite {', '.join(unknown)}; there are: {', '.join(known)}")
    machine = _prepare(options)
    _header(machine)
    problems = run(
        options.suite or known, quick=options.quick, json_file=options.json, machine=machine, data=options.data
    )
    for p in problems:
        print(f"FAILED {p}")
    return 1 if problems else 0


def _prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Choose the device, and say what machine it is on."""
    import mlx.core as mx

    if options.device == "gpu" and not mx.metal.is_available():
        sys.exit("benchmarks/run.py: --device gpu needs a Metal device but MLX has none on this machine")
    mx.set_default_device(getattr(mx, options.device))
    return _machine(options.device, options.bandwidth)


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # suites are imported as benchmarks.<suite>, so that no suite shadows a package
    if sys.argv[1:2] == ["--child"]:
        _child(json.loads(sys.argv[2]))
        sys.exit(0)
    # LD_PRELOAD and the threads of OpenBLAS and OpenMP are read when a process starts: start again with them.
    wanted = _environment()
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    sys.exit(main())
