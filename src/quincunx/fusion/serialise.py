"""Programs as bytes, for engines that run them without PyTorch: libquincunx, ONNX Runtime, OpenVINO.

The bytes hold steps, tables and unpacked weights for one size of map; any batch, number of threads and
instruction set runs them. ``csrc/program_file.h`` describes the layout, ``csrc/program.h`` the steps.
A program whose followers are all among those that the kernels have becomes one such piece; other followers
stay functions of torch between pieces, which an exporter writes as its engine's own operators.
"""

from __future__ import annotations

import operator
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.fusion.epilogues import Activation
from quincunx.fusion.program import BufferCode, Program, StepCode, _arena
from quincunx.fusion.steps import (
    Follower,
    Map,
    Step,
    _second,
    _shared,
    output,
    pool_window,
    shortcut_rows,
    tables,
)
from quincunx.modules import surely
from quincunx.ops import native
from quincunx.ops.plan import fill_plan, nearest_index, window_plan

__all__ = ["NativePiece", "TorchPiece", "load_program", "pieces", "program_bytes", "programs"]

_MAGIC, _VERSION = b"QUINCUNX", 1
_HEADER = struct.Struct("<8s2I5II Q12sI")
_ENTRY = struct.Struct("<2I4qq")
_LINE = 64
_TABLE, _FLOATS, _WEIGHTS = 0, 1, 2
_CONVOLVE, _WINDOW_MAX, _FILL, _COPY, _POINTWISE = range(5)
_INPUT, _SCRATCH, _OUTPUT = range(3)


@dataclass(frozen=True)
class NativePiece:
    """Steps that the kernels run in one call.

    Attributes:
        data: the bytes.
        inputs: names of the maps that it reads.
        outputs: names of those that it returns.
        input_shapes, output_shapes: of one image, [C, H, W]; [C] where the result is [N, C].
    """

    data: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TorchPiece:
    """A follower that the kernels do not have.

    Attributes:
        function: of the maps named by ``inputs``, float32 [N, C, H, W]; returns the map named by ``outputs``.
    """

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def programs(model: nn.Module) -> dict[str, Program]:
    """Return the programs of a fused network, by the name of the module.

    Example:
        >>> fused = qx.fuse(qx.networks.build("rrn8").eval())
        >>> list(programs(fused))
        ['program0']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Program)}


def program_bytes(program: Program, *shapes: Sequence[int]) -> bytes:
    """Return a program for inputs of one size as bytes.

    Args:
        program: of a fused network; see :func:`programs`.
        shapes: of its inputs, [N, C, H, W] each; any N.

    Raises:
        ValueError: shapes that the program cannot read, or a follower that the kernels do not have; see
            :func:`pieces`.

    Example:
        >>> fused = qx.fuse(qx.networks.build("rrn8").eval())
        >>> data = program_bytes(fused.program0, (1, 3, 32, 32))
        >>> data[:8]
        b'QUINCUNX'
    """
    found = pieces(program, *shapes)
    if len(found) != 1 or not isinstance(found[0], NativePiece):
        names = [piece.outputs[0] for piece in found if isinstance(piece, TorchPiece)]
        raise ValueError(
            f"{', '.join(names)}: not among the operations that the kernels have, so that the program is "
            f"{len(found)} pieces; see quincunx.fusion.serialise.pieces"
        )
    return found[0].data


def pieces(program: Program, *shapes: Sequence[int]) -> list[NativePiece | TorchPiece]:
    """Return a program for inputs of one size in parts: what the kernels run in one call, what lies between.

    Names connect the parts; inputs and outputs have those of the program.

    Args:
        program: of a fused network; see :func:`programs`.
        shapes: of its inputs, [N, C, H, W] each; any N.

    Raises:
        ValueError: shapes that the program cannot read.

    Example:
        >>> fused = qx.fuse(qx.networks.build("rrn8").eval())
        >>> [piece.inputs for piece in pieces(fused.program0, (1, 3, 32, 32))]
        [('x',)]
    """
    if len(shapes) != len(program.inputs) or any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            f"shapes={shapes!r}: expected one [N, C, H, W] for each of the inputs {program.inputs}"
        )
    with torch.no_grad():
        steps, maps = program.settle(shapes)
        writer = _Writer(program, maps)
        for step in steps:
            writer.follower(step) if isinstance(step, Follower) else writer.step(step)
        return writer.finished()


def load_program(data: bytes | Tensor) -> Callable[..., list[Tensor]]:
    """Return a function that runs a program's bytes in torch, on maps [N, C, H, W] in torch's threads.

    Args:
        data: from :func:`program_bytes`, as bytes or as a uint8 tensor; it must not change afterwards.

    Raises:
        RuntimeError: the native back end was not built; at the first call, bytes that are no program.

    Example:
        >>> model, x = qx.networks.build("rrn8").eval(), torch.randn(2, 3, 32, 32)
        >>> fused = qx.fuse(model)
        >>> run = load_program(program_bytes(fused.program0, x.shape))
        >>> (y,) = run(x)
        >>> torch.equal(y, fused.program0(x)[0])
        True
    """
    if (reason := native.load()) is not None:
        raise RuntimeError(f"the native back end is not available: {reason}")
    held = data if isinstance(data, Tensor) else torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def run(*maps: Tensor) -> list[Tensor]:
        found: list[Tensor] = torch.ops.quincunx_native.run_program_file(list(maps), held)
        return found

    return run


# ---------------------------------------------------------------- from steps to lines


@dataclass
class _Line:
    """A step of the file: names of maps and tensors in the fields of StepCode."""

    work: int
    x: str
    out: str | None = None
    out2: str | None = None
    residual: str | None = None
    tensors: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    @property
    def reads(self) -> list[str]:
        return [self.x] + ([self.residual] if self.residual else [])

    @property
    def writes(self) -> list[str]:
        return [name for name in (self.out, self.out2) if name is not None]


class _Writer:
    """Collects lines and the functions between them; knows all maps by name, also those that it adds."""

    def __init__(self, program: Program, maps: Mapping[str, Map]) -> None:
        self.program = program
        self.maps = dict(maps)
        self.done: list[_Line | TorchPiece] = []
        self.flat: set[str] = set()  # maps [N, C, 1, 1] that torch has as [N, C]
        self.weights: dict[int, Tensor] = {}

    # ------------------------------------------------ what a program has

    def step(self, step: Step) -> None:
        if step.filling is not None:
            return self._fitted(step)
        plan, out = tables(step, self.maps), output(step, self.maps)
        line = _Line(_CONVOLVE, step.source, step.out, step.out2)
        line.tensors = _gather(plan.index, plan.rows, plan.taps, plan.groups)
        line.values = {"num_taps": step.taps}
        if step.kind != "mean":
            line.tensors |= {"weight": (_WEIGHTS, self._plain(step))} | _floats(
                bias=step.bias, scale2=step.scale2, shift2=step.shift2, slope=step.slope
            )
            line.values |= {"channel_groups": step.groups, "activation": int(step.activation)}
        if step.shortcut is not None:
            source = self.maps[step.shortcut.source]
            line.residual = step.shortcut.source
            line.values["residual_channels"] = source.channels
            if step.shortcut.stride > 1 or source.fill or out.fill:
                rows = shortcut_rows(source.size, step.shortcut.stride, source.fill, out)
                line.tensors["residual_rows"] = (_TABLE, rows)
        self.done.append(line)

    def _fitted(self, step: Step) -> None:
        """The sampled convolution, one pass that fills, adds and activates, and a second output."""
        filling = step.filling
        assert filling is not None  # noqa: S101  # the caller asked
        name = step.out or f"{step.out2}.first"
        size = step.geometry.grid(*self.maps[step.source].size)
        bias = None if step.bias is None else step.bias.to(step.weight.dtype)
        bare: dict[str, Any] = {
            "filling": None,
            "shortcut": None,
            "activation": Activation.NONE,
            "slope": None,
        }
        bare |= {"out2": None, "scale2": None, "shift2": None}
        sampled = replace(step, kind="sampled", bias=bias, out=f"{name}.sampled", **bare)
        self.maps[f"{name}.sampled"] = output(sampled, self.maps)
        self.maps[name] = Map(step.out_channels, size)
        self.step(sampled)
        residual = None
        if step.shortcut is not None:
            residual = self._every(self._whole(step.shortcut.source), step.shortcut.stride)
        # what the pass cannot take along is a pointwise step behind it
        behind = step.activation > Activation.RELU6 or (
            step.shortcut is not None and step.shortcut.padded > 0
        )
        filled = self._new(f"{name}.filled", self.maps[name]) if behind else name
        plan = fill_plan(step.sampling, *size, filling.reach)
        channels = (0, step.out_channels)
        plan.check(filling.weight.shape, None if filling.bias is None else filling.bias.shape, channels)
        line = _Line(_FILL, f"{name}.sampled", filled, residual=None if behind else residual)
        line.tensors = {"tap_index": (_TABLE, plan.index), "rows": (_TABLE, plan.kinds)}
        line.tensors |= _floats(weight=filling.weight if plan.taps else None, bias=filling.bias)
        line.values = {"num_taps": max(1, plan.taps), "activation": 0 if behind else int(step.activation)}
        self.done.append(line)
        if behind:
            self._pointwise(filled, name, residual, step.activation, slope=step.slope)
        if step.out2 is not None:
            scales = {"scale": step.scale2, "shift": step.shift2}
            self.maps[step.out2] = self.maps[name]
            self._pointwise(name, step.out2, None, Activation.RELU, **scales)

    def follower(self, step: Follower) -> None:
        first = self.maps[step.sources[0]]
        if step.kind == "maxpool":
            plan = window_plan(first.fill, pool_window(step, first.size), *first.size)
            line = _Line(_WINDOW_MAX, step.sources[0], step.out)
            line.tensors = {"tap_index": (_TABLE, plan.index), "rows": (_TABLE, plan.starts)}
            self.done.append(line)
        elif step.kind == "mean":
            height, width = first.size
            index = nearest_index(first.fill, height, width) if first.fill else torch.arange(height * width)
            self._read(step.sources[0], step.out, index.view(1, -1))
            if not step.keepdim:
                self.flat.add(step.out)
        elif step.kind == "concat":
            self._concatenate(step)
        elif (simple := self._simple(step)) is not None:
            simple()
        else:
            shared = step.kind != "sum" and _shared([self.maps[name] for name in step.sources])
            sources = step.sources if shared else tuple(self._whole(name) for name in step.sources)
            self.done.append(TorchPiece(step.function, sources, (step.out,)))

    def _concatenate(self, step: Follower) -> None:
        compact = _shared([self.maps[name] for name in step.sources])
        at = 0
        for name in step.sources if compact else [self._whole(name) for name in step.sources]:
            line = _Line(_COPY, name, step.out, values={"residual_channels": at})
            self.done.append(line)
            at += self.maps[name].channels

    def _simple(self, step: Follower) -> Callable[[], None] | None:
        """A pointwise follower as a line; None for what the kernels do not have."""
        function, maps = step.function, [self.maps[name] for name in step.sources]
        target, rest = getattr(function, "function", function), getattr(function, "rest", ())
        named = getattr(function, "named", {})
        if step.kind != "pointwise" or rest or named or any(shape != maps[0] for shape in maps):
            return None
        x, out = step.sources[0], step.out
        if len(maps) == 1:
            if isinstance(function, partial) and function.func is _second:
                scales = {"scale": function.args[0].scale2, "shift": function.args[0].shift2}
                return partial(self._pointwise, x, out, None, Activation.RELU, **scales)
            if target in _RELUS or (isinstance(target, nn.Module) and surely(target, nn.ReLU)):
                return partial(self._pointwise, x, out, None, Activation.RELU)
            if isinstance(target, nn.BatchNorm2d) and (found := _affine(target)) is not None:
                return partial(self._pointwise, x, out, None, 0, scale=found[0], shift=found[1])
        elif len(maps) == 2 and target in _ADDS:
            return partial(self._pointwise, x, out, step.sources[1], 0)
        return None

    # ------------------------------------------------ lines

    def _new(self, name: str, shape: Map) -> str:
        self.maps[name] = shape
        return name

    def _pointwise(
        self,
        x: str,
        out: str,
        residual: str | None,
        activation: int,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        slope: Tensor | None = None,
    ) -> None:
        line = _Line(_POINTWISE, x, out, residual=residual)
        line.tensors = _floats(scale2=scale, shift2=shift, slope=slope)
        line.values = {"activation": int(activation)}
        if residual is not None:
            line.values["residual_channels"] = self.maps[residual].channels
        self.done.append(line)

    def _read(self, x: str, out: str, index: Tensor) -> None:
        """Means of rows of a map; of one row, copies of it."""
        count, taps = index.shape
        groups = torch.tensor([[count, taps]])
        line = _Line(_CONVOLVE, x, out, values={"num_taps": taps})
        line.tensors = _gather(index, torch.arange(count), torch.arange(taps), groups)
        self.done.append(line)

    def _whole(self, name: str) -> str:
        """A map that is stored in compact form, made whole."""
        shape = self.maps[name]
        whole = f"{name}.whole"
        if not shape.fill:
            return name
        if whole not in self.maps:
            self._new(whole, Map(shape.channels, shape.size))
            self._read(name, whole, nearest_index(shape.fill, *shape.size).view(-1, 1))
        return whole

    def _every(self, name: str, stride: int) -> str:
        """Each so many-th position of a whole map, in both directions."""
        shape, fewer = self.maps[name], f"{name}.every{stride}"
        if stride == 1:
            return name
        if fewer not in self.maps:
            height, width = shape.size
            rows = torch.arange(height * width).view(height, width)[::stride, ::stride]
            self._new(fewer, Map(shape.channels, (rows.shape[0], rows.shape[1])))
            self._read(name, fewer, rows.reshape(-1, 1))
        return fewer

    def _plain(self, step: Step) -> Tensor:
        """A weight [groups, O / groups, C / groups, taps], the same one for each step that has it."""
        key = id(step.weight)
        if key not in self.weights:
            weight = step.weight.detach().flatten(2)
            weight = weight.view(step.groups, -1, *weight.shape[1:])
            self.weights[key] = (weight.transpose(1, 2) if step.kind == "transposed" else weight).contiguous()
        return self.weights[key]

    # ------------------------------------------------ pieces

    def finished(self) -> list[NativePiece | TorchPiece]:
        wanted: list[str] = []
        for name in self.program.outputs:
            whole = self._whole(name)
            if whole in wanted or whole in self.program.inputs:
                # a result has memory of its own
                copied = self._new(f"{name}.copy{len(wanted)}", self.maps[whole])
                self.done.append(_Line(_COPY, whole, copied, values={"residual_channels": 0}))
                whole = copied
            wanted.append(whole)
        renamed = dict(zip(wanted, self.program.outputs, strict=True))
        runs: list[list[_Line] | TorchPiece] = []
        for line in self.done:
            if isinstance(line, TorchPiece):
                runs.append(line)
            elif runs and isinstance(runs[-1], list):
                runs[-1].append(line)
            else:
                runs.append([line])
        result: list[NativePiece | TorchPiece] = []
        for number, run in enumerate(runs):
            if isinstance(run, TorchPiece):
                result.append(
                    replace(run, inputs=_named(run.inputs, renamed), outputs=_named(run.outputs, renamed))
                )
                continue
            later = set(wanted)
            for other in runs[number + 1 :]:
                later |= (
                    set(other.inputs)
                    if isinstance(other, TorchPiece)
                    else {name for line in other for name in line.reads}
                )
            inputs = _unwritten(run) if len(runs) > 1 else list(self.program.inputs)
            written = list(dict.fromkeys(name for line in run for name in line.writes))
            outputs = [name for name in written if name in later] if len(runs) > 1 else wanted
            data = self._bytes(run, inputs, outputs)
            shapes = [self.maps[name] for name in (*inputs, *outputs)]
            flat = [
                (s.channels,) if n in self.flat else (s.channels, *s.stored)
                for n, s in zip((*inputs, *outputs), shapes, strict=True)
            ]
            result.append(
                NativePiece(
                    data,
                    _named(inputs, renamed),
                    _named(outputs, renamed),
                    tuple(flat[: len(inputs)]),
                    tuple(flat[len(inputs) :]),
                )
            )
        return result

    def _bytes(self, lines: Sequence[_Line], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
        written = dict.fromkeys(name for line in lines for name in line.writes)
        scratch = [name for name in written if name not in outputs]
        offsets = _arena(lines, scratch, self.maps)  # type: ignore[arg-type]
        numbers = {name: number for number, name in enumerate((*inputs, *outputs, *scratch))}
        kinds = [_INPUT] * len(inputs) + [_OUTPUT] * len(outputs) + [_SCRATCH] * len(scratch)
        buffers: list[int] = []
        for name, kind in zip(numbers, kinds, strict=True):
            shape = self.maps[name]
            buffers += BufferCode(kind, shape.channels, *shape.stored, offsets.get(name, 0))
        found = _Tensors()
        code: list[int] = []
        for line in lines:
            fields = dict.fromkeys(StepCode._fields, -1)
            fields |= {"residual_channels": 0, "num_taps": 1, "channel_groups": 1, "activation": 0}
            fields |= line.values | {"work": line.work, "x": numbers[line.x]}
            for name in ("out", "out2", "residual"):
                if (other := getattr(line, name)) is not None:
                    fields[name] = numbers[other]
            fields |= {name: found.number(kind, tensor) for name, (kind, tensor) in line.tensors.items()}
            code += StepCode(**fields)
        ranks = [2 if name in self.flat else 4 for name in outputs]
        counts = (len(inputs), len(outputs), len(kinds), len(lines), len(found.all))
        return _packed_file(self.program.dtype, counts, [*ranks, *buffers, *code], found.all)


_RELUS = (torch.relu, torch.nn.functional.relu, Tensor.relu)
_ADDS = (torch.add, Tensor.add, operator.add)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | None:
    if not surely(norm, nn.BatchNorm2d) or norm.training or norm.running_var is None:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    mean = norm.running_mean if norm.running_mean is not None else torch.zeros_like(scale)
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    return scale.float(), shift.float()


def _gather(index: Tensor, rows: Tensor, taps: Tensor, groups: Tensor) -> dict[str, tuple[int, Tensor]]:
    found = {"tap_index": index, "rows": rows, "taps": taps, "groups": groups}
    return {name: (_TABLE, tensor) for name, tensor in found.items()}


def _floats(**tensors: Tensor | None) -> dict[str, tuple[int, Tensor]]:
    return {name: (_FLOATS, tensor) for name, tensor in tensors.items() if tensor is not None}


def _unwritten(lines: Sequence[_Line]) -> list[str]:
    written: set[str] = set()
    found: list[str] = []
    for line in lines:
        found += [name for name in line.reads if name not in written and name not in found]
        written |= set(line.writes)
    return found


def _named(names: Sequence[str], renamed: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(renamed.get(name, name) for name in names)


# ---------------------------------------------------------------- from lines to bytes


class _Tensors:
    """The tensors of a file, each once."""

    def __init__(self) -> None:
        self.all: list[tuple[int, Tensor]] = []
        self._numbers: dict[tuple[int, int], int] = {}

    def number(self, kind: int, tensor: Tensor) -> int:
        key = (kind, id(tensor))
        if key not in self._numbers:
            self._numbers[key] = len(self.all)
            self.all.append((kind, tensor))  # holds it, so that its id stays its own
        return self._numbers[key]


def _content(kind: int, tensor: Tensor) -> bytes:
    dtype = {_TABLE: torch.int32, _FLOATS: torch.float32, _WEIGHTS: tensor.dtype}[kind]
    plain = tensor.detach().to("cpu", dtype).contiguous()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _packed_file(
    dtype: torch.dtype,
    counts: tuple[int, int, int, int, int],
    numbers: Sequence[int],
    tensors: Sequence[tuple[int, Tensor]],
) -> bytes:
    head = struct.pack(f"<{len(numbers)}q", *numbers)
    at = -(-(_HEADER.size + len(head) + _ENTRY.size * len(tensors)) // _LINE) * _LINE
    entries, data = [], []
    for kind, tensor in tensors:
        content = _content(kind, tensor)
        sizes = [*tensor.shape, 1, 1, 1, 1][:4]
        entries.append(_ENTRY.pack(kind, 0, *sizes, at))
        data.append((at, content))
        at = -(-(at + len(content)) // _LINE) * _LINE
    result = bytearray(at)
    front = head + b"".join(entries)
    result[_HEADER.size : _HEADER.size + len(front)] = front
    for begin, content in data:
        result[begin : begin + len(content)] = content
    fields = (_MAGIC, _VERSION, int(dtype == torch.bfloat16), *counts, 0, at, b"")
    result[: _HEADER.size] = _HEADER.pack(*fields, 0)
    # of everything but the checksum itself
    checksum = zlib.crc32(memoryview(result)[_HEADER.size :], zlib.crc32(result[: _HEADER.size - 4]))
    result[: _HEADER.size] = _HEADER.pack(*fields, checksum)
    return bytes(result)
