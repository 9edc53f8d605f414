"""Tables say what went; plots are drawn from whatever a run recorded."""

import io

import jax
import jax.numpy as jnp
import matplotlib.image
import rich.console
from flax import nnx

import tpp_jax as tpp
from tpp_jax.analysis import plots, tables

SUMMARY = {
    "status": "done",
    "phases": [
        {"name": "pretrain", "steps": 10, "accuracy": 90.0},
        {"name": "slice", "steps": 0, "accuracy_before": 88.0, "accuracy_after": 87.5},
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


def test_plots_are_drawn_also_from_a_run_without_all_phases(tmp_path):
    history = [
        {"step": 5, "phase": "pretrain", "loss": 1.0, "accuracy": 50.0},
        {"step": 10, "phase": "pretrain", "test_accuracy": 90.0, "test_loss": 0.3},
        {"step": 20, "phase": "finetune", "test_accuracy": 89.0, "test_loss": 0.3},
    ]
    plots.draw_run(history, SUMMARY, tmp_path)
    for name in ("curves.png", "channels.png"):
        image = matplotlib.image.imread(tmp_path / name)
        assert image.shape[0] > 200 and image.std() > 0.05
