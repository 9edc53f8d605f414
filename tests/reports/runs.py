"""A run and a sweep that were never made, as their files describe them."""

import numpy as np

from tests.reports.test_tables_plots import SUMMARY
from tpp_jax.reports import grids

JACOBIAN = {
    "mean": 0.5,
    "std": 0.1,
    "min": 0.0,
    "max": 0.9,
    "condition": None,
    "edges": [0.0, 0.5, 1.0],
    "counts": [3, 5],
}
GRAMS = {
    "chosen": np.eye(4),
    "regularized": np.eye(4),
    "cut": np.eye(2),
    "pruned": np.array([True, False, True, False]),
    "layer": np.asarray("conv1"),
}
HISTORY = [
    {"step": 5, "phase": "pretrain", "loss": 1.0, "accuracy": 50.0},
    {"step": 10, "phase": "pretrain", "test_accuracy": 90.0},
    {"step": 15, "phase": "regularize", "strength": 1.0, "gram": 0.1, "loss": 1.0}
    | {"accuracy": 70.0, "pruned_norm": 3.0},
    {"step": 20, "phase": "finetune", "test_accuracy": 89.0},
]
PAIR = {
    "dense_seconds": 0.02,
    "pruned_seconds": 0.01,
    "dense_flops": 4000,
    "pruned_flops": 1000,
}
PROFILE = {
    "device": "a device",
    "networks": {"batch 1": PAIR, "batch 256": PAIR, "batch 256, onnx": PAIR},
    "layers": {"conv1": PAIR},
}
EXPORTS = {
    "pruned.onnx": {
        "bytes": 1600,
        "params": 400,
        "flops": 1000,
        "runtime": "a runtime",
        "difference": 1e-6,
    }
}


MADE = {"command": "python launch.py --workdir='a b'", "date": "2026-11-30"}


def whole_summary():
    """The summary of a finished run, with everything that a report shows."""
    phases = [
        {"seconds": 1.0, "best_accuracy": 91.0, **phase} for phase in SUMMARY["phases"]
    ]
    phases[0]["jacobian"] = JACOBIAN
    config = {**SUMMARY["config"], "note": "</pre><script>alert(1)</script>"}
    dense = SUMMARY["dense"] | {"bytes": 4000}
    pruned = SUMMARY["pruned"] | {"bytes": 1600}
    more = {"phases": phases, "config": config}
    return {**SUMMARY, **more, "dense": dense, "pruned": pruned}


def grid():
    """A sweep with a row that did not run and one of published values only."""
    results = {
        ("TPP", "0.9", seed): {"best_accuracy": 80.0 + seed, "dense_accuracy": 90.0}
        for seed in (0, 1)
    }
    results["L2", "0.9", 0] = {"best_accuracy": 70.0}
    paper = {("L1", "0.9", "best_accuracy"): (75.0, None)}
    rows = "L1", "L2", "TPP", "Never"
    return grids.Grid("a table", rows, ("0.9",), ("best_accuracy",), results, 5, paper)
