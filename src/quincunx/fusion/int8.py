"""Programs whose convolutions compute in eight bits; what is kept in real numbers stands between them.

Every map may exist in two forms: real numbers, by its name, and uint8 numbers on the map's grid, by its name
and ":q". A step in eight bits reads the latter and writes what its readers need; consecutive ones are one
native call. On the reference back end the same lines run one by one, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.fusion.lines import arena
from quincunx.fusion.program import (
    BufferCode,
    Program,
    Stage,
    StepCode,
    _prefers_torch,
    _reference_stage,
    _segment,
)
from quincunx.fusion.steps import (
    Follower,
    Map,
    Step,
    _shared,
    fill_maps,
    follow,
    output,
    pool,
    pool_window,
    shortcut_rows,
    tables,
)
from quincunx.ops import native_int8
from quincunx.ops.int8 import Grid, accumulate, dequantise, finish, quantise
from quincunx.ops.plan import forward_plan, window_plan

__all__ = ["Int8Program", "Int8Step", "in_eight_bits"]

_CONVOLVE, _WINDOW_MAX, _COPY, _POINTWISE = 0, 1, 3, 4


@dataclass(frozen=True, eq=False)
class Int8Step(Step):
    """A step in eight bits. Its ``weight`` has the shape of the real one, and no values.

    Attributes:
        integers: int8, of the weight's shape; of a "mean" None.
        scales: float32 [O], what 1 of each output channel's weights stands for.
    """

    integers: Tensor | None = None
    scales: Tensor | None = None

    def to(self, dtype: torch.dtype | None) -> Step:
        return self

    def laid_out(self) -> Step:
        return self


def in_eight_bits(
    step: Step, integers: Tensor | None, scales: Tensor | None, bias: Tensor | None
) -> Int8Step:
    """Return a step with weights in eight bits in place of its own."""
    fields = {name: getattr(step, name) for name in step.__dataclass_fields__}
    fields |= {"weight": step.weight.new_zeros(()).expand(step.weight.shape), "bias": bias}
    return Int8Step(**fields, integers=integers, scales=scales)


# ---------------------------------------------------------------- what runs in eight bits


def _q(name: str) -> str:
    return f"{name}:q"


@dataclass
class _Line:
    """One piece of work on maps in eight bits: names of maps in one of their forms.

    ``sources`` are the maps that a concatenation reads besides ``x``.
    """

    work: int
    x: str
    out: str | None
    out2: str | None = None
    residual: str | None = None
    step: Int8Step | Follower | None = None
    sources: tuple[str, ...] = ()

    @property
    def reads(self) -> list[str]:
        return [self.x, *self.sources, *([self.residual] if self.residual else [])]

    @property
    def writes(self) -> list[str]:
        return [name for name in (self.out, self.out2) if name is not None]


@dataclass
class _Lines:
    """Consecutive lines; ``wanted`` are the maps among those that they write that somebody else reads."""

    lines: list[_Line] = field(default_factory=list)
    wanted: set[str] = field(default_factory=set)

    @property
    def reads(self) -> set[str]:
        written: set[str] = set()
        found: set[str] = set()
        for line in self.lines:
            found.update(name for name in line.reads if name not in written)
            written.update(line.writes)
        return found


@dataclass
class _Alone:
    """A step in real numbers."""

    step: Step | Follower

    @property
    def reads(self) -> set[str]:
        return set(self.step.reads)


class _Divider:
    """Divides a program's steps into lines in eight bits and steps in real numbers.

    Args:
        steps, maps: settled for one size of input.
        outputs: names of the results, which are real.
        grids: by map.
    """

    def __init__(
        self,
        steps: Sequence[Step | Follower],
        maps: Mapping[str, Map],
        outputs: Iterable[str],
        grids: Mapping[str, Grid],
    ) -> None:
        self.maps, self.grids = maps, grids
        self.stages: list[_Lines | _Alone] = []
        self.written: set[str] = set()  # in eight bits, by a step in eight bits
        eight: list[bool] = []
        for step in steps:
            eight.append(self._eight(step))
            if eight[-1]:
                self.written.update(name for name in step.writes if name in grids)
        self.integers: set[str] = set()  # maps that somebody reads in eight bits
        self.real: set[str] = set(outputs)
        for step, low in zip(steps, eight, strict=True):
            if low and isinstance(step, Step):
                self.integers.add(step.source)
                self.integers.update(name for name in step.reads if name in self.written)
                self.real.update(name for name in step.reads[1:] if name not in self.written)
            else:
                (self.integers if low else self.real).update(step.reads)
        self.there: set[str] = set()  # forms that were made
        for step, low in zip(steps, eight, strict=True):
            if not low:
                self.stages.append(_Alone(step))
                continue
            if not self.stages or isinstance(self.stages[-1], _Alone):
                self.stages.append(_Lines())
            self._add(step)
        wanted = set(outputs)
        for stage in reversed(self.stages):
            if isinstance(stage, _Lines):
                stage.wanted = {name for line in stage.lines for name in line.writes if name in wanted}
            wanted |= stage.reads

    def _eight(self, step: Step | Follower) -> bool:
        if isinstance(step, Step):
            return isinstance(step, Int8Step) and step.source in self.grids
        if step.kind not in ("maxpool", "concat") or not self.written.issuperset(step.sources):
            return False
        grids = {self.grids.get(name) for name in (*step.sources, step.out)}
        found = [self.maps[name] for name in step.sources]
        return len(grids) == 1 and (
            step.kind == "maxpool" or bool(_shared(found)) or not any(shape.fill for shape in found)
        )

    def _add(self, step: Step | Follower) -> None:
        last = self.stages[-1]
        assert isinstance(last, _Lines)  # noqa: S101  # the caller made it
        if isinstance(step, Follower):
            names = [_q(name) for name in step.sources]
            work = _WINDOW_MAX if step.kind == "maxpool" else _COPY
            made = _Line(work, names[0], _q(step.out), step=step, sources=tuple(names[1:]))
            last.lines.append(made)
            if step.out in self.real:
                last.lines.append(_Line(_POINTWISE, _q(step.out), step.out))
            return
        assert isinstance(step, Int8Step)  # noqa: S101  # the caller asked
        if step.source not in self.written and _q(step.source) not in self.there:
            last.lines.append(_Line(_POINTWISE, step.source, _q(step.source)))
            self.there.add(_q(step.source))
        line = _Line(_CONVOLVE, _q(step.source), self._form(step.out), self._form(step.out2), step=step)
        if step.shortcut is not None:
            name = step.shortcut.source
            line.residual = _q(name) if name in self.written else name
        last.lines.append(line)
        for name in step.writes:
            if name in self.real and self._form(name) != name:
                last.lines.append(_Line(_POINTWISE, _q(name), name))

    def _form(self, name: str | None) -> str | None:
        """In which form a step writes a map."""
        if name is None:
            return None
        return _q(name) if name in self.integers and name in self.written else name


# ---------------------------------------------------------------- natively


@dataclass
class _Call:
    """Lines as one native call: its arguments."""

    inputs: list[str]
    outputs: list[str]
    grids: list[Grid | torch.dtype] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    multipliers: list[int] = field(default_factory=list)

    def run(self, values: dict[str, Tensor]) -> None:
        maps = [values[name] for name in self.inputs]
        found = native_int8.run(maps, self.tensors, self.buffers, self.code, self.grids, self.multipliers)
        values.update(zip(self.outputs, found, strict=True))


def _call(stage: _Lines, maps: Mapping[str, Map], grids: Mapping[str, Grid], real: torch.dtype) -> _Call:
    lines = stage.lines
    written = list(dict.fromkeys(name for line in lines for name in line.writes))
    inputs = list(dict.fromkeys(name for line in lines for name in line.reads if name not in written))
    shapes = {name: maps[name.removesuffix(":q")] for name in (*inputs, *written)}
    scratch = [name for name in written if name not in stage.wanted]
    offsets = arena(lines, scratch, shapes, {})
    call = _Call(inputs, [name for name in written if name in stage.wanted])
    numbers: dict[str, int] = {}
    for name in (*inputs, *written):
        kind = 0 if name in inputs else 2 if name in stage.wanted else 1
        numbers[name] = len(numbers)
        call.buffers += BufferCode(kind, shapes[name].channels, *shapes[name].stored, offsets.get(name, 0))
        call.grids.append(grids[name.removesuffix(":q")] if name.endswith(":q") else real)

    def number(tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        known = next((i for i, other in enumerate(call.tensors) if other is tensor), len(call.tensors))
        if known == len(call.tensors):
            call.tensors.append(tensor)
        return known

    def add(line: _Line, multiplier: Tensor | None = None, **fields: int) -> None:
        code = dict.fromkeys(StepCode._fields, -1)
        code |= {"residual_channels": 0, "num_taps": 1, "channel_groups": 1, "activation": 0}
        code |= {"work": line.work, "x": numbers[line.x]}
        code |= {key: numbers[name] for key in ("out", "out2") if (name := getattr(line, key)) is not None}
        call.code += StepCode(**{**code, **fields})
        call.multipliers.append(number(multiplier))

    for line in lines:
        if isinstance(line.step, Int8Step):
            step = line.step
            multiplier, fields = _of_step(step, line, shapes, maps, numbers, number, grids)
            add(line, multiplier, **fields)
        elif line.work == _WINDOW_MAX:
            assert isinstance(line.step, Follower)  # noqa: S101  # by construction
            first = shapes[line.x]
            plan = window_plan(first.fill, pool_window(line.step, first.size), *first.size)
            add(line, tap_index=number(plan.index), rows=number(plan.starts))
        elif line.work == _COPY:
            at = 0
            for name in (line.x, *line.sources):
                add(line, x=numbers[name], residual_channels=at)
                at += shapes[name].channels
        else:
            add(line)
    return call


def _of_step(
    step: Int8Step,
    line: _Line,
    shapes: Mapping[str, Map],
    maps: Mapping[str, Map],
    numbers: Mapping[str, int],
    number: Callable[[Tensor | None], int],
    grids: Mapping[str, Grid],
) -> tuple[Tensor | None, dict[str, int]]:
    """The multipliers of a step, and the fields of its code besides maps."""
    everything = dict(maps)
    plan, out = tables(step, everything), output(step, everything)
    fields = {
        "tap_index": number(plan.index),
        "rows": number(plan.rows),
        "taps": number(plan.taps),
        "groups": number(plan.groups),
        "num_taps": step.taps,
    }
    if step.integers is None:
        return None, fields
    fields |= {
        "weight": number(native_int8.pack(step.integers, step.groups, step.kind == "transposed")),
        "bias": number(step.bias),
        "scale2": number(step.scale2),
        "shift2": number(step.shift2),
        "slope": number(step.slope),
        "channel_groups": step.groups,
        "activation": int(step.activation),
    }
    if line.residual is not None and step.shortcut is not None:
        source = shapes[line.residual]
        fields |= {"residual": numbers[line.residual], "residual_channels": source.channels}
        if step.shortcut.stride > 1 or source.fill or out.fill:
            fields["residual_rows"] = number(
                shortcut_rows(source.size, step.shortcut.stride, source.fill, out)
            )
    return _multiplier(step, grids[step.source]), fields


def _multiplier(step: Int8Step, grid: Grid) -> Tensor | None:
    return None if step.scales is None else step.scales * grid.scale


# ---------------------------------------------------------------- by the reference


def _by_reference(
    line: _Line,
    maps: dict[str, Map],
    grids: Mapping[str, Grid],
    real: torch.dtype,
    values: dict[str, Tensor],
) -> None:
    """A line by the specification of ``ops/int8.py``, on whole maps; adds its outputs to ``values``."""
    x = values[line.x]
    if isinstance(line.step, Int8Step):
        return _step_by_reference(line, line.step, maps, grids, real, values)
    assert line.out is not None  # noqa: S101  # others write one map
    if line.work == _COPY:
        values[line.out] = torch.cat([x, *(values[name] for name in line.sources)], 1)
    elif line.work == _WINDOW_MAX:
        assert isinstance(line.step, Follower)  # noqa: S101  # by construction
        values[line.out] = line.step.function(x.float()).to(torch.uint8)
    elif line.out.endswith(":q"):
        values[line.out] = quantise(x, grids[line.x])
    else:
        values[line.out] = dequantise(x, grids[line.out]).to(real)


def _step_by_reference(
    line: _Line,
    step: Int8Step,
    maps: dict[str, Map],
    grids: Mapping[str, Grid],
    real: torch.dtype,
    values: dict[str, Tensor],
) -> None:
    x, grid, geometry = values[line.x], grids[step.source], step.geometry
    size = output(step, maps).size
    if step.integers is None:
        plan = forward_plan(step.sampling, geometry, *x.shape[2:])
        table = plan.index.view(-1, step.taps).long()
        rows = x.flatten(2).int() - grid.zero
        sums = (rows[:, :, table.clamp_min(0)] * (table >= 0)).sum(3, dtype=torch.int32)
        count = (table >= 0).sum(1).clamp_min(1).float()
        y = (sums.float() * (torch.tensor(grid.scale, dtype=torch.float32) / count))[..., None]
    else:
        kind = "transposed" if step.kind == "transposed" else "conv"
        where = (step.sampling, geometry.stride, geometry.padding, geometry.dilation, step.groups)
        sums = accumulate(kind, x, grid.zero, step.integers, *where, size)
        residual = None
        if line.residual is not None and step.shortcut is not None:
            residual = values[line.residual]
            if line.residual.endswith(":q"):
                residual = dequantise(residual, grids[step.shortcut.source])
            residual = step.shortcut.of(residual).float()
        multiplier = _multiplier(step, grid)
        assert multiplier is not None  # noqa: S101  # it has weights
        y = finish(sums, multiplier, step.bias, residual, int(step.activation), step.slope)
    if step.fills:
        y = torch.ops.quincunx.fill(y, step.sampling, geometry.grid(*x.shape[2:]))
    if line.out is not None:
        values[line.out] = _in_form(y, line.out, grids, real)
    if line.out2 is not None and step.scale2 is not None and step.shift2 is not None:
        second = F.relu(y * step.scale2.view(-1, 1, 1) + step.shift2.view(-1, 1, 1))
        values[line.out2] = _in_form(second, line.out2, grids, real)


def _in_form(y: Tensor, name: str, grids: Mapping[str, Grid], real: torch.dtype) -> Tensor:
    return quantise(y, grids[name.removesuffix(":q")]) if name.endswith(":q") else y.to(real)


# ---------------------------------------------------------------- the module


class Int8Program(Program):
    """A program of which some steps compute in eight bits; it takes and returns float32.

    Args:
        steps: in order; those in eight bits are of :class:`Int8Step`, the others float32.
        inputs, outputs: names of the arguments and of the results.
        grids: what the integers of each map stand for.
        real: type of the other steps and of the maps between them and those in eight bits.
    """

    def __init__(
        self,
        steps: Sequence[Step | Follower],
        inputs: Sequence[str],
        outputs: Sequence[str],
        grids: Mapping[str, Grid],
        real: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(steps, inputs, outputs, dtype=real)
        # the weight of a step in eight bits has no values, and not this type
        self._weight = torch.empty(0, dtype=real)
        self.grids = dict(grids)

    def extra_repr(self) -> str:
        low = sum(isinstance(step, Int8Step) for step in self.steps)
        return f"{super().extra_repr()}, {low} of them in eight bits"

    def settle(
        self, shapes: Sequence[Sequence[int]], whole: bool = False
    ) -> tuple[list[Step | Follower], dict[str, Map]]:
        """
        Raises:
            TypeError: always; who asks wants to write the program down for another engine.
        """
        raise TypeError(
            "a network fused in eight bits cannot be exported: export the network itself, or fuse it without "
            "dtype=torch.int8 first"
        )

    def _plain(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = ", ".join(f"{name}: {tuple(value.shape)} {value.dtype}" for name, value in values.items())
        raise ValueError(
            "a network fused in eight bits takes float32 maps [N, C, H, W] of one batch size on the CPU, got "
            + shapes
        )

    def _compile(self, shapes: list[tuple[int, ...]]) -> list[Stage]:
        natively = self._serving() == "native"
        steps, maps = super().settle(shapes, whole=not natively)
        stages = []
        for stage in _Divider(steps, maps, self.outputs, self.grids).stages:
            run: Callable[[dict[str, Tensor]], None]
            if isinstance(stage, _Alone):
                run = self._alone(stage.step, maps, shapes[0][0], natively)
            elif natively:
                run = _call(stage, maps, self.grids, self.dtype).run
            else:
                run = partial(_run_lines, stage.lines, maps, self.grids, self.dtype)
            stages.append(Stage(run, frozenset(stage.reads)))
        if filled := [(name, maps[name]) for name in self.outputs if maps[name].fill]:
            stages.append(Stage(partial(fill_maps, filled), frozenset(name for name, _ in filled)))
        return stages

    def _alone(
        self, step: Step | Follower, maps: dict[str, Map], batch: int, natively: bool
    ) -> Callable[[dict[str, Tensor]], None]:
        """A step in real numbers, by whoever is faster at it."""
        if isinstance(step, Follower):
            return partial(pool if natively and step.kind == "maxpool" else follow, step, maps)
        if not natively:
            return partial(_reference_stage, step, maps)
        whole = step.kind == "dense" and not maps[step.source].fill and not output(step, maps).fill
        if whole and _prefers_torch(step, maps, batch):
            return partial(_reference_stage, step, maps)
        return _segment([step], maps, set(step.writes)).run


def _run_lines(
    lines: Sequence[_Line],
    maps: dict[str, Map],
    grids: Mapping[str, Grid],
    real: torch.dtype,
    values: dict[str, Any],
) -> None:
    for line in lines:
        _by_reference(line, maps, grids, real, values)
