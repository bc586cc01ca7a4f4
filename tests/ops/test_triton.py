"""The GPU kernels without a GPU: interpreted against the reference, and compiled for other machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quincunx as qx
from helpers import ROOT
from helpers.commands import refused
from quincunx.experiments import tuning
from quincunx.fusion import program
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.ops import reference, select
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import adjoint_plan, forward_plan
from quincunx.ops.triton import configs, layouts
from quincunx.ops.triton.configs import Config

pytest.importorskip("triton", reason="Triton is not installed")

MASK = qx.Random(0.4, 0)
SAMPLINGS = (
    qx.CHESSBOARD,
    qx.QUARTER,
    qx.THREE_QUARTERS,
    qx.Cosets(3, [(0, 1), (2, 2)]),
    qx.Cosets(4, [(3, 0)]),
    MASK,
    qx.Uniform(0.3),
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[SimpleNamespace]:
    """The operators run by Triton's interpreter, on maps in which nothing that is not written is a number."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, where the kernels are compiled: test_cuda.py is for it")
    from quincunx.ops.triton import launch, operators

    made = launch._empty

    def poisoned(like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return made(like, shape).fill_(float("nan"))

    launch._empty = poisoned
    yield SimpleNamespace(ops=operators, launch=launch)
    launch._empty = made


def _close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert torch.isfinite(found).all()
    distance = (found.double() - wanted.double()).norm()
    assert distance <= tolerance * wanted.double().norm() + 1e-6


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    inner, outer = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        groups, inner, outer = draw(st.integers(2, 5)), 1, 1
    return {
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
        "padding": draw(st.tuples(*[st.integers(0, 2)] * 4)),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
        "channels": (inner * groups, outer * groups),
        "size": draw(st.tuples(st.integers(3, 9), st.integers(3, 9))),
        "batch": draw(st.integers(0, 3)),
        "sampling": draw(st.sampled_from(SAMPLINGS)),
        "source": draw(st.sampled_from((qx.QUARTER, MASK))),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float32, torch.float32, torch.float16))),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(convolutions())
def test_operators_equal_the_reference(interpreted: SimpleNamespace, case: dict[str, Any]) -> None:
    kernel, groups, (inner, outer) = case["kernel"], case["groups"], case["channels"]
    (height, width), batch, spec = case["size"], case["batch"], case["sampling"].spec
    where = (case["stride"], case["padding"], case["dilation"], groups)
    grid = Geometry.make(kernel, *where[:3]).grid(height, width)
    assume(min(grid) >= 4)
    dtype, ops = case["dtype"], interpreted.ops
    tolerance = 2e-5 if dtype == torch.float32 else 3e-3
    x = torch.randn(batch, inner, height, width).to(dtype)
    weight = torch.randn(outer, inner // groups, *kernel).to(dtype)
    bias = torch.randn(outer).to(dtype) if case["bias"] else None

    y = reference.conv(x.float(), weight.float(), None if bias is None else bias.float(), spec, *where)
    _close(ops.conv(x, weight, bias, spec, *where), y.to(dtype), tolerance)
    y = y.to(dtype)
    z = reference.conv_transpose(y.float(), weight.float(), None, (height, width), spec, *where).to(dtype)
    _close(ops.conv_transpose(y, weight, None, (height, width), spec, *where), z, tolerance)
    gradient = reference.conv_weight(x.float(), y.float(), kernel, spec, *where).to(dtype)
    _close(ops.conv_weight(x, y, kernel, spec, *where), gradient, tolerance)

    source = case["source"].spec
    m = case["source"].count(height, width)
    compact = torch.randn(batch, inner, m, 1).to(dtype)
    filled = reference.fill(compact, source, (height, width))
    assert torch.equal(ops.fill(compact, source, (height, width)), filled)
    _close(ops.collect(filled, source), reference.collect(filled.float(), source).to(dtype), tolerance)
    wanted = reference.conv(filled.float(), weight.float(), None, spec, *where).to(dtype)
    _close(ops.conv_filled(compact, weight, None, source, (height, width), spec, *where), wanted, tolerance)


@pytest.mark.parametrize("spec", [qx.CHESSBOARD.spec, MASK.spec])
@pytest.mark.parametrize(
    ("config", "activation2"),
    [(Config(16, 16, 16, 4, 5), 1), (Config(32, 32, 32, 4, 5, 3), 0), (Config(64, 16, 16, 8, 7, 4), 1)],
)
def test_tiles_and_parts_change_nothing(
    interpreted: SimpleNamespace, spec: str, config: Config, activation2: int
) -> None:
    geometry, device = Geometry((3, 3), padding=(1, 1, 1, 1)), torch.device("cpu")
    x, weight, bias = torch.randn(2, 40, 8, 7), torch.randn(24, 40, 3, 3), torch.randn(24)
    layout = layouts.forward_layout(spec, geometry, 8, 7, None, device)
    rows = torch.randint(0, 30, (layout.out_rows,), dtype=torch.int32)
    other, scale, shift = torch.randn(2, 20, 30, 1), torch.rand(24), torch.randn(24)
    out, second = interpreted.launch.convolve(
        x,
        weight,
        bias,
        layout,
        1,
        residual=other,
        residual_rows=rows,
        activation=2,
        scale2=scale,
        shift2=shift,
        activation2=activation2,
        config=config,
    )
    y = reference.conv(x, weight, bias, spec, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    y[:, :20] += other[:, :, rows.long()]
    wanted = y.clamp(0, 6)
    _close(out, wanted)
    wanted = wanted * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    _close(second, torch.relu(wanted) if activation2 else wanted)


def test_what_is_not_a_number_stays_so(interpreted: SimpleNamespace) -> None:
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
    x[0, 0, 2, 2] = float("nan")
    layout = layouts.forward_layout("", Geometry((3, 3), padding=(1, 1, 1, 1)), 6, 6, None, x.device)
    out, _ = interpreted.launch.convolve(x, weight, None, layout, 1, activation=1)
    wanted = torch.relu(nn.functional.conv2d(x, weight, padding=1))
    assert torch.equal(out.isnan(), wanted.isnan())


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_windows(interpreted: SimpleNamespace, how: str) -> None:
    x = torch.randn(2, 20, 6, 1)
    index = torch.tensor([0, 3, 5, 1, 1], dtype=torch.int32)
    starts = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    found = interpreted.launch.reduce_windows(x, index, starts, (3, 1), how)
    rows = x[:, :, index.long(), 0]
    parts = [rows[:, :, :3], rows[:, :, 3:]]
    join = {"sum": lambda t: t.sum(2), "mean": lambda t: t.mean(2), "max": lambda t: t.amax(2)}[how]
    torch.testing.assert_close(found[:, :, 0, 0], join(parts[0]))
    torch.testing.assert_close(found[:, :, 2, 0], join(parts[1]))
    assert bool((found[:, :, 1] == (-torch.inf if how == "max" else 0)).all())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil"),
    [(3, 2, 1, 1, False), (2, 2, 0, 1, True), ((3, 2), (1, 3), (1, 0), (2, 1), False), (3, 2, 0, 1, True)],
)
def test_max_pooling(
    interpreted: SimpleNamespace, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> None:
    x = torch.randn(2, 20, 11, 10)
    x[0, 3, 4, 4] = float("nan")
    wanted = nn.functional.max_pool2d(x, kernel, stride, padding, dilation, ceil)
    two = [v if isinstance(v, tuple) else (v, v) for v in (kernel, stride, padding, dilation)]
    (top, left), down, right = two[2], two[1][0], two[1][1]
    window = Geometry(two[0], (down, right), (top, top, left, left), two[3])
    if ceil:
        window = window.rounded_up(11, 10)
    found = interpreted.launch.max_pool(x, window, window.grid(11, 10))
    torch.testing.assert_close(found, wanted, equal_nan=True)


def _rows_of(layout: layouts.Layout) -> dict[tuple[int, int], int]:
    """(output row, kernel tap) -> input row, as a kernel works it out."""
    found = {}
    for about in layout.classes.tolist():
        points, columns, o_a, o_b, o_0, t_a, t_b, bits, first, count = about
        for point in range(points):
            a, b = divmod(point, columns)
            for t in range(count):
                shift, tap = divmod(int(layout.taps[first + t]), 2**layouts.TAP_BITS)
                if int(layout.index[bits + point]) >> t & 1:
                    found[a * o_a + b * o_b + o_0, tap] = a * t_a + b * t_b + shift
    return found


def _rows_of_plan(plan: Any) -> dict[tuple[int, int], int]:
    found = {}
    at = first = tap_at = 0
    for points, width in plan.groups.tolist():
        for row in range(points):
            for t in range(width):
                source = int(plan.index[at + row * width + t])
                if source >= 0:
                    found[int(plan.rows[first + row]), int(plan.taps[tap_at + t])] = source
        at, first, tap_at = at + points * width, first + points, tap_at + width
    return found


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_affine_rows_are_those_of_the_tables(case: dict[str, Any]) -> None:
    """Two ways to the same rows: lattices, and the plans of the CPU kernels."""
    geometry = Geometry.make(case["kernel"], case["stride"], case["padding"], case["dilation"])
    height, width = case["size"]
    sampling, device = case["sampling"], torch.device("cpu")
    assume(isinstance(sampling, qx.Cosets) and min(geometry.grid(height, width)) >= 4)
    forward = layouts.forward_layout(sampling.spec, geometry, height, width, None, device)
    assert forward.affine
    assert _rows_of(forward) == _rows_of_plan(forward_plan(sampling.spec, geometry, height, width))
    adjoint = layouts.adjoint_layout(sampling.spec, geometry, height, width, device)
    # rows of unlike numbers of computed positions go through tables
    assume(adjoint.affine)
    assert _rows_of(adjoint) == _rows_of_plan(adjoint_plan(sampling.spec, geometry, height, width))


def test_chessboard_and_quarter_need_no_table() -> None:
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    for sampling in (qx.CHESSBOARD, qx.QUARTER):
        assert layouts.adjoint_layout(sampling.spec, geometry, 8, 8, torch.device("cpu")).affine


# ---------------------------------------------------------------- programs


def _settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("name", ["rrn8", "rsbn8", "csbn11", "rsbn8 avgpool", "masks"])
def test_fused_networks(interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A program's steps launched one by one, as on a GPU, by the interpreter."""
    monkeypatch.setattr(program, "serving", lambda device, dtype: "triton")
    monkeypatch.setattr(program.Program, "_prefers_torch", lambda *_: False)
    torch.manual_seed(0)
    if name == "masks":
        model: nn.Module = nn.Sequential(
            PerforatedConv2d(3, 8, 3, padding=1, sampling=MASK),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            PerforatedConv2d(8, 8, 3, padding=1, sampling=qx.CHESSBOARD),
            nn.Conv2d(8, 12, 1),
            nn.ReLU6(),
            nn.Conv2d(12, 12, 3, groups=12, padding=1),
            nn.BatchNorm2d(12),
            PerforatedConv2d(12, 8, 3, padding=1, sampling=MASK),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    else:
        kind, *down = name.split()
        model = qx.networks.build(kind, **({"down": down[0]} if down else {}))
    model, x = _settled(model), torch.randn(2, 3, 17, 16)
    fused = qx.fuse(model)
    with torch.no_grad():
        _close(fused(x), model(x))


# ---------------------------------------------------------------- which back end, and what it costs


def test_importing_neither_needs_nor_imports_triton() -> None:
    names = "quincunx.fusion.launches, quincunx.experiments.tuning"
    # that the package can be imported where Triton cannot is test_surface's
    code = (
        f"import sys, quincunx, {names}\n"
        "print('triton' in sys.modules)\n"
        "sys.modules['triton'] = None\n"
        "from quincunx.ops import triton\n"
        "print(triton.load())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False\nTriton is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_backend_says_why_nothing_serves_a_gpu() -> None:
    found = qx.backend("cuda")
    assert found.name == "reference"
    assert "no GPU" in found.reason
    assert qx.backend("meta").name == "reference"


def test_backend_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of cards that are not here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "H100")
    select.triton.card.cache_clear()
    select._of_cuda.cache_clear()
    assert str(select._of_cuda("auto", 0)).startswith("triton (sm_90)")
    assert select._of_cuda("reference", 0).name == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 0))
    select.triton.card.cache_clear()
    select._of_cuda.cache_clear()
    assert "7.0" in select._of_cuda("auto", 0).reason
    with pytest.raises(RuntimeError, match=r"QUINCUNX_BACKEND=triton.*7\.0"):
        select._of_cuda("triton", 0)
    select.triton.card.cache_clear()
    select._of_cuda.cache_clear()


def test_forced_name_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINCUNX_BACKEND", "cutlass")
    with pytest.raises(ValueError, match="cutlass"):
        qx.backend("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 16, 64, 200, 512])
@pytest.mark.parametrize("batch", [1, 8, 256])
def test_the_rule_fits_small_cards(dtype: torch.dtype, channels: int, batch: int) -> None:
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    layout = layouts.forward_layout(qx.CHESSBOARD.spec, geometry, 14, 14, None, torch.device("cpu"))
    config = configs._ruled(dtype, batch, channels, channels, 1, layout, 132)
    size = torch.finfo(dtype).bits // 8
    loads = (config.rows + config.columns) * config.depth * size * ((config.stages + 1) // 2)
    assert loads <= 99 * 1024
    assert min(config.rows, config.columns, config.depth) >= 16


def test_tuning_keeps_the_fastest(
    interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a made-up clock: the case's table, what failed, and what later calls use."""
    monkeypatch.setenv("QUINCUNX_CACHE", str(tmp_path))
    best, worse, refused = Config(32, 16, 16, 4, 5), Config(16, 16, 16, 4, 5), Config(64, 16, 16, 4, 5)
    times = {best: 1.0, worse: 2.0}

    def timed(run: Any) -> float:
        run()
        return times[run.args[0]]

    monkeypatch.setattr(tuning, "gpu_seconds", timed)
    monkeypatch.setattr(tuning, "candidates", lambda *_: [worse, best, refused])
    monkeypatch.setattr(tuning, "weight_candidates", lambda *_: [best])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    cases = [case for case in tuning.cases([(16, 4)], [2], "float32", True) if case.what != "dense"]
    found = tuning.tune(cases, torch.device("cpu"), jobs=1)
    assert all(row["tried"] for row in found["rows"])
    assert {tuple(v) for v in found["table"].values()} == {(32, 16, 16, 4, 5, 1)}
    assert "KeyError" in found["rows"][0]["failed"][0]["reason"]
    json.dumps(found)
    assert all("32 x 16 x 16" in text for text in tuning.best_tiles(found).values())
    key = next(iter(found["table"]))
    assert configs._found(key) == best
    configs._tuned.cache_clear()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "device='tpu'"),
        (["--device", "cpu"], "only cuda has tiles"),
        ([], "torch finds no GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_tune_refuses(words: list[str], message: str) -> None:
    assert message in refused("tune", *words)


def test_shapes_of_tune() -> None:
    from quincunx.cli.tune import _parse_shapes

    assert _parse_shapes("64x56, 128x28") == [(64, 56), (128, 28)]
    for text in ("64", "64x", "0x4", "axb", "64x1", ""):
        with pytest.raises(ValueError, match="shapes="):
            _parse_shapes(text)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_for_cards_that_are_not_here(architecture: int, tmp_path: Path) -> None:
    """Machine code for each architecture, with matrix instructions and memory that the card has."""
    script = ROOT / "tests" / "helpers" / "triton_compile.py"
    # elsewhere a quarter of the kernels, another one for each
    part = () if os.environ.get("CI") else ({80: "0", 90: "1", 100: "2"}[architecture], "4")
    done = subprocess.run(
        [sys.executable, str(script), str(architecture), *part],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) > 10
    most = {80: 163, 90: 227, 100: 227}[architecture] * 1024
    for row in rows:
        assert row["shared"] <= most, row
        assert row["cubin"] > 0
        assert row["matrix"] or "ieee" in row["name"], row


def test_a_capture_before_the_first_call_is_refused(
    interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = qx.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    part = next(m for m in fused.modules() if isinstance(m, program.Program))
    x = torch.randn(1, 3, 6, 6)
    with pytest.raises(RuntimeError, match=r"call it once with inputs of \(1, 3, 6, 6\)"):
        part._known((x,))
    with torch.no_grad():
        fused(x)
    assert part._known((x,))
