"""Where alerts go: a log, a file, a webhook, Prometheus; and the outbox that keeps them until they are there."""

import fcntl
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import os
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from .alerts import ID_DIGITS, Alert, Cooldown
from .state import State

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
SIGNATURE, TIMESTAMP, IDEMPOTENCY_KEY = "X-Bulwark-Signature", "X-Bulwark-Timestamp", "Idempotency-Key"
MOST_AT_ONCE = 100  # alerts that a sink gets in one go
WAITS = (408, 425, 429)  # statuses of a request that may be repeated as it is; so are those from 500


class DeliveryError(Exception):
    """A sink did not take an alert.

    Args:
        message: Why, without secrets: it is kept in the state file.
        retry_after: Seconds that the receiver asked for.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Sink(Protocol):
    """Where alerts go. ``deliver`` returns when the alert is there, and raises when it is not or may not be.

    Attributes:
        name: What the outbox knows it by; the same after a restart.
    """

    name: str

    def deliver(self, alert: Alert) -> None:
        """Take an alert; the same one may come again."""


class LoggingSink:
    """Alerts in Python's log, at the level of their severity.

    Args:
        logger: Where; by default ``mlx_bulwark.monitor``.
        name: What the outbox knows it by.
    """

    def __init__(self, logger: logging.Logger | None = None, *, name: str = "logging") -> None:
        self.name, self._logger = name, logger or logging.getLogger("mlx_bulwark.monitor")

    def deliver(self, alert: Alert) -> None:
        """Log an alert."""
        self._logger.log(LEVELS[alert.severity], "%s: %s [%s]", alert.source, alert.message, alert.id)


class FileSink:
    """Alerts as lines of JSON, each exactly once.

    A line is on the disk before the outbox hears of it, and its id is looked for in the file before it is written: a
    crash between the two neither loses nor doubles it. A last line that a crash has torn is taken out, and comes again
    whole. Several processes may write. Move the file away only while no alert is being delivered: ids are looked for
    in this file alone.

    Args:
        path: File, made where it is missing.
        name: What the outbox knows it by.

    Example:
        >>> import tempfile
        >>> from mlx_bulwark.monitor import Alert, FileSink
        >>> path = tempfile.mkdtemp() + "/alerts.jsonl"
        >>> alert = Alert("info", "demo", "hello")
        >>> FileSink(path).deliver(alert); FileSink(path).deliver(alert)
        >>> FileSink(path).path.read_text().count("hello")
        1
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str = "file") -> None:
        self.name, self.path = name, Path(path)
        self._ids: set[str] = set()
        self._read: tuple[int, int, int] = (0, 0, 0)  # device, inode and size of what the ids were read from

    def deliver(self, alert: Alert) -> None:
        """Append an alert and wait until it is on the disk, unless it is there.

        Raises:
            OSError: The file cannot be written.
        """
        made = not self.path.exists()
        with self.path.open("a+b") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            self._look(f)
            if alert.id not in self._ids:
                self._read = (0, 0, 0)  # until the line is there, nothing is known of the file
                f.write(json.dumps(alert.to_json(), sort_keys=True, allow_nan=False).encode() + b"\n")
                f.flush()
            os.fsync(f.fileno())
            self._ids.add(alert.id)
            self._read = _identity(f)
        if made:
            _sync_directory(self.path.parent)

    def _look(self, f: IO[bytes]) -> None:
        device, inode, size = _identity(f)
        if (device, inode, size) == self._read:
            return
        if (device, inode) != self._read[:2] or size < self._read[2]:
            self._ids, self._read = set(), (device, inode, 0)
        f.seek(self._read[2])
        for line in f:
            if line.endswith(b"\n"):
                self._ids |= _ids(line)
            elif _ids(line):
                f.write(b"\n")  # whole but for its end
                self._ids |= _ids(line)
            else:
                f.truncate(f.tell() - len(line))
        f.seek(0, os.SEEK_END)


def _ids(line: bytes) -> set[str]:
    try:
        found = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return set()
    return {found} if isinstance(found, str) and len(found) == ID_DIGITS else set()


def _identity(f: IO[bytes]) -> tuple[int, int, int]:
    found = os.fstat(f.fileno())
    return found.st_dev, found.st_ino, found.st_size


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class WebhookSink:
    """Alerts as JSON, posted to an address, each at least once.

    The header ``Idempotency-Key`` is the alert's id, so that the receiver can drop what comes again. With a secret,
    ``X-Bulwark-Signature`` is ``sha256=`` and the HMAC of the time in ``X-Bulwark-Timestamp``, a full stop and the
    body; :func:`verify_webhook` checks it. An answer other than 2xx, a redirect included, is a failure. Neither the
    secret nor the path of the address, which is often one, is shown or kept.

    Args:
        url: Where to, https; http only to this machine.
        secret: Of the signature, 16 bytes or more; None signs nothing.
        timeout: Seconds without an answer.
        headers: Further ones, such as ``Authorization``.
        allow_http: Send without encryption to other machines too.
        ssl_context: With a certificate authority of one's own.
        name: What the outbox knows it by.
        clock: Seconds since 1970.

    Raises:
        ValueError: The address is not https, the secret is short, or the context verifies nothing.

    Example:
        >>> from mlx_bulwark.monitor import WebhookSink
        >>> WebhookSink("https://example.org/hooks/T0P-SECRET", secret=b"0123456789abcdef")
        WebhookSink('https://example.org', signed)
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str | bytes | None = None,
        timeout: float = 5.0,
        headers: dict[str, str] | None = None,
        allow_http: bool = False,
        ssl_context: ssl.SSLContext | None = None,
        name: str = "webhook",
        clock: Callable[[], float] = time.time,
    ) -> None:
        parts = urlsplit(url)
        self._shown = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise ValueError("[WebhookSink] url must begin with https:// and a host but does not")
        if parts.username or parts.password:
            raise ValueError("[WebhookSink] url must have no password but has one: use headers")
        if parts.scheme == "http" and not allow_http and not _is_here(parts.hostname):
            raise ValueError(f"[WebhookSink] url must be https but is {self._shown}; allow_http=True sends it in clear")
        if ssl_context is not None and (ssl_context.verify_mode != ssl.CERT_REQUIRED or not ssl_context.check_hostname):
            raise ValueError("[WebhookSink] ssl_context must verify certificates and host names but does not")
        if not timeout > 0:
            raise ValueError(f"[WebhookSink] timeout must be above 0 but is {timeout}")
        key = secret.encode() if isinstance(secret, str) else secret
        if key is not None and len(key) < 16:
            raise ValueError(f"[WebhookSink] secret must have 16 bytes or more but has {len(key)}")
        self.name, self.timeout = name, float(timeout)
        self._url, self._key, self._headers, self._clock = url, key, dict(headers or {}), clock
        context = ssl_context or ssl.create_default_context()
        self._opener = urllib.request.build_opener(_NoRedirects(), urllib.request.HTTPSHandler(context=context))

    def __repr__(self) -> str:
        return f"WebhookSink({self._shown!r}, {'signed' if self._key else 'not signed'})"

    def deliver(self, alert: Alert) -> None:
        """Post an alert.

        Raises:
            DeliveryError: It did not arrive, or was not taken.
        """
        body = json.dumps(alert.to_json(), sort_keys=True, allow_nan=False).encode()
        headers = self._headers | {"Content-Type": "application/json", IDEMPOTENCY_KEY: alert.id}
        if self._key is not None:
            stamp = str(int(self._clock()))
            headers |= {TIMESTAMP: stamp, SIGNATURE: _signature(self._key, stamp, body)}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                answer.read(1 << 16)
        except urllib.error.HTTPError as e:
            e.close()
            raise DeliveryError(f"status {e.code}", _retry_after(e)) from None
        except (OSError, http.client.HTTPException, ValueError) as e:  # its words may hold the address
            reason = e.reason if isinstance(e, urllib.error.URLError) else e
            raise DeliveryError(f"{type(reason).__name__} at {self._shown}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _retry_after(e: urllib.error.HTTPError) -> float | None:
    words = (e.headers.get("Retry-After") or "").strip() if e.code in WAITS or e.code >= 500 else ""
    return float(words) if words.isascii() and words.isdigit() and len(words) < 7 else None


def _signature(key: bytes, stamp: str, body: bytes) -> str:
    return "sha256=" + hmac.new(key, stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def verify_webhook(
    secret: str | bytes,
    timestamp: str,
    body: bytes,
    signature: str,
    *,
    tolerance: float = 300.0,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Whether a request to a webhook is what :class:`WebhookSink` sent with this secret, and recent.

    Args:
        secret: The sink's.
        timestamp: Header ``X-Bulwark-Timestamp``.
        body: Body, as it came.
        signature: Header ``X-Bulwark-Signature``.
        tolerance: Seconds that it may be old, or ahead of this clock.
        clock: Seconds since 1970.

    Returns:
        bool: Whether it is. Compared in constant time.

    Example:
        >>> from mlx_bulwark.monitor import verify_webhook
        >>> verify_webhook("0123456789abcdef", "1700000000", b"{}", "sha256=00", clock=lambda: 1700000001.0)
        False
    """
    key = secret.encode() if isinstance(secret, str) else secret
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) < 16):
        return False
    right = hmac.compare_digest(_signature(key, timestamp, body).encode(), signature.encode("utf-8", "replace"))
    return right and abs(clock() - int(timestamp)) <= tolerance


class Outbox:
    """Alerts that are to be delivered: written down first, then given to each sink until it has them.

    A sink that fails is tried again after ``first_wait`` seconds, then twice as long each time, up to ``longest_wait``,
    each time a random share of it between half and all; or after what the receiver asks for. Nothing is ever given up.

    Args:
        state: The state file.
        sinks: Where alerts go; their names differ. An alert goes to the sinks of the moment it was raised.
        cooldown: Holds back repetitions; its state is kept in the state file.
        first_wait: Seconds.
        longest_wait: Seconds.
        clock: Seconds since 1970.
        seed: Of the random shares.

    Raises:
        ValueError: Two sinks have one name, or a wait is not above 0.

    Example:
        >>> import tempfile
        >>> from mlx_bulwark.monitor import Alert, FileSink, Outbox, State
        >>> folder = tempfile.mkdtemp()
        >>> state = State(folder + "/monitor.sqlite")
        >>> outbox = Outbox(state, [FileSink(folder + "/alerts.jsonl")])
        >>> outbox.raise_alerts([Alert("critical", "accuracy", "accuracy fell to 0.7")])
        1
        >>> outbox.deliver()
        1
        >>> state.close()
    """

    def __init__(
        self,
        state: State,
        sinks: Sequence[Sink] = (),
        *,
        cooldown: Cooldown | None = None,
        first_wait: float = 1.0,
        longest_wait: float = 300.0,
        clock: Callable[[], float] = time.time,
        seed: int | None = None,
    ) -> None:
        names = [sink.name for sink in sinks]
        if len(set(names)) < len(names):
            raise ValueError(f"[Outbox] sinks must have names that differ but have {', '.join(names)}")
        if not 0 < first_wait <= longest_wait:
            raise ValueError(f"[Outbox] waits must be above 0 and grow but are {first_wait} and {longest_wait}")
        self.state, self.sinks, self.cooldown = state, list(sinks), cooldown or Cooldown(clock=clock)
        self._waits, self._clock, self._random = (first_wait, longest_wait), clock, random.Random(seed)
        self._paused: dict[str, tuple[int, float]] = {}  # sink: failures in a row, and when it may be tried
        self.load()

    def load(self) -> None:
        """Take the cool-down from the state file."""
        self.cooldown.load(self.state.kept().get("cooldown", {"held": []}))

    def raise_alerts(self, alerts: Sequence[Alert]) -> int:
        """Write alerts down, but for those that the cool-down holds back; return how many are new.

        When it returns they are on the disk. It must not be called within a transaction that is not durable.

        Args:
            alerts: The alerts.
        """
        before = self.cooldown.state()
        passed = [told for alert in alerts if (told := self.cooldown.admit(alert)) is not None]
        names = [sink.name for sink in self.sinks]
        try:
            with self.state.transaction(durable=True):
                new = sum(self.state.add_alert(alert, names) for alert in passed)
                self.state.keep({"cooldown": self.cooldown.state()})
        except BaseException:
            self.cooldown.load(before)
            raise
        return new

    def deliver(self) -> int:
        """Give the sinks what waits for them and is due; return how many deliveries were made."""
        return sum(self._deliver_to(sink) for sink in self.sinks)

    def _deliver_to(self, sink: Sink) -> int:
        now, done = self._clock(), 0
        failures, until = self._paused.get(sink.name, (0, now))
        if now < until <= now + self._waits[1]:
            return 0
        for alert, attempts in self.state.due(sink.name, now, MOST_AT_ONCE):
            try:
                sink.deliver(alert)
            except Exception as e:  # a sink may be anybody's, and no alert is lost by what it raises
                words = str(e) if isinstance(e, DeliveryError) else type(e).__name__
                asked = e.retry_after if isinstance(e, DeliveryError) and e.retry_after else 0.0
                self.state.failed(alert, sink.name, words, now + max(self._wait(attempts), asked))
                self._paused[sink.name] = (failures + 1, now + max(self._wait(failures), asked))
                return done
            self.state.delivered(alert, sink.name, now)
            self._paused.pop(sink.name, None)
            failures, done = 0, done + 1
        return done

    def _wait(self, failures: int) -> float:
        first, longest = self._waits
        return min(longest, first * 2.0 ** min(failures, 60)) * self._random.uniform(0.5, 1.0)


class PrometheusSink:
    """Alerts as a counter of Prometheus, in a registry of its own.

    Args:
        registry: A ``prometheus_client.CollectorRegistry``; by default a new one.
        name: What the outbox knows it by.

    Raises:
        ImportError: prometheus_client is missing: the extra ``monitor`` brings it.

    Example:
        >>> from mlx_bulwark.monitor import Alert, PrometheusSink
        >>> sink = PrometheusSink()
        >>> sink.deliver(Alert("critical", "accuracy", "accuracy fell to 0.7"))
        >>> sink.registry.get_sample_value("bulwark_alerts_total", {"severity": "critical", "source": "accuracy"})
        1.0
    """

    def __init__(self, registry: Any = None, *, name: str = "prometheus") -> None:
        from .metrics import prometheus

        client = prometheus()
        self.name, self.registry = name, registry or client.CollectorRegistry()
        self._alerts = client.Counter(
            "bulwark_alerts", "Alerts since the process began.", ["severity", "source"], registry=self.registry
        )

    def deliver(self, alert: Alert) -> None:
        """Count an alert."""
        self._alerts.labels(alert.severity, alert.source).inc()

    def watch(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Show what a monitor measures too, read when Prometheus asks for it.

        Args:
            snapshot: ``Monitor.snapshot``.
        """
        from .metrics import MonitorCollector

        self.registry.register(MonitorCollector(snapshot, alerts=False))
