"""A page that shows a monitor: read-only, without a request to anywhere else."""

import json
import socket
from collections.abc import Callable
from datetime import datetime, timezone
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .metrics import MonitorCollector, prometheus
from .snapshot import snapshot
from .state import State, StateError

LOCAL = ("127.0.0.1", "localhost", "::1")
REFRESH = 10  # seconds
WIDTH, HEIGHT = 600, 120  # of a chart
SHOWN_POINTS, SHOWN_ALERTS = 200, 50
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--soft:#5a6070;--page:#fff;--box:#f4f5f8;--line:#2557c9;--bad:#b3261e;
--warn:#8a5a00;--good:#1b6e3c;--rule:#c9ccd6}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaf0;--soft:#a3a9b8;--page:#14161a;--box:#1e2127;--line:#8ab0ff;
--bad:#ff8a80;--warn:#ffc65c;--good:#7bd99d;--rule:#3a3f4b}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;
max-width:60rem;padding:1rem}h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:1.6rem 0 .4rem}
h3{font-size:1rem;margin:.8rem 0 .2rem}p{margin:.3rem 0}.soft{color:var(--soft)}.bad{color:var(--bad)}
.warn{color:var(--warn)}.good{color:var(--good)}section>div,li{background:var(--box);border-radius:.5rem;
padding:.6rem .8rem;margin:.5rem 0}
ul{list-style:none;padding:0;margin:0}li{overflow-wrap:anywhere}svg{width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.2rem .6rem .2rem 0;border-bottom:1px solid
var(--rule)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.5rem;margin:.5rem 0}dt{color:var(--soft)}
dd{margin:0;font-size:1.2rem;font-variant-numeric:tabular-nums}dl>div{background:var(--box);border-radius:.5rem;
padding:.4rem .8rem}
"""


def serve(state: Path, host: str, port: int, ready: Callable[[str], None] = lambda url: None) -> ThreadingHTTPServer:
    """Make a server for a state file; its ``serve_forever`` runs it.

    Args:
        state: State file.
        host: Address to listen at.
        port: 0 for a free one.
        ready: Gets the address of the page.

    Raises:
        StateError: It is not a state file.
        OSError: The file is missing, or the address cannot be used.
    """
    State(state, read_only=True).close()

    class Handler(_Page):
        path_of_state, only_hosts = state, LOCAL if host in LOCAL else None

    class Server(ThreadingHTTPServer):
        daemon_threads, address_family = True, socket.AF_INET6 if ":" in host else socket.AF_INET

    server = Server((host, port), Handler)
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{server.server_address[1]}/")
    return server


class _Page(BaseHTTPRequestHandler):
    path_of_state: Path
    only_hosts: tuple[str, ...] | None
    server_version, sys_version = "mlx-bulwark", ""
    timeout = 10

    def do_GET(self) -> None:
        """Answer."""
        try:
            self._answer(*self._content())
        except (StateError, OSError) as e:
            self._answer(503, "text/plain", f"the state cannot be read: {type(e).__name__}\n")

    def do_HEAD(self) -> None:
        """Answer without content."""
        self.do_GET()

    def _content(self) -> tuple[int, str, str]:
        if not self._meant_for_us():
            return 421, "text/plain", "this host name is not served\n"
        path = urlsplit(self.path).path
        if path not in ("/", "/status", "/metrics", "/healthz"):
            return 404, "text/plain", "not found\n"
        if path == "/metrics":
            client = prometheus()
            registry = client.CollectorRegistry()
            registry.register(MonitorCollector(self._snapshot))
            return 200, client.CONTENT_TYPE_LATEST, client.generate_latest(registry).decode()
        found = self._snapshot()
        if path == "/healthz":
            return 200, "text/plain", "ok\n"
        if path == "/status":
            return 200, "application/json", json.dumps(found, indent=2, allow_nan=False) + "\n"
        return 200, "text/html", page(found)

    def _meant_for_us(self) -> bool:
        """A page of another site whose name was made to point here must not read this one."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return self.only_hosts is None or host in self.only_hosts

    def _snapshot(self) -> dict[str, Any]:
        state = State(self.path_of_state, read_only=True)
        try:
            return snapshot(state)
        finally:
            state.close()

    def _answer(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind if "charset" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in SECURITY.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing: addresses of visitors are nobody's business."""


def page(found: dict[str, Any]) -> str:
    """HTML of a snapshot."""
    opened = found["open_alerts"]
    if opened["critical"]:
        verdict = f'<p class="bad"><strong>&#9888; {_count(opened["critical"], "critical alert")} open</strong></p>'
    elif opened["warning"]:
        verdict = f'<p class="warn"><strong>{_count(opened["warning"], "warning")} open</strong></p>'
    else:
        verdict = '<p class="good"><strong>&#10003; No alert is open</strong></p>'
    counters = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{value:,}</dd></div>"
        for name, value in found["counters"].items()
    )
    charts = "".join(_chart(name, series) for name, series in found["series"].items() if series["points"])
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>Monitor: {escape(found['state'])}</title><style>{STYLE}</style></head><body><main>",
        f'<h1>Monitor</h1><p class="soft">{escape(found["state"])}, {_time(found["time"])}; ',
        f"reloads every {REFRESH} s</p>",
        f"{verdict}<dl>{counters}</dl>",
        f"<section><h2>Alerts</h2>{_alerts(found['alerts'])}</section>",
        f"<section><h2>Figures</h2>{charts or '<p>No point is full yet.</p>'}</section>",
        f"<section><h2>Drift</h2>{_windows(found['windows'])}</section>",
        f"<section><h2>Delivery</h2>{_outbox(found['outbox'])}</section></main></body></html>\n",
    ]
    return "".join(parts)


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _alerts(alerts: list[dict[str, Any]]) -> str:
    if not alerts:
        return "<p>None was raised.</p>"
    shades = {"critical": "bad", "warning": "warn", "info": "soft"}
    items = "".join(
        f'<li><strong class="{shades[a["severity"]]}">{a["severity"]}</strong> {escape(a["source"])} '
        f'<span class="soft">{_time(a["time"])}{", acknowledged" if a["acknowledged"] else ""}</span><br>'
        f'{escape(a["message"])}<br><span class="soft">{escape(a["id"])}</span></li>'
        for a in reversed(alerts[-SHOWN_ALERTS:])
    )
    more = len(alerts) - SHOWN_ALERTS
    return f"<ul>{items}</ul>" + (f'<p class="soft">and {more:,} older ones</p>' if more > 0 else "")


def _chart(name: str, series: dict[str, Any]) -> str:
    points = [p for p in series["points"][-SHOWN_POINTS:] if p["value"] is not None]
    if not points:
        return ""
    base = series.get("baseline")
    shown = [p["value"] for p in points] + [base] * (base is not None)
    low, span = min(shown), (max(shown) - min(shown)) or max(abs(shown[0]), 1.0) * 0.01

    def at(i: int, value: float) -> tuple[float, float]:
        x = 6 + (WIDTH - 12) * i / max(len(points) - 1, 1)
        return round(x, 1), round(HEIGHT - 8 - (HEIGHT - 16) * (value - low) / span, 1)

    places = [at(i, p["value"]) for i, p in enumerate(points)]
    marks = "".join(_mark(p, *place) for p, place in zip(points, places, strict=True) if p["signals"])
    words, rule = f"last {points[-1]['value']:.4g}", ""
    if base is not None:
        words, y = f"{words}, baseline {base:.4g}", at(0, base)[1]
        rule = f'<line x1="0" x2="{WIDTH}" y1="{y}" y2="{y}" stroke="var(--soft)" stroke-dasharray="5 4"/>'
    words += f", {_count(len(points), 'point')}, {_count(sum(bool(p['signals']) for p in points), 'signal')}"
    line = " ".join(f"{x},{y}" for x, y in places)
    return (
        f'<div><h3>{escape(name)}</h3><p class="soft">{words}</p><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(name)}: {words}">{rule}<polyline points="{line}" fill="none" stroke="var(--line)" '
        f'stroke-width="2"/>{marks}</svg></div>'
    )


def _mark(point: dict[str, Any], x: float, y: float) -> str:
    words = f"{point['label'] or point['batch']}: {point['value']:.4g}, {', '.join(map(str, point['signals']))}"
    return f'<circle cx="{x}" cy="{y}" r="4.5" fill="var(--bad)"><title>{escape(words)}</title></circle>'


def _windows(windows: dict[str, Any]) -> str:
    if not windows:
        return "<p>No window is kept.</p>"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_verdict(w)}</td><td>{escape(w.get('test') or '')}</td>"
        f'<td class="n">{_figure(w["p_value"])}</td><td class="n">{_figure(w.get("effect"))}</td>'
        f'<td class="n">{_figure(w.get("psi"))}</td></tr>'
        for name, w in windows.items()
    )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">window</th><th scope="col">last test</th>'
        '<th scope="col">by</th><th scope="col" class="n">p</th><th scope="col" class="n">effect</th>'
        f'<th scope="col" class="n">PSI</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _verdict(window: dict[str, Any]) -> str:
    if window["drift"] is None:
        return '<span class="soft">not full yet</span>'
    return '<strong class="warn">drift</strong>' if window["drift"] else "no drift"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _outbox(outbox: dict[str, Any]) -> str:
    if not outbox:
        return "<p>No sink was given an alert.</p>"
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{box["alerts"]:,}</td><td class="n">{box["waiting"]:,}</td>'
        f"<td>{escape(box['error'] or '')}</td></tr>"
        for name, box in outbox.items()
    )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">sink</th><th scope="col" class="n">alerts</th>'
        '<th scope="col" class="n">waiting</th><th scope="col">last error</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
