"""The command ``mlx-bulwark monitor``."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from .snapshot import snapshot
from .state import State, StateError, acknowledge

if TYPE_CHECKING:
    import typer

HELP = """Look at a monitor through its state file, while it runs or after.

Exit codes: 0 done, 1 critical alerts are open (status), 2 an option or the file cannot be used or a package is \
missing, 130 interrupted."""


def add_commands(app: "typer.Typer") -> None:
    """Add the group to the command line."""
    import typer

    group = typer.Typer(help=HELP, no_args_is_help=True)
    app.add_typer(group, name="monitor")
    file = typer.Option(metavar="FILE", help="State file of the monitor.", show_default=False)
    as_json = typer.Option("--json", help="Print JSON and nothing else.")

    @group.command(help="Say how it stands. Exit code 1 where critical alerts are open.")
    def status(state: Annotated[Path, file], json: Annotated[bool, as_json] = False) -> None:
        sys.exit(_status(state, json))

    @group.command(help="List alerts, the oldest first.")
    def alerts(
        state: Annotated[Path, file],
        last: Annotated[int | None, typer.Option(min=1, help="Only so many.", show_default=False)] = None,
        opened: Annotated[bool, typer.Option("--open", help="Only those that nobody acknowledged.")] = False,
        json: Annotated[bool, as_json] = False,
    ) -> None:
        sys.exit(_alerts(state, last, opened, json))

    @group.command(name="acknowledge", help="Mark alerts as seen: they are no longer open.")
    def acknowledge_command(
        ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Of alerts.")], state: Annotated[Path, file]
    ) -> None:
        sys.exit(_acknowledge(state, ids))

    @group.command(help="Show it on a page that reloads; /status as JSON, /metrics for Prometheus, /healthz.")
    def serve(
        state: Annotated[Path, file],
        port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8765,
        host: Annotated[str, typer.Option(help="Anybody who reaches it may read.")] = "127.0.0.1",
    ) -> None:
        sys.exit(_serve(state, host, port))


def _fail(message: str) -> NoReturn:
    print(f"mlx-bulwark: {message}", file=sys.stderr)
    sys.exit(2)


def _opened(path: Path) -> State:
    try:
        return State(path, read_only=True)
    except (StateError, OSError) as e:
        _fail(f"{path} cannot be read: {e.strerror if isinstance(e, OSError) else e}")


def _status(path: Path, as_json: bool) -> int:
    state = _opened(path)
    try:
        found = snapshot(state)
    finally:
        state.close()
    critical = found["open_alerts"]["critical"]
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return int(bool(critical))
    for name, value in found["counters"].items():
        print(f"{name.replace('_', ' '):<20} {value:>12,}")
    for name, series in found["series"].items():
        if series["points"]:
            last, baseline = series["points"][-1], series["baseline"]
            against = "" if baseline is None else f", baseline {baseline:.4g}"
            print(f"{name:<20} {'none' if last['value'] is None else format(last['value'], '.4g'):>12}{against}")
    for name, box in found["outbox"].items():
        if box["waiting"]:
            print(f"sink {name:<15} {box['waiting']:>12,} alerts wait, last error: {box['error']}")
    print(f"{'open alerts':<20} " + ", ".join(f"{n} {severity}" for severity, n in found["open_alerts"].items()))
    return int(bool(critical))


def _alerts(path: Path, last: int | None, opened: bool, as_json: bool) -> int:
    state = _opened(path)
    try:
        found = state.alerts(last=last, open_only=opened)
    finally:
        state.close()
    if as_json:
        print(json.dumps([a.to_json() | {"acknowledged": seen} for a, seen in found], indent=2, allow_nan=False))
        return 0
    for alert, seen in found:
        mark = " (acknowledged)" if seen else ""
        print(f"{alert.to_json()['at']}  {alert.id}  {alert.severity:<8}  {alert.source}: {alert.message}{mark}")
    if not found:
        print("no alerts")
    return 0


def _acknowledge(path: Path, ids: list[str]) -> int:
    try:
        unknown = acknowledge(path, ids, time.time())
    except (StateError, OSError) as e:
        _fail(f"{path} cannot be used: {e.strerror if isinstance(e, OSError) else e}")
    if unknown:
        _fail(f"no alert has the id {', '.join(unknown)}")
    return 0


def _serve(path: Path, host: str, port: int) -> int:
    from .metrics import prometheus
    from .serve import LOCAL, serve

    try:
        prometheus()
        server = serve(path, host, port, lambda url: print(f"serving {path} at {url}", flush=True))
    except (StateError, ImportError) as e:
        _fail(str(e))
    except OSError as e:
        _fail(f"{e.filename or f'{host}:{port}'} cannot be used: {e.strerror or e}")
    if host not in LOCAL:
        print("mlx-bulwark: anybody who reaches this address may read the page", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 130
    finally:
        server.server_close()
    return 0
