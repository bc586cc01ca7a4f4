"""Calibration data in every usual form: what a network is called with, what is a target, what is refused."""

import collections
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import quincunx as qx
from quincunx.acceleration import search
from quincunx.measure.tasks import classification
from quincunx.measure.tasks.classes import class_labels
from quincunx.surgery.calibration import Calibration

Pair = collections.namedtuple("Pair", "picture kind")


class One(nn.Module):
    """One map in, classes out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6, 3)

    def forward(self, image):
        return self.last(self.second(self.first(image).relu()).relu().mean((2, 3)))


class Named(One):
    """As a library of transformers has it: keywords, a target of its own, an answer in a dictionary."""

    def forward(self, pixel_values=None, scale=None, labels=None):
        x = pixel_values if scale is None else pixel_values * scale
        return {"logits": super().forward(x)}


class Whole(One):
    """Reads a dictionary."""

    def forward(self, sample):
        return super().forward(sample["photo"] * sample["gain"])


class Two(One):
    """Two inputs, a third that may be left out."""

    def forward(self, left, right, scale=None):
        x = left + right
        return super().forward(x if scale is None else x * scale)


def maps(count=6, seed=0):
    return torch.randn(count, 2, 9, 7, generator=torch.Generator().manual_seed(seed))


def classes(count=6):
    return torch.arange(count) % 3


def read(network, *elements):
    return list(Calibration(list(elements), network))


def quietly(network, method, data):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibration: .* are few", UserWarning)
        return qx.accelerate(network, method, calibration=data)


x, t = maps(), classes()
TWICE = maps(seed=1)

FORMS = {
    "tensor": (One, x, None),
    "pair": (One, (x, t), t),
    "named pair": (One, Pair(x, t), t),
    "list of one": (One, [x], None),
    "dictionary": (One, {"img": x, "label": t}, t),
    "its key is forward's": (One, {"image": x, "path": ["a"] * 6}, None),
    "the only tensor": (One, {"scan": x, "y": t.tolist()}, t.tolist()),
    "dictionary and target": (One, ({"x": x}, t), t),
    "by keyword": (Named, {"pixel_values": x, "labels": t}, t),
    "two by keyword": (Named, {"labels": t, "scale": torch.ones(1), "pixel_values": x}, t),
    "whole dictionary": (Whole, {"photo": x, "gain": 2.0}, None),
    "two": (Two, (x, TWICE), None),
    "two and a target": (Two, (x, TWICE, t), t),
    "three and a target": (Two, (x, TWICE, torch.ones(1), t), t),
    "nested": (Two, ((x, TWICE), t), t),
    "two by name": (Two, {"right": TWICE, "left": x, "target": t}, t),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_in_each_form(form):
    kind, element, target = FORMS[form]
    network = kind().eval()
    (batch,) = read(network, element)
    assert torch.equal(batch.input, x)
    assert (batch.target is None) == (target is None)
    if target is not None:
        assert torch.equal(torch.as_tensor(batch.target), torch.as_tensor(target))
    with torch.no_grad():
        answer = batch.ask(network)
        summed = x + TWICE if kind is Two else x * 2 if kind is Whole else x
        expected = One.forward(network, summed)
    torch.testing.assert_close(answer["logits"] if kind is Named else answer, expected)
    result = quietly(network, qx.LowRank(2), [element])
    assert set(result.replaced) == {"first", "second"}
    loss = None if kind is not Named else lambda out, _: out["logits"].square().sum()
    masked = quietly(network, qx.Espace(2, rate=0.5, loss=loss), [element])
    assert set(masked.replaced) == {"first", "second"}


def test_a_data_loader_of_a_tensor_data_set():
    network = One().eval()
    for data in (TensorDataset(x), TensorDataset(x, t)):
        assert len(quietly(network, qx.SpatialBottleneck(), DataLoader(data, batch_size=4)).replaced) == 2


class Samples(Dataset):
    """A data set without an end of its own: it has a length."""

    def __len__(self):
        return len(x)

    def __getitem__(self, index):
        return x[index % len(x)], int(t[index % len(x)])


@pytest.mark.parametrize("data", [Samples(), [Samples()[i] for i in range(6)]], ids=["data set", "list"])
def test_samples_are_batches_of_one(data):
    network = One().eval()
    batches = list(Calibration(data, network))
    assert [tuple(batch.input.shape) for batch in batches] == [(1, 2, 9, 7)] * 6
    one, many = (quietly(network, qx.Espace(2, rate=0.5), given) for given in (data, [(x, t)]))
    for name, found in many.maps.items():
        torch.testing.assert_close(one.maps[name]["impact2"], found["impact2"], rtol=0.3, atol=1e-3)


def test_what_the_first_convolution_reads_decides():
    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.conv(x[:, None])

    (batch,) = read(Grey(), torch.randn(5, 8, 8))
    assert batch.input.shape == (5, 8, 8)
    assert read(nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4))[0].input.shape == (3, 4)


@pytest.mark.parametrize(
    ("element", "match"),
    [
        (torch.randn(9, 7), r"batch 0 has shape \(9, 7\).*batches \[N, C, H, W\]"),
        (t, r"batch 0 has shape \(6,\).*one \(input, target\) pair is \[\(input, target\)\]"),
        (3.0, "batch 0 is a float; expected"),
        ([], "batch 0 is a list of 0; expected"),
        ((x, TWICE, t), r"batch 0 is a tuple of 3; .*forward\(image\)"),
        ({"a": x, "b": TWICE}, "the keys 'a', 'b', which"),
        (torch.tensor(1.0), "batch 0 is a Tensor; expected"),
        (x.to(torch.uint8), r"batch 0 \(\(6, 2, 9, 7\), uint8\) cannot be run"),
    ],
)
def test_what_is_no_batch_is_one_sentence(element, match):
    with pytest.raises((TypeError, ValueError), match=match) as told:
        qx.accelerate(One().eval(), qx.LowRank(2), calibration=[element])
    assert str(told.value).startswith("calibration")
    assert "\n" not in str(told.value)


def test_a_dictionary_that_lacks_an_input():
    with pytest.raises(TypeError, match="needs 'right' too"):
        read(Two(), {"left": x, "labels": t})


# ---------------------------------------------------------------- labels


LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "given",
    [
        t.to(torch.int16),
        t.to(torch.uint8),
        t.double(),
        t[:, None],
        t.tolist(),
        t.numpy(),
        F.one_hot(t, 3),
        F.one_hot(t, 3).half(),
    ],
    ids=["int16", "uint8", "float", "column", "list", "numpy", "one-hot", "half one-hot"],
)
def test_labels_that_can_mean_one_thing_only(given):
    assert class_labels(LOGITS, given).tolist() == t.tolist()


def test_probabilities_stay():
    soft = LOGITS.softmax(1).double()
    torch.testing.assert_close(class_labels(LOGITS, soft), soft.float())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (t + 2, "from 2 to 4, but there are 3 classes; expected 0 to 2"),
        (t - 1, "from -1 to 1"),
        (t[:4], r"have shape \(4,\), but the network answers \(6, 3\)"),
        (t + 0.5, "numbers with a fraction"),
        (["bird"] * 6, "are a list that holds more than numbers"),
        (torch.ones(6, 3), "no probabilities"),
        ({"boxes": x}, "are a dict"),
    ],
)
def test_labels_that_cannot_be_used_name_the_batch(given, match):
    data = [(x, t), (x, given)]
    with pytest.raises((TypeError, ValueError), match=match) as told:
        quietly(One().eval(), qx.Espace(2, rate=0.5), data)
    assert str(told.value).startswith("calibration: the labels of batch 1")
    assert "\n" not in str(told.value)


def test_ignored_labels_are_left_out_and_nothing_else():
    network, some = One().eval(), t.clone()
    some[2:] = -100
    left = quietly(network, qx.Espace("full", rate=0.5), [(x, some), (x, torch.full((6,), -100))])
    assert all(impact.any() for impact in left.maps["first"].values())
    with pytest.raises(ValueError, match="calibration: all labels, from batch 0 to batch 1, are -100"):
        quietly(network, qx.Espace("full", rate=0.5), [(x, torch.full((6,), -100))] * 2)


# ---------------------------------------------------------------- gradients


class Cut(nn.Module):
    """A stem that no gradient reaches, a body that one does, a branch that the loss does not read."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.stem, self.body, self.branch = (nn.Conv2d(2 if i == 0 else 4, 4, 3, padding=1) for i in range(3))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            y = self.stem(x).relu()
        y = y.detach() if self.how == "detach" else y
        self.branch(y)
        return self.last(self.body(y).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "left"), [("no_grad", {"body"}), ("detach", {"body"}), ("", {"stem", "body"})]
)
def test_layers_that_the_loss_has_no_gradient_to_stay_with_that_reason(how, left):
    result = quietly(Cut(how).eval(), qx.Espace("full", rate=0.25), [(x, t)])
    assert set(result.replaced) == left
    for name in {"stem", "body", "branch"} - left:
        assert "the loss has no gradient to it" in result.skipped[name]
    for found in result.maps.values():
        assert all(bool(impact.any()) for impact in found.values())


def test_a_layer_whose_positions_have_no_impact_stays():
    network = One().eval()
    nn.init.zeros_(network.last.weight)
    with pytest.warns(UserWarning, match="replaced nothing"):
        result = qx.accelerate(network, qx.Espace("full", rate=0.25), calibration=[(x, t)])
    assert all("impact of all its positions is 0" in reason for reason in result.skipped.values())
    assert set(result.skipped) == {"first", "second"}


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda out, _: 1.0, TypeError, "loss: of batch 0 it gives a float"),
        (lambda out, _: out, TypeError, r"loss: of batch 0 it gives a shape \(6, 3\)"),
        (lambda out, _: F.nll_loss(out, t + 5), ValueError, "loss: of batch 0 .* raises IndexError"),
    ],
)
def test_a_loss_that_is_none(loss, error, match):
    with pytest.raises(error, match=match):
        quietly(One().eval(), qx.Espace(2, loss=loss), [(x, t)])


def test_in_inference_mode_results_can_be_trained():
    network = One().eval()
    with torch.inference_mode():
        made = quietly(network, qx.Espace(2, rate=0.5), [(maps(), classes())]).model.train()
    F.cross_entropy(made(x), t).backward()
    assert all(p.grad is not None for p in made.parameters())


def test_a_search_judges_labels_in_any_form():
    network, drops = One().eval(), []
    with torch.no_grad():
        answer = network(x)
    changed = One().eval()
    for labels in (t, t[:, None].float(), F.one_hot(t), t.tolist()):
        scores = SimpleNamespace(
            context=SimpleNamespace(data=read(network, (x, labels))),
            answers=[answer],
            counts=[len(answer)],
            task=classification(),
        )
        drops.append(search._Builder._drop(SimpleNamespace(scores=scores), changed))
    before, after = ((out.argmax(1) == t).sum() for out in (answer, changed(x)))
    assert drops == [pytest.approx(100 * float(before - after) / 6)] * 4


def test_a_search_takes_networks_of_one_input():
    with pytest.raises(TypeError, match="calibration: batch 0 has more than one input"):
        qx.accelerate(Two().eval(), "lrd", calibration=[((x, TWICE), t)], macs="90%")
