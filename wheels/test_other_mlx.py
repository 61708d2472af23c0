"""For an environment that holds the wheel and an MLX that it was not built for (.ci/run makes one)."""

import json
import os
import subprocess
import sys
from importlib import metadata

from mlx_bulwark import _built

PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mlx_bulwark as bw
    import mlx.core as mx
    a, b = (bw.gaussian((4,), 1.0, bw.key_from_seed(7), counter).tolist() for counter in (0, bw.blocks_used((4,))))
    norms = bw.sample_sq_norms([mx.array([[3.0, 4.0], [0.0, 1.0]])]).tolist()
print(json.dumps({"backend": bw.backend(), "warnings": [str(w.message) for w in caught], "norms": norms,
                  "noise": [a, b], "loaded": "mlx_bulwark._ext" in sys.modules, "file": bw.__file__}))
"""


def test_one_warning_and_the_reference():
    installed = metadata.version("mlx")
    assert installed != _built.MLX
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BULWARK_")}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["file"].startswith(sys.prefix)
    assert seen["backend"][0] == "reference"
    (warning,) = seen["warnings"]
    assert f"built for mlx {_built.MLX} but mlx {installed} is installed" in warning
    assert f"pip install 'mlx[cpu]=={_built.MLX}'" in warning
    assert not seen["loaded"]
    assert seen["norms"] == [25.0, 1.0]
    assert len({*seen["noise"][0], *seen["noise"][1]}) == 8
