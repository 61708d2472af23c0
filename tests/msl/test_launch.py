"""What the host does wrong is refused; and the extension's way into the simulator."""

import ctypes
import hashlib
import re

import numpy as np
import pytest

import msl
from msl.bridge import Simulator
from msl.mutations import barriers, without

pytestmark = pytest.mark.usefixtures("simulator")
TEXT = """#include <metal_stdlib>
using namespace metal;
constant uint offset [[function_constant(3)]];
constant bool negated [[function_constant(5)]];

kernel void turn(device const float* x [[buffer(1)]], device float* y [[buffer(0)]], constant uint& n [[buffer(2)]],
                 uint t [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[t] = x[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);  // not: threadgroup_barrier(mem_flags::mem_none)
  float v = shared[(n - 1 - t + offset) % n];
  y[t] = negated ? -v : v;
}

struct Input {
  device const float* x;
};
kernel void gather(constant Input* inputs [[buffer(0)]], device float* y [[buffer(1)]],
                   constant uint& offset_in_each [[buffer(2)]], uint t [[thread_index_in_threadgroup]]) {
  y[t] = inputs[t].x[offset_in_each];
}
"""
X = np.arange(64, dtype=np.float32)
LAUNCH = {"grid": (64, 1, 1), "group": (64, 1, 1)}
CONSTANTS = {"offset": 0, "negated": False}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = tmp_path_factory.mktemp("launch") / "turn.metal"
    source.write_text(TEXT)
    return msl.Library(source)


def arguments(**other):
    return {"x": X, "y": msl.Output((64,)), "n": np.uint32(64)} | other


def test_function_constants(library):
    constants = {"offset": 2, "negated": True}
    result = library.launch("turn", arguments(), **LAUNCH, constants=constants)
    assert result.reports == []
    assert (result.arrays["y"] == -np.roll(X[::-1], 2)).all()
    again = library.launch("turn", arguments(), **LAUNCH, constants=CONSTANTS)
    assert (again.arrays["y"] == X[::-1]).all()


@pytest.mark.parametrize(
    ("kernel", "given", "launch", "message"),
    [
        ("spin", arguments(), LAUNCH, "there is no kernel spin"),
        ("turn", {"x": X, "n": np.uint32(64)}, LAUNCH, "nothing is bound to y"),
        ("turn", arguments(n=msl.Output((1,), np.uint32)), LAUNCH, "n is constant in the kernel but an output"),
        ("turn", arguments(), {"grid": (64, 0, 1), "group": (64, 1, 1)}, "the grid or the threadgroup is empty"),
        ("turn", arguments(), LAUNCH | {"speed": 1}, "there is no option speed"),
    ],
)
def test_what_the_host_does_wrong_is_refused(library, kernel, given, launch, message):
    with pytest.raises(ValueError, match=message):
        library.launch(kernel, given, **launch, constants=CONSTANTS)


def test_a_function_constant_of_another_type_is_refused(library):
    library.functions.msl_begin(b"turn")
    value = ctypes.c_uint32(1)
    assert library.functions.msl_constant(5, 0, ctypes.byref(value), ctypes.c_size_t(4)) == -1
    assert library.functions.msl_error() == b"function constant negated has another type in the kernel"


def test_arrays_that_a_kernel_reaches_by_address(library):
    inputs = [np.arange(i, i + 3 + i, dtype=np.float32) for i in range(4)]
    given = {"inputs": inputs, "y": msl.Output((4,)), "offset_in_each": np.uint32(2)}
    result = library.launch("gather", given, grid=(4, 1, 1), group=(4, 1, 1))
    assert result.reports == []
    assert (result.arrays["y"] == [2, 3, 4, 5]).all()
    assert [result.buffers[f"inputs[{i}]"]["unique_read"] for i in range(4)] == [4] * 4
    past = library.launch("gather", given | {"offset_in_each": np.uint32(3)}, grid=(4, 1, 1), group=(4, 1, 1))
    (report,) = past.reports
    assert "out-of-bounds read: 4 bytes at offset 12 of inputs[0] (12 bytes)" in report


def test_text_that_has_not_changed_is_not_compiled_again(library, monkeypatch):
    commands = []
    run = msl.build.__globals__["run"]
    monkeypatch.setitem(msl.build.__globals__, "run", lambda *words: commands.append(words) or run(*words))
    source = library.source
    msl.Library(source)
    assert not [words for words in commands if "-c" in words]


class Extension:
    """What csrc/common/launch_sim.cpp does, in Python."""

    def __init__(self):
        self.libraries, self.results = {}, []

    def sources(self):
        return [("turn", TEXT, hashlib.sha256(TEXT.encode()).hexdigest()[:16])]

    def sim_load(self, digest, path):
        self.libraries[digest] = ctypes.CDLL(path)
        for name in ("msl_buffer", "msl_result"):
            getattr(self.libraries[digest], name).restype = ctypes.c_void_p

    def sim_option(self, name, value):
        for library in self.libraries.values():
            assert library.msl_option(name.encode(), value) == 0

    def sim_take(self):
        taken, self.results = self.results, []
        return taken

    def turn(self, x):
        """Run the kernel as an op would."""
        library = self.libraries[self.sources()[0][2]]
        y, n, offset, negated = np.empty_like(x), ctypes.c_uint32(64), ctypes.c_uint32(0), ctypes.c_bool(False)
        assert library.msl_begin(b"turn") == 0
        assert library.msl_constant(3, 0, ctypes.byref(offset), ctypes.c_size_t(4)) == 0
        assert library.msl_constant(5, 1, ctypes.byref(negated), ctypes.c_size_t(1)) == 0
        assert (
            library.msl_constant(9, 1, ctypes.byref(negated), ctypes.c_size_t(1)) == 0
        )  # which the text does not know
        to = library.msl_buffer(0, ctypes.c_size_t(y.nbytes), 1)
        ctypes.memmove(library.msl_buffer(1, ctypes.c_size_t(x.nbytes), 0), x.ctypes.data, x.nbytes)
        ctypes.memmove(library.msl_buffer(2, ctypes.c_size_t(4), 0), ctypes.byref(n), 4)
        size = (ctypes.c_uint32 * 3)(64, 1, 1)
        assert library.msl_launch(size, size) >= 0
        ctypes.memmove(y.ctypes.data, to, y.nbytes)
        self.results.append(("turn", ctypes.string_at(library.msl_result()).decode()))
        return y


def test_the_bridge_between_extension_and_simulator():
    simulator, extension = Simulator(), Extension()
    simulator(extension)
    for order in (0, 1, 2):
        simulator.option("order", order)
        assert (extension.turn(X) == X[::-1]).all()
    assert simulator.reports == []
    assert [call.kernel for call in simulator.calls] == ["turn"] * 3
    assert simulator.calls[0].buffers["x"]["unique_read"] == 256
    assert simulator.calls[0].threadgroup_bytes == 256
    assert simulator.calls[0].threads == 64

    (barrier,) = barriers(TEXT)
    name, _, digest = extension.sources()[0]
    simulator.load(name, without(TEXT, barrier), digest)
    extension.turn(X)
    expected = r"turn: turn\.metal:11:\d+: data race: read after write without a barrier: offset 124 of shared"
    assert any(re.match(expected, report) for report in simulator.reports)

    simulator.load(name, TEXT, digest)
    simulator.reset()
    extension.turn(X)
    assert simulator.reports == []


def test_the_bridge_refuses_text_that_a_mac_would_refuse():
    simulator = Simulator()
    simulator(Extension())
    with pytest.raises(msl.CompileError, match="a pointer or reference without an address space"):
        simulator.load("turn", TEXT.replace("threadgroup float shared[64];", "float v = 0; float* p = &v;"), "0")
