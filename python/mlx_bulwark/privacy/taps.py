"""Taps: record the inputs of every private layer, and give it an output whose gradient can be asked for.

While a loss is traced, each layer that owns trainable parameters is *tapped*: its call adds a zero `probe` to its
output, so that the gradient with respect to the probe is the gradient with respect to the output, and its inputs are
kept. One backward pass then gives everything that per-sample norms and clipped sums need, and no weight gradient.

Between the calls the layer's trainable parameters are hidden behind a `Hidden`, so that a use outside the call, whose
gradient the tap would not see, is an error rather than a silent gap in the guarantee.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class PrivacyError(ValueError):
    """The model, the loss or their use cannot be made private as they are."""


class Hidden(dict[str, Any]):
    """Stands in for a trainable parameter outside its layer's call. A dict, or model.parameters() would skip it."""

    def __init__(self, path: str, array: mx.array) -> None:
        super().__init__()
        self._path = path
        self.shape, self.dtype, self.ndim, self.size = array.shape, array.dtype, array.ndim, array.size

    def refuse(self) -> NoReturn:
        """Say what must not be done."""
        raise PrivacyError(
            f"[value_and_grad] parameter {self._path} must be used only inside the __call__ of the layer that owns it "
            "but was used outside; its gradient would escape clipping (grad_sample_mode='loop' takes such a model)"
        )

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()

    def _refused(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refused
    __matmul__ = __rmatmul__ = __neg__ = __pow__ = __abs__ = __getitem__ = __iter__ = __len__ = __bool__ = _refused

    def _read(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PrivacyError(
            f"[value_and_grad] parameter {self._path} must be used only inside the __call__ of the layer that owns it "
            "but was read with the model's parameters (weight decay in the loss? nn.utils.checkpoint?): decay belongs "
            "to the optimizer, and private gradients need what the layers saw, which a checkpoint would drop "
            "(grad_sample_mode='loop' does without)"
        )

    items = keys = values = _read


@dataclass
class Slot:
    """One trainable array and the container that holds it."""

    path: str  # in the model
    name: str  # in the site's module
    container: Any
    key: Any
    array: mx.array


ShapeAndDtype = tuple[tuple[int, ...], mx.Dtype]


class Rule(NamedTuple):
    """How a type of layer is tapped, and how its per-sample gradients come from what was tapped."""

    per_sample: Callable[..., Any]  # (Site, list[Tapped]) -> PerSample
    parameters: tuple[str, ...] = ("weight", "bias")  # what the rule knows; a layer that trains more has no rule
    methods: tuple[str, ...] = ("__call__",)  # what the model may call
    needs_outputs: bool = False
    recorded: tuple[str, ...] = ()  # children whose outputs are recorded
    probed: tuple[str, ...] = ()  # children whose input gets a probe too
    # (layer, inputs) -> biases that are run with a probe for each row of the batch, and the probes' shapes
    expanded: Callable[[Any, list[mx.array]], dict[str, tuple[int, ...]]] | None = None
    routed: bool = False  # sees rows that may be sorted by their experts, all examples together


@dataclass
class Site:
    """One tapped layer."""

    path: str
    module: nn.Module
    cls: type[nn.Module]
    slots: list[Slot]
    rule: Rule | None
    clipped_together: bool = False  # all its parameters in one group
    folded: bool = False  # its rows are those of all examples, one after the other

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that are tapped."""
        return self.rule.methods if self.rule else ("__call__",)

    @property
    def params(self) -> dict[str, mx.array]:
        """The layer's trainable arrays by their names in the layer."""
        return {s.name: s.array for s in self.slots}

    def install(self, params: dict[str, mx.array]) -> None:
        """Put these arrays in place of the layer's trainable parameters."""
        for s in self.slots:
            s.container[s.key] = params[s.name]

    def hide(self) -> None:
        """Put stand-ins in place of the layer's trainable parameters."""
        for s in self.slots:
            s.container[s.key] = Hidden(s.path, s.array)

    def run(
        self,
        params: dict[str, mx.array],
        args: Any,
        kwargs: Any,
        method: str = "__call__",
        expanded: dict[str, mx.array] | None = None,
    ) -> Any:
        """Call the layer as it is without a tap, with these parameters and these probes added to its biases."""
        self.install(params)
        cls, module = self.module.__class__, self.module
        module.__class__ = self.cls
        biases = {name: getattr(module, name) for name in expanded or {}}
        for name, probe in (expanded or {}).items():
            setattr(module, name, probe if biases[name] is None else biases[name] + probe)
        try:
            return getattr(module, method)(*args, **kwargs)
        finally:
            for name, bias in biases.items():
                setattr(module, name, bias)
            module.__class__ = cls
            self.hide()

    @property
    def label(self) -> str:
        """How errors name the layer."""
        return f"layer {self.path or 'model'} ({self.cls.__name__})"


class Planned(NamedTuple):
    """What is known of a call before it is traced."""

    path: str
    method: str
    outputs: list[ShapeAndDtype]  # as the rest of the model sees them: with the batch axis
    inner: dict[str, ShapeAndDtype]  # probes inside the layer
    batched: list[bool]  # which inputs have the batch axis
    broadcast: bool  # the layer sees no batch axis: one output for all examples


@dataclass
class Call:
    """One call of a tapped layer."""

    site: Site
    method: str
    structure: Any  # (args, kwargs) with every array replaced by its index
    inputs: list[mx.array]
    outputs: list[mx.array]
    recorded: dict[str, mx.array]  # outputs of children, and the layer's own, where its rule wants them
    inner: dict[str, ShapeAndDtype]  # shapes of the probes inside the layer, without those of a broadcast

    def arguments(self, inputs: list[mx.array]) -> tuple[Any, Any]:
        """Return args and kwargs with these arrays in place of the recorded ones."""
        args, kwargs = _replace(self.structure, lambda v: inputs[v.index] if isinstance(v, _Index) else v)
        return args, kwargs


class _Index:
    def __init__(self, index: int) -> None:
        self.index = index


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """Dotted paths and arrays of a tree."""
    return [(path, a) for path, a in list(tree_flatten(tree)) if isinstance(a, mx.array)]


def _replace(tree: Any, f: Any) -> Any:
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return type(tree)(_replace(v, f) for v in tree)
    if type(tree) is dict:
        return {k: _replace(v, f) for k, v in tree.items()}
    return f(tree)


def _take_arrays(tree: Any) -> tuple[Any, list[mx.array]]:
    arrays: list[mx.array] = []

    def take(v: Any) -> Any:
        if not isinstance(v, mx.array):
            return v
        arrays.append(v)
        return _Index(len(arrays) - 1)

    return _replace(tree, take), arrays


class _Sorted(NamedTuple):
    """Rows of all examples in the order of their experts."""

    experts: mx.array  # [rows]; held, since it is known by its id
    inverse: mx.array  # [rows]: where each row went
    shape: tuple[int, ...]  # [B, ...] of the rows before they were sorted

    def undone(self, rows: mx.array) -> mx.array:
        """[rows, ...] -> [B, ..., ...]."""
        return mx.unflatten(rows[self.inverse], 0, self.shape)

    def done(self, rows: mx.array) -> mx.array:
        """[B, ..., ...] -> [rows, ...]."""
        return rows.flatten(0, len(self.shape) - 1)[mx.argsort(self.inverse)]


class Trace:
    """What one forward pass through tapped layers recorded."""

    def __init__(
        self,
        batch_size: int,
        plan: list[Planned] | None,
        probes: list[list[mx.array]],
        inner: list[dict[str, mx.array]],
    ) -> None:
        self.batch_size, self.plan, self.probes, self.inner = batch_size, plan, probes, inner
        self.calls: list[Call] = []
        self.sorted: dict[int, _Sorted] = {}

    def call(self, site: Site, method: str, args: Any, kwargs: Any) -> Any:
        """Run the layer, record, and add the probes."""
        k = len(self.calls)
        planned = self.plan is not None
        if self.plan is not None and (k >= len(self.plan) or self.plan[k][:2] != (site.path, method)):
            raise PrivacyError(
                f"[value_and_grad] {site.label} must be called alike in every forward pass but was not; "
                "control flow must not depend on the data"
            )
        structure, inputs = _take_arrays((args, kwargs))
        call = Call(site, method, structure, inputs, [], {}, {})
        self.calls.append(call)
        random_state = _random_state()
        probed = site.rule.probed if site.rule else ()
        inner = self.inner[k] if planned else {}
        with ExitStack() as stack:
            for name in dict.fromkeys((*site.rule.recorded, *probed)) if site.rule else ():
                stack.enter_context(_child(call, name, name in probed, inner.get(name)))
            expanded = {name: probe for name, probe in inner.items() if name not in probed}
            if expanded and self.plan is not None and self.plan[k].broadcast:
                (B, *_), _ = self.plan[k].outputs[0]
                args, kwargs = call.arguments([mx.broadcast_to(a, (B, *a.shape)) for a in inputs])
            result = site.run(site.params, args, kwargs, method, expanded)
        if site.rule and site.rule.routed:
            return self._routed(call, result, self.probes[k] if planned else None)
        if not site.rule and _random_state() is not random_state:
            raise PrivacyError(
                f"[value_and_grad] {site.label} must not draw random numbers but does (dropout?): its forward pass is "
                "run again for per-sample gradients; move what is random into a layer of its own"
            )
        call.outputs = _take_arrays(result)[1]
        if site.rule and site.rule.needs_outputs:
            call.recorded["output"] = call.outputs[0]
        if site.rule and site.rule.expanded:
            shapes = site.rule.expanded(site.module, inputs)
            call.inner.update({name: (shape, call.outputs[0].dtype) for name, shape in shapes.items()})
        if site.folded:
            self._unfold(call)
        if not planned:
            return result
        if site.folded:
            return result + self.probes[k][0].reshape(result.shape)
        probes = iter(self.probes[k])
        return _replace(result, lambda v: _probe(v, next(probes)) if isinstance(v, mx.array) else v)

    def _routed(self, call: Call, result: mx.array, probes: list[mx.array] | None) -> mx.array:
        """Record a call with its rows in the order of the examples; the layer itself sees them in any."""
        x, experts = call.inputs
        order = self.sorted.get(id(experts))
        if order is None and call.structure[1].get("sorted_indices"):
            raise PrivacyError(
                f"[value_and_grad] {call.site.label} must get its rows sorted by mlx_lm.models.switch_layers but did "
                "not: what belongs to which example is lost"
            )

        def of_examples(rows: mx.array) -> mx.array:
            if order is not None:
                return order.undone(rows)
            return mx.broadcast_to(rows, (*experts.shape, *rows.shape[-2:]))

        call.inputs = [of_examples(x), experts if order is None else order.undone(experts)]
        call.recorded = {name: of_examples(y) for name, y in call.recorded.items()}
        call.outputs = [of_examples(result)]
        shape = call.outputs[0].shape
        if call.site.folded:
            self._unfold(call)
        if probes is None:
            return result
        probe = probes[0].reshape(shape)
        return result + (probe if order is None else order.done(probe))

    def _unfold(self, call: Call) -> None:
        """Give what was recorded the batch axis."""

        def unfolded(rows: mx.array) -> mx.array:
            return mx.unflatten(rows, 0, (self.batch_size, -1))

        call.inputs, call.outputs = ([unfolded(a) for a in arrays] for arrays in (call.inputs, call.outputs))
        call.recorded = {name: unfolded(a) for name, a in call.recorded.items()}


@contextmanager
def _sorting_recorded(trace: Trace) -> Iterator[None]:
    """Remember how mlx-lm sorts the rows of all examples by their experts."""
    layers: Any = sys.modules["mlx_lm.models.switch_layers"]
    sort = layers._gather_sort

    def recording(x: mx.array, experts: mx.array) -> Any:
        rows, of_rows, inverse = sort(x, experts)
        trace.sorted[id(of_rows)] = _Sorted(of_rows, inverse, experts.shape)
        return rows, of_rows, inverse

    layers._gather_sort = recording
    try:
        yield
    finally:
        layers._gather_sort = sort


@contextmanager
def _child(call: Call, name: str, probed: bool, probe: mx.array | None) -> Iterator[None]:
    module: Any = call.site.module
    child = module[name]

    def run(x: mx.array) -> Any:
        if probed:
            call.inner[name] = (x.shape, x.dtype)
        y = child(x if probe is None else _probe(x, probe))
        call.recorded[name] = y
        return y

    module[name] = run
    try:
        yield
    finally:
        module[name] = child


def _random_state() -> Any:
    return cast(Any, mx.random.state)[0]


def _probe(y: mx.array, probe: mx.array) -> mx.array:
    return mx.broadcast_to(y, probe.shape) + probe


_active: list[tuple[dict[int, Site], Trace]] = []
_tapped_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _tapped(cls: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    if cls not in _tapped_classes:

        def tap(method: str) -> Callable[..., Any]:
            def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                sites, trace = _active[-1]
                return trace.call(sites[id(self)], method, args, kwargs)

            return call

        members = {method: tap(method) for method in methods}
        _tapped_classes[cls] = type(cls.__name__, (cls,), {**members, "__module__": cls.__module__})
    return _tapped_classes[cls]


@contextmanager
def tapped(sites: list[Site], trace: Trace) -> Iterator[None]:
    """Tap the layers while a forward pass is traced."""
    _active.append(({id(s.module): s for s in sites}, trace))
    for s in sites:
        s.module.__class__ = _tapped(s.cls, s.methods)
        s.hide()
    routed = any(s.rule and s.rule.routed for s in sites)
    try:
        with _sorting_recorded(trace) if routed else nullcontext():
            yield
    except TypeError as e:
        if "Hidden" in str(e):
            raise PrivacyError(
                "[value_and_grad] trainable parameters must be used only inside the __call__ of the layer that owns "
                f"them but one was used outside: {str(e).splitlines()[0]}"
            ) from e
        raise
    finally:
        for s in sites:
            s.module.__class__ = s.cls
            s.install(s.params)
        _active.pop()


def find_sites(model: nn.Module, rule_of: Callable[[nn.Module], Rule | None]) -> list[Site]:
    """List the layers that own trainable parameters."""
    slots: dict[tuple[int, Any], tuple[str, nn.Module, Slot]] = {}
    for path, array in named_arrays(model.trainable_parameters()):
        owner_path, owner, slot = _locate(model, path, array)
        slots[id(slot.container), slot.key] = (owner_path, owner, slot)  # shared: its last path counts, as in MLX
    sites: dict[int, Site] = {}
    for path, module, slot in slots.values():
        new = Site(path, module, type(module), [], rule_of(module), folded=_in_folding(model, path))
        site = sites.setdefault(id(module), new)
        site.slots.append(slot)
    return list(sites.values())


# Layers of mlx-lm that, from [batch, steps, features], give theirs [batch * steps, features].
FOLDING = ("mlx_lm.models.olmoe.OlmoeSparseMoeBlock",)


def _in_folding(model: nn.Module, path: str) -> bool:
    container: Any = model
    for part in path.split(".") if path else ():
        if f"{type(container).__module__}.{type(container).__qualname__}" in FOLDING:
            return True
        container = container[int(part) if isinstance(container, list) else part]
    return False


def _locate(model: nn.Module, path: str, array: mx.array) -> tuple[str, nn.Module, Slot]:
    container: Any = model
    owner_path, owner, parts = "", model, path.split(".")
    for i, part in enumerate(parts[:-1]):
        container = container[int(part) if isinstance(container, list) else part]
        if isinstance(container, nn.Module):
            owner_path, owner = ".".join(parts[: i + 1]), container
    key = int(parts[-1]) if isinstance(container, list) else parts[-1]
    name = path[len(owner_path) + 1 :] if owner_path else path
    return owner_path, owner, Slot(path, name, container, key, array)
