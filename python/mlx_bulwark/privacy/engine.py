"""DP-SGD for any MLX training loop."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..ops.noise import bit_blocks_used, random_bits, random_key
from .accounting import check_delta, check_epsilon, warn_of_delta
from .batches import Augment, Batch, Batches, Source, UnitReduction
from .books import Books, noise_for, steps_for
from .check import CheckReport, check
from .clipping import AdaptiveClipping, ClippingMode, Sensitivity
from .distributed import Ranks, make_ranks
from .events import Accountant, Event, Run
from .gradients import LossFunction
from .key_file import keep_noise_key, own_file
from .ledger import Ledger
from .memory import find_microbatch_size
from .optimizer import ClippedGradients, PrivateOptimizer
from .plan import NoiseMode, default_accountant, make_plan
from .refusals import GradSampleMode
from .sampling import SamplingMode, make_sampler
from .schedules import Schedule
from .state import new_state, set_scale
from .steps import LossAndGrad, compiled_step, private_value_and_grad, release
from .validate import Fix, ValidationReport, fix, validate

if TYPE_CHECKING:
    from ..provenance.manifest import AppendsLines

WORDS_AHEAD = 1 << 14


class PrivacyEngine:
    """Differentially private training: clipping, noise, sampling and accounting for one model.

    The unit of privacy is one example, or all rows of one user (``units`` of `batches`); `adjacency` says how
    neighbouring data sets differ. What the guarantee covers is the sequence of noised updates, so the trained model;
    losses, gradient norms and realised batch sizes depend on the data and are not covered.

    Args:
        dataset_size: number of examples N that batches are drawn from, or of users. Public: it enters the denominator.
        sample_rate: probability q with which an example enters a batch. Give this or ``batch_size``.
        batch_size: expected batch size q * N; with ``"shuffle"`` the size of every batch.
        sampling: how `batches` draws, and what is accounted. ``"poisson"``: every example by its own coin;
            ``"cyclic_poisson"``: the same within one group of a fixed random partition a step, in turns; ``"shuffle"``:
            a permutation an epoch in batches of fixed size, accounted without amplification, one Gaussian an epoch,
            for neighbours in which one example is replaced by zeros; ``"full"``: all examples in every step.
        cycle_length: number of groups of ``"cyclic_poisson"``.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``; or a function from the number of steps
            charged so far to it, such as `schedules` has.
        max_grad_norm: clipping norm C of a per-sample gradient over all trainable parameters; or such a function; or
            one for each layer or group of parameters, whose squares add up to C squared.
        clipping: ``"flat"``: min(1, C / norm); ``"automatic"``: C / (norm + 0.01) (AUTO-S); ``"per_layer"``: every
            layer by itself, to C over the root of their number or to ``max_grad_norm[layer]``; ``"per_group"``: every
            group by itself, to ``max_grad_norm[pattern]``, where a parameter belongs to the first pattern of
            `fnmatch` that its path matches; ``"adaptive"`` or an `AdaptiveClipping`: C, which starts at
            ``max_grad_norm``, follows a quantile of the norms, found privately.
        noise: ``"gaussian"``: independent from step to step; ``"banded"``: correlated over ``bands`` steps, so that it
            cancels in the sum of the updates (BandMF). That needs ``steps``, keeps noise and clipping norm fixed, and
            is amplified by sampling only with ``"cyclic_poisson"`` and at most ``cycle_length`` bands. ``"discrete"``:
            gradients are truncated to an integer grid one by one, summed exactly, and get exact discrete Gaussian
            noise: no rounding of floats has a part in the guarantee. Much slower, and not compiled.
        bands: of banded noise; default: ``cycle_length``.
        noise_key_file: with banded noise and a ledger, a file for the noise key (mode 0600), so that a resumed run
            goes on with the same noise; keep it apart from the model. With several ranks each has its own, the name
            followed by a dot and the rank, and keeps its shard. Default: the key lives and dies with the engine, and a
            resumed run begins a correlation of its own.
        grad_sample_mode: ``"ghost"``: one backward pass for all rows, by what the layers saw; ``"loop"``: a backward
            pass for each row, which takes models that the other refuses (weights that are used outside of their layer,
            checkpointing, trainable quantized layers), and the time and memory of as many gradients as rows.
        accountant: ``"pld"`` or ``"rdp"``. Default: ``"pld"``; with discrete noise ``"rdp"``, which it needs.
        steps: planned number of steps; an update past it is refused.
        delta: default delta of `epsilon`; well below 1 / dataset_size.
        target_epsilon: budget at ``delta``: an update that would pass it is refused, and nothing is spent by that.
        ledger: file of JSON lines, made or continued, with one line for each step, on the disk before the step's
            update exists. Steps in it count as spent. One engine at a time may use it; of several ranks the first does.
        audit_log: with a ledger, a `provenance.AuditLog`, or anything with its ``append``, that gets a line of the kind
            ``"privacy.step"`` before each line of the ledger.
        group: ranks that train together, each on its shard of the data; ``dataset_size`` and the batch size are those
            of all. Every rank adds its share of the noise, under a key of its own, before the sums travel. All ranks
            make the engine, call its functions and take its steps.
        group_timeout: seconds after which a rank that waits for others ends its process.

    Raises:
        ValueError: an argument is out of range.
        PrivacyError: the ledger is in use, or one of its lines was changed; ranks have other settings, or one of them
            was lost.

    Example:
        >>> import mlx_bulwark as bw
        >>> engine = bw.PrivacyEngine(60_000, batch_size=256, noise_multiplier=1.1, max_grad_norm=1.0)
        >>> engine.epsilon(delta=1e-5)
        0.0

    Source:
        Abadi et al. 2016 (arXiv:1607.00133); book-keeping: Bu et al. 2022 (arXiv:2210.00038); automatic clipping:
        Bu et al. 2022 (arXiv:2206.07136).
    """

    def __init__(
        self,
        dataset_size: int,
        *,
        sample_rate: float | None = None,
        batch_size: float | None = None,
        sampling: SamplingMode = "poisson",
        cycle_length: int | None = None,
        noise_multiplier: float | Schedule,
        max_grad_norm: float | Schedule | Mapping[str, float],
        clipping: ClippingMode | AdaptiveClipping = "flat",
        noise: NoiseMode = "gaussian",
        bands: int | None = None,
        noise_key_file: str | os.PathLike[str] | None = None,
        grad_sample_mode: GradSampleMode = "ghost",
        accountant: Accountant | None = None,
        steps: int | None = None,
        delta: float | None = None,
        target_epsilon: float | None = None,
        ledger: str | os.PathLike[str] | None = None,
        audit_log: "AppendsLines | None" = None,
        group: mx.distributed.Group | None = None,
        group_timeout: float = 600.0,
    ) -> None:
        plan = make_plan(
            dataset_size,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            sample_rate=sample_rate,
            batch_size=batch_size,
            sampling=sampling,
            cycle_length=cycle_length,
            clipping=clipping,
            noise=noise,
            bands=bands,
            steps=steps,
        )
        accountant = default_accountant(accountant, noise)
        if accountant not in ("pld", "rdp"):
            raise ValueError(f"[PrivacyEngine] accountant must be 'pld' or 'rdp' but is {accountant!r}")
        if grad_sample_mode not in ("ghost", "loop"):
            raise ValueError(f"[PrivacyEngine] grad_sample_mode must be 'ghost' or 'loop' but is {grad_sample_mode!r}")
        if delta is not None:
            check_delta("PrivacyEngine", delta)
            warn_of_delta(delta, dataset_size)
        if target_epsilon is not None:
            check_epsilon("PrivacyEngine", target_epsilon)
            if delta is None:
                raise ValueError("[PrivacyEngine] delta must be given with target_epsilon but is None")
        self.dataset_size, self.sample_rate, self.clipping = dataset_size, plan.sample_rate, clipping
        self.grad_sample_mode: GradSampleMode = grad_sample_mode
        self.expected_batch_size = self.sample_rate * dataset_size
        self._clipping = plan.clipping
        self._ranks = make_ranks(group, group_timeout)
        if self._ranks:
            keeps_key = noise_key_file is not None
            outline = plan.outline()
            self._ranks.agree("settings", (dataset_size, outline, accountant, steps, delta, target_epsilon, keeps_key))
        self._books = Books(
            plan,
            accountant,
            planned_steps=steps,
            delta=delta,
            target_epsilon=target_epsilon,
            ledger=self._open(ledger, audit_log),
        )
        self._follow_first_rank()
        self.state = new_state(self.event, self._clipping, self._books.steps)
        self._noise_key_file = self._partition = None
        if noise_key_file is not None:
            self._noise_key_file = own_file(noise_key_file, self._ranks)
            try:
                self.state["noise"]["key"], self._partition = keep_noise_key(noise_key_file, self._books, self._ranks)
            except (ValueError, OSError):
                self.close()  # who is refused must not hold the ledger
                raise
        self._sampling_key = random_key()  # of its own: a resumed run must not toss the same coins under its old key
        self._sampler = make_sampler(plan.sampling, dataset_size, self._partition)
        self._has_shard = False
        self._noised: dict[str, tuple[int, ...]] = {}  # shapes that banded noise is made for
        self._words = np.empty(0, np.uint64)  # drawn for discrete noise and not yet used
        self._unit, self._joins_rows = "example", False
        self._sampling_counter = self._discrete_counter = 0
        self._tracing = False  # a compiled step of the engine's own is being traced
        self._counts_in_graph = False  # a compiled step of the user's own counts steps in the state
        self._accumulated: dict[str, mx.array] = {}

    @classmethod
    def for_epsilon(
        cls,
        epsilon: float,
        delta: float,
        dataset_size: int,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        noise_schedule: Schedule | None = None,
        **settings: Any,
    ) -> "PrivacyEngine":
        """Engine with the least noise, or the most steps, that stays within a target epsilon.

        Give the length of the run, and the noise is found; or give ``noise_multiplier`` among the settings, and the
        number of steps is found.

        Args:
            epsilon: target, above 0.
            delta: probability of the (epsilon, delta) guarantee; well below 1 / dataset_size.
            dataset_size: number of examples.
            steps: number of optimizer steps; an update past them is refused.
            epochs: instead of ``steps``: passes over the data, each 1 / sample_rate steps.
            noise_schedule: shape of the noise: what is found is the factor that this is multiplied with.
            settings: the other arguments of `PrivacyEngine`.

        Returns:
            The engine; its ``noise_multiplier`` and ``planned_steps`` hold what was found.

        Raises:
            ValueError: an argument is out of range.

        Example:
            >>> import mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine.for_epsilon(3, 1e-5, 10_000, steps=1000, sample_rate=0.01, max_grad_norm=1)
            >>> round(engine.noise_multiplier, 3)
            0.814
            >>> settings = dict(batch_size=100, noise_multiplier=1.0, max_grad_norm=1)
            >>> bw.PrivacyEngine.for_epsilon(2, 1e-5, 10_000, **settings).planned_steps
            1202

        Source:
            `find_noise_multiplier` and `find_steps`.
        """
        accountant = default_accountant(settings.get("accountant"), settings.get("noise", "gaussian"))
        outside = {"accountant", "target_epsilon", "ledger", "audit_log", "noise_key_file", "grad_sample_mode"}
        kinds: dict[str, Any] = {k: v for k, v in settings.items() if k not in outside | {"group", "group_timeout"}}
        if sum(v is not None for v in (steps, epochs, settings.get("noise_multiplier"))) != 1:
            raise ValueError("[for_epsilon] one of steps, epochs and noise_multiplier must be given")
        if "noise_multiplier" in settings:
            plan = make_plan(dataset_size, **kinds)
            steps = steps_for(epsilon, delta, accountant, plan.runs)
            return cls(dataset_size, steps=steps, delta=delta, **settings)
        if epochs is not None:
            unbanded = {**kinds, "noise": "gaussian", "bands": None}
            steps = round(epochs / make_plan(dataset_size, noise_multiplier=1.0, **unbanded).sample_rate)
        if not steps or steps < 0:
            raise ValueError(f"[for_epsilon] steps must be positive but are {steps}")
        length = steps
        plan = make_plan(dataset_size, noise_multiplier=noise_schedule or 1.0, steps=length, **kinds)
        scale = noise_for(epsilon, delta, accountant, lambda s: plan.scaled(s).runs(0, length))
        return cls(
            dataset_size, noise_multiplier=plan.scaled(scale).noise_multiplier, steps=steps, delta=delta, **settings
        )

    def value_and_grad(self, model: nn.Module, loss_fn: LossFunction) -> LossAndGrad:
        """Private counterpart of ``mlx.nn.value_and_grad``.

        Args:
            model: the model; its trainable parameters are made private, the frozen ones are left alone.
            loss_fn: ``loss_fn(model, *arrays)`` returning one loss an example, [B]; no example's loss may depend on
                the others (`check` finds out).

        Returns:
            A function ``f(model, batch)`` for a `Batch` of `batches`, or ``f(model, *arrays, mask=None, units=None,
            unit_reduction="mean", last=True)`` for arrays [B, ...] of your own, that returns the losses [B] (0 in
            padding rows; not covered by epsilon) and `ClippedGradients`. mask [B] bool is False in padding rows.
            units [B], integers below B, says which rows belong to one unit (a user's rows, an example's
            augmentations, an example and its adversarial twin): their gradients are averaged (``"mean"``) or added
            up (``"sum"``) before the one clip; by default every row is a unit. ``last=False`` says that the logical
            batch goes on.

        Raises:
            PrivacyError: (from the returned function) the loss is not per example, a layer couples the batch, or
                a layer's per-sample gradients cannot be computed; the message names it.

        Example:
            >>> import mlx.core as mx, mlx.nn as nn, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> model = nn.Linear(4, 2)
            >>> def loss_fn(model, x, y):
            ...     return nn.losses.cross_entropy(model(x), y, reduction="none")
            >>> losses, grads = engine.value_and_grad(model, loss_fn)(model, mx.ones((10, 4)), mx.zeros(10, mx.int32))
            >>> losses.shape, grads
            ((10,), ClippedGradients(not yet noised: pass to engine.wrap(optimizer).update))

        Source:
            Bu et al. 2022, Differentially Private Optimization on Large Model at Small Cost (arXiv:2210.00038).
        """
        return private_value_and_grad(self, model, loss_fn)

    def wrap(self, optimizer: optim.Optimizer) -> PrivateOptimizer:
        """Make an optimizer private: its ``update`` takes `ClippedGradients`, and nothing else.

        Args:
            optimizer: any MLX optimizer.

        Returns:
            The private optimizer.

        Example:
            >>> import mlx.optimizers as optim, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> engine.wrap(optim.Adam(1e-3)).learning_rate.item() < 0.0011
            True

        Source:
            Abadi et al. 2016 (arXiv:1607.00133).
        """
        return PrivateOptimizer(self, optimizer)

    def batches(
        self,
        data: Any,
        *,
        steps: int | None = None,
        microbatch_size: int | None = None,
        max_memory: int | None = None,
        training: tuple[nn.Module, PrivateOptimizer, LossFunction] | None = None,
        units: Any = None,
        max_rows_per_unit: int | None = None,
        unit_reduction: UnitReduction = "mean",
        augment: Augment | None = None,
        multiplicity: int = 1,
    ) -> Batches:
        """Batches of a data set, drawn as the engine's ``sampling`` says.

        A Poisson batch may be empty, and is then a step of pure noise. Each logical batch is padded and masked to
        physical ones of ``microbatch_size`` rows, so that a compiled step compiles once, and no example is ever
        dropped. Noise comes once a logical batch.

        With ``units``, rows of one user (or document, or device) are one unit of privacy: units are drawn and
        counted, not rows; all rows of a drawn unit, at most ``max_rows_per_unit``, go into one gradient before the
        one clip, and neighbouring data sets differ by a whole unit. With ``multiplicity``, so are the augmented copies
        of an example.

        Args:
            data: an array or a tuple of arrays (numpy or mlx) with a row for each example.
            steps: number of logical batches; default: as many as plan and target still allow.
            microbatch_size: rows of a physical batch, copies counted; default: expected size plus three standard
                deviations.
            max_memory: in place of ``microbatch_size``, the bytes that MLX's peak memory may reach in a step; the
                largest size that stays within is found by trial steps, which are not charged, and printed.
            training: with ``max_memory``: the model, the optimizer from `wrap`, and the loss function.
            units: [rows], for each row the id of its unit; there must be ``dataset_size`` different ones. Default:
                every row is a unit.
            max_rows_per_unit: with ``units``, the most rows of one unit in a step; of more, so many are chosen
                secretly and evenly, anew in each step.
            unit_reduction: ``"mean"`` or ``"sum"`` of the rows' gradients is what is clipped.
            augment: ``augment(*arrays)`` is called with the arrays of a physical batch and returns arrays of as many
                rows; it must treat each row by itself.
            multiplicity: copies of each row that are augmented, and reduced to one gradient.

        Returns:
            An iterable of `Batch`, whose ``len`` is the number of logical batches.

        Raises:
            ValueError: the data has another number of rows or units, no number of steps is known, or a size does not
                fit.

        Example:
            >>> import numpy as np, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> batches = engine.batches((np.zeros((100, 4)), np.zeros(100)), steps=3, microbatch_size=32)
            >>> sum(batch.last for batch in batches)
            3

        Source:
            Poisson subsampling: Mironov et al. 2019 (arXiv:1908.10530); augmentation multiplicity: De et al. 2022
            (arXiv:2204.13650).
        """
        if steps is None:
            steps = self._up_to_date_books().remaining()
        if steps is None or steps < 0:
            raise ValueError(f"[batches] steps must be a number of logical batches but is {steps}")
        arrays = tuple(data) if isinstance(data, (tuple, list)) else (data,)
        source = Source(
            arrays,
            self._take_shard(arrays, units) if self._ranks else self.dataset_size,
            units,
            max_rows_per_unit,
            unit_reduction,
            augment,
            multiplicity,
        )
        size = source.default_microbatch_size(self._sampler) if microbatch_size is None else microbatch_size
        if max_memory is not None:
            if microbatch_size is not None or training is None:
                raise ValueError(
                    "[batches] max_memory must come with training=(model, optimizer, loss_fn) and without "
                    "microbatch_size but does not"
                )
            find = functools.partial(find_microbatch_size, self, *training, source, size, max_memory)
            size = self._ranks.together(find) if self._ranks else find()
        if units is not None:
            self._unit = "unit (all its rows)"
        self._joins_rows = self._joins_rows or source.rows_per_unit > 1
        return Batches(source, self._sampler, steps, size, self._sampling_words, lambda: self.steps)

    def compiled_step(
        self, model: nn.Module, optimizer: PrivateOptimizer, loss_fn: LossFunction
    ) -> Callable[[Batch], mx.array]:
        """Whole training step, compiled: losses, clipping, noise and update of one physical batch.

        Args:
            model: the model.
            optimizer: what `wrap` returned.
            loss_fn: as for `value_and_grad`.

        Returns:
            A function that takes a `Batch` and returns the losses [P]. Evaluate its result, ``model.state`` and
            ``engine.state`` to make a step happen.

        Example:
            >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, numpy as np, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0, steps=3)
            >>> model, optimizer = nn.Linear(4, 1), engine.wrap(optim.SGD(0.1))
            >>> step = engine.compiled_step(model, optimizer, lambda model, x: (model(x)[:, 0] - 1) ** 2)
            >>> for batch in engine.batches(np.ones((100, 4), np.float32)):
            ...     mx.eval(step(batch), model.state, optimizer.state, engine.state)
            >>> engine.steps
            3

        Source:
            `value_and_grad` and `PrivateOptimizer.update` under ``mx.compile``.
        """
        return compiled_step(self, model, optimizer, loss_fn)

    @property
    def event(self) -> Event:
        """What the next step spends: its mechanism under the sampling scheme."""
        return self._books.event

    @property
    def runs(self) -> tuple[Run, ...]:
        """The composition spent so far: runs of steps, each under one event."""
        return self._up_to_date_books().runs

    @property
    def accountant(self) -> Accountant:
        """How epsilon is computed: ``"pld"`` or ``"rdp"``."""
        return self._books.accountant

    @property
    def planned_steps(self) -> int | None:
        """Number of steps past which an update is refused."""
        return self._books.planned_steps

    @property
    def delta(self) -> float | None:
        """Default delta of `epsilon`."""
        return self._books.delta

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the next step's noise over its clipping norm."""
        return self.event.mechanism.noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """Clipping norm of the next step, over the whole model."""
        if self._clipping.quantile:
            return float(self.state["max_grad_norm"].item())
        return self.event.mechanism.max_grad_norm

    @property
    def sensitivity(self) -> Sensitivity:
        """Largest change of the next step's sums in L2 norm; the noise is ``noise_multiplier`` times the first.

        Where the clipping norm is found privately, the count of norms below it is one coordinate more.
        """
        return self._clipping.sensitivity(self.max_grad_norm, self.noise_multiplier)

    @property
    def adjacency(self) -> str:
        """How neighbouring data sets differ."""
        return self.event.sampling.adjacency.replace("example", self._unit)

    @property
    def steps(self) -> int:
        """Number of optimizer steps charged so far, those of a loaded state or a continued ledger included."""
        return self._up_to_date_books().steps

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon spent so far, for neighbours as `adjacency` says.

        Args:
            delta: probability of the (epsilon, delta) guarantee; default: the engine's.

        Returns:
            Epsilon of the steps charged so far.

        Raises:
            ValueError: no delta is known.

        Example:
            >>> import mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> engine.epsilon(delta=1e-5)
            0.0

        Source:
            `compute_epsilon`.
        """
        delta = self.delta if delta is None else delta
        if delta is None:
            raise ValueError("[epsilon] delta must be given, here or to the engine")
        check_delta("epsilon", delta)
        if delta != self.delta:
            warn_of_delta(delta, self.dataset_size)
        return self._up_to_date_books().epsilon(delta)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write what was spent to a JSON file, and the clipping norm that was found privately. Keys are never saved.

        Args:
            path: the file, replaced as a whole.

        Raises:
            OSError: it cannot be written.

        Example:
            >>> import os, tempfile, mlx_bulwark as bw
            >>> path = os.path.join(tempfile.mkdtemp(), "engine.json")
            >>> bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0).save_state(path)
        """
        if self._keeps_books:
            found = self.max_grad_norm if self._clipping.quantile else None
            self._up_to_date_books().save(path, self.dataset_size, found)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Continue the budget of a saved state, under this engine's own fresh noise key.

        Settings are this engine's: it may go on with other noise or sampling, and the composition stays exact. Where
        there is a ledger, that counts, also when the state is of an older checkpoint: what was spent stays spent.

        Args:
            path: what `save_state` wrote.

        Raises:
            PrivacyError: the file is no saved state, it is of a data set of another size, this engine has taken steps,
                or its ledger lacks steps of the state.
            OSError: the file cannot be read.

        Example:
            >>> import os, tempfile, mlx_bulwark as bw
            >>> path = os.path.join(tempfile.mkdtemp(), "engine.json")
            >>> settings = dict(batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> bw.PrivacyEngine(100, **settings).save_state(path)
            >>> engine = bw.PrivacyEngine(100, **settings)
            >>> engine.load_state(path)
            >>> engine.steps
            0
        """
        found = self._up_to_date_books().load(path, self.dataset_size) if self._keeps_books else None
        if self._ranks:
            found = self._ranks.from_first(found)
        self._follow_first_rank()
        self.state["steps"] = mx.array(self._books.steps, mx.uint32)
        if found is not None and self._clipping.quantile:
            self.state["max_grad_norm"] = mx.array(found)
        set_scale(self.state, self.event, self._clipping)

    def close(self) -> None:
        """Let go of the ledger, so that another engine can continue it. Updates are refused from then on.

        Example:
            >>> import mlx_bulwark as bw
            >>> bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0).close()
        """
        if self._books.ledger is not None:
            self._books.ledger.close()

    def check(
        self, model: nn.Module, batch: Any, loss_fn: LossFunction, *, rtol: float = 1e-4, noise_steps: int = 8
    ) -> CheckReport:
        """Compare private gradients with a one-by-one loop and noise with what is accounted; find coupled examples.

        Each example is run alone, and again among copies of another example: its loss and gradient norm must stay
        the same; sums are compared at ``max_grad_norm`` and where every example is clipped. Then steps of zero
        gradients are rehearsed under keys of their own, eagerly and compiled: the noise of every parameter must have
        its standard deviation, be independent between steps, parameters and engines, and never repeat. Dropout is off
        meanwhile, and nothing is spent. Takes about B + 3 passes more than a step: give it a small batch. With several
        ranks all call it, with as many parameters: shares that are not independent change the standard deviation.

        Args:
            model: the model.
            batch: a tuple of arrays [B, ...], a `Batch`, or one array.
            loss_fn: as for `value_and_grad`.
            rtol: largest relative difference that passes.
            noise_steps: steps of zero gradients for each of two keys; 0: none. Sound noise is refused once in a
                million calls.

        Returns:
            The largest differences that were seen.

        Raises:
            PrivacyError: a difference is larger; the message says of what and where.

        Example:
            >>> import mlx.core as mx, mlx.nn as nn, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> report = engine.check(nn.Linear(4, 1), mx.ones((3, 4)), lambda model, x: model(x)[:, 0] ** 2)
            >>> report.norm_error < 1e-4
            True

        Source:
            Microbatch comparison and noise on zero gradients as in Opacus' and JAX-Privacy's test suites.
        """
        return check(self, model, batch, loss_fn, rtol, noise_steps)

    def validate(self, model: nn.Module) -> ValidationReport:
        """List what of a model is private, frozen or refused, and why. Raises nothing: all problems come at once.

        Args:
            model: the model.

        Returns:
            A report with one entry for each layer that has parameters or is refused. It prints as a table;
            ``is_valid``, ``refused`` and ``to_json()`` are for programs.

        Example:
            >>> import mlx.nn as nn, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> model = nn.Sequential(nn.Linear(4, 2).freeze(), nn.BatchNorm(2), nn.Linear(2, 1))
            >>> [(layer.path, layer.status) for layer in engine.validate(model).layers]
            [('layers.0', 'frozen'), ('layers.1', 'refused'), ('layers.2', 'private')]

        Source:
            Opacus' ModuleValidator.
        """
        return validate(model, self.grad_sample_mode)

    def fix(self, model: nn.Module) -> tuple[Fix, ...]:
        """Repair a model in place: a BatchNorm becomes a GroupNorm, and trainable integers are frozen.

        A GroupNorm has gcd(32, channels) groups and takes over weight, bias and what of them is frozen; running
        statistics are dropped, so train the model on, or fix it before training.

        Args:
            model: the model; changed in place.

        Returns:
            What was changed: path, before and after.

        Raises:
            PrivacyError: the model itself is a BatchNorm, so that nothing holds it.

        Example:
            >>> import mlx.nn as nn, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> model = nn.Sequential(nn.Linear(4, 48), nn.BatchNorm(48))
            >>> [fix.path for fix in engine.fix(model)], model.layers[1].num_groups
            (['layers.1'], 16)

        Source:
            Opacus' ModuleValidator.fix; Wu and He 2018, Group Normalization (arXiv:1803.08494).
        """
        return fix(model)

    def _up_to_date_books(self) -> Books:
        if self._counts_in_graph:
            self._books.steps = int(self.state["steps"].item())
        return self._books

    @property
    def _keeps_books(self) -> bool:
        """Whether this process reads and writes files: the first rank, which no step happens without."""
        return self._ranks is None or self._ranks.rank == 0

    def _open(self, path: str | os.PathLike[str] | None, audit_log: "AppendsLines | None") -> Ledger | None:
        if audit_log is not None and path is None:
            raise ValueError("[PrivacyEngine] audit_log must come with a ledger but does not")
        ours = None if path is None or not self._keeps_books else path

        def opened() -> Ledger | None:
            return None if ours is None else Ledger(ours, audit_log)

        return self._ranks.together(opened) if self._ranks else opened()

    def _follow_first_rank(self) -> None:
        if self._ranks:
            self._books.follow(self._ranks.from_first(self._books.spent()))

    def _advance(self) -> None:
        if self._books.advance():
            set_scale(self.state, self.event, self._clipping)

    def _release(self, gradients: ClippedGradients) -> dict[str, mx.array] | None:
        return release(self, gradients)

    def _take_shard(self, arrays: tuple[Any, ...], units: Any) -> int:
        """Number of this rank's units; the sampler is made for them."""
        ranks = cast(Ranks, self._ranks)
        size = len(arrays[0]) if units is None else len(np.unique(np.array(units)))
        ranks.check_shards(size, self.dataset_size)
        if not self._has_shard:
            scheme = ranks.local_sampling(self.event.sampling, size, self.dataset_size)
            self._sampler, self._has_shard = make_sampler(scheme, size, self._partition), True
        changed = ranks.from_all(size != self._sampler.size)
        if any(changed):
            raise ValueError(
                "[batches] data must be the shard that this rank had before but is another on ranks "
                f"{[rank for rank, other in enumerate(changed) if other]}"
            )
        return size

    def _discrete_words(self, n: int) -> Any:
        self._books.refuse_fork()
        if n > len(self._words):  # rejection asks for a few at a time: they are drawn in larger pieces
            more = max(n, WORDS_AHEAD)
            fresh = random_bits((2 * more,), self.state["noise"]["key"], self._discrete_counter, domain="discrete")
            self._discrete_counter += bit_blocks_used((2 * more,))
            self._words = np.concatenate([self._words, np.array(fresh).view(np.uint64)])
        words, self._words = self._words[:n], self._words[n:]
        return words

    def _sampling_words(self, n: int) -> mx.array:
        self._books.refuse_fork()
        words = random_bits((n,), self._sampling_key, self._sampling_counter, domain="poisson")
        self._sampling_counter += bit_blocks_used((n,))
        return words

    def _without_books(self) -> "PrivacyEngine":
        """Engine of the same settings that charges nothing: for measurements, whose updates are thrown away."""
        trial = object.__new__(PrivacyEngine)
        vars(trial).update(vars(self))
        trial._books, trial._accumulated = self._books.rehearsal(), {}
        trial._counts_in_graph, trial._noised, trial._noise_key_file = False, {}, None
        trial._words = np.empty(0, np.uint64)
        trial.state = new_state(trial.event, self._clipping, 0)
        return trial

    def __reduce__(self) -> NoReturn:
        raise TypeError("[PrivacyEngine] engine must not be copied or pickled: it holds the secret noise key")

    def __repr__(self) -> str:
        return (
            f"PrivacyEngine(dataset_size={self.dataset_size}, sample_rate={self.sample_rate:.6g}, "
            f"noise_multiplier={self.noise_multiplier:.6g}, max_grad_norm={self.max_grad_norm:.6g}, "
            f"clipping={self.clipping!r}, accountant={self.accountant!r}, adjacency={self.adjacency!r})"
        )
