"""Find the fastest tiles of the GPU kernels on this card: measured when asked for, kept on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

from quincunx.fusion.launches import gpu_seconds
from quincunx.measure.environment import environment
from quincunx.ops.geometry import Geometry
from quincunx.ops.triton.configs import (
    Config,
    architecture,
    candidates,
    keep,
    key_of,
    processors,
    weight_candidates,
)
from quincunx.ops.triton.layouts import Layout, adjoint_layout, forward_layout, weight_table
from quincunx.sampling import CHESSBOARD, QUARTER, Cosets, Random, from_spec

__all__ = ["SHAPES", "Problem", "best_tiles", "cases", "tune"]

# channels and side of the maps
SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
_SAME = Geometry((3, 3), padding=(1, 1, 1, 1))
_POINT = Geometry((1, 1))


@dataclass(frozen=True)
class Problem:
    """A convolution to find tiles for.

    Attributes:
        what: "dense", "conv", "transpose" or "weight".
        spec: of the sampling; empty for a dense convolution.
    """

    what: str
    spec: str
    geometry: Geometry
    dtype: str
    batch: int
    inner: int
    outer: int
    side: int

    @property
    def name(self) -> str:
        return (
            f"{self.what} {self.geometry.kernel[0]} x {self.geometry.kernel[1]}, {self.inner} to "
            f"{self.outer}, {self.side}^2, batch {self.batch}, {self.dtype}, {self._where}"
        )

    @property
    def _where(self) -> str:
        sampling = from_spec(self.spec) if self.spec else None
        if isinstance(sampling, Cosets):
            return f"{len(sampling.offsets)} of {sampling.period**2} cosets"
        return "every position" if sampling is None else f"density {sampling.density:g}"

    def layout(self, device: torch.device) -> Layout:
        if self.what == "transpose":
            return adjoint_layout(self.spec, self.geometry, self.side, self.side, device)
        return forward_layout(self.spec, self.geometry, self.side, self.side, None, device)

    def key(self, device: torch.device) -> str:
        dtype = getattr(torch, self.dtype)
        if self.what == "weight":
            _, points = weight_table(self.spec, self.geometry, self.side, self.side, device)
            taps = self.geometry.kernel[0] * self.geometry.kernel[1]
            return key_of("weight", dtype, self.batch * points, taps, self.inner, self.outer)
        layout = self.layout(device)
        rows = self.batch * sum(points for points, _ in layout.shape)
        taps = max(taps for _, taps in layout.shape)
        kind = "affine" if layout.affine else "table"
        return key_of(kind, dtype, rows, taps, self.inner, self.outer)

    def kernel(self, device: torch.device) -> tuple[Any, ...]:
        """Return everything besides the tiles that the compiled kernel depends on."""
        how = self.what if self.what in ("weight", "transpose") else "conv"
        affine = self.what != "weight" and self.layout(device).affine
        return how, affine, self.dtype, self.inner, self.outer

    def configs(self, device: torch.device) -> list[Config]:
        dtype = getattr(torch, self.dtype)
        if self.what == "weight":
            _, computed = weight_table(self.spec, self.geometry, self.side, self.side, device)
            taps = self.geometry.kernel[0] * self.geometry.kernel[1]
            many = processors(device.index)
            return weight_candidates(dtype, self.batch, computed, taps, self.inner, self.outer, many)
        layout = self.layout(device)
        points = tuple(self.batch * points for points, _ in layout.shape)
        taps = max(taps for _, taps in layout.shape)
        return candidates(dtype, points, taps, self.inner, self.outer, processors(device.index))

    def runner(self, device: torch.device) -> Callable[[Config], object]:
        """Return the convolution on random maps as a function of its tiles."""
        launch = import_module("quincunx.ops.triton.launch")
        dtype = getattr(torch, self.dtype)

        def made(*shape: int) -> Tensor:
            t = torch.randn(shape, device=device).to(dtype)
            return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

        kernel = self.geometry.kernel
        dense = made(self.batch, self.inner, self.side, self.side)
        if self.what == "weight":
            table, points = weight_table(self.spec, self.geometry, self.side, self.side, device)
            y = made(self.batch, self.outer, points, 1)
            return lambda config: launch.derive_weight(dense, y, kernel, table, points, 1, config)
        layout, bias = self.layout(device), made(self.outer)
        if self.what == "transpose":
            y, weight = made(self.batch, self.inner, layout.in_rows, 1), made(self.inner, self.outer, *kernel)
            other = made(self.batch, self.outer, self.side, self.side)
            return lambda config: launch.convolve(
                y, weight, bias, layout, 1, transposed=True, residual=other, activation=1, config=config
            )
        weight = made(self.outer, self.inner, *kernel)
        return lambda config: launch.convolve(dense, weight, bias, layout, 1, activation=1, config=config)


def cases(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    batches: Sequence[int] = (16, 64, 256),
    dtype: str = "bfloat16",
    train: bool = False,
) -> Iterator[Problem]:
    """Yield the 3 x 3 convolutions of the usual stages: dense, both halves of blocks, masks."""
    for (channels, side), batch in product(shapes, batches):
        make = partial(Problem, dtype=dtype, batch=batch, inner=channels, outer=channels, side=side)
        yield make("dense", "", _SAME)
        for sampling in (CHESSBOARD, QUARTER):
            yield make("conv", sampling.spec, _SAME)
            yield make("transpose", sampling.spec, _SAME)
            if train:
                yield make("weight", sampling.spec, _SAME)
        yield make("conv", Random(0.5, 0).spec, _SAME)


def tune(
    wanted: Sequence[Problem],
    device: torch.device,
    *,
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time every candidate of every case, and keep the fastest for this card; JSON-ready.

    Args:
        wanted: the cases; if several share a place in the table the first is measured.
        device: the card.
        jobs: processes that compile beforehand; by default one per core, less two.
        progress: called with the case, how many are done and how many there are.
    """
    unique: dict[str, Problem] = {}
    for case in wanted:
        unique.setdefault(case.key(device), case)
    _compile(list(unique.values()), device, jobs)
    rows = []
    best: dict[str, Config] = {}
    for number, (key, case) in enumerate(unique.items()):
        progress(case.name, number, len(unique))
        run = case.runner(device)
        seconds: list[tuple[float, Config]] = []
        failed = []
        for config in case.configs(device):
            taken = _seconds(partial(run, config))
            if isinstance(taken, float):
                seconds.append((taken, config))
            else:
                failed.append({**asdict(config), "reason": taken})
        if seconds:
            seconds.sort(key=lambda found: found[0])
            best[key] = seconds[0][1]
        rows.append(
            {
                "case": case.name,
                "key": key,
                "tried": [{**asdict(c), "seconds": float(f"{s:.4g}")} for s, c in seconds],
                "failed": failed,
            }
        )
    path = keep(architecture(device.index), best)
    return {
        "schema": 1,
        "kind": "tune",
        "architecture": architecture(device.index),
        "device": torch.cuda.get_device_name(device),
        "table": {key: list(asdict(config).values()) for key, config in best.items()},
        "rows": rows,
        "kept": str(path),
        "environment": environment(),
    }


def best_tiles(result: dict[str, Any]) -> dict[str, str]:
    """Return the fastest tiles of each case of a result, their time and that of the slowest."""
    found = {}
    for row in result["rows"]:
        timings = row["tried"]
        if not timings:
            found[row["case"]] = f"none ran: {row['failed'][0]['reason']}" if row["failed"] else "none fits"
            continue
        best, worst = timings[0], timings[-1]
        tiles = " x ".join(str(best[part]) for part in ("rows", "columns", "depth"))
        found[row["case"]] = (
            f"{tiles}, {best['split']} parts: {1e6 * best['seconds']:.1f} us; slowest of {len(timings)}: "
            f"{1e6 * worst['seconds']:.1f} us"
        )
    return found


def _seconds(run: Callable[[], object]) -> float | str:
    """Return the GPU time of a call, or the error: a card may refuse tiles for many reasons."""
    try:
        return gpu_seconds(run)
    except Exception as error:  # noqa: BLE001 - Triton's, CUDA's and torch's errors are recorded
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _compile(found: Sequence[Problem], device: torch.device, jobs: int | None) -> None:
    """Compile every kernel once in other processes, for Triton's cache: compiling takes most of the time."""
    count = jobs if jobs is not None else max(1, (os.cpu_count() or 1) - 2)
    if count < 2:
        return
    # a kernel does not depend on the batch, and on the sampling only in how rows are found
    kernels = {
        (case.kernel(device), config): (case, config) for case in found for config in case.configs(device)
    }
    parts = [list(kernels.values())[i::count] for i in range(count)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_run_once, args=(part, str(device))) for part in parts if part]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _run_once(part: Sequence[tuple[Problem, Config]], device: str) -> None:
    where = torch.device(device)
    torch.cuda.set_device(where)
    runners: dict[Problem, Callable[[Config], object]] = {}
    for case, config in part:
        small = replace(case, batch=min(case.batch, 4))
        run = runners.setdefault(small, small.runner(where))
        with suppress(Exception):  # retried where its failure is recorded
            run(config)
