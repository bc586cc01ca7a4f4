"""Steps as lines: the parts that the kernels run one after the other, and where their maps lie.

Most steps are one line. A fitted fill is two or three: the sampled convolution, one pass that fills, adds and
activates, and what that pass cannot take along. The torch operator (:mod:`quincunx.fusion.program`) and files
(:mod:`quincunx.fusion.serialise`) are made of the same lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from quincunx.fusion.epilogues import Activation
from quincunx.fusion.steps import Map, Step, output, shortcut_rows, tables
from quincunx.ops.plan import fill_plan, nearest_index

__all__ = [
    "CONVOLVE",
    "COPY",
    "FILL",
    "FLOATS",
    "INT8_WEIGHTS",
    "POINTWISE",
    "TABLE",
    "WEIGHTS",
    "WINDOW_MAX",
    "Line",
    "Lines",
    "ReadsAndWrites",
    "arena",
    "floats",
    "gathered",
    "mean_index",
    "replaced",
    "unwritten",
]

# kinds of tensors, and what a line does (``Work`` in csrc/runner.h)
TABLE, FLOATS, WEIGHTS, INT8_WEIGHTS = 0, 1, 2, 3
CONVOLVE, WINDOW_MAX, FILL, COPY, POINTWISE = range(5)
# elements; keeps every map of the arena on its own cache lines
_ALIGN = 32


@dataclass
class Line:
    """A part of a program: names of maps and tensors in the fields of StepCode."""

    work: int
    x: str
    out: str | None = None
    out2: str | None = None
    residual: str | None = None
    tensors: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    @property
    def reads(self) -> list[str]:
        return [self.x] + ([self.residual] if self.residual else [])

    @property
    def writes(self) -> list[str]:
        return [name for name in (self.out, self.out2) if name is not None]


class Lines:
    """Collects the lines of steps; knows all maps by name, also those that it adds."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        self.maps = dict(maps)
        self.done: list[Line] = []

    def add(self, line: Line) -> None:
        """One more."""
        self.done.append(line)

    def weight_of(self, step: Step) -> Tensor:
        """A convolution's weight as the lines hold it."""
        raise NotImplementedError

    def in_lines(self, step: Step) -> bool:
        """Whether a step's kernel gains from a table of shifts; where it is not known, one is made."""
        return True

    def step(self, step: Step) -> None:
        if step.filling is not None:
            return self.fitted(step)
        plan, out = tables(step, self.maps), output(step, self.maps)
        line = Line(CONVOLVE, step.source, step.out, step.out2)
        line.tensors = gathered(plan.index, plan.rows, plan.taps, plan.groups)
        line.values = {"num_taps": step.taps}
        if step.kind != "mean":
            line.tensors |= {"weight": (WEIGHTS, self.weight_of(step))} | floats(
                bias=step.bias, scale2=step.scale2, shift2=step.shift2, slope=step.slope
            )
            line.values |= {"channel_groups": step.groups, "activation": int(step.activation)}
            line.values["activation2"] = int(step.activation2)
            if (
                self.in_lines(step)
                and (shifts := plan.lines(step.taps, step.groups, self.maps[step.source].channels))
                is not None
            ):
                line.tensors["shifts"] = (TABLE, shifts)
        if step.shortcut is not None:
            source = self.maps[step.shortcut.source]
            line.residual = step.shortcut.source
            line.values["residual_channels"] = source.channels
            if step.shortcut.stride > 1 or source.fill or out.fill:
                rows = shortcut_rows(source.size, step.shortcut.stride, source.fill, out)
                line.tensors["residual_rows"] = (TABLE, rows)
        self.add(line)

    def fitted(self, step: Step) -> None:
        """The sampled convolution, one pass that fills, adds and activates, and a second output."""
        filling = step.filling
        assert filling is not None  # noqa: S101  # the caller asked
        name = step.out or f"{step.out2}.first"
        size = step.geometry.grid(*self.maps[step.source].size)
        bias = None if step.bias is None else step.bias.to(step.weight.dtype)
        bare: dict[str, Any] = {
            "filling": None,
            "shortcut": None,
            "activation": Activation.NONE,
            "slope": None,
        }
        bare |= {"out2": None, "scale2": None, "shift2": None}
        sampled = replace(step, kind="sampled", bias=bias, out=f"{name}.sampled", **bare)
        self.maps[f"{name}.sampled"] = output(sampled, self.maps)
        self.maps[name] = Map(step.out_channels, size)
        self.step(sampled)
        residual = None
        if step.shortcut is not None:
            residual = self.every(self.whole(step.shortcut.source), step.shortcut.stride)
        # what the pass cannot take along is a pointwise step behind it
        behind = step.activation > Activation.RELU6 or (
            step.shortcut is not None and step.shortcut.padded > 0
        )
        filled = self.new(f"{name}.filled", self.maps[name]) if behind else name
        plan = fill_plan(step.sampling, *size, filling.reach)
        channels = (0, step.out_channels)
        plan.check(filling.weight.shape, None if filling.bias is None else filling.bias.shape, channels)
        line = Line(FILL, f"{name}.sampled", filled, residual=None if behind else residual)
        line.tensors = {"tap_index": (TABLE, plan.index), "rows": (TABLE, plan.kinds)}
        line.tensors |= floats(weight=filling.weight if plan.taps else None, bias=filling.bias)
        line.values = {"num_taps": max(1, plan.taps), "activation": 0 if behind else int(step.activation)}
        self.add(line)
        if behind:
            self.pointwise(filled, name, residual, step.activation, slope=step.slope)
        if step.out2 is not None:
            scales = {"scale": step.scale2, "shift": step.shift2}
            self.maps[step.out2] = self.maps[name]
            self.pointwise(name, step.out2, None, step.activation2, **scales)

    # ------------------------------------------------ lines

    def new(self, name: str, shape: Map) -> str:
        self.maps[name] = shape
        return name

    def pointwise(
        self,
        x: str,
        out: str,
        residual: str | None,
        activation: int,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        slope: Tensor | None = None,
    ) -> None:
        line = Line(POINTWISE, x, out, residual=residual)
        line.tensors = floats(scale2=scale, shift2=shift, slope=slope)
        line.values = {"activation": int(activation)}
        if residual is not None:
            line.values["residual_channels"] = self.maps[residual].channels
        self.add(line)

    def read(self, x: str, out: str, index: Tensor) -> None:
        """Means of rows of a map; of one row, copies of it."""
        count, taps = index.shape
        groups = torch.tensor([[count, taps]])
        line = Line(CONVOLVE, x, out, values={"num_taps": taps})
        line.tensors = gathered(index, torch.arange(count), torch.arange(taps), groups)
        self.add(line)

    def whole(self, name: str) -> str:
        """A map that is stored in compact form, made whole."""
        shape = self.maps[name]
        whole = f"{name}.whole"
        if not shape.fill:
            return name
        if whole not in self.maps:
            self.new(whole, Map(shape.channels, shape.size))
            self.read(name, whole, nearest_index(shape.fill, *shape.size).view(-1, 1))
        return whole

    def every(self, name: str, stride: int) -> str:
        """Each so many-th position of a whole map, in both directions."""
        shape, fewer = self.maps[name], f"{name}.every{stride}"
        if stride == 1:
            return name
        if fewer not in self.maps:
            height, width = shape.size
            rows = torch.arange(height * width).view(height, width)[::stride, ::stride]
            self.new(fewer, Map(shape.channels, (rows.shape[0], rows.shape[1])))
            self.read(name, fewer, rows.reshape(-1, 1))
        return fewer


def gathered(index: Tensor, rows: Tensor, taps: Tensor, groups: Tensor) -> dict[str, tuple[int, Tensor]]:
    found = {"tap_index": index, "rows": rows, "taps": taps, "groups": groups}
    return {name: (TABLE, tensor) for name, tensor in found.items()}


def floats(**tensors: Tensor | None) -> dict[str, tuple[int, Tensor]]:
    """Those tensors of a line that there are."""
    return {name: (FLOATS, tensor) for name, tensor in tensors.items() if tensor is not None}


def mean_index(shape: Map) -> Tensor:
    """The stored rows that the mean over all positions reads, [1, H W]."""
    height, width = shape.size
    rows = nearest_index(shape.fill, height, width) if shape.fill else torch.arange(height * width)
    return rows.view(1, -1)


def unwritten(lines: Sequence[Line]) -> list[str]:
    """What lines read and none of them writes before."""
    written: set[str] = set()
    found: dict[str, None] = {}
    for line in lines:
        # a line may read one map twice
        found |= dict.fromkeys(name for name in line.reads if name not in written)
        written |= set(line.writes)
    return list(found)


class ReadsAndWrites(Protocol):
    """What lines of any number format tell of themselves: names of maps."""

    @property
    def reads(self) -> Sequence[str]: ...

    @property
    def writes(self) -> Sequence[str]: ...


def arena(
    lines: Sequence[ReadsAndWrites],
    scratch: Sequence[str],
    maps: Mapping[str, Map],
    replaced: dict[str, str],
    widths: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """First fit: an offset for each map inside the segment, none overlapping one that is still read.

    Args:
        replaced: maps that lie where another one does, which comes before them in ``scratch``.
        widths: bytes of each map's values where offsets are to be bytes; else they are numbers of values.
    """
    # several lines may write one map
    first = {name: i for i, line in reversed(list(enumerate(lines))) for name in line.writes}
    last = {name: i for i, line in enumerate(lines) for name in line.reads}
    offsets: dict[str, int] = {}
    width = dict.fromkeys(scratch, 1) if widths is None else widths
    sizes = {name: -(-maps[name].numel * width[name] // _ALIGN) * _ALIGN for name in scratch}
    for name in scratch:
        if name in replaced:
            offsets[name] = offsets[replaced[name]]
            continue
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


def replaced(lines: Sequence[Line], scratch: Sequence[str], maps: Mapping[str, Map]) -> dict[str, str]:
    """Sums that take the place of what was added: its last reader reads each value just before it writes the
    one that stands there then, so that a residual network needs a map less."""
    last = {name: i for i, line in enumerate(lines) for name in line.reads}
    found: dict[str, str] = {}
    for number, line in enumerate(lines):
        added, out = line.residual, line.out or line.out2
        if added is None or out is None or added == line.x or "residual_rows" in line.tensors:
            continue
        same = (maps[added].channels, maps[added].stored) == (
            maps[out].channels,
            maps[out].stored,
        )
        if same and {out, added} <= set(scratch) and last[added] == number:
            found[out] = added
    return found
