"""What benchmarks/zoo.py calls equal, wrong, refused, a crash or a hang, on networks made here."""

import importlib.util
import json
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import ROOT

PATH = ROOT / "benchmarks" / "zoo.py"
spec = importlib.util.spec_from_file_location("zoo_under_test", PATH)
zoo = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = zoo
spec.loader.exec_module(zoo)

forking = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


class Scaled(nn.Module):
    """A branch that starts as nothing: a last norm of zeros, and a layer scale."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.last = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 1e-6))
        self.head = nn.Linear(6, 4)
        nn.init.zeros_(self.last.weight)
        nn.init.normal_(self.depthwise.weight, std=1e-4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = x + self.scale * self.last(self.depthwise(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Scaled().eval().requires_grad_(False)
    zoo.randomise(made, zoo.images((16, 16), 4))
    return made


def test_no_part_of_a_randomised_network_is_idle(model):
    assert all(p.min() < p.max() for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert model.norm.momentum == 0.1
    x = zoo.images((16, 16), 2)
    before = model(x)
    assert zoo.spread_of(before) > zoo.DULL
    for part in ("scale", "last.weight", "last.running_var", "depthwise.weight"):
        changed = Scaled().eval()
        changed.load_state_dict(model.state_dict())
        with torch.no_grad():
            (changed.get_parameter if "running" not in part else changed.get_buffer)(part).mul_(1.5)
        assert zoo.distance(changed(x), before) > zoo.TOLERANCE, part


def test_distance_is_relative_to_the_largest_value_of_each_tensor():
    one = torch.tensor([0.0, -8.0])
    assert zoo.distance(one, one.clone()) == 0
    assert zoo.distance(one + 0.08, one) == pytest.approx(0.01)
    pair = {"a": one, "b": one * 1e-6}
    assert zoo.distance({"a": one, "b": one * 1e-6 + 4e-6}, pair) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "answer",
    [
        OrderedDict(a=torch.ones(2)),
        {"a": torch.ones(2), "b": torch.ones(1)},
        {"a": torch.ones(2, 1)},
        {"a": torch.ones(2).double()},
        {"a": torch.tensor([1.0, float("nan")])},
    ],
    ids=["another dictionary", "one more", "shape", "dtype", "no number"],
)
def test_answers_of_another_form_are_infinitely_far(answer):
    assert zoo.distance(answer, {"a": torch.ones(2)}) == float("inf")


def test_a_fused_copy_that_answers_alike_is_equal(model):
    record, fused = zoo.fused_record(model, [(16, 16), (12, 20)])
    assert (record["answer"], fused is not None) == ("equal", True)
    assert record["error"] < 1e-5


def test_a_fused_copy_that_is_a_little_off_is_wrong(model, monkeypatch):
    off = Scaled().eval()
    off.load_state_dict(model.state_dict())
    with torch.no_grad():
        off.head.bias[0] += 1e-2
    monkeypatch.setattr(zoo.qx, "fuse", lambda _: off)
    record, _ = zoo.fused_record(model, [(16, 16)])
    assert record["answer"] == "wrong"
    assert zoo.faults({"name": "n", "fuse": record}) == [f"n: fuse: wrong: relative error {record['error']}"]


def test_an_answer_of_another_images_size_is_wrong(model, monkeypatch):
    """Right on the first size alone."""
    monkeypatch.setattr(
        zoo.qx, "fuse", lambda own: lambda x: own(x) if x.shape[-1] == 16 else own(x).flip(0) * 0.9
    )
    assert zoo.fused_record(model, [(16, 16)])[0]["answer"] == "equal"
    assert zoo.fused_record(model, [(16, 16), (16, 12)])[0]["answer"] == "wrong"


@pytest.mark.parametrize("rounding", [0.5, float("inf")])
def test_an_answer_that_is_rounding_excuses_nothing(model, monkeypatch, rounding):
    """Other images are tried instead."""
    torn = zoo.images((16, 16), 1)
    monkeypatch.setattr(zoo, "own_rounding", lambda *_: rounding)
    monkeypatch.setattr(zoo.qx, "fuse", lambda own: lambda x: own(x) * (1.5 if torch.equal(x, torn) else 1))
    record, _ = zoo.fused_record(model, [(16, 16)])
    assert (record["answer"], record["error"]) == ("equal", 0)
    assert [told["off"] for told in record["off"]["1x16x16"]] == [0.5, 0.5]  # the first input comes twice
    monkeypatch.setattr(zoo.qx, "fuse", lambda own: lambda x: own(x) * 1.5)
    assert zoo.fused_record(model, [(16, 16)])[0]["answer"] == "wrong"


def test_a_call_that_changes_the_users_network_is_wrong(model, monkeypatch):
    def fuse(own):
        own.norm.weight.mul_(1.0)
        return own

    monkeypatch.setattr(zoo.qx, "fuse", fuse)
    record, _ = zoo.fused_record(model, [(16, 16)])
    assert (record["answer"], record["sentence"]) == ("wrong", "the user's own network was changed")


class Asking(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_sentence_of_ours_is_a_refusal_and_other_exceptions_are_errors(monkeypatch):
    record, fused = zoo.fused_record(Asking(), [(8, 8)])
    assert (record["answer"], fused) == ("refused", None)
    assert "Asking" in record["sentence"]
    assert zoo.faults({"name": "n", "fuse": record}) == []

    def fuse(_):
        raise KeyError("conv")

    monkeypatch.setattr(zoo.qx, "fuse", fuse)
    record, _ = zoo.fused_record(Asking(), [(8, 8)])
    assert record["answer"] == "error"
    assert record["sentence"] == "KeyError: 'conv'"


def test_convolutions_left_in_torch_are_counted_by_kind(model):
    assert zoo.kinds_called(model, zoo.images((16, 16), 1)) == {"Conv2d": 1, "Conv2d, depthwise": 1}
    assert not any(m._forward_hooks for m in model.modules())


def test_everything_about_one_network():
    row = {}
    zoo.examine(zoo.Entry("own/scaled", Scaled), row.__setitem__)
    assert row["fuse"]["answer"] == "equal"
    assert row["convs"]["all"] == 2
    assert row["methods"]["sb"]["takes"] + sum(row["methods"]["sb"]["leaves"].values()) == 2
    assert row["accelerated"]["artifact"]["answer"] == "equal"
    assert row["time"]["speedup"] > 0
    json.dumps(row, allow_nan=False)
    assert zoo.faults({"name": "own/scaled", **row}) == []


class Constant(nn.Module):
    def forward(self, x):
        return x.new_ones(x.shape[0], 4)


def test_networks_whose_answers_show_nothing_are_left_out():
    row = {}
    zoo.examine(zoo.Entry("own/constant", Constant), row.__setitem__)
    assert "show nothing" in row["unusable"]


def test_reasons_are_counted_whatever_names_and_numbers_they_hold():
    said = ["called 2 times", "called 31 times", "shared with 'a.b'", "1 x 1: no rank", "a 5 x 1 kernel"]
    assert zoo.reasons(said) == {
        "called n times": 2,
        "shared with '...'": 1,
        "1 x 1: no rank": 1,
        "a n x n kernel": 1,
    }


def test_of_networks_too_large_no_layers_are_fitted(monkeypatch):
    monkeypatch.setattr(zoo, "LARGE", 10)
    row = {}
    zoo.examine(zoo.Entry("own/scaled", Scaled), row.__setitem__)
    assert "accelerated" not in row
    assert row["methods"]["sb"]["takes"] >= 0


def test_some_networks_do_not_overwrite_the_result_of_all(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(zoo, "catalogue", lambda _: ([zoo.Entry("a", nn.Identity)], []))
    monkeypatch.setattr(zoo, "run", lambda _, out, **options: asked.append(out) or 0)
    zoo.main(["--only", "a"])
    zoo.main([])
    zoo.main(["--only", "a", "--out", str(tmp_path / "own.json")])
    result = PATH.parent.parent / "results" / "zoo.json"
    assert asked[0] != result
    assert asked[1:] == [result, tmp_path / "own.json"]


# ---------------------------------------------------------------- processes


def _examiner(entry, done):
    done("fuse", {"answer": "equal", "error": 0.0})
    if entry.name == "crash":
        os._exit(7)
    if entry.name == "hang":
        time.sleep(60)
    while entry.name == "busy":
        pass
    if entry.name == "raise":
        raise KeyError("unforeseen")
    done("seconds", 0.0)


@forking
def test_a_crash_and_a_hang_are_rows_and_not_the_end(capfd):
    entries = [zoo.Entry(name, nn.Identity) for name in ("crash", "hang", "busy", "raise", "fine")]
    rows = {row["name"]: row for row in zoo.rows_of(entries, jobs=2, limit=1, examiner=_examiner)}
    assert rows["crash"]["stopped"] == "crash: exit code 7 after fuse"
    assert rows["hang"]["stopped"] == "timeout: 1 s, after fuse"
    assert rows["raise"]["stopped"] == "crash: exit code 1 after fuse"
    assert rows["fine"] == {"name": "fine", "fuse": {"answer": "equal", "error": 0.0}, "seconds": 0.0}
    assert rows["busy"]["stopped"] == rows["hang"]["stopped"]
    assert len(zoo.faults(rows["hang"])) == 1
    capfd.readouterr()


def _rows(entries, **_):
    for entry in entries:
        yield {"name": entry.name, "fuse": {"answer": "wrong" if entry.name == "b" else "equal"}}


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    def interrupted(entries, **_):
        yield from _rows(entries[:1])
        raise KeyboardInterrupt

    entries = [zoo.Entry(name, nn.Identity) for name in "abc"]
    out = tmp_path / "zoo.json"
    monkeypatch.setattr(zoo, "rows_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zoo.run(entries, out, only="*", jobs=1, limit=1)
    side = tmp_path / ".zoo.json.part"
    side.write_text(side.read_text() + '{"name": "b", "fu')  # torn by the interruption
    asked = []
    monkeypatch.setattr(
        zoo, "rows_of", lambda entries, **_: asked.extend(e.name for e in entries) or _rows(entries)
    )
    assert zoo.run(entries, out, only="*", jobs=1, limit=1) == 1
    assert asked == ["b", "c"]
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["a", "b", "c"]
    assert not side.exists()
    assert "b: fuse: wrong" in capsys.readouterr().out


def test_rows_of_other_code_are_made_anew(tmp_path, monkeypatch):
    side = tmp_path / "part"
    made_by = {"code": "1"}
    side.write_text(json.dumps(made_by) + '\n{"name": "a"}\n')
    assert zoo.kept_rows(side, {"code": "1"}) == [{"name": "a"}]
    assert zoo.kept_rows(side, {"code": "2"}) == []
    before = zoo.digest_of_code()
    monkeypatch.setattr(zoo, "__file__", str(Path(__file__)))
    assert zoo.digest_of_code() != before


# ---------------------------------------------------------------- which networks


def test_without_the_libraries_the_script_says_so_and_stops(monkeypatch, capsys):
    monkeypatch.setattr(zoo, "find_spec", lambda _: None)
    assert zoo.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("skipped: torchvision, timm, segmentation_models_pytorch")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "smallest"),
    [
        (["hrnet_w18", "hrnet_w18_small", "hrnet_w18_small_v2"], "hrnet_w18_small"),
        (["nets_large", "nets_m", "nets_xx_small", "nets_x_small"], "nets_xx_small"),
        (["own50", "own101", "own34t"], "own34t"),
        (["tf_effv2_b0", "tf_effv2_b3"], "tf_effv2_b0"),
    ],
)
def test_the_smallest_of_a_family_is_chosen_by_its_name(names, smallest):
    assert min(names, key=zoo.size_by_name) == smallest
    assert len({zoo.family_of(name) for name in names}) == 1


def test_each_method_gets_cheap_layers_of_its_own():
    net = nn.Sequential(*(nn.Conv2d(c, c, 3, padding=1) for c in (8, 2, 4, 6)))
    layers = [zoo.Layer(str(i), (str(i),), module) for i, module in enumerate(net)]
    pairs = [(layers[0], layers[3])]
    assert zoo.cheapest(layers, set(), pairs) == ["0", "3", "1", "2"]
    assert zoo.cheapest(layers, {"3", "1"}, pairs) == ["2"]
