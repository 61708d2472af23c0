"""The commands ``mlx-bulwark report`` and ``mlx-bulwark assess``."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    import typer

    from .assess import AssessOptions

REPORT_HELP = """Make one HTML page that a person reads out of what other commands found.

FOUND are JSON files, what commands print or write with --json. The page holds verdicts in plain words, what to do \
next, tables and plots, needs nothing from outside, and is written with its data as JSON beside it.

Exit codes: 0 done, 1 a package is missing or a file cannot be read or written, 2 an option or a file cannot be used."""

ASSESS_HELP = """Assess the security of a classifier, and hold it against a stored baseline.

MODEL is module:function, DATA an .npz file as of the command attack. The model is attacked, its inputs, confidences \
and classes are tested for drift, it is inspected for a backdoor, and with --train the training data are scanned for \
poison. Settings must be those of the baseline, which --update writes. The report goes to OUT/report.html and .json.

Exit codes: 0 nothing is worse, 1 something is worse than sampling explains, the data drifted, or the training data or \
the model are newly accused, 2 an option or a file cannot be used or a package is missing, 130 interrupted."""

MOST_BYTES = 1 << 28
INTERRUPTED = 130


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

    @app.command(help=ASSESS_HELP)
    def assess(
        model: Annotated[str, typer.Option(metavar="MODULE:FUNCTION", help="Makes the model.", show_default=False)],
        data: Annotated[Path, typer.Option(metavar="D.npz", help="Held-out inputs and labels.", show_default=False)],
        baseline: Annotated[Path, typer.Option(metavar="FILE", help="The stored baseline.", show_default=False)],
        weights: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Weights, .safetensors.", show_default=False)
        ] = None,
        update: Annotated[bool, typer.Option("--update", help="Write the baseline in place of comparing.")] = False,
        train: Annotated[
            Path | None, typer.Option(metavar="T.npz", help="Scan these training data.", show_default=False)
        ] = None,
        inspect: Annotated[bool, typer.Option(help="Look for a backdoor, by the held-out inputs.")] = True,
        eps: Annotated[list[float] | None, typer.Option(help="Radius; may repeat. Default: 0.1.")] = None,
        norm: Annotated[str, typer.Option(metavar="linf|l2|l1", help="Of the radius.")] = "linf",
        attack: Annotated[list[str] | None, typer.Option(help="As of attack; may repeat. Default: fgsm, pgd.")] = None,
        bounds: Annotated[tuple[float, float], typer.Option(help="Lowest and highest value of an input.")] = (0.0, 1.0),
        inputs: Annotated[int, typer.Option(min=1, help="Attack the first so many.")] = 500,
        batch_size: Annotated[int, typer.Option(min=1, help="Inputs at once.")] = 256,
        seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
        tolerance: Annotated[
            float | None, typer.Option(help="Drop that does not matter. Default: the baseline's, 0.01.")
        ] = None,
        out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the report.")] = Path("bulwark-assessment"),
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
        progress: Annotated[bool, typer.Option(help="Show bars on standard error.")] = True,
    ) -> None:
        from ..attacks.command import AttackOptions
        from .assess import AssessOptions

        radii, names = tuple(eps or [0.1]), tuple(attack or ["fgsm", "pgd"])
        attacks = AttackOptions(
            model,
            weights,
            data,
            radii,
            norm,  # type: ignore[arg-type]  # anything else is refused with its words
            names,
            bounds,
            None,
            None,
            None,
            inputs,
            batch_size,
            seed,
            True,
            progress,
        )
        try:
            sys.exit(_assess(AssessOptions(attacks, train, inspect, baseline, update, tolerance), out, as_json))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


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


def _assess(options: "AssessOptions", out: Path, as_json: bool) -> int:
    from .assess import assess

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if out.exists() and not out.is_dir():
        _fail(f"--out must be a folder but {out} is a file", 2)
    try:
        found, report = assess(options, say)
        out.mkdir(parents=True, exist_ok=True)
        report.write(out / "report.html")
    except (ValueError, ImportError) as e:
        _fail(str(e), 2)
    except OSError as e:
        _fail(f"{e.filename} cannot be read or written: {e.strerror}", 2)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        for f in found["figures"]:
            before = "" if f["before"] is None else f", baseline {f['before']:.4f}, p {f['p_value']:.2g}"
            print(f"{'WORSE' if f['worse'] else '':<6} {f['name']:<24} {f['now']:.4f}{before}")
        for event in found["events"]:
            print(f"WORSE  {event}")
        for matter in found["standing"]:
            print(f"STILL  {matter}" if found["baseline"] else f"NOTE   {matter}, and the baseline now has it so")
        print(report.sections[0].verdict)
        print(f"report     {out / 'report.html'}")
    return 0 if found["ok"] else 1


def _samples(path: Path) -> Any:
    from ..smoothing.command import load_data

    try:
        return load_data(path)[0]
    except ValueError as e:
        _fail(str(e).replace("--data", "--samples"), 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"mlx-bulwark: {message}", file=sys.stderr)
    sys.exit(code)
