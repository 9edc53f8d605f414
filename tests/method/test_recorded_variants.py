"""An MLP and the ablations follow the original's recordings, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.method.test_transforms import optimizer
from tests.reference import GOLDEN, filled, section, with_leaves
from tpp_jax.graph.naming import map_named, named_leaves
from tpp_jax.models import MLP, CifarResNet


def follow(model, plan, tx, steps, differentiate):
    """Trains on the recorded batches; returns what came out, step by step."""
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    state = tx.init(params)

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    out = {"loss_ce": [], "loss_gram": [], "strength": [], "plan": plan}
    for i in range(steps):
        (loss, stats), grads = differentiate(params, stats, i)
        params, state = update(grads, state, params)
        out["loss_ce"].append(loss)
        out["loss_gram"].append(state[0].gram)
        out["strength"].append(state[0].strength)
        out[f"after_{i + 1}"] = named_leaves(params)
    out["before_slicing"] = named_leaves(params) | named_leaves(stats)
    nnx.update(model, params, stats)
    model.eval()
    out["model"] = model
    return out


def differentiated(model, golden):
    """``(params, statistics, step) -> ((loss, statistics), gradients)``, compiled."""
    model.train()
    graphdef = nnx.graphdef(model)
    images = jnp.asarray(golden["images"], jnp.float64).transpose(0, 1, 3, 4, 2)
    labels = jnp.asarray(golden["labels"])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def differentiate(params, stats, step):
        batch = step % len(images)  # the recorded batches, in turn
        net = nnx.merge(graphdef, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            net(images[batch]), labels[batch]
        )
        return losses.mean(), nnx.state(net, nnx.BatchStat)

    return differentiate


def eval_images(golden):
    return jnp.asarray(golden["eval_images"], jnp.float64).transpose(0, 2, 3, 1)


MLP_SCHEDULE = tpp.growing_schedule(
    granularity=0.05, every=2, stabilize=12, zero_out_every=2
)


def zero_kernels(plan, schedule):
    """The original's zero-out, which leaves biases alone."""
    return optax.masked(
        tpp.zero_pruned(plan, schedule),
        lambda params: map_named(lambda name, _: "bias" not in name, params),
    )


ZERO_OUTS = {"ours": tpp.zero_pruned, "the original's": zero_kernels}


@pytest.fixture(scope="module", params=ZERO_OUTS)
def mlp_run(request):
    """A linear MLP without norms; the original crashes but for one guarded line."""
    golden = np.load(GOLDEN / "mlp.npz")
    schedule = MLP_SCHEDULE
    with jax.enable_x64(True):
        model = filled(
            lambda: MLP(
                4, image_shape=(8, 8, 1), hidden=20, linear=True, rngs=nnx.Rngs(0)
            )
        )
        model = with_leaves(model, section(golden, "start"), jnp.float64)
        groups = tpp.channel_groups(model, jnp.ones((1, 8, 8, 1)))
        plan = tpp.make_plan(groups, model, "*net*:0.5", skip="*net.6")
        tx = optimizer(plan, schedule, 0.001, zero_out=ZERO_OUTS[request.param])
        differentiate = differentiated(model, golden)
        run = follow(model, plan, tx, schedule.total_steps, differentiate)
    return request.param, golden, run


def assert_close_leaves(ours, theirs, rtol=1e-6, atol=1e-7):
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol, atol, err_msg=name)


def test_an_mlp_without_norms_keeps_the_recorded_filters(mlp_run):
    _, golden, ours = mlp_run
    for group in ours["plan"].pruned_groups:
        kept = ours["plan"].kept[group.name]
        np.testing.assert_array_equal(kept, np.sort(golden[f"kept/{group.name}"]))
    assert len(ours["plan"].pruned_groups) == 3


def test_an_mlp_follows_the_recording_until_the_first_layer_is_zeroed_out(mlp_run):
    _, golden, ours = mlp_run
    assert MLP_SCHEDULE.total_steps == golden["iterations"]
    assert MLP_SCHEDULE.regularize_steps == golden["stabilize_starts"]
    first = MLP_SCHEDULE.zero_out_step(0)
    assert len(ours["strength"]) == len(golden["strength"])
    np.testing.assert_allclose(ours["strength"], golden["strength"], rtol=1e-7)
    for name in ("loss_ce", "loss_gram"):
        np.testing.assert_allclose(
            ours[name][: first + 1], golden[name][: first + 1], rtol=1e-6
        )
    for when in ("after_5", "after_20"):
        theirs = section(golden, when)
        assert ours[when].keys() == theirs.keys()
        assert_close_leaves(ours[when], theirs)


def test_an_mlp_ends_as_the_recording_but_for_the_biases_of_pruned_rows(mlp_run):
    who, golden, ours = mlp_run
    theirs = section(golden, "before_slicing")
    for group in ours["plan"].pruned_groups:
        pruned = ours["plan"].pruned(group.name)
        assert not np.any(ours["before_slicing"][f"{group.name}.kernel"][:, pruned])
        assert np.all(theirs[f"{group.name}.bias"][pruned] != 0)
    if who == "ours":
        # Its biases of pruned rows go on feeding the next layers: a small difference.
        for name, value in theirs.items():
            layer = name.removesuffix(".bias")
            if name.endswith(".bias") and layer in ours["plan"].kept:
                rows = ours["plan"].kept[layer]
                assert not np.any(
                    np.delete(np.asarray(ours["before_slicing"][name]), rows)
                )
            else:
                rows = slice(None)
            np.testing.assert_allclose(
                ours["before_slicing"][name][rows], value[rows], atol=3e-4
            )
    else:
        assert_close_leaves(ours["before_slicing"], theirs)
        np.testing.assert_allclose(ours["loss_ce"], golden["loss_ce"], rtol=1e-6)


def test_the_sliced_mlp_computes_what_the_whole_one_did_where_the_original_s_does_not(
    mlp_run,
):
    who, golden, ours = mlp_run
    with jax.enable_x64(True):
        x = eval_images(golden)
        sliced = tpp.prune(ours["model"], ours["plan"])
        whole, logits = ours["model"](x), sliced(x)
    if who == "ours":
        np.testing.assert_allclose(logits, whole, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(logits, golden["sliced_logits"], atol=1e-3)
    else:
        np.testing.assert_allclose(whole, golden["full_logits"], atol=1e-6)
        np.testing.assert_allclose(logits, golden["sliced_logits"], atol=1e-6)
        assert np.abs(golden["full_logits"] - golden["sliced_logits"]).max() > 0.01
        assert_close_leaves(named_leaves(nnx.state(sliced)), section(golden, "sliced"))


@pytest.fixture(scope="module")
def resnet_run():
    """(recording, plan, function from a variant's settings to its run)."""
    golden = np.load(GOLDEN / "ablations.npz")
    with jax.enable_x64(True):
        start = with_leaves(
            filled(lambda: CifarResNet((1, 1, 1), rngs=nnx.Rngs(0))),
            section(golden, "start"),
            jnp.float64,
        )
        groups = tpp.channel_groups(start, jnp.ones((1, 16, 16, 3)))
        plan = tpp.make_plan(groups, start, "*layer*.conv1:0.5")
        differentiate = differentiated(start, golden)

        def run(kind="linear", regularize_steps=None, **options):
            schedule = tpp.growing_schedule(
                kind,
                granularity=0.05,
                every=2,
                stabilize=20,
                zero_out_every=2,
                regularize_steps=regularize_steps,
            )
            tx = optimizer(plan, schedule, 0.001, **options)
            model = nnx.clone(start)
            return follow(model, plan, tx, schedule.total_steps, differentiate)

        return golden, plan, run


ABLATIONS = {
    "no_gram": {"gram_weight": 0.0},
    "no_bn": {"bn": False},
    "no_l2": {"l2": False},
    "orthogonal": {"target": "orthogonal"},
    "poly2": {"kind": "poly2", "regularize_steps": 40},
}


@functools.partial(jax.jit, static_argnums=0)
def evaluate(graphdef, plan, state, images):
    return nnx.merge(graphdef, tpp.slice_tree(plan, state))(images)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_follow_the_recording(resnet_run, name):
    golden, plan, run = resnet_run
    with jax.enable_x64(True):
        ours = run(**ABLATIONS[name])
        graphdef, state = nnx.split(ours["model"])
        logits = evaluate(graphdef, plan, state, eval_images(golden))
    for key in ("loss_ce", "loss_gram", "strength"):
        np.testing.assert_allclose(
            ours[key], golden[f"{name}/{key}"], rtol=1e-6, atol=1e-9, err_msg=key
        )
    assert_close_leaves(
        ours["before_slicing"], section(golden, f"{name}/before_slicing")
    )
    np.testing.assert_allclose(logits, golden[f"{name}/sliced_logits"], atol=1e-6)
