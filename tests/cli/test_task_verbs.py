"""Every verb with another task than classification: images, masks, outputs of any structure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import quincunx as qx
from helpers.commands import call, document, refused

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:calibration. .* images are few:UserWarning"),
]

NOISY = ("--data", "small", "--noise", "25")
FEW = ("--calibration", "20", "--batch", "1", "--rounds", "3")
MODULE = '''
import torch
from torch import nn
from torch.utils.data import Dataset

import quincunx as qx


class Two(nn.Module):
    """Maps and boxes, as a detector returns them before it chooses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        inner = torch.relu(self.second(torch.relu(self.first(x))))
        return {"map": self.head(inner), "boxes": [inner.mean((2, 3)), None]}


def network():
    torch.manual_seed(0)
    return Two()


def several():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )


class Labelled(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, index):
        made = torch.Generator().manual_seed(index)
        labels = torch.tensor([index % 2, 1, index % 3 == 0])
        return {"image": torch.randn(3, 8, 8, generator=made), "labels": labels}


def data():
    return Labelled(), Labelled()


def error(output, target):
    return (output - target).abs().flatten(1).mean(1)


SCALE = qx.tasks.Scale("MAE", "", "lower")


def task():
    return qx.Task("mean error", error, error, SCALE)


def stuck():
    return qx.Task("stuck", lambda y, t: error(y.detach(), t), error, SCALE)


def nan():
    return qx.Task("nan", error, lambda y, t: error(y, t) * float("nan"), SCALE)


def no_task():
    return 3
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with photographs, pairs with masks, and a module of the user's own."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 8)):
        for i in range(count):
            coarse = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            photograph = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC)
            for folder in (f"small/{part}", f"masked/{part}/image"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                photograph.save(f"{folder}/{i}.png")
            Path(f"masked/{part}/mask").mkdir(parents=True, exist_ok=True)
            bright = (np.asarray(photograph).mean(2) > 127).astype(np.uint8)
            Image.fromarray(bright).save(f"masked/{part}/mask/{i}.png")
    # a name for each test, since modules stay imported
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(MODULE)
    return name


def trained(folder, *options):
    recipe = ("--epochs", "3", "--recipe", "denoising", "--batch-size", "8")
    done = call("train", "--network", "dncnn5", "--width", "8", *NOISY, *recipe, "--out", folder, *options)
    assert done.exit_code == 0, done.stderr
    return done


def test_a_denoiser_is_trained_judged_accelerated_and_reported(here):
    done = trained("run", "--patch", "12", "--seed", "1")
    assert "dncnn5, width 8 on small: test PSNR " in done.stdout
    assert "--noise 25 --patch 12" in done.stdout
    run = json.loads(Path("run/run.json").read_text())
    assert run["task"] == qx.tasks.image_to_image().identity
    assert run["test_score"] == run["history"][-1]["test_score"]
    assert run["data"]["items"]["noise"] == 25
    assert run["data"]["size"] == [16, 16]
    judged = document("evaluate", "run", *NOISY, "--patch", "12")
    # another seed's noise
    assert judged["score"] == pytest.approx(run["test_score"], abs=1)
    assert judged["task"]["name"] == "image-to-image"
    result = document(
        "accelerate", "run", *NOISY, *FEW, "--method", "spatialbottleneck", "--keep-slower",
        "--finetune-epochs", "1", "--distill", "0.5", "--lr", "1e-4",
    )  # fmt: skip
    first, last = result["stages"][0], result["stages"][-1]
    assert first["score"] == pytest.approx(judged["score"], abs=1e-6)
    assert last["test"] == "Wilcoxon"
    assert 0 <= last["p"] <= 1
    page = Path("fast/report.html").read_text()
    assert "Test PSNR before: " in page
    assert "Wilcoxon p = " in page
    # the artifact is the network that was judged
    again = document("evaluate", "fast", *NOISY)
    assert again["score"] == pytest.approx(last["score"], abs=1e-4)
    assert call("report", "run").exit_code == 0
    assert "test PSNR" in Path("run/report.html").read_text()


def test_a_run_goes_on_where_it_was(here):
    trained("whole")
    done = call("train", "--network", "dncnn5", "--width", "8", *NOISY, "--epochs", "3", "--out", "whole")
    assert "holds a run already" in done.stderr
    again = trained("whole", "--resume")
    assert again.exit_code == 0
    refusal = refused("train", "--network", "dncnn5", "--width", "8", "--data", "small", "--downscale", "2",
                      "--epochs", "3", "--recipe", "denoising", "--batch-size", "8", "--out", "whole",
                      "--resume")  # fmt: skip
    assert "a checkpoint of another data" in refusal


def test_a_target_in_decibels_is_searched_and_judged(here):
    trained("run")
    done = call("accelerate", "run", *NOISY, *FEW, "--macs", "90%", "--max-drop", "30", "--method",
                "spatialbottleneck,lowrank")  # fmt: skip
    assert done.exit_code in (0, 1), done.stderr
    assert "points" not in done.stdout.splitlines()[0]
    result = json.loads(Path("fast/accelerate.json").read_text())
    parts = {part["what"]: part for part in result["verdict"]["parts"]}
    assert parts["max_drop"]["asked"] == 30
    assert "PSNR lost on 8 test images" in parts["max_drop"]["words"]
    assert result["search"]["task"]["name"] == "image-to-image"
    losses = [row["loss"] for row in result["search"]["candidates"] if row["loss"] is not None]
    assert losses
    assert min(losses) >= 0
    assert Path("fast/report.html").exists()
    other = refused("accelerate", "run", "--data", "small", "--task", "agreement", *FEW, "--macs", "90%",
                    "--scores", "fast/scores.json", "--out", "other")  # fmt: skip
    assert "scores of another search: " in other


def test_what_may_be_lost_of_another_score_has_no_default(here):
    trained("run")
    told = refused("accelerate", "run", *NOISY, *FEW)
    assert "max_drop: task 'image-to-image' scores by PSNR; say what may be lost" in told


def test_a_network_of_classes_agrees_with_itself_without_labels(here):
    recipe = ("--epochs", "1", "--batch-size", "8", "--lr", "0.01")
    for kind in ("a", "b"):
        for part in ("train", "test"):
            Path(f"kinds/{part}/{kind}").mkdir(parents=True)
            for i in range(4):
                Path(f"kinds/{part}/{kind}/{i}.png").write_bytes(Path(f"small/train/{i}.png").read_bytes())
    done = call("train", "--network", "rrn8", "--width", "8", "--data", "kinds", *recipe, "--out", "run")
    assert done.exit_code == 0, done.stderr
    own = ("--data", "small", "--task", "agreement")
    result = document("accelerate", "run", *own, *FEW, "--method", "lowrank", "--keep-slower")
    assert result["stages"][0]["score"] == 0
    assert result["stages"][1]["score"] > 0
    judged = document("evaluate", "fast", *own, "--original", "run")
    assert judged["score"] == pytest.approx(result["stages"][-1]["score"], rel=1e-4)


def test_methods_are_compared_in_decibels(here):
    trained("run")
    one = ("compare", "run", *NOISY, *FEW, "--methods", "espace", "--points", "*-impact-rate-1of2")
    found = document(*one)
    [row] = found["rows"]
    assert row["top5_drop"] is None
    assert row["drop"] > -5
    assert "PSNR lost (dB)" in Path("compared/drop-speed.svg").read_text()
    assert "PSNR lost" in call(*one).stdout


def test_masks_are_learned_and_accelerated(here):
    masked = ("--data", "masked", "--task", "segmentation")
    recipe = ("--epochs", "6", "--batch-size", "4", "--lr", "0.05")
    done = call("train", "--network", "sb-unet", "--width", "4", *masked, *recipe, "--out", "run")
    assert done.exit_code == 0, done.stderr
    run = json.loads(Path("run/run.json").read_text())
    assert run["network"]["num_classes"] == 2
    assert 0.3 < run["test_score"] <= 1
    assert set(run["further"]) == {"pixel_accuracy", "mean_iou_of_all"}
    said = call("evaluate", "run", *masked)
    assert "test mean IoU" in said.stdout
    assert "pixel accuracy" in said.stdout
    result = document("accelerate", "run", *masked, *FEW, "--method", "perforate", "--keep-slower")
    assert result["stages"][-1]["further"]["pixel_accuracy"] <= 1


def test_outputs_of_any_structure_agree_with_the_originals(here):
    own = ("--model", f"{here}:network", "--data", "small", "--task", "agreement")
    result = document(
        "accelerate", *own, *FEW, "--method", "espace", "--rate", "0.5", "--rank", "0.5", "--keep-slower",
        "--finetune-epochs", "2", "--lr", "0.01", "--recipe", "short",
    )  # fmt: skip
    stages = {stage["name"]: stage["score"] for stage in result["stages"]}
    assert stages["before"] == 0
    assert stages["after replacing"] > 0
    assert stages["after fine-tuning"] < stages["after replacing"]
    assert result["recipe"]["distill"] == 1
    assert result["maps"], "impact masks need no labels"
    fast = qx.load("fast/model", factory=__import__(here).network)
    qx.save(__import__(here).network(), "own", factory=f"{here}:network")
    judged = document("evaluate", "fast", *own, "--original", "own")
    assert judged["score"] == pytest.approx(result["stages"][-1]["score"], rel=1e-4)
    assert set(fast(torch.zeros(1, 3, 16, 16))) == {"map", "boxes"}
    done = call("accelerate", *own, *FEW, "--macs", "90%", "--max-drop", "100", "--out", "searched",
                "--method", "lowrank,spatialbottleneck")  # fmt: skip
    assert "distance to the original network's outputs" in done.stdout


def test_several_classes_at_once_from_a_data_set_of_ones_own(here):
    own = ("--model", f"{here}:several", "--data", f"{here}:data", "--task", "multilabel")
    result = document(
        "accelerate", *own, *FEW, "--method", "lowrank", "--keep-slower", "--finetune-epochs", "1"
    )
    assert result["task"]["score"]["name"] == "Jaccard index"
    assert result["data"]["items"] == {"function": f"{here}:data"}
    judged = document("evaluate", "fast/model", *own)
    assert judged["score"] == pytest.approx(result["stages"][-1]["score"], abs=1e-6)
    assert set(judged["further"]) == {"all_right"}


def test_a_task_of_ones_own(here):
    trained("run", "--task", f"{here}:task")
    run = json.loads(Path("run/run.json").read_text())
    assert run["task"]["score"] == {"name": "MAE", "unit": "", "better": "lower"}
    history = [entry["test_score"] for entry in run["history"]]
    assert history[-1] < history[0]
    result = document("accelerate", "run", *NOISY, "--task", f"{here}:task", *FEW, "--method", "lowrank",
                      "--keep-slower")  # fmt: skip
    assert result["stages"][0]["score"] == pytest.approx(run["test_score"], abs=1e-6)


TRAIN = ("train", "--network", "dncnn5", "--width", "8", "--epochs", "1", "--lr", "0.001", "--out", "run")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            (*NOISY, "--task", "{here}:stuck"),
            "task 'stuck': its loss has no gradient to the network's weights",
        ),
        ((*NOISY, "--task", "{here}:no_task"), "returned a int, expected a qx.Task"),
        ((*NOISY, "--task", "{here}:missing"), "has no missing"),
        ((*NOISY, "--task", "image-to-imag"), "task='image-to-imag': expected image-to-image, "),
        ((*NOISY, "--patch", "17"), "patch=17: expected 1 to 16, the shorter side of the images"),
        (("--data", "small", "--noise", "-1"), "noise=-1.0: expected a standard deviation from 0 up"),
        (("--data", "small", "--patch", "8"), "patch=8: is for --pairs, --noise or --downscale"),
        (("--data", "masked", "--pairs", "boxes"), "pairs='boxes': expected images or masks"),
        (("--data", "small", "--task", "segmentation"), "no pairs of images, expected input/NAME"),
        (("--data", "masked", "--pairs", "masks", "--noise", "25"), "says the targets by itself"),
        (("--data", "{here}:nothing"), "has no nothing"),
        (("--data", "masked", "--pairs", "images", "--stream"), "stream: pairs cannot be read so"),
        (("--data", "{here}:data", "--size", "8"), "size: a data set of your function cannot be read so"),
        ((*NOISY, "--task", "agreement"), "task 'agreement' learns the outputs of another network"),
        (
            ("--data", "masked", "--task", "image-to-image", "--pairs", "masks"),
            "num_classes=2: the network gives images of as many",
        ),
    ],
)
def test_bad_input_is_one_sentence(here, options, match):
    told = refused(*TRAIN, *(option.format(here=here) for option in options))
    assert match in told


def test_a_score_that_is_no_number_ends_a_run_and_keeps_what_was(here):
    told = refused(*TRAIN, *NOISY, "--task", f"{here}:nan", code=1)
    assert "task 'nan': the score of 8 of 8 images is not finite" in told
    assert "the checkpoint after epoch 0 is kept in run/checkpoint.pt" in told
    assert Path("run/checkpoint.pt").exists()
    trained("good")
    told = refused("accelerate", "good", *NOISY, "--task", f"{here}:nan", *FEW, "--method", "lowrank")
    assert "the score of 8 of 8 images is not finite" in told
    assert "original: task 'agreement' compares with a network" in refused(
        "evaluate", "good", "--data", "small", "--task", "agreement"
    )
    assert "--task agreement compares outputs" in refused(
        "accelerate", "good", "--data", "small", "--task", "segmentation", "--unlabelled"
    )


def test_masks_of_another_size_are_named(here):
    Image.new("L", (8, 8)).save("masked/train/mask/3.png")
    told = refused("train", "--network", "unet", "--width", "4", "--data", "masked", "--task", "segmentation",
                   "--epochs", "1", "--out", "run")  # fmt: skip
    assert "masked/train/mask/3.png: a mask of 8 x 8 pixels, but the image 3.png has 16 x 16" in told


def test_pairs_that_are_read_as_classes_are_noticed(here):
    for kind in ("images", "masks"):
        for i in range(6):
            Path(f"both/{kind}").mkdir(parents=True, exist_ok=True)
            Path(f"both/{kind}/{i}.png").write_bytes(Path(f"small/train/{i}.png").read_bytes())
    said = refused("train", "--network", "rrn8", "--data", "both", "--epochs", "1")
    assert "its folders images, masks look like pairs and not like classes; --pairs images or" in said


def test_a_denoiser_of_grey_images(here):
    recipe = ("--epochs", "1", "--batch-size", "4", "--width", "8")
    done = call("train", "--network", "dncnn4", *NOISY, "--grey", *recipe, "--out", "run")
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("run/run.json").read_text())["data"]["in_channels"] == 1
    said = refused("evaluate", "run", *NOISY)
    assert "images of 3 channels, but the network takes 1; --grey makes images of one channel of them" in said
    result = document("accelerate", "run", *NOISY, "--grey", *FEW, "--method", "lowrank", "--keep-slower")
    assert result["stages"][-1]["score"] > 0
    # of a streamed set nothing is known to be in memory
    assert "grey: a data set of your function" in refused(
        "evaluate", "run", "--data", f"{here}:data", "--grey"
    )
