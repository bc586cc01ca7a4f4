"""The operators straight from their formulas, as loops in float64, and the cases they are asked about.

It shares nothing with the library but a sampling's mask as a boolean array: no convolution is called
and every grid, position and tap is found here again.
"""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from quincunx.sampling import Cosets, Positions, Random, Sampling, Uniform

# ---------------------------------------------------------------- formulas


def grid_size(size, kernel, stride, padding, dilation):
    """How many kernel placements fit along rows and columns, counted one by one."""
    (height, width), (top, bottom, left, right) = size, padding
    rows = range(0, height + top + bottom - dilation[0] * (kernel[0] - 1), stride[0])
    cols = range(0, width + left + right - dilation[1] * (kernel[1] - 1), stride[1])
    return len(rows), len(cols)


def computed(mask):
    """The positions of a mask as (row, column), in row-major order."""
    height, width = mask.shape
    return [(r, c) for r in range(height) for c in range(width) if mask[r, c]]


def taps(kernel):
    return [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]


def sampled_conv(x, w, b, mask, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1):
    batch, _, height, width = x.shape
    outputs, depth, *kernel = w.shape
    places = computed(mask)
    y = np.zeros((batch, outputs, len(places), 1))
    for k, (p, q) in enumerate(places):
        for o in range(outputs):
            first = o // (outputs // groups) * depth
            if b is not None:
                y[:, o, k, 0] += b[o]
            for i, j in taps(kernel):
                r = stride[0] * p + dilation[0] * i - padding[0]
                c = stride[1] * q + dilation[1] * j - padding[2]
                if 0 <= r < height and 0 <= c < width:
                    y[:, o, k, 0] += (x[:, first : first + depth, r, c] * w[o, :, i, j]).sum(1)
    return y


def sampled_conv_transpose(
    y, w, b, mask, size, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1
):
    batch, channels = y.shape[:2]
    _, depth, *kernel = w.shape
    z = np.zeros((batch, depth * groups, *size))
    for k, (p, q) in enumerate(computed(mask)):
        for i, j in taps(kernel):
            r = stride[0] * p + dilation[0] * i - padding[0]
            c = stride[1] * q + dilation[1] * j - padding[2]
            if not (0 <= r < size[0] and 0 <= c < size[1]):
                continue
            for channel in range(channels):
                first = channel // (channels // groups) * depth
                z[:, first : first + depth, r, c] += y[:, channel, k, 0, None] * w[channel, :, i, j]
    return z if b is None else z + b.reshape(1, -1, 1, 1)


def nearest(mask):
    """For each position, row-major, the number of the nearest computed one; ties to the lowest."""
    places = computed(mask)
    return [
        min(range(len(places)), key=lambda k: ((places[k][0] - r) ** 2 + (places[k][1] - c) ** 2, k))
        for r in range(mask.shape[0])
        for c in range(mask.shape[1])
    ]


def fill_nearest(y, mask):
    return y[:, :, nearest(mask), 0].reshape(*y.shape[:2], *mask.shape)


def run_plan(plan, rows, weight_of_tap):
    """Interpret gather tables: rows [in_rows, C] to [out_rows, O], a matrix [C, O] for each tap."""
    assert rows.shape[0] == plan.in_rows
    assert all(t.dtype == torch.int32 for t in (plan.index, plan.rows, plan.taps, plan.groups))
    index, order, tap_list = plan.index.numpy(), plan.rows.numpy(), plan.taps.numpy()
    out = np.full((plan.out_size[0] * plan.out_size[1], weight_of_tap[0].shape[1]), np.nan)
    at = position = tap = 0
    for count, active in plan.groups.tolist():
        block = index[at : at + count * active].reshape(count, active)
        for row, reads in zip(order[position : position + count], block, strict=True):
            assert np.isnan(out[row]).all(), "an output row is written twice"
            out[row] = 0
            for t, read in zip(tap_list[tap : tap + active], reads, strict=True):
                if read >= 0:
                    out[row] += rows[read] @ weight_of_tap[t]
        at, position, tap = at + count * active, position + count, tap + active
    assert (at, position, tap) == (len(index), len(order), len(tap_list)), "tables longer than the groups"
    return out  # a row that no group wrote stays NaN and fails every comparison


# ---------------------------------------------------------------- comparison


def assert_close(got, want, scale, terms=1):
    """Error of a sum of ``terms`` products within its a-priori bound.

    ``scale`` is the same sum over absolute values. A sum of n rounded products is off by at most
    (n + 2) u of that, in any order; bfloat16 sums in float32 and rounds its result and the bias
    addition, 2 eps in all.
    """
    assert got.shape == want.shape
    eps = torch.finfo(got.dtype).eps
    factor = 2 if got.dtype == torch.bfloat16 else terms + 2
    error = np.abs(got.detach().double().numpy() - want)
    assert (error <= factor * eps * scale).all(), f"error {error.max()}, allowed {factor * eps * scale.max()}"


def numpy(*tensors):
    return [None if t is None else t.detach().double().numpy() for t in tensors]


def magnitude(*arrays):
    return [None if a is None else np.abs(a) for a in arrays]


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One convolution: where it lands, its channels, and a seed for its values."""

    size: tuple[int, int]
    sampling: Sampling
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    depth: tuple[int, int] = (2, 3)
    batch: int = 2
    bias: bool = True
    layout: str = "contiguous"
    seed: int = 0

    @property
    def grid(self):
        return grid_size(self.size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def mask(self):
        return self.sampling.mask(*self.grid).numpy()

    @property
    def geometry(self):
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def operator_arguments(self):
        """What every convolution operator takes after its tensors."""
        return (self.sampling.spec, self.stride, self.padding, self.dilation, self.groups)

    @property
    def channels(self):
        return self.depth[0] * self.groups, self.depth[1] * self.groups

    @property
    def terms(self):
        """Products in the longest sum, either way."""
        return self.kernel[0] * self.kernel[1] * max(self.depth) + 1

    def values(self, dtype=torch.float64):
        """x [N, C, H, W], y [N, O, m, 1], w [O, C / groups, kh, kw], biases [O] and [C]."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        inner, outer = self.channels
        m = int(self.mask.sum())
        x = lay_out(draw(self.batch, inner, *self.size), self.layout)
        y = lay_out(draw(self.batch, outer, m, 1), self.layout)
        w = lay_out(draw(outer, self.depth[0], *self.kernel), self.layout)
        biases = (draw(outer), draw(inner)) if self.bias else (None, None)
        return x, y, w, *biases


LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


def lay_out(t, how):
    """The same values in another arrangement of memory (expanded: batch entries share theirs)."""
    if how == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if how == "sliced":
        wide = t.new_full((*t.shape[:3], 2 * t.shape[3] + 1), torch.nan)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if how == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "expanded":
        return t[:1].expand(t.shape)
    return t


@st.composite
def samplings(draw, height, width):
    """Any sampling that can be laid on a grid."""
    kinds = ["random", "uniform", "eq8", "positions"] + ["cosets"] * 3 * (min(height, width) >= 2)
    kind = draw(st.sampled_from(kinds))
    if kind == "cosets":
        period = draw(st.integers(2, min(4, height, width)))
        offset = st.integers(0, period - 1)
        return Cosets(period, draw(st.lists(st.tuples(offset, offset), min_size=1, max_size=period**2)))
    rate = draw(st.sampled_from([0.05, 0.25, 0.4, 0.75, 1.0]))
    if kind == "random":
        return Random(rate, draw(st.integers(0, 99)))
    if kind == "uniform":
        return Uniform(rate)
    if kind == "eq8":
        # the formula has no positions on thin grids
        return Uniform(min(rate, min(height, width) / max(height, width)), rule="eq8")
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width).filter(any))
    return Positions(torch.tensor(bits).view(height, width))


@st.composite
def cases(draw, strides=(1, 2, 3)):
    """Any convolution whose grid has at least one position."""
    kernel = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (5, 5), (3, 1), (1, 3), (2, 3)]))
    stride = draw(st.tuples(st.sampled_from(strides), st.sampled_from(strides)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    size = []
    for i in (0, 1):
        least = dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1]
        size.append(max(1, least + draw(st.integers(0, 6 * stride[i]))))
    grid = grid_size(size, kernel, stride, padding, dilation)
    return Case(
        size=tuple(size),
        sampling=draw(samplings(*grid)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=draw(st.integers(1, 3)),
        depth=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        batch=draw(st.integers(0, 2)),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 999)),
    )


CHESS, QUARTER = Cosets(2, [(0, 0), (1, 1)]), Cosets(2, [(0, 0)])
AWKWARD = {
    "odd size": Case((7, 5), CHESS, padding=(1, 1, 1, 1)),
    "one position": Case((3, 3), Positions([[True]]), batch=1),
    "one row": Case((1, 9), Random(0.5, 3), padding=(1, 1, 1, 1)),
    "kernel larger than the map": Case((2, 3), CHESS, (5, 5), padding=(3, 2, 2, 3)),
    "padding larger than the kernel": Case((4, 4), QUARTER, (1, 1), padding=(2, 3, 0, 2)),
    "one tap, most positions unreached": Case((6, 6), QUARTER, (1, 1)),
    "period 3": Case((8, 7), Cosets(3, [(1, 0), (2, 2)]), padding=(1, 1, 1, 1)),
    "period 4, grid 4": Case((4, 4), Cosets(4, [(3, 1)]), padding=(1, 1, 1, 1)),
    "vertical": Case((7, 6), Uniform(0.3), (3, 1), padding=(1, 1, 0, 0)),
    "horizontal": Case((7, 6), Random(0.3, 1), (1, 3), padding=(0, 0, 1, 1)),
    "even kernel": Case((6, 7), CHESS, (2, 2), padding=(0, 1, 0, 1)),
    "depthwise": Case((6, 5), CHESS, padding=(1, 1, 1, 1), groups=4, depth=(1, 1)),
    "grouped": Case((5, 6), CHESS, padding=(1, 1, 1, 1), groups=2, depth=(3, 2)),
    "dilated": Case((9, 8), CHESS, dilation=(2, 3), padding=(2, 2, 3, 3)),
    "strided, rest unread": Case((8, 9), CHESS, stride=(2, 3), padding=(1, 0, 0, 1)),
    "stride beyond the kernel": Case((9, 9), CHESS, (1, 1), stride=(3, 3)),
    "no picture": Case((6, 6), CHESS, padding=(1, 1, 1, 1), batch=0),
    "one channel": Case((6, 6), CHESS, padding=(1, 1, 1, 1), depth=(1, 1), batch=1, bias=False),
    "many channels": Case((5, 5), CHESS, padding=(1, 1, 1, 1), depth=(17, 19), batch=1),
    "shared batch": Case((6, 5), CHESS, padding=(1, 1, 1, 1), layout="expanded"),
}
