"""A run from Python: the function :func:`fit`."""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
import re
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from tpp_jax.errors import TPPError, renamed, require
from tpp_jax.interop.equinox_modules import is_equinox
from tpp_jax.pruning.plan import Plan

if TYPE_CHECKING:
    from tpp_jax.callbacks import Callback


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns. The networks are in evaluation mode.

    Attributes:
      dense: Network before the cut, as it was trained; None if the method has none.
      pruned: Pruned network, fine-tuned; None if nothing was cut.
      plan: Plan of the cut; None if nothing was cut.
      summary: Content of ``summary.json``: scores of all phases, parameters, FLOPs.
      history: Recorded metrics, a dict for each record.
      folder: Folder of the run with its report; None if there is none.
    """

    dense: nnx.Module | None
    pruned: nnx.Module | None
    plan: Plan | None
    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    folder: pathlib.Path | None

    @property
    def report(self) -> pathlib.Path | None:
        """Path of the report, a page for the browser; None without a folder."""
        return None if self.folder is None else self.folder / "report.html"


def fit(
    task: Any,
    data: Any = None,
    *,
    loss: Callable[..., Any] | None = None,
    ratios: float | str | Mapping[str, float] = 0.5,
    method: str = "tpp",
    epochs: int = 10,
    pretrain_epochs: int = 0,
    learning_rate: float | str = 0.01,
    batch_size: int = 128,
    schedule: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    folder: str | pathlib.Path | None = None,
    callbacks: "Sequence[Callback]" = (),
    **fields: Any,
) -> FitResult:
    """Trains, prunes and fine-tunes a network: the run of ``launch.py``, from Python.

    Args:
      task: Task, or object that defines a part of one, see docs/own_model.md; or a
        network, trained or not: a module of Flax NNX or Linen or of Equinox; or a
        function of ``nnx.Rngs`` that makes one.
      data: Training and evaluation data of a network, ``(train, evaluation)``: pytrees
        of arrays whose first axis runs over the examples, or sources of random access.
      loss: ``loss(model, batch)`` or ``loss(model, batch, key)`` of a network, the mean
        loss of a batch or a tuple of it and a dict of metrics; None for the
        cross-entropy of data ``(inputs, labels)``, whose labels are integers.
      ratios: Share of channels to prune: of every group, or by patterns of layers.
      method: Name of the method, see docs/config.md.
      epochs: Length of the fine-tuning in epochs.
      pretrain_epochs: Length of the dense training before it; 0 for a trained network.
      learning_rate: Learning rate of both.
      batch_size: Number of examples in a batch, unless the task has its own.
      schedule: Fields of ``prune.schedule``, such as ``{"granularity": 0.01}``.
      config: Other fields of the config by full name: ``{"finetune.optimizer":
        "adamw"}``.
      folder: Folder of the run, with checkpoints, from which the same call continues,
        and a report; None for none.
      callbacks: Objects that are called during the run.
      **fields: Further attributes of the task of a network: ``inputs``, ``metrics``,
        ``report``, ``headline``, ``augment``, ``examples``, ``steps_per_epoch``.

    Returns:
      The networks, the plan and the records.

    Raises:
      TPPError: An argument is wrong, which is found before any training; or the loss is
        no longer finite.

    Example:
      >>> images = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
      >>> labels = (images.sum(1) > 0).astype("int32")
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.first = nnx.Linear(8, 16, rngs=rngs)
      ...         self.last = nnx.Linear(16, 2, rngs=rngs)
      ...
      ...     def __call__(self, x):
      ...         return self.last(nnx.relu(self.first(x)))
      >>> result = fit(
      ...     Net,
      ...     ((images, labels), (images, labels)),
      ...     batch_size=16,
      ...     epochs=1,
      ...     pretrain_epochs=1,
      ...     schedule={"granularity": 0.5, "every": 1, "stabilize": 10},
      ... )  # doctest: +SKIP
      >>> result.pruned.first.kernel.shape  # doctest: +SKIP
      (8, 8)
    """
    require("train", "ml_collections", "orbax.checkpoint", "rich", "tensorboardX")
    from tpp_jax.experiment import run
    from tpp_jax.experiment.setup import Given
    from tpp_jax.training.own import complete

    own, name = _own(task, data, loss, fields)
    listeners = _callbacks(callbacks)
    tree = _config(
        {
            "task.name": name,
            "data.batch_size": batch_size,
            "prune.method": method,
            "prune.ratios": _ratios(ratios),
            "pretrain.epochs": pretrain_epochs,
            "pretrain.learning_rate": learning_rate,
            "finetune.epochs": epochs,
            "finetune.learning_rate": learning_rate,
            **{f"prune.schedule.{key}": x for key, x in (schedule or {}).items()},
            **(config or {}),
        }
    )
    made = complete(own, name.partition(":")[2], int(batch_size))
    tree.data.batch_size = made.batch_size
    given = Given(made, listeners, checkpoints=folder is not None)
    with _folder(folder) as place, renamed(_IN_A_CONFIG, _as_argument):
        summary = run.train(tree, place, given)
        return _result(summary, place, made, tree, folder is not None)


# What runs call the values that arguments of fit set.
_IN_A_CONFIG = r"(?:--)?\bconfig\.([a-z_]+(?:\.[a-z_]+)*)|--workdir"
_ARGUMENTS = {
    "data.batch_size": "batch_size",
    "prune.method": "method",
    "prune.ratios": "ratios",
    "prune.schedule": "schedule",
    "pretrain.epochs": "pretrain_epochs",
    "pretrain.learning_rate": "learning_rate",
    "finetune.epochs": "epochs",
    "finetune.learning_rate": "learning_rate",
}


def _as_argument(found: re.Match[str]) -> str:
    """Returns the argument of fit for a field of a config."""
    from tpp_jax.experiment.config import FIELDS

    if (name := found[1]) is None:
        return "folder"
    section, _, last = name.rpartition(".")
    if name not in FIELDS and name not in _ARGUMENTS:  # such as config.json
        return found[0]
    if section == "prune.schedule":
        return f'schedule["{last}"]'
    return _ARGUMENTS.get(name) or f'config["{name}"]'


def _own(
    task: Any, data: Any, loss: Callable[..., Any] | None, fields: Mapping[str, Any]
) -> tuple[Any, str]:
    """Returns the object to complete to a task, and a dotted path that describes it."""
    named = task if isinstance(task, type | types.FunctionType) else type(task)
    kind = named if isinstance(named, type) else types.FunctionType
    name = f"{named.__module__}:{named.__qualname__.rpartition('.')[2]}"
    network = issubclass(kind, nnx.Module | linen.Module) or is_equinox(task)
    if hasattr(task, "loss") and not network:
        given = {"data": data, "loss": loss, **fields}
        if extra := [key for key, value in given.items() if value is not None]:
            raise TPPError(
                f"{name} is a task, which has its own data and loss: leave out "
                f"{', '.join(extra)}"
            )
        return (_made(task, name) if isinstance(task, type) else task), name
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise TPPError(
            "a network needs data: a tuple (train, evaluation) of two pytrees of "
            "arrays or two sources of random access"
        )
    fields = {name: x for name, x in fields.items() if x is not None}
    if unknown := fields.keys() - _FIELDS:
        raise TPPError(
            f"fit has no argument {min(unknown)!r}; a task has {', '.join(_FIELDS)}, "
            "and config= takes the fields of the config"
        )
    if loss is None:
        loss = functools.partial(cross_entropy, largest=_largest_label(data))
        extra = {"report": _percent, "headline": _accuracy()}
        fields = extra | dict(fields)

    def model(rngs: nnx.Rngs) -> Any:
        if isinstance(task, nnx.Module):
            return nnx.clone(task)
        if isinstance(task, type) and issubclass(task, linen.Module):
            return _made(task, name)
        made = isinstance(task, linen.Module) or is_equinox(task)
        return task if made else task(rngs)

    own = types.SimpleNamespace(
        model=model, loss=loss, train=data[0], evaluation=data[1], **fields
    )
    return own, name


_FIELDS = ("inputs", "metrics", "report", "headline", "augment", "examples")
_FIELDS += ("steps_per_epoch",)


def _callbacks(given: Any) -> "tuple[Callback, ...]":
    from tpp_jax.callbacks import Callback

    found = tuple(given) if isinstance(given, tuple | list) else (given,)
    for one in found:
        if not isinstance(one, Callback):
            name = one.__name__ if isinstance(one, type) else type(one).__name__
            raise TPPError(
                f"callbacks has {name}, must be a list of objects of tpp_jax.Callback"
            )
    return found


def _made(task: type, name: str) -> Any:
    try:
        inspect.signature(task).bind()
    except TypeError as error:
        raise TPPError(
            f"{name} is a class that needs arguments ({error}): pass an object of it"
        ) from None
    return task()


def _largest_label(data: Sequence[Any]) -> int:
    """Returns the largest label of data in arrays; -1 if it is not known.

    Raises:
      TPPError: They are not inputs and labels for a cross-entropy.
    """
    largest = -1
    for part, examples in zip(("training", "evaluation"), data, strict=True):
        if not isinstance(examples, tuple | list):
            if isinstance(examples, Mapping) or hasattr(examples, "shape"):
                raise TPPError(
                    f"the {part} data are a {type(examples).__name__}, but without "
                    "loss= they must be a pair (inputs, labels)"
                )
            continue  # random access, whose examples are not read here
        if len(examples) != 2 or not hasattr(examples[1], "dtype"):
            continue  # what else is wrong is found with the batch
        labels = np.asarray(examples[1])
        whole = np.issubdtype(labels.dtype, np.integer)
        if not whole or (labels.size and labels.min() < 0):
            found = f"the label {labels.min()}" if whole else f"{labels.dtype} labels"
            raise TPPError(
                f"the {part} data have {found}, but without loss= labels are classes, "
                "integers from 0"
            )
        largest = max(largest, int(labels.max(initial=-1)))
    return largest


def cross_entropy(
    model: Any, batch: Any, largest: int = -1
) -> tuple[Any, dict[str, Any]]:
    """Returns the mean cross-entropy of integer labels, and the accuracy.

    Args:
      model: Network from inputs to logits.
      batch: Pair of inputs and labels. The loss of a label that is no class is NaN.
      largest: Largest label of all data; -1 if it is not known.

    Raises:
      TPPError: The logits do not fit the labels.
    """
    inputs, labels = batch
    logits = model(inputs).astype(jnp.float32)
    if logits.shape[:-1] != labels.shape:
        raise TPPError(
            f"the network returns {logits.shape} for labels {labels.shape}, but "
            "without loss= it must return logits, one axis more than the labels"
        )
    if largest >= logits.shape[-1]:
        raise TPPError(
            f"the data have the label {largest}, but the network returns logits of "
            f"{logits.shape[-1]} classes, of which the first is 0"
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    losses = jnp.where((labels < 0) | (labels >= logits.shape[-1]), jnp.nan, losses)
    return losses.mean(), {"accuracy": (logits.argmax(-1) == labels).mean()}


def _accuracy() -> Any:
    from tpp_jax.headline import ACCURACY

    return ACCURACY


def _percent(means: Mapping[str, float]) -> dict[str, float]:
    if "accuracy" not in means:
        return dict(means)
    return {**means, "accuracy": 100 * means["accuracy"]}


def _ratios(ratios: float | str | Mapping[str, float]) -> str:
    if isinstance(ratios, Mapping):
        return ",".join(f"{pattern}:{ratio}" for pattern, ratio in ratios.items())
    return ratios if isinstance(ratios, str) else f"*:{ratios}"


def _config(fields: Mapping[str, Any]) -> Any:
    """Returns the default config with some fields.

    Raises:
      TPPError: A field is unknown.
    """
    import ml_collections

    from tpp_jax.experiment.config import FIELDS, default_config, near_fields

    config = default_config().to_dict()
    for name, value in fields.items():
        if name not in FIELDS:
            raise TPPError(f"there is no field {name!r} of a config{near_fields(name)}")
        section, _, last = name.rpartition(".")
        place = config
        for part in section.split(".") if section else ():
            place = place[part]
        place[last] = value.item() if hasattr(value, "item") else value
    return ml_collections.ConfigDict(config)


@contextlib.contextmanager
def _folder(given: str | pathlib.Path | None) -> Iterator[pathlib.Path]:
    if given is not None:
        yield pathlib.Path(given)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield pathlib.Path(temporary) / "run"


def _result(
    summary: Mapping[str, Any], place: pathlib.Path, task: Any, tree: Any, kept: bool
) -> FitResult:
    """Reads the networks and records from the folder of a run."""
    from tpp_jax.experiment.config import RunConfig
    from tpp_jax.experiment.records.history import read_history
    from tpp_jax.experiment.setup import start_of
    from tpp_jax.pruning.channels import channel_groups
    from tpp_jax.saving import load_model, load_model_info

    model = start_of(task, RunConfig.from_dict(tree))
    dense = pruned = plan = None
    if (place / "dense").is_dir():
        dense = load_model(place / "dense", model)
    if (place / "model").is_dir():
        pruned = load_model(place / "model", model)
        groups = channel_groups(model, *task.example_inputs())
        plan = Plan.from_dict(load_model_info(place / "model")["plan"], groups)
    history = read_history(place / "metrics.jsonl")
    return FitResult(dense, pruned, plan, summary, history, place if kept else None)
