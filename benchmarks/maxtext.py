"""MaxText's own model, pruned, saved, and opened by MaxText with smaller sizes.

    pip install maxtext        # and the packages that it imports; Python 3.12 or later
    python -m benchmarks.maxtext

A small Llama with random weights is made by MaxText, with its layers in one scan and
without. Half of the units of its MLPs and half of its key-value heads are cut, each
layer's own. The result is saved by MaxText's function for checkpoints of parameters.
MaxText then makes a model of the smaller sizes, which are overrides of its config, and
loads these parameters. Its logits must be those of the pruned model.

Results are written to ``results/maxtext_cpu.json``.
"""

import importlib.metadata
import json
import logging
import os
import pathlib
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine

NAME = "maxtext"
SIZES = {
    "base_emb_dim": 32,
    "base_mlp_dim": 48,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_num_decoder_layers": 4,
    "head_dim": 8,
    "vocab_size": 64,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 8)))
POSITIONS = jnp.arange(8)[None]


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    result = {
        "version": importlib.metadata.version("maxtext"),
        "scanned": measured(scan=True),
        "unrolled": measured(scan=False),
    }
    print(json.dumps(result, indent=2))
    machine.write(NAME, result)


def made(scan: bool = True, **sizes: int) -> Any:
    """Returns a small Llama of MaxText, float32, with random weights.

    Args:
      scan: Whether its layers are stacked and run by a scan.
      **sizes: Overrides of MaxText's config, in place of those of :data:`SIZES`.
    """
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = {
        "run_name": "tpp_jax",
        "enable_checkpointing": False,
        "decoder_block": "llama2",
        "attention": "dot_product",
        "dtype": "float32",
        "weight_dtype": "float32",
        "max_target_length": 8,
        "max_prefill_predict_length": 4,
        "per_device_batch_size": 1,
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "scan_layers": scan,
        **SIZES,
        **sizes,
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    config = pyconfig.initialize(["", str(base), *arguments])
    rngs = nnx.Rngs(params=0, dropout=1)
    return model_creation_utils.from_config(config, rngs=rngs)


def logits(model: Any) -> jax.Array:
    return model(TOKENS, POSITIONS, enable_dropout=False)


def measured(scan: bool) -> dict[str, Any]:
    """Prunes a model and compares it with what MaxText makes of the result."""
    from maxtext.common import checkpointing

    model = made(scan)
    options = {"enable_dropout": False}
    groups = tpp.channel_groups(model, TOKENS, POSITIONS, **options)
    plan = tpp.make_plan(groups, model, {"*.mlp.wi_0": 0.5, "*.query": 0.5})
    small = tpp.prune(model, plan)
    overrides = overrides_of(plan)
    with tempfile.TemporaryDirectory() as folder:
        weights = nnx.state(small, nnx.Param).to_pure_dict()
        checkpointing.save_params_to_path(f"{folder}/0", {"params": weights})
        other = made(scan, **overrides)
        wanted = nnx.state(other, nnx.Param)
        loaded = checkpointing.load_params_from_path(f"{folder}/0/items", wanted, 8)
        nnx.update(other, loaded)
    dense, cut, again = logits(model), logits(small), logits(other)
    units = [group for group in groups if group.name.endswith("mlp.wi_0")]
    batches = [(TOKENS[:, ::step], POSITIONS) for step in (1, -1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few tokens are not enough for a refit
        moments = tpp.input_moments(model, batches, groups=units, **options)
        plan = tpp.make_plan(
            groups, model, {"*.mlp.wi_0": 0.5}, criterion="wanda", statistics=moments
        )
        refit = logits(tpp.compensate(model, plan, moments=moments))
    at_once = logits(tpp.prune(model, plan))
    return {
        "groups": {g.name: [g.steps, g.size, g.reason or ""] for g in groups},
        "overrides": overrides,
        "against MaxText with these overrides": _largest(cut, again),
        "against the dense model": _largest(cut, dense),
        "units alone, cut": _largest(at_once, dense),
        "units alone, cut and refit": _largest(refit, dense),
    }


def overrides_of(plan: tpp.Plan) -> dict[str, int]:
    """Returns the sizes of a pruned Llama as overrides of MaxText's config.

    They are those of all layers: MaxText's layers have equal sizes.
    """
    kept = {group.name: plan.kept_count(group) for group in plan.groups}
    [units] = {n for name, n in kept.items() if name.endswith(".mlp.wi_0")}
    [heads] = {n for name, n in kept.items() if name.endswith(".query")}
    [queries] = {n for name, n in kept.items() if name.endswith(".query#2")}
    return {
        "base_mlp_dim": units,
        "base_num_kv_heads": heads,
        "base_num_query_heads": heads * queries,
    }


def _largest(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.abs(a - b).max())


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
