"""A network that the library did not build, from the command line: accelerated, resumed, saved, loaded."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quincunx as qx
from helpers.commands import call, document, refused
from quincunx.acceleration.journal import FolderJournal
from quincunx.cli.network import load_trained
from quincunx.data import load_data
from quincunx.networks.spec import read_spec
from quincunx.train.loop import _Run

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)])
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        first, second = self.layers
        return F.relu(x + self.norm(second(F.relu(first(x)))))


class Net(nn.Module):
    def __init__(self, classes=10, channels=1):
        super().__init__()
        self.parts = nn.ModuleDict({"stem": nn.Conv2d(channels, 8, 3, stride=4, padding=1)})
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.parts["stem"](x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Moody(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def make():
    return Net()


class Zoo:
    @staticmethod
    def small():
        return Net()


def moody():
    return Moody()


def five():
    return Net(classes=5)


def colour():
    return Net(channels=3)


def picky():
    class Picky(Net):
        def forward(self, x):
            raise LookupError("only on Sundays\\nand holidays")

    return Picky()


def maps():
    return nn.Conv2d(1, 10, 3)


def answers():
    class Answers(Net):
        def forward(self, x):
            return {"logits": super().forward(x)}

    return Answers()


def text():
    return "a network"


def needy(depth):
    return Net()


def broken():
    raise OSError("no weights here")


def leaving():
    raise SystemExit(3)


net = Net()
number = 3
"""
QUICK = ("--calibration", "40", "--rounds", "3", "--threads", "1")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder with the user's module in it, which is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    for name in ("mynets", "broken_module", "needing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("mynets.py").write_text(SOURCE)
    Path("broken_module.py").write_text("1 / 0\n")
    Path("needing.py").write_text("import no_such_package\n")
    return tmp_path


def made(name="make", seed=0):
    """A network of the user's module, as a program of the user would have it."""
    scope = {"__name__": "elsewhere"}
    exec(SOURCE, scope)
    torch.manual_seed(seed)
    return scope[name]().eval()


def weights(name="weights.safetensors", **changes):
    state = {**made(seed=3).state_dict(), **changes}
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, name)
    return name


ACCELERATE = ("accelerate", "--model", "mynets:make", "--weights", "weights.safetensors", "--data", "digits")


# ---- the whole way


def test_the_whole_command_interrupted_twice_and_resumed(monkeypatch):
    weights()
    options = (*QUICK, "--input", "1x1x32x32", "--finetune-epochs", "2", "--lr", "0.01", "--distill", "0.5")
    options = (*options, "--method", "espace", "--keep-slower")
    # straight through, to compare with
    assert call(*ACCELERATE, *options, "--out", "straight").exit_code == 0
    straight = json.loads(Path("straight/accelerate.json").read_text())

    keep, kept = FolderJournal.keep, []

    def stopping_keep(self, layer, replacement):
        keep(self, layer, replacement)
        kept.append(layer.name)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderJournal, "keep", stopping_keep)
    assert "stopped" in refused(*ACCELERATE, *options, "--json", code=1)
    monkeypatch.setattr(FolderJournal, "keep", keep)

    epoch = _Run._epoch

    def stopping_epoch(self, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, *rest)

    monkeypatch.setattr(_Run, "_epoch", stopping_epoch)
    assert "stopped after 1 of 2 epochs" in refused(*ACCELERATE, *options, "--json", code=1)
    monkeypatch.setattr(_Run, "_epoch", epoch)
    first = json.loads(Path("fast/finetune/log.jsonl").read_text().splitlines()[0])

    done = call(*ACCELERATE, *options)
    assert done.exit_code == 0, done.stderr
    result = json.loads(Path("fast/accelerate.json").read_text())
    assert result["network"] == {"kind": "factory", "factory": "mynets:make"}
    assert result["recalled"] == ["parts.stem", *(f"blocks.{i}.layers.{j}" for i in (0, 1) for j in (0, 1))]
    assert kept == result["recalled"][:2]
    history = json.loads(Path("fast/finetune/run.json").read_text())["history"]
    assert history[0] == first
    assert len(history) == 2
    assert [stage["error"] for stage in result["stages"]] == [s["error"] for s in straight["stages"]]

    # what the last lines say is what a person can run
    lines = [line.strip() for line in done.stdout.partition("to use it:\n")[2].splitlines()]
    assert lines == [
        "import quincunx as qx",
        "from mynets import make",
        'model = qx.fuse(qx.load("fast/model", factory=make))',
    ]
    page = Path("fast/report.html").read_text()
    assert "from mynets import make" in page
    assert "mynets:make by espace" in page
    scope = {}
    exec("\n".join(lines), scope)
    loaded = qx.load("fast/model", factory=lambda: made(seed=7))
    assert type(loaded.blocks[1].layers[0]) is qx.EspaceConv2d
    assert loaded.quincunx_spec == {"kind": "factory", "factory": "mynets:make"}
    x = torch.rand(5, 1, 32, 32)
    torch.testing.assert_close(scope["model"](x), loaded(x), rtol=1e-4, atol=1e-5)
    uninterrupted = qx.load("straight/model", factory=made)
    torch.testing.assert_close(loaded(x), uninterrupted(x), rtol=1e-3, atol=1e-4)

    # the artifact stands for a trained network in the other verbs
    judged = document("evaluate", "fast", "--model", "mynets:make")
    assert judged["error"] == result["stages"][-1]["error"]
    assert (judged["artifact"], judged["model"]) == ("fast/model", "mynets:make")
    assert document("evaluate", "--model", "mynets:make", "--weights", "fast")["error"] == judged["error"]
    assert "fast/model on digits: test error" in call("evaluate", "fast", "--model", "mynets:make").stdout
    before = document("evaluate", "--model", "mynets:make", "--weights", "weights.safetensors")
    assert before["error"] == result["stages"][0]["error"]
    assert before["artifact"] is None
    again = document(
        *ACCELERATE[:3], "--weights", "fast", *QUICK, "--method", "binaryconnect", "--out", "two"
    )
    assert again["stages"][0]["error"] == judged["error"]
    assert call("report", "fast").exit_code == 0
    assert "mynets:make" in Path("fast/report.html").read_text()


def test_other_weights_or_another_function_are_another_run():
    weights()
    options = (*QUICK, "--method", "lrd", "--layers", "blocks.0.*")
    assert call(*ACCELERATE, *options).exit_code == 0
    weights(**{"head.bias": torch.ones(10)})
    assert "another run: weights was" in refused(*ACCELERATE, *options)
    weights()
    other = ("accelerate", "--model", "mynets:Zoo.small", *ACCELERATE[3:])
    assert "network factory was 'mynets:make', now 'mynets:Zoo.small'" in refused(*other, *options)


def test_a_forward_that_depends_on_the_data_is_timed_and_used_unfused():
    arguments = ("--model", "mynets:moody", *QUICK, "--method", "lrd", "--layers", "blocks.0.*")
    done = call("accelerate", *arguments, "--keep-slower")
    assert done.exit_code == 0, done.stderr
    result = json.loads(Path("fast/accelerate.json").read_text())
    assert "cannot be traced by torch.fx" in result["unfused"]
    assert "the whole network without it" in result["how"]
    assert "to be used, without qx.fuse: model: Moody cannot be traced" in done.stdout
    assert done.stdout.rstrip().endswith('model = qx.load("fast/model", factory=moody)')
    loaded = qx.load("fast/model", factory=lambda: made("moody"))
    assert type(loaded.blocks[0].layers[0]) is qx.SeparableConv2d


def test_a_forward_that_can_be_traced_is_fused():
    result = document("accelerate", "--model", "mynets:make", *QUICK, "--layers", "blocks.0.layers.0")
    assert result["unfused"] is None
    assert result["how"].startswith("qx.fuse before and after")


def test_compare_takes_a_function_too():
    options = ("--methods", "binaryconnect", "--layers", "blocks.0.*", *QUICK, "--json")
    rows = json.loads(call("compare", "--model", "mynets:make", *options).stdout)["rows"]
    assert [row["series"] for row in rows] == ["BinaryConnect"]
    assert read_spec("compared/original")["model"] == {"kind": "factory", "factory": "mynets:make"}


# ---- weights and normalisation


@pytest.mark.parametrize("form", ["safetensors", "plain", "nested", "parallel", "own"])
def test_weights_in_every_form_are_those_of_the_file(form):
    wanted = made(seed=3).state_dict()
    file = "w.safetensors" if form == "safetensors" else "w.pt"
    if form == "safetensors":
        weights(file)
    elif form == "parallel":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in wanted.items()}}, file)
    elif form != "own":
        torch.save({"state_dict": wanted} if form == "nested" else wanted, file)
    found = load_trained(None, None if form == "own" else Path(file), "mynets:make", None, seed=3).model
    # without a file the function's own weights, drawn from the seed
    assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())
    assert not found.training


def test_images_are_normalised_as_the_options_say_else_by_their_own_statistics():
    data = load_data("digits")
    found = load_trained(None, None, "mynets:make", "2x1x32x32")
    assert found.suited(data).mean == data.mean
    given = found.suited(data, "0.5", "0.25")
    assert (given.mean, given.std) == ((0.5,), (0.25,))
    weights()
    arguments = (*ACCELERATE, *QUICK, "--method", "lrd", "--layers", "blocks.0.*", "--mean", "0.5")
    result = document(*arguments, "--std", "0.25")
    assert (result["data"]["mean"], result["data"]["std"]) == ([0.5], [0.25])
    # the artifact's images are normalised as it was
    assert document("evaluate", "fast", "--model", "mynets:make")["error"] == result["stages"][-1]["error"]


# ---- bad input

MODEL = ("--model", "mynets:make")
REFUSED = {
    "neither": ((), "network, model: give one of them"),
    "both": (("runs/a", *MODEL), "network, model: give one of them"),
    "no colon": (("--model", "mynets.make"), "model='mynets.make': expected package.module:function"),
    "a file": (("--model", "mynets.py:make"), "without its ending: mynets:make"),
    "without its option": (("mynets:make",), "network is given as --model mynets:make"),
    "a path": (("--model", "./mynets:make"), "expected package.module:function"),
    "no module": (("--model", "yournets:make"), "no module 'yournets' here or among what is installed"),
    "no package": (("--model", "your.nets:make"), "no module 'your' here"),
    "no submodule": (("--model", "mynets.sub:make"), "mynets.sub"),
    "no attribute": (("--model", "mynets:mk"), "mynets has no mk"),
    "import fails": (("--model", "broken_module:make"), "importing broken_module raised ZeroDivisionError"),
    "import needs": (("--model", "needing:make"), "importing needing raised ModuleNotFoundError: No module"),
    "no function": (("--model", "mynets:number"), "is of type int, expected a function"),
    "a network": (("--model", "mynets:net"), "is of type Net, expected a function that returns the network"),
    "arguments": (("--model", "mynets:needy"), "raised TypeError: needy() missing 1 required positional"),
    "raises": (("--model", "mynets:broken"), "raised OSError: no weights here"),
    "exits": (("--model", "mynets:leaving"), "raised SystemExit: 3"),
    "text": (("--model", "mynets:text"), "returned a str, expected a torch.nn.Module"),
    "no weights": ((*MODEL, "--weights", "none.pt"), "none.pt: no such file"),
    "no artifact": ((*MODEL, "--weights", "empty"), "empty: no artifact here"),
    "pickled": ((*MODEL, "--weights", "whole.pt"), "whole.pt: no checkpoint of tensors"),
    "refuses": (
        ("--model", "mynets:picky"),
        "refuses an input of 1x1x32x32: LookupError: only on Sundays",
    ),
    "channels": (
        ("--model", "mynets:colour"),
        "refuses an input of 1x1x32x32: RuntimeError: Given groups=1, weight of size [8, 3, 3, 3], expected",
    ),
    "shape": ((*MODEL, "--input", "32x32"), "input='32x32': expected NxCxHxW"),
    "other shape": (
        (*MODEL, "--input", "1x1x64x64"),
        "input='1x1x64x64': the images of digits are 1x32x32",
    ),
    "refused shape": ((*MODEL, "--input", "1x3x32x32"), "refuses an input of 1x3x32x32: RuntimeError"),
    "head": (("--model", "mynets:five"), "its head has 5 outputs, but digits has 10 classes"),
    "maps": (("--model", "mynets:maps"), "scores of shape (1, 10, 30, 30), expected [images, classes]"),
    "answers": (("--model", "mynets:answers"), "gives a dict, expected a tensor of scores"),
    "mean alone": ((*MODEL, "--mean", "0.5"), "mean, std: give both or none"),
    "mean": ((*MODEL, "--mean", "0.5,0.5", "--std", "1"), "mean='0.5,0.5': expected a number"),
    "mean text": ((*MODEL, "--mean", "grey", "--std", "1"), "mean='grey': expected a number"),
    "std": ((*MODEL, "--mean", "0", "--std", "0"), "std='0': expected numbers above 0"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("verb", ["accelerate", "evaluate"])
def test_bad_input_is_one_sentence_and_leaves_nothing(home, verb, arguments, message):
    if verb == "evaluate":
        message = {"network, model: give one of them": "artifact, model: give the folder"}.get(
            message, message
        )
        if arguments[:1] == ("runs/a",):
            message = "runs/a: no such file"
    Path("empty").mkdir()
    torch.save(nn.Linear(2, 2), "whole.pt")
    before = {p for p in home.rglob("*") if "__pycache__" not in p.parts}
    assert message in refused(verb, *arguments)
    assert {p for p in home.rglob("*") if "__pycache__" not in p.parts} == before


def test_weights_that_do_not_fit_are_told_by_name_and_size_at_most_ten_of_each():
    extra = {f"extra.{i:02}": torch.zeros(1) for i in range(12)}
    weights(**{"head.bias": None, "head.weight": torch.zeros(10, 9), **extra})
    sentence = refused(*ACCELERATE)
    assert (
        "weights.safetensors: does not fit mynets:make: missing head.bias; unexpected extra.00," in sentence
    )
    assert "extra.09 and 2 more; wrong shape of head.weight (10, 9), expected (10, 8)" in sentence
    assert "extra.10" not in sentence


def test_an_artifact_names_its_function_and_imports_nothing(home):
    Path("trap.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    qx.save(made(), "mine", factory="trap:make")
    for arguments in (("evaluate", "mine"), ("accelerate", "mine"), ("compare", "mine")):
        sentence = refused(*arguments)
        assert "made by 'trap:make', and nothing that a file names is imported" in sentence
        assert "--model trap:make --weights mine" in sentence
    assert 'qx.load("mine", factory=make)' in refused("train", "--start", "mine")
    assert not (home / "executed").exists()
    assert "not both" in refused("evaluate", "mine", *MODEL, "--weights", "w.pt")
    qx.save(qx.networks.build("rrn8", in_channels=1), "theirs")
    assert "theirs holds rrn8, which needs none" in refused("evaluate", "theirs", *MODEL)


def test_a_network_of_the_package_has_two_lines(tmp_path):
    qx.save(qx.networks.build("cifar-resnet8", 10, 1), "theirs")
    done = call("accelerate", "theirs", *QUICK, "--method", "lrd", "--layers", "layer1.0.conv1")
    lines = ["import quincunx as qx", 'model = qx.fuse(qx.load("fast/model"))']
    assert [line.strip() for line in done.stdout.partition("to use it:\n")[2].splitlines()] == lines
    page = Path("fast/report.html").read_text()
    assert "import quincunx as qx\nmodel = qx.fuse(qx.load(&#34;fast/model&#34;))" in page
