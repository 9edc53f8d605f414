"""Models saved in a folder, with all data that is needed to use them again.

A saved model is a flat dict of named arrays and JSON, which Orbax writes. It describes
its content, so loading needs no config: only the architecture's name, or a module or
tree of the same structure.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from tpp_jax import models
from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import Shardings
from tpp_jax.graph.bridge import counted_groups, follow_arrays, group_counts
from tpp_jax.graph.fields import set_fields_of_modules
from tpp_jax.graph.naming import longest_known_suffix, named_leaves
from tpp_jax.graph.nnx_layers import modules
from tpp_jax.pruning.plan import Plan
from tpp_jax.storage import folders, items, leaves, processes
from tpp_jax.storage.paths import plain

_META = {"model", "plan", "config", "metrics"}  # keys of a saved model's JSON
# Flags of a mode that may be None if an argument of the call decides.
_MODES = ("deterministic", "use_running_average", "decode")
_SHOWN = 3  # number of differences that a message lists
_FORMAT = 2


def save_model(
    path: str | pathlib.Path,
    model: Any,
    plan: Plan | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model with all data that is needed to use it again.

    A saved model in the folder is replaced atomically: after any interruption the old
    or the new one can be loaded. Other files are never replaced.

    Args:
      path: Folder of the model. It is created, or replaced if it contains a saved model
        and nothing else.
      model: Module created by ``tpp_jax.models.create`` (pruned or not); any other NNX
        module, whose unpruned form :func:`load_model` then needs; or tree of arrays,
        such as the variables of a Linen module.
      plan: Plan by which the model was pruned.
      config: Data to keep with the model, as JSON.
      metrics: Numbers, text or arrays to keep with the model, as JSON.

    Raises:
      TPPError: If the folder contains other files, the model contains a value that
        cannot be saved, or writing fails.

    Example:
      >>> import tempfile
      >>> model = models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
      >>> save_model(folder, model, metrics={"accuracy": 0.5})
      >>> type(load_model(folder)).__name__
      'MLP'
    """
    is_leaf = jax.tree_util.all_leaves([model])
    if isinstance(model, linen.Module) or (is_leaf and callable(model)):
        raise TPPError(
            f"save_model saves an nnx.Module or a tree of arrays, and not a "
            f"{type(model).__name__}: for a Linen module pass its variables"
        )
    target = folders.resolved(path)
    folders.check_replaceable(target)
    tree = nnx.state(model) if _is_module(model) else model
    names = leaves.unique_names(tree)
    by_name = dict(zip(names, jax.tree.leaves(tree), strict=True))
    arrays, notes = leaves.encode(by_name)
    if not arrays:
        raise TPPError(f"this {type(model).__name__} holds no arrays to save")
    meta = {
        **_facts(model, plan),
        "config": dict(config or {}),
        "metrics": jax.tree.map(_json_ready, dict(metrics or {})),
        "contents": {
            "format": _FORMAT,
            "class": type(model).__name__,
            "classes": _classes(model) if _is_module(model) else None,
            "settings": _settings(model) if _is_module(model) else {},
            "tree": None if _is_module(model) else leaves.describe(tree, names),
            "leaves": notes,
            "unpruned": {} if plan is None else _unpruned_shapes(plan, names),
        },
    }
    _write(target, arrays, _as_json(meta))


def load_model(
    path: str | pathlib.Path, model: Any = None, *, sharding: Shardings | None = None
) -> Any:
    """Loads a model that :func:`save_model` saved.

    Args:
      path: Folder of the saved model.
      model: Module of the saved one's class in its unpruned form, whose arrays are not
        used; not needed if the saved model came from ``tpp_jax.models.create``. For a
        saved tree, a tree of the same structure; needed only if it has containers other
        than Python's and Flax's, or functions as leaves.
      sharding: Sharding of all arrays, or function of the name and shape of an array to
        its sharding, of which each device reads its part; None for the default device.
        Axes of a mesh that do not divide an array are left out.

    Returns:
      The module, or the tree, with the saved arrays, pruned widths included. A module
      is in the mode (training or evaluation) in which it was saved, and its layers have
      the saved values of attributes that are flags or integers.

    Raises:
      TPPError: If there is no readable model, its structure is unknown without
        ``model``, or its classes, arrays, shapes or types differ from those of
        ``model``; or a sharding does not fit.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> save_model(folder, {"w": jnp.ones(3)})
      >>> load_model(folder)["w"].shape
      (3,)
    """
    arrays, meta = _load(path, sharding)
    contents = meta.get("contents", {})
    saved = leaves.decode(
        arrays,
        contents.get("leaves", {}),
        exact=bool(contents),
        shardings=sharding,
    )
    if contents.get("tree") is not None:
        return _filled_tree(path, saved, contents, model)
    if model is None and meta["model"] is None:
        raise TPPError(
            f"the model at {path} is not one of tpp_jax.models.create: pass "
            "load_model an unpruned module of its class"
        )
    if not contents and model is not None and not _is_module(model):
        return _filled_tree(path, saved, contents, model)  # saved by the first version
    given = create_abstract(**meta["model"]) if model is None else model
    if not _is_module(given):
        raise TPPError(
            f"the model at {path} is a {contents.get('class', 'module')}: pass "
            f"load_model an unpruned module of its class, and not a "
            f"{type(given).__name__}"
        )
    _check_classes(contents, given)
    if model is not None:
        _check_leaves(saved, contents, nnx.state(given), type(given).__name__)
    loaded = _filled_module(given, saved)
    _restore_attributes(loaded, given, meta)
    return loaded


def load_model_info(path: str | pathlib.Path) -> dict[str, Any]:
    """Returns the spec, plan, config and metrics that were saved with a model.

    Args:
      path: Folder of the saved model.

    Returns:
      ``model``, the arguments of ``tpp_jax.models.create`` or None; ``plan``, which
      :meth:`tpp_jax.Plan.from_dict` reads, or None; ``config`` and ``metrics``.

    Raises:
      TPPError: If there is no readable model.

    Example:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
      >>> save_model(folder, {"w": jnp.ones(3)}, metrics={"accuracy": 0.5})
      >>> load_model_info(folder)["metrics"]
      {'accuracy': 0.5}
    """
    meta = _load(path, info=True)[1]
    return {key: value for key, value in meta.items() if key != "contents"}


def create_abstract(
    name: str, num_classes: int, image_shape: Sequence[int]
) -> nnx.Module:
    """Returns a network of ``tpp_jax.models`` without arrays, for its structure.

    Args:
      name: Name of the network.
      num_classes: Number of logits.
      image_shape: Shape of one image, (height, width, channels).
    """
    height, width, channels = image_shape
    return nnx.eval_shape(
        lambda: models.create(
            name,
            num_classes=num_classes,
            image_shape=(height, width, channels),
            rngs=nnx.Rngs(0),
        )
    )


def with_arrays(model: nnx.Module, arrays: Mapping[str, Any]) -> nnx.Module:
    """Returns a model of the same structure with the given arrays.

    Args:
      model: Module with the structure, whose random streams are kept.
      arrays: Arrays by name.

    Raises:
      TPPError: If the names are not those of the model's arrays.
    """
    graphdef, streams, state = nnx.split(model, nnx.RngState, ...)
    given = {name: jnp.asarray(x) for name, x in arrays.items()}
    return nnx.merge(graphdef, streams, _filled(state, given, type(model).__name__))


# Description of a model


def _facts(model: Any, plan: Plan | None) -> dict[str, Any]:
    spec = getattr(model, "spec", None)
    known = isinstance(spec, models.ModelSpec)
    return {
        "model": dataclasses.asdict(spec) if known else None,
        "plan": None if plan is None else plan.to_dict(),
        "num_groups": group_counts(model) if _is_module(model) else {},
        "fields": {} if plan is None else plan.field_values(),
    }


def _is_module(model: Any) -> bool:
    return isinstance(model, nnx.Pytree)


def _classes(model: nnx.Module) -> dict[str, str]:
    return {path: _class_name(module) for path, module in modules(model)}


def _class_name(module: nnx.Module) -> str:
    # A pruned Linen module inside an NNX module has a class of this library.
    bridge = isinstance(module, nnx.bridge.ToNNX)
    return "ToNNX" if bridge else type(module).__name__


def _settings(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """Returns the flags and integers of every module, by its path.

    Flags are its mode; integers, such as a number of heads, may be changed by pruning.
    """
    found = {}
    for path, module in modules(model):
        settings = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and _is_setting(name, value)
        }
        if settings:
            found[path] = settings
    return found


def _is_setting(name: str, value: Any) -> bool:
    if type(value) is tuple:
        return all(type(number) is int for number in value)
    return type(value) in (bool, int) or (value is None and name in _MODES)


def _set(model: nnx.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    for path, module in modules(model):
        for name, value in settings.get(path, {}).items():
            value = tuple(value) if isinstance(value, list) else value
            ours = vars(module).get(name, "")
            same_type = _is_setting(name, ours) and type(ours) is type(value)
            if same_type or name in _MODES:
                setattr(module, name, value)


def _restore_attributes(
    loaded: nnx.Module, given: nnx.Module, meta: Mapping[str, Any]
) -> None:
    """Sets the attributes of a loaded module to those of the saved one."""
    numbers = meta.get("num_groups") or {}
    state = named_leaves(nnx.state(given))
    shapes = {name: jnp.shape(leaf) for name, leaf in state.items()}
    follow_arrays(loaded, counted_groups(numbers), shapes)
    _set(loaded, meta.get("contents", {}).get("settings", {}))
    # Settings that a cut has changed.
    set_fields_of_modules(modules(loaded), meta.get("fields") or {})


def _unpruned_shapes(plan: Plan, names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the shape before the cut of every leaf that the plan may cut."""
    found = {}
    for name in names:
        parameter = longest_known_suffix(name, plan.groups.shapes)
        if parameter is not None and parameter in plan.groups.members:
            found[name] = list(plan.groups.shapes[parameter])
    return found


def _json_ready(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data as they will be read from JSON, so that they can be compared."""
    try:
        return json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise TPPError(
            f"config and metrics are kept as JSON, which cannot represent them: {error}"
        ) from error


# Filling a given structure with saved arrays


def _filled_module(model: nnx.Module, saved: Mapping[str, Any]) -> nnx.Module:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, _filled(state, saved, type(model).__name__))


def _filled(tree: Any, saved: Mapping[str, Any], title: str) -> Any:
    names = leaves.unique_names(tree)
    _check_names(names, saved, title)
    given, structure = jax.tree.flatten(tree)
    found = [
        leaf if isinstance(saved[name], leaves.Other) else saved[name]
        for name, leaf in zip(names, given, strict=True)
    ]
    return jax.tree.unflatten(structure, found)


def _filled_tree(
    path: str | pathlib.Path,
    saved: Mapping[str, Any],
    contents: Mapping[str, Any],
    tree: Any,
) -> Any:
    if tree is None:
        return leaves.rebuild(contents["tree"], saved)
    if _is_module(tree) or isinstance(tree, linen.Module):
        raise TPPError(
            f"the model at {path} is a tree of arrays, and not a module: load it "
            f"without the {type(tree).__name__}, or pass a tree of the same structure"
        )
    name = f"tree ({type(tree).__name__})"
    _check_leaves(saved, contents, tree, name)
    return _filled(tree, saved, name)


def _check_classes(contents: Mapping[str, Any], model: nnx.Module) -> None:
    saved, ours = contents.get("classes") or {}, _classes(model)
    for path in saved.keys() & ours.keys():
        if saved[path] != ours[path]:
            where = f", at {path}," if path else ""
            raise TPPError(
                f"the saved arrays are not those of this {type(model).__name__}: "
                f"the saved model{where} is a {saved[path]} and the given one is a "
                f"{ours[path]}"
            )


def _check_names(names: Sequence[str], saved: Mapping[str, Any], title: str) -> None:
    if unpaired := sorted(set(names) ^ saved.keys()):
        more = "and more " if len(unpaired) > 5 else ""
        raise TPPError(
            f"the saved arrays are not those of this {title}: "
            f"{', '.join(unpaired[:5])} {more}do not match"
        )


def _check_leaves(
    saved: Mapping[str, Any], contents: Mapping[str, Any], tree: Any, title: str
) -> None:
    """Compares names, shapes and types with those of the tree to fill."""
    names = leaves.unique_names(tree)
    _check_names(names, saved, title)
    unpruned = contents.get("unpruned") or None
    problems = []
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        has, has_type = leaves.shape_and_dtype(saved[name])
        wants, wants_type = leaves.shape_and_dtype(leaf)
        if has_type != wants_type:
            problems.append(f"{name} was saved as {has_type} and is {wants_type} here")
        elif has != wants and not _may_be_pruned(name, has, wants, unpruned):
            problems.append(f"{name} was saved as {has} and is {wants} here")
    if problems:
        more = len(problems) - _SHOWN
        raise TPPError(
            f"the saved arrays are not those of this {title}: "
            f"{'; '.join(problems[:_SHOWN])}{f'; and {more} more' if more > 0 else ''}"
        )


def _may_be_pruned(
    name: str,
    has: Sequence[int],
    wants: Sequence[int],
    unpruned: Mapping[str, Sequence[int]] | None,
) -> bool:
    """Returns whether pruning may have turned the one shape into the other.

    The plan that was saved with the model decides. Without one every axis may be
    shorter, except the window of a convolution.
    """
    if unpruned is not None:
        return name in unpruned and tuple(unpruned[name]) == tuple(wants)
    if len(has) != len(wants):
        return False
    window = len(has) - 2 if len(has) > 3 and name.endswith("kernel") else 0
    return tuple(has[:window]) == tuple(wants[:window]) and all(
        0 <= n <= most for n, most in zip(has, wants, strict=True)
    )


# Reading and writing


def _write(
    target: pathlib.Path, arrays: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    first, shared = processes.is_first(), jax.process_count() > 1
    saver = items.checkpointer()
    try:
        with folders.work_folder(target, shared, make=first) as work:
            new = work / folders.NEW
            processes.wait_for_all(f"saving {target.name}")
            with plain(new, new=True) as place, saver:
                saver.save(place, items.to_save(dict(arrays), meta))
            if first:
                manifest = {"format": _FORMAT, "files": folders.files_in(new)}
                (new / folders.MANIFEST).write_text(json.dumps(manifest, indent=1))
                folders.swap(work, target)
            processes.wait_for_all(f"saved {target.name}")
    except TPPError:
        raise
    except Exception as error:  # Orbax and TensorStore raise errors of any type
        raise TPPError(
            f"the model could not be saved at {target} ({folders.why(error)}); what "
            "was there before is unchanged"
        ) from error


def _load(
    path: str | pathlib.Path, shardings: Shardings | None = None, *, info: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays and the JSON of a saved model.

    Args:
      path: Folder of the model.
      shardings: Shardings of the arrays.
      info: Whether the JSON is enough.
    """
    folder = folders.whereabouts(folders.resolved(path))
    if not folder.is_dir():
        raise TPPError(f"there is no saved model at {folder}")
    arrays = None
    try:
        with plain(folder) as place:
            meta = items.restore_meta(place)
            if not info or items.SUMS not in meta:
                notes = meta.get("contents", {}).get("leaves", {})
                arrays = items.restore_arrays(place, shardings, on_host=notes)
        meta = items.checked(meta, arrays)
    except TPPError:
        raise
    except Exception as error:  # Orbax and TensorStore raise errors of any type
        raise TPPError(
            f"the saved model at {folder} cannot be read ({type(error).__name__}): it "
            "is damaged or not one of tpp_jax"
        ) from error
    if missing := _META - set(meta):
        raise TPPError(
            f"the saved model at {folder} is not one of tpp_jax: it has no "
            f"{sorted(missing)[0]}"
        )
    return arrays or {}, meta
