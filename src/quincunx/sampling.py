"""The computed positions of a feature map. Pure geometry: no weights, no values.

A *sampling* names a subset of the H x W positions of a *grid*; m of them are computed and
density = m / (H W). Positions are always listed in row-major order.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = [
    "CHESSBOARD",
    "QUARTER",
    "THREE_QUARTERS",
    "Cosets",
    "EvenGrid",
    "Positions",
    "Random",
    "Sampling",
    "Uniform",
    "constant",
    "from_spec",
    "parse",
    "undisturbed",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Sampling(ABC):
    r"""A rule for the computed positions of an H x W grid.

    Samplings are immutable and hashable, so that plans can be cached by them, and have a JSON
    form (``spec``) from which :func:`from_spec` rebuilds them.
    """

    kind: ClassVar[str]
    spec: str
    """A JSON text that :func:`from_spec` turns back into an equal sampling."""

    @abstractmethod
    def mask(self, height: int, width: int) -> Tensor:
        """Return the computed positions as a BoolTensor [H, W], a new tensor at each call.

        Raises:
            ValueError: the grid is empty, or does not fit this sampling.
        """

    def positions(self, height: int, width: int) -> Tensor:
        """Return the computed positions as a LongTensor [m, 2] of (row, column), in row-major order."""
        return self.mask(height, width).nonzero()

    @abstractmethod
    def count(self, height: int, width: int) -> int:
        """Return the number m of computed positions on an H x W grid; makes no tensor, for compilers."""

    @property
    @abstractmethod
    def density(self) -> float:
        """Return m / (H W), in (0, 1]; exact for positions, the limit for large grids for rules."""

    def _describe(self, **fields: Any) -> None:
        """Store the JSON form: operators pass it at every call, so it is made once."""
        object.__setattr__(self, "spec", json.dumps({"kind": self.kind, **fields}))


def _check_grid(height: int, width: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name}={value}: a grid needs at least one row and one column")


def _check_rate(rate: float) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"rate={rate!r}: expected a number in (0, 1]")
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate!r}: expected a number in (0, 1]")


@dataclass(frozen=True)
class Cosets(Sampling):
    r"""A union of cosets of the lattice of period K.

    .. math:: \{(w, h) : \exists (a, b) \in \text{offsets},\; w \equiv a,\; h \equiv b \pmod K\}

    ``a`` is the column's residue and ``b`` the row's (the paper's order).

    Args:
        period: K >= 2.
        offsets: pairs (a, b), each in [0, K); order and repetition do not matter.

    Raises:
        ValueError: K < 2, no offsets, or an offset outside [0, K).
        TypeError: K or an offset is not an integer.

    Source: Peng et al., arXiv:1809.02601, section 3.2.

    Example:
        >>> Cosets(2, [(0, 0), (1, 1)]).mask(2, 4).int().tolist()
        [[1, 0, 1, 0], [0, 1, 0, 1]]
    """

    period: int
    offsets: tuple[tuple[int, int], ...]
    kind: ClassVar[str] = "cosets"

    def __init__(self, period: int, offsets: Iterable[tuple[int, int]]) -> None:
        if isinstance(period, bool) or not isinstance(period, int):
            raise TypeError(f"period={period!r}: expected an integer >= 2")
        if period < 2:
            raise ValueError(f"period={period}: expected an integer >= 2")
        if not isinstance(offsets, Iterable):
            raise TypeError(f"offsets={offsets!r}: expected pairs (a, b) of integers")
        kept: set[tuple[int, int]] = set()
        for pair in offsets:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"offsets: expected pairs (a, b) of integers, got {pair!r}")
            a, b = pair
            if any(isinstance(v, bool) or not isinstance(v, int) for v in (a, b)):
                raise TypeError(f"offsets: expected pairs (a, b) of integers, got {pair!r}")
            if not (0 <= a < period and 0 <= b < period):
                raise ValueError(f"offsets: ({a}, {b}) is outside [0, {period}) x [0, {period})")
            kept.add((a, b))
        if not kept:
            raise ValueError("offsets=(): an empty sampling computes nothing; give at least one coset")
        object.__setattr__(self, "period", period)
        object.__setattr__(self, "offsets", tuple(sorted(kept)))
        self._describe(period=period, offsets=[list(offset) for offset in self.offsets])

    def _check_fits(self, height: int, width: int) -> None:
        _check_grid(height, width)
        if height < self.period or width < self.period:
            raise ValueError(
                f"grid {height} x {width}: smaller than the sampling's period K={self.period}, "
                "so a coset may be empty"
            )

    def mask(self, height: int, width: int) -> Tensor:
        self._check_fits(height, width)
        mask = torch.zeros(height, width, dtype=torch.bool)
        for a, b in self.offsets:
            mask[b :: self.period, a :: self.period] = True
        return mask

    def count(self, height: int, width: int) -> int:
        self._check_fits(height, width)
        k = self.period
        return sum(((height - b + k - 1) // k) * ((width - a + k - 1) // k) for a, b in self.offsets)

    @property
    def density(self) -> float:
        return len(self.offsets) / self.period**2


@dataclass(frozen=True)
class Random(Sampling):
    r"""``max(1, round(rate H W))`` positions drawn uniformly without replacement.

    The draw depends only on the seed and on the grid's size, and is the same on every platform.

    Args:
        rate: share of positions to compute, in (0, 1].
        seed: of the draw, 0 <= seed < 2**63.

    Raises:
        ValueError: rate outside (0, 1] or a negative seed.
        TypeError: rate is not a number or seed not an integer.

    Source: Lin et al., ESPACE (AAAI 2017), random mask.

    Example:
        >>> Random(0.25, seed=1).count(8, 8)
        16
    """

    rate: float
    seed: int = 0
    kind: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed={self.seed!r}: expected an integer")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: expected 0 <= seed < 2**63")
        self._describe(rate=self.rate, seed=self.seed)

    def mask(self, height: int, width: int) -> Tensor:
        _check_grid(height, width)
        total = height * width
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(total, generator=generator, dtype=torch.float64).argsort(stable=True)
        mask = torch.zeros(total, dtype=torch.bool)
        mask[order[: self.count(height, width)]] = True
        return mask.view(height, width)

    def count(self, height: int, width: int) -> int:
        _check_grid(height, width)
        return _share(self.rate, int(height), int(width))

    @property
    def density(self) -> float:
        return float(self.rate)


UNIFORM_RULES = ("even", "eq8")


@dataclass(frozen=True)
class Uniform(Sampling):
    r"""Evenly spread rows times evenly spread columns, with one of two rules.

    ``"even"`` covers the grid to its borders:

    .. math:: \{\lfloor (i + \tfrac12) H / H_s \rfloor\}_{i < H_s} \times
              \{\lfloor (j + \tfrac12) W / W_s \rfloor\}_{j < W_s}

    with the integers H_s, W_s for which H_s W_s is nearest to rate H W, with the spacing of rows and
    columns as equal as that allows.

    ``"eq8"`` is the paper's rule, with m = max(1, round(rate H W)) and positions counted from 1:

    .. math:: \{a, 2 a, \ldots, s a\} \times \{b, 2 b, \ldots, s b\}, \quad
              s = \lfloor \sqrt m \rfloor,\; a = \lfloor H / \sqrt m \rfloor,\;
              b = \lfloor W / \sqrt m \rfloor

    It has s^2 <= m positions and leaves a margin below and on the right if a division has a remainder. At
    rates above 1/4 a square grid has a = b = 1, and all positions lie in its upper left corner.

    Args:
        rate: wanted share of positions, in (0, 1]. The share reached is H_s W_s / (H W), or s^2 / (H W).
        rule: "even" or "eq8".

    Raises:
        ValueError: rate outside (0, 1], another rule; with "eq8" a grid lower or narrower than
            sqrt(m), for which the formula gives no positions.
        TypeError: rate is not a number.

    Source: Lin et al., ESPACE (AAAI 2017), eq. 8; "even" is our own rule.

    Example:
        >>> Uniform(0.25).count(8, 8)
        16
        >>> Uniform(0.2, rule="eq8").positions(5, 7).tolist()
        [[0, 1], [0, 3], [1, 1], [1, 3]]
    """

    rate: float
    rule: str = "even"
    kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if self.rule not in UNIFORM_RULES:
            raise ValueError(f"rule={self.rule!r}: expected one of {', '.join(UNIFORM_RULES)}")
        self._describe(rate=self.rate, rule=self.rule)

    def mask(self, height: int, width: int) -> Tensor:
        _check_grid(height, width)
        mask = torch.zeros(height, width, dtype=torch.bool)
        if self.rule == "eq8":
            side, down, across = _eq8(self.rate, int(height), int(width))
            mask[down - 1 : side * down : down, across - 1 : side * across : across] = True
            return mask
        rows, cols = _even_counts(self.rate, int(height), int(width))
        at_rows = torch.tensor([(2 * i + 1) * height // (2 * rows) for i in range(rows)])
        at_cols = torch.tensor([(2 * j + 1) * width // (2 * cols) for j in range(cols)])
        mask[at_rows[:, None], at_cols[None, :]] = True
        return mask

    def count(self, height: int, width: int) -> int:
        _check_grid(height, width)
        if self.rule == "eq8":
            return _eq8(self.rate, int(height), int(width))[0] ** 2
        rows, cols = _even_counts(self.rate, int(height), int(width))
        return rows * cols

    @property
    def density(self) -> float:
        return float(self.rate)


def _share(rate: float, height: int, width: int) -> int:
    """Return the number of positions for a rate on a grid."""
    return max(1, round(rate * height * width))


def _eq8(rate: float, height: int, width: int) -> tuple[int, int, int]:
    """Return the side s and the steps a and b of eq. 8 exactly: floor(H / sqrt(m)) = isqrt(H^2 // m)."""
    m = _share(rate, height, width)
    side, down, across = math.isqrt(m), math.isqrt(height**2 // m), math.isqrt(width**2 // m)
    if min(down, across) < 1:
        raise ValueError(
            f"grid {height} x {width}: eq. 8 has no positions at rate={rate:g} on a grid lower or narrower "
            f"than sqrt(m), m={m}; rule='even' has"
        )
    return side, down, across


@lru_cache(maxsize=4096)
def _even_counts(rate: float, height: int, width: int) -> tuple[int, int]:
    """Return the numbers of rows and columns whose product is nearest to rate H W.

    A relative error of the count weighs ten times as much as the logarithm of the spacings' ratio.
    """
    wanted = max(1.0, rate * height * width)
    best: tuple[float, int, int] | None = None
    for rows in range(1, height + 1):
        for cols in {min(width, max(1, math.floor(wanted / rows))), min(width, math.ceil(wanted / rows))}:
            count_error = abs(rows * cols - wanted) / wanted
            spacing_error = abs(math.log((height / rows) / (width / cols)))
            candidate = (count_error + 0.1 * spacing_error, rows, cols)
            if best is None or candidate < best:
                best = candidate
    if best is None:
        raise ValueError(f"grid {height} x {width}: a grid needs at least one row and one column")
    return best[1], best[2]


# the descriptive name; the older one is kept
EvenGrid = Uniform


class Positions(Sampling):
    """An explicit set of positions on one grid, such as an impact mask of ESPACE.

    Args:
        mask: BoolTensor [H, W] (or a value that ``torch.as_tensor`` converts to one); copied.

    Raises:
        ValueError: the mask is not 2-D or has no position; a grid of another size is requested.
        TypeError: the mask is not boolean.

    Example:
        >>> Positions(torch.eye(3, dtype=torch.bool)).positions(3, 3).tolist()
        [[0, 0], [1, 1], [2, 2]]
    """

    kind: ClassVar[str] = "positions"

    def __init__(self, mask: Any) -> None:
        tensor = torch.as_tensor(mask)
        if tensor.dtype != torch.bool:
            raise TypeError(f"mask: expected a boolean tensor, got dtype {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"mask: expected [H, W], got shape {tuple(tensor.shape)}")
        if not bool(tensor.any()):
            raise ValueError("mask: holds no position; an empty sampling computes nothing")
        bits = "".join("1" if v else "0" for v in tensor.detach().cpu().flatten().tolist())
        # one hexadecimal digit holds four positions, the last one padded with zeros
        digits = f"{int(bits + '0' * (-len(bits) % 4), 2):0{(len(bits) + 3) // 4}x}"
        self._set((int(tensor.shape[0]), int(tensor.shape[1])), digits)

    def _set(self, size: tuple[int, int], digits: str) -> None:
        self._size, self._bits = size, digits
        self._describe(size=list(size), bits=digits)

    @classmethod
    def _from_digits(cls, size: Sequence[int], digits: str) -> Positions:
        """Return the sampling of a spec's fields, without a tensor: compilers and meta devices replace those.

        Raises:
            ValueError: a size that is not two positive integers, or digits that are no such mask.
        """
        height, width = size
        _check_grid(height, width)
        if len(digits) != (height * width + 3) // 4:
            raise ValueError(f"bits: {len(digits)} digits for a grid of {height} x {width}")
        bits = int(digits, 16)
        if bits < 1:
            raise ValueError("bits: hold no position; an empty sampling computes nothing")
        if bits & ((1 << -height * width % 4) - 1):
            raise ValueError("bits: a position beyond the grid's end")
        made = cls.__new__(cls)
        made._set((height, width), f"{bits:0{len(digits)}x}")
        return made

    @property
    def size(self) -> tuple[int, int]:
        """The grid (H, W) of these positions."""
        return self._size

    def _check_fits(self, height: int, width: int) -> None:
        if (height, width) != self._size:
            raise ValueError(
                f"grid {height} x {width}: these positions belong to a grid of "
                f"{self._size[0]} x {self._size[1]}"
            )

    def count(self, height: int, width: int) -> int:
        self._check_fits(height, width)
        return int(self._bits, 16).bit_count()

    def mask(self, height: int, width: int) -> Tensor:
        self._check_fits(height, width)
        bits = f"{int(self._bits, 16):0{4 * len(self._bits)}b}"[: height * width]
        return torch.tensor([b == "1" for b in bits]).view(height, width)

    @property
    def density(self) -> float:
        return self.count(*self._size) / (self._size[0] * self._size[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Positions) and self._size == other._size and self._bits == other._bits

    def __hash__(self) -> int:
        return hash((self._size, self._bits))

    def __repr__(self) -> str:
        height, width = self._size
        return f"Positions({self.count(height, width)} of {height} x {width})"


QUARTER = Cosets(2, [(0, 0)])
CHESSBOARD = Cosets(2, [(0, 0), (1, 1)])
THREE_QUARTERS = Cosets(2, [(0, 0), (0, 1), (1, 1)])

_NAMED = {
    "1/4": QUARTER,
    "2/4": CHESSBOARD,
    "3/4": THREE_QUARTERS,
    "quarter": QUARTER,
    "chessboard": CHESSBOARD,
    "three-quarters": THREE_QUARTERS,
}


def constant(function: F) -> F:
    """Mark a function whose result ``torch.compile`` takes as it is, instead of following its steps."""
    # torch.compiler.assume_constant_result, without its import of all of torch._dynamo
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def undisturbed(make: Callable[[], T]) -> T:
    """Return what ``make`` returns where none of torch's modes is on: they belong to a thread.

    A compiler that follows a forward has tensors without values in place of all that are made; a table of
    positions must have values, and is kept for later calls.

    Example:
        >>> from torch._subclasses import FakeTensorMode
        >>> with FakeTensorMode():
        ...     undisturbed(lambda: QUARTER.positions(2, 4).tolist())
        [[0, 0], [0, 2]]
    """
    with ThreadPoolExecutor(max_workers=1) as apart:
        return apart.submit(make).result()


@lru_cache(maxsize=4096)
def from_spec(spec: str) -> Sampling:
    """Return the sampling that a JSON text from ``Sampling.spec`` describes.

    Raises:
        ValueError: the text is not such a description.

    Example:
        >>> from_spec(CHESSBOARD.spec) == CHESSBOARD
        True
    """
    try:
        fields = json.loads(spec)
        kind = fields["kind"]
        if kind == Cosets.kind:
            return Cosets(fields["period"], [(a, b) for a, b in fields["offsets"]])
        if kind == Random.kind:
            return Random(fields["rate"], fields["seed"])
        if kind == Uniform.kind:
            # specs from before there were two rules have none
            return Uniform(fields["rate"], fields.get("rule", "even"))
        if kind == Positions.kind:
            return Positions._from_digits(fields["size"], fields["bits"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"spec={spec!r}: not the description of a sampling ({error})") from error
    raise ValueError(f"spec={spec!r}: unknown kind {kind!r}")


def parse(text: str | Sampling) -> Sampling:
    """Return the sampling that a user's text names.

    ``1/4``, ``2/4``, ``3/4`` (or ``quarter``, ``chessboard``, ``three-quarters``),
    ``cosets:K:a,b;a,b``, ``random:RATE[:SEED]``, ``uniform:RATE[:eq8]``, or a ``spec``.

    Raises:
        ValueError: the text is none of these.

    Example:
        >>> parse("cosets:3:0,0;1,2").density
        0.2222222222222222
    """
    if isinstance(text, Sampling):
        return text
    if not isinstance(text, str):
        raise TypeError(f"sampling={text!r}: expected a sampling or its name")
    named = _NAMED.get(text.strip().lower())
    if named is not None:
        return named
    if text.lstrip().startswith("{"):
        return from_spec(text)
    cosets = re.fullmatch(r"cosets:(\d+):(-?\d+,-?\d+(?:;-?\d+,-?\d+)*)", text)
    random = re.fullmatch(r"random:([\d.eE+-]+)(?::(\d+))?", text)
    uniform = re.fullmatch(r"uniform:([\d.eE+-]+)(?::(\w+))?", text)
    try:
        if cosets is not None:
            pairs = [tuple(map(int, pair.split(","))) for pair in cosets[2].split(";")]
            return Cosets(int(cosets[1]), [(a, b) for a, b in pairs])
        if random is not None:
            return Random(float(random[1]), int(random[2] or 0))
        if uniform is not None:
            return Uniform(float(uniform[1]), uniform[2] or "even")
    except ValueError as error:
        raise ValueError(f"sampling={text!r}: {error}") from error
    raise ValueError(
        f"sampling={text!r}: expected one of {', '.join(_NAMED)}, cosets:K:a,b;a,b, "
        "random:RATE[:SEED] or uniform:RATE[:eq8]"
    )
