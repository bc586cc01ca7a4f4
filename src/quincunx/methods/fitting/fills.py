"""Fits a perforated convolution to a layer's responses: its fill, then its kernel, in turn.

The fill is least squares on second moments, summed in float64 in one pass over the data. The kernel, given
the fill, is least squares too: conjugate gradients on the responses, so that computed positions and those
that are filled from them give the responses together. No step raises the error on the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.layers.fills import FittedFill2d
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.methods.fitting.moments import Accumulator, Moments, completed, of_noise, relative
from quincunx.ops import sampled_conv2d
from quincunx.ops.plan import FillPlan, fill_plan
from quincunx.sampling import Cosets

__all__ = [
    "Errors",
    "FillMoments",
    "Held",
    "conditioner",
    "fit_fill",
    "fit_perforated",
    "keep_better",
    "refit_kernel",
]

Pairs = Iterable[tuple[Tensor, Tensor]]

# of a class's or a position's mean tap power; holds what little data says little about near the start
_RIDGE = {"cosets": 1e-4, "mask": 1e-2}
# tried one after the other where a ridge leaves more error than the nearest fill
_LESS = (1.0, 1e-2, 1e-4, 0.0)
# share of the mean weight of a half's channels in the answers; rarely used channels take no long steps
_WEIGHED = 1e-3
_TINY = torch.finfo(torch.float64).tiny ** 0.5
# share of the mean square of values in float32 below which their variance is rounding
_ROUNDING = 1e-10
# share of the mean square of what a kernel reads that holds it where only rounding decides, as between
# constant inputs: slopes are sums of many such values, and large weights that cancel do not survive bfloat16
_HELD = 1e-4
# bytes of inputs and responses that are kept instead of computed again
_MOST_KEPT = 1 << 30
# doubles of one block of taps; what stays in a near cache is added up fastest
_BLOCK = 1 << 18


class Held:
    """Pairs that are kept at the first reading, where they are not too much, for those after it.

    Example:
        >>> pairs = Held((torch.ones(1), torch.ones(1)) for _ in range(3))
        >>> len(list(pairs)), len(list(pairs))
        (3, 3)
    """

    def __init__(self, pairs: Pairs, most: int = _MOST_KEPT) -> None:
        self.pairs, self.most = pairs, most
        self.kept: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.kept is not None:
            yield from self.kept
            return
        found: list[tuple[Tensor, Tensor]] | None = []
        held = 0
        for pair in self.pairs:
            held += sum(t.numel() * t.element_size() for t in pair)
            if held > self.most:
                found = None
            if found is not None:
                found.append(pair)
            yield pair
        self.kept = found


@dataclass(frozen=True)
class Errors:
    """Squared errors of a perforated layer's answers over the centred power of the responses.

    Attributes:
        fill: with the fitted fill.
        nearest: with the nearest fill.
        computed: the part of both that computed positions have.
    """

    fill: float
    nearest: float
    computed: float


class FillMoments:
    r"""Second moments of the taps u and the responses r at skipped positions, in float64.

    For each residue class and channel (cosets), or each skipped position with all channels together:
    E[u u^T], E[u r], E[u], E[r], E[r^2]. Besides: the squared error at computed positions, and the
    responses' power, of which errors are shares.

    Args:
        fill: whose sampling and reach are used.
        size: the grid (H', W') of the first map; those of cosets may have others.
    """

    def __init__(self, fill: FittedFill2d, size: tuple[int, int]) -> None:
        self.fill, self.size = fill, size
        self.plan: FillPlan = fill_plan(fill.sampling.spec, *size, fill.reach)
        self.shared = not isinstance(fill.sampling, Cosets)
        self.channels = fill.channels
        groups = (self.plan.count, 1 if self.shared else fill.channels)
        taps = self.plan.taps
        device = fill.weight.device
        self.gram = torch.zeros(*groups, taps, taps, dtype=torch.float64, device=device)
        self.cross = torch.zeros(*groups, taps, dtype=torch.float64, device=device)
        self.sum_tap = torch.zeros_like(self.cross)
        self.sum_response = torch.zeros(groups, dtype=torch.float64, device=device)
        self.power = torch.zeros(groups, dtype=torch.float64, device=device)
        self.count = torch.zeros(self.plan.count, 1, dtype=torch.float64, device=device)
        self.computed = 0.0
        self.sums = torch.zeros(3, fill.channels, dtype=torch.float64, device=device)

    def add(self, y: Tensor, response: Tensor) -> None:
        """A batch: the sampled map [N, C, m, 1] and the responses [N, C, H', W'].

        Raises:
            ValueError: the positions are a mask's, and the map has another size than the first.
        """
        size = int(response.shape[2]), int(response.shape[3])
        if self.shared and size != self.size:
            raise ValueError(
                f"calibration: maps of {size[0]} x {size[1]}, earlier ones of {self.size[0]} x "
                f"{self.size[1]}; the coefficients of a mask's fill belong to positions of one size"
            )
        plan, device = fill_plan(self.fill.sampling.spec, *size, self.fill.reach), y.device
        # position by position, as maps lie in memory
        rows, flat = y.squeeze(3).transpose(1, 2), response.permute(0, 2, 3, 1).flatten(1, 2)
        computed = plan.computed.to(device)
        # an image at a time, which a cache holds also in float64
        for row, one in zip(rows, flat, strict=True):
            wide = one.double()
            self.computed += float((row.double() - wide.index_select(0, computed)).square().sum())
            self.sums[0] += wide.square().sum(0)
            self.sums[1] += wide.sum(0)
        self.sums[2] += len(flat) * flat.shape[1]
        index, kinds = plan.index[plan.skipped].long().to(device), plan.kinds[plan.skipped].to(device)
        skipped = plan.skipped.to(device)
        if self.shared:
            self._add(slice(None), rows, flat, index, skipped)
            return
        for kind in range(plan.count):
            members = (kinds == kind).nonzero().flatten()
            if len(members):
                taps = int((index[members[0]] >= 0).sum())
                self._add(slice(kind, kind + 1), rows, flat, index[members, :taps], skipped[members])

    def _add(self, kinds: slice, rows: Tensor, flat: Tensor, index: Tensor, skipped: Tensor) -> None:
        """Sums over images and positions for each channel, or over images and channels for each position."""
        over = (0, 2) if self.shared else (0, 1)
        place = partial(torch.unsqueeze, dim=1 if self.shared else 0)
        taps = index.shape[1]
        step = max(1, _BLOCK // (len(skipped) * (taps + 1) * self.channels))
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            u = [some.index_select(1, index[:, tap]).double() for tap in range(taps)]
            r = flat[first : first + step].index_select(1, skipped).double()
            for i in range(taps):
                for j in range(i, taps):
                    product = place((u[i] * u[j]).sum(over))
                    self.gram[kinds, :, i, j] += product
                    if j > i:
                        self.gram[kinds, :, j, i] += product
                self.cross[kinds, :, i] += place((u[i] * r).sum(over))
                self.sum_tap[kinds, :, i] += place(u[i].sum(over))
            self.sum_response[kinds] += place(r.sum(over))
            self.power[kinds] += place((r * r).sum(over))
            self.count[kinds] += r.shape[0] * (r.shape[2] if self.shared else r.shape[1])

    def solve(self, start: Tensor) -> tuple[Tensor, Tensor]:
        r"""Coefficients [R, C or 1, T] and biases [R, C or 1] of least squares, held near a start.

        .. math:: a = a_0 + (G + \lambda I)^{-1} (B - G a_0), \quad b = \bar r - a^T \bar u

        with centred moments for cosets; positions of masks have no bias of their own. Where that leaves more
        error than the nearest fill, lambda is lowered; without it least squares cannot, since the nearest
        computed position is a tap.

        Args:
            start: a_0 [R, T].
        """
        n = self.count.clamp_min(1)
        gram, cross = self.gram / n[..., None, None], self.cross / n[..., None]
        squares = gram.diagonal(dim1=2, dim2=3)
        mean_tap, mean_response = self.sum_tap / n[..., None], self.sum_response / n
        if not self.shared:
            gram = gram - mean_tap[..., :, None] * mean_tap[..., None, :]
            cross = cross - mean_tap * mean_response[..., None]
        else:
            mean_tap, mean_response = torch.zeros_like(mean_tap), torch.zeros_like(mean_response)
        start = start.to(gram)[:, None].expand_as(cross)
        diagonal = gram.diagonal(dim1=2, dim2=3)
        live = (diagonal > 0).sum(2).clamp_min(1)
        scale = diagonal.sum(2) / live * _RIDGE["mask" if self.shared else "cosets"]
        best = torch.zeros_like(cross)
        best[..., 0] = 1
        bias = torch.zeros_like(mean_response)
        lowest = self.errors(best, bias)
        # unknowns that no data speaks of keep the start: taps that a class has not, and maps that differ by
        # the rounding of float32 alone, as those of a channel that is never active
        silent = _TINY + squares.amax(2) * _ROUNDING
        done = torch.zeros_like(lowest, dtype=torch.bool)
        for less in _LESS:
            ridge = (scale * less + silent)[..., None, None] * torch.eye(gram.shape[2]).to(gram)
            rest = cross - (gram @ start[..., None]).squeeze(3)
            found = start + torch.linalg.solve(gram + ridge, rest[..., None]).squeeze(3)
            offset = mean_response - (found * mean_tap).sum(2)
            errors = self.errors(found, offset)
            better = (errors <= lowest) & ~done & found.float().isfinite().all(2)
            best, bias = found.where(better[..., None], best), offset.where(better, bias)
            done |= better
        return best, bias

    def errors(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Sums of squared errors [R, C or 1] of coefficients and biases, from the raw moments."""
        quadratic = (weight * (self.gram @ weight[..., None]).squeeze(3)).sum(2)
        linear = (weight * self.cross).sum(2)
        offset = 2 * bias * ((weight * self.sum_tap).sum(2) - self.sum_response) + self.count * bias**2
        return (self.power - 2 * linear + quadratic + offset).clamp_min(0)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """The whole map's squared error over the responses' centred power."""
        return self._share(float(self.errors(weight, bias).sum()) + self.computed)

    def _share(self, squares: float) -> float:
        power = self.sums[0] - self.sums[1] ** 2 / self.sums[2].clamp_min(1)
        return relative(squares, float(power.sum()))

    def nearest(self) -> float:
        """The error with the nearest fill."""
        copy = torch.zeros_like(self.cross)
        copy[..., 0] = 1
        return self.error(copy, torch.zeros_like(self.sum_response))

    def of_computed(self) -> float:
        """The error at computed positions alone."""
        return self._share(self.computed)


def _sampled(layer: PerforatedConv2d, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's sampled map with another kernel."""
    return sampled_conv2d(
        x,
        kernel,
        bias,
        sampling=layer.sampling,
        stride=layer.stride,
        padding=layer.borders,
        dilation=layer.dilation,
        groups=layer.groups,
    )


@torch.no_grad()
def fit_fill(layer: PerforatedConv2d, pairs: Pairs, start: Tensor) -> Errors:
    """The best fill for a layer's kernel, put in the layer."""
    fill = layer.filling
    if fill is None:
        raise TypeError(f"layer: expected a fitted fill, got fill={layer.fill!r}")
    moments: FillMoments | None = None
    for x, response in pairs:
        if moments is None:
            moments = FillMoments(fill, (response.shape[2], response.shape[3]))
        moments.add(_sampled(layer, x, layer.weight, layer.bias), response)
    if moments is None:
        raise ValueError("fit_perforated: no batch was given")
    weight, bias = moments.solve(start)
    nearest, computed = moments.nearest(), moments.of_computed()
    if fill.gain is None:
        fill.weight.copy_(weight.transpose(1, 2))
        fill.bias.copy_(bias)
        return Errors(moments.error(weight, bias), nearest, computed)
    fill.weight.copy_(weight[:, 0])
    gain, offset, squares = _gains(layer, pairs)
    fill.gain.copy_(gain)
    fill.bias.copy_(offset)
    return Errors(moments._share(squares + moments.computed), nearest, computed)


def _gains(layer: PerforatedConv2d, pairs: Pairs) -> tuple[Tensor, Tensor, float]:
    """Least squares of gain and bias for each channel, given the positions' coefficients; squares left."""
    fill = layer.filling
    if fill is None or fill.gain is None:
        raise TypeError("layer: expected the fitted fill of a mask")
    fill.gain.fill_(1)
    fill.bias.zero_()
    sums = torch.zeros(5, fill.channels, dtype=torch.float64, device=fill.gain.device)
    count = 0
    for x, response in pairs:
        whole = fill(_sampled(layer, x, layer.weight, layer.bias), response.shape[2:])
        plan = fill_plan(fill.sampling.spec, response.shape[2], response.shape[3], fill.reach)
        at = plan.skipped.to(response.device)
        u, r = (t.flatten(2)[:, :, at].double() for t in (whole, response))
        sums += torch.stack([v.sum((0, 2)) for v in (u, r, u * u, u * r, r * r)])
        count += u.shape[0] * u.shape[2]
    n = max(1, count)
    mean_u, mean_r = sums[0] / n, sums[1] / n
    variance, covariance = sums[2] / n - mean_u**2, sums[3] / n - mean_u * mean_r
    gain = torch.where(variance > _ROUNDING * sums[2] / n, covariance / variance, torch.ones_like(variance))
    offset = mean_r - gain * mean_u
    left = sums[4] - 2 * (gain * sums[3] + offset * sums[1])
    left = left + gain**2 * sums[2] + 2 * gain * offset * sums[0] + n * offset**2
    return gain, offset, float(left.clamp_min(0).sum())


def _answered(
    layer: PerforatedConv2d, x: Tensor, kernel: Tensor, bias: Tensor | None, affine: bool
) -> Tensor:
    """A layer's map with another kernel; without ``affine`` what is linear in kernel and bias alone."""
    fill = layer.filling
    y = _sampled(layer, x, kernel, bias)
    size = layer.grid(x.shape[2], x.shape[3])
    if fill is None:
        return layer.made_whole(y, layer.sampling, size)
    weight, offset = (t.detach() for t in fill.coefficients())
    whole: Tensor = torch.ops.quincunx.fill_fitted(
        y, weight, offset if affine else None, fill.sampling.spec, size, fill.reach
    )
    return whole


@torch.no_grad()
def _squares(maps: Tensor) -> float:
    """The sum of the squares of maps [N, C, H, W], without a copy of them in another format."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    # in the order of channels_last, in which they lie
    return sum(float(torch.dot(row, row)) for row in wide.permute(0, 2, 3, 1).flatten(1))


class _Kernel:
    """A layer's kernel and bias as one unknown of a linear least squares problem, given its fill.

    Args:
        layer: whose kernel it is.
        pairs: inputs and the responses wanted.
        conditioner: Cholesky factor of the moments of what the kernel reads, for each channel group.
        behind: a layer that reads this one's map and gives the answers, if they are not its own.
    """

    def __init__(
        self,
        layer: PerforatedConv2d,
        pairs: Pairs,
        conditioner: Tensor,
        behind: PerforatedConv2d | None = None,
    ) -> None:
        self.layer, self.pairs, self.conditioner, self.behind = layer, pairs, conditioner, behind

    def answer(self, x: Tensor, kernel: Tensor, bias: Tensor, affine: bool) -> Tensor:
        """The map of a batch; without ``affine`` what is linear in kernel and bias alone."""
        whole = _answered(self.layer, x, kernel, bias, affine)
        if (behind := self.behind) is None:
            return whole
        added = behind.bias.detach() if affine and behind.bias is not None else None
        return _answered(behind, whole, behind.weight.detach(), added, affine)

    def slope(self, kernel: Tensor, bias: Tensor, affine: bool) -> tuple[Tensor, Tensor, float]:
        """Of half the squared error, and the squared error: one pass over the data.

        Without ``affine`` of half the squared change of the answers along a direction, which is the direction
        times the matrix of the normal equations.
        """
        kernel, bias = kernel.detach().requires_grad_(), bias.detach().requires_grad_()
        slopes = [torch.zeros_like(t, dtype=torch.float64) for t in (kernel, bias)]
        squares = 0.0
        for x, response in self.pairs:
            with torch.enable_grad():
                rest = self.answer(x, kernel, bias, affine)
                rest = rest - response if affine else rest
                found = torch.autograd.grad(rest, (kernel, bias), rest.detach())
            for total, slope in zip(slopes, found, strict=True):
                total += slope
            squares += _squares(rest)
        return slopes[0], slopes[1], squares

    def conditioned(self, kernel: Tensor) -> Tensor:
        """A slope by the inverse moments of what the kernel reads and of the kernel behind it."""
        groups = self.layer.groups
        flat = kernel.reshape(groups, kernel.shape[0] // groups, -1).transpose(1, 2)
        flat = torch.cholesky_solve(flat, self.conditioner)
        if self.behind is not None:
            # [g, outputs of the one behind, its inputs, taps]: how the answers weigh this layer's channels
            read = self.behind.weight.detach().double()
            read = read.reshape(groups, -1, *read.shape[1:]).transpose(1, 2).flatten(2)
            weighed = read @ read.transpose(1, 2)
            ridge = weighed.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * _WEIGHED
            unit = torch.eye(weighed.shape[1], dtype=weighed.dtype, device=weighed.device)
            flat = torch.linalg.solve(weighed + (ridge + _TINY) * unit, flat.transpose(1, 2)).transpose(1, 2)
        return flat.transpose(1, 2).reshape(kernel.shape)


def refit_kernel(
    layer: PerforatedConv2d,
    pairs: Pairs,
    conditioner: Tensor,
    steps: int,
    behind: PerforatedConv2d | None = None,
) -> None:
    """Conjugate gradients on kernel and bias, given the fill; each step lowers the squared error.

    Few steps from where the kernel is: what the data says least about changes least.
    """
    problem = _Kernel(layer, pairs, conditioner, behind)
    kernel = layer.weight.detach().clone()
    own = layer.bias is not None
    bias = layer.bias.detach().clone() if layer.bias is not None else kernel.new_zeros(layer.out_channels)
    # per sample, as the conditioner's moments are; a bias is read as 1 everywhere
    samples = float(sum(r.shape[0] * r.shape[2] * r.shape[3] for _, r in pairs))
    slope, offset, _ = problem.slope(kernel, bias, True)
    step: tuple[Tensor, Tensor] | None = None
    before = 0.0
    for _ in range(steps):
        toward = problem.conditioned(slope / samples), offset / samples if own else torch.zeros_like(offset)
        energy = float((slope * toward[0]).sum() + (offset * toward[1]).sum())
        if not energy > 0:
            break
        share = 0.0 if step is None else energy / before
        before = energy
        step = toward if step is None else (toward[0] + share * step[0], toward[1] + share * step[1])
        product, of_bias, curvature = problem.slope(step[0].to(kernel), step[1].to(bias), False)
        if not curvature > 0:
            break
        length = float((slope * step[0]).sum() + (offset * step[1]).sum()) / curvature
        kernel, bias = kernel - length * step[0].to(kernel), bias - length * step[1].to(bias)
        slope, offset = slope - length * product, offset - length * of_bias
    with torch.no_grad():
        layer.weight.copy_(kernel)
        if layer.bias is not None:
            layer.bias.copy_(bias)


def fit_perforated(
    layer: PerforatedConv2d,
    conv: nn.Conv2d,
    pairs: Pairs,
    *,
    refits: int = 2,
    steps: int = 6,
    positions: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a perforated layer with a fitted fill, in place, to (input, response) pairs.

    First the fill is fitted with the layer's own kernel. Then the kernel is fitted at the computed positions
    to the responses, which differ from the kernel's own where the input is approximated, and the fill again.
    Then, in turn, the kernel for computed and filled positions together and the fill. A stage that leaves
    more error than the one before is taken back; so errors never rise, on the data of the fit.

    Args:
        layer: has the kernel of ``conv``.
        conv: the convolution it stands for; its geometry is read.
        pairs: inputs [N, C, H, W] and the responses [N, O, H', W'] wanted; read several times.
        refits: how often kernel and fill are fitted in turn; 0 fits the fill alone.
        steps: of conjugate gradients in each turn.
        positions, seed: as :class:`quincunx.methods.fitting.moments.Accumulator` has them.

    Returns:
        A record: "response_error", "nearest_error" (of the nearest fill with the kernel of ``conv``), and
        "stages", pairs of a stage's name and its error.

    Raises:
        TypeError: a layer without a fitted fill.
        ValueError: no pairs.

    Source: the responses of Lin et al., ESPACE (AAAI 2017), eq. 4, for fills and kernels in turn.

    Example:
        >>> conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(8, 3, 8, 8)
        >>> layer = PerforatedConv2d(3, 4, 3, sampling=qx.CHESSBOARD, padding=1, fill="fitted")
        >>> kept = layer.load_state_dict(conv.state_dict(), strict=False)
        >>> record = fit_perforated(layer, conv, [(x, conv(x).detach())])
        >>> record["response_error"] <= record["nearest_error"]
        True
    """
    if layer.filling is None:
        raise TypeError(f"layer: expected a fitted fill, got fill={layer.fill!r}")
    pairs, start = Held(pairs), layer.filling.start
    first = fit_fill(layer, pairs, start)
    stages = [("fill", first.fill)]

    def fitted() -> float:
        return fit_fill(layer, pairs, start).fill

    if refits:
        moments = _read_moments(layer, conv, pairs, positions, seed)
        g, size, outputs = moments.cross.shape
        own = layer.weight.detach().reshape(g, outputs, size).transpose(1, 2).double()
        full = completed(moments, 8 * size, of_noise(own))
        factor = _factor(full.gram, full.gram)
        rest = full.cross - full.gram @ own

        def kernel_alone() -> None:
            found = own + torch.cholesky_solve(rest, factor)
            with torch.no_grad():
                layer.weight.copy_(found.transpose(1, 2).reshape(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.copy_(moments.bias(found).flatten())

        keep_better("kernel", layer, fitted, stages, kernel_alone)
        whole = _uncentred(full)
        for _ in range(refits):
            change = partial(refit_kernel, layer, pairs, whole, steps)
            if not keep_better("together", layer, fitted, stages, change):
                break
    record = {"response_error": stages[-1][1], "nearest_error": first.nearest}
    return record | {"stages": [list(stage) for stage in stages]}


def _factor(gram: Tensor, centred: Tensor) -> Tensor:
    """Cholesky factor of second moments with a small ridge, a share of them and of the centred ones."""
    ridge, squares = (t.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] for t in (centred, gram))
    ridge = ridge * 1e-5 + squares * _HELD
    unit = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.cholesky(gram + (ridge + _TINY) * unit)
    return found


def _uncentred(found: Moments) -> Tensor:
    """The same of moments as a kernel with a bias of its own reads them."""
    mean = found.mean_patch
    return _factor(found.gram + mean[:, :, None] * mean[:, None, :], found.gram)


def conditioner(layer: PerforatedConv2d, conv: nn.Conv2d, pairs: Pairs, positions: int, seed: int) -> Tensor:
    """Return the Cholesky factor [g, P, P] of the moments of what a layer's kernel reads at computed
    positions, for :func:`refit_kernel`; arguments as :func:`fit_perforated` has them."""
    moments = _read_moments(layer, conv, pairs, positions, seed)
    g, size, outputs = moments.cross.shape
    own = layer.weight.detach().reshape(g, outputs, size).transpose(1, 2).double()
    return _uncentred(completed(moments, 8 * size, of_noise(own)))


def _read_moments(
    layer: PerforatedConv2d, conv: nn.Conv2d, pairs: Pairs, positions: int, seed: int
) -> Moments:
    """Moments of what the kernel reads and of the responses at computed positions."""
    sums: Accumulator | None = None
    with torch.no_grad():
        for x, response in pairs:
            # those of this map, which may have another size than the first
            mask = layer.sampling.mask(response.shape[2], response.shape[3])
            among = mask.flatten().nonzero().flatten()
            sums = Accumulator(conv, positions, seed) if sums is None else sums
            sums.among = among
            sums.add(x, response)
    if sums is None:
        raise ValueError("fit_perforated: no batch was given")
    return sums.finish()


def keep_better(
    name: str,
    layer: PerforatedConv2d,
    fitted: Callable[[], float],
    stages: list[tuple[str, float]],
    change: Callable[[], None],
) -> bool:
    """Change a layer's kernel and fit its fill anew; taken back where the error rises.

    Args:
        name: of the stage.
        layer: whose kernel is changed.
        fitted: fits the fill and returns the error.
        stages: the last one's error is what it is compared with; one that stays is added.
        change: changes the kernel.

    Returns:
        Whether it stays.
    """
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    change()
    error = fitted()
    if error > stages[-1][1]:
        layer.load_state_dict(before)
        return False
    stages.append((name, error))
    return True
