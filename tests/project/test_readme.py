"""What the README and the pages behind it say is so: tables come from the result files, examples run."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch

from helpers import ROOT
from quincunx import networks

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_result_files():
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_result_was_measured_on_changed_files():
    """A commit with "+" behind it names code that nobody else has."""
    # a demonstration run here writes to results/demo, which is not committed
    committed = [p for p in (ROOT / "results").rglob("*.json") if ROOT / "results" / "demo" not in p.parents]
    assert committed
    for path in committed:
        commits = re.findall(r'"commit": "([^"]*)"', path.read_text(encoding="utf-8"))
        assert commits, path
        assert all(re.fullmatch(r"[0-9a-f]{7,40}", commit) for commit in commits), path


def programs(page):
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def test_the_first_program_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    [program] = programs(README)
    assert len([line for line in program.splitlines() if line.strip()]) <= 14
    monkeypatch.chdir(tmp_path)
    # a smaller network, and a shorter look at the clock
    quick = program.replace("cifar-resnet20", "cifar-resnet8").replace("min_run_time=1", "min_run_time=0.1")
    exec(quick, {})
    said = capsys.readouterr().out
    assert re.search(r"\d+ layers replaced", said)
    assert re.search(r"^before: [\d.]+ ms\nafter: [\d.]+ ms$", said, re.MULTILINE)


def test_the_guide_runs(tmp_path, monkeypatch):
    first, second, third, fourth = programs((ROOT / "docs" / "guide.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(first, scope)
    assert scope["y"].shape == (8, 64, 256, 1)
    assert scope["z"].shape == (8, 64, 32, 32)
    assert isinstance(scope["fast"], torch.nn.Module)
    scope["model"] = scope["qx"].networks.build("cifar-resnet8")
    scope["model"].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where bfloat16 is slower
        exec(third, scope)
    assert scope["fast"].meta["dtype"]["asked"] == "bfloat16"
    scope["images"] = [(torch.randn(20, 3, 32, 32), torch.arange(20) % 10) for _ in range(2)]
    exec(second, scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where eight bits are slower
        exec(fourth, scope)
    assert scope["fast"].meta["dtype"]["asked"] == "int8"
    assert scope["result"].replaced["layer1.0.conv1"]["rates"] == [0.5, 0.5]
    assert scope["result"].model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_the_page_of_training_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {"original": networks.build("cifar-resnet8", 10, 3, width=4)}
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 10) for _ in range(2)]
    scope |= {"calibration": batches, "loader": batches, "epochs": 1, "x": batches[0][0]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="calibration")  # few images
        for program in programs((ROOT / "docs" / "training.md").read_text(encoding="utf-8")):
            exec(program, scope)
    assert scope["fast"](scope["x"]).shape == (8, 10)
    assert scope["fast"].meta["dtype"]["used"] == "int8"
    assert scope["step"] is not scope["net"]
    assert type(scope["loss"]).__name__ == "Loss"


def test_it_takes_two_minutes_to_read():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize(
    ("candidates", "batches"),
    [(("rSB 2/4",), (64, 256)), (("rSB 1/4",), (64, 256)), (("rSB 2/4", "rSB 1/4"), (1,))],
)
def test_what_is_said_of_a_gpu_is_what_was_measured(candidates, batches):
    rows = json.loads((ROOT / "results" / "bench-blocks-cuda.json").read_text(encoding="utf-8"))["rows"]
    found = [r["candidates"][name]["speedup"] for r in rows if r["batch"] in batches for name in candidates]
    overview = (ROOT / "docs" / "measured" / "overview.md").read_text(encoding="utf-8")
    assert f"{min(found):.2f} to {max(found):.2f} times" in " ".join(overview.split())


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_table_made_has_its_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    made = (ROOT / "docs" / "tables.py").read_text(encoding="utf-8").partition("MADE = {")[2]
    names = re.findall(r'^    "([\w.-]+)": ', made, flags=re.MULTILINE)
    assert [name for name in names if f"<!-- {name} -->" not in text] == []
