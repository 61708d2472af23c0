"""How well detectors tell anomalies from the rest: area under the ROC curve, beside PyOD's detectors of the same name.

``--data DIR`` names a folder of .npz files with ``X`` [n, d] and ``y`` [n], 1 for anomalies, as ADBench has them. Both
sides are fitted to the same rows, without labels, and score them. AUROC is the mean over the files; where both sides
leave files out, the row names them.
"""

import copy
import warnings
from pathlib import Path

import numpy as np

# Columns: the minimum covariance determinant decomposes their covariance hundreds of times. With 166 it takes 20 s on
# either side; with 1,555 ours took 5 minutes and PyOD's was ended after 20.
WIDEST_FOR_MCD = 200
QUICK_NUMBERS = 60_000  # rows times columns of the files that --quick looks at


def auroc(scores, y):
    """Probability that an anomaly scores higher than another row, ties by half."""
    order = np.sort(scores[y == 0])
    ranks = [np.searchsorted(order, scores[y == 1], side=side) for side in ("left", "right")]
    return float(np.mean(ranks) / len(order))


def detectors():
    from mlx_bulwark import outliers as o

    return {
        "KNN": o.KNN(),
        "LOF": o.LOF(),
        "ECOD": o.ECOD(),
        "COPOD": o.COPOD(),
        "HBOS": o.HBOS(),
        "MCD": o.Mahalanobis("mcd", random_state=0),
        "PCA": o.PCAReconstruction(),
        "IsolationForest": o.IsolationForest(random_state=0),
        "RobustZ": o.RobustZ(),
        "Mahalanobis": o.Mahalanobis(),
        "LedoitWolf": o.Mahalanobis("ledoit_wolf"),
        "Ensemble": o.Ensemble(random_state=0),
    }


def peers(bench):
    """PyOD's detectors, by our names."""
    if bench.peer("pyod") is None:
        return {}
    from pyod.models.copod import COPOD
    from pyod.models.ecod import ECOD
    from pyod.models.hbos import HBOS
    from pyod.models.iforest import IForest
    from pyod.models.knn import KNN
    from pyod.models.lof import LOF
    from pyod.models.mcd import MCD
    from pyod.models.pca import PCA

    return {
        "KNN": KNN(),
        "LOF": LOF(),
        "ECOD": ECOD(),
        "COPOD": COPOD(),
        "HBOS": HBOS(),
        "MCD": MCD(random_state=0),
        "PCA": PCA(),
        "IsolationForest": IForest(random_state=0),
    }


def sets(folder: Path, quick: bool):
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as f:
            x, y = f["X"].astype(np.float64), f["y"].ravel().astype(int)
        if not quick or x.size <= QUICK_NUMBERS:
            yield path.stem, x, y


def measured(models, scores_of, name, x, y):
    """AUROC of each model on one file; its rows must all have a score."""
    found = {}
    for model_name, model in models.items():
        if model_name == "MCD" and x.shape[1] > WIDEST_FOR_MCD:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = scores_of(copy.deepcopy(model).fit(x))  # PyOD's are fitted once
        found[model_name] = (auroc(scores, y), scores.shape == y.shape and not np.isnan(scores).any())
    return found


def run(bench):
    if bench.data is None:
        print("  outliers_quality: no --data DIR with data sets: nothing is measured")
        return
    files = list(sets(bench.data, bench.quick))
    if not files:
        raise ValueError(f"[outliers_quality] --data must be a folder of .npz files but is {bench.data}")
    ours, theirs, models, others, left_out = {}, {}, detectors(), peers(bench), {}
    for name, x, y in files:
        for of, table, scores in (
            (models, ours, lambda m: -m.training_scores_),
            (others, theirs, lambda m: np.nan_to_num(m.decision_scores_, nan=np.inf)),
        ):
            found = measured(of, scores, name, x, y)
            for model, of_file in found.items():
                table.setdefault(model, []).append(of_file)
            if table is ours:
                for model in models.keys() - found.keys():
                    left_out.setdefault(model, []).append(name)
                print(f"  {name}: " + ", ".join(f"{m} {f[0]:.3f}" for m, f in found.items()), flush=True)
    means = {model: float(np.mean([a for a, _ in found])) for model, found in ours.items()}
    for model, found in ours.items():
        bench.check(model, all(whole for _, whole in found))
        without = f"without {', '.join(left_out[model])}" if model in left_out else None
        bench.row(f"{model}/auroc", means[model], "", peer=without, better="higher")
        if model in theirs:
            peer = float(np.mean([a for a, _ in theirs[model]]))
            named = f"pyod {type(others[model]).__name__} {peer:.4f}" + (f", {without}" if without else "")
            bench.row(f"{model}/auroc_minus_pyod", means[model] - peer, "", peer=named, better="higher")
    best = max((m for m in means if m != "Ensemble" and len(ours[m]) == len(files)), key=means.__getitem__)
    bench.row("Ensemble/auroc_minus_best_single", means["Ensemble"] - means[best], "", peer=best, better="higher")
