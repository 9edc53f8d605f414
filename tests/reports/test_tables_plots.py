"""Tables say what went; plots are drawn from whatever a run recorded."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import rich.console
from flax import nnx

import tpp_jax as tpp
from tpp_jax.reports import plots, tables

SUMMARY = {
    "status": "done",
    "method": "tpp",
    "phases": [
        {"name": "pretrain", "steps": 10, "accuracy": 90.0},
        {"name": "regularize", "steps": 5, "accuracy": 88.5},
        {"name": "stabilize", "steps": 5, "accuracy": 88.0},
        {
            "name": "slice",
            "steps": 0,
            "accuracy": 87.5,
            "accuracy_before": 88.0,
            "accuracy_after": 87.5,
        },
        {"name": "finetune", "steps": 10, "accuracy": 89.0},
    ],
    "dense": {"params": 1000, "flops": 4000, "accuracy": 90.0},
    "pruned": {"params": 400, "flops": 1000, "accuracy": 89.0},
    "one_shot": {"accuracy_after": 30.0},
    "speedup": 4.0,
    "sparsity": 0.6,
    "layers": {"a": {"kept": 4, "total": 8}, "b": {"kept": 3, "total": 3}},
    "config": {"model": {"name": "net"}, "data": {"name": "data"}},
}


def text(table):
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_layer_table_shows_what_changed_and_what_did_not():
    model = tpp.models.create("lenet5", rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    groups = tpp.channel_groups(model, x)
    small = tpp.prune(model, tpp.make_plan(groups, model, {"fc4": 0.5}))
    shown = text(tables.layer_table(tpp.count(model, x), tpp.count(small, x)))
    rows = {line.split()[1]: line for line in shown.splitlines() if "│" in line}
    assert "84 → 42" in rows["fc4"]
    assert "850 → 430" in rows["fc5"]
    assert "→" not in rows["conv2"]


def test_the_result_table_sets_tpp_beside_cutting_at_once():
    shown = text(tables.result_table(SUMMARY))
    for number in ("4.00×", "60.0 %", "90.00", "30.00", "88.00", "87.50", "89.00"):
        assert number in shown


def cut(name, before, after, accuracy=None):
    accuracies = {"accuracy_before": before, "accuracy_after": after}
    return {"name": name, "steps": 0, "accuracy": accuracy or after, **accuracies}


def trained(name, accuracy):
    return {"name": name, "steps": 10, "accuracy": accuracy}


RIVALS = {
    "oneshot": (
        [
            trained("pretrain", 90.0),
            cut("slice", 90.0, 30.0),
            trained("finetune", 80.0),
        ],
        ["dense 90", "cut at once (one-shot) 30", "fine-tuned 80"],
    ),
    "reinitialized": (
        [cut("slice", 90.0, 30.0, accuracy=10.0), trained("extra", 70.0)],
        [
            "dense 90",
            "cut at once (one-shot) 30",
            "kernels reinitialized 10",
            "trained on 70",
        ],
    ),
    "iterative": (
        [
            cut("slice", 90.0, 60.0),
            trained("finetune", 85.0),
            cut("slice_2", 85.0, 50.0),
            trained("finetune_2", 80.0),
        ],
        [
            "dense 90",
            "cut at once (one-shot) 30",
            "pruned, after the cut 60",
            "fine-tuned 85",
            "pruned, after cut 2 50",
            "fine-tuned 80",
        ],
    ),
}


@pytest.mark.parametrize("name", RIVALS)
def test_the_result_table_tells_what_a_rival_of_tpp_did(name, tmp_path):
    phases, expected = RIVALS[name]
    summary = {**SUMMARY, "phases": phases}
    lines = text(tables.result_table(summary)).splitlines()
    rows = [line.strip("│ ").split("│") for line in lines if line.startswith("│")]
    assert [f"{a.strip()} {b.strip()[:-5]}" for a, b in rows] == expected
    plots.save(plots.of_run([], summary, {}), tmp_path)


def test_a_run_that_pruned_nothing_and_one_that_trained_nothing_are_told(tmp_path):
    none = {**SUMMARY, "pruned": None, "one_shot": {"accuracy_after": None}}
    none["phases"] = SUMMARY["phases"][:1]
    dense = {**SUMMARY["dense"], "accuracy": None}
    scratch = {**none, "dense": dense, "pruned": SUMMARY["pruned"]}
    scratch["phases"] = [cut("slice", None, 10.0), SUMMARY["phases"][-1]]
    for summary, count in ((none, 1), (scratch, 2)):
        shown = text(tables.result_table(summary))
        rows = [line for line in shown.splitlines() if line.startswith("│")]
        assert len(rows) == count
        assert "None" not in shown
        plots.save(plots.of_run([], summary, {}), tmp_path)


def test_plots_are_drawn_also_from_a_run_without_all_phases(tmp_path):
    history = [
        {"step": 5, "phase": "pretrain", "loss": 1.0, "accuracy": 50.0},
        {"step": 10, "phase": "pretrain", "test_accuracy": 90.0, "test_loss": 0.3},
        {"step": 20, "phase": "finetune", "test_accuracy": 89.0, "test_loss": 0.3},
    ]
    plots.save(plots.of_run(history, SUMMARY, {}), tmp_path)
    for name in ("curves.png", "channels.png"):
        image = matplotlib.image.imread(tmp_path / name)
        assert image.shape[0] > 100 and image.std() > 0.03


def test_the_picture_of_a_sensitivity_shows_every_cost(tmp_path):
    result = tpp.Sensitivity(
        groups=("conv1", "a$b"),
        sizes=(8, 4),
        ratios=(0.25, 0.5),
        removed=np.array([[2, 4], [1, 2]]),
        costs=np.array([[-0.01, 0.5], [0.0, 123.0]]),
        baseline=0.25,
    )
    svg = plots.save(plots.of_sensitivity(result), tmp_path)["sensitivity"]
    for text in ("conv1", "a$b", "25%", "−0.01", "0.5", "1.2e+2", "from 0.25"):
        assert text in svg.wide and text in svg.phone
    assert matplotlib.image.imread(tmp_path / "sensitivity.png").std() > 0.1
    nothing = dataclasses.replace(result, costs=np.zeros((2, 2)))
    assert plots.save(plots.of_sensitivity(nothing), tmp_path)
