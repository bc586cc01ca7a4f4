"""The files around the code that people and machines read: they are valid, and true."""

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]
OLDEST = re.search(r'^requires-python = ">=(3\.\d+)"$', PROJECT, re.MULTILINE)[1]
PINNED = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- Python versions


def workflow():
    [job] = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    return job


def test_the_workflow_runs_what_ci_runs_on_every_python_that_is_supported():
    job = workflow()
    versions = job["strategy"]["matrix"]["python"]
    assert versions == [f"3.{minor}" for minor in range(10, 15)]
    assert versions[0] == OLDEST
    said = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert said == versions
    assert job["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


@pytest.mark.parametrize("python", [f"3.{minor}" for minor in range(10, 15)])
def test_one_version_of_each_package_is_pinned_on_every_python(python):
    """A line without a marker for a package that needs a newer Python would leave nothing to install."""
    names = [
        pin.name for pin in PINNED if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert len(names) == len(set(names))
    for pin in PINNED:
        if pin.marker is not None and not pin.marker.evaluate({"python_version": python}):
            continue
        try:
            installed = distribution(pin.name)
        except PackageNotFoundError:
            continue
        needed = SpecifierSet(installed.metadata.get("Requires-Python") or "")
        # of other versions than the installed one nothing is known here
        if pin.specifier.contains(installed.version):
            assert needed.contains(f"{python}.15"), f"{pin} needs Python {needed}"


def test_an_unpinned_python_would_be_seen():
    """The newest version of at least one package needs more than the oldest Python."""
    assert any(pin.marker is not None for pin in PINNED)


# ---------------------------------------------------------------- forms


def test_forms_of_issues_are_forms():
    """GitHub shows none of a folder of which one is invalid."""
    paths = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    forms = {path.name: read_yaml(path) for path in paths if path.name != "config.yml"}
    assert len(forms) >= 3
    assert len({form["name"] for form in forms.values()}) == len(forms)
    for name, form in forms.items():
        assert set(form) <= {
            "name",
            "description",
            "title",
            "labels",
            "assignees",
            "projects",
            "type",
            "body",
        }, name
        assert form["name"], name
        assert form["description"], name
        assert any(part["type"] != "markdown" for part in form["body"]), name
        ids = [part["id"] for part in form["body"] if "id" in part]
        assert len(ids) == len(set(ids)), name
        for part in form["body"]:
            assert part["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes"), name
            assert set(part) <= {"type", "id", "attributes", "validations"}, name
            assert re.fullmatch(r"[\w-]+", part.get("id", "x")), name
            assert part["attributes"]["value" if part["type"] == "markdown" else "label"], name
        # what every report needs
        assert "doctor" in ids, name


def test_the_page_of_new_issues_sends_holes_elsewhere():
    config = read_yaml(".github/ISSUE_TEMPLATE/config.yml")
    assert set(config) <= {"blank_issues_enabled", "contact_links"}
    for link in config.get("contact_links", []):
        assert set(link) == {"name", "url", "about"}


# ---------------------------------------------------------------- citation, changes, commands


def test_the_citation_is_of_this_version():
    cited = read_yaml("CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= set(cited)
    assert cited["version"] == VERSION
    assert cited["license"] in PROJECT
    for paper in cited["references"]:
        assert {"type", "title", "authors", "year"} <= set(paper)


def test_releases_in_the_changelog_have_dates_in_order():
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles[0] == "Unreleased" or titles[0].startswith(VERSION)
    released = [title for title in titles if title != "Unreleased"]
    found = [re.fullmatch(r"\d+\.\d+\.\d+ \((\d{4}-\d\d-\d\d)\)", title) for title in released]
    assert all(found), released
    dates = [match[1] for match in found]
    assert dates == sorted(dates, reverse=True)


def test_commands_that_contributors_are_told_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^make ([\w-]+)", page, re.MULTILINE)) | set(re.findall(r"`make ([\w-]+)", page))
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    assert told - targets == set()
    # and all that a person may ask for is told
    helped = set(re.findall(r'@echo "make ([\w-]+)', MAKEFILE)) - {"demo", "format"}
    assert helped - told == set()


def test_hooks_are_the_checks_of_lint():
    hooks = [
        hook for repository in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]
    ]
    rule = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    for hook in hooks:
        program = hook["entry"].split()[0].removeprefix(".venv/")
        assert program.replace("bin/", "$(BIN)/") in rule, hook["id"]
    assert {hook["entry"].split()[0].rpartition("/")[2] for hook in hooks} == {"ruff", "mypy", "lint-imports"}


@pytest.mark.parametrize(
    "name", ["LICENSE", "SECURITY.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "CITATION.cff"]
)
def test_what_people_look_for_is_there(name):
    assert (ROOT / name).stat().st_size > 500


def test_make_prints_its_help():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make wheel" in said
