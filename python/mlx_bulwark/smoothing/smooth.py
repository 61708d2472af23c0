"""Certified randomized smoothing of any classifier."""

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..convolutions import faster_convolutions
from ..ops.noise import FLOATS, random_key
from ..ops.smooth import Distribution, count_votes
from .bounds import (
    ABSTAIN,
    Array,
    Norm,
    check_count,
    check_fraction,
    check_norm,
    check_positive,
    draws_for_radius,
    failure_of,
    is_integer,
    is_number,
    look_schedule,
    prediction_p_value,
    radius_of,
    upper_failure_bound,
)
from .sources import InputNoise, LinearOutputNoise, Source

IN_FLIGHT = 2  # batches: one runs, one waits; more of them would hold memory and gain nothing
LOOKS_FOR_TARGET = 6
MOST_DRAWS = 2**31 - 1  # counts are int32


class Certificate(NamedTuple):
    """What ``Smooth.certify_each`` found for one input."""

    prediction: int
    """The class, or ABSTAIN (-1)."""
    radius: float
    """No input closer than this has another class; 0.0 with ABSTAIN."""
    lower_bound: float
    """Lower bound on the probability of the class under noise."""
    votes: int
    """Draws that voted for the class, of those that the bound rests on."""
    draws: int
    """Draws that the bound rests on; fewer than n where it ended early."""
    invalid: int
    """Draws whose logits held NaN. They are votes against every class."""


class Certificates(NamedTuple):
    """What ``Smooth.certify`` found: the fields of ``Certificate`` as NumPy arrays, one entry an input."""

    prediction: Array
    radius: Array
    lower_bound: Array
    votes: Array
    draws: Array
    invalid: Array


@dataclass(frozen=True)
class _Plan:
    first: int
    looks: list[int]
    alpha: float  # of each look: they share the allowed error equally
    batch_size: int
    target: float


class Smooth:
    """A classifier smoothed by noise, with a provable radius around each input.

    The smoothed classifier returns the class that ``model`` most often chooses for ``x + noise``. It is provably
    constant in a ball around x: in L2 with Gaussian noise (``norm="l2"``), in L1 with noise uniform in
    [-lambda, lambda], lambda = sqrt(3) * sigma (``norm="l1"``). The proof holds for any model, up to the error
    probability alpha of each decision. Noise is drawn under a key from the operating system that never leaves the
    object; every draw of every decision has a counter of its own. The object cannot be copied or pickled.

    The theorem speaks of real numbers. Noise, model and x are floats, and inputs have been built for which float
    arithmetic breaks a certificate (Voracek and Hein 2023): their low bits survive in ``x + noise``. ``bounds`` with
    ``levels`` rounds noisy copies to a coarse grid, which leaves such bits next to no room, and is part of the
    certified classifier; it is no proof that covers rounding.

    Args:
        model: Takes ``[m, *shape]``, returns logits ``[m, num_classes]``. A ``nn.Module`` runs in evaluation mode,
            compiled, with the parameters that it has at the time of the call.
        num_classes: Number of classes, >= 2.
        sigma: Standard deviation of the noise, in the unit of the input that is given here: a model that normalises
            does so inside.
        norm: ``"l2"`` or ``"l1"``.
        bounds: Lowest and highest value of valid inputs. Inputs outside are refused, noisy copies are clipped.
        levels: Number of evenly spaced values in ``bounds`` to which noisy copies are rounded.
        exact_first_layer: The model is a ``nn.Sequential`` that begins with a ``nn.Linear`` of fewer outputs than
            inputs, y = Wx + b, and the noise is drawn there: y + Lz with L L^T = sigma^2 W W^T, computed in float64.
            The same distribution by less work. Inputs are ``[b, d]``; not with bounds, nor with ``"l1"``.
        compile: Compile a ``nn.Module``. A plain function is never compiled: arrays it refers to may change.

    Raises:
        ValueError: An argument has a wrong value.
        TypeError: ``model`` cannot be called.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_bulwark.smoothing import Smooth
        >>> model = nn.Linear(2, 2)
        >>> model.update({"weight": mx.array([[1.0, 0.0], [-1.0, 0.0]]), "bias": mx.zeros(2)})
        Linear(input_dims=2, output_dims=2, bias=True)
        >>> smooth = Smooth(model, num_classes=2, sigma=0.5)
        >>> found = smooth.certify(mx.array([[0.6, 0.0], [0.0, 0.0]]), n0=100, n=10_000)
        >>> found.prediction.tolist(), bool(0.5 < found.radius[0] < 0.6)
        ([0, -1], True)

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019;
        G. Yang et al., "Randomized Smoothing of All Shapes and Sizes", 2020 (L1); V. Voracek, M. Hein, "Sound
        Randomized Smoothing in Floating-Point Arithmetics", 2023.
    """

    def __init__(
        self,
        model: Callable[[mx.array], mx.array],
        num_classes: int,
        sigma: float,
        *,
        norm: Norm = "l2",
        bounds: tuple[float, float] | None = None,
        levels: int | None = None,
        exact_first_layer: bool = False,
        compile: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"[Smooth] model must be callable but has type {type(model).__name__}")
        if not is_integer(num_classes) or num_classes < 2:
            raise ValueError(f"[Smooth] num_classes must be an integer >= 2 but is {num_classes!r}")
        check_positive("Smooth", "sigma", sigma)
        check_norm("Smooth", norm)
        self.model, self.num_classes, self.sigma, self.norm = model, int(num_classes), float(sigma), norm
        self.bounds, self.levels = _check_bounds(bounds, levels), levels
        self._source = self._make_source(exact_first_layer)
        self._compiled = compile and isinstance(model, nn.Module)
        self._steps: dict[int, Callable[..., mx.array]] = {}
        self._new_key()

    def predict(
        self,
        x: Any,
        n: int = 1000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        *,
        looks: int | Sequence[int] = 1,
    ) -> Array:
        """Classify inputs by the majority under noise.

        Args:
            x: Inputs ``[b, *shape]``, float32, float16 or bfloat16, of NumPy or MLX (float64 is rounded to float32).
            n: Number of noisy draws an input.
            alpha: Probability that a returned class is not that of the smoothed classifier, an input.
            batch_size: Draws that the model sees at once; memory follows it, not n.
            looks: See ``certify``: how often the votes are looked at. The first look at which the test is passed ends
                the draws.

        Returns:
            array: NumPy int64 ``[b]``; ABSTAIN (-1) where top class and runner-up are too close to tell apart. Draws
            with NaN among their logits are counted as a class of their own, which is never returned.

        Raises:
            ValueError: An argument has a wrong value or shape, or an input is not finite or outside the bounds; or
                the model returned something else than logits ``[m, num_classes]``.

        Example:
            >>> import mlx.core as mx
            >>> from mlx_bulwark.smoothing import Smooth
            >>> smooth = Smooth(lambda x: mx.concatenate([x, -x], axis=1), num_classes=2, sigma=0.5)
            >>> smooth.predict([[0.7], [-0.7]], n=1000).tolist()
            [0, 1]

        Source:
            J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
        """
        plan = self._plan("predict", None, n, alpha, batch_size, looks, None)
        inputs = self._inputs("predict", x)
        with _evaluating(self.model):
            return np.array(list(_pipelined(self._predict_one(x, plan) for x in inputs)), np.int64)

    def certify(
        self,
        x: Any,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        *,
        looks: int | Sequence[int] | None = None,
        target_radius: float | None = None,
    ) -> Certificates:
        """Classify inputs, and certify radii within which the smoothed classifier does not change its class.

        The class is guessed from n0 draws, and its probability bounded by Clopper and Pearson from n others.

        With several looks the draws may end before n: where the bound already reaches ``target_radius``, or where
        it is all but sure that it will not, nor, without a target, leave 1/2 behind. The looks are fixed
        beforehand, each has an equal part of alpha, and so the bounds of all looks hold together with probability
        1 - alpha, whenever the draws end; the best of them counts.

        Args:
            x: Inputs ``[b, *shape]``, float32, float16 or bfloat16, of NumPy or MLX (float64 is rounded to float32).
            n0: Number of draws for the guess.
            n: Number of draws for the bound, at most 2^31 - 1.
            alpha: Probability that a certificate is wrong, an input.
            batch_size: Draws that the model sees at once; memory follows it, not n.
            looks: Numbers of draws after which the votes are looked at, increasing to n; or how many looks there are,
                each after twice as many draws as the one before. Default: 1 look, and with a target 6.
            target_radius: A radius that is enough. Looks that could not certify it are left out beforehand.

        Returns:
            Certificates: ``prediction`` int64, ``radius`` float64 in the unit of x, ``lower_bound``, ``votes``,
            ``draws``, ``invalid``, each ``[b]``. Draws with NaN among their logits are votes against the class.

        Raises:
            ValueError: As ``predict``; or n draws could not certify ``target_radius``.

        Example:
            >>> import mlx.core as mx
            >>> from mlx_bulwark.smoothing import Smooth
            >>> smooth = Smooth(lambda x: mx.concatenate([x, -x], axis=1), num_classes=2, sigma=0.5)
            >>> found = smooth.certify([[1.0]], n=100_000, target_radius=0.5)
            >>> bool(found.radius[0] >= 0.5), bool(found.draws[0] < 10_000)
            (True, True)

        Source:
            J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
        """
        arguments = n0, n, alpha, batch_size
        found = list(self.certify_each(x, *arguments, looks=looks, target_radius=target_radius))
        columns: Any = zip(*found, strict=True) if found else [()] * len(Certificates._fields)
        kinds = np.int64, np.float64, np.float64, np.int64, np.int64, np.int64
        return Certificates(*(np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)))

    def certify_each(
        self,
        x: Any,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        *,
        looks: int | Sequence[int] | None = None,
        target_radius: float | None = None,
    ) -> Generator[Certificate, None, None]:
        """Certify inputs one after the other, and give each certificate as soon as it stands.

        Args:
            x: As of ``certify``, and so are the others.
            n0: Number of draws for the guess.
            n: Number of draws for the bound.
            alpha: Probability that a certificate is wrong, an input.
            batch_size: Draws that the model sees at once.
            looks: Numbers of draws after which the votes are looked at, or how many.
            target_radius: A radius that is enough.

        Returns:
            iterator: One ``Certificate`` an input. A model that is a ``nn.Module`` is in evaluation mode until the
            last one was given.

        Raises:
            ValueError: As ``certify``, here and not when the first certificate is asked for.

        Example:
            >>> import mlx.core as mx
            >>> from mlx_bulwark.smoothing import Smooth
            >>> smooth = Smooth(lambda x: mx.concatenate([x, -x], axis=1), num_classes=2, sigma=0.5)
            >>> [c.prediction for c in smooth.certify_each([[1.0], [-1.0]], n=1000)]
            [0, 1]

        Source:
            J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
        """
        plan = self._plan("certify", n0, n, alpha, batch_size, looks, target_radius)
        inputs = self._inputs("certify", x)

        def decisions() -> Generator[Certificate, None, None]:
            with _evaluating(self.model):
                yield from _pipelined(self._certify_one(x, plan) for x in inputs)

        return decisions()

    # One decision: a generator that gives control away after each batch it has submitted, and before it waits.

    def _certify_one(self, x: mx.array, plan: _Plan) -> Generator[bool, None, Certificate]:
        state = self._source.prepare(x)
        first = yield from self._count(state, plan.first, plan.batch_size, self._zeros())
        counts, drawn, guess = self._zeros(), 0, -1
        best = Certificate(ABSTAIN, 0.0, 0.0, 0, 0, 0)
        for look in plan.looks:
            counts = yield from self._count(state, look - drawn, plan.batch_size, counts)
            yield True
            votes, drawn = np.array(counts).tolist(), look
            if guess < 0:
                guess = int(np.array(first)[: self.num_classes].argmax())
            failure = float(upper_failure_bound("certify", votes[guess], drawn, plan.alpha))
            if not best.draws or 1.0 - failure > best.lower_bound:
                radius = float(radius_of(failure, self.sigma, self.norm))
                prediction = guess if radius > 0 else ABSTAIN
                best = Certificate(prediction, radius, 1.0 - failure, votes[guess], drawn, votes[-1])
            if best.radius >= plan.target or self._hopeless(votes[guess], drawn, plan):
                break
        return best

    def _hopeless(self, votes: int, drawn: int, plan: _Plan) -> bool:
        """Whether the upper bound on the probability is below what is wanted. It only ends draws, so it may err."""
        wanted = 0.0 if math.isinf(plan.target) else plan.target
        least_failure = 1.0 - float(upper_failure_bound("certify", drawn - votes, drawn, plan.alpha))
        return least_failure > failure_of(wanted, self.sigma, self.norm)

    def _predict_one(self, x: mx.array, plan: _Plan) -> Generator[bool, None, int]:
        state, counts, drawn = self._source.prepare(x), self._zeros(), 0
        for look in plan.looks:
            counts = yield from self._count(state, look - drawn, plan.batch_size, counts)
            yield True
            votes, drawn = np.array(counts), look
            second, top = np.sort(votes)[-2:]
            if votes.argmax() < self.num_classes and prediction_p_value(top, second) <= plan.alpha:
                return int(votes.argmax())
        return ABSTAIN

    def _count(
        self, state: list[mx.array], n: int, batch_size: int, counts: mx.array
    ) -> Generator[bool, None, mx.array]:
        flying: deque[mx.array] = deque()
        for start in range(0, n, batch_size):
            m = min(batch_size, n - start)
            counts = self._step(m)(state, self._key, self._take(m, state), counts)
            mx.async_eval(counts)
            flying.append(counts)
            if len(flying) > IN_FLIGHT:
                mx.eval(flying.popleft())
            yield False
        return counts

    def _step(self, m: int) -> Callable[..., mx.array]:
        """The work of one batch: noise, model, votes."""
        if m in self._steps:
            return self._steps[m]

        def step(state: list[mx.array], key: mx.array, counter: mx.array, counts: mx.array) -> mx.array:
            with faster_convolutions(self.model):
                logits = self._source.logits(state, m, key, counter)
            return count_votes(self._checked(logits, m), counts)

        # The parameters are inputs of the compiled step: training between two calls is seen.
        self._steps[m] = mx.compile(step, inputs=[self.model.state]) if self._compiled else step  # type: ignore[attr-defined]
        return self._steps[m]

    def _checked(self, logits: Any, m: int) -> mx.array:
        if not isinstance(logits, mx.array) or logits.shape != (m, self.num_classes) or logits.dtype not in FLOATS:
            has = f"{logits.dtype} of shape {logits.shape}" if isinstance(logits, mx.array) else type(logits).__name__
            raise ValueError(
                f"[Smooth] model must return floating logits of shape ({m}, {self.num_classes}), [m, num_classes], but "
                f"has {has}"
            )
        return logits

    def _zeros(self) -> mx.array:
        return mx.zeros(self.num_classes + 1, mx.int32)

    # Noise: a counter serves once.

    def _new_key(self) -> None:
        self._key, self._counter, self._process = random_key(), 0, os.getpid()

    def _take(self, m: int, state: list[mx.array]) -> mx.array:
        blocks = self._source.blocks(m, state)
        if self._process != os.getpid() or self._counter + blocks > 1 << 64:
            self._new_key()  # a forked process would draw the noise of its parent
        counter = self._counter
        self._counter += blocks
        return mx.array([counter & 0xFFFFFFFF, counter >> 32], mx.uint32)

    def __reduce__(self) -> NoReturn:
        raise TypeError("[Smooth] it holds a secret key and counters that serve once: it cannot be copied or pickled")

    # Checks

    def _make_source(self, exact_first_layer: bool) -> Source:
        if not exact_first_layer:
            distribution: Distribution = "gaussian" if self.norm == "l2" else "uniform"
            return InputNoise(self.model, self.sigma, distribution, self.bounds, self.levels)
        if self.norm != "l2" or self.bounds is not None:
            has = "norm='l1'" if self.norm != "l2" else f"bounds={self.bounds}"
            raise ValueError(
                f"[Smooth] exact_first_layer must come with Gaussian noise that is neither clipped nor rounded "
                f"but has {has}"
            )
        return LinearOutputNoise(self.model, self.sigma)

    def _plan(
        self, where: str, n0: int | None, n: int, alpha: float, batch_size: int, looks: Any, target: float | None
    ) -> _Plan:
        for name, count in (("n0", n0), ("n", n), ("batch_size", batch_size)):
            if name != "n0" or n0 is not None:
                check_count(where, name, count)
            if count is not None and count > MOST_DRAWS:
                raise ValueError(f"[{where}] {name} must be at most {MOST_DRAWS} but is {count}")
        check_fraction(where, "alpha", alpha)
        if target is not None:
            check_positive(where, "target_radius", target)
        schedule = look_schedule(where, n, looks if looks is not None else LOOKS_FOR_TARGET if target else 1)
        if target is not None:
            least = draws_for_radius(target, self.sigma, alpha / len(schedule), norm=self.norm)
            if n < least:
                raise ValueError(
                    f"[{where}] n must be at least {least} to certify target_radius {target:g} in {len(schedule)} "
                    f"looks at sigma {self.sigma:g} and alpha {alpha:g} but is {n}"
                )
            schedule = [look for look in schedule if look >= least]
        return _Plan(n0 or 0, schedule, alpha / len(schedule), int(batch_size), math.inf if target is None else target)

    def _inputs(self, where: str, x: Any) -> mx.array:
        inputs = x if isinstance(x, mx.array) else mx.array(_floats(where, x))
        if inputs.dtype not in FLOATS:
            raise ValueError(f"[{where}] x must be float32, float16 or bfloat16 but has {inputs.dtype}")
        if inputs.ndim < 2:
            raise ValueError(f"[{where}] x must be a batch of inputs, [b, *shape], but has shape {inputs.shape}")
        self._source.refresh()
        low, high = self.bounds or (-math.inf, math.inf)
        wide = inputs.astype(mx.float32)
        bad = ~mx.isfinite(wide) | (wide < low) | (wide > high)
        if count := int(np.array(bad.sum())):
            first = int(np.array(bad.reshape(len(inputs), -1).any(1)).argmax())
            allowed = "finite" if self.bounds is None else f"finite and within the bounds {self.bounds}"
            raise ValueError(
                f"[{where}] x must be {allowed} but has {count} values that are not, first in input {first}"
            )
        return inputs


def _floats(where: str, x: Any) -> Array:
    values = np.asarray(x)
    if values.dtype.kind != "f":
        raise ValueError(f"[{where}] x must be a floating array but has dtype {values.dtype}")
    return values if values.dtype == np.float16 else values.astype(np.float32)


def _check_bounds(bounds: Any, levels: Any) -> tuple[float, float] | None:
    if bounds is None:
        if levels is not None:
            raise ValueError(f"[Smooth] levels must come with bounds but is {levels!r} without")
        return None
    try:
        low, high = bounds
    except (TypeError, ValueError):
        low = high = None
    if not (is_number(low) and is_number(high) and -math.inf < low < high < math.inf):
        raise ValueError(f"[Smooth] bounds must be two finite numbers that increase but is {bounds!r}")
    if levels is not None and (not is_integer(levels) or not 2 <= levels <= 65536):
        raise ValueError(f"[Smooth] levels must be an integer in [2, 65536] but is {levels!r}")
    return float(low), float(high)


def _pipelined(decisions: Iterator[Generator[bool, None, Any]]) -> Iterator[Any]:
    """Results in order. Before one decision waits for its votes, the next one submits its first batch."""
    current = next(decisions, None)
    while current is not None:
        following: Generator[bool, None, Any] | None = None
        while True:
            try:
                waits = next(current)
            except StopIteration as finished:
                result = finished.value
                break
            if waits and following is None:
                following = next(decisions, None)
                if following is not None:
                    next(following)
        yield result
        current = following


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that each module had."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module._training = training
