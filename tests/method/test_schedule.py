"""The strength grows as the original's does, and phases begin and end when they do."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tpp_jax as tpp
from tests.reference import GOLDEN

RECORDED = json.loads((GOLDEN / "schedule.json").read_text())
STRENGTHS = np.load(GOLDEN / "schedule.npz")

# Our arguments for the recorded command lines. A given number of steps T of a linear
# schedule is the same as intervals of T·Δ/λ_max steps: 500 · 0.01 = 5.
SETTINGS = {
    "linear_fast": dict(granularity=0.05, every=2, stabilize=20, zero_out_every=3),
    "linear_interval5": dict(
        granularity=0.01, every=5, stabilize=40, zero_out_every=10
    ),
    "linear_nondivisor": dict(
        granularity=0.07, every=3, stabilize=10, zero_out_every=2
    ),
    "linear_upper0.3": dict(
        granularity=0.1, every=4, ceiling=0.3, stabilize=10, zero_out_every=2
    ),
    "linear_1e-3": dict(granularity=1e-3, every=1, stabilize=10, zero_out_every=2),
    "linear_reg_iters_given": dict(
        granularity=0.01, every=5, stabilize=10, zero_out_every=2
    ),
    "both_layers_pruned": dict(
        granularity=0.25, every=2, stabilize=12, zero_out_every=4
    ),
    "poly1": dict(
        kind="poly1", regularize_steps=100, every=10, stabilize=20, zero_out_every=3
    ),
    **{
        f"poly{power}_{name}": dict(
            kind=f"poly{power}", **steps, stabilize=20, zero_out_every=3
        )
        for power in (2, 3)
        for name, steps in (
            ("fast", dict(regularize_steps=40, every=2)),
            ("1e-4", dict(regularize_steps=1000, every=10)),
        )
    },
}
# The others: an interval of 2.5 steps, a poly schedule that runs away, a run that
# prunes nothing (its phase ends at once; ours knows no plan), a refused setting.
LEFT_OUT = {
    "linear_reg_iters_given_fractional_interval",
    "poly2_reg_iters_default(-1)",
    "poly3_reg_iters_default(-1)",
    "nothing_pruned",
    "stabilize_too_short",
}


def test_every_recorded_setting_is_accounted_for():
    assert SETTINGS.keys() | LEFT_OUT == RECORDED.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_strengths_are_the_recorded_ones_at_every_iteration(name):
    schedule = tpp.growing_schedule(**SETTINGS[name])
    recorded = STRENGTHS[f"{name}/reg_strength_per_iter"]
    ours = schedule(np.arange(schedule.total_steps))
    # The original keeps its strength in float32.
    np.testing.assert_allclose(ours, recorded, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_phases_begin_and_end_at_the_recorded_iterations(name):
    schedule, recorded = tpp.growing_schedule(**SETTINGS[name]), RECORDED[name]
    assert schedule.regularize_steps == recorded["iter_stabilize_reg"]
    assert schedule.total_steps == recorded["n_iterations"]
    assert schedule.total_steps - 1 == recorded["prune_iter"]
    assert recorded["zero_out_iter"]
    for layer, step in recorded["zero_out_iter"].items():
        assert schedule.zero_out_step(recorded["layers"][layer]["index"]) == step


def test_the_published_settings_grow_for_100_000_steps_on_cifar():
    schedule = tpp.growing_schedule()
    assert schedule.regularize_steps == 100_000
    assert schedule.total_steps == 110_001
    assert float(schedule(99_999)) < 1 == float(schedule(100_000))
    assert tpp.growing_schedule(every=5).regularize_steps == 50_000


def test_the_first_interval_has_no_strength():
    schedule = tpp.growing_schedule(granularity=0.5, every=3)
    assert [float(schedule(t)) for t in range(7)] == [0, 0, 0, 0.5, 0.5, 0.5, 1]


def test_the_strength_is_not_clipped_to_the_ceiling():
    schedule = tpp.growing_schedule(granularity=0.07, every=1)
    assert float(schedule(10_000)) == pytest.approx(1.05)


def test_the_ceiling_is_reached_in_float32_as_in_the_original():
    assert 0.3 * 3 < 0.9  # in float64
    schedule = tpp.growing_schedule(granularity=0.3, every=1, ceiling=0.9)
    assert schedule.regularize_steps == 3


def test_the_strength_stays_after_the_last_step():
    schedule = tpp.growing_schedule(granularity=0.5, every=2, stabilize=3)
    assert float(schedule(schedule.total_steps + 10**6)) == 1.0


@settings(max_examples=50)
@given(
    granularity=st.floats(1e-3, 2),
    every=st.integers(1, 7),
    ceiling=st.floats(0.1, 3),
)
def test_a_linear_schedule_ends_at_the_first_multiple_that_reaches_the_ceiling(
    granularity, every, ceiling
):
    schedule = tpp.growing_schedule(
        granularity=granularity, every=every, ceiling=ceiling
    )
    *before, last = schedule.strengths
    assert np.float32(last) >= np.float32(ceiling)
    assert all(np.float32(strength) < np.float32(ceiling) for strength in before)
    np.testing.assert_allclose(np.diff(schedule.strengths), granularity)
    assert schedule.regularize_steps == every * (len(schedule.strengths) - 1)


def test_a_schedule_can_be_traced_jitted_and_vmapped():
    schedule = tpp.growing_schedule(granularity=0.3, every=2, stabilize=4)
    steps = np.arange(schedule.total_steps)
    one_by_one = [float(schedule(int(step))) for step in steps]
    compiled = jax.jit(schedule)
    assert [float(compiled(jnp.int32(step))) for step in steps] == one_by_one
    np.testing.assert_array_equal(jax.vmap(schedule)(steps), np.float32(one_by_one))
    assert compiled(jnp.int32(5)).dtype == jnp.float32


def test_double_precision_keeps_the_strength_in_float64():
    with jax.enable_x64(True):
        strength = tpp.growing_schedule(granularity=0.1, every=1)(3)
        assert strength.dtype == jnp.float64
        assert float(strength) == 0.1 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(granularity=0), "granularity is 0, must be above 0"),
        (dict(granularity=math.nan), "granularity is nan"),
        (dict(ceiling=-1.0), "ceiling is -1.0"),
        (dict(ceiling=math.inf), "ceiling is inf"),
        (dict(every=0), "every is 0"),
        (dict(every=2.5), "every is 2.5, must be a whole number"),
        (dict(stabilize=-1), "stabilize is -1"),
        (dict(stabilize=1.5), "stabilize is 1.5, must be a whole number"),
        (dict(zero_out_every=0), "zero_out_every is 0"),
        (dict(zero_out_every=0.5), "zero_out_every is 0.5, must be a whole number"),
        (dict(kind="cosine"), "unknown schedule 'cosine'"),
        (dict(kind="poly"), "unknown schedule 'poly'"),
        (dict(kind="polyx"), "unknown schedule 'polyx'"),
    ],
)
def test_numbers_out_of_range_and_unknown_kinds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tpp.growing_schedule(**options)


def test_a_linear_schedule_takes_no_number_of_steps():
    # The original turns it into an interval, here of 2.5 steps.
    with pytest.raises(ValueError, match="length follows from granularity"):
        tpp.growing_schedule(granularity=0.01, regularize_steps=250)


@pytest.mark.parametrize("kind", ["poly2", "poly3"])
@pytest.mark.parametrize("steps", [None, -1, 0, 1005, -1000])
def test_a_poly_schedule_needs_its_number_of_steps(kind, steps):
    # The original runs away without it: poly2 jumps to 100, poly3 never ends.
    with pytest.raises(ValueError, match=f"{kind} schedule needs regularize_steps"):
        tpp.growing_schedule(kind, every=10, regularize_steps=steps)
