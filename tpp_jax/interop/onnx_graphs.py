"""Rewrites of ONNX models that converters leave to others."""

from typing import Any

# Operations that broadcast their operands themselves.
_BROADCAST = frozenset(
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow "
    "Sub Where Xor".split()
)


def with_shared_constants(model: Any) -> Any:
    """Returns a model in which equal constants are one.

    Args:
      model: ONNX model.
    """
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateHashedInitializersPass

    read = onnx_ir.from_proto(model)
    DeduplicateHashedInitializersPass()(read)
    return onnx_ir.to_proto(read)


def without_expansions(model: Any) -> Any:
    """Returns a model in which operands are not expanded where this changes nothing.

    JAX broadcasts operands to equal shapes. If a size is symbolic, each time becomes
    several operations of ONNX that compute the shape, and a copy; but ONNX's own
    operations broadcast too.

    Args:
      model: ONNX model with shapes where they are known; modified.
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        one.name: _shape(one)
        for one in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes |= {one.name: tuple(one.dims) for one in graph.initializer}
    sources = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Expand" and _is_known(shapes.get(node.output[0]))
    }
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            source, shape = sources.get(name), shapes.get(name)
            if source is None:
                continue
            others = [x for k, x in enumerate(node.input) if k != i]
            broadcast = node.op_type in _BROADCAST
            same = shapes.get(source) == shape
            if same or (broadcast and shape in map(shapes.get, others)):
                node.input[i] = source
    _remove_unread(model.graph)
    return model


def _remove_unread(graph: Any) -> None:
    """Removes the nodes that no output depends on."""
    read = {one.name for one in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read |= _read_by(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _read_by(node: Any) -> set[str]:
    """Returns the names of what a node reads, and the bodies of loops inside it."""
    names = set(node.input)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            names |= {one.name for one in body.output}
            for inner in body.node:
                names |= _read_by(inner)
    return names


def _shape(value: Any) -> tuple[Any, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims
    )


def _is_known(shape: tuple[Any, ...] | None) -> bool:
    """Reports whether every size is a number or has a name."""
    return shape is not None and "" not in shape
