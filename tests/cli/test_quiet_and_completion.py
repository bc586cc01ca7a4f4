"""``--quiet``, ``--version`` and what the shell completes."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import quincunx as qx
from helpers import ROOT
from helpers.commands import call
from quincunx.cli import app
from quincunx.measure import version
from quincunx.progress import is_silenced, progress_bar, silenced

TINY = ("--network", "rsbn8", "--width", "4", "--epochs", "1", "--threads", "1")


@pytest.fixture
def photographs(tmp_path):
    """Twelve images and one text, which the reader tells of in a note."""
    for part in ("train", "test"):
        for number, name in enumerate("ab"):
            folder = tmp_path / "photographs" / part / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((8, 8, 3), 90 * number + 9 * i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photographs" / "train" / "a" / "audio.bin").write_bytes(b"\0\1\2")
    return tmp_path / "photographs"


def test_quiet_leaves_results_alone(photographs, tmp_path):
    loud = call("train", *TINY, "--data", photographs, "--out", tmp_path / "loud")
    assert "note: " in loud.stderr
    quiet = call("train", *TINY, "--data", photographs, "--out", tmp_path / "quiet", "--quiet")
    assert (loud.exit_code, quiet.exit_code) == (0, 0)
    assert quiet.stderr == ""
    assert "test error" in quiet.stdout
    before = call("-q", "train", *TINY, "--data", photographs, "--out", tmp_path / "before")
    assert (before.exit_code, before.stderr) == (0, "")
    # the next call in this process is heard again
    assert not is_silenced()


def test_quiet_does_not_hide_an_error(tmp_path):
    refused = call("evaluate", tmp_path / "nothing", "-q")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")


def test_no_bar_within_silenced(capsys):
    def shown():
        with progress_bar(True) as bar:
            bar.add_task("long work", total=1, state="")
        return "long work" in capsys.readouterr().err

    assert shown()
    with silenced():
        assert not shown()
        with silenced(False):
            assert shown()


def test_the_version_names_commit_and_back_ends_without_torch():
    code = "import sys; sys.argv = ['quincunx', '--version']; from quincunx.__main__ import main; main(); "
    code += "sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == f"{version.version_line()}\n"
    assert call("--version").stdout == run.stdout
    assert f"(commit {version.commit()})" in run.stdout
    assert run.stdout.strip().endswith("reference")
    assert ("native" in run.stdout) == (qx.backend("cpu").name == "native")


def test_the_commit_of_a_package_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv("QUINCUNX_COMMIT", raising=False)
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    monkeypatch.setattr(version, "COMMIT", tmp_path / "commit.txt")
    assert version.commit() is None
    assert "(commit unknown)" in version.version_line()
    (tmp_path / "commit.txt").write_text("0123456789ab\n")
    assert version.commit() == "0123456789ab"
    monkeypatch.setenv("QUINCUNX_COMMIT", "abcdef")
    assert version.commit() == "abcdef"


def test_a_build_says_its_commit(tmp_path):
    """What setup.py writes into wheels, without building one."""
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; "
    code += f"setup.write_commit({str(tmp_path)!r})"
    (tmp_path / "measure").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    known = (version.commit() or "").rstrip("+")
    assert (tmp_path / "measure" / "commit.txt").read_text().strip() == known


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("quincunx acc", ["accelerate"]),
        ("quincunx train --net", ["--network"]),
        ("quincunx train --network csbn2", ["csbn29"]),
        ("quincunx train --recipe pyr", ["pyramidnet"]),
        ("quincunx accelerate x --method low", ["lowrank"]),
        ("quincunx accelerate x --task seg", ["segmentation"]),
        ("quincunx evaluate x --dtype bf", ["bfloat16"]),
        ("quincunx accelerate x --dtype in", ["int8"]),
    ],
)
def test_the_shell_completes(typed, offered, monkeypatch, capsys):
    for name, value in {
        "_QUINCUNX_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        app(prog_name="quincunx")
    assert capsys.readouterr().out.split() == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_in_the_users_shell(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert call("--install-completion", shell).exit_code == 0
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "_QUINCUNX_COMPLETE" in written
