"""A fused network as a module that exporters can trace: plain operators, or one node for each native
piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from quincunx.deployment.plain import PlainEnd, PlainProgram
from quincunx.fusion.exported import TorchNode
from quincunx.fusion.fuse import fuse
from quincunx.fusion.fused import Fused, copied_argument, match_layout, same_argument, tensor_argument
from quincunx.fusion.int8 import Int8Program
from quincunx.fusion.program import Program
from quincunx.fusion.serialise import NativePiece, TorchPiece, pieces
from quincunx.layers.binary import (
    BinaryConv2d,
    BinaryLinear,
    PackedConv2d,
    PackedLinear,
    _packed_conv,
    _packed_linear,
)
from quincunx.layers.blocks import PairedFill2d
from quincunx.layers.padded import continued, continued_sampling
from quincunx.layers.quantised import QuantConv2d, QuantLinear
from quincunx.layers.sampled import SampledConvTranspose2d
from quincunx.modules import copied, set_module

__all__ = ["Node", "OnnxNode", "TorchNode", "decoded", "lower"]


class Node(Protocol):
    """Makes a module of a native piece: one operator of an engine that has our kernels as a plug-in."""

    def __call__(self, piece: NativePiece) -> nn.Module:
        """Return a module that maps the piece's inputs [N, C, H, W] to a sequence of its outputs."""


class OnnxNode(nn.Module):
    """A piece as the operator quincunx::Program of an ONNX file; only an exporter can run it."""

    program: Tensor

    def __init__(self, piece: NativePiece) -> None:
        super().__init__()
        self.register_buffer("program", torch.frombuffer(bytearray(piece.data), dtype=torch.uint8))
        self.shapes = [tuple(shape) for shape in piece.output_shapes]

    def forward(self, *maps: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
            "quincunx::Program",
            (self.program, *maps),
            {},
            dtypes=[torch.float32] * len(self.shapes),
            shapes=[(maps[0].shape[0], *shape) for shape in self.shapes],
            version=1,
        )
        return found


class PluginProgram(nn.Module):
    """A program as nodes of an engine, with torch's functions between them where the kernels have none.

    Args:
        program: of a fused network.
        shapes: of its inputs, [N, C, H, W] each.
        node: makes the module of a native piece.

    Raises:
        ValueError: shapes that the program cannot read.
    """

    def __init__(self, program: Program, shapes: Sequence[Sequence[int]], node: Node) -> None:
        super().__init__()
        self.inputs, self.outputs = list(program.inputs), list(program.outputs)
        self.calls = nn.ModuleList()
        self.names: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        for piece in pieces(program, *shapes):
            self.calls.append(_Function(piece) if isinstance(piece, TorchPiece) else node(piece))
            self.names.append((piece.inputs, piece.outputs))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.inputs, maps, strict=True))
        for call, (sources, outs) in zip(self.calls, self.names, strict=True):
            found = call(*[values[name] for name in sources])
            values.update(zip(outs, found, strict=True))
        return tuple(values[name] for name in self.outputs)


class _Function(nn.Module):
    def __init__(self, piece: TorchPiece) -> None:
        super().__init__()
        self.function = piece.function

    def forward(self, *maps: Tensor) -> tuple[Tensor]:
        return (self.function(*maps),)


class _Half(nn.Module):
    """The transposed half of a spatial bottleneck, to the size of a map."""

    def __init__(self, up: SampledConvTranspose2d) -> None:
        super().__init__()
        self.up = up

    def forward(self, y: Tensor, like: Tensor) -> Tensor:
        return self.up(y, like.shape[2:])  # type: ignore[no-any-return]


class _ContinuedHalf(nn.Module):
    """A transposed half that continues its sampled map beyond the grid, for one size."""

    rows: Tensor

    def __init__(self, up: Any, shapes: Sequence[tuple[int, ...]], node: Node | None) -> None:
        super().__init__()
        (n, c, m, _), self.size = shapes[0], (shapes[1][0], shapes[1][1])
        how = up.sampling.spec, self.size, up.borders, up.padding_mode
        self.register_buffer("rows", continued(torch.arange(m).view(1, 1, m, 1), *how).flatten())
        made = SampledConvTranspose2d(
            up.in_channels,
            up.out_channels,
            up.kernel_size,
            sampling=continued_sampling(*how),
            padding=up.reach,
            dilation=up.dilation,
            groups=up.groups,
            bias=up.bias is not None,
        )
        made.load_state_dict(up.state_dict())
        example = torch.zeros(n, c, len(self.rows), 1), torch.zeros(n, 1, *self.size)
        self.step = lower(fuse(_Half(made).eval()), example, node)

    def forward(self, y: Tensor, _: object) -> Tensor:
        like = y[:, :1, :1] * y.new_zeros(1, 1, *self.size)
        return self.step(y[:, :, self.rows], like)  # type: ignore[no-any-return]


Shapes = list[tuple[int, ...]]


def _note(calls: dict[str, list[Shapes]], name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
    calls.setdefault(name, []).append([tuple(t.shape) if isinstance(t, Tensor) else tuple(t) for t in given])


def _continues(module: nn.Module) -> bool:
    return isinstance(module, SampledConvTranspose2d) and module.padding_mode != "zeros"


_PACKED = (_packed_conv, _packed_linear)
_PASSED_ON = (match_layout, tensor_argument, copied_argument)


def lower(fused: Fused, arguments: Sequence[Any], node: Node | None = None) -> fx.GraphModule:
    """Return a fused network without operators of this package, for inputs of one size and any batch.

    Args:
        fused: from :func:`quincunx.fuse`; it stays as it is.
        arguments: an example of its arguments.
        node: makes nodes of an engine with our kernels; None for plain operators.

    Raises:
        TypeError: a module with operators of this package that was not fused, or packed layers of one bit;
            as plain operators, a network in eight bits.
        ValueError: a program that cannot be lowered.

    Example:
        >>> model, x = qx.networks.build("rsbn8", width=4).eval(), torch.randn(2, 3, 12, 12)
        >>> plain = lower(qx.fuse(model), (x,))
        >>> torch.allclose(plain(x), model(x), atol=1e-4)
        True
    """
    calls: dict[str, list[Shapes]] = {}
    handles = []
    for name, module in fused.named_modules():
        if isinstance(module, Program) or _has_own(module):
            handles.append(module.register_forward_pre_hook(partial(_note, calls, name)))
    try:
        with torch.no_grad():
            fused(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    if any(value.target in _PACKED for value in fused.graph.nodes):
        raise TypeError("fused: has packed layers of one bit; fuse what decoded(model) returns")
    if node is None and any(isinstance(module, Int8Program) for module in fused.modules()):
        raise TypeError(
            "fused: in eight bits, which plain operators have not; our kernels as a plug-in have them"
        )
    graph = fx.Graph()
    graph.output(graph.graph_copy(fused.graph, {}))
    _simplify(graph)
    root, untraced = nn.Module(), nn.Module()
    for name, module in fused.named_children():
        if isinstance(module, Program):
            shapes = calls[name][-1]
            made = PlainProgram(module, shapes) if node is None else None
            root.add_module(name, made or PluginProgram(module, shapes, node))  # type: ignore[arg-type]
        else:
            untraced.add_module(name, decoded(module))
            root.add_module(name, copied(untraced.get_submodule(name), share=True))
    root._parameters |= fused._parameters
    root._buffers |= fused._buffers
    # what no forward calls is in no file
    while left := [name for name, module in root.named_modules() if _is_own(module) and name in calls]:
        set_module(root, *_lower_part(untraced, left[0], calls, node))
    return fx.GraphModule(root, graph).eval().requires_grad_(False)


def _simplify(graph: fx.Graph) -> None:
    """Leave out what only a caller in Python needs: memory formats and checks of arguments."""
    for value in list(graph.nodes):
        if value.op != "call_function":
            continue
        if value.target in _PASSED_ON:
            value.replace_all_uses_with(value.args[0])
            graph.erase_node(value)
        elif value.target is same_argument:
            graph.erase_node(value)
    graph.lint()


def decoded(module: nn.Module) -> nn.Module:
    """Return a network with dense layers instead of quantised and one-bit ones, which no engine has.

    Of one-bit layers :func:`quincunx.fuse` leaves operators without the layers, so that this comes first.

    Example:
        >>> model = nn.Sequential(qx.BinaryConv2d(3, 4, 3)).eval()
        >>> x = torch.randn(1, 3, 8, 8)
        >>> torch.allclose(lower(qx.fuse(decoded(model)), (x,))(x), model(x), atol=1e-5)
        True
    """
    kinds = (QuantConv2d, BinaryConv2d, PackedConv2d, QuantLinear, BinaryLinear, PackedLinear)
    if any(isinstance(layer, kinds) for layer in module.modules()):
        module = copied(module, share=True)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, kinds):
            module = set_module(module, name, _dense(layer))
    return module


def _dense(layer: Any) -> nn.Module:
    weight, bias = layer.weight.detach(), layer.bias
    if isinstance(layer, (BinaryConv2d, BinaryLinear)):
        return _dense(layer.pack())
    if isinstance(layer, (QuantLinear, PackedLinear)):
        made: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    else:
        made = dense_convolution(layer)
    inner: Any = made[-1] if isinstance(made, nn.Sequential) else made
    inner.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        inner.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made.eval()


def dense_convolution(layer: Any) -> nn.Module:
    """Return the dense convolution with the settings of a layer that stands for one; fresh weights."""
    padding, before = layer.padding, None
    if not isinstance(padding, str) and len(padding) == 4:
        top, bottom, left, right = padding
        before, padding = nn.ZeroPad2d((left, right, top, bottom)), 0
    made = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
    )
    return made if before is None else nn.Sequential(before, made)


def _is_own(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith("quincunx.layers.") and "Activation" not in type(module).__name__
    )


def _has_own(module: nn.Module) -> bool:
    return any(map(_is_own, module.modules()))


def _lower_part(
    root: nn.Module, name: str, calls: Mapping[str, Sequence[Shapes]], node: Node | None
) -> tuple[str, nn.Module]:
    """Lower the smallest part around a layer that is a network of its own; the exporter traces what calls it.

    Returns:
        The part's name, and what stands for it.

    Raises:
        TypeError: there is none: each gets several arguments or maps of several sizes, or cannot be traced.
    """
    place = name
    while place:
        part, given = root.get_submodule(place), calls.get(place, [])
        if given and len(given[0]) == 2 and all(shapes == given[0] for shapes in given):
            if _continues(part):
                return place, _ContinuedHalf(part, given[0], node)
            if isinstance(part, PairedFill2d):
                height, width = given[0][1]
                return place, PlainEnd(part, (height, width))
        if given and all(len(shapes) == 1 and shapes[0][1:] == given[0][0][1:] for shapes in given):
            with suppress(TypeError):
                fused = fuse(part)
                # what is left in it is lowered in its turn; a layer of ours that stays itself is not
                if not _has_own(fused) or not _is_own(part):
                    dtype = next((p.dtype for p in part.parameters()), torch.float32)
                    return place, lower(fused, (torch.zeros(given[0][0], dtype=dtype),), node)
        place = place.rpartition(".")[0]
    raise TypeError(
        f"model: layer {name!r} ({type(root.get_submodule(name)).__name__}) is inside a module that torch.fx "
        "cannot trace, which calls it with several arguments or with maps of several sizes, so that it "
        "cannot be exported; make that module traceable"
    )
