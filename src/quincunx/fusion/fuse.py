"""From a trained network to an inference copy made of programs.

The network is traced with torch.fx. Each convolution takes along what can ride on its output: batch
norm is folded into its weight, a residual addition and an activation go into its epilogue, and so does
the batch norm, with or without ReLU, that a block puts in front of its first convolution. What is left
runs in torch as it was.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

from quincunx.fusion.calibrated import calibrate_network, quantise_network, read_images
from quincunx.fusion.constants import fold_constants, make_modules, make_norms
from quincunx.fusion.effects import (
    Effects,
    added_to,
    drop_unread,
    forget_layout,
    make_pure,
    may_raise,
    surely_changes,
)
from quincunx.fusion.epilogues import Activation
from quincunx.fusion.faster import speed_ratio
from quincunx.fusion.followers import follower
from quincunx.fusion.formats import gain_of, type_beside_int8
from quincunx.fusion.fused import (
    Fused,
    copied_argument,
    match_layout,
    same_argument,
    tensor_argument,
)
from quincunx.fusion.int8 import Int8Program
from quincunx.fusion.layouts import lay_out_weights
from quincunx.fusion.nodes import (
    activation,
    addition,
    affine_of,
    by_position,
    drop_nothings,
    give_sizes,
    grid_of,
    is_map,
    padded_channels,
    slope_of,
    subsampled,
)
from quincunx.fusion.padding import know_by_size, pad_apart
from quincunx.fusion.program import Program
from quincunx.fusion.steps import (
    Filling,
    Follower,
    Shortcut,
    Step,
    keeps_compact,
)
from quincunx.fusion.verified import Comparison
from quincunx.layers.binary import pack_binary
from quincunx.layers.changes import is_opaque, module_of
from quincunx.layers.eightbits import quantisation_of, round_weights
from quincunx.layers.graph import is_conv, is_leaf, trace
from quincunx.layers.padded import PaddedBySize2d
from quincunx.layers.paired import PairedDown2d, PairedUp2d
from quincunx.layers.sampled import (
    PerforatedConv2d,
    SampledConvTranspose2d,
    SampledDown2d,
    window_means,
)
from quincunx.layers.separable import MaskedConv2d
from quincunx.modules import copied, held_at, padding_of, surely
from quincunx.ops.geometry import Geometry

__all__ = ["fuse"]

# what the kernels and the epilogues compute in, by device
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


# whose forward is that of the network in them
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def fuse(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    calibration: Any = None,
    check: Any = None,
    force: bool = False,
    observer: str = "histogram",
    max_drop: float = 1.0,
    keep_ends: bool | None = None,
) -> Fused:
    r"""An inference copy of a network, as fast as this machine's back end makes it.

    Batch norm is folded, w' = w \gamma / \sigma and b' = \beta + (b - \mu) \gamma / \sigma; bias,
    residual and activation run in the convolutions' epilogues. Maps of which only some positions are
    computed stay compact between layers: pointwise operations and 1 x 1 convolutions are done at those
    positions, while max pooling, global means and other convolutions read them through tables. Binary
    layers get their form with one bit a weight. On the native back end consecutive convolutions are one
    call, and each dense convolution goes to torch's own kernel or to ours, whichever is faster for its
    shape here (measured at the first input of a shape, once a process).

    Only what surely does what its class says is taken: a layer of a subclass with a forward of its own, with
    hooks or with a parametrisation runs in torch as it is, and so does a module that torch.fx cannot look
    into (``.meta["whole"]`` of the result has these, with the reason). Operations in place that somebody
    else sees keep their order. Where the forward raises for some sizes of its maps, the copy does too.

    Args:
        model: a network that ``torch.fx`` can trace, on the CPU; it stays as it is. Convolutions in float32
            and bfloat16 are fused, others run in torch.
        dtype: number format that fused float32 convolutions compute in, such as ``torch.bfloat16``: maps and
            weights are in it, sums, bias and batch norm in float32. Arguments, results, and what runs in
            torch (a classifier, a mean over all positions behind a program) stay float32. A format that is
            slower here than float32 is not used: a warning says so, and ``.meta["dtype"]`` of the result
            has the format used and the measured ratio.
            ``torch.int8`` computes in eight bits: weights in int8 with a scale for each output channel, maps
            in uint8 with a scale and a zero point each, sums exact. The first convolution and the last layer
            are not; ``.meta["int8"]`` says which others are not, and why. They compute in bfloat16 where
            that is faster, else in float32 (``.meta["dtype"]["rest"]``).
        calibration: for ``torch.int8``, and no other: at least 16 images like those that the network is for,
            as a tensor or as batches, each a tensor or a tuple that begins with one (the rest is not read).
            Left out for a network that :func:`quincunx.calibrate` made, or that was loaded as one: what it
            found there holds, and ``observer``, ``max_drop`` and ``keep_ends`` say nothing.
        check: an example input (a tensor, or a tuple of arguments) on which the copy is compared with the
            model. With ``dtype``, the copies in both formats are timed on it.
        force: use ``dtype`` where it is slower, too.
        observer: of ``torch.int8``, where a map's range ends: "minmax", "percentile" (0.01% beyond it on
            either side) or "histogram" (least squares).
        max_drop: of ``torch.int8``, how many of 100 calibration images may get another answer than the
            model's; for networks that do not answer with a class, the relative error of outputs in percent.
            Layers are kept in real numbers, those that change answers most first, until it holds; 100 keeps
            none.
        keep_ends: of ``torch.int8``, whether the first convolution and the last layer stay in real numbers;
            None: where answers would else be half as far off again, or more than ``max_drop`` of 100 would
            change for them.

    Returns:
        A :class:`Fused`, a ``torch.fx.GraphModule``, that maps the same arguments to the same results, up to
        rounding. It is frozen: in evaluation mode, without gradients, in the dtype the model had, with flags
        and other arguments that have a default, but for tensors and numbers, fixed to it. It does not change
        its arguments. It may be pickled, copied, called from several threads, and exported by
        ``torch.export`` with ``strict=False`` for maps of one size and any batch.

    Raises:
        TypeError: not a module; one that cannot be copied or whose forward cannot be traced; hooks on all
            modules; with ``check``, another answer than the model's (the first module whose output
            differs is named).
        ValueError: a ``dtype`` that no kernel serves on the model's device, ``calibration`` that nothing
            needs, or that is missing, too small or not finite.

    Example:
        >>> from quincunx import networks
        >>> model, x = networks.build("rsbn8", width=4).eval(), torch.randn(1, 3, 16, 16)
        >>> torch.allclose(fuse(model, check=x)(x), model(x), atol=1e-4)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, _WRAPPERS):
        raise TypeError(f"model: a network in a {type(model).__name__}; fuse its .module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model: a scripted or traced module has no forward to look into; pass what it was made of"
        )
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise TypeError(
            "model: forward hooks are registered for all modules (register_module_forward_hook), and a fused "
            "network has no modules to call them on; remove them first"
        )
    if dtype is not None:
        if dtype == torch.int8:
            return _fuse_int8(model, calibration, check, force, observer, max_drop, keep_ends)
        return _fuse_in(model, dtype, calibration, check, force)
    if calibration is not None:
        raise ValueError("calibration: float32 and bfloat16 need none; leave it out")
    return _fuse(model, None, check)


def fuse_shared(model: nn.Module) -> Fused:
    """Return what :func:`fuse` does, in float32, with parameters in the network's own memory where a step
    takes them as they are: for a fused network that lives no longer than the network stays as it is.
    """
    return _fuse(model, None, None, share=True)


def _fuse(
    model: nn.Module, dtype: torch.dtype | None, check: Any, joins: bool = False, share: bool = False
) -> Fused:
    with torch.inference_mode(False), torch.no_grad():
        own = pack_binary(copied(model, share)).eval().requires_grad_(False)
        _make_permanent(own)
        if is_leaf(own):
            own = nn.Sequential(own)  # a single layer is a network too
        graph = trace(own)
        whole, modules = graph.whole, _calls(graph)
        for name, constant in graph.constants.items():
            own.register_buffer(name, constant)
        know_by_size(own)
        by_position(own, graph)
        drop_nothings(own, graph)
        drop_unread(own, graph)
        _guard_arguments(graph)
        fold_constants(own, graph)
        make_modules(own, graph)
        make_pure(own, graph)
        make_norms(own, graph)
        forget_layout(own, graph)
        give_sizes(own, graph)
        pad_apart(own, graph)
        _keep_arguments(own, graph)
        fixed = {name: value for name, value in graph.fixed.items() if _is_written(value)}
        result = _lower(own, graph, fixed, dtype, joins).eval()
        lay_out_weights(result)
    result.carry_hooks(own)
    result.meta["whole"] = whole
    if check is not None:
        Comparison(modules, dtype).check(model, result, check)
    return result


def _fuse_in(model: nn.Module, dtype: torch.dtype, calibration: Any, check: Any, force: bool) -> Fused:
    """The copy in another format where that is faster, the one in the model's format elsewhere."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    served = [kind for kind in _DTYPES.get(device, ()) if kind != torch.float32]
    if dtype != torch.float32 and dtype not in served:
        names = " or ".join(str(kind) for kind in (torch.float32, *served))
        raise ValueError(f"dtype={dtype}: expected {names} on {device}")
    if calibration is not None:
        raise ValueError(f"calibration: {dtype} needs none; leave it out")
    if dtype == torch.float32:
        return _fuse(model, None, check)
    result, used, ratio = _fuse(model, dtype, check), dtype, None
    if not any(isinstance(m, Program) and m.dtype != m.outside for m in result.modules()):
        used = torch.float32  # nothing here is in float32 and fused
    elif not force:
        plain = None if check is None else _fuse(model, None, check)
        if plain is None:
            ratio = gain_of(dtype, device)
        else:
            arguments = check if isinstance(check, tuple) else (check,)
            with torch.no_grad():
                runs = partial(result, *arguments), partial(plain, *arguments)
                ratio = median(speed_ratio(*runs) for _ in range(3))
        if ratio <= 1:
            warnings.warn(
                f"fuse: convolutions in {dtype} are {ratio:.2f} times as fast as in float32 here, so the "
                "copy computes in float32 (force=True takes the other format all the same)",
                UserWarning,
                stacklevel=3,
            )
            result, used = _fuse(model, None, None) if plain is None else plain, torch.float32
    result.meta["dtype"] = {
        "asked": str(dtype).removeprefix("torch."),
        "used": str(used).removeprefix("torch."),
        "ratio": ratio,
    }
    return result


def _fuse_int8(
    model: nn.Module,
    calibration: Any,
    check: Any,
    force: bool,
    observer: str,
    max_drop: float,
    keep_ends: bool | None,
) -> Fused:
    """The copy in eight bits where that is faster, the one in float32 elsewhere."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device != "cpu":
        raise ValueError(f"dtype=torch.int8: expected a model on the CPU, got one on {device}")
    if check is not None:
        _fuse(model, None, check)
    record = quantisation_of(model)
    if record is None or calibration is not None:
        own, record = calibrate_network(
            model, _fuse_joined, read_images(calibration), observer, max_drop, keep_ends
        )
    else:
        own = copied(model)
        # they are rounded already, unless the network was trained since
        round_weights(own, record.layers)
    rest = type_beside_int8()
    result = quantise_network(_fuse_joined(own), record, rest)
    used, ratio = torch.int8, None
    if not any(isinstance(module, Int8Program) for module in result.modules()):
        result, used, rest = _carry(result, _fuse(model, None, None)), torch.float32, torch.float32
        warnings.warn(
            "fuse: no layer of this network runs in eight bits, so the copy computes in float32"
            + "".join(f"; {name}: {why}" for name, why in result.meta["int8"]["kept"].items()),
            UserWarning,
            stacklevel=3,
        )
    elif not force:
        example = torch.zeros(8, *record.facts["input"]) if check is None else check
        arguments = example if isinstance(example, tuple) else (example,)
        other = _fuse(model, None, None)
        with torch.no_grad():
            ratio = median(
                speed_ratio(partial(result, *arguments), partial(other, *arguments)) for _ in range(3)
            )
        if ratio <= 1:
            warnings.warn(
                f"fuse: convolutions in eight bits are {ratio:.2f} times as fast as in float32 here, so the "
                "copy computes in float32 (force=True takes eight bits all the same)",
                UserWarning,
                stacklevel=3,
            )
            result, used, rest = other, torch.float32, torch.float32
    names = {key: str(kind).removeprefix("torch.") for key, kind in (("used", used), ("rest", rest))}
    result.meta["dtype"] = {"asked": "int8", **names, "ratio": ratio}
    return result


def _carry(old: Fused, new: Fused) -> Fused:
    new.meta["int8"] = old.meta["int8"]
    return new


def _fuse_joined(model: nn.Module) -> Fused:
    """The copy in float32 that becomes one in eight bits, where joins are copies of bytes."""
    return _fuse(model, None, None, joins=True)


# ---------------------------------------------------------------- before


def _make_permanent(own: nn.Module) -> None:
    """Weights that torch's own parametrisations compute at each call, computed once.

    By hand: torch takes the property off the class, which the user's own layer has too.
    """
    for module in list(own.modules()):
        if not parametrize.is_parametrized(module):
            continue
        chains = dict(module.parametrizations.items())  # type: ignore[union-attr, operator]
        if any(type(part).__module__ != parametrizations.__name__ for c in chains.values() for part in c):
            continue
        values = {name: getattr(module, name).detach() for name in chains}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _calls(graph: fx.Graph) -> dict[str, tuple[str, int]]:
    """For each node that calls a module: its path, and which call of it this is."""
    found: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            found[node.name] = path, counts.get(path, 0)
            counts[path] = counts.get(path, 0) + 1
    return found


def _is_written(value: Any) -> bool:
    """Whether a value is a constant that code can hold as it is printed."""
    if isinstance(value, tuple):
        return all(_is_written(part) for part in value)
    finite = not isinstance(value, float) or math.isfinite(value)
    return value is None or (type(value) in (bool, int, float, str) and finite)


def _guard_arguments(graph: fx.Graph) -> None:
    """Arguments whose type the forward asked for are what it was told they are."""
    last = None
    for node in graph.nodes:
        if node.op == "placeholder":
            last = node
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.meta.get("asked")]:
        with graph.inserting_after(last):
            guarded = graph.call_function(tensor_argument, (node, str(node.target)))
        _read_instead(node, guarded)


def _read_instead(node: fx.Node, made: fx.Node) -> None:
    """Whoever reads a node reads what was made of it, but for that itself."""
    for user in list(node.users):
        if user is not made:
            user.replace_input_with(node, made)


def _keep_arguments(own: nn.Module, graph: fx.Graph) -> None:
    """Arguments that the network may change in place are copied first.

    Raises:
        TypeError: the forward changes a tensor of the network's own.
    """
    effects = Effects(own, graph)
    attributes = set(effects.attributes())
    for node, changed in effects.changed.items():
        if surely_changes(own, node) and attributes & changed:
            name = min(str(n.target) for n in attributes & changed)
            raise TypeError(
                f"model: {type(own).__name__} cannot be fused: its forward changes its own {name!r} in place"
            )
    for node in effects.arguments():
        last = next(n for n in reversed(list(graph.nodes)) if n.op == "placeholder")
        with graph.inserting_after(last):
            kept = graph.call_function(copied_argument, (node,))
        _read_instead(node, kept)


# ---------------------------------------------------------------- steps


def _start(model: nn.Module, node: fx.Node) -> Step | None:
    """The step of a convolution node with nothing riding on it yet; None if it has to stay in torch."""
    module: Any = module_of(model, node)
    if node.target is window_means:
        return _means(model, node)
    sized = surely(module, SampledConvTranspose2d, PairedUp2d)
    by_size = surely(module, PaddedBySize2d)
    if (
        not (is_conv(module) or by_size)
        or module.padding_mode != "zeros"
        or node.kwargs
        or len(node.args) != 1 + sized
        or not _served(module)
    ):
        return None
    if not isinstance(node.args[0], fx.Node):
        return None
    bias = None if module.bias is None else module.bias.detach().float()
    weight, source = module.weight.detach(), node.args[0].name
    if sized:
        found = grid_of(node.args[1])
        if found is None:
            return None
        like, first = found
        geometry = Geometry(module.kernel_size, (1, 1), module.borders, module.dilation)
        step = Step("transposed", source, weight, bias, geometry, module.groups, module.sampling.spec)
        return replace(step, like=like.name, like_behind=first)
    if not (surely(module, nn.Conv2d) or by_size):
        if surely(module, SampledDown2d, PairedDown2d) and module.window > 1 and not _pooled(node):
            return None
        filling = None
        if not surely(module, PerforatedConv2d, MaskedConv2d):
            kind = "sampled"
        elif module.fill == "nearest":
            kind = "filled"
        else:
            kind, filling = "fitted", Filling.of(module)
        geometry = Geometry(module.kernel_size, module.stride, module.borders, module.dilation)
        resize = module.resize_masks if surely(module, MaskedConv2d) else None
        spec = module.sampling.spec
        step = Step(kind, source, weight, bias, geometry, module.groups, spec, resize_masks=resize)
        return replace(step, filling=filling)
    kernel = module.weight.shape[2:]
    stride, dilation = _two(module.stride), _two(module.dilation)
    geometry = Geometry(_two(kernel), stride, padding_of(module), dilation)
    return Step("dense", source, weight, bias, geometry, module.groups, same=by_size)


def _served(module: nn.Module | None) -> bool:
    """Whether a convolution's tensors are of one type that the kernels compute in."""
    tensors = [t for t in (getattr(module, "weight", None), getattr(module, "bias", None)) if t is not None]
    return all(
        t.dtype in _DTYPES.get(t.device.type, ())
        and (t.dtype, t.device) == (tensors[0].dtype, tensors[0].device)
        for t in tensors
    )


def _pooled(node: fx.Node) -> bool:
    """Whether a convolution reads the means that its windows are made of."""
    return isinstance(node.args[0], fx.Node) and node.args[0].target is window_means


def _means(model: nn.Module, node: fx.Node) -> Step | None:
    """The step of means that were put in front of the convolution that alone reads them."""
    conv: Any = module_of(model, next(iter(node.users)))
    source, known = node.args[0], surely(conv, SampledDown2d, PairedDown2d) and _served(conv)
    if not known or not isinstance(source, fx.Node):
        return None
    # its taps stay among the computed positions, whose windows do not cross
    geometry = Geometry((conv.window, conv.window), (1, 1), (0, conv.window - 1, 0, conv.window - 1))
    none = conv.weight.detach().new_empty((conv.weight.shape[1] * conv.groups, 0, conv.window, conv.window))
    return Step("mean", source.name, none, None, geometry, 1, conv.sampling.spec)


def _two(values: int | Sequence[int]) -> tuple[int, int]:
    return (values, values) if isinstance(values, int) else (values[0], values[1])


def _folded(step: Step, scale: Tensor, shift: Tensor) -> Step:
    """Batch norm behind a step that has no shortcut yet."""
    weight = step.weight.double()
    if step.kind == "transposed":
        grouped = weight.view(step.groups, -1, *weight.shape[1:])
        weight = (grouped * scale.view(step.groups, 1, -1, 1, 1)).view(weight.shape)
    else:
        weight = weight * scale.view(-1, 1, 1, 1)
    bias = shift if step.bias is None else step.bias.double() * scale + shift
    if step.filling is not None:
        step = replace(step, filling=step.filling.scaled(scale, shift))
    return replace(step, weight=weight.to(step.weight.dtype), bias=bias.float())


def _with_second(step: Step, affine: tuple[Tensor, Tensor], kind: Activation) -> Step:
    return replace(step, scale2=affine[0].float(), shift2=affine[1].float(), activation2=kind)


@dataclass
class _Fused:
    """A step and the nodes it stands for."""

    step: Step | Follower
    main: fx.Node
    second: fx.Node | None


class _Absorber:
    """Finds what rides on each convolution's output."""

    def __init__(self, model: nn.Module, effects: Effects) -> None:
        self.model, self.effects = model, effects
        self.claimed: set[fx.Node] = set()

    def absorb(self, node: fx.Node, step: Step) -> _Fused:
        """What a convolution takes along, as long as no map that it reads changes before its last part."""
        before = set(self.claimed)
        read = [(n, node) for n in node.all_input_nodes if n.name in step.needs]
        found, reads = self._absorb(node, step)
        if any(self.effects.between(value, at, found.main) for value, at in read + reads):
            self.claimed = before
            return _Fused(replace(step, out=node.name), node, None)
        return found

    def _absorb(self, node: fx.Node, step: Step) -> tuple[_Fused, list[tuple[fx.Node, fx.Node]]]:
        value = node
        reads: list[tuple[fx.Node, fx.Node]] = []
        norm = self._only_user(value)
        if norm is not None and (affine := self._affine(norm, step)) is not None:
            step, value = _folded(step, *affine), norm
            self.claimed.add(value)
        summed = self._shortcut(step, value)
        if summed is not None:
            step, value, reads = summed
        self.claimed.add(value)
        user = self._only_user(value)
        if user is not None and (activated := self._activated(step, user)) is not None:
            step, value = activated, user
        self.claimed.add(value)
        before = set(self.claimed)
        step, second = self._second(step, value)
        # what another step has claimed still reads this one
        readers = set(value.users) - (self.claimed - before)
        step = replace(
            step, out=value.name if readers else None, out2=second.name if second is not None else None
        )
        return _Fused(step, value, second), reads

    def _activated(self, step: Step, node: fx.Node) -> Step | None:
        """A step with the activation that a node is."""
        kind, slope = activation(self.model, node), None
        # the kernels for GPUs have the first ones only
        if kind == Activation.NONE or (kind > Activation.RELU6 and step.weight.is_cuda):
            return None
        if kind == Activation.LEAKY:
            slope = slope_of(self.model, node, step.weight, step.out_channels)
            if slope is None:
                return None
        return replace(step, activation=kind, slope=slope)

    def _affine(self, norm: fx.Node, step: Step) -> tuple[Tensor, Tensor] | None:
        """Scale and shift of a batch norm that torch would apply to a step's maps."""
        if step.filling is not None and not step.filling.reach:
            return None  # what a norm makes of zeros is no longer zero
        affine = affine_of(self.model, norm, step.weight.dtype)
        return affine if affine is not None and affine[0].numel() == step.out_channels else None

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        alone = len(users) == 1 and users[0] not in self.claimed and node not in self.effects.changed
        return users[0] if alone and users[0] not in self.effects.changed else None

    def _shortcut(
        self, step: Step, value: fx.Node
    ) -> tuple[Step, fx.Node, list[tuple[fx.Node, fx.Node]]] | None:
        """A step with what is added to it, the sum, and where the network reads that."""
        if step.kind == "filled":
            # the sum differs at positions that share a computed value
            return None
        user = self._only_user(value)
        if user is None or (terms := addition(user)) is None or terms[0] is terms[1]:
            return None
        other = terms[1] if terms[0] is value else terms[0]
        into = "" if user.target is not added_to else "out" if terms[0] is value else "other"
        stride, padded, base, at = 1, 0, other, user
        if len(other.users) == 1:
            if (behind := padded_channels(other)) is not None:
                base, padded, at = *behind, other
            found = subsampled(base) if base is other or len(base.users) == 1 else None
            if found is not None:
                at = base
                base, stride = found
        if not is_map(self.model, base) or any(n in self.effects.changed for n in (base, other)):
            return None
        return replace(step, shortcut=Shortcut(base.name, stride, padded, into)), user, [(base, at)]

    def _second(self, step: Step, value: fx.Node) -> tuple[Step, fx.Node | None]:
        """A step with what some block puts in front of its first convolution: a ReLU, a batch norm with one,
        or a batch norm alone, the first of these that there is."""
        if value in self.effects.changed:
            return step, None
        readers = [n for n in value.users if n not in self.claimed and self._reads_as_made(value, n)]
        for relu in readers:
            if step.activation != Activation.RELU and activation(self.model, relu) == Activation.RELU:
                self.claimed.add(relu)
                ones = torch.ones(step.out_channels)
                return replace(step, scale2=ones, shift2=torch.zeros_like(ones)), relu
        norms = [(n, affine) for n in readers if (affine := self._affine(n, step)) is not None]
        for norm, affine in norms:
            user = self._only_user(norm)
            if user is not None and activation(self.model, user) == Activation.RELU:
                self.claimed.update((norm, user))
                return _with_second(step, affine, Activation.RELU), user
        if not norms:
            return step, None
        norm, affine = norms[0]
        self.claimed.add(norm)
        return _with_second(step, affine, Activation.NONE), norm

    def _reads_as_made(self, value: fx.Node, user: fx.Node) -> bool:
        return user not in self.effects.changed and not self.effects.between(value, value, user)


# ---------------------------------------------------------------- the new graph


def _lower(
    model: nn.Module, graph: fx.Graph, fixed: dict[str, Any], dtype: torch.dtype | None, joins: bool
) -> Fused:
    """The graph with programs in place of the convolutions and what they absorbed."""
    _pool_outside(model, graph)
    effects = Effects(model, graph)
    absorber = _Absorber(model, effects)
    fused: dict[fx.Node, _Fused] = {}
    for node in graph.nodes:
        if (step := _start(model, node)) is not None:
            layer = str(node.target) if node.op == "call_module" else ""
            found = absorber.absorb(node, replace(step, layer=layer))
            fused[found.main] = found
    _follow(model, graph, fused, absorber.claimed | set(effects.changed), joins)
    seconds = {f.second: f for f in fused.values() if f.second is not None}
    by_name = {node.name: node for node in graph.nodes}

    def needs(node: fx.Node) -> list[fx.Node]:
        owner = fused.get(node) or seconds.get(node)
        return [by_name[n] for n in owner.step.needs] if owner else node.all_input_nodes

    kept = [n for n in graph.nodes if n.op == "output" or n in effects.changed or may_raise(n)]
    live, todo = set(), kept
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo += needs(node)
    return _Writer(model, graph, fused, seconds, live, needs, effects, dtype).write(fixed)


def _follow(
    model: nn.Module, graph: fx.Graph, fused: dict[fx.Node, _Fused], barred: set[fx.Node], joins: bool
) -> None:
    """Adds the nodes that can read compact maps as they are, and max pooling, to the fused ones."""
    compact: dict[fx.Node, str] = {}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        owner = fused.get(node)
        if owner is not None and isinstance(owner.step, Step):
            fill = _fill(owner.step, {other.name: spec for other, spec in compact.items()})
            values = [value for value in (owner.main, owner.second) if value is not None]
            written.update(values)
            if fill:
                compact.update(dict.fromkeys(values, fill))
        elif node not in barred and (found := follower(model, node, compact, written, joins)) is not None:
            step, fill = found
            fused[node] = _Fused(step, node, None)
            written.add(node)
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
        module: Any = module_of(model, node)
        known = surely(module, SampledDown2d, PairedDown2d) and _served(module) and not node.kwargs
        if known and module.window > 1:
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
        effects: Effects,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.graph, self.fused, self.seconds = model, graph, fused, seconds
        self.dtype = dtype
        self.live, self.needs, self.effects = live, needs, effects
        self.result = fx.Graph()
        self.copied: dict[fx.Node, fx.Node] = {}
        self.pending: list[_Fused] = []
        self.by_name = {node.name: node for node in graph.nodes}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        for reader in live:
            for node in needs(reader):
                self.readers.setdefault(node, []).append(reader)
        self.programs: dict[str, Program] = {}
        # whose layout in memory the network's maps have: its input's, unless its weights have another
        layouts = (p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous())
        inputs = [n for n in graph.nodes if n.op == "placeholder" and n in live]
        self.like = inputs[0] if inputs and next(layouts, None) is None else None

    def write(self, fixed: dict[str, Any]) -> Fused:
        for node in self.graph.nodes:
            owner = self.fused.get(node)
            if owner is not None and self._joins(owner):
                if node in self.live or owner.second in self.live:
                    if self.pending and _dtype(owner) not in (None, _dtype(self.pending[0])):
                        self._flush()
                    self.pending.append(owner)
            elif node.op == "placeholder" or (node in self.live and node not in self.seconds):
                if self._written_by_pending() & set(node.all_input_nodes) or self._changes_what_waits(node):
                    self._flush()
                self._lay_out(node)
                self.copied[node] = self.result.node_copy(node, lambda n: self.copied[n])
        self._fix(fixed)
        modules: dict[str, Any] = {**dict(self.model.named_modules()), **self.programs}
        root = nn.Module()
        for node in self.result.nodes:
            if node.op == "call_module":
                _attach(root, str(node.target), modules[str(node.target)])
            elif node.op == "get_attr":
                _attach(root, str(node.target), held_at(self.model, str(node.target)))
        return Fused(root, self.result, type(self.model).__name__)

    def _fix(self, fixed: dict[str, Any]) -> None:
        """Arguments with a default may be given, as long as it is their default."""
        inputs = [node for node in self.result.nodes if node.op == "placeholder"]
        after = inputs[-1] if inputs else None
        for name, default in fixed.items():
            with self.result.inserting_after(after) if after else self.result.inserting_before(None):
                after = self.result.create_node("placeholder", name, (default,), name=name)
        last = after
        for node in [n for n in self.result.nodes if n.op == "placeholder" and n.target in fixed]:
            with self.result.inserting_after(last):
                last = self.result.call_function(
                    same_argument, (node, fixed[str(node.target)], str(node.target))
                )

    def _changes_what_waits(self, node: fx.Node) -> bool:
        """Whether a node may change a map that a step which has not run yet still has to read."""
        changed = {value.name for value in self.effects.changed.get(node, ())}
        return any(changed & set(owner.step.needs) for owner in self.pending)

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
        number = len(self.programs)
        while hasattr(self.model, name := f"program{number}") or name in self.programs:
            number += 1
        # other formats than float32 are the network's own choice
        lower = self.dtype if _dtype(self.pending[0]) == torch.float32 else None
        names = [n.name for n in inputs], [n.name for n in outputs]
        self.programs[name] = Program(steps, *names, dtype=lower)
        call = self.result.call_module(name, tuple(self.copied[n] for n in inputs))
        for i, node in enumerate(outputs):
            value = self.result.call_function(operator.getitem, (call, i))
            if self.like is not None and any(self._sees_layout(n) for n in self.readers.get(node, [])):
                value = self.result.call_function(match_layout, (value, self.copied[self.like]))
            self.copied[node] = value
        self.pending = []

    def _lay_out(self, reader: fx.Node) -> None:
        """Give somebody else maps that lie in memory as the network's would, if nobody reads them after."""
        if self.like is None or not self._sees_layout(reader):
            return
        for node in reader.all_input_nodes:
            value, order = self.copied[node], self.effects.order
            alike = self.effects.classes.get(node, {node})
            later = any(order[user] > order[reader] for n in alike for user in n.users)
            if node.op in ("placeholder", "get_attr") or value.target is match_layout or later:
                continue
            self.copied[node] = self.result.call_function(match_layout, (value, self.copied[self.like]))

    def _sees_layout(self, reader: fx.Node) -> bool:
        """Whether somebody else gets a map: the caller, or a module that nobody has looked into."""
        return reader.op == "output" or is_opaque(self.model, reader)

    def _read_outside(self, node: fx.Node, waiting: set[int]) -> bool:
        owners = (self.fused.get(reader) or self.seconds.get(reader) for reader in self.readers.get(node, []))
        return any(owner is None or id(owner) not in waiting for owner in owners)


def _dtype(owner: _Fused) -> torch.dtype | None:
    """Of a step's maps; a follower takes any."""
    return owner.step.weight.dtype if isinstance(owner.step, Step) else None


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
