"""Perforation: convolutions of full rank at some positions, the others filled (Figurnov et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import nn

from quincunx.layers.fills import check_fill
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.methods.fitting.fills import fit_perforated
from quincunx.methods.fitting.lattices import LATTICES
from quincunx.methods.fitting.moments import POSITIONS
from quincunx.methods.fitting.settings import check_integers, conv_of, conv_settings
from quincunx.methods.points import Point
from quincunx.sampling import CHESSBOARD, Cosets, Positions, Sampling
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work, each
from quincunx.surgery.pairs import find_pointwise

__all__ = ["Perforate"]

# what a search tries; the other lattices have rates of the ESPACE paper
SAMPLINGS: tuple[tuple[Sampling, str], ...] = tuple(
    (LATTICES[text], text) for text in ("3/4", "2/4", "1/3", "1/4")
)


@dataclass(frozen=True)
class Perforate:
    r"""A convolution computed at the positions of a sampling; the others are filled from them.

    .. math:: y_p = \begin{cases} (W * x)_p + \beta & p \text{ computed} \\
              b_{r(p)} + \sum_t w_{r(p),t}\, y_{k_t(p)} & \text{otherwise} \end{cases}

    Convolutions of any kernel, stride and groups, depthwise and 1 x 1 among them. MACs: those of the
    convolution at the computed positions, and with a fitted fill one for each tap, channel and skipped
    position. Parameters: a fitted fill adds its coefficients.

    A layer whose result only a 1 x 1 convolution reads, perforated by the same method, keeps its kernel and
    has no fitted fill, since nothing is read between its computed positions: the depthwise and the projecting
    convolution of an inverted residual are computed at the sampled positions, exactly, and the projection's
    fill makes the map whole.

    Layers are fitted in forward order, each to the original layer's responses on the input that the layers
    before, already perforated, give it: first the fill, by least squares; then the kernel at the computed
    positions, and kernel and fill in turn. No stage raises the error on the calibration data, and the fitted
    error is never above that of the nearest fill.

    Args:
        sampling: which positions of the output's grid are computed.
        fill: "fitted"; or "nearest" (the value of the nearest computed position) or "zero", which need no
            data. Without calibration data a fitted fill is the mean of the nearest computed positions.
        reach: of a fitted fill: for cosets rows and columns of its window to each side, else how many
            computed positions it reads. By default 1 (3 x 3) and 4.
        refits: how often kernel and fill are fitted in turn; 0 leaves the kernel as it is.
        pointwise: whether 1 x 1 convolutions are perforated too.
        positions: most positions of an image that moments of the kernel's inputs are summed over.
        seed: of the draw of these.

    Raises:
        ValueError: an unknown fill, a count outside its range, a reach for another fill than the fitted one.
        TypeError: ``sampling`` is not one.

    Source: nearest fill: Figurnov et al., PerforatedCNNs (NIPS 2016); fills that are trained, with a fixed
        kernel: Xie et al., Spatially Adaptive Inference (ECCV 2020). The fit is this library's.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1))
        >>> result = qx.accelerate(net, Perforate(), calibration=[torch.randn(8, 8, 12, 12)])
        >>> record = result.replaced["0"]
        >>> record["response_error"] <= record["nearest_error"]
        True
    """

    name: ClassVar[str] = "perforate"
    saves_bytes: ClassVar[bool] = False

    sampling: Sampling = CHESSBOARD
    _: KW_ONLY
    fill: str = "fitted"
    reach: int | None = None
    refits: int = 1
    pointwise: bool = True
    positions: int = POSITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling={self.sampling!r}: expected a sampling such as qx.CHESSBOARD")
        check_fill(self.fill)
        check_integers(self, refits=0, positions=1, seed=0)
        if self.reach is not None:
            check_integers(self, reach=1)
            if self.fill != "fitted":
                raise ValueError(f"reach={self.reach}: the {self.fill} fill has none")

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Convolutions."""
        return (nn.Conv2d,)

    @classmethod
    def candidates(cls) -> tuple[Perforate, ...]:
        """What a search tries in each layer."""
        return tuple(cls(sampling) for sampling, _ in SAMPLINGS)

    @classmethod
    def sweep(cls, fill: str = "fitted") -> list[Point]:
        """The settings that draw its curve of accuracy against speed, with one fill."""
        return [
            Point(f"perforate, {fill}", f"rate {text}", cls(sampling, fill=fill))
            for sampling, text in SAMPLINGS
        ]

    def label(self, pair: bool = False) -> str:
        """Its settings in a few words."""
        named = dict(SAMPLINGS)
        return ", ".join([self.name, named.get(self.sampling, repr(self.sampling)), self.fill])

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Why a layer stays."""
        conv = conv_of(layer)
        if conv.kernel_size == (1, 1) and not self.pointwise:
            return "1 x 1: pointwise=True perforates it"
        if self._fits(context) and layer.calls is not None and layer.calls > 1:
            return f"called {layer.calls} times in a forward: there are no one responses to fit it to"
        if layer.output_shape is None:
            if self.fill == "fitted" and not isinstance(self.sampling, (Cosets, Positions)):
                return "its grid, which coefficients belong to, is not known; give an example input"
            return None
        try:
            computed = self.sampling.count(*layer.grid)
        except ValueError as error:
            return str(error)
        height, width = layer.grid
        if computed == height * width:
            return f"all {computed} positions of its {height} x {width} grid would be computed"
        return self._no_saving(layer, computed)

    def _fits(self, context: Context) -> bool:
        return self.fill == "fitted" and context.calibration is not None

    def _no_saving(self, layer: Layer, computed: int) -> str | None:
        """Why perforation would multiply no less; None if it does."""
        if self.fill != "fitted":
            return None
        conv, (height, width) = conv_of(layer), layer.grid
        reads = self._layer(layer).filling.plan(height, width).reads  # type: ignore[union-attr]
        unit = conv.weight[0].numel()
        after, before = computed * unit + reads, height * width * unit
        if after < before:
            return None
        return f"with its fill it takes {after / before:.2f} times as many multiply-adds"

    def _layer(self, layer: Layer, fill: str | None = None) -> PerforatedConv2d:
        """The layer with the convolution's weights, not fitted yet."""
        conv, fill = conv_of(layer), fill or self.fill
        size = None
        if fill == "fitted" and not isinstance(self.sampling, (Cosets, Positions)):
            size = layer.grid
        made = PerforatedConv2d(
            **conv_settings(conv),
            sampling=self.sampling,
            fill=fill,
            fill_reach=self.reach if fill == "fitted" else None,
            fill_size=size,
        )
        made.to(conv.weight)
        made.load_state_dict(conv.state_dict(), strict=False)
        return made

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Fit layer by layer."""
        by_name = {name: layer for layer in layers for name in layer.names if layer.calls in (1, None)}
        unread = {}
        if self.fill == "fitted" and len(layers) > 1:
            followers = find_pointwise(context.original).items()
            unread = {by_name[a].name: b for a, b in followers if {a, b} <= set(by_name)}

        def replace(layer: Layer) -> Replacement:
            if layer.name in unread:
                module = self._layer(layer, "nearest")
                record: dict[str, object] = {
                    "fill": "nearest",
                    "rate": self.sampling.density,
                    "read_by": unread[layer.name],
                }
                return Replacement(module, module.spec, record)
            module = self._layer(layer)
            record = {"fill": self.fill, "rate": self.sampling.density}
            if module.filling is not None:
                record["reach"] = module.filling.reach
            if self._fits(context):
                record |= fit_perforated(
                    module,
                    conv_of(layer),
                    context.responses(layer, padded=True),
                    refits=self.refits,
                    positions=self.positions,
                    seed=self.seed,
                )
            return Replacement(module, module.spec, record)

        return each(replace)
