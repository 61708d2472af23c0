import mlx.core as mx
import mlx_bulwark as bw
import numpy as np


def test_norms(backend):
    g = np.random.default_rng(0).standard_normal((3, 31)).astype(np.float32)
    np.testing.assert_allclose(np.array(bw.sample_sq_norms([mx.array(g)])), (g.astype(np.float64) ** 2).sum(1), rtol=1e-5)
