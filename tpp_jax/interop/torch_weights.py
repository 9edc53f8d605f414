"""Import of PyTorch's weights into modules, and export of a module's weights."""

import contextlib
import difflib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError, require
from tpp_jax.graph.bridge import follow_arrays
from tpp_jax.graph.functions import set_evaluation
from tpp_jax.graph.naming import layer_name, map_named, named_leaves
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.interop.layers import describe_layers
from tpp_jax.interop.names import shown
from tpp_jax.interop.places import LAYERS, Flattened, Place, Shape, places
from tpp_jax.interop.torch_files import read_torch, tensors_in
from tpp_jax.interop.torch_tensors import Tensors

_OF_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
_SHOWN = 5  # number of names that a message lists, of each category
# Number of names that are compared with a missing one, and their largest length.
_COMPARED, _LONGEST = 1000, 200


def load_torch(
    source: str | pathlib.Path | Mapping[str, Any],
    model: nnx.Module,
    *,
    pruned: bool = False,
    flattened: Flattened | None = None,
) -> nnx.Module:
    """Returns a module of the same class with weights of PyTorch.

    Files are read without PyTorch, and no code in them is run. Tensors and arrays must
    correspond one to one; only ``num_batches_tracked``, which PyTorch counts but does
    not use, is ignored.

    Args:
      source: Path of a ``.safetensors`` file, of a file that ``torch.save`` wrote (a
        state dict, a checkpoint with one, or a module), or of the ``.index.json`` of a
        checkpoint in several files; or a state dict: tensors of PyTorch, NumPy or JAX
        by name. From a checkpoint with several sets of weights, such as ``model`` and
        ``model_ema``, the first of ``state_dict``, ``model_state_dict``, ``model`` and
        ``net`` is read, with a warning.
      model: Module with the structure; its arrays are not used, and it may be abstract
        (``nnx.eval_shape``).
      pruned: Whether layers may be narrower than the model's.
      flattened: Sizes ``{layer: (height, width)}`` for every dense layer that is
        applied to a flattened feature map. Needed only for your own modules that
        flatten pixels before channels, and not for the networks of ``tpp_jax.models``.

    Returns:
      A new module; the given one is not modified. Its arrays have the types of the
      tensors; float64 only with ``jax.enable_x64``.

    Raises:
      TPPError: If the file cannot be read, or the tensors do not fit the model.

    Example:
      >>> model = nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(0))])
      >>> weights = {"0.weight": np.ones((2, 3)), "0.bias": np.zeros(2)}
      >>> load_torch(weights, model)[0].kernel.shape
      (3, 2)
    """
    in_memory = isinstance(source, Mapping)
    tensors = tensors_in(source) if in_memory else read_torch(source)
    graphdef, rngs, state = nnx.split(model, nnx.RngState, ...)
    leaves, targets = named_leaves(state), places(model, flattened)
    tensors = _without_wrappers(tensors, targets)
    _check_names(tensors, targets, model)
    _check_shapes(
        tensors, {p: p.shape(leaves[p.leaf].shape) for p in targets}, model, pruned
    )
    arrays = {p.leaf: jnp.array(p.to_ours(tensors[p.name])) for p in targets}
    state = map_named(lambda leaf, _: arrays[leaf], state)
    loaded = nnx.merge(graphdef, rngs, state, copy=True)  # copies the random state too
    if pruned:
        _follow_widths(loaded)
    return loaded


def save_torch(
    model: nnx.Module, path: str | pathlib.Path, *, flattened: Flattened | None = None
) -> None:
    """Saves a module's weights as a state dict of PyTorch, pruned widths included.

    A second file, ``<path>.json``, holds the type and the sizes of every layer; see
    :func:`tpp_jax.interop.layers.describe_layers`. Each file is replaced atomically.

    Args:
      model: Module with concrete arrays.
      path: Path that ends in ``.safetensors``, or in ``.pth`` or ``.pt``, which needs
        PyTorch. Missing folders are created.
      flattened: Sizes of flattened feature maps, as for :func:`load_torch`.

    Raises:
      TPPError: If the path has another ending, PyTorch is not installed, or the model
        is abstract or has a layer without an equivalent in PyTorch.

    Example:
      >>> import tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "weights.safetensors"
      >>> save_torch(nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(0))]), file)
      >>> sorted(tensors_in(read_torch(file)))
      ['0.bias', '0.weight']
    """
    path = pathlib.Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise TPPError(
            f"the format to write is unknown from {path}: end it in .safetensors or "
            ".pth"
        )
    if path.suffix != ".safetensors":
        require("torch", "torch")
    leaves = named_leaves(nnx.split(model, nnx.RngState, ...)[2])
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
        raise TPPError(
            f"this {type(model).__name__} is abstract: there are no arrays to save"
        )
    tensors = {
        place.name: np.asarray(
            place.to_torch(np.asarray(leaves[place.leaf])), order="C"
        )
        for place in places(model, flattened)
    }
    description = json.dumps(describe_layers(model), indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            write_safetensors(tensors, partial)
        else:
            _write_with_torch(tensors, partial)
    with replacing(path.with_name(f"{path.name}.json")) as partial:
        partial.write_text(description)


def _without_wrappers(tensors: Tensors, targets: Sequence[Place]) -> Tensors:
    """Removes the prefixes that DataParallel and other wrappers add to every name."""
    for prefix in 2 * _OF_WRAPPERS:  # either may wrap the other
        if any(place.name.startswith(prefix) for place in targets):
            continue
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _check_names(tensors: Tensors, targets: Sequence[Place], model: nnx.Module) -> None:
    wanted = {place.name for place in targets}
    missing = [place.name for place in targets if place.name not in tensors]
    unexpected = [
        name
        for name in tensors
        if name not in wanted and not name.endswith("num_batches_tracked")
    ]
    problems = []
    if missing:
        others = [n for n in unexpected if len(n) < _LONGEST][:_COMPARED]
        near = [difflib.get_close_matches(n, others, 1) for n in missing[:_SHOWN]]
        near += [[]] * len(missing[_SHOWN:])
        names = [
            f"{name} (but a {shown(other[0])})" if other else name
            for name, other in zip(missing, near, strict=True)
        ]
        problems.append(f"they have no {_listed(names)}")
    if unexpected:
        problems.append(f"the model has no {_listed(unexpected)}")
    if problems:
        raise TPPError(
            f"the weights are not those of this {type(model).__name__}: "
            f"{'; '.join(problems)}"
        )


def _check_shapes(
    tensors: Tensors, shapes: Mapping[Place, Shape], model: nnx.Module, pruned: bool
) -> None:
    """Compares shapes, as they are in PyTorch."""
    wrong = {
        place: (tensors[place.name].shape, shape)
        for place, shape in shapes.items()
        if tensors[place.name].shape != shape
    }
    narrower = all(_is_narrower(*pair, place) for place, pair in wrong.items())
    if not wrong or (pruned and narrower):
        return
    layers = {layer_name(place.name) for place in wrong}
    has, wants = max(wrong.values(), key=lambda pair: len(pair[1]))
    name = type(model).__name__
    if len(layers) == 1 and len(wants) == 2 and has[1:] == wants[1:]:
        raise TPPError(
            f"the weights have {has[0]} outputs at {layers.pop()} and this {name} has "
            f"{wants[0]}: create the model with num_classes={has[0]} if these are "
            "classes"
        )
    names = [
        f"{place.name} is {shown(_size(has))} and not {_size(wants)}"
        for place, (has, wants) in wrong.items()
    ]
    hint = "; if the network is pruned, pass pruned=True" if narrower else ""
    raise TPPError(
        f"the weights have other shapes than this {name}: {_listed(names)}{hint}"
    )


def _is_narrower(has: Shape, wants: Shape, place: Place) -> bool:
    """Returns whether channels may have been removed; windows must be the same."""
    if len(has) != len(wants) or (place.is_kernel and has[2:] != wants[2:]):
        return False
    return all(0 < n <= most for n, most in zip(has, wants, strict=True))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(map(shown, names[:_SHOWN])) + (
        f" and {more} more" if more > 0 else ""
    )


def _size(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a number"


def _follow_widths(model: nnx.Module) -> None:
    """Sets the static sizes of a module to those of its arrays, and traces it.

    Raises:
      TPPError: If the widths do not fit each other.
    """
    for path, module in modules(model):
        if not isinstance(module, LAYERS):
            continue
        arrays = [v for v in vars(module).values() if isinstance(v, nnx.Variable)]
        widths = {array.shape[-1] for array in arrays}  # numbers of output channels
        if len(widths) > 1:
            raise TPPError(
                f"the weights do not fit each other: {path} has arrays for "
                f"{' and for '.join(map(str, sorted(widths)))} channels"
            )
        grouped = isinstance(module, nnx.GroupNorm)
        if grouped and widths != {module.num_groups * module.group_size}:
            raise TPPError(
                f"{path} is a pruned GroupNorm, whose number of groups does not follow "
                "from the weights: save such a network with tpp_jax.save_model"
            )
    follow_arrays(model, num_groups=lambda *_: None)
    spec = getattr(model, "spec", None)
    if spec is None:
        return  # the shape of its inputs is unknown
    graphdef, state = nnx.split(model)

    def run(state: Any, images: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        set_evaluation(merged)
        return merged(images)

    images = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    try:
        jax.eval_shape(run, state, images)
    except (TypeError, ValueError) as error:
        raise TPPError(
            f"the weights do not fit each other in this {type(model).__name__}: {error}"
        ) from error


# Writing


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a file that replaces another once it is complete.

    Args:
      path: Path of the file that is replaced.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_safetensors(tensors: Tensors, path: pathlib.Path) -> None:
    """Writes arrays to a file in the format safetensors.

    Args:
      tensors: Arrays by name, in C order.
      path: Path of the file.
    """
    from safetensors.numpy import save_file  # late: only these files need the package

    save_file(tensors, path, metadata={"format": "pt"})


def _write_with_torch(tensors: Tensors, path: pathlib.Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]  # an optional dependency

    def as_torch(array: np.ndarray) -> Any:
        # As bytes first, since NumPy lacks some of PyTorch's types.
        bytes_ = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
        dtype = getattr(torch, array.dtype.name)
        return bytes_.view(dtype).reshape(array.shape)

    torch.save({name: as_torch(array) for name, array in tensors.items()}, path)
