"""Time a network and its layers before and after, in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.acceleration.candidates import pair_name
from quincunx.acceleration.free import FreeChoice
from quincunx.acceleration.scores import eager_form
from quincunx.fusion.calibrate import fuse_to_time
from quincunx.fusion.faster import speed_ratio
from quincunx.fusion.fuse import fuse
from quincunx.fusion.int8 import Int8Program
from quincunx.measure.cost import cost
from quincunx.measure.engines import PEERS
from quincunx.measure.latency import Timing, measure_models
from quincunx.modules import inference_mode_of
from quincunx.progress import progress_bar
from quincunx.surgery.calibration import run_order
from quincunx.surgery.method import (
    Accelerated,
)

__all__ = ["time_accelerated", "time_free", "time_layers", "time_together"]

# approximate duration of a round for a layer: there are many layers, each called some hundred times in all
_LAYER_SECONDS = 0.01


# rounds added for a whole network when much depends on its time
_MORE_ROUNDS = 31
# networks held in memory at once besides the original, to be timed in turn, and the original's name
_TOGETHER, _ORIGINAL = 6, "(original)"
# the original in float32, beside another format
_FLOAT32 = "before, float32"


def time_accelerated(
    model: nn.Module,
    found: Accelerated,
    one: Tensor,
    *,
    peers: Sequence[str] = (),
    batch: int = 8,
    rounds: int = 11,
    progress: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return MACs and times before and after, as :func:`accelerate_trained` reports them.

    Args:
        model: the network before; its weights need not be trained, since times do not depend on them.
        found: the accelerated network.
        one: an input [1, C, H, W].
        peers: engines of ``quincunx.measure.engines.PEERS`` that are timed in turn with it, on each original
            layer and on the original network; ratios are under "peers".
        batch: images of the timed inputs.
        rounds: how often each candidate is timed.
        progress: show bars.
        dtype: number format in which networks are timed; see :func:`quincunx.fuse`.
    """
    return {
        "cost": {key: cost_record(m, one) for key, m in (("before", model), ("after", found.model))},
        **time_record(model, found, one, batch, rounds, progress, peers, dtype=dtype),
    }


def format_served(
    model: nn.Module, example: Tensor, dtype: torch.dtype | None
) -> tuple[torch.dtype | None, str | None]:
    """The format in which a network is timed and judged, and why it is not the one that was asked for.

    Args:
        example: an input as those that are timed, on which the formats are compared.

    Raises:
        ValueError: no kernel serves the format on the network's device.
    """
    if dtype in (None, torch.float32):
        return None, None
    if dtype == torch.int8:
        return _int8_served(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = fuse(model, dtype, check=example).meta["dtype"]
        except TypeError as error:
            return None, f"{dtype} is for fused networks, so float32 is used: {error}"
    if found["used"] == found["asked"]:
        return dtype, None
    if found["ratio"] is None:
        return None, f"nothing in this network can be computed in {found['asked']}; float32 is used"
    return None, (
        f"this network is {found['ratio']:.2f} times as fast in {found['asked']} as in float32 here, so "
        "float32 is used"
    )


def _int8_served(model: nn.Module, example: Tensor) -> tuple[torch.dtype | None, str | None]:
    try:
        low, plain = fuse_to_time(model, torch.int8, check=example), fuse(model)
    except TypeError as error:
        return None, f"torch.int8 is for fused networks, so float32 is used: {error}"
    if not any(isinstance(module, Int8Program) for module in low.modules()):
        return None, "nothing in this network can be computed in int8; float32 is used"
    with torch.no_grad():
        runs = partial(low, example), partial(plain, example)
        ratio = median(speed_ratio(*runs) for _ in range(3))
    if ratio > 1:
        return torch.int8, None
    return None, f"this network is {ratio:.2f} times as fast in int8 as in float32 here, so float32 is used"


def cost_record(model: nn.Module, one: Tensor) -> dict[str, int]:
    found = cost(model, one)
    return {"macs": found.macs, "params": found.params}


def time_record(
    original: nn.Module,
    found: Accelerated,
    one: Tensor,
    batch: int,
    rounds: int,
    progress: bool,
    peers: Sequence[str] = (),
    *,
    sure: bool = False,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
    from_float32: bool = False,
) -> dict[str, Any]:
    """Return milliseconds of each replaced layer and of the whole network, before and after, both fused.

    If nothing was replaced there is only one network. The whole network is timed for longer if ``sure``,
    or if it is not clear whether it is faster. With ``size`` the network after gets images of that size;
    with ``from_float32`` the network before is in float32 whatever the format of the one after.
    """
    models = {"before": original, "after": found.model}
    rows = time_layers(
        original,
        found,
        one,
        peers=peers,
        batch=batch,
        rounds=rounds,
        progress=progress,
        dtype=dtype,
        round_seconds=_LAYER_SECONDS,
    )
    forms, unfused = _forms(models, one, dtype)
    if dtype is not None and unfused is None:
        # what the format gains by itself
        forms[_FLOAT32] = fuse(original)
        if from_float32:
            forms["before"] = forms.pop(_FLOAT32)
    beside_whole = dict.fromkeys(peers, original)
    shape = (batch, *one.shape[1:])
    same = not found.replaced and size is None and not from_float32
    if same:
        # a single network, whose two times would differ by chance
        del forms["after"]
    timings = _measured(forms, shape, rounds, beside_whole, size)
    if same:
        timings["after"] = timings["before"]
    elif sure or not timings["after"].clearly_faster_than(timings["before"]):
        more = _measured(forms, shape, _MORE_ROUNDS, beside_whole, size)
        timings = {name: timing.and_more(more[name]) for name, timing in timings.items()}
    whole = _ratio(timings)
    engine = "qx.fuse" if unfused is None else "each layer by qx.fuse, the whole network without it,"
    threads = torch.get_num_threads()
    many = "s" if threads > 1 else ""
    format_name = str(dtype or torch.float32).removeprefix("torch.")
    formats = f"float32 before, {format_name} after" if from_float32 else format_name
    if size is not None:
        formats += f", input {size[0]} x {size[1]} after"
    how = f"{engine} before and after, {formats}, channels_last, {threads} thread{many}, batch {batch}"
    found_times = {"layers": rows, "whole": whole, "batch": batch, "how": how, "unfused": unfused}
    return {**found_times, "dtype": format_name}


def time_layers(
    original: nn.Module,
    found: Accelerated,
    one: Tensor,
    *,
    peers: Sequence[str] = (),
    batch: int = 8,
    rounds: int = 11,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return a row for each replaced layer: its record, and seconds before and after, both fused.

    Args:
        original: the network before.
        found: the accelerated network.
        one: an input [1, C, H, W].
        peers: engines that are timed in turn with it, as in :func:`time_accelerated`.
        batch: images of the timed inputs.
        rounds: how often each candidate is timed.
        progress: show bars.
        dtype: number format in which networks are timed; see :func:`quincunx.fuse`.
        options: of :func:`quincunx.measure.latency.measure_models`, such as ``round_seconds``.
    """
    with inference_mode_of(original):
        order = run_order(original, one, None) or {}
    rows = []
    models = {"before": original, "after": found.model}
    with progress_bar(progress) as bar:
        task = bar.add_task("timing", total=len(found.replaced), state="")
        for name, record in found.replaced.items():
            bar.update(task, state=name)
            names = record.get("pair", [name])
            if name == names[0]:
                # within a network, a layer that fx cannot trace stays one module
                chains = {key: nn.Sequential(_chain(model, names)) for key, model in models.items()}
                layers = {key: fuse_to_time(chain, dtype, keep_ends=False) for key, chain in chains.items()}
                beside = dict.fromkeys(peers, chains["before"])
                timings = _measured(layers, (batch, *order[name][1][1:]), rounds, beside, None, **options)
                rows.append({**_joined([found.replaced[n] for n in names], names), **_ratio(timings)})
            bar.update(task, advance=1)
    return rows


def time_together(
    original: nn.Module,
    fast: Mapping[str, Callable[[], nn.Module]],
    shape: tuple[int, int, int],
    *,
    batch: int = 8,
    rounds: int = 11,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return seconds of whole networks and each one's speed-up over the original, all timed in turn.

    Args:
        original: the network before.
        fast: name -> function that returns a network with the same input; a few are held at a time, always
            together with the original.
        shape: (C, H, W) of an image.
        batch: images of the timed inputs.
        rounds: how often each network is timed.
        progress: show bars.
        dtype: number format in which networks are timed; see :func:`quincunx.fuse`.
        sizes: height and width of the images of some, where they are not those of the shape.
    """
    names, found = list(fast), {}
    with progress_bar(progress) as bar:
        task = bar.add_task("timing together", total=len(names), state="")
        for start in range(0, len(names), _TOGETHER):
            some = names[start : start + _TOGETHER]
            whole = {_ORIGINAL: original, **{name: fast[name]() for name in some}}
            forms, _ = _forms(whole, torch.randn(1, *shape), dtype)
            inputs = {name: _example(batch, shape, (sizes or {}).get(name)) for name in forms}
            timings = measure_models(forms, inputs, rounds=rounds)
            for name in some:
                found[name] = _ratio({"before": timings[_ORIGINAL], "after": timings[name]})
            bar.update(task, advance=len(some))
    return found


def time_free(
    model: nn.Module | Callable[[torch.dtype | None], nn.Module],
    choices: Sequence[FreeChoice],
    shape: Sequence[int],
    *,
    batch: int = 8,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[FreeChoice, dict[str, Any]]:
    """Return seconds of a network in other formats and at other sizes, and its speed-up, all timed in turn.

    Images that are scaled count as decoded at their size: scaling takes no time here.

    Args:
        model: the network, or a function that returns it for a format.
        choices: formats and sizes.
        shape: (C, H, W) of an image.
        batch: images of the timed inputs.
        dtype: number format of the network that they are compared with.
        options: of :func:`quincunx.measure.latency.measure`, such as ``rounds``.

    Example:
        >>> net, small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), FreeChoice(size=(24, 24))
        >>> time_free(net, [small], (3, 32, 32), rounds=3)[small]["speedup"]["median"] > 0
        True
    """
    one = torch.randn(1, *shape)
    formats = dict.fromkeys([dtype, *(choice.dtype for choice in choices)])
    made = {each: model if isinstance(model, nn.Module) else model(each) for each in formats}
    forms = {each: _forms({_ORIGINAL: made[each]}, one, each)[0][_ORIGINAL] for each in formats}
    named = {_ORIGINAL: FreeChoice(dtype), **{choice.name: choice for choice in choices}}
    timings = measure_models(
        {name: forms[choice.dtype] for name, choice in named.items()},
        {name: _example(batch, shape, choice.size) for name, choice in named.items()},
        **options,
    )
    return {
        choice: _ratio({"before": timings[_ORIGINAL], "after": timings[choice.name]}) for choice in choices
    }


def _example(batch: int, shape: Sequence[int], size: tuple[int, int] | None) -> Tensor:
    x = torch.randn(batch, shape[0], *(size or shape[1:]))
    return x.contiguous(memory_format=torch.channels_last)


def _chain(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a layer, or the two of a pair with a ReLU between them."""
    parts = [model.get_submodule(name) for name in names]
    return parts[0] if len(parts) == 1 else nn.Sequential(parts[0], nn.ReLU(), parts[1])


def _joined(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return one row for layers that are replaced together."""
    macs = {key: sum(record[key] for record in records) for key in ("macs_before", "macs_after")}
    return {"name": pair_name(names), **records[0], **records[-1], **macs}


def _forms(
    models: dict[str, nn.Module], one: Tensor, dtype: torch.dtype | None = None
) -> tuple[dict[str, nn.Module], str | None]:
    """Fuse all models, or none if one cannot be fused, as with a data-dependent forward; also return why.

    Args:
        one: an input of one image, on which each fused network is compared with its original.
    """
    try:
        return {key: fuse_to_time(model, dtype, check=one) for key, model in models.items()}, None
    except TypeError as error:
        return {key: eager_form(model) for key, model in models.items()}, str(error)


def _measured(
    models: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    rounds: int,
    peers: Mapping[str, nn.Module],
    size: tuple[int, int] | None = None,
    **options: Any,
) -> dict[str, Timing]:
    """Time models, and others run by the named engines, in turn; the one called "after" at its own size."""
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    others = {name: PEERS[name](model, x, torch.get_num_threads()) for name, model in peers.items()}
    inputs = x if size is None else {**dict.fromkeys(models, x), "after": _example(shape[0], shape[1:], size)}
    return measure_models(models, inputs, others=others, rounds=rounds, **options)


def _ratio(timings: dict[str, Timing]) -> dict[str, Any]:
    after = timings["after"]

    def over(other: Timing) -> dict[str, float]:
        return dict(zip(("median", "q1", "q3"), after.speedup_over(other), strict=True))

    own = ("before", "after")
    ratio = over(timings["before"])
    # times shown beside a ratio must have that ratio; medians taken separately drift apart
    before = timings["before"].median
    seconds = {"seconds_before": before, "seconds_after": before / ratio["median"]}
    peers = {
        name: {"seconds": timing.median, "speedup": over(timing)}
        for name, timing in timings.items()
        if name not in own
    }
    return {
        **seconds,
        "speedup": ratio,
        "threads": timings["after"].threads,
        "rounds": len(timings["after"].seconds),
        **({"peers": peers} if peers else {}),
    }
