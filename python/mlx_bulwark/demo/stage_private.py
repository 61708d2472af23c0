"""Private training beside the plain twin."""

from . import private as training
from .sections import private as describe
from .stage import Outcome, Scene, percent


def private(scene: Scene) -> Outcome:
    """Train one model privately and one without privacy, on the same batches."""
    figures = scene.figures
    engine = training._calibrate(scene.options, figures, scene.say)
    scene.stop.check()
    scene.private_model = training._train(engine, scene.options, scene.split, figures, scene.stop)
    right, plain = figures.test_accuracy or 0.0, figures.nonprivate_test_accuracy or 0.0
    scene.tell("private", f"{percent(right)} of the test digits named right, at epsilon {figures.epsilon:.2f}")
    scene.tell("plain", f"{percent(plain)}, at no epsilon at all")
    told = {"epsilon": figures.epsilon, "test_accuracy": right, "nonprivate_test_accuracy": plain}
    what = f"test accuracy, at epsilon {figures.epsilon:.2f}"
    return Outcome(told, what, percent(plain), percent(right), describe(figures))
