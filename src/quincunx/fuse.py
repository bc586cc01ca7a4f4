"""From a trained network to an inference copy made of programs.

The network is traced with torch.fx. Each convolution takes along what can ride on its output: batch
norm is folded into its weight, a residual addition and an activation go into its epilogue, and so does
the batch norm and ReLU that a pre-activation block puts in front of the next convolution. What is left
runs in torch as it was.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quincunx.methods.binaryconnect import pack_binary
from quincunx.nn import PerforatedConv2d, SampledConv2d, SampledConvTranspose2d, SampledDown2d, window_means
from quincunx.nodes import (
    CONVS,
    activation,
    addition,
    affine_of,
    drop_nothings,
    follower,
    give_sizes,
    is_map,
    module_of,
    out_of_place,
    padded_channels,
    size_of,
    subsampled,
    trace,
)
from quincunx.plan import Geometry
from quincunx.program import Program
from quincunx.separable import MaskedConv2d
from quincunx.steps import Follower, Shortcut, Step, keeps_compact

__all__ = ["fuse"]


def fuse(model: nn.Module) -> nn.Module:
    r"""An inference copy of a network, as fast as this machine's back end makes it.

    Batch norm is folded, w' = w \gamma / \sigma and b' = \beta + (b - \mu) \gamma / \sigma; bias,
    residual and activation run in the convolutions' epilogues. Maps of which only some positions are
    computed stay compact between layers: pointwise operations and 1 x 1 convolutions are done at those
    positions, while max pooling, global means and other convolutions read them through tables. Binary
    layers get their form with one bit a weight. On the native back end consecutive convolutions are one
    call, and each dense convolution goes to torch's own kernel or to ours, whichever is faster for its
    shape here (measured at the first input of a shape, once a process).

    Args:
        model: any network that ``torch.fx`` can trace, float32 or bfloat16, on the CPU; it stays as
            it is.

    Returns:
        A ``torch.fx.GraphModule`` that maps the same arguments to the same results, up to rounding,
        without those that are None by default. It is frozen: in evaluation mode, without parameters to
        train, in the dtype the model had.

    Raises:
        TypeError: not a module, or one whose forward cannot be traced.

    Example:
        >>> from quincunx import networks
        >>> model, x = networks.build("rsbn8", width=4).eval(), torch.randn(1, 3, 16, 16)
        >>> torch.allclose(fuse(model)(x), model(x), atol=1e-4)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    own = pack_binary(copy.deepcopy(model)).eval().requires_grad_(False)
    if isinstance(own, (nn.Conv2d, SampledConv2d)):
        own = nn.Sequential(own)  # a single layer is a network too
    graph = trace(own)
    drop_nothings(own, graph)
    out_of_place(own, graph)
    give_sizes(own, graph)
    with torch.no_grad():
        return _lower(own, graph).eval()


# ---------------------------------------------------------------- steps


def _start(model: nn.Module, node: fx.Node) -> Step | None:
    """The step of a convolution node with nothing riding on it yet; None if it has to stay in torch."""
    module = module_of(model, node)
    if node.target is window_means:
        return _means(model, node)
    if not isinstance(module, CONVS) or len(node.args) + len(node.kwargs) > 2:
        return None
    if module.weight.device.type != "cpu" or not isinstance(node.args[0], fx.Node):
        return None
    bias = None if module.bias is None else module.bias.float()
    weight, source = module.weight.detach(), node.args[0].name
    if isinstance(module, SampledConvTranspose2d):
        like = size_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("size"))
        if like is None:
            return None
        geometry = Geometry(module.kernel_size, (1, 1), module.borders, module.dilation)
        return Step(
            "transposed", source, weight, bias, geometry, module.groups, module.sampling.spec, like=like.name
        )
    if isinstance(module, SampledConv2d):
        kind = "filled" if isinstance(module, PerforatedConv2d) else "sampled"
        geometry = Geometry(module.kernel_size, module.stride, module.borders, module.dilation)
        resize = module.resize_masks if isinstance(module, MaskedConv2d) else None
        spec = module.sampling.spec
        return Step(kind, source, weight, bias, geometry, module.groups, spec, resize_masks=resize)
    if module.padding_mode != "zeros":
        return None
    # a Conv2d in words ("same", "valid") keeps its padding here, (left, right, top, bottom)
    left, right, top, bottom = module._reversed_padding_repeated_twice
    geometry = Geometry(
        _two(module.kernel_size), _two(module.stride), (top, bottom, left, right), _two(module.dilation)
    )
    return Step("dense", source, weight, bias, geometry, module.groups)


def _means(model: nn.Module, node: fx.Node) -> Step | None:
    """The step of means that were put in front of the convolution that alone reads them."""
    conv, source = module_of(model, next(iter(node.users))), node.args[0]
    if (
        not isinstance(conv, SampledDown2d)
        or conv.weight.device.type != "cpu"
        or not isinstance(source, fx.Node)
    ):
        return None
    # its taps stay among the computed positions, whose windows do not cross
    geometry = Geometry((conv.window, conv.window), (1, 1), (0, conv.window - 1, 0, conv.window - 1))
    none = conv.weight.detach().new_empty((conv.weight.shape[1] * conv.groups, 0, conv.window, conv.window))
    return Step("mean", source.name, none, None, geometry, 1, conv.sampling.spec)


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _folded(step: Step, scale: Tensor, shift: Tensor) -> Step:
    """Batch norm behind a step that has no shortcut yet."""
    weight = step.weight.double()
    if step.kind == "transposed":
        grouped = weight.view(step.groups, -1, *weight.shape[1:])
        weight = (grouped * scale.view(step.groups, 1, -1, 1, 1)).view(weight.shape)
    else:
        weight = weight * scale.view(-1, 1, 1, 1)
    bias = shift if step.bias is None else step.bias.double() * scale + shift
    return replace(step, weight=weight.to(step.weight.dtype), bias=bias.float())


@dataclass
class _Fused:
    """A step and the nodes it stands for."""

    step: Step | Follower
    main: fx.Node
    second: fx.Node | None


class _Absorber:
    """Finds what rides on each convolution's output."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.claimed: set[fx.Node] = set()

    def absorb(self, node: fx.Node, step: Step) -> _Fused:
        value = node
        norm = self._only_user(value)
        if norm is not None and (affine := affine_of(self.model, norm)) is not None:
            step, value = _folded(step, *affine), norm
            self.claimed.add(value)
        step, value = self._shortcut(step, value)
        self.claimed.add(value)
        user = self._only_user(value)
        if user is not None and (kind := activation(self.model, user)):
            step, value = replace(step, activation=kind), user
        self.claimed.add(value)
        before = set(self.claimed)
        second = None
        if step.activation == 0:
            step, second = self._pre_activation(step, value)
        # what another step has claimed still reads this one
        readers = set(value.users) - (self.claimed - before)
        step = replace(
            step, out=value.name if readers else None, out2=second.name if second is not None else None
        )
        return _Fused(step, value, second)

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0] not in self.claimed else None

    def _shortcut(self, step: Step, value: fx.Node) -> tuple[Step, fx.Node]:
        if step.kind == "filled":
            # the sum differs at positions that share a computed value
            return step, value
        user = self._only_user(value)
        if user is None or (terms := addition(user)) is None or terms[0] is terms[1]:
            return step, value
        other = terms[1] if terms[0] is value else terms[0]
        stride, base = 1, other
        if len(other.users) == 1:
            inner = padded_channels(other) or other
            if inner is other or len(inner.users) == 1:
                found = subsampled(inner)
                base, stride = found if found is not None else (inner, 1)
            else:
                base = inner
        if not is_map(self.model, base):
            return step, value
        return replace(step, shortcut=Shortcut(base.name, stride)), user

    def _pre_activation(self, step: Step, value: fx.Node) -> tuple[Step, fx.Node | None]:
        """The batch norm and ReLU, or the ReLU alone, that some block puts in front of its first
        convolution."""
        for user in value.users:
            if user not in self.claimed and activation(self.model, user) == 1:
                self.claimed.add(user)
                ones = torch.ones(step.out_channels)
                return replace(step, scale2=ones, shift2=torch.zeros_like(ones)), user
        for norm in value.users:
            affine, relu = affine_of(self.model, norm), self._only_user(norm)
            if affine is not None and relu is not None and activation(self.model, relu) == 1:
                self.claimed.update((norm, relu))
                return replace(step, scale2=affine[0].float(), shift2=affine[1].float()), relu
        return step, None


# ---------------------------------------------------------------- the new graph


def _lower(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph with programs in place of the convolutions and what they absorbed."""
    _pool_outside(model, graph)
    absorber = _Absorber(model)
    fused: dict[fx.Node, _Fused] = {}
    for node in graph.nodes:
        if (step := _start(model, node)) is not None:
            found = absorber.absorb(node, step)
            fused[found.main] = found
    _follow(model, graph, fused, absorber.claimed)
    seconds = {f.second: f for f in fused.values() if f.second is not None}
    by_name = {node.name: node for node in graph.nodes}

    def needs(node: fx.Node) -> list[fx.Node]:
        owner = fused.get(node) or seconds.get(node)
        return [by_name[n] for n in owner.step.needs] if owner else node.all_input_nodes

    live, todo = set(), [next(n for n in graph.nodes if n.op == "output")]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo += needs(node)
    return _Writer(model, graph, fused, seconds, live, needs).write()


def _follow(model: nn.Module, graph: fx.Graph, fused: dict[fx.Node, _Fused], claimed: set[fx.Node]) -> None:
    """Adds the nodes that can read compact maps as they are to the fused ones."""
    compact: dict[fx.Node, str] = {}
    for node in graph.nodes:
        owner = fused.get(node)
        if owner is not None and isinstance(owner.step, Step):
            fill = _fill(owner.step, {other.name: spec for other, spec in compact.items()})
            if fill:
                compact.update({value: fill for value in (owner.main, owner.second) if value is not None})
        elif node not in claimed and (found := follower(model, node, compact)) is not None:
            step, fill = found
            fused[node] = _Fused(step, node, None)
            if fill:
                compact[node] = fill


def _fill(step: Step, fills: dict[str, str]) -> str:
    """The sampling whose nearest computed positions stand for a step's output; empty for every one."""
    if step.fills:
        return step.sampling
    source = fills.get(step.source, "")
    shortcut = fills.get(step.shortcut.source, "") if step.shortcut else source
    return source if keeps_compact(step, source, shortcut) else ""


def _pool_outside(model: nn.Module, graph: fx.Graph) -> None:
    """A down-sampling half by average pooling, as the pooling and the sampled convolution it is."""
    for node in list(graph.nodes):
        module = module_of(model, node)
        if isinstance(module, SampledDown2d) and module.window > 1:
            with graph.inserting_before(node):
                pooled = graph.call_function(window_means, (node.args[0], module.window))
            node.replace_input_with(node.args[0], pooled)


class _Writer:
    """Copies live nodes, gathering steps into programs that are as long as what lies between allows."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        fused: dict[fx.Node, _Fused],
        seconds: dict[fx.Node, _Fused],
        live: set[fx.Node],
        needs: Callable[[fx.Node], list[fx.Node]],
    ) -> None:
        self.model, self.graph, self.fused, self.seconds = model, graph, fused, seconds
        self.live, self.needs = live, needs
        self.result = fx.Graph()
        self.copied: dict[fx.Node, fx.Node] = {}
        self.pending: list[_Fused] = []
        self.by_name = {node.name: node for node in graph.nodes}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        for reader in live:
            for node in needs(reader):
                self.readers.setdefault(node, []).append(reader)
        self.programs: dict[str, Program] = {}

    def write(self) -> fx.GraphModule:
        for node in self.graph.nodes:
            owner = self.fused.get(node)
            if owner is not None and self._joins(owner):
                if node in self.live or owner.second in self.live:
                    self.pending.append(owner)
            elif node in self.live and node not in self.seconds:
                if self._written_by_pending() & set(node.all_input_nodes):
                    self._flush()
                self.copied[node] = self.result.node_copy(node, lambda n: self.copied[n])
        modules: dict[str, Any] = {**dict(self.model.named_modules()), **self.programs}
        root = nn.Module()
        for node in self.result.nodes:
            if node.op == "call_module":
                _attach(root, str(node.target), modules[str(node.target)])
            elif node.op == "get_attr":
                _attach(root, str(node.target), operator.attrgetter(str(node.target))(self.model))
        return fx.GraphModule(root, self.result, type(self.model).__name__)

    def _joins(self, owner: _Fused) -> bool:
        """A map that has left its program is filled: what would have followed there is an ordinary node."""
        return isinstance(owner.step, Step) or self._written_by_pending().issuperset(
            owner.main.all_input_nodes
        )

    def _written_by_pending(self) -> set[fx.Node]:
        return {node for owner in self.pending for node in (owner.main, owner.second) if node is not None}

    def _flush(self) -> None:
        inside = self._written_by_pending()
        steps = [owner.step for owner in self.pending]
        needed = dict.fromkeys(self.by_name[name] for step in steps for name in step.needs)
        inputs = [node for node in needed if node not in inside]
        waiting = set(map(id, self.pending))
        outputs = [
            node
            for node in self.graph.nodes
            if node in inside and node in self.live and self._read_outside(node, waiting)
        ]
        name = f"program{len(self.programs)}"
        self.programs[name] = Program(steps, [n.name for n in inputs], [n.name for n in outputs])
        call = self.result.call_module(name, tuple(self.copied[n] for n in inputs))
        for i, node in enumerate(outputs):
            self.copied[node] = self.result.call_function(operator.getitem, (call, i))
        self.pending = []

    def _read_outside(self, node: fx.Node, waiting: set[int]) -> bool:
        owners = (self.fused.get(reader) or self.seconds.get(reader) for reader in self.readers.get(node, []))
        return any(owner is None or id(owner) not in waiting for owner in owners)


def _attach(root: nn.Module, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
        setattr(root, last, value)
    elif last not in dict(root.named_buffers(recurse=False)):
        root.register_buffer(last, value)
