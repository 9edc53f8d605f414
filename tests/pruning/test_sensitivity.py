"""Measured costs are the losses of pruned networks; plans by them meet targets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tpp_jax as tpp
from tests.reference import filled

RATIOS = (0.2, 0.5, 0.8)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.second = nnx.Conv(6, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(nnx.relu(self.second(x)).mean((1, 2)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(5)(x))
        return linen.Dense(2)(linen.relu(linen.Dense(8)(x)))


def mlp(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp_params():
    return {"w1": draw(4, 8), "w2": draw(8, 12, seed=1), "w3": draw(12, 3, seed=2)}


def error(model, batch):
    """Mean square of the outputs' distance to some targets."""
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def batches_of(model, shape):
    inputs = [draw(*shape, seed=i) for i in (7, 8)]
    return [{"x": x, "y": jax.jit(model)(x) + 0.1} for x in inputs]


def nnx_case():
    model = filled(lambda: Net(nnx.Rngs(0)))
    model.eval()
    graphdef, state = nnx.split(model)
    batches = batches_of(lambda x: nnx.merge(graphdef, state)(x), (5, 6, 6, 2))
    model.train()  # it is measured in evaluation mode nevertheless
    return model, None, batches, lambda small: nnx.view(small, use_running_average=True)


def linen_case():
    module = LinenNet()
    variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
    batches = batches_of(lambda x: module.apply(variables, x), (6, 4))
    apply = tpp.linen_apply(module)
    return module, variables, batches, lambda small: lambda x: apply(small, x)


def function_case():
    params = mlp_params()
    batches = batches_of(lambda x: mlp(params, x), (6, 4))
    return mlp, params, batches, lambda small: lambda x: mlp(small, x)


CASES = {"nnx": nnx_case, "linen": linen_case, "function": function_case}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    model, params, batches, run = CASES[request.param]()
    groups = tpp.channel_groups(model, batches[0]["x"], params=params)
    moments = tpp.input_moments(model, [batch["x"] for batch in batches], params)
    return model, params, groups, batches, moments, run


@pytest.mark.parametrize("refit", [False, True], ids=["cut", "refit"])
@pytest.mark.filterwarnings("ignore:there are fewer than")
def test_a_cost_is_the_loss_of_the_pruned_network(case, refit):
    model, params, groups, batches, moments, run = case
    found = tpp.sensitivity(
        model,
        groups,
        batches,
        error,
        params,
        ratios=RATIOS,
        moments=moments if refit else None,
    )
    assert found.groups == tuple(g.name for g in groups if g.reason is None)
    tree = model if params is None else params

    def loss(small):
        return np.mean([error(run(small), batch) for batch in batches])

    np.testing.assert_allclose(found.baseline, 0.01, rtol=1e-3)
    for name, row in zip(found.groups, found.costs, strict=True):
        for ratio, cost in zip(RATIOS, row, strict=True):
            plan = tpp.make_plan(groups, tree, {name: ratio}, check=False)
            if refit:
                small = tpp.compensate(model, plan, None, params, moments=moments)
            else:
                small = tpp.prune(model, plan, params)
            expected = loss(small) - found.baseline
            np.testing.assert_allclose(cost, expected, rtol=1e-3, atol=1e-5)
    assert found.costs.max() > 1e-3


@pytest.fixture(scope="module")
def net():
    params = mlp_params()
    groups = tpp.channel_groups(mlp, jnp.ones((1, 4)), params=params)
    return params, groups, batches_of(lambda x: mlp(params, x), (6, 4))


def test_all_plans_are_one_program_and_narrow_groups_are_not_measured_twice(net):
    params, groups, batches = net
    traces, runs = [], []

    def loss(p, batch):
        traces.append(batch)
        value = jnp.mean((mlp(p, batch["x"]) - batch["y"]) ** 2)
        jax.debug.callback(lambda v: runs.append(v), value)
        return value

    # 0.1 and 0.2 of 8 channels are one and two, 0.05 and 0.1 are both one.
    found = tpp.sensitivity(
        params, groups, iter(batches), loss, ratios=[0.2, 0.05, 0.1], skip="w2"
    )
    jax.effects_barrier()
    assert found.ratios == (0.05, 0.1, 0.2)
    assert found.groups == ("w1",) and found.removed.tolist() == [[1, 1, 2]]
    assert found.costs[0, 0] == found.costs[0, 1] < found.costs[0, 2]
    assert len(traces) == 1
    assert len(runs) == 3 * len(batches)


def test_the_criterion_chooses_the_channels(net):
    params, groups, batches = net
    scores = {"w1": np.arange(8.0), "w2": np.arange(12.0)}
    own = tpp.sensitivity(mlp, groups, batches, error, params, scores=scores)
    other = tpp.sensitivity(mlp, groups, batches, error, params, criterion="fpgm")
    plan = tpp.make_plan(groups, params, {"w2": 0.5}, scores=scores)
    small = tpp.prune(mlp, plan, params)
    losses = [error(lambda x: mlp(small, x), batch) for batch in batches]
    column = own.ratios.index(0.5)
    np.testing.assert_allclose(
        own.costs[1, column], np.mean(losses) - own.baseline, rtol=1e-3
    )
    assert (own.costs != other.costs).any()


def test_sharded_parameters_remain_where_they_are(net):
    params, groups, batches = net
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec(None, "model")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    sharded = params | {"w1": jax.device_put(params["w1"], sharding)}

    expected = tpp.sensitivity(mlp, groups, batches, error, params, ratios=[0.5])
    found = tpp.sensitivity(mlp, groups, batches, error, sharded, ratios=[0.5])
    np.testing.assert_allclose(found.costs, expected.costs, rtol=1e-4, atol=1e-6)


def test_the_result_is_read_from_json(net):
    params, groups, batches = net
    found = tpp.sensitivity(mlp, groups, batches, error, params)
    again = tpp.Sensitivity.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    np.testing.assert_array_equal(again.curve("w2"), found.curve("w2"))


def curves(**costs):
    """A sensitivity with costs of a half and of three quarters."""
    sizes = {"w1": 8, "w2": 12}
    removed = [[sizes[name] // 2, 3 * sizes[name] // 4] for name in costs]
    return tpp.Sensitivity(
        groups=tuple(costs),
        sizes=tuple(sizes[name] for name in costs),
        ratios=(0.5, 0.75),
        removed=np.array(removed),
        costs=np.array(list(costs.values())),
        baseline=1.0,
    )


def test_a_curve_is_linear_between_what_was_measured_and_never_negative():
    found = curves(w1=[-0.4, 0.6])
    assert found.curve("w1").round(6).tolist() == [0, 0, 0, 0, 0, 0.3, 0.6]


def shares(plan, params):
    small = tpp.prune(mlp, plan, params)
    x = jnp.ones((1, 4))
    dense, cut = tpp.count(mlp, x, params=params), tpp.count(mlp, x, params=small)
    return cut.flops / dense.flops


def test_the_insensitive_group_loses_more(net):
    params, groups, _ = net
    for costs, loser in (
        ({"w1": [0.1, 0.2], "w2": [3.0, 9.0]}, "w1"),
        ({"w1": [3.0, 9.0], "w2": [0.1, 0.2]}, "w2"),
    ):
        plan = tpp.make_plan(groups, params, flops=0.5, sensitivity=curves(**costs))
        lost = {g.name: 1 - plan.kept_count(g) / g.size for g in groups if not g.reason}
        assert max(lost, key=lost.__getitem__) == loser
        assert shares(plan, params) <= 0.5
        # The channels are those of the criterion.
        same = tpp.make_plan(groups, params, counts=counts(plan))
        assert plan == same


def counts(plan):
    return {g.name: plan.kept_count(g) for g in plan.pruned_groups}


@pytest.mark.parametrize(
    "options",
    [
        {"flops": 0.6, "round_to": 4},
        {"flops": 0.5, "min_channels": 3},
        {"params": 0.4},
        {"params": 0.6, "flops": 0.5},
        {"flops": 0.7, "skip": "w2"},
    ],
    ids=str,
)
def test_limits_and_targets_hold_and_no_group_could_keep_more(net, options):
    params, groups, _ = net
    found = curves(w1=[0.5, 1.5], w2=[0.3, 2.0])
    plan = tpp.make_plan(groups, params, sensitivity=found, **options)
    kept, step = counts(plan), options.get("round_to", 1)
    assert all(n % step == 0 for n in kept.values())
    assert min(kept.values()) >= options.get("min_channels", 1)
    assert "w2" not in kept or options.get("skip") != "w2"
    target = min(options.get("flops", 1), options.get("params", 1))
    # Parameters and FLOPs of a network of matrices alone are in proportion.
    assert shares(plan, params) <= target
    for name, n in kept.items():
        more = kept | {name: min(n + step, groups[name].size)}
        assert shares(tpp.make_plan(groups, params, counts=more), params) > target


def test_no_more_is_removed_than_was_measured(net):
    params, groups, _ = net
    found = curves(w1=[0.1, 0.2], w2=[3.0, 9.0])
    with pytest.raises(tpp.TPPError, match="measure larger ratios"):
        tpp.make_plan(groups, params, flops=0.01, sensitivity=found)
    plan = tpp.make_plan(groups, params, flops=0.15, sensitivity=found)
    assert min(counts(plan)["w1"] / 8, counts(plan)["w2"] / 12) >= 0.25
