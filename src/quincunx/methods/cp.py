"""CPD: split every convolution into four small ones by a CP decomposition (Lebedev et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from quincunx.layers.separable import CPConv2d
from quincunx.methods.fitting.moments import POSITIONS, moments
from quincunx.methods.fitting.settings import (
    LayerRanks,
    SeparableFit,
    check_integers,
    check_rank_names,
    conv_of,
    conv_settings,
    plain_ranks,
    rank_of,
)
from quincunx.methods.points import Point
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work, each

__all__ = ["CP", "Decomposition", "decompose", "full_cp_rank", "products"]

# components larger than this many times the kernel's norm cancel each other
DEGENERATE = 3.0

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Decomposition:
    r"""A tensor [O, C, dh, dw] as a sum of R products of vectors.

    Attributes:
        factors: A [O, R], B [C, R], V [dh, R], H [dw, R], float64; the four vectors of a component have
            equal norms.
        error: |W - W_R|^2 / |W|^2.
        errors: the error of each start, the SVD's first; None where the iteration broke down.
        largest: the largest norm of a component, over |W|. Components of a good decomposition are no
            larger than their sum; if this is far above 1 they cancel each other, the
            decomposition is degenerate, and training is unstable.
    """

    factors: tuple[Tensor, Tensor, Tensor, Tensor]
    error: float
    errors: tuple[float | None, ...]
    largest: float


def full_cp_rank(shape: Sequence[int]) -> int:
    """Return a rank that matches any tensor of this shape: the product of all sizes except the largest."""
    return math.prod(shape) // max(shape)


def decompose(
    weight: Tensor,
    rank: int,
    *,
    restarts: int = 3,
    iterations: int = 100,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> Decomposition | None:
    r"""Return the best CP decomposition that alternating least squares finds from several starts.

    .. math:: \min_{A, B, V, H} \Big| W_{n,c,i,j} - \sum_{r \le R} A_{n,r} B_{c,r} V_{i,r} H_{j,r} \Big|^2

    Args:
        weight: [O, C, dh, dw].
        rank: R.
        restarts: number of starts: one from the singular vectors of the unfoldings, the others random.
        iterations: the most iterations of each start.
        tolerance: stop when the relative error falls by less.
        seed: of the random starts.

    Returns:
        None if no start gave finite factors: the iteration diverged.

    Raises:
        ImportError: tensorly is not installed.

    Source: Lebedev et al., arXiv:1412.6553, section 3.1; the solver is tensorly's ``parafac``.

    Example:
        >>> a, b, v, h = (torch.randn(n, 2) for n in (6, 5, 3, 3))
        >>> found = decompose(torch.einsum("nr,cr,ir,jr->ncij", a, b, v, h), 2)
        >>> found.error < 1e-10
        True
    """
    tensor = weight.detach().cpu().double().numpy()
    norm = float(np.linalg.norm(tensor))
    if norm == 0:
        zeros = [torch.zeros(size, rank, dtype=torch.float64) for size in tensor.shape]
        return Decomposition((zeros[0], zeros[1], zeros[2], zeros[3]), 0.0, (0.0,), 0.0)
    best: list[Array] | None = None
    errors: list[float | None] = []
    for start in range(restarts):
        factors = _parafac(tensor, rank, start, iterations, tolerance, seed)
        if factors is None:
            errors.append(None)
            continue
        rebuilt = np.einsum("nr,cr,ir,jr->ncij", *factors, optimize=True)
        error = float(np.linalg.norm(tensor - rebuilt) / norm) ** 2
        if best is None or error < min(e for e in errors if e is not None):
            best = factors
        errors.append(error)
    if best is None:
        return None
    norms = [np.linalg.norm(factor, axis=0) for factor in best]
    sizes: Array = np.prod(norms, axis=0)
    # equal norms for the four, so that their gradients have similar sizes
    even = [f / np.where(n > 0, n, 1) * sizes**0.25 for f, n in zip(best, norms, strict=True)]
    a, b, v, h = (torch.from_numpy(factor) for factor in even)
    error = min(e for e in errors if e is not None)
    return Decomposition((a, b, v, h), error, tuple(errors), float(sizes.max()) / norm)


def _parafac(
    tensor: Array, rank: int, start: int, iterations: int, tolerance: float, seed: int
) -> list[Array] | None:
    """Return the four factors; None if the iteration broke down."""
    try:
        import tensorly
        from tensorly import tenalg
        from tensorly.decomposition import parafac
    except ImportError as error:
        raise ImportError("qx.CP needs tensorly: pip install 'quincunx[methods]'") from error
    with (
        tensorly.backend_context("numpy", local_threadsafe=True),
        tenalg.backend_context(_chained(), local_threadsafe=True),
    ):
        try:
            _, factors = parafac(
                tensor,
                rank,
                n_iter_max=iterations,
                tol=tolerance,
                init=(np.ones(rank), _start(tensor, rank, start, seed)),
            )
        except np.linalg.LinAlgError:
            return None
    return list(factors) if all(np.isfinite(factor).all() for factor in factors) else None


@cache
def _chained() -> Any:
    """Return tensorly's algebra with :func:`products` instead of a materialised Khatri-Rao product."""
    from tensorly.tenalg.core_tenalg import CoreTenalgBackend

    class Chained(CoreTenalgBackend, backend_name="quincunx-chained"):  # type: ignore[call-arg, misc]
        unfolding_dot_khatri_rao = staticmethod(products)

    return Chained()


def products(tensor: Array, cp_tensor: tuple[Array | None, Sequence[Array]], mode: int) -> Array:
    """Return a tensor's unfolding times the Khatri-Rao product of all factors but one, for a step of ALS.

    The largest other mode is contracted by a matrix product, which leaves little work for the rest. The
    Khatri-Rao product has a row for each value of a slice: for 512 x 512 x 3 x 3 and rank 921 that
    is 5.8 GB.
    """
    weights, factors = cp_tensor
    largest, *rest = sorted(set(range(tensor.ndim)) - {mode}, key=lambda m: -tensor.shape[m])
    # [rank, the remaining modes]
    found = np.tensordot(factors[largest].T, tensor, (1, largest))
    left = [m for m in range(tensor.ndim) if m != largest]
    for other in rest:
        last = np.moveaxis(found, 1 + left.index(other), -1)
        flat = np.ascontiguousarray(last).reshape(len(last), -1, last.shape[-1])
        found = (flat @ factors[other].T[:, :, None]).reshape(last.shape[:-1])
        left.remove(other)
    return found.T if weights is None else found.T * weights


def _start(tensor: Array, rank: int, start: int, seed: int) -> list[Array]:
    """Return random factors; for the first start, the first columns are singular vectors."""
    generator = np.random.default_rng([seed, start])
    factors = [generator.standard_normal((size, rank)) for size in tensor.shape]
    if start == 0:
        for mode, factor in enumerate(factors):
            unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
            left = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
            factor[:, : left.shape[1]] = left
    return factors


@dataclass(frozen=True)
class CP:
    r"""Splits a convolution into 1 x 1, d x 1 depthwise, 1 x d depthwise and 1 x 1, of CP rank R.

    .. math:: W_{n,c,i,j} \approx \sum_{r \le R} A_{n,r}\, B_{c,r}\, V_{i,r}\, H_{j,r}

    The kernel of each channel group is decomposed separately, on the weights only; calibration data is
    used to report the response error. The decomposition can be degenerate: large components that cancel.
    The network should be trained further, as in the paper, with a small learning rate;
    otherwise it diverges.

    Args:
        rank: R of each group: an integer, a share in (0, 1] of the rank that matches any kernel, which is
            the product of its sizes except the largest, or "full"; an integer is capped at that rank. A
            mapping of patterns to these sets the rank of single layers: the first pattern that matches a name
            counts, and layers without a match are not replaced.
        restarts: starts of the solver, the first from singular vectors, the others random; the one with
            the smallest weight error is taken.
        iterations: the most iterations of each start.
        tolerance: a start stops when its relative error falls by less.
        positions: the most positions of an image over which the response error is summed.
        seed: of the random starts and of the draw of positions.

    Raises:
        ValueError: a rank or count outside its range.
        TypeError: a rank of another type.
        ImportError: at the first use, if tensorly is not installed.

    Source: Lebedev, Ganin, Rakhuba, Oseledets, Lempitsky, arXiv:1412.6553.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
        >>> result = qx.accelerate(net, CP(rank=8, iterations=20))
        >>> result.replaced["0"]["rank"], len(result.replaced["0"]["restart_errors"])
        (8, 3)
    """

    name: ClassVar[str] = "cp"
    saves_bytes: ClassVar[bool] = False

    rank: LayerRanks = 0.25
    _: KW_ONLY
    restarts: int = 3
    iterations: int = 100
    tolerance: float = 1e-8
    positions: int = POSITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", plain_ranks(self.rank))
        check_integers(self, restarts=1, iterations=1, positions=1, seed=0)
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance!r}: expected a positive number")

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that it replaces."""
        return (nn.Conv2d,)

    @classmethod
    def candidates(cls) -> tuple[CP, ...]:
        """Return the settings that a search tries in each layer."""
        return ()

    @classmethod
    def sweep(cls) -> list[Point]:
        """Return the settings for its curve of accuracy against speed."""
        return [Point("CPD", f"rank {share:g}", cls(rank=share)) for share in (0.5, 0.35, 0.2)]

    def label(self, pair: bool = False) -> str:
        """Return its settings in a few words."""
        return f"{self.name}, rank {self.rank}"

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why a layer cannot be split into four, or None."""
        return SeparableFit(self.rank).separable_refusal(layer, with_data=False)

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Return work that replaces each layer separately."""
        check_rank_names(self.rank, layers)
        return each(lambda layer: self._replacement(layer, context))

    def _replacement(self, layer: Layer, context: Context) -> Replacement | str:
        conv = conv_of(layer)
        kernels = conv.weight.detach().chunk(conv.groups)
        rank = rank_of(self.rank, full_cp_rank(kernels[0].shape), layer.name)
        found = []
        for kernel in kernels:
            one = decompose(
                kernel,
                rank,
                restarts=self.restarts,
                iterations=self.iterations,
                tolerance=self.tolerance,
                seed=self.seed,
            )
            if one is None:
                return f"the CP decomposition of rank {rank} diverged from all {self.restarts} starts"
            found.append(one)
        module = _module(conv, rank, found)
        return Replacement(module, module.spec, self._record(layer, context, rank, found))

    def _record(
        self, layer: Layer, context: Context, rank: int, found: list[Decomposition]
    ) -> dict[str, Any]:
        conv = conv_of(layer)
        powers = [float(kernel.double().square().sum()) for kernel in conv.weight.detach().chunk(conv.groups)]
        largest = max(one.largest for one in found)

        def joined(errors: Sequence[float]) -> float:
            squares = sum(error * power for error, power in zip(errors, powers, strict=True))
            return squares / sum(powers) if sum(powers) > 0 else 0.0

        known = [[e for e in one.errors if e is not None] for one in found]
        return {
            "rank": rank,
            "weight_error": joined([one.error for one in found]),
            # from the best start of each group to the worst
            "restart_spread": joined([max(errors) for errors in known]) - joined([min(e) for e in known]),
            "restart_errors": list(found[0].errors) if len(found) == 1 else [list(x.errors) for x in found],
            "diverged_starts": sum(error is None for one in found for error in one.errors),
            "largest_component": largest,
            "degenerate": largest > DEGENERATE,
            "response_error": self._response_error(layer, context, found),
        }

    def _response_error(self, layer: Layer, context: Context, found: list[Decomposition]) -> float | None:
        """Return E|y - z|^2 / E|y - mean y|^2 on the calibration data; None without, or if called twice."""
        if context.calibration is None or (layer.calls or 0) > 1:
            return None
        conv = conv_of(layer)
        seen = moments(conv, context.responses(layer, padded=True), positions=self.positions, seed=self.seed)
        rebuilt = torch.stack(
            [torch.einsum("nr,cr,ir,jr->cijn", *one.factors).flatten(0, 2) for one in found]
        )
        bias = 0 if conv.bias is None else conv.bias.detach().double().view(conv.groups, -1)
        rebuilt = rebuilt.to(seen.gram)
        # the bias is kept, so the means may differ too
        shift = seen.bias(rebuilt) - bias
        power = float(seen.power.sum())
        return seen.error(rebuilt) + (float(shift.square().sum()) / power if power > 0 else 0.0)


def _module(conv: nn.Conv2d, rank: int, found: list[Decomposition]) -> CPConv2d:
    module = CPConv2d(**conv_settings(conv), rank=rank)
    outer, inner, vertical, horizontal = zip(*(one.factors for one in found), strict=True)
    with torch.no_grad():
        module.first.weight.copy_(torch.cat([b.T for b in inner])[:, :, None, None])
        module.spatial.vertical.weight.copy_(torch.cat([v.T for v in vertical])[:, None, :, None])
        module.spatial.horizontal.weight.copy_(torch.cat([h.T for h in horizontal])[:, None, None, :])
        module.last.weight.copy_(torch.cat(list(outer))[:, :, None, None])
        if conv.bias is not None and module.last.bias is not None:
            module.last.bias.copy_(conv.bias)
    return module
