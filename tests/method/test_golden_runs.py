"""Whole TPP runs follow the original's recordings, in float64 to rule rounding out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.reference import GOLDEN, section, with_leaves
from tpp_jax.graph.naming import named_leaves
from tpp_jax.models import CifarResNet, CifarVGG

RUNS = {
    "resnet_a": dict(
        model=lambda rngs: CifarResNet((1, 1, 1), option="A", rngs=rngs),
        ratios="*layer*.conv1:0.5",
        learning_rate=0.01,
        stabilize=10,
    ),
    "resnet_b": dict(
        model=lambda rngs: CifarResNet((1, 1, 1), option="B", num_classes=7, rngs=rngs),
        ratios="*layer[1-2]*.conv1:0.5,*layer3*.conv1:0.25",
        learning_rate=0.001,
        stabilize=12,
    ),
    "vgg": dict(
        model=lambda rngs: CifarVGG((8, "M", 16, "M", 16, "M", 32), rngs=rngs),
        ratios="*features*:0.5",
        skip="features.0",
        learning_rate=0.01,
        stabilize=8,
    ),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    """Trains on the recorded batches; returns (the recording, what came out)."""
    settings = RUNS[request.param]
    golden = np.load(GOLDEN / f"{request.param}.npz")
    with jax.enable_x64(True):
        return golden, _train(golden, **settings)


def _train(golden, model, ratios, learning_rate, stabilize, skip=()):
    model = with_leaves(model(nnx.Rngs(0)), section(golden, "start"), jnp.float64)
    images = jnp.asarray(golden["images"], jnp.float64).transpose(0, 1, 3, 4, 2)
    groups = tpp.channel_groups(model, images[0])
    plan = tpp.make_plan(groups, model, ratios, skip=skip)
    schedule = tpp.growing_schedule(
        granularity=0.1, every=2, stabilize=stabilize, zero_out_every=1
    )
    tx = optax.chain(
        tpp.add_tpp_penalties(plan, schedule, gram_weight=1000.0),
        optax.add_decayed_weights(5e-4),
        optax.sgd(learning_rate, momentum=0.9),
        tpp.zero_pruned(plan, schedule),
    )
    model.train()
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, stats, opt_state, images, labels):
        def loss_fn(params):
            net = nnx.merge(graphdef, params, stats, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                net(images), labels
            )
            return losses.mean(), nnx.state(net, nnx.BatchStat)

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    opt_state = tx.init(params)
    out = {"ce": [], "gram": [], "strength": [], "schedule": schedule, "plan": plan}
    for i in range(schedule.total_steps):
        params, stats, opt_state, loss = step(
            params, stats, opt_state, images[i], golden["labels"][i]
        )
        out["ce"].append(loss)
        out["gram"].append(opt_state[0].gram)
        out["strength"].append(opt_state[0].strength)
        out[f"after_{i + 1}"] = named_leaves(params) | named_leaves(stats)
    out["before_slicing"] = out[f"after_{schedule.total_steps}"]
    small = tpp.prune(nnx.merge(graphdef, params, stats), plan)
    out["sliced"] = named_leaves(nnx.state(small))
    small.eval()
    out["logits"] = small(images[0])
    return out


def test_schedule_has_the_recorded_length_and_strengths(run):
    golden, ours = run
    assert ours["schedule"].total_steps == golden["iterations"]
    assert ours["schedule"].regularize_steps == golden["stabilize_starts"]
    np.testing.assert_allclose(ours["strength"], golden["strength"], atol=1e-12)


def test_the_same_filters_are_kept(run):
    golden, ours = run
    for group in ours["plan"].pruned_groups:
        kept = ours["plan"].kept[group.name]
        np.testing.assert_array_equal(kept, np.sort(golden[f"kept/{group.name}"]))
    pruned = {group.name for group in ours["plan"].pruned_groups}
    for name in (key for key in golden.files if key.startswith("kept/")):
        whole = ours["plan"].groups.shapes[name[5:] + ".kernel"][-1]
        assert (len(golden[name]) < whole) == (name[5:] in pruned)


def test_losses_follow_the_recording_at_every_step(run):
    golden, ours = run
    np.testing.assert_allclose(ours["ce"], golden["loss_ce"], rtol=1e-6)
    np.testing.assert_allclose(ours["gram"], golden["loss_gram"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("when", ["after_1", "after_5", "after_20", "before_slicing"])
def test_weights_and_statistics_follow_the_recording(run, when):
    golden, ours = run
    _assert_equal_leaves(ours[when], section(golden, when))


def test_sliced_weights_and_logits_equal_the_recording(run):
    golden, ours = run
    _assert_equal_leaves(ours["sliced"], section(golden, "sliced"))
    np.testing.assert_allclose(ours["logits"], golden["sliced_logits"], atol=1e-6)


def _assert_equal_leaves(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # The recording holds float32: its own rounding is 6e-8 of a value.
        np.testing.assert_allclose(
            ours[name], value, rtol=1e-6, atol=1e-7, err_msg=name
        )
