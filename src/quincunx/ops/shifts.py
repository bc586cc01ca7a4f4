"""Convolutions in which a tap is a shift: tables by which kernels read their inputs side by side.

Positions of a grid can be laid out in *lines* such that the inputs behind a tap follow each other as the
outputs do. The line of a dense map is its positions row by row, with a gap behind each row that stands for
what lies outside; a lattice has a line for each of its residue classes. The inputs of 16 neighbouring outputs
then lie side by side for every tap, and one copy of the input in this order serves all taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Reads", "shift_table"]

# what csrc/tile_shifts.h can hold
_MOST_CLASSES, _MOST_TAPS = 32, 64
# outputs that share a tile
_TILE = 16
# how many times the tiles that tables need without lines may be needed with them; the kernels weigh the two
# by the channels that they meet: copies of narrow maps are dear
_WASTE = 4.0


@dataclass(frozen=True)
class Reads:
    """What each output of a convolution reads.

    Attributes:
        outputs: row and column of each output, [n, 2].
        inputs: row and column behind each tap, inside the map or not, [n, taps, 2].
        table: the number of that input, -1 where there is none, [n, taps].
        rows: the number of each output, [n].
        gathered: how many inputs the gather tables name, "none" included.
        stride: of the convolution.
        period: of the lattice of the sampled side, 1 if it has none.
        transposed: the sampled side is that of the inputs.
    """

    outputs: Tensor
    inputs: Tensor
    table: Tensor
    rows: Tensor
    gathered: int
    stride: tuple[int, int]
    period: int
    transposed: bool


@dataclass(frozen=True)
class _Lines:
    """Position (r, c) has place (r // rows * pitch + c) // step in the line that its remainders name."""

    rows: int
    step: int
    pitch: int

    def finer(self, stride: tuple[int, int], step: int) -> _Lines:
        """The same on the other side, whose neighbours are nearer to each other, or as far as a step."""
        return _Lines(stride[0] * self.rows, stride[1] // step * self.step, stride[1] * self.pitch)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each position's line, and its place there."""
        r, c = positions[..., 0], positions[..., 1]
        flat = r.div(self.rows, rounding_mode="floor") * self.pitch + c
        line = r.remainder(self.rows) * self.step + flat.remainder(self.step)
        return line, flat.div(self.step, rounding_mode="floor")


def shift_table(reads: Reads, apart: bool = False) -> Tensor:
    """Return the lines of a convolution as one int32 table, empty if there are none or they are not worth it.

    The table is (classes, slots, step), for each class of outputs (taps, positions), for each class its taps,
    the offset of each tap and the output of each position, and the input of each slot. Position q of a class
    reads slot offsets[tap] + step q. -1 is an output that nobody needs, or an input that there is none of.

    Args:
        apart: whether the inputs of a row stay side by side where the convolution has a horizontal stride,
            which is the step then; empty where it has none. Otherwise the step is 1.
    """
    best = torch.zeros(0, dtype=torch.int32)
    if not reads.gathered or (apart and (reads.transposed or not 1 < reads.stride[1] <= _MOST_TAPS)):
        return best
    step = reads.stride[1] if apart else 1
    least = _WASTE * reads.gathered / _TILE
    coarse, fine = (reads.inputs, reads.outputs) if reads.transposed else (reads.outputs, reads.inputs)
    across, along = (int(of[..., 1].max() - of[..., 1].min()) + 1 for of in (coarse, fine))
    narrowest = int(coarse[..., 1].max()) + 1
    widest = max(across, -(-along // reads.stride[1])) + 2 * reads.period
    # lattices with positions in every row, then those with the same columns in each so many-th row
    for rows in dict.fromkeys((1, reads.period)):
        last = widest
        for pitch in range(narrowest, widest + 1):
            if pitch > last:
                break  # what follows has the same lines with longer gaps
            found = _in_lines(reads, _Lines(rows, reads.period, pitch), least, step)
            if found is not None:
                least, best = found
                last = min(last, pitch + reads.period - 1)
    return best


def _in_lines(reads: Reads, lines: _Lines, most: float, step: int) -> tuple[float, Tensor] | None:
    """The cost of these lines in tiles times taps, and their table; None if it is not below ``most``, or
    if an input would have two slots' worth of meaning."""
    finer = lines.finer(reads.stride, step)
    of_outputs, of_inputs = (finer, lines) if reads.transposed else (lines, finer)
    line, place = of_outputs(reads.outputs)
    _, member = line.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    classes, taps = int(member.max()) + 1, reads.table.shape[1]
    exists = reads.table >= 0
    used = torch.zeros(classes, taps, dtype=torch.int32).index_add_(0, member, exists.int()) > 0
    counts = torch.zeros(classes, dtype=torch.long).scatter_reduce_(0, member, place + 1, "amax")
    cost = float((-(-counts // _TILE) * used.sum(1)).sum())
    if classes > _MOST_CLASSES or int(used.sum(1).max()) > _MOST_TAPS or cost >= most:
        return None
    plane, slot = of_inputs(reads.inputs)
    shift, wanted = slot - step * place[:, None], used[member]
    # one line and one shift for each tap of a class
    cells = (member[:, None] * taps + torch.arange(taps))[wanted]
    both = []
    for values in (plane[wanted], shift[wanted]):
        lowest, highest = (
            torch.zeros(classes * taps, dtype=torch.long).scatter_reduce_(
                0, cells, values, how, include_self=False
            )
            for how in ("amin", "amax")
        )
        if not torch.equal(lowest, highest):
            return None
        both.append(lowest.view(classes, taps))
    plane_of, shift_of = both
    offsets, slots = _planes(plane_of, shift_of, step * (counts - 1) + 1, used)
    inputs = torch.full((slots,), -1)
    at = (offsets[member] + step * place[:, None])[wanted]
    found = reads.table[wanted]
    inputs[at[found >= 0]] = found[found >= 0]
    if not torch.equal(inputs[at], found):
        return None  # the gap behind a row is too short
    head, body = [torch.tensor([classes, slots, step])], []
    for number in range(classes):
        own = used[number].nonzero().flatten()
        outputs = torch.full((int(counts[number]),), -1)
        outputs[place[member == number]] = reads.rows[member == number]
        head.append(torch.tensor([len(own), len(outputs)]))
        body += [own, offsets[number, own], outputs]
    return cost, torch.cat([*head, *body, inputs]).int()


def _planes(plane_of: Tensor, shift_of: Tensor, reach: Tensor, used: Tensor) -> tuple[Tensor, int]:
    """The slots of the inputs, line after line: the offsets [classes, taps], and how many there are.

    ``reach``: from the first slot that a class's positions read through a tap to behind the last, [classes].
    """
    offsets, slots = torch.zeros_like(shift_of), 0
    for plane in sorted(set(plane_of[used].tolist())):
        here = used & (plane_of == plane)
        first = int(shift_of[here].min())
        offsets[here] = shift_of[here] - first + slots
        slots += int((shift_of + reach[:, None])[here].max()) - first
    return offsets, slots
