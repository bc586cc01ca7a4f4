"""Timing on an NVIDIA GPU: CUDA events around graph replays, a cold cache, and the card's ceilings."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from quincunx.measure.environment import environment
from quincunx.measure.latency import Timing
from quincunx.ops.cuda_graphs import Run, timing_event

__all__ = [
    "Ceilings",
    "Flush",
    "ceilings",
    "device_facts",
    "environment_cuda",
    "measure_cuda",
    "peak_memory_cuda",
    "sm_clock",
    "tf32",
]


_CARD = "cuda"
# limits of the calls in a round
_FEWEST_CALLS, _MOST_CALLS = 3, 200


# ---------------------------------------------------------------- flushing the cache


class Flush:
    """Fills the second-level cache with other data when called.

    It reads, because written data would have to be written back within the timed call.
    """

    def __init__(self, times: float = 4.0, least: int = 256 << 20) -> None:
        self.buffer = torch.zeros(int(max(times * l2_bytes(), least)) // 4, device=_CARD)
        self.sink = torch.zeros((), device=_CARD)

    def __call__(self) -> None:
        torch.sum(self.buffer, 0, out=self.sink)


def l2_bytes() -> int:
    """Return the size of the current device's second-level cache in bytes."""
    return int(
        getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20)
    )


# ---------------------------------------------------------------- timing


def _seconds(run: Run, calls: int, flush: Callable[[], None] | None) -> list[float]:
    """Return seconds of each call, by CUDA events; the CPU stays ahead while the cache is flushed."""
    pairs = [(timing_event(), timing_event()) for _ in range(calls)]
    for begin, end in pairs:
        if flush is not None:
            flush()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    # events have a resolution of half a microsecond
    return [max(begin.elapsed_time(end), 5e-4) / 1e3 for begin, end in pairs]


def measure_cuda(
    candidates: Mapping[str, Run],
    *,
    rounds: int = 11,
    round_seconds: float = 0.02,
    flush: Callable[[], None] | None = None,
    clocks: list[int] | None = None,
) -> dict[str, Timing]:
    """Time functions against each other on the current device: A B C A B C ...

    Args:
        candidates: name -> function that launches work, such as one from :func:`captured`.
        rounds: how often each is timed; a round's figure is the median of its calls.
        round_seconds: approximate duration of a round of one candidate, including flushes.
        flush: runs before each call, outside the timed part.
        clocks: gets the multiprocessors' clock in MHz, in the middle and at the end.

    Raises:
        ValueError: no candidates, or no rounds.
    """
    if not candidates:
        raise ValueError("candidates={}: nothing to measure")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    emptied = float(np.median(_seconds(flush, 3, None))) if flush is not None else 0.0
    calls = {}
    for name, run in candidates.items():
        _seconds(run, 2, flush)
        once = float(np.median(_seconds(run, 3, flush)))
        calls[name] = min(max(_FEWEST_CALLS, int(round_seconds / (once + emptied))), _MOST_CALLS)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(float(np.median(_seconds(run, calls[name], flush))))
        # reading the clock may take as long as a round
        if clocks is not None and number in (rounds // 2, rounds - 1) and (now := sm_clock()) is not None:
            clocks.append(now)
    threads = torch.get_num_threads()
    return {name: Timing(name, threads, tuple(values)) for name, values in seconds.items()}


def peak_memory_cuda(make: Callable[[], Run]) -> tuple[Run, int]:
    """Return a function and the peak of bytes in use during a call, beyond those before it was made.

    Its own copy of the weights, tables and values kept from call to call count.
    """
    torch.cuda.synchronize()
    # memory of earlier candidates must not be freed in between and count as this one's saving
    gc.collect()
    before = torch.cuda.memory_allocated()
    run = make()
    # measuring and compiling at the first call do not belong to later calls
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    del kept
    return run, most


# ---------------------------------------------------------------- what bounds it


@dataclass(frozen=True)
class Ceilings:
    """Measured peak rates of the card.

    Attributes:
        bandwidth: bytes per second of a large copy, reads and writes counted.
        rates: type -> floating-point operations per second of a large matrix product ("float32": with tf32).
    """

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    def floor(self, work: list[tuple[float, float]], dtype: str) -> float:
        """Return the least seconds for parts of (operations, bytes), one after the other."""
        return sum(max(flops / self.rates[dtype], size / self.bandwidth) for flops, size in work)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {"bandwidth": self.bandwidth, "rates": self.rates}


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def ceilings(size: int = 8192, bytes_copied: int = 1 << 31) -> Ceilings:
    """Measure the two ceilings: a copy, and matrix products of random values."""
    with tf32(True):
        found = Ceilings(
            _bandwidth(bytes_copied), {name: _rate(size, dtype) for name, dtype in _DTYPES.items()}
        )
    torch.cuda.empty_cache()
    return found


def _bandwidth(size: int) -> float:
    source = torch.empty(size // 4, device=_CARD).normal_()
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _median(lambda: target.copy_(source))


def _rate(size: int, dtype: torch.dtype) -> float:
    # zeros would run faster than random values
    a, b = (torch.randn(size, size, device=_CARD).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median(lambda: torch.mm(a, b, out=out))


def _median(run: Run) -> float:
    return float(np.median(_seconds(run, 13, None)[3:]))


class tf32:
    """Compute float32 convolutions and matrix products in tf32, or in full precision, within the context."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.on

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self.before


# ---------------------------------------------------------------- facts about the card


def sm_clock() -> int | None:
    """Return the current clock of the multiprocessors in MHz; None if it cannot be read."""
    try:
        return int(torch.cuda.clock_rate())
    except Exception:  # noqa: BLE001 - the library may be missing, old or forbidden
        found = _query("clocks.sm").get("clocks.sm", "")
        return int(found) if found.isdigit() else None


_QUERIED = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def _query(*names: str) -> dict[str, str]:
    """Return nvidia-smi's values for the current device; it only reads."""
    asked = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(
            asked, capture_output=True, text=True, check=True, timeout=20
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    at = torch.cuda.current_device()
    line = lines[at] if at < len(lines) else lines[0] if lines else ""
    values = [value.strip() for value in line.split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def device_facts() -> dict[str, Any]:
    """Return card, driver, libraries and clocks. JSON-ready."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "triton": triton,
        **{name.replace(".", "_"): value for name, value in _query(*_QUERIED).items()},
    }


def environment_cuda() -> dict[str, Any]:
    """Return :func:`quincunx.measure.environment.environment` with the card's facts."""
    return {**environment(), **device_facts()}
