"""What a program consists of: convolutions with their epilogues, and what may stand between them.

A map that was filled from its nearest computed positions is known here by those positions alone: it is
stored in compact form and whoever can reads it so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.fusion.effects import added_to
from quincunx.fusion.epilogues import Activation, apply
from quincunx.layers.sampled import window_means
from quincunx.layers.separable import mask_at_size
from quincunx.ops import native
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import (
    Plan,
    adjoint_plan,
    forward_plan,
    nearest_index,
    nearest_shares,
    position_index,
    window_plan,
)
from quincunx.sampling import from_spec

__all__ = [
    "Filling",
    "Follower",
    "Map",
    "Shortcut",
    "Step",
    "fill_maps",
    "follow",
    "followed",
    "keeps_compact",
    "output",
    "parted",
    "pool",
    "pool_window",
    "reference",
    "settled",
    "shape_key",
    "shortcut_rows",
    "tables",
]


@dataclass(frozen=True)
class Shortcut:
    """What is added to a step's output.

    Attributes:
        source: name of another map.
        stride: every so many-th position of it is read, in both directions.
        padded: zero channels behind its own.
        into: which of the two was changed in place by the addition, "out" or "other"; empty for neither.
    """

    source: str
    stride: int = 1
    padded: int = 0
    into: str = ""

    def of(self, other: Tensor) -> Tensor:
        """What is added, made of the other map."""
        if self.stride > 1:
            other = other[:, :, :: self.stride, :: self.stride]
        return F.pad(other, (0, 0, 0, 0, 0, self.padded)) if self.padded else other

    def add(self, out: Tensor, other: Tensor) -> Tensor:
        """The sum as torch makes it, for shapes of any kind."""
        other = self.of(other)
        if self.into:
            return added_to(out, other) if self.into == "out" else added_to(other, out)
        return out + other

    def meets(self, other: Map, out: Map) -> bool:
        """Whether what is added has the shape of a step's output: what a convolution can take along."""
        size = tuple(-(-n // self.stride) for n in other.size)
        return size == out.size and other.channels + self.padded == out.channels


@dataclass(frozen=True, eq=False)
class Filling:
    """What stands at skipped positions, as :func:`quincunx.fill_fitted` has it.

    Attributes:
        weight: [R, T, C]; without taps zeros stand there.
        bias: float32 [R, C] or None.
        reach: how far it reads.
    """

    weight: Tensor
    bias: Tensor | None
    reach: int

    @classmethod
    def of(cls, layer: Any) -> Filling:
        """Return what stands at the positions that a perforated convolution skips."""
        if layer.filling is None:
            return cls(layer.weight.new_empty((0, 0, layer.out_channels)), None, 0)
        weight, bias = (t.detach() for t in layer.filling.coefficients())
        # of a tap that a class has not any number may be there
        present = layer.filling.present[:, :, None].to(weight.device)
        return cls(weight.where(present, 0).contiguous(), bias.float().contiguous(), layer.filling.reach)

    def scaled(self, scale: Tensor, shift: Tensor) -> Filling:
        """For a sampled map that is scaled and shifted, such as the filled map is to be.

        s (sum w y + b) + t = sum w (s y + t) + s b + t (1 - sum w).
        """
        total = self.weight.double().sum(1)
        bias = total.new_zeros(()) if self.bias is None else self.bias.double() * scale
        return replace(self, bias=(bias + shift * (1 - total)).float())


@dataclass(frozen=True, eq=False)
class Step:
    """One convolution and its epilogue, or the means that a convolution reads.

    out = act(conv(source) + bias + shortcut), out2 = act2(out scale2 + shift2).

    Attributes:
        kind: "dense", "sampled" (to a sampled map), "filled" (sampled, read by others as if filled
            from the nearest computed position), "fitted" (sampled, and made whole by ``filling``),
            "transposed" (from a sampled map) or "mean" (of the window
            that begins at each computed position, over what lies inside the map; filled likewise).
        weight: [O, C / groups, kh, kw]; of "transposed" [C, O / groups, kh, kw]; of "mean"
            empty, [C, 0, kh, kw].
        activation: one of :class:`quincunx.fusion.epilogues.Activation`.
        slope: of a leaky ReLU, for each channel, float32.
        activation2: of the second output, NONE or RELU.
        like: of "transposed", the map whose height and width the output has.
        like_behind: the convolution of that map whose grid the output has instead, if there is one.
        out, out2: names of the outputs, None for one that nobody reads.
        resize_masks: whether explicit positions may be used on another grid than their own; None where
            the convolution has no such setting.
        filling: of "fitted".
        same: whether the padding is that of :meth:`Geometry.as_large` for the size of the map.
        layer: path of the module that it was made of; empty for none.
    """

    kind: str
    source: str
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    groups: int
    sampling: str = ""
    like: str | None = None
    like_behind: Geometry | None = None
    shortcut: Shortcut | None = None
    activation: int = Activation.NONE
    slope: Tensor | None = None
    out: str | None = None
    out2: str | None = None
    scale2: Tensor | None = None
    shift2: Tensor | None = None
    activation2: int = Activation.RELU
    resize_masks: bool | None = None
    filling: Filling | None = None
    same: bool = False
    layer: str = ""

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.kind == "transposed" else self.weight.shape[0]

    def to(self, dtype: torch.dtype | None) -> Step:
        """The step that computes in another type; None leaves it as it is. Bias and scales stay float32."""
        return self if dtype in (None, self.weight.dtype) else replace(self, weight=self.weight.to(dtype))

    def laid_out(self) -> Step:
        """The step with its weight as torch's convolution of maps in channels_last reads it."""
        if self.kind != "dense":
            return self
        return replace(self, weight=self.weight.contiguous(memory_format=torch.channels_last))

    @property
    def fills(self) -> bool:
        """Whether what it computes stands for the positions nearest to it, too."""
        return self.kind in ("filled", "mean")

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


_ONE = Geometry((1, 1))


@dataclass(frozen=True, eq=False)
class Follower:
    """Something else than a convolution that reads maps in compact form.

    Attributes:
        kind: "pointwise" (each position by itself), "concat" (of channels), "maxpool", "mean" (over all
            positions) or "sum" (of a step and a shortcut of another shape).
        sources: names of the maps it reads.
        function: torch's form of it, of whole maps.
        out: name of the result.
        window: of "maxpool", where its windows lie.
        ceil: of "maxpool", whether a window may begin inside the map and end outside.
        keepdim: of "mean", whether the result is [N, C, 1, 1].
        shortcut: of "sum", what is added.
    """

    kind: str
    sources: tuple[str, ...]
    function: Callable[..., Tensor]
    out: str
    window: Geometry = _ONE
    ceil: bool = False
    keepdim: bool = False
    shortcut: Shortcut | None = None

    @property
    def reads(self) -> list[str]:
        return list(self.sources)

    @property
    def needs(self) -> list[str]:
        return self.reads

    @property
    def writes(self) -> list[str]:
        return [self.out]


@dataclass(frozen=True)
class Map:
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


# ---------------------------------------------------------------- convolutions


def settled(step: Step, maps: dict[str, Map]) -> Step:
    """A step with the padding of its map's size and the mask that its convolution has on this grid.

    Raises:
        ValueError: explicit positions belong to another grid and may not be resized.
    """
    if step.same:
        step = replace(step, geometry=step.geometry.as_large(*maps[step.source].size))
    if step.resize_masks is None:
        return step
    grid = step.geometry.grid(*maps[step.source].size)
    return replace(step, sampling=mask_at_size(from_spec(step.sampling), grid, step.resize_masks).spec)


def shape_key(step: Step, maps: dict[str, Map], batch: int) -> tuple[Any, ...]:
    """What the time of a dense step depends on, besides where it runs."""
    shortcut = maps[step.shortcut.source] if step.shortcut else None
    return (
        batch,
        step.weight.dtype,
        tuple(step.weight.shape),
        step.geometry,
        step.groups,
        maps[step.source],
        shortcut,
        int(step.activation),
        step.out is None,
        step.out2 is None,
    )


def keeps_compact(step: Step, source: str, shortcut: str) -> bool:
    """Whether a dense step computes the same at positions that share a value.

    Args:
        source, shortcut: the fills of the maps it reads.
    """
    alone = replace(step.geometry, dilation=(1, 1)) == _ONE
    added = step.shortcut is None or (step.shortcut.stride == 1 and shortcut == source)
    return step.kind == "dense" and source != "" and alone and added


def _compact(step: Step, maps: dict[str, Map]) -> str:
    """The fill of a dense step's output."""
    source = maps[step.source]
    shortcut = maps[step.shortcut.source] if step.shortcut else source
    return source.fill if keeps_compact(step, source.fill, shortcut.fill) else ""


def output(step: Step, maps: dict[str, Map]) -> Map:
    """The shape of what a step writes, in compact form where it can be."""
    if step.like is not None:
        size = maps[step.like].size
        return Map(step.out_channels, size if step.like_behind is None else step.like_behind.grid(*size))
    grid = step.geometry.grid(*maps[step.source].size)
    if step.kind == "sampled":
        return Map(step.out_channels, (_count(step.sampling, grid), 1))
    fill = step.sampling if step.fills else _compact(step, maps)
    return Map(step.out_channels, grid, fill)


def tables(step: Step, maps: dict[str, Map]) -> Plan:
    """The gather tables of a step between maps as they are stored."""
    source = maps[step.source]
    if step.kind == "transposed":
        return adjoint_plan(step.sampling, step.geometry, *output(step, maps).size)
    if _compact(step, maps):
        return forward_plan("", step.geometry, *source.stored)
    return forward_plan(step.sampling, step.geometry, *source.size, source=source.fill or None)


@lru_cache(maxsize=1024)
def shortcut_rows(size: tuple[int, int], stride: int, fill: str, out: Map) -> Tensor:
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


def reference(step: Step, values: dict[str, Tensor], maps: dict[str, Map]) -> None:
    """A step by torch's operators and those of the contract; adds its outputs to ``values``."""
    geometry, x = step.geometry, values[step.source]
    bias = None if step.bias is None else step.bias.to(step.weight.dtype)
    where = (geometry.stride, geometry.padding, geometry.dilation, step.groups)
    if step.kind == "transposed":
        size = output(step, maps).size
        out = torch.ops.quincunx.conv_transpose(x, step.weight, bias, size, step.sampling, *where)
    elif step.kind == "mean":
        computed = position_index(step.sampling, *x.shape[2:])
        means = window_means(x, step.geometry.kernel[0]).flatten(2)[:, :, computed, None]
        out = torch.ops.quincunx.fill(means, step.sampling, x.shape[2:])
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
        if step.filling is not None:
            out = _made_whole(step, step.filling, out, geometry.grid(*x.shape[2:]))
    if step.shortcut is not None:
        out = step.shortcut.add(out, values[step.shortcut.source])
    # what a sum in place returns may be the other map
    out = apply(step.activation, out, step.slope, own=step.shortcut is None)
    if step.out is not None:
        values[step.out] = out
    if step.out2 is not None:
        values[step.out2] = _second(step, out)


def _made_whole(step: Step, filling: Filling, y: Tensor, size: tuple[int, int]) -> Tensor:
    weight, bias = filling.weight.to(y.dtype), None if filling.bias is None else filling.bias.to(y.dtype)
    whole: Tensor = torch.ops.quincunx.fill_fitted(y, weight, bias, step.sampling, size, filling.reach)
    return whole


def _second(step: Step, out: Tensor) -> Tensor:
    found = (t for t in (step.scale2, step.shift2) if t is not None)
    scale, shift = (t.to(out.dtype).view(-1, 1, 1) for t in found)
    return apply(step.activation2, out * scale + shift)


def parted(step: Step, shortcut: Shortcut) -> list[Step | Follower]:
    """A step without its shortcut, and the addition and what rides on it as calls of their own."""
    bare = f"{step.out or step.out2}.bare"
    total = step.out or f"{step.out2}.total"

    def add(out: Tensor, other: Tensor) -> Tensor:
        return apply(step.activation, shortcut.add(out, other), step.slope)

    bare_settings: dict[str, Any] = {"activation": Activation.NONE, "slope": None, "out2": None}
    first = replace(step, shortcut=None, out=bare, scale2=None, shift2=None, **bare_settings)
    parts: list[Step | Follower] = [
        first,
        Follower("sum", (bare, shortcut.source), add, total, shortcut=shortcut),
    ]
    if step.out2 is not None:
        parts.append(Follower("pointwise", (total,), partial(_second, step), step.out2))
    return parts


# ---------------------------------------------------------------- what follows them


def _shared(found: Sequence[Map]) -> str:
    """The fill that maps on one grid share; empty where their values stand at different positions."""
    same = len({(shape.size, shape.fill) for shape in found}) == 1
    return found[0].fill if same else ""


def followed(step: Follower, maps: dict[str, Map]) -> Map:
    """The shape of what a follower writes, in compact form where it can be."""
    found = [maps[name] for name in step.sources]
    channels = [shape.channels for shape in found]
    size = max(shape.size[0] for shape in found), max(shape.size[1] for shape in found)
    if step.kind == "mean":
        return Map(channels[0], (1, 1))
    if step.kind == "maxpool":
        grid = pool_window(step, size).grid(*size)
        if min(grid) < 1:
            step.function(torch.empty(1, channels[0], *size))  # torch says what does not fit
        return Map(channels[0], grid)
    if step.shortcut is not None:
        out, other = found
        stride, padded = step.shortcut.stride, step.shortcut.padded
        height, width = (max(a, -(-b // stride)) for a, b in zip(out.size, other.size, strict=True))
        return Map(max(out.channels, other.channels + padded), (height, width))
    return Map(sum(channels) if step.kind == "concat" else max(channels), size, _shared(found))


def pool_window(step: Follower, size: tuple[int, int]) -> Geometry:
    """Where the windows of a pooling lie on a map of this size."""
    return step.window.rounded_up(*size) if step.ceil else step.window


def follow(step: Follower, maps: dict[str, Map], values: dict[str, Tensor]) -> None:
    """Run a follower, on compact maps where the result is the same; adds its output to ``values``."""
    first = maps[step.sources[0]]
    if step.kind == "maxpool" and first.fill:
        pool(step, maps, values)
    elif step.kind == "mean" and first.fill:
        values[step.out] = _mean(values[step.sources[0]], first, step.keepdim)
    else:
        local = {name: values[name] for name in step.sources}
        if step.kind == "sum" or not _shared([maps[name] for name in step.sources]):
            fill_maps([(name, maps[name]) for name in local], local)
        values[step.out] = step.function(*(local[name] for name in step.sources))


def pool(step: Follower, maps: dict[str, Map], values: dict[str, Tensor]) -> None:
    """Run a max pooling by the native kernel, of a compact map or a whole one; adds its output."""
    first = maps[step.sources[0]]
    plan = window_plan(first.fill, pool_window(step, first.size), *first.size)
    values[step.out] = native.window_max(values[step.sources[0]], plan)


def _mean(y: Tensor, shape: Map, keepdim: bool) -> Tensor:
    """The mean of a filled map: each computed value as often as it stands."""
    shares = nearest_shares(shape.fill, *shape.size)
    return (y.float() * shares.view(-1, 1)).sum((2, 3), keepdim=keepdim).to(y.dtype)


def fill_maps(found: Sequence[tuple[str, Map]], values: dict[str, Tensor]) -> None:
    """Make what is stored in compact form whole."""
    for name, shape in found:
        if shape.fill:
            values[name] = torch.ops.quincunx.fill(values[name], shape.fill, shape.size)
