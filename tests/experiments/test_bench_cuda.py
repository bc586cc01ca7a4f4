"""Benchmarks on a GPU, without one: what is compared, what is said of failures, the arithmetic."""

import gc
import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from helpers import ROOT
from quincunx.cli import app
from quincunx.cli.printing import print_bench
from quincunx.experiments import bench_cuda
from quincunx.experiments import engines_cuda as peers_cuda
from quincunx.experiments.bench import Regular
from quincunx.experiments.bench_cuda import Case, Implementation, run_suite_cuda
from quincunx.measure import latency_cuda
from quincunx.measure.environment import environment
from quincunx.measure.latency import Timing, measure
from quincunx.measure.latency_cuda import Ceilings
from quincunx.networks import build
from quincunx.ops import cuda_graphs
from quincunx.report.training import draw_speedup_figure
from quincunx.sampling import CHESSBOARD, QUARTER


def conv_relu(x, weight, bias, stride, padding, dilation, groups):
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's two epilogues by ordinary operators."""
    fake = SimpleNamespace(cudnn_convolution_relu=conv_relu, cudnn_convolution_add_relu=conv_add_relu)
    monkeypatch.setattr(peers_cuda, "_ATEN", fake)


@pytest.fixture
def card(monkeypatch, cudnn):
    """A card whose clock is the processor's."""
    rates = dict.fromkeys(bench_cuda.DTYPES, 4e14)
    facts = {"device": "NVIDIA None", "cudnn": 1}
    monkeypatch.setattr(bench_cuda, "SHAPES", ((4, 8), (8, 7)))
    monkeypatch.setattr(bench_cuda, "BATCHES", (3, 2, 1))
    monkeypatch.setattr(bench_cuda, "captured", lambda run: run)
    monkeypatch.setattr(bench_cuda, "peak_memory_cuda", lambda make: (make(), 0))
    monkeypatch.setattr(bench_cuda, "environment_cuda", lambda: {**environment(), **facts})
    monkeypatch.setattr(bench_cuda, "ceilings", lambda: Ceilings(2e12, rates))
    monkeypatch.setattr(bench_cuda, "Flush", lambda: None)
    monkeypatch.setattr(bench_cuda, "on_stream", nullcontext)
    monkeypatch.setattr(
        bench_cuda, "measure_cuda", lambda runs, clocks, flush, **options: measure(runs, **options)
    )
    for name, suite in bench_cuda.SUITES.items():
        monkeypatch.setitem(bench_cuda.SUITES, name, partial(suite, device="cpu"))


def quick(name, **options):
    return run_suite_cuda(name, compilers=False, rounds=3, round_seconds=1e-3, **options)


# ---- what is compared


@pytest.mark.parametrize("side", [7, 8])
def test_a_quarter_is_a_strided_and_a_transposed_convolution(cudnn, side):
    block = Regular(6, QUARTER).eval()
    x = torch.randn(2, 6, side, side)
    plain = peers_cuda.Strided(block.down, block.up)
    want = F.relu(block(x))
    torch.testing.assert_close(plain(x), want)
    plain.on_cudnn = False
    torch.testing.assert_close(plain(x), want)
    torch.testing.assert_close(bench_cuda._formula(block, QUARTER, x), want)


def test_the_formula_of_a_sampled_block():
    block, x = Regular(6, CHESSBOARD).eval(), torch.randn(2, 6, 7, 6)
    torch.testing.assert_close(bench_cuda._formula(block, CHESSBOARD, x), F.relu(block(x)))


@pytest.mark.parametrize(("name", "left"), [("resnet18", 0), ("resnet50", 0), ("rrn8", 4)])
def test_cudnn_takes_along_what_it_can(cudnn, name, left):
    """Every ReLU of a ResNet; of a pre-activation network those between the convolutions of a block."""
    model, x = build(name).eval(), torch.randn(2, 3, 32, 32)
    fused = peers_cuda.cudnn_fused(model)
    relus = [n for n in fused.graph.nodes if peers_cuda._is_relu(fused, n)]
    assert len(relus) == left
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


def test_convolutions_that_others_read_or_that_pad_otherwise_stay(cudnn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding="same")
            self.b = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
            self.c = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.c(x)
            return F.relu(y) + F.relu(self.a(x)) + F.relu(self.b(x)) + y

    model, x = Net().eval(), torch.randn(1, 3, 5, 5)
    fused = peers_cuda.cudnn_fused(model)
    assert not any(name.startswith("ridden") for name, _ in fused.named_children())
    torch.testing.assert_close(fused(x), model(x))


def test_the_least_work_of_a_block():
    """Five maps moved dense and four by a chessboard, shortcut included; half the products."""
    dense = bench_cuda._block_work(64, 56, 256, "bfloat16", None)
    chess = bench_cuda._block_work(64, 56, 256, "bfloat16", CHESSBOARD)
    assert [sum(f for f, _ in work) / 1e9 for work in (dense, chess)] == pytest.approx(
        [118.4, 59.2], rel=1e-3
    )
    assert [sum(b for _, b in work) / 1e6 for work in (dense, chess)] == pytest.approx([514, 411], rel=2e-3)
    card = Ceilings(3.0e12, {"bfloat16": 650e12})
    assert card.floor(dense, "bfloat16") == pytest.approx(194e-6, rel=0.01)
    assert card.floor(chess, "bfloat16") == pytest.approx(137e-6, rel=0.01)


def test_the_least_work_of_a_network_is_near_what_its_layers_move():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)).eval()
    work = bench_cuda._network_work(model, 10, 5, "float16")
    assert work == [
        (2 * 5 * 100 * 27 * 8, 2.0 * (5 * 100 * (3 + 8) + 8 * 28)),
        (2 * 5 * 100 * 8 * 4, 2.0 * (5 * 100 * (8 + 4) + 32)),
    ]


# ---- suites


def test_blocks(card, monkeypatch):
    kept = []
    result = quick("blocks", dtypes=("float32", "bfloat16"), keep=kept.append)
    assert [(r["case"], r["batch"], r["dtype"]) for r in result["rows"]] == [
        *(("rRB 4 x 8^2", b, "float32") if i % 2 == 0 else ("rRB 8 x 7^2", b, "float32")
          for b in (3, 2, 1) for i in range(2)),
        ("rRB 4 x 8^2", 3, "bfloat16"), ("rRB 8 x 7^2", 3, "bfloat16"),
    ]  # fmt: skip
    assert len(kept) == 8
    for row in result["rows"]:
        assert not row["failed"]
        assert row["best_dense"] in ("cuDNN", "cuDNN, fused")
        assert set(row["candidates"]) == {"rRB", "rSB 2/4", "rSB 1/4", "cuDNN, stride 2"}
        quarter = row["candidates"]["rSB 1/4"]
        assert {"speedup_over rRB", "speedup_over cuDNN, stride 2", "roofline_share"} <= set(quarter)
        assert max(row["errors"].values()) < (1e-5 if row["dtype"] == "float32" else 0.02)
    assert result["rows"][0]["candidates"]["rSB 2/4"]["mac_ratio"] == 2
    assert {entry["dtype"] for entry in result["summary"]} == {"float32", "bfloat16"}
    json.dumps(result, allow_nan=False)
    print_bench(result)
    assert draw_speedup_figure(result).lstrip().startswith(b"<?xml")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_summary

    lines = list(gpu_summary.bench_lines(result))
    assert lines[0].startswith("-- blocks: 8 cases")
    assert lines[1].startswith("rRB 4 x 8^2 b3 tf32: cuDNN")
    assert "rSB 1/4" in lines[1]
    assert "/ stride 2" in lines[1]
    assert "copy 2.00 TB/s" in gpu_summary.ceiling_line(result)


@pytest.mark.parametrize("suite", ["ops", "training"])
def test_other_suites(card, suite):
    result = quick(suite, dtypes=("float32",), only="x ")
    assert result["rows"]
    assert not any(row["failed"] for row in result["rows"]), result["rows"][0]["failed"]
    assert all(entry["speedup"] > 0 for row in result["rows"] for entry in row["candidates"].values())


def test_networks(card, monkeypatch):
    monkeypatch.setattr(bench_cuda, "NETWORKS", (("rrn8", "rsbn8", 16, (2, 1)),))
    result = quick("networks", dtypes=("float32",))
    first = result["rows"][0]
    assert not first["failed"]
    assert [row["batch"] for row in result["rows"]] == [2, 1]
    assert set(first["timings"]) == {"cuDNN", "cuDNN, fused", "ours, dense", "rsbn8"}
    assert set(first["candidates"]) == {"rsbn8"}


def test_a_training_step_of_a_network_updates_it():
    x = torch.randn(4, 3, 16, 16)
    run = bench_cuda._step(build("rsbn8"), x, True)
    first = run().clone()
    for _ in range(3):
        last = run()
    assert first.shape == (4, 10)
    assert not torch.equal(first, last)


# ---- failures and limits


def cases(*candidates):
    x = torch.randn(2, 3)
    named = {f"c{i}": candidate for i, candidate in enumerate(candidates)}
    return lambda dtypes, compilers: iter([Case("a", 2, "float32", lambda: (x, named))])


def raising(error):
    raise error


def test_a_candidate_that_fails_is_left_out_and_named(card, monkeypatch):
    good = Implementation(lambda: lambda: torch.ones(2, 3), dense=True, wants=torch.ones_like)
    wrong = Implementation(lambda: lambda: torch.zeros(2, 3), wants=torch.ones_like)
    nothing = Implementation(lambda: lambda: torch.full((2, 3), torch.nan), wants=torch.ones_like)
    broken = Implementation(lambda: raising(RuntimeError("no kernel\nmore")))
    monkeypatch.setitem(bench_cuda.SUITES, "ops", cases(good, wrong, nothing, broken))
    (row,) = quick("ops", dtypes=("float32",))["rows"]
    assert set(row["timings"]) == {"c0"}
    assert row["failed"]["c1"] == "ArithmeticError: its answer is off by 1 of the formula's norm"
    assert "off by nan" in row["failed"]["c2"]
    assert row["failed"]["c3"] == "RuntimeError: no kernel"


def test_a_case_in_which_nothing_dense_runs_is_a_row_all_the_same(card, monkeypatch):
    monkeypatch.setitem(bench_cuda.SUITES, "ops", cases(Implementation(lambda: lambda: torch.ones(1))))
    result = quick("ops", dtypes=("float32",))
    assert (result["rows"][0]["best_dense"], result["rows"][0]["candidates"]) == (None, {})
    assert result["summary"] == []
    print_bench(result)


def test_what_does_not_fit_the_budget_is_named(card, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(bench_cuda, "perf_counter", lambda: float(next(clock)))
    result = quick("blocks", dtypes=("float32",), budget=200)
    assert 0 < len(result["rows"]) < 6
    assert len(result["rows"]) + len(result["left_out"]) == 6
    assert result["left_out"][-1] == "rRB 8 x 7^2, batch 1, float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("int8",)}, "dtype='int8': expected one of bfloat16"),
        ({"only": "vgg"}, "only='vgg': no case of blocks"),
    ],
)
def test_refuses(card, options, message):
    with pytest.raises(ValueError, match=message):
        quick("blocks", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_the_command_line_without_a_gpu(tmp_path):
    run = partial(CliRunner().invoke, app)
    without = run(["bench", "blocks", "--device", "cuda", "--out", str(tmp_path)])
    assert (without.exit_code, "device='cuda'" in without.stderr) == (2, True)
    budget = run(["bench", "blocks", "--budget", "9", "--out", str(tmp_path)])
    assert (budget.exit_code, "budget=9: only with --device cuda" in budget.stderr) == (2, True)


# ---- timing


class Event:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at


def spend(milliseconds):
    Event.now += milliseconds


def test_candidates_take_turns_and_the_cache_is_emptied_outside_what_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(latency_cuda, "sm_clock", lambda: 1980)
    order, clocks = [], []

    def run(name, milliseconds):
        return lambda: (order.append(name), spend(milliseconds))

    found = latency_cuda.measure_cuda(
        {"a": run("a", 2.0), "b": run("b", 4.0)},
        rounds=3,
        round_seconds=0.02,
        flush=run("f", 1.0),
        clocks=clocks,
    )
    assert isinstance(found["a"], Timing)
    assert found["a"].seconds == pytest.approx((2e-3,) * 3)
    assert found["a"].speedup_over(found["b"]) == pytest.approx((2, 2, 2))
    rounds = "".join(order)[-3 * 2 * (6 + 4) :]
    assert rounds == ("fa" * 6 + "fb" * 4) * 3
    assert clocks == [1980] * 2


class Stream:
    cuda_stream = 1

    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def fake_cuda(monkeypatch):
    """What torch.cuda has, as far as it can be had without a card; replays are counted."""
    graphs = []

    class Graph:
        def __init__(self):
            graphs.append(self)
            self.replays = 0

        def replay(self):
            self.replays += 1

    @contextmanager
    def graph(which, stream, capture_error_mode):
        assert which is graphs[-1]
        try:
            yield
        finally:
            if sys.exc_info()[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    facts = {"name": "Fake", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 1 << 36}
    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "current_device": lambda: 0,
        "current_stream": Stream,
        "empty_cache": lambda: None,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1 << 20, **facts),
        "graph": graph,
        "max_memory_allocated": lambda: 700,
        "memory_allocated": lambda: 200,
        "reset_peak_memory_stats": lambda: None,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(latency_cuda, "_CARD", "cpu")
    monkeypatch.setattr(cuda_graphs, "_STREAMS", {})
    return graphs


def test_a_call_is_warmed_up_captured_once_and_replayed(fake_cuda):
    calls = []

    def run():
        assert gc.isenabled() == (len(calls) < 3)  # nothing is collected within the capture
        calls.append(1)
        return len(calls)

    with cuda_graphs.on_stream():
        replay = cuda_graphs.captured(run)
    assert (len(calls), gc.isenabled()) == (4, True)
    assert (replay(), replay()) == (4, 4)
    assert len(calls) == 4
    assert fake_cuda[0].replays == 3


def test_a_capture_that_fails_says_why(fake_cuda):
    calls = []

    def run():
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("waits for the card")

    with pytest.raises(RuntimeError, match="capture: waits for the card"):
        cuda_graphs.captured(run)
    assert gc.isenabled()


def test_memory_ceilings_and_facts(fake_cuda, monkeypatch):
    monkeypatch.setattr(latency_cuda, "_query", lambda *names: {"clocks.sm": "1980", "driver_version": "5"})
    run, most = latency_cuda.peak_memory_cuda(lambda: lambda: "answer")
    assert (run(), most) == ("answer", 500)
    found = latency_cuda.ceilings(size=16, bytes_copied=64)
    # the fake clock stands still: no event is shorter than half a microsecond
    assert found.bandwidth == pytest.approx(2 * 64 / 5e-7)
    assert found.rates == dict.fromkeys(bench_cuda.DTYPES, pytest.approx(2 * 16**3 / 5e-7))
    flush = latency_cuda.Flush(least=1 << 10)
    assert flush.buffer.numel() * 4 == 4 << 20
    flush()
    facts = latency_cuda.environment_cuda()
    assert (facts["device"], facts["compute_capability"], facts["l2_bytes"]) == ("Fake", "9.0", 1 << 20)
    assert (facts["clocks_sm"], facts["driver_version"]) == ("1980", "5")
    assert latency_cuda.sm_clock() == 1980
    json.dumps(facts, allow_nan=False)


def test_nvidia_smi_is_only_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="1, 2\n3, [N/A]\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert latency_cuda._query("a", "b") == {"a": "3", "b": "[N/A]"}
    assert asked == [["nvidia-smi", "--query-gpu=a,b", "--format=csv,noheader,nounits"]]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: raising(FileNotFoundError()))
    assert latency_cuda._query("a") == {}


@pytest.mark.parametrize(("candidates", "rounds"), [({}, 1), ({"a": lambda: None}, 0)])
def test_nothing_to_measure(candidates, rounds):
    with pytest.raises(ValueError, match=r"candidates=\{\}|rounds=0"):
        latency_cuda.measure_cuda(candidates, rounds=rounds)


def test_tf32_is_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for on in (True, False):
        with latency_cuda.tf32(on):
            assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (on, on)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# ---- the scripts for a machine with a GPU


def script(*arguments, **environ):
    return subprocess.run(
        arguments,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )


def test_the_checks_of_operators_hold_on_the_cpu_and_see_errors(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_correct

    def wrong(*arguments):
        found = torch.ops.quincunx.conv(*arguments)
        found[-1, -1, -1] *= 1.05
        return found

    names = ("17 -> 33", "odd size", "no picture", "depthwise")
    jobs = [j for j in gpu_correct.jobs() if j.name in names and j.precision in ("float32", "bfloat16")]
    done = [gpu_correct.perform(job, "cpu") for job in jobs if job.part == "operators"]
    assert len(done) == 8
    assert gpu_correct.failures({"jobs": done}) == []
    rest = ("conv_transpose", "conv_weight", "conv_filled", "fill", "collect")
    fake = SimpleNamespace(conv=wrong, **{name: getattr(torch.ops.quincunx, name) for name in rest})
    monkeypatch.setattr(gpu_correct, "OPS", fake)
    (first, *_) = (gpu_correct.perform(job, "cpu") for job in jobs if job.name == "17 -> 33")
    (line,) = gpu_correct.failures({"jobs": [first]})
    assert line.startswith("operators: 17 -> 33, float32: conv: ")
    assert "part" in gpu_correct.table({"jobs": done})[0]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("derivatives", "even kernel"),
        ("networks", "perforated"),
        ("training", "rsbn8"),
        ("compiled", "bottleneck"),
    ],
)
def test_the_other_checks_hold_on_the_cpu(monkeypatch, part, name):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_correct

    found = gpu_correct.chosen([part], name)
    done = gpu_correct.perform(next(job for job in found if job.precision == "float32"), "cpu")
    assert gpu_correct.failures({"jobs": [done]}) == []
    assert done["checks"]


def test_a_network_may_be_as_far_off_as_its_factors_are_cut(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_correct

    whole = torch.tensor([1 + 2.0**-10 + 2.0**-11, -(1 + 2.0**-11), 3.0, 0.0, 1e-30])
    want = [1 + 2.0**-10, -1.0, 3.0, 0.0]
    assert gpu_correct.cut(whole)[:4].tolist() == want
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    got = gpu_correct.with_cut_factors(layer)(x)
    weight = gpu_correct.cut(layer[0].weight)
    torch.testing.assert_close(got, layer[1](torch.nn.functional.conv2d(gpu_correct.cut(x), weight)))
    assert 0 < gpu_correct.distance(got, layer(x)) < 2e-3
    # the network given is left as it is
    assert not torch.equal(weight, layer[0].weight)


def test_correctness_in_processes(tmp_path):
    out = tmp_path / "correct.json"
    run = script(
        sys.executable, "benchmarks/gpu_correct.py", "--device", "cpu", "--parts", "operators", "--only",
        "odd size", "--workers", "2", "--out", str(out),
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(result["jobs"]) == 4
    assert result["left_out"] == []
    assert "0 failed, 0 jobs left out" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_the_script_goes_on_after_a_failure(tmp_path):
    run = script("benchmarks/gpu_check.sh", "blocks", "ops", OUT=str(tmp_path / "out"), PYTHON=sys.executable)
    assert run.returncode == 1
    assert "torch finds no GPU" in run.stdout
    assert "machine:1" in run.stdout
    assert "blocks:2" in run.stdout
    assert "ops:2" in run.stdout
    assert (tmp_path / "out" / "gpu_check.log").exists()
    assert script("benchmarks/gpu_check.sh", "everything", OUT=str(tmp_path / "out")).returncode == 2
