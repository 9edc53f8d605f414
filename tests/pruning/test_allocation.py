"""The greedy allocation is compared with the best of all combinations."""

import itertools

import numpy as np
import pytest

from tpp_jax.pruning.allocation import Problem, cheapest_levels


def chain(rng, convex):
    """A chain of four dense layers: groups of 4 to 8 channels, random costs."""
    sizes = rng.integers(4, 9, size=4)
    ends = rng.integers(1, 10, size=2)
    curves = []
    for n in sizes:
        measured = np.unique(
            np.minimum(np.ceil(n * np.array([0, 0.3, 0.6, 0.9])), n - 1)
        )
        rises = rng.exponential(size=len(measured) - 1) * rng.exponential()
        if convex:
            rises = np.sort(rises / np.diff(measured)) * np.diff(measured)
        curves.append(np.interp(np.arange(n), measured, [0, *np.cumsum(rises)]))

    def flops(levels):
        widths = [ends[0], *(sizes - levels), ends[1]]
        return np.dot(widths[1:], widths[:-1])

    dense = flops(np.zeros(4, int))
    fewest = flops(np.array([len(curve) - 1 for curve in curves]))
    wanted = rng.uniform(fewest / dense, 0.9)
    return Problem(
        [np.arange(n) for n in sizes],
        curves,
        lambda levels: np.array([flops(np.array(levels)) / dense]),
        np.array([wanted]),
    )


def cost(problem, levels):
    return sum(c[level] for c, level in zip(problem.curves, levels, strict=True))


def best_cost(problem):
    every = itertools.product(*[range(len(curve)) for curve in problem.curves])
    return min(
        cost(problem, levels)
        for levels in every
        if (problem.shares(levels) <= problem.wanted).all()
    )


@pytest.mark.parametrize("convex", [True, False])
def test_the_cost_is_near_the_least_of_all_combinations(convex):
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(15):
        problem = chain(rng, convex)
        levels = cheapest_levels(problem)
        assert (problem.shares(levels) <= problem.wanted).all()
        gaps.append(cost(problem, levels) / best_cost(problem) - 1)
    assert np.mean(np.array(gaps) < 1e-9) > 0.8  # most are the optimum
    assert np.mean(gaps) < 0.02


def test_it_is_exact_where_every_channel_saves_the_same_and_costs_rise():
    rng = np.random.default_rng(1)
    curves = [np.cumsum([0, *np.sort(rng.exponential(size=6))]) for _ in range(4)]
    for total in range(25):
        problem = Problem(
            [np.arange(7)] * 4,
            curves,
            lambda levels: np.array([1 - sum(levels) / 24]),
            np.array([1 - total / 24 + 1e-9]),
        )
        rises = np.sort(np.concatenate([np.diff(curve) for curve in curves]))
        expected = rises[:total].sum()
        np.testing.assert_allclose(cost(problem, cheapest_levels(problem)), expected)


def test_steps_that_save_nothing_alone_are_taken_if_they_are_needed():
    """Of two branches the costlier one counts: both must be pruned."""
    problem = Problem(
        [np.arange(5)] * 2,
        [np.arange(5.0), 2 * np.arange(5.0)],
        lambda levels: np.array([max(5 - levels[0], 5 - levels[1]) / 5]),
        np.array([0.6]),
    )
    assert cheapest_levels(problem) == [2, 2]


def test_two_targets_are_met():
    problem = Problem(
        [np.arange(9)] * 2,
        [np.arange(9.0), np.arange(9.0)],
        lambda levels: np.array([1 - levels[0] / 10, 1 - levels[1] / 10]),
        np.array([0.7 + 1e-9, 0.4 + 1e-9]),
    )
    assert cheapest_levels(problem) == [3, 6]
