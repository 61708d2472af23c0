"""Chooses what runs the ops: the native extension, the plain-MLX reference, or in tests the Metal simulator."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

try:
    import mlx.core as mx
except ImportError as e:
    if "libmlx" not in str(e):
        raise
    raise ImportError(f"mlx holds no library on Linux ({e}); `pip install 'mlx-bulwark[cpu]'` brings it") from e

if TYPE_CHECKING:
    from . import _ext

    ext = _ext
else:
    ext = None  # the extension, once it is loaded

BACKENDS = ("auto", "native", "reference", "metal-sim")

Stream = mx.Stream | mx.Device | mx.DeviceType | None
ReferenceFunction = Callable[..., list[mx.array]]


class Backend(NamedTuple):
    """What runs the ops, and why."""

    name: str
    reason: str


class Simulator(Protocol):
    """What runs the Metal kernels under the backend ``metal-sim``."""

    reports: list[str]

    def __call__(self, extension: Any) -> None:
        """Get ready; called with the extension whenever that backend is chosen."""


_references: dict[str, ReferenceFunction] = {}
_simulator: Simulator | None = None
_loaded = False
_state = Backend("reference", "not chosen yet")


def backend() -> Backend:
    """Tell which backend runs the ops, and why.

    Returns:
        Backend: ``name`` is ``"native"`` or ``"reference"``, of ops on MLX's default device; ``reason`` says why. The
        environment variable ``BULWARK_BACKEND`` (``auto``, ``native``, ``reference``) chooses at import.

    Example:
        >>> import mlx_bulwark as bw
        >>> bw.backend().name in ("native", "reference")
        True
    """
    if _state.name == "reference" or runs_native(None):
        return _state
    return Backend(
        "reference",
        f"the extension is loaded and runs on the CPU and on Metal, but the default device is {mx.default_device()}",
    )


def installed_mlx() -> str:
    """Version of the MLX that is imported, without a local part."""
    version: str = mx.__version__.split("+")[0]  # type: ignore[attr-defined]  # MLX's stubs leave it out
    return version


def _load() -> str | None:
    """Import the extension; return a reason in words where that cannot be.

    Nothing is loaded before the versions agree: MLX's C++ symbols change in patch releases.
    """
    global _loaded
    if _loaded:
        return None
    try:
        from . import _built
    except ImportError:
        return "the package holds no native extension; `pip install .` in its sources builds it"
    installed = installed_mlx()
    if installed != _built.MLX:
        return (
            f"the extension was built for mlx {_built.MLX} but mlx {installed} is installed; "
            f"`{_install_mlx(_built.MLX)}` mends it"
        )
    try:
        from . import _ext
    except ImportError as e:
        return f"the extension does not load ({e}); `pip install --force-reinstall --no-deps .` in its sources mends it"
    for name, f in _references.items():
        _ext.set_reference(name, f)
    globals()["ext"] = _ext
    _loaded = True
    _load_blas()
    return None


def _load_blas() -> None:
    """Give the extension a fast matrix product: Accelerate on macOS, scipy-openblas32 elsewhere."""
    if sys.platform == "darwin":
        ext.load_blas("/System/Library/Frameworks/Accelerate.framework/Accelerate", "")
        return
    with suppress(ImportError):
        import scipy_openblas32

        folder = scipy_openblas32.get_lib_dir()
        ext.load_blas(os.path.join(folder, scipy_openblas32.get_library(fullname=True)), "scipy_")


def _reason() -> str:
    if ext.has_blas():
        return "the extension is loaded"
    return "the extension is loaded, but no BLAS: matrix products are slower; `pip install scipy-openblas32` brings one"


def _install_mlx(version: str) -> str:
    """Command that installs this MLX with the library that is installed now."""
    extra = "" if sys.platform == "darwin" else "cpu"
    for cuda in ("cuda-12", "cuda-13"):
        if any(d.metadata["Name"] == f"mlx-{cuda}" for d in metadata.distributions()):
            extra = cuda.replace("-", "")
    return f"pip install 'mlx[{extra}]=={version}'" if extra else f"pip install mlx=={version}"


def use(name: str) -> None:
    """Choose the backend of the ops that are built from now on (tests; users set ``BULWARK_BACKEND``).

    Args:
        name: ``"auto"``, ``"native"``, ``"reference"`` or, with a simulator connected, ``"metal-sim"``.

    Raises:
        ValueError: ``name`` is none of them.
        ImportError: ``"native"`` was asked for and cannot be.
        RuntimeError: ``"metal-sim"`` was asked for and no simulator is connected.
    """
    global _state
    if name not in BACKENDS:
        raise ValueError(f"[bulwark] BULWARK_BACKEND must be one of {', '.join(BACKENDS)} but is {name!r}")
    why = "asked for" if name == "reference" else _load()
    if name in ("native", "metal-sim") and why:
        raise ImportError(f"[bulwark] backend {name}: {why}")
    if name == "auto" and why:
        warnings.warn(f"mlx_bulwark runs its plain-MLX reference, correct but slower: {why}", stacklevel=3)
    if name == "metal-sim":
        if _simulator is None:
            raise RuntimeError("[bulwark] backend metal-sim: no simulator is connected (tests/conftest.py does it)")
        _simulator(ext)
    if _loaded and sys.platform != "darwin":
        ext.sim_enable(name == "metal-sim")
    _state = Backend("reference", why) if why else Backend("native" if name == "auto" else name, _reason())


@contextmanager
def using(name: str) -> Iterator[None]:
    """Choose the backend of the ops that are built inside."""
    global _state
    before = _state
    try:
        use(name)
        yield
    finally:
        use(before.name)
        _state = before


def connect(simulator: Simulator) -> None:
    """Give the backend ``metal-sim`` its simulator."""
    global _simulator
    _simulator = simulator


def simulator() -> Simulator | None:
    """The simulator that is connected."""
    return _simulator


def use_from_environment() -> None:
    """Choose the backend that ``BULWARK_BACKEND`` names."""
    use(os.environ.get("BULWARK_BACKEND") or "auto")


def reference(name: str) -> Callable[[ReferenceFunction], ReferenceFunction]:
    """Make ``f(arrays, stream) -> [array]`` the derivative and the vmap of the primitive ``name``.

    A primitive with parameters beyond its inputs gives them as JSON: ``f(arrays, stream, parameters)``.
    """

    def register(f: ReferenceFunction) -> ReferenceFunction:
        _references[name] = f
        if _loaded:
            ext.set_reference(name, f)
        return f

    return register


def runs_native(stream: Stream) -> bool:
    """Whether the extension (``ext``) runs ops on this stream; on a GPU stream other than Metal the reference runs."""
    if _state.name == "reference":
        return False
    device = mx.default_device() if stream is None else stream
    return bool(getattr(device, "device", device) == mx.cpu) or mx.metal.is_available()
