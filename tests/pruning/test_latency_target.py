"""Plans for a latency, from tables of times that are made by hand."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tpp_jax.errors import TPPError, TPPTypeError
from tpp_jax.pruning.times import Measured, Size, TimedLayer, TimedShape


def net(p, x):
    for name in ("w1", "w2", "w3"):
        x = jnp.tanh(x @ p[name])
    return x


PARAMS = {"w1": jnp.ones((4, 32)), "w2": jnp.ones((32, 24)), "w3": jnp.ones((24, 2))}
GROUPS = tpp.channel_groups(net, jnp.ones((1, 4)), params=PARAMS)

# A machine that computes 8 columns in the time of one, in steps of a millisecond.
STAIRS = tuple(w for step in (0, 8, 16, 24) for w in (step + 1, step + 8))


def staircase(most: int) -> TimedShape:
    widths = tuple(w for w in STAIRS if w <= most)
    return TimedShape((widths,), tuple(1e-3 * -(-w // 8) for w in widths))


def of_both() -> TimedShape:
    """Time of the second layer: the product of its widths, in microseconds."""
    widths = (1, 8, 31, 32), (1, 8, 23, 24)
    return TimedShape(widths, tuple(1e-6 * a * b for a in widths[0] for b in widths[1]))


def table(**changes) -> tpp.LatencyTable:
    w1, w2 = Size((1, (0,))), Size((1, (1,)))
    found = tpp.LatencyTable(
        device="a machine",
        groups=tuple(g.name for g in GROUPS),
        sizes=tuple(g.size for g in GROUPS),
        axes=(((32, (0,)),), ((24, (1,)),)),
        shapes=(staircase(32), of_both()),
        layers=(TimedLayer(0, (w1,), 1), TimedLayer(1, (w1, w2), 2)),
        elements=((10, (0,)), (10, (1,))),
        weights=(2.0, 1e-6, 1e-3),
        measured=(Measured((32, 24, 2), 0.013), Measured((16, 12, 2), 0.006)),
    )
    return dataclasses.replace(found, **changes)


def test_the_sum_of_all_parts_is_predicted():
    def by_hand(steps, a, b):
        return 2 * (1e-3 * steps + 2e-6 * a * b) + 1e-6 * 10 * (a + b) + 1e-3

    assert [g.size for g in GROUPS] == [32, 24, 2]
    cases = ((4, 32, 24), (1, 8, 24), (4, 31, 7), (2, 9, 9), (1, 1, 1), (2, 16, 3))
    for steps, a, b in cases:
        found = table().seconds({"w1": a, "w2": b})
        assert found == pytest.approx(by_hand(steps, a, b))
    # Of those that 8 does not divide, the nearest are 9 (two steps) and 17 (three).
    assert table().seconds({"w1": 12}) == pytest.approx(by_hand(2 + 3 / 8, 12, 24))
    assert table().dense_seconds == 0.013


def test_without_channels_a_product_takes_no_time():
    assert table().seconds({"w1": 0}) == pytest.approx(1e-6 * 240 + 1e-3)


def test_widths_that_suit_the_machine_are_interpolated_among_each_other():
    times = {1: 2.0, 8: 8.0, 9: 18.0, 31: 62.0, 32: 32.0}
    own = TimedShape((tuple(times),), tuple(times.values()))
    for width in range(1, 33):
        expected = width if width % 8 == 0 else 2.0 * width
        assert own.at([width]) == pytest.approx(expected)


def test_a_table_is_compared_and_written_as_data():
    text = json.dumps(table().to_json())
    again = tpp.LatencyTable.from_json(json.loads(text))
    assert again == table() and hash(again) == hash(table())
    assert again != table(device="another")
    assert again.seconds({"w1": 5}) == table().seconds({"w1": 5})


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"device": "cpu"},
        table().to_json() | {"sizes": [1]},
        table().to_json() | {"shapes": []},
        table().to_json() | {"measured": []},
    ],
    ids=["empty", "list", "device", "sizes", "shapes", "measured"],
)
def test_other_data_are_refused(content):
    with pytest.raises(TPPError, match="not those of a latency table"):
        tpp.LatencyTable.from_json(content)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_target_is_met_and_one_channel_more_would_miss_it(scope):
    found = table()
    for share in (0.9, 0.5, 0.3):
        plan = tpp.make_plan(GROUPS, PARAMS, latency=share, table=found, scope=scope)
        kept = {g.name: plan.kept_count(g) for g in plan.pruned_groups}
        assert found.seconds(kept) <= share * found.seconds({})
        more = [kept | {name: n + 1} for name, n in kept.items()]
        assert any(found.seconds(one) > share * found.seconds({}) for one in more)


def test_several_targets_are_all_met():
    found = table()
    plan = tpp.make_plan(GROUPS, PARAMS, latency=0.9, flops=0.3, table=found)
    only = tpp.make_plan(GROUPS, PARAMS, flops=0.3)
    assert plan == only
    plan = tpp.make_plan(GROUPS, PARAMS, latency=0.4, flops=0.9, table=found)
    assert plan == tpp.make_plan(GROUPS, PARAMS, latency=0.4, table=found)


def test_costs_are_weighed_against_the_time_that_is_saved():
    ratios, removed = (0.5, 0.75), np.array([[16, 24], [12, 18]])
    costs = np.array([[0.1, 0.2], [10.0, 20.0]])
    curves = tpp.Sensitivity(("w1", "w2"), (32, 24), ratios, removed, costs, 0.0)
    found = table()
    plan = tpp.make_plan(GROUPS, PARAMS, latency=0.6, table=found, sensitivity=curves)
    kept = {g.name: plan.kept_count(g) for g in plan.pruned_groups}
    assert list(kept) == ["w1"]
    assert found.seconds(kept) <= 0.6 * found.seconds({}) < found.seconds({"w1": 17})


def test_where_fewer_channels_are_slower_the_most_that_are_fast_are_kept():
    # 16 channels are fast enough, 9 to 15 are not, and 8 are again.
    times = {1: 3.0, 8: 3.5, 9: 7.0, 15: 7.0, 16: 5.5, 17: 9.0, 31: 9.0, 32: 8.0}
    found = table(
        shapes=(TimedShape((tuple(times),), tuple(times.values())), of_both()),
        layers=(TimedLayer(0, (Size((1, (0,))),), 1),),
        weights=(1.0, 0.0, 0.0),
    )
    for share, expected in ((1.0, 32), (0.99, 24), (0.7, 16), (0.6, 8), (0.4, 1)):
        plan = tpp.make_plan(GROUPS, PARAMS, {"w1": 0.5}, latency=share, table=found)
        assert plan.kept_count(GROUPS["w1"]) == expected


def test_fast_widths_are_the_largest_of_each_step():
    found = table(layers=(TimedLayer(0, (Size((1, (0,))),), 1),), weights=(1.0, 0, 0))
    assert found.fast_widths("w1") == (8, 16, 24, 32)
    assert found.fast_widths("w2") == (24,)  # nothing of it was measured
    both = table(layers=(TimedLayer(1, (Size((1, (0,))), Size((1, (1,)))), 2),))
    assert both.fast_widths("w2") == (1, 8, 16, 23, 24)


def test_counts_are_rounded_up_to_fast_widths():
    found = table(layers=(TimedLayer(0, (Size((1, (0,))),), 1),), weights=(1.0, 0, 0))
    for ratio, expected in ((0.1, 32), (0.25, 24), (0.3, 24), (0.6, 16), (0.9, 8)):
        ratios = {"w1": ratio}
        plan = tpp.make_plan(GROUPS, PARAMS, ratios, round_to="fast", table=found)
        assert plan.kept_count(GROUPS["w1"]) == expected
    plan = tpp.make_plan(
        GROUPS, PARAMS, {"w1": 0.5}, flops=0.6, round_to="fast", table=found
    )
    assert plan.kept_count(GROUPS["w1"]) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0.5}, "latency=0.5 needs the times of this machine: pass table="),
        ({"ratios": 0.5, "round_to": "fast"}, "round_to='fast' needs the times"),
        ({"flops": 0.5, "table": table()}, "neither is given"),
        ({"latency": 0, "table": table()}, r"latency=0 is not in \(0, 1\]"),
        ({"latency": 0.01, "table": table()}, r"of the latency \(\d\.\d+ ms\) remain"),
        (
            {"latency": 0.5, "table": table(sizes=(31, 24, 2))},
            "that of other groups: w1 differ",
        ),
        (
            {"latency": 0.5, "table": table(groups=("v1", "w2", "w3"))},
            "that of other groups: v1, w1 differ",
        ),
        ({"counts": {"w1": 4}, "latency": 0.5, "table": table()}, "would be ignored"),
    ],
    ids=str,
)
def test_the_impossible_is_refused(options, message):
    with pytest.raises(TPPError, match=message):
        tpp.make_plan(GROUPS, PARAMS, **options)


def test_what_is_no_table_is_refused():
    with pytest.raises(TPPTypeError, match="the table is a dict"):
        tpp.make_plan(GROUPS, PARAMS, latency=0.5, table={"w1": 1.0})
    with pytest.raises(TPPError, match="no group 'w9'"):
        table().seconds({"w9": 1})
