"""The gate before a model at inference: every input has the shape, the type and the range that the model knows."""

import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..ops.tails import column_stats

Policy = Literal["raise", "mask", "clip"]
Bound = float | mx.array | None

NAMED_ROWS = 3  # of refused rows, in a message
_MOST_ROWS = 2**31  # of what column_stats takes
_counting = threading.Lock()  # of all gates: one of its own could not be copied with the module


@dataclass(frozen=True)
class GateCounts:
    """What a gate has seen since it was made or reset. A row may count under several kinds.

    Attributes:
        rows: Rows in all.
        nan: Rows with NaN.
        inf: Rows with an infinity.
        below: Rows with a value below its lower bound.
        above: Rows with a value above its upper bound.
        refused: Rows that were refused or masked.
    """

    rows: int = 0
    nan: int = 0
    inf: int = 0
    below: int = 0
    above: int = 0
    refused: int = 0

    def to_json(self) -> str:
        """Return the counts as JSON."""
        return json.dumps({"kind": "input_gate"} | asdict(self))


class GatedOutput(NamedTuple):
    """What a gate returns under the policy ``"mask"``.

    Attributes:
        output: The model's output; of a gate without a model, the input. Floating outputs of rows that are not valid
            are NaN, all other outputs of such rows mean nothing.
        valid: bool ``[B]``, which rows passed.
    """

    output: Any
    valid: mx.array


class InputError(ValueError):
    """Inputs that a gate does not let pass.

    Attributes:
        rows: Numbers of the refused rows.
    """

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = list(rows)


class InputGate(nn.Module):
    """Let only inputs of the right shape, dtype and range reach a model.

    All values of a batch are looked at in one pass on the device, with one wait for its result. Only where that finds
    something are rows looked at one by one. Wrong shapes and dtypes are refused under every policy.

    - ``"raise"``: a batch with a bad row raises ``InputError``, which names rows and reasons.
    - ``"clip"``: values outside of the bounds are moved to the nearest one. NaN, and infinities on a side without a
      bound, have no nearest value and raise.
    - ``"mask"``: bad rows are replaced by harmless ones before the model runs, so that they can do nothing to other
      rows, and ``GatedOutput(output, valid)`` is returned.

    Under ``"raise"`` and ``"clip"`` the gate is a layer: ``nn.Sequential(gate, model)`` is the same as a gate that was
    given the model. It waits for the device, so it stays outside of ``mx.compile`` and ``mx.vmap``.

    Args:
        shape: Shape of one row, without the batch; None is any length.
        dtype: Floating or integer type of inputs.
        bounds: Lowest and highest value allowed; each a number, an array of the last axes of a row (for example one
            value a channel), or None for no bound. Bounds are rounded to ``dtype``.
        finite: Refuse NaN and infinities; False lets them pass where no bound forbids them.
        policy: ``"raise"``, ``"mask"`` or ``"clip"``.
        model: Runs on what passes.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.gate import InputGate
        >>> gate = InputGate([3], mx.float32, (0, 1), policy="mask", model=nn.Linear(3, 2))
        >>> output, valid = gate(mx.array([[0.1, 0.2, 0.3], [0.1, float("nan"), 7.0]]))
        >>> valid.tolist(), gate.counts.rows, gate.counts.nan, gate.counts.above
        ([True, False], 2, 1, 1)
    """

    def __init__(
        self,
        shape: Sequence[int | None],
        dtype: mx.Dtype = mx.float32,
        bounds: tuple[Bound, Bound] | None = None,
        finite: bool = True,
        *,
        policy: Policy = "raise",
        model: Callable[[mx.array], Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if any(n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1) for n in shape):
            raise ValueError(f"[InputGate] shape must be positive integers or None but is {list(shape)}")
        if not (mx.issubdtype(dtype, mx.floating) or mx.issubdtype(dtype, mx.integer)):
            raise ValueError(f"[InputGate] dtype must be floating or integer but is {dtype}")
        if policy not in get_args(Policy):
            raise ValueError(f"[InputGate] policy must be one of {', '.join(get_args(Policy))} but is {policy!r}")
        if model is not None and not callable(model):
            raise ValueError(f"[InputGate] model must be callable but is {type(model).__name__}")
        self._row: tuple[int | None, ...] = tuple(shape)
        self._type = str(dtype).rpartition(".")[2]  # a Dtype could not be copied with the module
        self._finite, self._policy = finite, policy
        self._low, self._high = self._read_bounds(bounds)
        self.model = model
        self._counts = GateCounts()

    @property
    def _dtype(self) -> mx.Dtype:
        dtype: mx.Dtype = getattr(mx, self._type)
        return dtype

    @property
    def counts(self) -> GateCounts:
        """What the gate has seen, over all threads."""
        return self._counts

    def reset_counts(self) -> GateCounts:
        """Begin to count anew.

        Returns:
            GateCounts: What was counted until now.
        """
        with _counting:
            seen, self._counts = self._counts, GateCounts()
        return seen

    def __call__(self, x: mx.array) -> Any:
        """Check ``x`` ``[B, *shape]`` and run the model.

        Args:
            x: Inputs, any number of rows.

        Returns:
            The model's output, or ``x`` without a model; under ``"mask"`` a ``GatedOutput``.

        Raises:
            InputError: Values are not as they must be.
            ValueError: Shape or dtype is wrong.
        """
        self._refuse_form(x)
        clean = not x.size or bool(self._nothing_wrong(x).item())
        if clean:
            self._count(len(x))
            return self._run(x, None)
        faults = self._faults(x)
        if self._policy == "clip":
            return self._run(self._clipped(x, faults), None)
        bad = faults.bad(self._finite)
        self._count(len(x), faults, int(bad.sum()))
        if not bad.any():
            return self._run(x, None)
        if self._policy == "raise":
            raise InputError(self._words(faults, bad), np.flatnonzero(bad).tolist())
        valid = mx.array(~bad)
        return self._run(mx.where(_along(valid, x), x, self._harmless(x)), valid)

    def _run(self, x: mx.array, valid: mx.array | None) -> Any:
        output = x if self.model is None else self.model(x)
        if self._policy != "mask":
            return output
        if valid is None:
            return GatedOutput(output, mx.ones(len(x), mx.bool_))
        return GatedOutput(tree_map(lambda leaf: _marked(leaf, valid), output), valid)

    def _refuse_form(self, x: mx.array) -> None:
        if not isinstance(x, mx.array):
            raise ValueError(f"[InputGate] x must be an mlx array but is {type(x).__name__}")
        if x.ndim != len(self._row) + 1 or any(
            n is not None and n != m for n, m in zip(self._row, x.shape[1:], strict=True)
        ):
            wanted = ", ".join(["B", *("any" if n is None else str(n) for n in self._row)])
            raise ValueError(f"[InputGate] x must have shape [{wanted}] but has {list(x.shape)}")
        if x.dtype != self._dtype:
            raise ValueError(f"[InputGate] x must have dtype {self._dtype} but has {x.dtype}")

    def _read_bounds(self, bounds: tuple[Bound, Bound] | None) -> tuple[mx.array | None, mx.array | None]:
        low, high = (None, None) if bounds is None else (self._read_bound(b) for b in bounds)
        if low is not None and high is not None:
            if low.ndim and high.ndim and low.shape != high.shape:
                raise ValueError(f"[InputGate] bounds must have one shape but have {low.shape} and {high.shape}")
            if not bool((low <= high).all().item()):
                raise ValueError("[InputGate] bounds must be lowest, highest but the first exceeds the second")
        return low, high

    def _read_bound(self, bound: Bound) -> mx.array | None:
        if bound is None:
            return None
        value = np.array(bound.tolist() if isinstance(bound, mx.array) else bound, np.float64)
        if not np.isfinite(value).all():
            raise ValueError(f"[InputGate] bounds must be finite but are {bound}; None is no bound")
        tail = self._row[len(self._row) - value.ndim :] if value.ndim <= len(self._row) else None
        if value.ndim and tail != value.shape:
            raise ValueError(
                f"[InputGate] bounds must be numbers or have the last axes of {list(self._row)} but have shape "
                f"{list(value.shape)}"
            )
        if mx.issubdtype(self._dtype, mx.integer):
            info = mx.iinfo(self._dtype)
            if (value != np.round(value)).any() or (value < info.min).any() or (value > info.max).any():
                raise ValueError(f"[InputGate] bounds must be integers that {self._dtype} holds but are {bound}")
            return mx.array(value.astype(np.int64)).astype(self._dtype)
        with np.errstate(over="ignore"):
            rounded = mx.array(value.astype(np.float32)).astype(self._dtype)
        if not bool(mx.isfinite(rounded).all().item()):
            raise ValueError(f"[InputGate] bounds must be within {self._dtype} but are {bound}")
        return rounded

    def _nothing_wrong(self, x: mx.array) -> mx.array:
        """Whether no value can be bad, one bool on the device."""
        columns = max((b.size for b in (self._low, self._high) if b is not None), default=1)
        if x.size // columns >= _MOST_ROWS:
            columns = x.size // len(x)
        flat = x.reshape(-1, columns)
        ok = mx.array(True)
        if mx.issubdtype(x.dtype, mx.floating) and x.dtype != mx.float64:
            stats = column_stats(flat)
            # the extremes are those of finite values: where others may pass, rows are looked at one by one
            ok = (stats.nans + stats.infs).sum() == 0
            least, most = stats.minimum, stats.maximum
        elif self._low is None and self._high is None:
            return ok if mx.issubdtype(x.dtype, mx.integer) else mx.isfinite(x).all()
        else:
            least, most = flat.min(axis=0), flat.max(axis=0)
        if self._low is not None:
            ok = mx.logical_and(ok, (least >= self._low.flatten()).all())
        if self._high is not None:
            ok = mx.logical_and(ok, (most <= self._high.flatten()).all())
        return ok

    def _faults(self, x: mx.array) -> "_Faults":
        """What each row has; a second look, for batches with something to tell."""
        none = mx.zeros(len(x), mx.bool_)
        floating = mx.issubdtype(x.dtype, mx.floating)
        found = [
            _any(mx.isnan(x)) if floating else none,
            _any(mx.isinf(x)) if floating else none,
            none if self._low is None else _any(x < self._low),
            none if self._high is None else _any(x > self._high),
        ]
        mx.eval(found)
        return _Faults(*(np.array(f) for f in found))

    def _clipped(self, x: mx.array, faults: "_Faults") -> mx.array:
        y = x
        if self._low is not None:
            y = mx.maximum(y, self._low)
        if self._high is not None:
            y = mx.minimum(y, self._high)
        left = np.zeros(len(x), bool)
        if self._finite and (faults.nan.any() or faults.inf.any()):
            left = np.array(_any(mx.logical_not(mx.isfinite(y))))
        self._count(len(x), faults, int(left.sum()))
        if left.any():
            raise InputError(self._words(faults, left), np.flatnonzero(left).tolist())
        return y

    def _harmless(self, x: mx.array) -> mx.array:
        """Zero, or the bound next to it."""
        value = mx.array(0, x.dtype)
        if self._low is not None:
            value = mx.maximum(value, self._low)
        if self._high is not None:
            value = mx.minimum(value, self._high)
        return value

    def _count(self, rows: int, faults: "_Faults | None" = None, refused: int = 0) -> None:
        kinds = ("nan", "inf", "below", "above")
        with _counting:
            seen = self._counts
            more = {} if faults is None else {k: getattr(seen, k) + int(getattr(faults, k).sum()) for k in kinds}
            self._counts = replace(seen, rows=seen.rows + rows, refused=seen.refused + refused, **more)

    def _words(self, faults: "_Faults", bad: Any) -> str:
        wanted = ["finite"] if self._finite else []
        if self._low is not None or self._high is not None:
            low = "-inf" if self._low is None else _number(self._low)
            high = "inf" if self._high is None else _number(self._high)
            wanted.append(f"in [{low}, {high}]")
        named = np.flatnonzero(bad)[:NAMED_ROWS]
        rows = "; ".join(f"row {i}: {faults.words(i)}" for i in named)
        further = f"; and {int(bad.sum()) - len(named)} further rows" if bad.sum() > len(named) else ""
        return (
            f"[InputGate] x must be {' and '.join(wanted)} but {int(bad.sum())} of {len(bad)} rows are not: "
            f"{rows}{further}"
        )


class _Faults(NamedTuple):
    """What rows have, each bool [B]."""

    nan: Any
    inf: Any
    below: Any
    above: Any

    def bad(self, finite: bool) -> Any:
        outside = self.below | self.above
        return outside | self.nan | self.inf if finite else outside

    def words(self, row: int) -> str:
        names = ("NaN", "an infinity", "below the bounds", "above the bounds")
        return ", ".join(name for name, has in zip(names, self, strict=True) if has[row])


def _any(flags: mx.array) -> mx.array:
    """Rows with a flag."""
    return flags.reshape(len(flags), -1).any(axis=1)


def _along(rows: mx.array, x: mx.array) -> mx.array:
    """One value a row in the shape of x."""
    return rows.reshape(-1, *(1 for _ in x.shape[1:]))


def _marked(leaf: Any, valid: mx.array) -> Any:
    """NaN in rows that are not valid, where the leaf has such rows and can tell so."""
    if not isinstance(leaf, mx.array) or not leaf.ndim or len(leaf) != len(valid):
        return leaf
    if not mx.issubdtype(leaf.dtype, mx.floating):
        return leaf
    return mx.where(_along(valid, leaf), leaf, mx.array(math.nan, leaf.dtype))


def _number(bound: mx.array) -> str:
    return f"{bound.item():g}" if not bound.ndim else f"{bound.min().item():g}..{bound.max().item():g}"
