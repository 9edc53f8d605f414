"""The config of a run: its fields and their checks.

The files in configs/ start from :func:`default_config` and set some of the fields.
docs/config.md and the help of the command line are generated from the declarations here
and in :mod:`tpp_jax.experiment.sections`.
"""

import dataclasses
import difflib
from typing import Any

import ml_collections

from tpp_jax.errors import TPPError
from tpp_jax.experiment.fields import (
    OPEN,
    Tree,
    build,
    field,
    flat,
    plain,
    sections_of,
)
from tpp_jax.experiment.sections import (
    DataConfig,
    FinetuneConfig,
    InitConfig,
    ModelConfig,
    PruneConfig,
    TaskConfig,
    TrainingConfig,
)
from tpp_jax.training.parallel import Api


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Typed config of a run. :meth:`from_dict` checks one."""

    seed: int = field(
        0,
        "Seed of all random numbers: initial weights, order of the data, augmentation.",
        most=2**32 - 1,  # JAX uses the lower 32 bits
    )
    num_devices: int = field(0, "Number of devices to train on; 0 for all.")
    accumulate: int = field(
        1,
        "Number of parts in which each device computes its share of a batch, one after "
        "the other, to save memory (gradient accumulation).",
        least=1,
    )
    parallel: Api = field("pmap", "JAX API that programs several devices.")
    skip_nonfinite: bool = field(
        False,
        "Whether a step whose loss or gradient is not finite is skipped; otherwise it "
        "stops the run.",
    )
    sync_bn: bool = field(
        True,
        "Whether batch norm uses the statistics of all devices together; otherwise "
        "each device uses its own.",
    )
    steps_per_dispatch: int = field(
        0,
        "Number of steps in one dispatch to a device, at most 100, or 1 if the data is "
        "streamed; 0 for 1 on the CPU and that maximum on accelerators.",
    )
    log_every: int = field(50, "Number of steps between records of metrics.", least=1)
    eval_every: int = field(
        1000,
        "Number of steps between evaluations on the test set; each phase ends with "
        "one.",
        least=1,
    )
    checkpoint_every: int = field(
        1000,
        "Number of steps between checkpoints; each phase ends with one.",
        least=1,
    )
    keep_checkpoints: int = field(
        2,
        "Number of checkpoints to keep; the best network is kept in `best/`.",
        least=1,
    )
    jacobian_every: int = field(
        0,
        "Number of steps between measurements of the Jacobian's singular values; 0 for "
        "none.",
    )
    jacobian_images: int = field(
        16, "Number of test images that the Jacobian is measured on.", least=1
    )
    callbacks: str = field(
        "",
        "Dotted paths, separated by commas, of callbacks: `tpp_jax.loggers:Wandb`, "
        "`tpp_jax.loggers:MLflow` or your own, see [own_model.md](own_model.md).",
    )
    report_layer: str = field(
        "",
        "Layer whose Gram matrix the report shows; empty for the first pruned layer.",
    )
    task: TaskConfig = field(TaskConfig(), "What the network learns.")
    model: ModelConfig = field(ModelConfig(), "The network and its arithmetic.")
    data: DataConfig = field(
        DataConfig(),
        "The data set, its batches and its augmentation. Small data sets are held in "
        "memory; `folder` and `imagenet2012` are streamed.",
    )
    init: InitConfig = field(
        InitConfig(),
        "Trained weights to start from, instead of the phase `pretrain`. At most one "
        "of the two may be set.",
    )
    pretrain: TrainingConfig = field(
        TrainingConfig(epochs=200, learning_rate="0:0.1,100:0.01,150:0.001"),
        "Training of the dense network before pruning.",
    )
    prune: PruneConfig = field(
        PruneConfig(),
        "Method of pruning, and what and how much it prunes. The defaults are the "
        "paper's for CIFAR.",
    )
    finetune: FinetuneConfig = field(
        FinetuneConfig(epochs=120, learning_rate="0:0.01,60:0.001,90:0.0001"),
        "Training of the pruned network after the cut.",
    )

    @classmethod
    def from_dict(cls, config: Tree) -> "RunConfig":
        """Returns the typed form of a config after checking its values.

        Args:
          config: Values of all fields, as a ConfigDict or nested dicts.

        Raises:
          TPPError: A field is missing or unknown, or its value is unusable.

        Example:
          >>> RunConfig.from_dict(default_config()) == RunConfig()
          True
        """
        check_fields(config)
        check_values(config)
        return build(cls, config)


SECTIONS = sections_of(RunConfig(), doc="Seed, devices, logs and checkpoints.")
"""Sections of a run's config, in the order of the documentation."""

FIELDS = {one.name: one for section in SECTIONS for one in section.fields}
"""Fields of a run's config by full name (``prune.schedule.every``)."""


def default_config() -> ml_collections.ConfigDict:
    """Returns a config of a run with all defaults, which the caller may change.

    A field keeps its type. An unknown field is an error when the run starts.

    Example:
      >>> config = default_config()
      >>> config.prune.ratios = "*layer*.conv1:0.9"
    """
    return ml_collections.ConfigDict(dataclasses.asdict(RunConfig()))


def with_defaults(config: Tree) -> dict[str, Any]:
    """Returns the config of an earlier version with the newest fields, as nested dicts.

    Args:
      config: Config that was read from a file, which may lack fields.
    """
    return _merged(default_config().to_dict(), plain(config))


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dicts with the values of others, which replace fields of dicts."""
    found = dict(old)
    for name, value in new.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        inner = both and name != OPEN
        found[name] = _merged(found[name], value) if inner else value
    return found


def check_fields(config: Tree) -> None:
    """Checks that a config has exactly the fields of the default config.

    Raises:
      TPPError: It is the config of a table, or a field is missing or unknown.
    """
    if "rows" in config and "columns" in config:
        raise TPPError("the config is that of a table: run it with --mode=sweep")
    names = flat(config).keys()
    if odd := sorted(names - FIELDS.keys()):
        raise TPPError(f"the config has an unknown field {odd[0]}{near_fields(odd[0])}")
    if missing := sorted(FIELDS.keys() - names):
        raise TPPError(
            f"the config has no field {missing[0]}: start it from "
            "tpp_jax.experiment.config.default_config()"
        )


def near_fields(name: str) -> str:
    """Returns ``"; did you mean …?"`` for a misspelt name, or an empty text."""
    full = {field.rpartition(".")[2]: field for field in sorted(FIELDS)}
    near = difflib.get_close_matches(name, [*FIELDS, *full], n=2)
    if not near:
        return ""
    meant = dict.fromkeys(full.get(one, one) for one in near)
    return f"; did you mean {' or '.join(meant)}?"


def check_values(config: Tree) -> None:
    """Checks the values of a config, as far as they do not depend on the data.

    Args:
      config: Config with the fields of the default config.

    Raises:
      TPPError: The value of a field is unusable.
    """
    values = flat(config)
    for name, one in FIELDS.items():
        one.check(values[name])
    if values["data.resize"] < values["data.image_size"]:
        raise TPPError(
            f"config.data.resize is {values['data.resize']}, too small for crops of "
            f"config.data.image_size={values['data.image_size']}"
        )
    if values["init.model"] and values["init.torch"]:
        raise TPPError(
            "config.init.model and config.init.torch are both set, but a run starts "
            "from one network: leave one of them empty"
        )


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Returns a line of text for each field in which two nested dicts differ."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return found
