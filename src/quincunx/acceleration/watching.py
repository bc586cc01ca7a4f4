"""What a search tells while it runs: what it does, and the best network so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quincunx.acceleration.knapsack import choose
from quincunx.acceleration.target import Target

if TYPE_CHECKING:
    from quincunx.acceleration.scores import Scores

__all__ = ["Watch", "search_bar"]

# a prediction solves an integer program, so it is made this often at most, in seconds
_EVERY = 2.0


class Watch:
    """Calls ``tell`` with the best so far and the current action, and with the share of the scoring.

    While candidates are scored the best so far is what those that are known promise together; from the first
    choice on it is what was measured: of the choices that meet the target the one of least loss, else the
    fastest.

    Args:
        target: of the search.
        tell: gets a text, and the share in [0, 1] of the scoring that is done, or -1 where none is known.
        clock: seconds.

    Example:
        >>> watch = Watch(Target(speedup=1.5), lambda what, share: print(what))
        >>> watch("timing a choice", -1.0)
        timing a choice
        >>> watch.measured({"speedup": 1.4, "loss": 0.02}, met=False)
        >>> watch("timing a choice", -1.0)
        best so far 1.40x of 1.5x asked, loss 0.02; timing a choice
    """

    def __init__(
        self,
        target: Target,
        tell: Callable[[str, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target, self.tell, self.clock = target, tell, clock
        self.best = ""
        self.scores: Scores | None = None
        self._asked = "" if target.speedup is None else f" of {target.speedup:g}x asked"
        self._predicted_at = float("-inf")
        self._rank: tuple[bool, float] | None = None

    def __call__(self, what: str, share: float) -> None:
        """Tell what is done now."""
        now = self.clock()
        if self._rank is None and self.scores is not None and now - self._predicted_at >= _EVERY:
            self._predict(self.scores)
            self._predicted_at = self.clock()
        self.tell(f"{self.best}; {what}" if self.best else what, share)

    def measured(self, attempt: Mapping[str, Any], *, met: bool, lost: str = "") -> None:
        """Note a choice that was timed.

        Args:
            attempt: with "speedup" and "loss".
            met: whether it meets the target.
            lost: its measured loss of score in words, in place of the loss.
        """
        speed, loss = float(attempt["speedup"]), float(attempt.get("loss", 0.0))
        only_drop = set(self.target.to_dict()) == {"max_drop"}
        rank = (met, -loss if met and not only_drop else speed)
        if self._rank is None or rank > self._rank:
            self._rank = rank
            self.best = f"best so far {speed:.2f}x{self._asked}, {lost or f'loss {loss:.2g}'}"

    def _predict(self, scores: Scores) -> None:
        """Choose among the candidates known by now."""
        rows = scores.usable()
        if not rows or not scores.reference:
            return
        if self.target.macs is not None:
            gains = [float(row.macs_saved) for row in rows]
            wanted = scores.macs - self.target.macs_of(scores.macs)
        else:
            gains = [row.seconds for row in rows]
            wanted = scores.reference * _share_wanted(self.target, scores.reference)
        chosen = choose(rows, gains, wanted)
        speed = scores.reference / max(scores.reference - sum(row.seconds for row in chosen), 1e-12)
        loss = sum(max(row.loss or 0.0, 0.0) for row in chosen)
        self.best = f"best so far {speed:.2f}x{self._asked}, loss {loss:.2g} (predicted)"


def _share_wanted(target: Target, reference: float) -> float:
    """Return the share of the time that has to be saved; as much as possible where only a loss is limited."""
    if target.speedup is not None:
        return 1 - 1 / target.speedup
    if target.latency_ms is not None:
        return 1 - target.latency_ms / 1e3 / reference
    return float("inf")


@contextmanager
def search_bar(shown: bool, limit: float | None) -> Iterator[Callable[[str, float], None]]:
    """Show how far a search is, on standard error; what is yielded is its ``tell``.

    Args:
        shown: whether anything is shown.
        limit: seconds after which no further candidate is scored; None for no limit.

    Example:
        >>> with search_bar(False, None) as tell:
        ...     tell("scoring", 0.5)
    """
    # it brings rich, which takes its time to import
    from quincunx.progress import progress_bar

    with progress_bar(shown) as bar:
        task = bar.add_task("searching", total=1.0, state="", limit=limit)

        def tell(what: str, share: float) -> None:
            nonlocal task
            bar.update(task, state=what, completed=share if share >= 0 else None)
            if share == 1.0:
                # how many choices are timed and fitted shows only as it goes on
                bar.update(task, state="")
                task = bar.add_task("choosing", total=None, state=what)

        yield tell
