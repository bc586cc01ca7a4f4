"""What onnx2torch does not read, rewritten so that it does: newer opsets, paddings that follow from sizes,
sizes that are constants of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quincunx.deployment.onnx_operators import DOMAIN, READ, Padded

__all__ = ["fix_sizes", "in_opset_17"]

_FIRST, _NEWEST = 11, 17
# changed after opset 17 in the types that they take alone, or by attributes that may be left out
_UNCHANGED = {
    *("Cast", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "Reshape", "Shape", "Squeeze"),
    *("Unsqueeze", "Transpose", "Conv", "ConvTranspose", "MaxPool", "GlobalAveragePool"),
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
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    _pad_explicitly(made)
    _pad_all_axes(made, constants)
    _read_here(made)
    declared = _declared(made)
    if declared is None or declared.version <= _NEWEST:
        return made, []
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


def _read_here(proto: Any) -> None:
    """Operators that are read by modules of our own move to their domain."""
    import onnx

    for node in proto.graph.node:
        wrapped = node.op_type == "Pad" and _given(node).get("mode") == b"wrap"
        if not node.domain and (node.op_type in READ or wrapped):
            node.domain = DOMAIN
    if any(node.domain == DOMAIN for node in proto.graph.node):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _shapes(proto: Any) -> dict[str, list[int]]:
    """Sizes of values by name, 0 for one that the file leaves free."""
    return {
        value.name: [entry.dim_value for entry in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _given(node: Any) -> dict[str, Any]:
    """Attributes of a node by name."""
    import onnx

    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def _give(node: Any, **attributes: Any) -> None:
    """Set attributes of a node."""
    import onnx

    _leave_out(node, *attributes)
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())


def _pad_explicitly(proto: Any) -> None:
    """Write paddings that follow from sizes as numbers, or as a node of its own where sizes are free."""
    import onnx

    shapes = _shapes(proto)
    shapes |= {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    made = []
    for node in proto.graph.node:
        before, after = [], []
        known = [shapes.get(name, []) for name in node.input]
        sizes = "kernel_shape" in _given(node) or (len(known) > 1 and len(known[1]) > 2)
        if node.domain or not known or len(known[0]) < 3 or not sizes:
            # what is missing is told where the node is read
            pass
        elif node.op_type in ("Conv", "MaxPool", "AveragePool"):
            before = _pad_windows(node, known)
        elif node.op_type == "ConvTranspose":
            after = _cut_windows(node, known)
        for extra in after[1:]:
            proto.graph.initializer.append(extra)
        made += [*before, node, *after[:1]]
        for extra in before:
            free = [None] * len(known[0])
            proto.graph.value_info.append(
                onnx.helper.make_tensor_value_info(extra.output[0], onnx.TensorProto.FLOAT, free)
            )
    del proto.graph.node[:]
    proto.graph.node.extend(made)


def _windows(node: Any, known: Sequence[list[int]]) -> tuple[list[int], list[int], bytes]:
    """How far windows reach, their strides, and how they are padded."""
    given, axes = _given(node), len(known[0]) - 2
    kernel = given.get("kernel_shape") or known[1][2:]
    dilations = given.get("dilations") or [1] * axes
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    return reach, list(given.get("strides") or [1] * axes), given.get("auto_pad", b"NOTSET")


def _shared(lacking: Sequence[int], lower: bool) -> list[int]:
    """Paddings of all axes' beginnings, then of their ends."""
    less = [total // 2 for total in lacking]
    more = [total - total // 2 for total in lacking]
    return [*more, *less] if lower else [*less, *more]


def _pad_windows(node: Any, known: Sequence[list[int]]) -> list[Any]:
    """Write a node's paddings as numbers; return what pads in its place where sizes are free."""
    import onnx

    reach, stride, auto = _windows(node, known)
    mean = node.op_type == "AveragePool"
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        lower, free = auto == b"SAME_LOWER", False
        lacking = []
        for length, over, step in zip(known[0][2:], reach, stride, strict=True):
            free |= not length and step > 1 < over
            lacking.append(max(over - 1 - (length - 1) % step, 0))
        if not free:
            _leave_out(node, "auto_pad")
            _give(node, pads=_shared(lacking, lower))
        elif any(over < step for over, step in zip(reach, stride, strict=True) if over > 1):
            # positions that no window covers; the converter names the node
            return []
        elif mean:
            node.domain = DOMAIN
            return []
        else:
            padded = f"{node.output[0]}.padded"
            value = float("-inf") if node.op_type == "MaxPool" else 0.0
            before = onnx.helper.make_node(
                "SamePad", [node.input[0]], [padded], f"{node.name or node.output[0]}.pad", domain=DOMAIN,
                reach=reach, stride=stride, lower=int(lower), value=value,
            )  # fmt: skip
            node.input[0] = padded
            _give(node, auto_pad="VALID")
            return [before]
    pads = list(_given(node).get("pads") or [])
    if mean and pads[: len(reach)] != pads[len(reach) :]:
        node.domain = DOMAIN
    return []


def _cut_windows(node: Any, known: Sequence[list[int]]) -> list[Any]:
    """Make the paddings of a transposed convolution equal; return the node that cuts off the rest, and its
    constants."""
    import onnx

    reach, stride, auto = _windows(node, known)
    given, axes = _given(node), len(reach)
    added = list(given.get("output_padding") or [0] * axes)
    pads = list(given.get("pads") or [0] * 2 * axes)
    if "output_shape" in given or auto in (b"SAME_UPPER", b"SAME_LOWER"):
        lengths = known[0][2:]
        wanted = list(given.get("output_shape") or [])[-axes:]
        if wanted and not all(lengths):
            return []
        sizes = wanted or [0] * axes
        lacking = [
            step * (length - 1) + more + over - size if wanted else over + more - step
            for length, over, step, more, size in zip(lengths, reach, stride, added, sizes, strict=True)
        ]
        added = [more + max(-total, 0) for more, total in zip(added, lacking, strict=True)]
        pads = _shared([max(total, 0) for total in lacking], auto != b"SAME_UPPER")
        _leave_out(node, "auto_pad", "output_shape")
        _give(node, output_padding=added)
    elif pads[:axes] == pads[axes:]:
        return []
    least = [min(pair) for pair in zip(pads[:axes], pads[axes:], strict=True)]
    _give(node, pads=[*least, *least])
    starts = [pad - size for pad, size in zip(pads[:axes], least, strict=True)]
    ends = [size - pad for pad, size in zip(pads[axes:], least, strict=True)]
    if not any(starts) and not any(ends):
        return []
    whole, cut = f"{node.output[0]}.whole", node.output[0]
    node.output[0] = whole
    numbers = {
        "starts": starts,
        "ends": [end or 2**31 - 1 for end in ends],
        "axes": list(range(2, axes + 2)),
    }
    constants = [
        onnx.helper.make_tensor(f"{cut}.{name}", onnx.TensorProto.INT64, [axes], values)
        for name, values in numbers.items()
    ]
    names = [whole, *(tensor.name for tensor in constants)]
    return [onnx.helper.make_node("Slice", names, [cut], f"{node.name or cut}.cut"), *constants]


def _pad_all_axes(proto: Any, constants: dict[str, Any]) -> None:
    """Pads of some axes become pads of all."""
    import onnx

    shapes = _shapes(proto)
    for node in proto.graph.node:
        if node.domain or node.op_type != "Pad" or len(node.input) < 4:
            continue
        rank = len(shapes.get(node.input[0], []))
        given = [constants.get(node.input[place]) for place in (1, 3)]
        if not rank or any(tensor is None for tensor in given):
            continue
        pads, axes = (onnx.numpy_helper.to_array(tensor).tolist() for tensor in given)
        every = [0] * 2 * rank
        for place, axis in enumerate(axes):
            every[axis % rank], every[axis % rank + rank] = pads[place], pads[place + len(axes)]
        name = f"{node.output[0]}.pads"
        constants[name] = onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [2 * rank], every)
        proto.graph.initializer.append(constants[name])
        node.input[1] = name
        del node.input[2 if not node.input[2] else 3 :]


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

    shapes = _shapes(proto)
    for node in proto.graph.node:
        given = _given(node)
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

    given = _given(node)
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
        return Padded(str(module.mode), values[0], values[1][0] if len(values) > 1 else 0.0)
    if kind == "OnnxSplit13" and len(values) == 1:
        return _Pieces(values[0], int(str(module.axis)))
    if kind == "OnnxSlice":
        starts, ends = values[:2]
        axes = values[2] if len(values) > 2 else list(range(len(starts)))
        steps = values[3] if len(values) > 3 else [1] * len(starts)
        if min(steps) > 0:
            return _Cut(list(zip(axes, starts, ends, steps, strict=True)))
    return None
