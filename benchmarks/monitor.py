"""Control charts: run lengths against the published ones, speed, and how soon they find a drop of accuracy.

Run lengths are counted in streams that are in control until each has had its first signal: 20,000 of them, 1,000 with
``--quick``. All eight of Nelson's rules have no published run length: beside theirs stands one of a plain loop that is
written here from the rules' definitions and shares nothing with the charts.

Detection: an accuracy of 95 % falls to 92 % at once, or over 200 batches to 90 %. Batches have 100 predictions. Every
detector sees the first 100 batches, which are in control: the charts take them for their baseline, river's detectors
learn from them as they do from all. What follows is 300 batches, in control or not. All settings but one of each
detector are its defaults, or what its method advises for such a drop; that one was chosen, on other streams, for an
alarm in about one of ten streams in control, and what rate it comes to here stands in the detector's rows. Delays are
in predictions since the change, the median over the streams; a stream without alarm counts with its whole length.
"""

import itertools
import math

import numpy as np
from mlx_bulwark.monitor import CUSUM, EWMA, NELSON, HotellingT2, PChart, Shewhart, WesternElectric

PUBLISHED = {
    "shewhart": (Shewhart(0.0, 1.0), 370.4),
    "western_electric": (WesternElectric(0.0, 1.0), 91.75),
    "cusum": (CUSUM(0.0, 1.0, k=0.5, h=5.0), 465.0),
    "ewma": (EWMA(0.0, 1.0, weight=0.2, limit=2.86, exact=False), 370.0),
}
T2_RATE = 0.005

BATCH, BASELINE, AFTER = 100, 100, 300  # predictions; batches
ACCURACY, DROPPED, DRIFTED, OVER = 0.95, 0.92, 0.90, 200


def run(bench):
    run_lengths(bench)
    speed(bench)
    detection(bench)


def run_lengths(bench):
    runs, within = (1_000, 0.15) if bench.quick else (20_000, 0.05)  # of 1,000 the standard error is 3.2 %
    rng = np.random.default_rng(0)
    for name, (chart, published) in PUBLISHED.items():
        found = first_signals(chart, runs, rng).mean()
        close(bench, f"run_length_{name}", found, published, within)
    close(bench, "run_length_t2", t2_run_lengths(runs, rng).mean(), 1 / T2_RATE, within)
    naive = np.mean([naive_nelson(rng) for _ in range(500 if bench.quick else 20_000)])
    ours = first_signals(Shewhart(0.0, 1.0, rules=NELSON), runs, rng).mean()
    bench.row("run_length_nelson/plain_loop", naive, "values", better="higher", peer="plain loop")
    close(bench, "run_length_nelson", ours, naive, 0.25 if bench.quick else within)


def close(bench, case, found, expected, within):
    bench.check(case, abs(found / expected - 1) < within)
    bench.row(f"{case}/mean", found, "values", better="higher")
    bench.row(f"{case}/off", 100 * (found / expected - 1), "%", better="lower", peer=f"{expected:.5g}")


def first_signals(chart, runs, rng, steps=32):
    charts, first, seen = chart.streams(runs), np.zeros(runs, np.int64), 0
    while not first.all():
        found = charts.update_many(rng.standard_normal((steps, runs)))
        stream, i = np.unique(found.stream, return_index=True)  # the first of each stream: they are in order
        new = first[stream] == 0
        first[stream[new]] = found.index[i[new]] + 1
        seen += steps
    return first


def t2_run_lengths(runs, rng):
    covariance = np.array([[1.0, 0.8, 0.1], [0.8, 2.0, 0.3], [0.1, 0.3, 0.5]])
    chart = HotellingT2(np.zeros(3), covariance, false_alarm_rate=T2_RATE)
    factor, gaps, before = np.linalg.cholesky(covariance), np.zeros(0), 0
    while len(gaps) < runs:  # vectors are independent: what lies between alarms is a run
        x = rng.standard_normal((200_000, 3)) @ factor.T
        alarms = np.array([-1 - before, *(signal.index for signal in chart.fresh().update_many(x))])
        gaps, before = np.append(gaps, np.diff(alarms)), len(x) - 1 - alarms[-1]
    return gaps[:runs]


def naive_nelson(rng):
    """Length of a run until one of Nelson's rules is broken: one point after the other, by the definitions."""
    x = []
    while True:
        x += rng.standard_normal(64).tolist()
        for n in range(len(x) - 63, len(x) + 1):
            if broken(x[max(0, n - 15) : n]):
                return n


def broken(x):
    if x[-1] > 3 or x[-1] < -3:
        return True
    for y in (x, [-v for v in x]):
        if len([v for v in y[-3:] if v > 2]) >= 2 or len([v for v in y[-5:] if v > 1]) >= 4:
            return True
        if len(y) >= 9 and min(y[-9:]) > 0:
            return True
        if len(y) >= 6 and y[-6] < y[-5] < y[-4] < y[-3] < y[-2] < y[-1]:
            return True
    if len(x) >= 14:
        ups = [b > a for a, b in zip(x[-14:], x[-13:], strict=False)]
        if all(a != b for a, b in itertools.pairwise(ups)):
            return True
    if len(x) >= 15 and max(x) < 1 and min(x) > -1:
        return True
    last = x[-8:]
    return len(last) == 8 and min(abs(v) for v in last) > 1 and min(last) < 0 < max(last)


def speed(bench):
    rng = np.random.default_rng(1)
    values = rng.standard_normal(100_000 if bench.quick else 1_000_000)
    streams = rng.standard_normal((len(values) // 10_000, 10_000))
    charts = {name: chart for name, (chart, _) in PUBLISHED.items()}
    charts["nelson"] = Shewhart(0.0, 1.0, rules=NELSON)
    charts["ewma_exact"] = EWMA(0.0, 1.0)
    for name, chart in charts.items():
        case = f"updates_{name}"
        bench.check(case, lambda chart=chart: many_are_one_by_one(chart, values[:5000], streams[:, :50]))
        times = bench.compare(
            {
                "values": lambda chart=chart: chart.fresh().update_many(values) and None,
                "streams": lambda chart=chart: chart.streams(streams.shape[1]).update_many(streams) and None,
            },
            rounds=3,
        )
        bench.row(f"{case}/one_stream", len(values) / times["values"].median / 1e6, "M/s", better="higher")
        bench.row(f"{case}/10k_streams", streams.size / times["streams"].median / 1e6, "M/s", better="higher")
    pairs = np.stack([rng.binomial(200, 0.97, len(values)), np.full(len(values), 200)], axis=1)
    vectors = rng.standard_normal((len(values) // 5, 5))
    t2 = HotellingT2(np.zeros(5), np.eye(5))
    single = PChart(0.97)
    bench.check("updates_p_chart", len(single.fresh().update_many(pairs[:2000])) < 20)
    bench.check("updates_t2", np.allclose(t2.statistic(vectors), (vectors**2).sum(axis=1)))
    times = bench.compare(
        {
            "pairs": lambda: PChart(0.97).update_many(pairs) and None,
            "vectors": lambda: t2.fresh().update_many(vectors) and None,
        },
        rounds=3,
    )
    bench.row("updates_p_chart/one_stream", len(pairs) / times["pairs"].median / 1e6, "M/s", better="higher")
    bench.row("updates_t2/one_stream_of_5", len(vectors) / times["vectors"].median / 1e6, "M/s", better="higher")


def many_are_one_by_one(chart, values, streams):
    at_once = chart.fresh().update_many(values)
    single = chart.fresh()
    if at_once != [s for s in map(single.update, values.tolist()) if s]:
        return False
    found = chart.streams(streams.shape[1]).update_many(streams)
    each = [(j, s.index) for j, x in enumerate(streams.T) for s in chart.fresh().update_many(x)]
    return sorted(zip(found.stream.tolist(), found.index.tolist(), strict=True)) == each


class Chart:
    """A chart of the batches' accuracy, whose baseline is the first of them."""

    def __init__(self, build):
        self.build = build

    def alarm(self, right):
        counts = np.stack([right.reshape(-1, BATCH).sum(axis=1), np.full(right.size // BATCH, BATCH)], axis=1)
        chart = PChart.from_baseline(counts[:BASELINE], sides="below", **self.build.get("p_chart", {}))
        if "p_chart" in self.build:
            signals = chart.update_many(counts[BASELINE:])
        else:
            signals = self.build["chart"].fresh().update_many(chart.standardize(counts[BASELINE:]))
        below = [s.index for s in signals if "below" in (s.side, *(o.side for o in s.others))]
        return BATCH * (below[0] + 1) if below else math.inf


class River:
    """A detector of river, on predictions (1 is an error) or on the batches' accuracy."""

    def __init__(self, build, batches=False):
        self.build, self.batches = build, batches

    def alarm(self, right):
        values = right.reshape(-1, BATCH).mean(axis=1) if self.batches else ~right
        width = BATCH if self.batches else 1
        learned = BASELINE * BATCH // width
        detector = self.build()
        for i, value in enumerate(values.astype(float if self.batches else int).tolist()):
            detector.update(value)
            if i >= learned and detector.drift_detected:
                return (i - learned + 1) * width
        return math.inf


def detectors(drift):
    ours = {
        "shewhart": Chart({"chart": Shewhart(0.0, 1.0, limit=4.0)}),
        "p_chart": Chart({"p_chart": {"false_alarm_rate": 0.0005}}),
        "cusum": Chart({"chart": CUSUM(0.0, 1.0, h=7.2, sides="below")}),
        "ewma": Chart({"chart": EWMA(0.0, 1.0, limit=3.6, sides="below")}),
    }
    if not drift:
        return ours
    binary = drift.binary
    return ours | {
        "adwin": River(lambda: drift.ADWIN(delta=0.04)),
        "page_hinkley": River(
            lambda: drift.PageHinkley(mode="down", delta=0.015, threshold=0.115, alpha=1.0), batches=True
        ),
        "kswin": River(lambda: drift.KSWIN(alpha=0.0035, seed=0), batches=True),
        "ddm": River(lambda: binary.DDM(drift_threshold=2.6)),
        "eddm": River(lambda: binary.EDDM(beta=0.8)),
        "hddm_a": River(lambda: binary.HDDMA(drift_confidence=0.005)),
        "hddm_w": River(lambda: binary.HDDMW(drift_confidence=0.04)),
        "fhddm": River(lambda: binary.FHDDM(sliding_window_size=1000, confidence_level=0.02)),
    }


def detection(bench):
    streams = 2 if bench.quick else 40
    river = bench.peer("river.drift")
    if river:
        bench.peer("river.drift.binary")
    right = {change: predictions(change, streams, seed) for seed, change in enumerate(("none", "drop", "drift"))}
    for name, detector in detectors(river).items():
        alarms = {change: np.array([detector.alarm(stream) for stream in right[change]]) for change in right}
        case, peer = f"accuracy_{name}", None if isinstance(detector, Chart) else "river"
        false = float(np.isfinite(alarms["none"]).mean())
        bench.check(case, bench.quick or false <= 0.25)  # else its delays are no match
        if name in ("cusum", "ewma"):
            bench.check(case, all(np.isfinite(alarms[change]).mean() >= 0.95 for change in ("drop", "drift")))
        bench.row(f"{case}/false_alarms", 100 * false, "%", better="lower", peer=peer)
        for change in ("drop", "drift"):
            found = np.isfinite(alarms[change]).mean()
            delay = np.median(np.minimum(alarms[change], AFTER * BATCH))
            bench.row(f"{case}/{change}_found", 100 * found, "%", better="higher", peer=peer)
            bench.row(f"{case}/{change}_delay", delay, "samples", better="lower", peer=peer)


def predictions(change, streams, seed):
    """Whether predictions are right, ``[streams, predictions]``."""
    batch = np.arange(-BASELINE, AFTER)
    accuracy = {
        "none": np.full(len(batch), ACCURACY),
        "drop": np.where(batch < 0, ACCURACY, DROPPED),
        "drift": ACCURACY - (ACCURACY - DRIFTED) * np.clip((batch + 1) / OVER, 0, 1),
    }[change]
    rng = np.random.default_rng(seed)
    return rng.random((streams, len(batch) * BATCH)) < np.repeat(accuracy, BATCH)
