"""Straight lines of convolutions with their epilogues, run in one call of the native back end.

A *step* is a convolution (dense, sampled or transposed) with everything that can ride on its output:
bias, residual, activation, and a second output relu(out scale + shift), the pre-activation of the
next block. A *program* is a list of steps; on the CPU consecutive steps are one native call, and maps
between them stay compact in one arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from quincunx.latency import measure
from quincunx.ops import backend, native
from quincunx.plan import Geometry, Plan, adjoint_plan, forward_plan, nearest_index, position_index

__all__ = ["Program", "Shortcut", "Step"]

# what a part of a program does: it reads values by name and adds others
Stage = Callable[[dict[str, Tensor]], None]

# elements; keeps every map of the arena on its own cache lines
_ALIGN = 32
# one native call less is worth this much time of a step
_MARGIN = 0.95


@dataclass(frozen=True)
class Shortcut:
    """What is added to a step's output: another map, every ``stride``-th position of it, padded with
    zero channels."""

    source: str
    stride: int = 1


@dataclass(frozen=True, eq=False)
class Step:
    """One convolution and its epilogue.

    out = act(conv(source) + bias + shortcut), out2 = relu(out scale2 + shift2).

    Attributes:
        kind: "dense", "sampled" (to a sampled map), "filled" (sampled, read by others as if filled
            from the nearest computed position) or "transposed" (from a sampled map).
        weight: [O, C / groups, kh, kw]; of "transposed" [C, O / groups, kh, kw].
        like: of "transposed", the map whose height and width the output has.
        out, out2: names of the outputs, None for one that nobody reads.
    """

    kind: str
    source: str
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    groups: int
    sampling: str = ""
    like: str | None = None
    shortcut: Shortcut | None = None
    activation: int = 0
    out: str | None = None
    out2: str | None = None
    scale2: Tensor | None = None
    shift2: Tensor | None = None

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.kind == "transposed" else self.weight.shape[0]

    @property
    def taps(self) -> int:
        return self.weight.shape[2] * self.weight.shape[3]

    @property
    def reads(self) -> list[str]:
        return [self.source] + ([self.shortcut.source] if self.shortcut else [])

    @property
    def needs(self) -> list[str]:
        """What it reads, and the map whose size alone it takes."""
        return self.reads + ([self.like] if self.like else [])

    @property
    def writes(self) -> list[str]:
        return [name for name in (self.out, self.out2) if name is not None]


@dataclass(frozen=True)
class _Map:
    """A value's shape: what a consumer sees, [channels, *size], and the rows that are stored."""

    channels: int
    size: tuple[int, int]
    fill: str = ""  # spec of the sampling whose nearest computed position stands for each position

    @property
    def stored(self) -> tuple[int, int]:
        return (_count(self.fill, self.size), 1) if self.fill else self.size

    @property
    def numel(self) -> int:
        return self.channels * self.stored[0] * self.stored[1]


def _count(spec: str, size: tuple[int, int]) -> int:
    return int(position_index(spec, *size).shape[0])


def _output(step: Step, maps: dict[str, _Map]) -> _Map:
    if step.like is not None:
        return _Map(step.out_channels, maps[step.like].size)
    grid = step.geometry.grid(*maps[step.source].size)
    if step.kind == "sampled":
        return _Map(step.out_channels, (_count(step.sampling, grid), 1))
    return _Map(step.out_channels, grid, step.sampling if step.kind == "filled" else "")


def _plan(step: Step, maps: dict[str, _Map]) -> Plan:
    source = maps[step.source]
    if step.kind == "transposed":
        return adjoint_plan(step.sampling, step.geometry, *_output(step, maps).size)
    return forward_plan(step.sampling, step.geometry, *source.size, source=source.fill or None)


def _program_flops(inputs: Any, tensors: Any, buffers: Any, code: Any, *_: Any, **__: Any) -> int:
    """Two for each multiply-add of a program; arguments as shapes and integers."""
    fields = _OUT_FIELD + 5
    total = 0
    for at in range(0, len(code), fields):
        step = code[at : at + fields]
        out = step[_OUT_FIELD] if step[_OUT_FIELD] >= 0 else step[_OUT_FIELD + 1]
        channels, outputs = (buffers[5 * number + 1] for number in (step[0], out))
        reads = tensors[step[_INDEX_FIELD]][0]
        total += 2 * inputs[0][0] * reads * channels * outputs // step[_OUT_FIELD + 3]
    return total


_INDEX_FIELD, _OUT_FIELD = 8, 12


@lru_cache(maxsize=1)
def _count_flops() -> None:
    register_flop_formula(torch.ops.quincunx_native.run_program)(_program_flops)


@lru_cache(maxsize=1024)
def _shortcut_rows(size: tuple[int, int], stride: int, fill: str, out: _Map) -> Tensor:
    """The stored row of the shortcut's source behind each stored row of the output, int32."""
    height, width = size
    positions = torch.arange(height * width).view(height, width)[::stride, ::stride]
    if positions.numel() != out.size[0] * out.size[1]:
        raise ValueError(f"a shortcut from {size} by stride {stride} does not meet an output of {out.size}")
    rows = positions.flatten()
    if out.fill:
        rows = rows[position_index(out.fill, *out.size)]
    if fill:
        rows = nearest_index(fill, height, width)[rows]
    return rows.int()


def _reference(step: Step, values: dict[str, Tensor], maps: dict[str, _Map]) -> None:
    """A step by torch's operators and those of the contract; adds its outputs to ``values``."""
    geometry, x = step.geometry, values[step.source]
    bias = None if step.bias is None else step.bias.to(step.weight.dtype)
    where = (geometry.stride, geometry.padding, geometry.dilation, step.groups)
    if step.kind == "transposed":
        size = _output(step, maps).size
        out = torch.ops.quincunx.conv_transpose(x, step.weight, bias, size, step.sampling, *where)
    elif step.kind == "dense":
        top, bottom, left, right = geometry.padding
        padding: tuple[int, int] = (top, left)
        if top != bottom or left != right:
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        out = F.conv2d(x, step.weight, bias, geometry.stride, padding, geometry.dilation, step.groups)
    else:
        out = torch.ops.quincunx.conv(x, step.weight, bias, step.sampling, *where)
        if step.kind == "filled":
            out = torch.ops.quincunx.fill(out, step.sampling, geometry.grid(*x.shape[2:]))
    if step.shortcut is not None:
        other, stride = values[step.shortcut.source], step.shortcut.stride
        if stride > 1:
            other = other[:, :, ::stride, ::stride]
        missing = out.shape[1] - other.shape[1]
        out = out + (F.pad(other, (0, 0, 0, 0, 0, missing)) if missing else other)
    if step.activation:
        out = F.relu(out) if step.activation == 1 else F.relu6(out)
    if step.out is not None:
        values[step.out] = out
    if step.out2 is not None and step.scale2 is not None and step.shift2 is not None:
        scale, shift = (t.to(out.dtype).view(1, -1, 1, 1) for t in (step.scale2, step.shift2))
        values[step.out2] = F.relu(out * scale + shift)


# ---------------------------------------------------------------- native segments


@dataclass
class _Segment:
    """Consecutive steps as one native call: its arguments."""

    inputs: list[str]
    outputs: list[str]
    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    code: list[int] = field(default_factory=list)

    def run(self, values: dict[str, Tensor]) -> None:
        found = torch.ops.quincunx_native.run_program(
            [values[name] for name in self.inputs], self.tensors, self.buffers, self.code
        )
        values.update(zip(self.outputs, found, strict=True))


def _arena(steps: Sequence[Step], scratch: Sequence[str], maps: dict[str, _Map]) -> dict[str, int]:
    """First fit: an offset for each map inside the segment, none overlapping one that is still read."""
    first = {name: i for i, step in enumerate(steps) for name in step.writes}
    last = {name: i for i, step in enumerate(steps) for name in step.reads}
    offsets: dict[str, int] = {}
    sizes = {name: -(-maps[name].numel // _ALIGN) * _ALIGN for name in scratch}
    for name in scratch:
        busy = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if first[other] <= last.get(name, first[name]) and first[name] <= last.get(other, first[other])
        )
        at = 0
        for begin, end in busy:
            if at + sizes[name] <= begin:
                break
            at = max(at, end)
        offsets[name] = at
    return offsets


def _segment(steps: Sequence[Step], maps: dict[str, _Map], wanted: set[str]) -> _Segment:
    """Tables, packed weights, buffers and code of consecutive steps."""
    written = [name for step in steps for name in step.writes]
    read = [name for step in steps for name in step.reads]
    inputs = list(dict.fromkeys(name for name in read if name not in written))
    outputs = [name for name in written if name in wanted]
    offsets = _arena(steps, [name for name in written if name not in wanted], maps)
    segment = _Segment(inputs, outputs)
    _count_flops()
    numbers: dict[str, int] = {}
    for name in (*inputs, *written):
        kind = 0 if name in inputs else 2 if name in wanted else 1
        numbers[name] = len(numbers)
        segment.buffers += [kind, maps[name].channels, *maps[name].stored, offsets.get(name, 0)]

    known: dict[int, int] = {}

    def number(tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        if id(tensor) not in known:
            known[id(tensor)] = len(segment.tensors)
            segment.tensors.append(tensor)
        return known[id(tensor)]

    for step in steps:
        plan, out = _plan(step, maps), _output(step, maps)
        residual, rows, channels = -1, None, 0
        if step.shortcut is not None:
            source = maps[step.shortcut.source]
            residual, channels = numbers[step.shortcut.source], source.channels
            if step.shortcut.stride > 1 or source.fill or out.fill:
                rows = _shortcut_rows(source.size, step.shortcut.stride, source.fill, out)
        segment.code += [
            numbers[step.source],
            number(native.pack(step.weight, step.groups, step.kind == "transposed")),
            number(step.bias),
            residual,
            number(rows),
            channels,
            number(step.scale2),
            number(step.shift2),
            number(plan.index),
            number(plan.rows),
            number(plan.taps),
            number(plan.groups),
            numbers[step.out] if step.out is not None else -1,
            numbers[step.out2] if step.out2 is not None else -1,
            step.taps,
            step.groups,
            step.activation,
        ]
    return segment


# ---------------------------------------------------------------- which back end for a dense step

_FASTER: dict[tuple[Any, ...], bool] = {}


def _prefers_torch(step: Step, maps: dict[str, _Map], batch: int) -> bool:
    """Whether torch's convolution is faster for a dense step of this shape; measured once a process."""
    shortcut = maps[step.shortcut.source] if step.shortcut else None
    key = (
        batch,
        torch.get_num_threads(),
        step.weight.dtype,
        tuple(step.weight.shape),
        step.geometry,
        step.groups,
        maps[step.source],
        shortcut,
        step.activation,
        step.out is None,
        step.out2 is None,
    )
    if key not in _FASTER:
        values = {name: _example(maps[name], batch, step.weight.dtype) for name in step.reads}
        ours = _segment([step], maps, set(step.writes))
        found = measure(
            {
                "ours": partial(ours.run, dict(values)),
                "torch": partial(_reference_stage, step, maps, dict(values)),
            },
            rounds=7,
            round_seconds=0.005,
        )
        _FASTER[key] = found["torch"].speedup_over(found["ours"])[0] * _MARGIN > 1
    return _FASTER[key]


def _example(shape: _Map, batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, shape.channels, *shape.stored).to(dtype, memory_format=torch.channels_last)


# ---------------------------------------------------------------- the module


class Program(nn.Module):
    """Steps as a module: maps in, maps out. Its weights are constants, in packed layout where used.

    Args:
        steps: in order.
        inputs: names of the arguments.
        outputs: names of the values returned.
        native_only: never torch's own convolution, not even where it is faster.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        native_only: bool = False,
    ) -> None:
        super().__init__()
        self.native_only = native_only
        self.steps, self.inputs, self.outputs = list(steps), list(inputs), list(outputs)
        self._compiled: dict[tuple[Any, ...], list[Stage]] = {}

    def extra_repr(self) -> str:
        return f"{len(self.steps)} steps, ({', '.join(self.inputs)}) -> ({', '.join(self.outputs)})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        weight = self.steps[0].weight
        moved = fn(weight[:0])
        if moved.dtype != weight.dtype or moved.device != weight.device:
            raise RuntimeError("a fused network is frozen: convert the model first, then call qx.fuse")
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        for name, tensor in zip(self.inputs, arguments, strict=True):
            if tensor.dtype != self.steps[0].weight.dtype:
                raise TypeError(
                    f"{name}: {tensor.dtype}, but the network was fused in {self.steps[0].weight.dtype}"
                )
        key = (torch.get_num_threads(), *(tuple(tensor.shape) for tensor in arguments))
        stages = self._compiled.get(key)
        if stages is None:
            # what is measured and packed here is no part of the network's own work
            with _disable_current_modes():
                stages = self._compile([tuple(tensor.shape) for tensor in arguments])
            self._compiled[key] = stages
        with torch.no_grad():
            values = _run(stages, dict(zip(self.inputs, arguments, strict=True)))
        return tuple(values[name] for name in self.outputs)

    def _compile(self, shapes: list[tuple[int, ...]]) -> list[Stage]:
        batch = shapes[0][0]
        maps = {
            name: _Map(shape[1], (shape[2], shape[3]))
            for name, shape in zip(self.inputs, shapes, strict=True)
        }
        native_here = backend().name == "native" and self.steps[0].weight.dtype in native.DTYPES
        by_torch = []
        for step in self.steps:
            shape = _output(step, maps)
            dense = step.kind == "dense" and not maps[step.source].fill
            # outside a native segment there are no compact filled maps
            plain = _Map(shape.channels, shape.size)
            for name in step.writes:
                maps[name] = shape if native_here else plain
            by_torch.append(
                not native_here
                or (not self.native_only and dense and not shape.fill and _prefers_torch(step, maps, batch))
            )
        mixed = self._stages(maps, by_torch)
        if not native_here or not any(by_torch) or all(by_torch):
            return mixed
        # a step that torch runs faster also cuts a native call in two
        whole = self._stages(maps, [False] * len(self.steps))
        example = {name: _example(maps[name], batch, self.steps[0].weight.dtype) for name in self.inputs}
        runs = {"mixed": partial(_run, mixed, example), "whole": partial(_run, whole, example)}
        found = measure(runs, rounds=9, round_seconds=0.01)
        return mixed if found["mixed"].speedup_over(found["whole"])[0] * _MARGIN > 1 else whole

    def _stages(self, maps: dict[str, _Map], by_torch: list[bool]) -> list[Stage]:
        stages: list[Stage] = []
        i = 0
        while i < len(self.steps):
            if by_torch[i]:
                stages.append(partial(_reference_stage, self.steps[i], maps))
                i += 1
                continue
            end = i
            while end < len(self.steps) and not by_torch[end]:
                end += 1
            later = {name for step in self.steps[end:] for name in step.reads} | set(self.outputs)
            stages.append(_segment(self.steps[i:end], maps, later).run)
            i = end
        filled = [(name, maps[name]) for name in self.outputs if maps[name].fill]
        if filled:
            stages.append(partial(_fill_outputs, filled))
        return stages


def _run(stages: Sequence[Stage], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    values = dict(inputs)
    for stage in stages:
        stage(values)
    return values


def _reference_stage(step: Step, maps: dict[str, _Map], values: dict[str, Tensor]) -> None:
    local = {name: values[name] for name in step.reads}
    # others may still read the compact maps
    _fill_outputs([(name, maps[name]) for name in step.reads if maps[name].fill], local)
    _reference(step, local, maps)
    values.update({name: local[name] for name in step.writes})


def _fill_outputs(filled: Sequence[tuple[str, _Map]], values: dict[str, Tensor]) -> None:
    for name, shape in filled:
        values[name] = torch.ops.quincunx.fill(values[name], shape.fill, shape.size)
