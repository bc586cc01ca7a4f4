"""Decisions that were measured: kept where they are clear, read by later processes, never in the way."""

import json
import os
import subprocess
import sys

import pytest

from quincunx.fusion import decisions
from quincunx.writing import cache_folder


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QUINCUNX_CACHE", str(tmp_path / "cache"))
    decisions.forget()
    yield
    decisions.forget()


def measured(key, ratio):
    calls = []

    def measure():
        calls.append(1)
        return ratio

    return decisions.decision(key, measure), len(calls)


def test_a_clear_decision_is_kept_for_other_processes():
    assert measured(("a", 1), 3.0) == (3.0, 1)
    assert measured(("a", 1), 5.0) == (3.0, 0)
    decisions.forget()
    assert measured(("a", 1), 5.0) == (3.0, 0)
    assert measured(("a", 2), 0.5) == (0.5, 1)
    content = json.loads(decisions.decisions_file().read_text())
    assert content["ratios"] == {"a 1": 3.0, "a 2": 0.5}


def test_one_that_may_be_chance_is_measured_again_by_the_next_process():
    assert measured(("a",), 1.1) == (1.1, 1)
    assert measured(("a",), 0.9) == (1.1, 0)
    decisions.forget()
    assert measured(("a",), 0.9) == (0.9, 1)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"ratios": 3}', '{"ratios": {"a": "fast"}}', '{"ratios": {"a": -1}}']
)
def test_a_damaged_file_is_no_reason_to_stop(content):
    path = decisions.decisions_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert measured(("a",), 2.0) == (2.0, 1)
    decisions.forget()
    assert measured(("a",), 9.0) == (2.0, 0)


def test_a_folder_that_cannot_be_written_costs_a_measurement_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUINCUNX_CACHE", str(tmp_path / "file"))
    assert measured(("a",), 2.0) == (2.0, 1)
    assert measured(("a",), 9.0) == (2.0, 0)


def test_set_to_nothing_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QUINCUNX_CACHE", "")
    assert cache_folder() is None
    assert decisions.decisions_file() is None
    assert measured(("a",), 2.0) == (2.0, 1)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_the_users_cache_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("QUINCUNX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "quincunx"


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    code = (
        "import sys\nfrom quincunx.fusion.decisions import decision\n"
        "for i in range(30): decision((sys.argv[1], i), lambda: 2.0)"
    )
    environment = {**os.environ, "QUINCUNX_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen([sys.executable, "-c", code, name], env=environment) for name in "abc"]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    ratios = json.loads(decisions.decisions_file().read_text())["ratios"]
    assert len(ratios) == 90
