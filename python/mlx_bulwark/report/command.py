"""The command ``mlx-bulwark report``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    import typer

REPORT_HELP = """Make one HTML page that a person reads out of what other commands found.

FOUND are JSON files, what commands print or write with --json. The page holds verdicts in plain words, what to do \
next, tables and plots, needs nothing from outside, and is written with its data as JSON beside it.

Exit codes: 0 done, 1 a package is missing or a file cannot be read or written, 2 an option or a file cannot be used."""

MOST_BYTES = 1 << 28


def add_commands(app: "typer.Typer") -> None:
    """Add the commands of the report."""
    import typer

    @app.command(help=REPORT_HELP)
    def report(
        found: Annotated[list[Path], typer.Argument(metavar="FOUND...", show_default=False)],
        out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
        title: Annotated[str, typer.Option(help="Heading of the page.")] = "Security report",
        samples: Annotated[
            Path | None,
            typer.Option(
                metavar="D.npz",
                help="Data that rows in FOUND mean, array x: the worst are shown as pictures or rows.",
                show_default=False,
            ),
        ] = None,
    ) -> None:
        sys.exit(_report(found, out, title, samples))


def _report(found: list[Path], out: Path, title: str, samples: Path | None) -> int:
    from .page import Report

    x = None if samples is None else _samples(samples)
    made = Report(title)
    for path in found:
        try:
            if path.stat().st_size > MOST_BYTES:
                _fail(f"{path} must have at most {MOST_BYTES:,} bytes but has {path.stat().st_size:,}", 2)
            made.add(path.read_text(encoding="utf-8"), samples=x)
        except OSError as e:
            _fail(f"{path} cannot be read: {e.strerror}", 1)
        except ValueError as e:
            _fail(f"{path}: {e}", 2)
    try:
        beside = made.write(out)
    except ImportError as e:
        _fail(str(e), 1)
    except OSError as e:
        _fail(f"{e.filename} cannot be written: {e.strerror}", 1)
    except ValueError as e:
        _fail(f"--out: {e}", 2)
    print(f"{made.verdict}\nreport     {out}\nfigures    {beside}")
    return 0


def _samples(path: Path) -> Any:
    from ..smoothing.command import load_data

    try:
        return load_data(path)[0]
    except ValueError as e:
        _fail(str(e).replace("--data", "--samples"), 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"mlx-bulwark: {message}", file=sys.stderr)
    sys.exit(code)
