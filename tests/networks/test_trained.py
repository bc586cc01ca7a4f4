"""Trained results: entered in a registry, fetched into the cache, checked, and built from by name."""

import errno
import functools
import http.server
import json
import shutil
import threading

import pytest
import torch

import quincunx as qx
from helpers.commands import call, document, refused
from helpers.training import pictures
from quincunx import writing
from quincunx.experiments.publishing import publish
from quincunx.networks import trained
from quincunx.networks.trained import cached, fetch, registry
from quincunx.train.loop import fit
from quincunx.train.recipes import Recipe

DATA = pictures(count=40, size=8, channels=3)
RECIPE = Recipe("tiny", epochs=1, batch_size=20, lr=0.01, augment="none")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(0)
    fit(qx.networks.build("rsbn8", 3, 3, width=4), DATA, RECIPE, out)
    # as if it came from a commit without changes
    result = json.loads((out / "run.json").read_text())
    result["environment"]["commit"] = "0123456789ab"
    (out / "run.json").write_text(json.dumps(result))
    return out


@pytest.fixture
def served(run, tmp_path, monkeypatch):
    """A folder with one result, which is also the address, and an empty cache."""
    monkeypatch.setenv("QUINCUNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QUINCUNX_RESULTS", str(tmp_path / "served"))
    publish(run, tmp_path / "served", name="tiny", licence="Apache-2.0")
    return tmp_path / "served"


def weights_of(place, name="tiny", version=1):
    return place / name / str(version) / "weights.safetensors"


def test_an_entry_says_what_was_trained_and_how(served, run):
    [result] = registry().values()
    told = json.loads((run / "run.json").read_text())
    assert (result.name, result.version) == ("tiny", 1)
    assert result.network == told["network"]
    facts = result.facts
    assert facts["score"]["value"] == told["test_error"]
    assert facts["score"]["images"] == len(DATA.test)
    assert (facts["recipe"], facts["seconds"]) == (told["recipe"], told["seconds"])
    assert (facts["commit"], facts["licence"]) == ("0123456789ab", "Apache-2.0")
    for file in result.files:
        there = served / "tiny" / "1" / file.name
        assert there.stat().st_size == file.bytes
        assert qx.networks.trained.sha256_of(there) == file.sha256


def test_a_result_is_fetched_once_and_then_needs_no_address(served, run, monkeypatch):
    seen = []
    place = fetch("tiny", progress=lambda done, whole: seen.append((done, whole)))
    assert seen[-1][0] == seen[-1][1] == sum(f.stat().st_size for f in place.iterdir())
    for file in (run / "model").iterdir():
        assert (place / file.name).read_bytes() == file.read_bytes()
    assert list(cached()) == ["tiny"]
    before = weights_of(served).stat().st_mtime_ns
    shutil.rmtree(served / "tiny")
    assert fetch("tiny") == place, "what is there and whole is not downloaded again"
    assert before
    monkeypatch.delenv("QUINCUNX_RESULTS")
    assert fetch("tiny", newest=False) == place
    with pytest.raises(ValueError, match="QUINCUNX_RESULTS: no address of trained results is set"):
        fetch("tiny")


def test_a_network_is_built_with_trained_weights(served, run):
    x = torch.randn(2, 3, 8, 8)
    own = qx.load(run / "model")
    for weights in ("tiny", run / "model"):
        model = qx.networks.build("rsbn8", weights=weights)
        assert not model.training
        assert torch.equal(model(x), own(x))
    assert qx.networks.build("rsbn8", 3, 3, width=4, weights="tiny").quincunx_spec == own.quincunx_spec
    for given, said in [
        ({"num_classes": 5}, "num_classes=5: the result 'tiny' has num_classes 3"),
        ({"width": 8}, "width=8: the result 'tiny' has width 4"),
        ({"sampling": qx.QUARTER}, "the result 'tiny' has its own sampling"),
    ]:
        with pytest.raises(ValueError, match=said):
            qx.networks.build("rsbn8", weights="tiny", **given)
    with pytest.raises(ValueError, match="weights='tiny': of rsbn8, not of 'rrn8'"):
        qx.networks.build("rrn8", weights="tiny")
    with pytest.raises(TypeError, match="weights=3: expected the name"):
        qx.networks.build("rsbn8", weights=3)


def test_another_version_is_found_and_the_old_one_stays(served, run, tmp_path):
    first = fetch("tiny")
    assert publish(run, served, name="tiny", licence="MIT").version == 1, (
        "the same files are the same version"
    )
    other = tmp_path / "other"
    shutil.copytree(run, other)
    model = qx.load(run / "model")
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    spec = json.loads((run / "model" / "spec.json").read_text())
    qx.save(model, other / "model", info=spec["info"])
    assert publish(other, served, name="tiny", licence="MIT").version == 2
    assert fetch("tiny", newest=False) == first
    second = fetch("tiny")
    assert (first.name, second.name) == ("1", "2")
    assert first.exists()
    assert cached()["tiny"].version == 2
    assert fetch("tiny", newest=False) == second


@pytest.mark.parametrize("damage", ["altered", "longer", "shorter", "missing", "swapped"])
def test_what_differs_from_its_checksum_is_not_kept(served, damage, tmp_path):
    path = weights_of(served)
    content = path.read_bytes()
    expected = ValueError
    if damage == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        said = "has the checksum .*damaged or altered, and not kept"
    elif damage == "longer":
        path.write_bytes(content + b"x")
        said = "longer than the .* bytes of the registry"
    elif damage == "shorter":
        path.write_bytes(content[:-1])
        expected, said = ConnectionError, "ended after"
    elif damage == "missing":
        path.unlink()
        expected, said = ConnectionError, "cannot be read .No such file"
    else:
        entries = json.loads((served / "registry.json").read_text())
        entries["results"][0]["network"]["name"] = "rrn8"
        (served / "registry.json").write_text(json.dumps(entries))
        said = "another network than its entry"
    with pytest.raises(expected, match=said):
        fetch("tiny")
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert left == [], "no part of it is left"
    # mended at the source, it is fetched
    path.write_bytes(content)
    if damage == "swapped":
        entries["results"][0]["network"]["name"] = "rsbn8"
        (served / "registry.json").write_text(json.dumps(entries))
    assert fetch("tiny").is_dir()


def test_damage_in_the_cache_is_found_and_mended(served):
    place = fetch("tiny")
    path = place / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    qx.networks.build("rsbn8", weights="tiny")
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_nothing_and_is_one_sentence(served, tmp_path, monkeypatch):
    real = trained.hashlib.sha256

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trained.hashlib, "sha256", full)
    said = refused("fetch", "tiny", code=1)
    assert "No space left on device" in said
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    monkeypatch.setattr(trained.hashlib, "sha256", real)
    monkeypatch.setattr(trained.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    assert "MB of disk, 0.0 are free" in refused("fetch", "tiny", code=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema: expected 1; a newer quincunx may read it"),
        ({"kind": "train"}, "kind: expected trained-results"),
        ({"results": [{"name": "../../etc"}]}, "expected lower-case letters"),
        ({"results": 3}, "results: expected a list"),
    ],
)
def test_a_registry_that_is_none_is_refused(served, change, said):
    content = {**json.loads((served / "registry.json").read_text()), **change}
    (served / "registry.json").write_text(json.dumps(content))
    assert said in refused("fetch")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 0),
        ("seconds", "long"),
        ("licence", None),
        ("network", []),
        ("files", []),
        ("score", {"name": "x"}),
        ("files", [{"name": "../spec.json", "bytes": 1, "sha256": "0" * 64}] * 2),
        ("files", [{"name": "spec.json", "bytes": 1, "sha256": "0" * 64}] * 2),
        ("files", [{"name": "spec.json", "bytes": 1, "sha256": "zz"}] * 2),
    ],
)
def test_an_entry_that_is_incomplete_is_refused(served, key, value):
    content = json.loads((served / "registry.json").read_text())
    content["results"][0][key] = value
    (served / "registry.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"registry\.json: incomplete or altered, results\[0\]"):
        registry()
    for text in ("{", "[" * 100_000, "\x00"):
        (served / "registry.json").write_text(text)
        with pytest.raises(ValueError, match=r"registry\.json: (not a JSON file|incomplete)"):
            registry()


def test_addresses_and_names_that_are_none(served, monkeypatch):
    assert "not among the trained results" in refused("fetch", "tinny")
    assert "expected a folder, or an address with https" in refused("fetch", "--address", "ftp://x")
    assert "expected lower-case letters" in refused("fetch", "../tiny")
    assert "cannot be read (No such file" in refused("fetch", "--address", served / "none", code=1)
    assert "cannot be read" in refused("fetch", "--address", "http://127.0.0.1:9/", code=1)
    monkeypatch.setenv("QUINCUNX_CACHE", "")
    assert "QUINCUNX_CACHE=''" in refused("fetch", "tiny")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Breaks(Quiet):
    """Promises a whole file and ends in the middle of it."""

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content if self.path.endswith(".json") else content[: len(content) // 2])


@pytest.mark.parametrize("handler", [Quiet, Breaks])
def test_over_http(served, handler, monkeypatch):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(served))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        if handler is Quiet:
            assert {f.name for f in fetch("tiny", address).iterdir()} == {"spec.json", "weights.safetensors"}
            with pytest.raises(ConnectionError, match="File not found"):
                registry(f"{address}none")
        else:
            with pytest.raises(ConnectionError, match="fetch it again"):
                fetch("tiny", address)
            assert cached() == {}
    finally:
        server.shutdown()
        server.server_close()


def test_only_runs_that_others_can_repeat_are_published(run, tmp_path):
    def changed(**environment):
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(run, other)
        result = json.loads((other / "run.json").read_text())
        result["environment"].update(environment)
        (other / "run.json").write_text(json.dumps(result))
        return other

    for commit in (None, "0123456789ab+"):
        with pytest.raises(ValueError, match="is not that of a commit"):
            publish(changed(commit=commit), tmp_path / "served", name="tiny", licence="MIT")
    for name, licence in (("Tiny", "MIT"), ("a/b", "MIT"), ("tiny", " ")):
        with pytest.raises(ValueError, match=r"name=|licence="):
            publish(run, tmp_path / "served", name=name, licence=licence)
    own = changed()
    spec = json.loads((own / "model" / "spec.json").read_text())
    spec["model"] = {"kind": "factory", "factory": "mynets:make"}
    (own / "model" / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="code of your own, mynets:make"):
        publish(own, tmp_path / "served", name="tiny", licence="MIT")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "none", tmp_path / "served", name="tiny", licence="MIT")
    assert not (tmp_path / "served" / "registry.json").exists()


def test_a_registry_that_cannot_be_written_stays_as_it_was(served, run, monkeypatch):
    before = (served / "registry.json").read_bytes()

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "_write_text", full)
    with pytest.raises(OSError, match="No space left"):
        publish(run, served, name="second", licence="MIT")
    assert (served / "registry.json").read_bytes() == before


def test_the_verbs_publish_list_fetch_and_clear(served, run, tmp_path):
    done = call("publish", run, tmp_path / "more", "--name", "tiny2", "--licence", "MIT")
    assert done.stdout.startswith("tiny2 (version 1): rsbn8 on pictures, test error ")
    assert "licence MIT" in done.stdout
    assert [r["name"] for r in document("fetch")["results"]] == ["tiny"]
    assert call("fetch").stdout.startswith("tiny (version 1): rsbn8 on pictures")
    fetched = document("fetch", "tiny2", "--address", tmp_path / "more")
    assert qx.load(fetched["folder"])(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    said = call("fetch", "tiny").stdout
    assert "model = qx.networks.build('rsbn8', weights='tiny')" in said
    assert [one["name"] for one in document("cache")["results"]] == ["tiny", "tiny2"]
    assert "2 trained results (tiny, tiny2)" in call("cache").stdout
    call("cache", "--clear")
    assert len(cached()) == 2, "measurements alone are removed"
    assert call("cache", "--clear-results").exit_code == 0
    assert cached() == {}
