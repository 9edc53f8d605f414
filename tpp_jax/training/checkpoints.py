"""Orbax checkpoints: everything is a flat dict of named arrays, plus JSON.

A checkpoint tells its own shapes, so that restoring a network, pruned or not, needs no
config: only the architecture's name, which is in the JSON.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from tpp_jax import models
from tpp_jax.errors import TPPError
from tpp_jax.pruning.functions import modules
from tpp_jax.pruning.modules import follow_arrays
from tpp_jax.pruning.naming import layer_name, map_named, named_leaves
from tpp_jax.pruning.plan import Plan
from tpp_jax.storage.paths import plain
from tpp_jax.training import hosts

Arrays = dict[str, Any]

_META = {"model", "plan", "config", "metrics"}  # what is told of a saved model


class Checkpoints:
    """The checkpoints of a run, one for each step saved, in one folder."""

    def __init__(self, folder: str | pathlib.Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True
        )
        self._folder = pathlib.Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._link = contextlib.ExitStack()
        self._manager = ocp.CheckpointManager(
            self._link.enter_context(plain(self._folder)),
            options=options,
            item_names=("arrays", "meta"),
        )

    def save(self, step: int, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        """Saves arrays and JSON-ready meta under a step, in the background.

        The arrays are copied off the device before this returns.

        Raises:
          TPPError: this or the last save could not be written.
        """
        with self._explained():
            self._manager.save(step, args=_items(arrays, meta), force=True)

    def latest(self) -> int | None:
        """Returns the last step saved, None if there is none."""
        return self._manager.latest_step()

    def restore(self) -> tuple[Arrays, dict[str, Any], list[str]] | None:
        """Returns the arrays and meta of the last step that is whole.

        What is damaged is put aside, as ``damaged-<step>``.

        Returns:
          Arrays, meta, and a line about each damaged checkpoint; None if there is no
          checkpoint at all.

        Raises:
          TPPError: all of them are damaged.
        """
        damaged: list[tuple[int, Exception]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                items = self._manager.restore(step, args=_wanted())
                arrays, meta = _whole(items)
            except Exception as error:  # orbax and tensorstore raise of every kind here
                damaged.append((step, error))
                continue
            return arrays, meta, [self._put_aside(*one) for one in damaged]
        if damaged:
            raise TPPError(
                f"none of the checkpoints in {self._folder} can be read "
                f"({_kind(damaged[0][1])}). Remove that folder to begin anew"
            ) from damaged[0][1]
        return None

    def _put_aside(self, step: int, error: Exception) -> str:
        aside = self._folder / f"damaged-{step}"
        hosts.wait_for_all(f"damaged {step}")  # all have read it
        if hosts.is_first():
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            (self._folder / str(step)).rename(aside)
        hosts.wait_for_all(f"aside {step}")
        self._manager.reload()
        return (
            f"The checkpoint of step {step} is damaged ({_kind(error)}); it is now "
            f"{aside}."
        )

    def close(self) -> None:
        """Waits for the last save to be on disk.

        Raises:
          TPPError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._manager.close()
        self._link.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise of every kind here
            latest = self.latest()
            kept = "none was written before" if latest is None else f"{latest} is whole"
            raise TPPError(
                f"a checkpoint could not be written to {self._folder} "
                f"({' '.join(str(error).split())[:200]}). Of those there {kept}: make "
                "room on the disk, and the same command goes on from it"
            ) from error


def save_model(
    path: str | pathlib.Path,
    model: nnx.Module,
    plan: Plan | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model with all that is needed to use it again; replaces what is there.

    Args:
      path: a folder.
      model: made by ``tpp_jax.models.create`` (pruned or not), or any module, which
        :func:`load_model` then has to be given in its unpruned form.
      plan: how it was pruned.
      config: JSON-ready, kept with it.
      metrics: numbers, text or arrays, kept with it as JSON.
    """
    spec = getattr(model, "spec", None)
    meta = {
        "model": None if spec is None else dataclasses.asdict(spec),
        "plan": None if plan is None else plan.to_dict(),
        "config": dict(config or {}),
        "metrics": jax.tree.map(_json_ready, dict(metrics or {})),
        "num_groups": {
            path: module.num_groups
            for path, module in modules(model)
            if isinstance(module, nnx.GroupNorm)
        },
    }
    items = _items(named_leaves(nnx.state(model)), meta)
    with (
        plain(path, new=True) as place,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver,
    ):
        saver.save(place, items, force=True)


def load_model(path: str | pathlib.Path, model: nnx.Module | None = None) -> nnx.Module:
    """Loads a model saved by :func:`save_model`.

    Args:
      path: the folder.
      model: a module of the saved one's class in its unpruned form (its arrays are not
        used). Not needed if the saved model came from ``tpp_jax.models.create``.

    Returns:
      The model with the saved arrays, pruned widths included, in training mode.

    Raises:
      TPPError: there is no readable model, it does not say what it is and ``model`` is
        not given, or its arrays are not those of the given model.
    """
    arrays, meta = _load(path)
    if model is None:
        if meta["model"] is None:
            raise TPPError(
                f"the model at {path} is not one that tpp_jax.models.create makes: "
                "pass load_model an unpruned module of its class"
            )
        model = create_abstract(**meta["model"])
    loaded = with_arrays(model, arrays)
    numbers = meta.get("num_groups") or {}
    follow_arrays(loaded, lambda leaf, old: numbers.get(layer_name(leaf), old))
    return loaded


def load_model_info(path: str | pathlib.Path) -> dict[str, Any]:
    """Returns what was saved with a model: its spec, plan, config and metrics.

    Raises:
      TPPError: there is no readable model.
    """
    return _load(path)[1]


def _load(path: str | pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    folder = pathlib.Path(path).absolute()
    if not folder.is_dir():
        raise TPPError(f"there is no saved model at {folder}")
    try:
        with (
            plain(folder) as place,
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as loader,
        ):
            arrays, meta = _whole(loader.restore(place, _wanted()))
    except Exception as error:  # orbax and tensorstore raise of every kind here
        raise TPPError(
            f"the saved model at {folder} cannot be read ({type(error).__name__}): it "
            "is damaged or not one of tpp_jax"
        ) from error
    if missing := _META - set(meta):
        raise TPPError(
            f"the saved model at {folder} is not one of tpp_jax: it does not tell its "
            f"{sorted(missing)[0]}"
        )
    return arrays, meta


def create_abstract(
    name: str, num_classes: int, image_shape: Sequence[int]
) -> nnx.Module:
    """Returns a network of ``tpp_jax.models`` without arrays, for its structure."""
    return nnx.eval_shape(
        lambda: models.create(
            name,
            num_classes=num_classes,
            image_shape=tuple(image_shape),
            rngs=nnx.Rngs(0),
        )
    )


def with_arrays(model: nnx.Module, arrays: Mapping[str, Any]) -> nnx.Module:
    """Returns a model of the same structure that holds the given arrays by name.

    Raises:
      TPPError: the names are not those of the model's arrays.
    """
    graphdef, state = nnx.split(model)
    names = named_leaves(state).keys()
    if names != arrays.keys():
        odd = sorted(names ^ arrays.keys())
        raise TPPError(
            f"the saved arrays are not those of this {type(model).__name__}: "
            f"{', '.join(odd[:5])} {'and more ' if len(odd) > 5 else ''}do not match"
        )
    state = map_named(lambda name, _: jnp.asarray(arrays[name]), state)
    return nnx.merge(graphdef, state)


def _json_ready(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _wanted() -> ocp.args.Composite:
    return ocp.args.Composite(
        arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )


def _items(arrays: Arrays, meta: Mapping[str, Any]) -> ocp.args.Composite:
    # Host copies: a checkpoint then knows nothing of the devices it came from, and the
    # device's buffers are free to be donated while Orbax writes in the background.
    arrays = jax.device_get(arrays)
    meta = {**meta, "checksum": _checksum(arrays, meta)}
    return ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
    )


class _Damaged(Exception):
    """What was read is not what was written."""


def _whole(items: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """Returns the arrays and meta that were read, if they are what was written.

    Orbax finds files that are missing or cut short, and not a bit that has flipped.
    """
    arrays, meta = items["arrays"], dict(items["meta"])
    if meta.pop("checksum", None) != _checksum(arrays, meta):
        raise _Damaged("the content is not what was written")
    return arrays, meta


def _checksum(arrays: Arrays, meta: Mapping[str, Any]) -> int:
    """CRC-32 of the names and contents of all arrays, and of the JSON beside them."""
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc


def _kind(error: Exception) -> str:
    return str(error) if isinstance(error, _Damaged) else type(error).__name__
