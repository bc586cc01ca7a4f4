"""Straight lines of convolutions with their epilogues, run in one call of the native back end.

A *step* is a convolution (dense, sampled or transposed) with everything that can ride on its output:
bias, residual, activation, and a second output relu(out scale + shift), the pre-activation of the
next block. A *program* is a list of steps; on the CPU consecutive steps are one native call, and maps
between them stay compact in one arena. Between convolutions there may be what else reads compact maps, a
*follower*, which is a call of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils._python_dispatch import _disable_current_modes

from quincunx.fusion import launches
from quincunx.fusion.decisions import decision
from quincunx.fusion.faster import speed_ratio
from quincunx.fusion.lines import FLOATS, TABLE, WEIGHTS, Line, Lines, arena, mean_index, replaced, unwritten
from quincunx.fusion.steps import (
    Follower,
    Map,
    Step,
    fill_maps,
    follow,
    followed,
    output,
    parted,
    pool,
    reference,
    settled,
    shape_key,
)
from quincunx.ops import backend, native, serving
from quincunx.ops.flops import counted_by
from quincunx.ops.traced import is_tracing

__all__ = ["Program"]


@dataclass(frozen=True)
class Stage:
    """A part of a program.

    Attributes:
        run: reads values by name and adds others.
        reads: the names.
        spent: values that nobody reads afterwards; their memory goes to the maps that follow.
    """

    run: Callable[[dict[str, Tensor]], None]
    reads: frozenset[str]
    spent: frozenset[str] = frozenset()


# shapes of inputs that are kept as CUDA graphs
_MOST_GRAPHS = 16
# one native call less is worth this much time of a step
_MARGIN = 0.95


class BufferCode(NamedTuple):
    """A map as ``run_program`` reads it; ``BufferField`` in csrc/program.h has the same names.

    ``kind`` is 0 for an input, 1 for scratch, 2 for an output; ``offset`` is that in the arena, in elements.
    """

    kind: int
    channels: int
    height: int
    width: int
    offset: int


class StepCode(NamedTuple):
    """A step as ``run_program`` reads it; ``StepField`` in csrc/program.h has the same names.

    ``x``, ``residual``, ``out`` and ``out2`` are numbers of buffers, ``residual_channels``, ``num_taps``,
    ``channel_groups``, ``activation`` and ``activation2`` are values, all others are numbers of tensors; -1
    is none. ``work`` says what it computes (``Work`` in csrc/runner.h): 0 a convolution or mean, 1 the
    maximum of windows, 2 a fill, 3 a part of a concatenation, 4 a pointwise operation.
    """

    x: int
    weight: int
    bias: int
    residual: int
    residual_rows: int
    residual_channels: int
    scale2: int
    shift2: int
    tap_index: int
    rows: int
    taps: int
    groups: int
    out: int
    out2: int
    num_taps: int
    channel_groups: int
    activation: int
    slope: int
    work: int = 0
    shifts: int = -1
    activation2: int = 0


def coded(line: Line, numbers: Mapping[str, int]) -> StepCode:
    """A line as numbers; ``numbers`` are those of its maps and tensors."""
    fields = dict.fromkeys(StepCode._fields, -1)
    fields |= {"residual_channels": 0, "num_taps": 1, "channel_groups": 1}
    fields |= {"activation": 0, "activation2": 0}
    return StepCode(**(fields | line.values | {"work": line.work} | dict(numbers)))


def _in_records(kind: Callable[..., Any], numbers: Sequence[int], length: int) -> list[Any]:
    return [kind(*numbers[at : at + length]) for at in range(0, len(numbers), length)]


def _program_flops(inputs: Any, number: int, *_: Any, **__: Any) -> int:
    """Two for each multiply-add of a program; inputs as shapes."""
    call = _CALLS[number]
    maps = _in_records(BufferCode, call.buffers, len(BufferCode._fields))
    total = 0
    for step in _in_records(StepCode, call.code, len(StepCode._fields)):
        if step.weight < 0:
            continue  # means multiply nothing
        out = maps[step.out if step.out >= 0 else step.out2]
        reads = call.tensors[step.tap_index].shape[0]
        if step.work:
            # a fill; a class with fewer taps than another counts as many
            skipped = out.height * out.width - maps[step.x].height * maps[step.x].width
            total += 2 * inputs[0][0] * skipped * step.num_taps * out.channels
            continue
        total += 2 * inputs[0][0] * reads * maps[step.x].channels * out.channels // step.channel_groups
    return total


def _fill_flops(x: Any, weight: Any, bias: Any, residual: Any, index: Any, *_: Any, **__: Any) -> int:
    """Two for each multiply-add of a fill; a class with fewer taps than another counts as many."""
    batch, channels, computed, _one = x
    return int(2 * batch * channels * (index[0] - computed) * weight[1])


@lru_cache(maxsize=1)
def _count_flops() -> None:
    counted_by(_program_flops, torch.ops.quincunx_native.run_kept)
    counted_by(_fill_flops, torch.ops.quincunx_native.fitted_fill)


# ---------------------------------------------------------------- native segments


@dataclass
class NativeCall:
    """Consecutive steps as one native call: names of its maps, and what is kept as a program."""

    inputs: list[str]
    outputs: list[str]
    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    kept: native.Kept = field(init=False)

    def keep(self, kept: native.Kept) -> None:
        self.kept = kept
        _CALLS[kept.number] = self

    def run(self, values: dict[str, Tensor]) -> None:
        found = self.kept.run([values[name] for name in self.inputs])
        values.update(zip(self.outputs, found, strict=True))

    def between(
        self, arguments: Sequence[str], results: Sequence[str], crossing: bool
    ) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]] | None:
        """The call as a function from arguments to results; None if it has not all of them.

        Args:
            arguments, results: names of maps.
            crossing: as of :meth:`quincunx.ops.native.Kept.run`.
        """
        if not (set(self.inputs) <= set(arguments) and set(results) <= set(self.outputs)):
            return None
        if self.inputs == list(arguments) and self.outputs == list(results):
            return lambda given: tuple(self.kept.run(given, crossing))
        reads = [arguments.index(name) for name in self.inputs]
        writes = [self.outputs.index(name) for name in results]

        def chosen(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
            found = self.kept.run([given[number] for number in reads], crossing)
            return tuple([found[number] for number in writes])

        return chosen


# native calls by the numbers of their programs
_CALLS: WeakValueDictionary[int, NativeCall] = WeakValueDictionary()


class _Packed(Lines):
    """With weights as the kernels of this processor read them."""

    def in_lines(self, step: Step) -> bool:
        return native.reads_shifts(step.weight.dtype)

    def weight_of(self, step: Step) -> Tensor:
        return native.pack(step.weight, step.groups, step.kind == "transposed")


def _segment(
    steps: Sequence[Step], maps: dict[str, Map], wanted: set[str], whole: Iterable[str] = ()
) -> NativeCall:
    """Tables, packed weights, buffers and code of consecutive steps.

    Args:
        whole: compact maps that the steps write and the call returns filled.
    """
    packed = _Packed(maps)
    for step in steps:
        packed.step(step)
    names = {packed.whole(name): name for name in whole}
    call = _of_lines(packed, (wanted - set(names.values())) | set(names), steps[0].weight.dtype)
    call.outputs = [names.get(name, name) for name in call.outputs]
    return call


def _mean_segment(step: Follower, maps: dict[str, Map], dtype: torch.dtype) -> NativeCall:
    """The mean over all positions as a native call; its result is [N, C, 1, 1]."""
    packed = _Packed(maps)
    packed.read(step.sources[0], step.out, mean_index(maps[step.sources[0]]))
    return _of_lines(packed, {step.out}, dtype)


def _of_lines(packed: Lines, wanted: set[str], dtype: torch.dtype) -> NativeCall:
    lines, maps = packed.done, packed.maps
    written = list(dict.fromkeys(name for line in lines for name in line.writes))
    outputs = [name for name in written if name in wanted]
    scratch = [name for name in written if name not in wanted]
    offsets = arena(lines, scratch, maps, replaced(lines, scratch, maps))
    segment = NativeCall(unwritten(lines), outputs)
    numbers: dict[str, int] = {}
    for name in (*segment.inputs, *written):
        kind = 0 if name in segment.inputs else 2 if name in wanted else 1
        numbers[name] = len(numbers)
        segment.buffers += BufferCode(kind, maps[name].channels, *maps[name].stored, offsets.get(name, 0))

    known: dict[int, tuple[int, Tensor]] = {}

    def number(kind: int, tensor: Tensor) -> int:
        if id(tensor) not in known:
            # held, so that its id stays its own
            known[id(tensor)] = len(segment.tensors), tensor
            dtype = {TABLE: torch.int32, FLOATS: torch.float32, WEIGHTS: tensor.dtype}[kind]
            segment.tensors.append(tensor.detach().to(dtype).contiguous())
        return known[id(tensor)][0]

    for line in lines:
        named = {name: getattr(line, name) for name in ("x", "residual", "out", "out2")}
        maps_of = {name: -1 if other is None else numbers[other] for name, other in named.items()}
        tensors = {name: number(kind, tensor) for name, (kind, tensor) in line.tensors.items()}
        segment.code += coded(line, maps_of | tensors)
    segment.keep(native.keep(segment.tensors, segment.buffers, segment.code, dtype))
    return segment


# ---------------------------------------------------------------- which back end for a dense step


def _prefers_torch(step: Step, maps: dict[str, Map], batch: int) -> bool:
    """Whether torch's convolution is faster for a dense step of this shape; measured once for a machine."""

    def measure() -> float:
        device = step.weight.device
        values = {
            name: launches.example_map(maps[name], batch, step.weight.dtype, device) for name in step.reads
        }
        ours = _segment([step], maps, set(step.writes))
        return speed_ratio(
            partial(_reference_stage, step, maps, dict(values)),
            partial(ours.run, dict(values)),
            level=1 / _MARGIN,
        )

    key = ("torch in channels_last", torch.get_num_threads(), *shape_key(step, maps, batch))
    return decision(key, measure) * _MARGIN > 1


# ---------------------------------------------------------------- the module


class Program(nn.Module):
    """Steps as a module: maps in, maps out. Its weights are constants, in packed layout where used.

    Args:
        steps: in order, convolutions and what follows them; all in the dtype of the first convolution.
        inputs: names of the arguments.
        outputs: names of the values returned.
        native_only: never torch's own convolution, not even where it is faster.
        dtype: computes in this type; arguments and results keep that of the weights.
    """

    def __init__(
        self,
        steps: Sequence[Step | Follower],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        native_only: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _hide_from_compilers()
        self.native_only = native_only
        self.outside = next(step.weight.dtype for step in steps if isinstance(step, Step))
        self.steps = [step.to(dtype).laid_out() if isinstance(step, Step) else step for step in steps]
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._weight = next(step.weight for step in self.steps if isinstance(step, Step))
        if backend().name == "native":
            _count_flops()  # a counter reads the formulas that are there when it is made
        self._compiled: dict[tuple[Any, ...], list[Stage]] = {}
        # those of one native call, as functions of the arguments
        self._single: dict[tuple[Any, ...], Callable[[Sequence[Tensor]], tuple[Tensor, ...]]] = {}
        self._graphs: dict[tuple[Any, ...], launches.Recorded] = {}
        self._key = _new_key(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps that it computes; arguments and results are in ``outside``."""
        return self._weight.dtype

    def extra_repr(self) -> str:
        return f"{len(self.steps)} steps, ({', '.join(self.inputs)}) -> ({', '.join(self.outputs)})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        moved = fn(self._weight[:0])
        if moved.dtype != self.dtype or moved.device != self._weight.device:
            raise RuntimeError("a fused network is frozen: convert the model first, then call qx.fuse")
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # what was compiled for shapes and threads seen here is made again where it is needed
        return {**self.__dict__, "_compiled": {}, "_single": {}, "_graphs": {}, "_key": ""}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._key = _new_key(self)
        _hide_from_compilers()

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The outputs; in torch's own operators where arguments are not maps of one batch and our dtype."""
        if torch.compiler.is_exporting():
            # its module imports this one
            from quincunx.fusion.exported import exported_outputs

            return exported_outputs(self._key, *arguments)
        if torch.compiler.is_compiling() or get_eval_frame_callback() is not None or is_tracing():
            return self._hidden(arguments)
        return self._answer(arguments)

    def _hidden(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What compilers call and do not look into."""
        if is_tracing():
            _TRACED[self._key] = self
            return tuple(torch.ops.quincunx.run_fused(list(arguments), self._key))
        return self._answer(arguments)

    def _answer(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        single = self._single.get(self._shapes(arguments))
        # to enter a context takes as long as a small convolution
        if (
            single is not None
            and all([t.dtype == self.outside and t.is_cpu and not t.requires_grad for t in arguments])  # noqa: C419
            and not torch.is_autocast_enabled("cpu")
        ):
            return single(arguments)
        device = self._weight.device.type
        if torch.is_autocast_enabled(device):
            # what stands between programs may have answered in autocast's type
            arguments = tuple(t.to(self.dtype) if t.is_floating_point() else t for t in arguments)
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return self._computed(arguments)
        if not torch.is_grad_enabled():
            return self._computed(arguments)
        with torch.no_grad():
            return self._computed(arguments)

    def _computed(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.outside != self.dtype:
            arguments = tuple(self._brought_inside(t) for t in arguments)
        if not self._fits(arguments):
            values = self._plain(dict(zip(self.inputs, arguments, strict=True)))
            found = tuple(values[name] for name in self.outputs)
        elif self._weight.is_cuda and self._serving() == "triton":
            found = self._recorded(arguments)
        else:
            found = self._through(self._stages_for(arguments), arguments)
        return found if self.outside == self.dtype else tuple(t.to(self.outside) for t in found)

    def _brought_inside(self, value: Tensor) -> Tensor:
        if value.dtype != self.outside:
            return value  # refused or served as it is, as without another type inside
        if value.dim() == 4 and value.device.type == "cpu":
            # torch's one pass for both takes twice as long as two
            value = value.contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if value.dim() == 4 else torch.preserve_format
        return value.to(self.dtype, memory_format=layout)

    def _through(self, stages: Sequence[Stage], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values = _run(stages, dict(zip(self.inputs, arguments, strict=True)))
        return tuple(values[name] for name in self.outputs)

    def _recorded(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """On a GPU: the launches, or the graph that was recorded of them for inputs of these shapes."""
        with torch.cuda.device(self._weight.device):
            # a stream's work is in order, so one graph serves it; another stream has its own
            key = (torch.cuda.current_stream().cuda_stream, *(tuple(t.shape) for t in arguments))
            recorded = self._graphs.get(key)
            if recorded is None:
                if launches.is_recording():
                    return self._through(self._known(arguments), arguments)
                stages = self._stages_for(arguments)
                with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                    recorded = launches.Recorded(partial(self._through, stages), arguments)
                if len(self._graphs) >= _MOST_GRAPHS:
                    # each has memory of its own; the one that is oldest goes
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = recorded
            return recorded(arguments)

    def _fits(self, arguments: Sequence[Tensor]) -> bool:
        batch = arguments[0].shape[:1]
        return all(
            t.dim() == 4
            and t.shape[:1] == batch
            and t.dtype == self.dtype
            and t.device == self._weight.device
            for t in arguments
        )

    def _plain(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Step by step in torch's operators, which also say what does not go together."""
        for step in self.steps:
            if isinstance(step, Follower):
                values[step.out] = step.function(*(values[name] for name in step.sources))
            else:
                found = {name: values[name] for name in step.needs}
                if found[step.source].dtype != self.dtype:
                    raise TypeError(
                        f"{step.source}: {found[step.source].dtype}, "
                        f"but the network was fused in {self.dtype}"
                    )
                maps = {
                    n: Map(t.shape[1], (t.shape[2], t.shape[3])) for n, t in found.items() if t.dim() == 4
                }
                if step.kind != "dense" and step.source not in maps:
                    shape = list(found[step.source].shape)
                    raise ValueError(f"{step.source}: expected a map [N, C, H, W], got one of shape {shape}")
                reference(settled(step, maps), values, maps)
        return values

    def _known(self, arguments: Sequence[Tensor]) -> list[Stage]:
        """What was chosen for inputs of these shapes, within somebody else's capture.

        Raises:
            RuntimeError: nothing was yet: what is measured and copied for it cannot be captured.
        """
        stages = self._compiled.get(self._shapes(arguments))
        if stages is None:
            shapes = ", ".join(str(tuple(t.shape)) for t in arguments)
            raise RuntimeError(
                "a fused network cannot be captured before its first call: call it once with inputs of "
                f"{shapes}"
            )
        return stages

    @staticmethod
    def _shapes(arguments: Sequence[Tensor]) -> tuple[Any, ...]:
        return (torch.get_num_threads(), *[tensor.shape for tensor in arguments])

    def _stages_for(self, arguments: Sequence[Tensor]) -> list[Stage]:
        key = self._shapes(arguments)
        stages = self._compiled.get(key)
        if stages is None:
            # what is measured and packed here is no part of the network's own work
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                stages = self._compile([tuple(tensor.shape) for tensor in arguments])
            self._compiled[key] = stages
            call = getattr(stages[0].run, "__self__", None) if len(stages) == 1 else None
            if isinstance(call, NativeCall) and self.outside in native.DTYPES:
                single = call.between(self.inputs, self.outputs, self.outside != self.dtype)
                if single is not None:
                    self._single[key] = single
        return stages

    def settle(
        self, shapes: Sequence[Sequence[int]], whole: bool = False
    ) -> tuple[list[Step | Follower], dict[str, Map]]:
        """The steps as they are for inputs of these shapes, and the maps between them.

        Args:
            shapes: of the inputs, [N, C, H, W] each.
            whole: as the reference has maps, without compact ones.

        Raises:
            ValueError: a map whose channels or size a step cannot read.
        """
        maps = {
            name: Map(shape[1], (shape[2], shape[3])) for name, shape in zip(self.inputs, shapes, strict=True)
        }
        steps: list[Step | Follower] = []
        todo = list(reversed(self.steps))
        while todo:
            step = todo.pop()
            if isinstance(step, Follower):
                shape = followed(step, maps)
            else:
                _check_channels(step, maps)
                step = settled(step, maps)
                shape = output(step, maps)
                if step.shortcut is not None and not step.shortcut.meets(maps[step.shortcut.source], shape):
                    todo += reversed(parted(step, step.shortcut))
                    continue
            steps.append(step)
            # outside a native segment there are no compact filled maps
            plain = Map(shape.channels, shape.size)
            for name in step.writes:
                maps[name] = plain if whole else shape
        return steps, maps

    def _compile(self, shapes: list[tuple[int, ...]]) -> list[Stage]:
        batch, serving = shapes[0][0], self._serving()
        steps, maps = self.settle(shapes, whole=serving == "reference")
        by_torch: dict[int, bool] = {}
        for number, step in enumerate(steps):
            if isinstance(step, Step):
                filled = maps[step.source].fill or output(step, maps).fill
                by_torch[number] = serving == "reference" or (
                    not self.native_only
                    and step.kind == "dense"
                    and not filled
                    and self._prefers_torch(step, maps, batch)
                )
        mixed = self._stages(steps, maps, {number for number, torchs in by_torch.items() if torchs})
        if serving != "native" or not any(by_torch.values()) or all(by_torch.values()):
            return mixed
        # a step that torch runs faster also cuts a native call in two
        whole = self._stages(steps, maps, set())
        example = {
            name: launches.example_map(maps[name], batch, self.dtype, self._weight.device)
            for name in self.inputs
        }
        ratio = speed_ratio(partial(_run, mixed, example), partial(_run, whole, example), level=1 / _MARGIN)
        return mixed if ratio * _MARGIN > 1 else whole

    def _launched(
        self, step: Step | Follower, maps: dict[str, Map], by_cudnn: bool
    ) -> Callable[[dict[str, Tensor]], None]:
        device = self._weight.device
        if isinstance(step, Follower):
            return launches.follower_stage(step, maps, device)
        return launches.cudnn_stage(step, maps) if by_cudnn else launches.step_stage(step, maps, device)

    def _serving(self) -> str:
        """The back end that computes our convolutions on the device and in the dtype of the weights."""
        return serving(self._weight.device, self.dtype)

    def _prefers_torch(self, step: Step, maps: dict[str, Map], batch: int) -> bool:
        if self._weight.is_cuda:
            return launches.prefers_cudnn(step, maps, batch, self._weight.device)
        return _prefers_torch(step, maps, batch)

    def _stages(
        self, steps: Sequence[Step | Follower], maps: dict[str, Map], by_torch: set[int]
    ) -> list[Stage]:
        stages: list[Stage] = []
        segment: list[Step] = []
        filled = {name for name in self.outputs if maps[name].fill}
        for number, step in enumerate(steps):
            alone: Stage | None = None
            if isinstance(step, Step) and step.filling is not None and self._serving() != "native":
                alone = Stage(partial(_reference_stage, step, maps), frozenset(step.reads))
            elif self._serving() == "triton":
                alone = Stage(self._launched(step, maps, number in by_torch), frozenset(step.reads))
            elif isinstance(step, Follower):
                natively = step.kind == "maxpool" and self._serving() == "native"
                alone = Stage(partial(pool if natively else follow, step, maps), frozenset(step.reads))
            elif number in by_torch:
                alone = Stage(partial(_reference_stage, step, maps), frozenset(step.reads))
            else:
                segment.append(step)
            if segment and (alone is not None or number == len(steps) - 1):
                # a step that stands alone reads what the segment before it wrote
                rest = steps[number if alone is not None else number + 1 :]
                read = {name for other in rest for name in other.reads}
                ends = filled.intersection(name for step in segment for name in step.writes) - read
                native_call = _segment(segment, maps, read | set(self.outputs), sorted(ends))
                filled -= ends
                stages.append(Stage(native_call.run, frozenset(native_call.inputs)))
                segment = []
            if alone is not None:
                stages.append(alone)
        if filled:
            # others read them in compact form
            left = [(name, maps[name]) for name in sorted(filled)]
            stages.append(Stage(partial(fill_maps, left), frozenset(filled)))
        wanted = frozenset(self.outputs)
        for number in reversed(range(len(stages))):
            stages[number] = replace(stages[number], spent=stages[number].reads - wanted)
            wanted |= stages[number].reads
        return stages


@lru_cache(maxsize=1)
def _hide_from_compilers() -> None:
    # here and not as a decorator: it imports the whole compiler, which takes longer than all of this package
    Program._hidden = torch.compiler.disable(Program._hidden)  # type: ignore[method-assign, no-untyped-call]
    # its module imports this one
    from quincunx.fusion.exported import exported_outputs

    torch.compiler.allow_in_graph(exported_outputs)  # type: ignore[no-untyped-call]


# programs by the names that graphs have for them
_KNOWN: WeakValueDictionary[str, Program] = WeakValueDictionary()
# those that torch.jit.trace has seen: its trace has no more than a name, so they live as long as the process
_TRACED: dict[str, Program] = {}


def _new_key(program: Program) -> str:
    key = uuid.uuid4().hex
    _KNOWN[key] = program
    return key


@torch.library.custom_op("quincunx::run_fused", mutates_args=())
def _run_fused(inputs: list[Tensor], key: str) -> list[Tensor]:
    """A program as one operator, for maps of any size: what torch.jit.trace records of it."""
    if key not in _TRACED:
        raise RuntimeError(
            "this trace holds a network that was fused in another process; trace the network that was given "
            "to qx.fuse, or fuse it again here"
        )
    state = torch._C._get_tracing_state()
    # sizes are numbers again, and what runs here is not recorded
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        found = _TRACED[key]._answer(inputs)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
    return [t.clone() if any(t is x for x in inputs) else t for t in found]


def _check_channels(step: Step, maps: dict[str, Map]) -> None:
    """
    Raises:
        ValueError: a map that has other channels than the convolution that reads it.
    """
    expected = (
        step.weight.shape[0] if step.kind in ("transposed", "mean") else step.weight.shape[1] * step.groups
    )
    if maps[step.source].channels != expected:
        raise ValueError(
            f"{step.source}: expected a map of {expected} channels, got {maps[step.source].channels}"
        )


def _run(stages: Sequence[Stage], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    values = dict(inputs)
    for stage in stages:
        stage.run(values)
        for name in stage.spent:
            del values[name]
    return values


def _reference_stage(step: Step, maps: dict[str, Map], values: dict[str, Tensor]) -> None:
    local = {name: values[name] for name in step.reads}
    # others may still read the compact maps
    fill_maps([(name, maps[name]) for name in step.reads], local)
    reference(step, local, maps)
    values.update({name: local[name] for name in step.writes})
