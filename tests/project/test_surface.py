"""The package from outside: what it exports, what importing it costs, examples that run."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import warnings
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

import quincunx as qx
from helpers.forked import forked

ROOT = Path(qx.__file__).parent
# plain descriptions of what functions return, shown there
_SHOWN_ELSEWHERE = {"Cost", "Sampling"}
_HEAVY = (
    "matplotlib",
    "PIL",
    "sklearn",
    "scipy",
    "tensorly",
    "pandas",
    "typer",
    "rich",
    "jinja2",
    "onnx",
    "openvino",
    "triton",
)


def modules():
    # the extension has no Python in it, and importing __main__ is for the command line
    found = (module.name for module in pkgutil.walk_packages([str(ROOT)], "quincunx."))
    return ["quincunx", *(n for n in found if n.rpartition(".")[2] not in ("__main__", "_native"))]


def documented(name):
    """The docstring of what a public name stands for; a constant has its class's."""
    value = getattr(qx, name)
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
        return inspect.getdoc(value)
    return inspect.getdoc(type(value))


def test_all_is_sorted_complete_and_there():
    assert len(set(qx.__all__)) == len(qx.__all__)
    assert all(hasattr(qx, name) for name in qx.__all__)
    namespace = {}
    exec("from quincunx import *", namespace)
    assert set(qx.__all__) <= set(namespace)
    public = {
        name
        for name, value in vars(qx).items()
        if not name.startswith("_") and not (inspect.ismodule(value) and name not in qx.__all__)
    }
    assert public == set(qx.__all__)


@pytest.mark.parametrize("name", qx.__all__)
def test_every_public_name_is_explained_by_an_example(name):
    text = documented(name)
    assert text
    assert len(text.splitlines()[0]) > 10
    if name not in _SHOWN_ELSEWHERE:
        assert doctest.DocTestParser().get_examples(text), f"{name} has no example"


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    module = importlib.import_module(name)
    assert module.__doc__
    # what a reader has who began with the README's imports
    names = {"qx": qx, "torch": torch, **{public: getattr(qx, public) for public in qx.__all__}}
    with warnings.catch_warnings():
        # on a busy machine no candidate of so small a network may save time
        warnings.filterwarnings("ignore", message="accelerate: the target")
        results = doctest.testmod(
            module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
    assert results.failed == 0


def test_examples_of_public_names_are_among_those_that_run():
    """A docstring behind a decorator or a re-export would be passed over in silence."""
    finder = doctest.DocTestFinder()
    run = {
        test.name
        for name in modules()
        for test in finder.find(importlib.import_module(name))
        if test.examples
    }
    for name in set(qx.__all__) - _SHOWN_ELSEWHERE:
        value = getattr(qx, name)
        if inspect.ismodule(value):
            expected = value.__name__
        else:
            target = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
            expected = f"{target.__module__}.{target.__qualname__}"
        assert expected in run, name


def test_importing_is_light_and_silent():
    code = "import sys, quincunx; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & set(_HEAVY)
    own = {name for name in done.stdout.split() if name.startswith("quincunx.")}
    assert not own & {
        f"quincunx.{name}" for name in ("cli", "data", "experiments", "report.figures", "train")
    }


def test_engines_are_modules_of_their_public_names():
    """Whichever is imported first, it is one module, and the engine's own package is another."""
    pieces = []
    for name in ("onnxruntime", "openvino"):
        lines = [
            f"import quincunx.{name}",
            f"from quincunx.{name} import register",
            f"from quincunx import {name}",
        ]
        for first in lines:
            code = "; ".join([first, *lines, "import quincunx, quincunx.ops", "import sys"])
            code += f"\nassert quincunx.{name} is {name} is quincunx.ops.{name}, quincunx.{name}"
            code += f"\nassert {name}.register is register and sys.modules.get({name!r}) is not {name}"
            pieces.append((code, {}))
    for (code, _), found in zip(pieces, forked(pieces, "torch"), strict=True):
        assert found == [0, "", ""], code


def test_the_package_is_small_to_look_at():
    """At most 8 modules and 14 folders; each folder says in one line what it is for."""
    folders = [p for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(list(ROOT.glob("*.py"))) <= 8
    assert len(folders) <= 14
    for folder in folders:
        assert (folder / "__init__.py").read_text().startswith('"""'), folder


def test_importing_needs_no_extra():
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in _HEAVY)
    code = f"import sys; {blocked}import quincunx as qx; print(qx.networks.build('rrn8').__class__.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("PreResNet\n", "")


def test_version_typing_and_command():
    installed = distribution("quincunx")
    assert qx.__version__ == installed.version
    assert re.fullmatch(r"\d+\.\d+\.\d+([.a-z]\w+)?", qx.__version__)
    assert (ROOT / "py.typed").is_file()
    assert (ROOT / "report" / "templates" / "training.html.jinja").is_file()
    [command] = [entry for entry in installed.entry_points if entry.group == "console_scripts"]
    assert command.name == "quincunx"
    assert callable(command.load())
