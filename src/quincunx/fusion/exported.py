"""Programs in graphs of ``torch.export``: an operator that is registered in C++, and its bytes as a constant.

The bytes hold tables and unpacked weights: whoever loads the graph packs them for the processor there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from quincunx.fusion.program import _KNOWN, Program
from quincunx.fusion.serialise import NativePiece, TorchPiece, pieces
from quincunx.ops import native

__all__ = ["TorchNode", "exported_outputs"]


class TorchNode(nn.Module):
    """A piece as an operator of torch; weights are packed where it is loaded.

    Example:
        >>> fused = qx.fuse(qx.networks.build("rsbn8", width=4).eval())
        >>> [piece] = pieces(fused.program0, (1, 3, 8, 8))
        >>> TorchNode(piece)(torch.randn(2, 3, 8, 8))[0].shape
        torch.Size([2, 16, 2, 2])
    """

    program: Tensor

    def __init__(self, piece: NativePiece) -> None:
        super().__init__()
        _register_fake()
        self.register_buffer("program", torch.frombuffer(bytearray(piece.data), dtype=torch.uint8))
        self.sizes = [n for shape in piece.output_shapes for n in (len(shape), *shape)]

    def forward(self, *maps: Tensor) -> Sequence[Tensor]:
        found: list[Tensor] = torch.ops.quincunx_native.run_program_sized(
            list(maps), self.program, self.sizes
        )
        return found


@lru_cache(maxsize=1)
def _register_fake() -> None:
    """Tell tracers the results' sizes.

    Raises:
        RuntimeError: the native back end was not built.
    """
    if (reason := native.load()) is not None:
        raise RuntimeError(f"a fused network cannot be exported without the native back end: {reason}")

    def fake(inputs: Sequence[Tensor], program: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        found, left = [], list(sizes)
        while left:
            rank, left = left[0], left[1:]
            shape, left = (inputs[0].shape[0], *left[:rank]), left[rank:]
            layout = torch.channels_last if rank == 3 else torch.contiguous_format
            found.append(inputs[0].new_empty(shape).contiguous(memory_format=layout))
        return found

    torch.library.register_fake("quincunx_native::run_program_sized", fake)


# program -> {shapes of one image: its pieces}
_PIECES: WeakKeyDictionary[Program, dict[tuple[tuple[int, ...], ...], list[TorchNode | TorchPiece]]] = (
    WeakKeyDictionary()
)
_NAMES: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], tuple[str, ...]]] = WeakKeyDictionary()


def exported_outputs(key: str, *arguments: Tensor) -> tuple[Tensor, ...]:
    """Return a program's outputs while ``torch.export`` traces it.

    A strict export first reads Python, then runs what it read: for the reader this is one call, which it does
    not look into (``allow_in_graph``), for the run it is the operators.

    Args:
        key: of the program.
        arguments: its inputs.

    Raises:
        ValueError: a free size other than the batch; tables belong to one size of map.
        RuntimeError: the native back end was not built.
    """
    program = _KNOWN[key]
    shapes = tuple(tuple(x.shape[1:]) for x in arguments)
    if not all(type(n) is int for shape in shapes for n in shape):
        raise ValueError(
            "a fused network is exported for maps of one size: only the batch may be dynamic, got shapes "
            f"{[tuple(x.shape) for x in arguments]}"
        )
    known = _PIECES.setdefault(program, {})
    if shapes not in known:
        # nothing of this belongs to the graph, not even that gradients are off here
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            made: list[TorchNode | TorchPiece] = []
            for piece in pieces(program, *((1, *shape) for shape in shapes)):
                if isinstance(piece, NativePiece):
                    node = TorchNode(piece)
                    _NAMES[node] = piece.inputs, piece.outputs
                    made.append(node)
                else:
                    made.append(piece)
            known[shapes] = made
    values = dict(zip(program.inputs, arguments, strict=True))
    for step in known[shapes]:
        sources, outs = (step.inputs, step.outputs) if isinstance(step, TorchPiece) else _NAMES[step]
        maps = [values[name] for name in sources]
        found = (step.function(*maps),) if isinstance(step, TorchPiece) else step(*maps)
        values.update(zip(outs, found, strict=True))
    return tuple(values[name] for name in program.outputs)
