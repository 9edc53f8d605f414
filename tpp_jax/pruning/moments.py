"""Moments of what kernels read along the channels of groups: ``input_moments``."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import on_host
from tpp_jax.graph.functions import Function, as_function
from tpp_jax.graph.records import Group, Member
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.consumers import Place, Weights
from tpp_jax.pruning.findings import GAIN, INVERSE, STREAM, Findings
from tpp_jax.pruning.probe import run
from tpp_jax.pruning.sums import Sums, filled, merge
from tpp_jax.pruning.windows import PatchSums, as_sums

_NOT_FOLLOWED = (
    "its kernel is computed by more than moves of the parameter's entries, or is used "
    "by an operation that is not measured"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Bias:
    """The entries of a parameter that are added to the outputs of a kernel.

    Attributes:
      leaf: Name of the parameter: a bias, or the mean of a batch norm.
      sign: Sign of the sum: -1 for a mean, which is subtracted.
      index: Flat index of the entry of each output, int ``[stacks, outputs]``.
    """

    leaf: str
    sign: int
    index: Int[np.ndarray, "stacks outputs"]


@dataclasses.dataclass(frozen=True, eq=False)
class ConsumerMoments:
    """What one kernel reads: means and covariances of its features.

    A *feature* is what one weight of each output is multiplied with: a channel, at one
    tap of a window for a convolution. A *stack* is a matrix of its own: a step of a
    loop over layers, an expert, a group of a grouped convolution; most kernels have
    one. Of the parameter, the weight that takes feature f to output o in stack s has
    the flat index ``stacks[s] + features[f] + outputs[o]``.

    Attributes:
      leaf: Name of the parameter that is the kernel.
      stacks: Flat index of the first weight of each stack, int ``[stacks]``.
      features: Offset of each feature, int ``[features]``.
      outputs: Offset of each output, int ``[outputs]``.
      positions: Axis of the parameter that channels run along → position of each
        feature along it, int ``[features]``.
      rows: Number of rows that were averaged over (examples, times positions), float
        ``[stacks]``.
      mean: Mean of each feature, float64 ``[stacks, features]``.
      variance: Variance of each feature, float64 ``[stacks, features]``.
      covariance: Covariances, float64 ``[stacks, features, features]``; None in
        diagonal mode and for more than ``max_features`` features.
      bias: Bias (or mean of a norm) that takes up a shift of the outputs; None if
        nothing does.
      fixed: Reason why the weights cannot be refit; None if they can.
      gain: Factor by which each output is multiplied behind the kernel, such as the
        scale of a batch norm divided by its standard deviation, float64 ``[stacks,
        outputs]``.
      stream: Mean square and variance of the sums that the outputs become part of, such
        as a residual stream, averaged over outputs; and the harmonic mean of the rows'
        mean squares (of layers with a bias the mean square again); float64 ``[stacks,
        3]``. None if the outputs are added to nothing.
      steps: Number of steps of loops whose kernels are the stacks, one after the other;
        1 outside of loops.
      once: Whether the weights are read by one product, outside of loops and branches.
    """

    leaf: str
    stacks: Int[np.ndarray, " stacks"]
    features: Int[np.ndarray, " features"]
    outputs: Int[np.ndarray, " outputs"]
    positions: Mapping[int, Int[np.ndarray, " features"]]
    rows: Float[np.ndarray, " stacks"]
    mean: Float[np.ndarray, "stacks features"]
    variance: Float[np.ndarray, "stacks features"]
    covariance: Float[np.ndarray, "stacks features features"] | None
    bias: Bias | None
    fixed: str | None
    gain: Float[np.ndarray, "stacks outputs"]
    stream: Float[np.ndarray, "stacks 3"] | None
    steps: int
    once: bool

    @property
    def second_moment(self) -> Float[np.ndarray, "stacks features"]:
        """Mean square of each feature."""
        return self.variance + self.mean**2

    def moments_about(
        self, stack: int
    ) -> Float[np.ndarray, "features features"] | Float[np.ndarray, " features"]:
        """Returns the moments that errors of the outputs follow from.

        They are about the mean if a shift of the outputs is taken up, else about zero.
        If only variances are known, they are the diagonal.
        """
        mean = self.mean[stack] * (self.bias is None)
        if self.covariance is None:
            return self.variance[stack] + mean**2
        return self.covariance[stack] + np.outer(mean, mean)

    def reads_all(self, shape: tuple[int, ...], axis: int) -> bool:
        """Reports whether each position along an axis of the kernel is one feature.

        All weights of the kernel are then read once, as those of a dense layer are.

        Args:
          shape: Shape of the kernel.
          axis: Axis that channels run along.
        """
        positions = self.positions[axis]
        one_each = np.array_equal(np.sort(positions), np.arange(shape[axis]))
        size = len(positions) * len(self.outputs)
        return one_each and len(self.stacks) == 1 and size == int(np.prod(shape))

    def weight_index(self) -> Int[np.ndarray, "stacks features outputs"]:
        """Returns the flat index of each weight."""
        return self.stacks[:, None, None] + self.features[:, None] + self.outputs


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Moments of what all consumers of some groups read.

    Attributes:
      consumers: Moments of each use of a kernel, in order of execution. A kernel that
        is used several times in the same way has one entry for all of its uses.
      skipped: Name of a kernel that reads channels of the groups and was not measured →
        the reason.
    """

    consumers: tuple[ConsumerMoments, ...]
    skipped: Mapping[str, str]

    def of(self, leaf: str) -> tuple[ConsumerMoments, ...]:
        """Returns the entries of one kernel."""
        return tuple(entry for entry in self.consumers if entry.leaf == leaf)

    def readers_of(self, group: Group) -> list[tuple[Member, ConsumerMoments]]:
        """Lists the kernels that read a group's channels.

        Raises:
          TPPError: None of them was measured.
        """
        found = [
            (member, entry)
            for member in group.members
            for entry in self.of(member.leaf)
            if member.axis in entry.positions
        ]
        if not found:
            readers = [m.leaf for m in group.members if m.role == "contracted"]
            known = [f"{x}: {self.skipped[x]}" for x in readers if x in self.skipped]
            raise TPPError(
                f"no kernel that reads the channels of {group.name} was measured "
                f"({'; '.join(known) or 'the moments are of other groups'}): skip that "
                "layer, or choose another criterion"
            )
        return found


def input_moments(
    model: nnx.Module | linen.Module | Callable[..., Any],
    batches: Iterable[Any],
    params: Any = None,
    groups: Iterable[Group] | None = None,
    *,
    diagonal: bool = False,
    max_features: int = 8192,
    rows: int | None = 64,
    **kwargs: Any,
) -> Moments:
    """Measures what kernels read along the channels that can be pruned.

    For the criteria ``wanda``, ``variance`` and ``obs``, and for
    :func:`tpp_jax.compensate`. A consumer is a convolution or dense layer whose input
    channels are those of a group, in any network that can be traced: with windows,
    strides, dilation, groups; products with several axes; inside loops and branches.
    Nothing is measured of depthwise convolutions and of products of activations,
    through which channels pass.

    Args:
      model: NNX module (runs in evaluation mode, not modified), Linen module or
        function ``fn(params, *inputs)``.
      batches: Batches; each an array, or a tuple if the model has several inputs. Sums
        of a batch are float32 with exact centring, those over batches float64.
      params: Variables of a Linen module, or parameter pytree of a function.
      groups: Groups whose consumers are measured, those that will be pruned; by default
        all groups of the model that can be pruned.
      diagonal: Whether only means and variances are measured, which is enough for
        criteria and takes little memory.
      max_features: Largest number of features of a consumer whose covariances are
        measured; of those with more (taps of a window count) only the variances are.
      rows: Number of rows for each feature of a window that are enough: where a
        convolution of several taps reads more in a batch, its covariances and means are
        those of fewer examples, at equal distances in the batch and at least a quarter
        of them. None for all examples. Nothing is left out with ``diagonal``.
      **kwargs: Keyword arguments of the model, the same for all batches.

    Returns:
      The moments of each consumer. The matrices of all are on the device, float64.

    Raises:
      TPPError: There is no batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.eye(2), "w2": jnp.ones((2, 1))}
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 2.0]])]
      >>> [entry] = tpp.input_moments(mlp, batches, p).consumers
      >>> entry.leaf, entry.mean.tolist(), entry.covariance.tolist()
      ('w2', [[2.0, 2.0]], [[[1.0, 0.0], [0.0, 0.0]]])
    """
    runs = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    first = next(runs, None)
    if first is None:
        raise TPPError("there is no batch to measure moments on")
    if groups is None:
        groups = channel_groups(model, *first, params=params, **kwargs)
    prunable = [g for g in groups if g.reason is None]
    total, findings = _total(
        as_function(model, params),
        kwargs,
        itertools.chain([first], runs),
        _axes_read(prunable),
        lambda features: diagonal or features > max_features,
        rows,
    )
    entries = tuple(
        _entry(key, weights, total.pop(key), total, findings)
        for key, weights in findings.weights.items()
    )
    measured = {entry.leaf for entry in entries}
    readers = {m.leaf for g in prunable for m in g.members if m.role == "contracted"}
    skipped = dict.fromkeys(sorted(readers - measured), _NOT_FOLLOWED)
    return Moments(_fixed_where_shared(entries), skipped)


def _total(
    function: Function,
    kwargs: Mapping[str, Any],
    runs: Iterable[tuple[Any, ...]],
    wanted: Mapping[str, frozenset[int]],
    is_diagonal: Callable[[int], bool],
    enough: int | None,
) -> tuple[dict[str, Sums], Findings]:
    """Returns the sums over all batches by key of a consumer, float64 on the host."""
    call = functools.partial(function.call, **kwargs)
    probe = functools.partial(run, call, function.names, wanted, is_diagonal, enough)
    findings, total, centres = Findings(), {}, {}
    measure = jax.jit(functools.partial(probe, findings))
    for inputs in runs:
        first = not total
        if first:  # only names and shapes of the centres, so that one program is enough
            shapes = jax.eval_shape(
                functools.partial(probe, Findings()), function.params, inputs, {}
            )
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            centres = _centres(zeros)
        sums = measure(function.params, inputs, centres, first)
        if first:  # on the host as the zeros were, so that the program is the same
            centres = jax.tree.map(on_host, _centres(sums))
        total = _added(total, sums)
        jax.block_until_ready(total)  # the sums of several batches may not fit
    merged: dict[str, Sums] = {}
    for place in list(total):
        sums = jax.tree.map(on_host, total.pop(place))
        if isinstance(sums, PatchSums):
            sums = as_sums(sums, place.lines, place.groups)
        sums = filled(sums)
        known = merged.get(place.key)
        merged[place.key] = sums if known is None else merge(known, sums)
    return merged, findings


def _centres(sums: Mapping[Place, Sums | PatchSums]) -> dict[Place, Any]:
    return {at: one.centre for at, one in sums.items() if isinstance(one, PatchSums)}


def _added(
    total: dict[Place, Any], sums: Mapping[Place, Any]
) -> dict[Place, Sums | PatchSums]:
    """Returns a total with the sums of one more batch, float64 on the device.

    With float32 the rounding of many batches would add up; on the host, adding large
    matrices would take longer than to measure them.
    """
    known = {place: total.pop(place) for place in list(total) if place in sums}
    new = {place: one for place, one in sums.items() if place not in known}
    more = {place: sums[place] for place in known}
    with jax.enable_x64(True):
        return total | _as_float64(new) | _merge_all(known, more)


@functools.partial(jax.jit, donate_argnums=0)
def _merge_all(total: dict[Place, Any], sums: dict[Place, Any]) -> dict[Place, Any]:
    return {
        place: _merge(total[place], one) for place, one in _as_float64(sums).items()
    }


def _merge(one: Any, other: Any) -> Any:
    if isinstance(one, PatchSums):
        return jax.tree.map(jnp.add, one, other)._replace(centre=one.centre)
    return merge(one, other)


@jax.jit
def _as_float64(sums: dict[Place, Any]) -> dict[Place, Any]:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), sums)


def _axes_read(groups: Sequence[Group]) -> dict[str, frozenset[int]]:
    """Returns the axes of kernels that channels run along, by name.

    An axis along which one use of a kernel produces channels may be read by another.
    """
    axes: dict[str, set[int]] = {}
    for group in groups:
        for member in group.members:
            if member.role in ("contracted", "produced"):
                axes.setdefault(member.leaf, set()).add(member.axis)
    return {leaf: frozenset(found) for leaf, found in axes.items()}


def _entry(
    key: str,
    weights: Weights,
    sums: Sums,
    others: Mapping[str, Sums],
    findings: Findings,
) -> ConsumerMoments:
    sums = _in_order(sums, weights.order)
    rows = np.maximum(sums.rows, 1)[:, None]
    full = sums.scatter.ndim == 3
    covariance = sums.scatter / rows[:, :, None] if full else None
    squares = np.diagonal(sums.scatter, axis1=1, axis2=2) if full else sums.scatter
    variance = squares / rows
    fixed = None
    if ("parameter", weights.leaf) in findings.spent:
        fixed = "its weights are used for something else too"
    elif not full:
        fixed = f"of its {len(weights.features):,} features only variances are known"
    return ConsumerMoments(
        weights.leaf,
        weights.stacks,
        weights.features,
        weights.outputs,
        weights.positions,
        sums.rows,
        sums.mean,
        variance,
        covariance,
        _bias_of(key, weights, findings),
        fixed,
        _gain(weights, others.get(GAIN + key)),
        _stream(others.get(STREAM + key), others.get(INVERSE + key)),
        findings.steps[key],
        findings.uses[key] == 1,
    )


def _gain(weights: Weights, squares: Sums | None) -> np.ndarray:
    shape = len(weights.stacks), len(weights.outputs)
    return np.ones(shape) if squares is None else np.sqrt(squares.mean)


def _stream(sums: Sums | None, inverse: Sums | None) -> np.ndarray | None:
    if sums is None:
        return None
    variance = sums.scatter / np.maximum(sums.rows, 1)[:, None]
    square = (variance + sums.mean**2).mean(axis=1)
    harmonic = square
    if inverse is not None:
        found = inverse.mean[:, 0]
        harmonic = np.divide(1, found, out=np.zeros_like(found), where=found > 0)
    return np.stack([square, variance.mean(axis=1), harmonic], axis=1)


def _in_order(sums: Sums, order: Int[np.ndarray, " features"]) -> Sums:
    """Returns sums whose features are in another order."""
    if np.array_equal(order, np.arange(order.size)):
        return sums
    scatter = sums.scatter[:, order]
    if scatter.ndim == 3:
        scatter = scatter[:, :, order]
    return Sums(sums.rows, sums.mean[:, order], scatter)


def _bias_of(key: str, weights: Weights, findings: Findings) -> Bias | None:
    """Returns what alone is added to the outputs of a consumer, and to no others."""
    users = collections.defaultdict(set)
    for user, added in findings.added.items():
        for leaf, sign, index in added:
            users[leaf].add((user, sign, index.tobytes()))
    added = {leaf for leaf, _, _ in findings.added.get(key, ())}
    if ("product", key) in findings.spent or len(added) != 1:
        return None
    [(leaf, sign, index), *_] = findings.added[key]
    if ("parameter", leaf) in findings.spent or len(users[leaf]) != 1:
        return None
    return Bias(leaf, sign, index.reshape(len(weights.stacks), len(weights.outputs)))


def _fixed_where_shared(
    entries: tuple[ConsumerMoments, ...],
) -> tuple[ConsumerMoments, ...]:
    """Marks kernels whose weights are read in several ways: none of these has a say."""
    by_leaf: dict[str, list[ConsumerMoments]] = {}
    for entry in entries:
        by_leaf.setdefault(entry.leaf, []).append(entry)
    shared = set()
    for leaf, found in by_leaf.items():
        if len(found) > 1:
            index = np.concatenate([e.weight_index().reshape(-1) for e in found])
            if np.unique(index).size < index.size:
                shared.add(leaf)
    reason = "its weights are used for something else too"
    return tuple(
        dataclasses.replace(entry, fixed=reason) if entry.leaf in shared else entry
        for entry in entries
    )
