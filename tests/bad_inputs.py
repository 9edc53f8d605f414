"""Everything a user may get wrong, done: what each mistake says.

    python -m tests.bad_inputs     # writes docs/errors.md

Each case is a function of an empty folder that makes a mistake. It must end in a
``TPPError`` or ``ValueError`` of one or two sentences or, through launch.py, in exit
code 1 and one line.
"""

import contextlib
import functools
import io
import pathlib
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import tests.conftest  # noqa: F401  # isort: skip  simulates devices: before jax

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

import tpp_jax as tpp
from tests.end_to_end.runs import ROOT, launch
from tests.experiment.records.test_checkpoints import cut_short
from tests.experiment.test_errors import small_config
from tests.interop.tensors import FILES
from tpp_jax.commands import inspect, sweep
from tpp_jax.commands.evaluate import evaluate
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.records.stopping import locked
from tpp_jax.method.gram import gram_penalty

PAGE = ROOT / "docs" / "errors.md"


Make = Callable[[pathlib.Path], Any]
Cases = Iterator[tuple[str, Make]]  # what is wrong, and a function that does it


def message_of(title: str, make: Make, folder: pathlib.Path) -> str:
    """Makes the mistake in an empty folder; returns what it says, paths shortened.

    Raises:
      AssertionError: nothing was said, or not to a person.
    """
    said = ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            done = make(folder)
    except (TPPError, ValueError) as error:
        said = str(error)
    else:
        assert getattr(done, "returncode", 0) == 1, f"{title}: no error"
        assert "Traceback" not in done.stderr, done.stderr
        lines = done.stderr.strip().splitlines()
        said = next(line for line in lines if line.startswith("error: "))
        said = said.removeprefix("error: ")
    said = said.replace(str(folder), "…").replace(str(ROOT) + "/", "")
    said = re.sub(r"process \d+ on \S+\)", "process … on …)", said)
    assert len(said) > 10 and said.count("\n") <= 12, said
    return said


INTRODUCTION = """# What mistakes say

Every wrong input stops a run before it trains, or where it is met, with one message and
exit code 1; `--debug` shows the traceback as well. This page is made by making the
mistakes: `python -m tests.bad_inputs`.
"""


def page() -> str:
    """Returns the text of docs/errors.md, made by making every mistake."""
    return "\n".join([INTRODUCTION, *(f"{table(name)}\n" for name in SECTIONS)])


def table(section: str) -> str:
    """Returns one section of the page."""
    lines = [f"## {section}", "", "| mistake | message |", "|---|---|"]
    for title, make in SECTIONS[section]():
        with tempfile.TemporaryDirectory() as folder:
            said = message_of(title, make, pathlib.Path(folder).resolve())
        said = " ".join(said.split()).replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| {title} | {said} |")
    return "\n".join(lines)


def _train(folder: pathlib.Path, **fields: Any) -> Any:
    return run.train(small_config(**fields), folder / "run")


def _fields() -> Cases:
    wrong = [
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
        ("prune.round_to", 0),
        ("prune.min_channels", 0),
        ("prune.gram_weight", float("nan")),
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
    for name, value in wrong:
        make = functools.partial(_train, **{name: value})
        yield (f"`config.{name}` = `{value!r}`", make)
    yield (
        "`config.init.model` and `config.init.torch` both set",
        lambda f: _train(f, **{"init.model": "a", "init.torch": "b"}),
    )
    yield (
        "more rounds than there are steps of fine-tuning",
        lambda f: _train(f, **{"prune.method": "iterative", "prune.rounds": 500}),
    )
    yield ("a field that nothing reads", _odd_field)
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


def _patterns() -> Cases:
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
        make = functools.partial(_train, **{"prune.ratios": ratios})
        yield (f"`config.prune.ratios` = `{ratios!r}`", make)
    yield (
        "`config.prune.skip` = `'conv1'`",
        lambda f: _train(f, **{"prune.skip": "conv1"}),
    )
    yield (
        "a target that cannot be reached: `config.prune.flops` = `0.0001`",
        lambda f: _train(f, **{"prune.flops": 0.0001, "prune.ratios": ""}),
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


def _command_lines() -> Cases:
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


def _tables() -> Cases:
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


def _data() -> Cases:
    streamed = {"model.name": "resnet18", "data.name": "folder", "data.image_size": 32}
    streamed |= {"data.resize": 32, "data.batch_size": 8, "prune.skip": ""}
    streamed |= {"prune.ratios": "*layer*.conv1:0.5", "prune.schedule.stabilize": 60}

    def train(folder: pathlib.Path, **fields: Any) -> Any:
        return _train(folder, **(streamed | {"data.dir": str(folder)} | fields))

    def classes(
        folder: pathlib.Path, splits: tuple[str, ...] = ("train", "val")
    ) -> None:
        draws = np.random.default_rng(0)
        for split in splits:
            for name in ("cat", "dog"):
                place = folder / split / name
                place.mkdir(parents=True)
                for i in range(8):
                    pixels = draws.integers(256, size=(40, 48, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / f"{i}.jpg")

    def broken(folder: pathlib.Path, content: bytes | int) -> Any:
        classes(folder)
        for image in (folder / "train").rglob("*.jpg"):
            whole = image.read_bytes()
            image.write_bytes(whole[:content] if isinstance(content, int) else content)
        return train(folder)

    yield (
        "a prepared data set in a folder that does not exist",
        lambda f: _train(f, **{"data.name": "mnist", "data.dir": str(f / "none")}),
    )
    yield (
        "a folder without the prepared data set",
        lambda f: _train(f, **{"data.name": "mnist", "data.dir": str(f)}),
    )

    def damaged_metadata(folder: pathlib.Path) -> Any:
        (folder / "mnist" / "3.0.1").mkdir(parents=True)
        (folder / "mnist" / "3.0.1" / "dataset_info.json").write_text("{")
        return _train(folder, **{"data.name": "mnist", "data.dir": str(folder)})

    yield ("a prepared data set whose metadata is damaged", damaged_metadata)
    yield ("class folders: an empty folder", train)

    def no_test(folder: pathlib.Path) -> Any:
        classes(folder, ("train",))
        return train(folder)

    yield ("class folders: no test images", no_test)

    def empty_class(folder: pathlib.Path) -> Any:
        classes(folder)
        (folder / "train" / "emu").mkdir()
        return train(folder)

    yield ("class folders: a class without images", empty_class)

    def other_classes(folder: pathlib.Path) -> Any:
        classes(folder)
        (folder / "val" / "dog").rename(folder / "val" / "fox")
        return train(folder)

    yield ("class folders: other classes to test than to train", other_classes)

    def linked(folder: pathlib.Path) -> Any:
        classes(folder)
        (folder / "train" / "cat" / "more").symlink_to(folder / "train")
        return train(folder)

    yield ("class folders: a link that leads back", linked)
    yield ("an image that is cut short", functools.partial(broken, content=200))
    yield ("an image that is text", functools.partial(broken, content=b"hello"))
    yield ("an image file without content", functools.partial(broken, content=b""))

    def few(folder: pathlib.Path) -> Any:
        classes(folder)
        return train(folder, **{"data.batch_size": 64})

    yield ("a batch that is larger than the data", few)
    yield (
        "crops larger than the images: `config.data.resize` < `image_size`",
        lambda f: _train(f, **{"data.image_size": 224, "data.resize": 200}),
    )


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
    return _train(folder, **{"pretrain.epochs": 1, **fields})


def _folders() -> Cases:

    def a_file(folder: pathlib.Path) -> Any:
        (folder / "run").write_text("")
        return _train(folder)

    def other_config(folder: pathlib.Path) -> Any:
        _trained(folder)
        return _again(folder, **{"prune.ratios": "*net*:0.25"})

    def other_unfinished(folder: pathlib.Path) -> Any:
        _unfinished(folder)
        return _again(folder, seed=1)

    def broken_summary(folder: pathlib.Path) -> Any:
        (_trained(folder) / "summary.json").write_text('{"phases": [')
        return _again(folder)

    def no_file_of_metrics(folder: pathlib.Path) -> Any:
        (folder / "run" / "metrics.jsonl").mkdir(parents=True)
        return _train(folder)

    def no_folder_of_checkpoints(folder: pathlib.Path) -> Any:
        (folder / "run").mkdir()
        (folder / "run" / "checkpoints").write_text("")
        return _train(folder)

    def other_config_file(folder: pathlib.Path) -> Any:
        (folder / "run").mkdir()
        (folder / "run" / "config.json").write_text('{"model_type": "bert"}')
        return _train(folder)

    def no_table(folder: pathlib.Path) -> Any:
        (folder / "table.json").write_text("{")
        return sweep.write_report(folder)

    def all_damaged(folder: pathlib.Path) -> Any:
        for step in (_unfinished(folder) / "checkpoints").iterdir():
            cut_short(step)
        return _again(folder)

    def in_use(folder: pathlib.Path) -> Any:
        (folder / "run").mkdir()
        with locked(folder / "run"):
            return _train(folder)

    def unfinished(folder: pathlib.Path) -> Any:
        workdir = _unfinished(folder)
        shutil.rmtree(workdir / "model")
        return evaluate(workdir)

    def damaged_model(folder: pathlib.Path) -> Any:
        workdir = _trained(folder)
        cut_short(workdir / "model")
        return evaluate(workdir)

    def not_a_model(folder: pathlib.Path) -> Any:
        return tpp.load_model(folder)

    def not_replaced(folder: pathlib.Path) -> Any:
        (folder / "project").mkdir()
        (folder / "project" / "train.py").write_text("")
        return tpp.save_model(folder / "project", {"w": jnp.ones(3)})

    def other_shape(folder: pathlib.Path) -> Any:
        tpp.save_model(folder / "m", nnx.Linear(3, 9, rngs=nnx.Rngs(0)))
        return tpp.load_model(folder / "m", nnx.Linear(3, 4, rngs=nnx.Rngs(0)))

    def other_class(folder: pathlib.Path) -> Any:
        tpp.save_model(folder / "m", nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
        return tpp.load_model(folder / "m", nnx.GroupNorm(3, 3, rngs=nnx.Rngs(0)))

    def other_network(folder: pathlib.Path) -> Any:
        model = tpp.models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
        tpp.save_model(folder / "dense", model)
        return _train(folder, **{"init.model": str(folder / "dense")})

    def not_finite(folder: pathlib.Path) -> Any:
        fields = {"finetune.learning_rate": "1e6", "finetune.epochs": 20}
        return _train(folder, **fields)

    yield from (
        ("`--workdir` is a file", a_file),
        ("a finished run of another config", other_config),
        ("an unfinished run of another config", other_unfinished),
        ("`summary.json` is damaged", broken_summary),
        ("`metrics.jsonl` is a folder", no_file_of_metrics),
        ("`checkpoints` is a file", no_folder_of_checkpoints),
        ("`config.json` is of something else", other_config_file),
        ("`table.json` of a sweep is damaged", no_table),
        ("all checkpoints are damaged", all_damaged),
        ("another process trains in the folder", in_use),
        ("`--mode=evaluate` of an unfinished run", unfinished),
        ("the saved model is damaged", damaged_model),
        ("a folder that holds no saved model", not_a_model),
        ("`tpp.save_model` to a folder that holds other things", not_replaced),
        ("`tpp.load_model` into a module of other shapes", other_shape),
        ("`tpp.load_model` into a module of another class", other_class),
        ("`config.init.model` of another network", other_network),
        ("the loss is no longer finite", not_finite),
    )


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def _weights() -> Cases:

    def resnet() -> nnx.Module:
        return tpp.models.create("resnet18", rngs=nnx.Rngs(0))

    def file(folder: pathlib.Path, content: bytes, name: str = "weights.pth") -> Any:
        (folder / name).write_bytes(content)
        return tpp.load_torch(folder / name, resnet())

    def state(change: Callable[[dict[str, Any]], None]) -> Any:
        model = tpp.models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "weights.safetensors"
            tpp.save_torch(model, path)
            from safetensors.numpy import load_file

            tensors = load_file(path)
        change(tensors)
        return tpp.load_torch(tensors, model)

    index = b'{"weight_map": {"w": "model-00001-of-00002.safetensors"}}'
    whole = (FILES / "state_dict.pth").read_bytes()
    tensors = (FILES / "state_dict.safetensors").read_bytes()
    transposed = lambda d: d.update({"net.0.weight": d["net.0.weight"].T[:3]})  # noqa: E731
    yield from (
        ("a file that does not exist", lambda f: tpp.load_torch(f / "w.pth", resnet())),
        ("a file cut short", lambda f: file(f, whole[:1000])),
        ("a file that is text", lambda f: file(f, b"hello, world")),
        ("a pickle that would run code", lambda f: file(f, pickle.dumps(_Malicious()))),
        (
            "safetensors cut short",
            lambda f: file(f, tensors[:300], "weights.safetensors"),
        ),
        (
            "an index whose files are not there",
            lambda f: file(f, index, "model.safetensors.index.json"),
        ),
        ("weights of another network", lambda f: file(f, whole)),
        ("a tensor is missing", lambda f: state(lambda d: d.pop("net.0.weight"))),
        ("a tensor too many", lambda f: state(lambda d: d.update(x=np.ones(3)))),
        ("a tensor of another shape", lambda f: state(transposed)),
    )


def _even(params: Any, x: Any) -> Any:
    hidden = x @ params["w1"]
    if hidden.shape[-1] % 2:
        raise ValueError("the width must be even")
    return hidden @ params["w2"]


def _library() -> Cases:
    model = tpp.models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    images = jnp.ones((2, 8, 8, 1))
    groups = tpp.channel_groups(model, images)
    plan = tpp.make_plan(groups, model, "*net*:0.5", skip="net.12")
    other = tpp.models.create("mlp20_linear", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    kernel = jnp.ones((4, 8))
    params = nnx.state(model, nnx.Param)
    picky_params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
    picky_groups = tpp.channel_groups(_even, jnp.ones((1, 4)), params=picky_params)
    yield from (
        (
            "`tpp.models.create('resnet51', …)`",
            lambda f: tpp.models.create("resnet51", rngs=nnx.Rngs(0)),
        ),
        (
            "`tpp.make_plan(groups, model, 1.5)`",
            lambda f: tpp.make_plan(groups, model, 1.5),
        ),
        (
            "`tpp.make_plan(groups, model)` with neither ratios nor a target",
            lambda f: tpp.make_plan(groups, model),
        ),
        (
            "`tpp.make_plan(…, criterion='taylor')` without statistics",
            lambda f: tpp.make_plan(groups, model, 0.5, criterion="taylor"),
        ),
        (
            "`tpp.prune` with the plan of another model",
            lambda f: tpp.prune(other, plan),
        ),
        (
            "`Plan.from_dict` of another model",
            lambda f: tpp.Plan.from_dict({"net.0": [0, 1]}, groups),
        ),
        (
            "`Plan.from_dict` with indices out of range",
            lambda f: tpp.Plan.from_dict(plan.to_dict() | {"net.0": [0, 999]}, groups),
        ),
        (
            "`tpp.slice_tree` of a tree that is no parameters'",
            lambda f: tpp.slice_tree(
                plan, {"net": {"0": {"kernel": jnp.ones((3, 3))}}}
            ),
        ),
        (
            "`tpp.growing_schedule(granularity=0)`",
            lambda f: tpp.growing_schedule(granularity=0),
        ),
        (
            "`gram_penalty` with a mask of the wrong length",
            lambda f: gram_penalty(kernel, jnp.zeros(5, bool)),
        ),
        (
            "`tpp.reinitialize` by an unknown recipe",
            lambda f: tpp.reinitialize(model, "orthop"),
        ),
        (
            "`tpp.jacobian_singular_values` without a batch axis",
            lambda f: tpp.jacobian_singular_values(model, jnp.ones((8, 8, 1))),
        ),
        (
            "`tpp.add_tpp_penalties` updated without parameters",
            lambda f: tpp.add_tpp_penalties(plan, tpp.growing_schedule()).update(
                params, tpp.add_tpp_penalties(plan, tpp.growing_schedule()).init(params)
            ),
        ),
        (
            "`tpp.add_tpp_penalties` with a tree that is named otherwise",
            lambda f: tpp.add_tpp_penalties(plan, tpp.growing_schedule()).init(
                {"weights": jnp.ones(3)}
            ),
        ),
        (
            "`tpp.make_plan` with a width that the model's code does not allow",
            lambda f: tpp.make_plan(picky_groups, picky_params, counts={"w1": 5}),
        ),
        (
            "`tpp.register_rule` for a primitive that has a rule",
            lambda f: tpp.register_rule("add"),
        ),
        (
            "`tpp.zero_pruned` with a stabilize phase that is too short",
            lambda f: tpp.zero_pruned(plan, tpp.growing_schedule(stabilize=10)),
        ),
    )


SECTIONS: dict[str, Callable[[], Cases]] = {
    "Fields of the config": _fields,
    "Patterns of layers": _patterns,
    "Command lines": _command_lines,
    "Tables": _tables,
    "Data": _data,
    "Folders of runs, checkpoints, saved models": _folders,
    "PyTorch's weights": _weights,
    "Calls of the library": _library,
}


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.exit(0)
