"""Blocks of a depthwise convolution and 1 x 1 layers, computed at sampled positions and filled at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quincunx.layers.blocks import PairedFill2d
from quincunx.layers.fills import check_fill
from quincunx.layers.padded import sides_of
from quincunx.layers.paired import PairedDown2d
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.methods.fitting.fills import fit_perforated
from quincunx.methods.fitting.moments import POSITIONS
from quincunx.methods.fitting.settings import check_integers
from quincunx.methods.points import Point
from quincunx.ops import fill_nearest
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets
from quincunx.surgery.blocks import is_block
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work

__all__ = ["SpatialBlock"]


@dataclass(frozen=True)
class SpatialBlock:
    r"""Computes a depthwise convolution and the 1 x 1 layers behind it at sampled positions only.

    The block of ConvNeXt (depthwise 7 x 7, norm over channels, 1 x 1, GELU, 1 x 1): everything behind the
    depthwise convolution works position by position, so it needs that convolution's values at a position and
    nothing else. The last 1 x 1 layer's results are filled; layer scale and shortcut follow on the whole map.

    .. math:: z_p = f((W * x)_p) \text{ at sampled } p, \qquad
              z_q = \sum_p a_{q - p} z_p + b \text{ elsewhere}

    Found by rule, in [N, C, H, W] or [N, H, W, C]; see :func:`quincunx.surgery.blocks.find_blocks`. Weights
    stay as they are, but for the last layer's, which is fitted to the block's responses together with the
    fill's coefficients if there is data. Multiply-adds: the sampling's density of all layers, and the fill's.

    Args:
        sampling: cosets, which are the same on every grid.
        fill: "fitted", or "nearest" for copies of the nearest value.
        refits: how often the last layer and the fill are fitted in turn; 0 fits the fill only.
        positions: the most positions of an image that a fit uses.
        seed: of their draw.

    Raises:
        ValueError: a fill other than "fitted" and "nearest", a count outside its range.
        TypeError: ``sampling`` is not cosets.

    Source: Peng et al., arXiv:1809.02601, for the sampling; the block and its fill are our addition.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 32, 1), nn.GELU(),
        ...                     nn.Conv2d(32, 8, 1))
        >>> made = qx.accelerate(net, SpatialBlock(), calibration=[torch.randn(4, 8, 8, 8)]).replaced
        >>> made["3"]["pair"], made["3"]["macs_before"], made["0"]["macs_after"]
        (['0', '3'], 16384, 12544)
    """

    name: ClassVar[str] = "spatialblock"
    saves_bytes: ClassVar[bool] = False
    pairs: ClassVar[bool] = True
    singles: ClassVar[bool] = False

    sampling: Cosets = CHESSBOARD
    _: KW_ONLY
    fill: str = "fitted"
    refits: int = 1
    positions: int = POSITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Cosets):
            raise TypeError(f"sampling={self.sampling!r}: expected cosets such as qx.CHESSBOARD")
        if check_fill(self.fill) == "zero":
            raise ValueError("fill='zero': expected 'fitted' or 'nearest'")
        check_integers(self, refits=0, positions=1, seed=0)

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that it replaces."""
        return (nn.Conv2d, nn.Linear)

    @classmethod
    def candidates(cls) -> tuple[SpatialBlock, ...]:
        """Return the settings that a search tries in each block."""
        return tuple(cls(sampling) for sampling in (QUARTER, CHESSBOARD, THREE_QUARTERS))

    @classmethod
    def sweep(cls) -> list[Point]:
        """Return the settings for its curve of accuracy against speed."""
        return [
            Point("spatial block", text, cls(sampling))
            for sampling, text in ((THREE_QUARTERS, "3/4"), (CHESSBOARD, "2/4"), (QUARTER, "1/4"))
        ]

    def label(self, pair: bool = False) -> str:
        """Return its settings in a few words."""
        return f"{self.name}, density {self.sampling.density:g}, {self.fill}"

    def fits_pair(self, pair: tuple[Layer, ...]) -> bool:
        """Return whether two layers that were found together are the ends of a block."""
        return is_block(pair[0].module, pair[-1].module)

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why a layer is not replaced, or None."""
        pair = next((p for p in context.pairs if layer in p and self.fits_pair(p)), None)
        if pair is None:
            return "no end of a block: a depthwise convolution, and behind it 1 x 1 layers without neighbours"
        if pair[0].output_shape is not None:
            try:
                self.sampling.count(*pair[0].grid)
            except ValueError as error:
                return str(error)
        return None

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Return the work, which fits block by block."""
        taken = {layer.name for layer in layers}
        pairs = [p for p in context.pairs if self.fits_pair(p) and {p[0].name, p[1].name} <= taken]
        return _BlockWork(self, context, {layer.name: pair for pair in pairs for layer in pair})


@dataclass(frozen=True)
class _BlockWork:
    method: SpatialBlock
    context: Context
    pair_of: dict[str, tuple[Layer, Layer]]

    def replace(self, layer: Layer) -> Replacement | str:
        """Return one end of a block."""
        if layer.name not in self.pair_of:
            return "the other end of its block stays"
        first, last = self.pair_of[layer.name]
        made = self._first(layer) if layer is first else self._last(layer, first)
        sampling = self.method.sampling
        record = {"sampling": sampling.spec, "rates": [sampling.density], "pair": [first.name, last.name]}
        return Replacement(made.module, made.spec, record | made.record)

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement]:
        """Change nothing more."""
        return {}

    def _first(self, layer: Layer) -> Replacement:
        conv: Any = layer.module
        settings: dict[str, Any] = {
            "in_channels": conv.in_channels,
            "out_channels": conv.out_channels,
            "kernel_size": list(conv.kernel_size),
            "dilation": list(conv.dilation),
            "groups": conv.groups,
            "bias": conv.bias is not None,
        }
        if sides_of(conv) is not None:
            settings["padding_mode"] = conv.padding_mode
        sampling = self.method.sampling
        module = PairedDown2d(**settings, sampling=sampling).to(conv.weight)
        module.load_state_dict(conv.state_dict())
        record = {}
        if layer.output_shape is not None:
            record["macs_after"] = sampling.count(*layer.grid) * conv.weight.numel()
        return Replacement(module, {"kind": "paired-down", **settings, "sampling": sampling.spec}, record)

    def _last(self, layer: Layer, first: Layer) -> Replacement:
        method, old = self.method, layer.module
        weight, bias = old.get_parameter("weight").detach(), old._parameters["bias"]
        outputs, inputs = weight.shape[:2]
        kernel = weight.view(outputs, inputs, 1, 1)
        module = PairedFill2d(
            inputs,
            outputs,
            sampling=method.sampling,
            partner=first.name,
            channels="last" if isinstance(old, nn.Linear) else "first",
            bias=bias is not None,
            fill=method.fill,
        ).to(kernel)
        with torch.no_grad():
            module.weight.copy_(kernel)
            if bias is not None and module.bias is not None:
                module.bias.copy_(bias)
        record: dict[str, object] = {"fill": method.fill}
        if method.fill == "fitted" and self.context.calibration is not None:
            record |= self._fit(layer, module, kernel, bias)
        if first.output_shape is not None:
            count, fill = method.sampling.count(*first.grid), module.filling
            reads = 0 if fill is None else fill.plan(*first.grid).reads
            record["macs_after"] = count * weight.numel() + reads * outputs
        return Replacement(module, module.spec, record)

    def _fit(self, layer: Layer, module: PairedFill2d, kernel: Tensor, bias: Any) -> dict[str, Any]:
        """Fit the last layer and the fill to the block's responses, in place."""
        method, outputs, inputs = self.method, kernel.shape[0], kernel.shape[1]
        conv = nn.Conv2d(inputs, outputs, 1, bias=bias is not None).to(kernel)
        conv.load_state_dict({"weight": kernel} | ({} if bias is None else {"bias": bias.detach()}))
        whole = PerforatedConv2d(
            inputs, outputs, 1, sampling=method.sampling, bias=bias is not None, fill="fitted"
        ).to(kernel)
        whole.load_state_dict(module.state_dict())
        whole.eval()
        read = _Whole(self.context, layer, module.channels == "last", method.sampling)
        how = {"refits": method.refits, "positions": method.positions, "seed": method.seed}
        record = fit_perforated(whole, conv, read, **how)
        module.load_state_dict(whole.state_dict())
        return record


@dataclass(frozen=True)
class _Whole:
    """Pairs of a block's last input, filled from the sampled map, and its response, as [N, C, H, W]."""

    context: Context
    layer: Layer
    last: bool
    sampling: Cosets

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for y, response in self.context.responses(self.layer):
            y = y.as_subclass(Tensor)
            if self.last:
                y, response = y.permute(0, 3, 1, 2), response.permute(0, 3, 1, 2).contiguous()
            height, width = response.shape[2:]
            yield fill_nearest(y, sampling=self.sampling, size=(height, width)), response
