"""Programs as bytes, for engines that run them without PyTorch: libquincunx, ONNX Runtime, OpenVINO.

The bytes hold steps, tables and unpacked weights for one size of map; any batch, number of threads and
instruction set runs them. ``csrc/program_file.h`` describes the layout, ``csrc/program.h`` the steps.
A program whose followers are all among those that the kernels have becomes one such piece; other followers
stay functions of torch between pieces, which an exporter writes as its engine's own operators. A program in
eight bits holds integers and grids beside its real numbers; what crosses from piece to piece is real.
"""

from __future__ import annotations

import operator
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from quincunx.fusion.epilogues import Activation
from quincunx.fusion.int8 import Alone, Divider, Int8Program, Int8Step, kernel_lines, map_of
from quincunx.fusion.lines import (
    COPY,
    FLOATS,
    INT8_WEIGHTS,
    POINTWISE,
    TABLE,
    WEIGHTS,
    WINDOW_MAX,
    Line,
    Lines,
    arena,
    mean_index,
    replaced,
    unwritten,
)
from quincunx.fusion.program import BufferCode, Program, coded
from quincunx.fusion.steps import (
    Follower,
    Map,
    Step,
    _second,
    _shared,
    pool_window,
)
from quincunx.modules import surely
from quincunx.ops import native, native_int8
from quincunx.ops.int8 import Grid
from quincunx.ops.plan import window_plan

__all__ = ["NativePiece", "TorchPiece", "load_program", "pieces", "program_bytes", "programs"]

_MAGIC, _VERSION, _INT8_VERSION = b"QUINCUNX", 5, 6
_HEADER = struct.Struct("<8s2I5II Q12sI")
_ENTRY = struct.Struct("<2I4qq")
_GRID = struct.Struct("<2ifI")
_LINE = 64
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
        writer = _Int8Writer(program, maps) if isinstance(program, Int8Program) else _Writer(program, maps)
        writer.take(steps)
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


class _Writer(Lines):
    """Collects lines and the functions between them."""

    def __init__(self, program: Program, maps: Mapping[str, Map]) -> None:
        super().__init__(maps)
        self.program = program
        self.parts: list[Line | TorchPiece] = []
        self.flat: set[str] = set()  # maps [N, C, 1, 1] that torch has as [N, C]
        self.weights: dict[int, Tensor] = {}

    # ------------------------------------------------ what a program has

    def take(self, steps: Sequence[Step | Follower]) -> None:
        for step in steps:
            self.follower(step) if isinstance(step, Follower) else self.step(step)

    def follower(self, step: Follower) -> None:
        first = self.maps[step.sources[0]]
        if step.kind == "maxpool":
            plan = window_plan(first.fill, pool_window(step, first.size), *first.size)
            line = Line(WINDOW_MAX, step.sources[0], step.out)
            line.tensors = {"tap_index": (TABLE, plan.index), "rows": (TABLE, plan.starts)}
            self.add(line)
        elif step.kind == "mean":
            self.read(step.sources[0], step.out, mean_index(first))
            if not step.keepdim:
                self.flat.add(step.out)
        elif step.kind == "concat":
            self._concatenate(step)
        elif (simple := self._simple(step)) is not None:
            simple()
        else:
            shared = step.kind != "sum" and _shared([self.maps[name] for name in step.sources])
            sources = step.sources if shared else tuple(self.whole(name) for name in step.sources)
            self.add(TorchPiece(step.function, sources, (step.out,)))

    def _concatenate(self, step: Follower) -> None:
        compact = _shared([self.maps[name] for name in step.sources])
        at = 0
        for name in step.sources if compact else [self.whole(name) for name in step.sources]:
            line = Line(COPY, name, step.out, values={"residual_channels": at})
            self.add(line)
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
                behind: Step = function.args[0]
                scales = {"scale": behind.scale2, "shift": behind.shift2}
                return partial(self.pointwise, x, out, None, behind.activation2, **scales)
            if target in _RELUS or (isinstance(target, nn.Module) and surely(target, nn.ReLU)):
                return partial(self.pointwise, x, out, None, Activation.RELU)
            if isinstance(target, nn.BatchNorm2d) and (found := _affine(target)) is not None:
                return partial(self.pointwise, x, out, None, 0, scale=found[0], shift=found[1])
        elif len(maps) == 2 and target in _ADDS:
            return partial(self.pointwise, x, out, step.sources[1], 0)
        return None

    def weight_of(self, step: Step) -> Tensor:
        """A weight [groups, O / groups, C / groups, taps], the same one for each step that has it."""
        return self.grouped(step, step.weight)

    def grouped(self, step: Step, weight: Tensor) -> Tensor:
        key = id(weight)
        if key not in self.weights:
            flat = weight.detach().flatten(2)
            flat = flat.view(step.groups, -1, *flat.shape[1:])
            self.weights[key] = (flat.transpose(1, 2) if step.kind == "transposed" else flat).contiguous()
        return self.weights[key]

    def add(self, line: Line | TorchPiece) -> None:
        self.parts.append(line)

    # ------------------------------------------------ pieces

    def finished(self) -> list[NativePiece | TorchPiece]:
        wanted: list[str] = []
        for name in self.program.outputs:
            whole = self.whole(name)
            if whole in wanted or whole in self.program.inputs:
                # a result has memory of its own
                copied = self.new(f"{name}.copy{len(wanted)}", self.maps[whole])
                self.add(Line(COPY, whole, copied, values={"residual_channels": 0}))
                whole = copied
            wanted.append(whole)
        renamed = dict(zip(wanted, self.program.outputs, strict=True))
        runs = self.runs()
        result: list[NativePiece | TorchPiece] = []
        for number, run in enumerate(runs):
            if isinstance(run, TorchPiece):
                result.append(
                    replace(run, inputs=_named(run.inputs, renamed), outputs=_named(run.outputs, renamed))
                )
                continue
            later = set(wanted)
            for other in runs[number + 1 :]:
                later |= set(other.inputs if isinstance(other, TorchPiece) else unwritten(other))
            inputs = unwritten(run) if len(runs) > 1 else list(self.program.inputs)
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

    def runs(self) -> list[list[Line] | TorchPiece]:
        """Lines that follow each other, and what stands between them."""
        runs: list[list[Line] | TorchPiece] = []
        for line in self.parts:
            if isinstance(line, TorchPiece):
                runs.append(line)
            elif runs and isinstance(runs[-1], list):
                runs[-1].append(line)
            else:
                runs.append([line])
        return runs

    def grid_of(self, name: str) -> Grid | torch.dtype:
        """What the numbers of a map are."""
        return self.program.dtype

    def _bytes(self, lines: Sequence[Line], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
        written = dict.fromkeys(name for line in lines for name in line.writes)
        scratch = [name for name in written if name not in outputs]
        grids = {name: self.grid_of(name) for name in (*inputs, *outputs, *scratch)}
        low = isinstance(self.program, Int8Program)
        widths = {name: _width(grid) for name, grid in grids.items()} if low else None
        # what takes the place of another map has values as wide
        places = replaced(lines, scratch, self.maps)
        places = {
            name: other for name, other in places.items() if widths is None or widths[name] == widths[other]
        }
        offsets = arena(lines, scratch, self.maps, places, widths)
        numbers = {name: number for number, name in enumerate((*inputs, *outputs, *scratch))}
        kinds = [_INPUT] * len(inputs) + [_OUTPUT] * len(outputs) + [_SCRATCH] * len(scratch)
        buffers: list[int] = []
        for name, kind in zip(numbers, kinds, strict=True):
            shape = self.maps[name]
            buffers += BufferCode(kind, shape.channels, *shape.stored, offsets.get(name, 0))
        found = _Tensors()
        code: list[int] = []
        multipliers: list[int] = []
        for line in lines:
            named = {name: getattr(line, name) for name in ("x", "residual", "out", "out2")}
            maps_of = {name: -1 if other is None else numbers[other] for name, other in named.items()}
            tensors = {name: found.number(kind, tensor) for name, (kind, tensor) in line.tensors.items()}
            multipliers.append(tensors.pop("multiplier", -1))
            code += coded(line, maps_of | tensors)
        ranks = [2 if name in self.flat else 4 for name in outputs]
        counts = (len(inputs), len(outputs), len(kinds), len(lines), len(found.all))
        head = _integers([*ranks, *buffers, *code])
        if low:
            head += b"".join(_grid_entry(grids[name]) for name in numbers) + _integers(multipliers)
        version = _INT8_VERSION if low else _VERSION
        return _packed_file(version, self.program.dtype, counts, head, found.all)


class _Int8Writer(_Writer):
    """Of a program in eight bits: maps have two forms, and steps in real numbers stand between the others."""

    program: Int8Program

    def take(self, steps: Sequence[Step | Follower]) -> None:
        for stage in Divider(steps, self.maps, self.program.outputs, self.program.grids).stages:
            if isinstance(stage, Alone):
                super().take([stage.step])
                continue
            for low in stage.lines:
                for line in kernel_lines(low, self.maps, self.program.grids, self._integers_of):
                    self.add(line)
        forms = [
            name for part in self.parts if isinstance(part, Line) for name in (*part.reads, *part.writes)
        ]
        self.maps |= {name: self.maps[map_of(name)] for name in forms if name.endswith(":q")}

    def _integers_of(self, step: Int8Step) -> tuple[int, Tensor]:
        assert step.integers is not None  # noqa: S101  # a convolution has them
        return INT8_WEIGHTS, self.grouped(step, step.integers)

    def grid_of(self, name: str) -> Grid | torch.dtype:
        if name.endswith(":q"):
            return self.program.grids[map_of(name)]
        return torch.float32 if name.endswith(_CROSSING) else self.program.dtype

    def runs(self) -> list[list[Line] | TorchPiece]:
        """With the real numbers of maps whose integers a later piece reads: they give these back."""
        runs = super().runs()
        home: dict[str, list[Line]] = {}
        for run in runs:
            if isinstance(run, TorchPiece):
                continue
            arriving = [name for name in unwritten(run) if name.endswith(":q")]
            for name in arriving:
                real = f"{map_of(name)}{_CROSSING}"
                if real not in self.maps:
                    self.maps[real] = self.maps[name]
                    home[name].append(Line(POINTWISE, name, real))
            home |= {name: run for line in run for name in line.writes if name not in home}
            again = {name: f"{map_of(name)}:q" for name in arriving}
            run[:0] = [Line(POINTWISE, f"{map_of(name)}{_CROSSING}", again[name]) for name in arriving]
        return runs


# the form of a map that crosses to a later piece; float32, of which the same integers are made again
_CROSSING = ":crossing"
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
    dtype = {TABLE: torch.int32, FLOATS: torch.float32, WEIGHTS: tensor.dtype, INT8_WEIGHTS: torch.int8}[kind]
    plain = tensor.detach().to("cpu", dtype).contiguous()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _width(grid: Grid | torch.dtype) -> int:
    return 1 if isinstance(grid, Grid) else grid.itemsize


def _integers(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _grid_entry(grid: Grid | torch.dtype) -> bytes:
    if isinstance(grid, Grid):
        return _GRID.pack(native_int8.TYPES[grid.dtype], grid.zero, grid.scale, 0)
    return _GRID.pack(native_int8.TYPES[grid], 0, 1.0, 0)


def _packed_file(
    version: int,
    dtype: torch.dtype,
    counts: tuple[int, int, int, int, int],
    head: bytes,
    tensors: Sequence[tuple[int, Tensor]],
) -> bytes:
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
    fields = (_MAGIC, version, int(dtype == torch.bfloat16), *counts, 0, at, b"")
    result[: _HEADER.size] = _HEADER.pack(*fields, 0)
    # of everything but the checksum itself
    checksum = zlib.crc32(memoryview(result)[_HEADER.size :], zlib.crc32(result[: _HEADER.size - 4]))
    result[: _HEADER.size] = _HEADER.pack(*fields, checksum)
    return bytes(result)
