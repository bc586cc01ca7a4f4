"""A program's steps as GPU kernels: ours, or cuDNN's if measured to be faster; CUDA graphs.

A program on a GPU is a sequence of launches. With few images launching a call takes the CPU longer than the
GPU takes to run it; then the sequence is recorded once for each shape and replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.fusion.epilogues import apply
from quincunx.fusion.steps import (
    Follower,
    Map,
    Step,
    follow,
    keeps_compact,
    output,
    pool_window,
    reference,
    shape_key,
    shortcut_rows,
)
from quincunx.modules import first_line
from quincunx.ops.cuda_graphs import ONE_AT_A_TIME, captured, timing_event
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import forward_plan, nearest_shares, window_plan
from quincunx.ops.triton.layouts import adjoint_layout, forward_layout

__all__ = [
    "Recorded",
    "cudnn_stage",
    "example_map",
    "follower_stage",
    "gpu_seconds",
    "is_recording",
    "prefers_cudnn",
    "step_stage",
]

Values = dict[str, Tensor]
# calls in a timed graph, and its replays
_CALLS, _REPLAYS = 10, 7
# prefer ours when close: it needs no second copy of its weights, and it is the one that we know
_MARGIN = 0.97
_FASTER: dict[tuple[Any, ...], bool] = {}


def is_recording() -> bool:
    """Return whether launches are currently recorded into a caller's graph, in which nothing may wait."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------- one step


def step_stage(step: Step, maps: dict[str, Map], device: torch.device) -> Callable[[Values], None]:
    """Return a step with our kernels: its tables on the device, and its weight in their layout."""
    if step.kind == "mean":
        return partial(_means, step, *_mean_windows(step, maps, device), output(step, maps))
    source, out = maps[step.source], output(step, maps)
    if step.kind == "transposed":
        layout = adjoint_layout(step.sampling, step.geometry, *out.size, device)
    elif keeps_compact(step, source.fill, _shortcut_fill(step, maps)):
        layout = forward_layout("", step.geometry, *source.stored, None, device)
    else:
        layout = forward_layout(step.sampling, step.geometry, *source.size, source.fill or None, device)
    rows = None
    if step.shortcut is not None:
        other = maps[step.shortcut.source]
        if step.shortcut.stride > 1 or other.fill or out.fill:
            rows = shortcut_rows(other.size, step.shortcut.stride, other.fill, out).to(device)
    weight = step.weight.contiguous(memory_format=torch.channels_last)
    return partial(_convolve, step, weight, layout, rows)


def _shortcut_fill(step: Step, maps: dict[str, Map]) -> str:
    return maps[step.shortcut.source if step.shortcut else step.source].fill


def _convolve(step: Step, weight: Tensor, layout: Any, rows: Tensor | None, values: Values) -> None:
    out, second = _kernels().convolve(
        values[step.source],
        weight,
        step.bias,
        layout,
        step.groups,
        transposed=step.kind == "transposed",
        residual=None if step.shortcut is None else values[step.shortcut.source],
        residual_rows=rows,
        activation=step.activation,
        scale2=step.scale2 if step.out2 is not None else None,
        shift2=step.shift2 if step.out2 is not None else None,
        activation2=step.activation2,
        keep=step.out is not None,
    )
    if step.out is not None:
        values[step.out] = out
    if step.out2 is not None:
        values[step.out2] = second


def _kernels() -> Any:
    # import Triton only where something runs on a GPU
    return import_module("quincunx.ops.triton.launch")


def follower_stage(step: Follower, maps: dict[str, Map], device: torch.device) -> Callable[[Values], None]:
    """Return an operation between convolutions; on compact maps with tables on the device."""
    first = maps[step.sources[0]]
    if step.kind == "maxpool" and first.fill:
        plan = window_plan(first.fill, pool_window(step, first.size), *first.size)
        return partial(_pool, step, plan.index.to(device), plan.starts.to(device), plan.out_size)
    if step.kind == "maxpool":
        window = pool_window(step, first.size)
        return partial(_pool_dense, step, window, window.grid(*first.size))
    if step.kind == "mean" and first.fill:
        shares = nearest_shares(first.fill, *first.size).to(device).view(-1, 1)
        return partial(_mean, step, shares)
    return partial(follow, step, maps)


def _pool(step: Follower, index: Tensor, starts: Tensor, size: tuple[int, int], values: Values) -> None:
    values[step.out] = _kernels().reduce_windows(values[step.sources[0]], index, starts, size, "max")


def _pool_dense(step: Follower, window: Geometry, size: tuple[int, int], values: Values) -> None:
    # torch's max pooling also stores indices, which only training needs
    values[step.out] = _kernels().max_pool(values[step.sources[0]], window, size)


def _mean(step: Follower, shares: Tensor, values: Values) -> None:
    y = values[step.sources[0]]
    values[step.out] = (y.float() * shares).sum((2, 3), keepdim=step.keepdim).to(y.dtype)


def _mean_windows(step: Step, maps: dict[str, Map], device: torch.device) -> tuple[Tensor, Tensor]:
    source = maps[step.source]
    plan = forward_plan(step.sampling, step.geometry, *source.size, source=source.fill or None)
    table = plan.index.view(-1, step.taps)
    inside = table >= 0
    starts = F.pad(inside.sum(1).cumsum(0), (1, 0)).int()
    return table[inside].contiguous().to(device), starts.to(device)


def _means(step: Step, index: Tensor, starts: Tensor, out: Map, values: Values) -> None:
    found = _kernels().reduce_windows(values[step.source], index, starts, out.stored, "mean")
    values[step.writes[0]] = found


# ---------------------------------------------------------------- cuDNN


def prefers_cudnn(step: Step, maps: dict[str, Map], batch: int, device: torch.device) -> bool:
    """Return whether cuDNN is faster for a dense step of this shape; measured once per process and card."""
    key = (device, torch.backends.cudnn.allow_tf32, *shape_key(step, maps, batch))
    if key not in _FASTER:
        values = {name: example_map(maps[name], batch, step.weight.dtype, device) for name in step.reads}
        ours = step_stage(step, maps, device)
        theirs = cudnn_stage(step, maps)
        ratio = gpu_seconds(lambda: ours(dict(values))) / gpu_seconds(lambda: theirs(dict(values)))
        _FASTER[key] = ratio * _MARGIN > 1
    return _FASTER[key]


def cudnn_stage(step: Step, maps: dict[str, Map]) -> Callable[[Values], None]:
    """Return a dense step with cuDNN, with bias, shortcut and ReLU in its epilogue where it has one."""
    geometry = step.geometry
    top, bottom, left, right = geometry.padding
    plain = step.shortcut is None or (step.shortcut.stride == 1 and not step.shortcut.padded)
    if step.activation == 1 and plain and top == bottom and left == right and step.weight.dtype.itemsize == 2:
        weight = step.weight.contiguous(memory_format=torch.channels_last)
        bias = step.bias if step.bias is not None else weight.new_zeros(weight.shape[0])
        where = (geometry.stride, (top, left), geometry.dilation, step.groups)
        return partial(_cudnn_fused, step, weight, bias.to(weight.dtype), where)
    return partial(_cudnn_plain, step, maps)


def _cudnn_fused(step: Step, weight: Tensor, bias: Tensor, where: tuple[Any, ...], values: Values) -> None:
    x = values[step.source]
    with _cudnn():
        if step.shortcut is None:
            out = torch.cudnn_convolution_relu(x, weight, bias, *where)
        else:
            other = values[step.shortcut.source]
            out = torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *where)
    if step.out is not None:
        values[step.out] = out
    if step.out2 is not None and step.scale2 is not None and step.shift2 is not None:
        scale, shift = (t.to(out.dtype).view(-1, 1, 1) for t in (step.scale2, step.shift2))
        values[step.out2] = apply(step.activation2, torch.addcmul(shift, out, scale), own=True)


def _cudnn_plain(step: Step, maps: dict[str, Map], values: Values) -> None:
    with _cudnn():
        reference(step, values, maps)


def _cudnn() -> Any:
    """Use cuDNN's best algorithm by trial; in a graph, which cannot try any, the one found before."""
    now = torch.backends.cudnn
    return now.flags(
        enabled=True,
        benchmark=not is_recording(),
        deterministic=now.deterministic,
        allow_tf32=now.allow_tf32,
    )


def example_map(shape: Map, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random values of a map's shape, to time a step with."""
    made = torch.randn(batch, shape.channels, *shape.stored, device=device)
    return made.to(dtype).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- graphs


def gpu_seconds(run: Callable[[], object]) -> float:
    """Return the GPU time of a call, without the CPU's launch time: the median of some replays."""
    with ONE_AT_A_TIME:
        replay = captured(lambda: [run() for _ in range(_CALLS)])
        return _event_seconds(replay) / _CALLS


def _call_seconds(run: Callable[[], object]) -> float:
    """Return the time of a call as its user sees it, averaged over consecutive calls."""
    run()
    return _event_seconds(lambda: [run() for _ in range(_CALLS)]) / _CALLS


def _event_seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    times = []
    for _ in range(_REPLAYS):
        begin, end = timing_event(), timing_event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times)) / 1000


class Recorded:
    """A sequence of launches for one shape of input, replayed as a CUDA graph if that is faster.

    A replay writes to fixed memory, so inputs are copied to the graph and outputs from it;
    with many images that costs more than launching, and then nothing is recorded.

    Args:
        run: computes outputs from inputs, tensors on one device.
        inputs: examples.
    """

    def __init__(
        self, run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], inputs: Sequence[Tensor]
    ) -> None:
        self.run = run
        self.lock = threading.Lock()
        self.inputs = [t.clone(memory_format=torch.preserve_format) for t in inputs]
        self.replay: Callable[[], Any] | None = None
        # the reason for not replaying
        self.reason = "launching is faster"
        with ONE_AT_A_TIME:
            try:
                self.replay = captured(lambda: run(self.inputs))
            except RuntimeError as error:
                # operations between convolutions may wait for the card, which cannot be recorded
                self.reason, self.inputs = first_line(error), []
                return
            by_graph = _call_seconds(lambda: self._replayed(inputs))
            worth = by_graph < _call_seconds(lambda: run(inputs))
        if not worth:
            # the graph is not worth its memory
            self.replay, self.inputs = None, []

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.replay is None or is_recording():
            return self.run(inputs)
        return self._replayed(inputs)

    def _replayed(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # one lock for the copies in, the replay and the copies out, also across threads
        with self.lock:
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            outputs = self.replay() if self.replay is not None else ()
            return tuple(t.clone(memory_format=torch.preserve_format) for t in outputs)
