"""Monitoring: alerts that are neither lost nor doubled, and where they go."""

from .alerts import Alert, Cooldown, Severity
from .sinks import DeliveryError, FileSink, LoggingSink, Outbox, PrometheusSink, Sink, WebhookSink, verify_webhook
from .state import State, StateError

__all__ = [
    "Alert",
    "Cooldown",
    "DeliveryError",
    "FileSink",
    "LoggingSink",
    "Outbox",
    "PrometheusSink",
    "Severity",
    "Sink",
    "State",
    "StateError",
    "WebhookSink",
    "verify_webhook",
]
