"""Time and judge what costs nothing to make, beside which an acceleration has to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.acceleration.free import (
    FreeChoice,
    format_to_use,
    meets,
    scaled_inputs,
    size_to_use,
    sizes_refused,
    smaller_sizes,
)
from quincunx.acceleration.judge import JudgedStage, score_on
from quincunx.acceleration.lowered import ready_for
from quincunx.acceleration.scores import inference_form
from quincunx.acceleration.target import Search
from quincunx.acceleration.timing import cost_record, format_served, time_free
from quincunx.fusion.fuse import fuse
from quincunx.measure.tasks import Task
from quincunx.modules import copied
from quincunx.surgery.method import Accelerated

__all__ = ["Baselines", "Picked", "pick"]

# they are shown beside the result; what is chosen is timed again for longer
_ROUNDS, _SECONDS = 7, 0.03
_FORMATS = (torch.bfloat16, torch.int8)
# asked of methods where the format alone is as fast as was asked, but loses too much
_JUST_FASTER = 1.01


@dataclass
class Baselines:
    """The network as it is in other number formats and with smaller inputs, timed and judged.

    Args:
        original: the network.
        images: calibration images and targets, on which a search compares them.
        one: an input [1, C, H, W].
        judged: (name, network) -> the network judged on the test images.
        before: the network itself, judged.
        task: scores and how outputs are compared.
        batch: images of the timed inputs.
        base: number format of the network that times are compared with; None for float32.

    Attributes:
        rows: a dictionary for each: "name", "dtype", "size", "seconds", "speedup", "macs", "macs_before",
            "calibration_drop" and "drop" (score lost on calibration and on test images), and the score.
        refused: name -> why it cannot be used.
        made: format -> the network that is fused in it.
    """

    original: nn.Module
    images: Sequence[tuple[Tensor, Any]]
    one: Tensor
    judged: Callable[[str, nn.Module], JudgedStage]
    before: JudgedStage
    task: Task
    batch: int
    base: torch.dtype | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    made: dict[torch.dtype | None, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.score = score_on(self.original, self.images, self.task, self.original)
        self.macs = cost_record(self.original, self.one)["macs"]

    def try_formats(self) -> list[dict[str, Any]]:
        """Add the number formats that are faster here than float32; return all rows."""
        example = torch.randn(self.batch, *self.one.shape[1:])
        served = []
        for dtype in _FORMATS:
            found, reason = format_served(self.original, example, dtype)
            if found is None:
                self.refused[FreeChoice(dtype).name] = reason or "not faster than float32 here"
            else:
                served.append(FreeChoice(found))
        return self._added(served)

    def try_sizes(self, dtype: torch.dtype | None) -> list[dict[str, Any]]:
        """Add smaller inputs in a format; return all rows."""
        sizes = smaller_sizes((self.one.shape[2], self.one.shape[3]))
        refused = sizes_refused(self.original, self.images[0][0][:1], sizes)
        self.refused.update({FreeChoice(size=size).name: reason for size, reason in refused.items()})
        return self._added([FreeChoice(dtype, size) for size in sizes if size not in refused])

    def _ready(self, dtype: torch.dtype | None) -> nn.Module:
        """The network for a format; calibrated once."""
        if dtype not in self.made:
            self.made[dtype] = ready_for(self.original, dtype, self.images, self.task)
        return self.made[dtype]

    def _fused(self, dtype: torch.dtype | None) -> nn.Module:
        """The network as it is judged in a format."""
        if dtype is None:
            return inference_form(self.original, self.one)
        return fuse(self._ready(dtype), dtype, force=True)

    def _added(self, choices: Sequence[FreeChoice]) -> list[dict[str, Any]]:
        if not choices:
            return self.rows
        times = time_free(
            self._ready,
            choices,
            self.one.shape[1:],
            batch=self.batch,
            dtype=self.base,
            rounds=_ROUNDS,
            round_seconds=_SECONDS,
        )
        # fused once for all sizes of a format
        networks = {dtype: self._fused(dtype) for dtype in dict.fromkeys(choice.dtype for choice in choices)}
        for choice in choices:
            network = networks[choice.dtype]
            with scaled_inputs(network, choice.size):
                lost = score_on(network, self.images, self.task, self.original)
                stage = self.judged(choice.name, network)
            small = self.one if choice.size is None else self.one.new_zeros(*self.one.shape[:2], *choice.size)
            self.rows.append(
                {
                    **stage.against(self.before),
                    "name": choice.name,
                    "dtype": choice.format_name,
                    "size": None if choice.size is None else list(choice.size),
                    "seconds": times[choice]["seconds_after"],
                    "speedup": times[choice]["speedup"],
                    "macs": cost_record(self.original, small)["macs"],
                    "macs_before": self.macs,
                    "calibration_drop": self.task.scale.lost(self.score, lost),
                    "drop": self.task.scale.lost(self.before.score, stage.score),
                }
            )
        return self.rows


@dataclass
class Picked:
    """What a search found among methods, formats and sizes.

    Attributes:
        found: the network; None where nothing was searched.
        dtype: number format of inference.
        size: height and width to which images are scaled; None for their own.
        gained: how many times as fast as float32 a format that the search chose is by itself; None if it
            chose none.
        rows: of :class:`Baselines`.
        refused: of :class:`Baselines`.
    """

    found: Accelerated | None = None
    dtype: torch.dtype | None = None
    size: tuple[int, int] | None = None
    gained: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what a result file says of it."""
        if self.found is None:
            return {}
        return {
            "input": None if self.size is None else list(self.size),
            "format_gain": self.gained,
            "free": {"rows": self.rows, "refused": self.refused},
        }


def pick(method: Search, free: Baselines, run: Callable[..., Accelerated]) -> Picked:
    """Choose for a target among a number format, a smaller input and methods for layers.

    First the format: the fastest that loses little (:func:`quincunx.acceleration.free.format_to_use`); all
    else is searched in it. A size that meets speed and loss together ends the search, because it needs no
    fit. Otherwise layers are chosen, and of the two the one that loses less on the calibration images is
    taken, or if only a loss was asked for, the faster one. What may not be chosen is tried all the same, to
    be shown beside the result.

    Args:
        method: the search; its ``free`` says what may be chosen.
        free: times and judges formats and sizes.
        run: (search, dtype=) -> the network that methods give.
    """
    target, scale, dtype, gained = method.target, free.task.scale, free.base, None
    rows = [] if dtype is not None else free.try_formats()
    rest = method
    row = format_to_use(rows, target, scale, free.score) if "format" in method.free else None
    if row is not None:
        dtype, gained = getattr(torch, row["dtype"]), float(row["speedup"]["median"])
        if target.speedup is not None:
            left = max(target.speedup / gained, _JUST_FASTER)
            rest = dataclasses.replace(method, target=dataclasses.replace(target, speedup=left))
    rows = free.try_sizes(dtype)
    sized = None
    if "size" in method.free:
        sized = size_to_use(rows, target, FreeChoice(dtype).format_name)
    only_drop = target.to_dict().keys() == {"max_drop"}

    def picked(found: Accelerated, size: Sequence[int] | None = None) -> Picked:
        record = {**(found.search or {}), "target": target.to_dict()}
        height_width = None if size is None else (size[0], size[1])
        found = dataclasses.replace(found, search=record)
        return Picked(found, dtype, height_width, gained, rows, free.refused)

    if row is not None and not only_drop and meets(row, target):
        return picked(_as_it_is(free, True))
    if sized is not None and target.max_drop is not None and not only_drop:
        return picked(_as_it_is(free, True), sized["size"])
    if not method.methods:
        return picked(_as_it_is(free, sized is not None), None if sized is None else sized["size"])
    found = run(rest, dtype=dtype)
    if sized is None:
        return picked(found)
    speed = float(found.search["attempts"][-1]["speedup"]) if found.replaced and found.search else 1.0
    if only_drop:
        taken = float(sized["speedup"]["median"]) > speed * (gained or 1.0)
    else:
        lost = scale.lost(free.score, score_on(found.model, free.images, free.task, free.original))
        taken = not (found.search or {}).get("met") or sized["calibration_drop"] < lost
    return picked(_as_it_is(free, True), sized["size"]) if taken else picked(found)


def _as_it_is(free: Baselines, met: bool) -> Accelerated:
    """Return the network without a replaced layer, as a search's result."""
    record: dict[str, Any] = {
        "met": met,
        "attempts": [],
        "chosen": [],
        "candidates": [],
        "macs": free.macs,
        "images": sum(len(x) for x, _ in free.images),
        **({} if free.task.classifies else {"task": free.task.to_dict()}),
    }
    return Accelerated(copied(free.original).eval(), {}, {}, search=record)
