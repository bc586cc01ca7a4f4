"""ESPACE: low rank fitted on data, then masks, in every convolution (Lin et al. 2017)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from quincunx.layers.fills import check_fill
from quincunx.layers.padded import padded_like
from quincunx.layers.separable import EspaceConv2d, MaskedConv2d, SeparableConv2d
from quincunx.methods.fitting.fills import Held, fit_perforated
from quincunx.methods.fitting.halves import fit_halves
from quincunx.methods.fitting.impact import ESTIMATED, MASKS, Loss, impacts_in, mask_of, without_gradient
from quincunx.methods.fitting.lattices import lattice_of
from quincunx.methods.fitting.separable import separable
from quincunx.methods.fitting.settings import (
    SeparableFit,
    check_integers,
    conv_of,
    conv_settings,
)
from quincunx.methods.points import Point
from quincunx.modules import set_module
from quincunx.sampling import Random
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work

__all__ = ["Espace"]


# the rates that the paper's tables have
RATES = ((2 / 3, "2/3"), (0.5, "1/2"), (0.25, "1/4"), (0.2, "1/5"), (0.125, "1/8"))


# with fitted fills: mask, budget of low rank, rates of both halves, and these in words. Ranks by PCA energies
# lose far less than equal shares. On lattices one fill of half of a map loses less than two of a quarter;
# masks by impact lose much at half and little at three quarters
FITTED: tuple[tuple[str, float, tuple[float, float], str], ...] = (
    ("residual", 2 / 3, (0.75, 0.75), "budget 2/3, rate 3/4"),
    ("residual", 0.5, (0.75, 0.75), "budget 1/2, rate 3/4"),
    ("lattice", 2 / 3, (1.0, 0.5), "budget 2/3, rates 1 and 1/2"),
    ("lattice", 0.5, (1.0, 0.5), "budget 1/2, rates 1 and 1/2"),
    ("lattice", 0.5, (0.5, 0.5), "budget 1/2, rate 1/2"),
)


@dataclass(frozen=True)
class Espace(SeparableFit):
    r"""A convolution as d x 1 then 1 x d of low rank, each computed at masked positions only.

    First every layer, in forward order, is fitted to the original layer's responses on the input that
    the layers fitted before give it (eq. 4). Then, on the network so far, the impact of each position
    of both halves is estimated (eqs. 9 to 11), and the rate's share with the highest impact is
    computed; the other positions take the value of the nearest computed one. Of few samples a fit is held
    near the weights' own, as :class:`LowRank` says. A layer that the loss has no gradient to, or of whose
    positions none has an impact, stays.

    Args:
        rank: K of each channel group: an integer (of a layer of smaller full rank, that one), a share of the
            full rank min(C dh, O dw) in (0, 1], or "full". A mapping of patterns to these gives layers their
            own, the first that matches a name; layers without one stay.
        rate: share of the positions that are computed, in (0, 1], or a pair for the two halves.
        mask: "impact"; "residual", the impact of what a position's neighbours do not say of it, which is what
            a fill leaves; "lattice" (cosets of rate 1, 3/4, 2/3, 1/2, 1/3, 1/4, 1/5 or 1/8; in their fitted
            fills each channel has coefficients of its own); "uniform" (an even grid), "uniform-eq8" (eq. 8 as
            the paper has it) or "random".
        pointwise: whether 1 x 1 convolutions get a mask too (they have no low rank here).
        resize_masks: whether impact masks may be resized to inputs of another size; otherwise such
            inputs are refused.
        loss: for impact masks, of (output, target), summed over images; by default the task's, in
            classification cross-entropy with the targets, or with the network's own predictions where the
            data has none.
        seed: of the positions that a fit draws, and of random masks unless ``mask_seed`` is given.
        data: fit both halves to the layer's responses on the calibration data; False truncates the SVD of
            the weight; None does the first where there is calibration data.
        budget: instead of ``rank``, the share of the layers' dense MACs that all of them together may cost
            before masks; ranks are chosen by PCA energies and rounded to multiples of ``multiple``.
        multiple: of ranks chosen for a budget.
        fill: what stands at the other positions: "nearest" as in the paper, "zero", or "fitted", which is
            fitted like :class:`Perforate`'s: after the masks, in forward order, the first half's fill to that
            half's own responses, the second half on the filled output of the first to the layer's, and then
            both halves in turn to the layer's. Without calibration data it is the mean of the nearest
            computed positions.
        reach, refits: of a fitted fill, as :class:`Perforate` has them.
        iterations: at most so many of the alternating least squares.
        positions: most positions of an image that the fit sums over; of larger maps as many are drawn.

    Raises:
        ValueError: a rate outside (0, 1], an unknown mask or fill; masks that may be resized with a fitted
            fill; what :class:`LowRank` refuses.
        TypeError: a rate or rank that is no number.

    Source: Lin, Ji, Chen, Huang, ESPACE (AAAI 2017).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1))
        >>> result = qx.accelerate(net, Espace(rank=4, rate=(0.5, 0.25), mask="uniform"))
        >>> result.replaced["0"]["rates"]
        [0.5, 0.25]
    """

    name: ClassVar[str] = "espace"
    saves_bytes: ClassVar[bool] = False

    _: KW_ONLY
    rate: float | tuple[float, float] = 0.25
    mask: str = "impact"
    pointwise: bool = False
    resize_masks: bool = False
    loss: Loss | None = None
    mask_seed: int | None = None
    fill: str = "nearest"
    reach: int | None = None
    refits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = self.rate if isinstance(self.rate, tuple) else (self.rate, self.rate)
        if len(pair) != 2:
            raise ValueError(f"rate={self.rate!r}: expected a number in (0, 1] or a pair of them")
        for rate in pair:
            Random(rate)  # refuses what is no rate
        if self.mask not in MASKS:
            raise ValueError(f"mask={self.mask!r}: expected one of {', '.join(MASKS)}")
        if self.mask == "lattice":
            for rate in pair:
                lattice_of(rate)  # refuses what none has
        if self.mask_seed is not None:
            check_integers(self, mask_seed=0)
        check_fill(self.fill)
        check_integers(self, refits=0)
        if self.reach is not None:
            check_integers(self, reach=1)
            if self.fill != "fitted":
                raise ValueError(f"reach={self.reach}: the {self.fill} fill has none")
        if self.fill == "fitted" and self.resize_masks:
            raise ValueError("resize_masks=True: the coefficients of a fitted fill belong to one grid")

    @property
    def after_fits(self) -> tuple[str, ...]:
        """Settings that its fits do not depend on."""
        later = ("rate", "resize_masks", "loss", "mask_seed", "fill", "reach", "refits")
        # impact masks leave a layer that is called twice: on weights alone a budget gives others more
        return later if self.budget is not None and self.data is False else (*later, "mask")

    @property
    def rates(self) -> tuple[float, float]:
        """Of the vertical and of the horizontal half."""
        return self.rate if isinstance(self.rate, tuple) else (self.rate, self.rate)

    @classmethod
    def candidates(cls) -> tuple[Espace, ...]:
        """What a search tries in each layer."""
        # not "residual", which costs less: a network of its masks takes inputs of one size only
        return tuple(
            cls(rank=rank, rate=rate, mask="lattice", fill="fitted")
            for rank, rate in ((1 / 3, (1.0, 0.5)), (0.25, (1.0, 0.5)), (0.25, 0.5))
        )

    @classmethod
    def sweep(cls, mask: str | None = None) -> list[Point]:
        """The settings that draw its curves of accuracy against speed.

        Args:
            mask: of the paper's curve, half of the rank at the paper's rates with the nearest fill; None for
                the one with impact masks and for those of fitted fills.
        """
        points = [
            Point(
                f"espace, {mask or 'impact'}", f"rate {text}", cls(rank=0.5, rate=rate, mask=mask or "impact")
            )
            for rate, text in RATES
        ]
        if mask is not None:
            return points
        return points + [
            Point(
                f"espace, {kind}, fitted",
                text,
                cls(budget=budget, rate=rates, mask=kind, fill="fitted"),
            )
            for kind, budget, rates, text in FITTED
        ]

    def label(self, pair: bool = False) -> str:
        """Its settings in a few words."""
        share = f"rank {_short(self.rank)}" if self.budget is None else f"budget {_short(self.budget)}"
        words = [self.name, share, f"rate {_short(self.rate)}", self.mask]
        return ", ".join(words if self.fill == "nearest" else [*words, f"{self.fill} fill"])

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Why a layer stays."""
        impact = self.mask in ESTIMATED
        if conv_of(layer).kernel_size != (1, 1):
            reason = self.separable_refusal(layer, self.with_data(context))
        elif self.pointwise:
            reason = None
        else:
            reason = "1 x 1: no low rank here; pointwise=True masks it"
        if reason is None and impact and layer.calls is not None and layer.calls > 1:
            return f"called {layer.calls} times in a forward: its positions have no one impact"
        return reason or self._no_positions(layer)

    def _no_positions(self, layer: Layer) -> str | None:
        """Why masks made by a rule cannot be laid on a layer's grids, where these are known."""
        if layer.output_shape is None:
            if self.fill == "fitted" and self.mask not in (*ESTIMATED, "lattice"):
                return "its grid, which coefficients belong to, is not known; give an example input"
            return None
        if self.mask in ESTIMATED:
            return None
        grids = [layer.grid]
        if conv_of(layer).kernel_size != (1, 1):
            grids.insert(0, (layer.grid[0], layer.input_size[1]))
        try:
            for rate, grid in zip(self.rates, grids, strict=False):
                mask_of(self.mask, rate, seed=0, place="").count(*grid)
        except ValueError as error:
            return str(error)
        return None

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Choose all ranks; the fits follow, then the masks.

        Raises:
            ValueError: impact masks without calibration data.
        """
        if self.mask in ESTIMATED and context.calibration is None:
            raise ValueError(
                f"calibration=None: {self.mask} masks are estimated on data; give input batches, or choose "
                "mask='uniform' or mask='random'"
            )
        with_data = self.with_data(context)
        # what the loss says no gradient of is known, and labels are looked at, before any fit is spent
        unmasked = self._without_impact(layers, context) if self.mask in ESTIMATED and layers else set()
        by_name = {layer.name: layer for layer in layers}
        layers = [layer for layer in layers if layer.name not in unmasked]
        wide = [layer for layer in layers if conv_of(layer).kernel_size != (1, 1)]
        ranks = self.ranks(wide, context, with_data) if wide else {}
        return _EspaceWork(self, context, by_name, ranks, with_data, unmasked)

    def _without_impact(self, layers: Sequence[Layer], context: Context) -> set[str]:
        """Names of the layers that the loss has no gradient to in the network as it was."""
        modules = {layer.name: context.original.get_submodule(layer.name) for layer in layers}

        def find() -> set[str]:
            return without_gradient(
                context.original, modules, context.data.first(), self.loss or context.loss
            )

        # not "while no layer is changed": it is the original that is asked
        return context.once(("without gradient", self.loss or context.loss, tuple(modules)), find)


@dataclass(frozen=True)
class _EspaceWork:
    method: Espace
    context: Context
    # all of them: a layer that a journal recalls is not asked to be replaced
    layers: Mapping[str, Layer]
    ranks: dict[str, int]
    with_data: bool
    unmasked: set[str]

    def replace(self, layer: Layer) -> Replacement | str:
        """The layer of low rank, or of 1 x 1, without masks yet; or why it stays."""
        if layer.name in self.unmasked:
            return (
                "the loss has no gradient to it, so its positions have no impact; mask='uniform' needs none"
            )
        conv = conv_of(layer)
        if layer.name not in self.ranks:
            same = copy.deepcopy(conv)
            return Replacement(same, {"kind": "conv", **conv_settings(conv)}, {})
        rank = self.ranks[layer.name]
        if (reason := self.method.no_saving(layer, rank, self.method.rates)) is not None:
            return reason
        found, record = self.method.fitted(layer, rank, self.context, self.with_data)
        module = separable(conv, found)
        return Replacement(module, module.spec, record)

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement | str]:
        """Masks for every layer, estimated on the network of low rank; or why a layer can have none."""
        found: dict[str, Tensor] = {}
        if self.method.mask in ESTIMATED and done:
            places = {place: half for name in done for place, half in _halves(name, done[name].module)}
            residual = self.method.mask == "residual"
            found = impacts_in(self.context, places, self.method.loss, residual=residual)
        made: dict[str, Replacement | str] = {}
        for name, replacement in done.items():
            seen = [found[place] for place, _ in _halves(name, replacement.module) if place in found]
            if all(bool(impact.any()) for impact in seen):
                made[name] = self._masked(name, replacement, found)
            else:
                made[name] = (
                    "the impact of all its positions is 0 on this data, so none can be preferred; "
                    "mask='uniform' needs no impacts"
                )
        return made

    def _masked(self, name: str, made: Replacement, found: dict[str, Tensor]) -> Replacement:
        method, dense, layer = self.method, made.module, self.layers[name]
        seed = method.seed if method.mask_seed is None else method.mask_seed
        masks = {
            place: mask_of(method.mask, rate, seed=seed, place=place, impact=found.get(place))
            for (place, _), rate in zip(_halves(name, dense), method.rates, strict=False)
        }
        samplings = tuple(masks.values())
        settings = {key: value for key, value in _dense_spec(made).items() if key != "kind"}
        settings |= {"resize_masks": method.resize_masks, "fill": method.fill}
        if method.fill == "fitted":
            settings["fill_reach"] = method.reach
        grid = None if layer.output_shape is None else layer.grid
        module: EspaceConv2d | MaskedConv2d
        if isinstance(dense, SeparableConv2d):
            if method.fill == "fitted" and grid is not None:
                # a half of which nothing is skipped needs no fill, and the second reads it as it is
                settings["fill"] = ["nearest" if mask.density == 1 else "fitted" for mask in samplings]
                if "fitted" in settings["fill"]:
                    settings["fill_sizes"] = (grid[0], layer.input_size[1]), grid
                else:
                    del settings["fill_reach"]
            module = EspaceConv2d(**settings, masks=(samplings[0], samplings[1]))
        else:
            if method.fill == "fitted":
                settings["fill_size"] = grid
            module = MaskedConv2d(**settings, sampling=samplings[0])
        module.to(next(dense.parameters()))
        module.load_state_dict(dense.state_dict(), strict=method.fill != "fitted")
        record = {**made.record, "mask": method.mask, "rates": [mask.density for mask in samplings]}
        if method.fill != "nearest":
            record["fill"] = method.fill
        if method.fill == "fitted" and self.context.calibration is not None:
            record |= self._fit_fills(layer, dense, module)
        maps = {f"impact{i}": found[place] for i, place in enumerate(masks, 1) if place in found}
        return Replacement(module, module.spec, record, maps)

    def _fit_fills(
        self, layer: Layer, dense: nn.Module, module: EspaceConv2d | MaskedConv2d
    ) -> dict[str, Any]:
        """Fit the fills, and kernels with them, and put the layer where those behind it read it."""
        pairs = Held(self.context.responses(layer, padded=True))
        how: dict[str, Any] = {
            "refits": self.method.refits,
            "positions": self.method.positions,
            "seed": self.method.seed,
        }
        module.eval()
        if isinstance(module, EspaceConv2d) and isinstance(dense, SeparableConv2d):
            if module.vertical.filling is None and module.horizontal.filling is None:
                return {}  # nothing is skipped
            found = fit_halves(module, dense, pairs, **how)
        elif isinstance(module, MaskedConv2d) and isinstance(dense, nn.Conv2d):
            found = fit_perforated(module, dense, pairs, **how)
        else:
            raise TypeError(
                f"layer {layer.name!r}: expected a separable convolution, got {type(dense).__name__}"
            )
        for name in layer.names:
            self.context.network = set_module(self.context.network, name, padded_like(layer.module, module))
        return found


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _dense_spec(made: Replacement) -> dict[str, Any]:
    """What builds a layer of low rank, or of 1 x 1, before it gets masks."""
    return made.module.spec if isinstance(made.module, SeparableConv2d) else made.spec


def _halves(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions of a replacement that get a mask each, with names of their own."""
    if isinstance(module, SeparableConv2d):
        return [(f"{name}/1", module.vertical), (f"{name}/2", module.horizontal)]
    return [(f"{name}/1", module)]
