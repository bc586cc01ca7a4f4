"""``--log``: a file that says what was asked, what was said, how far long work was, and how it ended."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from helpers.commands import call, refused
from quincunx.cli import cost as cost_verb
from quincunx.progress import LOG, logged_to, progress_bar

TINY = ("--network", "rsbn8", "--width", "4", "--epochs", "1", "--threads", "1")


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_a_log_has_the_command_what_is_said_and_the_end(tmp_path):
    log = tmp_path / "log.txt"
    done = call("train", *TINY, "--out", tmp_path / "run", "--log", log, "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    text = lines(log)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) ", line) for line in text)
    assert "quincunx" in text[1]
    assert "torch" in text[1]
    # progress, which --quiet hides
    assert any(re.search(r"rsbn8: \d+ of \d+, .*epoch 1", line) for line in text)
    assert any("test error" in line for line in text)
    assert text[-1].endswith("ended with exit code 0")
    before = len(text)
    # the same command goes on in the same file; before the verb it is the same option
    call("--log", log, "cost", "rrn8")
    text = lines(log)
    assert len(text) > before
    assert any("M MACs" in line for line in text[before:])
    assert any("stages.0.0.conv1" in line for line in text[before:]), "tables as they are printed"
    assert "\x1b" not in log.read_text()


def test_a_refusal_is_in_the_log_with_its_exit_code(tmp_path):
    log = tmp_path / "log.txt"
    for order in (
        ("evaluate", tmp_path / "none", "--log", log),
        ("--log", log, "evaluate", tmp_path / "none"),
    ):
        log.unlink(missing_ok=True)
        said = refused(*order)
        text = lines(log)
        assert text[-2].endswith(f"ERROR   {said.removeprefix('error: ')}")
        assert text[-1].endswith("ended with exit code 2")


def test_a_defect_leaves_its_place_in_the_log(tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(cost_verb, "print_cost", broken)
    with pytest.raises(ZeroDivisionError):
        call("cost", "rrn8", "--log", tmp_path / "log.txt")
    text = (tmp_path / "log.txt").read_text()
    assert "ended by an error" in text
    assert "ZeroDivisionError: a defect" in text
    assert "test_log.py" in text


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    said = refused("cost", "rrn8", "--log", tmp_path / "none" / "log.txt")
    assert "log=" in said
    assert "cannot be written (No such file or directory)" in said


def test_the_next_command_is_not_logged(tmp_path):
    call("cost", "rrn8", "--log", tmp_path / "log.txt")
    before = (tmp_path / "log.txt").read_bytes()
    call("cost", "rrn8")
    assert (tmp_path / "log.txt").read_bytes() == before


def test_warnings_of_other_modules_are_in_the_log_and_shown(tmp_path, capsys):
    with logged_to(tmp_path / "log.txt"):
        logging.getLogger("quincunx").warning("mind this")
    assert lines(tmp_path / "log.txt")[0].endswith("WARNING mind this")
    assert len(lines(tmp_path / "log.txt")) == 1
    assert "mind this" in capsys.readouterr().err


def test_long_work_is_logged_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("quincunx.progress.time.monotonic", lambda: now[0])
    with logged_to(tmp_path / "log.txt"), progress_bar(False) as bar:
        bar.get_time = lambda: now[0]
        task = bar.add_task("work", total=100, state="")
        for step in range(1, 101):
            now[0] = float(step)
            bar.update(task, completed=step, state=f"step {step}")
        LOG.info("over")
    text = lines(tmp_path / "log.txt")
    told = [line for line in text if "work: " in line]
    assert len(told) == 11
    assert told[1].endswith("work: 11 of 100, about 0:01:29 left, step 11")
    assert told[-1].endswith("work: 100 of 100, step 100")


def in_a_terminal(*arguments, **environment):
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "quincunx", *map(str, arguments)]
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    run = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**keep, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    content = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        content += piece
    os.close(ours)
    assert run.wait() == 0
    return content.decode(errors="replace")


# a colour of the text or of what is behind it
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_no_color_is_honoured(tmp_path):
    """The bar, the sign of life while data are read, tables and sentences: all of them are in a training."""
    # https://no-color.org: set to nothing is not set
    coloured = in_a_terminal("train", *TINY, "--out", tmp_path / "a", NO_COLOR="")
    assert COLOUR.search(coloured)
    plain = in_a_terminal("train", *TINY, "--out", tmp_path / "b", NO_COLOR="1")
    assert "test error" in plain
    assert not COLOUR.search(plain)
