"""Methods side by side: the same data and timing for all, the front, the papers' points, the figures."""

import json
from dataclasses import replace

import pytest
import torch

import quincunx as qx
from helpers.acceleration import DATA, network
from helpers.commands import call
from quincunx.acceleration.judge import sample_batches
from quincunx.acceleration.timing import time_together
from quincunx.experiments.compare import (
    SWEEPS,
    Compared,
    compare_methods,
    draw_comparison,
    points_suited,
    with_fronts,
)
from quincunx.experiments.espace_paper import (
    ESPACE_EXPERIMENTS,
    EspaceExperiment,
    draw_responses,
    espace_by_name,
    time_points,
)
from quincunx.experiments.printed import ESPACE
from quincunx.measure.latency import Timing
from quincunx.methods.points import Point
from quincunx.networks.spec import note_factory
from quincunx.report.figures import on_front
from quincunx.train.recipes import Recipe

POINTS = [
    Point("masks", "rate 1/2", qx.Espace(rank=0.5, rate=0.5), (("speedup", 1.5), ("drop", 0.3))),
    Point("masks", "rate 1/4", qx.Espace(rank=0.5, rate=0.25)),
    Point("low rank", "rank 16", qx.LowRank(rank=16)),
]
OPTIONS = {"calibration": 40, "batch": 1, "rounds": 3, "layers": ["layer1.*"]}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return out, compare_methods(network(), POINTS, DATA, out, **OPTIONS)


def test_every_point_has_its_folder_and_its_row(made):
    out, rows = made
    assert [(row.series, row.label) for row in rows] == [(p.series, p.label) for p in POINTS]
    for row, name in zip(rows, ("masks-rate-1of2", "masks-rate-1of4", "low-rank-rank-16"), strict=True):
        result = json.loads((out / name / "accelerate.json").read_text())
        errors = [stage["error"] for stage in result["stages"]]
        assert row.drop == pytest.approx(100 * (errors[-1] - errors[0]))
        assert row.mac_ratio == result["cost"]["before"]["macs"] / result["cost"]["after"]["macs"] > 1
        assert row.bytes == (out / name / "model" / "weights.safetensors").stat().st_size
        assert row.bytes_before == (out / "original" / "weights.safetensors").stat().st_size
        assert row.p == result["stages"][-1]["p"]
        assert row.speedup_range[0] <= row.speedup <= row.speedup_range[1]
        assert (row.untuned_drop, row.tested) == (None, 30)
    assert rows[1].mac_ratio > rows[0].mac_ratio > rows[2].mac_ratio > 1
    assert rows[0].paper == {"speedup": 1.5, "drop": 0.3}
    written = json.loads((out / "comparison.json").read_text())
    pairs = ("speedup_range", "fronts")
    assert [{**r, **{key: tuple(r[key]) for key in pairs}} for r in written["rows"]] == [
        row.to_dict() for row in rows
    ]
    assert written["environment"]["commit"] == result["environment"]["commit"]
    assert (written["before"]["error"], written["recipe"]) == (errors[0], None)


def measured(row):
    """What another run may find otherwise: times, and what follows from them."""
    return replace(row, seconds_before=0, seconds_after=0, speedup=0, speedup_range=(0, 0), fronts=())


def test_points_that_are_there_are_not_made_again_but_timed_anew(made, monkeypatch):
    out, rows = made
    monkeypatch.setattr(
        "quincunx.experiments.compare.accelerate_trained", lambda *_, **__: pytest.fail("made again")
    )
    again = compare_methods(network(), POINTS, DATA, out, **OPTIONS)
    assert [measured(row) for row in again] == [measured(row) for row in rows]
    assert [row.seconds_after for row in again] != [row.seconds_after for row in rows]


@pytest.mark.parametrize(
    ("seed", "changed", "match"),
    [
        (1, {}, "points of another run: weights was"),
        (0, {"calibration": 41}, "calibration was 40, now 41"),
        (0, {"recipe": Recipe("tiny", epochs=1, batch_size=30, lr=0.1)}, "recipe was None, now"),
    ],
)
def test_points_of_another_run_are_not_taken_for_this_ones(made, seed, changed, match):
    with pytest.raises(ValueError, match=match):
        compare_methods(network(seed), POINTS, DATA, made[0], **{**OPTIONS, **changed})


class Refusing(qx.LowRank):
    def begin(self, layers, context):
        raise ValueError("rank: what the images give is not enough")


def test_a_refused_point_is_left_out_and_named(made, tmp_path):
    few = Point("low rank", "too few images", Refusing(rank=16))
    options = {**OPTIONS, "layers": ["layer3.*"]}
    with pytest.raises(ValueError, match="images give"):
        compare_methods(network(), [few], DATA, tmp_path / "alone", **options)
    told = []
    points = [few, Point("CPD", "rank 4", qx.CP(rank=4, iterations=2))]
    rows = compare_methods(network(), points, DATA, tmp_path, tell=told.append, **options)
    assert [row.series for row in rows] == ["CPD"]
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert list(written["refused"]) == ["low rank, too few images"]
    assert told[1].startswith("refused: ")
    assert "images give" in told[1]


def test_points_that_fit_in_the_same_way_share_the_fits(made, tmp_path):
    out, _ = made
    recalled = {
        place.parent.name: json.loads(place.read_text())["recalled"]
        for place in out.glob("*/accelerate.json")
    }
    taken = json.loads((out / "masks-rate-1of2" / "accelerate.json").read_text())["layers"]
    assert recalled["masks-rate-1of2"] == recalled["low-rank-rank-16"] == []
    assert recalled["masks-rate-1of4"] == [row["name"] for row in taken]
    assert len(list((out / "fits").iterdir())) == 2
    # what it is fitted to alone gives the same network
    alone = compare_methods(network(), POINTS[1:2], DATA, tmp_path, **OPTIONS)
    assert (alone[0].drop, alone[0].bytes) == (made[1][1].drop, made[1][1].bytes)
    first, second = (qx.load(folder / "masks-rate-1of4" / "model") for folder in (out, tmp_path))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_masks_of_every_kind_share_the_fits(tmp_path):
    masks = ("impact", "uniform")
    kinds = [Point(mask, "rate 1/2", qx.Espace(rank=8, rate=0.5, mask=mask)) for mask in masks]
    compare_methods(network(), kinds, DATA, tmp_path, **OPTIONS)
    assert len(list((tmp_path / "fits").iterdir())) == 1
    assert json.loads((tmp_path / "uniform-rate-1of2" / "accelerate.json").read_text())["recalled"]
    compare_methods(network(), kinds[1:], DATA, tmp_path / "alone", **OPTIONS)
    shared, alone = (qx.load(at / "uniform-rate-1of2" / "model") for at in (tmp_path, tmp_path / "alone"))
    assert all(map(torch.equal, shared.state_dict().values(), alone.state_dict().values()))


def test_networks_are_timed_with_the_original_some_at_a_time(monkeypatch):
    monkeypatch.setattr("quincunx.acceleration.timing._TOGETHER", 2)
    held = []

    def timed(models, *_, **__):
        held.append(list(models))
        return {name: Timing(name, 1, (i or 4.0,) * 2) for i, name in enumerate(models)}

    monkeypatch.setattr("quincunx.acceleration.timing.measure_models", timed)
    found = time_together(network(), dict.fromkeys("abc", network), (3, 12, 12), batch=1, rounds=2)
    assert held == [["(original)", "a", "b"], ["(original)", "c"]]
    assert {name: row["speedup"]["median"] for name, row in found.items()} == {"a": 4.0, "b": 2.0, "c": 4.0}
    assert all(row["seconds_before"] == 4.0 for row in found.values())


def test_a_network_of_ones_own_is_timed_from_its_artifacts(tmp_path):
    own = note_factory(network_of_ones_own(), "mynets:make")
    rows = compare_methods(own, POINTS[2:], DATA, tmp_path, **{**OPTIONS, "layers": []})
    assert rows[0].seconds_after > 0


def network_of_ones_own():
    torch.manual_seed(1)
    convs = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, padding=1)
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 3)
    return torch.nn.Sequential(*convs, *head).eval()


def test_two_points_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two are called masks, rate 1/2"):
        compare_methods(network(), [POINTS[0]] * 2, DATA, tmp_path, **OPTIONS)


def test_the_front():
    points = [(0.0, 1.0), (0.5, 2.0), (0.5, 2.0), (0.6, 1.9), (-0.1, 0.9), (1.0, 3.0), (1.0, 2.5)]
    assert on_front(points) == [True, True, True, False, True, True, False]


def row(series, label, lost, gain, **paper):
    speeds = (gain, 1.0, gain, (gain, gain), gain, 2 * gain)
    lost = lost, lost / 2, 3.0, 0.5, 100
    return Compared(series, label, "", *lost, *speeds, 50, 100, False, paper)


def test_each_trade_off_has_its_front():
    # in the order of drop and speed-up; MACs fall twice as far, bytes to half
    fast, slow, same = row("a", "fast", 1.0, 2.0), row("b", "slow", 0.5, 0.9), row("c", "same", 0.0, 1.0)
    drawn = [replace(row("d", "drawn", lost, 3.0), draw=f"seed {lost}") for lost in (0.8, 1.4)]
    rows = with_fronts([fast, slow, same, *drawn])
    # "same" is better than "slow" everywhere; "drawn" loses 1.1 in the mean, so that "fast" keeps its place
    assert [r.fronts for r in rows] == [
        *[("speed", "MACs"), (), ("speed", "MACs", "bytes"), ("speed", "MACs"), ("speed", "MACs")],
    ]
    # leaving the network alone is better than "slow" in speed, not in MACs or bytes
    assert with_fronts([slow])[0].fronts == ("MACs", "bytes")
    picture = draw_comparison(rows)["drop-speed"]
    assert "On the Pareto front: a, fast; c, same; d, drawn." in picture.alternative
    assert "Pareto" not in draw_comparison([fast])["drop-speed"].alternative


def test_figures_say_what_they_show():
    rows = [row("a", "x", 1.0, 2.0, speedup=1.5, drop=0.5), row("b", "y", -0.25, 1.2)]
    pictures = draw_comparison(rows)
    assert set(pictures) == {"drop-speed", "drop-macs", "drop-bytes"}
    assert "a, x: +1.00 points at 2.00; b, y: -0.25 points at 1.20" in pictures["drop-speed"].alternative
    assert "Hollow marks" in pictures["drop-speed"].alternative
    assert "a, x: +1.00 points at 4.00" in pictures["drop-macs"].alternative
    assert "Hollow" not in pictures["drop-bytes"].alternative
    assert pictures["drop-bytes"].content.startswith(b"<?xml")

    first = draw_comparison(rows, top5=True)
    assert "a, x: +0.50 points at 2.00" in first["top5-drop-speed"].alternative
    # the paper's errors are of the first five answers
    assert "Hollow" in first["top5-drop-speed"].alternative
    assert "Hollow" not in first["drop-speed"].alternative
    # where the paper does not have the network, its own are named
    other = draw_comparison(rows[1:])["drop-speed"]
    assert "AlexNet's convolutions, top-5 (the paper)" in other.content.decode()


def test_a_point_whose_fine_tuning_diverges_is_kept_as_it_was_before_and_said(made, tmp_path):
    recipe = Recipe("wild", epochs=1, batch_size=10, lr=1e30, augment="none")
    rows = compare_methods(network(), POINTS[2:], DATA, tmp_path, recipe=recipe, **OPTIONS)
    result = json.loads((tmp_path / "low-rank-rank-16" / "accelerate.json").read_text())
    assert "loss is" in result["diverged"]
    assert result["stages"][-1]["name"] == "after fine-tuning (it diverged: the network from before it)"
    assert (rows[0].diverged, rows[0].setting) == (True, "rank 16 (diverged)")
    assert rows[0].drop == rows[0].untuned_drop
    alone, kept = (
        qx.load(folder / "low-rank-rank-16" / "model").state_dict() for folder in (made[0], tmp_path)
    )
    assert all(torch.equal(kept[key], value) for key, value in alone.items())
    assert not any(row.diverged for row in made[1])


def test_every_sweep_has_settings_that_can_be_used():
    for make in SWEEPS.values():
        points = make()
        assert len({p.name for p in points}) == len(points) > 0


def test_the_masks_are_drawn_at_the_same_rates_random_ones_by_several_seeds():
    points = SWEEPS["masks"]()
    rates = {p.method.rate for p in points if p.series == "espace, impact"}
    assert len(rates) == 5
    for mask in ("uniform", "random"):
        assert {p.method.rate for p in points if p.method.mask == mask} == rates
    drawn = [p.method for p in points if p.method.mask == "random"]
    assert {(m.rate, m.mask_seed) for m in drawn} == {(rate, seed) for rate in rates for seed in (0, 1, 2)}


def test_every_method_goes_through_the_same_comparison(tmp_path):
    """One setting each of all, fine-tuned alike, saved, loaded and timed."""
    torch.manual_seed(0)
    model = qx.networks.build("cifar-resnet8", 3, 3).eval()
    # there are no blocks of ConvNeXt
    points = points_suited([SWEEPS[name]()[0] for name in SWEEPS if name != "masks"], model)
    recipe = Recipe("tiny", epochs=1, batch_size=30, lr=0.001, augment="none")
    rows = compare_methods(model, points, DATA, tmp_path, recipe=recipe, **{**OPTIONS, "calibration": 60})
    assert [row.series for row in rows] == [
        *("spatial bottleneck", "perforate, fitted", "espace, impact", "LRD", "CPD"),
        *("BinaryConnect", "Q-CNN", "smaller input"),
    ]
    assert all(row.speedup > 0 and row.bytes > 0 for row in rows)
    stages = json.loads((tmp_path / "LRD-rank-0.45" / "accelerate.json").read_text())["stages"]
    assert rows[3].untuned_drop == pytest.approx(100 * (stages[-2]["error"] - stages[0]["error"]))
    # one bit a weight in the artifact; the run that trained it keeps the real ones
    weights = sum(
        m.weight.numel() for m in model.get_submodule("layer1").modules() if isinstance(m, torch.nn.Conv2d)
    )
    assert rows[5].bytes_before - rows[5].bytes > 3.7 * weights
    assert isinstance(
        qx.load(tmp_path / "BinaryConnect-1-bit/finetune/model").get_submodule("layer1.0.conv1"),
        qx.BinaryConv2d,
    )


def test_blocks_are_compared_where_there_are_some():
    points = [SWEEPS[name]()[0] for name in ("spatialblock", "lowrank")]
    depthwise = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)
    block = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), depthwise, torch.nn.GELU(), torch.nn.Conv2d(8, 8, 1)
    )
    assert points_suited(points, block) == points
    assert points_suited(points, block[:3]) == points[1:]


@pytest.mark.parametrize("name", ESPACE_EXPERIMENTS)
def test_every_espace_experiment_finds_its_layers(name):
    experiment = espace_by_name(name)
    model = qx.networks.build(experiment.network, 10, 3, **dict(experiment.settings))
    convs = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert set(experiment.layers) <= convs
    plain = experiment.without_data()
    assert len({p.name for p in plain.points}) == len(plain.points)
    printed = {k: v for p in experiment.points for k, v in dict(p.paper).items()}
    assert {k: v for p in plain.points for k, v in dict(p.paper).items()} == printed
    assert all(getattr(p.method, "mask", "uniform") == "uniform" for p in plain.points)


def test_each_printed_figure_of_espace_stands_at_its_setting_or_beside_them():
    for name, experiment in ESPACE_EXPERIMENTS.items():
        placed = {(p.series, p.label, *dict(p.paper).values()) for p in experiment.points if p.paper}
        beside = {(g.method, g.setting, *dict(g.fields).values()) for g in experiment.elsewhere}
        assert placed | beside == {(g.method, g.setting, *dict(g.fields).values()) for g in ESPACE[name]}
        assert not placed & beside
        # what stands beside is said, a sentence a method
        said = " ".join(experiment.sentences)
        assert all(f"prints for {gain.method}" in said for gain in experiment.elsewhere)
        assert all(str(gain) in said and gain.setting in said for gain in experiment.elsewhere)


def test_printed_speeds_stand_at_their_rates():
    def of(name):
        return {p.label: dict(p.paper) for p in espace_by_name(name).points if p.series == "impact masks"}

    two, three = of("espace-table2"), of("espace-table3")
    assert list(two) == list(three) == [f"rate {r}" for r in ("2/3", "1/2", "1/4", "1/5", "1/8")]
    assert two["rate 1/4"] == {"speedup": 4.15, "drop": 0.01}
    assert three["rate 1/4"] == {"speedup": 3.76, "drop": 0.04}
    assert [two[f"rate {r}"]["speedup"] for r in ("2/3", "1/2", "1/5", "1/8")] == [1.89, 2.27, 5.48, 8.12]
    assert [three[f"rate {r}"]["drop"] for r in ("2/3", "1/2", "1/5", "1/8")] == [0.0, 0.0, 0.68, 2.89]
    # of one layer the paper states no rate, but the rank of low rank and CP
    for name in ("espace-figure3", "espace-figure4"):
        assert all(not p.paper for p in espace_by_name(name).points if "mask" in p.series)
    one = {p.name: dict(p.paper) for p in espace_by_name("espace-figure4").points if p.paper}
    assert one == {"LRD, rank 1": {"speedup": 1.93}, "CPD, rank 1": {"speedup": 1.78}}
    assert espace_by_name("espace-figure3").printed == (("impact masks", 4.72), ("impact masks", 6.11))
    assert espace_by_name("espace-figure4").printed == (("uniform masks, eq. 8", 3.11),)
    assert not espace_by_name("espace-table2").printed
    rivals = {gain.method for gain in espace_by_name("espace-table2").elsewhere}
    assert rivals == {"LRD", "CPD", "BinaryConnect", "Q-CNN"}
    sentences = " ".join(espace_by_name("espace-table2").sentences)
    assert "3.71x for 0.36 points (6 per codeword, 128); 4.27x" in sentences
    assert "CPD, at settings that it does not state: 1.67x for 0.00 points; 2.87x" in sentences


def test_the_papers_fine_tuning_is_espaces():
    for name, batch in (("espace-table2", 100), ("espace-table3", 32), ("espace-figure3", 100)):
        recipe = espace_by_name(name).recipe(3)
        assert (recipe.epochs, recipe.batch_size) == (3, batch)
        assert (recipe.lr, recipe.gamma, recipe.every) == (1e-4, 0.5, 10_000)
        assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.95, False, 5e-4)
        assert espace_by_name(name).recipe(0) is None


def test_the_papers_layers_have_the_papers_ranks_and_shapes():
    alexnet = qx.networks.build("alexnet", 10, 3, form="original")
    conv2 = alexnet.get_submodule(espace_by_name("espace-figure3").layers[0])
    assert (conv2.in_channels, conv2.out_channels, conv2.kernel_size, conv2.groups) == (96, 256, (5, 5), 2)
    googlenet = qx.networks.build("googlenet", 10, 3, form="original")
    conv3b = googlenet.get_submodule(espace_by_name("espace-figure4").layers[0])
    assert (conv3b.in_channels, conv3b.out_channels, conv3b.kernel_size) == (128, 192, (3, 3))
    with pytest.raises(ValueError, match="nearest first: espace-figure3"):
        espace_by_name("espace-figure33")


def test_speeds_need_no_data():
    experiment = espace_by_name("espace-figure3")
    few = type(experiment)(
        "few", "two points", "cifar-resnet8", (), 16, ("layer1.*",), (POINTS[0], POINTS[2])
    )
    rows = time_points(few, network(), batch=1, rounds=3)
    assert [r["label"] for r in rows] == ["rate 1/2", "rank 16"]
    assert all(r["response_error"] is None for r in rows)
    assert all(r[part]["peers"]["torch eager"] > 0 for r in rows for part in ("layers", "network"))
    # rank 24 of 16 channels: 2 * 3 * 16 * 24 for 9 * 16 * 16, at about half of the positions
    assert rows[0]["layers"]["mac_ratio"] == pytest.approx(2.0, rel=0.05)
    assert rows[1]["layers"]["mac_ratio"] == pytest.approx(1.5)
    assert all(r[part]["speedup"] > 0 for r in rows for part in ("layers", "network"))


def test_fitted_points_are_not_fitted_again(tmp_path, monkeypatch):
    experiment = EspaceExperiment("few", "two points", "cifar-resnet8", (), 16, ("layer1.*",), POINTS[1:])
    options = {"batch": 1, "rounds": 3, "keep": tmp_path}
    told = []
    once = replace(experiment, points=POINTS[1:2])
    [first] = time_points(once, network(), **options)
    rows = time_points(experiment, network(), tell=told.append, **options)
    assert told == [POINTS[2].name]
    monkeypatch.setattr(
        "quincunx.experiments.espace_paper.replace_layers", lambda *_, **__: pytest.fail("fitted again")
    )
    again = time_points(experiment, network(), **options)
    counted = [
        [r["label"], r["layers"]["mac_ratio"], r["network"]["mac_ratio"]] for r in (first, *rows, *again)
    ]
    assert counted == [counted[0], *counted[1:3] * 2]
    assert counted[0] == counted[1]
    with pytest.raises(ValueError, match=r"fitted points of another run: .*calibration.*another --out"):
        time_points(experiment, network(), **{**options, "calibration": 5})
    for weights in tmp_path.glob(f"{POINTS[2].folder}/*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="not there or damaged"):
        time_points(experiment, network(), **options)


def test_a_layers_response_is_judged_on_images_it_was_not_fitted_to():
    methods = (qx.Espace(rank=0.25, rate=0.5), qx.LowRank(rank="full"), qx.QCNN(subspace=4, codewords=16))
    points = tuple(Point(f"{i}", "a", method) for i, method in enumerate(methods))
    layer = "layer1.0.conv1"
    experiment = EspaceExperiment("few", "few points", "cifar-resnet8", (), 8, (layer,), points)
    model = network()
    rows = time_points(experiment, model, batch=1, rounds=3, data=DATA, calibration=40)
    assert [r["series"] for r in rows] == ["0", "1", "2"]
    errors = [r["response_error"] for r in rows]
    assert errors[1] < 1e-8 < min(errors[0], errors[2])
    # one layer: its own times alone
    assert all("network" not in r and r["layers"]["peers"]["torch eager"] > 0 for r in rows)
    for r in rows:
        low, high = r["layers"]["speedup_range"]
        assert 0 < low <= high

    made = qx.accelerate(model, methods[2], where=layer, calibration=sample_batches(DATA, 40)).model
    images = (DATA.test.images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    with torch.no_grad():
        x = torch.relu(model.bn1(model.conv1(images)))
        y, z = model.get_submodule(layer)(x), made.get_submodule(layer)(x)
    spread = y - y.mean((0, 2, 3), keepdim=True)
    assert errors[2] == pytest.approx(float((y - z).square().sum() / spread.square().sum()), rel=1e-4)
    assert "2, a:" in draw_responses(rows).alternative
    rows[0]["paper"] = {"speedup": 4.72}
    said = draw_responses(rows, [("elsewhere", 3.11)]).alternative
    assert said.endswith("Dotted lines are speed-ups that the paper prints: 4.72 (a), 3.11 (elsewhere).")
    with pytest.raises(ValueError, match="replaces many layers"):
        time_points(replace(experiment, layers=()), model, batch=1, rounds=3, data=DATA)


def test_draws_of_one_setting_are_one_point_with_a_range():
    def drawn(draw, lost, gain):
        return replace(row("r", "x", lost, gain), draw=draw)

    rows = [drawn("seed 0", 1.0, 2.0), drawn("seed 1", 3.0, 2.2), row("r", "y", 0.5, 1.5)]
    pictures = draw_comparison(rows)
    assert "r, x: +1.00 points at 2.00; r, x: +3.00 points at 2.20" in pictures["drop-speed"].alternative


def test_the_verbs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--network", "rrn8", "--epochs", "1", "--threads", "1", "--json", "--out", "run")
    assert call("train", *small).exit_code == 0
    monkeypatch.setitem(SWEEPS, "lowrank", lambda: [POINTS[2]])
    done = call(
        "compare", "run", "--methods", "lrd", "--calibration", "60", "--rounds", "3", "--threads", "1"
    )
    assert done.exit_code == 0, done.stderr
    assert "low rank" in done.stdout
    assert {p.name for p in (tmp_path / "compared").glob("*.svg")} == {
        "drop-speed.svg",
        "drop-macs.svg",
        "drop-bytes.svg",
    }
    refused = call("compare", "run", "--methods", "lrd", "--points", "*-16,*-17")
    said = "points='*-17': matches none of low-rank-rank-16"
    assert (refused.exit_code, said in refused.stderr) == (2, True)
    refused = call("compare", "run", "--methods", "magic")
    assert (refused.exit_code, "methods='magic': expected some of" in refused.stderr) == (2, True)
    half = call("reproduce", "espace-table2", "--data", "digits")
    assert (half.exit_code, "espace-table2 replaces" in half.stderr) == (2, True)
    half = call("reproduce", "espace-figure3", "--weights", "a.pt")
    assert (half.exit_code, "its errors need --data" in half.stderr) == (2, True)
    half = call("reproduce", "espace-figure3", "--peers", "magic")
    assert (half.exit_code, "peers='magic': expected some of" in half.stderr) == (2, True)
    planned = json.loads(call("reproduce", "espace-table2", "--plan", "--json").stdout)
    assert planned["points"][-1] == "impact masks, rate 1/8"
    assert planned["rows"][2] == {
        "point": "impact masks, rate 1/4",
        "paper": {"speedup": 4.15, "drop": 0.01},
    }
    assert len(planned["paper"]) == 5 + 5 + 1 + 4
    said = call("reproduce", "espace-table3", "--plan").stdout
    assert "3.76" in said
    assert "The paper prints for BinaryConnect: 8.35x for 13.59 points (1 bit)." in said
