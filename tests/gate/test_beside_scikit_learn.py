"""Statistics of the gate and of drift beside scikit-learn's."""

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark.gate.statistics import channel_statistics

pytest.importorskip("sklearn")
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_and_extremes_are_those_of_its_scalers(dtype):
    x = (np.random.default_rng(0).normal(size=(3001, 7)) * np.arange(1, 8) + 100).astype(dtype)
    x[5, 3] = np.nan
    ours, standard, extremes = channel_statistics(x, 0), StandardScaler().fit(x), MinMaxScaler().fit(x)
    np.testing.assert_allclose(ours.mean, standard.mean_, rtol=1e-6)
    np.testing.assert_allclose(ours.m2 / ours.count, standard.var_, rtol=1e-4)
    np.testing.assert_array_equal(ours.minimum, extremes.data_min_)
    np.testing.assert_array_equal(ours.maximum, extremes.data_max_)
    np.testing.assert_array_equal(ours.count, standard.n_samples_seen_)


def test_the_center_is_that_of_its_scaler():
    x = np.random.default_rng(1).standard_t(3, size=(501, 4)).astype(np.float32)
    center, _ = bw.robust_scale(bw.quantile_table(mx.array(x)))
    np.testing.assert_allclose(np.array(center), RobustScaler().fit(x).center_, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(31, 33), (200, 150)])
def test_the_discrepancy_is_that_of_its_kernel(n, m):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 5)), rng.normal(0.3, 1, size=(m, 5))
    xx, yy, xy = (rbf_kernel(*pair, gamma=1 / (2 * 1.5**2)) for pair in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - n) / (n * (n - 1)) + (yy.sum() - m) / (m * (m - 1))
    found = bw.mmd(mx.array(x.astype(np.float32)), mx.array(y.astype(np.float32)), bandwidth=1.5)
    assert float(found.statistic) == pytest.approx(within - 2 * xy.mean(), abs=2e-6)
