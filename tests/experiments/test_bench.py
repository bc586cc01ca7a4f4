"""Benchmarks: what is compared with what, and the arithmetic of the summary. No time is asserted."""

import json
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from quincunx.cli import app
from quincunx.cli.printing import print_bench
from quincunx.experiments import bench
from quincunx.measure.cost import cost
from quincunx.measure.engines import fold_batch_norm
from quincunx.measure.environment import environment
from quincunx.measure.latency import Timing
from quincunx.networks import build
from quincunx.ops import backend


def row(case, threads, **speedups):
    candidates = {k: {"mac_ratio": 2.0, "speedup": v, "efficiency": v / 2} for k, v in speedups.items()}
    return {"case": case, "batch": 1, "threads": threads, "candidates": candidates}


def test_summary_has_geometric_mean_and_worst_case():
    found = bench.summary([row("rRB a", 1, ours=1.0), row("rRB b", 1, ours=4.0), row("rRB a", 2, ours=3.0)])
    one, two = found
    assert (one["mean"], one["worst"], one["cases"]) == (pytest.approx(2.0), 1.0, 2)
    assert one["worst_case"] == "rRB a, batch 1"
    assert (two["threads"], two["mean"]) == (2, pytest.approx(3.0))


def test_a_suite_writes_every_case_against_the_fastest_dense(monkeypatch):
    def small():
        yield from bench.training(((4, 6, 2), (8, 5, 1)))

    monkeypatch.setitem(bench.SUITES, "training", small)
    seen = []
    result = bench.run_suite(
        "training", threads=(1, 2), rounds=3, round_seconds=1e-3, progress=lambda *a: seen.append(a)
    )
    assert [(r["case"], r["threads"]) for r in result["rows"]] == [
        ("rRB 4 x 6^2", 1), ("rRB 4 x 6^2", 2), ("rRB 8 x 5^2", 1), ("rRB 8 x 5^2", 2)
    ]  # fmt: skip
    assert [done for _, done, _ in seen] == [0, 1, 2, 3]
    for r in result["rows"]:
        assert r["best_dense"] == "torch eager"
        entry = r["candidates"]["rSB 2/4"]
        assert entry["q1"] <= entry["speedup"] <= entry["q3"]
        assert entry["efficiency"] == pytest.approx(entry["speedup"] / entry["mac_ratio"])
    assert {"cpu", "torch", "commit", "command"} <= set(result["environment"])
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("then", "now", "anew"), [("0123", "0123", 1), ("0123", "4567", 2), ("0123+", "0123+", 2)]
)
def test_an_interrupted_suite_goes_on_with_rows_of_the_same_code(monkeypatch, tmp_path, then, now, anew):
    def small():
        yield from bench.training(((4, 6, 2), (8, 5, 1)))

    commit, timed, limit = [then], [], [1]
    run_case = bench._run_case

    def counted(case, *rest):
        if len(timed) == limit[0]:
            raise KeyboardInterrupt
        timed.append(case.name)
        return run_case(case, *rest)

    monkeypatch.setitem(bench.SUITES, "training", small)
    monkeypatch.setattr(bench, "environment", lambda: {**environment(), "commit": commit[0]})
    monkeypatch.setattr(bench, "_run_case", counted)
    settings = {"threads": (1,), "rounds": 3, "round_seconds": 1e-3, "keep": tmp_path / "kept.json"}
    with pytest.raises(KeyboardInterrupt):
        bench.run_suite("training", **settings)
    first = json.loads((tmp_path / "kept.json").read_text())["rows"]
    commit[0], limit[0] = now, 99
    timed.clear()
    result = bench.run_suite("training", **settings)
    assert len(timed) == anew
    assert (result["rows"][0] == first[0]) is (anew == 1)
    assert len(result["rows"]) == 2
    assert not (tmp_path / "kept.json").exists()


def test_candidates_in_eight_bits_compute_the_block():
    [case] = bench.int8_blocks(((16, 6, 2),))
    assert case.baselines == (*bench.INT8_PEERS, "torch int8")
    x = bench._map(2, 16, 6)
    engines = ("ONNX Runtime int8", "torch int8")
    makers = {"dense": case.ours["rRB"][0], **{name: case.dense[name] for name in engines}}
    torch.manual_seed(0)
    expected = bench.Dense(16).eval()(x).detach()
    for name, make in makers.items():
        found = make(1)()
        found = torch.as_tensor(found[0] if isinstance(found, list) else found)
        assert float((found - expected).norm() / expected.norm()) < 0.05, name
    assert {"rSB 2/4", "rSB 1/4", "rSB 2/4 in bfloat16"} < set(case.ours)
    with torch.inference_mode():
        low, plain = (case.ours[name][0](1)() for name in ("rSB 2/4", "rSB 2/4 in bfloat16"))
    assert float((low - plain).norm() / plain.norm()) < 0.05


def test_rounds_in_which_the_machine_was_slow_are_marked(monkeypatch, capsys):
    assert bench._slow_rounds([1.0, 1.2, 1.3, 1.0, 5.0, 0.5]) == [4]
    assert bench._slow_rounds([2.0, 2.0, 2.4]) == []
    low = {case.dtype for case in bench.low_blocks(((16, 8, 1),))}
    assert low == {torch.bfloat16}
    monkeypatch.setattr(bench, "_slow_rounds", lambda seconds: [0, 2])
    monkeypatch.setitem(bench.SUITES, "training", lambda: bench.training(((4, 6, 2), (8, 5, 1))))
    result = bench.run_suite("training", threads=(1,), rounds=3, round_seconds=1e-3)
    assert [row["slow_rounds"] for row in result["rows"]] == [[0, 2], [0, 2]]
    assert all(
        "reference" in row["timings"] and "reference" not in row["candidates"] for row in result["rows"]
    )
    print_bench(result)
    assert "slow in 4 rounds of 2 cases" in " ".join(capsys.readouterr().out.split())


def test_peaks_of_networks_are_in_torch_and_fused_in_one_format():
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    models = {name: build(name).eval() for name in ("rrn8", "rsbn8")}
    full, half = (
        bench._peaks_of_networks(models, x, dtype)["peak_memory"] for dtype in (None, torch.bfloat16)
    )
    assert set(full) == set(half) == {"rrn8", "rsbn8", "rrn8, fused", "rsbn8, fused"}
    assert all(0 < half[name] < full[name] for name in full)


def test_a_training_step_has_a_case_in_each_format_and_both_compute_the_same():
    found = list(bench.training(((16, 8, 2),), (("rrn8", "rsbn8", 32, 2),), formats=bench.FORMATS))
    assert [(c.name, c.batch) for c in found] == [
        ("rRB 16 x 8^2", 2), ("rRB 16 x 8^2 bfloat16", 2),
        ("rsbn8 / rrn8, 32^2", 2), ("rsbn8 / rrn8, 32^2 bfloat16", 2),
    ]  # fmt: skip
    for case in found:
        low = " bfloat16" if case.dtype == torch.bfloat16 else ""
        assert case.baselines == tuple(case.dense) == (f"torch eager{low}",)
        [(name, (make, ratio))] = case.ours.items()
        assert name in (f"rSB 2/4{low}", f"rsbn8{low}")
        assert ratio > 1.2
        assert torch.isfinite(make(1)()).all()
        # a step holds the gradients and what the backward pass needs
        peaks = case.facts()["peak_memory"]
        assert len(peaks) == 2
        assert min(peaks.values()) > 0
    full, low = (found[i].facts()["peak_memory"]["rrn8"] for i in (2, 3))
    assert low < full  # maps are kept in bfloat16


def test_the_whole_training_suite_has_every_row_of_both_formats():
    settings = bench.SUITES["training"]
    assert settings.args == (bench.SHAPES, bench.TRAINED)
    assert settings.keywords == {"formats": bench.FORMATS, "trainers": ("torch eager", "torch.compile")}
    assert {(a, side, batch) for a, _, side, batch in bench.TRAINED} == {
        ("rrn20", 32, 64), ("rrn110", 32, 64), ("resnet18", 64, 32), ("resnet18", 128, 8)
    }  # fmt: skip


def test_the_faster_of_eager_and_compiled_counts(monkeypatch):
    (case,) = bench.training(((16, 8, 2),), trainers=bench.TRAINERS)
    assert list(case.compiled) == list(case.ours) == ["rSB 2/4"]
    seconds = {"torch eager": 6, "torch.compile": 5, "rSB 2/4": 4, "rSB 2/4, torch.compile": 2.5}

    def measured(runs, **_):
        assert set(runs) == {*seconds, "reference"}
        taken = {**seconds, "reference": 1}
        return {name: Timing(name, 1, (taken[name],) * 3) for name in runs}

    monkeypatch.setattr(bench, "measure", measured)
    for maker in (case.dense, case.compiled):
        for name in maker:
            maker[name] = lambda _: lambda: None
    entry = bench._run_case(case, 1, 3, 0.01)["candidates"]["rSB 2/4"]
    assert entry["faster"] == "rSB 2/4, torch.compile"
    assert entry["speedup"] == 2.0
    assert entry["compiled_over_eager"] == 1.6
    seconds["rSB 2/4, torch.compile"] = 5
    entry = bench._run_case(case, 1, 3, 0.01)["candidates"]["rSB 2/4"]
    assert (entry["faster"], entry["speedup"], entry["compiled_over_eager"]) == ("rSB 2/4", 1.25, 0.8)


@pytest.mark.parametrize("dtype", bench.FORMATS)
def test_a_compiled_step_of_ours_is_the_eager_one(dtype):
    (case,) = bench.training(((16, 8, 2),), formats=(dtype,), trainers=bench.TRAINERS)
    [(name, (make, _))] = case.ours.items()
    found = []
    for maker in (make, case.compiled[name]):
        torch.manual_seed(1)  # of the gradient from above
        found.append(maker(1)().clone().float())
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(*found, **close)


@pytest.mark.parametrize("dtype", bench.FORMATS)
def test_a_compiled_step_of_the_dense_network_is_the_eager_one(dtype):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    found = []
    for how in bench.TRAINERS:
        torch.manual_seed(1)  # of the gradient from above
        found.append(bench._trained(block, x, dtype, how)(1)().clone())
    close = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(*found, **close)


def test_blocks_compare_equal_work():
    """Ratio of MACs: two convolutions against the same pair at half and a quarter of the positions."""
    first = next(bench.blocks(((16, 8, 2),)))
    assert first.ours["rSB 2/4"][1] == 2
    assert first.ours["rSB 1/4"][1] == 4
    cases = {c.name: c for c in bench.blocks(((64, 56, 1),))}
    assert cases["cRB 256-64 x 56^2"].ours["cSB 2/4"][1] == pytest.approx(17 / 12.5)


def test_peak_memory_counts_what_a_call_allocates():
    x = torch.randn(1000)
    assert bench.peak_memory(lambda: x + 1) == pytest.approx(4000, abs=64)
    assert bench.peak_memory(lambda: (x + 1) + 1) >= 8000
    assert bench.peak_memory(lambda: None) == 0


@pytest.mark.parametrize(("channels", "side", "batch"), [(64, 28, 1), (16, 32, 8), (128, 14, 4)])
def test_a_sampled_block_needs_less_memory_than_a_dense_one(channels, side, batch):
    if backend().name != "native":
        pytest.skip("the reference computes the dense convolution")
    (case, *_) = bench.blocks(((channels, side, batch),))
    peaks = case.facts()["peak_memory"]
    assert peaks["rSB 2/4"] < peaks["rRB"]


def test_folding_keeps_the_function():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    nn.init.normal_(model[1].running_mean)
    x = torch.randn(2, 3, 6, 6)
    folded = fold_batch_norm(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 1
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "suite='speed': expected one of ops, blocks"),
        (["training", "--threads", "0"], "threads='0'"),
        (["training", "--threads", "1,x"], "threads='1,x'"),
        (["training", "--only", "vgg"], "only='vgg'"),
        (["training", "--out", "/proc/nowhere"], "out='/proc/nowhere'"),
    ],
)
def test_refuses(monkeypatch, arguments, message):
    monkeypatch.setitem(bench.SUITES, "training", lambda: bench.training(((4, 6, 2),)))
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_command_writes_result_and_figure(monkeypatch, tmp_path):
    monkeypatch.setitem(bench.SUITES, "training", lambda: bench.training(((4, 6, 2),)))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "training", "--threads", "1", "--rounds", "3", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "results/bench-training.json").read_text())
    assert (tmp_path / "results/bench-training.svg").read_bytes().lstrip().startswith(b"<?xml")
    assert math.isfinite(json.loads(result.stdout)["rows"][0]["candidates"]["rSB 2/4"]["speedup"])


@pytest.mark.parametrize(
    ("dense", "sampled", "side"), [("rrn20", "rsbn20", 32), ("resnet18", "sb-resnet18", 128)]
)
def test_the_free_baseline_costs_what_the_sampled_network_costs(dense, sampled, side):
    networks = [build(name).eval() for name in (dense, sampled)]
    small = bench._side_of_equal_cost(*networks, side)
    assert 1 < small < side
    wanted = cost(networks[1], torch.zeros(1, 3, side, side)).macs
    found, less, more = (
        cost(networks[0], torch.zeros(1, 3, s, s)).macs for s in (small, small - 1, small + 1)
    )
    assert abs(found - wanted) <= min(abs(less - wanted), abs(more - wanted))


def test_whole_networks_are_timed_beside_smaller_images():
    case = next(bench.whole([("rrn8", "rsbn8", 16, (2,))]))
    assert case.batch == 2
    assert next(iter(case.dense)) == "ours, dense"
    (name, (_, ratio)), (free, (make, free_ratio)) = case.ours.items()
    assert (name, ratio > 1) == ("rsbn8", True)
    assert free.startswith("rrn8 at 1")
    assert free_ratio == pytest.approx(ratio, rel=0.25)
    assert make(1)().shape == (2, 10)


def test_an_engine_that_does_not_compile_a_network_is_left_out_and_named(monkeypatch):
    def timed(runs, **_):
        return {name: Timing(name, 1, (1.0,) * 3) for name in runs}

    def refuses(_):
        raise RuntimeError("no suitable\nimplementations")

    monkeypatch.setattr(bench, "measure", timed)
    ours = {"rSB 2/4": (lambda _: lambda: None, 2.0)}
    case = bench.Case("a block", 1, {"one": lambda _: lambda: None, "other": refuses}, ours)
    row = bench._run_case(case, 1, 3, 0.01)
    assert row["best_dense"] == "one"
    assert "other" not in row["timings"]
    assert row["refused"] == {"other": "no suitable implementations"}
    with pytest.raises(RuntimeError, match="a block: no engine runs the dense network"):
        bench._run_case(bench.Case("a block", 1, {"other": refuses}, ours), 1, 3, 0.01)
    with pytest.raises(RuntimeError, match="no suitable"):
        bench._run_case(bench.Case("a block", 1, case.dense, {"ours": (refuses, 2.0)}), 1, 3, 0.01)
