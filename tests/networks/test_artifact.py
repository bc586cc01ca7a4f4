"""Artifacts: back to the bit, whole or not at all, and nothing is ever unpickled."""

import errno
import hashlib
import importlib
import json
import os
import pickle
import resource
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quincunx as qx
from quincunx import writing
from quincunx.networks.spec import read_spec
from quincunx.reading import read_json
from quincunx.writing import write_atomically, write_json

NETWORKS = {
    "plain": ("rrn8", {}),
    "bottleneck": ("rsbn8", {"num_classes": 3, "in_channels": 1}),
    "quarter": ("rsbn14", {"sampling": qx.QUARTER}),
    "pooled": ("rsbn8", {"sampling": "1/4", "down": "avgpool"}),
    "cosets": ("rsbn8", {"sampling": qx.Cosets(3, [(0, 0), (2, 1)])}),
    "random": ("csbn20", {"sampling": qx.Random(0.3, 7)}),
    "channels": ("crn11", {}),
}


def network(name="rsbn8", seed=0, **settings):
    """A network whose statistics are not those it starts with."""
    torch.manual_seed(seed)
    model = qx.networks.build(name, **{"width": 4, **settings})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(12)
    return model


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def respec(folder, change):
    """Alter an artifact's spec in place."""
    spec = json.loads((folder / "spec.json").read_text())
    change(spec)
    (folder / "spec.json").write_text(json.dumps(spec))


def put_weights(folder, content):
    """Replace the weights and make their checksum right."""
    (folder / "weights.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    respec(folder, lambda spec: spec["weights"].update(sha256=digest))


@pytest.fixture
def saved(tmp_path):
    return qx.save(network(), tmp_path / "runs" / "model", info={"test_error": 0.25})


# ---- round trip


@pytest.mark.parametrize(("name", "settings"), NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_round_trip_is_equal_to_the_bit(tmp_path, name, settings, layout):
    model = network(name, **settings).to(memory_format=layout).eval()
    x = torch.randn(2, settings.get("in_channels", 3), 16, 16).contiguous(memory_format=layout)
    with torch.no_grad():
        wanted = model(x)
        torch.manual_seed(99)  # whatever the new network starts with
        loaded = qx.load(qx.save(model, tmp_path / "model")).to(memory_format=layout)
        assert torch.equal(loaded(x), wanted)
    assert not any(module.training for module in loaded.modules())
    assert loaded.quincunx_spec == model.quincunx_spec
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value)
        assert state[key].dtype == value.dtype


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    again = qx.save(qx.load(saved), tmp_path / "again", info={"test_error": 0.25})
    assert contents(again) == contents(saved)


def test_the_folder_holds_two_files_that_others_can_read(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["spec.json", "weights.safetensors"]
    assert read_spec(saved)["info"] == {"test_error": 0.25}
    assert set(safetensors.torch.load_file(saved / "weights.safetensors")) == set(network().state_dict())
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_strings_and_links_are_paths_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for seed in (1, 2):
        assert str(qx.save(network(seed=seed), "link")) == "link"
        assert torch.equal(qx.load("link").stem.weight, network(seed=seed).stem.weight)
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "real")
    assert torch.equal(qx.load(".").stem.weight, network(seed=2).stem.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_an_older_artifact_is_replaced(saved):
    qx.save(network("rrn8", seed=5), saved)
    assert torch.equal(qx.load(saved).stem.weight, network("rrn8", seed=5).stem.weight)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


# ---- what is refused


FOREIGN = {
    "other-files": {"thesis.tex": b"years of work"},
    "beside-an-artifact": {"notes.txt": b"x", "spec.json": b'{"format": "quincunx-artifact"}'},
    "another-programs-spec": {"spec.json": b'{"format": "elsewhere"}'},
    "a-list": {"spec.json": b"[]"},
    "no-json": {"spec.json": b"\xff\xfe"},
    "weights-only": {"weights.safetensors": b"of another program"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_folder_is_neither_replaced_nor_loaded(tmp_path, files):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="not replaced"):
        qx.save(network(), folder)
    with pytest.raises((ValueError, FileNotFoundError), match="mine"):
        qx.load(folder)
    assert contents(folder) == files
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        qx.save(network(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 4, 3))])
def test_a_model_without_a_spec_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"no spec to build it from again.*networks\.build"):
        qx.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("info", [{"error": float("nan")}, {"error": torch.zeros(1)}])
def test_info_that_is_no_json_keeps_the_older_artifact(saved, info):
    before = contents(saved)
    with pytest.raises((ValueError, TypeError)):
        qx.save(network(seed=3), saved, info=info)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        qx.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"spec\.json is missing"):
        qx.load(tmp_path)
    (saved / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors"):
        qx.load(saved)


@given(st.data())
def test_any_damage_to_the_weights_is_noticed(tmp_path_factory, data):
    folder = qx.save(network("rrn8", width=1), tmp_path_factory.mktemp("a") / "model")
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors: corrupt, its SHA-256"):
        qx.load(folder)


SPEC_CHANGES = {
    "foreign": (lambda s: s.update(format="gguf"), "not the spec of a quincunx artifact"),
    "newer": (lambda s: s.update(version=3), "version 3, but this program reads versions 1 and 2"),
    "no-version": (lambda s: s.pop("version"), "version None"),
    "no-model": (lambda s: s.pop("model"), "incomplete or altered"),
    "model-list": (lambda s: s.update(model=[]), "incomplete or altered"),
    "no-settings": (lambda s: s["model"].pop("settings"), "incomplete or altered"),
    "settings-number": (lambda s: s["model"].update(settings=3), "incomplete or altered"),
    "other-kind": (lambda s: s["model"].update(kind="pickle"), "incomplete or altered"),
    "weights-list": (lambda s: s.update(weights=[]), "incomplete or altered"),
    "no-checksum": (lambda s: s["weights"].pop("sha256"), "incomplete or altered"),
    "other-checksum": (lambda s: s["weights"].update(sha256="0" * 64), "corrupt"),
    "checksum-null": (lambda s: s["weights"].update(sha256=None), "corrupt"),
    "above": (lambda s: s["weights"].update(file="../weights.safetensors"), "incomplete or altered"),
    "below": (lambda s: s["weights"].update(file="a/weights.safetensors"), "incomplete or altered"),
    "absolute": (lambda s: s["weights"].update(file="/etc/passwd"), "incomplete or altered"),
    "file-number": (lambda s: s["weights"].update(file=3), "incomplete or altered"),
    "unknown-network": (lambda s: s["model"].update(name="rsbn9"), "rsbn9"),
    "name-number": (lambda s: s["model"].update(name=8), "name=8"),
    "unknown-setting": (lambda s: s["model"]["settings"].update(colour=1), "colour"),
    "bad-width": (lambda s: s["model"]["settings"].update(width="4"), "width='4'"),
    "bad-classes": (lambda s: s["model"].update(num_classes=-1), "num_classes=-1"),
    "bad-sampling": (lambda s: s["model"]["settings"].update(sampling="5/4"), "5/4"),
    "bad-sampling-type": (lambda s: s["model"]["settings"].update(sampling=[2]), "sampling"),
    "bad-down": (lambda s: s["model"]["settings"].update(down="up"), "down"),
    "more-classes": (lambda s: s["model"].update(num_classes=11), "does not fit rsbn8"),
    "deeper": (lambda s: s["model"].update(name="rsbn14"), "does not fit rsbn14"),
    "dense": (lambda s: s["model"].update(name="rrn8"), "does not fit rrn8"),
}


@pytest.mark.parametrize(("change", "message"), SPEC_CHANGES.values(), ids=SPEC_CHANGES.keys())
def test_an_altered_spec_is_refused(saved, change, message):
    respec(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        qx.load(saved)
    assert str(saved) in str(caught.value)


def test_weights_outside_the_folder_are_not_read(saved, tmp_path):
    other = qx.save(network(seed=4), tmp_path / "other")
    digest = hashlib.sha256((other / "weights.safetensors").read_bytes()).hexdigest()
    for file in ("../../other/weights.safetensors", str(other / "weights.safetensors")):
        respec(saved, lambda spec, file=file: spec["weights"].update(file=file, sha256=digest))
        with pytest.raises(ValueError, match="incomplete or altered"):
            qx.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00", '{"a": 1}}', "[" * 100_000, "1" * 10_000])
def test_a_spec_that_is_no_json_is_refused(saved, text):
    (saved / "spec.json").write_text(text)
    with pytest.raises(ValueError, match=r"spec\.json"):
        qx.load(saved)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(saved, tmp_path):
    trap = tmp_path / "executed"
    torch.save(Payload(trap), tmp_path / "payload.pt")
    for content in (pickle.dumps(Payload(trap)), (tmp_path / "payload.pt").read_bytes()):
        put_weights(saved, content)
        with pytest.raises(ValueError, match="does not fit"):
            qx.load(saved)
        assert not trap.exists()


def test_damaged_weights_with_a_right_checksum_are_refused(saved):
    content = (saved / "weights.safetensors").read_bytes()
    for broken in (b"", content[:4], content[:200], content[:-1], b"\xff" * 8 + content[8:]):
        put_weights(saved, broken)
        with pytest.raises(ValueError, match="does not fit rsbn8"):
            qx.load(saved)


# ---- a network that a function of the user makes


class Own(nn.Module):
    """Tied weights, overlapping views of a larger tensor, and a forward of its own."""

    def __init__(self, channels=4):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3)])
        self.encode = nn.Linear(channels, 5, bias=False)
        self.decode = nn.Linear(channels, 5, bias=False)
        self.decode.weight = self.encode.weight
        table = torch.arange(100.0).view(10, 10)
        self.register_buffer("rows", table[2:4])
        self.register_buffer("more", table[3:5])

    def forward(self, x):
        for part in self.parts:
            x = torch.relu(part(x))
        x = x.mean((2, 3))
        return self.encode(x) + 2 * self.decode(x) + self.rows.sum() - self.more.mean()


def accelerated(seed=0):
    torch.manual_seed(seed)
    return qx.accelerate(Own(), qx.LowRank(rank=3), example_input=torch.zeros(1, 3, 9, 9)).model


def test_a_network_of_the_user_comes_back_with_its_function(tmp_path):
    model, x = accelerated().eval(), torch.randn(2, 3, 9, 9)
    qx.save(model, tmp_path / "own", factory="mynets.small:Own.make")
    assert read_spec(tmp_path / "own")["model"]["factory"] == "mynets.small:Own.make"
    torch.manual_seed(99)
    loaded = qx.load(tmp_path / "own", factory=Own)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    assert type(loaded.parts[1]) is qx.SeparableConv2d
    assert loaded.encode.weight is loaded.decode.weight
    # what was loaded can be saved without naming the function again, and reads the same
    again = qx.save(loaded, tmp_path / "again")
    assert contents(again) == contents(tmp_path / "own")
    # only once a function is named, or noted, is a network one that can be saved
    with pytest.raises(ValueError, match=r"no spec to build it from again.*factory="):
        qx.save(model, tmp_path / "unnamed")


def test_a_named_function_is_never_imported_by_load(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.hit').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    qx.save(Own(), tmp_path / "own", factory="trap:make")
    with pytest.raises(
        ValueError, match="made by 'trap:make', and nothing that a file names is imported"
    ) as told:
        qx.load(tmp_path / "own")
    line = f'from trap import make; qx.load("{tmp_path}/own", factory=make)'
    assert str(told.value).endswith(line)
    with pytest.raises(TypeError, match="factory='trap:make': expected a function"):
        qx.load(tmp_path / "own", factory="trap:make")
    with pytest.raises(TypeError, match=r"factory=Own\("):
        qx.load(tmp_path / "own", factory=Own())
    assert not (tmp_path / "trap.hit").exists()


@pytest.mark.parametrize(
    "text", ["make", "mynets.make", ":make", "mynets:", "my nets:make", "a:b:c", "os.:x", 3]
)
def test_a_factory_of_another_form_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"factory=.*: expected package\.module:function"):
        qx.save(Own(), tmp_path / "own", factory=text)
    assert list(tmp_path.iterdir()) == []
    qx.save(Own(), tmp_path / "own", factory="mynets:make")
    respec(tmp_path / "own", lambda spec: spec["model"].update(factory=text))
    with pytest.raises(ValueError, match="incomplete or altered"):
        qx.load(tmp_path / "own", factory=Own)


def wider():
    return Own(channels=6)


def other():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5))


def failing():
    raise LookupError("as the function of the user says")


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        (
            wider,
            ValueError,
            r"does not fit mynets:make: wrong shape of parts\.0\.weight \(4, 3, 3, 3\), expected \(6,",
        ),
        (
            other,
            ValueError,
            r"missing 0\.weight, 0\.bias, 1\.weight, 1\.bias; unexpected encode\.weight, more, parts",
        ),
        (dict, TypeError, "factory: returned a dict, expected a torch.nn.Module"),
        (failing, LookupError, "as the function of the user says"),
    ],
)
def test_a_function_that_makes_another_network_is_refused(tmp_path, factory, kind, message):
    qx.save(Own(), tmp_path / "own", factory="mynets:make")
    with pytest.raises(kind, match=message):
        qx.load(tmp_path / "own", factory=factory)


def test_replaced_layers_that_the_function_does_not_make_are_refused(tmp_path):
    qx.save(accelerated(), tmp_path / "own", factory="mynets:make")
    with pytest.raises(ValueError, match=r"spec\.json: does not fit mynets:make's network"):
        qx.load(tmp_path / "own", factory=other)


def test_a_function_for_an_artifact_that_needs_none_is_refused(saved):
    with pytest.raises(ValueError, match=r"factory: .* holds rsbn8, which needs none"):
        qx.load(saved, factory=Own)


def test_a_named_function_wins_over_the_spec_of_the_package(tmp_path):
    # a head of the user's own: the spec no longer builds this network
    def make():
        model = network("rrn8")
        model.extra = nn.Linear(2, 2)
        return model

    qx.save(make(), tmp_path / "own", factory="mynets:make")
    assert qx.load(tmp_path / "own", factory=make).quincunx_spec["factory"] == "mynets:make"


def test_a_state_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    class Remembers(Own):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(
        ValueError, match="its state has a dict under '_extra_state'; an artifact holds tensors"
    ):
        qx.save(Remembers(), tmp_path / "own", factory="mynets:make")
    assert list(tmp_path.iterdir()) == []


# ---- a full disk


@contextmanager
def no_room_beyond(size):
    """Within: the kernel refuses to let a file of this process grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 5000])
def test_no_room_keeps_the_older_artifact(saved, room):
    before = contents(saved)
    with no_room_beyond(room), pytest.raises(OSError, match="model"):
        qx.save(network(seed=3), saved)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    qx.save(network(seed=3), saved)
    assert torch.equal(qx.load(saved).stem.weight, network(seed=3).stem.weight)


# the weights, the spec, their folder; the modes of both
CALLS = [("os.fsync", 0), ("os.fsync", 1), ("os.fsync", 2), ("os.chmod", 0), ("os.chmod", 1)]
# without an exchange in one step: the older artifact steps aside, the new one takes its place
RENAMES = [("os.rename", 0), ("os.rename", 1), ("quincunx.writing._exchange", 0)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("call", "number"), CALLS + RENAMES)
def test_whichever_call_fails_the_older_artifact_survives(saved, monkeypatch, call, number, error):
    before = contents(saved)
    if call == "os.rename":
        monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    home, _, name = call.rpartition(".")
    module = importlib.import_module(home)
    real, calls = getattr(module, name), []

    def instead(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(module, name, instead)
    with pytest.raises(type(error)) as caught:
        qx.save(network(seed=3), saved)
    monkeypatch.undo()
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    if isinstance(caught.value, OSError):
        assert str(caught.value) == f"[Errno 28] No space left on device: '{saved}'"


def test_a_first_artifact_that_fails_leaves_nothing(tmp_path):
    with no_room_beyond(100), pytest.raises(OSError, match="written"):
        qx.save(network(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ---- files


@given(old=st.binary(max_size=50), new=st.binary(min_size=1, max_size=50))
def test_write_atomically_writes_all_or_nothing(tmp_path_factory, old, new):
    path = tmp_path_factory.mktemp("a") / "deep" / "file"
    write_atomically(path, lambda p: p.write_bytes(old))
    assert path.read_bytes() == old

    def half(p):
        p.write_bytes(new)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_bytes() == old
    write_atomically(path, lambda p: p.write_bytes(new))
    assert path.read_bytes() == new
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_is_strict_and_errors_name_the_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, "ü"]})
    assert read_json(path) == {"a": [1, None, "ü"]}
    with pytest.raises(ValueError):
        write_json(path, float("inf"))
    assert read_json(path) == {"a": [1, None, "ü"]}
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not a JSON file"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
