"""The last words of a run."""

import math

from rich.console import Console
from rich.table import Table

from .figures import Figures

NOT_COVERED = (
    "* Not covered by epsilon: loss, gradient norms, times, all about the models without privacy, which the other "
    "stages train too, nor that the default hyperparameters were once tuned on this data. Test images are held out and "
    "never trained on."
)


def say(line: str) -> None:
    """Print a line of a running demo."""
    heading = line.lstrip().startswith("[")
    Console(highlight=False, markup=False).print(line, style="bold" if heading else None, soft_wrap=True)


def tell(figures: Figures) -> None:
    """Print the figures, how they were taken and what they mean."""
    console = Console(highlight=False, markup=False)
    console.print()
    if figures.stages:
        console.print(_stages(figures))
        console.print()
    if figures.max_grad_norm is None and not figures.interrupted:
        return
    console.print(_table(figures))
    for paragraph in (_how_timed(), _guarantee(figures), NOT_COVERED):
        console.print(f"{paragraph}\n")


def _stages(figures: Figures) -> Table:
    """One line a stage."""
    result = Table(title=f"{figures.dataset}: the layers, in {figures.seconds or 0:.0f} s", title_justify="left")
    for name in ("stage", "figure"):
        result.add_column(name)
    for name in ("without", "defended", "seconds"):
        result.add_column(name, justify="right")
    for name, stage in figures.stages.items():
        result.add_row(name, stage["what"], stage["without"], stage["defended"], f"{stage['seconds']:.1f}")
    return result


def _table(figures: Figures) -> Table:
    """Lay both models out side by side; a star marks what epsilon does not cover."""
    stopped = f", interrupted after {figures.steps}" if figures.interrupted else ""
    result = Table(title=f"{figures.dataset}, {figures.steps_planned} steps{stopped}", title_justify="left")
    result.add_column("")
    result.add_column("private", justify="right")
    result.add_column("without privacy *", justify="right")
    spent = f"{figures.epsilon:.2f} of {figures.epsilon_target:g}"
    result.add_row("test accuracy", _percent(figures.test_accuracy), _percent(figures.nonprivate_test_accuracy))
    result.add_row(f"epsilon spent (delta {figures.delta:g}, {figures.accountant.upper()})", spent, "unbounded")
    result.add_row("median step *", _ms(figures.private_step_seconds), _ms(figures.nonprivate_step_seconds))
    result.add_row("private over non-private step *", _number(figures.private_over_nonprivate, "{:.2f} x"), "")
    result.add_row("examples a second *", _number(figures.examples_per_second, "{:,.0f}"), "")
    result.add_row("noise multiplier", _number(figures.noise_multiplier, "{:.3f}"), "none")
    result.add_row("clipping norm", _number(figures.max_grad_norm, "{:g}"), "none")
    result.add_row("examples clipped *", _percent(figures.clip_fraction), "")
    result.add_row("loss of the last batch *", _number(figures.loss, "{:.3f}"), "")
    if figures.refused_examples:
        result.add_row("examples with NaN or Inf gradients, left out *", f"{figures.refused_examples}", "")
    return result


def _how_timed() -> str:
    """Tell what the step times compare."""
    return (
        "Step times: both models take each step in turn, on the same rows, padding included; a step is losses, "
        "gradients and update, for the private one also clipping, noise and the books. Medians without the first step."
    )


def _guarantee(figures: Figures) -> str:
    """Tell what epsilon means and what it does not cover."""
    if figures.steps == 0:
        return "No step was taken: nothing was released, and epsilon is 0."
    return (
        "What this means: whether any one training image was there or not (add or remove one) changes the probability "
        f"of every possible private model by a factor of at most e^{figures.epsilon:.2f} = "
        f"{math.exp(figures.epsilon):.3g}, but for a probability of {figures.delta:g}; this rests on Poisson sampling "
        "and on noise whose key came from the operating system and is forgotten now."
    )


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, "{:.1f} %")


def _ms(value: float | None) -> str:
    return _number(None if value is None else 1000 * value, "{:.1f} ms")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
