"""Honest timing: candidates in turn within one process, warmed up, median and quartiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from quincunx.modules import inference_mode_of

__all__ = [
    "Timing",
    "measure",
    "measure_models",
    "using_threads",
]

# a difference that is as likely without a reason is none
_BY_CHANCE = 0.05
# calls by which a round's length is decided
_SIZED_BY = 3


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one candidate, one entry a round.

    Attributes:
        name: the candidate.
        threads: intra-op threads while it ran.
        seconds: per round, the mean over that round's calls.
    """

    name: str
    threads: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    def speedup_over(self, other: Timing) -> tuple[float, float, float]:
        """(median, first quartile, third quartile) of other / self, round by round.

        Rounds of the two lie side by side in time, so the ratio holds when the machine's speed drifts.

        Raises:
            ValueError: different numbers of rounds.
        """
        if len(self.seconds) != len(other.seconds):
            raise ValueError(
                f"other: {other.name} has {len(other.seconds)} rounds, {self.name} has {len(self.seconds)}"
            )
        ratios = np.array(other.seconds) / np.array(self.seconds)
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        return float(middle), float(low), float(high)

    def clearly_faster_than(self, other: Timing) -> bool:
        """Whether it took less time in more rounds than chance gives once in twenty: a sign test, which asks
        nothing of how the noise is distributed. Of fewer than five rounds none are enough."""
        rounds, won = len(self.seconds), sum(a < b for a, b in zip(self.seconds, other.seconds, strict=True))
        at_least = sum(comb(rounds, i) for i in range(won, rounds + 1))
        return at_least <= _BY_CHANCE * float(2**rounds)

    def and_more(self, later: Timing) -> Timing:
        """With the rounds of a later measurement behind its own."""
        return replace(self, seconds=(*self.seconds, *later.seconds))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        low, high = self.quartiles
        return {
            "name": self.name,
            "threads": self.threads,
            "median_s": self.median,
            "q1_s": low,
            "q3_s": high,
            "rounds": len(self.seconds),
            "seconds": [float(f"{s:.4g}") for s in self.seconds],
        }


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Within: torch computes with that many intra-op threads."""
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    threads: int | None = None,
    rounds: int = 15,
    round_seconds: float = 0.05,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time functions against each other: A B C A B C ..., after a warm-up of each.

    Args:
        candidates: name -> function without arguments. ``torch.utils.benchmark`` synchronises devices.
        threads: intra-op threads; by default torch's present number.
        rounds: how often each is timed.
        round_seconds: about how long one round of one candidate lasts.
        warmup: calls of each before anything is timed.

    Raises:
        ValueError: no candidates, or rounds or threads below 1.

    Example:
        >>> sorted(measure({"a": lambda: 1, "b": lambda: 2}, rounds=2, round_seconds=1e-3))
        ['a', 'b']
    """
    if not candidates:
        raise ValueError("candidates={}: nothing to measure")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    count = torch.get_num_threads() if threads is None else threads
    with using_threads(count):
        timers = {
            name: Timer("run()", globals={"run": function}, num_threads=count)
            for name, function in candidates.items()
        }
        calls: dict[str, int] = {}
        for name, timer in timers.items():
            for _ in range(warmup):
                timer.timeit(1)
            # on a busy machine one call may take ten times as long, and a round would be of one cold call
            once = min(timer.timeit(1).mean for _ in range(_SIZED_BY))
            calls[name] = max(1, int(round_seconds / max(once, 1e-9)))
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timer in timers.items():
                seconds[name].append(float(timer.timeit(calls[name]).mean))
    return {name: Timing(name, count, tuple(values)) for name, values in seconds.items()}


def measure_models(
    models: Mapping[str, nn.Module],
    example: Tensor,
    others: Mapping[str, Callable[[], object]] | None = None,
    **options: Any,
) -> dict[str, Timing]:
    """Time networks on one input in evaluation mode without gradients; options as in :func:`measure`.

    ``others`` are functions that are timed in turn with them.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(inference_mode_of(model))
        runs = {name: partial(model, example) for name, model in models.items()}
        return measure({**runs, **(others or {})}, **options)
