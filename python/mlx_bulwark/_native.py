"""Chooses what runs the ops: the native extension, or the plain-MLX reference."""

import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx

BACKENDS = ("auto", "native", "reference")

Stream = mx.Stream | mx.Device | mx.DeviceType | None
ReferenceFunction = Callable[[list[mx.array], Any], list[mx.array]]


class Backend(NamedTuple):
    """What runs the ops, and why."""

    name: str
    reason: str


ext: ModuleType | None = None
_references: dict[str, ReferenceFunction] = {}
_state = Backend("reference", "not chosen yet")


def backend() -> Backend:
    """Tell which backend runs the ops, and why.

    Returns:
        Backend: ``name`` is ``"native"`` or ``"reference"``, ``reason`` says why. The environment variable
        ``BULWARK_BACKEND`` (``auto``, ``native``, ``reference``) chooses at import.

    Example:
        >>> import mlx_bulwark as bw
        >>> bw.backend().name in ("native", "reference")
        True
    """
    return _state


def _load() -> str | None:
    """Import the extension; return a reason in words where that cannot be.

    Nothing is loaded before the versions agree: MLX's C++ symbols change in patch releases.
    """
    global ext
    if ext is not None:
        return None
    try:
        from ._built import MLX as built
    except ImportError:
        return "the package holds no native extension; `pip install mlx-bulwark` builds it"
    installed = mx.__version__.split("+")[0]
    if installed != built:
        return (
            f"the extension was built for mlx {built} but mlx {installed} is installed; "
            f"`pip install mlx=={built}` mends it"
        )
    try:
        from . import _ext
    except ImportError as e:
        return f"the extension does not load ({e}); `pip install --force-reinstall mlx-bulwark` builds it anew"
    for name, f in _references.items():
        _ext.set_reference(name, f)
    ext = _ext
    return None


def use(name: str) -> None:
    """Choose the backend of the ops that are built from now on (tests; users set ``BULWARK_BACKEND``).

    Args:
        name: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: ``name`` is none of them.
        ImportError: ``"native"`` was asked for and cannot be.
    """
    global _state
    if name not in BACKENDS:
        raise ValueError(f"[bulwark] BULWARK_BACKEND must be one of {', '.join(BACKENDS)} but is {name!r}")
    why = "asked for" if name == "reference" else _load()
    if name == "native" and why:
        raise ImportError(f"[bulwark] backend native: {why}")
    if name == "auto" and why:
        warnings.warn(f"mlx_bulwark runs its plain-MLX reference, correct but slower: {why}", stacklevel=3)
    _state = Backend("reference", why) if why else Backend("native", "the extension is loaded")


def use_from_environment() -> None:
    """Choose the backend that ``BULWARK_BACKEND`` names."""
    use(os.environ.get("BULWARK_BACKEND", "auto"))


def reference(name: str) -> Callable[[ReferenceFunction], ReferenceFunction]:
    """Make ``f(arrays, stream) -> [array]`` the derivative and the vmap of the primitive ``name``."""

    def register(f: ReferenceFunction) -> ReferenceFunction:
        _references[name] = f
        if ext is not None:
            ext.set_reference(name, f)
        return f

    return register


def native_for(stream: Stream) -> ModuleType | None:
    """Return the extension if it runs ops on this stream, else None: on a GPU stream the reference runs."""
    if _state.name == "reference":
        return None
    device = mx.default_device() if stream is None else stream
    device = getattr(device, "device", device)
    return ext if device == mx.cpu else None
