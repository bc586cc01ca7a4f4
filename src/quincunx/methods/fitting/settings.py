"""Settings that methods with separable convolutions share: eligible layers and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from quincunx.layers.padded import sides_of, without_padding
from quincunx.methods.fitting.moments import (
    POSITIONS,
    Accumulator,
    Moments,
    completed,
    few_images,
    moments,
    of_noise,
)
from quincunx.methods.fitting.rank_budget import candidate, check_budget, select_ranks
from quincunx.methods.fitting.separable import Fit, fit_separable, full_rank, kernel_energies, samples_needed
from quincunx.surgery.calibration import Context, Layer

__all__ = [
    "LayerRanks",
    "SeparableFit",
    "check_integers",
    "check_rank_names",
    "conv_of",
    "conv_settings",
    "plain_ranks",
    "rank_of",
]


def check_integers(settings: object, **least: int) -> None:
    """Check that attributes of an object are integers and not too small.

    Raises:
        ValueError: names the attribute, its value and its minimum.
    """
    for name, smallest in least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {smallest}")


def conv_of(layer: Layer) -> nn.Conv2d:
    """Return the layer's module, which must be a convolution.

    One that pads by other values than zeros is returned without padding, as the layer that surgery shows:
    its inputs are padded, and its replacement gets the padding in front.
    """
    if not isinstance(layer.module, nn.Conv2d):
        raise TypeError(f"layer {layer.name!r}: expected a Conv2d, got {type(layer.module).__name__}")
    return layer.module if sides_of(layer.module) is None else without_padding(layer.module)


def conv_settings(conv: nn.Conv2d) -> dict[str, Any]:
    """Return the settings that build an equal convolution, JSON-ready."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": list(conv.kernel_size),
        "stride": list(conv.stride),
        "padding": conv.padding if isinstance(conv.padding, str) else list(conv.padding),
        "dilation": list(conv.dilation),
        "groups": conv.groups,
        "bias": conv.bias is not None,
    }


Rank = int | float | str
# for all layers, or for those whose names match a pattern
LayerRanks = Rank | Mapping[str, Rank] | tuple[tuple[str, Rank], ...]


def rank_of(rank: LayerRanks, full: int, name: str) -> int:
    """Return the rank of a layer with this full rank.

    Raises:
        ValueError: a rank outside its range; no rank for a layer of this name.
        TypeError: a rank of another type.

    Example:
        >>> rank_of({"conv2": 71, "*": 0.25}, 240, "conv2"), rank_of({"conv2": 71, "*": 0.25}, 240, "conv3")
        (71, 60)
    """
    given = rank_given(rank, name)
    if given is None:
        raise ValueError(f"rank={rank!r}: none for layer {name!r}")
    if given == "full":
        return full
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"rank={given!r}: expected an integer, a share in (0, 1] or 'full'")
    if isinstance(given, int):
        if given < 1:
            raise ValueError(f"rank={given}: expected at least 1")
        return min(given, full)
    if not 0 < given <= 1:
        raise ValueError(f"rank={given}: expected a share in (0, 1], or an integer")
    return max(1, round(given * full))


def rank_given(rank: LayerRanks, name: str) -> Rank | None:
    """Return the rank of the first pattern that a name matches, as the user gave it; None without a match."""
    return next((value for pattern, value in _pairs(rank) if fnmatchcase(name, pattern)), None)


def plain_ranks(rank: LayerRanks) -> LayerRanks:
    """Return the same with pairs instead of a mapping, so that it can be hashed; refuse invalid ranks."""
    pairs = _pairs(rank)
    for _, value in pairs:
        rank_of(value, 10**9, "")
    return pairs if isinstance(rank, Mapping) else rank


def _pairs(rank: LayerRanks) -> tuple[tuple[str, Rank], ...]:
    """Return the patterns and their ranks; a single rank applies to all."""
    if isinstance(rank, Mapping):
        return tuple(rank.items())
    return rank if isinstance(rank, tuple) else (("*", rank),)


def check_rank_names(rank: LayerRanks, layers: Sequence[Layer]) -> None:
    """Refuse a pattern that matches no layer's name.

    Raises:
        ValueError: names the pattern and some layers.
    """
    for pattern, _ in _pairs(rank):
        if not any(fnmatchcase(layer.name, pattern) for layer in layers):
            some = ", ".join(layer.name for layer in layers[:10])
            raise ValueError(f"rank={pattern!r}: no layer that gets one has such a name; there are {some}")


@dataclass(frozen=True)
class SeparableFit:
    """The settings of a fit by separable convolutions; :class:`quincunx.LowRank` documents them."""

    rank: LayerRanks = 0.25
    _: KW_ONLY
    data: bool | None = None
    budget: float | None = None
    multiple: int = 16
    iterations: int = 20
    positions: int = POSITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", plain_ranks(self.rank))
        check_integers(self, multiple=1, iterations=1, positions=1, seed=0)
        if self.budget is not None:
            check_budget(self.budget)
        if self.data not in (None, True, False):
            raise ValueError(f"data={self.data!r}: expected True, False or None")

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that it replaces."""
        return (nn.Conv2d,)

    def with_data(self, context: Context) -> bool:
        """Return whether layers are fitted to data: ``data``, or by default whether there is any."""
        return context.calibration is not None if self.data is None else self.data

    def separable_refusal(self, layer: Layer, with_data: bool) -> str | None:
        """Return why a convolution cannot be split into two, or None."""
        conv = conv_of(layer)
        if conv.kernel_size == (1, 1):
            return "a 1 x 1 kernel has no columns and rows to separate"
        if conv.groups > 1 and conv.groups == conv.in_channels:
            return "depthwise: a kernel of one channel has no channels to join"
        if self.budget is None and rank_given(self.rank, layer.name) is None:
            return "no rank was given for it"
        if with_data and layer.calls is not None and layer.calls > 1:
            return f"called {layer.calls} times in a forward: there is no one input to fit it to"
        return None

    def no_saving(self, layer: Layer, rank: int, rates: tuple[float, float] = (1.0, 1.0)) -> str | None:
        """Return why a rank saves nothing, since two convolutions multiply as often; None if it saves.

        Counted per position of the output; the vertical half is computed at every column of the input.
        The check is skipped if the user asks for "full", which is exact at any cost, or sets a budget.
        """
        conv = conv_of(layer)
        if self.budget is not None or rank_given(self.rank, layer.name) == "full":
            return None
        columns: float = conv.stride[1]
        if layer.input_shape is not None:
            columns = layer.input_size[1] / layer.grid[1]
        vertical = rates[0] * conv.kernel_size[0] * conv.in_channels * columns
        unit = vertical + rates[1] * conv.kernel_size[1] * conv.out_channels
        dense = conv.weight.numel()
        if rank * unit < dense:
            return None
        most = math.ceil(dense / unit) - 1
        below = f"; ranks up to {most} save some" if most else ""
        return f"rank {rank} saves nothing: {rank * unit / dense:.2f} times as many multiply-adds{below}"

    def ranks(self, layers: Sequence[Layer], context: Context, with_data: bool) -> dict[str, int]:
        """Return the rank of each layer: the one asked for, or the one that a budget allows."""
        if self.budget is None:
            check_rank_names(self.rank, layers)
            return {x.name: rank_of(self.rank, full_rank(conv_of(x)), x.name) for x in layers}
        grams: dict[str, Tensor] = {}
        if with_data:
            grams = self._column_grams(layers, context)
        energies = {x.name: kernel_energies(conv_of(x), grams.get(x.name)) for x in layers}
        candidates = {layer.name: candidate(layer, energies[layer.name]) for layer in layers}
        return select_ranks(candidates, self.budget, multiple=self.multiple)

    def _column_grams(self, layers: Sequence[Layer], context: Context) -> dict[str, Tensor]:
        """Return second moments of the columns that each layer reads in the original network, in one pass."""
        found = context.total(partial(_column_sums, tuple(layers), self.positions, self.seed))
        grams: dict[str, Tensor] = {}
        for layer in layers:
            parts = ((key.rpartition(" "), value) for key, value in found.items())
            own = {key: value for (name, _, key), value in parts if name == layer.name}
            sums = Accumulator(_first_half(conv_of(layer)), self.positions, self.seed)
            sums.take(own)
            grams[layer.name] = _whole(sums.finish()).gram
        return grams

    def fitted(
        self, layer: Layer, rank: int, context: Context, with_data: bool
    ) -> tuple[Fit, dict[str, Any]]:
        """Fit a layer's current input to its response in the original network; also return a record."""
        conv = conv_of(layer)
        found: Moments | None = None
        if with_data:
            found = context.once(
                (layer.name, self.positions, self.seed),
                lambda: moments(
                    conv, context.responses(layer, padded=True), positions=self.positions, seed=self.seed
                ),
            )
        made = fit_separable(conv, rank, found, iterations=self.iterations)
        record = {"rank": made.rank, "response_error": made.response_error, "energy": made.energy}
        if found is not None:
            record |= few_images(found, samples_needed(conv, rank))
        return made, record


def _column_sums(layers: tuple[Layer, ...], positions: int, seed: int, context: Context) -> dict[str, Tensor]:
    """Return the sums of the columns that layers read in a context's original network, "NAME SUM" each."""
    columns = {layer.name: _first_half(conv_of(layer)) for layer in layers}
    sums = {name: Accumulator(conv, positions, seed) for name, conv in columns.items()}
    for one in sums.values():
        # what is drawn for a batch depends on its number among all
        one.batches = context.data.start

    def visit(name: str, x: Tensor, _: Tensor) -> None:
        sums[name].add(x, columns[name](x))

    context.survey(layers, visit)
    return {f"{name} {key}": value for name, one in sums.items() for key, value in one.sums().items()}


def _whole(columns: Moments) -> Moments:
    """Return moments of columns, with noise added if there are fewer samples than twice the directions."""
    g, size, _ = columns.gram.shape
    return completed(columns, 2 * size, of_noise(columns.gram.new_zeros(g, size, columns.cross.shape[2])))


def _first_half(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a vertical convolution that reads the columns of ``conv``; one channel per group suffices."""
    padding = conv.padding if isinstance(conv.padding, str) else (int(conv.padding[0]), 0)
    return nn.Conv2d(
        conv.in_channels,
        conv.groups,
        (conv.kernel_size[0], 1),
        (conv.stride[0], 1),
        padding,
        (conv.dilation[0], 1),
        conv.groups,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
