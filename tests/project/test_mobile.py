"""What benchmarks/mobile.py says of its rows, and its short training; it needs timm for the rest."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def mobile(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("mobile", FOLDER / "mobile.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mobile", module)
    spec.loader.exec_module(module)
    return module


def row(network, method, speed_up, agreement, **more):
    return {"network": network, "method": method, "speed_up": speed_up, "agreement": agreement, **more}


def test_the_verdict_takes_labels_where_there_are_some_and_the_fastest_that_is_good_enough(mobile):
    rows = [
        row("labelled", "dense", 1.0, 1.0, dtype="float32", right=0.886),
        row("labelled", "dense", 1.36, 0.97, dtype="bfloat16", right=0.884),
        row("labelled", "smaller input", 1.9, 0.8, dtype="float32", size=160, right=0.80),
        row("labelled", "search", 1.5, 0.96, dtype="bfloat16", tuned=100, right=0.877),
        row("plain", "dense", 1.0, 1.0, dtype="float32"),
        row("plain", "dense", 1.6, 0.927, dtype="bfloat16"),
        row("plain", "search", 1.19, 0.999, dtype="float32", tuned=0),
        {"network": "plain", "method": "expansion sampled", "density": "3/4", "layers": 0},
        row("known", "dense", 1.0, 1.0, dtype="float32", known=118, agreement_known=1.0),
        row("known", "dense", 1.3, 0.9, dtype="int8", known=118, agreement_known=0.995),
        row("slow", "dense", 1.0, 1.0, dtype="float32"),
    ]
    assert list(mobile.verdict(rows)) == [
        "labelled: 1.2x for 1 point reached: search, bfloat16, 100: 1.50x, 0.9 points of right answers lost, "
        "agreement 96.0%",
        "plain: 1.2x for 1 point NOT reached; nearest: dense, bfloat16: 1.60x, 7.3 of 100 answers lost, "
        "agreement 92.7%",
        "known: 1.2x for 1 point reached: dense, int8: 1.30x, 0.5 of 100 answers on 118 images of its kind "
        "lost, agreement 90.0%",
        "slow: nothing is 1.2 times as fast",
    ]


def test_tuning_brings_a_network_nearer_to_its_teacher(mobile):
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    fast = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    fast.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        teacher[4].weight.mul_(20)
        fast[4].weight.mul_(20).add_(torch.randn(5, 8))
    images = torch.randn(30, 3, 24, 24)

    def away():
        with torch.no_grad():
            given, wanted = fast(images).log_softmax(1), teacher(images).softmax(1)
            return float(nn.functional.kl_div(given, wanted, reduction="batchmean"))

    before, own = away(), {key: value.clone() for key, value in teacher.state_dict().items()}
    mobile.tuned(fast, teacher, images, 300)
    assert away() < 0.7 * before
    assert all(torch.equal(value, own[key]) for key, value in teacher.state_dict().items())


def test_tensors_of_keras_lie_as_those_of_timm(mobile, monkeypatch, tmp_path):
    """Kernels [kh, kw, C, O] become [O, C, kh, kw], depthwise [kh, kw, C, 1] become [C, 1, kh, kw]."""
    shapes = {"Conv1/kernel": (3, 3, 3, 8), "Conv_1/kernel": (1, 1, 8, 16), "dense/kernel": (16, 5)}
    shapes |= {"dense/bias": (5,), "expanded_conv_depthwise/kernel": (3, 3, 8, 1)}
    shapes |= {"expanded_conv_project/kernel": (1, 1, 8, 4)}
    norms = {"bn_Conv1": 8, "expanded_conv_depthwise_BN": 8, "expanded_conv_project_BN": 4, "Conv_1_bn": 16}
    for number in range(1, 17):
        shapes[f"block_{number}_expand/kernel"] = (1, 1, 4, 24)
        shapes[f"block_{number}_depthwise/kernel"] = (3, 3, 24, 1)
        shapes[f"block_{number}_project/kernel"] = (1, 1, 24, 4)
        norms |= {
            f"block_{number}_{part}_BN": n for part, n in (("expand", 24), ("depthwise", 24), ("project", 4))
        }
    for name, count in norms.items():
        shapes |= {f"{name}/{part}": (count,) for part in ("gamma", "beta", "moving_mean", "moving_variance")}
    values = {name: torch.randn(shape).numpy() for name, shape in shapes.items()}

    class File(dict[str, object]):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    class Group:
        def visititems(self, visit):
            for name, value in values.items():
                visit(f"network/{name.split('/')[0]}", object())
                visit(f"network/{name}", value)

    fake = type("h5py", (), {"File": staticmethod(lambda path: File(model_weights=Group()))})
    monkeypatch.setitem(sys.modules, "h5py", fake)
    found = mobile.keras_tensors(tmp_path / "any.h5")
    assert len(found) == len(shapes)
    assert [tuple(t.shape) for t in found[:7]] == [(8, 3, 3, 3), (8,), (8,), (8,), (8,), (8, 1, 3, 3), (8,)]
    assert torch.equal(found[0][5, 2], torch.from_numpy(values["Conv1/kernel"])[:, :, 2, 5])
    assert torch.equal(found[5][3, 0], torch.from_numpy(values["expanded_conv_depthwise/kernel"])[:, :, 3, 0])
    assert torch.equal(found[-2], torch.from_numpy(values["dense/kernel"]).t())
