"""A run of a model that sums up what its kernels read along the channels of groups."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex_core
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from tpp_jax.graph.unfolding import check_length, scan_parts
from tpp_jax.pruning.consumers import (
    Place,
    Reading,
    Tag,
    Windows,
    by_output,
    moved,
    paired,
    read_convolution,
    read_dot,
    read_ragged,
    weights_of,
)
from tpp_jax.pruning.findings import GAIN, INVERSE, STREAM, Findings, Value
from tpp_jax.pruning.replay import evaluate, over_shards, replay
from tpp_jax.pruning.sums import Sums, combined, merge, sums_of
from tpp_jax.pruning.windows import PatchSums
from tpp_jax.xla.holding import held

# Larger parameters are no biases; they are followed only if they are kernels.
_LARGEST_BIAS = 1 << 20


def run(
    call: Callable[..., Any],
    names: Sequence[str],
    wanted: Mapping[str, Collection[int]],
    is_diagonal: Callable[[int], bool],
    enough: int | None,
    findings: Findings,
    params: Any,
    inputs: tuple[Any, ...],
    centres: Mapping[Place, Any],
    first: Any = True,
) -> dict[Place, Sums | PatchSums]:
    """Returns the sums of what each consumer reads in one call.

    Args:
      call: Function ``call(params, *inputs)``.
      names: Names of the parameters' leaves.
      wanted: Name of a parameter → axes that channels of interest run along.
      is_diagonal: Function of a number of features that says whether only the variances
        are summed up.
      enough: Number of rows for each feature of a window that are enough.
      findings: Record of what is found on the way; modified.
      params: Parameters.
      inputs: Inputs.
      centres: Means of the channels of what windows read in the first call.
      first: Whether this call is the first; a traced boolean.
    """
    closed = jax.make_jaxpr(call)(params, *inputs)
    check_length(closed.jaxpr)
    findings.uses.clear()  # batches of another shape are traced too
    leaves = dict(zip(names, jax.tree.leaves(params), strict=True))
    shapes = {name: jnp.shape(leaf) for name, leaf in leaves.items()}
    windows = Windows(centres, first, enough, {})
    numbers = itertools.count()
    probe = _Probe(shapes, wanted, is_diagonal, findings, numbers, {}, {}, windows)
    arguments = []
    for name, leaf in leaves.items():
        small = jnp.size(leaf) <= _LARGEST_BIAS or name in wanted
        tag = None
        if small and jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            index = np.arange(jnp.size(leaf), dtype=_dtype(jnp.size(leaf)))
            tag = Tag("parameter", name, index.reshape(jnp.shape(leaf)))
        arguments.append(Value(leaf, tag, False))
    arguments += [Value(leaf, None, True) for leaf in jax.tree.leaves(inputs)]
    for value in probe.replay(closed.jaxpr, closed.consts, arguments):
        probe.spend(value)
    sums = {Place(key): sums for key, sums in probe.sums.items()}
    return sums | windows.sums


def _dtype(size: int) -> Any:
    return np.int32 if size < 1 << 31 else np.int64


@dataclasses.dataclass
class _Probe:
    """Runs a jaxpr and sums up what kernels read; one for each level of loops.

    Attributes:
      shapes: Name of a parameter → its shape.
      wanted, is_diagonal, findings: See :func:`run`.
      numbers: Numbers of loops, shared by all levels.
      sums: Key of a consumer → its sums.
      loops: Key of a consumer → the loops whose steps its stacks are, those of this
        level and outside of it.
      windows: Sums over patches; None in a loop or branch.
    """

    shapes: Mapping[str, tuple[int, ...]]
    wanted: Mapping[str, Collection[int]]
    is_diagonal: Callable[[int], bool]
    findings: Findings
    numbers: Any
    sums: dict[str, Sums]
    loops: dict[str, tuple[int, ...]]
    windows: Windows | None

    def inside(self) -> "_Probe":
        """Returns a probe for the body of a loop or branch."""
        return dataclasses.replace(self, sums={}, loops={}, windows=None)

    def replay(
        self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Value]
    ) -> list[Value]:
        """Returns the outputs of a jaxpr."""
        return replay(jaxpr, constants, arguments, _built_in, self._step)

    def spend(self, value: Value) -> None:
        """Notes that a value is read in a way that is not understood."""
        if value.tag is not None:
            self.findings.spent.add((value.tag.kind, value.tag.name))
            if value.factor is not None:
                self._note_outputs(GAIN, value.tag, value.factor[None])

    def _note_outputs(self, what: str, tag: Tag, rows: Array) -> None:
        """Sums up rows of numbers of which a kernel's outputs have one each."""
        stacks = len(self.findings.weights[tag.name].stacks) // math.prod(tag.steps)
        rows = rows.reshape(len(rows), stacks, -1).transpose(1, 0, 2)
        if what == INVERSE:
            squares = jnp.square(rows.astype(jnp.float32)).mean(2, keepdims=True)
            rows = jnp.where(squares > 0, 1 / squares, 0)
        self._add(what + tag.name, sums_of(rows, diagonal=True), tag.loops)

    def _step(self, eqn: Any, values: list[Value]) -> list[Value]:
        match eqn.primitive.name:
            case "scan":
                return self._scan(eqn, values)
            case "while":
                return self._while(eqn, values)
            case "cond":
                return self._cond(eqn, values)
            case "shard_map":
                return self._shard_map(eqn, values)
            case "dot_general" | "conv_general_dilated" | "ragged_dot_general":
                product = self._product(eqn, values)
                if product is not None:
                    return [product]
            case "add" | "sub" | "mul" | "div":
                behind = self._added(eqn, values) or self._behind(eqn, values)
                if behind is not None:
                    return [behind]
        if len(values) == 1 and values[0].tag is not None:
            tags = moved(eqn, values[0].tag)
            if tags:
                results = self._plain(eqn, values, ())
                pairs = zip(results, tags, strict=True)
                factor = values[0].factor
                return [v._replace(tag=tag, factor=factor) for v, tag in pairs]
        return self._plain(eqn, values, values)

    def _plain(
        self, eqn: Any, values: list[Value], spent: Sequence[Value]
    ) -> list[Value]:
        for value in spent:
            self.spend(value)
        results = evaluate(eqn, [value.array for value in values])
        varies = any(value.varies for value in values)
        return [Value(result, None, varies) for result in results]

    def _product(self, eqn: Any, values: list[Value]) -> Value | None:
        """Returns the result of a product with a kernel of interest."""
        for operand in (1, 0):
            tag, other = values[operand].tag, values[1 - operand]
            if tag is None or tag.kind != "parameter" or tag.name not in self.wanted:
                continue
            floats = jnp.issubdtype(other.array.dtype, jnp.floating)
            empty = 0 in self.shapes[tag.name]  # a removed branch computes nothing
            if not other.varies or not floats or empty:
                continue
            array, reading = _replicated(other.array), None
            match eqn.primitive.name:
                case "dot_general":
                    reading = read_dot(eqn, operand, tag, array)
                case "ragged_dot_general" if operand == 1:
                    reading = read_ragged(eqn, tag, array, values[2].array)
                case "conv_general_dilated" if operand == 1:
                    if eqn.params["batch_group_count"] == 1:
                        reading = read_convolution(eqn, tag, array)
            key = reading and self._note(tag, reading)
            if reading and key:
                self.spend(other)
                [result] = self._plain(eqn, values, ())
                if reading.made is None:
                    return result
                return result._replace(tag=Tag("product", key, reading.made, tag.loops))
        return None

    def _note(self, tag: Tag, reading: Reading) -> str | None:
        """Sums up what a kernel reads; returns the consumer's key."""
        shape, axes = self.shapes[tag.name], self.wanted[tag.name]
        weights = weights_of(tag.name, shape, reading.index, axes)
        if weights is None or not weights.positions:
            return None
        digest = hashlib.sha256()
        for part in (weights.stacks, weights.features, weights.outputs):
            digest.update(np.ascontiguousarray(part, np.int64).tobytes() + b"|")
        key = f"{tag.name}|{digest.hexdigest()[:16]}"
        self.findings.weights[key] = weights
        self.findings.uses[key] = self.findings.uses.get(key, 0) + 1
        self.findings.steps[key] = math.prod(tag.steps)
        diagonal = self.is_diagonal(len(weights.features))
        if reading.patches is not None and self.windows is not None:
            images, lines, groups = reading.patches
            place = Place(key, lines, groups)
            if place not in self.windows.sums:
                # The sums have several passes: none shall repeat the layers before.
                self.windows.note(place, held(images), diagonal)
                return key
        sums = reading.sums(diagonal)
        self._add(key, sums, tag.loops)
        return key

    def _add(self, key: str, sums: Sums, loops: tuple[int, ...]) -> None:
        known = self.sums.get(key)
        self.sums[key] = sums if known is None else merge(known, sums)
        self.loops[key] = loops

    def _added(self, eqn: Any, values: list[Value]) -> Value | None:
        """Notes a parameter that is added to the outputs of a kernel."""
        if eqn.primitive.name not in ("add", "sub"):
            return None
        pairs = [(values[0], values[1], -1 if eqn.primitive.name == "sub" else 1)]
        if eqn.primitive.name == "add":
            pairs.append((values[1], values[0], 1))
        for product, other, sign in pairs:
            made, added = product.tag, other.tag
            if made is None or added is None:
                continue
            if (made.kind, added.kind) != ("product", "parameter"):
                continue
            at = paired(made, added)
            if at is not None:
                found = self.findings.added.setdefault(made.name, [])
                found.append((added.name, sign, at))
                [result] = self._plain(eqn, values, ())
                return result._replace(tag=dataclasses.replace(made, kind="output"))
        return None

    def _behind(self, eqn: Any, values: list[Value]) -> Value | None:
        """Follows the outputs of a kernel through what is done to each of them alone.

        Returns:
          The result of the equation; None if it is something else.
        """
        name = eqn.primitive.name
        own = [v for v in values if v.tag is not None and v.tag.kind != "parameter"]
        if not own:
            return None
        if len(own) == 1 and not all(value.varies for value in values):
            [value], tag = own, own[0].tag
            other = values[values[0] is value]
            if tag is None or (name == "div" and other is values[0]):
                return None
            factor = value.factor
            if name in ("mul", "div"):
                array = jnp.broadcast_to(other.array, value.array.shape)
                rows = by_output(_replicated(array), tag)
                if rows is None:
                    return None
                square = jnp.mean(jnp.square(rows.astype(jnp.float32)), axis=0)
                square = square if name == "mul" else 1 / square
                factor = square if factor is None else factor * square
            [result] = self._plain(eqn, values, [v for v in values if v.tag is not tag])
            if tag.kind == "product":
                self.findings.spent.add((tag.kind, tag.name))
            tag = dataclasses.replace(tag, kind="output")
            return result._replace(tag=tag, factor=factor)
        if name not in ("add", "sub"):
            return None
        [result] = self._plain(eqn, values, values)
        for value in own:
            rows = value.tag and by_output(_replicated(result.array), value.tag)
            if value.tag is not None and rows is not None:
                self._note_outputs(STREAM, value.tag, rows)
                if value.tag.name not in self.findings.added:
                    self._note_outputs(INVERSE, value.tag, rows)
        return result

    def _scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        n_consts, n_carry = scan_parts(eqn)
        consts, carry = values[:n_consts], values[n_consts:][:n_carry]
        stacked = values[n_consts + n_carry :]
        body, varies = eqn.params["jaxpr"], any(value.varies for value in values)
        loop = next(self.numbers)
        slices = [value.tag and _sliced(value.tag, loop) for value in stacked]

        def step(carried: Any, parts: Any) -> tuple[Any, dict[str, Sums], "_Probe"]:
            probe = self.inside()
            arguments = [
                *consts,
                *(Value(array, None, varies) for array in carried),
                *map(Value, parts, slices, [value.varies for value in stacked]),
            ]
            outputs = probe.replay(body.jaxpr, body.consts, arguments)
            for value in outputs:
                probe.spend(value)
            return [value.array for value in outputs], probe.sums, probe

        arrays = [value.array for value in carry], [value.array for value in stacked]
        one = jax.eval_shape(lambda parts: [part[0] for part in parts], arrays[1])
        found, zero, loops = _sums_within(step, arrays[0], one)
        if not found:
            return self._plain(eqn, values, values)
        for value in carry:
            self.spend(value)
        each = {key for key in found if loops[key][-1:] == (loop,)}
        zero = {key: sums for key, sums in zero.items() if key not in each}

        def body_function(state: Any, parts: Any) -> Any:
            carried, total = state
            outputs, sums, _ = step(carried, parts)
            total = {key: merge(total[key], sums[key]) for key in total}
            apart = {key: sums[key] for key in each}
            return (outputs[:n_carry], total), (outputs[n_carry:], apart)

        (last, total), (more, apart) = lax.scan(
            body_function,
            (arrays[0], zero),
            arrays[1],
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
        )
        for key, sums in total.items():
            self._add(key, sums, loops[key])
        for key, sums in apart.items():  # the steps become stacks
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sums)
            self._add(key, flat, loops[key][:-1])
        return [Value(array, None, varies) for array in (*last, *more)]

    def _while(self, eqn: Any, values: list[Value]) -> list[Value]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = values[n_cond:][:n_body], values[n_cond + n_body :]
        body, varies = eqn.params["body_jaxpr"], any(value.varies for value in values)
        test = jex_core.jaxpr_as_fun(eqn.params["cond_jaxpr"])
        test_consts = [value.array for value in values[:n_cond]]

        def step(carried: Any) -> tuple[Any, dict[str, Sums], "_Probe"]:
            probe = self.inside()
            arguments = [*consts, *(Value(array, None, varies) for array in carried)]
            outputs = probe.replay(body.jaxpr, body.consts, arguments)
            for value in outputs:
                probe.spend(value)
            return [value.array for value in outputs], probe.sums, probe

        arrays = [value.array for value in carry]
        found, zero, loops = _sums_within(step, arrays)
        if not found:
            return self._plain(eqn, values, values)
        for value in (*values[:n_cond], *carry):
            self.spend(value)

        def body_function(state: Any) -> Any:
            outputs, sums, _ = step(state[0])
            return outputs, {key: merge(state[1][key], sums[key]) for key in sums}

        last, total = lax.while_loop(
            lambda state: test(*test_consts, *state[0])[0],
            body_function,
            (arrays, zero),
        )
        for key, sums in total.items():
            self._add(key, sums, loops[key])
        return [Value(array, None, varies) for array in last]

    def _cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        varies = any(value.varies for value in values)

        def step(branch: Any, arrays: Any) -> tuple[Any, dict[str, Sums], "_Probe"]:
            probe = self.inside()
            pairs = zip(arrays, values[1:], strict=True)
            arguments = [value._replace(array=array) for array, value in pairs]
            outputs = probe.replay(branch.jaxpr, branch.consts, arguments)
            for value in outputs:
                probe.spend(value)
            return [value.array for value in outputs], probe.sums, probe

        arrays = [value.array for value in values[1:]]
        zero: dict[str, Sums] = {}
        loops: dict[str, tuple[int, ...]] = {}
        for branch in eqn.params["branches"]:
            _, none, own = _sums_within(functools.partial(step, branch), arrays)
            zero, loops = zero | none, loops | own
        if not zero:
            return self._plain(eqn, values, values)

        def branch_function(branch: Any) -> Callable[[Any], Any]:
            def function(arrays: Any) -> Any:
                outputs, sums, _ = step(branch, arrays)
                return outputs, zero | sums

            return function

        branches = [branch_function(branch) for branch in eqn.params["branches"]]
        outputs, total = lax.switch(values[0].array, branches, arrays)
        for key, sums in total.items():
            self._add(key, sums, loops[key])
        return [Value(array, None, varies) for array in outputs]

    def _shard_map(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Enters the program of a shard, if its batch alone is divided."""
        specs = eqn.params["in_specs"]
        pairs = list(zip(values, specs, strict=True))
        divided = {bool(value.varies): set() for value in values}
        for value, spec in pairs:
            divided[value.varies] |= set(_axes(spec))
        axes = divided.get(True, set())
        # Along other axes all shards may see the same rows, which count once.
        if not axes or divided.get(False, set()) - axes:
            return self._plain(eqn, values, values)
        for value, spec in pairs:
            if any(_axes(spec)):
                self.spend(value)
        loops: dict[str, tuple[int, ...]] = {}

        def body(*shards: Any) -> tuple[tuple[Any, ...], dict[str, Sums]]:
            probe = self.inside()
            arguments = [
                Value(array, None if any(_axes(spec)) else value.tag, value.varies)
                for array, (value, spec) in zip(shards, pairs, strict=True)
            ]
            outputs = probe.replay(eqn.params["jaxpr"], (), arguments)
            for value in outputs:
                probe.spend(value)
            loops.update(probe.loops)
            sums = jax.tree.map(lambda leaf: leaf[None], probe.sums)
            return tuple(value.array for value in outputs), sums

        out_specs = tuple(eqn.params["out_specs"]), PartitionSpec(tuple(sorted(axes)))
        arrays = [value.array for value in values]
        outputs, sums = over_shards(eqn, body, out_specs, arrays)
        for key, parts in sums.items():
            self._add(key, combined(parts), loops[key])
        varies = any(value.varies for value in values)
        return [Value(array, None, varies) for array in outputs]


def _axes(spec: PartitionSpec) -> list[Any]:
    """Returns the axes of a mesh along which an array is divided."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec]
    return [axis for part in parts for axis in part if axis is not None]


def _replicated(array: Any) -> Any:
    """Returns an array that explicit axes of a mesh do not divide.

    Sums over such axes would need to be written for each of the ways to divide them;
    the compiler does it by itself for all other meshes.
    """
    sharding = jax.typeof(array).sharding
    if not any(sharding.spec):
        return array
    everywhere = PartitionSpec(*[None] * array.ndim)
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, everywhere))


def _built_in(array: Any) -> Value:
    return Value(array, None, False)


def _sliced(tag: Tag, loop: int) -> Tag:
    """Returns the tag of one step's part of a stacked array."""
    return dataclasses.replace(tag, loops=(*tag.loops, loop))


def _sums_within(
    step: Callable[..., tuple[Any, dict[str, Sums], _Probe]], *arguments: Any
) -> tuple[dict[str, Any], dict[str, Sums], dict[str, tuple[int, ...]]]:
    """Returns the sums that a body makes: their shapes, zeros, and their loops."""
    loops: dict[str, tuple[int, ...]] = {}

    def sums_of_body(*arguments: Any) -> dict[str, Sums]:
        _, sums, probe = step(*arguments)
        loops.update(probe.loops)
        return sums

    shapes = jax.eval_shape(sums_of_body, *arguments)
    return shapes, jax.tree.map(jnp.zeros_like, shapes), loops
