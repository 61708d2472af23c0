"""Mean run lengths of charts in control are the published ones.

1,500 runs with a fixed seed. Run lengths are nearly geometric, so that the standard error of their mean is below 2.6 %
of it; 11.6 % is more than 4.4 of those: a right chart fails with a probability of 1e-5, each of the six.
"""

import numpy as np
import pytest
from mlx_bulwark.monitor import CUSUM, EWMA, NELSON, Shewhart, WesternElectric

RUNS = 1500
PUBLISHED = {
    "shewhart": (Shewhart(0.0, 1.0), 370.4),
    "nelson": (Shewhart(0.0, 1.0, rules=NELSON), 74.0),  # by an independent simulation: benchmarks/monitor.py
    "western electric": (WesternElectric(0.0, 1.0), 91.75),
    "cusum": (CUSUM(0.0, 1.0, k=0.5, h=5.0), 465.0),
    "cusum, a shift of one sigma": (CUSUM(-1.0, 1.0, k=0.5, h=5.0), 10.4),
    "ewma": (EWMA(0.0, 1.0, weight=0.2, limit=2.86, exact=False), 370.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_run_length(name):
    chart, published = PUBLISHED[name]
    rng, charts = np.random.default_rng(0), chart.streams(RUNS)
    first = np.zeros(RUNS, np.int64)
    while not first.all():
        found = charts.update_many(rng.standard_normal((64, RUNS)))
        stream, i = np.unique(found.stream, return_index=True)
        first[stream] = np.where(first[stream], first[stream], found.index[i] + 1)
    assert first.mean() == pytest.approx(published, rel=0.116)
