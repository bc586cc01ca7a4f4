"""Tiles for the GPU kernels: from a table of measurements on a card, else from a rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch

from quincunx.ops.triton.layouts import Layout
from quincunx.writing import cache_folder, write_json

__all__ = [
    "Config",
    "architecture",
    "candidates",
    "for_gemm",
    "for_weight",
    "keep",
    "key_of",
    "power",
    "processors",
    "weight_candidates",
]

# a tap's row indices are loaded before the rows, so Triton gives a load two of its stages
_STAGES = (5, 7)
# bytes of shared memory besides those of the loads
_BESIDE = 2048
_TABLE = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Config:
    """The configuration of one kernel.

    Attributes:
        rows: positions of a tile (output channels for a weight's gradient).
        columns: output channels of a tile (input channels for a weight's gradient).
        depth: input channels of a step (positions for a weight's gradient).
        warps: as in Triton.
        stages: as in Triton.
        split: parts of a sum, which are added up afterwards.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    split: int = 1


def power(value: int) -> int:
    """Return the smallest power of two that is not smaller, and at least 16: a valid side of a tile."""
    return max(16, 1 << (max(1, value) - 1).bit_length())


def _log2(value: int) -> int:
    return max(0, value.bit_length() - 1)


@lru_cache(maxsize=8)
def processors(index: int | None) -> int:
    """Return the least number of thread blocks that a card runs in parallel."""
    if index is None:
        return 132
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@lru_cache(maxsize=8)
def _shared_of(index: int | None) -> int:
    if index is None:
        return 99 * 1024
    return int(getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 99 * 1024))


def _shared_memory() -> int:
    """Return the bytes that a block's loads may use on the current card."""
    return _shared_of(_card()) - _BESIDE


def _card() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


@lru_cache(maxsize=8)
def architecture(index: int | None) -> str:
    """Return a card's name in the table, such as "sm_90"; empty without a card."""
    if index is None:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=8)
def _tuned(card: str) -> dict[str, list[int]]:
    """Return the measurements for a card's architecture: the shipped table, overridden by local tuning."""
    table: dict[str, list[int]] = {}
    for path in (_TABLE, _kept_at(card)):
        if path is not None and path.exists():
            table.update(json.loads(path.read_text())["tables"].get(card, {}))
    return table


def _kept_at(card: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"tiles-{card}.json"


def keep(card: str, best: dict[str, Config]) -> Path:
    """Store measurements of this machine; later calls use them.

    Returns:
        The file.

    Raises:
        ValueError: caching is off (QUINCUNX_CACHE is empty).
    """
    path = _kept_at(card)
    if path is None:
        raise ValueError("QUINCUNX_CACHE='': there is no folder to keep tiles in; name one, or unset it")
    table = json.loads(path.read_text())["tables"].get(card, {}) if path.exists() else {}
    table.update({key: list(astuple(config)) for key, config in best.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"tables": {card: table}})
    _tuned.cache_clear()
    return path


def key_of(kind: str, dtype: torch.dtype, rows: int, taps: int, inner: int, outer: int) -> str:
    """Return a shape's key in the table; rows are rounded to powers of two, so that batches share it."""
    width = torch.finfo(dtype).bits
    return f"{kind} {width} bits, 2^{_log2(rows)} rows, {taps} taps, {inner} to {outer}"


def _found(key: str) -> Config | None:
    entry = _tuned(architecture(_card())).get(key)
    return None if entry is None else Config(*entry)


def for_gemm(dtype: torch.dtype, batch: int, inner: int, outer: int, groups: int, layout: Layout) -> Config:
    """Return the tiles of a gather GEMM."""
    points = sum(points for points, _ in layout.shape)
    taps = max(taps for _, taps in layout.shape)
    kind = "affine" if layout.affine else "table"
    found = _found(key_of(kind, dtype, batch * points, taps, inner, outer))
    return found or _ruled(dtype, batch, inner, outer, groups, layout, processors(_card()))


def _ruled(
    dtype: torch.dtype, batch: int, inner: int, outer: int, groups: int, layout: Layout, processors: int
) -> Config:
    """Choose large tiles while they fill the card, then smaller ones, then split sums."""
    half = torch.finfo(dtype).bits == 16
    depth = min(64 if half else 32, power(inner))
    columns = min(128, power(outer))
    taps = max(1, max(taps for _, taps in layout.shape))

    def tiles(rows: int, columns: int) -> int:
        over = sum(-(-batch * points // rows) for points, _ in layout.shape)
        return over * -(-outer // columns) * groups

    rows = 128
    while rows > 32 and tiles(rows, columns) < processors:
        rows //= 2
    while columns > 32 and tiles(rows, columns) < processors:
        columns //= 2
    steps = taps * -(-inner // depth)
    split = 1
    while tiles(rows, columns) * split * 2 <= processors and steps // (split * 2) >= 4:
        split *= 2
    warps = 4 if rows * columns >= 64 * 64 else 2
    return Config(rows, columns, depth, warps, 5, split)


def for_weight(
    dtype: torch.dtype, batch: int, points: int, taps: int, inner: int, outer: int, groups: int
) -> Config:
    """Return the tiles of a weight's gradient; its sum has as many parts as fill the card twice."""
    found = _found(key_of("weight", dtype, batch * points, taps, inner, outer))
    if found is not None:
        return found
    half = torch.finfo(dtype).bits == 16
    rows, columns = min(128, power(outer)), min(64 if outer > 64 else 128, power(inner))
    depth = min(64 if half else 32, power(points))
    tiles = -(-outer // rows) * -(-inner // columns) * taps * groups
    most = -(-points // depth) * max(1, batch // 8)
    split = max(1, min(most, 2 * processors(_card()) // tiles))
    return Config(rows, columns, depth, 4, 3, split)


def candidates(
    dtype: torch.dtype, points: Sequence[int], taps: int, inner: int, outer: int, count: int
) -> list[Config]:
    """Return configurations to try for a gather GEMM; if tiles are few, also smaller ones and split sums.

    Args:
        dtype: of the maps.
        points: positions of each class, all images together.
        taps: of the kernel.
        inner: input channels of a group.
        outer: output channels of a group.
        count: the card's processors.
    """
    size = torch.finfo(dtype).bits // 8
    depths = sorted({min(depth, power(inner)) for depth in ((64, 128) if size == 2 else (32, 64))})
    widths = sorted({min(columns, power(outer)) for columns in (32, 64, 128, 256)})
    found = []
    # a long step is only tried with long sums, unless it is the shortest
    depths = [depth for depth in depths if depth == depths[0] or inner >= 2 * depth]
    for rows, columns, depth in product((32, 64, 128, 256), widths, depths):
        area = rows * columns
        tiles = sum(-(-n // rows) for n in points) * -(-outer // columns)
        few = tiles < 2 * count
        small = rows == 32 or columns < min(64, outer)
        if area > 128 * 256 or (small and not few) or (few and area > 64 * 128):
            continue
        warps = 8 if area > 128 * 128 else 4 if area > 1024 else 2
        splits = [1] + [n for n in (2, 4, 8) if tiles * n <= 2 * count and taps * inner // depth >= 4 * n]
        for stages, split in product(_STAGES, splits):
            # one of two stages holds the loads whose rows are not yet known
            fits = (rows + columns) * depth * size * ((stages + 1) // 2) <= _shared_memory()
            if fits and (split == 1 or stages == _STAGES[0]):
                found.append(Config(rows, columns, depth, warps, stages, split))
    return found


def weight_candidates(
    dtype: torch.dtype, batch: int, points: int, taps: int, inner: int, outer: int, count: int
) -> list[Config]:
    """Return configurations to try for a weight's gradient; ``count`` as in :func:`candidates`."""
    size = torch.finfo(dtype).bits // 8
    found = []
    sides = sorted({min(side, power(outer)) for side in (64, 128)})
    widths = sorted({min(side, power(inner)) for side in (64, 128)})
    depths = sorted({min(depth, power(points)) for depth in (32, 64)})
    for rows, columns, depth in product(sides, widths, depths):
        tiles = -(-outer // rows) * -(-inner // columns) * taps
        most = -(-points // depth) * batch
        splits = sorted({max(1, min(most, fill * count // tiles)) for fill in (1, 2, 4)})
        for stages, split in product((3, 4), splits):
            if (rows + columns) * depth * size * stages <= _shared_memory():
                found.append(Config(rows, columns, depth, 4, stages, split))
    return found
