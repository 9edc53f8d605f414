"""Every field of a run's config with its default; the files in configs/ set some."""

import difflib
import math
import operator
import pathlib
import typing
from typing import Any

import ml_collections

from tpp_jax.errors import TPPError
from tpp_jax.experiment.methods import METHODS
from tpp_jax.method.gram import Target
from tpp_jax.method.isometry import RECIPES
from tpp_jax.training import parallel
from tpp_jax.training.optimizers import (
    MOST_STEPS,
    OPTIMIZERS,
    ORTHOGONALITY,
    SCHEDULES,
)

_PHASES = ("pretrain", "finetune")

# The least that makes sense of a number; no number may be infinite or not a number.
_LEAST: dict[str, float] = {
    "seed": 0,
    "num_devices": 0,
    "accumulate": 1,
    "steps_per_dispatch": 0,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "data.batch_size": 1,
    "data.pad_to": 0,
    "data.crop_padding": 0,
    "data.image_size": 1,
    "data.resize": 1,
    "data.workers": 0,
    "prune.flops": 0,
    "prune.params": 0,
    "prune.batches": 1,
    "prune.learning_rate": 0,
    "prune.momentum": 0,
    "prune.weight_decay": 0,
    "prune.gram_weight": 0,
    "prune.kept_weight": 0,
    "prune.rounds": 1,
    "prune.grow.weight": 0,
    "prune.grow.steps": 0,
    "jacobian_every": 0,
    "jacobian_images": 1,
}
_LEAST_OF_A_PHASE = {
    "epochs": 0,
    "warmup_epochs": 0,
    "momentum": 0,
    "weight_decay": 0,
    "label_smoothing": 0,
    "mixup": 0,
    "cutmix": 0,
    "ema": 0,
    "orthogonality_weight": 0,
}
_LEAST |= {f"{p}.{name}": n for p in _PHASES for name, n in _LEAST_OF_A_PHASE.items()}

# What must stay below 1: a momentum of 1 forgets nothing, an average of 1 learns none.
_BELOW_ONE = (
    "prune.momentum",
    *(f"{p}.{n}" for p in _PHASES for n in ("momentum", "label_smoothing", "ema")),
)

# The most of a number where that is not what 32 bits hold, in which steps are counted
# and parameters computed. JAX takes the lower 32 bits of a seed.
_MOST: dict[str, float] = {
    "seed": 2**32 - 1,
    "data.pad_to": 2**14,
    "data.crop_padding": 2**14,
    "data.image_size": 2**14,
    "data.resize": 2**14,
    "data.workers": 1000,
    "prune.rounds": 1000,
}
_MOST_FLOAT = 3e38

# Text that may be given as the number it says.
_TEXT_OR_NUMBER = tuple(f"{p}.learning_rate" for p in _PHASES)
_TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
}

_CHOICES = {
    "parallel": typing.get_args(parallel.Kind),
    "model.dtype": ("float32", "bfloat16"),
    "prune.method": tuple(METHODS),
    "prune.target": typing.get_args(Target),
    "prune.reinitialize": ("", *RECIPES),
    **{f"{p}.schedule": SCHEDULES for p in _PHASES},
    **{f"{p}.optimizer": OPTIMIZERS for p in _PHASES},
    **{f"{p}.orthogonality": ORTHOGONALITY for p in _PHASES},
}


def default_config() -> ml_collections.ConfigDict:
    """Returns all fields of a run. Types are fixed, and unknown fields are an error.

    The defaults of ``prune`` and its schedule are the paper's for CIFAR.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_devices = 0  # to train on; 0 for all
    # Parts a batch is computed in, one after the other, to save memory.
    config.accumulate = 1
    config.parallel = "pmap"  # or "shard_map": how several devices are programmed
    # Leave out steps whose loss or gradient is not finite, instead of stopping.
    config.skip_nonfinite = False
    config.sync_bn = True  # batch norm over the batches of all devices, or of each
    config.steps_per_dispatch = 0  # 0: 1 on the CPU, 100 on accelerators
    config.log_every = 50  # steps between lines of metrics
    config.eval_every = 1000  # steps between test accuracies; each phase ends with one
    config.checkpoint_every = 1000  # steps; each phase ends with a checkpoint
    config.keep_checkpoints = 2  # the last ones; the best network is in best/
    # Steps between measurements of the Jacobian's singular values, and on how many
    # test images; 0 for none.
    config.jacobian_every = 0
    config.jacobian_images = 16
    config.report_layer = ""  # whose Gram matrix is kept; "" for the first pruned one

    config.model = ml_collections.ConfigDict()
    config.model.name = "cifar_resnet56"  # see tpp_jax.models.names()
    # Of the computation: "float32" or "bfloat16"; parameters, batch statistics and the
    # loss stay float32.
    config.model.dtype = "float32"
    # Recompute all but convolutions and matrix products in the backward pass.
    config.model.remat = False

    config.data = ml_collections.ConfigDict()
    config.data.name = "cifar10"
    config.data.dir = ""  # prepared TFDS data; "" for TFDS's own default
    config.data.pad_to = 0  # zero-pad images to this size; 0 leaves them
    config.data.batch_size = 128  # of all devices together
    config.data.crop_padding = 4  # zero pixels around an image before its random crop
    config.data.flip = True
    config.data.image_size = 224  # of streamed data, as are the next two
    config.data.resize = 256  # shorter side before the test's centre crop
    config.data.workers = 0  # processes that decode; 0: threads of this one

    # Start from weights instead of training a network first: one saved by
    # tpp_jax.save_model (the folder dense/ of another run), or PyTorch's.
    config.init = ml_collections.ConfigDict()
    config.init.model = ""
    config.init.torch = ""  # a .pth or .safetensors file

    config.pretrain = _training(epochs=200, learning_rate="0:0.1,100:0.01,150:0.001")

    config.prune = ml_collections.ConfigDict()
    # Or a rival of TPP: oneshot, extra, scratch, greg2, group_lasso, iterative; none
    # trains the dense network only. See tpp_jax/experiment/methods.py.
    config.prune.method = "tpp"
    # pattern:share pruned, comma-separated; with a target "" means all groups alike
    config.prune.ratios = "*layer*.conv1:0.5"
    config.prune.flops = 0.0  # target: share of the FLOPs that remains; 0 for none
    config.prune.params = 0.0  # likewise, of the parameters
    config.prune.skip = ""  # patterns left whole
    config.prune.criterion = "l1"  # a name in tpp_jax/pruning/criteria.py, or random
    config.prune.batches = 4  # of training images, for taylor, hessian, activation
    config.prune.scope = "local"  # or global, isomorphic
    config.prune.reduce = "mean"  # of a group's layers; or sum, max, first
    config.prune.round_to = 1
    config.prune.min_channels = 1
    config.prune.learning_rate = 1e-3
    config.prune.momentum = 0.9
    config.prune.weight_decay = 5e-4
    config.prune.gram_weight = 1000.0  # 0: without Gram decorrelation
    config.prune.bn = True  # shrink batch norms' scales and biases
    config.prune.l2 = True  # shrink pruned filters
    config.prune.target = "decorrelate"  # or "orthogonal", an ablation
    config.prune.kept_weight = 0.0  # an ablation: kept filters orthonormal, 0.1
    # After the cut, kernels made anew: a recipe of tpp_jax/method/isometry.py, or "".
    config.prune.reinitialize = ""
    config.prune.rounds = 5  # of the method iterative
    # The phase before the channels are chosen: of greg2, L2 of growing strength (the
    # first three fields), of group_lasso one of constant weight.
    config.prune.grow = ml_collections.ConfigDict()
    config.prune.grow.granularity = 1e-5
    config.prune.grow.every = 10
    config.prune.grow.ceiling = 1e-2
    config.prune.grow.weight = 1e-3
    config.prune.grow.steps = 0  # 0: as many as TPP regularizes and stabilizes
    config.prune.schedule = ml_collections.ConfigDict()
    config.prune.schedule.kind = "linear"  # or poly2, poly3…
    config.prune.schedule.granularity = 1e-4
    config.prune.schedule.every = 10
    config.prune.schedule.ceiling = 1.0
    config.prune.schedule.stabilize = 10_000
    config.prune.schedule.zero_out_every = 100
    config.prune.schedule.regularize_steps = 0  # for poly only

    config.finetune = _training(epochs=120, learning_rate="0:0.01,60:0.001,90:0.0001")
    return config


def _training(**fields: Any) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "schedule": "step",  # or cosine
            "warmup_epochs": 0.0,  # the rate's linear rise from zero
            "optimizer": "sgd",  # or adamw, lamb
            "momentum": 0.9,  # beta_1 of adamw and lamb
            "nesterov": False,  # for sgd only
            "weight_decay": 5e-4,
            "decay_norms": True,  # False: no weight decay on biases and norms
            "label_smoothing": 0.0,
            "mixup": 0.0,  # alpha of Beta(alpha, alpha); 0 for none
            "cutmix": 0.0,  # likewise; with both, either one at random per batch
            "ema": 0.0,  # decay per step of the weights' average; 0 for none
            "orthogonality": "",  # or kernel, convolution: a penalty added to the loss
            "orthogonality_weight": 0.1,
            **fields,
        }
    )


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Raises a TPPError unless a config has exactly the fields of the default one."""
    if "rows" in config and "columns" in config:
        raise TPPError("the config is that of a table: run it with --mode=sweep")
    ours, theirs = _fields(default_config()), _fields(config)
    if odd := sorted(theirs - ours):
        raise TPPError(
            f"the config has a field {odd[0]} that nothing reads{near_fields(odd[0])}"
        )
    if missing := sorted(ours - theirs):
        raise TPPError(
            f"the config has no field {missing[0]}: start it from "
            "tpp_jax.experiment.config.default_config()"
        )


def near_fields(name: str) -> str:
    """Returns ``"; did you mean …?"`` for a field's name or the last part of one."""
    ours = _fields(default_config())
    full = {field.rpartition(".")[2]: field for field in sorted(ours)}
    near = difflib.get_close_matches(name, [*ours, *full], n=2)
    if not near:
        return ""
    meant = dict.fromkeys(full.get(one, one) for one in near)
    return f"; did you mean {' or '.join(meant)}?"


def check_values(config: ml_collections.ConfigDict) -> None:
    """Raises a TPPError if a field holds what no run can use, whatever its data."""
    for name, default in _values(default_config()).items():
        _check_type(name, operator.attrgetter(name)(config), type(default))
    for name, least in _LEAST.items():
        value = operator.attrgetter(name)(config)
        if not least <= value < math.inf:
            what = "at least" if abs(value) < math.inf else "finite and at least"
            raise TPPError(f"config.{name} is {_short(value)}, must be {what} {least}")
    for name in _BELOW_ONE:
        value = operator.attrgetter(name)(config)
        if value >= 1:
            raise TPPError(f"config.{name} is {value}, must be below 1")
    for name in (f"{p}.{mix}" for p in _PHASES for mix in ("mixup", "cutmix")):
        value = operator.attrgetter(name)(config)
        if 0 < value < 1e-6:  # no number is drawn from such a distribution
            raise TPPError(f"config.{name} is {value}, must be 0 or at least 1e-06")
    for name, value in _values(config).items():
        if isinstance(value, str | bool) or name in _BELOW_ONE:
            continue
        most = _MOST.get(name, _MOST_FLOAT if isinstance(value, float) else MOST_STEPS)
        if not -most <= value <= most:
            what = f"at most {most}" if abs(value) < math.inf else "finite"
            raise TPPError(f"config.{name} is {_short(value)}, must be {what}")
    for name, choices in _CHOICES.items():
        value = operator.attrgetter(name)(config)
        if value not in choices:
            raise TPPError(
                f"unknown config.{name} {value!r}: choose "
                f"{' or '.join(map(repr, choices))}"
            )
    if config.data.resize < config.data.image_size:
        raise TPPError(
            f"config.data.resize is {config.data.resize}, too small to cut images of "
            f"config.data.image_size={config.data.image_size} from"
        )
    for name in ("init.model", "init.torch", "data.dir"):
        path = operator.attrgetter(name)(config)
        try:
            pathlib.Path(path).exists()
            bad = "it holds a zero byte" if "\0" in path else ""
        except (OSError, ValueError) as error:
            bad = getattr(error, "strerror", None) or str(error)
        if bad:
            raise TPPError(f"config.{name} is {_short(path)}, which is no path: {bad}")
    if config.init.model and config.init.torch:
        raise TPPError(
            "config.init.model and config.init.torch are both set: a run starts from "
            "one network, so leave one of them empty"
        )


def _check_type(name: str, value: Any, wanted: type) -> None:
    """Raises a TPPError unless a value is of its field's type; True is no number."""
    fits = isinstance(value, int | float if wanted is float else wanted)
    if name in _TEXT_OR_NUMBER:
        fits |= isinstance(value, int | float)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise TPPError(f"config.{name} is {_short(value)}, must be {_TYPES[wanted]}")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields(config: ml_collections.ConfigDict) -> set[str]:
    return set(_values(config))


def _values(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the value of each field, by its full name."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found |= _values(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lists the fields in which two configs (nested dicts) differ, as text."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return found
