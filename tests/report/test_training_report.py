"""The report: numbers as in the JSON, one file that needs no other, the same bytes for the same results."""

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from quincunx.experiments.timings import time_runs
from quincunx.measure.latency import Timing
from quincunx.report.figures import Curve, draw_learning_curves
from quincunx.report.results import (
    collect,
    label_of,
    result_lines,
    speed_words,
    verdicts,
)
from quincunx.report.training import write_report

SPEEDS = {"rrn14": 4.0, "rsbn14 2/4": 2.5, "rsbn14 1/4": 8.0}


def run(name="rrn14", error=0.05, macs=26_000_000, seed=0, **changes):
    settings = changes.pop("settings", {})
    epochs = changes.pop("epochs", 3)
    history = [{"epoch": e + 1, "test_error": error * (epochs - e)} for e in range(epochs)]
    return {
        "schema": 1,
        "kind": "train",
        "network": {
            "kind": "network",
            "name": name,
            "num_classes": 4,
            "in_channels": 1,
            "settings": settings,
        },
        "recipe": {"name": "digits", "epochs": epochs, "lr": 0.1, "batch_size": 32, "weight_decay": 1e-4},
        "data": {"name": "digits", "train": 1437, "test": 360, "size": [32, 32], "classes": list("abcd")},
        "seed": seed,
        "cost": {"macs": macs, "params": 172_218},
        "test_error": error,
        "history": history,
        "environment": {
            "time": "2026-01-02T03:04:05+00:00",
            "command": "quincunx demo",
            "commit": None,
            "cpu": "a processor",
            "cores": 2,
            "capability": "AVX2",
            "threads": 2,
            "quincunx": "0.1.0",
            "torch": "2.13.0",
            "python": "3.11.7",
        },
        **changes,
    }


def timing(setting="batch 1", seconds=SPEEDS, baseline="rrn14"):
    rows = {}
    for name, ms in seconds.items():
        ratio = seconds[baseline] / ms
        rows[name] = {
            "median_s": ms / 1e3,
            "q1_s": 0.97 * ms / 1e3,
            "q3_s": 1.04 * ms / 1e3,
            "speedup": {"median": ratio, "q1": 0.98 * ratio, "q3": 1.03 * ratio},
        }
    return {
        "schema": 1,
        "kind": "latency",
        "setting": setting,
        "how": "medians",
        "rounds": 15,
        "baseline": baseline,
        "rows": rows,
        "environment": {"threads": 2},
    }


@pytest.fixture
def folder(tmp_path):
    """Three networks, timed at two batch sizes."""
    quarter, half = ({"sampling": "1/4"}, {"sampling": "2/4"})
    put(tmp_path / "a.json", run())
    put(tmp_path / "b.json", run("rsbn14", 0.06, 16_000_000, settings=half))
    put(tmp_path / "c.json", run("rsbn14", 0.0, 12_000_000, settings=quarter))
    put(tmp_path / "t1.json", timing())
    put(tmp_path / "t64.json", timing("batch 64", {name: 50 * ms for name, ms in SPEEDS.items()}))
    return tmp_path


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.cells, self.title = [], [], ""
        self._open = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "td" in self._open or "th" in self._open:
            self.cells[-1] = " ".join(f"{self.cells[-1]} {data}".split())
        if "title" in self._open:
            self.title += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_one_file_that_needs_no_other(folder):
    page = Page(write_report(folder))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        assert tag != "script" or not attributes
        for key in {"src", "href", "srcset", "data"} & set(attributes):
            assert attributes[key].startswith("data:image/svg+xml;base64,")
    assert not re.search(r"https?://|@import|url\(", page.source)
    for image in page.all("img"):
        svg = base64.b64decode(image["src"].partition(",")[2]).decode()
        # names of XML vocabularies are no references
        assert not re.search(r"(href|src)=\"(?!#|data:)", svg)


def test_every_picture_says_what_it_shows(folder):
    page = Page(write_report(folder))
    pictures = page.all("img")
    # curves, error against MACs and against two times, two samplings
    assert len(pictures) == 6
    texts = [picture["alt"] for picture in pictures]
    assert len(set(texts)) == 6
    assert "rrn14 ends at 5.00%" in texts[0]
    assert "rsbn14 2/4: 6.00% at 16 M" in texts[1]
    assert "rsbn14 1/4: 0.00% at 8 ms" in texts[2]
    assert "32 of 64" in texts[4]
    assert "16 of 64" in texts[5]


def test_a_phone_and_a_reader_can_use_it(folder):
    page = Page(write_report(folder))
    assert page.title == "quincunx: rrn14 and 2 other networks on digits"
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "@media print" in page.source
    # on a phone a cell stands alone and must say what it is
    assert all(cell.get("data-name") for cell in page.all("td"))


def test_the_table_holds_the_numbers_of_the_files(folder):
    cells = Page(write_report(folder)).cells
    row = cells[cells.index("rsbn14 2/4") :][:8]
    assert row == [
        "rsbn14 2/4",
        "6.00% 22 of 360",
        "16.00 ratio 1.62",
        "172,218",
        "2.50 2.42–2.60",
        "1.60x 1.57–1.65 98% of ratio",
        "125.00 121.25–130.00",
        "1.60x 1.57–1.65 98% of ratio",
    ]
    assert cells[cells.index("rrn14") :][1:3] == ["5.00% 18 of 360", "26.00 baseline"]


def test_the_same_results_give_the_same_bytes(folder, tmp_path_factory):
    first = write_report(folder).read_bytes()
    again = write_report(folder, tmp_path_factory.mktemp("elsewhere"))
    assert again.name == "report.html"
    assert again.read_bytes() == first
    # redrawn from the JSON alone: a copy of the files under other names
    copied = tmp_path_factory.mktemp("copy")
    for i, path in enumerate(sorted(folder.glob("*.json"))):
        (copied / f"{9 - i}.json").write_bytes(path.read_bytes())
    assert write_report(copied).read_bytes() == first
    put(folder / "a.json", run(error=0.0501))
    assert write_report(folder).read_bytes() != first


def test_a_users_matplotlib_settings_change_nothing(folder):
    import matplotlib as mpl

    first = write_report(folder).read_bytes()
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "none"}):
        assert write_report(folder).read_bytes() == first
        assert mpl.rcParams["font.size"] == 30


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$\\frac{", "_hidden", "网络 🙂", "x" * 300, "a\"b'c&"]
)
def test_hostile_names_are_only_text(folder, name):
    content = run("rrn14", macs=20_000_000)
    content["network"]["name"] = name
    content["data"]["name"] = content["environment"]["command"] = "</title><img src=x onerror=1>"
    for path in folder.glob("*.json"):
        path.unlink()
    put(folder / "hostile.json", content)
    page = Page(write_report(folder))
    # the one that sorts tables, which holds nothing of the results, and the policy lets no other run
    [script] = re.findall(r"<script>(.*?)</script>", page.source, flags=re.DOTALL)
    assert len(page.all("script")) == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert "onerror" not in script
    assert all("onerror" not in attributes for attributes in page.all("img"))
    assert page.title == f"quincunx: {name} on </title><img src=x onerror=1>"
    assert " ".join(name.split()) in page.cells


def test_many_networks_and_settings(folder):
    for i in range(12):
        put(folder / f"n{i}.json", run("rrn14", macs=10**7 + i, settings={"width": i + 1}))
    for batch in (8, 16, 128):
        put(folder / f"t{batch}.json", timing(f"batch {batch}"))
    page = Page(write_report(folder))
    assert len([cell for cell in page.all("th") if cell.get("scope") == "row"]) == 15
    shown = [cell for cell in page.cells if re.fullmatch(r"batch \d+", cell)]
    assert shown == ["batch 1", "batch 8", "batch 16", "batch 64", "batch 128"]
    assert page.cells.count("not timed") == 12 * 5


def test_seeds_are_averaged_and_other_recipes_are_not(folder):
    put(folder / "seed1.json", run(error=0.07, seed=1))
    put(folder / "long.json", run(error=0.04, epochs=5))
    rows = {row.label: row for row in result_lines(collect(folder))}
    assert list(rows)[:2] == [
        "rrn14, 3 epochs at 0.1, batch 32",
        "rrn14, 5 epochs at 0.1, batch 32",
    ]
    averaged, single = list(rows.values())[:2]
    assert (averaged.seeds, single.seeds, single.deviation) == (2, 1, None)
    assert averaged.error == pytest.approx(0.06)
    assert averaged.deviation == pytest.approx(0.02 / math.sqrt(2))
    assert averaged.wrong == (18 + 25) / 2
    assert "6.00% ± 1.41, 2 seeds" in Page(write_report(folder)).cells
    assert "(means over seeds)" in verdicts(list(rows.values()))[1]


def test_a_run_and_its_copy_are_one_and_the_later_counts(folder):
    later = run(error=0.08)
    later["environment"] = {**later["environment"], "time": "2027-01-01T00:00:00+00:00"}
    put(folder / "0" / "run.json", later)
    rows = result_lines(collect(folder))
    assert len(rows) == 3
    assert rows[0].error == 0.08


def test_the_baseline_is_the_one_that_was_timed_against(folder):
    put(folder / "big.json", run("rrn20", macs=40_000_000))
    rows = result_lines(collect(folder))
    assert [row.label for row in rows] == ["rrn14", "rrn20", "rsbn14 2/4", "rsbn14 1/4"]
    assert rows[1].mac_ratio == 26 / 40
    assert "1.54x its MACs" not in verdicts(rows)[1]
    assert verdicts(rows)[0].startswith("rrn20: 1.54x its MACs")


def test_runs_are_timed_from_what_their_results_say(folder, monkeypatch):
    for old in folder.glob("t*.json"):
        old.unlink()
    seen = []

    def measured(models, example, rounds):
        seen.append((list(models), tuple(example.shape)))
        return {name: Timing(name, 1, (1.0 + i,) * rounds) for i, name in enumerate(models)}

    monkeypatch.setattr("quincunx.experiments.timings.measure_models", measured)
    written = time_runs(folder, [1, 8])
    assert [path.name for path in written] == ["latency-batch1.json", "latency-batch8.json"]
    assert set(map(str, seen)) == {
        str((["rrn14", "rsbn14 2/4", "rsbn14 1/4"], (batch, 1, 32, 32))) for batch in (1, 8)
    }
    rows = result_lines(collect(folder))
    assert [row.speedups["batch 8"][0] for row in rows] == [1.0, 1 / 2, 1 / 3]
    time_runs(folder, [1, 8], "rsbn14 1/4")
    assert result_lines(collect(folder))[0].label == "rsbn14 1/4"
    with pytest.raises(ValueError, match="baseline='rrn99': expected one of "):
        time_runs(folder, [1], "rrn99")
    put(folder / "own.json", {**run(), "network": {"kind": "factory", "factory": "a:b", "name": "a:b"}})
    with pytest.raises(ValueError, match="no network of this package"):
        time_runs(folder, [1])


def test_without_a_logarithm_of_zero(folder):
    # the 1/4 network makes no mistake at all; warnings are errors
    assert result_lines(collect(folder))[2].error == 0
    write_report(folder)
    shown, floor = (draw_learning_curves([Curve(0, "a", [1, 2], [5.0, e], 0.5)]).source for e in (0.0, 0.5))
    assert shown == floor


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ((1.72, 1.6, 1.8), "1.72x faster (middle half of the rounds 1.60 to 1.80)"),
        ((0.5, 0.4, 0.8), "2.00x slower (middle half of the rounds 1.25 to 2.50)"),
        ((0.99, 0.94, 1.34), "as fast (0.99x, middle half of the rounds 0.94 to 1.34)"),
        ((1.2, 0.99, 1.3), "as fast (1.20x, middle half of the rounds 0.99 to 1.30)"),
        ((1.003, 1.0021, 1.0049), "as fast (1.00x, middle half of the rounds 1.00 to 1.00)"),
        ((0.97, 0.76, 0.9998), "as fast (0.97x, middle half of the rounds 0.76 to 1.00)"),
    ],
)
def test_a_speed_in_words(ratio, expected):
    assert speed_words(*ratio) == expected


def test_verdicts_say_losses_too(folder):
    gained, lost = verdicts(result_lines(collect(folder)))
    assert gained == (
        "rsbn14 2/4: 1.62x fewer MACs than rrn14, 4 more wrong answers of 360; "
        "batch 1: 1.60x faster (middle half of the rounds 1.57 to 1.65); "
        "batch 64: 1.60x faster (middle half of the rounds 1.57 to 1.65)."
    )
    assert "18 fewer wrong answers" in lost
    assert "2.00x slower" in lost


def test_labels_tell_networks_apart():
    settings = [
        {},
        {"sampling": "1/4"},
        {"sampling": "cosets:3:0,0;1,2"},
        {"sampling": "random:0.3:7"},
        {"sampling": "uniform:0.25"},
        {"sampling": "uniform:0.25:eq8"},
        {"down": "avgpool"},
        {"width": 8},
    ]
    labels = [label_of({"name": "rsbn20", "settings": chosen}) for chosen in settings]
    assert labels == [
        "rsbn20 2/4",
        "rsbn20 1/4",
        "rsbn20 cosets:3:0,0;1,2",
        "rsbn20 random:0.3:7",
        "rsbn20 uniform:0.25",
        "rsbn20 uniform:0.25:eq8",
        "rsbn20 2/4, avgpool",
        "rsbn20 2/4, width 8",
    ]


def test_refusals_name_the_file(folder):
    def refused(error, pattern):
        with pytest.raises(error, match=pattern):
            write_report(folder)

    page = write_report(folder)
    before = page.read_bytes()
    bad = folder / "bad.json"
    bad.write_text("{")
    refused(ValueError, r"bad\.json: not a JSON file")
    bad.write_text(json.dumps({**run(), "test_error": math.nan}))
    refused(ValueError, r"bad\.json: not a JSON file \(NaN")
    for content, pattern in [
        ({"schema": 1, "kind": "train"}, "'network' is missing"),
        ({**run(), "history": []}, "no epoch"),
        ({**run(), "history": 3}, "not iterable"),
        ({**run(), "test_error": "low"}, "'low' where a number"),
        ({**run(), "cost": {"macs": 0, "params": 1}}, "0 where a number"),
        ({**timing(), "rows": {"rrn14": {}}}, "'median_s' is missing"),
        ({**timing(), "rows": []}, "no attribute"),
    ]:
        put(bad, content)
        refused(ValueError, rf"bad\.json: not a whole result.*{pattern}")
    # other people's JSON is no concern of the report
    for other in ([], 3, {"schema": 2, "kind": "train"}, {"kind": "train"}):
        put(bad, other)
        assert write_report(folder).read_bytes() == before


def test_what_cannot_be_compared_is_refused(folder):
    other = copy.deepcopy(run("rrn20"))
    other["data"]["name"] = "photographs"
    put(folder / "other.json", other)
    with pytest.raises(ValueError, match=r"different data .*digits, photographs"):
        collect(folder)
    (folder / "other.json").unlink()
    put(folder / "other.json", timing("batch 9", baseline="rsbn14 2/4"))
    with pytest.raises(ValueError, match="different baselines: rrn14, rsbn14 2/4"):
        collect(folder)


def test_folders_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        collect(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no results of a training run"):
        collect(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        collect(put(tmp_path / "file", {}))


def test_a_page_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    page = write_report(folder)
    before = page.read_bytes()
    put(folder / "a.json", run(error=0.3))
    monkeypatch.setattr("quincunx.writing._write_text", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert page.read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def _full_disk(path, text):
    path.write_text(text[: len(text) // 2])
    raise OSError(28, "No space left on device")
