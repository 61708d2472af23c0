"""What a Mac would refuse is refused here, with file and line; what it takes is not."""

import re
from pathlib import Path

import pytest

import msl

pytestmark = pytest.mark.usefixtures("simulator")
HERE = Path(__file__).parent
REFUSED = (HERE / "refused.metal").read_text()
EXPECTED = {
    "ADDRESS_SPACE": "no matching function",
    "WRITE_TO_CONSTANT": "read-only variable is not assignable",
    "DOUBLE": "Metal has no double",
    "RECURSION": "a function that calls itself",
    "MUTUAL_RECURSION": "a function that calls itself",
    "VECTOR_OF_32_BYTES": "the simulator does not see vectors of 32 bytes",
    "VEC_OF_32_BYTES": "the simulator does not see vectors of 32 bytes",
    "LAMBDA": "a lambda",
    "IF_CONSTEXPR": "constexpr if is incompatible with C",
    "STRUCTURED_BINDING": "decomposition declarations are incompatible with C",
    "FOLD": "pack fold expression is incompatible with C",
    "VIRTUAL": "virtual: Metal has no types at run time",
    "NEW": "new: Metal has no dynamic memory",
    "GOTO": "goto: Metal does not have this of C",
    "STANDARD_LIBRARY": "std: Metal has no C.. standard library",
    "STRING": "a string",
    "NARROWING": "implicit conversion loses floating-point precision",
    "COMPILERS_OWN": "__builtin_popcount: not a name for kernels to use",
    "UNKNOWN_ATTRIBUTE": "an attribute that the simulator does not know",
    "LONG_DOUBLE": "Metal has no long double",
    **dict.fromkeys(
        re.findall(r"#ifdef (UNQUALIFIED_\w+)", REFUSED), "a pointer or reference without an address space"
    ),
    **dict.fromkeys(
        ("PROGRAM_VARIABLE", "CONSTEXPR_PROGRAM_VARIABLE", "STATIC_VARIABLE", "STATIC_MEMBER"),
        "a variable of the program must be in constant memory",
    ),
}


@pytest.mark.parametrize("name", re.findall(r"#ifdef (\w+)", REFUSED))
def test_what_metal_does_not_take_is_refused(name, tmp_path):
    source = tmp_path / "refused.metal"
    source.write_text(f"#define {name}\n#line 1\n{REFUSED}")
    line = next(n for n, text in enumerate(REFUSED.splitlines(), 1) if text.endswith(f"// refused: {name}"))
    with pytest.raises(msl.CompileError, match=rf"refused\.metal:{line}:[^\n]*{EXPECTED[name]}"):
        msl.check(source)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("// 5 \N{MICRO SIGN}s", "not ASCII"),
        ('#include "other.h"', "only <metal_"),
        ("#include <cmath>", "only <metal_"),
        ("  # import <metal_stdlib.h>", "only <metal_"),
    ],
)
def test_characters_and_includes(line, problem, tmp_path):
    source = tmp_path / "included.metal"
    source.write_text(f"#include <metal_stdlib>\n{line}\n")
    with pytest.raises(msl.CompileError, match=rf"^included\.metal:2: {problem}"):
        msl.check(source)


def test_what_metal_takes_is_not_refused(tmp_path):
    msl.check(HERE / "accepted.metal")
    nothing = tmp_path / "refused.metal"
    nothing.write_text(REFUSED)
    msl.check(nothing)
    assert set(msl.Library(HERE / "accepted.metal").kernels) == {
        f"scale_{t}" for t in ("float32", "float16", "bfloat16")
    }
