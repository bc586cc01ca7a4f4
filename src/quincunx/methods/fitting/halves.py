"""Fits the two masked halves of a convolution of low rank: fills and kernels of both, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.layers.separable import EspaceConv2d, SeparableConv2d
from quincunx.methods.fitting.fills import (
    Held,
    conditioner,
    fit_fill,
    fit_perforated,
    keep_better,
    refit_kernel,
)
from quincunx.methods.fitting.moments import relative

__all__ = ["fit_halves"]


@dataclass(frozen=True)
class _Read:
    """Pairs made of other pairs, batch by batch, as often as they are read."""

    pairs: Iterable[tuple[Tensor, Tensor]]
    make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, response in self.pairs:
            # no mode is on where a reader goes on, who may never come back
            with torch.no_grad():
                made = self.make(x, response)
            yield made


@torch.no_grad()
def _error(module: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """E|y - z|^2 / E|y - mean y|^2 of a module's answers z to responses y."""
    squares, power, total, count = 0.0, 0.0, None, 0
    for x, response in pairs:
        wide = response.double()
        squares += float((module(x).double() - wide).square().sum())
        power += float(wide.square().sum())
        added = wide.sum((0, 2, 3))
        total, count = added if total is None else total + added, count + wide[:, 0].numel()
    if total is None:
        raise ValueError("fit_halves: no batch was given")
    return relative(squares, power - float(total.square().sum()) / max(1, count))


def fit_halves(
    module: EspaceConv2d,
    dense: SeparableConv2d,
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    refits: int = 1,
    steps: int = 6,
    positions: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a masked layer of low rank with fitted fills, in place, to (input, response) pairs.

    First the first half's fill and kernel, to that half's own responses; then the second half's, on the
    filled output of the first, to the layer's. Then, in turn, the first half's kernel, given all that stands
    behind it, and the second half's fill and kernel, to the layer's responses. A stage that leaves more error
    than the one before is taken back.

    Args:
        module: has the kernels of ``dense``.
        dense: the layer of low rank without masks.
        pairs: inputs [N, C, H, W] and the responses [N, O, H', W'] wanted; read several times.
        refits, steps, positions, seed: as :func:`quincunx.methods.fitting.fills.fit_perforated` has them.

    Returns:
        A record as that function's, of the whole layer: "stages" begins with the layer of low rank, before
        masks; "nearest_error" is of the second half's nearest fill, where that half skips positions;
        "first_half" is the record of the first half's own fit, where that half does.

    Raises:
        ValueError: no pairs.

    Source: the order of Lin et al., ESPACE (AAAI 2017), sections 3.1 and 3.2, low rank and then masks; fills
        and what follows are this library's.

    Example:
        >>> dense, x = SeparableConv2d(3, 4, 3, rank=4, padding=1), torch.randn(8, 3, 8, 8)
        >>> masks = (qx.CHESSBOARD, qx.CHESSBOARD)
        >>> layer = EspaceConv2d(3, 4, 3, rank=4, padding=1, masks=masks, fill="fitted")
        >>> kept = layer.load_state_dict(dense.state_dict(), strict=False)
        >>> fit_halves(layer, dense, [(x, dense(x).detach())])["stages"][0]
        ['low rank', 0.0]
    """
    pairs = Held(pairs)
    how: dict[str, Any] = {"refits": refits, "steps": steps, "positions": positions, "seed": seed}
    first, second, vertical = module.vertical, module.horizontal, dense.vertical
    own = _Read(pairs, lambda x, _: (x, vertical(x)))
    record: dict[str, Any] = {}
    if first.filling is not None:
        record["first_half"] = fit_perforated(first, vertical, own, **how)

    def read() -> Held:
        return Held(_Read(pairs, lambda x, r: (first(x), r)))

    def fitted(seen: Held) -> float:
        """The error, with the second half's fill fitted anew where it has one."""
        return _error(second, seen) if second.filling is None else fit_fill(second, seen, start).fill

    start = torch.empty(0) if second.filling is None else second.filling.start
    seen = read()
    stages: list[tuple[str, float]] = [("low rank", _error(dense, pairs))]
    if second.filling is None:
        stages.append(("mask", _error(second, seen)))
    else:
        record |= fit_perforated(second, dense.horizontal, seen, **how)
        stages += [(name, error) for name, error in record["stages"]]
    factors: list[Tensor] = []
    if refits:
        factors.append(conditioner(first, vertical, own, positions, seed))
        factors.append(conditioner(second, dense.horizontal, seen, positions, seed))
    for _ in range(refits):
        before = {key: value.clone() for key, value in module.state_dict().items()}
        refit_kernel(first, pairs, factors[0], steps, second)
        seen = read()
        error = fitted(seen)
        if error > stages[-1][1]:
            module.load_state_dict(before)
            break
        stages.append(("first half", error))
        again = partial(refit_kernel, second, seen, factors[1], steps)
        keep_better("together", second, partial(fitted, seen), stages, again)
    return record | {"response_error": stages[-1][1], "stages": [list(stage) for stage in stages]}
