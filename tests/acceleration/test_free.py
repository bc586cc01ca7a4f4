"""What costs nothing to make: number formats and smaller inputs, beside the result and in its place."""

import itertools

import pytest
import torch
from torch import nn

import quincunx as qx
from helpers.acceleration import DATA, METHOD, clock_of_macs, network
from helpers.commands import call
from quincunx.acceleration import baselines, timing
from quincunx.acceleration.free import (
    FreeChoice,
    SmallerInput,
    format_to_use,
    meets,
    scaled_inputs,
    size_to_use,
    sizes_refused,
    smaller_sizes,
)
from quincunx.acceleration.pipeline import accelerate_trained, plan_for_target
from quincunx.acceleration.target import Search, Target
from quincunx.experiments.compare import compare_methods
from quincunx.measure.latency import Timing
from quincunx.measure.tasks.scale import ERROR
from quincunx.methods.points import Point
from quincunx.networks.spec import note_factory
from quincunx.report.acceleration import acceleration_sentences, first_sentences, usage
from quincunx.report.acceleration import write_acceleration_report as write_report
from quincunx.train.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def row(name, speed, drop, size=None, dtype="float32", macs=50):
    speedup = {"median": speed, "q1": speed - 0.05, "q3": speed + 0.05}
    return {
        "name": name,
        "dtype": dtype,
        "size": size,
        "speedup": speedup,
        "seconds": 0.01 / speed,
        "macs": macs,
        "macs_before": 100,
        "calibration_drop": drop,
        "drop": drop,
    }


def test_a_network_with_scaled_inputs_sees_the_smaller_image_and_is_as_before_afterwards():
    seen = []
    net = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1))
    net[0].register_forward_hook(lambda _m, given, _y: seen.append(given[0]))
    x = torch.rand(2, 3, 12, 12)
    with scaled_inputs(net, (6, 4)):
        net(x)
    net(x)
    with scaled_inputs(net, None):
        net(x)
    assert [tuple(each.shape[-2:]) for each in seen] == [(6, 4), (12, 12), (12, 12)]
    # a mean over all positions stays where windows of equal size are averaged
    torch.testing.assert_close(seen[0].mean((2, 3)), x.mean((2, 3)), atol=0.02, rtol=0)
    with pytest.raises(ZeroDivisionError), scaled_inputs(net, (6, 4)):
        raise ZeroDivisionError
    assert net(x).shape == (2, 3, 1, 1)
    assert tuple(seen[-1].shape[-2:]) == (12, 12)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 31, 63, 64, 65, 227, 1024])
def test_sizes_that_are_tried_are_smaller_and_not_empty(side):
    for size in (smaller_sizes((side, side)), smaller_sizes((side, 2 * side))):
        assert all(0 < h <= side and w > 0 for h, w in size)
        assert len(set(size)) == len(size)
    assert (side, side) not in smaller_sizes((side, side))


def test_only_sizes_whose_answer_has_the_same_shape_are_allowed():
    x = torch.rand(1, 3, 16, 16)
    maps = nn.Conv2d(3, 4, 3, padding=1)
    assert sizes_refused(maps, x, [(8, 8)]) == {(8, 8): "its answer has another shape"}
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    assert "the network refuses it: mat1 and mat2" in sizes_refused(fixed, x, [(8, 8)])[8, 8]
    pooled = nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert sizes_refused(pooled, x, [(8, 8), (4, 6)]) == {}


def test_a_format_is_chosen_if_it_is_faster_and_loses_little():
    fast, faster = (row("bfloat16", s, d, dtype="bfloat16") for s, d in ((1.3, 0.1), (1.8, 0.3)))
    small = row("bfloat16, input 8 x 8", 3.0, 0.0, [8, 8], "bfloat16")
    any_speed = Target(speedup=2)
    assert format_to_use([fast, faster, small], any_speed, ERROR, 0.1) is fast
    assert format_to_use([fast, faster, small], Target(speedup=2, max_drop=2), ERROR, 0.1) is faster
    assert format_to_use([row("bfloat16", 1.02, 0.0, dtype="bfloat16")], any_speed, ERROR, 0.1) is None
    psnr = qx.tasks.image_to_image().scale
    assert format_to_use([row("bfloat16", 1.3, 0.05, dtype="bfloat16")], any_speed, psnr, 30.0) is not None
    assert format_to_use([row("bfloat16", 1.3, 0.07, dtype="bfloat16")], any_speed, psnr, 30.0) is None


def test_a_size_has_to_meet_all_that_is_asked():
    near, far = row("a", 1.5, 0.5, [12, 12], macs=70), row("b", 3.0, 4.0, [8, 8], macs=30)
    other = row("c", 4.0, 0.0, [8, 8], "bfloat16", macs=30)
    rows = [row("bfloat16", 5.0, 0.0, dtype="bfloat16"), near, far, other]
    for target, wanted in (
        (Target(speedup=1.4), near),
        (Target(speedup=2), far),
        (Target(speedup=2, max_drop=1), None),
        (Target(max_drop=5), far),
        (Target(max_drop=1), near),
        (Target(macs="50%"), far),
        (Target(macs=75), near),
        (Target(latency_ms=4.0), far),
        (Target(latency_ms=7.0), near),
        (Target(speedup=9), None),
    ):
        assert size_to_use(rows, target, "float32") is wanted, target
        assert wanted is None or meets(wanted, target)
    assert size_to_use(rows, Target(speedup=2), "bfloat16") is other


def test_other_formats_and_sizes_are_timed_against_the_network_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    choices = [FreeChoice(size=(8, 8)), FreeChoice(torch.bfloat16), FreeChoice(torch.bfloat16, (8, 8))]
    found = timing.time_free(net, choices, (3, 64, 64), batch=2, rounds=3, round_seconds=1e-3)
    assert list(found) == choices
    for one in found.values():
        assert one["seconds_before"] / one["seconds_after"] == pytest.approx(one["speedup"]["median"])


@pytest.fixture
def by_macs(monkeypatch):
    """Time falls as multiply-adds do, and bfloat16 takes half of it."""
    clock_of_macs(monkeypatch)
    fused = {}

    def fuse(model, dtype=None, **_):
        copy = nn.Sequential(model)
        fused[copy] = dtype
        return copy

    measure = timing.measure_models

    def timed(models, example, **options):
        found = measure({n: m[0] if m in fused else m for n, m in models.items()}, example, **options)
        halved = {name for name, m in models.items() if fused.get(m) is not None}
        return {
            name: Timing(name, 1, tuple(s / 2 if name in halved else s for s in one.seconds))
            for name, one in found.items()
        }

    monkeypatch.setattr(timing, "measure_models", timed)
    monkeypatch.setattr(timing, "fuse", fuse)
    monkeypatch.setattr(timing, "fuse_to_time", fuse)
    half = torch.bfloat16
    monkeypatch.setattr(baselines, "format_served", lambda m, x, dtype: (half if dtype == half else None, ""))


def accelerated(out, target, free=(), methods=("spatialbottleneck",), **options):
    search = Search(target, methods, free=free)
    return accelerate_trained(network(), search, DATA, out, calibration=40, batch=2, rounds=3, **options)


def test_formats_and_sizes_stand_beside_a_search_that_may_not_take_them(tmp_path, by_macs):
    result = accelerated(tmp_path, Target(speedup=1.1))
    assert (result["input"], result["format_gain"]) == (None, None)
    rows = {one["name"]: one for one in result["free"]["rows"]}
    assert list(rows) == ["bfloat16", "input 6 x 6", "input 4 x 4"]
    assert rows["bfloat16"]["speedup"]["median"] == pytest.approx(2)
    assert rows["input 4 x 4"]["speedup"]["median"] > rows["input 6 x 6"]["speedup"]["median"] > 1.4
    for one in rows.values():
        assert one["drop"] == pytest.approx(100 * (one["error"] - result["stages"][0]["error"]))
        assert 0 <= one["p"] <= 1
    assert any(
        text.startswith("Free beside it: bfloat16 is 2.00x") for text in acceleration_sentences(result)
    )
    page = write_report(tmp_path).read_text()
    assert "What was tried" in page


def test_a_format_that_may_be_chosen_is_searched_in_and_counts(tmp_path, by_macs):
    result = accelerated(tmp_path, Target(speedup=2.2), ("format",))
    assert result["dtype"] == "bfloat16"
    assert result["format_gain"] == pytest.approx(2)
    assert result["layers"], "layers give the rest"
    assert result["whole"]["speedup"]["median"] >= 2.2
    assert result["search"]["target"] == {"speedup": 2.2}
    assert result["verdict"]["met"]
    assert result["how"].endswith("float32 before, bfloat16 after, channels_last, 1 thread, batch 2")
    assert "torch.bfloat16" in usage(result, tmp_path)[-1]


def test_a_format_that_is_enough_by_itself_ends_the_search(tmp_path, by_macs, monkeypatch):
    monkeypatch.setattr("quincunx.acceleration.pipeline.run_search", forbidden)
    result = accelerated(tmp_path, Target(speedup=1.8), ("format", "size"))
    assert (result["layers"], result["input"], result["format_gain"]) == ([], None, pytest.approx(2))
    assert result["verdict"]["met"]
    loaded = qx.load(tmp_path / "model")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), network()(x))


def test_a_smaller_input_that_meets_speed_and_loss_needs_no_search(tmp_path, by_macs, monkeypatch):
    monkeypatch.setattr("quincunx.acceleration.pipeline.run_search", forbidden)
    result = accelerated(tmp_path, Target(speedup=1.4, max_drop=100), ("size",))
    assert result["input"] == [6, 6]
    assert result["stages"][1]["name"] == "at input 6 x 6"
    assert result["cost"]["after"]["macs"] < result["cost"]["before"]["macs"] / 1.4
    assert result["whole"]["speedup"]["median"] == pytest.approx(
        result["cost"]["before"]["macs"] / result["cost"]["after"]["macs"]
    )
    assert result["verdict"]["met"]
    assert usage(result, tmp_path)[-1].endswith("# give it images of 6 x 6")
    # the score is that of the loaded network on images of that size
    images = (DATA.test.images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    small = nn.functional.interpolate(images, (6, 6), mode="bilinear", antialias=True)
    wrong = (qx.load(tmp_path / "model")(small).argmax(1) != DATA.test.labels).double().mean()
    assert result["stages"][1]["error"] == pytest.approx(float(wrong))


def test_a_smaller_input_is_fine_tuned_at_its_size(tmp_path, by_macs):
    recipe = Recipe("tiny", epochs=1, batch_size=20, lr=0.01, augment="none")
    result = accelerated(
        tmp_path, Target(speedup=1.4, max_drop=100), ("size",), recipe=recipe, keep_best=False
    )
    assert result["input"] == [6, 6]
    assert result["stages"][-1]["name"] == "after fine-tuning"
    state = qx.load(tmp_path / "model").state_dict()
    assert any(not torch.equal(value, state[name]) for name, value in network().state_dict().items())


@pytest.mark.parametrize("size_is_better", [True, False])
def test_of_a_smaller_input_and_layers_the_one_that_loses_less_is_taken(
    tmp_path, by_macs, monkeypatch, size_is_better
):
    score_on = baselines.score_on

    def scored(model, *given):
        # the network itself, each size that is tried, and then the one with replaced layers
        dense = not any(isinstance(m, qx.SampledConv2d) for m in model.modules())
        return score_on(model, *given) if dense else (0.99 if size_is_better else -0.99)

    monkeypatch.setattr(baselines, "score_on", scored)
    result = accelerated(tmp_path, Target(speedup=1.1), ("size",))
    assert (result["input"] is not None) == size_is_better
    assert bool(result["layers"]) != size_is_better
    assert result["verdict"]["met"]


def test_nothing_but_free_choices(tmp_path, by_macs):
    result = accelerated(tmp_path / "a", Target(speedup=100), ("size",), methods=())
    assert result["input"] is None
    assert not result["verdict"]["met"]
    plan = plan_for_target(
        network(),
        Search(Target(speedup=1.4), (), free=("size",)),
        DATA,
        tmp_path / "b",
        calibration=40,
        batch=2,
    )
    assert plan["met"]
    assert plan["input"] == [6, 6]


def test_a_page_says_when_a_smaller_input_is_the_better_answer(tmp_path, by_macs):
    result = accelerated(tmp_path, Target(speedup=1.1))
    for one in result["free"]["rows"]:
        one["drop"] = -100.0
    said = [text for text in first_sentences(result) if "is the better answer here" in text]
    assert len(said) == 1
    assert said[0].startswith("A smaller input is the better answer here: input 4 x 4 is")
    assert said[0].endswith("--allow size takes it.")
    for one in result["free"]["rows"]:
        one["drop"] = 100.0
    assert not any("better answer" in text for text in first_sentences(result))


def test_what_may_be_chosen_is_checked():
    with pytest.raises(ValueError, match="free='colour': expected some of format, size"):
        Search(Target(speedup=2), free=("colour",))
    with pytest.raises(ValueError, match="nothing to choose from"):
        Search(Target(speedup=2), ())
    assert Search(Target(speedup=2), ("lowrank",), free=("size",)).name == "size+lowrank"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--allow", "size"], "allow='size': needs a target, such as --speedup 2"),
        (["--allow", "size", "--method", "sb", "--speedup", "2"], "leave one out"),
        (
            ["--allow", "colour", "--speedup", "2"],
            "allow='colour': expected some of format, size, auto, spatial",
        ),
        (["--allow", "format", "--dtype", "bfloat16", "--speedup", "2"], "--allow format chooses it"),
        (["--allow", "cp", "--speedup", "2"], "allow='cp': expected some of format, size"),
    ],
)
def test_bad_words_for_allow_are_one_sentence(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("accelerate", "rrn8", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def forbidden(*_, **__):
    raise AssertionError("nothing needs a search")


def test_names_say_format_and_size():
    names = [FreeChoice(d, s).name for d, s in itertools.product((None, torch.bfloat16), (None, (6, 4)))]
    assert names == ["as it is", "input 6 x 4", "bfloat16", "bfloat16, input 6 x 4"]


def test_a_comparison_has_smaller_inputs_beside_the_methods(tmp_path, by_macs):
    points = [*SmallerInput.sweep()[::3], Point("espace", "rate 1/2", METHOD)]
    recipe = Recipe("tiny", epochs=1, batch_size=20, lr=0.01, augment="none")
    options = {"recipe": recipe, "calibration": 40, "batch": 2, "rounds": 3, "layers": ["layer1.*"]}
    rows = compare_methods(network(), points, DATA, tmp_path, **options)
    assert [row.series for row in rows] == ["smaller input", "smaller input", "espace"]
    for row in rows:
        assert row.speedup == pytest.approx(row.mac_ratio)
        assert row.untuned_drop is not None
    assert rows[0].mac_ratio < rows[1].mac_ratio
    assert (tmp_path / points[0].folder / "model").exists()
    # the same call judges nothing anew
    again = compare_methods(network(), points, DATA, tmp_path, **options)
    assert [row.drop for row in again] == [row.drop for row in rows]


def test_a_smaller_input_that_the_network_refuses_is_one_sentence(tmp_path):
    torch.manual_seed(0)
    net = note_factory(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)), "mynets:make")
    with pytest.raises(ValueError, match="input 6 x 6: the network refuses it: mat1 and mat2"):
        accelerate_trained(net, SmallerInput(0.75), DATA, tmp_path, calibration=40, batch=2, rounds=3)
    with pytest.raises(ValueError, match="share=1: expected a number in"):
        SmallerInput(1)
