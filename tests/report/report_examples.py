"""What commands print with --json, a small one of each kind."""

from mlx_bulwark.report.png import data_uri


def attack(name, eps, accuracy):
    figures = {"robust_accuracy": accuracy, "attack_success_rate": 1 - accuracy / 0.9}
    rest = {"mean_distance": eps, "median_distance": eps, "mean_queries": 40.0, "seconds": 1.0}
    return {"name": name, "norm": "linf", "eps": eps} | figures | rest


def attacked(eps, accuracy, flags=()):
    figures = {"clean_accuracy": 0.9, "robust_accuracy": accuracy, "attack_success_rate": 1 - accuracy / 0.9}
    both = [attack("fgsm", eps, accuracy + (0.9 - accuracy) / 3), attack("pgd", eps, accuracy)]
    return {"kind": "robust_accuracy", "eps": eps, "inputs": 200, "attacks": both, "flags": list(flags)} | figures


def drifted(name, verdict, effect, test="ks"):
    figures = {"statistic": effect, "p_value": 1e-9, "p_adjusted": 1e-8, "effect": effect, "least_effect": 0.1}
    return {"name": name, "test": test, "verdict": verdict, "reason": "median 40.1, now 50.3", "psi": 0.3} | figures


def method(accused, p_value, reason, **more):
    return {"accused": accused, "p_value": p_value, "reason": reason, "accused_classes": [3] * accused} | more


def trigger(target, size):
    mask = [[[float(i + j < size)] for i in range(8)] for j in range(8)]
    pattern = [[[float((i + j) % 2)] for i in range(8)] for j in range(8)]
    figures = {"norm": float(size), "success": 0.98, "anomaly_index": 9.0 - size}
    return {"target": target, "mask": mask, "pattern": pattern} | figures


def point(batch, value, signals=()):
    return {"batch": batch, "value": value, "standardised": 0.0, "size": 100, "signals": list(signals)}


ALERT = {
    "id": "ab12",
    "at": "2026-01-01T00:00:00.000+00:00",
    "severity": "critical",
    "source": "accuracy",
    "message": "accuracy fell in batch 31",
    "acknowledged": None,
}

EXAMPLES = {
    "robust_accuracy": {
        "kind": "robust_accuracy",
        "runs": [attacked(0.1, 0.8), attacked(0.2, 0.5), attacked(0.3, 0.1)],
    },
    "certificates": {
        "kind": "certificates",
        "interrupted": False,
        "runs": [
            {
                "sigma": s,
                "file": "a.csv",
                "inputs": 100,
                "abstained": 0.05,
                "certified_accuracy": {"0": 0.9 - s / 4, "0.25": 0.8 - s / 4, "0.5": 0.5 * s, "1": 0.2 * s},
                "average_certified_radius": 0.4 + s / 10,
                "seconds": 0.1,
            }
            for s in (0.25, 0.5, 1.0)
        ],
    },
    "poison_scan": {
        "kind": "poison_scan",
        "rows": 1000,
        "accused": True,
        "p_value": 1e-7,
        "false_alarm_rate": 0.01,
        "suspects": [3, 1],
        "methods": {
            "spectral_signatures": method(True, 1e-7, "class 3 has two parts"),
            "deep_knn": method(False, None, "-"),
        },
        "skipped": {"label_noise": "fewer than 20 rows of a class"},
        "worst": [
            {"row": row, "label": 3, "score": 0.9 - row / 10, "reason": "label 3: in the odd part of its class"}
            for row in (3, 1, 2)
        ],
        "pictures": [
            {"row": row, "png": data_uri([[(i * j + row) % 5 / 4 for i in range(8)] for j in range(8)])}
            for row in (3, 1)
        ],
    },
    "model_inspection": {
        "kind": "model_inspection",
        "accused": True,
        "p_value": 1e-4,
        "methods": {
            "neural_cleanse": method(
                True, 1e-4, "class 3", triggers=[trigger(c, 3 if c == 3 else 9) for c in range(5)]
            ),
            "activation_range": method(False, 0.4, "no unit is out of range"),
        },
    },
    "drift": {
        "kind": "drift",
        "drift": True,
        "alpha": 0.05,
        "reference_rows": 1000,
        "new_rows": 500,
        "results": [
            drifted("age", "drift", 0.4),
            drifted("a column with a very long name indeed", "none", 0.02),
            drifted("all columns", "drift", 0.3, "mmd"),
        ],
    },
    "gate": {
        "kind": "gate",
        "schema": "people 1",
        "ok": False,
        "rows": 1000,
        "bad_rows": 2,
        "dropped": 0,
        "counts": {"range": 2},
        "results": [
            {
                "rule": "range",
                "where": "age",
                "count": 2,
                "limit": "be at most 120",
                "found": "is 999",
                "rows": [4, 9],
                "droppable": True,
            },
            {"rule": "missing", "where": "age", "count": 0, "limit": "", "found": "", "rows": [], "droppable": True},
        ],
        "statistics": {},
        "contributors": {},
    },
    "outliers": {
        "kind": "outliers",
        "file": "people.csv",
        "reference": "people.csv",
        "detector": "ECOD()",
        "rows": 1000,
        "columns": ["age"],
        "threshold": 4.2,
        "outliers": 3,
        "worst": [
            {
                "row": 7,
                "anomaly_score": 9.1,
                "outlier": True,
                "reasons": [{"column": "age", "value": 999.0, "low": 18.0, "high": 70.0, "share": 1.0}],
            }
        ],
    },
    "privacy": {
        "kind": "privacy",
        "epsilon": 12.5,
        "epsilon_target": 8.0,
        "delta": 1e-5,
        "accountant": "pld",
        "adjacency": "add or remove one example",
        "steps": 100,
        "torn": False,
        "runs": [{"steps": 100, "session": 0, "sampling": "poisson", "sample_rate": 0.1, "noise_multiplier": 0.8}],
        "curve": {"step": [0, 50, 100], "epsilon": [0.0, 8.1, 12.5]},
    },
    "manifest": {
        "kind": "manifest",
        "ok": False,
        "checked": 12,
        "findings": [{"kind": "changed", "path": "train.csv", "message": "its content is not what it was"}],
        "notices": [{"kind": "git-commit", "path": "", "message": "another commit"}],
        "root": "cd" * 32,
    },
    "monitor": {
        "kind": "monitor",
        "version": "0",
        "run_length": 1000.0,
        "counters": {"batches": 40, "rows": 4000},
        "series": {
            "accuracy": {
                "baseline": {"mean": 0.95},
                "points": [
                    *[point(i, 0.95 - i % 3 / 100) for i in range(30)],
                    *[point(i, 0.88, ["CUSUM: shift"]) for i in range(30, 34)],
                ],
            }
        },
        "windows": {"inputs": {"p_value": 1e-5, "effect": 0.3, "drift": True}, "predictions": {"drift": None}},
        "outbox": {"log": {"waiting": 0}},
        "open_alerts": {"critical": 1, "warning": 0},
        "alerts": [ALERT],
    },
    "audit_log": {
        "kind": "audit_log",
        "ok": False,
        "verdict": "changed",
        "count": 7,
        "chain": "ab" * 32,
        "torn": 12,
        "findings": ["line 3 was changed"],
        "lines": [{"n": 1, "time": "2026-01-01T00:00:00Z", "kind": "gate.check", "fields": {"ok": True}}],
    },
    "unheard_of": {"kind": "unheard_of", "answer": 42, "deep": {"list": [1, {"x": None}]}},
}
