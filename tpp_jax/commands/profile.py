"""What pruning gains on this machine: --mode=profile."""

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
      config: as for training, if there is no finished run: the network and the cut that
        it asks for. Weights are random then, which changes no time.
      workdir: of a finished run, whose networks are taken, or of one that is not, whose
        config is; otherwise a folder for ``profile.json``, made if missing.
      given: whether somebody asked for ``config``: then it is said if another is used.

    Returns:
      What ``profile.json`` holds: ``networks``, by batch size, and ``layers`` at the
      largest, as :class:`Pair`, and the ``device``.

    Raises:
      TPPError: whatever is wrong with the config, or the run's networks.
    """
    folder = None if workdir is None else pathlib.Path(workdir)
    if folder is not None and (folder / "model").is_dir():
        pruned, info = load_model(folder / "model"), load_model_info(folder / "model")
        if (folder / "dense").is_dir():
            dense = load_model(folder / "dense")
        else:  # a network pruned before it was trained never had one
            dense = _with_weights(create_abstract(**info["model"]))
        dtype = info["config"]["model"]["dtype"]
    else:
        typed = RunConfig.from_dict(config_of(folder, config, given))
        dense, pruned = _untrained(typed)
        dtype = typed.model.dtype
    shape = tuple(dense.spec.image_shape)
    console = Terminal()
    device = jax.devices()[0].device_kind
    console.print(
        f"{dense.spec.name}, images {'×'.join(map(str, shape))}, {dtype}, on {device}"
    )
    networks = {
        f"batch {n}": compare(dense, pruned, shape, n, dtype) for n in BATCH_SIZES
    }
    console.print(table(networks, "network"))
    largest = BATCH_SIZES[-1]
    by_layer = compare_layers(dense, pruned, shape, largest, dtype)
    console.print(table(by_layer, f"layer alone, batch {largest}"))
    result = {
        "model": dense.spec.name,
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


def _untrained(config: RunConfig) -> tuple[nnx.Module, nnx.Module]:
    dense = _with_weights(abstract_model(config), config.seed)
    example = jax.ShapeDtypeStruct((1, *dense.spec.image_shape), jnp.float32)
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
    """Returns a table of times and speedups; pairs that are equal share a row."""
    shown = rich.table.Table()
    shown.add_column(title, overflow="fold")
    for column in ("dense, ms", "pruned, ms", "faster", "fewer FLOPs", "realised"):
        shown.add_column(column, justify="right")
    alike: dict[Pair, list[str]] = {}
    for name, pair in pairs.items():
        alike.setdefault(pair, []).append(name)
    for pair, (name, *others) in alike.items():
        label = f"{name} and {len(others)} alike" if others else name
        shown.add_row(
            rich.text.Text(label),  # a plain string would be read as markup
            f"{1e3 * pair.dense_seconds:.2f}",
            f"{1e3 * pair.pruned_seconds:.2f}",
            f"{pair.speedup:.2f}×",
            f"{pair.flops_speedup:.2f}×",
            f"{pair.realised:.0%}",
        )
    return shown
