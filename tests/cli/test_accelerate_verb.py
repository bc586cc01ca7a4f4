"""accelerate as a user meets it: what is said first, which step comes next, and the exit code."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import quincunx as qx
from helpers.acceleration import clock_of_macs, network
from helpers.commands import call, refused
from helpers.training import pictures
from quincunx.acceleration import pipeline as acceleration
from quincunx.acceleration.journal import FolderJournal
from quincunx.train.checkpoint import only_writer
from quincunx.train.loop import fit
from quincunx.train.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A trained network and images of three classes that it tells apart, in the current folder; a clock that
    multiply-adds move."""
    monkeypatch.chdir(tmp_path)
    clock_of_macs(monkeypatch)
    data = pictures(count=120, size=16, channels=3)
    recipe = Recipe("tiny", epochs=4, batch_size=20, lr=0.05, augment="none")
    fit(network(), data, recipe, tmp_path / "run")
    for part in ("train", "test"):
        split = getattr(data, part)
        for i, (image, label) in enumerate(zip(split.images.numpy(), split.labels.tolist(), strict=True)):
            place = tmp_path / "photos" / part / "abc"[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i}.png")
    return (
        "accelerate",
        "run",
        "--data",
        "photos",
        "--rounds",
        "3",
        "--threads",
        "1",
        "--calibration",
        "120",
    )


def test_a_target_that_is_missed_ends_with_1_and_says_which_half_and_the_next_step(small):
    """Nobody reaches 50 times as fast; what was reached is kept, and what can be asked for is said."""
    done = call(*small, "--speedup", "50", "--max-drop", "100", "--method", "lowrank")
    assert done.exit_code == 1, done.stderr
    first, second, *_ = done.stdout.splitlines()
    found = re.fullmatch(
        r"Target missed: ([\d.]+)x faster \(asked: 50x\); (no|[\d.]+ points of) accuracy lost on 60 test "
        r"images, without fine-tuning \(asked: at most 100\)\.",
        first,
    )
    assert found, first
    assert re.fullmatch(r"Next: --speedup [\d.]+ is within reach\.", second)
    result = json.loads(Path("fast/accelerate.json").read_text())
    parts = {part["what"]: part["met"] for part in result["verdict"]["parts"]}
    assert parts == {"speedup": False, "max_drop": True}
    assert Path("fast/model").is_dir()
    assert first in Path("fast/report.html").read_text()


def test_a_loss_that_was_not_to_be_ends_with_1_and_says_so_first(small, monkeypatch):
    """Half of the answers of whatever is replaced are made wrong, so that accuracy is what fails."""
    real = acceleration.score_images

    def worse(model, **options):
        found = real(model, **options)
        if any(isinstance(m, qx.SeparableConv2d) for m in model.modules()):
            found.scores[1::2] = 1
        return found

    monkeypatch.setattr(acceleration, "score_images", worse)
    options = ("--macs", "90%", "--max-drop", "1", "--method", "lowrank")
    done = call(*small, *options)
    assert done.exit_code == 1, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("Much worse than before: ")
    assert "add --finetune-epochs 5, or ask for less" in said[0]
    assert re.match(
        r"Target missed: [\d.]+ points of accuracy lost on 60 test images, without fine-tuning", said[1]
    )
    assert said[2].startswith("Next: add --finetune-epochs 5")


@pytest.mark.filterwarnings("ignore:calibration. 120 images are few:UserWarning")
def test_the_bare_command_looks_for_what_loses_little(small):
    done = call(*small, "--layers", "layer3.*")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(("Target met: ", "Target missed: "))
    result = json.loads(Path("fast/accelerate.json").read_text())
    assert result["search"]["target"] == {"max_drop": 1.0}
    told = " ".join(call("accelerate", "--help").stdout.split())
    assert "a search for the fastest network that loses at most 1 point of accuracy (--max-drop 1)" in told


@pytest.mark.filterwarnings("ignore:calibration. 120 images are few:UserWarning")
def test_a_dry_run_predicts_and_keeps_nothing(small):
    small = (*small, "--layers", "layer3.*")
    done = call(*small, "--speedup", "1.1", "--max-drop", "100", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "Prediction, nothing is kept: " in done.stdout
    assert "The target would be met." in done.stdout
    assert [path.name for path in Path("fast").iterdir() if path.suffix == ".json"] == ["scores.json"]
    missed = call(*small, "--speedup", "50", "--max-drop", "100", "--dry-run")
    assert missed.exit_code == 1
    assert re.search(r"would be missed \([\d.]+x faster, where 50x is asked\)\.", missed.stdout)
    assert "fine-tuning, such as" not in missed.stdout, "that makes nothing faster"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "espace", "--dry-run"), "dry_run: needs a target, such as --speedup 2"),
        (("--method", "espace", "--time-budget", "5m"), "time_budget: needs a target"),
        (("--method", "espace", "--scores", "s.json"), "scores: needs a target"),
        (("--speedup", "2", "--keep-slower"), "keep_slower: a search never takes what gains no time"),
        (("--speedup", "2", "--rank", "0.5"), "rank: a search for a target chooses it; leave it out"),
        (("--speedup", "2", "--scores", "none.json"), "scores='none.json': no such file"),
        (("--speedup", "2", "--time-budget", "soon"), "time_budget='soon': expected a time such as 30m"),
        (("--speedup", "2", "--method", "qcnn"), "method='qcnn': expected auto or some of"),
        (("--speedup", "1"), "speedup=1.0: expected more than 1"),
        (("--speedup", "2", "--macs", "50%"), "speedup and macs cannot be asked for together"),
        (
            ("--mean", "123,116,103", "--std", "58,57,57"),
            "expected numbers in [0, 1], the scale of the pixels; those of pixels from 0 to 255 become 0.482",
        ),
        (("--mean", "0.5,0.5,0.5"), "mean, std: give both or none"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(small, options, message):
    assert message in refused(*small, *options)
    assert not Path("fast").exists()


def test_an_original_that_guesses_is_named_before_the_work_and_first_at_the_end(small):
    """As where the classes were in another order when it was trained."""
    model = qx.load("run/model")
    with torch.no_grad():
        for value in (model.linear.weight, model.linear.bias):
            value.copy_(value.roll(1, 0))
    qx.save(model, "rolled")
    done = call(
        "accelerate", "rolled", *small[2:], "--method", "lowrank", "--rank", "0.2", "--layers", "layer2*"
    )
    assert done.exit_code == 0
    assert re.search(
        r"^warning: the network as it is has [\d.]+% of 60 test images wrong, no better", done.stderr
    )
    assert "the classes in the order of its training" in done.stderr
    assert done.stdout.startswith("Doubtful: the network as it is has")


def test_a_folder_that_is_in_use_and_one_of_another_run(small):
    options = (*small, "--method", "lowrank", "--rank", "0.2", "--layers", "layer2*", "--keep-slower")
    with only_writer(Path("fast")):
        sentence = refused(*options, "--json", code=1)
    assert sentence == "error: fast: another run is writing to it; give this one another --out"
    tuned = (*options, "--finetune-epochs", "1", "--json")
    assert call(*tuned, "--lr", "0.001").exit_code == 0
    sentence = refused(*tuned, "--lr", "0.002")
    assert "give another --out, or delete fast/finetune to start anew" in sentence
    assert "lr was 0.001, now 0.002" in sentence
    assert "another --out starts anew" in refused(*tuned, "--lr", "0.001", "--rank", "0.1")


def test_ctrl_c_says_how_to_go_on(small, monkeypatch):
    def stopping(*_):
        raise KeyboardInterrupt

    options = (*small, "--method", "lowrank", "--rank", "0.2", "--layers", "layer2*")
    monkeypatch.setattr(FolderJournal, "keep", stopping)
    assert refused(*options, "--json", code=1) == (
        "error: stopped; the same command goes on from here: what is finished is kept in fast"
    )


def test_a_rank_that_saves_nothing_replaces_nothing_and_says_which_do(small):
    options = (*small, "--method", "lowrank", "--rank", "1000", "--layers", "layer1.0.conv1")
    with pytest.warns(UserWarning, match="lowrank replaced nothing"):
        done = call(*options)
    assert done.exit_code == 0
    first, second, *_ = [line for line in done.stdout.splitlines() if line.strip()]
    assert first == "Nothing was replaced: the network is as it was."
    assert second == (
        "kept layer1.0.conv1: rank 48 saves nothing: 2.00 times as many multiply-adds; ranks up to 23 save "
        "some"
    )
