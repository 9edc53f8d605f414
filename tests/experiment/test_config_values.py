"""The value of every field of a config is used, or refused with the field's name."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experiment.test_errors import small_config
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import check_values, default_config
from tpp_jax.experiment.fields import flat
from tpp_jax.experiment.setup import make_setup
from tpp_jax.method.schedule import growing_schedule
from tpp_jax.training.optimizers import MOST_STEPS, learning_rate

FIELDS = flat(default_config())


def with_field(name, value, config=None):
    """Returns a config, a plain dict, whose field has the given value of any type."""
    config = small_config() if config is None else config
    *path, last = name.split(".")
    place = config
    for part in path:
        place = place[part]
    with place.unlocked(), place.ignore_type():
        place[last] = value
    return config


def of_the_wrong_type(default):
    wrong = [None, (1, 2), b"x", 2.5j]
    match default:
        case bool():
            wrong += [1, 0.0, "True"]
        case int():
            wrong += [True, 1.5, "1", math.nan]
        case float():
            wrong += ["1", "nan"]
        case str():
            wrong += [True]
    return wrong


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_by_name(name):
    for value in of_the_wrong_type(FIELDS[name]):
        config = with_field(name, value)
        with pytest.raises(TPPError, match=rf"config\.{name} is .*, must be "):
            check_values(config)


NUMBERS = [name for name, x in FIELDS.items() if not isinstance(x, str | bool)]
FLOATS = [name for name in NUMBERS if isinstance(FIELDS[name], float)]
INTEGERS = [name for name in NUMBERS if isinstance(FIELDS[name], int)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, float("1e400")])
def test_a_number_that_is_none_in_single_precision_is_refused_by_name(name, value):
    with pytest.raises(TPPError, match=rf"config\.{name} is .*, must be "):
        check_values(with_field(name, value))


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [2**63, 10**30, 10**5000], ids=["2^63", "1e30", "…"])
def test_a_whole_number_that_cannot_be_counted_is_refused_by_name(name, value):
    with pytest.raises(TPPError, match=rf"config\.{name} is .*, must be at most") as e:
        check_values(with_field(name, value))
    assert len(str(e.value)) < 200


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        # JAX treats 2**32 as 0.
        ("seed", 2**32, "must be at most 4294967295"),
        ("data.batch_size", 0, "must be at least 1"),
        ("data.batch_size", -64, "must be at least 1"),
        ("data.image_size", 10**6, "must be at most 16384"),
        ("data.workers", 10**6, "must be at most 1000"),
        ("prune.rounds", 10**6, "must be at most 1000"),
        ("prune.momentum", 1.0, "must be below 1"),
        # Beta(1e-38, 1e-38) cannot be sampled.
        ("finetune.mixup", 1e-38, "must be 0 or at least 1e-06"),
        ("pretrain.cutmix", 1e-320, "must be 0 or at least 1e-06"),
        ("init.model", "a\0b", "which is not a path"),
        ("init.torch", "a" * 1000, "which is not a path: File name too long"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(field, value, message):
    with pytest.raises(TPPError, match=rf"config\.{field} is .*{message}"):
        check_values(with_field(field, value))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrain.epochs": MOST_STEPS}, "phase of 2147483647 epochs.* more than"),
        ({"finetune.warmup_epochs": 1e30, "finetune.epochs": 0}, "more than"),
        (
            {"pretrain.learning_rate": "0:0.1,1e30:0.01"},
            "'0:0.1,1e30:0.01'.* more than",
        ),
        ({"pretrain.learning_rate": "1e39"}, "no negative or infinite rate"),
        ({"prune.schedule.granularity": 1e-30}, "raise the strength 1e\\+30 times"),
        ({"prune.schedule.every": MOST_STEPS}, "config.prune.schedule has .* steps"),
        ({"prune.schedule.kind": "poly²"}, "unknown schedule 'poly²'"),
        ({"prune.schedule.kind": "poly" + "9" * 5000}, "unknown schedule 'poly9"),
        (
            {"prune.method": "greg2", "prune.grow.every": MOST_STEPS},
            "config.prune.grow has .* steps",
        ),
        (
            {"prune.method": "iterative", "prune.rounds": 1000},
            "rounds is 1000, but finetune has only 22 steps",
        ),
    ],
)
def test_what_would_run_for_ever_is_refused(fields, message):
    with pytest.raises(TPPError, match=message):
        make_setup(small_config(**fields))


def test_the_longest_schedules_that_are_counted_are_made():
    rate = learning_rate(f"0:0.1,{MOST_STEPS}:0.01", 1)
    assert float(rate(MOST_STEPS - 1)) == pytest.approx(0.1)
    assert len(growing_schedule(granularity=1e-6).strengths) == 1_000_001


def test_a_learning_rate_may_be_a_number():
    check_values(with_field("pretrain.learning_rate", 0.1))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([0, 1, -1, 2**31, 2**32, 10**30, 1e-320, 3e38, "1", "[b]"]),
    st.tuples(st.integers()),
)


@settings(max_examples=400)
@given(name=st.sampled_from(sorted(FIELDS)), value=VALUES)
def test_any_value_in_any_field_makes_a_run_or_is_refused_clearly(name, value):
    config = with_field(name, value)
    message = None
    try:
        make_setup(config)
    except TPPError as error:
        message = str(error)
    assert message is None or (10 < len(message) < 1000 and "\n" not in message)
