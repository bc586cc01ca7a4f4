"""The guide: its programs run, its links lead somewhere, and what it quotes is what the package says."""

import ast
import inspect
import re
import textwrap
import warnings

import pytest
from typer.main import get_command

import quincunx as qx
from helpers import ROOT
from quincunx.cli import app

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(p for p in DOCS.rglob("*.md"))]
# the programs of these pages have a test of their own
TESTED = ("README.md", "guide.md", "tasks.md", "deploying.md", "plugins.md", "training.md")
PROGRAMS = [
    page
    for page in PAGES
    if page.name not in TESTED
    and page.parent.name not in ("methods", "measured")
    and "```python\n" in page.read_text(encoding="utf-8")
]


def named(path):
    return str(path.relative_to(ROOT))


def cells(page, kind):
    return [textwrap.dedent(cell) for cell in re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)]


@pytest.mark.parametrize("path", PROGRAMS, ids=named)
def test_the_programs_of_a_page_run_one_after_the_other(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": path.stem}
    with warnings.catch_warnings():
        # so small a network may gain nothing here
        warnings.filterwarnings("ignore", message="accelerate: the target")
        warnings.filterwarnings("ignore", message="calibration: .* images are few")
        for program in cells(path.read_text(encoding="utf-8"), "python"):
            # a smaller network, and a search with fewer candidates
            quick = program.replace('"resnet18", num_classes=10', '"cifar-resnet8"')
            quick = quick.replace("speedup=1.2", 'method="lowrank", speedup=1.2')
            exec(compile(quick, named(path), "exec"), scope)


def test_there_are_programs_to_run():
    assert {page.stem for page in PROGRAMS} >= {
        "quickstart",
        "own-network",
        "own-method",
        "training-from-scratch",
        "gpus",
    }


def anchors(path):
    """The names of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    }


def broken(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_to_a_file_and_to_a_heading_of_it(path):
    assert list(broken(path)) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `heading`, here\n[a](#a-heading-here) [b](#b) [c](c.md) [d](https://example.org)\n")
    assert list(broken(page)) == ["#b", "c.md"]


def contents():
    tree = ast.parse((DOCS / "conf.py").read_text(encoding="utf-8"))
    [found] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONTENTS"
    ]
    return [node.value for node in ast.walk(found) if isinstance(node, ast.Constant)]


def test_every_page_is_one_click_away():
    listed = set(contents())
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert {page for page in pages if not page.startswith("api/")} - listed == set()
    assert {page.stem for page in ROOT.glob("*.md")} - listed == {"README"}


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"\.\. (?:auto\w+|py:data):: ([\w.]+)", text))
    for name in qx.__all__:
        value = getattr(qx, name)
        assert (value.__name__ if inspect.ismodule(value) else f"quincunx.{name}") in shown, name


def test_the_page_of_commands_has_every_verb():
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert [c.name for c in app.registered_commands if f"| `{c.name}` |" not in text] == []


def commands(text):
    """The calls of quincunx in a page's blocks of code: verb and options."""
    for block in re.findall(r"```(?:\w*)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            call = re.match(r"(?:torchrun .* -m )?quincunx (\w+)(.*?)(?:#.*)?$", line.strip())
            if call:
                yield call[1], re.findall(r"(?<=\s)--?[a-z][\w-]*", call[2])


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_commands_have_the_verbs_and_options_that_there_are(path):
    known = {
        name: {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, verb in get_command(app).commands.items()
    }
    unknown = [
        (verb, option)
        for verb, options in commands(path.read_text(encoding="utf-8"))
        for option in [None, *options]
        if verb not in known or (option is not None and option not in known[verb])
    ]
    assert unknown == []


def test_commands_are_found():
    text = (
        "```\nquincunx cost rrn20 --sampling 1/4  # --no\ntorchrun x -m quincunx train --a \\\n    --b 1\n```"
    )
    assert list(commands(text)) == [("cost", ["--sampling"]), ("train", ["--a", "--b"])]


def literals():
    """What the package says, with "…" for each value that a sentence has."""
    for path in (ROOT / "src" / "quincunx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_refusals_are_quoted_as_the_package_words_them():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(quoted) > 40
    said = "\n".join(literals())
    assert [sentence for sentence in quoted if sentence not in said] == []
