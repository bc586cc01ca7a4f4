"""A network in eight bits: ranges from calibration images, weights, biases, what stays in real numbers.

Ranges come from torch's own observers. The bias of a channel is corrected by the mean, over the calibration
images, of what rounding its weights changes (Nagel et al., "Data-free quantization through weight
equalization and bias correction", ICCV 2019). Maps that are joined, or of which one is the maximum of windows
of the other, share a grid, so that joining and pooling move bytes; what is only added keeps its own, since
the epilogue takes both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quincunx.fusion.epilogues import Activation
from quincunx.fusion.fused import Fused
from quincunx.fusion.int8 import Int8Program, Int8Step, bare_step, in_eight_bits, sampled_map
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Follower, Map, Step, reference, settled
from quincunx.layers.eightbits import Quantisation, round_weights, sole_weights
from quincunx.modules import copied
from quincunx.ops.int8 import MOST_PRODUCTS, Grid, grid_of_range, quantise_weight

__all__ = ["OBSERVERS", "any_record", "calibrate_network", "quantise_network", "read_images", "weights_of"]

OBSERVERS = ("histogram", "minmax", "percentile")
_LEAST_IMAGES = 16
# what lies beyond a percentile range, on either side
_BEYOND = 1e-4
# images of one call while a network is calibrated, and that layers are compared on alone
_BATCH, _COMPARED = 32, 64
# bytes of answers in float32 that are kept instead of computed again
_MOST_KEPT = 1 << 28

# how many times as far off answers may be where the first and the last layer are in eight bits too
_ENDS_MAY_ADD = 1.5

# a program's name and the number of its step
_Key = tuple[str, int]


class Images:
    """Calibration images in batches of at most 32, read anew in each pass.

    Args:
        batches: tensors [N, C, H, W], or tuples and lists whose first entry is one; can be iterated again.

    Attributes:
        count: of the images.
        shape: [C, H, W] of the first one.

    Raises:
        TypeError: something else.
        ValueError: too few, or numbers that are not finite.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.count, self.shape = 0, torch.Size()
        for images in self:
            self.shape = self.shape if self.count else images.shape[1:]
            self.count += len(images)
        if self.count < _LEAST_IMAGES:
            raise ValueError(f"calibration: {self.count} images, expected at least {_LEAST_IMAGES}")

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self.batches):
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(images, Tensor) or images.dim() != 4:
                what = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
                raise TypeError(f"calibration: expected images [N, C, H, W] in batch {number}, got {what}")
            if not bool(images.isfinite().all()):
                raise ValueError(f"calibration: batch {number} has numbers that are not finite")
            yield from torch.split(images.detach(), _BATCH) if len(images) else ()


def read_images(calibration: Any) -> Images:
    """Return calibration images as batches of at most 32, which are not kept in memory.

    Args:
        calibration: a tensor [N, C, H, W], or batches that can be iterated again: tensors, or tuples and
            lists whose first entry is one.

    Raises:
        TypeError: something else.
        ValueError: none, too few, or numbers that are not finite.

    Example:
        >>> [len(batch) for batch in read_images(torch.zeros(40, 3, 8, 8))]
        [32, 8]
    """
    if calibration is None:
        raise ValueError(
            f"calibration=None: dtype=torch.int8 needs at least {_LEAST_IMAGES} images like the network's"
        )
    if not isinstance(calibration, (Tensor, Iterable)):
        raise TypeError(
            f"calibration: expected images or batches of images, got {type(calibration).__name__}"
        )
    if isinstance(calibration, Iterator):
        raise TypeError(
            f"calibration: a {type(calibration).__name__} can be read only once, and ranges and answers need "
            "a pass each; pass a list or a DataLoader"
        )
    return Images([calibration] if isinstance(calibration, Tensor) else calibration)


class _Answers:
    """A network's answers to images, batch by batch; kept unless they are large, else computed again."""

    def __init__(self, network: nn.Module, images: Images) -> None:
        self.network, self.images = network, images
        self.kept: list[Any] | None = None
        self.too_large = False

    def __iter__(self) -> Iterator[Any]:
        if self.kept is not None:
            yield from self.kept
            return
        found: list[Any] = []
        held = 0
        for batch in self.images:
            answer = self.network(batch)
            held += sum(part.nbytes for part in pytree.tree_leaves(answer) if isinstance(part, Tensor))
            if held > _MOST_KEPT:
                self.too_large = True
                found.clear()
            if not self.too_large:
                found.append(answer)
            yield answer
        if not self.too_large:
            self.kept = found


def calibrate_network(
    model: nn.Module,
    lower: Callable[[nn.Module], Fused],
    images: Images,
    observer: str,
    max_drop: float,
    keep_ends: bool | None = None,
) -> tuple[nn.Module, Quantisation]:
    """Return a copy of a network with rounded weights, and what makes eight bits of it.

    Args:
        model: it stays as it is.
        lower: fuses in float32.
        images: batches, from :func:`read_images`.
        observer: one of ``OBSERVERS``.
        max_drop: how many of 100 images may get another answer.
        keep_ends: whether the first convolution and the last layer stay in real numbers; None: where answers
            would else be half as far off again, or more than ``max_drop`` of 100 would change for them.

    Returns:
        The copy, and a record whose facts are "layers" (how many compute in eight bits), "kept" (those that
        do not, by name, and why), "drop" (how many of 100 answers changed), "images", "observer" and
        "input", [C, H, W] of an image.

    Raises:
        ValueError: an unknown observer, a ``max_drop`` beyond its limits, a network of several arguments, or
            a map that is not finite.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"observer={observer!r}: expected one of {', '.join(OBSERVERS)}")
    if not 0 <= max_drop <= 100:
        raise ValueError(f"max_drop={max_drop}: expected 0 to 100")
    fused = lower(model)
    arguments = [str(n.target) for n in fused.graph.nodes if n.op == "placeholder" and not n.args]
    if len(arguments) != 1:
        raise ValueError(
            "model: expected a network of one argument, since calibration has one, got "
            + (", ".join(arguments) or "none")
        )
    with torch.inference_mode(False), torch.no_grad():
        kept = _kept_from_the_start(fused, bool(keep_ends))
        found = _observe(fused, images, observer, lower(_rounded_copy(model, _paths(model, fused, kept))))
        answers = _Answers(fused, images)
        result = _assembled(fused, found, kept)
        drop, off = _compared(map(result, images), answers)
        longer = _kept_from_the_start(fused, True)
        if keep_ends is None and len(longer) > len(kept):
            with_ends = _assembled(fused, found, longer)
            real_drop, real_off = _compared(map(with_ends, images), answers)
            if off > _ENDS_MAY_ADD * real_off or real_drop <= max_drop < drop:
                kept, result, drop = longer, with_ends, real_drop
        layers = [key for key in _layers(fused) if key not in kept]
        if drop > max_drop and layers:
            kept, result, drop = _search(fused, found, kept, layers, images, answers, max_drop)
        names, programs = _names(fused), _programs(fused)
        facts = {
            "layers": len(names) - len(kept),
            "kept": {names[key]: why for key, why in kept.items()},
            "drop": drop,
            "images": images.count,
            "observer": observer,
            "input": list(images.shape),
        }
        shifts = {
            programs[name].steps[number].writes[0]: (
                None if (name, number) in kept else found[name].shifts[number].contiguous()
            )
            for name, number in _layers(fused)
        }
        grids = {name: grid for part in found.values() for name, grid in part.grids.items()}
        paths = _paths(model, fused, kept)
        return _rounded_copy(model, paths), Quantisation(grids, shifts, paths, facts)


def quantise_network(fused: Fused, record: Quantisation, real: torch.dtype = torch.float32) -> Fused:
    """Return a copy of a fused network in eight bits, as a record says.

    Args:
        fused: in float32, made of the network that has the record, with rounded weights; it stays as it is.
        record: of the network.
        real: type of what is not in eight bits.

    Returns:
        A copy; ``meta["int8"]`` has the record's facts.

    Raises:
        ValueError: the record is of another network.
    """
    programs = _programs(fused)
    found = {name: _Observed(dict(record.grids), {}, {}) for name in programs}
    kept: dict[_Key, str] = {}
    steps = {programs[name].steps[number].writes[0]: (name, number) for name, number in _layers(fused)}
    changed = "it was changed since; calibrate it again, with calibration="
    if steps.keys() != record.shifts.keys():
        other = min(steps.keys() ^ record.shifts.keys())
        raise ValueError(
            f"model: its record of eight bits is of other convolutions (one is {other!r}): {changed}"
        )
    with torch.inference_mode(False), torch.no_grad():
        for written, shift in record.shifts.items():
            name, number = steps[written]
            step = programs[name].steps[number]
            assert isinstance(step, Step)  # noqa: S101  # layers are
            if shift is None:
                kept[name, number] = ""
                continue
            stored = [step.source] + ([sampled_map(step)] if step.filling is not None else [])
            fits = step.weight.dtype == torch.float32 and all(name in record.grids for name in stored)
            if not fits or shift.shape != (step.out_channels,):
                raise ValueError(
                    f"model: its record of eight bits does not fit convolution {written!r}: {changed}"
                )
            found[name].weights[number] = weights_of(step)
            found[name].shifts[number] = shift
        result = _assembled(fused, found, kept, real)
    result.meta["int8"] = dict(record.facts)
    return result


def any_record(fused: Fused, keep_ends: bool = False) -> Quantisation:
    """Return a record with ranges that nobody has seen, for a network that is only timed.

    Args:
        fused: in float32.
        keep_ends: whether the first convolution and the last layer stay in real numbers.
    """
    kept, programs = _kept_from_the_start(fused, keep_ends), _programs(fused)
    maps = {m for program in programs.values() for step in program.steps for m in (*step.reads, *step.writes)}
    shifts: dict[str, Tensor | None] = {}
    for name, number in _layers(fused):
        step = programs[name].steps[number]
        assert isinstance(step, Step)  # noqa: S101  # layers are
        shifts[step.writes[0]] = None if (name, number) in kept else torch.zeros(step.out_channels)
        maps |= {sampled_map(step)} if step.filling is not None else set()
    return Quantisation(dict.fromkeys(maps, Grid(0.05)), shifts, ())


def _paths(model: nn.Module, fused: Fused, kept: Mapping[_Key, str]) -> tuple[str, ...]:
    """The layers of a network whose weights are in eight bits wherever they are used."""
    programs = _programs(fused)
    of = {key: getattr(programs[key[0]].steps[key[1]], "layer", "") for key in _layers(fused)}
    real = {of[key] for key in kept}
    paths = (path for key, path in of.items() if path and path not in real)
    # the layer of a network that is one layer has a path that the network has not
    there = dict(model.named_modules())
    return sole_weights(model, [path for path in paths if path in there])


def _rounded_copy(model: nn.Module, layers: tuple[str, ...]) -> nn.Module:
    result = copied(model)
    round_weights(result, layers)
    return result


# ---------------------------------------------------------------- which layers


def _programs(fused: nn.Module) -> dict[str, Program]:
    return {name: m for name, m in fused.named_modules() if isinstance(m, Program)}


def _layers(fused: nn.Module) -> list[_Key]:
    """Every convolution of the programs, in order."""
    return [
        (name, number)
        for name, program in _programs(fused).items()
        for number, step in enumerate(program.steps)
        if isinstance(step, Step) and step.kind != "mean"
    ]


def _names(fused: nn.Module) -> dict[_Key, str]:
    programs = _programs(fused)
    found: dict[_Key, str] = {}
    for name, number in _layers(fused):
        step = programs[name].steps[number]
        label = step.layer if isinstance(step, Step) and step.layer else step.writes[0]
        found[name, number] = label if label not in found.values() else f"{label} ({name}, step {number})"
    return found


def _kept_from_the_start(fused: Fused, ends: bool) -> dict[_Key, str]:
    """Layers that are not tried in eight bits, and why."""
    programs, kept = _programs(fused), {}
    behind: set[fx.Node] = set()
    for node in fused.graph.nodes:
        called = str(node.target) if node.op == "call_module" else ""
        if called in programs:
            program = programs[called]
            given = zip(program.inputs, node.args, strict=True)
            first = {name for name, value in given if isinstance(value, fx.Node) and value not in behind}
            for number, step in enumerate(program.steps):
                if ends and isinstance(step, Step) and step.kind != "mean" and step.source in first:
                    kept[called, number] = "reads the network's input"
            behind.add(node)
        elif behind.intersection(node.all_input_nodes):
            behind.add(node)
    layers = _layers(fused)
    for key in layers:
        step = programs[key[0]].steps[key[1]]
        assert isinstance(step, Step)  # noqa: S101  # layers are
        products = step.weight[0].numel() if step.kind != "transposed" else step.weight[:, 0].numel()
        if step.weight.dtype != torch.float32:
            kept[key] = f"is in {step.weight.dtype}"
        elif products > MOST_PRODUCTS:
            kept[key] = f"sums {products} products, more than fit 32 bits"
    if ends and layers and not any(isinstance(module, nn.Linear) for module in fused.modules()):
        kept.setdefault(layers[-1], "is the last layer")
    return kept


# ---------------------------------------------------------------- what the images say


@dataclass
class _Observed:
    """Of one program: the grid of each map, and for each convolution its integers, their scales and what is
    added to its bias."""

    grids: dict[str, Grid]
    weights: dict[int, tuple[Tensor, Tensor]]
    shifts: dict[int, Tensor]


class _Watched(nn.Module):
    """A program that runs step by step on whole maps and keeps what it sees."""

    def __init__(self, program: Program, observer: str, rounded: Program) -> None:
        super().__init__()
        self.program = program
        self.ranges: dict[str, Any] = {}
        self.kind, self.count = observer, 0
        self.steps: dict[int, tuple[Step, Tensor, Tensor]] = {}
        self.shifts: dict[int, Tensor] = {}
        for number, step in enumerate(program.steps):
            if isinstance(step, Step) and step.kind != "mean" and step.weight.dtype == torch.float32:
                other = rounded.steps[number]
                assert isinstance(other, Step)  # noqa: S101  # the same network
                self.steps[number] = (step, *weights_of(other))

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        values = self.program._plain(dict(zip(self.program.inputs, arguments, strict=True)))
        for step in self.program.steps:
            if isinstance(step, Step) and step.filling is not None:
                values |= self._one(bare_step(step), values)
        for name, value in values.items():
            if value.dim() == 4:
                if not bool(value.isfinite().all()):
                    raise ValueError(
                        f"calibration: map {name!r} of the network is not finite on these images"
                    )
                self.ranges.setdefault(name, _observer(self.kind))(value.float())
        images = len(arguments[0])
        for number, (step, integers, scales) in self.steps.items():
            off = step.weight - integers.float() * _by_output(scales, step)
            bare = replace(step, weight=off, bias=None, shortcut=None, activation=Activation.NONE, slope=None)
            bare = replace(bare, out="off", out2=None, scale2=None, shift2=None, filling=None)
            bare = replace(bare, kind="sampled") if step.filling is not None else bare
            mean = self._one(bare, values)["off"].mean((0, 2, 3)) * images
            self.shifts[number] = self.shifts.get(number, 0) + mean
        self.count += images
        return tuple(values[name] for name in self.program.outputs)

    @staticmethod
    def _one(step: Step, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a step that nothing is added to writes."""
        x = values[step.source]
        maps = {step.source: Map(x.shape[1], (x.shape[2], x.shape[3]))}
        if step.like is not None:
            maps[step.like] = Map(0, (values[step.like].shape[2], values[step.like].shape[3]))
        local = {step.source: x}
        reference(settled(step, maps), local, maps)
        return {name: local[name] for name in step.writes}

    def observed(self) -> _Observed:
        ranges = {name: _range_of(seen, self.kind) for name, seen in self.ranges.items()}
        weights = {number: (integers, scales) for number, (_, integers, scales) in self.steps.items()}
        shifts = {number: shift / max(self.count, 1) for number, shift in self.shifts.items()}
        return _Observed(_shared_grids(self.program, ranges), weights, shifts)


def weights_of(step: Step) -> tuple[Tensor, Tensor]:
    """A step's weight in int8 and the scales of its outputs."""
    if step.kind != "transposed":
        return quantise_weight(step.weight)
    # [C, O / groups, kh, kw]: an output channel is a group and a place in it
    grouped = step.weight.view(step.groups, -1, *step.weight.shape[1:])
    turned, scales = quantise_weight(grouped.transpose(1, 2).flatten(0, 1))
    back = turned.view(step.groups, step.weight.shape[1], -1, *step.weight.shape[2:]).transpose(1, 2)
    return back.reshape(step.weight.shape), scales


def _by_output(scales: Tensor, step: Step) -> Tensor:
    """Scales of the outputs in the shape of a step's weight."""
    if step.kind != "transposed":
        return scales.view(-1, 1, 1, 1)
    each = step.weight.shape[0] // step.groups
    return scales.view(step.groups, -1).repeat_interleave(each, 0)[:, :, None, None]


def _observer(kind: str) -> Any:
    # torch's quantisation package takes a moment to import
    from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver

    made = MinMaxObserver if kind == "minmax" else HistogramObserver
    return made(dtype=torch.quint8, qscheme=torch.per_tensor_affine)


def _range_of(seen: Any, kind: str) -> tuple[float, float]:
    low, high = float(seen.min_val), float(seen.max_val)
    if kind == "minmax" or low == high:
        return low, high
    if kind == "percentile":
        shares = seen.histogram.double().cumsum(0) / seen.histogram.double().sum()
        width = (high - low) / len(shares)
        first = int((shares <= _BEYOND).sum())
        last = int((shares < 1 - _BEYOND).sum())
        return low + first * width, low + (last + 1) * width
    scale, zero = (float(value) for value in seen.calculate_qparams())
    return max(low, -zero * scale), min(high, (255 - zero) * scale)


def _shared_grids(program: Program, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Grid]:
    """A grid for each map, and one for all that are joined or pooled."""
    group = {name: name for name in ranges}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for step in program.steps:
        if isinstance(step, Follower) and step.kind in ("concat", "maxpool") and step.out in group:
            for source in step.sources:
                if source in group:
                    group[root(source)] = root(step.out)
    bounds: dict[str, tuple[float, float]] = {}
    for name, (low, high) in ranges.items():
        first, last = bounds.get(root(name), (low, high))
        bounds[root(name)] = min(first, low), max(last, high)
    return {name: grid_of_range(*bounds[root(name)]) for name in ranges}


def _observe(
    fused: Fused, images: Iterable[Any], observer: str, rounded: Fused | None = None
) -> dict[str, _Observed]:
    """Ranges of maps and shifts of biases.

    Args:
        images: batches, or tuples of arguments.
        rounded: the network with rounded weights.
    """
    watching, others = _copied(fused), _programs(rounded or fused)
    watched = {
        name: _Watched(program, observer, others[name]) for name, program in _programs(watching).items()
    }
    for name, module in watched.items():
        watching.set_submodule(name, module)
    for batch in images:
        watching(*batch) if isinstance(batch, tuple) else watching(batch)
    return {name: module.observed() for name, module in watched.items()}


# ---------------------------------------------------------------- the copy


def _assembled(
    fused: Fused,
    found: Mapping[str, _Observed],
    kept: Mapping[_Key, str],
    real: torch.dtype = torch.float32,
) -> Fused:
    """A copy in which all layers but some compute in eight bits, those in another type."""
    programs = _programs(fused)
    result = _copied(fused)
    for name, program in programs.items():
        steps: list[Step | Follower] = []
        for number, step in enumerate(program.steps):
            low = isinstance(step, Step) and (name, number) not in kept and step.weight.dtype == torch.float32
            if not low or not isinstance(step, Step):
                steps.append(step)
            elif step.kind == "mean":
                steps.append(in_eight_bits(step, None, None, None))
            else:
                shift = found[name].shifts[number]
                bias = shift if step.bias is None else step.bias + shift
                steps.append(in_eight_bits(step, *found[name].weights[number], bias))
        if any(isinstance(step, Int8Step) and step.integers is not None for step in steps):
            names = program.inputs, program.outputs
            # without layers in another type, arguments and results need no pass of their own into it
            alone = all(isinstance(step, (Int8Step, Follower)) for step in steps)
            outside = torch.float32 if alone else real
            result.set_submodule(name, Int8Program(steps, *names, found[name].grids, outside))
        elif program.dtype == torch.float32 != real:
            result.set_submodule(name, Program(steps, program.inputs, program.outputs, dtype=real))
    return result


def _copied(fused: Fused) -> Fused:
    """A network of the same modules, of which some may be exchanged."""
    make, parts = fused.__reduce__()
    found: Fused = make(*parts)
    return found


# ---------------------------------------------------------------- what it costs


def _search(
    fused: Fused,
    found: Mapping[str, _Observed],
    kept: Mapping[_Key, str],
    layers: Sequence[_Key],
    images: Images,
    answers: Iterable[Any],
    max_drop: float,
) -> tuple[dict[_Key, str], Fused, float]:
    """Keep the fewest layers in float32, those first that alone change the answers most."""
    some = list(islice(images, -(-_COMPARED // _BATCH)))
    first = [fused(batch) for batch in some]
    alone: dict[_Key, float] = {}
    for key in layers:
        others = {**kept, **{other: "" for other in layers if other != key}}
        tried = _assembled(fused, found, others)
        alone[key] = _error([tried(batch) for batch in some], first)
    order = sorted(layers, key=lambda key: -alone[key])

    def keep(count: int) -> tuple[dict[_Key, str], Fused, float]:
        more = {**kept, **dict.fromkeys(order[:count], "changes the answers too much")}
        result = _assembled(fused, found, more)
        return more, result, _changed(map(result, images), answers)

    # enough layers surely are enough; fewer are tried by halves, as if more were never worse
    low, high, best = 0, len(order), keep(len(order))
    while high - low > 1:
        middle = (low + high) // 2
        tried_one = keep(middle)
        if tried_one[2] <= max_drop:
            high, best = middle, tried_one
        else:
            low = middle
    return best


def _changed(found: Iterable[Any], expected: Iterable[Any]) -> float:
    """How many of 100 images get another answer; for other answers than classes, the relative error in %."""
    return _compared(found, expected)[0]


def _compared(found: Iterable[Any], expected: Iterable[Any]) -> tuple[float, float]:
    """How many of 100 images get another answer, as in :func:`_changed`, and the relative error."""
    different = count = 0
    named, sums = True, _Differences()
    for given, wanted in zip(found, expected, strict=True):
        sums.add(given, wanted)
        a, b = _classes(given), _classes(wanted)
        if a is None or b is None:
            named = False
        else:
            different, count = different + int((a != b).sum()), count + len(b)
    return (100 * different / count if named else 100 * sums.share()), sums.share()


def _classes(answer: Any) -> Tensor | None:
    named = isinstance(answer, Tensor) and answer.dim() == 2 and answer.shape[1] > 1
    return answer.argmax(1) if named else None


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The root of the summed squares of differences over that of the expected numbers."""
    sums = _Differences()
    for given, wanted in zip(found, expected, strict=True):
        sums.add(given, wanted)
    return sums.share()


class _Differences:
    """Squares of the differences of answers, and of the expected answers, summed batch by batch."""

    def __init__(self) -> None:
        self.off = self.total = 0.0

    def add(self, found: Any, expected: Any) -> None:
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                self.off += float((a.double() - b.double()).square().sum())
                self.total += float(b.double().square().sum())

    def share(self) -> float:
        return math.sqrt(self.off / max(self.total, 1e-30))
