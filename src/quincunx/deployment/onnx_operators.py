"""Operators that onnx2torch does not have, as modules; they are its converters in a domain of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DOMAIN", "READ", "Padded", "register"]

# nodes of it are made here and never written
DOMAIN = "read"

_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
_MEAN = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Padded(nn.Module):
    """Pads, or cuts off.

    Args:
        mode: of ``F.pad``.
        sides: for each axis at its beginning, then for each at its end; last axes without any are left out.
        value: of a constant padding.
    """

    def __init__(self, mode: str, sides: Sequence[int], value: float = 0.0) -> None:
        super().__init__()
        half = len(sides) // 2
        pairs = zip(reversed(sides[:half]), reversed(sides[half:]), strict=True)
        self.sides = [side for pair in pairs for side in pair]
        while len(self.sides) > 2 and self.sides[-2:] == [0, 0]:
            del self.sides[-2:]
        self.mode, self.value = mode, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sides, self.mode, self.value if self.mode == "constant" else None)


class _Same(nn.Module):
    """Pads so that windows of a stride begin at every multiple of it: ceil(size / stride) of them.

    Of a window that reaches over e positions at stride s, a size of n lacks e - 1 - (n - 1) mod s.
    """

    def __init__(self, reach: Sequence[int], stride: Sequence[int], lower: bool, value: float) -> None:
        super().__init__()
        self.reach, self.stride, self.lower, self.value = list(reach), list(stride), lower, value

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for axis in reversed(range(len(self.reach))):
            reach, stride = self.reach[axis], self.stride[axis]
            lacking = reach - 1 - (x.shape[axis + 2] - 1) % stride if reach > 1 else 0
            first = lacking - lacking // 2 if self.lower else lacking // 2
            sides += [first, lacking - first]
        return F.pad(x, sides, value=self.value)


class _Mean(nn.Module):
    """Average pooling over the positions that there are, whatever is padded."""

    def __init__(self, pad: nn.Module, pool: nn.Module, whole: bool) -> None:
        super().__init__()
        self.pad, self.pool, self.whole = pad, pool, whole

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.pool(self.pad(x))
        return mean if self.whole else mean / self.pool(self.pad(torch.ones_like(x[:1, :1])))


class _ToDepth(nn.Module):
    """Squares of positions become channels, the place in a square first."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        squares = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
        return squares.reshape(n, c * b * b, h // b, w // b)


class _Swish(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.alpha * x)


class _Normalised(nn.Module):
    def __init__(self, order: int, axis: int) -> None:
        super().__init__()
        self.order, self.axis = order, axis

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, p=self.order, dim=self.axis)


class _Sampled(nn.Module):
    def __init__(self, mode: str, padding: str, corners: bool) -> None:
        super().__init__()
        self.mode, self.padding, self.corners = mode, padding, corners

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, self.mode, self.padding, self.corners)


# ---------------------------------------------------------------- of a node and its graph


def _weights(node: Any, graph: Any) -> list[Tensor]:
    """
    Raises:
        NotImplementedError: an input after the first that is computed.
    """
    names = [name for name in node.input_values[1:] if name]
    if not all(name in graph.initializers for name in names):
        raise NotImplementedError("weights that the file does not hold")
    return [graph.initializers[name].to_torch() for name in names]


def _rank(node: Any, graph: Any) -> int:
    """How many axes there are after the channels."""
    return len(graph.value_info[node.input_values[0]].type.tensor_type.shape.dim) - 2


def _group_norm(node: Any, graph: Any) -> nn.Module:
    scale, shift = _weights(node, graph)
    given = node.attributes
    made = nn.GroupNorm(given["num_groups"], scale.numel(), given.get("epsilon", 1e-5))
    made.load_state_dict({"weight": scale, "bias": shift})
    return made


def _rms_norm(node: Any, graph: Any) -> nn.Module:
    (scale,) = _weights(node, graph)
    given = node.attributes
    axis, axes = given.get("axis", -1), _rank(node, graph) + 2
    if scale.dim() != (-axis if axis < 0 else axes - axis):
        raise NotImplementedError(f"a scale of {scale.dim()} axes for those from {axis}")
    made = nn.RMSNorm(list(scale.shape), given.get("epsilon", 1e-5))
    made.load_state_dict({"weight": scale})
    return made


def _shrink(node: Any, _: Any) -> nn.Module:
    bound, bias = node.attributes.get("lambd", 0.5), node.attributes.get("bias", 0.0)
    if bias not in (0.0, bound):
        raise NotImplementedError(f"a bias of {bias:g} beside a bound of {bound:g}")
    return nn.Softshrink(bound) if bias else nn.Hardshrink(bound)


def _gelu(node: Any, _: Any) -> nn.Module:
    return nn.GELU(approximate=node.attributes.get("approximate", "none"))


def _swish(node: Any, _: Any) -> nn.Module:
    alpha = node.attributes.get("alpha", 1.0)
    return nn.SiLU() if alpha == 1 else _Swish(alpha)


def _normalised(node: Any, _: Any) -> nn.Module:
    return _Normalised(node.attributes.get("p", 2), node.attributes.get("axis", -1))


def _sampled(node: Any, _: Any) -> nn.Module:
    given = node.attributes
    mode = given.get("mode", "bilinear")
    # names of opset 20
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return _Sampled(mode, given.get("padding_mode", "zeros"), bool(given.get("align_corners", 0)))


def _same(node: Any, _: Any) -> nn.Module:
    given = node.attributes
    return _Same(given["reach"], given["stride"], bool(given["lower"]), given["value"])


def _mean(node: Any, graph: Any) -> nn.Module:
    """
    Raises:
        NotImplementedError: dilated windows, or more than three axes.
    """
    given, rank = node.attributes, _rank(node, graph)
    kernel, stride = given["kernel_shape"], given.get("strides", [1] * rank)
    if rank not in _MEAN or any(step != 1 for step in given.get("dilations", [])):
        raise NotImplementedError(f"average pooling over {rank} axes, or dilated")
    pool = _MEAN[rank](kernel, stride, ceil_mode=bool(given.get("ceil_mode", 0)))
    if "pads" in given:
        pads = given["pads"]
        pad: nn.Module = Padded("constant", [0, 0, *pads[:rank], 0, 0, *pads[rank:]])
    else:
        pad = _Same(kernel, stride, given["auto_pad"] == "SAME_LOWER", 0.0)
    return _Mean(pad, pool, bool(given.get("count_include_pad", 0)))


def _wrapped(node: Any, graph: Any) -> nn.Module:
    return Padded("circular", _weights(node, graph)[0].tolist())


# by operator of the standard, in every node of it
READ: dict[str, Callable[[Any, Any], nn.Module]] = {
    "Gelu": _gelu,
    "GlobalMaxPool": lambda node, graph: _MAX[_rank(node, graph)](1),
    "GridSample": _sampled,
    "GroupNormalization": _group_norm,
    "LpNormalization": _normalised,
    "Mish": lambda node, graph: nn.Mish(),
    "RMSNormalization": _rms_norm,
    "Shrink": _shrink,
    "SpaceToDepth": lambda node, graph: _ToDepth(node.attributes["blocksize"]),
    "Swish": _swish,
    "ThresholdedRelu": lambda node, graph: nn.Threshold(node.attributes.get("alpha", 1.0), 0.0),
}
# in nodes that the rewrites choose
_CHOSEN: dict[str, Callable[[Any, Any], nn.Module]] = {
    "AveragePool": _mean,
    "Pad": _wrapped,
    "SamePad": _same,
}


def register() -> None:
    """Tell onnx2torch of the operators here, once."""
    from onnx2torch.node_converters.registry import _CONVERTER_REGISTRY, add_converter
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    known = {entry.operation_type for entry in _CONVERTER_REGISTRY if entry.domain == DOMAIN}

    def converter(build: Callable[[Any, Any], nn.Module], inputs: int) -> Callable[[Any, Any], Any]:
        def convert(node: Any, graph: Any) -> Any:
            named = OnnxMapping(inputs=node.input_values[:inputs], outputs=node.output_values)
            return OperationConverterResult(torch_module=build(node, graph), onnx_mapping=named)

        return convert

    for name, build in (READ | _CHOSEN).items():
        if name not in known:
            # what else a node has are weights, which its module holds
            inputs = 2 if name == "GridSample" else 1
            add_converter(operation_type=name, version=1, domain=DOMAIN)(converter(build, inputs))
