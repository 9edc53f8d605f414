"""Mistakes in the folders of runs, their checkpoints and saved models."""

import functools
import pathlib
import shutil
import tempfile
from typing import Any

import jax.numpy as jnp
from flax import nnx

import tpp_jax as tpp
from tests.experiment.records.test_checkpoints import cut_short
from tests.experiment.test_errors import small_config
from tests.mistakes.runs import Cases, train
from tpp_jax.commands import report
from tpp_jax.commands.evaluate import evaluate
from tpp_jax.experiment import run
from tpp_jax.experiment.records.stopping import locked


@functools.cache
def _example() -> tempfile.TemporaryDirectory:
    """A finished run, to be copied and damaged."""
    folder = tempfile.TemporaryDirectory()
    run.train(small_config(**{"pretrain.epochs": 1}), folder.name)
    return folder


def _trained(folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(_example().name, folder / "run"))


def _unfinished(folder: pathlib.Path) -> pathlib.Path:
    workdir = _trained(folder)
    (workdir / "summary.json").unlink()
    return workdir


def _again(folder: pathlib.Path, **fields: Any) -> Any:
    return train(folder, **{"pretrain.epochs": 1, **fields})


def _a_file(folder: pathlib.Path) -> Any:
    (folder / "run").write_text("")
    return train(folder)


def _other_config(folder: pathlib.Path) -> Any:
    _trained(folder)
    return _again(folder, **{"prune.ratios": "*net*:0.25"})


def _other_unfinished(folder: pathlib.Path) -> Any:
    _unfinished(folder)
    return _again(folder, seed=1)


def _broken_summary(folder: pathlib.Path) -> Any:
    (_trained(folder) / "summary.json").write_text('{"phases": [')
    return _again(folder)


def _no_file_of_metrics(folder: pathlib.Path) -> Any:
    (folder / "run" / "metrics.jsonl").mkdir(parents=True)
    return train(folder)


def _no_folder_of_checkpoints(folder: pathlib.Path) -> Any:
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").write_text("")
    return train(folder)


def _other_config_file(folder: pathlib.Path) -> Any:
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text('{"model_type": "bert"}')
    return train(folder)


def _no_table(folder: pathlib.Path) -> Any:
    (folder / "table.json").write_text("{")
    return report.write_report(folder)


def _all_damaged(folder: pathlib.Path) -> Any:
    for step in (_unfinished(folder) / "checkpoints").iterdir():
        cut_short(step)
    return _again(folder)


def _in_use(folder: pathlib.Path) -> Any:
    (folder / "run").mkdir()
    with locked(folder / "run"):
        return train(folder)


def _evaluated_unfinished(folder: pathlib.Path) -> Any:
    workdir = _unfinished(folder)
    shutil.rmtree(workdir / "model")
    return evaluate(workdir)


def _damaged_model(folder: pathlib.Path) -> Any:
    workdir = _trained(folder)
    cut_short(workdir / "model")
    return evaluate(workdir)


def _not_a_model(folder: pathlib.Path) -> Any:
    return tpp.load_model(folder)


def _not_replaced(folder: pathlib.Path) -> Any:
    (folder / "project").mkdir()
    (folder / "project" / "train.py").write_text("")
    return tpp.save_model(folder / "project", {"w": jnp.ones(3)})


def _other_shape(folder: pathlib.Path) -> Any:
    tpp.save_model(folder / "m", nnx.Linear(3, 9, rngs=nnx.Rngs(0)))
    return tpp.load_model(folder / "m", nnx.Linear(3, 4, rngs=nnx.Rngs(0)))


def _other_class(folder: pathlib.Path) -> Any:
    tpp.save_model(folder / "m", nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    return tpp.load_model(folder / "m", nnx.GroupNorm(3, 3, rngs=nnx.Rngs(0)))


def _other_network(folder: pathlib.Path) -> Any:
    model = tpp.models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    tpp.save_model(folder / "dense", model)
    return train(folder, **{"init.model": str(folder / "dense")})


def _not_finite(folder: pathlib.Path) -> Any:
    fields = {"finetune.learning_rate": "1e6", "finetune.epochs": 20}
    return train(folder, **fields)


def folders() -> Cases:
    yield from (
        ("`--workdir` is a file", _a_file),
        ("a finished run of another config", _other_config),
        ("an unfinished run of another config", _other_unfinished),
        ("`summary.json` is damaged", _broken_summary),
        ("`metrics.jsonl` is a folder", _no_file_of_metrics),
        ("`checkpoints` is a file", _no_folder_of_checkpoints),
        ("`config.json` is of something else", _other_config_file),
        ("`table.json` of a sweep is damaged", _no_table),
        ("all checkpoints are damaged", _all_damaged),
        ("another process trains in the folder", _in_use),
        ("`--mode=evaluate` of an unfinished run", _evaluated_unfinished),
        ("the saved model is damaged", _damaged_model),
        ("a folder that holds no saved model", _not_a_model),
        ("`tpp.save_model` to a folder that holds other things", _not_replaced),
        ("`tpp.load_model` into a module of other shapes", _other_shape),
        ("`tpp.load_model` into a module of another class", _other_class),
        ("`config.init.model` of another network", _other_network),
        ("the loss is no longer finite", _not_finite),
    )
