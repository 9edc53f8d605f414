"""A jaxpr unfolded into a flat list of equations over numbered values.

Nested calls (``jit``, ``custom_jvp``, ``remat``…), loops, branches and the bodies of
``shard_map`` are entered, so that readers of the list see plain primitives only.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex_core

from tpp_jax.errors import TPPError

# Calls that only wrap another jaxpr: the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "composite": "jaxpr",
}

ENTERED = frozenset({*CALLS, "scan", "while", "cond", "shard_map"})
"""Primitives in whose place the operations inside them are listed."""

LASTING = frozenset({"join", "decide"})
"""Operations that matter even if no result of theirs is read."""

# A language model of a hundred unrolled layers has some ten thousand equations.
MOST_EQUATIONS = 2_000_000

# Primitives whose result is equal on all shards along some axes of the mesh: the
# parameter that names these axes.
_MADE_ALIKE = {
    "psum_invariant": "axes",
    "all_gather_invariant": "axis_name",
    "pmax": "axes",
    "pmin": "axes",
}


class Equation(NamedTuple):
    """One primitive applied to numbered values; ``None`` is a scalar literal.

    In addition to JAX's primitives there are six that come from unfolding:
    ``loop_slice`` takes one step's part of an array (without its first axis),
    ``loop_stack`` puts the parts together again, ``join`` is one value of several
    sources, ``decide`` reads the value that a branch or another step depends on,
    ``shard`` is one device's part of an array and ``unshard`` puts these parts
    together. Their parameter ``shards`` is the number of parts along each axis.

    Attributes:
      primitive: Name of the primitive.
      inputs: Value numbers of the operands.
      outputs: Value numbers of the results.
      params: Parameters of the primitive, as in the jaxpr.
      source: Place in the source code, as JAX records it; see
        :func:`tpp_jax.graph.tracing.source_line`.
      times: Number of times that it runs: steps of a ``scan``, shards of a
        ``shard_map``.
      branches: Branches of ``cond`` that it is in, from the outermost inwards: pairs of
        a number of the ``cond`` and a number of the branch.
      endless: Whether it is in a ``while``, whose number of steps is not known;
        ``times`` is then the number in one step.
      scalars: For each operand that is a literal, its value; None for the others, and
        for a literal that a loop carries on from.
    """

    primitive: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    source: Any = None
    times: int = 1
    branches: tuple[tuple[int, int], ...] = ()
    endless: bool = False
    scalars: tuple[Any, ...] = ()

    def operand(self, i: int) -> int:
        """Returns the value number of an operand that is no literal."""
        value = self.inputs[i]
        assert value is not None
        return value


class Scalar(NamedTuple):
    """A literal in the code, in place of the number of a value."""

    value: Any


Value = int | Scalar | None
"""Number of a value, or a literal; None for a literal that is not known."""


class Builder:
    """Numbers values and unfolds calls while it goes through a jaxpr.

    Attributes:
      shapes: Shape of every value, by number.
      dtypes: Type of every value's numbers, by number.
      equations: Primitives in order of execution.
      constants: Value numbers of the arrays that inner functions closed over.
      literals: Literals in the code; see :attr:`tpp_jax.graph.tracing.Trace.literals`.
      origin: Parameter leaves that each value is computed from; None if it depends on
        an input of the model.
      loops: For each ``scan``, the numbers of the values that all of its steps have in
        common or that one hands on to the next.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[Any] = []
        self.equations: list[Equation] = []
        self.constants: list[int] = []
        self.literals: list[tuple[Any, Any, int]] = []
        self.origin: dict[int, tuple[str, ...] | None] = {}
        self.loops: list[tuple[int, ...]] = []
        self._unions: dict[tuple[Any, Any], tuple[str, ...]] = {}
        self._source: Any = None
        self._caller: Any = None
        self._times = 1
        self._branches: tuple[tuple[int, int], ...] = ()
        self._endless = False
        self._conds = 0
        # Inside a shard_map: the sizes of the mesh's axes, and the axes along which a
        # value differs from shard to shard.
        self._mesh: dict[str, int] = {}
        self._varying: dict[int | None, frozenset[str]] = {}

    def number(self, var: Any, origin: tuple[str, ...] | None = None) -> int:
        """Returns the number of a new value, which a variable of a jaxpr stands for."""
        self.shapes.append(_shape(var))
        self.dtypes.append(_dtype(var))
        n = len(self.shapes) - 1
        self.origin[n] = origin
        return n

    def unfold(self, jaxpr: Any, known: dict[Any, Value]) -> list[Value]:
        """Adds the equations of a jaxpr; returns the numbers of its results.

        Args:
          jaxpr: Jaxpr whose equations are added.
          known: Value number of each variable that is no result of an equation; those
            of the others are added.
        """
        caller, literal = self._caller, jex_core.Literal
        for eqn in jaxpr.eqns:
            self._source = caller or eqn.source_info
            inputs = [
                self._literal(var) if isinstance(var, literal) else known[var]
                for var in eqn.invars
            ]
            name = eqn.primitive.name
            if name in ENTERED:
                outputs = self._enter(name, eqn, inputs)
            else:
                outputs = self._plain(name, eqn, inputs)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [
            self._literal(var) if isinstance(var, literal) else known[var]
            for var in jaxpr.outvars
        ]

    def _enter(self, name: str, eqn: Any, inputs: list[Value]) -> Sequence[Value]:
        match name:
            case "scan":
                return self._scan(eqn, inputs)
            case "while":
                return self._while(eqn, inputs)
            case "cond":
                return self._cond(eqn, inputs)
            case "shard_map" if "in_specs" in eqn.params:
                return self._shard_map(eqn, inputs)
            case "shard_map":
                return self._plain(name, eqn, inputs)
        before = self._caller
        # JAX caches the jaxpr of a jitted function, with the lines of its first call.
        # So the line of this call is its source.
        self._caller = self._source if name in ("jit", "pjit") else before
        outputs = self._call(eqn.params[CALLS[name]], inputs)
        self._caller = before
        return outputs

    def _plain(self, name: str, eqn: Any, inputs: list[Value]) -> list[int]:
        """Adds an equation of a jaxpr that is not entered."""
        shapes = [_shape(var) for var in eqn.outvars]
        outputs = self._equation(name, inputs, shapes, eqn.params)
        if outputs:
            self.dtypes[outputs[0] :] = [_dtype(var) for var in eqn.outvars]
        return outputs

    def _equation(
        self,
        name: str,
        operands: Sequence[Value],
        shapes: list[tuple[int, ...]],
        params: dict[str, Any] | None = None,
    ) -> list[int]:
        inputs = [n if isinstance(n, int) else None for n in operands]
        scalars: list[Any] = [None] * len(operands)
        if None in inputs:
            scalars = [n.value if isinstance(n, Scalar) else None for n in operands]
        origin, params = self._origin_of(inputs), params or {}
        first = len(self.shapes)
        self.shapes += shapes
        # What unfolding adds moves numbers, and leaves their type.
        known = next((n for n in inputs if n is not None), None)
        self.dtypes += [None if known is None else self.dtypes[known]] * len(shapes)
        outputs = list(range(first, len(self.shapes)))
        for n in outputs:
            self.origin[n] = origin
        times = self._times
        if self._mesh:
            varying = frozenset().union(*(self._varying.get(n, ()) for n in inputs))
            if name == "axis_index":
                varying |= set(_axis_names(params["axis_name"]))
            times *= math.prod(self._mesh[axis] for axis in varying)
            if name in _MADE_ALIKE:
                varying -= set(_axis_names(params[_MADE_ALIKE[name]]))
            self._varying.update(dict.fromkeys(outputs, varying))
        self.equations.append(
            Equation(
                name,
                tuple(inputs),
                tuple(outputs),
                params,
                self._source,
                times,
                self._branches,
                self._endless,
                tuple(scalars),
            )
        )
        return outputs

    def _call(self, closed: Any, inputs: list[Value]) -> list[Value]:
        inner = getattr(closed, "jaxpr", closed)
        scope: dict[Any, Value] = dict(zip(inner.invars, inputs, strict=True))
        for var in inner.constvars:
            scope[var] = constant = self.number(var, ())
            self.constants.append(constant)
        return self.unfold(inner, scope)

    def _join(self, sources: Sequence[Value]) -> Value:
        """Adds one value in place of several that must have the same channels."""
        known = [n for n in sources if isinstance(n, int)]
        if not known or len(sources) < 2:
            return known[0] if known else None
        return self._equation("join", sources, [self.shapes[known[0]]])[0]

    def _decide(self, value: Value) -> None:
        """Adds the use of a value by which a branch is chosen, or a loop ends."""
        if isinstance(value, int):
            self._equation("decide", [value], [()])

    def _carried(self, first: list[Value], last: list[Value]) -> list[Value]:
        """Returns what a loop carries, from its operands and results."""
        return [self._join(pair) for pair in zip(first, last, strict=True)]

    def _scan(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        n_consts, n_carry = scan_parts(eqn)
        carry, stacked = inputs[n_consts:][:n_carry], inputs[n_consts + n_carry :]
        parts = [
            self._equation("loop_slice", [n], [self.shapes[n][1:]])[0]
            if isinstance(n, int)
            else None
            for n in stacked
        ]
        before = self._times
        self._times *= eqn.params["length"]
        arguments = [*inputs[:n_consts], *_unknown(carry), *parts]
        results = self._call(eqn.params["jaxpr"], arguments)
        self._times = before
        crossing = [*arguments[: n_consts + n_carry], *results[:n_carry]]
        self.loops.append(tuple(n for n in crossing if isinstance(n, int)))
        outputs = self._carried(carry, results[:n_carry])
        for result, var in zip(results[n_carry:], eqn.outvars[n_carry:], strict=True):
            shape = _shape(var)
            sources = [result] if isinstance(result, int) else []
            outputs += self._equation("loop_stack", sources, [shape])
        return outputs

    def _while(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = inputs[n_cond + n_body :]
        inside = _unknown(carry)
        before = self._endless
        self._endless = True
        self._decide(*self._call(eqn.params["cond_jaxpr"], [*inputs[:n_cond], *inside]))
        body = [*inputs[n_cond:][:n_body], *inside]
        results = self._call(eqn.params["body_jaxpr"], body)
        self._endless = before
        return self._carried(carry, results)

    def _cond(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        self._decide(inputs[0])
        before, number = self._branches, self._conds
        self._conds += 1
        found = []
        for i, branch in enumerate(eqn.params["branches"]):
            self._branches = (*before, (number, i))
            found.append(self._call(branch, inputs[1:]))
        self._branches = before
        return [self._join(list(sources)) for sources in zip(*found, strict=True)]

    def _shard_map(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        before = self._mesh
        sizes = dict(eqn.params["mesh"].shape)
        self._mesh = before | sizes
        body = eqn.params["jaxpr"]
        parts = []
        for n, spec in zip(inputs, eqn.params["in_specs"], strict=True):
            names = _axes_of(spec)
            if isinstance(n, int) and any(names):
                shape = self.shapes[n]
                shards = _shards(names, sizes, len(shape))
                shape = tuple(a // b for a, b in zip(shape, shards, strict=True))
                [n] = self._equation("shard", [n], [shape], {"shards": shards})
                self._varying[n] = frozenset(name for some in names for name in some)
            parts.append(n)
        results = self._call(body, parts)
        self._mesh = before
        outputs: list[Value] = []
        for n, spec, var in zip(
            results, eqn.params["out_specs"], eqn.outvars, strict=True
        ):
            names = _axes_of(spec)
            if isinstance(n, int) and any(names):
                shape = _shape(var)
                shards = _shards(names, sizes, len(shape))
                [n] = self._equation("unshard", [n], [shape], {"shards": shards})
            outputs.append(n)
        return outputs

    def _literal(self, var: Any) -> Scalar:
        # The next number is that of the result, or in a call of the first one.
        self.literals.append((var.val, self._source, len(self.shapes)))
        return Scalar(var.val)

    def _origin_of(self, inputs: Sequence[int | None]) -> tuple[str, ...] | None:
        found: tuple[str, ...] = ()
        for n in inputs:
            if n is None:
                continue
            origin = self.origin[n]
            if origin is None:
                return None
            if found and origin and found is not origin:
                key = found, origin
                if key not in self._unions:
                    self._unions[key] = tuple(dict.fromkeys((*found, *origin)))
                found = self._unions[key]
            else:
                found = found or origin
        return found


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())


def _dtype(var: Any) -> Any:
    return getattr(var.aval, "dtype", None)


def _unknown(carry: list[Value]) -> list[Value]:
    """Returns what a loop carries, without the literals that it starts from."""
    return [n if isinstance(n, int) else None for n in carry]


def scan_parts(eqn: Any) -> tuple[int, int]:
    """Returns how many operands of a ``scan`` are constant, and how many it carries.

    The others are stacked. How the operands are counted differs between versions of
    JAX; what is stacked has one axis more outside the body than inside.
    """
    body = eqn.params["jaxpr"].jaxpr
    n_stacked = _count_other_ranks(eqn.invars, body.invars)
    n_carry = len(eqn.outvars) - _count_other_ranks(eqn.outvars, body.outvars)
    return len(eqn.invars) - n_carry - n_stacked, n_carry


def check_length(jaxpr: Any) -> None:
    """Refuses a computation that would be too long when unfolded.

    A jaxpr holds a jitted function once, however often it is called: two calls of a
    function that calls another twice, and so on, are few lines, and 2^n equations.

    Args:
      jaxpr: Jaxpr of the computation.

    Raises:
      TPPError: It has more than two million equations.
    """
    length = _length(jaxpr, {})
    if length > MOST_EQUATIONS:
        raise TPPError(
            f"the model's computation is too long: with all calls of jitted functions "
            f"written out it has {length:,} operations, and {MOST_EQUATIONS:,} are the "
            "most that are read. Find the groups of its parts instead"
        )


def _length(jaxpr: Any, known: dict[int, int]) -> int:
    if id(jaxpr) not in known:
        known[id(jaxpr)] = len(jaxpr.eqns) + sum(
            _length(inner, known)
            for eqn in jaxpr.eqns
            if eqn.primitive.name in ENTERED
            for inner in _entered(eqn)
        )
    return known[id(jaxpr)]


def _entered(eqn: Any) -> Iterator[Any]:
    """Yields the jaxprs inside an equation that are unfolded."""
    name, params = eqn.primitive.name, eqn.params
    match name:
        case name if name in CALLS:
            inner = [params[CALLS[name]]]
        case "scan" | "shard_map":
            inner = [params["jaxpr"]]
        case "while":
            inner = [params["cond_jaxpr"], params["body_jaxpr"]]
        case "cond":
            inner = params["branches"]
        case _:
            return
    for closed in inner:
        yield getattr(closed, "jaxpr", closed)


def _axes_of(spec: Any) -> list[tuple[str, ...]]:
    """Returns the mesh's axes along each axis of an array, from a PartitionSpec."""
    return [_axis_names(entry) for entry in spec]


def _axis_names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    names = entry if isinstance(entry, (tuple, list, set, frozenset)) else (entry,)
    return tuple(name for name in names if isinstance(name, str))


def _shards(
    names: list[tuple[str, ...]], sizes: dict[str, int], rank: int
) -> tuple[int, ...]:
    """Returns the number of parts that each axis of an array is split into."""
    shards = [math.prod(sizes[name] for name in some) for some in names]
    return tuple([*shards, *[1] * rank][:rank])


def _count_other_ranks(outside: list[Any], inside: list[Any]) -> int:
    """Returns how many variables of two lists have different numbers of axes."""
    pairs = zip(outside, inside, strict=True)
    return sum(np.ndim(a.aval) != np.ndim(b.aval) for a, b in pairs)
