"""Mistakes in calls of the library."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import tpp_jax as tpp
from tests.mistakes.runs import Cases
from tpp_jax.method.gram import gram_penalty


def _even(params: Any, x: Any) -> Any:
    hidden = x @ params["w1"]
    if hidden.shape[-1] % 2:
        raise ValueError("the width must be even")
    return hidden @ params["w2"]


_EVEN_PARAMS = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}


def _sparse(p: Any, x: jax.Array) -> jax.Array:
    best, places = jax.lax.top_k(x @ p["w1"], 2)
    return jnp.einsum("bk,bkd->bd", best, p["w2"][places])


def _mlp(name: str = "mlp7_relu") -> nnx.Module:
    return tpp.models.create(name, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))


def _mlp_and_plan() -> tuple[nnx.Module, tpp.Groups, tpp.Plan]:
    model = _mlp()
    groups = tpp.channel_groups(model, jnp.ones((2, 8, 8, 1)))
    return model, groups, tpp.make_plan(groups, model, "*net*:0.5", skip="net.12")


def library() -> Cases:
    yield from _plans()
    yield from _depth()
    yield from _sensitivities()
    yield from _latencies()
    yield from _transforms()
    yield from _folding()


def _plans() -> Cases:
    model, groups, plan = _mlp_and_plan()
    other = _mlp("mlp20_linear")
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
    )


def _depth() -> Cases:
    model, groups, _ = _mlp_and_plan()
    x = jnp.ones((1, 8, 8, 1))
    yield from (
        (
            '`tpp.make_plan(groups, model, {"net.0": 1})`',
            lambda f: tpp.make_plan(groups, model, {"net.0": 1}),
        ),
        (
            '`tpp.make_plan(…, {"net.0": 1}, min_channels=0)` without a shortcut',
            lambda f: tpp.make_plan(groups, model, {"net.0": 1}, min_channels=0),
        ),
        (
            "`tpp.make_plan(…, kv_cache=0.5)` without such layers",
            lambda f: tpp.make_plan(groups, model, kv_cache=0.5),
        ),
        (
            "`tpp.depth_scores` of a network without shortcuts",
            lambda f: tpp.depth_scores(model, groups, [x], "net.0"),
        ),
        (
            "`tpp.models.keep_tokens` of a network that is no decoder",
            lambda f: tpp.models.keep_tokens(model, [0, 1]),
        ),
    )


def _square(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


def _sensitivities() -> Cases:
    model, groups, _ = _mlp_and_plan()
    x = [jnp.ones((2, 8, 8, 1))]
    found = tpp.sensitivity(model, groups, x, _square, ratios=[0.5])
    other = tpp.channel_groups(_even, jnp.ones((1, 4)), params=_EVEN_PARAMS)
    yield from (
        (
            "`tpp.sensitivity(…, ratios=0.5)`, a single number",
            lambda f: tpp.sensitivity(model, groups, x, _square, ratios=0.5),
        ),
        (
            "`tpp.sensitivity` without batches",
            lambda f: tpp.sensitivity(model, groups, [], _square),
        ),
        (
            "`tpp.sensitivity` with a loss for each example",
            lambda f: tpp.sensitivity(model, groups, x, lambda m, x: m(x)[:, 0]),
        ),
        (
            "`tpp.sensitivity` with the batches in place of the groups",
            lambda f: tpp.sensitivity(model, x, groups, _square),
        ),
        (
            "`tpp.make_plan(…, sensitivity=…)` without a target",
            lambda f: tpp.make_plan(groups, model, sensitivity=found),
        ),
        (
            "`tpp.make_plan(…, sensitivity=…)` with ratios too",
            lambda f: tpp.make_plan(groups, model, 0.5, sensitivity=found, flops=0.5),
        ),
        (
            "`tpp.make_plan(…, sensitivity=…)` of another model",
            lambda f: tpp.make_plan(other, _EVEN_PARAMS, sensitivity=found, flops=0.5),
        ),
        (
            "`tpp.make_plan(…, sensitivity=…)` for more than was measured",
            lambda f: tpp.make_plan(groups, model, sensitivity=found, flops=0.1),
        ),
        (
            "`tpp.make_plan(…, sensitivity=0.5)`",
            lambda f: tpp.make_plan(groups, model, sensitivity=0.5, flops=0.5),
        ),
        (
            '`tpp.load_model(…, sharding="data")`',
            _load_into_no_sharding,
        ),
        (
            '`tpp.make_plan(…, round_to="mesh")`',
            lambda f: tpp.make_plan(groups, model, 0.5, round_to="mesh"),
        ),
        (
            "`tpp.Sensitivity.from_json` of other data",
            lambda f: tpp.Sensitivity.from_json({"groups": ["net.0"]}),
        ),
    )


def _latencies() -> Cases:
    x = jnp.ones((1, 4))
    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
    groups = tpp.channel_groups(_pair, x, params=params)
    table = tpp.LatencyTable.from_json(_TABLE)
    wider = {"w1": jnp.ones((4, 16)), "w2": jnp.ones((16, 2))}
    other = tpp.channel_groups(_pair, x, params=wider)
    yield from (
        (
            "`tpp.make_plan(…, latency=0.5)` without a table",
            lambda f: tpp.make_plan(groups, params, latency=0.5),
        ),
        (
            '`tpp.make_plan(…, round_to="fast")` without a table',
            lambda f: tpp.make_plan(groups, params, 0.5, round_to="fast"),
        ),
        (
            "`tpp.make_plan(…, table=…)` that nothing uses",
            lambda f: tpp.make_plan(groups, params, flops=0.5, table=table),
        ),
        (
            "`tpp.make_plan(…, latency=0.5, table=…)` of another model",
            lambda f: tpp.make_plan(other, wider, latency=0.5, table=table),
        ),
        (
            "`tpp.make_plan(…, latency=0.1, table=…)` out of reach",
            lambda f: tpp.make_plan(groups, params, latency=0.1, table=table),
        ),
        (
            "`tpp.make_plan(…, memory=0.01)` out of reach",
            lambda f: tpp.make_plan(groups, params, memory=0.01),
        ),
        (
            "`tpp.make_plan(…, latency=0.5, table={…})`",
            lambda f: tpp.make_plan(groups, params, latency=0.5, table=_TABLE),
        ),
        (
            "`tpp.latency_table` with the groups of another model",
            lambda f: tpp.latency_table(_pair, x, other, params=params),
        ),
        (
            "`tpp.latency_table` with the parameters in place of the groups",
            lambda f: tpp.latency_table(_pair, x, params, params=params),
        ),
        (
            "`tpp.LatencyTable.from_json` of other data",
            lambda f: tpp.LatencyTable.from_json({"device": "cpu"}),
        ),
        (
            "`LatencyTable.seconds` of an unknown group",
            lambda f: table.seconds({"w3": 1}),
        ),
    )


def _pair(params: Any, x: Any) -> Any:
    return x @ params["w1"] @ params["w2"]


# Both products take a millisecond for each of eight channels.
_TABLE = {
    "device": "a machine",
    "groups": ["w1", "w2"],
    "sizes": [8, 2],
    "axes": [[[8, [0]]]],
    "shapes": [[[[1, 8]], [0.001, 0.008]]],
    "layers": [[0, [[[1, [0]], [1, []]]], 2]],
    "elements": [],
    "weights": [1.0, 0.0, 0.004],
    "measured": [[[8, 2], 0.02]],
}


def _load_into_no_sharding(folder: pathlib.Path) -> None:
    tpp.save_model(folder / "model", {"w": jnp.ones(4)})
    tpp.load_model(folder / "model", sharding="data")


def _transforms() -> Cases:
    model, _, plan = _mlp_and_plan()
    kernel = jnp.ones((4, 8))
    params = nnx.state(model, nnx.Param)
    picky_groups = tpp.channel_groups(_even, jnp.ones((1, 4)), params=_EVEN_PARAMS)
    sparse_groups = tpp.channel_groups(_sparse, jnp.ones((1, 4)), params=_EVEN_PARAMS)
    yield from (
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
            lambda f: tpp.make_plan(picky_groups, _EVEN_PARAMS, counts={"w1": 5}),
        ),
        (
            "`tpp.make_plan` with fewer experts than a token is sent to",
            lambda f: tpp.make_plan(sparse_groups, _EVEN_PARAMS, counts={"w1": 1}),
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


def _folding() -> Cases:
    x = jnp.ones((1, 8, 8, 1))
    abstract = nnx.eval_shape(lambda: nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    yield from (
        (
            "`tpp.fold_norms` of a network without norms",
            lambda f: tpp.fold_norms(_mlp(), x),
        ),
        (
            "`tpp.fold_norms` of a norm that follows no kernel",
            lambda f: tpp.fold_norms(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), x),
        ),
        (
            "`tpp.fold_norms` of a model without its arrays",
            lambda f: tpp.fold_norms(abstract, x),
        ),
    )
