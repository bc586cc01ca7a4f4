"""The papers' printed figures, against a transcript of their tables where one lies beside the project."""

import re
from pathlib import Path

import pytest

from quincunx.experiments.printed import ESPACE, ESPACE_ORIGINALS, MACS, error_of, top5_of

TRANSCRIPT = Path(__file__).parents[2].parent / "shared" / "facts" / "paper_tables.md"


@pytest.fixture(scope="module")
def transcript() -> dict[str, str]:
    if not TRANSCRIPT.exists():
        pytest.skip(f"no transcript of the papers' tables at {TRANSCRIPT}")
    parts = re.split(r"^## (.*)$", TRANSCRIPT.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows_below(transcript: dict[str, str], heading: str) -> list[list[str]]:
    """Return the cells of the table below the heading that begins so, without its head."""
    (text,) = [body for title, body in transcript.items() if title.startswith(heading)]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def pair(cell: str) -> list[str]:
    return [half.strip() for half in cell.split("/")]


def macs_of(cell: str) -> list[float]:
    scale = 1000.0 if cell.endswith("G") else 1.0
    return [scale * float(half) for half in pair(cell.rstrip("GM "))]


def same(error, cell: str) -> None:
    mean, *spread = (float(part) for part in cell.split("±"))
    assert error is not None, cell
    assert (error.mean, error.deviation) == (mean, spread[0] if spread else None)


def test_table1(transcript):
    rows, blocks = rows_below(transcript, "Spatial bottleneck, Table 1"), ""
    assert len(rows) == 9
    for name, cifar10, cifar100, macs in rows:
        blocks = {"rRN": "rrn rsbn", "cRN": "crn csbn"}.get(name.split()[0], blocks)
        depth = name.split()[-1]
        networks = [block + depth for block in blocks.split()]
        for data, cell in (("cifar10", cifar10), ("cifar100", cifar100)):
            for network, figure in zip(networks, pair(cell), strict=True):
                same(error_of(network, [], data), figure)
        assert [MACS[network] for network in networks] == macs_of(macs)


def test_table2_and_average_pooling(transcript):
    rows = rows_below(transcript, "Table 2 (CIFAR-100")
    assert len(rows) == 5
    for depth, *cells in rows:
        dense = ("rrn" + depth, [])
        sampled = [("rsbn" + depth, [("sampling", s)]) for s in ("1/4", "2/4", "3/4")]
        for (network, settings), cell in zip([*sampled, dense], cells, strict=True):
            same(error_of(network, settings, "cifar100", "table2"), cell)
    (text,) = [body for title, body in transcript.items() if title.startswith("Table 2 (CIFAR-100")]
    found = re.findall(r"([\d.]+ ± [\d.]+) \((./4)\)|and ([\d.]+ ± [\d.]+) \((./4)\)", text)
    figures = [(a or c, b or d) for a, b, c, d in found]
    pooled = re.search(r"average pooling (\d+\.\d+ ± \d+\.\d+) and (\d+\.\d+ ± \d+\.\d+)", text)
    assert len(figures) == 2
    assert pooled is not None
    for cell, sampling in figures:
        same(error_of("rsbn110", [("sampling", sampling)], "cifar100"), cell)
    for cell, sampling in zip(pooled.groups(), ("1/4", "2/4"), strict=True):
        same(error_of("rsbn110", [("sampling", sampling), ("down", "avgpool")], "cifar100"), cell)


def test_table3(transcript):
    rows = rows_below(transcript, "Table 3 (PyramidNet")
    assert len(rows) == 4
    for name, cifar10, cifar100, macs in rows:
        depth, alpha = name.split(", ")
        networks = [f"{before}pyramidnet{depth}-a{alpha}" for before in ("", "sb-")]
        for data, cell in (("cifar10", cifar10), ("cifar100", cifar100)):
            for network, figure in zip(networks, pair(cell), strict=True):
                same(error_of(network, [], data), figure)
        assert [MACS[network] for network in networks] == macs_of(macs)


def test_table4(transcript):
    rows = rows_below(transcript, "Table 4 (ImageNet")
    assert len(rows) == 4
    for depth, top1, top5, macs in rows:
        networks = ["resnet" + depth, "sb-resnet" + depth]
        for network, first, fifth in zip(networks, pair(top1), pair(top5), strict=True):
            same(error_of(network, [], "imagenet"), first)
            same(top5_of(network, [], "imagenet"), fifth)
        assert [MACS[network] for network in networks] == macs_of(macs)


def test_espace_originals(transcript):
    (title,) = [t for t in transcript if t.startswith("ESPACE, Table 1")]
    found = re.search(
        r"batch (\d+)\): AlexNet CPU ([\d,]+) ms, GPU (\d+) ms, errors ([\d.]+) / ([\d.]+); "
        r"GoogLeNet ([\d,]+) ms, (\d+) ms, ([\d.]+) / ([\d.]+)",
        title,
    )
    assert found is not None
    batch, *figures = (float(figure.replace(",", "")) for figure in found.groups())
    for network, (cpu, gpu, error, top5) in zip(
        ("alexnet", "googlenet"), (figures[:4], figures[4:]), strict=True
    ):
        printed = ESPACE_ORIGINALS[network]
        assert (printed.batch, printed.error, printed.top5_error) == (batch, error, top5)
        assert (1e3 * printed.cpu_seconds, 1e3 * printed.gpu_seconds) == (cpu, gpu)


def test_espace_tables(transcript):
    named = {"ESPACE at rates 2/3, 1/2, 1/4, 1/5, 1/8": "impact masks"}
    rows = rows_below(transcript, "Tables 2 and 3")
    assert len(rows) == 5
    for method, *cells in rows:
        own = named.get(method, method.split(" (")[0])
        for table, cell in zip(("espace-table2", "espace-table3"), cells, strict=True):
            figures = [(float(a), float(b)) for a, b in re.findall(r"([\d.]+)x ([\d.]+)", cell)]
            assert [(g.speedup, g.drop) for g in ESPACE[table] if g.method == own] == figures


def test_espace_single_layers(transcript):
    (text,) = [body for title, body in transcript.items() if title.startswith("Tables 2 and 3")]
    speeds = {figure: {g.speedup for g in ESPACE[figure]} for figure in ("espace-figure3", "espace-figure4")}
    single = text[text.index("Single layers") :]
    conv2, inception = single[: single.index("GoogLeNet 3b")], single[single.index("GoogLeNet 3b") :]
    assert {float(x) for x in re.findall(r"([\d.]+)x", conv2)} == speeds["espace-figure3"]
    assert {float(x) for x in re.findall(r"([\d.]+)x", inception)} == speeds["espace-figure4"]
