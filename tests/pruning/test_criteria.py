"""Scores known by hand, and the filters that the original's criteria chose."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.pruning.consumers import KINDS, example, jacobian
from tests.reference import GOLDEN, filled
from tpp_jax.errors import TPPError
from tpp_jax.pruning import criteria
from tpp_jax.pruning.criteria import CRITERIA, Criterion, group_scores

FILTERS = np.array([[3, -4], [0, 1], [0, 0], [-6, 8]], np.float32)
OTHERS = np.array([[1, 1], [2, -3], [9, 9], [0.5, -0.25]], np.float32)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("l1", [3.5, 0.5, 0, 7]),
        ("l2", [np.sqrt(12.5), np.sqrt(0.5), 0, np.sqrt(50)]),
        ("bn_scale", [3.5, 0.5, 0, 7]),
        ("lamp", [25 / 125, 1 / 126, 0, 1]),
    ],
)
def test_scores_of_weights_alone(name, scores):
    np.testing.assert_allclose(CRITERIA[name].score(FILTERS), scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("taylor", [1, 3, 0, 5]),
        ("taylor_fo", [(9 + 16) / 2, 9 / 2, 0, (9 + 4) / 2]),
        ("hessian", [25 / 2, -3 / 2, 0, (18 - 16) / 2]),
        ("activation", [1, -0.5, 9, 0.125]),
    ],
)
def test_scores_of_weights_and_statistics(name, scores):
    assert CRITERIA[name].statistics
    np.testing.assert_allclose(CRITERIA[name].score(FILTERS, OTHERS), scores, rtol=1e-6)


def test_fpgm_is_the_distance_to_the_other_filters():
    rows = FILTERS.astype(np.float64)
    apart = np.linalg.norm(rows[:, None] - rows, axis=-1)
    np.testing.assert_allclose(
        criteria.fpgm(FILTERS), apart.sum(1) / (3 * np.sqrt(2)), rtol=1e-12
    )
    many = np.random.default_rng(0).normal(size=(1500, 3))  # more than one block
    apart = np.linalg.norm(many[:, None] - many, axis=-1)
    np.testing.assert_allclose(
        criteria.fpgm(many), apart.sum(1) / (1499 * np.sqrt(3)), rtol=1e-6
    )


def test_fpgm_and_lamp_of_degenerate_layers_are_finite():
    np.testing.assert_array_equal(criteria.fpgm(FILTERS[:1]), [0])
    np.testing.assert_array_equal(criteria.fpgm(np.ones((3, 2))), [0, 0, 0])
    np.testing.assert_array_equal(criteria.lamp(np.zeros((3, 2))), [0, 0, 0])


def test_lamp_ranks_as_l2_does_and_gives_every_layer_the_same_largest_score():
    filters = np.random.default_rng(0).normal(size=(9, 5))
    for scale in (1, 1000):
        scores = criteria.lamp(filters * scale)
        np.testing.assert_array_equal(
            np.argsort(scores), np.argsort(criteria.l2(filters))
        )
        assert scores.max() == 1


def chain(**layers):
    """Returns (parameters, groups) of consecutive dense layers with these kernels."""
    params = {name: {"kernel": np.asarray(k)} for name, k in layers.items()}

    def fn(p, x):
        for name in layers:
            x = x @ p[name]["kernel"]
        return x

    rows = next(iter(layers.values())).shape[0]
    return params, tpp.channel_groups(fn, np.ones((1, rows)), params=params)


def two_producers():
    """Returns a sum of the layers a and b, 4 channels wide, with known scores."""
    params = {
        "a": {"kernel": np.float32([[1, 2, 3, 4]])},
        "b": {"kernel": np.float32([[9, 1, 5, 1]])},
        "c": {"kernel": np.ones((4, 2), np.float32)},
    }

    def fn(p, x):
        return (x @ p["a"]["kernel"] + x @ p["b"]["kernel"]) @ p["c"]["kernel"]

    return params, tpp.channel_groups(fn, np.ones((1, 1)), params=params)


@pytest.mark.parametrize(
    ("reduce", "order"),
    [
        ("mean", [1, 3, 2, 0]),
        ("sum", [1, 3, 2, 0]),
        ("max", [1, 3, 2, 0]),
        ("first", [0, 1, 2, 3]),
    ],
)
def test_the_scores_of_all_producers_are_reduced_to_one(reduce, order):
    params, groups = two_producers()
    for n in (1, 2, 3):
        plan = tpp.make_plan(groups, params, {"a": n / 4}, reduce=reduce)
        np.testing.assert_array_equal(plan.pruned("a"), np.sort(order[:n]))


def test_reductions_differ():
    scores = {
        reduce: criteria.REDUCTIONS[reduce](np.array([[1.0, 5, 2], [4, 1, 1]]))
        for reduce in criteria.REDUCTIONS
    }
    np.testing.assert_array_equal(scores["mean"], [2.5, 3, 1.5])
    np.testing.assert_array_equal(scores["sum"], [5, 6, 3])
    np.testing.assert_array_equal(scores["max"], [4, 5, 2])
    np.testing.assert_array_equal(scores["first"], [1, 5, 2])


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.bare = nnx.Conv(4, 4, (1, 1), rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.bare(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


def normed():
    model = filled(lambda: Normed(nnx.Rngs(0)))
    model.norm.scale[...] = jnp.array([-3.0, 1.0, -2.0, 0.5])
    return model, tpp.channel_groups(model, jnp.ones((1, 2, 2, 2)))


def test_bn_scale_looks_at_the_norm_that_follows():
    model, groups = normed()
    plan = tpp.make_plan(groups, model, "conv:0.5", criterion="bn_scale")
    np.testing.assert_array_equal(plan.pruned("conv"), [1, 3])


def test_bn_scale_needs_a_norm():
    model, groups = normed()
    with pytest.raises(ValueError, match=r"needs a norm after bare.*skip that layer"):
        tpp.make_plan(groups, model, "bare:0.5", criterion="bn_scale")


def test_weights_in_half_precision_are_scored_in_single():
    small = np.full((3000, 3), 1e-3, np.float16)
    small[:, 1] = 2e-3
    params, groups = chain(a=small, b=np.ones((3, 1), np.float16))
    seen = []

    def spy(filters):
        seen.append(filters.dtype)
        return criteria.l1(filters)

    plan = tpp.make_plan(groups, params, {"a": 0.6}, criterion=spy)
    assert seen == [np.float32]
    np.testing.assert_array_equal(plan.kept["a"], [1])


def test_a_function_sees_the_statistics_of_each_weight():
    params, groups = chain(a=FILTERS.T, b=np.ones((4, 2)))
    tree = {"opt": {"a": {"kernel": OTHERS.T}}}  # found by the parameter's name

    def criterion(filters, statistics):
        np.testing.assert_array_equal(filters, FILTERS)
        np.testing.assert_array_equal(statistics, OTHERS)
        return np.array([2, 1, 0, 3])

    plan = tpp.make_plan(
        groups, params, {"a": 0.5}, criterion=criterion, statistics=tree
    )
    np.testing.assert_array_equal(plan.pruned("a"), [1, 2])


def test_statistics_may_have_one_value_for_each_channel():
    params, groups = chain(a=FILTERS.T, b=np.ones((4, 2)))
    plan = tpp.make_plan(
        groups,
        params,
        {"a": 0.5},
        criterion="activation",
        statistics={"a.kernel": np.array([3, 1, 4, 2])},
    )
    np.testing.assert_array_equal(plan.pruned("a"), [1, 3])


@pytest.mark.parametrize(
    ("criterion", "statistics", "message"),
    [
        ("taylor", None, r"needs more than weights: pass.*loss_gradient"),
        ("taylor_fo", None, "loss_gradient"),
        ("hessian", None, "hessian_diagonal"),
        ("activation", None, "activation_means"),
        ("l1", {"a": {"kernel": OTHERS.T}}, "'l1' uses no statistics"),
        ("taylor", {"b": {"kernel": OTHERS}}, "no statistic for a.kernel"),
        ("taylor", {"a": {"kernel": np.ones(3)}}, r"shape \(3,\).*fit.*\(2, 4\)"),
        ("taylor", {"a": {"kernel": np.full(4, np.nan)}}, "nan for filters of a.kern"),
        ("lamb", None, "unknown criterion 'lamb': choose one of l1.*random"),
    ],
)
def test_missing_or_unfitting_statistics_are_refused(criterion, statistics, message):
    params, groups = chain(a=FILTERS.T, b=np.ones((4, 2)))
    with pytest.raises(ValueError, match=message):
        tpp.make_plan(
            groups, params, {"a": 0.5}, criterion=criterion, statistics=statistics
        )


def test_an_unknown_reduction_is_refused():
    params, groups = two_producers()
    with pytest.raises(ValueError, match="unknown reduce 'median': choose one of mean"):
        tpp.make_plan(groups, params, {"a": 0.5}, reduce="median")


# What the original chose for the layers of a CIFAR ResNet, each on its own.


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "selection.npz") as file:
        return dict(file)


def section(recorded, prefix):
    return {
        key.removeprefix(f"{prefix}/"): array
        for key, array in recorded.items()
        if key.startswith(f"{prefix}/")
    }


def side_by_side(kernels):
    """Returns (parameters, groups) of independent layers."""
    params = {
        "layer": {name: {"kernel": kernel} for name, kernel in kernels.items()},
        "out": {name: np.ones((k.shape[-1], 1)) for name, k in kernels.items()},
    }

    def fn(p, x):
        return sum(
            x[name] @ p["layer"][name]["kernel"] @ p["out"][name] for name in kernels
        )

    x = {name: np.ones((1, kernel.shape[0])) for name, kernel in kernels.items()}
    return params, tpp.channel_groups(fn, x, params=params)


LARGEST = {"": lambda f: f, "_largest": lambda f: lambda *args: -f(*args)}


@pytest.mark.parametrize("pick", LARGEST)
@pytest.mark.parametrize("name", ["l1", "taylor_fo"])
def test_the_recorded_filters_are_chosen(recorded, name, pick):
    weights = section(recorded, "weight")
    params, groups = side_by_side(
        {n: w.reshape(len(w), -1).T for n, w in weights.items()}
    )
    gradients = {
        f"layer.{layer}.kernel": g.reshape(len(g), -1).T
        for layer, g in section(recorded, "gradient").items()
    }
    expected = section(recorded, name + pick)
    plan = tpp.make_plan(
        groups,
        params,
        {f"layer.{n}": len(p) / len(weights[n]) for n, p in expected.items()},
        criterion=LARGEST[pick](CRITERIA[name].score),
        statistics=gradients if CRITERIA[name].statistics else None,
    )
    assert len(expected) == 4
    for layer, pruned in expected.items():
        np.testing.assert_array_equal(plan.pruned(f"layer.{layer}"), pruned)


def test_taylor_fo_is_the_recorded_score(recorded):
    weights, gradients = section(recorded, "weight"), section(recorded, "gradient")
    for layer, score in section(recorded, "taylor_score").items():
        n = len(score)
        ours = criteria.taylor_fo(
            weights[layer].reshape(n, -1), gradients[layer].reshape(n, -1)
        )
        np.testing.assert_allclose(ours, score, rtol=1e-5)


@pytest.mark.parametrize(
    ("run", "total", "ratios"),
    [
        # The same total as in the original, distributed differently: it counts the last
        # filter of a layer, which it keeps, as a pruned one.
        (
            "global_0.4",
            127,
            "*layer1*:0.375,*layer2*:0.375,*layer3*:0.4,*layer3.0.conv1:0.42",
        ),
        ("global_0.9", 305, "*:0.86,*layer3.0.conv1:0.9"),
    ],
)
def test_global_scope_prunes_the_recorded_filters(recorded, run, total, ratios):
    kernels = {n: score[None] for n, score in section(recorded, "score").items()}
    params, groups = side_by_side(kernels)
    expected = section(recorded, run)
    local = tpp.make_plan(groups, params, ratios)
    plan = tpp.make_plan(groups, params, ratios, scope="global")
    assert sum(len(pruned) for pruned in expected.values()) == total
    assert sum(len(local.pruned(f"layer.{layer}")) for layer in expected) == total
    for layer, pruned in expected.items():
        np.testing.assert_array_equal(plan.pruned(f"layer.{layer}"), pruned)


@pytest.mark.parametrize("pick", LARGEST)
def test_aligned_layers_lose_what_the_first_of_them_would(recorded, pick):
    scores = section(recorded, "score")
    expected = section(recorded, f"aligned{pick}")
    for stage, first, second in (
        (1, "conv1", "layer1.0.conv2"),
        (2, "layer2.0.conv2", "layer2.0.downsample.0"),
        (3, "layer3.0.conv2", "layer3.0.downsample.0"),
    ):
        params = {
            "a": {"kernel": scores[first][None]},
            "b": {"kernel": scores[second][None]},
            "c": {"kernel": np.ones((8 * 2**stage, 1))},
        }
        groups = tpp.channel_groups(
            lambda p, x: (
                (x @ p["a"]["kernel"] + x @ p["b"]["kernel"]) @ p["c"]["kernel"]
            ),
            np.ones((1, 1)),
            params=params,
        )
        plan = tpp.make_plan(
            groups,
            params,
            {"a": 0.375},
            criterion=LARGEST[pick](criteria.l1),
            reduce="first",
        )
        for layer in (first, second):
            np.testing.assert_array_equal(plan.pruned("a"), expected[layer])


def test_counts_follow_the_recorded_table(recorded):
    sizes, ratios = recorded["counts_sizes"], recorded["counts_ratios"]
    rows = dict(zip(sizes.tolist(), recorded["counts"], strict=True))
    assert not rows.pop(1).any()  # an axis of one channel is not coupled
    for n, row in rows.items():
        params, groups = chain(a=np.ones((1, n)), b=np.ones((n, 1)))
        for ratio, count in zip(ratios.tolist(), row, strict=True):
            plan = tpp.make_plan(groups, params, {"a": ratio})
            assert len(plan.pruned("a")) == count, (n, ratio)


def test_a_custom_criterion_names_the_statistics_that_it_needs():
    params, groups = chain(a=FILTERS.T, b=np.ones((4, 2)))
    own = Criterion(criteria.taylor, statistics="loss_gradient")
    with pytest.raises(TPPError, match="'taylor' needs more than weights"):
        tpp.make_plan(groups, params, {"a": 0.5}, criterion=own)
    tree = {"a.kernel": OTHERS.T}
    plan, named = (
        tpp.make_plan(groups, params, {"a": 0.5}, criterion=one, statistics=tree)
        for one in (own, "taylor")
    )
    assert plan == named


def test_a_custom_criterion_may_score_norms():
    model, groups = normed()
    own = Criterion(lambda scales: -np.abs(scales[:, 0]), of="norms")
    plan = tpp.make_plan(groups, model, "conv:0.5", criterion=own)
    np.testing.assert_array_equal(plan.pruned("conv"), [0, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["wanda", "variance"])
def test_criteria_of_consumers_are_the_energy_that_a_channel_adds(name, kind):
    """The score is the mean square (or variance) of what each weight adds, summed."""
    fn, params, batches, reader = example(kind)
    groups = tpp.channel_groups(fn, batches[0], params=params)
    moments = tpp.input_moments(fn, batches, params, diagonal=True)
    [group, *_] = [g for g in groups if g.reason is None and not g.inner]
    flat = {"first.kernel": None, "second.kernel": params["second"]["kernel"]}
    got = group_scores(group, flat, CRITERIA[name], statistics=moments)
    rows = jacobian(params, batches, reader)
    outputs = sum(len(e.stacks) * len(e.outputs) for e in moments.consumers)
    mean, square = (x.sum(0) * outputs / len(rows) for x in (rows, rows**2))
    energy = square - (mean**2 if name == "variance" else 0)
    cost = energy * np.square(np.asarray(params["second"]["kernel"]).reshape(-1))
    [member] = [m for m in group.members if m.role == "contracted"]
    cost = np.moveaxis(cost.reshape(params["second"]["kernel"].shape), member.axis, 0)
    expected = [cost[positions].sum() for positions in member.positions]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_costs_of_several_consumers_are_added():
    params = {name: np.eye(3, dtype=np.float32) for name in ("w1", "w2", "w3")}
    params["w3"] = params["w3"] * np.array([[1], [2], [3]], np.float32)

    def fn(p, x):
        z = x @ p["w1"]
        return z @ p["w2"], z @ p["w3"]

    x = jnp.array([[1.0, 2.0, 3.0], [1.0, 0.0, 3.0]])
    groups = tpp.channel_groups(fn, x, params=params)
    moments = tpp.input_moments(fn, [x], params)
    scores = group_scores(groups["w1"], params, CRITERIA["wanda"], statistics=moments)
    np.testing.assert_allclose(scores, [1 * 2, 2 * 5, 9 * 10], rtol=1e-6)
    plan = tpp.make_plan(
        groups, params, counts={"w1": 1}, criterion="variance", statistics=moments
    )
    assert plan.to_dict()["w1"] == [1]


def test_a_criterion_of_consumers_needs_moments_of_the_group():
    params, groups = chain(a=np.ones((2, 3)), b=np.ones((3, 4)), c=np.ones((4, 1)))
    x = jnp.ones((1, 2))
    with pytest.raises(TPPError, match="input_moments"):
        tpp.make_plan(groups, params, 0.5, criterion="wanda")
    with pytest.raises(TPPError, match="input_moments"):
        tpp.make_plan(groups, params, 0.5, criterion="wanda", statistics=params)

    def fn(p, x):
        return x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"]

    moments = tpp.input_moments(fn, [x], params, [groups["a"]])
    with pytest.raises(TPPError, match="channels of b was measured"):
        tpp.make_plan(groups, params, 0.5, criterion="wanda", statistics=moments)
    with pytest.raises(TPPError, match="input moments are for criteria of consumers"):
        tpp.make_plan(groups, params, 0.5, criterion="taylor", statistics=moments)
