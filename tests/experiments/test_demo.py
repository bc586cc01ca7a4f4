"""The demonstration: its files load again, agree with each other, and it replaces only its own."""

import json

import pytest
import torch

import quincunx as qx
from quincunx.data import load_data
from quincunx.experiments import demo, timings
from quincunx.report.results import collect, result_lines
from quincunx.train.evaluation import evaluate

LABELS = ["rrn14", "rsbn14 2/4", "rsbn14 1/4"]
FILES = [
    "latency-batch1.json",
    "latency-batch8.json",
    "model",
    "report.html",
    "rrn14.json",
    "rsbn14-1of4.json",
    "rsbn14-2of4.json",
    "training",
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One epoch and few rounds of timing: the folder and the rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timings, "_ROUNDS", 6)
        patch.setattr(demo, "_BATCHES", (1, 8))
        folder = tmp_path_factory.mktemp("demo") / "results"
        yield folder, demo.run_demo(folder, epochs=1)
    torch.set_num_threads(threads)


def content(path):
    return json.loads(path.read_text())


def test_it_writes_what_it_promises(ran):
    folder, rows = ran
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [row.label for row in rows] == LABELS
    # what it returns is what the files say
    assert rows == result_lines(collect(folder))


def test_its_figures_agree_with_each_other(ran):
    folder, rows = ran
    for row, name in zip(rows, ("rrn14", "rsbn14-2of4", "rsbn14-1of4"), strict=True):
        result = content(folder / f"{name}.json")
        assert result == content(folder / "training" / name / "run.json")
        assert row.error == result["test_error"] == result["history"][-1]["test_error"]
        assert row.wrong == round(row.error * 360)
        model = qx.load(folder / "training" / name / "model")
        assert row.macs == qx.cost(model, torch.zeros(1, 1, 32, 32)).macs
        for batch in (1, 8):
            timed = content(folder / f"latency-batch{batch}.json")["rows"][row.label]
            assert len(timed["seconds"]) == timed["rounds"] == 6
            assert timed["q1_s"] <= timed["median_s"] <= timed["q3_s"]
            assert row.times[f"batch {batch}"][0] == timed["median_s"] > 0
    assert rows[0].mac_ratio == 1
    assert [round(row.mac_ratio, 2) for row in rows] == [1.0, 1.57, 2.19]
    assert all(rows[0].speedups[f"batch {batch}"] == (1, 1, 1) for batch in (1, 8))


def test_it_learns_and_its_artifact_is_what_was_measured(ran):
    folder, rows = ran
    assert all(row.error < 0.7 for row in rows)
    digits = load_data("digits")
    again = evaluate(qx.load(folder / "model"), digits.test, digits)
    assert again.error == rows[1].error


def test_a_second_call_replaces_its_own_and_nothing_else(ran):
    folder, _ = ran
    mine = folder / "mine.txt"
    mine.write_text("mine")
    kept = folder / "training" / "another"
    kept.mkdir()
    (kept / "checkpoint.pt").write_bytes(b"mine")
    demo._make_room(folder, LABELS)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert left == ["mine.txt", "training", "training/another", "training/another/checkpoint.pt"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rrn14.json", '{"mine": 1}'),
        ("rrn14.json", "[]"),
        ("latency-batch1.json", "not JSON"),
        ("rsbn14-2of4.json", '{"schema": 1, "kind": "latency"}'),
        ("report.html", "<title>mine</title>"),
        ("model/spec.json", '{"info": {}}'),
        ("model/weights", "mine"),
        ("training/rrn14/notes", "mine"),
        ("training", "mine"),
    ],
)
def test_what_it_did_not_write_is_refused_before_anything_is_removed(tmp_path, name, text):
    own = tmp_path / "rsbn14-1of4.json"
    own.write_text('{"schema": 1, "kind": "train"}')
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{name.split('/')[0]}.*not written by an earlier demonstration"):
        demo.run_demo(tmp_path, epochs=1)
    assert path.read_text() == text
    assert own.exists()


def test_names_of_files():
    assert demo.file_name("rsbn14 2/4, width 8") == "rsbn14-2of4-width-8"
    assert demo.file_name("../x:*?") == "x"
    names = {demo.file_name("cosets " + "0,0;" * 50 + end) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) <= 80 for name in names)
