"""Looks at the installation, and holds every kernel against its plain-MLX reference on this machine.

``python -m mlx_bulwark.doctor`` prints the report as JSON and needs no optional package; ``mlx-bulwark doctor`` is the
same for people. Kernels run in a process of their own: a fault of a GPU ends that process and becomes a line.
"""

import importlib
import json
import mmap
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from . import _native
from .ops import clip, ghost, mmd, neighbors, noise, pool, smooth, step, tails

TIME_LIMIT = 600.0  # seconds of a child process; compiling all Metal kernels takes some ten
SIZE = 10_003
KEY = noise.key_from_seed(0)
COUNTER = 2**32 - 100  # its high word changes on the way
# A value that is off by less than 1e-5 may be rounded to the neighbouring half: of the largest value, that is one ulp.
TOLERANCES = {mx.float32: 1e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


Array = np.ndarray[Any, np.dtype[Any]]


class Target(NamedTuple):
    """What runs the ops."""

    backend: str
    device: str


@dataclass(frozen=True)
class Check:
    """One op on one backend.

    Attributes:
        op: Name of the public function.
        backend: ``"native"``, ``"metal-sim"`` or, on a GPU that is not Metal, ``"reference"``.
        device: ``"cpu"`` or ``"gpu"``.
        ok: Whether every case is within its tolerance.
        case: The worst case, or the one that failed.
        error: Its largest difference from the reference on the CPU, over the reference's largest value.
        tolerance: What ``error`` may be.
        seconds: Time of all cases, compilation of kernels included.
        message: What went wrong, where something did.
    """

    op: str
    backend: str
    device: str
    ok: bool
    case: str | None = None
    error: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    message: str | None = None


@dataclass(frozen=True)
class Report:
    """What ``examine`` found.

    Attributes:
        mlx_bulwark: Version of this package.
        python: Version of Python.
        system: Operating system and machine.
        chip: Name of the processor.
        mlx: Version of MLX.
        built_for_mlx: Version of MLX that the extension was built for; None where there is no extension.
        mlx_is_newer: Whether MLX is newer than that.
        abi_key: nanobind's key of the extension.
        mlx_abi_key: The same of MLX; types are shared only between equal keys.
        instruction_set: Of the extension's code for the CPU.
        backend: What runs the ops of this process.
        reason: Why.
        device: MLX's default device.
        metal: Whether MLX has a Metal device.
        gpu: What MLX tells of its GPU.
        checks: One an op and backend.
    """

    mlx_bulwark: str
    python: str
    system: str
    chip: str
    mlx: str
    built_for_mlx: str | None
    mlx_is_newer: bool
    abi_key: str | None
    mlx_abi_key: str | None
    instruction_set: str | None
    backend: str
    reason: str
    device: str
    metal: bool
    gpu: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(c.ok for c in self.checks)

    def summary(self) -> list[tuple[str, str]]:
        """The installation, as names and words."""
        built = f"built for MLX {self.built_for_mlx}" if self.built_for_mlx else "without an extension"
        newer = ", which is newer than that" if self.mlx_is_newer else ""
        same = "the same as MLX's" if self.abi_key == self.mlx_abi_key else f"MLX's is {self.mlx_abi_key}"
        gpu = f"; GPU {self.gpu.get('device_name', self.gpu)}" if self.gpu else ""
        return [
            ("mlx-bulwark", f"{self.mlx_bulwark}, {built}"),
            ("MLX", f"{self.mlx}{newer}"),
            ("Python", self.python),
            ("system", self.system),
            ("chip", f"{self.chip}{gpu}"),
            ("device", f"{self.device}; Metal {'is there' if self.metal else 'is not there'}"),
            ("backend", f"{self.backend}: {self.reason}"),
            ("instructions", self.instruction_set or "none: no extension is loaded"),
            ("ABI key", f"{self.abi_key}, {same}" if self.abi_key else "none"),
        ]

    def to_json(self) -> str:
        """The report as JSON, with ``ok``."""
        return json.dumps({"kind": "doctor"} | asdict(self) | {"ok": self.ok}, indent=1)


def examine(*, checks: bool = True, isolated: bool = True, simulator: Path | None = None) -> Report:
    """Look at the installation and run every kernel on every backend of this machine.

    Args:
        checks: Run the kernels; otherwise the report has no checks.
        isolated: Run the kernels in child processes, which a GPU's fault may kill; otherwise in this process.
        simulator: The folder ``tests/msl`` of a checkout, to run the Metal kernels in its simulator as well.

    Returns:
        Report: Never raises for what is wrong with a kernel: that is a check with a message.

    Example:
        >>> from mlx_bulwark import doctor
        >>> doctor.examine(isolated=False).ok
        True
    """
    report = _installation()
    run = _run_isolated if isolated else _run
    for target in _targets(isolated, simulator) if checks else ():
        report.checks.extend(run(target, list(CASES), simulator))
    return report


# The installation.


def chip() -> str:
    """Name of the processor."""
    try:
        if sys.platform == "darwin":
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except (OSError, subprocess.CalledProcessError):
        found = None
    return found[1] if found else platform.machine()


def _installation() -> Report:
    from . import __version__

    reason = _native._load()
    installed = _native.installed_mlx()
    built = _built_for()
    darwin = sys.platform == "darwin"
    system = f"macOS {platform.mac_ver()[0]}" if darwin else f"{platform.system()} {platform.release()}"
    return Report(
        mlx_bulwark=__version__,
        python=platform.python_version(),
        system=f"{system} {platform.machine()}",
        chip=chip(),
        mlx=installed,
        built_for_mlx=built,
        mlx_is_newer=built is not None and _numbers(installed) > _numbers(built),
        abi_key=_abi_key(next(iter(Path(__file__).parent.glob("_ext.*.so")), None)),
        mlx_abi_key=_abi_key(Path(mx.__file__)),
        instruction_set=None if reason else _native.ext.isa(),
        backend=_native.backend().name,
        reason=_native.backend().reason,
        device=str(mx.default_device()),
        metal=mx.metal.is_available(),
        gpu=dict(mx.device_info(mx.gpu)) if mx.is_available(mx.gpu) else {},
    )


def _built_for() -> str | None:
    try:
        from . import _built
    except ImportError:
        return None
    return str(_built.MLX)


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)[:3]]


def _abi_key(binary: Path | None) -> str | None:
    """The key under which nanobind shares types between extensions, as it stands in a binary."""
    if binary is None or binary.stat().st_size == 0:
        return None
    with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"nanobind_[a-z]+_lib[a-z]+_[a-z0-9_]+", content)
        return found[0].decode() if found else None


# The kernels.


class Case(NamedTuple):
    """One way to run an op: called with ``stream=``, it gives the arrays to compare, in a tree."""

    name: str
    run: Callable[..., Any]
    tolerance: float = TOLERANCES[mx.float32]


Cases = Callable[[], Iterator[Case]]
CASES: dict[str, Cases] = {}


def _op(cases: Cases) -> Cases:
    """Enter the cases of the op of that name."""
    CASES[cases.__name__.lstrip("_")] = cases
    return cases


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _normals(shape: Sequence[int], dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).astype(dtype)


def _gradients(dtype: mx.Dtype) -> list[mx.array]:
    return [_normals((33, *shape), dtype) for shape in ((SIZE,), (31, 8), (), (0,))]


@_op
def _gaussian() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCES.items():
        yield Case(_name(dtype), partial(noise.gaussian, SIZE, 2.0, KEY, COUNTER, dtype=dtype), tolerance)


@_op
def _add_gaussian() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCES.items():
        leaves = [_normals(shape, dtype) for shape in ((SIZE,), (7, 3), ())]
        yield Case(_name(dtype), partial(noise.add_gaussian, leaves, 2.0, KEY, COUNTER), tolerance)


@_op
def _random_bits() -> Iterator[Case]:
    yield Case("uint32", partial(noise.random_bits, SIZE, KEY, COUNTER, domain="test"), 0.0)


@_op
def _sample_sq_norms() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(clip.sample_sq_norms, _gradients(dtype)))
    yield Case("small", partial(clip.sample_sq_norms, _normals((33, 31))))


@_op
def _clip_factors() -> Iterator[Case]:
    for mode in clip.MODES:
        norms, mask = mx.square(_normals((SIZE,))), _normals((SIZE,)) > 0
        yield Case(mode, partial(clip.clip_factors, norms, 1.0, mode, mask))


@_op
def _clipped_sum() -> Iterator[Case]:
    factors = mx.array([0.0, 1.0, 0.5] * 11)
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(clip.clipped_sum, _gradients(dtype), factors))
    yield Case("with noise", partial(clip.clipped_sum, _gradients(mx.float32), factors, 1.0, KEY, COUNTER))
    yield Case("wide", partial(clip.clipped_sum, _normals((2, 164_000)), factors[1:3]))
    yield Case("short", partial(clip.clipped_sum, _normals((33, 31, 8)), factors, 1.0, KEY, COUNTER))


@_op
def _clip_and_sum() -> Iterator[Case]:
    mask = mx.array([True, True, False] * 11)
    for mode in clip.MODES:
        for dtype in TOLERANCES:
            run = partial(clip.clip_and_sum, _gradients(dtype), 100.0, mode, mask, 1.0, KEY, COUNTER)
            yield Case(f"{_name(dtype)}, {mode}", run)
    yield Case("short", partial(clip.clip_and_sum, _normals((33, 31, 8)), 10.0, "flat", mask, 1.0, KEY, COUNTER))


def _layer(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    return _normals((5, 70, 33), dtype), _normals((5, 70, 17), dtype)


def _image(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    return _normals((5, 9, 8, 6), dtype), _normals((5, 5, 4, 4), dtype)


CONVOLUTION: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2, "bias": True}
SEGMENTS: dict[str, Any] = {"segments": mx.array([0, 1, 0, 2, 1]), "num_segments": 3}
FACTORS = mx.array([1.0, 0.0, 0.5, 0.25, 2.0])


def _rows(dtype: mx.Dtype, *shapes: Sequence[int]) -> list[mx.array]:
    return [_normals(shape, dtype) for shape in shapes]


@_op
def _linear_sq_norms() -> Iterator[Case]:
    for dtype in TOLERANCES:
        for method in ("gram", "direct"):
            run = partial(ghost.linear_sq_norms, *_layer(dtype), bias=True, method=method, **SEGMENTS)
            yield Case(f"{_name(dtype)}, {method}", run)
        yield Case(f"{_name(dtype)}, one row", partial(ghost.linear_sq_norms, *_rows(dtype, (33, 31), (33, 8))))
        for method, sides in {"gram": ((86, 65, 3), (86, 65, 2)), "direct": ((256, 2, 33), (256, 2, 34))}.items():
            run = partial(ghost.linear_sq_norms, *_rows(dtype, *sides), method=method)
            yield Case(f"{_name(dtype)}, {method}, many", run)


@_op
def _linear_sample_grads() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(ghost.linear_sample_grads, *_layer(dtype), bias=True, **SEGMENTS))


@_op
def _linear_clipped_sum() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(ghost.linear_clipped_sum, *_layer(dtype), FACTORS, bias=True))


@_op
def _conv_sq_norms() -> Iterator[Case]:
    for dtype in TOLERANCES:
        x, dy = _image(dtype)
        for method in ("gram", "direct"):
            run = partial(ghost.conv_sq_norms, x, dy, 3, method=method, **CONVOLUTION, **SEGMENTS)
            yield Case(f"{_name(dtype)}, {method}", run)


@_op
def _convolve() -> Iterator[Case]:
    for dtype in TOLERANCES:
        x, _ = _image(dtype)
        weight = _normals((4, 3, 3, 3), dtype)
        yield Case(_name(dtype), partial(ghost.convolve, x, weight, weight[:, 0, 0, 0], stride=2, padding=1, groups=2))


@_op
def _max_pool() -> Iterator[Case]:
    for dtype in TOLERANCES:
        x, _ = _image(dtype)
        yield Case(_name(dtype), partial(pool.max_pool, x, (2, 3)))
        yield Case(f"{_name(dtype)}, its gradient", partial(_max_pool_gradient, x))


def _max_pool_gradient(x: mx.array, *, stream: Any) -> mx.array:
    return cast(mx.array, mx.grad(lambda a: pool.max_pool(a, (2, 3), stream=stream).sum())(x))


@_op
def _conv_sample_grads() -> Iterator[Case]:
    for dtype in TOLERANCES:
        x, dy = _image(dtype)
        yield Case(_name(dtype), partial(ghost.conv_sample_grads, x, dy, 3, **CONVOLUTION, **SEGMENTS))


@_op
def _conv_clipped_sum() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(ghost.conv_clipped_sum, *_image(dtype), FACTORS, 3, **CONVOLUTION))


def _lookups(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    tokens = mx.array(np.random.default_rng(0).integers(0, 17, (5, 70)).astype(np.int32))
    return tokens, _normals((5, 70, 33), dtype)


@_op
def _embedding_sq_norms() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(ghost.embedding_sq_norms, *_lookups(dtype), padding_index=3, **SEGMENTS))


@_op
def _embedding_clipped_sum() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(ghost.embedding_clipped_sum, *_lookups(dtype), FACTORS, 17))


@_op
def _embedding_linear_products() -> Iterator[Case]:
    for dtype in TOLERANCES:
        run = partial(ghost.embedding_linear_products, *_lookups(dtype), *_layer(dtype), **SEGMENTS)
        yield Case(_name(dtype), run)


@_op
def _noisy_copies() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCES.items():
        for distribution in smooth.DISTRIBUTIONS:
            run = partial(smooth.noisy_copies, _normals((31, 33), dtype), 10, 0.5, KEY, COUNTER)
            yield Case(f"{_name(dtype)}, {distribution}", partial(run, distribution=distribution), tolerance)
    x = mx.arange(SIZE) / SIZE
    yield Case("clipped", partial(smooth.noisy_copies, x, 2, 0.5, KEY, COUNTER, bounds=(0, 1)))
    # Where the noise is off by an ulp, a value in the middle between two of the grid may go to the other.
    run = partial(smooth.noisy_copies, x, 2, 0.5, KEY, COUNTER, bounds=(0, 1), levels=1001)
    yield Case("grid", run, 1.001e-3)


@_op
def _count_votes() -> Iterator[Case]:
    for dtype in TOLERANCES:
        for classes in (10, 1001):
            run = partial(smooth.count_votes, _normals((77, classes), dtype), mx.arange(classes + 1, dtype=mx.int32))
            yield Case(f"{_name(dtype)}, {classes} classes", run, 0.0)


@_op
def _knn() -> Iterator[Case]:
    for dtype in TOLERANCES:
        x, y = _rows(dtype, (70, 33), (300, 33))
        for metric in neighbors.METRICS:
            yield Case(f"{_name(dtype)}, {metric}", partial(neighbors.knn, x, y, 7, metric))
    yield Case("themselves", partial(neighbors.knn, _normals((300, 33)), k=40))


def _discrepancies(*samples: mx.array, stream: _native.Stream, **arguments: Any) -> mx.array:
    """The statistic, and those of permutations."""
    found = mmd.mmd(*samples, stream=stream, **arguments)
    return mx.array([found.statistic, *found.permuted])


@_op
def _mmd() -> Iterator[Case]:
    for dtype in TOLERANCES:
        x, y = _rows(dtype, (70, 33), (300, 33))
        yield Case(_name(dtype), partial(_discrepancies, x, y + 1, permutations=40, bandwidth=[5.0, 9.0]))
    near = mx.where(mx.arange(200)[:, None] % 3 == 0, 1.0, -1.0) * 2**20 + mx.round(4 * _normals((200, 3)))
    yield Case("near each other and far from others", partial(_discrepancies, near[:90], near[90:] + 8, bandwidth=4.0))


def _with_holes(x: mx.array) -> mx.array:
    """NaN and infinities at some places."""
    at = mx.arange(x.size).reshape(x.shape) % 101
    return mx.where(at == 0, float("nan"), mx.where(at == 7, float("inf"), x)).astype(x.dtype)


def _seven_stats(x: mx.array, *, stream: _native.Stream) -> list[mx.array]:
    """Without what rounding took from the mean, which is another one where sums go another way."""
    return list(tails.column_stats(x, stream=stream)[:7])


@_op
def _column_stats() -> Iterator[Case]:
    for dtype in TOLERANCES:
        for shape in ((SIZE, 3), (33, 257)):
            x = _with_holes(_normals(shape, dtype) + 100.0).astype(dtype)
            yield Case(f"{_name(dtype)}, {shape[0]} x {shape[1]}", partial(_seven_stats, x))


@_op
def _merge_column_stats() -> Iterator[Case]:
    chunks = [tails.column_stats_reference(_normals((n, 5)) + n, stream=mx.cpu) for n in (40, 7)]
    yield Case("float32", partial(tails.merge_column_stats, *chunks))


@_op
def _quantile_table() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(tails.quantile_table, _normals((2003, 5), dtype)))


@_op
def _tail_scores() -> Iterator[Case]:
    for dtype in TOLERANCES:
        table = tails.quantile_table_reference(_normals((501, 19), dtype), stream=mx.cpu)
        x = _normals((301, 19), dtype) * 1.1
        for method, aggregation in (("ecod", "per_feature"), ("copod", "per_feature"), ("ecod", "paper")):
            for per_column in (False, True):
                run = partial(tails.tail_scores, x, table, method, aggregation, per_column)
                yield Case(f"{_name(dtype)}, {method}, {aggregation}", run)


@_op
def _histogram_table() -> Iterator[Case]:
    for dtype in TOLERANCES:
        yield Case(_name(dtype), partial(tails.histogram_table, _with_holes(_normals((SIZE, 3), dtype))))


@_op
def _histogram_scores() -> Iterator[Case]:
    for dtype in TOLERANCES:
        table = tails.histogram_table_reference(_normals((501, 19), dtype), stream=mx.cpu)
        for per_column in (False, True):
            run = partial(tails.histogram_scores, _normals((301, 19), dtype) * 1.2, table, 0.5, per_column)
            yield Case(_name(dtype), run)


@_op
def _robust_scale() -> Iterator[Case]:
    table = tails.quantile_table_reference(_normals((501, 19)), stream=mx.cpu)
    yield Case("float32", partial(tails.robust_scale, table))


@_op
def _robust_zscore() -> Iterator[Case]:
    for dtype in TOLERANCES:
        run = partial(tails.robust_zscore, _normals((301, 19), dtype), _normals((19,)), mx.abs(_normals((19,))))
        yield Case(_name(dtype), run)


@_op
def _mahalanobis() -> Iterator[Case]:
    for dtype in TOLERANCES:
        for d in (1, 19, 140):
            cholesky = mx.tril(0.1 * _normals((d, d))) + mx.eye(d)
            run = partial(tails.mahalanobis, _normals((301, d), dtype), _normals((d,)), cholesky)
            yield Case(f"{_name(dtype)}, {d} columns", run)


@_op
def _spectral_scores() -> Iterator[Case]:
    for dtype in TOLERANCES:
        x = (_normals((301, 19)) * mx.array([2.0**-i for i in range(19)])).astype(dtype)
        yield Case(_name(dtype), partial(tails.spectral_scores, x, 2))


@_op
def _projected_step() -> Iterator[Case]:
    eps = mx.array([0.1, 1.0, 10.0])
    for dtype, tolerance in TOLERANCES.items():
        for norm in step.NORMS:
            rows = [mx.clip(_normals((3, 1001), dtype) * scale, 0, 1) for scale in (1, 0.5, 0.9)]
            run = partial(step.projected_step, rows[0], rows[1], rows[2], eps, 0.5, norm, (0, 1))
            yield Case(f"{_name(dtype)}, {norm}", run, tolerance)


@_op
def _random_start() -> Iterator[Case]:
    for norm in step.NORMS:
        yield Case(norm, partial(step.random_start, mx.zeros((3, 33)), 1.0, norm, seed=0))


# Running them.


def _targets(isolated: bool, simulator: Path | None) -> list[Target]:
    native = _native._load() is None
    targets = [Target("native", "cpu")] if native else []
    if mx.is_available(mx.gpu):
        targets.append(Target("native" if native and mx.metal.is_available() else "reference", "gpu"))
    if native and (simulator or (_native.simulator() and not isolated)):
        targets.append(Target("metal-sim", "cpu"))
    return targets


def _run(target: Target, names: Sequence[str], simulator: Path | None) -> Iterator[Check]:
    """Check ops in this process, one after the other."""
    try:
        if target.backend == "metal-sim" and simulator:
            _connect(simulator)
    except Exception as e:
        yield from (_failed(target, name, f"the simulator does not start: {e}") for name in names)
        return
    for name in names:
        start = time.perf_counter()
        check = _check(target, name)
        yield replace(check, seconds=time.perf_counter() - start)


def _connect(simulator: Path) -> None:
    sys.path.insert(0, str(simulator.resolve().parent))
    try:
        bridge = importlib.import_module("msl.bridge")
    finally:
        del sys.path[0]
    _native.connect(bridge.Simulator())


def _check(target: Target, name: str) -> Check:
    """Run the cases of an op; the worst of them stands for all."""
    worst, worst_share = Check(name, *target, ok=True), -1.0
    case = "its cases"
    try:
        for case, run, tolerance in CASES[name]():
            error, report = _compare(target, run)
            if report or not error <= tolerance:
                message = report or "it differs from the reference"
                return Check(name, *target, False, case, error, tolerance, message=message)
            if (share := error / (tolerance or 1.0)) > worst_share:
                worst, worst_share = Check(name, *target, True, case, error, tolerance), share
    except Exception as e:
        return replace(_failed(target, name, str(e) or type(e).__name__), case=case)
    return worst


def _compare(target: Target, run: Callable[..., Any]) -> tuple[float, str | None]:
    """The largest difference from the reference, and what the simulator reports."""
    with _native.using("reference"):
        want = _evaluated(run(stream=mx.cpu))
    with _native.using(target.backend):
        got = _evaluated(run(stream=getattr(mx, target.device)))
        simulator = _native.simulator() if target.backend == "metal-sim" else None
        reports = simulator.reports if simulator else []
    return _largest_difference(got, want), "\n".join(reports) or None


def _failed(target: Target, name: str, message: str) -> Check:
    return Check(name, *target, ok=False, message=message)


def _evaluated(tree: Any) -> list[Array]:
    arrays = [x for _, x in cast(list[tuple[str, mx.array | None]], tree_flatten(tree)) if x is not None]
    mx.eval(arrays)
    return [np.array(x.astype(mx.float32) if x.dtype in TOLERANCES else x) for x in arrays]


def _largest_difference(got: list[Array], want: list[Array]) -> float:
    """Over all arrays, each by its largest value."""
    largest = 0.0
    for x, y in zip(got, want, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"the shape is {x.shape}, not {y.shape}")
        if not np.isfinite(x).all():
            raise ValueError("the result holds NaN or infinity")
        if x.size:
            difference = abs(x.astype(np.float64) - y.astype(np.float64)).max()
            largest = max(largest, float(difference / (abs(y).max() or 1.0)))
    return largest


# A child process takes one target and writes a line of JSON an op.


def _run_isolated(target: Target, names: Sequence[str], simulator: Path | None) -> Iterator[Check]:
    """Check ops in child processes: a new one after each op that killed the last."""
    left = list(names)
    while left:
        call = json.dumps([target, left, simulator and str(simulator)])
        found, end = _child(call)
        yield from found
        left = left[len(found) :]
        if left:
            yield _failed(target, left.pop(0), end)


def _child(call: str) -> tuple[list[Check], str]:
    """What a child process found, and how it ended."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from mlx_bulwark import doctor; doctor._serve()"
    with subprocess.Popen(
        [sys.executable, "-c", code, call],
        env=os.environ | {"BULWARK_BACKEND": "auto"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            out, err = child.communicate(timeout=TIME_LIMIT)
            end = f"the process ended with status {child.returncode}"
            if child.returncode < 0:
                end = f"the process was killed by {signal.Signals(-child.returncode).name}"
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            end = f"it did not end within {TIME_LIMIT:.0f} s"
    checks = [Check(**json.loads(line)) for line in out.splitlines() if line.startswith('{"op"')]
    return checks, f"{end}: {err.strip()}" if err.strip() else end


def _serve() -> None:
    target, names, simulator = json.loads(sys.argv[1])
    for check in _run(Target(*target), names, simulator and Path(simulator)):
        print(json.dumps(asdict(check)), flush=True)


if __name__ == "__main__":
    report = examine()
    print(report.to_json())
    sys.exit(not report.ok)
