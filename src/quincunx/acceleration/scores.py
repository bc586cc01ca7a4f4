"""The score table of a search: measured accuracy loss and time saved of each candidate on its own."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quincunx.acceleration.around import Around, NoPart
from quincunx.acceleration.assigned import Assigned
from quincunx.acceleration.candidates import Candidate, pair_name
from quincunx.acceleration.prefix import Tails
from quincunx.fusion.calibrate import fuse_to_time
from quincunx.layers.build import build_module
from quincunx.measure.cost import cost
from quincunx.measure.latency import Timing, measure_models
from quincunx.measure.tasks import Task, classification
from quincunx.measure.tasks.ready import is_usual
from quincunx.measure.tasks.structure import tensors_in
from quincunx.methods.points import worded
from quincunx.modules import Attached, copied, inference_mode_of, set_module, weight_of
from quincunx.networks.artifact import build_measured
from quincunx.reading import Entry, Unreadable, bounded, differing_fields, one_line, read_json
from quincunx.surgery.calibration import MOST_KEPT, Batch, Calibration, Layer
from quincunx.surgery.eligible import Where
from quincunx.surgery.method import Method, Replacement
from quincunx.surgery.replace import layer_macs, prepare, temporarily_replaced
from quincunx.writing import write_json

__all__ = ["BUDGET", "Measured", "Scores", "Shared", "eager_form", "inference_form", "timed_clearly"]

_ROUNDS = 11
# seconds; a part of a network takes less than the whole
_ROUND_OF_PART = 0.02
# for the whole network of a choice: few are timed, and one of them decides
_ATTEMPT_ROUNDS = 31
# share of its time below which no difference between quartiles counts
_BLURRED = 0.01
# Images on which candidates are compared.
_COMPARED_ON = 256
# The fewest images on which a candidate is fitted for that, and output positions for each weight of an output
# channel; what is chosen is fitted on all.
_FITTED_ON, _ROWS = 64, 64
BUDGET = "not scored: the time budget was used up"
# the candidate saves no multiply-adds, or no time
NO_GAIN = "no gain, stays dense"


def inference_form(
    model: nn.Module, check: Tensor | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the fused copy, compared on ``check``; if it cannot be fused, a channels_last copy."""
    try:
        return fuse_to_time(model, dtype, check=check)
    except TypeError:
        return eager_form(model)


def eager_form(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode and channels_last, not fused."""
    return copied(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def timed_clearly(
    models: Mapping[str, nn.Module], x: Tensor, *, rounds: int = _ROUNDS, more: int = _ATTEMPT_ROUNDS
) -> dict[str, tuple[Timing, Timing]]:
    """Return (seconds of the first network, seconds of another) by the other's name, timed in turn.

    If neither is clearly faster, both are timed again and the rounds of both measurements are joined.
    """
    first, *others = models
    timings = measure_models(models, x, rounds=rounds)
    found = {key: (timings[first], timings[key]) for key in others}
    doubtful = [
        key
        for key, (one, other) in found.items()
        if not one.clearly_faster_than(other) and not other.clearly_faster_than(one)
    ]
    if doubtful:
        again = measure_models({key: models[key] for key in (first, *doubtful)}, x, rounds=more)
        for key in doubtful:
            one, other = found[key]
            found[key] = one.and_more(again[first]), other.and_more(again[key])
    return found


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found of a candidate that was put in the network by itself.

    Attributes:
        number: of the candidate in :attr:`Scores.rows`.
        macs_saved: as of the candidate.
        loss: as of the candidate.
        why_not: as of the candidate.
        specs: of its modules; None where it cannot be used.
    """

    number: int
    macs_saved: int
    loss: float | None
    why_not: str | None
    specs: list[dict[str, Any]] | None


class Scores:
    """All candidates of a network, each with its own loss in the network and the time that it saves there.

    Args:
        model: any network that ``accelerate`` supports.
        calibration: batches as for :func:`quincunx.accelerate`.
        candidates: methods to choose from.
        where: which layers may be replaced.
        example_input: the timed input [N, C, H, W]; by default the first 8 images of the first batch.
        tell: called with the current action and the share of the scoring that is done.
        dtype: number format in which networks are timed; see :func:`quincunx.fuse`.

    Attributes:
        rows: the candidates.
        layers: name -> layer, in forward order.
        skipped: layers that no candidate may replace, and why.
        answers: outputs of the original network, batch by batch; kept if they fit in memory.
        counts: images of each batch.
        task: what is compared.
        dense: its fused form.
        macs: of one calibration image.
        reference: seconds of one call of the dense network; saved shares are multiplied by it.
        choices: earlier choices by target; stored in the table.

    Raises:
        TypeError: not a network.
        ValueError: outputs that are not finite or that the task cannot compare, or calibration data that
            differs between passes.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Iterable[Any],
        candidates: Sequence[Method],
        where: Where | None,
        example_input: Tensor | None,
        tell: Callable[[str, float], None],
        dtype: torch.dtype | None = None,
        task: Task | None = None,
    ) -> None:
        self.task = task or classification()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.candidates, self.tell, self.dtype = model, candidates, tell, dtype
        batch = Calibration(calibration, model).first()
        if not batch.plain:
            raise TypeError(
                "calibration: batch 0 has more than one input tensor; a search for a target takes networks "
                "of one"
            )
        first = batch.input
        self.example = first[:8] if example_input is None else example_input
        impact = self.task.impact_function
        # classes of layers, and whether to look for pairs
        asked = Assigned({f"{i}": method for i, method in enumerate(candidates)})
        self.context, layers, self.skipped = prepare(
            model, asked, where=where, example_input=first[:1], calibration=calibration, loss=impact
        )
        self.pairs = tuple(p for p in self.context.pairs if any(_fits(m, p) for m in candidates))
        paired = {layer.name for pair in self.pairs for layer in pair}
        # linear layers may be asked for as the end of pairs alone
        alone = tuple(kind for m in candidates if getattr(m, "singles", True) for kind in m.targets)
        alone += (nn.Conv2d,)
        self.layers = {
            layer.name: layer for layer in layers if layer.name in paired or isinstance(layer.module, alone)
        }
        self.units: list[tuple[Layer, ...]] = [*self.pairs, *((layer,) for layer in self.layers.values())]
        self.rows = [row for unit in self.units for row in self._rows_of(unit)]
        self.macs = cost(model, first[:1]).macs
        self.dense = inference_form(model, first[:1], dtype)
        self.data = self.context.data
        # the first batches of the data, by how many they are
        self.parts: dict[int, Calibration] = {}
        self.tails = self.context.shortcut = Tails(model, self.data)
        self.specs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.choices: dict[str, dict[str, Any]] = {}
        self.reference = 0.0
        self.marks, self.counts = [], []
        kept: list[Any] | None = []
        held = 0
        with inference_mode_of(model):
            for batch in self.context.data:
                self.marks.append(batch.mark)
                self.counts.append(len(batch.input))
                answer = self._first_answer(model, batch)
                held += sum(t.nbytes for _, t in tensors_in(answer))
                # many large maps are computed again each time
                kept = None if kept is None or held > MOST_KEPT else [*kept, answer]
        self.kept = kept
        if [batch.mark for batch in self.context.data] != self.marks:
            raise ValueError(
                "calibration: gives other batches each time it is read, so candidates cannot be compared; "
                "turn off shuffling and augmentation"
            )

    def _first_answer(self, model: nn.Module, batch: Batch) -> Any:
        """Return the original's output, once it has been compared with itself."""
        answer = model(batch.input)
        self.task.distances(answer, answer, images=len(batch.input))
        for _, part in tensors_in(answer):
            if part.is_floating_point() and not part.isfinite().all():
                raise ValueError(f"calibration: batch {batch.index}: the answers are not finite")
        return answer

    @property
    def answers(self) -> Iterator[Any]:
        """Yield the original network's output for each batch."""
        if self.kept is not None:
            yield from self.kept
            return
        for batch in self.data:
            # no mode is on where a reader goes on, who may never come back
            with inference_mode_of(self.model):
                answer = self.model(batch.input)
            yield answer

    def _first_images(self, count: int) -> Calibration:
        """Return the first batches that hold so many images, if there are."""
        batches = 1 + bisect_left(list(accumulate(self.counts)), count)
        if batches >= len(self.counts):
            return self.data
        return self.parts.setdefault(batches, self.data.leading(batches))

    def _rows_of(self, unit: tuple[Layer, ...]) -> Iterator[Candidate]:
        for method in self.candidates:
            together = bool(getattr(method, "pairs", False))
            if not all(isinstance(layer.module, method.targets) for layer in unit):
                continue
            if len(unit) == 2 and not (together and _fits(method, unit)):
                continue
            alone = method
            if len(unit) == 1 and hasattr(method, "pairs"):
                if not getattr(method, "singles", True):
                    continue
                alone = dataclasses.replace(method, pairs=False, singles=True)  # type: ignore[type-var]
            yield Candidate(tuple(layer.name for layer in unit), worded(alone, len(unit) == 2), alone)

    # ------------------------------------------------------------ scoring

    def fill(self, table: Path | None, time_budget: float | None, shared: Shared | None = None) -> None:
        """Time and score every candidate that the table does not have yet.

        Args:
            table: file of the scores.
            time_budget: seconds after which no further candidate is scored; then the layers with the most
                multiply-adds, those of one shape together, come first.
            shared: has losses measured by several processes; by default this one measures them.
        """
        ends = float("inf") if time_budget is None else time.perf_counter() + time_budget
        self._recall(table)
        classes: dict[str, list[tuple[Layer, ...]]] = {}
        for unit in self.units:
            classes.setdefault(_shape_of(unit), []).append(unit)
        todo = [row for row in self.rows if not _finished(row)]
        order = list(classes.values())
        if time_budget is not None:
            # what there is no time for should be what could save least
            order.sort(key=_macs_of, reverse=True)
        for units in order:
            if not self.reference and time.perf_counter() < ends:
                timed = measure_models({"": self.dense}, self._timed_input(), rounds=_ROUNDS)
                self.reference = timed[""].median
            if shared is not None:
                self._share(shared, self._representatives(units), ends)
            if time.perf_counter() < ends:
                self._time_class(units)
            if shared is not None:
                among = {tuple(layer.name for layer in unit) for unit in units}
                rest = [i for i, row in enumerate(self.rows) if row.layers in among and not _finished(row)]
                self._share(shared, rest, ends)
                left = sum(not _finished(other) for other in todo)
                self.tell(f"{pair_name(units[-1][0].names)}: scored", 1 - left / max(len(todo), 1))
                self.write(table)
                continue
            for unit in units:
                names = tuple(layer.name for layer in unit)
                for row in self.rows:
                    if row.layers != names or _finished(row):
                        continue
                    if time.perf_counter() >= ends:
                        row.why_not = BUDGET
                        continue
                    self._score(unit, row)
                    left = sum(not _finished(other) for other in todo)
                    self.tell(f"{pair_name(names)}: {row.label}", 1 - left / len(todo))
                self.context.kept = None
                self.write(table)

    def measure_losses(self, numbers: Sequence[int], seconds: float) -> list[Measured]:
        """Return what putting some candidates in the network by themselves shows; ``rows`` do not change.

        Args:
            numbers: of the candidates in ``rows``.
            seconds: after which no further candidate is scored.
        """
        ends = time.perf_counter() + seconds
        found: list[Measured] = []
        before: tuple[Layer, ...] = ()
        for number in numbers:
            row = dataclasses.replace(self.rows[number], loss=None, why_not=None)
            unit = self._unit(row)
            if unit != before:
                self.context.kept, before = None, unit
            if time.perf_counter() >= ends:
                row.why_not = BUDGET
            else:
                self._score(unit, row)
            specs = None if row.why_not is not None else self._specs_of(row)
            found.append(Measured(number, row.macs_saved, row.loss, row.why_not, specs))
        self.context.kept = None
        return found

    def _share(self, shared: Shared, numbers: Sequence[int], ends: float) -> None:
        """Take over what several processes measure of some candidates."""
        if not numbers:
            return
        left = max(ends - time.perf_counter(), 0.0)
        for one in sorted(shared(self, numbers, left), key=lambda one: one.number):
            row = self.rows[one.number]
            row.macs_saved, row.loss, row.why_not = one.macs_saved, one.loss, one.why_not
            if one.specs is not None:
                self.specs[_shape_of(self._unit(row)), repr(row.method)] = one.specs

    def _representatives(self, units: list[tuple[Layer, ...]]) -> list[int]:
        """Return the numbers of the candidates that are put in the network before a class is timed."""
        among = {tuple(layer.name for layer in unit) for unit in units}
        found: dict[str, int] = {}
        for i, row in enumerate(self.rows):
            if row.layers in among and row.seconds_saved is None and row.why_not is None:
                found.setdefault(repr(row.method), i)
        return [i for i in found.values() if self.rows[i].loss is None]

    def loss_of(self, network: nn.Module) -> float:
        """Return the mean distance of a changed network's outputs from the original's."""
        self.tails.read(self.data)
        with inference_mode_of(self.model):
            self.tails.go_to(())
        return self._distance(network)

    def _loss(self, network: nn.Module) -> float:
        return self._distance(network)

    def _distance(self, network: nn.Module) -> float:
        total, count = 0.0, 0
        with inference_mode_of(network):
            # the tails may read fewer batches
            found = zip(self.tails.answers(network), self.answers, self.counts, strict=False)
            for given, answer, images in found:
                distances = self.task.distances(given, answer, images=images)
                total += float(distances.sum())
                count += len(distances)
        return total / count

    @contextmanager
    def _in_place(self, unit: tuple[Layer, ...], row: Candidate) -> Iterator[None]:
        """Put only this candidate in the network within the context, and keep its modules' specs."""
        self.context.pairs = tuple(pair for pair in self.pairs if pair == unit)
        if self.context.kept is None:
            self.context.kept = {}
        with temporarily_replaced(self.context, row.method, unit) as done:
            row.macs_saved = sum(_macs_saved(layer, done[layer.name]) for layer in unit)
            if row.macs_saved <= 0:
                raise ValueError(NO_GAIN)
            self.specs[_shape_of(unit), repr(row.method)] = [done[layer.name].spec for layer in unit]
            yield

    def _score(self, unit: tuple[Layer, ...], row: Candidate) -> None:
        fitted_on = max(_FITTED_ON, max(map(_images_for, unit)))
        self.tails.read(self._first_images(max(_COMPARED_ON, fitted_on)))
        self.context.calibration = self._first_images(fitted_on)
        try:
            with inference_mode_of(self.model):
                self.tails.go_to(unit[0].names)
            with _excused(row), self._in_place(unit, row):
                row.loss = self._loss(self.context.network)
                if not np.isfinite(row.loss):
                    row.loss, row.why_not = None, "its answers are not finite"
        finally:
            self.context.calibration = self.data

    def _time_class(self, units: list[tuple[Layer, ...]]) -> None:
        """Time each candidate on all units of one shape at once, in the part of the network around them."""
        unit_of = {tuple(layer.name for layer in unit): unit for unit in units}
        rows = [r for r in self.rows if r.layers in unit_of and r.seconds_saved is None and r.why_not is None]
        around = self._around(units)
        try:
            forms = self._forms(unit_of, rows, around)
        except NoPart:
            around, forms = None, self._forms(unit_of, rows, None)
        if not forms:
            return
        timings = self._timed(forms, around)
        for row in rows:
            if row.why_not is None and repr(row.method) in timings:
                shares = _saved(*timings[repr(row.method)], len(units))
                low, middle, high = (share * self.reference for share in shares)
                row.seconds_saved = (low, middle, high)
                if row.seconds_saved[0] <= 0:
                    row.why_not = NO_GAIN

    def _around(self, units: list[tuple[Layer, ...]]) -> Around | None:
        """Return the part of the network that is timed; None for the whole."""
        # ranges of eight bits are the whole network's
        if self.tails.graph is None or self.dtype == torch.int8:
            return None
        names = [name for unit in units for layer in unit for name in layer.names]
        try:
            return Around(self.model, self.tails.graph, names, self._timed_input())
        except NoPart:
            return None

    def _forms(
        self,
        unit_of: Mapping[tuple[str, ...], tuple[Layer, ...]],
        rows: list[Candidate],
        around: Around | None,
    ) -> dict[str, nn.Module]:
        """Return what is timed, by method: the network, or its part, with it in all units."""
        forms: dict[str, nn.Module] = {}
        shape = _shape_of(next(iter(unit_of.values())))
        for row in rows:
            method = repr(row.method)
            # the first unit that the method can replace represents all
            if method not in forms:
                self.tell(f"timing {row.label} in {pair_name(row.layers)}", -1.0)
                # several processes may have done so
                if row.loss is None or (shape, method) not in self.specs:
                    self._score(unit_of[row.layers], row)
                if row.why_not is None:
                    specs = self.specs[shape, method]
                    with _excused(row):
                        sketch = self._sketch([(unit, specs) for unit in unit_of.values()])
                        forms[method] = self._form(sketch if around is None else around.of(sketch))
        if forms and around is not None:
            forms[""] = self._form(around.of(self.model))
        return forms

    def _timed(
        self, forms: Mapping[str, nn.Module], around: Around | None
    ) -> dict[str, tuple[Timing, Timing, Timing]]:
        """Return times by form: of the dense network, of its part, and of the form; without a part the first
        two are one. What other work blurs is timed again, for longer."""
        x = self._timed_input()
        inputs: dict[str, Any] = dict.fromkeys(forms, x if around is None else around.given)
        whole = "" if around is None else "whole network"
        options: dict[str, Any] = {} if around is None else {"round_seconds": _ROUND_OF_PART}

        def times(methods: Sequence[str], rounds: int) -> dict[str, tuple[Timing, Timing, Timing]]:
            networks = {whole: self.dense, **{key: forms[key] for key in ("", *methods) if key in forms}}
            found = measure_models(networks, {**inputs, whole: x}, rounds=rounds, **options)
            return {method: (found[whole], found[""], found[method]) for method in methods}

        found = times([method for method in forms if method], _ROUNDS)
        if blurred := [method for method in found if _blurred(*found[method])]:
            for method, later in times(blurred, _ATTEMPT_ROUNDS).items():
                one, two, three = (a.and_more(b) for a, b in zip(found[method], later, strict=True))
                found[method] = one, two, three
        return found

    def _timed_input(self) -> Tensor:
        return self.example.contiguous(memory_format=torch.channels_last)

    def _sketch(self, chosen: Sequence[tuple[tuple[Layer, ...], list[dict[str, Any]]]]) -> nn.Module:
        """Return a copy of the network with modules of these specs and fresh weights, to be timed."""
        network = copied(self.model).eval()
        made: list[nn.Module] = []
        for unit, specs in chosen:
            for layer, spec in zip(unit, specs, strict=True):
                # a second half refers to its first half by name
                own = {**spec, "partner": unit[0].name} if "partner" in spec else spec
                weight = layer.module.get_parameter("weight")
                made.append(build_module(own).to(weight).eval().requires_grad_(False))
                for name in layer.names:
                    network = set_module(network, name, made[-1])
        for module in made:
            if isinstance(module, Attached):
                module.attach(network)
        return network

    # ------------------------------------------------------------ the table

    @cached_property
    def _identity(self) -> dict[str, Any]:
        layers = [f"{x.name} {x.module} {tuple(x.input_shape or ())[1:]}" for x in self.layers.values()]
        return {
            "layers": hashlib.sha256("\n".join(layers).encode()).hexdigest()[:16],
            "weights": weight_of(self.model),
            "images": hashlib.sha256("".join(self.marks).encode()).hexdigest()[:16],
            **({"compared_on": _COMPARED_ON} if sum(self.counts) > _COMPARED_ON else {}),
            "example": list(self.example.shape),
            **({} if self.dtype is None else {"dtype": str(self.dtype)}),
            **({} if is_usual(self.task) else {"task": self.task.identity}),
            "threads": torch.get_num_threads(),
        }

    def _recall(self, table: Path | None) -> None:
        if table is None or not table.exists():
            return
        content = Entry(read_json(table), table)
        if (theirs := content.get("identity", None).value) != self._identity:
            raise ValueError(f"{table}: scores of another search: {differing_fields(theirs, self._identity)}")
        kept = {}
        for entry in content["rows"].items():
            names = tuple(name.text() for name in entry["layers"].items())
            kept[names, entry["method"].text()] = _Scored.read(entry)
        reference = content["reference"].number(0.0)
        specs = {}
        for entry in content["specs"].items():
            shape, method, modules = entry.items(3)
            specs[shape.text(), method.text()] = [self._spec(module) for module in modules.items()]
        choices = {target: _choice(choice) for target, choice in content["choices"].entries()}
        for row in self.rows:
            scored = kept.get((row.layers, repr(row.method)))
            if scored is None:
                continue
            unit = self._unit(row)
            known = specs.get((_shape_of(unit), repr(row.method)), ())
            if scored.usable and not (reference > 0 and len(known) == len(unit)):
                raise content["rows"].wrong(f"with each usable candidate a reference and specs ({row.label})")
            row.macs_saved, row.loss = scored.macs_saved, scored.loss
            row.why_not = None if scored.why_not == BUDGET else scored.why_not
            row.seconds_saved = scored.seconds_saved
        # keep nothing of a table that is refused
        self.specs, self.choices, self.reference = specs, choices, reference

    def _spec(self, entry: Entry) -> dict[str, Any]:
        """Read a module's spec; a replacement may hardly be larger than the whole network."""
        spec, state = entry.object(), self.context.network.state_dict()
        try:
            measured = build_measured(lambda: build_module(spec), state)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise entry.wrong(f"the spec of a layer ({one_line(error)})") from error
        size = sum(value.nbytes for value in measured.state_dict().values())
        most = (1 << 20) + 4 * sum(value.nbytes for value in state.values())
        bounded(size, what=f"{entry.file}: {entry.at}", at_most=most)
        return spec

    def write(self, table: Path | None) -> None:
        """Write the table to its file, if it has one."""
        if table is not None:
            write_json(
                table,
                {
                    "schema": 1,
                    "kind": "scores",
                    "identity": self._identity,
                    "rows": [row.to_dict() for row in self.rows],
                    "specs": [[shape, method, specs] for (shape, method), specs in self.specs.items()],
                    "reference": self.reference,
                    "choices": self.choices,
                },
            )

    # ------------------------------------------------------------ the whole network

    def attempt(self, chosen: Sequence[Candidate]) -> dict[str, Any]:
        """Return a choice's predicted and measured times, in seconds per call."""
        if not chosen:
            before = measure_models({"": self.dense}, self._timed_input(), rounds=_ROUNDS)[""].median
            return {
                "layers": 0,
                "before": before,
                "predicted": before,
                "after": before,
                "speedup": 1.0,
                "loss": 0.0,
            }
        timings = measure_models(
            {"": self.dense, "fast": self._form_of(chosen)}, self._timed_input(), rounds=_ATTEMPT_ROUNDS
        )
        middle, low, high = timings["fast"].speedup_over(timings[""])
        before = timings[""].median
        return {
            "layers": sum(len(row.layers) for row in chosen),
            "before": before,
            # shares of the time before, independent of the machine's current speed
            "predicted": before * (1 - sum(row.seconds for row in chosen) / self.reference),
            "after": before / middle,
            "speedup": middle,
            "quartiles": [low, high],
            # what the candidates lose alone; together they may lose more
            "loss": sum(max(row.loss or 0.0, 0.0) for row in chosen),
        }

    def slower(self, chosen: Sequence[Candidate]) -> dict[tuple[str, ...], float]:
        """Return the chosen layers without which the network is no slower: their names -> how many times as
        long the network takes without them.

        Layers with the same shape and method are judged together, in turn with the whole choice, and for
        longer if the result is not clear.
        """
        classes: dict[tuple[str, str], list[Candidate]] = {}
        for row in chosen:
            classes.setdefault((_shape_of(self._unit(row)), repr(row.method)), []).append(row)
        found: dict[tuple[str, ...], float] = {}
        fast = self._form_of(chosen) if chosen else self.dense
        for rows in classes.values():
            without = self._form_of([row for row in chosen if row not in rows])
            with_it, alone = timed_clearly({"fast": fast, "": without}, self._timed_input())[""]
            ratio, _, _ = with_it.speedup_over(alone)
            if ratio <= 1:
                found |= {row.layers: ratio for row in rows}
        return found

    def _form_of(self, chosen: Sequence[Candidate]) -> nn.Module:
        if not chosen:
            return self.dense
        sketch = self._sketch([(self._unit(row), self._specs_of(row)) for row in chosen])
        return self._form(sketch)

    def _form(self, network: nn.Module) -> nn.Module:
        """Return the form of a changed network that is timed, as that of the dense one."""
        return inference_form(network, None, self.dtype) if self.tails.suited else eager_form(network)

    def _unit(self, row: Candidate) -> tuple[Layer, ...]:
        return tuple(self.layers[name] for name in row.layers)

    def _specs_of(self, row: Candidate) -> list[dict[str, Any]]:
        return self.specs[_shape_of(self._unit(row)), repr(row.method)]

    def usable(self) -> list[Candidate]:
        """Return the candidates that a choice may contain."""
        return [r for r in self.rows if r.why_not is None and r.loss is not None and r.seconds_saved]


# (scores, numbers of candidates, seconds) -> what several processes measure
Shared = Callable[[Scores, Sequence[int], float], Sequence[Measured]]


def _choice(entry: Entry) -> dict[str, Any]:
    """Check and return an earlier choice from a table."""
    entry["among"].items()
    entry["met"].boolean()
    for attempt in entry["attempts"].items():
        for name in ("layers", "before", "predicted", "after", "speedup"):
            attempt[name].number(0.0)
        attempt.get("loss", 0.0).number(0.0)
        for quartile in attempt.get("quartiles", []).items():
            quartile.number()
    for chosen in entry["chosen"].items():
        chosen["method"].text()
        for layer in chosen["layers"].items():
            layer.text()
    for tried in entry.get("together", []).items():
        for name in ("layers", "alone", "together", "speedup"):
            tried[name].number(0.0)
        tried["taken"].boolean()
    return entry.object()


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A candidate's scores as read from a table."""

    macs_saved: int
    loss: float | None
    seconds_saved: tuple[float, float, float] | None
    why_not: str | None

    @property
    def usable(self) -> bool:
        return self.why_not is None and self.loss is not None and self.seconds_saved is not None

    @classmethod
    def read(cls, entry: Entry) -> _Scored:
        loss, why_not, saved = entry["loss"], entry["why_not"], entry["seconds_saved"]
        quartiles = None
        if not saved.missing():
            low, middle, high = (value.number() for value in saved.items(3))
            quartiles = (low, middle, high)
        return cls(
            entry["macs_saved"].integer(),
            None if loss.missing() else loss.number(),
            quartiles,
            None if why_not.missing() else why_not.text(),
        )


def _fits(method: Method, pair: tuple[Layer, ...]) -> bool:
    """Return whether two layers that were found together are of the kind that a method replaces together."""
    fits = getattr(method, "fits_pair", None)
    return bool(getattr(method, "pairs", False)) and (fits is None or bool(fits(pair)))


def _finished(row: Candidate) -> bool:
    return row.why_not is not None or (row.loss is not None and row.seconds_saved is not None)


def _shape_of(unit: tuple[Layer, ...]) -> str:
    """Return a key that is equal for units of equal speed."""
    return " + ".join(f"{tuple(x.input_shape or ())[1:]} {x.module}" for x in unit)


def _saved(whole: Timing, before: Timing, after: Timing, units: int) -> tuple[float, float, float]:
    """Return quartiles over the rounds of the share of the whole network's time that one unit saves.

    A round's times are measured side by side, so the shares hold even if the machine's speed drifts.
    """
    each = (np.array(before.seconds) - np.array(after.seconds)) / np.array(whole.seconds) / units
    low, middle, high = np.percentile(each, [25, 50, 75])
    return float(low), float(middle), float(high)


def _blurred(whole: Timing, before: Timing, after: Timing) -> bool:
    """Return whether the quartiles of a saving lie so far apart that their middle says little."""
    low, middle, high = _saved(whole, before, after, 1)
    return high - low > max(_BLURRED, abs(middle) / 2)


def _images_for(layer: Layer) -> int:
    """Return how many images give a fit of a layer enough rows."""
    columns = layer.module.get_parameter("weight")[0].numel()
    return math.ceil(_ROWS * columns / max(math.prod((layer.output_shape or ())[2:]), 1))


def _macs_of(units: Sequence[tuple[Layer, ...]]) -> int:
    return sum(layer_macs(layer.module, layer.input_shape or ()) for unit in units for layer in unit)


def _macs_saved(layer: Layer, made: Replacement) -> int:
    shape = layer.input_shape or ()
    after = made.record.get("macs_after")
    return layer_macs(layer.module, shape) - (layer_macs(made.module, shape) if after is None else int(after))


@contextmanager
def _excused(row: Candidate) -> Iterator[None]:
    """Record the reason if a candidate cannot be tried within the context, and let the search continue."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except Unreadable:
        # no fault of the candidate's
        raise
    except ValueError as error:
        row.why_not = str(error)
    except MemoryError:
        row.why_not = "not enough memory for it"
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        row.why_not = "not enough memory for it"
