"""Taking channels out of a model: ``prune``, ``check_plan``, ``linen_apply``.

What a plan says is tried on the model before anything is cut: the model is traced with
the widths that the plan leaves and must do the same operations on them.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from tpp_jax.errors import TPPError
from tpp_jax.graph import linen as linen_modules
from tpp_jax.graph.bridge import follow_inputs
from tpp_jax.graph.groups import read_groups
from tpp_jax.graph.naming import longest_known_suffix, named_leaves
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.plan import Plan, expect_plan
from tpp_jax.pruning.readiness import check_ready, measure
from tpp_jax.pruning.slicing import slice_tree
from tpp_jax.pruning.source import Source, adapt
from tpp_jax.pruning.trial import blamed


@overload
def prune(
    model: nnx.Module, plan: Plan, params: None = None, *, opt_state: Any = None
) -> nnx.Module: ...


@overload
def prune(
    model: linen.Module | Callable[..., Any],
    plan: Plan,
    params: Any,
    *,
    opt_state: Any = None,
) -> Any: ...


def prune(model: Any, plan: Plan, params: Any = None, *, opt_state: Any = None) -> Any:
    """Returns a smaller model; the given one is untouched.

    The cut is tried first, see :func:`check_plan`: so a size that a layer has written
    into it is found here, even where the sliced model would run and compute something
    else.

    Args:
      model: the model that the plan was made for: an NNX module, a Linen module or a
        function ``fn(params, *inputs)``.
      plan: what is pruned; concrete.
      params: the variables of a Linen module, the parameter tree of a function.
      opt_state: the state of the optimizer that TPP's transforms are chained into, if
        the cut is to be checked against it; it is not changed.

    Returns:
      For an NNX module a new one of the same class with narrower layers, whose static
      sizes follow. Otherwise the smaller tree: a function takes it as it is (an Equinox
      module in it has its sizes set), a Linen module through :func:`linen_apply`.

    Raises:
      TPPError: the sliced model does not run or computes something else; the groups at
        fault are named.

    Warns:
      UserWarning: by ``opt_state`` the filters that are cut should be zero and are not;
        or they are zero, but a norm or another reduction over their channels takes
        their absence for something else.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     return jax.nn.relu(x @ p["w1"]) @ p["w2"]
      >>> p = {"w1": jnp.arange(32.0).reshape(4, 8), "w2": jnp.ones((8, 2))}
      >>> groups = tpp.channel_groups(net, jnp.ones((1, 4)), params=p)
      >>> plan = tpp.make_plan(groups, p, 0.5)
      >>> small = prune(net, plan, p)
      >>> small["w1"].shape, net(small, jnp.ones((1, 4))).shape
      ((4, 4), (1, 2))
    """
    check_plan(plan, model, params)
    if not isinstance(model, nnx.Module):
        _warn(plan, params, opt_state)
        return slice_tree(plan, params)
    graphdef, state = nnx.split(model)
    _warn(plan, state, opt_state)
    small = nnx.merge(graphdef, slice_tree(plan, state))
    adapt(small, plan)
    follow_inputs(small, *plan.groups.inputs, **plan.groups.kwargs)
    return small


def _warn(plan: Plan, params: Any, opt_state: Any) -> None:
    """Warns where TPP was to make a cut free that is not."""
    if opt_state is not None:
        check_ready(opt_state, plan, params)
    reduced = [group for group in plan.pruned_groups if group.reduced]
    leaves = [*jax.tree.leaves(params), *plan.kept.values()]
    if not reduced or any(
        isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in leaves
    ):
        return
    # One filter tells a cut at once, which nobody takes for free, from TPP's.
    if _first_is_zero(plan, reduced[0], params) and measure(plan, params).all_zero:
        names = ", ".join(group.name for group in reduced[:3])
        warnings.warn(
            "the filters to be cut are zero, but a norm, softmax or other reduction "
            f"runs over the channels of {names}: it does not take "
            "their absence for zeros, so the cut changes what the network computes",
            UserWarning,
            stacklevel=3,
        )


def _first_is_zero(plan: Plan, group: Group, params: Any) -> bool:
    """Reports whether the first filter of a group that goes is zero."""
    member = next(m for m in group.members if m.role == "produced")
    there = np.zeros(plan.groups.shapes[member.leaf][member.axis], bool)
    there[member.positions[plan.pruned(group.name)[0]]] = True
    shape = [1] * len(plan.groups.shapes[member.leaf])
    shape[member.axis] = -1
    # All of it is looked at where it is: an array may be sharded.
    return not any(
        bool(jnp.any(jnp.where(there.reshape(shape), leaf, 0)))
        for name, leaf in named_leaves(params).items()
        if longest_known_suffix(name, plan.groups.shapes) == member.leaf
    )


def check_plan(
    plan: Plan,
    model: nnx.Module | linen.Module | Callable[..., Any] | None = None,
    params: Any = None,
) -> None:
    """Tries a plan on its model, without computing anything.

    The model is traced with the widths that the plan leaves: it must run, give outputs
    of the same shapes, take the same branches of its own code, and do the same
    operations on arrays as narrow as planned. ``make_plan``, ``prune`` and
    ``linen_apply`` do this; call it for a plan that was made by hand or read from a
    file and is used with ``slice_tree`` alone.

    Args:
      plan: what is pruned; concrete.
      model: the model; the one that the groups were found with if not given.
      params: as for :func:`tpp_jax.channel_groups`, for a model that is given and is no
        NNX module.

    Raises:
      TPPError: the plan does not fit the model; the groups at fault are named.
    """
    expect_plan(plan)
    groups = plan.groups
    source = groups.source
    if model is not None:
        given = model if not isinstance(model, nnx.Module) else nnx.graphdef(model)
        if source is None or source.model != given:
            if params is None and not isinstance(model, nnx.Module):
                params = source and source.given
            source = Source.of(model, params, groups.inputs, groups.kwargs)
            _check_shapes(source, groups)
    if source is None or groups.reading is None:
        groups = _found_again(groups, source)
        source, plan = groups.source, Plan(plan.kept, groups)
    if groups.checked(source, plan.kept):
        return
    found = blamed(source, plan)
    if found is not None:
        fault, names = found
        _check_call(source)
        left = ", ".join(
            f"{plan.kept_count(groups[name])} of the {groups[name].size} channels of "
            f"{name}"
            for name in names[:3]
        )
        more = f" and {len(names) - 3} groups more" if len(names) > 3 else ""
        line = f" ({fault.line})" if fault.line else ""
        raise TPPError(
            f"the model does not hold with {left}{more}: {fault.text}{line}. Leave "
            "other numbers of these channels, or skip the layer"
        )
    groups.note_checked(source, plan.kept)


def _check_shapes(source: Source, groups: Groups) -> None:
    """Raises if a model has other parameters than the one of the groups."""
    function = source.function
    for name, leaf in zip(function.names, function.params, strict=True):
        twin = function.namesakes.get(name, "")
        shape = groups.shapes.get(name, groups.shapes.get(twin))
        if leaf.shape != shape:
            planned = "is not there" if shape is None else f"has the shape {shape}"
            raise TPPError(
                f"the plan is of another model: {name} has the shape {leaf.shape} "
                f"here, and in the planned model it {planned}"
            )


def _check_call(source: Source) -> None:
    """Raises if even the unpruned model cannot be called with the groups' inputs."""
    try:
        source.trace()
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise TPPError(
            "the model cannot be called with the inputs that the groups were found "
            f"with: {text}. Find the groups with the model itself, giving all its "
            "arguments, as in channel_groups(model, x, train=False)"
        ) from error


def _found_again(groups: Groups, source: Source | None) -> Groups:
    """Reads groups that come from a pickle off their model again."""
    if source is None:
        raise TPPError(
            "this plan comes from a pickle, which does not hold its model: give the "
            "model, as in check_plan(plan, model, params)"
        )
    found, _ = read_groups(source.trace(), source.inputs, joined=groups.joined)
    reasons = {i: g.reason for i, g in enumerate(groups) if g.reason}
    found = found.with_verdict(reasons, groups.sizes, source)
    if found != groups:
        raise TPPError("the plan is of another model: its groups are others")
    return found


def linen_apply(module: linen.Module, plan: Plan | None = None) -> Callable[..., Any]:
    """Returns ``module.apply`` for variables of any width.

    Args:
      module: a Linen module; for the variables that it was made with, the result is
        that of ``module.apply``.
      plan: the plan that the variables were sliced by. It is tried on the module, see
        :func:`check_plan`, and sizes that the arrays do not tell follow it: the groups
        of a ``GroupNorm``, a number of heads. Without a plan nothing is tried.

    Returns:
      A function with the arguments of ``module.apply``, for sliced variables too.

    Raises:
      TPPError: the plan does not fit the module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> module = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(2)])
      >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> small = jax.tree.map(lambda x: x, variables)
      >>> first, last = small["params"]["layers_0"], small["params"]["layers_2"]
      >>> first.update(kernel=first["kernel"][:, :5], bias=first["bias"][:5])
      >>> last.update(kernel=last["kernel"][:5])
      >>> linen_apply(module)(small, jnp.ones((1, 4))).shape
      (1, 2)
    """
    if plan is not None and plan.pruned_groups:
        check_plan(plan, module)
    return functools.wraps(module.apply)(linen_modules.linen_apply(module, plan))
