import warnings

import numpy as np
from mlx_bulwark.outliers import (
    COPOD,
    ECOD,
    HBOS,
    KNN,
    LOF,
    Ensemble,
    IsolationForest,
    Mahalanobis,
    PCAReconstruction,
    RobustZ,
)


def detectors():
    """Every detector in its ways, by name; those of neighbours for rows beside the training ones."""
    return {
        "RobustZ": RobustZ(),
        "ECOD": ECOD(),
        "ECOD of the paper": ECOD("paper"),
        "COPOD": COPOD(),
        "HBOS": HBOS(),
        "KNN": KNN(novelty=True),
        "KNN, mean, cosine": KNN(4, method="mean", metric="cosine", novelty=True),
        "KNN, median": KNN(4, method="median", novelty=True),
        "LOF": LOF(novelty=True),
        "Mahalanobis": Mahalanobis(),
        "Ledoit-Wolf": Mahalanobis("ledoit_wolf"),
        "MCD": Mahalanobis("mcd", random_state=0),
        "PCA": PCAReconstruction(),
        "PCA, plain": PCAReconstruction(2, weighted=False),
        "IsolationForest": IsolationForest(20, random_state=0),
        "Ensemble": Ensemble([KNN(), LOF(), ECOD(), IsolationForest(10, random_state=0)]),
        "Ensemble of ranks": Ensemble([ECOD(), RobustZ()], combination="rank"),
    }


NAMES = list(detectors())


def rows(n=120, d=5, seed=0):
    """Correlated columns, one of them skewed, none centred."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ np.triu(rng.normal(size=(d, d))) + 3
    x[:, 0] = np.exp(0.5 * x[:, 0])
    return x.astype(np.float32)


def fitted(name, x, **changes):
    """A fitted detector, without the warnings of few rows."""
    detector = detectors()[name].set_params(**changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(x)
