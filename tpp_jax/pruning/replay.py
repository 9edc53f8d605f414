"""A jaxpr run equation by equation, so that what happens on the way can be seen."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import jax
from jax.extend import core as jex_core

from tpp_jax.graph.unfolding import CALLS
from tpp_jax.xla.convolution import convolve

ValueT = TypeVar("ValueT")


def replay(
    jaxpr: Any,
    constants: Sequence[Any],
    arguments: Sequence[ValueT],
    built_in: Callable[[Any], ValueT],
    step: Callable[[Any, list[ValueT]], list[ValueT]],
) -> list[ValueT]:
    """Returns the outputs of a jaxpr; calls (of jitted functions…) are entered.

    Args:
      jaxpr: Computation, not closed.
      constants: Arrays that it closed over.
      arguments: Its arguments: arrays with what is known of them.
      built_in: Function that makes such a value of a constant or a literal.
      step: Function of an equation and its operands that returns the results.
    """
    walk = equations(jaxpr, constants, arguments, built_in)
    results = None
    while True:
        try:
            eqn, values = walk.send(results) if results is not None else next(walk)
        except StopIteration as end:
            return end.value
        results = step(eqn, values)


def equations(
    jaxpr: Any,
    constants: Sequence[Any],
    arguments: Sequence[ValueT],
    built_in: Callable[[Any], ValueT],
) -> Generator[tuple[Any, list[ValueT]], list[ValueT], list[ValueT]]:
    """Yields each equation of a jaxpr with its operands, and is sent the results.

    Args:
      jaxpr: Computation, not closed.
      constants: Arrays that it closed over.
      arguments: Its arguments: arrays with what is known of them.
      built_in: Function that makes such a value of a constant or a literal.

    Returns:
      The outputs. Other values are forgotten after their last use.
    """
    env = dict(zip(jaxpr.constvars, map(built_in, constants), strict=True))
    env |= zip(jaxpr.invars, arguments, strict=True)
    last = dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    for i in reversed(range(len(jaxpr.eqns))):
        for var in _variables(jaxpr.eqns[i].invars):
            last.setdefault(var, i)

    def read(var: Any) -> ValueT:
        return built_in(var.val) if isinstance(var, jex_core.Literal) else env[var]

    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(var) for var in eqn.invars]
        for var in {*_variables(eqn.invars)}:
            if last[var] == i:
                del env[var]
        if eqn.primitive.name in CALLS:
            inner = eqn.params[CALLS[eqn.primitive.name]]
            inside, own = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            outputs = yield from equations(inside, own, values, built_in)
        else:
            outputs = yield eqn, values
        used = zip(eqn.outvars, outputs, strict=True)
        env |= {var: value for var, value in used if var in last}
    return [read(var) for var in jaxpr.outvars]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, jex_core.Literal)]


def evaluate(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
    """Returns the results of an equation; they have no forward-mode derivative."""
    if eqn.primitive.name == "shard_map":
        body = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(eqn.params["jaxpr"], ()))
        specs = tuple(eqn.params["out_specs"])
        return list(over_shards(eqn, lambda *own: tuple(body(*own)), specs, arrays))
    if eqn.primitive.name == "conv_general_dilated":
        return [convolve(*arrays, **eqn.params)]
    results = eqn.primitive.bind(*arrays, **eqn.params)
    return list(results) if eqn.primitive.multiple_results else [results]


def over_shards(
    eqn: Any, body: Callable[..., Any], out_specs: Any, arrays: Sequence[Any]
) -> Any:
    """Returns what a function gives on the shards of a ``shard_map`` equation.

    Args:
      eqn: Equation, whose mesh and division of the operands are taken.
      body: Function of the shards of its operands.
      out_specs: Division of the function's results.
      arrays: Operands.
    """
    params = eqn.params
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=out_specs,
        axis_names=set(params.get("newly_manual_axes", params["mesh"].axis_names)),
        check_vma=params["check_vma"],
    )(*arrays)
