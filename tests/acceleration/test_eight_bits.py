"""Eight bits as the format of an acceleration: how it is timed, judged, kept, chosen and compared."""

import pytest
import torch
from torch import nn

import quincunx as qx
from helpers.acceleration import DATA, METHOD, network
from quincunx.acceleration import baselines, lowered, timing
from quincunx.acceleration.lowered import ready_for
from quincunx.acceleration.pipeline import accelerate_trained
from quincunx.acceleration.target import Search, Target
from quincunx.experiments.compare import compare_methods
from quincunx.fusion.calibrate import fuse_to_time
from quincunx.fusion.int8 import Int8Program
from quincunx.layers.eightbits import quantisation_of
from quincunx.measure.tasks import classification
from quincunx.methods.points import Point
from quincunx.networks.spec import format_of, read_spec
from quincunx.report.acceleration import acceleration_sentences, usage, write_acceleration_report
from quincunx.train.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
INT8 = torch.int8
OPTIONS = {"layers": ["layer1.*"], "calibration": 40, "batch": 2, "rounds": 3}


@pytest.fixture
def served(monkeypatch):
    """On every machine, whatever is faster on it; whole networks, which are not trained."""
    monkeypatch.setattr(lowered, "_CHANGED", 100.0)
    monkeypatch.setattr(
        "quincunx.acceleration.pipeline.format_served", lambda model, example, dtype: (dtype, None)
    )


@pytest.mark.parametrize("method", [METHOD, Search(Target(macs="80%"))])
def test_times_judgement_and_artifact_are_in_eight_bits(method, tmp_path, served):
    result = accelerate_trained(network(), method, DATA, tmp_path, dtype=INT8, **OPTIONS)
    assert result["dtype"] == "int8"
    assert ", int8, channels_last" in result["how"]
    assert result["stages"][-1]["name"] == "in int8"
    assert result["int8"]["images"] == 40
    assert result["whole"]["peers"]["before, float32"]["seconds"] > 0
    assert usage(result, "fast")[-1] == 'model = qx.fuse(qx.load("fast/model"), torch.int8)'
    loaded = qx.load(tmp_path / "model")
    assert format_of(read_spec(tmp_path / "model")) == "int8"
    fused = qx.fuse(loaded, INT8, force=True)
    assert {**fused.meta["int8"], "rest": fused.meta["dtype"]["rest"]} == result["int8"]
    assert evaluate(fused, DATA.test, DATA).score == result["stages"][-1]["error"]
    # both in the same format, as times are
    assert result["bytes"]["after"] < 1.2 * result["bytes"]["before"]
    assert any("in eight bits" in text for text in acceleration_sentences(result))
    assert "in eight bits" in write_acceleration_report(tmp_path).read_text()


def test_where_it_is_slower_it_is_a_doubt_and_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "speed_ratio", lambda *_: 0.5)
    said = []
    result = accelerate_trained(network(), METHOD, DATA, tmp_path, dtype=INT8, tell=said.append, **OPTIONS)
    assert result["dtype"] == "float32"
    assert "int8" not in result
    assert any("0.50 times as fast in int8 as in float32 here" in text for text in said)
    assert format_of(read_spec(tmp_path / "model")) == "float32"


def test_networks_that_have_nothing_for_it_say_so(monkeypatch):
    monkeypatch.delattr(timing, "speed_ratio")
    # more products in a sum than fit 32 bits
    deep = nn.Sequential(nn.Conv2d(8192, 2, 3))
    found = timing.format_served(deep, torch.randn(2, 8192, 4, 4), INT8)
    assert found == (None, "nothing in this network can be computed in int8; float32 is used")
    found = timing.format_served(nn.Sequential(nn.Flatten()), torch.randn(2, 3, 8, 8), INT8)
    assert found[0] is None


def test_a_network_is_timed_in_it_without_images():
    net = network()
    fused = fuse_to_time(net, INT8, check=torch.randn(1, 3, 8, 8))
    steps = [m for m in fused.modules() if isinstance(m, Int8Program)]
    assert steps
    assert fused(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    known = qx.calibrate(net, torch.rand(16, 3, 8, 8), max_drop=100)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(fuse_to_time(known, INT8)(x), qx.fuse(known, INT8, force=True)(x))
    part = fuse_to_time(nn.Sequential(nn.Conv2d(3, 4, 1)), INT8, keep_ends=False)
    assert isinstance(part.program0, Int8Program)


def test_a_search_may_choose_it(tmp_path, monkeypatch):
    """On a clock that is fastest for eight bits; judged by its answers as every format is."""

    def time_free(model, choices, *_, **__):
        made = {choice: model(choice.dtype) for choice in choices}
        for choice, one in made.items():
            assert (quantisation_of(one) is not None) == (choice.dtype == INT8)
        speed = {choice: 3.0 if choice.dtype == INT8 else 1.5 for choice in choices}
        return {
            c: {"seconds_after": 1 / s, "speedup": {"median": s, "q1": s, "q3": s}} for c, s in speed.items()
        }

    monkeypatch.setattr(baselines, "time_free", time_free)
    monkeypatch.setattr(lowered, "_CHANGED", 100.0)
    monkeypatch.setattr(baselines, "format_served", lambda model, example, dtype: (dtype, None))
    search = Search(Target(speedup=2.0, max_drop=100.0), ("spatialbottleneck",), free=("format",))
    result = accelerate_trained(network(), search, DATA, tmp_path, calibration=40, batch=2, rounds=3)
    assert [row["name"] for row in result["free"]["rows"]][:2] == ["bfloat16", "int8"]
    assert (result["dtype"], result["format_gain"]) == ("int8", 3.0)
    assert result["how"].startswith("qx.fuse before and after, float32 before, int8 after")
    assert format_of(read_spec(tmp_path / "model")) == "int8"
    # the network before is one in float32
    assert result["bytes"]["after"] < 0.5 * result["bytes"]["before"]


def test_a_comparison_is_in_one_format(tmp_path, served):
    points = [Point("espace", "half", METHOD), Point("perforate", "2/4", qx.Perforate())]
    rows = compare_methods(network(), points, DATA, tmp_path, dtype=INT8, **OPTIONS)
    assert len(rows) == 2
    for folder in ("original", *(point.folder + "/model" for point in points)):
        assert format_of(read_spec(tmp_path / folder)) == "int8"
    assert all(row.bytes < 1.2 * row.bytes_before for row in rows)


def test_only_what_is_asked_for_is_calibrated():
    net = network()
    images = [(torch.rand(20, 3, 8, 8), torch.zeros(20))]
    assert ready_for(net, None, images, classification()) is net
    assert ready_for(net, torch.bfloat16, images, classification()) is net
    known = ready_for(net, INT8, images, classification())
    again = ready_for(known, INT8, [], classification())
    assert quantisation_of(again) is quantisation_of(known)
