"""Time candidates fairly: in turn within one process, after a warm-up, with median and quartiles."""

from __future__ import annotations

import math
import os
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import benchmark

from quincunx.modules import inference_mode_of

__all__ = [
    "Timing",
    "measure",
    "measure_models",
    "round_scale",
    "using_threads",
]

# how many times as long as otherwise a round is
SCALE = "QUINCUNX_ROUND_SCALE"

# a difference that is this likely by chance does not count
_BY_CHANCE = 0.05
# calls that determine a round's length
_SIZED_BY = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one entry per round.

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
        """Return the first and third quartile."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    def speedup_over(self, other: Timing) -> tuple[float, float, float]:
        """Return (median, first quartile, third quartile) of other / self, round by round.

        Rounds of the two are measured side by side, so the ratio holds when the machine's speed drifts.

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
        """Return whether it was faster in more rounds than chance explains at 5%: a sign test, which assumes
        nothing about the distribution of the noise. Fewer than five rounds are never enough."""
        rounds, won = len(self.seconds), sum(a < b for a, b in zip(self.seconds, other.seconds, strict=True))
        at_least = sum(math.comb(rounds, i) for i in range(won, rounds + 1))
        return at_least <= _BY_CHANCE * float(2**rounds)

    def and_more(self, later: Timing) -> Timing:
        """Return a copy with the rounds of a later measurement appended."""
        return replace(self, seconds=(*self.seconds, *later.seconds))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
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
    """Set torch's number of intra-op threads within the context."""
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def round_scale() -> float:
    """Return what ``QUINCUNX_ROUND_SCALE`` says: rounds of timing are so many times as long, by default once.

    Raises:
        ValueError: the variable is not a number above 0.

    Example:
        >>> round_scale() > 0
        True
    """
    given = os.environ.get(SCALE, "").strip()
    try:
        scale = float(given or 1)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise ValueError(f"{SCALE}={given!r}: expected a number above 0")
    return scale


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    threads: int | None = None,
    rounds: int = 15,
    round_seconds: float = 0.05,
    warmup: int = 2,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Time functions against each other: A B C A B C ..., after a warm-up of each.

    Args:
        candidates: name -> function without arguments. The clock of ``torch.utils.benchmark`` synchronises
            devices.
        threads: intra-op threads; by default torch's current number.
        rounds: how often each is timed.
        round_seconds: approximate duration of a round of one candidate; times ``QUINCUNX_ROUND_SCALE``.
        warmup: calls of each before timing starts.
        rest: seconds of sleep before each turn. Threads of an engine wait for more work, and take a processor
            from the next candidate, for about 0.05 seconds.

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
    round_seconds *= round_scale()
    count = torch.get_num_threads() if threads is None else threads
    with using_threads(count):
        timers = {
            name: timeit.Timer("run()", timer=benchmark.timer, globals={"run": function})
            for name, function in candidates.items()
        }
        calls: dict[str, int] = {}
        for name, timer in timers.items():
            if warmup:
                timer.timeit(warmup)
            # on a busy machine one call may take ten times as long, and would make a round a single cold call
            once = min(timer.repeat(_SIZED_BY, 1))
            calls[name] = max(1, int(round_seconds / max(once, 1e-9)))
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timer in timers.items():
                if rest > 0:
                    time.sleep(rest)
                # what another candidate left in the caches is not this one's fault
                timer.timeit(1)
                seconds[name].append(timer.timeit(calls[name]) / calls[name])
    return {name: Timing(name, count, tuple(values)) for name, values in seconds.items()}


def measure_models(
    models: Mapping[str, nn.Module],
    example: Tensor | Mapping[str, Tensor | tuple[Any, ...]],
    others: Mapping[str, Callable[[], object]] | None = None,
    **options: Any,
) -> dict[str, Timing]:
    """Time networks on an input in evaluation mode without gradients; options as in :func:`measure`.

    ``example`` is one input for all, or the input or arguments of each by name. ``others`` are functions to
    time in turn with them.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(inference_mode_of(model))
        inputs = dict.fromkeys(models, example) if isinstance(example, Tensor) else example
        runs = {name: partial(model, *_arguments(inputs[name])) for name, model in models.items()}
        return measure({**runs, **(others or {})}, **options)


def _arguments(given: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)
