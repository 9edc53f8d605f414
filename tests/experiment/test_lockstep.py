"""Runs in lockstep have the results of single runs."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.end_to_end.runs import arrays_of, history_of
from tests.experiment.test_errors import small_config
from tests.experiment.test_reliability import stop_at
from tests.training.test_step import CONFIG, digits_task, initial_state
from tests.training.test_step import assert_alike as assert_alike_trees
from tpp_jax.errors import TPPError
from tpp_jax.experiment import lockstep, run
from tpp_jax.experiment.program import Program
from tpp_jax.models import CifarResNet
from tpp_jax.pruning.plan import Plan
from tpp_jax.saving import load_model_info
from tpp_jax.training.step import make_train_step, make_train_steps
from tpp_jax.training.structure import structure_of

pytestmark = pytest.mark.usefixtures("no_pictures")

SEEDS = 0, 1


def of_seed(seed, **fields):
    return small_config(seed=seed, steps_per_dispatch=5, **fields)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of single runs."""
    folders = [tmp_path_factory.mktemp("alone") / str(seed) for seed in SEEDS]
    for seed, folder in zip(SEEDS, folders, strict=True):
        run.train(of_seed(seed), folder)
    return folders


def assert_alike(folder, other):
    """Checks that two runs have equal plans, and numbers equal up to rounding."""
    plans = [load_model_info(f / "model")["plan"] for f in (folder, other)]
    assert plans[0] == plans[1]
    for name, array in arrays_of(other).items():
        np.testing.assert_allclose(
            arrays_of(folder)[name], array, rtol=1e-4, atol=1e-5, err_msg=name
        )
    for row, expected in zip(history_of(folder), history_of(other), strict=True):
        assert row.keys() == expected.keys()
        if "loss" in row:
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def counting(monkeypatch):
    """Numbers of runs that the programs joined."""
    sizes, original = [], lockstep._Programs.__call__

    def call(self, asks, of_all):
        sizes.append(len(asks))
        return original(self, asks, of_all)

    monkeypatch.setattr(lockstep._Programs, "__call__", call)
    return sizes


def test_seeds_together_give_each_what_it_gives_alone(tmp_path, alone, monkeypatch):
    sizes = counting(monkeypatch)
    folders = [tmp_path / str(seed) for seed in SEEDS]
    ends = run.train_together([of_seed(seed) for seed in SEEDS], folders)
    assert [end["status"] for end in ends] == ["done"] * 2
    assert set(sizes) == {2}  # all steps of all phases
    for folder, other in zip(folders, alone, strict=True):
        assert_alike(folder, other)


def test_runs_stopped_at_different_steps_meet_again(tmp_path, alone, monkeypatch):
    folders = [tmp_path / str(seed) for seed in SEEDS]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)  # dispatches of the first run, alone
        with pytest.raises(SystemExit):
            run.train(of_seed(0), folders[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 10)  # dispatches of all runs
        with pytest.raises(SystemExit):
            run.train_together([of_seed(seed) for seed in SEEDS], folders)
    sizes = counting(monkeypatch)
    run.train_together([of_seed(seed) for seed in SEEDS], folders)
    assert sizes[-1] == 2
    for folder, other in zip(folders, alone, strict=True):
        assert_alike(folder, other)


def test_methods_that_fine_tune_alike_share_those_steps(tmp_path, alone, monkeypatch):
    changes = ("tpp", ""), ("oneshot", ""), ("oneshot", "orthp")
    configs = [
        of_seed(
            seed,
            **{"init.model": str(alone[seed % 2] / "dense")},
            **{"prune.method": method, "prune.reinitialize": recipe},
        )
        for seed, (method, recipe) in enumerate(changes)
    ]
    singly = [tmp_path / "singly" / str(i) for i in range(3)]
    sizes = counting(monkeypatch)
    for config, folder in zip(configs, singly, strict=True):
        run.train(config, folder)
    sizes.clear()
    jointly = [tmp_path / "jointly" / str(i) for i in range(3)]
    ends = run.train_together(configs, jointly)
    assert [end["status"] for end in ends] == ["done"] * 3
    # The others wait until TPP has regularized its network; then all are joined.
    first_joint = sizes.index(3)
    assert set(sizes[:first_joint]) == {1} and set(sizes[first_joint:]) == {3}
    for folder, other in zip(jointly, singly, strict=True):
        assert_alike(folder, other)


def test_one_that_fails_stops_no_other_also_on_two_devices(tmp_path, alone):
    configs = [of_seed(0, **{"pretrain.learning_rate": "1e9"}), of_seed(1)]
    for config in configs:
        config.num_devices = 2
    failed, other = run.train_together(configs, [tmp_path / "0", tmp_path / "1"])
    assert isinstance(failed, TPPError) and "no longer finite" in str(failed)
    assert other["status"] == "done"
    assert_alike(tmp_path / "1", alone[1])


@pytest.mark.parametrize("unroll", [False, True])
def test_a_step_of_replicas_with_convolutions_is_their_single_steps(unroll):
    models = [
        CifarResNet((1, 1, 1), width=0.25, in_channels=1, rngs=nnx.Rngs(seed))
        for seed in (0, 1)
    ]
    device = jax.devices()[:1]
    groups = tpp.channel_groups(models[0], jnp.zeros((1, 8, 8, 1)))
    plans = [tpp.make_plan(groups, model, "*layer*.conv1:0.5") for model in models]
    assert any(
        (plans[0].kept[name] != plans[1].kept[name]).any() for name in plans[0].kept
    )
    schedule = tpp.growing_schedule(
        granularity=0.5, every=1, stabilize=10, zero_out_every=1
    )
    graphdef = structure_of(models[0], training=True)
    task = digits_task()
    feed = task.feed(device)

    def steps_of(kept):
        plan = Plan(kept, groups)
        tx = optax.chain(
            tpp.add_tpp_penalties(plan, schedule),
            optax.sgd(0.01),
            tpp.zero_pruned(plan, schedule),
        )
        step = make_train_step(graphdef, tx, task.loss, CONFIG, feed.train_batch)
        return make_train_steps(step, loop=False)

    states = [initial_state(model, optax.sgd(0.01)) for model in models]
    tx = optax.chain(
        tpp.add_tpp_penalties(plans[0], schedule),
        optax.sgd(0.01),
        tpp.zero_pruned(plans[0], schedule),
    )
    states = [s._replace(opt_state=tx.init(s.params)) for s in states]
    keys = [jax.random.key(seed) for seed in (5, 6)]
    feed.begin(jax.random.key(2), 0)
    order, images = feed.train_data(0)
    joint = jax.jit(lockstep.together(steps_of, unroll))
    kept = tuple(plan.kept for plan in plans)
    results = joint(kept, tuple(states), tuple(keys), 1, (order, order), images)
    for plan, state, key, result in zip(plans, states, keys, results, strict=True):
        alone = jax.jit(steps_of(plan.kept))(state, key, 1, order, images)
        assert_alike_trees(result, alone, rtol=1e-4, atol=1e-5)


class Killed(BaseException):
    """An exception that nothing catches."""


def test_whatever_is_no_error_of_a_run_ends_all_of_them():
    closed = []

    def waits(take):
        try:
            take(program(), (None, None, 1), left=1)
        finally:
            closed.append(threading.current_thread())

    def killed(_):
        raise Killed

    with pytest.raises(Killed):
        lockstep.drive([waits, killed, waits])
    assert len(closed) == 1  # the third had not started
    assert not any(thread.is_alive() for thread in closed)


def test_what_a_program_raises_reaches_the_runs_that_asked_for_it():
    def fails(take):
        take(program(), (None, None, 1), left=1)

    def ends(_):
        return "done"

    failed, done = lockstep.drive([fails, ends])
    assert isinstance(failed, ZeroDivisionError) and done == "done"


def test_a_single_run_works_in_the_thread_that_asks_for_it():
    threads = lockstep.drive([lambda _: threading.current_thread()])
    assert threads == [threading.current_thread()]


def program():
    """Raises in place of steps."""
    return Program(
        tx=optax.identity(),
        steps=lambda *arguments: 1 / 0,
        at_once=1,
        likeness=None,
        steps_of=lambda kept: None,
        compile=lambda fn: fn,
        unroll=False,
        kept={},
    )
