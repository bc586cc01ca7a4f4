"""Badges say what the run behind them found, and coverage is set up to count what runs elsewhere."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from helpers import ROOT

SPEC = importlib.util.spec_from_file_location("badges", ROOT / "docs" / "badges.py")
badges = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(badges)


def written(tmp_path, covered, statements=1000):
    file = tmp_path / "coverage.json"
    file.write_text(json.dumps({"totals": {"covered_lines": covered, "num_statements": statements}}))
    return file


@pytest.mark.parametrize(
    ("covered", "text", "colour"),
    [
        (950, "95.0%", "#2e7d32"),
        (949, "94.9%", "#8a6d00"),
        (849, "84.9%", "#b3261e"),
        (1000, "100.0%", "#2e7d32"),
    ],
)
def test_a_badge_of_coverage(tmp_path, covered, text, colour):
    badges.write("coverage", badges.covered(written(tmp_path, covered)), tmp_path)
    svg = (tmp_path / "coverage.svg").read_text()
    assert ElementTree.fromstring(svg).attrib["aria-label"] == f"coverage: {text}"
    assert colour in svg
    content = json.loads((tmp_path / "badges.json").read_text())
    assert content["coverage"]["covered"] == covered
    assert content["coverage"]["environment"]["torch"]


def test_a_share_is_rounded_down_and_nonsense_is_refused(tmp_path):
    assert badges.covered(written(tmp_path, 94_999, 100_000))["text"] == "94.9%"
    for text in ("{", "{}", '{"totals": {"covered_lines": 0, "num_statements": 0}}'):
        (tmp_path / "coverage.json").write_text(text)
        with pytest.raises(ValueError, match="not what coverage json writes"):
            badges.covered(tmp_path / "coverage.json")


def test_types_with_errors_are_red_and_a_crash_is_no_badge(monkeypatch):
    def said(text):
        monkeypatch.setattr(
            badges.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, text, "")
        )

    said("Found 3 errors in 2 files (checked 232 source files)")
    assert badges.types() == {"text": "3 errors", "errors": 3, "files": 232}
    assert badges.colour("types", badges.types()) == "#b3261e"
    said("Success: no issues found in 232 source files")
    assert badges.types() == {"text": "mypy strict", "errors": 0, "files": 232}
    said("")
    with pytest.raises(RuntimeError, match="without a summary"):
        badges.types()


def test_each_badge_is_that_of_its_result():
    content = json.loads((badges.BADGES / "badges.json").read_text())
    for name in content.keys() - {"schema", "kind"}:
        found = content[name]
        svg = (badges.BADGES / f"{name}.svg").read_text()
        assert svg == badges.badge(name, found["text"], badges.colour(name, found))
    assert {path.stem for path in badges.BADGES.glob("*.svg")} == content.keys() - {"schema", "kind"}


def test_coverage_counts_what_a_process_of_a_process_runs(tmp_path):
    """Tests call the command line and engines in processes of their own."""
    pytest.importorskip("coverage")
    inner = "import quincunx.measure.version as v; v.version_line()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    (tmp_path / "outer.py").write_text(outer)
    environment = {**os.environ, "COVERAGE_FILE": str(tmp_path / "data" / ".coverage")}
    (tmp_path / "data").mkdir()
    settings = f"--rcfile={ROOT / 'pyproject.toml'}"
    for command in (
        ["run", settings, str(tmp_path / "outer.py")],
        ["combine", settings],
        # of all the files of the package these two alone are looked at
        ["json", settings, "--include=*/measure/version.py,*/outer.py", "-o", "-"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "coverage", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)["files"]
    [version] = [found for name, found in files.items() if re.search(r"quincunx.measure.version\.py$", name)]
    assert version["summary"]["covered_lines"] > 15
    assert not any(name.endswith("outer.py") for name in files)
