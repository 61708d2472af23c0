"""Monitoring: control charts, alerts that are neither lost nor doubled, and where they go."""

from .alerts import Alert, Cooldown, Severity
from .baseline import Baseline, estimate
from .charts import Chart, Signal
from .shewhart import NELSON, Shewhart
from .sinks import DeliveryError, FileSink, LoggingSink, Outbox, PrometheusSink, Sink, WebhookSink, verify_webhook
from .state import State, StateError

__all__ = [
    "NELSON",
    "Alert",
    "Baseline",
    "Chart",
    "Cooldown",
    "DeliveryError",
    "FileSink",
    "LoggingSink",
    "Outbox",
    "PrometheusSink",
    "Severity",
    "Shewhart",
    "Signal",
    "Sink",
    "State",
    "StateError",
    "WebhookSink",
    "estimate",
    "verify_webhook",
]
