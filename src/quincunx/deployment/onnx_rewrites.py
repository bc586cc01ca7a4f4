"""What onnx2torch does not read, rewritten so that it does: newer opsets, sizes that are constants of the
file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["fix_sizes", "in_opset_17"]

_FIRST, _NEWEST = 11, 17
# changed after opset 17 in the types that they take alone, or by attributes that may be left out
_UNCHANGED = {
    *("Cast", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "Reshape", "Shape", "Squeeze"),
    *("Unsqueeze", "Transpose", "Conv", "ConvTranspose", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"),
    *("Dropout", "Elu", "HardSigmoid", "HardSwish", "InstanceNormalization", "Selu", "Softplus", "Softsign"),
    *("Round", "Sin", "Cos", "Tan", "Acos", "Asin", "Atan", "Det", "EyeLike", "ScatterND", "Clip", "Size"),
}


def in_opset_17(proto: Any) -> tuple[Any, list[tuple[str, str, int]]]:
    """Return a model whose operators have the form of opset 17, constants folded by onnxscript's optimizer.

    Args:
        proto: an ``onnx.ModelProto``; it may be changed.

    Returns:
        The model, and the nodes that have no such form: name, operator, opset.
    """
    import onnx
    from onnxscript import optimizer

    declared = _declared(proto)
    if declared is not None and declared.version < _FIRST:
        # attributes of that time became inputs
        proto = onnx.version_converter.convert_version(proto, _FIRST)
    made = optimizer.optimize(proto)
    _drop_allowzero(made)
    _bound_below(made)
    declared = _declared(made)
    if declared is None or declared.version <= _NEWEST:
        return made, []
    _without_functions(made)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    _name_sizes(made)
    refused = []
    for number, node in enumerate(made.graph.node):
        if node.domain not in ("", "ai.onnx"):
            continue
        since = onnx.defs.get_schema(node.op_type, declared.version).since_version
        if since > _NEWEST and not _made_older(node, constants):
            refused.append((node.name or f"number {number}", node.op_type, declared.version))
    declared.version = _NEWEST
    return made, refused


def _declared(proto: Any) -> Any:
    """The entry that says which opset of the standard's operators a model has."""
    return next((entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)


def _bound_below(proto: Any) -> None:
    """Clips of float32 without a lower bound get the lowest number."""
    import onnx

    kind, name = onnx.TensorProto.FLOAT, "quincunx.lowest"
    floats = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == kind}
    clips = [
        node
        for node in proto.graph.node
        if node.op_type == "Clip" and list(node.input[1:2]) == [""] and floats.issuperset(node.input[2:])
    ]
    for node in clips:
        node.input[1] = name
    if clips:
        lowest = float(torch.finfo(torch.float32).min)
        proto.graph.initializer.append(onnx.helper.make_tensor(name, kind, [], [lowest]))


def _without_functions(proto: Any) -> None:
    """Write out activations that became operators of their own after opset 17."""
    import onnx

    made = []
    for node in proto.graph.node:
        given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        tanh = given.get("approximate", b"none") != b"none"
        if node.domain or node.op_type not in ("Gelu", "Mish") or tanh:
            made.append(node)
            continue
        x, y = node.input[0], node.output[0]
        steps: tuple[tuple[str, list[str], str], ...] = (
            ("Softplus", [x], "plus"), ("Tanh", [f"{y}.plus"], "bent"), ("Mul", [x, f"{y}.bent"], ""),
        )  # fmt: skip
        if node.op_type == "Gelu":
            steps = (
                ("Div", [x, f"{y}.root"], "scaled"), ("Erf", [f"{y}.scaled"], "erf"),
                ("Add", [f"{y}.erf", f"{y}.one"], "sum"), ("Mul", [x, f"{y}.sum"], "whole"),
                ("Mul", [f"{y}.whole", f"{y}.half"], ""),
            )  # fmt: skip
            for name, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5)):
                number = onnx.helper.make_tensor(f"{y}.{name}", onnx.TensorProto.FLOAT, [], [value])
                proto.graph.initializer.append(number)
        for number, (kind, inputs, name) in enumerate(steps):
            out = f"{y}.{name}" if name else y
            made.append(onnx.helper.make_node(kind, inputs, [out], f"{node.name or y}.{number}"))
    del proto.graph.node[:]
    proto.graph.node.extend(made)


def _leave_out(node: Any, *names: str) -> None:
    """Remove attributes of a node."""
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _drop_allowzero(proto: Any) -> None:
    """Where a reshape has no size of 0, what one would mean makes no difference."""
    import onnx

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        sizes = constants.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        if sizes is not None and onnx.numpy_helper.to_array(sizes).all():
            _leave_out(node, "allowzero")


def _name_sizes(proto: Any) -> None:
    """Splits into a number of pieces, where the file says how long their axis is, get the pieces' sizes."""
    import onnx

    shapes = {
        value.name: [entry.dim_value for entry in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.value_info)
    }
    for node in proto.graph.node:
        given = {entry.name: entry.i for entry in node.attribute}
        if node.op_type != "Split" or "num_outputs" not in given:
            continue
        shape, axis, number = shapes.get(node.input[0], []), given.get("axis", 0), given["num_outputs"]
        length = shape[axis] if -len(shape) <= axis < len(shape) else 0
        each = -(-length // number)
        sizes = [min(each, length - each * place) for place in range(number)]
        if min(sizes) < 1:
            continue
        name = f"{node.output[0]}_sizes"
        proto.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [number], sizes))
        node.input.append(name)
        _leave_out(node, "num_outputs")


def _made_older(node: Any, constants: dict[str, Any]) -> bool:
    import onnx

    given = {attribute.name for attribute in node.attribute}
    kind = node.op_type
    if kind in _UNCHANGED:
        return True
    if kind == "Pad":
        return len(node.input) <= 3
    if kind == "Split":
        return len(node.input) == 2
    if kind == "AveragePool":
        return "dilations" not in given
    if kind == "Resize":
        return _resize_made_older(node)
    if kind.startswith("Reduce"):
        # axes were an attribute, of ReduceSum already an input
        if kind == "ReduceSum" or len(node.input) < 2:
            return "noop_with_empty_axes" not in given or kind == "ReduceSum"
        axes = constants.get(node.input[1])
        if axes is None:
            return False
        del node.input[1:]
        _leave_out(node, "noop_with_empty_axes")
        node.attribute.append(onnx.helper.make_attribute("axes", onnx.numpy_helper.to_array(axes).tolist()))
        return True
    return False


def _resize_made_older(node: Any) -> bool:
    """Leave out settings that opset 18 added, where they change nothing."""
    import onnx

    given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    usual = {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"}
    if any(given.get(name, value) != value for name, value in usual.items()) or "axes" in given:
        return False
    if given.get("coordinate_transformation_mode") == b"half_pixel_symmetric":
        return False
    _leave_out(node, *usual)
    return True


# ---------------------------------------------------------------- constants as numbers


class _Reshaped(nn.Module):
    """A 0 keeps the size of its place."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape([x.shape[place] if size == 0 else size for place, size in enumerate(self.sizes)])


class _Padded(nn.Module):
    def __init__(self, mode: str, sides: Sequence[int], value: float) -> None:
        super().__init__()
        half = len(sides) // 2
        pairs = zip(reversed(sides[:half]), reversed(sides[half:]), strict=True)
        self.sides = [side for pair in pairs for side in pair]
        while len(self.sides) > 2 and self.sides[-2:] == [0, 0]:
            del self.sides[-2:]
        self.mode, self.value = mode, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sides, self.mode, self.value if self.mode == "constant" else None)


class _Pieces(nn.Module):
    def __init__(self, sizes: Sequence[int], axis: int) -> None:
        super().__init__()
        self.sizes, self.axis = list(sizes), axis

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.sizes, self.axis)


class _Cut(nn.Module):
    def __init__(self, cuts: Sequence[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self.cuts = list(cuts)

    def forward(self, x: Tensor) -> Tensor:
        for axis, start, end, step in self.cuts:
            places: list[Any] = [slice(None)] * x.dim()
            places[axis] = slice(start, end if abs(end) < 2**31 - 1 else None, step)
            x = x[tuple(places)]
        return x


def fix_sizes(graph: fx.GraphModule) -> fx.GraphModule:
    """Put sizes that are constants of the file into the code of a converted network: a tensor whose values
    are sizes could not be traced. The network is changed and returned."""
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or len(node.args) < 2 or node.kwargs:
            continue
        constants = [_constant(graph, value) for value in node.args[1:]]
        made = _with_constants(graph.get_submodule(node.target), constants)
        if made is not None:
            graph.set_submodule(node.target, made)
            node.args = node.args[:1]
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in list(graph.named_buffers()):
        parent, _, last = name.rpartition(".")
        if parent == "initializers" and name not in used:
            delattr(graph.get_submodule(parent), last)
    graph.recompile()
    return graph


def _constant(graph: fx.GraphModule, value: Any) -> Tensor | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    parent, _, name = str(value.target).rpartition(".")
    found = getattr(graph.get_submodule(parent), name)
    return found if isinstance(found, Tensor) else None


def _with_constants(module: nn.Module, constants: Sequence[Tensor | None]) -> nn.Module | None:
    """A module of the converter with its constants in it, None for one that is left as it is."""
    if any(value is None for value in constants):
        return None
    values = [value.flatten().tolist() for value in constants if value is not None]
    kind = type(module).__name__
    if kind == "OnnxReshape" and len(values) == 1:
        return _Reshaped(values[0])
    if kind == "OnnxPadDynamic" and all(isinstance(side, int) for side in values[0]):
        return _Padded(str(module.mode), values[0], values[1][0] if len(values) > 1 else 0.0)
    if kind == "OnnxSplit13" and len(values) == 1:
        return _Pieces(values[0], int(str(module.axis)))
    if kind == "OnnxSlice":
        starts, ends = values[:2]
        axes = values[2] if len(values) > 2 else list(range(len(starts)))
        steps = values[3] if len(values) > 3 else [1] * len(starts)
        if min(steps) > 0:
            return _Cut(list(zip(axes, starts, ends, steps, strict=True)))
    return None
