"""From a trained network to a faster one: what is fitted, judged, timed, resumed and shown."""

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

import quincunx as qx
from helpers.acceleration import DATA, METHOD, clock_of_macs, network
from helpers.commands import call
from quincunx.acceleration import judge, timing
from quincunx.acceleration import pipeline as acceleration
from quincunx.acceleration.journal import FolderJournal
from quincunx.acceleration.judge import mcnemar, reestimate_batch_norm, sample_batches
from quincunx.acceleration.pipeline import accelerate_trained
from quincunx.acceleration.target import Search, Target
from quincunx.fusion import fuse as fuse_module
from quincunx.measure.latency import Timing
from quincunx.report.acceleration import (
    acceleration_sentences,
    first_sentences,
    search_sentences,
    usage,
    write_acceleration_report,
)
from quincunx.train.checkpoint import only_writer
from quincunx.train.loop import fit
from quincunx.train.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("accelerated")
    recipe = Recipe("tiny", epochs=1, batch_size=20, lr=0.01, augment="none", distill=0.5)
    model = network()
    before = copy.deepcopy(model.state_dict())
    result = accelerate_trained(
        model, METHOD, DATA, out, layers=["layer1.*"], calibration=40, recipe=recipe, batch=2, rounds=3
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the original network was changed"
    return out, result


def test_the_result_says_what_each_stage_and_layer_gave(made):
    out, result = made
    assert json.loads((out / "accelerate.json").read_text()) == result
    names = [stage["name"] for stage in result["stages"]]
    assert names[:2] == ["before", "after replacing"]
    assert names[2].startswith("after re-estimating batch norm")
    assert names[3] == "after fine-tuning"
    assert [row["name"] for row in result["layers"]] == ["layer1.0.conv1", "layer1.0.conv2"]
    for row in result["layers"]:
        assert row["macs_after"] < row["macs_before"]
        assert row["seconds_before"] > 0
        assert row["rates"] == [0.5, 0.5]
    # 3 x 3, 16 to 16 channels on 8 x 8 with 24 channels between, half of the positions of both halves
    saved = sum(row["macs_before"] - row["macs_after"] for row in result["layers"])
    assert saved == 2 * (64 * 9 * 16 * 16 - 2 * 32 * 3 * 16 * 24)
    assert result["cost"]["before"]["macs"] - result["cost"]["after"]["macs"] == saved
    assert result["skipped"]["conv1"] == "left out by where"
    assert set(result["maps"]) == {"layer1.0.conv1", "layer1.0.conv2"}


def test_the_artifact_is_the_network_that_was_judged(made):
    out, result = made
    model = qx.load(out / "model")
    assert type(model.layer1[0].conv1) is qx.EspaceConv2d
    images = (DATA.test.images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    wrong = (model(images).argmax(1) != DATA.test.labels).float().mean()
    assert float(wrong) == pytest.approx(result["stages"][-1]["error"])
    torch.testing.assert_close(qx.fuse(model)(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("met", [True, False])
def test_a_search_says_how_fast_its_choice_was_and_a_dry_run_that_it_only_predicts(met):
    attempt = {"layers": 1, "before": 0.019, "predicted": 0.009, "after": 0.01, "speedup": 1.9}
    record = {
        "target": {"speedup": 2.0, "max_drop": 1},
        "met": met,
        "candidates": [{"why_not": None}],
        "chosen": [{}],
        "attempts": [attempt],
        "images": 300,
        "drop": 0.25,
    }
    first, second = search_sentences(record)
    assert first.startswith(
        "Asked: at least 2x faster, at most 1 point of accuracy lost. 1 candidates, 1 of them"
    )
    assert "19.00 ms before, 9.00 ms predicted, 10.00 ms measured (-10%), 1.90x faster" in second
    assert "Met" not in first + second
    said = search_sentences(record, judged=False)[0]
    assert said.startswith(
        "Prediction, nothing is kept: 1.90x faster; 0.25 points of accuracy lost on 300 cal"
    )
    assert "before fine-tuning" in said
    assert ("would be met" in said, "1.90x faster, where 2x is asked" in said) == (met, not met)


def test_the_page_shows_layers_masks_and_sentences(made):
    out, result = made
    text = write_acceleration_report(out).read_text()
    for row in result["layers"]:
        assert row["name"] in text
    # the positions of two halves of two layers, on impact maps and on an image; then times and front
    assert text.count("<figure>") == 8
    assert len(re.findall('src="data:image/svg', text)) == 6
    assert len(re.findall('src="data:image/png', text)) == 4
    assert "http" not in re.sub(r"data:image[^\"]*|http-equiv", "", text), "it needs nothing from elsewhere"
    for sentence in acceleration_sentences(result):
        assert sentence.replace("'", "&#39;") in text
    (out / "foreign").mkdir()
    (out / "foreign" / "accelerate.json").write_text('{"kind": "train"}')
    with pytest.raises(ValueError, match="not the result of an acceleration"):
        write_acceleration_report(out / "foreign")


def test_weights_of_one_bit_are_small_on_disk_and_do_not_train_on(tmp_path):
    recipe = Recipe("tiny", epochs=1, batch_size=20, lr=0.001, augment="none")
    options = {"calibration": 20, "batch": 1, "rounds": 3, "layers": ["layer1.*"]}
    result = accelerate_trained(network(), qx.BinaryConnect(), DATA, tmp_path, recipe=recipe, **options)
    packed, trained = (qx.load(tmp_path / place) for place in ("model", "finetune/model"))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(packed(x), trained.eval()(x), rtol=1e-4, atol=1e-4)
    weights = sum(m.weight.numel() for m in trained.modules() if isinstance(m, qx.BinaryConv2d))
    bits, scales = (
        sum(v.numel() * v.element_size() for k, v in packed.state_dict().items() if k.endswith(end))
        for end in ("bits", "scale")
    )
    assert weights / 8 <= bits < weights / 7
    assert result["bytes"]["before"] - result["bytes"]["after"] == 4 * weights - bits - scales
    assert any("MB on disk" in sentence for sentence in acceleration_sentences(result))
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1: weights of one bit are for inference"):
        fit(packed, DATA, recipe, tmp_path / "again")


def test_finished_layers_are_not_fitted_again(tmp_path, monkeypatch):
    real, seen = FolderJournal.keep, []

    def stopping(self, layer, replacement):
        real(self, layer, replacement)
        seen.append(layer.name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderJournal, "keep", stopping)
    options = {"calibration": 60, "batch": 1, "rounds": 3, "layers": ["layer1*", "layer2.0.conv1"]}
    with pytest.raises(KeyboardInterrupt):
        accelerate_trained(network(), METHOD, DATA, tmp_path / "run", **options)
    monkeypatch.setattr(FolderJournal, "keep", real)
    resumed = accelerate_trained(network(), METHOD, DATA, tmp_path / "run", **options)
    assert resumed["recalled"] == seen
    straight = accelerate_trained(network(), METHOD, DATA, tmp_path / "straight", **options)
    one, other = (qx.load(tmp_path / place / "model") for place in ("run", "straight"))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert resumed["stages"][-1]["error"] == straight["stages"][-1]["error"]
    with pytest.raises(ValueError, match=r"another run: method rank was '0\.5', now '0\.25'; another --out"):
        accelerate_trained(network(), qx.Espace(rank=0.25, rate=0.5), DATA, tmp_path / "run", **options)
    with pytest.raises(ValueError, match="another run: weights was"):
        accelerate_trained(network(seed=1), METHOD, DATA, tmp_path / "run", **options)
    for path in (tmp_path / "run" / "layers").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="are not there or damaged"):
        accelerate_trained(network(), METHOD, DATA, tmp_path / "run", **options)


def test_a_pattern_that_means_no_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers='layer9\.\*': no layer has such a name; there are conv1"):
        accelerate_trained(network(), METHOD, DATA, tmp_path, layers=["layer9.*"], calibration=20)


def test_batch_norm_is_estimated_from_the_inputs_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4))
    net[1].running_mean.fill_(9)
    inputs = [torch.randn(8, 3, 5, 5) for _ in range(3)]
    weights = copy.deepcopy([p.detach() for p in net.parameters()])
    net.eval()
    assert reestimate_batch_norm(net, inputs) == 2
    maps = [net[0](x) for x in inputs]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    variance = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean.detach())
    torch.testing.assert_close(net[1].running_var, variance.detach())
    assert not any(m.training for m in net.modules())
    assert net[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert reestimate_batch_norm(nn.Conv2d(3, 4, 1), inputs) == 0


def test_mcnemar_is_a_binomial_test_of_the_images_that_changed():
    before = torch.tensor([True] * 30 + [False] * 10)
    after = torch.tensor([True] * 18 + [False] * 12 + [True] * 3 + [False] * 7)
    found = mcnemar(before, after)
    assert (found["lost"], found["won"]) == (12, 3)
    assert found["p"] == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5))
    assert mcnemar(before, before) == {"lost": 0, "won": 0, "p": 1.0}


def test_a_sample_is_drawn_once_without_augmentation():
    found = sample_batches(DATA, 35, seed=3, batch_size=10)
    assert [len(y) for _, y in found] == [10, 10, 10, 5]
    again = sample_batches(DATA, 35, seed=3, batch_size=10)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, again, strict=True))
    assert sum(len(y) for _, y in sample_batches(DATA, 1000)) == 60
    keys = [x.sum().item() for batch, _ in found for x in batch]
    assert len(set(keys)) == 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "network='nothing': not the folder of an artifact or a run"),
        (
            (".", "--method", "magic"),
            "method='magic': expected one of spatialbottleneck, spatialblock, perforate",
        ),
        ((".", "--rate", "2"), r"rate=2.0: expected a number in (0, 1]"),
        ((".", "--rate", "a"), "rate='a': expected one number or two with a comma"),
        ((".", "--rank", "much"), "rank='much': expected a number, a share in (0, 1] or full"),
        ((".", "--rank", "conv1=3,4"), "rank='conv1=3,4': expected one, or NAME=RANK"),
        ((".", "--rank", "conv1=x"), "rank='x': expected a number"),
        ((".", "--rank", "3", "--rank-budget", "0.5"), "rank_budget: chooses the ranks by itself"),
        ((".", "--method", "lowrank", "--mask", "random"), "mask='random': lowrank has no such setting"),
        ((".",), "spec.json"),
    ],
)
def test_bad_input_ends_with_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = call("accelerate", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_verb_from_a_trained_run_to_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--network", "rrn8", "--epochs", "1", "--threads", "1", "--json")
    assert call("train", *small, "--out", "run").exit_code == 0
    fast = (
        "--method",
        "lrd",
        "--rank-budget",
        "0.7",
        "--calibration",
        "60",
        "--rounds",
        "3",
        "--keep-slower",
    )
    done = call(
        "accelerate",
        "run",
        *fast,
        "--keep-slower",
        "--threads",
        "1",
        "--finetune-epochs",
        "1",
        "--lr",
        "0.001",
    )
    assert done.exit_code == 0, done.stderr
    assert "MACs became" in done.stdout
    result = json.loads((tmp_path / "fast" / "accelerate.json").read_text())
    assert result["recipe"]["lr"] == 0.001
    assert result["cost"]["after"]["macs"] < 0.8 * result["cost"]["before"]["macs"]
    assert (tmp_path / "fast" / "report.html").exists()


def test_batch_norm_is_left_as_it_was_where_the_new_estimate_raises_the_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    net[3].weight.data.mul_(50)
    inputs = [torch.randn(16, 3, 2, 2) for _ in range(3)]
    images = [(x, net(x).argmax(1)) for x in inputs]  # it has them all right
    before = copy.deepcopy(net.state_dict())
    assert not judge.renormalise(net, images, [torch.full((4, 3, 2, 2), 9.0)])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net[0].running_mean.fill_(30)
    assert judge.renormalise(net, images, inputs)
    assert net[0].running_mean.abs().max() < 1


def test_without_labels_the_original_networks_answers_are_what_is_lost(tmp_path):
    """Labels that are there are not looked at: any give the same result."""
    results = []
    for i, shift in enumerate((0, 1)):
        parts = {
            key: dataclasses.replace(part, labels=(part.labels + shift) % 3)
            for key, part in (("train", DATA.train), ("test", DATA.test))
        }
        data = dataclasses.replace(DATA, classes=(), labelled=False, **parts)
        recipe = Recipe("tiny", epochs=1, batch_size=20, lr=0.01, augment="none", distill=1.0)
        results.append(
            accelerate_trained(
                network(), METHOD, data, tmp_path / str(i), layers=["layer1.*"], calibration=40,
                recipe=recipe, batch=2, rounds=3,
            )
        )  # fmt: skip
    assert results[0]["stages"][0]["error"] == 0
    assert results[0]["stages"] == results[1]["stages"]
    assert results[0]["stages"][1]["error"] > 0
    assert "of the original network's answers to" in " ".join(acceleration_sentences(results[0]))


def test_the_command_takes_images_without_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qx.save(network(), "net")
    Path("photos").mkdir()
    for i, image in enumerate(DATA.train.images[:30].numpy()):
        Image.fromarray(image).save(f"photos/{i}.png")
    options = (
        "accelerate",
        "net",
        "--data",
        "photos",
        "--layers",
        "layer1.*",
        "--rounds",
        "3",
        "--threads",
        "1",
    )
    assert "--unlabelled" in call(*options).stderr
    done = call(*options, "--unlabelled", "--distill", "0.5", "--finetune-epochs", "1")
    assert done.exit_code == 2
    assert "distill=0.5: without labels" in done.stderr
    more = ("--finetune-epochs", "1", "--distill-features", "0.5", "--calibration", "20", "--keep-slower")
    more = (*more, "--method", "espace")
    done = call(*options, "--unlabelled", *more)
    assert done.exit_code == 0, done.stderr
    result = json.loads(Path("fast/accelerate.json").read_text())
    assert (result["recipe"]["distill"], result["recipe"]["distill_features"]) == (1.0, 0.5)
    assert result["stages"][0]["error"] == 0
    assert "The images have no labels" in Path("fast/report.html").read_text()


def test_fine_tuning_that_makes_it_worse_is_not_kept(tmp_path):
    """At a ruinous learning rate the network from before it is the result, and the best epoch otherwise."""
    recipe = Recipe("ruin", epochs=2, batch_size=20, lr=0.5, augment="none")
    options = {"layers": ["layer1.*"], "calibration": 40, "batch": 1, "rounds": 3}
    model = network()
    images = (DATA.test.images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    # its own answers are the labels, so that it has something to lose
    labels = model(images).argmax(1)
    data = dataclasses.replace(DATA, test=dataclasses.replace(DATA.test, labels=labels))
    result = accelerate_trained(model, METHOD, data, tmp_path, recipe=recipe, **options)
    before, after = result["stages"][-2:]
    assert after["error"] <= before["error"]
    history = json.loads((tmp_path / "finetune" / "run.json").read_text())
    assert history["test_error"] == min(entry["test_error"] for entry in history["history"])
    assert ("not kept" in after["name"]) == (history["test_error"] > before["error"])


def as_fast(ratio):
    """Times of networks: the first of a call takes 1, all others ``ratio``."""

    def measure(models, example, *, rounds, **_):
        return {name: Timing(name, 1, ((ratio if i else 1.0),) * rounds) for i, name in enumerate(models)}

    return measure


@pytest.fixture
def by_macs(monkeypatch):
    clock_of_macs(monkeypatch)


@pytest.mark.parametrize("method", [METHOD, Search(Target(speedup=1.5))])
def test_a_finished_network_that_is_no_faster_becomes_the_one_before(method, tmp_path, by_macs, monkeypatch):
    """When layers were judged they seemed to gain; the final times say otherwise, after fine-tuning."""
    monkeypatch.setattr(timing, "measure_models", as_fast(1.25))
    recipe = Recipe("tiny", epochs=1, batch_size=20, lr=0.01, augment="none")
    options = {"layers": ["layer1.*"], "calibration": 40, "batch": 1, "rounds": 3, "keep_slower": False}
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images
        result = accelerate_trained(model, method, DATA, tmp_path, recipe=recipe, **options)
    assert result["put_back"] == 0.8
    assert result["layers"] == []
    assert result["cost"]["before"] == result["cost"]["after"]
    assert result["skipped"]["layer1.0.conv1"].startswith("no gain: the finished network was 0.80 times as")
    assert result["stages"][-1]["name"].startswith("after putting everything back")
    assert result["stages"][-1]["error"] == result["stages"][0]["error"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(qx.load(tmp_path / "model").eval()(x), model(x))
    first = first_sentences(result)
    assert first[0].startswith("Nothing was gained: the finished network was 0.80 times as fast as before")
    if method is not METHOD:
        assert first[1].startswith("Target missed: ")
        assert "nothing here saves time" in first[2]
    assert "Nothing was gained" in write_acceleration_report(tmp_path).read_text()


def test_a_whole_network_that_decides_is_timed_for_longer(tmp_path, monkeypatch):
    asked = []

    def measure(models, example, *, rounds, **_):
        asked.append(rounds)
        return as_fast(0.5 if "after" in models else 1.0)(models, example, rounds=rounds)

    monkeypatch.setattr(timing, "measure_models", measure)
    options = {"layers": ["layer1.*"], "calibration": 40, "batch": 1, "rounds": 3}
    result = accelerate_trained(network(), METHOD, DATA, tmp_path, **options)
    # of three rounds no number is clear
    assert asked == [3, 3, 3, 31]
    assert result["whole"]["rounds"] == 34
    assert result["whole"]["speedup"]["median"] == 2.0


def test_a_network_in_which_nothing_was_replaced_is_exactly_as_fast(tmp_path, monkeypatch):
    """Two times of one network differ, and neither a gain nor a loss may be read from them."""
    monkeypatch.setattr(timing, "measure_models", as_fast(0.5))
    options = {"layers": ["layer1.*"], "calibration": 40, "batch": 1, "rounds": 3}
    # no time to score any candidate
    search = Search(Target(speedup=1.5), time_budget=1e-9)
    result = accelerate_trained(network(), search, DATA, tmp_path, **options)
    assert (result["layers"], result["put_back"]) == ([], None)
    assert result["whole"]["speedup"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert result["whole"]["seconds_before"] == result["whole"]["seconds_after"]
    # with other time for its search the same folder goes on
    accelerate_trained(network(), dataclasses.replace(search, time_budget=2e-9), DATA, tmp_path, **options)


def test_fine_tuning_that_ends_early_says_after_how_many_epochs(tmp_path, by_macs):
    recipe = Recipe("tiny", epochs=9, batch_size=20, lr=0.001, augment="none")
    search = Search(Target(macs="95%", max_drop=100), methods=("lowrank",))
    options = {"layers": ["layer2.*"], "calibration": 60, "batch": 1, "rounds": 3}
    result = accelerate_trained(network(), search, DATA, tmp_path, recipe=recipe, **options)
    assert (result["epochs"], result["recipe"]["epochs"]) == (1, 9)
    ended = "Fine-tuning ended after 1 of 9 epochs: the accuracy asked for was reached."
    assert ended in acceleration_sentences(result)
    page = write_acceleration_report(tmp_path).read_text()
    assert "Fine-tuned for 1 epoch." in page
    assert ended in page
    part = {"what": "max_drop", "met": False}
    missed = {**result, "verdict": {**result["verdict"], "parts": [part]}}
    assert "9 epochs: it no longer got better" in " ".join(acceleration_sentences(missed))


def test_weights_that_are_no_numbers_and_a_second_run_in_the_folder_are_refused(tmp_path):
    model = network()
    with only_writer(tmp_path), pytest.raises(BlockingIOError, match="another run is writing"):
        accelerate_trained(model, METHOD, DATA, tmp_path, calibration=20)
    with torch.no_grad():
        model.conv1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model: 9 of the 432 values of conv1\.weight are not finite"):
        accelerate_trained(model, METHOD, DATA, tmp_path, calibration=20)


@pytest.mark.parametrize("method", [METHOD, Search(Target(macs="80%"))])
def test_in_another_format_times_and_the_final_accuracy_are_those_in_it(method, tmp_path, monkeypatch):
    monkeypatch.setattr(acceleration, "format_served", lambda model, example, dtype: (dtype, None))
    options = {"layers": ["layer1.*"], "calibration": 40, "batch": 2, "rounds": 3}
    result = accelerate_trained(network(), method, DATA, tmp_path, dtype=torch.bfloat16, **options)
    assert result["dtype"] == "bfloat16"
    assert "bfloat16" in result["how"]
    assert result["stages"][-1]["name"] == "in bfloat16"
    assert result["whole"]["peers"]["before, float32"]["seconds"] > 0
    assert usage(result, "fast") == [
        "import torch",
        "import quincunx as qx",
        'model = qx.fuse(qx.load("fast/model"), torch.bfloat16)',
    ]
    assert all(p.dtype == torch.float32 for p in qx.load(tmp_path / "model").parameters())


def test_a_format_that_is_slower_here_is_a_doubt_and_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(fuse_module, "speed_ratio", lambda *_: 0.5)
    said = []
    options = {"layers": ["layer1.0.conv1"], "calibration": 40, "batch": 2, "rounds": 3, "tell": said.append}
    result = accelerate_trained(network(), METHOD, DATA, tmp_path, dtype=torch.bfloat16, **options)
    assert result["dtype"] == "float32"
    assert any("0.50 times as fast in bfloat16 as in float32 here" in text for text in said)
    assert [stage["name"] for stage in result["stages"]][-1] != "in bfloat16"
