"""The Adversarial Robustness Toolbox's filters of poison, on features that we give them.

What they flag is theirs. They rank nothing over all classes, so that their own numbers are used for it, each to its
best: rows that they flag come first, and of clusters the one with the smaller share of its class; with this order all
ways of ``ActivationDefence`` to judge clusters rank alike. Rows that they hold for equal
are worth their mean over all orders. ``SpectralSignatureDefense`` is told the true rate, as it must be, and flags the
same share of every class; its scores, which are not centred, are ranked over all classes as well.
"""

from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    scores: np.ndarray  # [n], higher is worse
    flagged: np.ndarray  # bool [n]


class Features:
    """A classifier for ART that knows nothing but the features of the rows, which are their numbers."""

    layer_names = ("features",)

    def __init__(self, features, classes):
        self.features, self.nb_classes = features, classes

    def get_activations(self, x, layer, batch_size, framework=False):
        return self.features[x]


def defences(features, y, rate, classes=10):
    """Results by name: what each defence flags, and how it ranks."""
    from art.defences.detector import poison

    model, rows = Features(np.asarray(features, np.float32), classes), np.arange(len(y))
    spectral = poison.SpectralSignatureDefense(model, rows, y, expected_pp_poison=max(rate, 1e-9))
    _, clean = spectral.detect_poison()
    flagged = np.array(clean) == 0
    scores = np.zeros(len(y))
    for c in range(classes):
        mine = np.flatnonzero(y == c)
        if len(mine):
            scores[mine] = spectral.spectral_signature_scores(model.features[mine])[:, 0]
    found = {"art_spectral": Found(flagged.astype(float), flagged), "art_spectral_global": Found(scores, flagged)}
    np.random.seed(0)
    activation = poison.ActivationDefence(model, rows, y)
    activation.detect_poison()
    share = np.ones(len(y))  # of a row's cluster in its class
    for c in range(classes):
        clusters = activation.clusters_by_class[c]
        share[y == c] = np.bincount(clusters)[clusters] / len(clusters)
    _, clean = activation.analyze_clusters()  # its default: the smaller cluster of every class is poison
    flagged = np.ones(len(y), bool)
    for c in range(classes):
        flagged[y == c] = np.array(clean[c]) == 0
    found["art_activation"] = Found(flagged + 1 - share, flagged)
    return found


def recall(scores, poison, budget):
    """Mean share of the poison among the rows that are ranked worst, over all orders of rows with the same score."""
    order = np.argsort(-scores, kind="stable")
    last = scores[order[budget - 1]]
    above, level = scores > last, scores == last
    hits = poison[above].sum() + poison[level].mean() * (budget - above.sum())
    return float(hits / poison.sum())
