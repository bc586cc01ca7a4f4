"""The CPU back end: every convolution operator as one gather GEMM over a plan's tables.

The kernels are in ``csrc`` and know nothing of samplings. This module caches plans and packed weights,
so that a second call with the same shapes and weights builds no tables and packs nothing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from quincunx.ops.contract import CHANNELS_LAST
from quincunx.ops.geometry import Geometry
from quincunx.ops.norm import check as check_norm
from quincunx.ops.plan import (
    Plan,
    WindowPlan,
    adjoint_plan,
    collect_plan,
    fill_adjoint_plan,
    fill_kinds_plan,
    fill_plan,
    forward_plan,
    shift_plan,
)

__all__ = [
    "DTYPES",
    "Kept",
    "binary_conv",
    "binary_unavailable",
    "collect",
    "collect_fitted",
    "conv",
    "conv_filled",
    "conv_transpose",
    "conv_weight",
    "fill_fitted",
    "fill_fitted_weight",
    "filled_by",
    "isa",
    "keep",
    "load",
    "lookup",
    "norm_act",
    "norm_act_backward",
    "pack",
    "unavailable",
    "window_max",
]

DTYPES = (torch.float32, torch.bfloat16)

# weight -> {use: (its dependencies, packed)}; entries are dropped with the weight
_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def load() -> str | None:
    """Load the extension. Return None if that works, else why not."""
    try:
        import_module("quincunx._native")
        torch.ops.quincunx_native.isa()
        _watch_optimisers()
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def isa() -> str:
    """Return the instruction set of the chosen kernels; ``QUINCUNX_ISA`` forces one."""
    return str(torch.ops.quincunx_native.isa())


def level2_bytes() -> int:
    """Return the bytes of a core's level 2 cache, used to divide work; ``QUINCUNX_L2`` forces it."""
    return int(torch.ops.quincunx_native.level2_bytes())


def tile_formats() -> str:
    """Return which formats the chosen kernels multiply on tiles: "bfloat16 and int8"; empty for none."""
    return str(torch.ops.quincunx_native.tile_formats())


@lru_cache(maxsize=8)
def reads_shifts(dtype: torch.dtype) -> bool:
    """Return whether the chosen kernels gain from ``Plan.shifts`` for maps of this type."""
    name = {torch.bfloat16: "bfloat16", torch.uint8: "int8"}.get(dtype)
    return name is not None and name in tile_formats().split(" and ")


def tiles_refused() -> str:
    """Return why this process cannot multiply on AMX tiles; empty if it can."""
    return str(torch.ops.quincunx_native.tiles_refused())


def build() -> str:
    """Return a hash of the extension's file, which identifies measured kernels; empty without it."""
    if load() is not None:
        return ""
    content = Path(str(import_module("quincunx._native").__file__)).read_bytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def unavailable(*values: object) -> str | None:
    """Return why the kernels do not support the tensors among these arguments; None if they do."""
    for value in values:
        if isinstance(value, Tensor) and value.dtype not in DTYPES:
            return f"the native back end computes in float32 and bfloat16, not {value.dtype}"
    return None


def binary_unavailable(x: Tensor, bits: Tensor) -> str | None:
    """Return why the kernel for one-bit weights does not support a map; None if it does."""
    if x.dtype != torch.float32:
        return f"the native back end adds up one-bit weights in float32, not {x.dtype}"
    return None


def pack(weight: Tensor, groups: int, transposed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Return a weight [O, C / groups, kh, kw] in the kernel's layout, cached until the weight changes.

    A change is one that torch's version counter sees: in place, by an optimizer, by
    ``load_state_dict``. Writing through ``weight.data`` is not seen.

    Args:
        weight: the weight.
        groups: channel groups.
        transposed: pack for the adjoint, which swaps the roles of input and output.
        dtype: of the maps, if it is not the weight's: bfloat16 for a weight in float32.
    """
    low = dtype is not None and dtype != weight.dtype
    return _kept(weight, (transposed, low), (groups, transposed, low), _pack)


def _kept(weight: Tensor, use: object, settings: tuple[int, ...], make: Callable[..., Tensor]) -> Tensor:
    """Return ``make(weight, *settings)``, recomputed only when the weight or the settings change."""
    # tensors made in inference mode have no version counter, so changes cannot be detected
    if weight.is_inference():
        _say_packed_each_time()
        return make(weight, *settings)
    entries = _PACKED.setdefault(weight, {})  # type: ignore[no-untyped-call]
    state = (weight._version, weight.data_ptr(), weight.dtype, settings)
    entry = entries.get(use)
    if entry is None or entry[0] != state:
        entry = (state, make(weight, *settings))
        entries[use] = entry
    packed: Tensor = entry[1]
    return packed


@lru_cache(maxsize=1)
def _watch_optimisers() -> None:
    register_optimizer_step_post_hook(_count_fused_step)


@lru_cache(maxsize=1)
def _say_packed_each_time() -> None:
    warnings.warn(
        "a convolution's weight was made in inference mode, where torch does not count changes, so it is "
        "packed again at every call; build or load the network outside torch.inference_mode()",
        UserWarning,
        stacklevel=2,
    )


def _count_fused_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Raise the version of weights that a fused optimiser changed, which torch itself does not count."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            changed = [weight for weight in group["params"] if weight in _PACKED]
            if changed:
                torch.autograd.graph.increment_version(changed)


def _pack(weight: Tensor, groups: int, transposed: bool, low: bool = False) -> Tensor:
    flat = weight.detach().flatten(2)
    if transposed:
        # transpose each tap's matrix per group; this is a view, and packing reads any strides
        outputs, inputs, taps = flat.shape
        flat = flat.view(groups, outputs // groups, inputs, taps).transpose(1, 2)
    packed: Tensor = torch.ops.quincunx_native.pack_weight(flat, groups, low)
    return packed


class Kept:
    """A program that the kernels have checked and hold for as long as this object lives.

    Its tables are copies of its own; packed weights are held.

    Args:
        number: what ``keep_program`` returned.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._run = torch.ops.quincunx_native.run_kept.default
        # what a process leaves behind goes with it
        finalize(self, import_module("quincunx._native").drop_program, number).atexit = False

    def run(self, inputs: Sequence[Tensor], crossing: bool = False) -> list[Tensor]:
        """Return its outputs.

        Args:
            inputs: maps [N, C, H, W] in channels_last; others are turned.
            crossing: real maps outside have the other one of float32 and bfloat16.
        """
        found: list[Tensor] = self._run(inputs, self.number, crossing)
        return found


def keep(tensors: Sequence[Tensor], buffers: Sequence[int], code: Sequence[int], dtype: torch.dtype) -> Kept:
    """Return a program that was checked.

    Args:
        tensors, buffers, code: as of ``run_program``.
        dtype: of its maps.

    Raises:
        RuntimeError: something does not fit.
    """
    number = torch.ops.quincunx_native.keep_program(tensors, buffers, code, dtype == torch.bfloat16)
    return Kept(number)


def _gather_gemm(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    plan: Plan,
    outputs: int,
    taps: int,
    groups: int,
    residual: Tensor | None = None,
) -> Tensor:
    out, _ = torch.ops.quincunx_native.gather_gemm(
        x,
        packed,
        None if bias is None else bias.float(),
        residual,
        None,
        None,
        plan.index,
        plan.rows,
        plan.taps,
        plan.groups,
        plan.out_size,
        outputs,
        taps,
        groups,
        0,
        plan.lines(taps, groups, x.shape[1]) if reads_shifts(x.dtype) else None,
    )
    result: Tensor = out
    return result


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    plan = forward_plan(sampling, geometry, x.shape[2], x.shape[3])
    taps = weight.shape[2] * weight.shape[3]
    return _gather_gemm(x, pack(weight, groups, False, x.dtype), bias, plan, weight.shape[0], taps, groups)


def conv_filled(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: str,
    size: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    plan = forward_plan(sampling, geometry, size[0], size[1], source=source)
    taps = weight.shape[2] * weight.shape[3]
    return _gather_gemm(y, pack(weight, groups, False, y.dtype), bias, plan, weight.shape[0], taps, groups)


def conv_transpose(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shortcut: Tensor | None = None,
) -> Tensor:
    geometry = Geometry.make(weight.shape[2:], stride, padding, dilation)
    plan = adjoint_plan(sampling, geometry, size[0], size[1])
    taps = weight.shape[2] * weight.shape[3]
    packed = pack(weight, groups, True, y.dtype)
    return _gather_gemm(y, packed, bias, plan, weight.shape[1] * groups, taps, groups, shortcut)


def conv_weight(
    x: Tensor,
    y: Tensor,
    kernel: Sequence[int],
    sampling: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
    wide: bool = False,
) -> Tensor:
    geometry = Geometry.make(kernel, stride, padding, dilation)
    plan = forward_plan(sampling, geometry, x.shape[2], x.shape[3])
    gradient: Tensor = torch.ops.quincunx_native.weight_grad(
        x.contiguous(memory_format=CHANNELS_LAST),
        y.contiguous(memory_format=CHANNELS_LAST),
        plan.index,
        kernel[0] * kernel[1],
        groups,
        channels_last,
    )
    outputs, inputs = y.shape[1], x.shape[1] // groups
    if channels_last:
        gradient = gradient.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)
    else:
        gradient = gradient.view(outputs, inputs, *kernel)
    return gradient.to(torch.float32 if wide else x.dtype)


def collect(z: Tensor, sampling: str) -> Tensor:
    """Sum a bfloat16 map in float32 and round once."""
    plan = collect_plan(sampling, z.shape[2], z.shape[3])
    result: Tensor = torch.ops.quincunx_native.window_sum(z, plan.index, plan.starts, plan.out_size)
    return result


def fill_fitted(
    y: Tensor, weight: Tensor, bias: Tensor | None, sampling: str, size: Sequence[int], reach: int
) -> Tensor:
    return filled_by(y, weight, bias, sampling, size, reach)


def filled_by(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sampling: str,
    size: Sequence[int],
    reach: int,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """act(fill_fitted(y) + residual) in one pass; sums are float32."""
    plan = fill_plan(sampling, size[0], size[1], reach)
    plan.check(weight.shape, None if bias is None else bias.shape, y.shape)
    weight = weight if plan.taps else weight.new_empty((plan.count, 0, y.shape[1]))
    result: Tensor = torch.ops.quincunx_native.fitted_fill(
        y,
        weight.detach().float().contiguous(),
        None if bias is None else bias.detach().float().contiguous(),
        residual,
        plan.index,
        plan.kinds,
        plan.size,
        activation,
    )
    return result


def collect_fitted(z: Tensor, weight: Tensor, sampling: str, reach: int) -> Tensor:
    """The kernel that fills, with the tables read backwards; sums are float32 and rounded once."""
    plan = fill_plan(sampling, z.shape[2], z.shape[3], reach)
    plan.check(weight.shape, None, z.shape[:2])
    back = fill_adjoint_plan(sampling, z.shape[2], z.shape[3], reach)
    wide = weight.detach().float()
    # without taps no row of coefficients is read, however many there are
    wide = wide.reshape(plan.count * plan.taps, z.shape[1])
    wide = torch.cat([wide, wide.new_ones(1, z.shape[1])])
    result: Tensor = torch.ops.quincunx_native.fitted_fill(
        z, wide[back.rows], None, None, back.index, back.kinds, (len(plan.computed), 1), 0
    )
    return result


def fill_fitted_weight(y: Tensor, z: Tensor, sampling: str, reach: int, shape: Sequence[int]) -> Tensor:
    """Sums are float32, in shares that depend on the sizes alone, and rounded once."""
    plan = fill_plan(sampling, z.shape[2], z.shape[3], reach)
    plan.check(shape, None, y.shape)
    if not plan.taps:
        return y.new_zeros(tuple(shape))
    order, starts = fill_kinds_plan(sampling, z.shape[2], z.shape[3], reach)
    shares = torch.ops.quincunx_native.fill_grad(y, z, plan.index, order, starts, plan.taps)
    result: Tensor = shares.sum(0).to(y.dtype)
    return result


def lookup(
    x: Tensor,
    codebooks: Tensor,
    assignments: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Use float32 tables and sums; a bfloat16 map is widened before and rounded after."""
    plan = shift_plan(Geometry.make(kernel, stride, padding, dilation), x.shape[2], x.shape[3])
    y: Tensor = torch.ops.quincunx_native.lookup_conv(
        x.float(),
        codebooks.float().contiguous(),
        assignments.contiguous(),
        None if bias is None else bias.float().contiguous(),
        plan.slots,
        plan.offsets,
        plan.rows,
        plan.out_size,
        groups,
    )
    return y.to(x.dtype)


def binary_conv(
    x: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    plan = forward_plan("", Geometry.make(kernel, stride, padding, dilation), x.shape[2], x.shape[3])
    taps = kernel[0] * kernel[1]
    result: Tensor = torch.ops.quincunx_native.binary_gemm(
        x,
        _kept(bits, "binary", (x.shape[1] // groups, taps, groups), torch.ops.quincunx_native.binary_pack),
        None if scale is None else scale.float().contiguous(),
        None if bias is None else bias.float().contiguous(),
        plan.index,
        plan.out_size,
        bits.shape[0],
        taps,
        groups,
    )
    return result


def norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two passes over the map: sums, then the result; sums are float32 in a chunk and double over chunks."""
    check_norm(x, activation)
    y, mean, variance = torch.ops.quincunx_native.norm_act(
        x, _plain(weight), _plain(bias), residual, eps, activation
    )
    return y, mean, variance


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_norm(x, activation)
    to_x, to_weight, to_bias, joined = torch.ops.quincunx_native.norm_act_backward(
        grad, x, y, mean, variance, _plain(weight), _plain(bias), other, eps, activation
    )
    return to_x, to_weight, to_bias, joined


def _plain(channels: Tensor | None) -> Tensor | None:
    return None if channels is None else channels.detach().float().contiguous()


def window_max(x: Tensor, plan: WindowPlan) -> Tensor:
    """Max pooling through a table: the maximum of each window, -infinity for an empty one."""
    result: Tensor = torch.ops.quincunx_native.window_max(x, plan.index, plan.starts, plan.out_size)
    return result
