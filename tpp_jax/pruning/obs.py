"""The order in which an optimal brain surgeon removes channels, and what each costs.

A layer that reads features h by weights W gives, without some of them and with the
others refit, outputs with the smallest error. Of one channel, with features c, that
error is

    ``tr(U_cᵀ (Q_cc)⁻¹ U_c)``, where ``Q = (C + δ·mean(diag C)·I)⁻¹``

C are the covariances of the features and U the weights as refit so far (Hassibi and
Stork 1993). The channel with the smallest error is removed, Q and U are *downdated* to
those without it, and so on. Several layers that read a channel have their errors added.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import on_host
from tpp_jax.graph.records import Group, Member
from tpp_jax.pruning.moments import ConsumerMoments, Moments
from tpp_jax.pruning.ridge import default_damping

# Columns of downdates that are collected before they are applied as one product.
_COLUMNS = 64


@dataclasses.dataclass
class Reader:
    """One matrix that reads channels, while channels are removed; modified.

    Features are in the order of their channels, ``b`` for each. Q and U lack the latest
    downdates, ``Q - pending pendingᵀ`` and ``U - pending shiftsᵀ``; their blocks are
    up to date.

    Attributes:
      inverse: Q, float64 ``[n·b, n·b]``.
      weights: U, float64 ``[n·b, outputs]``.
      own: Block Q_cc of each channel, float64 ``[n, b, b]``.
      squares: Block of ``U Uᵀ`` of each channel, float64 ``[n, b, b]``.
      pending: Columns of the downdates of Q, float64 ``[n·b, columns]``.
      shifts: Columns of the downdates of U, float64 ``[outputs, columns]``.
    """

    inverse: Float[np.ndarray, "features features"]
    weights: Float[np.ndarray, "features outputs"]
    own: Float[np.ndarray, "n b b"]
    squares: Float[np.ndarray, "n b b"]
    pending: Float[np.ndarray, "features columns"]
    shifts: Float[np.ndarray, "outputs columns"]

    def costs(self) -> Float[np.ndarray, " n"]:
        """Returns the error that the removal of each channel would add."""
        if self.own.shape[-1] == 1:
            return self.squares[:, 0, 0] / self.own[:, 0, 0]
        return np.einsum("nij,nji->n", np.linalg.inv(self.own), self.squares)

    def remove(self, channel: int) -> None:
        """Downdates Q and U to those without a channel."""
        n, b, _ = self.own.shape
        rows = slice(channel * b, channel * b + b)
        columns = self.inverse[rows].T - self.pending @ self.pending[rows].T
        weights = self.weights[rows] - self.pending[rows] @ self.shifts.T
        root = np.linalg.inv(np.linalg.cholesky(self.own[channel]))
        new, shift = columns @ root.T, weights.T @ root.T
        along = self.weights @ shift - self.pending @ (self.shifts.T @ shift)
        along -= new @ (shift.T @ shift) / 2
        new_of, along_of = new.reshape(n, b, b), along.reshape(n, b, b)
        across = along_of @ new_of.transpose(0, 2, 1)
        self.own -= new_of @ new_of.transpose(0, 2, 1)
        self.squares -= across + across.transpose(0, 2, 1)
        self.own[channel] = np.eye(b)  # nothing is left: only rounding
        self.squares[channel] = 0
        self.pending = np.concatenate([self.pending, new], axis=1)
        self.shifts = np.concatenate([self.shifts, shift], axis=1)

    def settled(self, alive: Int[np.ndarray, " left"]) -> "Reader":
        """Returns the same with all downdates applied, for some of the channels."""
        b = self.own.shape[-1]
        rows = (alive[:, None] * b + np.arange(b)).reshape(-1)
        pending = self.pending[rows]
        inverse = self.inverse[np.ix_(rows, rows)]
        inverse -= pending @ pending.T
        return _reader(inverse, self.weights[rows] - pending @ self.shifts.T, b)


def _reader(inverse: np.ndarray, weights: np.ndarray, size: int) -> Reader:
    """Returns a matrix that reads ``size`` features of each channel."""
    count = len(weights) // size
    blocks = weights.reshape(count, size, weights.shape[1])
    at = np.arange(count)
    return Reader(
        inverse,
        weights,
        inverse.reshape(count, size, count, size)[at, :, at],
        blocks @ blocks.transpose(0, 2, 1),
        np.zeros((len(weights), 0)),
        np.zeros((weights.shape[1], 0)),
    )


def reader_of(
    moments: Float[np.ndarray, "all all"] | Float[np.ndarray, " all"],
    weights: Float[np.ndarray, "all outputs"],
    features: Int[np.ndarray, "n b"],
    damping: float,
) -> Reader | None:
    """Returns a matrix that reads channels, ready for :func:`removals`.

    Args:
      moments: Moments of all features that it reads; one axis if all but variances are
        taken as zero, as of layers that are not refit.
      weights: Weights that read them.
      features: Features of each channel, -1 where it has fewer than others. Features of
        no channel are never removed.
      damping: Share of the mean variance that is added to all variances.

    Returns:
      None if all features are zero.
    """
    of = features.reshape(-1)
    real = np.flatnonzero(of >= 0)
    at = of[real]
    variances = moments if moments.ndim == 1 else np.diagonal(moments)
    size = np.mean(variances) if variances.size else 0.0
    if not size > 0 or not real.size:
        return None
    # A feature that is not there is one that nothing reads.
    inverse = np.eye(of.size) / size
    if moments.ndim == 1:
        inverse[real, real] = 1 / (variances[at] + damping * size)
    else:
        damped = moments + damping * size * np.eye(len(moments))
        inverse[np.ix_(real, real)] = _inverse(damped)[np.ix_(at, at)]
    own = np.zeros((of.size, weights.shape[1]))
    own[real] = weights[at]
    return _reader(inverse, own, features.shape[1])


def _inverse(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Returns the inverse of a positive definite matrix."""
    from scipy.linalg import get_lapack_funcs  # late: slow to import

    factor, invert = get_lapack_funcs(("potrf", "potri"), (matrix,))
    root, failed = factor(matrix, lower=1)
    if failed:  # singular to rounding
        return np.linalg.pinv(matrix, hermitian=True)
    inverse, _ = invert(root, lower=1)
    lower = np.tril(inverse)
    return lower + np.tril(lower, -1).T


def removals(
    readers: Sequence[Reader], size: int
) -> tuple[Int[np.ndarray, " size"], Float[np.ndarray, " size"]]:
    """Returns the order in which channels are removed, and the error that each adds.

    Args:
      readers: All matrices that read the channels, scaled so that errors can be added;
        modified.
      size: Number of channels.

    Example:
      >>> weights = np.array([[1.0], [1.0], [0.5]])
      >>> covariances = np.diag([1.0, 4.0, 9.0])
      >>> reader = reader_of(covariances, weights, np.arange(3)[:, None], 1e-9)
      >>> order, costs = removals([reader], 3)
      >>> order.tolist(), costs.round(3).tolist()
      ([0, 2, 1], [1.0, 2.25, 4.0])
    """
    order, costs = np.zeros(size, np.int64), np.zeros(size)
    readers, channels = list(readers), np.arange(size)
    widest = max((reader.own.shape[-1] for reader in readers), default=1)
    steps = max(_COLUMNS // widest, 1)
    for first in range(0, size, steps):
        left = np.ones(len(channels), bool)
        for step in range(first, min(first + steps, size)):
            total = np.zeros(len(channels))
            for reader in readers:
                total += reader.costs()
            total[~left] = np.inf
            lowest = int(np.argmin(total))
            order[step], costs[step] = channels[lowest], max(total[lowest], 0)
            left[lowest] = False
            for reader in readers:
                reader.remove(lowest)
        alive = np.flatnonzero(left)
        readers = [reader.settled(alive) for reader in readers]
        channels = channels[alive]
    return order, costs


def obs(
    group: Group, leaves: Mapping[str, Any], moments: Moments
) -> Float[np.ndarray, " size"]:
    """Returns scores of a group's channels that rank them in the order of removal.

    A score is the error that the removal of the channel adds, relative to the variance
    of what the outputs of its readers become part of, summed over the readers. The
    errors are made ascending by isotonic regression, which keeps their sums: a channel
    whose removal makes that of the next one cheap is scored together with it.

    Args:
      group: Group to score.
      leaves: Parameter arrays by dotted name.
      moments: Moments of what is read. Covariances that are not known count as zero, as
        do those of layers that are not refit.

    Raises:
      TPPError: No covariances are known at all.
    """
    from scipy.optimize import isotonic_regression  # late: slow to import

    if all(entry.covariance is None for entry in moments.consumers):
        raise TPPError(
            "the criterion 'obs' needs covariances, but the moments are means and "
            "variances alone: measure input_moments without diagonal=True"
        )
    readers: list[Reader] = []
    for member, entry in moments.readers_of(group):
        readers += _readers_of(member, entry, on_host(leaves[member.leaf]))
    order, costs = removals(readers, group.size)
    ascending = isotonic_regression(costs).x
    scores = np.zeros(group.size)
    # The order decides between equal scores.
    steps = 1 + 1e-9 * np.arange(group.size)
    scores[order] = np.maximum(ascending, np.finfo(np.float32).tiny) * steps
    return scores


def _readers_of(
    member: Member, entry: ConsumerMoments, kernel: np.ndarray
) -> list[Reader]:
    """Returns the matrices of a kernel, scaled so that their errors are relative."""
    weights = kernel.reshape(-1)[entry.weight_index()] * entry.gain[:, None, :]
    weights = weights.astype(np.float64)
    features = _features_of(member.positions, entry.positions[member.axis])
    total = _energy(entry, weights).reshape(entry.steps, -1).sum(axis=1)
    readers = []
    for s, rows in enumerate(entry.rows):
        size = total[s * entry.steps // len(entry.rows)]
        if rows > 0 and size > 0:
            moments = entry.moments_about(s)
            if entry.fixed is not None and moments.ndim == 2:
                moments = np.diagonal(moments)
            scaled = weights[s] * np.sqrt(rows / size)
            damping = default_damping(len(entry.features), rows)
            readers.append(reader_of(moments, scaled, features, damping))
    return [reader for reader in readers if reader is not None]


def _energy(
    entry: ConsumerMoments, weights: Float[np.ndarray, "stacks features outputs"]
) -> Float[np.ndarray, " stacks"]:
    """Returns the sum, over rows and outputs, of what an error is relative to."""
    if entry.stream is not None:
        # A network without biases normalises its stream row by row (an RMS norm). There
        # a few huge rows, as of the first tokens of language models, make no error of
        # the others small.
        own = entry.stream[:, 2 if entry.bias is None else 1] * weights.shape[2]
        return entry.rows * own
    found = np.zeros(len(entry.rows))
    for s, rows in enumerate(entry.rows):
        moments, own = entry.moments_about(s), weights[s]
        read = moments @ own if moments.ndim == 2 else moments[:, None] * own
        found[s] = rows * np.sum(own * read)
    return found


def _features_of(
    positions: Int[np.ndarray, "n m"], of_features: Int[np.ndarray, " features"]
) -> Int[np.ndarray, "n b"]:
    """Returns the features of each channel, -1 where it has fewer than others.

    Args:
      positions: Positions of each channel along an axis of a kernel.
      of_features: Position of each feature along that axis.
    """
    found = [np.flatnonzero(np.isin(of_features, own)) for own in positions]
    features = np.full((len(found), max(map(len, found))), -1)
    for row, own in zip(features, found, strict=True):
        row[: len(own)] = own
    return features
