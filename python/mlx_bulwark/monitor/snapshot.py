"""What there is to see of a monitor, from its state file alone: another process may ask."""

import time
from typing import Any

from .. import __version__
from .alerts import SEVERITIES
from .state import State

MOST_ALERTS = 200


def snapshot(state: State) -> dict[str, Any]:
    """All there is to see, as JSON values; ``"kind": "monitor"``."""
    kept = state.kept()
    settings = kept.get("settings", {"series": {}, "windows": {}})
    series: dict[str, dict[str, Any]] = {name: found | {"points": []} for name, found in settings["series"].items()}
    for point in state.points():
        name = point.pop("series")
        series.setdefault(name, {"baseline": None, "points": []})["points"].append(point)
    tests = kept.get("tests", {})
    windows = {
        name: found | {"p_value": None, "drift": None} | tests.get(name, {})
        for name, found in settings["windows"].items()
    }
    opened = state.count_alerts(open_only=True)
    return {
        "kind": "monitor",
        "version": __version__,
        "time": time.time(),
        "state": state.path.name,
        "run_length": settings.get("run_length"),
        "counters": kept.get("counters", {}),
        "series": series,
        "windows": windows,
        "outbox": state.pending(),
        "open_alerts": {s: sum(n for (severity, _), n in opened.items() if severity == s) for s in SEVERITIES},
        "alert_counts": [{"severity": s, "source": o, "count": n} for (s, o), n in state.count_alerts().items()],
        "alerts": [a.to_json() | {"acknowledged": seen} for a, seen in state.alerts(last=MOST_ALERTS)],
    }
