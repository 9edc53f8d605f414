"""Removal of channels from a model: ``prune``, ``check_plan``, ``linen_apply``.

A plan is tried on the model before anything is cut: the model is traced with the widths
of the plan, and must do the same operations on narrower arrays.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.core import Tracer

from tpp_jax.errors import TPPError
from tpp_jax.graph import linen as linen_modules
from tpp_jax.graph.arrays import spread
from tpp_jax.graph.bridge import follow_inputs
from tpp_jax.graph.comparing import Difference
from tpp_jax.graph.functions import Structure, split_module
from tpp_jax.graph.groups import read_groups
from tpp_jax.graph.naming import longest_known_suffix, named_leaves
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.graph.records import Group, Groups
from tpp_jax.pruning.plan import Plan, expect_plan
from tpp_jax.pruning.readiness import check_ready, measure
from tpp_jax.pruning.rescaling import find_rescaling
from tpp_jax.pruning.slicing import slice_tree
from tpp_jax.pruning.source import Source, adapt
from tpp_jax.pruning.trial import blamed

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


@overload
def prune(
    model: ModuleT,
    plan: Plan,
    params: None = None,
    *,
    opt_state: optax.OptState | None = None,
    donate: bool = False,
) -> ModuleT: ...


@overload
def prune(
    model: linen.Module | Callable[..., Any],
    plan: Plan,
    params: Any,
    *,
    opt_state: optax.OptState | None = None,
    donate: bool = False,
) -> Any: ...


def prune(
    model: nnx.Module | linen.Module | Callable[..., Any],
    plan: Plan,
    params: Any = None,
    *,
    opt_state: optax.OptState | None = None,
    donate: bool = False,
) -> Any:
    """Returns the pruned model, or its parameters; the given ones are not modified.

    The plan is tried first, see :func:`check_plan`. This finds a size that is
    hard-coded in a layer, even if the sliced model runs and computes something else.

    If the pruned filters are zero, as they are after TPP, the pruned network computes
    what the given one does, also where a norm runs over the channels. With zeros in
    n - k of n channels a root mean square is √(k/n) times that of the other k, so its
    scale is multiplied by √(n/k), and what it is computed from by √(k/n), so that the
    epsilon counts the same. Such constant factors are found for any traced computation:
    norms of a user's own, queries times keys divided by the root of their size, means
    over channels. The weights of a network that is cut at once are not changed.

    Args:
      model: Model that the plan was made for: NNX module, Linen module or function
        ``fn(params, *inputs)``.
      plan: Plan of the channels to keep; not traced.
      params: Variables of a Linen module, or parameter pytree of a function.
      opt_state: State of the optimizer with TPP's transforms, to check that the pruned
        filters are zero; not modified.
      donate: Whether the parameters are given away, so that the memory of both is never
        needed at once, as in :func:`slice_tree`: the given model cannot be used any
        more. If the plan is refused, it is as it was.

    Returns:
      For an NNX module, a new module of the same class with narrower layers and
      adjusted static sizes. Otherwise the smaller tree: pass it to the function (the
      sizes of an Equinox module in it are adjusted), or to :func:`linen_apply`.

    Raises:
      TPPError: The sliced model does not run or computes something else; the message
        names the groups at fault.

    Warns:
      UserWarning: ``opt_state`` shows that the pruned filters should be zero, and they
        are not; or they are zero, but the cut changes what the network computes: a
        layer norm subtracts a mean over the channels (it is rescaled as if that were
        zero), a softmax runs over them, an activation is not zero at zero.

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
    if not isinstance(model, nnx.Module):
        source = _tried(plan, model, params)
        rescale = _rescaling(plan, source, params, opt_state)
        return rescale(slice_tree(plan, params, donate=donate))
    structure, function = split_module(model)
    source = _tried(plan, model, params, structure)
    named = dict(zip(function.names, function.params, strict=True))
    rescale = _rescaling(plan, source, named, opt_state)
    named = rescale(slice_tree(plan, named, donate=donate))
    small = structure.merge([named[name] for name in function.names])
    adapt(list(modules(small)), plan)
    follow_inputs(small, *plan.groups.inputs, **plan.groups.kwargs)
    return small


def _rescaling(
    plan: Plan, source: Any, params: optax.Params, opt_state: optax.OptState | None
) -> Callable[[Any], Any]:
    """Returns a function of the cut parameters that makes a cut of zeros free.

    It changes nothing if the pruned filters are not zero.

    Warns if the cut changes what the network computes although it should not.
    """
    if opt_state is not None:
        check_ready(opt_state, plan, params)
    groups = plan.pruned_groups
    leaves = [*jax.tree.leaves(params), *plan.kept.values()]
    if not groups or any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in leaves):
        return _unchanged
    # The first filter is cheap to look at, and zero only after TPP.
    zero = _first_is_zero(plan, groups[0], params) and measure(plan, params).all_zero
    if not zero:
        return _unchanged
    found = find_rescaling(plan, source)
    if found.problem is not None:
        warnings.warn(
            "the filters to be cut are zero, but the cut changes what the network "
            f"computes: {found.problem}",
            UserWarning,
            stacklevel=3,
        )
    return functools.partial(found.apply, plan)


def _unchanged(params: Any) -> Any:
    return params


def _first_is_zero(plan: Plan, group: Group, params: Any) -> bool:
    """Reports whether the first pruned filter of a group is zero."""
    member = next(m for m in group.members if m.role == "produced")
    shape = plan.groups.shapes[member.leaf]
    gone = plan.pruned(group.name)[..., 0]
    mask = np.zeros((*gone.shape, shape[member.axis]), bool)
    np.put_along_axis(mask, member.positions[gone], True, axis=-1)
    loop = member.steps if gone.ndim else None
    first = spread(mask, member.axis, loop, range(len(shape)))
    # A mask needs no indexing, which would gather an array that is sharded.
    return not any(
        bool(jnp.any(jnp.where(first, leaf, 0)))
        for name, leaf in named_leaves(params).items()
        if longest_known_suffix(name, plan.groups.shapes) == member.leaf
        and np.shape(leaf) == shape  # slice_tree refuses any other
    )


def check_plan(
    plan: Plan,
    model: nnx.Module | linen.Module | Callable[..., Any] | None = None,
    params: Any = None,
) -> None:
    """Tries a plan on its model, without computing anything.

    The model is traced with the widths of the plan. It must run, return outputs of the
    same shapes, take the same branches of its own code, and do the same operations on
    arrays of the planned widths. ``make_plan``, ``prune`` and ``linen_apply`` call this
    function; call it for a plan that was made by hand or read from a file and is used
    only with ``slice_tree``.

    Args:
      plan: Plan of the channels to keep; not traced.
      model: Model to try the plan on; by default the one that the groups were found
        with.
      params: Parameter pytree of a function, or variables of a Linen module; abstract
        ones are enough.

    Raises:
      TPPError: The plan does not fit the model; the message names the groups at fault.

    Example:
      >>> import jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def net(p, x):
      ...     x = x @ p["w1"]
      ...     if x.shape[-1] % 2:
      ...         raise ValueError("the width must be even")
      ...     return x @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> groups = tpp.channel_groups(net, jnp.ones((1, 4)), params=p)
      >>> check_plan(tpp.Plan.from_dict({"w1": [0, 1]}, groups))
      >>> three = tpp.Plan.from_dict({"w1": [0, 1, 2]}, groups)
      >>> check_plan(three)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      tpp_jax.errors.TPPError: ... 3 of the 8 channels of w1: the width must be even...
    """
    given = split_module(model)[0] if isinstance(model, nnx.Module) else None
    _tried(plan, model, params, given)


def _tried(
    plan: Plan, model: Any, params: Any, structure: Structure | None = None
) -> Source | None:
    """Tries a plan on its model, and returns the model.

    Args:
      plan: Plan of the channels to keep.
      model: Model to try the plan on, or None, as in :func:`check_plan`.
      params: Its parameters.
      structure: Structure of an NNX module.

    Raises:
      TPPError: The plan does not fit the model.
    """
    expect_plan(plan)
    groups = plan.groups
    source = given = _source(groups, model, params, structure)
    if source is None or groups.reading is None:
        groups = _found_again(groups, source)
        source, plan = groups.source, Plan(plan.kept, groups)
    if groups.checked(source, plan.kept):
        return given
    found = blamed(source, plan)
    if found is not None:
        _check_call(source)
        raise _refused(plan, *found)
    groups.note_checked(source, plan.kept)
    return given


def _source(
    groups: Groups, model: Any, params: Any, structure: Structure | None
) -> Source | None:
    """Returns the model to try a plan on: the given one, or that of the groups.

    Raises:
      TPPError: The parameters of the given model are not those of the groups.
    """
    known = groups.source
    if model is None:
        return known
    given = model if structure is None else structure
    if known is not None and known.model == given:
        return known
    if params is None and not isinstance(model, nnx.Module):
        params = known and known.given
    source = Source.of(model, params, groups.inputs, groups.kwargs)
    _check_shapes(source, groups)
    return source


def _refused(plan: Plan, fault: Difference, names: Sequence[str]) -> TPPError:
    """Returns the error for a plan that a model does not work with.

    Args:
      plan: Plan of the channels to keep.
      fault: Difference that the plan causes.
      names: Names of the groups at fault.
    """
    sizes = {name: plan.groups[name] for name in names}
    kept = ", ".join(
        f"{plan.kept_count(group)} of the {group.size} channels of {name}"
        for name, group in list(sizes.items())[:3]
    )
    more = f" and {len(names) - 3} more groups" if len(names) > 3 else ""
    line = f" ({fault.line})" if fault.line else ""
    return TPPError(
        f"the model does not work with {kept}{more}: {fault.text}{line}. Keep other "
        "numbers of these channels, or skip the layer"
    )


def _check_shapes(source: Source, groups: Groups) -> None:
    """Raises if the parameters of a model are not those of the groups."""
    function = source.function
    for name, leaf in zip(function.names, function.params, strict=True):
        twin = function.namesakes.get(name, "")
        shape = groups.shapes.get(name, groups.shapes.get(twin))
        if leaf.shape != shape:
            planned = "is missing" if shape is None else f"has the shape {shape}"
            raise TPPError(
                f"the plan is for another model: {name} has the shape {leaf.shape} "
                f"here, but in the planned model it {planned}"
            )


def _check_call(source: Source) -> None:
    """Raises if even the unpruned model cannot be called with the groups' inputs."""
    try:
        source.trace()
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise TPPError(
            "the model cannot be called with the inputs that the groups were found "
            f"with: {text}. Find the groups with the model itself and all of its "
            "arguments, as in channel_groups(model, x, train=False)"
        ) from error


def _found_again(groups: Groups, source: Source | None) -> Groups:
    """Returns the groups of a plan from a pickle, read off their model again."""
    if source is None:
        raise TPPError(
            "this plan comes from a pickle, which does not contain its model: pass the "
            "model, as in check_plan(plan, model, params)"
        )
    found, _ = read_groups(source.trace(), source.inputs, joined=groups.joined)
    reasons = {i: g.reason for i, g in enumerate(groups) if g.reason}
    found = found.with_verdict(reasons, groups.sizes, source)
    if found != groups:
        raise TPPError("the plan is for another model, which has other groups")
    return found


def linen_apply(module: linen.Module, plan: Plan | None = None) -> Callable[..., Any]:
    """Returns ``module.apply`` for variables of any width.

    Args:
      module: Linen module. With its own variables, the result is that of
        ``module.apply``.
      plan: Plan that the variables were sliced by. It is tried on the module, see
        :func:`check_plan`, and determines sizes that do not follow from the shapes of
        arrays: the groups of a ``GroupNorm``, a number of heads. Without a plan nothing
        is tried.

    Returns:
      A function with the arguments of ``module.apply``, which also takes sliced
      variables.

    Raises:
      TPPError: The plan does not fit the module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
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
