"""Mistakes in models, data and tasks of a user's own."""

import functools
import pathlib
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from tests.mistakes.runs import Cases, train


class _Task:
    """A task that fits."""

    train = evaluation = np.ones((96, 3), "float32"), np.ones(96, "float32")

    def model(self, rngs: nnx.Rngs) -> Any:
        return nnx.Linear(3, 1, rngs=rngs)

    def loss(self, model: Any, batch: Any) -> Any:
        return jnp.square(model(batch[0])[:, 0] - batch[1]).mean()


_PIXELS, _LABELS = np.zeros((80, 8, 8), np.uint8), np.zeros(80, int)


def _network(rngs: nnx.Rngs, width: int = 4) -> nnx.Module:
    return nnx.Linear(8, width, rngs=rngs)


# The user's module.
_MINE = types.ModuleType("mine")
vars(_MINE).update(
    network=_network,
    number=3,
    arrays=lambda: ((_PIXELS, _LABELS), (_PIXELS / 2, _LABELS)),
    nothing=lambda: None,
    Task=_Task,
    NoLoss=type("NoLoss", (_Task,), {"loss": None}),
    NoData=type("NoData", (_Task,), {"train": None}),
    Vector=type("Vector", (_Task,), {"loss": lambda self, m, x: m(x[0])}),
    Unreported=type("Unreported", (_Task,), {"headline": "rms"}),
    Summed=type(
        "Summed", (_Task,), {"metrics": lambda self, m, x: {"n": m(x[0]).sum()}}
    ),
    Broken=type("Broken", (_Task,), {"loss": lambda self, m, x: m(x[1]).mean()}),
    Unmeasured=type("Unmeasured", (_Task,), {"report": lambda self, x: x["rms"]}),
    Words=type("Words", (_Task,), {"loss": lambda self, m, x: (m(x[0]).mean(), 3)}),
    Rising=type("Rising", (_Task,), {"headline": "accuracy"}),
    Function=type("Function", (_Task,), {"model": lambda self, rngs: jnp.tanh}),
)


def _with_mine(folder: pathlib.Path, **fields: Any) -> Any:
    sys.modules["mine"] = _MINE
    try:
        return train(folder, **{"prune.skip": "", **fields})
    finally:
        del sys.modules["mine"]


def own() -> Cases:
    for fields in (
        {"model.name": "no_such_file:network"},
        {"model.name": "mine:missing"},
        {"model.name": "mine:number"},
        {"model.name": "mine:network"},
        {"model.name": "mine:network", "model.kwargs": {"widht": 3}},
        {"model.kwargs": {"width": 3}},
        {"model.kwargs": {"not a name": 3}},
        {"data.name": "mine:nothing"},
        {"data.name": "mine:arrays"},
        {"data.name": "nowhere.npz"},
        {"task.name": "regression"},
        {"task.name": "mine:NoLoss"},
        {"task.name": "mine:NoData"},
        {"task.name": "mine:Vector"},
        {"task.name": "mine:Unreported"},
        {"task.name": "mine:Summed"},
        {"task.name": "mine:Function"},
        {"task.name": "mine:Broken"},
        {"task.name": "mine:Unmeasured"},
        {"task.name": "mine:Words"},
        {"task.name": "mine:Rising"},
        {"task.name": "mine:Task", "data.batch_size": 200},
        {"task.name": "mine:Task", "finetune.mixup": 0.2},
        {"task.name": "mine:Task", "model.name": "mine:network"},
        {"task.name": "mine:Task", "data.kwargs": {"n": 3}},
        {"task.name": "language_modelling", "data.name": "python"},
        {"callbacks": "print"},
        {"callbacks": "mine:nothing"},
        {"prune.strengths": "net.0:-1"},
        {
            "task.name": "language_modelling",
            "data.name": "nowhere.txt",
            "model.name": "small_decoder",
        },
    ):
        title = ", ".join(f"`config.{name}` = `{x!r}`" for name, x in fields.items())
        yield title, functools.partial(_with_mine, **fields)
    data = (_PIXELS / 255, _LABELS), (_PIXELS / 255, _LABELS)
    for title, call in (
        ("`tpp.fit(model)` without data", lambda f: tpp.fit(_network)),
        (
            "`tpp.fit(task, data)` of a task with data of its own",
            lambda f: tpp.fit(_Task, data),
        ),
        (
            "`tpp.fit(model, data)` with labels -1",
            lambda f: tpp.fit(_network, (data[0], (_PIXELS, _LABELS - 1))),
        ),
        (
            "`tpp.fit(model, data)` with labels that are no integers",
            lambda f: tpp.fit(_network, (data[0], (_PIXELS, _LABELS / 2))),
        ),
        (
            "`tpp.fit(model, data, callbacks=print)`",
            lambda f: tpp.fit(_network, data, callbacks=print),  # type: ignore
        ),
        (
            "`tpp.fit(model, data, momentum=0.5)`",
            lambda f: tpp.fit(_network, data, momentum=0.5),
        ),
        (
            "`tpp.fit(model, data, config={'finetune.epoch': 1})`",
            lambda f: tpp.fit(_network, data, config={"finetune.epoch": 1}),
        ),
    ):
        yield title, call
