"""Programs whose convolutions compute in eight bits; what is kept in real numbers stands between them.

Every map may exist in two forms: real numbers, by its name, and uint8 numbers on the map's grid, by its name
and ":q". A step in eight bits reads the latter and writes what its readers need; consecutive ones are one
native call. A fitted fill is two lines: the sampled map between them has a grid of its own. On the reference
back end the same lines run one by one, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quincunx.fusion.epilogues import Activation, apply
from quincunx.fusion.lines import (
    CONVOLVE,
    COPY,
    FILL,
    FLOATS,
    INT8_WEIGHTS,
    POINTWISE,
    TABLE,
    WINDOW_MAX,
    Line,
    arena,
    floats,
    gathered,
)
from quincunx.fusion.program import (
    BufferCode,
    NativeCall,
    Program,
    Stage,
    _mean_segment,
    _prefers_torch,
    _reference_stage,
    _segment,
    coded,
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
from quincunx.ops import native, native_int8
from quincunx.ops.int8 import Grid, accumulate, dequantise, end, fill, finish, quantise
from quincunx.ops.plan import fill_plan, forward_plan, window_plan

__all__ = [
    "Alone",
    "Divider",
    "Int8Line",
    "Int8Program",
    "Int8Step",
    "bare_step",
    "in_eight_bits",
    "kernel_lines",
    "map_of",
    "sampled_map",
]


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


def sampled_map(step: Step) -> str:
    """The name of the sampled map that a fitted fill makes whole; the network has none for it."""
    return f"{step.writes[0]}.sampled"


def bare_step(step: Step) -> Step:
    """The sampled convolution of a step with a fitted fill, without what comes behind it."""
    nothing: dict[str, Any] = {"filling": None, "shortcut": None, "slope": None, "out2": None}
    nothing |= {"activation": Activation.NONE, "scale2": None, "shift2": None}
    return replace(step, kind="sampled", out=sampled_map(step), **nothing)


# ---------------------------------------------------------------- what runs in eight bits


def _q(name: str) -> str:
    return f"{name}:q"


def map_of(name: str) -> str:
    """The map whose form in real numbers or in integers has this name."""
    return name.removesuffix(":q")


@dataclass
class Int8Line:
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

    lines: list[Int8Line] = field(default_factory=list)
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
class Alone:
    """A step in real numbers."""

    step: Step | Follower

    @property
    def reads(self) -> set[str]:
        return set(self.step.reads)


class Divider:
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
        self.stages: list[_Lines | Alone] = []
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
                self.stages.append(Alone(step))
                continue
            if not self.stages or isinstance(self.stages[-1], Alone):
                self.stages.append(_Lines())
            self._add(step)
        wanted = set(outputs)
        for stage in reversed(self.stages):
            if isinstance(stage, _Lines):
                stage.wanted = {name for line in stage.lines for name in line.writes if name in wanted}
            wanted |= stage.reads

    def _eight(self, step: Step | Follower) -> bool:
        if isinstance(step, Step):
            whole = step.filling is None or sampled_map(step) in self.grids
            return isinstance(step, Int8Step) and step.source in self.grids and whole
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
            work = WINDOW_MAX if step.kind == "maxpool" else COPY
            made = Int8Line(work, names[0], _q(step.out), step=step, sources=tuple(names[1:]))
            last.lines.append(made)
            if step.out in self.real:
                last.lines.append(Int8Line(POINTWISE, _q(step.out), step.out))
            return
        assert isinstance(step, Int8Step)  # noqa: S101  # the caller asked
        if step.source not in self.written and _q(step.source) not in self.there:
            last.lines.append(Int8Line(POINTWISE, step.source, _q(step.source)))
            self.there.add(_q(step.source))
        x, work = _q(step.source), CONVOLVE
        if step.filling is not None:
            bare = bare_step(step)
            assert isinstance(bare, Int8Step)  # noqa: S101  # made of one
            last.lines.append(Int8Line(CONVOLVE, x, _q(sampled_map(step)), step=bare))
            x, work = _q(sampled_map(step)), FILL
        line = Int8Line(work, x, self._form(step.out), self._form(step.out2), step=step)
        if step.shortcut is not None:
            name = step.shortcut.source
            line.residual = _q(name) if name in self.written else name
        last.lines.append(line)
        for name in step.writes:
            if name in self.real and self._form(name) != name:
                last.lines.append(Int8Line(POINTWISE, _q(name), name))

    def _form(self, name: str | None) -> str | None:
        """In which form a step writes a map."""
        if name is None:
            return None
        return _q(name) if name in self.integers and name in self.written else name


# ---------------------------------------------------------------- natively


def _call(stage: _Lines, maps: Mapping[str, Map], grids: Mapping[str, Grid], real: torch.dtype) -> NativeCall:
    def packed(step: Int8Step) -> tuple[int, Tensor]:
        assert step.integers is not None  # noqa: S101  # the caller asked
        return INT8_WEIGHTS, native_int8.pack(step.integers, step.groups, step.kind == "transposed")

    in_lines = native.reads_shifts(torch.uint8)
    lines = [made for line in stage.lines for made in kernel_lines(line, maps, grids, packed, in_lines)]
    written = list(dict.fromkeys(name for line in lines for name in line.writes))
    inputs = list(dict.fromkeys(name for line in lines for name in line.reads if name not in written))
    shapes = {name: maps[map_of(name)] for name in (*inputs, *written)}
    scratch = [name for name in written if name not in stage.wanted]
    offsets = arena(lines, scratch, shapes, {})
    call = NativeCall(inputs, [name for name in written if name in stage.wanted])
    made_of: list[Grid | torch.dtype] = []
    multipliers: list[int] = []
    numbers: dict[str, int] = {}
    for name in (*inputs, *written):
        kind = 0 if name in inputs else 2 if name in stage.wanted else 1
        numbers[name] = len(numbers)
        call.buffers += BufferCode(kind, shapes[name].channels, *shapes[name].stored, offsets.get(name, 0))
        made_of.append(grids[map_of(name)] if name.endswith(":q") else real)
    known: dict[int, tuple[int, Tensor]] = {}

    def number(kind: int, tensor: Tensor) -> int:
        if id(tensor) not in known:
            # held, so that its id stays its own
            known[id(tensor)] = len(call.tensors), tensor
            dtype = {TABLE: torch.int32, FLOATS: torch.float32}.get(kind, tensor.dtype)
            call.tensors.append(tensor.detach().to(dtype).contiguous())
        return known[id(tensor)][0]

    for line in lines:
        named = {name: getattr(line, name) for name in ("x", "residual", "out", "out2")}
        maps_of = {name: -1 if other is None else numbers[other] for name, other in named.items()}
        tensors = {name: number(kind, tensor) for name, (kind, tensor) in line.tensors.items()}
        multipliers.append(tensors.pop("multiplier", -1))
        call.code += coded(line, maps_of | tensors)
    call.keep(native_int8.keep(call.tensors, call.buffers, call.code, made_of, multipliers))
    return call


def kernel_lines(
    line: Int8Line,
    maps: Mapping[str, Map],
    grids: Mapping[str, Grid],
    weight_of: Callable[[Int8Step], tuple[int, Tensor]],
    in_lines: bool = True,
) -> list[Line]:
    """Return a line as the kernels run it, with tables and tensors, among them the "multiplier" of sums.

    Args:
        line: names of maps.
        maps, grids: of the maps, by name without form.
        weight_of: a step's integers as the lines hold them, and what kind of tensor that is.
        in_lines: add tables of shifts.
    """
    made = Line(line.work, line.x, line.out, line.out2, line.residual)
    if line.work == COPY:
        copies, at = [], 0
        for name in (line.x, *line.sources):
            copies.append(Line(COPY, name, line.out, values={"residual_channels": at}))
            at += maps[map_of(name)].channels
        return copies
    if line.work == WINDOW_MAX:
        assert isinstance(line.step, Follower)  # noqa: S101  # by construction
        first = maps[map_of(line.x)]
        windows = window_plan(first.fill, pool_window(line.step, first.size), *first.size)
        made.tensors = {"tap_index": (TABLE, windows.index), "rows": (TABLE, windows.starts)}
    if not isinstance(line.step, Int8Step):
        return [made]
    step, everything = line.step, dict(maps)
    if line.work == FILL:
        _set_fill(made, step, maps, grids)
    else:
        plan = tables(step, everything)
        made.tensors = gathered(plan.index, plan.rows, plan.taps, plan.groups)
        made.values = {"num_taps": step.taps}
        if step.integers is None:
            return [made]
        multiplier = _multiplier(step, grids[step.source])
        made.tensors |= {"weight": weight_of(step), "multiplier": (FLOATS, multiplier)}
        made.tensors |= floats(bias=step.bias)
        made.values["channel_groups"] = step.groups
        if (
            in_lines
            and (shifts := plan.lines(step.taps, step.groups, maps[step.source].channels)) is not None
        ):
            made.tensors["shifts"] = (TABLE, shifts)
    made.tensors |= floats(scale2=step.scale2, shift2=step.shift2, slope=step.slope)
    made.values |= {"activation": int(step.activation), "activation2": int(step.activation2)}
    if line.residual is not None and step.shortcut is not None:
        source, out = maps[map_of(line.residual)], output(step, everything)
        made.values["residual_channels"] = source.channels
        if step.shortcut.stride > 1 or source.fill or out.fill:
            rows = shortcut_rows(source.size, step.shortcut.stride, source.fill, out)
            made.tensors["residual_rows"] = (TABLE, rows)
    return [made]


def _set_fill(made: Line, step: Int8Step, maps: Mapping[str, Map], grids: Mapping[str, Grid]) -> None:
    filling = step.filling
    assert filling is not None  # noqa: S101  # by construction
    plan = fill_plan(step.sampling, *step.geometry.grid(*maps[step.source].size), filling.reach)
    bias = filling.bias
    plan.check(filling.weight.shape, None if bias is None else bias.shape, (0, step.out_channels))
    made.tensors = {"tap_index": (TABLE, plan.index), "rows": (TABLE, plan.kinds)}
    scaled = filling.weight.float() * torch.tensor(grids[sampled_map(step)].scale, dtype=torch.float32)
    made.tensors |= floats(weight=scaled if plan.taps else None, bias=bias)
    made.values = {"num_taps": max(1, plan.taps)}


def _multiplier(step: Int8Step, grid: Grid) -> Tensor:
    assert step.scales is not None  # noqa: S101  # it has weights
    return step.scales * grid.scale


# ---------------------------------------------------------------- by the reference


def _by_reference(
    line: Int8Line,
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
    if line.work == COPY:
        values[line.out] = torch.cat([x, *(values[name] for name in line.sources)], 1)
    elif line.work == WINDOW_MAX:
        assert isinstance(line.step, Follower)  # noqa: S101  # by construction
        values[line.out] = line.step.function(x.float()).to(torch.uint8)
    elif line.out.endswith(":q"):
        values[line.out] = quantise(x, grids[line.x])
    else:
        values[line.out] = dequantise(x, grids[line.out]).to(real)


def _step_by_reference(
    line: Int8Line,
    step: Int8Step,
    maps: dict[str, Map],
    grids: Mapping[str, Grid],
    real: torch.dtype,
    values: dict[str, Tensor],
) -> None:
    x, grid, geometry = values[line.x], grids[map_of(line.x)], step.geometry
    size = output(step, maps).size
    residual = None
    if line.residual is not None and step.shortcut is not None:
        residual = values[line.residual]
        if line.residual.endswith(":q"):
            residual = dequantise(residual, grids[step.shortcut.source])
        residual = step.shortcut.of(residual).float()
    if line.work == FILL:
        assert step.filling is not None  # noqa: S101  # by construction
        how = step.filling.weight, step.filling.bias, step.sampling, size, step.filling.reach
        y = end(fill(x, grid, *how), residual, int(step.activation), step.slope)
    elif step.integers is None:
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
        y = finish(sums, _multiplier(step, grid), step.bias, residual, int(step.activation), step.slope)
    if step.fills:
        y = torch.ops.quincunx.fill(y, step.sampling, geometry.grid(*x.shape[2:]))
    if line.out is not None:
        values[line.out] = _in_form(y, line.out, grids, real)
    if line.out2 is not None and step.scale2 is not None and step.shift2 is not None:
        second = y * step.scale2.view(-1, 1, 1) + step.shift2.view(-1, 1, 1)
        second = apply(step.activation2, second, own=True)
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
        """As of :class:`Program`, with the sampled maps of fitted fills."""
        steps, maps = super().settle(shapes, whole)
        for step in steps:
            if isinstance(step, Int8Step) and step.filling is not None:
                maps[sampled_map(step)] = output(bare_step(step), maps)
        return steps, maps

    def _plain(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = ", ".join(f"{name}: {tuple(value.shape)} {value.dtype}" for name, value in values.items())
        raise ValueError(
            "a network fused in eight bits takes float32 maps [N, C, H, W] of one batch size on the CPU, got "
            + shapes
        )

    def _compile(self, shapes: list[tuple[int, ...]]) -> list[Stage]:
        natively = self._serving() == "native"
        steps, maps = self.settle(shapes, whole=not natively)
        stages = []
        for stage in Divider(steps, maps, self.outputs, self.grids).stages:
            run: Callable[[dict[str, Tensor]], None]
            if isinstance(stage, Alone):
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
            if step.kind == "mean" and natively:
                return partial(_mean_natively, step, _mean_segment(step, maps, self.dtype))
            if step.kind == "mean":
                return partial(_mean_by_reference, step, maps)
            return partial(pool if natively and step.kind == "maxpool" else follow, step, maps)
        if not natively:
            return partial(_reference_stage, step, maps)
        whole = (
            not self.native_only
            and step.kind == "dense"
            and not maps[step.source].fill
            and not output(step, maps).fill
        )
        if whole and _prefers_torch(step, maps, batch):
            return partial(_reference_stage, step, maps)
        return _segment([step], maps, set(step.writes)).run


def _mean_natively(step: Follower, call: NativeCall, values: dict[str, Tensor]) -> None:
    """As a program file has it, so that both give the same bits; torch's own adds in another order."""
    call.run(values)
    if not step.keepdim:
        values[step.out] = values[step.out].flatten(1)


def _mean_by_reference(step: Follower, maps: dict[str, Map], values: dict[str, Tensor]) -> None:
    x = values[step.sources[0]]
    rows = x.flatten(2).float()
    total = torch.zeros_like(rows[:, :, 0])
    for place in range(rows.shape[2]):
        total = total + rows[:, :, place]
    share = torch.tensor(1.0) / rows.shape[2]
    values[step.out] = (total * share).to(x.dtype).view(*x.shape[:2], *([1, 1] if step.keepdim else []))


def _run_lines(
    lines: Sequence[Int8Line],
    maps: dict[str, Map],
    grids: Mapping[str, Grid],
    real: torch.dtype,
    values: dict[str, Any],
) -> None:
    for line in lines:
        _by_reference(line, maps, grids, real, values)
