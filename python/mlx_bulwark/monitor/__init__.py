"""Monitoring: control charts, windows of drift, and alerts that are neither lost nor doubled."""

from .alerts import Alert, Cooldown, Severity
from .baseline import Estimate, estimate
from .charts import Chart, Signal
from .hotelling import HotellingT2
from .location import LocationChart, Streams, Violations
from .monitor import Monitor
from .proportions import ClassChart, PChart, confusion_matrix
from .reference import Baseline
from .schedule import Schedule
from .sequential import CUSUM, EWMA
from .series import change_point
from .shewhart import NELSON, Shewhart, WesternElectric
from .sinks import DeliveryError, FileSink, LoggingSink, Outbox, PrometheusSink, Sink, WebhookSink, verify_webhook
from .state import State, StateError
from .windows import DriftWindow, WindowTest

__all__ = [
    "CUSUM",
    "EWMA",
    "NELSON",
    "Alert",
    "Baseline",
    "Chart",
    "ClassChart",
    "Cooldown",
    "DeliveryError",
    "DriftWindow",
    "Estimate",
    "FileSink",
    "HotellingT2",
    "LocationChart",
    "LoggingSink",
    "Monitor",
    "Outbox",
    "PChart",
    "PrometheusSink",
    "Schedule",
    "Severity",
    "Shewhart",
    "Signal",
    "Sink",
    "State",
    "StateError",
    "Streams",
    "Violations",
    "WebhookSink",
    "WesternElectric",
    "WindowTest",
    "change_point",
    "confusion_matrix",
    "estimate",
    "verify_webhook",
]
