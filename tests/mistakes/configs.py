"""Mistakes in configs, patterns of layers, command lines and tables."""

import functools
import pathlib
from typing import Any

from tests.end_to_end.runs import launch
from tests.experiment.test_errors import small_config
from tests.mistakes.runs import Cases, train
from tpp_jax.commands import inspect, sweep
from tpp_jax.experiment import run

_WRONG_VALUES = [
    ("seed", -1),
    ("seed", 2**32),
    ("seed", True),
    ("log_every", 0),
    ("checkpoint_every", 0),
    ("keep_checkpoints", 0),
    ("jacobian_images", 0),
    ("report_layer", "conv9"),
    ("num_devices", 99),
    ("accumulate", 0),
    ("accumulate", 3),
    ("parallel", "pjit"),
    ("model.name", "cifar_resnet57"),
    ("model.name", "mlp7"),
    ("model.dtype", "float16"),
    ("data.name", "cifar11"),
    ("data.batch_size", 0),
    ("data.batch_size", 60),
    ("data.batch_size", 2000),
    ("data.crop_padding", -1),
    ("data.pad_to", 4),
    ("pretrain.epochs", -1),
    ("pretrain.epochs", 10**30),
    ("pretrain.epochs", 2**31 - 1),
    ("pretrain.learning_rate", "fast"),
    ("pretrain.learning_rate", "0:0.1,0.01"),
    ("pretrain.learning_rate", "0:0.1,50:0.01,20:0.001"),
    ("pretrain.learning_rate", "-0.1"),
    ("pretrain.schedule", "sine"),
    ("pretrain.warmup_epochs", 3.0),
    ("pretrain.optimizer", "adam"),
    ("pretrain.momentum", 1.0),
    ("pretrain.weight_decay", float("inf")),
    ("pretrain.weight_decay", 1e300),
    ("finetune.label_smoothing", 1.0),
    ("finetune.mixup", -0.2),
    ("finetune.mixup", 1e-30),
    ("finetune.ema", 1.0),
    ("finetune.orthogonality", "conv"),
    ("finetune.distillation.weight", 1.5),
    ("finetune.distillation.temperature", 0.0),
    ("prune.method", "magic"),
    ("prune.method", "math:pi"),
    ("prune.reinitialize", "magic"),
    ("prune.rounds", 0),
    ("prune.rounds", 10**6),
    ("prune.grow.weight", -1.0),
    ("prune.flops", 1.5),
    ("prune.params", -0.5),
    ("prune.criterion", "l3"),
    ("prune.criterion", "no_such_package.scores:mine"),
    ("prune.criterion", "math:no_such_name"),
    ("prune.criterion", "folder/scores.py:mine"),
    ("prune.scope", "everywhere"),
    ("prune.reduce", "median"),
    ("prune.calibration_examples", 0),
    ("prune.round_to", 0),
    ("prune.min_channels", 0),
    ("prune.gram_weight", float("nan")),
    ("prune.gram_every", 0),
    ("prune.target", "zero"),
    ("prune.schedule.kind", "sine"),
    ("prune.schedule.kind", "poly2"),
    ("prune.schedule.granularity", 0.0),
    ("prune.schedule.granularity", 1e-30),
    ("prune.schedule.every", 0),
    ("prune.schedule.ceiling", -1.0),
    ("prune.schedule.stabilize", 3),
    ("prune.schedule.zero_out_every", 0),
    ("init.model", "/nowhere/dense"),
    ("init.torch", "/nowhere/weights.pth"),
    ("init.torch", "a\0b"),
]


def fields() -> Cases:
    for name, value in _WRONG_VALUES:
        make = functools.partial(train, **{"num_devices": 8, name: value})
        yield (f"`config.{name}` = `{value!r}`", make)
    yield (
        "`config.init.model` and `config.init.torch` both set",
        lambda f: train(f, **{"init.model": "a", "init.torch": "b"}),
    )
    yield (
        "more rounds than there are steps of fine-tuning",
        lambda f: train(f, **{"prune.method": "iterative", "prune.rounds": 500}),
    )
    scratch = {"prune.method": "scratch"}
    yield (
        "a refit of random weights",
        lambda f: train(f, **scratch, **{"prune.compensate": True}),
    )
    yield (
        "a teacher where no dense network is trained",
        lambda f: train(f, **scratch, **{"finetune.distillation.weight": 0.5}),
    )
    activations = {"finetune.distillation.activations": "net.0"}
    yield ("activations of a pruned layer", lambda f: train(f, **activations))
    nowhere = {"finetune.distillation.activations": "conv1"}
    yield ("activations of no layer", lambda f: train(f, **nowhere))
    refit = {"prune.method": "compensated", "prune.reinitialize": "orthp"}
    yield ("refit weights that are then replaced", lambda f: train(f, **refit))
    yield ("a misspelt field", _odd_field)
    yield ("a field is missing", _missing_field)


def _odd_field(folder: pathlib.Path) -> Any:
    config = small_config()
    with config.unlocked():
        config.prune.ratio = "x"
    return run.train(config, folder / "run")


def _missing_field(folder: pathlib.Path) -> Any:
    config = small_config()
    with config.unlocked():
        del config.prune.scope
    return run.train(config, folder / "run")


def patterns() -> Cases:
    for ratios in (
        "*conv*:0.5",
        "net.1:0.5",
        "net.0:1.0",
        "net.0:-0.1",
        "net.0:half",
        "net.0:nan",
        "net.0",
        ":0.5",
        "net.12:0.5",
        "*net*:0.0",
        "",
    ):
        make = functools.partial(train, **{"prune.ratios": ratios})
        yield (f"`config.prune.ratios` = `{ratios!r}`", make)
    yield (
        "`config.prune.skip` = `'conv1'`",
        lambda f: train(f, **{"prune.skip": "conv1"}),
    )
    yield (
        "a target that cannot be reached: `config.prune.flops` = `0.0001`",
        lambda f: train(f, **{"prune.flops": 0.0001, "prune.ratios": ""}),
    )
    yield (
        "`--mode=inspect` with a pattern that matches nothing",
        lambda f: inspect.inspect(small_config(**{"prune.ratios": "head:0.5"})),
    )


_OTHER_TYPE = """from tpp_jax.experiment.config import default_config

def get_config():
    config = default_config()
    config.data.batch_size = 64.0
    return config
"""


def command_lines() -> Cases:
    wrong = {
        "no `--workdir`": [],
        "a config file that does not exist": ["--config=configs/nothing.py"],
        "an unknown flag": ["--workdir=w", "--confg=configs/digits_resnet8_tpp.py"],
        "an unknown mode": ["--workdir=w", "--mode=trian"],
        "an unknown field": ["--workdir=w", "--config.prune.ratoi=0.5"],
        "a field of the wrong type": ["--workdir=w", "--config.seed=one"],
        "a word too many": ["--workdir=w", "now"],
        "a coordinator without numbers": ["--workdir=w", "--coordinator=host0:12355"],
        "numbers without a coordinator": ["--workdir=w", "--num_processes=2"],
    }
    for title, arguments in wrong.items():
        yield (title, lambda f, a=arguments: launch(*a))
    for title, text in {
        "a config file with a syntax error": "def get_config(:\n",
        "a config file without `get_config`": "x = 1\n",
        "a config file that fails": "def get_config():\n    return None.x\n",
        "a config file that sets a field to a value of another type": _OTHER_TYPE,
        "a config file that imports what there is not": "import no_such_package\n",
    }.items():
        yield (title, functools.partial(_config_file, text=text))
    yield (
        "`--mode=evaluate` of a folder without a run",
        lambda f: launch("--mode=evaluate", f"--workdir={f / 'none'}"),
    )


def tables() -> Cases:
    digits = "--config=configs/tables/digits.py"
    yield (
        "`--mode=sweep` of a run's config",
        lambda f: launch("--mode=sweep", f"--workdir={f / 'sweep'}"),
    )
    yield (
        "a run of a table's config",
        lambda f: launch(digits, f"--workdir={f / 'run'}"),
    )
    yield (
        "`--mode=report` of a folder of neither",
        lambda f: launch("--mode=report", f"--workdir={f}"),
    )
    wrong = {
        "`only` matches no cell": {"only": "tpp_2_*"},
        "no rows": {"rows": ()},
        "a seed twice": {"seeds": (0, 0)},
        "an unknown metric": {"metrics": ("speed",)},
        "a row that changes what there is not": {
            "rows": (("L1", {"prune": {"ratois": "0.5"}}),)
        },
        "a published value of no row": {
            "paper": (("L2", "0.5", "best_accuracy", 90.0, None),)
        },
        "a row that is no pair": {"rows": ("L1",)},
        "a seed that is no number": {"seeds": ("0",)},
        "two rows whose folders would be one": {
            "rows": (("L 1", {"seed": 1}), ("L-1", {"seed": 2}))
        },
    }
    for title, fields in wrong.items():
        yield (title, functools.partial(_sweep, fields=fields))


def _sweep(folder: pathlib.Path, fields: dict[str, Any]) -> Any:
    table = sweep.default_table()
    table.base = small_config()
    table.rows = (("L1", {"prune": {"method": "oneshot"}}),)
    table.columns = (("0.5", {"prune": {"ratios": "*net*:0.5"}}),)
    table.update(fields)
    return sweep.sweep(table, folder / "sweep")


def _config_file(folder: pathlib.Path, text: str) -> Any:
    file = folder / "config.py"
    file.write_text(text)
    return launch(f"--config={file}", f"--workdir={folder / 'run'}")
