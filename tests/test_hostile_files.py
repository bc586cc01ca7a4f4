"""Files that somebody else, a bad disk or a mistake has changed: one sentence that names the file.

QUINCUNX_FUZZ=2000 tries as many changes of each kind of file.
"""

import copy
import json
import os
import random
import warnings
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from torch import nn

import quincunx as qx
from quincunx.acceleration import scores
from quincunx.acceleration.journal import FolderJournal
from quincunx.acceleration.scores import Scores
from quincunx.measure.latency import Timing
from quincunx.networks.spec import read_spec
from quincunx.reading import Entry, read_json, sealed, sha256_of
from quincunx.surgery.calibration import Layer
from quincunx.surgery.method import Replacement
from quincunx.train.checkpoint import read_checkpoint, write_checkpoint

TIMES = int(os.environ.get("QUINCUNX_FUZZ", "40"))
ODD = [
    None, True, 0, -1, 1, 2, 2**31, 2**63, 10**30, -(2**40), 0.5, 1e300, "", "conv", "\n", "\ud800",
    "x" * 5000, [], {}, [[]], [1, 2], {"kind": "conv"}, {"a": {"b": []}},
]  # fmt: skip


def containers(value):
    """Every object and list within a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def restructured(value, dice):
    """A JSON value of another form: entries gone, doubled, renamed, of other types and sizes."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 3)):
        places = [place for place in containers(value) if place]
        if not places:
            return value
        place = dice.choice(places)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = dice.choice(keys)
        kind = dice.randrange(5)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[dice.choice(["kind", "as", "name", "x\ny", ""])] = place.pop(key)
        elif kind == 1:
            place.append(copy.deepcopy(place[key]))
        elif kind == 2 and type(place[key]) in (int, float):
            place[key] = place[key] * dice.choice([-1, 0, 2, 1000, 2**31])
        else:
            place[key] = copy.deepcopy(dice.choice(ODD))
    return value


def corrupted(content, dice):
    """Bytes of which some are others, gone, or there twice."""
    content = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(content) + 1)
        kind = dice.randrange(4)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at : at + dice.randint(1, 9)]
        elif kind == 2:
            content[at:at] = content[max(0, at - 9) : at]
        elif at < len(content):
            content[at] = dice.choice([0, 0xFF, dice.randrange(256), content[at] ^ 1 << dice.randrange(8)])
    return bytes(content)


def mutate(path, dice):
    """Change a file in place."""
    content = path.read_bytes()
    if path.suffix == ".json" and dice.random() < 0.7:
        text = json.dumps(restructured(json.loads(content), dice))
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(corrupted(content, dice))


def survives(read, folder):
    """Reading works, or refuses with one sentence that names a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except (ValueError, OSError) as error:
            refusal = str(error)
        else:
            return True
    assert str(folder) in refusal, f"names no file: {refusal}"
    assert "\n" not in refusal
    return False


def fuzz(folder, make, read, seal=None):
    """Change each file that ``make`` writes again and again."""
    make()
    originals = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in originals:
        dice = random.Random(f"{path.name} 1")
        for _ in range(TIMES):
            for other, content in originals.items():
                other.write_bytes(content)
            mutate(path, dice)
            if seal is not None and dice.random() < 0.8:
                seal(folder)
            survives(read, folder)


# ---------------------------------------------------------------- what is written before


def own():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    torch.manual_seed(0)
    return model.eval()


def artifact_of(folder, kind):
    if kind == "named":
        model = qx.networks.build("rsbn8", width=2, num_classes=3, sampling=qx.Cosets(2, [(1, 0)]))
        return qx.save(model.eval(), folder, info={"data": {"classes": ["a", "b", "c"]}})
    method = {"factory": qx.LowRank(2, data=False), "codebooks": qx.QCNN(2, 4)}[kind]
    images = torch.randn(8, 3, 8, 8)
    return qx.save(qx.accelerate(own(), method, calibration=[images]).model, folder, factory="mynets:own")


def reseal_artifact(folder):
    """Make the checksum right, so that what is behind it is tried."""
    for spec in folder.rglob("spec.json"):
        with suppress(ValueError, TypeError, KeyError, IndexError):
            content = json.loads(spec.read_bytes())
            content["weights"]["sha256"] = sha256_of(spec.with_name("weights.safetensors"))
            spec.write_text(json.dumps(content), errors="surrogatepass")


@pytest.mark.parametrize("kind", ["named", "factory", "codebooks"])
def test_artifacts(tmp_path, kind):
    factory = None if kind == "named" else own
    fuzz(
        tmp_path,
        lambda: artifact_of(tmp_path / "m", kind),
        lambda: qx.load(tmp_path / "m", factory=factory),
        reseal_artifact,
    )


def layer():
    return Layer("0.conv", ("0.conv",), nn.Conv2d(3, 6, 3), input_shape=(1, 3, 8, 8))


def journal(folder):
    return FolderJournal(folder, {"method": {"name": "lrd", "rank": 2}, "weights": 3.5})


def reseal_journal(folder):
    for path in folder.glob("*.json"):
        with suppress(ValueError, TypeError, AttributeError):
            content = json.loads(path.read_bytes())
            weights = path.with_suffix(".safetensors")
            if "spec" in content and weights.exists():
                content.pop("sha256", None)
                path.write_text(json.dumps(sealed({**content, "weights": sha256_of(weights)})))


def test_journals(tmp_path):
    made = qx.accelerate(nn.Sequential(layer().module), qx.LowRank(2, data=False)).model
    spec = made.quincunx_replaced["0"]
    fuzz(
        tmp_path,
        lambda: journal(tmp_path).keep(layer(), Replacement(made[0], spec, {"error": 0.1})),
        lambda: journal(tmp_path).recall(layer()),
        reseal_journal,
    )


def test_a_finished_layer_whose_weights_are_of_another_is_refused(tmp_path):
    made = qx.accelerate(nn.Sequential(layer().module), qx.LowRank(2, data=False)).model
    journal(tmp_path).keep(layer(), Replacement(made[0], made.quincunx_replaced["0"], {}))
    assert journal(tmp_path).recall(layer()).module is not None
    (weights,) = tmp_path.glob("*.safetensors")
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: value + 1 for name, value in state.items()}, weights)
    with pytest.raises(
        ValueError, match=r"0\.conv.*\.safetensors: the weights of layer '0.conv' are not there"
    ):
        journal(tmp_path).recall(layer())
    weights.unlink()
    with pytest.raises(ValueError, match="No such file"):
        journal(tmp_path).recall(layer())


def test_checkpoints(tmp_path):
    model = qx.networks.build("rrn8", width=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "identity": json.dumps({"network": "rrn8"}),
        "history": "[]",
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 2.0},
    }
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, content)
    read = read_checkpoint(path)
    assert all(torch.equal(value, read["model"][name]) for name, value in model.state_dict().items())
    optimizer.load_state_dict(read["optimizer"])
    fuzz(tmp_path, lambda: None, lambda: read_checkpoint(path))


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (9,)])
def test_a_checkpoint_cannot_claim_more_numbers_than_it_stores(tmp_path, shape):
    # one number, which torch writes once
    write_checkpoint(tmp_path / "c.pt", {"model": {"w": torch.zeros(1).expand(shape)}})
    with pytest.raises(ValueError, match=r"c\.pt: corrupt.* claims more than its \d+ stored bytes"):
        read_checkpoint(tmp_path / "c.pt")


# ---------------------------------------------------------------- scores


@pytest.fixture
def _timed(monkeypatch):
    """Times by the number of weights."""

    def measure(models, example, *, rounds, **_):
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        return {name: Timing(name, 1, (1e-6 * size,) * rounds) for name, size in sizes.items()}

    monkeypatch.setattr(scores, "measure_models", measure)
    monkeypatch.setattr(scores, "inference_form", lambda model, *_: copy.deepcopy(model).eval())


class Table:
    """A search's table, and reading it again."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Flatten(),
            nn.Linear(512, 4),
        ).eval()
        self.data = [torch.randn(4, 3, 8, 8)]
        self.scores = Scores(
            self.model, self.data, [qx.LowRank(2, data=False)], None, None, lambda what, share: None
        )
        self.path = folder / "scores.json"

    def write(self):
        self.scores.fill(self.path, None)
        self.scores.choices["speedup 2"] = {
            "among": [], "met": True, "chosen": [{"layers": ["0"], "method": "LowRank"}],
            "attempts": [{"layers": 1, "before": 1.0, "predicted": 0.5, "after": 0.5, "speedup": 2.0}],
        }  # fmt: skip
        self.scores.write(self.path)

    def read(self):
        for row in self.scores.rows:
            row.loss = row.seconds_saved = row.why_not = None
        self.scores._recall(self.path)
        for row in self.scores.usable():
            self.scores._sketch([(self.scores._unit(row), self.scores._specs_of(row))])


@pytest.mark.usefixtures("_timed")
def test_scores(tmp_path):
    table = Table(tmp_path)
    fuzz(tmp_path, table.write, table.read)


@pytest.mark.usefixtures("_timed")
@pytest.mark.parametrize("name", ["identity", "rows", "specs", "choices", "reference"])
def test_scores_without_an_entry_are_refused(tmp_path, name):
    table = Table(tmp_path)
    table.write()
    content = json.loads(table.path.read_text())
    del content[name]
    table.path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"scores\.json: (incomplete or altered, '|scores of another)"):
        table.read()


# ---------------------------------------------------------------- sizes that a file claims


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 2**40},
        {"in_channels": 2**62},
        {"settings": {"width": 2**33}},
        {"name": "rrn600000002"},
        {"name": "pyramidnet110-a999999999"},
        {"name": "resnet50", "settings": {}},
    ],
    ids=str,
)
def test_a_spec_cannot_ask_for_memory_that_its_weights_do_not_fill(tmp_path, monkeypatch, change):
    folder = qx.save(qx.networks.build("rrn8", width=2), tmp_path / "m")
    path = folder / "spec.json"
    spec = json.loads(path.read_text())
    spec["model"].update(change)
    path.write_text(json.dumps(spec))
    asked = []
    real = torch.empty

    def empty(*sizes, **options):
        made = real(*sizes, **options)
        if made.device.type == "cpu":
            asked.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match=str(folder)):
        qx.load(folder)
    assert sum(asked) < 100_000


def test_a_replaced_layer_cannot_either(tmp_path):
    folder = artifact_of(tmp_path / "m", "factory")
    path = folder / "spec.json"
    spec = json.loads(path.read_text())
    next(iter(spec["model"]["replaced"].values()))["out_channels"] = 2**34
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"weights\.safetensors: does not fit mynets:own: 0: .*wrong shape"):
        qx.load(folder, factory=own)


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: expected a file"):
        read_json(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: expected a file"):
        read_checkpoint(tmp_path / "c.pt")
    (tmp_path / "m").mkdir()
    os.mkfifo(tmp_path / "m" / "spec.json")
    with pytest.raises(FileNotFoundError, match=r"no artifact here"):
        read_spec(tmp_path / "m")


def test_a_json_file_that_memory_cannot_hold_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(ValueError, match=r"large\.json: a JSON file of 4,398,046,511,104 bytes: claims"):
        read_json(path)


@pytest.mark.parametrize("text", ["NaN", "[1, Infinity]", '{"a": -Infinity}'])
def test_numbers_that_strict_json_has_not_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: not a JSON file \(-?[IN]"):
        read_json(tmp_path / "a.json")


def test_an_entry_says_where_it_stands():
    entry = Entry({"rows": [{"n": 1, "ok": True, "x y": {}}]}, "f.json")
    row = entry["rows"].items()[0]
    assert (row["n"].integer(), row["n"].number(), row["ok"].boolean()) == (1, 1.0, True)
    for ask, message in (
        (lambda: row["m"], "rows[0]: 'm' is missing"),
        (lambda: row["ok"].integer(), "rows[0].ok: expected a whole number, got True"),
        (lambda: row["n"].text("a", "b"), "rows[0].n: expected a or b, got 1"),
        (lambda: row["n"]["deeper"], "rows[0].n: expected an object, got 1"),
        (lambda: row["x y"].items(), "rows[0].'x y': expected a list, got {}"),
        (lambda: entry["rows"].items(2), "rows: expected a list of 2, got"),
        (lambda: row["n"].number(2.0), "rows[0].n: expected a number of at least 2, got 1"),
    ):
        with pytest.raises(ValueError) as caught:
            ask()
        assert str(caught.value).startswith(f"f.json: incomplete or altered, {message}")
