"""Checkpoints of Orbax that are pruned without being loaded: ``prune_orbax``.

Each array is read when it is scored, and once more when it is cut, so that a checkpoint
may be larger than the memory of the host. Orbax's interface v1 reads and writes, which
can leave out leaves when it loads, and add leaves to what it has saved.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import SequenceKey

from tpp_jax.errors import TPPError, require
from tpp_jax.graph.arrays import Positions, cut
from tpp_jax.graph.groups import Groups
from tpp_jax.graph.naming import leaf_name, longest_known_suffix, some
from tpp_jax.pruning.plan import Plan, expect_plan
from tpp_jax.pruning.planning import make_plan
from tpp_jax.pruning.slicing import find_cuts
from tpp_jax.storage import folders
from tpp_jax.storage.paths import plain

_BATCH_BYTES = 2**28  # read, cut and written at once, unless one array is larger
_CHUNK_BYTES = 2**26  # pieces of an array on disk, which devices read separately


def prune_orbax(
    folder: str | pathlib.Path,
    target: str | pathlib.Path,
    plan: Plan | Groups,
    ratios: Any = None,
    *,
    at: str | None = None,
    **choices: Any,
) -> Plan:
    """Prunes a tree of arrays that Orbax saved, a few arrays at a time.

    The result is what :func:`tpp_jax.slice_tree` gives of the tree, but neither tree is
    ever in memory: only arrays of 256 MiB, or the largest one. Weights are not
    rescaled, and whether pruned filters are zero is not checked: after TPP, use
    :func:`tpp_jax.prune`.

    Args:
      folder: Checkpoint of one tree (``StandardSave``, ``PyTreeSave``, a step of a
        ``CheckpointManager``, or of Orbax's interface v1), whose leaves have the names
        of the model's parameters, or names that end in them: parameters, or a training
        state with that of the optimizer.
      target: Folder to write, which must not exist or be empty. Orbax's interface v1
        reads it (``orbax.checkpoint.experimental.v1.load``); the earlier one reads the
        folder ``state`` in it. It holds NumPy arrays, for any devices and shardings.
      plan: Plan of the channels to keep; or groups of the model, which may be abstract
        (:func:`tpp_jax.channel_groups` of ``nnx.eval_shape``), to make one here.
      ratios: Share of the channels to prune, as for :func:`tpp_jax.make_plan`; with
        groups only.
      at: Path of the parameters in the tree, such as ``"model"``, if there are several
        copies of them; with groups only.
      **choices: Arguments of :func:`tpp_jax.make_plan`, such as ``counts``, ``params``,
        ``criterion`` and ``scores``; with groups only.

    Returns:
      The plan.

    Raises:
      TPPError: The checkpoint cannot be read, has no array that the plan cuts, or one
        of another shape; the plan cannot be made; the state of an optimizer cannot be
        cut; or the target has files.

    Example:
      >>> import tempfile, jax.numpy as jnp, orbax.checkpoint as ocp
      >>> import tpp_jax as tpp
      >>> def mlp(p, x):
      ...     return x @ p["w1"] @ p["w2"]
      >>> p = {"w1": jnp.arange(32.0).reshape(4, 8), "w2": jnp.ones((8, 2))}
      >>> home = pathlib.Path(tempfile.mkdtemp())
      >>> with ocp.StandardCheckpointer() as saver:
      ...     saver.save(home / "dense", {"params": p})
      >>> groups = tpp.channel_groups(mlp, jnp.ones((1, 4)), params=p)
      >>> plan = prune_orbax(home / "dense", home / "small", groups, 0.25)
      >>> from orbax.checkpoint.experimental import v1
      >>> jax.tree.map(jnp.shape, v1.load(home / "small"))
      {'params': {'w1': (4, 6), 'w2': (6, 2)}}
    """
    require("train", "orbax.checkpoint")
    target = folders.resolved(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TPPError(f"{target} exists and is not an empty folder: name a new one")
    if jax.process_count() > 1:
        raise TPPError("prune_orbax runs in one process, and not in several at once")
    with plain(folders.resolved(folder)) as place:
        saved = _Saved.of(place, str(folder))
        if isinstance(plan, Groups):
            weights = _parameters(saved.named(plan), plan, at)
            plan = make_plan(plan, weights, ratios, **choices)
        elif ratios is not None or at is not None or choices:
            raise TPPError("ratios and choices are for groups: prune_orbax has a plan")
        expect_plan(plan)
        named = saved.named(plan.groups)
        _check_optimizer(named)
        cuts = find_cuts(plan, named)
        try:
            _write(saved, named, cuts, target)
        except TPPError:
            raise
        except Exception as error:  # Orbax and TensorStore raise errors of any type
            raise TPPError(
                f"{folder} could not be read to its end, or {target} not be written "
                f"({folders.why(error)}): there is nothing at {target}"
            ) from error
        return plan


@dataclasses.dataclass(frozen=True, eq=False)
class _Array:
    """An array that is read when NumPy asks for it; to Orbax, an abstract one.

    Attributes:
      shape: Shape.
      dtype: Type of its numbers.
      saved: Tree that it belongs to.
      index: Place among the tree's leaves.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    saved: "_Saved"
    index: int

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array."""
        [found] = self.saved.read([self.index])
        return found.astype(dtype or found.dtype, copy=False)


@dataclasses.dataclass(frozen=True, eq=False)
class _Saved:
    """A tree on disk.

    Attributes:
      place: Folder, without characters that Orbax misreads.
      paths: Path of each leaf; empty containers are leaves.
      leaves: Each leaf: an :class:`_Array`, or what Orbax says about others.
      form: Structure of the tree.
      custom: What was saved about the tree.
    """

    place: pathlib.Path
    paths: list[tuple[Any, ...]]
    leaves: list[Any]
    form: Any
    custom: Any

    @classmethod
    def of(cls, place: pathlib.Path, folder: str) -> "_Saved":
        """Opens a checkpoint.

        Args:
          place: Folder of the checkpoint.
          folder: Its name in messages.
        """
        from orbax.checkpoint.experimental import v1

        if not place.is_dir():
            raise TPPError(f"there is no checkpoint at {folder}")
        try:
            about = v1.metadata(str(place))
        except Exception as error:  # Orbax and TensorStore raise errors of any type
            raise TPPError(
                f"{folder} cannot be read as a checkpoint of one tree: pass the folder "
                "that a checkpointer wrote, or that of a step of a CheckpointManager"
            ) from error
        found, form = jax.tree_util.tree_flatten_with_path(
            about.metadata, is_leaf=_is_empty
        )
        saved = cls(place, [], [], form, about.custom_metadata)
        for i, (path, leaf) in enumerate(found):
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
            if shape is not None and dtype is not None:
                leaf = _Array(tuple(shape), np.dtype(dtype), saved, i)
            saved.paths.append(path)
            saved.leaves.append(leaf)
        return saved

    def named(self, groups: Groups) -> dict[str, Any]:
        """Returns the leaves by name.

        An ``nnx.State`` is saved with a key ``value`` at the end of each path.

        Args:
          groups: Groups of the model, whose own names may end like this.
        """
        named = {}
        for path, leaf in zip(self.paths, self.leaves, strict=True):
            name = leaf_name(path)
            if longest_known_suffix(name, groups.shapes) is None:
                name = name.removesuffix(".value")
            if name in named:
                raise TPPError(f"the checkpoint has two leaves of the name {name}")
            named[name] = leaf
        return named

    def read(self, places: Sequence[int]) -> list[Any]:
        """Reads the leaves at some places: NumPy arrays, numbers, text, containers."""
        from orbax.checkpoint.experimental import v1

        wanted: list[Any] = [v1.PLACEHOLDER] * len(self.leaves)
        for i in places:
            wanted[i] = self.leaves[i]
        loaded = v1.load(str(self.place), jax.tree.unflatten(self.form, wanted))
        found = jax.tree.leaves(loaded, is_leaf=_is_empty)
        return [found[i] for i in places]


def _is_empty(node: Any) -> bool:
    return node is None or (isinstance(node, dict | list | tuple) and not node)


def _parameters(
    named: Mapping[str, Any], groups: Groups, path: str | None
) -> dict[str, Any]:
    """Returns the parameters of a model by its own names.

    Of several leaves with the name of a parameter, the one that is least deep in the
    tree is meant: moments of an optimizer are deeper than what they belong to.

    Args:
      named: Leaves of the checkpoint.
      groups: Groups of the model.
      path: Path of the parameters in the tree; None to find it.

    Raises:
      TPPError: There are no parameters, or several copies of them.
    """
    start = f"{path}." if path else ""
    found: dict[str, list[str]] = {}
    for name in named:
        known = longest_known_suffix(name, groups.shapes)
        if known is not None and name.startswith(start):
            found.setdefault(known, []).append(name)
    if not found:
        raise TPPError(
            f"the checkpoint has no parameters of the model"
            f"{f' at {path}' if path else ''}: it has {some(named)}, and the model "
            f"{some(groups.shapes)}"
        )
    params = {}
    for known, names in found.items():
        depth = min(name.count(".") for name in names)
        first, *others = [name for name in names if name.count(".") == depth]
        if others:
            raise TPPError(
                f"the checkpoint has {known} as {some([first, *others])}: pass the "
                "path of the parameters in the tree as at"
            )
        params[known] = named[first]
    return params


def _check_optimizer(named: Mapping[str, Any]) -> None:
    """Raises if a leaf depends on the numbers of others, as those of L-BFGS do."""
    for name in named:
        if name.endswith((".weights_memory", ".info.decrease_error")):
            raise TPPError(
                f"{name} belongs to L-BFGS, whose state depends on all parameters at "
                "once: load the checkpoint and use slice_tree, or leave it out"
            )


def _write(
    saved: _Saved,
    named: Mapping[str, Any],
    cuts: Mapping[str, tuple[str, dict[int, Positions]]],
    target: pathlib.Path,
) -> None:
    """Writes the cut tree, a few leaves at a time."""
    from orbax.checkpoint.experimental import v1

    place_of = {name: i for i, name in enumerate(named)}
    context = v1.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with folders.work_folder(target) as work:
        with plain(work / folders.NEW, new=True) as new, context:
            for names in _batches(named):
                sources = [place_of[cuts[name][0]] for name in names]
                tree: dict[Any, Any] = {}
                for name, leaf in zip(names, saved.read(sources), strict=True):
                    own = cuts[name][1]
                    small = np.ascontiguousarray(cut(leaf, own)) if own else leaf
                    _put(tree, saved.paths[place_of[name]], small)
                v1.partial.save(str(new), _as_saved(tree), custom_metadata=saved.custom)
            v1.partial.finalize(str(new))
        folders.swap(work, target)


def _batches(named: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yields the names of leaves that are read at once."""
    batch: list[str] = []
    room = _BATCH_BYTES
    for name, leaf in named.items():
        size = leaf.nbytes if isinstance(leaf, _Array) else 0
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH_BYTES
        batch.append(name)
        room -= size
    if batch:
        yield batch


def _put(tree: dict[Any, Any], path: Sequence[Any], leaf: Any) -> None:
    """Puts a leaf into nested dicts, whose keys are those of a path."""
    *outer, last = path
    for key in outer:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _as_saved(node: Any) -> Any:
    """Returns nested dicts with keys of paths as dicts and parts of lists."""
    if not isinstance(node, dict) or not node:
        return node
    if isinstance(next(iter(node)), SequenceKey):
        return _Some({key.idx: _as_saved(x) for key, x in node.items()})
    return {key.key: _as_saved(x) for key, x in node.items()}


@jax.tree_util.register_pytree_with_keys_class
class _Some:
    """Some of the items of a list, by their places in it."""

    def __init__(self, items: Mapping[int, Any]) -> None:
        self.items = items

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[int, ...]]:
        """Returns the items with their keys, and their places."""
        return [(SequenceKey(i), x) for i, x in self.items.items()], tuple(self.items)

    @classmethod
    def tree_unflatten(cls, places: tuple[int, ...], items: Any) -> "_Some":
        """Returns the same with other items."""
        return cls(dict(zip(places, items, strict=True)))
