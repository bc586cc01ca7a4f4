"""benchmarks/fair_front.py from timing to result, interrupted and gone on with, on small digits."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from helpers.acceleration import measure_macs

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "fair_front.py"


@pytest.fixture
def front(monkeypatch):
    spec = importlib.util.spec_from_file_location("fair_front", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fair_front", module)
    spec.loader.exec_module(module)
    # sizes that are found must not depend on how busy the machine is
    monkeypatch.setattr(module, "measure_models", measure_macs)
    monkeypatch.setattr(module, "fuse", lambda model, **_: model)
    return module


def run(front, monkeypatch, folder, *arguments):
    given = ["--short", "--seeds", "0", "--out", str(folder), "--results", str(folder / "results")]
    monkeypatch.setattr(sys, "argv", ["fair_front.py", *arguments, *given])
    front.main()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_goes_on_where_it_was_stopped_and_collects(front, monkeypatch, tmp_path, capsys):
    real, trained = front.fit, []

    def fit(model, data, recipe, folder, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(folder.name)
        return real(model, data, recipe, folder, **options)

    monkeypatch.setattr(front, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        run(front, monkeypatch, tmp_path, "train", "--only", "2/4")
    assert trained == ["dense-seed0", "bottleneck-2of4-seed0"]
    sizes = (tmp_path / "digits" / "sizes.json").read_text()

    more = []
    monkeypatch.setattr(
        front, "fit", lambda *given, **options: (more.append(given[3].name), real(*given, **options))
    )
    run(front, monkeypatch, tmp_path, "all", "--only", "bottleneck fitted 2/4,low rank 2/4,smaller 2/4")
    assert sorted(more) == ["bottleneck-fitted-2of4-seed0", "low-rank-2of4-seed0", "smaller-2of4-seed0"]
    assert (tmp_path / "digits" / "sizes.json").read_text() == sizes, "networks keep their sizes"

    found = json.loads((tmp_path / "results" / "fair-front-digits.json").read_text())
    rows = {row["network"]: row for row in found["rows"]}
    assert list(rows) == ["dense", "bottleneck 2/4", "smaller 2/4", "bottleneck fitted 2/4", "low rank 2/4"]
    assert rows["bottleneck 2/4"]["macs"] < rows["dense"]["macs"]
    assert rows["smaller 2/4"]["side"] == found["equal_time"]["2/4"]["side"]["value"] < 40
    assert rows["low rank 2/4"]["macs"] < rows["dense"]["macs"]
    for row in rows.values():
        assert 0 <= row["mean"] <= 1
        assert row["timing"]["rounds"] >= 3
        lost = row["against_dense"]["0"]
        tested = found["data"]["test"]
        change = round(tested * (row["mean"] - rows["dense"]["mean"]))
        assert lost["lost"] - lost["won"] == change
    assert b"low rank" in (tmp_path / "results" / "fair-front-digits.svg").read_bytes()
    assert "wrote" in capsys.readouterr().out


def test_the_largest_that_is_fast_enough_is_found(front):
    for fast in range(1, 9):
        found = front.largest(list(range(1, 9)), lambda n, fast=fast: n / fast)
        assert found["value"] == fast
        assert found["time"] == 1
    assert front.largest([3, 4], lambda n: 2.0)["value"] == 3


def test_other_settings_are_refused(front, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(front, monkeypatch, tmp_path, "collect", "--data", "mnist")
    assert "--data mnist: expected one of digits" in capsys.readouterr().err
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "sizes.json").write_text(json.dumps({"batch": 4}))
    with pytest.raises(SystemExit, match=r"sizes for batch 4, not 8; give another --out"):
        run(front, monkeypatch, tmp_path, "collect")
