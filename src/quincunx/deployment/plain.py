"""Programs of a fused network as plain operators, which every exporter and engine has.

A map that is sampled at cosets is held as one small map for each coset, a *phase*. A sampled convolution is
then one strided convolution for each coset, and a transposed one is a few small convolutions of the phases
for each residue class, whose results are interleaved once (PyTorch's pixel shuffle). No zero is multiplied.
A map that is sampled by a mask is held as rows [N, m, C]: its convolution gathers the rows behind each tap
and multiplies matrices.

Sizes of maps are fixed, the batch is not. Everything that depends on sizes is computed before tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.fusion.epilogues import Activation, apply
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Filling, Follower, Map, Step, keeps_compact, output, shortcut_rows
from quincunx.layers.blocks import PairedFill2d
from quincunx.layers.sampled import window_means
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import fill_plan, forward_plan, nearest_index, nearest_shares, position_index
from quincunx.sampling import Cosets, from_spec

__all__ = ["PlainEnd", "PlainProgram"]

Four = tuple[int, int, int, int]


class PlainProgram(nn.Module):
    """A program as a module of plain operators, for maps of one size and any batch.

    Args:
        program: of a fused network, in float32.
        shapes: of its inputs, [N, C, H, W] each.

    Raises:
        ValueError: shapes that the program cannot read, or a program in another type than float32.

    Example:
        >>> fused, x = qx.fuse(qx.networks.build("rsbn8", width=4).eval()), torch.randn(2, 3, 15, 16)
        >>> plain = PlainProgram(fused.program0, [x.shape])
        >>> torch.allclose(plain(x)[0], fused.program0(x)[0], atol=1e-5)
        True
    """

    def __init__(self, program: Program, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if program.dtype != torch.float32:
            raise ValueError(f"program: computes in {program.dtype}; plain operators are made from float32")
        with torch.no_grad():
            builder = _Builder(program, shapes)
        self.inputs = list(program.inputs)
        self.calls = nn.ModuleList(builder.calls)
        self.outputs = builder.outputs

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = dict(zip(self.inputs, maps, strict=True))
        call: Any
        for call in self.calls:
            values[call.out] = call(*[values[name] for name in call.sources])
        return tuple(values[name] for name in self.outputs)


class _Call(nn.Module):
    """A function of values by name; its tensors are buffers, so that files hold them once."""

    weight: Tensor
    bias: Tensor | None
    index: Tensor
    matrix: Tensor
    where: Tensor
    gain: Tensor | None
    shares: Tensor
    slope: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, sources: Sequence[str], out: str) -> None:
        super().__init__()
        self.sources, self.out = list(sources), out

    def keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else tensor.detach().clone().contiguous())


class _Applied(_Call):
    """A function without tensors of its own, or torch's module behind a follower."""

    def __init__(self, function: Callable[..., Any], sources: Sequence[str], out: str) -> None:
        super().__init__(sources, out)
        self.function = function

    def forward(self, *values: Any) -> Any:
        return self.function(*values)


# ---------------------------------------------------------------- orders and forms


def _order(spec: str, size: tuple[int, int]) -> Tensor:
    """The row-major number of each computed position in the order of stored rows, phase by phase."""
    positions, sampling = position_index(spec, *size), from_spec(spec)
    if not isinstance(sampling, Cosets):
        return torch.arange(len(positions))
    number = torch.full((size[0] * size[1],), -1)
    number[positions] = torch.arange(len(positions))
    grid, period = number.view(size), sampling.period
    return torch.cat([grid[b::period, a::period].flatten() for a, b in sampling.offsets])


def _places(spec: str, size: tuple[int, int]) -> Tensor:
    """The stored row of each computed position."""
    return _order(spec, size).argsort()


def _phase_sizes(sampling: Cosets, size: tuple[int, int]) -> list[tuple[int, int]]:
    return [
        (-(-(size[0] - b) // sampling.period), -(-(size[1] - a) // sampling.period))
        for a, b in sampling.offsets
    ]


def _unflatten(x: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    found: Tensor = x.unflatten(axis, tuple(sizes))  # type: ignore[no-untyped-call]
    return found


def _rows_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map_of(rows: Tensor, size: tuple[int, int]) -> Tensor:
    return _unflatten(rows.transpose(1, 2), 2, size)


class _Picked(_Call):
    """Rows of a map by number; a number beyond the last is a row of zeros."""

    def __init__(self, index: Tensor, rows: int, source: str, out: str) -> None:
        super().__init__([source], out)
        self.padded = bool((index < 0).any())
        self.keep("index", torch.where(index < 0, rows, index).long())

    def forward(self, rows: Tensor) -> Tensor:
        rows = F.pad(rows, (0, 0, 0, 1)) if self.padded else rows
        return rows.index_select(1, self.index)


class _Split(_Call):
    """Rows as phases."""

    def __init__(self, sizes: Sequence[tuple[int, int]], source: str, out: str) -> None:
        super().__init__([source], out)
        self.sizes = list(sizes)

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(rows.transpose(1, 2), [h * w for h, w in self.sizes], 2)
        return tuple(_unflatten(part, 2, size) for part, size in zip(parts, self.sizes, strict=True))


def _joined(phases: Sequence[Tensor]) -> Tensor:
    return torch.cat([_rows_of(phase) for phase in phases], 1)


# ---------------------------------------------------------------- convolutions


def _fitted_to(x: Tensor, sides: Four) -> Tensor:
    """A map with zeros around it, or without rows and columns where a number is negative."""
    top, bottom, left, right = sides
    if min(sides) < 0:
        height, width = x.shape[2:]
        x = x[:, :, max(0, -top) : height - max(0, -bottom), max(0, -left) : width - max(0, -right)]
        top, bottom, left, right = (max(0, side) for side in sides)
    return F.pad(x, (left, right, top, bottom)) if top or bottom or left or right else x


def _shared_padding(sides: Four, stride: int) -> tuple[int, int] | None:
    """One number an axis that pads to the same result, as torch's convolutions take it; None for none."""
    found = []
    for before, after in (sides[:2], sides[2:]):
        # what is too much behind does not fill another window
        if before < 0 or not 0 <= before - after < stride:
            return None
        found.append(before)
    return found[0], found[1]


class _Convolution(_Call):
    """A dense convolution with zeros on each side as given, possibly negative."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        sides: Four,
        stride: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        source: str,
        out: str,
    ) -> None:
        super().__init__([source], out)
        self.keep("weight", weight)
        self.keep("bias", bias)
        shared = _shared_padding(sides, min(stride))
        self.sides: Four = (0, 0, 0, 0) if shared else sides
        self.padding = shared or (0, 0)
        self.stride, self.dilation, self.groups = stride, dilation, groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            _fitted_to(x, self.sides),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class _Sampled(_Call):
    """A convolution at cosets: one with a larger stride for each of them, with one weight."""

    def __init__(
        self,
        step: Step,
        sampling: Cosets,
        size: tuple[int, int],
        source: str,
        out: str,
    ) -> None:
        super().__init__([source], out)
        geometry, period = step.geometry, sampling.period
        self.keep("weight", step.weight)
        self.keep("bias", step.bias)
        self.stride = (period * geometry.stride[0], period * geometry.stride[1])
        self.dilation, self.groups = geometry.dilation, step.groups
        self.windows: list[tuple[Four, tuple[int, int]]] = []
        for (a, b), counts in zip(
            sampling.offsets, _phase_sizes(sampling, geometry.grid(*size)), strict=True
        ):
            found: list[int] = []
            for axis, first in enumerate((b, a)):
                stride, before = geometry.stride[axis], geometry.padding[2 * axis]
                last = (first + period * (counts[axis] - 1)) * stride - before
                reach = geometry.dilation[axis] * (geometry.kernel[axis] - 1)
                found += [before - first * stride, last + reach - (size[axis] - 1)]
            sides: Four = (found[0], found[1], found[2], found[3])
            shared = _shared_padding(sides, min(self.stride))
            self.windows.append(((0, 0, 0, 0), shared) if shared else (sides, (0, 0)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        where = self.dilation, self.groups
        return tuple(
            F.conv2d(_fitted_to(x, sides), self.weight, self.bias, self.stride, padding, *where)
            for sides, padding in self.windows
        )


class _Transposed(_Call):
    """A transposed convolution of stride 1 from cosets.

    At positions r + K u of a residue class r, tap i reads position (r + top - d i - b) / K + u of the phase
    of the coset b, if that is an integer: an ordinary convolution of the phase with some of the taps.
    """

    def __init__(
        self,
        step: Step,
        sampling: Cosets,
        size: tuple[int, int],
        source: str,
        out: str,
    ) -> None:
        super().__init__([source], out)
        self.period, self.size, self.groups = sampling.period, size, step.groups
        self.channels = step.out_channels
        self.keep("bias", step.bias)
        weight = _unflatten(step.weight, 0, (step.groups, -1)).transpose(1, 2).flatten(0, 1)
        grid = step.geometry.grid(*size)
        phases = _phase_sizes(sampling, grid)
        # for each residue class: (phase, name of its weight, sides, dilation), ..., and how far it is padded
        self.classes: list[tuple[list[tuple[int, str, Four, tuple[int, int]]], tuple[int, int]]] = []
        tallest, widest = (-(-n // self.period) for n in size)
        for row in range(self.period):
            for col in range(self.period):
                counts = (-(-(size[0] - row) // self.period), -(-(size[1] - col) // self.period))
                terms = []
                for number, (a, b) in enumerate(sampling.offsets):
                    vertical = self._taps(step.geometry, 0, row, b, counts[0], phases[number][0])
                    horizontal = self._taps(step.geometry, 1, col, a, counts[1], phases[number][1])
                    if not vertical or not horizontal:
                        continue
                    (rows, top, bottom, down), (cols, left, right, across) = vertical, horizontal
                    name = f"weight{row}_{col}_{number}"
                    self.keep(name, weight[:, :, rows][:, :, :, cols])
                    terms.append((number, name, (top, bottom, left, right), (down, across)))
                self.classes.append((terms, (tallest - counts[0], widest - counts[1])))

    def _taps(
        self, geometry: Geometry, axis: int, residue: int, first: int, count: int, length: int
    ) -> tuple[list[int], int, int, int] | None:
        """The taps that read a phase, backwards, the zeros before and behind it, and their distance in it."""
        before, dilation = geometry.padding[2 * axis], geometry.dilation[axis]
        found = [
            (tap, (residue + before - dilation * tap - first) // self.period)
            for tap in reversed(range(geometry.kernel[axis]))
            if (residue + before - dilation * tap - first) % self.period == 0
        ]
        if not found:
            return None
        lowest, highest = found[0][1], found[-1][1]
        apart = found[1][1] - lowest if len(found) > 1 else 1
        return [tap for tap, _ in found], -lowest, count - 1 + highest - (length - 1), apart

    def forward(self, phases: Sequence[Tensor]) -> Tensor:
        parts = []
        for terms, (below, beside) in self.classes:
            total: Tensor | None = None
            for number, name, sides, dilation in terms:
                shared = _shared_padding(sides, 1)
                total_bias = self.bias if total is None else None
                found = F.conv2d(
                    phases[number] if shared else _fitted_to(phases[number], sides),
                    getattr(self, name),
                    total_bias,
                    1,
                    shared or 0,
                    dilation,
                    self.groups,
                )
                total = found if total is None else total + found
            tallest, widest = (-(-n // self.period) for n in self.size)
            if total is None:
                total = phases[0].new_zeros((phases[0].shape[0], self.channels, tallest, widest))
                total = total if self.bias is None else total + self.bias.view(1, -1, 1, 1)
            else:
                total = _fitted_to(total, (0, below, 0, beside))
            parts.append(total)
        whole = F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), self.period)
        return _fitted_to(whole, (0, self.size[0] - whole.shape[2], 0, self.size[1] - whole.shape[3]))


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """[O, C / g, kh, kw] as [taps C, O], or with several groups g as [g, taps C / g, O / g]."""
    parts = _unflatten(weight.flatten(2), 0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)
    return parts if groups > 1 else parts[0]


class _Product(_Call):
    """Rows times a matrix: [N, m taps, C] to [N, m, O]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: int, source: str, out: str) -> None:
        super().__init__([source], out)
        self.taps, self.groups = weight.shape[2] * weight.shape[3], groups
        self.keep("matrix", _matrix(weight, groups))
        self.keep("bias", bias)

    def forward(self, rows: Tensor) -> Tensor:
        if self.groups == 1:
            found = rows.reshape(rows.shape[0], -1, self.taps * rows.shape[2]) @ self.matrix
        else:
            parts = _unflatten(_unflatten(rows, 2, (self.groups, -1)), 1, (-1, self.taps))
            found = (parts.permute(0, 3, 1, 2, 4).flatten(3) @ self.matrix).permute(0, 2, 1, 3).flatten(2)
        return found if self.bias is None else found + self.bias


class _Spread(_Call):
    """A transposed convolution from any positions: products for each tap, summed where they meet."""

    def __init__(self, step: Step, size: tuple[int, int], source: str, out: str) -> None:
        super().__init__([source], out)
        self.size, self.taps, self.groups = size, step.taps, step.groups
        plan = forward_plan(step.sampling, step.geometry, *size)
        reads = plan.index.long().view(-1, self.taps)
        which, tap = (reads >= 0).nonzero(as_tuple=True)
        table = torch.full((size[0] * size[1], self.taps), reads.numel())
        table[reads[which, tap], tap] = which * self.taps + tap
        self.keep("index", table.flatten())
        # [C, O / groups, taps] to [groups, C / groups, taps O / groups]
        weight = _unflatten(step.weight.flatten(2), 0, (step.groups, -1)).transpose(2, 3).flatten(2)
        self.keep("matrix", weight)
        self.keep("bias", step.bias)

    def forward(self, rows: Tensor) -> Tensor:
        parts = _unflatten(rows, 2, (self.groups, -1)).transpose(1, 2) @ self.matrix
        products = _unflatten(parts, 3, (self.taps, -1)).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
        read = F.pad(products, (0, 0, 0, 1)).index_select(1, self.index)
        total = _unflatten(read, 1, (-1, self.taps)).sum(2)
        total = total if self.bias is None else total + self.bias
        return _map_of(total, self.size)


class _Fitted(_Call):
    """A fitted fill of rows: skipped positions class by class, then all positions in their places.

    Args:
        places: the row of each computed position; by default as rows are stored.
    """

    def __init__(
        self,
        filling: Filling,
        spec: str,
        size: tuple[int, int],
        channels: int,
        source: str = "",
        out: str = "",
        places: Tensor | None = None,
    ) -> None:
        super().__init__([source], out)
        self.size = size
        plan = fill_plan(spec, *size, filling.reach)
        places = _places(spec, size) if places is None else places
        plan.check(filling.weight.shape, None if filling.bias is None else filling.bias.shape, (0, channels))
        kinds, m = plan.kinds[plan.skipped].long(), len(places)
        order = kinds.argsort(stable=True)
        skipped, kinds = plan.skipped[order], kinds[order]
        self.taps, self.count = plan.taps, len(skipped)
        if self.taps:
            index = plan.index[skipped, : plan.taps].long()
            index = torch.where(index < 0, m, places[index.clamp_min(0)])
            self.keep("index", index.T.flatten())
            few = isinstance(from_spec(spec), Cosets)
            # the rows of a class lie together; each class of cosets has one row of coefficients
            self.lengths = kinds.bincount(minlength=plan.count).tolist() if few else None
            weight = filling.weight if few else filling.weight[kinds]
            self.keep("weight", weight)
            bias = filling.bias
            self.keep("bias", bias if few or bias is None else bias[kinds])
            self._factor(few)
        where = torch.full((size[0] * size[1],), m)
        where[plan.computed] = places
        where[skipped] = torch.arange(m, m + self.count) if self.taps else torch.full((self.count,), m)
        self.keep("where", where)

    def _factor(self, few: bool) -> None:
        """A mask's coefficients are numbers of positions times numbers of channels: kept as those."""
        self.keep("gain", None)
        if few or not self.weight.numel():
            return
        largest = int(self.weight.abs().argmax())
        channel = largest % self.weight.shape[2]
        row, tap = divmod(largest // self.weight.shape[2], self.weight.shape[1])
        gain = self.weight[row, tap] / self.weight[row, tap, channel]
        numbers = self.weight[:, :, channel : channel + 1]
        if torch.allclose(numbers * gain, self.weight, rtol=1e-5, atol=1e-7):
            self.keep("weight", numbers)
            self.keep("gain", gain)

    def forward(self, rows: Tensor) -> Tensor:
        zero = F.pad(rows, (0, 0, 0, 1))
        if not self.taps:
            return _map_of(zero.index_select(1, self.where), self.size)
        read = _unflatten(zero.index_select(1, self.index), 1, (self.taps, self.count))
        if self.lengths is None:
            total = (read * self.weight.transpose(0, 1)).sum(1)
            total = total if self.gain is None else total * self.gain
            total = total if self.bias is None else total + self.bias
        else:
            parts = []
            for number, part in enumerate(torch.split(read, self.lengths, 2)):
                made = (part * self.weight[number].unsqueeze(1)).sum(1)
                parts.append(made if self.bias is None else made + self.bias[number])
            total = torch.cat(parts, 1)
        return _map_of(torch.cat([rows, total], 1).index_select(1, self.where), self.size)


class PlainEnd(nn.Module):
    """The end of a block at sampled positions as plain operators, for maps of one size and any batch.

    Args:
        end: with a fill other than zeros.
        size: (H, W) of the grid.

    Example:
        >>> from quincunx.layers.blocks import PairedFill2d
        >>> end = PairedFill2d(8, 4, sampling=qx.CHESSBOARD, partner="0").eval()
        >>> y = torch.randn(2, 8, 18, 1)
        >>> torch.allclose(PlainEnd(end, (6, 6))(y), end(y, (6, 6)), atol=1e-6)
        True
    """

    def __init__(self, end: PairedFill2d, size: tuple[int, int]) -> None:
        super().__init__()
        spec = end.sampling.spec
        self.last = end.channels == "last"
        with torch.no_grad():
            self.calls = nn.Sequential(_Product(end.weight, end.bias, end.groups, "", ""))
            if end.filling is None:
                index = nearest_index(spec, *size)
                self.calls.append(_Picked(index, len(index), "", ""))
                self.calls.append(_Applied(partial(_map_of, size=size), "", ""))
            else:
                # the network's own layers between the halves keep the order of positions
                order = torch.arange(end.sampling.count(*size))
                self.calls.append(_Fitted(Filling.of(end), spec, size, end.out_channels, places=order))

    def forward(self, y: Tensor, _: object = None) -> Tensor:
        """Return the map; the size that a caller gives is the one that it was made for."""
        whole: Tensor = self.calls(y.flatten(1, 2) if self.last else _rows_of(y))
        return whole.permute(0, 2, 3, 1) if self.last else whole


class _Means(_Call):
    """Means of the windows that begin at computed positions, as rows."""

    def __init__(self, window: int, index: Tensor, source: str, out: str) -> None:
        super().__init__([source], out)
        self.window = window
        self.keep("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return _rows_of(window_means(x, self.window)).index_select(1, self.index)


class _Weighted(_Call):
    """The mean over all positions of a map that is stored at some of them."""

    def __init__(self, shares: Tensor, keepdim: bool, source: str, out: str) -> None:
        super().__init__([source], out)
        self.keep("shares", shares.view(1, -1, 1))
        self.keepdim = keepdim

    def forward(self, rows: Tensor) -> Tensor:
        mean = (rows * self.shares).sum(1)
        return mean[:, :, None, None] if self.keepdim else mean


class _Epilogue(_Call):
    """Shortcut and activation of one value or of each phase; channels are axis 1, or the last of rows."""

    def __init__(self, step: Step, rows: bool, sources: Sequence[str], out: str) -> None:
        super().__init__(sources, out)
        self.kind, self.rows = int(step.activation), rows
        self.padded = step.shortcut.padded if step.shortcut else 0
        slope = step.slope
        self.keep("slope", None if slope is None else slope if rows else slope.view(-1, 1, 1))

    def forward(self, out: Any, other: Any = None) -> Any:
        if isinstance(out, (tuple, list)):
            others = other if other is not None else [None] * len(out)
            return tuple(self._one(x, y) for x, y in zip(out, others, strict=True))
        return self._one(out, other)

    def _one(self, out: Tensor, other: Tensor | None) -> Tensor:
        if other is not None:
            if self.padded:
                sides = (0, self.padded) if self.rows else (0, 0, 0, 0, 0, self.padded)
                other = F.pad(other, sides)
            out = out + other
        if self.kind == Activation.LEAKY:
            return torch.where(out > 0, out, out * self.slope)
        return apply(self.kind, out)


class _Second(_Call):
    """act2(out scale2 + shift2)."""

    def __init__(self, step: Step, rows: bool, source: str, out: str) -> None:
        super().__init__([source], out)
        self.kind = int(step.activation2)
        for name, value in (("scale", step.scale2), ("shift", step.shift2)):
            self.keep(name, value if rows or value is None else value.view(-1, 1, 1))

    def forward(self, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return tuple(self.forward(x) for x in out)
        return apply(self.kind, out * self.scale + self.shift)


# ---------------------------------------------------------------- from steps to calls

# how a value is held: as a map that a reader sees or as it is stored, [N, C, m, 1]; as phases; as rows
_PLAIN, _PHASES, _ROWS = "plain", "phases", "rows"


class _Builder:
    """The calls of a program. A value of one name may be there in several forms, each made once."""

    def __init__(self, program: Program, shapes: Sequence[Sequence[int]]) -> None:
        steps, self.maps = program.settle(shapes)
        self.calls: list[_Call] = []
        # the form in which each value was made, and the sampling and grid of one that is sampled
        self.form = dict.fromkeys(program.inputs, _PLAIN)
        self.sampled: dict[str, tuple[str, tuple[int, int]]] = {}
        self.made: set[str] = set()
        for step in steps:
            if isinstance(step, Follower):
                self._follow(step)
            else:
                self._step(step)
        self.outputs = [self._whole(name) for name in program.outputs]

    def _add(self, call: _Call) -> str:
        self.calls.append(call)
        self.made.add(call.out)
        return call.out

    def _apply(self, function: Callable[..., Any], source: str, out: str) -> str:
        return out if out in self.made else self._add(_Applied(function, [source], out))

    # ------------------------------------------------ forms of values

    def _where(self, name: str) -> tuple[str, tuple[int, int]]:
        """The sampling and the grid of a value that has some positions only."""
        shape = self.maps[name]
        return (shape.fill, shape.size) if shape.fill else self.sampled[name]

    def _rows(self, name: str, sampled: tuple[str, tuple[int, int]] | None = None) -> str:
        """A value as rows; of a sampled map in stored order, else row-major."""
        if self.form[name] == _ROWS:
            return name
        if self.form[name] == _PHASES:
            return self._apply(_joined, name, f"{name}.rows")
        flat = self._apply(_rows_of, name, f"{name}.rows")
        if sampled is None:
            return flat
        order, out = _order(*sampled), f"{name}.ordered"
        return out if out in self.made else self._add(_Picked(order, len(order), flat, out))

    def _phases(self, name: str, sampling: Cosets, sampled: tuple[str, tuple[int, int]]) -> str:
        out = f"{name}.phases"
        if self.form[name] == _PHASES or out in self.made:
            return name if self.form[name] == _PHASES else out
        sizes = _phase_sizes(sampling, sampled[1])
        return self._add(_Split(sizes, self._rows(name, sampled), out))

    def _stored(self, name: str) -> str:
        """A value that has some positions only as [N, C, m, 1], in the order of the contract."""
        if self.form[name] == _PLAIN:
            return name
        places, out = _places(*self._where(name)), f"{name}.stored"
        rows, ordered = self._rows(name), f"{name}.stored.rows"
        if ordered not in self.made:
            self._add(_Picked(places, len(places), rows, ordered))
        return self._apply(partial(_map_of, size=(len(places), 1)), ordered, out)

    def _whole(self, name: str) -> str:
        """A value as the map that a reader sees."""
        shape = self.maps[name]
        if not shape.fill:
            return self._stored(name)
        whole, picked = f"{name}.whole", f"{name}.whole.rows"
        if whole in self.made:
            return whole
        places = _places(shape.fill, shape.size)
        index = places[nearest_index(shape.fill, *shape.size)]
        self._add(_Picked(index, len(places), self._rows(name), picked))
        return self._apply(partial(_map_of, size=shape.size), picked, whole)

    # ------------------------------------------------ steps

    def _step(self, step: Step) -> None:
        name = step.out or f"{step.out2}.first"
        shape = output(step, self.maps)
        self.maps[name] = shape
        alone = step.shortcut is None and step.activation == Activation.NONE
        bare = name if alone else f"{name}.bare"
        form, sampled = self._convolution(step, shape, bare)
        self.form[bare] = form
        self.maps.setdefault(bare, shape)
        if sampled is not None:
            self.sampled[bare] = sampled
        if step.kind == "fitted" or (step.kind == "transposed"):
            form, sampled = _PLAIN, None
        if not alone:
            sources = [bare]
            if step.shortcut is not None:
                sources.append(self._shortcut(step, shape, form, sampled))
            self._add(_Epilogue(step, form == _ROWS, sources, name))
        self.form[name] = form
        if sampled is not None:
            self.sampled[name] = sampled
        if step.out2 is not None:
            self._add(_Second(step, form == _ROWS, name, step.out2))
            self.form[step.out2] = form
            if sampled is not None:
                self.sampled[step.out2] = sampled

    def _convolution(
        self, step: Step, shape: Map, out: str
    ) -> tuple[str, tuple[str, tuple[int, int]] | None]:
        """The convolution alone; the form of its result, and where that is sampled."""
        geometry, source = step.geometry, self.maps[step.source]
        if step.kind == "transposed":
            self._transposed(step, shape.size, out)
            return _PLAIN, None
        grid = geometry.grid(*source.size)
        if step.kind == "dense":
            fills = source.fill, self.maps[step.shortcut.source].fill if step.shortcut else source.fill
            if keeps_compact(step, *fills):
                self._add(_Product(step.weight, step.bias, step.groups, self._rows(step.source), out))
                return _ROWS, None
            where = (geometry.padding, geometry.stride, geometry.dilation, step.groups)
            self._add(_Convolution(step.weight, step.bias, *where, self._whole(step.source), out))
            return _PLAIN, None
        if step.kind == "mean":
            index = position_index(step.sampling, *source.size)[_order(step.sampling, source.size)]
            self._add(_Means(geometry.kernel[0], index, self._whole(step.source), out))
            return _ROWS, None
        sampling = from_spec(step.sampling)
        bare = f"{out}.sampled" if step.kind == "fitted" else out
        if isinstance(sampling, Cosets):
            self._add(_Sampled(step, sampling, source.size, self._whole(step.source), bare))
            form = _PHASES
        else:
            self._masked(step, source, bare)
            form = _ROWS
        if step.kind == "fitted" and step.filling is not None:
            self.form[bare] = form
            rows = self._rows(bare)
            self._add(_Fitted(step.filling, step.sampling, grid, step.out_channels, rows, out))
            return _PLAIN, None
        return form, (step.sampling, grid)

    def _masked(self, step: Step, source: Map, out: str) -> None:
        plan = forward_plan(step.sampling, step.geometry, *source.size, source=source.fill or None)
        index, count = plan.index.long(), plan.in_rows
        if source.fill:
            places = _places(source.fill, source.size)
            index = torch.where(index < 0, -1, places[index.clamp_min(0)])
        rows = self._rows(step.source) if source.fill else self._rows_plain(step.source)
        self._add(_Picked(index, count, rows, f"{out}.read"))
        self._add(_Product(step.weight, step.bias, step.groups, f"{out}.read", out))

    def _rows_plain(self, name: str) -> str:
        whole = self._whole(name)
        return self._apply(_rows_of, whole, f"{whole}.rows")

    def _transposed(self, step: Step, size: tuple[int, int], out: str) -> None:
        sampling, geometry = from_spec(step.sampling), step.geometry
        sampled = step.sampling, geometry.grid(*size)
        if isinstance(sampling, Cosets) and geometry.stride == (1, 1):
            self._add(_Transposed(step, sampling, size, self._phases(step.source, sampling, sampled), out))
            return
        rows = self._rows(step.source, sampled)
        order = _order(*sampled)
        if not torch.equal(order, torch.arange(len(order))):
            rows = self._add(_Picked(order.argsort(), len(order), rows, f"{out}.read"))
        self._add(_Spread(step, size, rows, out))

    def _shortcut(
        self, step: Step, shape: Map, form: str, sampled: tuple[str, tuple[int, int]] | None
    ) -> str:
        """What is added, in the form of a step's result."""
        shortcut = step.shortcut
        if shortcut is None:
            raise ValueError(f"step {step.out or step.out2}: no shortcut")
        source = self.maps[shortcut.source]
        if form == _PLAIN:
            whole = self._whole(shortcut.source)
            if shortcut.stride == 1:
                return whole
            return self._apply(partial(_every, stride=shortcut.stride), whole, f"{whole}.{shortcut.stride}")
        if step.kind == "sampled" and sampled is not None:
            # of another sampled map at the same positions
            sampling = from_spec(step.sampling)
            if form == _PHASES and isinstance(sampling, Cosets):
                return self._phases(shortcut.source, sampling, sampled)
            return self._rows(shortcut.source, sampled)
        index = shortcut_rows(source.size, shortcut.stride, source.fill, shape).long()
        index = index[_order(shape.fill, shape.size)]
        if source.fill:
            rows, index = self._rows(shortcut.source), _places(source.fill, source.size)[index]
        else:
            rows = self._rows_plain(shortcut.source)
        count = source.stored[0] * source.stored[1]
        if torch.equal(index, torch.arange(count)):
            return rows
        return self._add(_Picked(index, count, rows, f"{step.out or step.out2}.shortcut"))

    # ------------------------------------------------ what follows them

    def _follow(self, step: Follower) -> None:
        first = self.maps[step.sources[0]]
        self.form[step.out] = _PLAIN
        forms = {self.form[name] for name in step.sources}
        fills = {(self.maps[name].fill, self.maps[name].size) for name in step.sources}
        if step.kind == "mean" and first.fill:
            shares = nearest_shares(first.fill, *first.size)[_order(first.fill, first.size)]
            self._add(_Weighted(shares, step.keepdim, self._rows(step.sources[0]), step.out))
        elif step.kind in ("pointwise", "concat") and len(fills) == 1 and first.fill:
            maps = [
                self._apply(partial(_map_of, size=first.stored), self._rows(name), f"{name}.column")
                for name in step.sources
            ]
            made = self._add(_Applied(step.function, maps, f"{step.out}.column"))
            self._apply(_rows_of, made, step.out)
            self.form[step.out] = _ROWS
        elif step.kind == "pointwise" and forms == {_PHASES} and self._meet(step.sources):
            self._add(_Applied(partial(_each, step.function), step.sources, step.out))
            self.form[step.out], self.sampled[step.out] = _PHASES, self.sampled[step.sources[0]]
        else:
            self._add(_Applied(step.function, [self._whole(name) for name in step.sources], step.out))

    def _meet(self, names: Sequence[str]) -> bool:
        channels = {self.maps[name].channels for name in names}
        return len({self.sampled[name] for name in names}) == 1 == len(channels)


def _every(x: Tensor, stride: int) -> Tensor:
    return x[:, :, ::stride, ::stride]


def _each(function: Callable[..., Tensor], *maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(function(*parts) for parts in zip(*maps, strict=True))
