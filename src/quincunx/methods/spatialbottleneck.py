"""Spatial bottlenecks in a trained network, fitted by least squares on responses (Peng et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.layers.padded import continued_sampling, pad_map, padding_at, sides_of
from quincunx.layers.paired import PairedDown2d, PairedUp2d
from quincunx.layers.sampled import (
    SampledConvTranspose2d,
    SampledDown2d,
    SpatialBottleneck2d,
    half_padding,
    window_means,
)
from quincunx.methods.fitting.moments import (
    POSITIONS,
    Accumulator,
    Moments,
    completed,
    few_images,
    moments,
    of_noise,
)
from quincunx.methods.fitting.settings import check_integers
from quincunx.methods.points import Point
from quincunx.ops.contract import transposed_reads
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Positions, Sampling
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work
from quincunx.surgery.pairs import is_strided, keeps_grid

__all__ = ["SpatialBottleneck"]

Built = TypeVar("Built", bound=nn.Module)

# share of the mean variance of patches; it pulls towards the start in directions that the data does not show
_RIDGE = 1e-6
# samples per unknown of an output; with fewer, a fit is worse on unseen images
_FULL = 6
# target values in one block of images
_BLOCK = 1 << 24
# variance floor, avoids 0 / 0
_LEAST = 1e-30
# of a subspace iteration: directions beyond the wanted ones, and rounds
_OVERSAMPLED, _ITERATIONS = 32, 4


@dataclass(frozen=True)
class SpatialBottleneck:
    r"""Replaces two convolutions, or one, by a sampled convolution and a transposed one to all positions.

    A *pair* of convolutions with at most a norm and an activation between them (the paper's rSB) keeps its
    first half's weights, now only at the sampling's positions (with average pooling, which changes its
    input, they are fitted like the second's). The second half W_2 is fitted to the responses of the original
    second convolution:

    .. math:: \min_{W_2, b} E\,|y - W_2^T * \uparrow a(W_1 * x)_{\text{sampling}} - b|^2

    The first half may be 1 x 1 where the second is depthwise, as in MobileNet's inverted residual: then the
    expansion is computed at the sampling's positions only. No fit helps positions that no tap of W_2 reaches
    from a computed one, so its kernel has to be larger than the sampling's gaps.

    A *single* convolution D1 -> D2 (the paper's cSB) becomes a linear bottleneck D1 -> D_mid -> D2. Its
    first half is the D_mid directions of x that best predict the responses around a position (reduced
    rank regression); the second half is fitted as above.

    A full fit takes n* = 6 (P + 1) samples, positions of images; P = c kh kw is the number of values that one
    output reads, with c input channels. With fewer samples n, white noise of the same mean power replaces the
    missing ones, with the responses of the layer's own weights:

    .. math:: \min_{W, b} E\,|y - W^T p - b|^2 + t\,s\,E\,|y_0 - W^T p_0|^2, \quad t = n^* / n - 1

    with s the power of a patch p over that of the noise p_0. So few samples change little compared with a fit
    without data. One warning then says how many images all layers would need.

    Args:
        sampling: the positions between the halves.
        down: "stride", or "avgpool" for the paper's ablation.
        pairs: whether pairs are replaced.
        singles: whether convolutions outside pairs are replaced.
        strided: whether a strided convolution may be the first of a pair. The pair's grid is then the
            smaller one: the first half is computed at sampled positions of it, the second spreads them over
            it. False leaves such layers as they are, as the paper does; searches try both.
        mid_share: D_mid of singles as a share of D1 D2 / (D1 + D2), which keeps the parameter count.
        data: fit to calibration data (True), to the weights only (False), or by default to data if
            there is any. Without data, pairs keep their weights, scaled by 1 / density, and singles
            are fitted to noise.
        positions: the most positions of an image that a fit uses.
        seed: of their draw, and of the noise.

    Raises:
        ValueError: an unknown ``down``, a share that is not positive, neither pairs nor singles.
        TypeError: ``sampling`` is not a sampling.

    Source: Peng et al., arXiv:1809.02601, section 3; starting from trained weights is our addition.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        >>> result = qx.accelerate(net, SpatialBottleneck(), calibration=[torch.randn(8, 3, 8, 8)])
        >>> made = result.replaced["2"]
        >>> made["pair"], made["macs_before"], made["macs_after"]
        (['0', '2'], 36864, 18432)
    """

    name: ClassVar[str] = "spatialbottleneck"
    saves_bytes: ClassVar[bool] = False

    sampling: Sampling = CHESSBOARD
    _: KW_ONLY
    down: str = "stride"
    pairs: bool = True
    singles: bool = True
    strided: bool = False
    mid_share: float = 1.0
    data: bool | None = None
    positions: int = POSITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        SampledDown2d(1, 1, sampling=self.sampling, down=self.down)  # refuses settings that no half accepts
        if not 0 < self.mid_share < float("inf"):
            raise ValueError(f"mid_share={self.mid_share!r}: expected a positive share")
        if self.data not in (None, True, False):
            raise ValueError(f"data={self.data!r}: expected True, False or None")
        if self.strided not in (True, False):
            raise ValueError(f"strided={self.strided!r}: expected True or False")
        if self.strided and self.down == "avgpool":
            raise ValueError("strided=True: window means (down='avgpool') have no stride")
        if not (self.pairs or self.singles):
            raise ValueError("pairs=False, singles=False: nothing is left to replace")
        check_integers(self, positions=1, seed=0)

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that it replaces."""
        return (nn.Conv2d,)

    @classmethod
    def candidates(cls) -> tuple[SpatialBottleneck, ...]:
        """Return the settings that a search tries in each layer."""
        return tuple(cls(sampling, strided=True) for sampling in (QUARTER, CHESSBOARD, THREE_QUARTERS))

    @classmethod
    def sweep(cls) -> list[Point]:
        """Return the settings for its curve of accuracy against speed."""
        return [
            Point("spatial bottleneck", text, cls(sampling))
            for sampling, text in ((THREE_QUARTERS, "3/4"), (CHESSBOARD, "2/4"), (QUARTER, "1/4"))
        ]

    def label(self, pair: bool = False) -> str:
        """Return its settings in a few words."""
        return ", ".join(
            [
                f"{self.name} of the pair" if pair else self.name,
                f"density {self.sampling.density:g}",
                *(["avgpool"] if self.down == "avgpool" else []),
            ]
        )

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why a layer is not replaced, or None."""
        conv = _conv_of(layer)
        if self.down == "avgpool" and sides_of(conv) is not None:
            return f"padding_mode={conv.padding_mode!r}: window means (down='avgpool') have zeros around them"
        if max(conv.kernel_size) == 1 and not self._starts(layer, context):
            return "1 x 1: it would leave the positions between the computed ones empty"
        if set(conv.stride) != {1} and not self._starts(layer, context):
            if self.strided:
                return "strided: no other convolution on the grid behind it makes a pair with it"
            return "strided: it changes the resolution, where the paper keeps the convolution"
        if set(conv.stride) == {1} and max(conv.kernel_size) > 1 and not keeps_grid(conv):
            if conv.padding == "same":
                return "an even kernel with padding='same': it has no middle; halves would shift the map"
            return "its result has another size than its input"
        if layer.output_shape is not None:
            try:
                self.sampling.count(*layer.grid)
            except ValueError as error:
                return str(error)
        if any(layer in pair for pair in self._pairs(context)):
            return None
        return self.refuse_single(layer, context)

    def _starts(self, layer: Layer, context: Context) -> bool:
        return any(layer is first for first, _ in self._pairs(context))

    def _pairs(self, context: Context) -> tuple[tuple[Layer, Layer], ...]:
        """Return the pairs that these settings replace."""
        if not self.pairs:
            return ()
        return tuple(pair for pair in context.pairs if self.fits_pair(pair))

    def fits_pair(self, pair: tuple[Layer, ...]) -> bool:
        """Return whether two layers that were found together are a pair of these settings' kind."""
        first, second = pair[0].module, pair[-1].module
        return keeps_grid(second) and (self.strided or not is_strided(first))

    def refuse_single(self, layer: Layer, context: Context) -> str | None:
        """Return why a convolution outside pairs is not replaced, or None."""
        conv = _conv_of(layer)
        if not self.singles:
            return "no other convolution on its grid makes a pair with it"
        if max(conv.kernel_size) == 1:
            return "1 x 1: it would leave the positions between the computed ones empty"
        if conv.groups == conv.in_channels:
            return "depthwise: a bottleneck of one channel saves nothing"
        if self.with_data(context) and layer.calls is not None and layer.calls > 1:
            return f"called {layer.calls} times in a forward: there is no one input to fit it to"
        return None

    def with_data(self, context: Context) -> bool:
        """Return whether layers are fitted to data: ``data``, or by default whether there is any."""
        return context.calibration is not None if self.data is None else self.data

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Return the work, which fits layer by layer.

        Raises:
            ValueError: ``data=True`` without calibration data.
        """
        with_data = self.with_data(context)
        if with_data:
            context.data  # noqa: B018 - raises if there is no data
        taken = {layer.name for layer in layers}
        pairs = [(a, b) for a, b in self._pairs(context) if {a.name, b.name} <= taken]
        return _BottleneckWork(self, context, {x.name: (a, b) for a, b in pairs for x in (a, b)}, with_data)


def _conv_of(layer: Layer) -> nn.Conv2d:
    """Return the layer's module as it is, which pads by itself."""
    if not isinstance(layer.module, nn.Conv2d):
        raise TypeError(f"layer {layer.name!r}: expected a Conv2d, got {type(layer.module).__name__}")
    return layer.module


@dataclass(frozen=True)
class _BottleneckWork:
    method: SpatialBottleneck
    context: Context
    pair_of: dict[str, tuple[Layer, Layer]]
    with_data: bool

    def replace(self, layer: Layer) -> Replacement | str:
        """Return half of a pair, or a whole bottleneck."""
        if layer.name not in self.pair_of:
            # its partner may have been skipped, or assigned to another method
            return self.method.refuse_single(layer, self.context) or self._single(layer)
        first, second = self.pair_of[layer.name]
        made = self._first(layer) if layer is first else self._second(layer, first.name)
        return Replacement(
            made.module, made.spec, {**self._record(layer), **made.record, "pair": [first.name, second.name]}
        )

    def finish(self, done: Mapping[str, Replacement]) -> Mapping[str, Replacement]:
        """Change nothing more."""
        return {}

    def _record(self, layer: Layer) -> dict[str, object]:
        sampling = self.method.sampling
        record: dict[str, object] = {"sampling": sampling.spec, "rates": [sampling.density]}
        if layer.name in self.pair_of and layer.output_shape is not None:
            weight = _conv_of(layer).weight
            record["macs_after"] = self._positions_read(layer) * (weight.numel() // weight[0, 0].numel())
        return record

    def _positions_read(self, layer: Layer) -> int:
        """Return how many pairs of a position and a tap the half of a pair multiplies."""
        conv, (height, width) = _conv_of(layer), layer.grid
        count, sampling = self.method.sampling.count(height, width), self.method.sampling
        sides = sides_of(conv)
        kernel, dilation = _two(conv.kernel_size), _two(conv.dilation)
        if sides is None or layer is self.pair_of[layer.name][0]:
            return count * kernel[0] * kernel[1]
        rows, cols = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        spec = continued_sampling(sampling.spec, (height, width), sides, conv.padding_mode).spec
        around = rows, rows, cols, cols
        return transposed_reads(count, kernel, (height, width), spec, (1, 1), around, dilation)

    def _built(
        self, kind: str, build: Callable[..., Built], conv: nn.Conv2d, **own: Any
    ) -> tuple[Built, dict[str, Any]]:
        """Return a module with a convolution's settings, its own and the method's sampling; and its spec."""
        settings: dict[str, Any] = {
            "in_channels": conv.in_channels,
            "out_channels": conv.out_channels,
            "kernel_size": list(conv.kernel_size),
            "dilation": list(conv.dilation),
            "groups": conv.groups,
            **own,
        }
        if sides_of(conv) is not None:
            settings["padding_mode"] = conv.padding_mode
        sampling = self.method.sampling
        module = build(**settings, sampling=sampling).to(conv.weight)
        return module, {"kind": kind, **settings, "sampling": sampling.spec}

    def _first(self, layer: Layer) -> Replacement:
        conv, method = _conv_of(layer), self.method
        pooled = self.with_data and method.down == "avgpool"
        bias = conv.bias is not None or pooled
        own: dict[str, Any] = {"down": method.down, "bias": bias}
        if is_strided(conv):
            own |= {"stride": list(conv.stride), "padding": list(padding_at(conv))}
        module, spec = self._built("paired-down", PairedDown2d, conv, **own)
        if not pooled:
            module.load_state_dict(conv.state_dict())
            return Replacement(module, spec, {})
        found = _read_by(module, layer, self.context.responses(layer), method, conv.out_channels, lambda y: y)
        start = _matrix(conv.weight.detach(), conv.groups)
        solution = _regression(completed(found, _needed(found), of_noise(start)), start)
        _set(module, solution.transpose(1, 2).reshape(conv.weight.shape), found.bias(solution))
        record = {"response_error": found.error(solution), **few_images(found, _needed(found))}
        return Replacement(module, spec, record)

    def _second(self, layer: Layer, partner: str) -> Replacement:
        conv = _conv_of(layer)
        bias = conv.bias is not None or self.with_data
        module, spec = self._built("paired-up", PairedUp2d, conv, partner=partner, bias=bias)
        with torch.no_grad():
            module.weight.copy_(_transposed(conv.weight, conv.groups) / self.method.sampling.density)
            if module.bias is not None:
                module.bias.zero_() if conv.bias is None else module.bias.copy_(conv.bias)
        record: dict[str, object] = {}
        if self.with_data:
            pairs = self.context.responses(layer)
            record = self._solve(conv, module, _spread(self.method, pairs))
        return Replacement(module, spec, record)

    def _single(self, layer: Layer) -> Replacement:
        method, conv = self.method, _conv_of(layer)
        g = conv.groups
        keeping = conv.in_channels * conv.out_channels / (conv.in_channels + conv.out_channels)
        # more channels than values in a patch would be redundant
        most = conv.in_channels // g * conv.kernel_size[0] * conv.kernel_size[1]
        mid = g * min(max(1, round(method.mid_share * keeping / g)), most)
        bias = conv.bias is not None or self.with_data
        module, spec = self._built(
            "spatial-bottleneck", SpatialBottleneck2d, conv, mid_channels=mid, down=method.down, bias=bias
        )
        pairs: Iterable[tuple[Tensor, Tensor]]
        # the larger number of channels among the halves that are fitted to noise
        known = self.with_data and _is_known(module.down)
        pairs = noise = _Noise(conv, mid if known else max(conv.in_channels, mid), method)
        if self.with_data:
            pairs = self.context.responses(layer)
        with torch.no_grad():
            found = _solve_codes(layer, module, pairs, noise, method)
            last = _like(conv, mid, conv.out_channels)
            module.up.weight.zero_()  # a channel that the data does not show contributes nothing

            def coded(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
                return _spread(method, ((module.down(x), y) for x, y in pairs))

            solved = self._solve(last, module.up, coded(pairs), lambda: coded(noise))
            _balance(module)
            if not self.with_data and conv.bias is not None and module.up.bias is not None:
                module.up.bias.copy_(conv.bias)
        record = {**self._record(layer), "mid_channels": mid}
        if self.with_data:
            record |= solved
            codes = few_images(found, _needed(found))
            if codes.get("images_needed", 0) > solved.get("images_needed", 0):
                record |= codes
        return Replacement(module, spec, record)

    def _solve(
        self,
        conv: nn.Conv2d,
        up: SampledConvTranspose2d,
        pairs: Iterable[tuple[Tensor, Tensor]],
        noise: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
    ) -> dict[str, Any]:
        """Set a second half to the least squares solution; return its record.

        On the filled map it is a convolution with ``conv``'s geometry, so ``conv``'s moments can be used.
        Missing samples come from ``noise``, or are white noise with the responses of the current half.
        """
        settings = {"positions": self.method.positions, "seed": self.method.seed}
        found = moments(conv, pairs, **settings)
        start = _matrix(_transposed(up.weight.detach(), conv.groups, back=True), conv.groups)
        whole, needed = found, _needed(found)
        if found.samples < needed:
            prior = of_noise(start) if noise is None else moments(conv, noise(), **settings)
            whole = completed(found, needed, prior)
        solution = _regression(whole, start)
        o, c, kh, kw = conv.weight.shape
        weight = solution.transpose(1, 2).reshape(o, c, kh, kw)
        _set(up, _transposed(weight, conv.groups), found.bias(solution))
        return {"response_error": found.error(solution), **few_images(found, needed)}


def _needed(found: Moments) -> int:
    """Return the samples of a full fit: 6 (P + 1), P being the values of a patch of a channel group."""
    return _FULL * (found.gram.shape[1] + 1)


class _Noise:
    """White noise inputs and the layer's responses to them; can be iterated repeatedly."""

    def __init__(self, conv: nn.Conv2d, channels: int, method: SpatialBottleneck) -> None:
        self.conv, self.method = conv, method
        sampling = method.sampling
        least = max(16, sampling.period) if isinstance(sampling, Cosets) else 16
        # explicit positions fit one grid only
        self.size = sampling.size if isinstance(sampling, Positions) else (least, least)
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        used = 8 * min(sampling.count(*self.size), method.positions)
        self.batches = -(-4 * channels // conv.groups * kernel // used)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.method.seed)
        for _ in range(self.batches):
            x = torch.randn(8, self.conv.in_channels, *self.size, generator=generator).to(self.conv.weight)
            yield (
                x,
                F.conv2d(
                    pad_map(x, padding_at(self.conv), self.conv.padding_mode),
                    self.conv.weight,
                    None,
                    1,
                    0,
                    self.conv.dilation,
                    self.conv.groups,
                ),
            )


def _transposed(weight: Tensor, groups: int, back: bool = False) -> Tensor:
    """Return the weight [C, O / g, kh, kw] of the transposed convolution that equals, on the filled map, a
    convolution with [O, C / g, kh, kw]; with ``back``, the inverse."""
    first, second, kh, kw = weight.shape
    grouped = weight.view(groups, first // groups, second, kh, kw).transpose(1, 2).flip((3, 4))
    return grouped.reshape(groups * second, first // groups, kh, kw)


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """Return a convolution's weight as [g, P, O / g] in float64."""
    return weight.double().reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)


def _damped(found: Moments) -> Tensor:
    """Return G with the ridge on its diagonal."""
    # for a constant map the variance is only the rounding of its mean square
    least = _LEAST + _RIDGE * found.mean_patch.square().mean(1)
    ridge = _RIDGE * found.gram.diagonal(dim1=1, dim2=2).mean(1).maximum(least)
    gram = found.gram.clone()  # may be gigabytes: make no second copy for a diagonal
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return gram


def _regression(found: Moments, start: Tensor) -> Tensor:
    """Return the weight [g, P, O / g] of least error, near ``start`` where the data does not determine it."""
    step = torch.cholesky_solve(found.cross - found.gram @ start, torch.linalg.cholesky(_damped(found)))
    return start + step


def _spread(
    method: SpatialBottleneck, pairs: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs with their sampled inputs scattered to a map of zeros."""
    for y, response in pairs:
        height, width = response.shape[-2:]
        mask = method.sampling.mask(height, width).flatten().to(y.device)
        filled = y.new_zeros(y.shape[0], y.shape[1], height * width)
        filled[:, :, mask] = y.flatten(2)
        yield filled.view(*y.shape[:2], height, width), response


def _read_by(
    half: SampledDown2d,
    layer: Layer,
    pairs: Iterable[tuple[Tensor, Tensor]],
    method: SpatialBottleneck,
    outputs: int,
    wanted: Callable[[Tensor], Tensor],
) -> Moments:
    """Return moments of the patches that a first half reads (of the map or of its window means) and of its
    targets, ``outputs`` channels computed from the responses, at the sampling's positions."""
    conv = _conv_of(layer)
    # the padding differs between the sides, so the map itself is padded
    seen = nn.Conv2d(
        conv.in_channels, outputs, _two(conv.kernel_size), dilation=half.dilation, groups=conv.groups
    )
    sums = Accumulator(seen.to(conv.weight), method.positions, method.seed)
    for x, y in pairs:
        height, width = y.shape[-2:]
        sums.among = method.sampling.mask(height, width).flatten().nonzero().flatten()
        step = max(1, _BLOCK // (outputs * height * width))
        for part in range(0, len(x), step):
            read = x[part : part + step]
            read = window_means(read, half.window) if half.window > 1 else read
            sums.add(pad_map(read, half.borders, half.padding_mode), wanted(y[part : part + step]))
    return sums.finish()


def _set(half: SampledDown2d | SampledConvTranspose2d, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        half.weight.copy_(weight)
        if half.bias is not None:
            half.bias.copy_(bias.flatten())


def _solve_codes(
    layer: Layer,
    module: SpatialBottleneck2d,
    pairs: Iterable[tuple[Tensor, Tensor]],
    noise: Iterable[tuple[Tensor, Tensor]],
    method: SpatialBottleneck,
) -> Moments:
    """Set the first half to the directions of a patch that best predict the responses around it.

    With patches p of the first half, G = E[p p^T] = L L^T and B = E[p t^T], t being the responses under
    the kernel, these are the leading directions of L^-1 B B^T L^-T, mapped back by L^-T. Noise replaces
    missing samples. Returns the data's own moments.
    """
    conv, down = _conv_of(layer), module.down
    kernel, spread = _two(conv.kernel_size), _two(conv.dilation)

    def around(y: Tensor) -> Tensor:
        told = F.unfold(y, kernel, spread, half_padding(kernel, spread))
        return told.view(len(y), -1, *y.shape[-2:])

    def read(pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments:
        return _read_by(down, layer, pairs, method, conv.out_channels * kernel[0] * kernel[1], around)

    found = whole = read(pairs)
    if pairs is not noise and found.samples < _needed(found):
        prior = _around_noise(conv) if _is_known(down) else read(noise)
        whole = completed(found, _needed(found), prior)
    factor = torch.linalg.cholesky(_damped(whole))
    told = torch.linalg.solve_triangular(factor, whole.cross, upper=False)
    count = down.out_channels // conv.groups
    with torch.random.fork_rng([told.device] if told.is_cuda else []):
        torch.manual_seed(method.seed)
        leading = _leading(told, count)
    directions = torch.linalg.solve_triangular(factor.transpose(1, 2), leading, upper=True)
    down.weight.copy_(directions.transpose(1, 2).reshape(down.weight.shape))
    return found


def _is_known(down: SampledDown2d) -> bool:
    """Return whether :func:`_around_noise` holds for a first half."""
    return down.window == 1 and all(size % 2 for size in _two(down.kernel_size))


def _around_noise(conv: nn.Conv2d) -> Moments:
    """Return, away from borders, the moments of white noise under an odd kernel and of its responses.

    G = I. The response i taps from the position reads the value at tap a through tap b = a - i + (k - 1) / 2.
    Drawing this noise was the most expensive part of a fit: there are more responses than values.
    """
    g, weight = conv.groups, conv.weight.detach().double()
    o, c, kh, kw = weight.shape
    padded = F.pad(weight, (kw - 1, kw - 1, kh - 1, kh - 1))
    taps = [torch.arange(k, device=weight.device) for k in (kh, kw)]
    rows, cols = (t[:, None] - t + (len(t) - 1) // 2 + len(t) - 1 for t in taps)
    read = padded[:, :, rows][..., cols].view(g, o // g, c, kh, kh, kw, kw)
    cross = read.permute(0, 2, 3, 5, 1, 4, 6).reshape(g, c * kh * kw, o // g * kh * kw)
    power = kh * kw * weight.square().view(g, -1).sum(1)
    return replace(of_noise(cross), power=power)


def _balance(module: SpatialBottleneck2d) -> None:
    """Give each middle channel the same norm in both halves without changing the result.

    The first half as solved gives values of variance one, whatever the map's scale: its weights may be a
    hundred thousand times smaller than the second's, and the first step of training would destroy it.
    """
    first, second = module.down.weight, module.up.weight
    norms = [w.flatten(1).norm(dim=1) for w in (first, second)]
    share = (norms[1] / norms[0]).sqrt()
    share[~(share.isfinite() & (share > 0))] = 1
    first.mul_(share[:, None, None, None])
    second.div_(share[:, None, None, None])


def _leading(matrix: Tensor, count: int) -> Tensor:
    """Return the first left singular vectors of [g, P, T] as [g, P, count], by subspace iteration.

    For a layer with 512 channels a full decomposition computes 4,608, where about 256 are wanted.
    """
    most = matrix.shape[1]
    sampled_rank = min(most, count + _OVERSAMPLED)
    # fewer columns than directions: any directions will do for the rest
    padded = F.pad(matrix, (0, max(0, sampled_rank - matrix.shape[2])))
    return torch.svd_lowrank(padded, q=sampled_rank, niter=_ITERATIONS)[0][:, :, :count]


def _like(conv: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a convolution with another one's geometry and groups."""
    kernel, dilation = _two(conv.kernel_size), _two(conv.dilation)
    padding = half_padding(kernel, dilation)
    mode = conv.padding_mode
    made = nn.Conv2d(in_channels, out_channels, kernel, 1, padding, dilation, conv.groups, padding_mode=mode)
    return made.to(conv.weight)  # device and dtype


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]
