"""``fold_norms``: batch norms folded into the kernels before them, for inference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array

from tpp_jax.errors import TPPError
from tpp_jax.graph.arrays import on_host
from tpp_jax.graph.functions import Function, as_function, set_evaluation
from tpp_jax.pruning.chains import other_scales
from tpp_jax.pruning.checking import example
from tpp_jax.pruning.compensation import like_leaf, with_leaves
from tpp_jax.pruning.dataflow import Graph, read_graph, with_arrays
from tpp_jax.pruning.identities import Fold, find_folds

ModuleT = TypeVar("ModuleT", bound=nnx.Module)

_TOLERANCE = 1e-5  # of the largest output, in float32


class Norm(NamedTuple):
    """A multiplication of channels with parameters, such as a batch norm's.

    Attributes:
      name: Name of the layer; of several, if they follow the same kernel.
      kernel: Name of the kernel that it is folded into; None if it is not folded.
      reason: Reason why it is not folded, or None.

    Example:
      >>> Norm("bn1", "conv1.kernel", None).kernel
      'conv1.kernel'
    """

    name: str
    kernel: str | None
    reason: str | None


@overload
def fold_norms(
    model: ModuleT, *inputs: Any, params: None = None, **kwargs: Any
) -> ModuleT: ...


@overload
def fold_norms(
    model: linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    **kwargs: Any,
) -> Any: ...


def fold_norms(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    **kwargs: Any,
) -> Any:
    """Folds batch norms into the kernels before them, for inference.

    In evaluation mode a batch norm multiplies each channel with a number and adds
    another. Both are computed from parameters, so that a convolution or dense layer in
    front can do it: its kernel is multiplied with the first numbers, and one parameter
    (the norm's bias, or the layer's) becomes what is added in all. The model still runs
    the norm, which then subtracts 0, multiplies with exactly 1, and adds the bias:
    operations that a compiler removes where the parameters are constants, as in a file
    that was exported.

    Norms are found in the jaxpr, not by their class, and so are layer scales and other
    maps of single channels. A norm is left as it is if its channels do not come from a
    kernel alone (but from a sum of branches, for example), if anything else reads them,
    or if parameters are shared; :func:`tpp_jax.find_norms` says so for each. At the end
    both models are run and compared.

    Args:
      model: NNX module (run in evaluation mode, not modified), Linen module or function
        ``fn(params, *inputs)``.
      *inputs: Example inputs, on which the folded model is compared with the given one;
        abstract ones are replaced by random numbers.
      params: Parameter pytree of a function, or variables of a Linen module.
      **kwargs: Keyword arguments of the model, like ``inputs``.

    Returns:
      A new NNX module in evaluation mode, or the tree of parameters. It must not be
      trained on: the running statistics of folded norms are 0 and 1.

    Raises:
      TPPError: No norm can be folded; the parameters are abstract; or the outputs
        differ by more than 1e-5 of the largest (in float32; 16 times the rounding error
        where the model computes in less), which would be an error of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> import tpp_jax as tpp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
      >>> norm = net.layers[1]
      >>> norm.mean[...], norm.var[...] = jnp.arange(4.0), jnp.arange(1.0, 5)
      >>> folded = tpp.fold_norms(net, jnp.ones((1, 3)))
      >>> folded.layers[1].mean[...].tolist()
      [0.0, 0.0, 0.0, 0.0]
      >>> x = jnp.ones((2, 3))
      >>> bool(jnp.allclose(folded(x), net.eval() or net(x), atol=1e-5))
      True
    """
    function = as_function(model, params)
    leaves = _leaves(function)
    graph = read_graph(function, inputs, kwargs)
    folds = find_folds(graph, leaves)
    done = [fold for fold in folds if fold.chain.scales]
    if not done:
        raise _nothing(_norms(graph, folds))
    leaves = _folded(leaves, done)
    _compare(graph, function, leaves, inputs, kwargs)
    folded = with_leaves(function, params, leaves)
    if isinstance(folded, nnx.Module):
        set_evaluation(folded)
    return folded


def find_norms(
    model: nnx.Module | linen.Module | Callable[..., Any],
    *inputs: Any,
    params: Any = None,
    **kwargs: Any,
) -> tuple[Norm, ...]:
    """Lists what :func:`tpp_jax.fold_norms` folds, and what it leaves and why.

    Args:
      model: Model, as for :func:`tpp_jax.fold_norms`.
      *inputs: Example inputs, which may be abstract.
      params: Parameter pytree of a function, or variables of a Linen module.
      **kwargs: Keyword arguments of the model, like ``inputs``.

    Returns:
      All multiplications of channels with parameters: those that are folded in order of
      execution, then the others. What is inside a loop is not among them.

    Raises:
      TPPError: The parameters are abstract.

    Example:
      >>> import jax.numpy as jnp
      >>> def net(p, x):
      ...     y = (x @ p["w"]) * p["scale"]
      ...     return (x + y) * p["after_sum"]
      >>> p = {"w": jnp.ones((2, 2)), "scale": jnp.ones(2), "after_sum": jnp.ones(2)}
      >>> for norm in find_norms(net, jnp.ones((1, 2)), params=p):
      ...     print(norm.name, norm.kernel, norm.reason)
      scale w None
      after_sum None what it multiplies is a result of add, not of a kernel
    """
    function = as_function(model, params)
    graph = read_graph(function, inputs, kwargs)
    return tuple(_norms(graph, find_folds(graph, _leaves(function))))


def folded_params(
    function: Function, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Returns parameters in which all norms are folded that can be, without a check.

    Args:
      function: Model.
      inputs: Inputs of the model, which may be abstract.
      kwargs: Keyword arguments of the model.
    """
    leaves = _leaves(function)
    folds = find_folds(read_graph(function, inputs, kwargs), leaves)
    leaves = _folded(leaves, [fold for fold in folds if fold.chain.scales])
    structure = jax.tree.structure(function.params)
    return jax.tree.unflatten(structure, leaves.values())


def _folded(leaves: Mapping[str, Any], folds: Sequence[Fold]) -> dict[str, Any]:
    """Returns the parameters with folded ones in their places."""
    folded = dict(leaves)
    for fold in folds:
        kernel = leaves[fold.chain.kernel]
        shape = [fold.chain.channels.get(i, 1) for i in range(kernel.ndim)]
        exact = on_host(kernel).astype(np.float64) * fold.factor.reshape(shape)
        folded[fold.chain.kernel] = like_leaf(kernel, exact)
        for name, values in fold.values.items():
            folded[name] = like_leaf(leaves[name], values)
    return folded


def _leaves(function: Function) -> dict[str, Any]:
    leaves = jax.tree.leaves(function.params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TPPError(
            "norms are folded by the values of parameters, and these are abstract: "
            "initialise or load the model first"
        )
    return dict(zip(function.names, leaves, strict=True))


def _norms(graph: Graph, folds: Sequence[Fold]) -> list[Norm]:
    found = [
        Norm(fold.chain.name, fold.chain.kernel, None)
        for fold in folds
        if fold.chain.scales
    ]
    others = dict(reversed([*other_scales(graph, [fold.chain for fold in folds])]))
    return found + [Norm(name, None, why) for name, why in reversed(others.items())]


def _nothing(norms: Sequence[Norm]) -> TPPError:
    if not norms:
        return TPPError(
            "there is no norm to fold: no channels are multiplied with parameters in "
            "evaluation mode, outside of loops"
        )
    first = "; ".join(f"{norm.name}: {norm.reason}" for norm in norms[:3])
    more = f"; and {len(norms) - 3} more" if len(norms) > 3 else ""
    return TPPError(f"no norm can be folded into a kernel ({first}{more})")


def _compare(
    graph: Graph,
    function: Function,
    leaves: Mapping[str, Any],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Raises if a model does not compute the same with other parameters."""
    rng = np.random.default_rng(0)
    inputs, kwargs = jax.tree.map(lambda x: example(x, rng), (inputs, dict(kwargs)))
    call, arrays = with_arrays(function, inputs, kwargs)
    run = jax.jit(lambda params: _floats(call(params, arrays)))
    new = jax.tree.unflatten(jax.tree.structure(function.params), leaves.values())
    # Some devices would round what they multiply.
    with jax.default_matmul_precision("highest"):
        pairs = zip(run(function.params), run(new), strict=True)
        differences = [_difference(*map(np.asarray, pair)) for pair in pairs]
    worst = max(differences, default=0.0)
    if not worst <= max(_TOLERANCE, 16 * _rounding(graph)):
        raise TPPError(
            f"the folded model differs from the given one by {worst:.1g} of its "
            "largest output. Please report the model; until then, do not fold it"
        )


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Returns the largest difference, as a share of the largest finite number."""
    finite = np.isfinite(expected)
    largest = float(np.abs(expected[finite]).max(initial=0.0)) or 1.0
    return float(np.abs(found - expected)[finite].max(initial=0.0)) / largest


def _floats(outputs: Any) -> list[Array]:
    arrays = map(jnp.asarray, jax.tree.leaves(outputs))
    kinds = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in kinds]


def _rounding(graph: Graph) -> float:
    """Returns the largest rounding error among the types that a model computes in."""
    made = {value.dtype for op in graph.operations for value in op.results} - {None}
    floating = [dtype for dtype in made if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)
