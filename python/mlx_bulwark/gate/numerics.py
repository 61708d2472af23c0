"""A look inside a model: where numbers overflow, vanish or blow up, and whether gradients are what they should be."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..attacks.base import check_model

NEAR_OVERFLOW = 0.25  # of the largest number of a dtype
STEEP = 1e4  # growth of a relative change in one layer
STEPS = (2.0**-7, 2.0**-10)  # of finite differences, over the size of values: a kink is seldom near both
ROUNDING = 32 * 2.0**-24  # of a layer's output, with room for sums inside of it
ACCEPTED = 1e-2  # relative error of a gradient that finite differences do not hold against it


@dataclass(frozen=True)
class LayerNumerics:
    """What was seen of a layer.

    Attributes:
        name: Path in the model; ``""`` is the model itself.
        kind: Class, or name of a function in a ``Sequential``.
        dtype: Of its output.
        largest: Largest finite magnitude of its output.
        range_share: That over the largest number of the dtype.
        nan: NaN among its output.
        inf: Infinities among its output.
        underflow: Share of its output that float32 has and the dtype lost; in float32 the subnormal numbers.
        amplification: Growth of a small relative change, output over input, the median over random directions.
        gradient_error: Relative error of ``mx.grad`` along random directions, the median; None if it was not checked.
        faults: What is wrong, in words; only of what begins in this layer.
    """

    name: str
    kind: str
    dtype: str
    largest: float
    range_share: float
    nan: int
    inf: int
    underflow: float
    amplification: float | None
    gradient_error: float | None
    faults: tuple[str, ...]


@dataclass(frozen=True)
class NumericsReport:
    """What was seen of a model.

    Attributes:
        layers: Each call of a layer, in the order in which they ended.
    """

    layers: tuple[LayerNumerics, ...]

    @property
    def ok(self) -> bool:
        """Whether no layer has a fault."""
        return not self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """All faults, each with its layer."""
        return tuple(f"{layer.name or 'model'} ({layer.kind}): {f}" for layer in self.layers for f in layer.faults)

    def table(self) -> str:
        """Return the report as text."""
        width = max((len(f"{layer.name or 'model'} ({layer.kind})") for layer in self.layers), default=5)
        lines = [
            f"{'layer':<{width}}  {'dtype':<9} {'largest':>9} {'range':>8} {'NaN':>6} {'inf':>6} {'underfl.':>8} "
            f"{'amplif.':>8} {'grad err.':>9}"
        ]
        for layer in self.layers:
            lines.append(
                f"{f'{layer.name or chr(0)} ({layer.kind})'.replace(chr(0), 'model'):<{width}}  {layer.dtype:<9} "
                f"{layer.largest:>9.3g} {layer.range_share:>8.1e} {layer.nan:>6} {layer.inf:>6} "
                f"{layer.underflow:>8.1%} {_short(layer.amplification):>8} {_short(layer.gradient_error):>9}"
            )
        return "\n".join([*lines, *(self.faults or ("no fault found",))])

    __str__ = table

    def to_json(self) -> str:
        """Return the report as JSON."""
        layers = [{k: _finite(v) for k, v in asdict(layer).items()} for layer in self.layers]
        content = {"kind": "numerics", "ok": self.ok, "faults": self.faults, "layers": layers}
        return json.dumps(content, indent=2, allow_nan=False)


def probe_numerics(
    model: nn.Module, x: mx.array, *, gradients: bool = True, directions: int = 5, seed: int = 0
) -> NumericsReport:
    """Run a model once and a few times slightly beside, and tell layer by layer what happens to its numbers.

    A fault is told of the innermost layer where it begins: NaN or infinities out of finite inputs; values beyond a
    quarter of the dtype's range; a small relative change that grows by more than 10,000; a gradient that is not finite;
    one that central differences contradict. Those are taken with the parameters in float32, by steps of 2^-7 and
    2^-10 of the size of values; near a kink they decide nothing.

    Args:
        model: In evaluation mode. Functions in a ``nn.Sequential`` are layers too.
        x: A small batch, finite, as the model takes it.
        gradients: Look at gradients too, which takes some ten runs of each layer.
        directions: Random directions of changes and of derivatives.
        seed: Of the directions.

    Returns:
        NumericsReport: Layers and faults.

    Raises:
        ValueError: ``x`` is not finite, or the model is in training mode with layers that mind it.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.gate import probe_numerics
        >>> x = mx.full((2, 4), 60.0, dtype=mx.float16)
        >>> probe_numerics(nn.Sequential(nn.ReLU(), mx.exp), x).faults
        ('layers.1 (exp): 8 of 8 values are infinite, out of finite inputs up to 60 (float16 ends at 65504)',)

    Source:
        N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapters 1 and 2.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"[probe_numerics] model must be a mlx.nn.Module but is {type(model).__name__}")
    if not isinstance(x, mx.array) or not bool(mx.isfinite(x).all().item()):
        raise ValueError("[probe_numerics] x must be a finite mlx array but is not")
    if directions < 1:
        raise ValueError(f"[probe_numerics] directions must be positive but is {directions}")
    check_model("probe_numerics", model)
    generator = np.random.default_rng(seed)
    calls = _recorded(model, x)
    beside = [_recorded(model, y) for y in _neighbours(x, directions, generator)]
    beside = [run for run in beside if len(run) == len(calls)]
    not_finite = [gradients and call.finite() and _slopes_break(call, generator) for call in calls]
    with _in_float32(model):
        exact = _recorded(model, x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)
        if len(exact) != len(calls):
            raise ValueError("[probe_numerics] model must call the same layers in float32 but does not")
        errors = [_error(call, directions, generator) if gradients and call.finite() else None for call in exact]
    seen = [
        _Seen(call, exact[i], _amplification(call, [run[i] for run in beside]), errors[i], not_finite[i])
        for i, call in enumerate(calls)
    ]
    own = [_own_faults(s) for s in seen]
    return NumericsReport(tuple(_layer(i, seen, own) for i in range(len(seen))))


class _Call(NamedTuple):
    """A layer, what it took and what it gave."""

    name: str
    kind: str
    run: Callable[..., Any]
    inputs: Any
    output: Any

    def finite(self) -> bool:
        return all(bool(mx.isfinite(a).all().item()) for a in _floats(self.inputs))


class _Seen(NamedTuple):
    call: _Call
    exact: _Call
    amplification: float | None
    gradient_error: float | None
    gradient_not_finite: bool


def _layer(i: int, seen: list[_Seen], own: list[list[tuple[str, str]]]) -> LayerNumerics:
    call, exact, amplification, error, _ = seen[i]
    flat, dtype, end = _values(call)
    largest = float(np.abs(flat[np.isfinite(flat)]).max(initial=0.0))
    nan, inf = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
    inner = {kind for j in range(i) for kind, _ in own[j] if _inside(seen[j].call, call)}
    faults = tuple(words for kind, words in own[i] if kind not in inner)
    share = _underflow(_floats(call.output), exact)
    return LayerNumerics(
        call.name, call.kind, dtype, largest, largest / end, nan, inf, share, amplification, error, faults
    )


def _values(call: _Call) -> tuple[np.ndarray[Any, np.dtype[Any]], str, float]:
    """All floating values that a layer gave, the name of their type and its largest number."""
    outputs = _floats(call.output)
    if not outputs:
        return np.zeros(0), "none", 1.0
    flat = np.concatenate([np.array(a.astype(mx.float32)).astype(np.float64).ravel() for a in outputs])
    return flat, str(outputs[0].dtype).rpartition(".")[2], _end(outputs[0].dtype)


def _own_faults(seen: _Seen) -> list[tuple[str, str]]:
    """Kind and words of what is wrong with a layer's output and was not with its input."""
    call = seen.call
    if not call.finite():
        return []
    flat, dtype, end = _values(call)
    entered = max((_largest(a) for a in _floats(call.inputs)), default=0.0)
    largest = float(np.abs(flat[np.isfinite(flat)]).max(initial=0.0))
    source = f"out of finite inputs up to {entered:.4g} ({dtype} ends at {end:.5g})"
    found = []
    for what, count in (("NaN", int(np.isnan(flat).sum())), ("infinite", int(np.isinf(flat).sum()))):
        if count:
            found.append(("forward", f"{count} of {len(flat)} values are {what}, {source}"))
    if largest > NEAR_OVERFLOW * end:
        found.append(("range", f"near overflow: {largest:.4g} is {largest / end:.0%} of what {dtype} holds"))
    if seen.amplification is not None and seen.amplification > STEEP:
        found.append(("steep", f"a small relative change grows {seen.amplification:.2g} times"))
    if seen.gradient_not_finite:
        found.append(("gradient", "its gradient is not finite, out of finite values"))
    elif seen.gradient_error is not None and seen.gradient_error > ACCEPTED:
        found.append(
            ("gradient", f"its gradient is wrong: finite differences contradict it by {seen.gradient_error:.1%}")
        )
    return found


def _inside(inner: _Call, outer: _Call) -> bool:
    return inner.name != outer.name and (not outer.name or inner.name.startswith(f"{outer.name}."))


def _underflow(outputs: list[mx.array], exact: _Call) -> float:
    """Share of values that are 0 or subnormal although they need not be."""
    if not outputs:
        return 0.0
    least = 2.0**-14 if outputs[0].dtype == mx.float16 else 2.0**-126  # the smallest normal numbers
    lost = total = 0
    for a, b in zip(outputs, _floats(exact.output), strict=False):
        if a.shape == b.shape:
            here, there = np.abs(np.array(a.astype(mx.float32))), np.array(b.astype(mx.float32))
            lost, total = lost + int(((here < least) & (there != 0) & np.isfinite(there)).sum()), total + here.size
    return lost / total if total else 0.0


def _neighbours(x: mx.array, directions: int, generator: np.random.Generator) -> Iterator[mx.array]:
    """Inputs slightly beside x."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return
    size = 32 * {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}.get(x.dtype, 2.0**-23) * _rms(x)
    for _ in range(directions):
        change = mx.array(generator.choice([-1.0, 1.0], x.shape).astype(np.float32))
        yield (x.astype(mx.float32) + size * change).astype(x.dtype)


def _amplification(call: _Call, others: list[_Call]) -> float | None:
    """Relative change of the output over that of the input, where both are to be had."""
    pairs = [(_change(other.output, call.output), _change(other.inputs, call.inputs)) for other in others]
    found = [left / entered for left, entered in pairs if entered > 0 and math.isfinite(left / entered)]
    return float(np.median(found)) if found else None


def _change(other: Any, here: Any) -> float:
    """Distance over size."""
    far = size = 0.0
    for a, b in zip(_floats(other), _floats(here), strict=False):
        if a.shape != b.shape:
            return math.nan
        u, v = (np.array(z.astype(mx.float32)).astype(np.float64) for z in (a, b))
        with np.errstate(invalid="ignore", over="ignore"):
            far = far + float(np.square(u - v).sum())
            size = size + max(float(np.square(u).sum()), float(np.square(v).sum()))
    return math.sqrt(far / size) if size > 0 and math.isfinite(far) and math.isfinite(size) else 0.0


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters of a model in float32, for a while."""
    before = model.parameters()
    model.set_dtype(mx.float32)
    try:
        yield
    finally:
        model.update(before)


def _slopes_break(call: _Call, generator: np.random.Generator) -> bool:
    """Whether a gradient is not finite although all that it comes from is."""
    outputs = _floats(call.output)
    if not all(bool(mx.isfinite(a).all().item()) for a in outputs):
        return False
    slopes = _slopes(call, _leaves(call), _projections(call, generator))
    return slopes is not None and not all(bool(mx.isfinite(s).all().item()) for s in slopes)


def _error(call: _Call, directions: int, generator: np.random.Generator) -> float | None:
    """Median relative error of the gradient along random directions."""
    leaves, errors = _leaves(call), []
    for _ in range(directions):
        projections = _projections(call, generator)
        slopes = _slopes(call, leaves, projections)
        error = None if slopes is None else _contradiction(call, leaves, slopes, projections, generator)
        if error is not None:
            errors.append(error)
    return float(np.median(errors)) if errors else None


def _contradiction(
    call: _Call,
    leaves: list[mx.array],
    slopes: list[mx.array],
    projections: list[mx.array],
    generator: np.random.Generator,
) -> float | None:
    """Relative error of a directional derivative, beyond what kinks and rounding explain."""
    if not all(bool(mx.isfinite(g).all().item()) for g in slopes):
        return None  # told as such
    sizes = [_rms(a) for a in leaves]
    ways = [generator.normal(size=a.shape) * s for a, s in zip(leaves, sizes, strict=True)]
    told = sum(float((np.array(g).astype(np.float64) * w).sum()) for g, w in zip(slopes, ways, strict=True))

    def value(step: float) -> tuple[float, float]:
        moved = [a + mx.array((step * w).astype(np.float32)) for a, w in zip(leaves, ways, strict=True)]
        outputs = [np.array(o).astype(np.float64) for o in _floats(_again(call, moved))]
        terms = np.concatenate([(o * np.array(p)).ravel() for o, p in zip(outputs, projections, strict=True)])
        if not np.isfinite(terms).all():
            return math.nan, math.nan
        return float(terms.sum()), float(np.sqrt(np.square(terms).sum()))

    here, size = value(0.0)
    errors = []
    for step in STEPS:
        (above, _), (below, _) = value(step), value(-step)
        central = (above - below) / (2 * step)
        bent = abs(above - 2 * here + below) / step  # by curvature or a kink: which slope is right is not known
        doubt = bent + ROUNDING * size / step
        if math.isfinite(central) and math.isfinite(doubt):
            errors.append(max(abs(told - central) - doubt, 0.0) / max(abs(told), abs(central), 1e-30))
    return min(errors, default=None)


def _slopes(call: _Call, leaves: list[mx.array], projections: list[mx.array]) -> list[mx.array] | None:
    """Gradients by the leaves; None of what has none."""

    def projected(moved: list[mx.array]) -> mx.array:
        outputs = _floats(_again(call, moved))
        parts = [(o.astype(mx.float32) * p).sum() for o, p in zip(outputs, projections, strict=True)]
        return functools.reduce(mx.add, parts)

    if not leaves or not projections:
        return None
    try:
        slopes: list[mx.array] = mx.grad(projected)(leaves)
        mx.eval(slopes)
    except (ValueError, RuntimeError):  # a function without a derivative
        return None
    return slopes


def _projections(call: _Call, generator: np.random.Generator) -> list[mx.array]:
    return [mx.array(generator.normal(size=a.shape).astype(np.float32)) for a in _floats(call.output)]


def _leaves(call: _Call) -> list[mx.array]:
    """Floating inputs of a layer and its parameters."""
    parameters = call.run.trainable_parameters() if isinstance(call.run, nn.Module) else {}
    return _floats(call.inputs) + _floats(parameters)


def _again(call: _Call, leaves: list[mx.array]) -> Any:
    """Run a layer on other inputs and parameters; its own parameters are put back."""
    left = iter(leaves)
    inputs = tree_map(lambda a: next(left) if _is_float(a) else a, call.inputs)
    if not isinstance(call.run, nn.Module):
        return call.run(*inputs[0], **inputs[1])
    own = call.run.trainable_parameters()
    call.run.update(tree_map(lambda a: next(left) if _is_float(a) else a, own))
    try:
        return call.run(*inputs[0], **inputs[1])
    finally:
        call.run.update(own)


def _recorded(model: nn.Module, x: mx.array) -> list[_Call]:
    """Run the model; all calls of its layers, inner ones first."""
    calls: list[_Call] = []
    with _watched(model, calls):
        model(x)
    mx.eval([_floats((call.inputs, call.output)) for call in calls])
    return calls


@contextmanager
def _watched(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Note each call: a class of its own stands in for that of each module, as Python looks __call__ up in classes."""
    modules = {id(module): (name, module, type(module)) for name, module in reversed(model.named_modules())}
    sequences = [(name, m, m.layers) for name, m, _ in modules.values() if isinstance(m, nn.Sequential)]
    try:
        for name, module, layers in sequences:
            path = f"{name}.layers" if name else "layers"
            module.layers = [
                f if isinstance(f, nn.Module) else _noting(f, f"{path}.{i}", calls) for i, f in enumerate(layers)
            ]
        for name, module, kind in modules.values():
            module.__class__ = _noting_class(kind, name, calls)
        yield
    finally:
        for _, module, kind in modules.values():
            module.__class__ = kind
        for _, module, layers in sequences:
            module.layers = layers


def _noting(f: Callable[..., Any], name: str, calls: list[_Call]) -> Callable[..., Any]:
    kind = getattr(f, "__name__", type(f).__name__)

    def noting(*args: Any, **kwargs: Any) -> Any:
        output = f(*args, **kwargs)
        calls.append(_Call(name, kind, f, (list(args), kwargs), output))
        return output

    return noting


def _noting_class(kind: type, name: str, calls: list[_Call]) -> type:
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.__call__(self, *args, **kwargs)
        calls.append(_Call(name, kind.__name__, self, (list(args), kwargs), output))
        return output

    return type(kind.__name__, (kind,), {"__call__": noting})


def _floats(tree: Any) -> list[mx.array]:
    leaves: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]  # a list, not a dict
    return [leaf for _, leaf in leaves if _is_float(leaf)]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _end(dtype: mx.Dtype) -> float:
    """Largest number of a dtype."""
    return {mx.float16: 65504.0, mx.bfloat16: (2 - 2.0**-7) * 2.0**127}.get(dtype, (2 - 2.0**-23) * 2.0**127)


def _largest(a: mx.array) -> float:
    return float(np.abs(np.array(a.astype(mx.float32))).max(initial=0.0))


def _rms(a: mx.array) -> float:
    """Size of the values of an array; 1 where all are 0."""
    if not a.size:
        return 1.0
    return float(np.sqrt(np.square(np.array(a.astype(mx.float32)).astype(np.float64)).mean())) or 1.0


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
