"""Honest timing: candidates in turn within one process, warmed up, median and quartiles."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import comb
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from quincunx.cost import inference_mode_of

__all__ = ["Timing", "environment", "measure", "measure_models", "speed_ratio", "using_threads"]

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


def speed_ratio(
    one: Callable[[], object],
    other: Callable[[], object],
    *,
    level: float = 1.0,
    rounds: int = 7,
    round_seconds: float = 0.005,
    budget: float = 0.3,
) -> float:
    r"""The median over rounds of the seconds of ``other`` over those of ``one``: how much faster ``one`` is.

    For a decision at run time, so no longer than that takes: after three rounds it ends where every round's
    ratio r lies on one side, :math:`r > 1.2\,\text{level}` or :math:`1.2\,r < \text{level}`, or where the
    budget is spent.

    Args:
        one, other: functions without arguments; each runs once before anything is timed.
        level: the ratio at which the decision changes.
        rounds: at most, and at least 3.
        round_seconds: about how long one round of one function lasts, if a call is not longer.
        budget: seconds in all after which no further round begins.

    Raises:
        ValueError: ``rounds`` below 3.

    Example:
        >>> speed_ratio(lambda: sum(range(10)), lambda: sum(range(10_000))) > 1
        True
    """
    if rounds < _FEWEST_ROUNDS:
        raise ValueError(f"rounds={rounds}: expected at least {_FEWEST_ROUNDS}")
    begin = perf_counter()
    calls = []
    for run in (one, other):
        run()
        calls.append(max(1, int(round_seconds / max(_seconds(run, 1), 1e-9))))
    ratios: list[float] = []
    while len(ratios) < rounds:
        taken = _seconds(one, calls[0])
        ratios.append(_seconds(other, calls[1]) / max(taken, 1e-9))
        clear = min(ratios) > _CLEAR * level or max(ratios) * _CLEAR < level
        if len(ratios) >= _FEWEST_ROUNDS and (clear or perf_counter() - begin > budget):
            break
    return float(np.median(ratios))


# a decision at run time takes so many rounds, and is beyond doubt where all differ so much
_FEWEST_ROUNDS, _CLEAR = 3, 1.2


def _seconds(run: Callable[[], object], calls: int) -> float:
    """The mean of some calls."""
    begin = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - begin) / calls


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


def environment() -> dict[str, Any]:
    """What a result file says about where it was made. JSON-ready."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # python -m names the file that it runs
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "quincunx"), *sys.argv[1:]]),
        "commit": _commit(),
        "quincunx": _own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _own_version() -> str | None:
    try:
        return version("quincunx")
    except PackageNotFoundError:
        return None  # run from a checkout that is not installed


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout the package runs from, "+" behind it if files differ.

    Elsewhere what the environment variable ``QUINCUNX_COMMIT`` says, for copies of a checkout; else None.
    """
    elsewhere = os.environ.get("QUINCUNX_COMMIT") or None
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", str(Path(__file__).name)) == "":
            return elsewhere
        # a result that was just written is no other code
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return elsewhere
