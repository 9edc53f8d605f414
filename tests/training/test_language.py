"""Language modelling is trained, measured and pruned like any other task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.data.text import Text
from tpp_jax.training import parallel
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.language import LanguageModelling
from tpp_jax.training.state import arrays_of, initial_state, with_state
from tpp_jax.training.step import StepConfig, make_train_step
from tpp_jax.training.structure import split, structure_of
from tpp_jax.training.task import Feed, Task

LENGTH, BATCH, VOCABULARY = 12, 8, 40
SIZES = tpp.models.DecoderConfig(
    vocabulary=VOCABULARY,
    width=16,
    depth=1,
    heads=4,
    kv_heads=2,
    head_size=4,
    hidden=24,
    tied=True,
)


def counting(n, seed):
    """Tokens that count up by 1 or by 3, and rarely change between the two."""
    rng = np.random.default_rng(seed)
    steps = np.where(np.cumsum(rng.random(n) < 0.05) % 2, 1, 3)
    return (np.cumsum(steps) % VOCABULARY).astype(np.uint8)


TEXT = Text(counting(600, 0), counting(250, 1), VOCABULARY, 2.0)
TASK = LanguageModelling(
    TEXT, lambda rngs: tpp.models.Decoder(SIZES, rngs=rngs), LENGTH, BATCH
)
TX = optax.adam(0.01)


def stepped(model, tx, steps, devices, accumulate=1, first=0, arrays=None, ema=0.0):
    """Trains some steps; returns the loss of each and the state."""
    feed, axis = TASK.feed(devices, accumulate), parallel.axis_name(devices)
    config = StepConfig(accumulate=accumulate, ema=ema)
    structure = structure_of(model, training=True)
    step = make_train_step(structure, tx, TASK.loss, config, feed.train_batch, axis)
    run = parallel.on_devices(step, devices, 0, None, accumulate, "pmap")
    state = initial_state(model, tx, average=ema > 0, step=first, arrays=arrays)
    key, state = parallel.replicate((jax.random.key(1), state), devices)
    feed.begin(jax.random.key(2), first)
    losses = []
    for i in range(first, steps):
        state, metrics = run(state, key, *feed.train_data(i))
        losses.append(float(metrics["loss"]))
    return losses, parallel.local(state)


def measured(model, devices):
    evaluate = Evaluator(TASK, TASK.feed(devices), StepConfig(), devices, "pmap")
    return evaluate(model, *split(model))


@functools.cache
def pruned():
    """Trains, regularizes and cuts; returns the losses and the measured metrics."""
    devices, model = jax.devices()[:1], TASK.model(nnx.Rngs(0))
    groups = tpp.channel_groups(model, *TASK.example_inputs())
    ratios = {"*.mlp.gate_proj": 0.5, "*.self_attn.q_proj": 0.5}
    plan = tpp.make_plan(groups, model, ratios)
    schedule = tpp.growing_schedule(
        granularity=0.1, every=2, stabilize=30, zero_out_every=1
    )
    pruning = optax.chain(
        optax.scale_by_adam(),
        tpp.add_tpp_penalties(plan, schedule, 1.0),
        optax.scale_by_learning_rate(0.01),
        tpp.zero_pruned(plan, schedule),
    )
    found = {"random": measured(model, devices)}
    losses, state = stepped(model, TX, 150, devices)
    model = with_state(model, state)
    found["trained"] = measured(model, devices)
    model = with_state(model, stepped(model, pruning, schedule.total_steps, devices)[1])
    found["regularized"] = measured(model, devices)
    model = tpp.prune(model, plan)
    found["cut"] = measured(model, devices)
    return losses, found, model


def test_the_protocols_are_what_the_generic_code_needs():
    task: Task = TASK
    feeds: list[Feed] = [task.feed(jax.devices()[:1])]
    assert not feeds[0].split
    assert task.headline.improves(2.0, 3.0)


def test_a_language_model_is_trained_measured_and_pruned():
    _, found, small = pruned()
    assert small.layers[0].mlp.up_proj.kernel.shape == (16, 12)
    assert small.layers[0].self_attn.k_proj.kernel.shape == (16, 4)
    perplexity = {moment: metrics["perplexity"] for moment, metrics in found.items()}
    assert perplexity["random"] == pytest.approx(VOCABULARY, rel=0.1)
    assert perplexity["trained"] < 0.25 * perplexity["random"]
    assert perplexity["cut"] == pytest.approx(perplexity["regularized"], rel=1e-5)
    assert perplexity["cut"] < 0.5 * perplexity["random"]


def test_the_evaluation_counts_every_held_out_token_once():
    _, found, small = pruned()
    text, nats = TEXT.held_out.astype(int), []
    assert (len(text) - 1) % LENGTH  # the last sequence is not full
    for i in range(0, len(text) - 1, LENGTH):
        start = min(i, len(text) - 1 - LENGTH)
        window = text[start : start + LENGTH + 1]
        logits = jax.nn.log_softmax(small(window[None, :-1]))[0]
        each = -np.asarray(logits)[np.arange(LENGTH), window[1:]]
        nats += each[i - start :].tolist()
    assert len(nats) == len(text) - 1
    metrics = found["cut"]
    assert metrics.keys() == {"loss", "perplexity", "bits_per_byte"}
    assert metrics["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(np.mean(nats) / np.log(2) / 2)


def test_two_devices_do_the_same_with_it():
    losses, found, small = pruned()
    devices = jax.devices()[:2]
    two, _ = stepped(TASK.model(nnx.Rngs(0)), TX, 20, devices)
    np.testing.assert_allclose(two, losses[:20], rtol=1e-4)
    assert measured(small, devices) == pytest.approx(found["cut"], rel=1e-5)


def test_two_devices_accumulate_the_parts_of_one():
    whole, _, _ = pruned()
    for n in (1, 2):
        devices, model = jax.devices()[:n], TASK.model(nnx.Rngs(0))
        losses, _ = stepped(model, TX, 6, devices, accumulate=2)
        np.testing.assert_allclose(losses, whole[:6], rtol=1e-4)


def test_training_goes_on_bit_for_bit_from_saved_arrays():
    devices, model = jax.devices()[:1], TASK.model(nnx.Rngs(0))
    whole, state = stepped(model, TX, 30, devices, ema=0.9)
    _, half = stepped(model, TX, 20, devices, ema=0.9)
    arrays = {name: np.asarray(x) for name, x in arrays_of(half).items()}
    restored = with_state(TASK.model(nnx.Rngs(7)), half)
    rest, end = stepped(restored, TX, 30, devices, 1, 20, arrays, ema=0.9)
    assert 20 % TASK.steps_per_epoch  # in the middle of an epoch
    assert rest == whole[20:]
    for name, array in arrays_of(state).items():
        np.testing.assert_array_equal(arrays_of(end)[name], array, err_msg=name)
    # What is not trained is not averaged either.
    fresh = np.asarray(model.layers[0].self_attn.frequencies[...])
    ends = [x for name, x in arrays_of(end).items() if name.endswith("frequencies")]
    assert [x.tolist() for x in ends] == 2 * [fresh.tolist()]


def test_training_sequences_begin_anywhere_and_depend_on_key_and_step_only():
    feed = TASK.feed(jax.devices()[:1])
    whole, starts = TEXT.train.tolist(), set()
    select = jax.jit(feed.train_batch)
    for step in range(2 * TASK.steps_per_epoch):
        feed.begin(jax.random.key(2), step)
        key = jax.random.fold_in(jax.random.key(1), step)
        batch = select(jnp.int32(step), key, *feed.train_data(step))
        assert batch.tokens.shape == (BATCH, LENGTH + 1)
        for tokens in np.asarray(batch.tokens).tolist():
            found = [
                i for i in range(len(whole)) if whole[i : i + LENGTH + 1] == tokens
            ]
            assert found
            starts.update(found)
    assert len({start % LENGTH for start in starts}) == LENGTH
    other = TASK.feed(jax.devices()[:1])
    other.begin(jax.random.key(2), step)
    again = jax.jit(other.train_batch)(jnp.int32(step), key, *other.train_data(step))
    np.testing.assert_array_equal(again.tokens, batch.tokens)


def test_samples_and_probes_are_sequences_of_the_text():
    first, *others = TASK.samples(3)
    assert len(others) == TASK.steps_per_epoch - 1
    taken = np.concatenate([first.tokens, *[batch.tokens for batch in others]])
    assert taken.shape[1] == LENGTH + 1 and len(np.unique(taken, axis=0)) > 30
    np.testing.assert_array_equal(next(TASK.samples(3)).tokens, first.tokens)
    probes = TASK.probes(3)
    np.testing.assert_array_equal(probes.tokens[1], TEXT.held_out[12:25])
    [tokens] = TASK.inputs(probes)
    assert tokens.shape == (3, LENGTH) and tokens.dtype == jnp.int32


def test_a_diverged_network_has_an_infinite_perplexity():
    assert TASK.report({"loss": 1000.0}) == {"loss": 1000.0, "perplexity": np.inf}
    assert np.isnan(TASK.report({"loss": np.nan})["perplexity"])
