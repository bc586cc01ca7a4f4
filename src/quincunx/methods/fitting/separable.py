r"""Fit a convolution as d x 1 then 1 x d, on its weights only or on data.

With patches ordered (q, j), q = (c, i), a layer of rank K is W[(q, j), n] = sum_k V[q, k] T[j][k, n].
Each channel group is fitted separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quincunx.layers.separable import SeparableConv2d
from quincunx.methods.fitting.moments import Moments, completed, of_noise, relative

__all__ = [
    "Fit",
    "fit_separable",
    "full_rank",
    "kernel_energies",
    "samples_needed",
    "separable",
]


# share of the mean of a normal matrix's diagonal. It pulls towards the previous step, not towards zero, so
# directions that the data does not determine keep their weights, and the error cannot rise
_RIDGE = 1e-9
_CG_STEPS = 6
# samples per unknown; with fewer, a fit is worse on unseen images
_FULL = 8


@dataclass(frozen=True, eq=False)
class Fit:
    """A convolution of low rank.

    Attributes:
        vertical: V [K g, C / g, dh, 1], g being the channel groups.
        horizontal: T [O, K, 1, dw].
        bias: [O] or None.
        rank: K of each group.
        energy: kept share of the PCA energy of the partial responses; see :func:`kernel_energies`.
        response_error: E|y - z|^2 / E|y - mean y|^2 on the data of the fit; None without data.
        history: that error after each iteration, the start first; if samples were missing, with the
            noise added for them.
    """

    vertical: Tensor
    horizontal: Tensor
    bias: Tensor | None
    rank: int
    energy: float
    response_error: float | None = None
    history: tuple[float, ...] = ()


def full_rank(conv: nn.Conv2d) -> int:
    """Return the least K of each group that matches any weight exactly: min(C dh, O dw) / groups."""
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    return min(inputs * conv.kernel_size[0], outputs * conv.kernel_size[1])


def samples_needed(conv: nn.Conv2d, rank: int) -> int:
    """Return the samples, positions of images, of a full fit: max(8 u, 2 C dh dw).

    With u = max(K dw, K dh C / O) + 1, u samples have as many equations as there are unknowns: each output
    has K dw in T, and V has K dh C in total for O responses per position. With eight times as many, and more
    than the directions of a patch, a fit is as good on other images. At full rank nothing is fitted.
    """
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    kh, kw = conv.kernel_size
    unknowns = max(rank * kw, math.ceil(rank * kh * inputs / outputs)) + 1
    return 0 if rank == full_rank(conv) else max(_FULL * unknowns, 2 * inputs * kh * kw)


def _matrices(conv: nn.Conv2d) -> Tensor:
    """Return the weight as [g, q, dw, n] in float64."""
    weight = conv.weight.detach().double()
    o, c, kh, kw = weight.shape
    grouped = weight.reshape(conv.groups, o // conv.groups, c * kh, kw)
    return grouped.permute(0, 2, 3, 1)


def _column_gram(conv: nn.Conv2d, gram: Tensor) -> Tensor:
    """Return the second moments of one column of a patch, averaged over the columns: [g, q, q]."""
    kw = conv.kernel_size[1]
    g, size, _ = gram.shape
    blocks = gram.view(g, size // kw, kw, size // kw, kw)
    return blocks.diagonal(dim1=2, dim2=4).mean(-1)


def kernel_energies(conv: nn.Conv2d, column_gram: Tensor | None = None) -> Tensor:
    r"""Return the PCA energies of a layer's partial responses, falling: [full rank], summed over groups.

    The dw partial responses of a column q of a patch are M^T q, M being the weight as [C dh, dw O];
    their covariance M^T Gamma M has these eigenvalues, and a rank K keeps the K largest. Without data
    Gamma = I, and they are the squared singular values of the weight.

    Args:
        conv: the layer.
        column_gram: Gamma [g, C dh / g, C dh / g].

    Source: Zhang et al., arXiv:1505.06798, section 3.3, for the first half of a separable pair.
    """
    matrix = _matrices(conv).flatten(2)
    rows, columns = matrix.shape[1:]
    if column_gram is not None:
        squares = matrix.transpose(1, 2) @ column_gram.double() @ matrix
    else:
        squares = matrix.transpose(1, 2) @ matrix if rows > columns else matrix @ matrix.transpose(1, 2)
    found = torch.linalg.eigvalsh(squares).flip(-1).clamp_min(0)
    energies: Tensor = found[:, : min(rows, columns)].sum(0)
    return energies


def _singular(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s and V^T of matrices [g, rows, columns], s falling.

    They come from eigenvectors of the smaller Gram matrix. Faster than a singular value decomposition. U s
    V^T equals the matrix up to rounding; values below about 1e-8 of the largest are not exact, and only the
    full rank keeps their directions.
    """
    if matrices.shape[1] > matrices.shape[2]:
        left, values, right = _singular(matrices.transpose(1, 2))
        return right.transpose(1, 2), values, left.transpose(1, 2)
    vectors = torch.linalg.eigh(matrices @ matrices.transpose(1, 2)).eigenvectors.flip(-1)
    scaled = vectors.transpose(1, 2) @ matrices
    values = scaled.norm(dim=2)
    return vectors, values, scaled / values.clamp_min(1e-300)[:, :, None]


def fit_separable(
    conv: nn.Conv2d,
    rank: int,
    data: Moments | None = None,
    *,
    iterations: int = 20,
    tolerance: float = 1e-3,
) -> Fit:
    r"""Return the best convolution of rank K, fitted to the weights only or to data.

    Without data it is the truncated SVD of the weight as [C dh, dw O], which minimises |W - V T|. With data

    .. math:: \min_{V, T, b} E\,|y - T * (V * x) - b|^2

    by alternating least squares from that start: with V fixed, T solves linear equations, and with T fixed,
    so does V (by a few preconditioned conjugate gradients), so the error never rises. If there are fewer
    than n* = :func:`samples_needed` samples, noise replaces the missing ones
    (:func:`quincunx.methods.fitting.moments.completed`), with the responses of W. The error becomes

    .. math:: E\,|y - T * (V * x) - b|^2 + t\,s\,|W - V T|^2, \quad t = n^* / n - 1

    with s the mean variance of an input, so few samples stay close to the weights' own solution.

    Args:
        conv: the layer, with zero padding.
        rank: K, of each channel group; at full rank the weight itself is kept.
        data: moments of the layer's input and of its target responses.
        iterations: the most iterations of both solves; n / n* of them with n samples where n* are needed.
        tolerance: stop when the error falls by a smaller share of itself.

    Raises:
        ValueError: a rank outside 1..full rank.

    Source: Lin et al., ESPACE (AAAI 2017), eqs. 3 and 4; Jaderberg et al., arXiv:1405.3866,
        section 2.2 (filter and data reconstruction).

    Example:
        >>> conv = nn.Conv2d(8, 8, 3)
        >>> exact = separable(conv, fit_separable(conv, full_rank(conv)))
        >>> x = torch.randn(1, 8, 6, 6)
        >>> torch.allclose(exact(x), conv(x), atol=1e-5)
        True
    """
    top = full_rank(conv)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= top:
        raise ValueError(f"rank={rank!r}: expected an integer from 1 to {top}, the full rank of this layer")
    matrices = _matrices(conv)
    g, q, kw, n = matrices.shape
    left, values, right = _singular(matrices.flatten(2))
    energies = values.square().sum(0)
    if data is not None:
        energies = kernel_energies(conv, _column_gram(conv, data.gram))
    total = float(energies.sum())
    energy = float(energies[:rank].sum()) / total if total > 0 else 1.0
    v = left[:, :, :rank] * values[:, None, :rank].sqrt()
    t = (values[:, :rank, None].sqrt() * right[:, :rank]).view(g, rank, kw, n).transpose(1, 2)
    bias = None if conv.bias is None else conv.bias.detach().double()
    history: list[float] = []
    error: float | None = None
    if data is not None:
        if rank < top:
            whole = completed(data, samples_needed(conv, rank), of_noise(matrices.reshape(g, q * kw, n)))
            if whole is not data:
                # it starts near the weights' own solution, so fewer iterations suffice
                iterations = max(2, math.ceil(iterations * data.samples / samples_needed(conv, rank)))
            v, t, history = _alternate(whole, v, t, iterations, tolerance)
            weight = torch.einsum("gqk,gjkn->gqjn", v, t).reshape(g, q * kw, n)
            bias = data.bias(weight).flatten()
            error = history[-1] if whole is data else data.error(weight)
        else:
            error = data.error(matrices.reshape(g, q * kw, n))
            history = [error]
    inputs, kh = conv.in_channels // conv.groups, conv.kernel_size[0]
    like = conv.weight.detach()
    return Fit(
        vertical=v.transpose(1, 2).reshape(g * rank, inputs, kh, 1).to(like),
        horizontal=t.permute(0, 3, 2, 1).reshape(g * n, rank, 1, kw).to(like),
        bias=None if bias is None else bias.to(like),
        rank=rank,
        energy=energy,
        response_error=error,
        history=tuple(history),
    )


# ---------------------------------------------------------------- alternating least squares


def _alternate(
    data: Moments, v: Tensor, t: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, list[float]]:
    """Return V [g, q, K] and T [g, dw, K, n] after the iterations, and the error after each."""
    groups = [_Group(data, i, v[i], t[i]) for i in range(v.shape[0])]
    power = float(data.power.sum())
    history = [relative(sum(group.squares for group in groups), power)]
    for number in range(iterations):
        for group in groups:
            if number:
                group.solve_vertical()
            group.solve_horizontal()
        history.append(relative(sum(group.squares for group in groups), power))
        if number and history[-2] - history[-1] <= tolerance * history[-2]:
            break
    return torch.stack([group.v for group in groups]), torch.stack([group.t for group in groups]), history


class _Group:
    """One channel group's equations and unknowns.

    Attributes:
        squares: E|y - z|^2, centred, of the current V and T.
    """

    def __init__(self, data: Moments, index: int, v: Tensor, t: Tensor) -> None:
        self.v, self.t = v, t
        self.q, self.k = v.shape
        self.kw, _, self.n = t.shape
        blocks = data.gram[index].view(self.q, self.kw, self.q, self.kw)
        # rows (j, q), columns (j', q'): the block of two columns of a patch is a slice
        self.gram = blocks.permute(1, 0, 3, 2).reshape(self.kw * self.q, self.kw * self.q)
        self.coarse = self.gram.float()
        self.cross = data.cross[index].view(self.q, self.kw, self.n).transpose(0, 1).contiguous()
        self.power = float(data.power[index])
        diagonal = blocks.diagonal(dim1=1, dim2=3).sum(-1)
        self.ridge = _RIDGE * float(diagonal.diagonal().mean()) + torch.finfo(torch.float64).tiny
        self.factor = _damped_cholesky(diagonal, self.ridge)
        self.squares = self._squares(*self._reduced())

    def _reduced(self) -> tuple[Tensor, Tensor]:
        """Return A^T G A [dw K, dw K] and A^T B [dw K, n], A being V for each column of a patch."""
        half = (self.gram.view(-1, self.q) @ self.v).view(self.kw, self.q, self.kw * self.k)
        normal = (self.v.T @ half).view(self.kw * self.k, self.kw * self.k)
        return (normal + normal.T) / 2, (self.v.T @ self.cross).view(self.kw * self.k, self.n)

    def _squares(self, normal: Tensor, right: Tensor) -> float:
        t = self.t.reshape(self.kw * self.k, self.n)
        return self.power + float((t * (normal @ t - 2 * right)).sum())

    def solve_horizontal(self) -> None:
        """Set T to the best one for this V: A^T G A T = A^T B."""
        normal, right = self._reduced()
        t = self.t.reshape(self.kw * self.k, self.n)
        ridge = _RIDGE * float(normal.diagonal().mean()) + torch.finfo(torch.float64).tiny
        step = torch.cholesky_solve(right - normal @ t, _damped_cholesky(normal, ridge))
        self.t = (t + step).view(self.kw, self.k, self.n)
        self.squares = self._squares(normal, right)

    def solve_vertical(self) -> None:
        """Improve V for this T: a few conjugate gradients on sum_jj' G_jj' V T_j' T_j^T = sum_j B_j T_j^T.

        First V and T are rotated so that the rows of T are orthonormal. Then the sum of the G_jj, the
        equations without the coupling of columns, is a good preconditioner. The residual at the start
        is in float64 and the correction in float32, as in iterative refinement: half the time, and
        the fixed point is that of float64.
        """
        rows = self.t.transpose(0, 1).reshape(self.k, self.kw * self.n)
        basis, turn = torch.linalg.qr(rows.T)
        self.v = self.v @ turn.T
        self.t = basis.T.reshape(self.k, self.kw, self.n).transpose(0, 1).contiguous()
        right = (self.cross @ self.t.transpose(1, 2)).sum(0)
        products = torch.einsum("akn,bln->akbl", self.t, self.t)
        residual = right - _normal(self.gram, products, self.v)
        scale = float(residual.abs().max())
        if scale == 0:
            return
        residual, products = (residual / scale).float(), products.float()
        delta = torch.zeros_like(residual)
        direction = ready = self._precondition(residual)
        rate = float((residual * ready).sum())
        start = rate
        for _ in range(_CG_STEPS):
            if rate <= 1e-10 * start:
                break
            image = _normal(self.coarse, products, direction) + self.ridge * direction
            length = rate / float((direction * image).sum())
            delta += length * direction
            residual = residual - length * image
            ready = self._precondition(residual)
            previous, rate = rate, float((residual * ready).sum())
            direction = ready + rate / previous * direction
        self.v = self.v + scale * delta.double()

    def _precondition(self, residual: Tensor) -> Tensor:
        return torch.cholesky_solve(residual.double(), self.factor).float()


def _damped_cholesky(matrix: Tensor, ridge: float) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(matrix + ridge * torch.eye(len(matrix)).to(matrix))
    return factor


def _normal(gram: Tensor, products: Tensor, v: Tensor) -> Tensor:
    """Return sum_jj' G_jj' V T_j' T_j^T, [q, K], from G [dw q, dw q] and the products T_j T_j'^T."""
    kw, k = products.shape[:2]
    q = v.shape[0]
    # for each j: stack V T_j' T_j^T over all j', then multiply by G's rows of j
    turned = (v @ products.reshape(kw, k, kw * k)).view(kw, q, kw, k).permute(2, 0, 1, 3)
    rows = gram.view(kw, q, kw * q)
    return (rows @ turned.reshape(kw, kw * q, k)).sum(0)


# ---------------------------------------------------------------- applying


def separable(conv: nn.Conv2d, found: Fit) -> SeparableConv2d:
    """Return the module of a fit, which replaces the fitted layer."""
    module = SeparableConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        rank=found.rank,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=found.bias is not None,
    ).to(found.vertical)
    with torch.no_grad():
        module.vertical.weight.copy_(found.vertical)
        module.horizontal.weight.copy_(found.horizontal)
        if found.bias is not None and module.horizontal.bias is not None:
            module.horizontal.bias.copy_(found.bias)
    return module
