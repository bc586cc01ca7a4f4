"""Measure whether replacements save time in their network, and undo those that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quincunx.acceleration.scores import inference_form, timed_clearly
from quincunx.measure.latency import Timing
from quincunx.modules import copied, set_module
from quincunx.surgery.method import Accelerated

__all__ = ["restore_layers", "whole_gain", "without_slower"]

# networks held in memory at once, besides the whole one, to be timed in turn
_TOGETHER = 6
# a smaller speed-up of a whole network counts as none: timings vary
_CLEAR = 1.01
_ROUNDS = 11


def restore_layers(original: nn.Module, found: Accelerated, reasons: dict[str, str]) -> Accelerated:
    """Return the same with some layers restored; the reasons go to ``skipped``.

    Args:
        original: the network before.
        found: the accelerated network; it is not changed.
        reasons: name of a replaced layer -> why it is restored.
    """
    network = copied(found.model)
    notes: dict[str, Any] = dict(getattr(network, "quincunx_replaced", {}))
    for name in reasons:
        module = copied(original.get_submodule(name))
        for place in found.replaced[name].get("names", [name]):
            module.train(network.get_submodule(place).training)
            network = set_module(network, place, module)
            notes.pop(place, None)
    network.quincunx_replaced = notes  # type: ignore[assignment]
    left = {name: record for name, record in found.replaced.items() if name not in reasons}
    maps = {name: kept for name, kept in found.maps.items() if name in left}
    skipped = {**found.skipped, **reasons}
    return dataclasses.replace(found, model=network, replaced=left, skipped=skipped, maps=maps)


def without_slower(
    original: nn.Module,
    found: Accelerated,
    example: Tensor,
    *,
    rounds: int = _ROUNDS,
    dtype: torch.dtype | None = None,
) -> Accelerated:
    """Return the same without the replacements that save the network no time.

    Replacements of layers of equal size are judged together: the network is timed with
    and without them in turn, both fused if possible, and longer if it is not clear which is
    faster. They stay if more rounds favour them than chance would explain. The record of each remaining
    replacement has a "gain": how many times as long the network takes without its group. If the remaining
    network is no faster than the original, everything is restored.

    Args:
        original: the network before.
        found: the accelerated network.
        example: an input [N, C, H, W] to time with.
        rounds: how often each network is timed.
        dtype: number format in which they are timed.
    """
    x = example.contiguous(memory_format=torch.channels_last) if example.dim() == 4 else example
    classes = list(_classes(original, found))
    slower: dict[str, str] = {}
    whole = inference_form(found.model, x[:1], dtype)
    for start in range(0, len(classes), _TOGETHER):
        some = classes[start : start + _TOGETHER]
        others = {
            f"{start + i}": inference_form(
                restore_layers(original, found, dict.fromkeys(names, "")).model, None, dtype
            )
            for i, names in enumerate(some)
        }
        timings = timed_clearly({"": whole, **others}, x, rounds=rounds)
        for names, key in zip(some, others, strict=True):
            with_it, without = timings[key]
            gain = _times_as_long(without, with_it)
            for name in names:
                found.replaced[name]["gain"] = gain
                if not with_it.clearly_faster_than(without):
                    slower[name] = _reason(gain)
    if slower:
        found = restore_layers(original, found, slower)
    if not found.replaced:
        return found
    if (ratio := whole_gain(original, found.model, x, rounds=rounds, dtype=dtype)) >= _CLEAR:
        return found
    reason = f"no gain: the whole network with all that was replaced is {ratio:.2f} times as fast as before"
    return restore_layers(original, found, dict.fromkeys(found.replaced, reason))


def whole_gain(
    original: nn.Module,
    fast: nn.Module,
    x: Tensor,
    *,
    rounds: int = _ROUNDS,
    dtype: torch.dtype | None = None,
) -> float:
    """Return the speed-up of a network over the original, both fused if possible."""
    forms = {"": inference_form(fast, x[:1], dtype), "before": inference_form(original, x[:1], dtype)}
    after, before = timed_clearly(forms, x, rounds=rounds)["before"]
    return _times_as_long(before, after)


def _times_as_long(without: Timing, with_it: Timing) -> float:
    """Return the median ratio over the rounds, whose two times are measured side by side."""
    return float(np.median(np.array(without.seconds) / np.array(with_it.seconds)))


def _reason(gain: float) -> str:
    if gain > 1:
        return (
            f"no clear gain: the network takes {gain:.2f} times as long without it, within what timings vary"
        )
    return f"no gain: the network takes {1 / gain:.2f} times as long with it as without it"


def _classes(original: nn.Module, found: Accelerated) -> Iterable[Sequence[str]]:
    """Yield groups of replaced layers that are alike before and after, with both layers of each pair."""
    classes: dict[str, list[str]] = {}
    for name, record in found.replaced.items():
        names = record.get("pair", [name])
        if name == names[0]:
            parts = [found.replaced[part] for part in names]
            alike = [(r["kind"], r["macs_before"], r["macs_after"]) for r in parts]
            key = f"{alike} {[str(original.get_submodule(part)) for part in names]}"
            classes.setdefault(key, []).extend(names)
    return classes.values()
