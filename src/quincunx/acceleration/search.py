"""Choose a method for each layer of a network to meet a target, from measured losses and times."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.acceleration.assigned import Assigned
from quincunx.acceleration.candidates import Candidate
from quincunx.acceleration.gain import restore_layers
from quincunx.acceleration.journal import FolderJournal
from quincunx.acceleration.knapsack import choose
from quincunx.acceleration.scores import BUDGET, Scores, Shared
from quincunx.acceleration.target import Target
from quincunx.acceleration.watching import Watch
from quincunx.measure.tasks import Task
from quincunx.measure.tasks.classes import IGNORED
from quincunx.measure.tasks.scale import scale_in
from quincunx.methods.registry import candidates_named
from quincunx.modules import copied, inference_mode_of
from quincunx.report.verdict import shortcoming
from quincunx.surgery.calibration import Pool
from quincunx.surgery.eligible import Where
from quincunx.surgery.method import Accelerated, Journal, Method
from quincunx.surgery.replace import replace_layers as replace_by

__all__ = [
    "Found",
    "search",
    "shortfall",
]

# choices timed before the nearest one is taken, and choices considered in between
_CORRECTIONS, _LOOKS = 10, 40
# stop when the budget is known this precisely, as a share of the first budget
_NEAR = 0.01
_BISECTIONS = 5
# ask for 1% more than an attempt says is needed: timings vary
_MARGIN = 1.01
# require a 2% margin to accept a choice: the finished network is timed again
_SURE = 1.02
# how often to drop layers that gain nothing within a choice, and choose again
_PRUNINGS = 3
# Losses of single candidates mislead if together they lose this many times their sum. Then the most harmful
# units are put back one by one, and another choice is made with what they lose within the whole.
_MISLED, _HARMFUL, _RECHOICES = 1.5, 8, 2
# the most that a loss is scaled by at once
_MOST_SCALED = 8.0
SLOWER = "no gain in the network that was chosen, stays dense"


@dataclass
class Found:
    """What :func:`search` found.

    Attributes:
        result: the network, as :func:`quincunx.accelerate` returns it.
        rows: every candidate with its scores.
        chosen: the candidates in the network.
        met: whether the target was met by measurement.
        record: JSON-ready: target, predicted and measured times, every attempt.
    """

    result: Accelerated
    rows: list[Candidate]
    chosen: list[Candidate]
    met: bool
    record: dict[str, Any] = field(default_factory=dict)


def search(
    model: nn.Module,
    target: Target,
    calibration: Iterable[Any],
    *,
    candidates: Sequence[Method] = (),
    where: Where | None = None,
    example_input: Tensor | None = None,
    table: str | Path | None = None,
    time_budget: float | None = None,
    dry_run: bool = False,
    journal: Journal | None = None,
    tell: Callable[[str, float], None] = lambda *_: None,
    dtype: torch.dtype | None = None,
    task: Task | None = None,
    shared: Shared | None = None,
    pool: Pool | None = None,
) -> Found:
    r"""Choose a method for every layer, by its measured time and its loss, to meet a target.

    Each candidate is put in the network on its own, fitted on 64 images or as many as its weights need. Its
    loss is the mean distance of the outputs from the original's on the first 256 images of the calibration
    data, as the task measures it (in classification the Kullback-Leibler divergence). Its time is measured
    in place, in the part of the fused network around all layers of its shape at once. Candidates that save
    no time are dropped. The search then chooses at most one
    candidate for each layer,

    .. math:: \min_x \sum_c x_c \ell_c \quad\text{s.t.}\quad \sum_c x_c t_c \ge t_{\text{wanted}},

    solved exactly as an integer program. The network of the choice is timed, and the wanted saving is
    corrected until the target is met or everything was chosen. Then the layers are fitted in forward order.

    If the fitted network loses much more than the sum of what its candidates lose alone, the most harmful
    layers are put back one by one. What the network regains is their loss within the whole: the losses of
    all candidates are scaled by it and the choice is made again, up to twice. The network that meets the
    target with the least loss is taken; ``record["together"]`` lists all that were tried.

    Args:
        model: any network that ``accelerate`` supports.
        target: what to reach.
        calibration: batches as for :func:`quincunx.accelerate`.
        candidates: methods to choose from; by default those of "auto".
        where: which layers may be replaced.
        example_input: the timed input [N, C, H, W]; by default the first 8 images of the first batch.
        table: file of the scores; an existing one is continued, so that another target needs no new
            forward pass.
        time_budget: seconds after which no further candidate is scored.
        dry_run: stop before the fit; the result holds only the choice and the estimate. Only a fit shows how
            much accuracy a choice loses, so a target with ``max_drop`` is fitted anyway.
        journal: of the fit, as for :func:`quincunx.surgery.replace.replace_layers`. In a ``FolderJournal``
            each choice has its own part; another journal holds one network's layers, so no second choice is
            made with it.
        tell: called with the best so far and the current action, and with the share of the scoring that is
            done, -1 where none is known; see :class:`quincunx.acceleration.watching.Watch`.
        dtype: number format in which networks are timed, the original too; see :func:`quincunx.fuse`.
        task: how outputs are compared and scored; by default classification.
        shared: has the losses of candidates measured by several processes.
        pool: adds up what several processes sum in the fit.

    Raises:
        ValueError: the table belongs to another network or other data; anything that ``accelerate`` refuses.

    Source: the choice under a budget follows Zhang et al., arXiv:1505.06798, section 3.4, with measured
        times instead of MACs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        ...                     nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = [torch.randn(16, 3, 16, 16)]
        >>> found = search(net, Target(macs="80%"), images, candidates=[qx.SpatialBottleneck()])
        >>> [row.label for row in found.rows if row.layers == ("0", "2")]
        ['spatialbottleneck of the pair, density 0.5']
    """
    began = time.perf_counter()
    place = None if table is None else Path(table)
    if where is not None and not callable(where) and not isinstance(where, str):
        where = list(where)  # it is read twice
    watch = Watch(target, tell)
    scores = Scores(
        model,
        calibration,
        tuple(candidates) or candidates_named("auto"),
        where,
        example_input,
        watch,
        dtype,
        task,
    )
    watch.scores = scores
    scores.fill(place, time_budget, shared)
    watch("all candidates are scored", 1.0)
    scored = time.perf_counter() - began
    key = json.dumps(target.to_dict(), sort_keys=True)
    builder = _Builder(scores, target, calibration, where, journal, dry_run, watch, pool)
    # a resumed run must choose the same network, unless there are more candidates now
    among = [[list(row.layers), repr(row.method)] for row in scores.usable()]
    kept = scores.choices.get(key)
    found = builder.chosen() if kept is None or kept["among"] != among else builder.again(kept)
    names = ("met", "attempts", "chosen", "together")
    scores.choices[key] = {"among": among, **{name: found.record.get(name, []) for name in names}}
    scores.write(place)
    found.record["seconds"] = {"scoring": scored, "all": time.perf_counter() - began}
    return found


def shortfall(record: Mapping[str, Any]) -> str:
    """Describe how far a search that missed its target came."""
    asked = ", ".join(f"{key}={value}" for key, value in record["target"].items())
    # with a single target it is clear what failed
    missed = "; ".join(shortcoming(record)) if len(record["target"]) > 1 else ""
    attempts = record["attempts"]
    left = sum(row["why_not"] == BUDGET for row in record["candidates"])
    late = (
        f"; {left} of {len(record['candidates'])} candidates were not scored in the time budget"
        if left
        else ""
    )
    if not attempts or not record["chosen"]:
        return f"the target {asked} is out of reach: no candidate can be used{late}"
    best = max(attempts, key=lambda attempt: attempt["speedup"])
    told = f"the target {asked} is out of reach; the best found is {best['speedup']:.2f} times as fast"
    if "macs" in record["target"]:
        told += f", with {record['macs'] / 1e6:.1f} M MACs"
    told += f", and loses {scale_in(record).amount(record['drop'], 1)}" if "drop" in record else ""
    return (f"{told} ({missed})" if missed else told) + late


@dataclass
class _Builder:
    """Builds a network that meets a target from scores."""

    scores: Scores
    target: Target
    calibration: Iterable[Any]
    where: Where | None
    journal: Journal | None
    dry_run: bool
    watch: Watch
    pool: Pool | None = None
    # names of layers that gain nothing within a choice -> how many times as long it takes without them
    slower: dict[tuple[str, ...], float] = field(default_factory=dict)
    # of layers: what a unit with it loses within a whole network, over what it loses alone
    scaled: dict[str, float] = field(default_factory=dict)
    # networks that were fitted and weighed, and what is recorded of each
    weighed: list[Found] = field(default_factory=list)
    together: list[dict[str, Any]] = field(default_factory=list)

    def again(self, kept: dict[str, Any]) -> Found:
        """Return the network of an earlier choice for this target."""
        wanted = [(tuple(entry["layers"]), entry["method"]) for entry in kept["chosen"]]
        rows = [row for row in self.scores.rows if (row.layers, repr(row.method)) in wanted]
        self.together = kept.get("together", [])
        return self._built(rows, kept["met"], kept["attempts"])

    def chosen(self) -> Found:
        """Return the choice that meets the target by measurement, or comes nearest, and its network."""
        usable = self.scores.usable()
        if self.target.max_drop is not None and len(self.target.to_dict()) == 1:
            return self._within_drop(usable)
        first = self._built(*self._choice(usable))
        if self.dry_run or not first.chosen or not isinstance(self.journal, (FolderJournal, type(None))):
            return first
        return self._rechosen(first, usable)

    def _choice(self, usable: list[Candidate]) -> tuple[list[Candidate], bool, list[dict[str, Any]]]:
        """Return the choice for the target, whether it meets it, and every attempt; of what saves time in
        the whole network only."""
        choice = self._by_macs if self.target.macs is not None else self._by_time
        attempts: list[dict[str, Any]] = []
        for _ in range(_PRUNINGS):
            chosen, met, attempted = choice(usable)
            attempts += attempted
            slower = self.scores.slower(chosen)
            if not slower:
                break
            self.slower |= slower
            usable = [row for row in usable if row not in chosen or row.layers not in slower]
        else:
            # the rest of the last choice
            chosen = [row for row in chosen if row.layers not in slower]
            attempts.append(self._attempt(chosen))
            met = self._meets(attempts[-1], chosen)
        if chosen and attempts[-1]["speedup"] <= 1:
            # a network that is no faster does not justify its loss
            chosen, met = [], False
            attempts.append(self._attempt([]))
        return chosen, met, attempts

    def _attempt(self, chosen: list[Candidate]) -> dict[str, Any]:
        """Return a choice's predicted and measured times, and tell the best so far."""
        count = sum(len(row.layers) for row in chosen)
        self.watch(f"timing a choice of {count} layers" if count else "timing the network before", -1.0)
        attempt = self.scores.attempt(chosen)
        if chosen and self.target.to_dict().keys() != {"max_drop"}:
            self.watch.measured(attempt, met=self._meets(attempt, chosen))
        return attempt

    # ------------------------------------------------------------ losses of a whole network

    def _alone(self, row: Candidate) -> float:
        """Return a candidate's loss, scaled by what its layers were found to lose within a network."""
        return max(row.loss or 0.0, 0.0) * self._scale(row)

    def _scale(self, row: Candidate) -> float:
        return max(self.scaled.get(layer, 1.0) for layer in row.layers)

    def _least(self, rows: list[Candidate], gains: list[float], wanted: float) -> list[Candidate]:
        return choose(rows, gains, wanted, [self._alone(row) for row in rows])

    def _rechosen(self, first: Found, usable: list[Candidate]) -> Found:
        """Return the best of the first choice and those made after measuring losses in fitted networks."""
        tried = {_key(first.chosen)}
        best, least, now = first, self._weighed(first), first
        for _ in range(_RECHOICES):
            if not self._misled(now):
                break
            self._rescale(now)
            chosen, met, attempts = self._choice(usable)
            if not chosen or _key(chosen) in tried:
                break
            tried.add(_key(chosen))
            now = self._built(chosen, met, attempts)
            loss = self._weighed(now)
            if (now.met, -loss) > (best.met, -least):
                best, least = now, loss
        self._mark_taken(best)
        return best

    def _mark_taken(self, best: Found) -> None:
        for entry, found in zip(self.together, self.weighed, strict=True):
            entry["taken"] = found is best
        best.record["together"] = self.together

    def _weighed(self, found: Found) -> float:
        """Return the loss of a fitted network, and note it beside what its candidates lose alone."""
        loss = self.scores.loss_of(found.result.model)
        self.weighed.append(found)
        self.together.append(
            {
                "layers": sum(len(row.layers) for row in found.chosen),
                "alone": sum(max(row.loss or 0.0, 0.0) for row in found.chosen),
                "together": loss,
                "speedup": float(found.record["attempts"][-1]["speedup"])
                if found.record["attempts"]
                else 1.0,
                "taken": False,
            }
        )
        return loss

    def _misled(self, found: Found) -> bool:
        """Return whether the network last weighed loses much more than was expected of its choice."""
        expected = sum(self._alone(row) for row in found.chosen)
        return len(found.chosen) > 1 and self.together[-1]["together"] > _MISLED * expected

    def _rescale(self, found: Found) -> None:
        """Scale the losses of units by what each of them loses within a fitted network."""
        together = self.together[-1]["together"]
        rows = sorted(found.chosen, key=lambda row: -self._alone(row))
        harmful, rest = rows[:_HARMFUL], rows[_HARMFUL:]
        harms = []
        for row in harmful:
            without = restore_layers(self.scores.model, found.result, dict.fromkeys(row.layers, "")).model
            harms.append(max(together - self.scores.loss_of(without), 0.0))
        left = max(together - sum(harms), 0.0)
        share = _ratio(left, sum(self._alone(row) for row in rest))
        shares = [_ratio(harm, self._alone(row)) for row, harm in zip(harmful, harms, strict=True)]
        for row, times in zip(rows, [*shares, *[share] * len(rest)], strict=True):
            # also for a pair that holds a layer which was harmful alone, and the other way round
            self.scaled |= dict.fromkeys(row.layers, self._scale(row) * times)

    def _by_macs(self, usable: list[Candidate]) -> tuple[list[Candidate], bool, list[dict[str, Any]]]:
        """Return the choice of least loss that saves enough MACs, whether it does, and its times."""
        wanted = self.scores.macs - self.target.macs_of(self.scores.macs)
        chosen = self._least(usable, [float(row.macs_saved) for row in usable], wanted)
        attempt = self._attempt(chosen)
        return chosen, self._meets(attempt, chosen), [attempt]

    def _by_time(self, usable: list[Candidate]) -> tuple[list[Candidate], bool, list[dict[str, Any]]]:
        """Choose, time the whole network, and raise or lower the wanted saving by the difference.

        Candidates' savings are in seconds of a network that takes ``reference``; the machine's speed
        drifts, so target and result are compared as shares of the time before.
        """
        saved = [row.seconds for row in usable]
        most = _sum(choose(usable, saved, float("inf")))
        attempts = [self._attempt([])]
        share = self._share_wanted(attempts[0])
        if share <= 0 or not usable:
            return [], share <= 0, attempts
        asked = first = share * self.scores.reference
        choices: list[list[Candidate]] = [[]]
        # savings that were too small, and that were enough: the sum of separate savings predicts the whole
        # network only roughly, so each choice narrows the next wanted saving
        low, high = 0.0, float("inf")
        for _ in range(_LOOKS):
            chosen = self._least(usable, saved, asked)
            if chosen in choices:
                now = attempts[choices.index(chosen)]
            elif len(choices) > _CORRECTIONS:
                break
            else:
                choices.append(chosen)
                attempts.append(now := self._attempt(chosen))
            if not (met := self._meets(now, sure=_SURE)) and _sum(chosen) >= most * (1 - 1e-9):
                break
            # all wanted savings up to a choice's own saving give the same choice
            low, high = (low, min(high, asked, most)) if met else (max(low, _sum(chosen)), high)
            if high - low <= _NEAR * first:
                break
            share = self._share_wanted(now)
            paid = (1 - now["after"] / now["before"]) * self.scores.reference / _sum(chosen)
            asked = _MARGIN * share * self.scores.reference / max(paid, 1e-9)
            if high == float("inf"):
                asked = max(asked, _MARGIN * low)
            elif not low < asked < high:
                asked = (low + high) / 2
        surely = [i for i in range(1, len(choices)) if self._meets(attempts[i], sure=_SURE)]
        reached = surely or [i for i in range(1, len(choices)) if self._meets(attempts[i])]
        best = min(reached, key=lambda i: sum(map(self._alone, choices[i])), default=None)
        if best is None:
            best = max(range(1, len(choices)), key=lambda i: float(attempts[i]["speedup"]), default=0)
        # the one that was taken goes last
        attempts.append(attempts.pop(best))
        return choices[best], best in reached, attempts

    def _share_wanted(self, attempt: dict[str, Any]) -> float:
        """Return the share of the time before that has to be saved."""
        if self.target.speedup is not None:
            return 1 - 1 / self.target.speedup
        return 1 - float(self.target.latency_ms or 0.0) / 1e3 / float(attempt["before"])

    def _meets(self, attempt: dict[str, Any], chosen: Sequence[Candidate] = (), *, sure: float = 1.0) -> bool:
        """Return whether a choice with these times is fast enough, by a margin, or saves enough MACs."""
        if self.target.macs is not None:
            left = self.scores.macs - sum(row.macs_saved for row in chosen)
            return left <= self.target.macs_of(self.scores.macs)
        if self.target.speedup is not None:
            return float(attempt["speedup"]) >= sure * self.target.speedup
        return sure * 1e3 * float(attempt["after"]) <= float(self.target.latency_ms or 0.0)

    def _built(self, chosen: list[Candidate], met: bool, attempts: list[dict[str, Any]]) -> Found:
        record: dict[str, Any] = {
            "target": self.target.to_dict(),
            "met": met,
            "attempts": attempts,
            "chosen": [
                {"layers": list(r.layers), "label": r.label, "method": repr(r.method)} for r in chosen
            ],
            "candidates": [row.to_dict() for row in self.scores.rows],
            "macs": self.scores.macs - sum(row.macs_saved for row in chosen),
            "images": sum(self.scores.counts),
            "dry_run": self.dry_run,
            "together": self.together,
            **({} if self.scores.task.classifies else {"task": self.scores.task.to_dict()}),
        }
        # only a fitted network shows how much accuracy is lost
        if not chosen or (self.dry_run and self.target.max_drop is None):
            result = Accelerated(copied(self.scores.model), {}, dict(self.scores.skipped))
            if self.target.max_drop is not None:
                record["drop"] = 0.0
        else:
            self.watch(f"fitting {sum(len(row.layers) for row in chosen)} layers", -1.0)
            result = replace_by(
                self.scores.model,
                Assigned({name: row.method for row in chosen for name in row.layers}),
                where=self.where,
                calibration=self.calibration,
                journal=None if self.dry_run else self._part_of_journal(chosen),
                loss=self.scores.task.impact_function,
                pool=self.pool,
            )
            if self.target.max_drop is not None:
                drop = self._drop(result.model)
                met = met and drop <= self.target.max_drop
                record["drop"], record["met"] = drop, met
            if self.dry_run:
                result = Accelerated(copied(self.scores.model), {}, dict(self.scores.skipped))
        result.skipped.update(self._reasons(chosen, met))
        return Found(result, self.scores.rows, chosen, met, record)

    def _part_of_journal(self, chosen: Sequence[Candidate]) -> Journal | None:
        """Return the journal of one choice: a layer's fit depends on all layers before it."""
        if isinstance(self.journal, FolderJournal):
            return self.journal.within(_digest(chosen))
        return self.journal

    def _reasons(self, chosen: Sequence[Candidate], met: bool) -> dict[str, str]:
        """Return the reason for each layer that no chosen candidate replaces."""
        left = "the target is met without it" if met else "not in the best network found"
        taken = {name for row in chosen for name in row.layers}
        reasons: dict[str, str] = {}
        for name in self.scores.layers:
            if name not in taken:
                own = [row for row in self.scores.rows if name in row.layers]
                why = {row.why_not for row in own if row.why_not} if own else {"no candidate takes it"}
                slow = any(name in names for names in self.slower)
                could = SLOWER if slow else left
                reasons[name] = could if any(row.why_not is None for row in own) else "; ".join(sorted(why))
        return reasons

    def _within_drop(self, usable: list[Candidate]) -> Found:
        """Return the fastest network whose accuracy falls by no more than allowed, by bisection."""
        saved = [row.seconds for row in usable]
        most = _sum(choose(usable, saved, float("inf")))
        journal = self.journal if isinstance(self.journal, FolderJournal) else None
        trial = dataclasses.replace(self, journal=journal, dry_run=False)
        fits: dict[tuple[tuple[tuple[str, ...], str], ...], Found] = {}
        low, high, share, best = 0.0, 1.0, 1.0, None
        repeated = False
        attempts: list[dict[str, Any]] = []
        for _ in range(_BISECTIONS if usable else 0):
            chosen = self._least(usable, saved, share * most)
            slower = self.scores.slower(chosen)
            self.slower |= slower
            chosen = [row for row in chosen if row.layers not in slower]
            attempt = self._attempt(chosen)
            if chosen and attempt["speedup"] <= 1:
                chosen, attempt = [], self._attempt([])
            key = _key(chosen)
            if fresh := key not in fits:
                fits[key] = trial._built(chosen, True, [attempt])
            found = fits[key]
            attempts.append({**attempt, "drop": found.record["drop"]})
            if found.met and chosen:
                scale = self.scores.task.scale
                self.watch.measured(attempt, met=True, lost=f"{scale.amount(found.record['drop'], 2)} lost")
            if fresh and chosen:
                self._weighed(found)
            if found.met:
                low, best = share, found
                if share == 1.0:
                    break
            elif fresh and not repeated and self._misled(found):
                # another choice of the same saving may lose less
                self._rescale(found)
                repeated = True
                continue
            else:
                high = share
            repeated = False
            share = (low + high) / 2
        if best is None:
            # the unchanged network: no loss, no gain
            best = self._built([], False, [])
        else:
            # the one that was taken goes last
            taken = max(i for i, one in enumerate(attempts) if one["drop"] == best.record["drop"])
            attempts.append(attempts.pop(taken))
        self._mark_taken(best)
        best.record["attempts"], best.record["dry_run"] = attempts, self.dry_run
        if self.dry_run:
            kept = {n: r for n, r in best.result.skipped.items() if n not in best.result.replaced}
            best.result = Accelerated(copied(self.scores.model), {}, kept)
        return best

    def _drop(self, network: nn.Module) -> float:
        """Return how much score the network loses on the calibration images against the original.

        Targets are those of the data, or the original's own outputs if there are none; in classification
        its own predictions.
        """
        task = self.scores.task
        scores: list[Tensor] = []
        with inference_mode_of(network):
            for batch, answer in zip(self.scores.context.data, self.scores.answers, strict=True):
                if task.needs_original:
                    target = answer
                elif batch.target is not None:
                    target = task.understand(answer, batch.target, batch.index)
                elif task.classifies:
                    target = answer.argmax(1)
                else:
                    raise ValueError(
                        f"calibration: batch {batch.index} has no target, which task {task.name!r} scores; "
                        "give targets, or the task qx.tasks.agreement()"
                    )
                images = len(batch.input)
                pair = (task.scores(found, target, images) for found in (answer, network(batch.input)))
                scores.append(torch.stack(list(pair)))
                if not scores[-1].isfinite().all():
                    raise ValueError(
                        f"calibration: batch {batch.index}: the score of task {task.name!r} is not finite"
                    )
                if task.classifies and isinstance(target, Tensor) and target.dim() == 1:
                    scores[-1] = scores[-1][:, target != IGNORED]
        if not any(part.shape[1] for part in scores):
            raise ValueError("calibration: no image has a label, so that nothing says what a network loses")
        before, after = torch.cat(scores, 1).mean(1).tolist()
        return task.scale.lost(before, after)


def _sum(rows: Sequence[Candidate]) -> float:
    return sum(row.seconds for row in rows)


def _key(rows: Sequence[Candidate]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Return what tells a choice from others."""
    return tuple((row.layers, repr(row.method)) for row in rows)


def _digest(rows: Sequence[Candidate]) -> str:
    return hashlib.sha256(repr(sorted(_key(rows))).encode()).hexdigest()[:12]


def _ratio(found: float, expected: float) -> float:
    """Return by what a loss is scaled; a single measurement is trusted within limits."""
    ratio = found / expected if expected > 0 else _MOST_SCALED if found > 0 else 1.0
    return min(max(ratio, 1 / _MOST_SCALED), _MOST_SCALED)
