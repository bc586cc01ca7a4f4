"""What gains no time in the network is put back; times are made of the layers, so that no clock decides."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.acceleration import gain, scores
from quincunx.acceleration.gain import restore_layers, without_slower
from quincunx.measure.latency import Timing
from quincunx.surgery.replace import replace_layers


class Net(nn.Module):
    """A stem of few channels, two layers of one shape, one that is called at two places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.once = nn.Conv2d(16, 16, 5, padding=2)
        self.again = self.once
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.b(self.a(x).relu()).relu()
        return self.head(self.again(self.once(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
METHOD = qx.LowRank(rank=0.25)


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a network: one, and what each replaced layer adds or takes away."""
    per_layer = {}

    def seconds(model):
        kinds = {n: type(m) for n, m in model.named_modules(remove_duplicate=False)}
        return 1 + sum(cost for n, cost in per_layer.items() if kinds[n] is qx.SeparableConv2d)

    def measure(models, example, *, rounds):
        return {name: Timing(name, 1, (seconds(model),) * rounds) for name, model in models.items()}

    monkeypatch.setattr(scores, "measure_models", measure)
    monkeypatch.setattr(gain, "inference_form", lambda model, *_: copy.deepcopy(model))
    return per_layer


def test_a_layer_that_makes_the_network_slower_is_put_back_with_its_reason(net, clock):
    clock |= {"stem": 0.05, "a": -0.2, "b": -0.2, "once": -0.1}
    found = without_slower(net, made := replace_layers(net, METHOD, example_input=X), X)
    assert sorted(made.replaced) == ["a", "b", "once", "stem"]
    assert sorted(found.replaced) == ["a", "b", "once"]
    assert found.skipped["stem"].startswith("no gain: the network takes 1.10 times as long with it")
    assert type(found.model.stem) is nn.Conv2d
    assert torch.equal(found.model.stem.weight, net.stem.weight)
    assert found.model.stem is not net.stem
    assert found.replaced["a"]["gain"] == pytest.approx(0.95 / 0.55)
    assert type(made.model.stem) is qx.SeparableConv2d, "what was given is left as it is"


def test_what_timings_do_not_tell_from_noise_is_put_back(net, clock, monkeypatch):
    """Of rounds half of which say so: their median is a gain, and it is chance."""
    clock |= {"a": -0.2, "b": -0.2, "once": -0.2}
    steady, asked = scores.measure_models, []

    def noisy(models, example, *, rounds):
        asked.append((rounds, list(models)))
        found = steady(models, example, rounds=rounds)
        for key, model in models.items():
            # without the stem's replacement: now slower, now faster, a little more often slower
            if type(model.stem) is nn.Conv2d and type(model.a) is qx.SeparableConv2d:
                seconds = [found[key].median * (1.1 if i % 9 < 5 else 0.95) for i in range(rounds)]
                found[key] = Timing(key, 1, tuple(seconds))
        return found

    monkeypatch.setattr(scores, "measure_models", noisy)
    found = without_slower(net, replace_layers(net, METHOD, example_input=X), X)
    assert sorted(found.replaced) == ["a", "b", "once"]
    assert found.skipped["stem"].startswith("no clear gain: the network takes 1.10 times as long without it")
    (first, all_of_them), (more, doubtful), *_ = asked
    assert (first, more) == (11, 31)
    assert (len(all_of_them), len(doubtful)) == (4, 2), "only what is in doubt is timed again"


def test_a_network_that_is_no_faster_becomes_the_one_before(net, clock, tmp_path):
    clock |= {"stem": 0.1, "a": 0.0, "b": 0.0, "once": 0.0}
    found = without_slower(net, replace_layers(net, METHOD, example_input=X), X)
    assert not found.replaced
    assert not found.model.quincunx_replaced
    assert set(found.skipped) >= {"stem", "a", "b", "once"}
    assert torch.equal(found.model(X), net(X))
    qx.save(found.model, tmp_path / "net", factory="mine:Net")
    assert torch.equal(qx.load(tmp_path / "net", factory=Net).eval()(X), net(X))


def test_a_whole_network_that_gains_nothing_is_put_back_though_each_layer_seems_to(net, clock, monkeypatch):
    clock |= {"a": -0.2, "b": -0.2}
    measure = scores.measure_models

    def together(models, example, *, rounds):
        found = measure(models, example, rounds=rounds)
        # beside the original it is as slow
        return {**found, "before": found[""]} if "before" in found else found

    monkeypatch.setattr(scores, "measure_models", together)
    found = without_slower(net, replace_layers(net, METHOD, where=["a", "b"], example_input=X), X)
    assert not found.replaced
    assert "whole network" in found.skipped["a"]


def test_a_shared_layer_is_one_module_again_in_all_its_places(net, clock):
    made = replace_layers(net, METHOD, example_input=X)
    back = restore_layers(net, made, {"once": "slow"})
    assert back.model.once is back.model.again
    assert type(back.model.once) is nn.Conv2d
    assert not {"once", "again"} & set(back.model.quincunx_replaced)


def test_both_halves_of_a_pair_are_judged_and_put_back_together(net, clock, monkeypatch):
    images = [torch.randn(16, *X.shape[1:])]
    pair = replace_layers(net, qx.SpatialBottleneck(singles=False), where=[("a", "b")], calibration=images)
    assert sorted(pair.replaced) == ["a", "b"]

    def slow(models, example, *, rounds):
        takes = {k: 1.0 + (type(m.a) is not nn.Conv2d) for k, m in models.items()}
        return {k: Timing(k, 1, (t,) * rounds) for k, t in takes.items()}

    monkeypatch.setattr(scores, "measure_models", slow)
    found = without_slower(net, pair, X)
    assert not found.replaced
    assert torch.equal(found.model(X), net(X))


def test_the_python_call_measures_where_it_is_asked_to(net, clock):
    clock |= {"stem": 0.05, "a": -0.2, "b": -0.2, "once": -0.1}
    assert "stem" in qx.accelerate(net, METHOD, example_input=X).replaced
    assert "stem" in qx.accelerate(net, METHOD, example_input=X, measure=True).skipped
    with pytest.raises(TypeError, match="example_input: measure=True times a tensor"):
        qx.accelerate(net, METHOD, calibration=[X], measure=True)


def test_a_result_prints_short_and_sums_up(net):
    made = replace_layers(net, METHOD, where=["a"], example_input=X)
    assert len(repr(made)) < 120
    assert "1 layers replaced" in repr(made)
    lines = made.summary().splitlines()
    assert lines[1].startswith("  a: lowrank, rank 12")
    assert lines[2:] == ["  stem, b, once stay: left out by where"]


def test_layers_that_stay_for_one_reason_share_a_line():
    net = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(9)), nn.Conv2d(16, 16, 3))
    lines = replace_layers(net, METHOD, example_input=torch.zeros(1, 16, 8, 8)).summary().splitlines()
    assert lines[2:] == [
        "  0, 1, 2, 3, 4, 5 and 3 more stay: a 1 x 1 kernel has no columns and rows to separate"
    ]


def test_a_summary_says_what_was_asked_for_and_what_was_reached(net):
    attempt = {"before": 0.003, "after": 0.002, "speedup": 1.5}
    made = replace_layers(net, METHOD, where=["a"], example_input=X)
    found = dataclasses.replace(
        made, search={"target": {"speedup": 2.0, "max_drop": 1.0}, "met": False, "attempts": [attempt]}
    )
    assert found.summary().splitlines()[1] == (
        "  asked speedup=2.0, max_drop=1.0, missed: 1.50 times as fast, 3 ms became 2 ms"
    )
