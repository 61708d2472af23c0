"""Monitoring: control charts, windows of drift, and alerts that are neither lost nor doubled."""

from .alerts import Alert, Cooldown, Severity
from .baseline import Estimate, estimate
from .charts import Chart, Signal
from .reference import Baseline
from .schedule import Schedule
from .shewhart import NELSON, Shewhart
from .sinks import DeliveryError, FileSink, LoggingSink, Outbox, PrometheusSink, Sink, WebhookSink, verify_webhook
from .state import State, StateError
from .windows import DriftWindow, WindowTest

__all__ = [
    "NELSON",
    "Alert",
    "Baseline",
    "Chart",
    "Cooldown",
    "DeliveryError",
    "DriftWindow",
    "Estimate",
    "FileSink",
    "LoggingSink",
    "Outbox",
    "PrometheusSink",
    "Schedule",
    "Severity",
    "Shewhart",
    "Signal",
    "Sink",
    "State",
    "StateError",
    "WebhookSink",
    "WindowTest",
    "estimate",
    "verify_webhook",
]
