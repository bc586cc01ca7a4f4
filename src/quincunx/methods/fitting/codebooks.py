r"""Product quantisation of a weight: k-means on its sub-vectors, then correction on the responses.

A weight is [P, O] for each channel group, its rows in the order (subspace m, tap t, channel c), so that
one subspace reads a block of rows. With the Gram matrix G of patches and the cross moments B with
the responses, the squared response error is |y|^2 - tr W^T (2 B - G W), so the data is read only once.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quincunx.layers.quantised import check_codebook
from quincunx.methods.fitting.moments import Moments, relative

__all__ = ["Quantisation", "quantise"]

_KMEANS_STEPS = 20
# share of the mean of a matrix's diagonal: unused codewords keep their values
_RIDGE = 1e-9
# A few samples determine a weight of many rows poorly, so it is pulled towards the original weight: by this
# share of the mean power of an input for as many samples as the weight has rows, and less for more.
_HOLD = 2.0


@dataclass(frozen=True, eq=False)
class Quantisation:
    """A weight as codebooks and assignments.

    Attributes:
        codebooks: [groups M, K, C'], the last subspace of a group padded with zeros.
        assignments: [groups M, taps, O / groups], int64.
        bias: [O]; None if the layer has none and no data was given.
        weight_error: |W - W'|^2 / |W|^2.
        plain_error: response error E|y - z|^2 / E|y - mean y|^2 before the correction; None without data.
        response_error: the same after the correction; None without data.
        history: the response error after each sweep; the first entry is the start.
    """

    codebooks: Tensor
    assignments: Tensor
    bias: Tensor | None
    weight_error: float
    plain_error: float | None = None
    response_error: float | None = None
    history: tuple[float, ...] = ()


def quantise(
    conv: nn.Conv2d,
    subspace: int,
    codewords: int,
    data: Moments | None = None,
    *,
    iterations: int = 4,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Quantisation:
    r"""Return codebooks and assignments for a convolution: from its weight only, or corrected on data.

    First k-means on the sub-vectors of each subspace, which minimises |W - W'|. With data

    .. math:: \min_{d, a, b} E\,|y - W' * x - b|^2

    by block coordinate descent: for one subspace after the other, with the others fixed, the codewords are
    solved by least squares and each sub-vector then takes the best codeword. Both steps also pull W' towards
    W, with 2 P / samples times the mean power of an input as weight, since a few samples determine P rows
    poorly. The sweep with the smallest response error is returned, so the error is never larger than
    plain quantisation's.

    Args:
        conv: the layer, with zero padding.
        subspace: C'.
        codewords: K.
        data: moments of the layer's input and of its target responses.
        iterations: the most sweeps over all subspaces.
        tolerance: stop when the error falls by a smaller share of itself.
        seed: of k-means.

    Raises:
        ValueError: a subspace outside 1..C / groups, fewer than 2 codewords or more than sub-vectors.

    Source: Wu et al., arXiv:1512.06473, sections 3.1 to 3.3.

    Example:
        >>> conv = nn.Conv2d(8, 16, 3)
        >>> found = quantise(conv, subspace=4, codewords=16)
        >>> found.codebooks.shape, found.assignments.shape, found.weight_error < 0.5
        (torch.Size([2, 16, 4]), torch.Size([2, 9, 16]), True)
    """
    o, channels, kh, kw = conv.weight.shape
    taps, g = kh * kw, conv.groups
    check_codebook(subspace, codewords, channels, taps * o // g)
    cuts = [range(c, min(c + subspace, channels)) for c in range(0, channels, subspace)]
    order = torch.tensor([c * taps + t for cut in cuts for t in range(taps) for c in cut])
    weight = conv.weight.detach().double().view(g, o // g, channels * taps)[:, :, order].transpose(1, 2)
    widths = [len(cut) for cut in cuts]
    generator = np.random.default_rng(seed)
    groups = [_Group(weight[i], widths, taps, codewords, generator) for i in range(g)]
    history: list[float] = []
    bias = None if conv.bias is None else conv.bias.detach().double()
    if data is not None:
        history = _correct(groups, data, order, iterations, tolerance)
        means = [data.mean_patch[i][order] @ group.weight() for i, group in enumerate(groups)]
        bias = (data.mean_response - torch.stack(means)).flatten()
    made = torch.stack([group.weight() for group in groups])
    books = torch.zeros(g * len(cuts), codewords, subspace, dtype=torch.float64)
    for number, words in enumerate(words for group in groups for words in group.words):
        books[number, :, : words.shape[1]] = words
    like = conv.weight.detach()
    return Quantisation(
        codebooks=books.to(like),
        assignments=torch.stack([which for group in groups for which in group.which]).to(like.device),
        bias=None if bias is None else bias.to(like),
        weight_error=relative(float((weight - made).square().sum()), float(weight.square().sum())),
        plain_error=history[0] if history else None,
        response_error=min(history) if history else None,
        history=tuple(history),
    )


def _correct(
    groups: list[_Group], data: Moments, order: Tensor, iterations: int, tolerance: float
) -> list[float]:
    """Sweep over the groups' subspaces; return the response error after each sweep, the start first."""
    power = float(data.power.sum())
    works = [_Correction(group, data, i, order) for i, group in enumerate(groups)]
    history = [relative(sum(work.squares for work in works), power)]
    best = [group.copied() for group in groups]
    for _ in range(iterations):
        for work in works:
            work.sweep()
        history.append(relative(sum(work.squares for work in works), power))
        if history[-1] <= min(history):
            best = [group.copied() for group in groups]
        if history[-2] - history[-1] <= tolerance * history[-2]:
            break
    for group, (words, which) in zip(groups, best, strict=True):
        group.words, group.which = words, which
    return history


class _Group:
    """The weight of one channel group as codewords and assignments, initially from k-means.

    Attributes:
        original: W [P, O].
        words: for each subspace [K, width].
        which: for each subspace [taps, O], int64.
        rows: for each subspace the block of W's rows.
    """

    def __init__(
        self, weight: Tensor, widths: list[int], taps: int, codewords: int, generator: np.random.Generator
    ) -> None:
        self.original, self.taps = weight, taps
        self.words: list[Tensor] = []
        self.which: list[Tensor] = []
        self.rows: list[slice] = []
        first = 0
        for width in widths:
            self.rows.append(slice(first, first + taps * width))
            first += taps * width
            # one row for each (tap, output)
            vectors = weight[self.rows[-1]].view(taps, width, -1).transpose(1, 2).reshape(-1, width)
            words, which = _kmeans(vectors, codewords, generator)
            self.words.append(words)
            self.which.append(which.view(taps, -1))

    def block(self, m: int) -> Tensor:
        """Return the rows of the weight for subspace m, [taps width, O]."""
        return self.words[m][self.which[m]].transpose(1, 2).flatten(0, 1)

    def weight(self) -> Tensor:
        """Return W' [P, O]."""
        return torch.cat([self.block(m) for m in range(len(self.words))])

    def copied(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return copies of the current codewords and assignments."""
        return [words.clone() for words in self.words], [which.clone() for which in self.which]


def _kmeans(vectors: Tensor, codewords: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return codewords [K, width] and the codeword index of each vector."""
    from scipy.cluster.vq import kmeans2

    values = vectors.cpu().numpy()
    distinct, inverse = np.unique(values, axis=0, return_inverse=True)
    if len(distinct) <= codewords:
        words = np.zeros((codewords, values.shape[1]))
        words[: len(distinct)] = distinct
        which = inverse.reshape(-1)
    else:
        with warnings.catch_warnings():
            # an unused codeword keeps its place, and the correction may use it
            warnings.filterwarnings("ignore", "One of the clusters is empty", UserWarning)
            words, which = kmeans2(values, codewords, _KMEANS_STEPS, minit="++", seed=generator)
    return torch.from_numpy(words).to(vectors), torch.from_numpy(which.astype(np.int64)).to(vectors.device)


class _Correction:
    """Block coordinate descent on one group's response error.

    Attributes:
        squares: E|y - z|^2, centred, of the current weight.
    """

    def __init__(self, group: _Group, data: Moments, index: int, order: Tensor) -> None:
        self.group = group
        self.gram = data.gram[index][order][:, order]
        self.cross = data.cross[index][order]
        self.power = float(data.power[index])
        size = len(order)
        self.hold = _HOLD * float(self.gram.diagonal().mean()) * size / data.samples
        self.present = group.weight()
        # B - G W', the part that the weight does not explain yet
        self.left = self.cross - self.gram @ self.present

    @property
    def squares(self) -> float:
        return self.power - float((self.present * (self.cross + self.left)).sum())

    def sweep(self) -> None:
        """Sweep once over all subspaces."""
        group = self.group
        for m, rows in enumerate(group.rows):
            own = self.gram[rows, rows] + self.hold * torch.eye(rows.stop - rows.start).to(self.gram)
            # the target of this subspace, with the others fixed
            target = self.left[rows] + self.hold * (group.original[rows] - self.present[rows])
            target = target + own @ self.present[rows]
            words = _solve_words(own, target, group.words[m], group.which[m])
            group.words[m] = words
            group.which[m] = _assign(own, target, words, group.which[m])
            block = group.block(m)
            self.left -= self.gram[:, rows] @ (block - self.present[rows])
            self.present[rows] = block


def _solve_words(gram: Tensor, target: Tensor, words: Tensor, which: Tensor) -> Tensor:
    """Return the least squares codewords for these assignments.

    With S_t the assignments of tap t as [K, O], sum_tt' G_tt' D (S_t' S_t^T) = sum_t R_t S_t^T.
    """
    k, width = words.shape
    taps, outputs = which.shape
    chosen = torch.zeros(taps, k, outputs, dtype=gram.dtype, device=gram.device)
    chosen.scatter_(1, which[:, None, :], 1.0)
    right = torch.einsum("tco,tko->kc", target.view(taps, width, outputs), chosen)
    if taps == 1:
        # codewords are independent: K small systems
        normal = chosen[0].sum(1)[:, None, None] * gram
        residual = (right[:, None] - words[:, None] @ normal)[:, 0, :, None]
        ridge = _RIDGE * float(normal.diagonal(dim1=1, dim2=2).mean()) + torch.finfo(gram.dtype).tiny
        factor = torch.linalg.cholesky(normal + ridge * torch.eye(width).to(gram))
        return words + torch.cholesky_solve(residual, factor)[:, :, 0]
    flat = chosen.view(taps * k, outputs).float()
    together = (flat @ flat.T).to(gram.dtype).view(taps, k, taps, k)
    pairs = together.permute(1, 3, 0, 2).reshape(k * k, taps * taps)
    blocks = gram.view(taps, width, taps, width).permute(0, 2, 1, 3).reshape(taps * taps, width * width)
    normal = (pairs @ blocks).view(k, k, width, width).permute(0, 2, 1, 3).reshape(k * width, k * width)
    ridge = _RIDGE * float(normal.diagonal().mean()) + torch.finfo(gram.dtype).tiny
    residual = right.reshape(-1, 1) - normal @ words.reshape(-1, 1)
    factor = torch.linalg.cholesky(normal + ridge * torch.eye(k * width).to(gram))
    return words + torch.cholesky_solve(residual, factor).view(k, width)


def _assign(gram: Tensor, target: Tensor, words: Tensor, which: Tensor) -> Tensor:
    """Assign the best codeword to each output, one tap after the other."""
    width = words.shape[1]
    which = which.clone()
    left = target - gram @ words[which].transpose(1, 2).flatten(0, 1)
    for t in range(len(which)):
        rows = slice(t * width, (t + 1) * width)
        own, before = gram[rows, rows], words[which[t]].T
        wanted = left[rows] + own @ before
        scores = ((words @ own) * words).sum(1)[:, None] - 2 * words @ wanted
        which[t] = scores.argmin(0)
        left -= gram[:, rows] @ (words[which[t]].T - before)
    return which


def bits_per_weight(found: Quantisation, weights: int) -> float:
    """Return the stored bits of codebooks and assignments per original weight."""
    kind = 8 if found.codebooks.shape[1] <= 256 else 16
    floats = found.codebooks.numel() * torch.finfo(found.codebooks.dtype).bits
    return math.fsum((floats, kind * found.assignments.numel())) / weights
