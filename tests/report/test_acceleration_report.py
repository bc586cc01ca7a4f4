"""The page of one acceleration and the page that compares several: pictures, next step, sorting, refusals."""

import base64
import copy
import io
import json
import os
import re
import shutil
import subprocess
import warnings
import webbrowser

import pytest
import torch
from PIL import Image

import quincunx as qx
from helpers.acceleration import DATA, METHOD, clock_of_macs, network
from helpers.commands import call, refused
from quincunx.acceleration.pipeline import accelerate_trained
from quincunx.acceleration.sample import sample_record
from quincunx.acceleration.target import Search, Target
from quincunx.report.acceleration import write_acceleration_report
from quincunx.report.compared import compared_sentences, read_runs, write_comparison
from quincunx.report.positions import draw_on_sample
from quincunx.report.verdict import next_in_words
from quincunx.train.loop import fit
from quincunx.train.recipes import Recipe

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three accelerations of one network: pairs, ESPACE's impact masks, and a search."""
    out = tmp_path_factory.mktemp("accelerated")
    options = {"calibration": 40, "batch": 2, "rounds": 3}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # so few images are enough to draw a page
        warnings.filterwarnings("ignore", message="calibration: .* images are few")
        clock_of_macs(patch)
        for name, method in {
            "pairs": qx.SpatialBottleneck(),
            "espace": METHOD,
            "search": Search(Target(macs="90%"), methods=("lowrank", "spatialbottleneck")),
        }.items():
            accelerate_trained(network(), method, DATA, out / name, **options)
    return out


def picture(source):
    kind, _, content = source.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_the_sample_is_a_small_image_in_its_own_colours():
    image = torch.zeros(1, 3, 200, 100)
    image[:, 0] = 0.5
    found = sample_record(network(), ["layer1.0.conv1", "fc", "none"], image, (0.25, 0, 0), (0.5, 1, 1))
    drawn = Image.open(io.BytesIO(base64.b64decode(found["image"])))
    assert drawn.size == (48, 96)
    assert drawn.getpixel((9, 9)) == (128, 0, 0)
    # a linear layer has no map
    assert found["maps"] == {"layer1.0.conv1": [[200, 100], [200, 100]]}
    grey = sample_record(qx.networks.build("rrn8", 2, 2), [], torch.ones(1, 2, 8, 8), (0, 0), (1, 1))
    assert Image.open(io.BytesIO(base64.b64decode(grey["image"]))).getpixel((0, 0)) == (255, 255, 255)


def test_computed_positions_are_the_image_and_all_others_are_tinted():
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (10, 200, 30)).save(buffer, format="PNG")
    sample = {
        "image": base64.b64encode(buffer.getvalue()).decode(),
        "maps": {"a": [[8, 8], [4, 4]], "b": [[8, 8], [8, 8]], "c": [[4, 4], [4, 4]]},
    }
    text = qx.CHESSBOARD.spec
    replaced = {
        "a": {"kind": "sampled-conv", "sampling": text},
        "b": {"masks": [text, qx.QUARTER.spec]},
        "c": {"kind": "sampled-conv-transpose", "sampling": text},
        "unknown": {"sampling": text},
        "dense": {},
    }
    found = draw_on_sample(sample, replaced)
    assert [one.title for one in found] == [
        "a, c: 8 of 4 x 4 (50%)",
        "b, vertical: 32 of 8 x 8 (50%)",
        "b, horizontal: 16 of 8 x 8 (25%)",
    ]
    drawn = picture(found[0].source)
    assert drawn.size == (256, 256)
    mask = qx.CHESSBOARD.mask(4, 4)
    for row in range(4):
        for column in range(4):
            pixel = drawn.getpixel((64 * column + 32, 64 * row + 32))
            assert (pixel == (10, 200, 30)) == bool(mask[row, column])
    assert draw_on_sample(None, replaced) == []
    for bad in ("no base64!", base64.b64encode(b"GIF89a").decode()):
        with pytest.raises(ValueError, match="sample: not a small PNG"):
            draw_on_sample({**sample, "image": bad}, replaced)


def test_a_transposed_half_is_drawn_on_its_input(runs):
    result = json.loads((runs / "pairs" / "accelerate.json").read_text())
    spec = json.loads((runs / "pairs" / "model" / "spec.json").read_text())["model"]["replaced"]
    both = {frozenset(map(tuple, result["sample"]["maps"][name])) for name in spec}
    assert frozenset({(8, 8)}) in both
    # every replaced layer is in a picture's alternative text
    told = " ".join(one.alternative for one in draw_on_sample(result["sample"], spec))
    assert [name for name in spec if name not in told] == []


def test_the_page_has_positions_what_was_tried_and_a_next_step(runs):
    page = write_acceleration_report(runs / "search").read_text()
    result = json.loads((runs / "search" / "accelerate.json").read_text())
    attempts = [one for one in result["search"]["attempts"] if one["layers"]]
    table = page.partition("choices that were tried")[2].partition("</table>")[0]
    assert table.count('<tr><th scope="row">') == len(attempts) > 0
    assert "(taken)" in table
    assert ">yes</td>" in table
    assert 'class="next">Next: ' in page
    page = write_acceleration_report(runs / "pairs").read_text()
    assert "data:image/png;base64," in page
    assert page.count("<img") == page.count('alt="') > 2
    assert "prefers-color-scheme: dark" in page
    # a result of before, without a sample image, is drawn as it was
    older = runs / "older"
    shutil.copytree(runs / "pairs", older)
    older_result = json.loads((older / "accelerate.json").read_text())
    del older_result["sample"]
    for attempt in attempts:
        del attempt["loss"]
    older_result["search"] = result["search"]
    (older / "accelerate.json").write_text(json.dumps(older_result))
    page = write_acceleration_report(older, runs / "older.html").read_text()
    assert "data:image/png" not in page
    assert "Choices that the search timed" in page
    assert "on the front" not in page


def finished(**changes):
    result = {
        "stages": [{"error": 0.1}, {"error": 0.1, "p": 1.0}],
        "whole": {"speedup": {"median": 1.5}},
        "data": {"test": 1000},
    }
    return {**result, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "quincunx export fast --out fast.onnx"),
        ({"verdict": {"next": "add --finetune-epochs 5"}}, "Next: add --finetune-epochs 5."),
        ({"put_back": 0.9}, "nothing here is faster"),
        ({"whole": {"speedup": {"median": 0.9}}}, "nothing here is faster"),
        (
            {"stages": [{"error": 0.1}, {"error": 0.5, "p": 1e-9}]},
            "add --finetune-epochs 5, to win accuracy back",
        ),
        ({"stages": [{"error": 0.1}, {"error": 0.11, "p": 1e-3}]}, "may win the 1.00 points back; or use it"),
        (
            {
                "free": {
                    "rows": [
                        {
                            "name": "b",
                            "dtype": "bfloat16",
                            "size": None,
                            "speedup": {"median": 2.0},
                            "drop": 0.0,
                        }
                    ]
                }
            },
            "compare with the better answer",
        ),
    ],
)
def test_the_next_step_mends_what_is_missing_first(changes, said):
    assert said in next_in_words(finished(**changes), "fast")


def test_one_page_compares_several_runs(runs):
    folders = [runs / name for name in ("pairs", "espace", "search")]
    page = write_comparison(folders)
    assert page == runs / "comparison.html"
    text = page.read_text()
    first = page.read_bytes()
    assert write_comparison(folders).read_bytes() == first
    assert "http" not in re.sub(r"data:image[^\"]*|http-equiv", "", text)
    for folder in folders:
        result = json.loads((folder / "accelerate.json").read_text())
        row = text.partition(f'<th scope="row">{folder.name}</th>')[2].partition("</tr>")[0]
        cells = [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in row.split("</td>")]
        assert cells[2].startswith(f"{result['whole']['speedup']['median']:.2f}x")
        macs = result["cost"]["before"]["macs"] / result["cost"]["after"]["macs"]
        assert cells[5] == f"{macs:.2f}"
        assert cells[7] == f"{100 * result['stages'][-1]['error']:.2f}%"
    # every layer that any run replaced has a row
    layers = text.partition('<h2 id="layers">')[2]
    assert layers.count('<tr><th scope="row">') == len(
        {
            row["name"]
            for folder in folders
            for row in json.loads((folder / "accelerate.json").read_text())["layers"]
        }
    )


def test_what_makes_runs_differ_is_said(runs, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "pairs", tmp_path / name / "fast")
    changed = json.loads((tmp_path / "two" / "fast" / "accelerate.json").read_text())
    changed["environment"]["cpu"] = "another processor"
    changed["data"]["name"] = "other images"
    changed["batch"] = 64
    (tmp_path / "two" / "fast" / "accelerate.json").write_text(json.dumps(changed))
    found = read_runs([tmp_path / "one" / "fast", tmp_path / "two" / "fast"])
    assert [run.name for run in found] == ["one/fast", "two/fast"]
    said = " ".join(compared_sentences(found))
    assert "another processor; speed-ups hold for one processor" in said
    assert "Different batch sizes: 2; 64" in said
    assert "Least loss" not in said
    page = write_comparison([tmp_path / "one" / "fast", tmp_path / "two" / "fast"]).read_text()
    assert "on the front" not in page


def test_the_one_that_is_behind_is_named(runs):
    [one, _, _] = read_runs([runs / name for name in ("pairs", "espace", "search")])
    slower = copy.deepcopy(one.result)
    slower["whole"]["speedup"] = {"median": 0.5 * one.speed, "q1": 0.5, "q3": 0.6}
    other = type(one)("slower", slower)
    said = compared_sentences([one, other])
    assert said[0].startswith(f"Fastest: {one.name}, ")
    assert any(sentence.startswith("Behind the others on these test images: slower;") for sentence in said)


def test_the_verb_draws_compares_and_refuses(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    assert call("report", "pairs").stdout == "wrote pairs/report.html\n"
    done = call("report", "pairs", "search", "--out", tmp_path / "both.html")
    assert done.stdout == f"wrote {tmp_path / 'both.html'}\n"
    assert "is named twice" in refused("report", "pairs", "pairs")
    (tmp_path / "empty").mkdir()
    assert "compare runs of one kind" in refused("report", "pairs", tmp_path / "empty")
    assert "is for one folder of training runs" in refused("report", "pairs", "--time", "1")
    assert "no such folder" in refused("report", "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "accelerate.json").write_text('{"schema": 1, "kind": "accelerate"}')
    assert "not a whole result" in refused("report", "pairs", broken)
    assert "accelerate.json: not a whole result" in refused("report", broken)


DAMAGE = [
    (("layers", 0, "name"), []),
    (("layers", 0, "speedup", "q1"), None),
    (("whole",), 3),
    (("stages",), []),
    (("bytes", "after"), {}),
    (("network",), None),
    (("environment", "commit"), ...),
    (("search", "attempts", 0), {"layers": 1}),
    (("sample", "maps"), {"layer1.0.conv1": [[10**9, 10**9], [10**9, 10**9]]}),
    (("sample", "image"), "nothing"),
    (("how",), ...),
]


@pytest.mark.parametrize(("path", "value"), DAMAGE, ids=[".".join(map(str, path)) for path, _ in DAMAGE])
def test_a_damaged_result_is_refused_by_name(runs, tmp_path, path, value):
    folder = tmp_path / "damaged"
    shutil.copytree(runs / "pairs", folder)
    result = json.loads((folder / "accelerate.json").read_text())
    result["search"] = json.loads((runs / "search" / "accelerate.json").read_text())["search"]
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / "accelerate.json").write_text(json.dumps(result))
    assert f"{folder / 'accelerate.json'}: not a whole result" in refused("report", folder)


def test_training_runs_of_several_folders_are_on_one_page(tmp_path):
    made = {"kind": "network", "num_classes": 3, "in_channels": 3, "settings": {"width": 4}}
    for name in ("rrn8", "rsbn8"):
        torch.manual_seed(0)
        model = qx.networks.build(name, 3, 3, width=4)
        assert model.quincunx_spec == {**made, "name": name}
        fit(model, DATA, Recipe("tiny", epochs=1, batch_size=20, lr=0.01, augment="none"), tmp_path / name)
    done = call("report", tmp_path / "rrn8", tmp_path / "rsbn8")
    assert done.stdout == f"wrote {tmp_path / 'comparison.html'}\n"
    page = (tmp_path / "comparison.html").read_text()
    assert "rrn8, width 4 and 1 other network on pictures" in page
    assert '<th scope="row">rsbn8 2/4, width 4</th>' in page
    # one folder in another, and one twice, are no further runs
    call("report", tmp_path, tmp_path / "rrn8", "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_open_shows_the_page_or_says_that_it_cannot(runs, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    done = call("report", runs / "pairs", "--open")
    assert opened == [(runs / "pairs" / "report.html").as_uri()]
    assert done.stderr == ""

    def none(address):
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "open", none)
    assert "no web browser" in call("report", runs / "pairs", "--open").stderr
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    done = call("report", runs / "pairs", "--open")
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: no web browser can be started here; open /")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a headless Chromium")
def test_tables_sort_by_the_keyboard_in_a_browser(runs, tmp_path):
    page = write_comparison([runs / name for name in ("pairs", "espace", "search")]).read_text()
    # what a person does, and what is then there; the policy would let no second script run
    press = """<script>
      const heads = [...document.querySelectorAll("table.sortable")[0].querySelectorAll("th[data-column]")];
      const rows = () => [...document.querySelectorAll("table.sortable")[0].tBodies[0].rows]
        .map((row) => row.cells[5].textContent.trim());
      const seen = [];
      for (let i = 0; i < 4; i++) {
        seen.push([heads[5].getAttribute("aria-sort"), heads[5].firstChild.tagName, ...rows()]);
        heads[5].firstChild.focus();
        document.activeElement.click();
      }
      document.title = JSON.stringify(seen);
    </script>"""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace(
        "</body>", f"{press}</body>"
    )
    (tmp_path / "page.html").write_text(page)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    seen = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    before = seen[0][2:]
    assert [one[0] for one in seen] == [None, "ascending", "descending", None]
    assert {one[1] for one in seen} == {"BUTTON"}
    assert seen[1][2:] == sorted(before, key=float)
    assert seen[2][2:] == sorted(before, key=float, reverse=True)
    assert seen[3][2:] == before
