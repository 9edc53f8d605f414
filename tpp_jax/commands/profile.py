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

from tpp_jax.analysis.exported_files import SUFFIXES, compare_files
from tpp_jax.analysis.latency import Pair, as_json, compare, compare_layers
from tpp_jax.commands.evaluate import load_network
from tpp_jax.commands.inspect import Inputs, network_of, title
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig, with_defaults
from tpp_jax.experiment.fields import build
from tpp_jax.experiment.own import check_known
from tpp_jax.experiment.planning import plan_for
from tpp_jax.experiment.records.folders import config_of
from tpp_jax.experiment.records.summary import draw_again
from tpp_jax.experiment.records.terminal import Terminal
from tpp_jax.experiment.setup import abstract_model
from tpp_jax.experiment.tasks import described_task
from tpp_jax.interop.modules import name_of
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.cutting import prune
from tpp_jax.saving import load_model_info
from tpp_jax.training.task import Task

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
      The content of ``profile.json``: ``networks`` by batch size, and files that were
      exported by batch size and format; ``layers`` at the largest batch size, as
      :class:`Pair`; and the ``device``.

    Raises:
      TPPError: The config or the networks of the run are unusable.
    """
    folder = None if workdir is None else pathlib.Path(workdir)
    if folder is not None and (folder / "model").is_dir():
        saved = load_model_info(folder / "model")["config"]
        check_known(saved, config, str(folder))
        typed = build(RunConfig, with_defaults(saved))
        task = described_task(typed)
        dense, pruned = _of_run(folder, task, typed)
        inputs = task.example_inputs()
    else:
        typed = RunConfig.from_dict(config_of(folder, config, given))
        dense, pruned, inputs = _untrained(typed)
    dtype = typed.model.dtype
    console = Terminal()
    device = jax.devices()[0].device_kind
    console.print(f"{title(dense, inputs)}, {dtype}, on {device}")
    networks = {
        f"batch {n}": compare(dense, pruned, inputs, n, dtype) for n in BATCH_SIZES
    }
    if folder is not None:
        networks |= _of_files(folder / "export", inputs, networks, console)
    console.print(table(networks, "network"))
    largest = BATCH_SIZES[-1]
    by_layer = compare_layers(dense, pruned, inputs, largest, dtype)
    console.print(table(by_layer, f"layer alone, batch {largest}"))
    result = {
        "model": name_of(dense),
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
        draw_again(folder)
    return result


def _of_run(
    folder: pathlib.Path, task: Task, config: RunConfig
) -> tuple[nnx.Module, nnx.Module]:
    """Returns the dense and the pruned network of a finished run."""
    if (folder / "dense").is_dir():
        dense = load_network(folder / "dense", task, config)
    else:  # the method pruned before training
        dense = _with_weights(abstract_model(task, 0))
    return dense, load_network(folder / "model", task, config)


def _of_files(
    folder: pathlib.Path,
    inputs: Inputs,
    networks: dict[str, Pair],
    console: Terminal,
) -> dict[str, Pair]:
    """Returns the times of the files that ``--mode=export`` wrote, if there are any."""
    found = {}
    for suffix in SUFFIXES:
        dense, pruned = folder / f"dense.{suffix}", folder / f"pruned.{suffix}"
        if not (dense.is_file() and pruned.is_file()):
            continue
        try:
            for n, (name, pair) in zip(BATCH_SIZES, networks.items(), strict=True):
                flops = pair.dense_flops, pair.pruned_flops
                timed = compare_files(dense, pruned, inputs, n, flops)
                found[f"{name}, {suffix}"] = timed
        except TPPError as error:
            console.print(f"The files of {suffix} are not timed: {error}")
    return found


def _untrained(config: RunConfig) -> tuple[nnx.Module, nnx.Module, Inputs]:
    """Returns the dense and the pruned network of a config, and their inputs.

    The weights are random.
    """
    model, inputs = network_of(config)
    dense = _with_weights(model, config.seed)
    groups = channel_groups(dense, *inputs)
    plan = plan_for(config.prune, groups, dense, config.seed)
    return dense, prune(dense, plan), inputs


def _with_weights(model: nnx.Module, seed: int = 0) -> nnx.Module:
    graphdef, state = nnx.split(model)
    draws = np.random.default_rng(seed)

    def fill(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(draws.uniform(0.1, 1, x.shape), x.dtype)

    filled = jax.tree.map(fill, state)
    return nnx.merge(graphdef, filled)


def table(pairs: dict[str, Pair], title: str) -> rich.table.Table:
    """Returns a table of times and speedups in which equal pairs share a row.

    "Realised" is the share of the time saved, divided by the share of the FLOPs saved.
    """
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
            "–" if pair.realised is None else f"{pair.realised:.0%}",
        )
    return shown
