"""MACs of the paper's tables: what each row costs here, by formula and beside what the paper prints.

Where the paper prints something else, DESIGN.md says why.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import quincunx as qx
from quincunx.experiments.printed import MACS

SMALL = torch.zeros(1, 3, 32, 32)
LARGE = torch.zeros(1, 3, 224, 224)


def convolution_macs(name, x=SMALL, **settings):
    rows = qx.cost(qx.networks.build(name, **settings), x).rows
    return sum(row.macs for row in rows if row.kind != "Linear")


# with widths 16, 32, 64 on maps of 1024, 256, 64 positions these cost the same in every stage
STEM = 1024 * 9 * 3 * 16
CONV = 1024 * 9 * 16 * 16


def regular_macs(depth, density):
    """Stem; two blocks that change the resolution, 1.5 convolutions each; all others two, sampled."""
    n = (depth - 2) // 6
    return STEM + 2 * 3 * CONV // 2 + (3 * n - 2) * 2 * density * CONV


@pytest.mark.parametrize(
    ("depth", "dense", "sampled"),
    [(20, 40.5, 24.0), (44, 97.2, 52.3), (62, 139.6, 73.6), (86, 196.3, 101.9), (110, 252.9, 130.2)],
)
def test_table_1_regular_blocks(depth, dense, sampled):
    """The paper prints 193.6 for rRN-86 and 130.0 for rSBN-110."""
    found = convolution_macs(f"rrn{depth}"), convolution_macs(f"rsbn{depth}")
    assert found == (regular_macs(depth, 1), regular_macs(depth, Fraction(1, 2)))
    assert [macs / 1e6 for macs in found] == pytest.approx([dense, sampled], abs=0.06)


@pytest.mark.parametrize(
    ("depth", "dense", "printed"),
    [(29, 41.9, 7.0), (47, 68.6, 14.2), (65, 95.3, 21.2), (83, 122.1, 28.5), (101, 148.8, None)],
)
def test_table_1_channel_bottlenecks(depth, dense, printed):
    """The savings agree with the differences of the paper's own figures, to their rounding; its absolute
    figures, 34.5, 57.1, 79.6 and 102.3, do not follow from a four-fold expansion."""
    full, half = convolution_macs(f"crn{depth}"), convolution_macs(f"csbn{depth}")
    assert full / 1e6 == pytest.approx(dense, abs=0.06)
    assert full - half == 3 * ((depth - 2) // 9 - 1) * CONV / 2
    if printed is not None:
        assert (full - half) / 1e6 == pytest.approx(printed, abs=0.2)


@pytest.mark.parametrize(("sampling", "density"), [("1/4", 1), ("2/4", 2), ("3/4", 3)])
@pytest.mark.parametrize("depth", [20, 110])
def test_table_2_sampling_rates(depth, sampling, density):
    found = convolution_macs(f"rsbn{depth}", sampling=sampling)
    assert found == regular_macs(depth, Fraction(density, 4))


@pytest.mark.parametrize(
    ("name", "dense", "sampled"),
    [
        ("pyramidnet110-a84", 0.772, 0.394),
        ("pyramidnet110-a270", 4.718, 2.410),
        ("pyramidnet164-a84", 0.745, 0.555),
        ("pyramidnet164-a270", 4.570, 3.394),
    ],
)
def test_table_3_pyramids(name, dense, sampled):
    """The paper prints 0.75 and 0.56 for 164 layers, alpha 84."""
    found = [qx.cost(qx.networks.build(kind + name), SMALL).macs / 1e9 for kind in ("", "sb-")]
    assert found == pytest.approx([dense, sampled], abs=6e-4)


# channels and positions of the four stages, blocks in each
STAGES = list(zip((64, 128, 256, 512), (56**2, 28**2, 14**2, 7**2), strict=True))
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@pytest.mark.parametrize(
    ("depth", "dense", "sampled", "ratio"),
    [(18, 1.814, 1.238, 1.46), (34, 3.664, 2.166, 1.69), (50, 4.089, 3.398, 1.20), (101, 7.801, 6.128, 1.27)],
)
def test_table_4_imagenet(depth, dense, sampled, ratio):
    """The paper prints 1.6 to 1.0 G, 3.5 to 2.0 G, 3.7 to 2.9 G and 7.4 to 5.7 G: what is saved agrees."""
    full, half = (
        qx.cost(qx.networks.build(kind + f"resnet{depth}", 1000), LARGE).macs for kind in ("", "sb-")
    )
    assert [full / 1e9, half / 1e9, full / half] == pytest.approx([dense, sampled, ratio], abs=6e-3)
    saved = 0
    for i, ((channels, positions), blocks) in enumerate(zip(STAGES, BLOCKS[depth], strict=True)):
        replaced = blocks - 1 if depth >= 50 or i > 0 else blocks
        convolutions = 1 if depth >= 50 else 2
        # of an odd number of positions the chessboard has the larger half
        saved += replaced * convolutions * (positions // 2) * 9 * channels**2
    assert full - half == saved


def test_table_4_counts_blocks_alone():
    """Without the first convolution and the classifier, ResNet-34 has the 3.5 and 2.0 G of the paper.

    ResNet-50 has its 3.7 G if each stage's first stride is on the first 1 x 1 instead of the 3 x 3, by which
    three of those convolutions, of as many MACs each, are computed at a quarter of the positions.
    """

    def blocks(name):
        rows = qx.cost(qx.networks.build(name, 1000), LARGE).rows
        return sum(row.macs for row in rows if row.name.startswith("layer")) / 1e9

    assert [blocks("resnet34"), blocks("sb-resnet34")] == pytest.approx([3.545, 2.047], abs=6e-4)
    assert [blocks("resnet18"), blocks("sb-resnet18")] == pytest.approx([1.696, 1.120], abs=6e-4)
    moved = 3 * (256 * 128 * 56**2) * 3 / 4 / 1e9
    assert blocks("resnet50") - moved == pytest.approx(3.738, abs=6e-4)
    assert blocks("resnet101") - moved == pytest.approx(7.450, abs=6e-4)
    for depth in (18, 34, 101):
        printed = MACS[f"resnet{depth}"] - MACS[f"sb-resnet{depth}"]
        saved = blocks(f"resnet{depth}") - blocks(f"sb-resnet{depth}")
        assert saved == pytest.approx(printed / 1000, abs=0.05)
