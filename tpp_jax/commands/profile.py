"""Speedup of the pruned network on this machine: --mode=profile."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.table
import rich.text
from flax import nnx

from tpp_jax import models
from tpp_jax.analysis.latency import Pair, as_json, compare, compare_layers
from tpp_jax.commands.inspect import abstract_model
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig
from tpp_jax.experiment.planning import plan_for
from tpp_jax.experiment.records.folders import config_of
from tpp_jax.experiment.records.terminal import Terminal
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import prune
from tpp_jax.saving import create_abstract, load_model, load_model_info

BATCH_SIZES = 1, 256


def profile(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path | None = None,
    *,
    given: bool = True,
) -> dict[str, Any]:
    """Times the dense and the pruned network, and each of their layers.

    Args:
      config: Config of the network and the cut, for use without a finished run. Its
        weights are random, which does not change the times.
      workdir: Folder of a run, whose networks are timed if it is finished; otherwise
        its config is used. In any case ``profile.json`` is written into the folder,
        which is created if it is missing.
      given: Whether the user asked for ``config``, so that a message appears if
        another is used.

    Returns:
      The content of ``profile.json``: ``networks`` by batch size and ``layers`` at the
      largest batch size, as :class:`Pair`, and the ``device``.

    Raises:
      TPPError: The config or the networks of the run are unusable.
    """
    folder = None if workdir is None else pathlib.Path(workdir)
    if folder is not None and (folder / "model").is_dir():
        dense, pruned, dtype = _of_run(folder)
    else:
        typed = RunConfig.from_dict(config_of(folder, config, given))
        dense, pruned = _untrained(typed)
        dtype = typed.model.dtype
    spec = models.spec_of(dense)
    name, shape = spec.name, tuple(spec.image_shape)
    console = Terminal()
    device = jax.devices()[0].device_kind
    console.print(f"{name}, images {'×'.join(map(str, shape))}, {dtype}, on {device}")
    networks = {
        f"batch {n}": compare(dense, pruned, shape, n, dtype) for n in BATCH_SIZES
    }
    console.print(table(networks, "network"))
    largest = BATCH_SIZES[-1]
    by_layer = compare_layers(dense, pruned, shape, largest, dtype)
    console.print(table(by_layer, f"layer alone, batch {largest}"))
    result = {
        "model": name,
        "dtype": dtype,
        "device": device,
        "networks": as_json(networks),
        "layers": as_json(by_layer),
    }
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=2)
            (folder / "profile.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise TPPError(f"the profile cannot be written: {error}") from error
    return result


def _of_run(folder: pathlib.Path) -> tuple[nnx.Module, nnx.Module, str]:
    """Returns the dense and the pruned network of a finished run, and their dtype."""
    pruned, info = load_model(folder / "model"), load_model_info(folder / "model")
    if (folder / "dense").is_dir():
        dense = load_model(folder / "dense")
    else:  # the method pruned before training
        dense = _with_weights(create_abstract(**info["model"]))
    return dense, pruned, info["config"]["model"]["dtype"]


def _untrained(config: RunConfig) -> tuple[nnx.Module, nnx.Module]:
    """Returns the dense and the pruned network of a config, with random weights."""
    dense = _with_weights(abstract_model(config), config.seed)
    shape = models.spec_of(dense).image_shape
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    groups = channel_groups(dense, example)
    return dense, prune(dense, plan_for(config.prune, groups, dense, config.seed))


def _with_weights(model: nnx.Module, seed: int = 0) -> nnx.Module:
    graphdef, state = nnx.split(model)
    draws = np.random.default_rng(seed)
    filled = jax.tree.map(
        lambda x: jnp.asarray(draws.uniform(0.1, 1, x.shape), x.dtype), state
    )
    return nnx.merge(graphdef, filled)


def table(pairs: dict[str, Pair], title: str) -> rich.table.Table:
    """Returns a table of times and speedups in which equal pairs share a row."""
    shown = rich.table.Table()
    shown.add_column(title, overflow="fold")
    for column in ("dense, ms", "pruned, ms", "faster", "fewer FLOPs", "realised"):
        shown.add_column(column, justify="right")
    names: dict[Pair, list[str]] = {}
    for name, pair in pairs.items():
        names.setdefault(pair, []).append(name)
    for pair, (name, *others) in names.items():
        label = f"{name} and {len(others)} equal" if others else name
        shown.add_row(
            rich.text.Text(label),  # rich parses markup in a plain string
            f"{1e3 * pair.dense_seconds:.2f}",
            f"{1e3 * pair.pruned_seconds:.2f}",
            f"{pair.speedup:.2f}×",
            f"{pair.flops_speedup:.2f}×",
            f"{pair.realised:.0%}",
        )
    return shown
