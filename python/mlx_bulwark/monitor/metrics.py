"""What a monitor measures, as metrics of Prometheus."""

from collections.abc import Callable, Iterator
from typing import Any


def prometheus() -> Any:
    """prometheus_client with its submodules, or an error that names the extra."""
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError:
        raise ImportError(
            'prometheus_client missing; pip install "mlx-bulwark[monitor]" brings what is needed'
        ) from None
    return prometheus_client


class MonitorCollector:
    """Metrics of a snapshot that is taken when they are asked for.

    Args:
        snapshot: Returns what ``Monitor.snapshot`` does.
        alerts: Count alerts too, as the state file has them.
    """

    def __init__(self, snapshot: Callable[[], dict[str, Any]], *, alerts: bool = True) -> None:
        self._snapshot, self._alerts = snapshot, alerts

    def collect(self) -> Iterator[Any]:
        """Yield the metrics."""
        core = prometheus().core
        found = self._snapshot()
        for name, value in found["counters"].items():
            yield core.CounterMetricFamily(
                f"bulwark_{name}", f"{name.capitalize()} since the state began.", value=value
            )
        values = core.GaugeMetricFamily("bulwark_chart_value", "Last value of a chart's series.", labels=["series"])
        shifts = core.GaugeMetricFamily(
            "bulwark_chart_standardised", "The same in standard deviations from the baseline.", labels=["series"]
        )
        for name, series in found["series"].items():
            if series["points"]:
                last = series["points"][-1]
                for family, value in ((values, last["value"]), (shifts, last["standardised"])):
                    if value is not None:
                        family.add_metric([name], value)
        yield values
        yield shifts
        tested = core.GaugeMetricFamily(
            "bulwark_window_p_value", "Least p-value of a window's last test.", labels=["window"]
        )
        for name, window in found["windows"].items():
            if window["p_value"] is not None:
                tested.add_metric([name], window["p_value"])
        yield tested
        waiting = core.GaugeMetricFamily("bulwark_outbox_waiting", "Alerts that a sink has not got.", labels=["sink"])
        for sink, box in found["outbox"].items():
            waiting.add_metric([sink], box["waiting"])
        yield waiting
        opened = core.GaugeMetricFamily("bulwark_alerts_open", "Alerts that nobody acknowledged.", labels=["severity"])
        for severity, n in found["open_alerts"].items():
            opened.add_metric([severity], n)
        yield opened
        if self._alerts:
            raised = core.CounterMetricFamily(
                "bulwark_alerts", "Alerts since the state began.", labels=["severity", "source"]
            )
            for row in found["alert_counts"]:
                raised.add_metric([row["severity"], row["source"]], row["count"])
            yield raised
