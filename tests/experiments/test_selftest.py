"""The test of an installation finds what is right, what is wrong, and what is missing."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from typer.testing import CliRunner

import quincunx as qx
from quincunx.cli import app
from quincunx.experiments import selftest
from quincunx.experiments.selftest import Finding, examine, report_line

CHEAP = {"rounds": 3, "round_seconds": 1e-3}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    measure = selftest.measure
    monkeypatch.setattr(selftest, "measure", lambda runs, **_: measure(runs, **CHEAP))


def by_name():
    return {finding.name: finding for finding in examine()}


def test_an_installation_that_is_right_has_nothing_wrong():
    found = by_name()
    assert {finding.state for finding in found.values()} <= {"ok", "note"}
    for name in (
        "convolutions in float32",
        "convolutions in bfloat16",
        "gradients",
        "a fused network in float32",
    ):
        assert found[name].state == "ok"
    assert "speed in bfloat16" in found


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("sampled_conv2d", "convolutions in float32"),
        ("sampled_conv2d", "gradients"),
        ("sampled_conv_transpose2d", "convolutions in bfloat16"),
    ],
)
def test_a_kernel_that_answers_wrongly_is_found(monkeypatch, name, broken):
    right = getattr(selftest, name)
    monkeypatch.setattr(selftest, name, lambda *args, **settings: 1.05 * right(*args, **settings))
    assert by_name()[broken].state == "wrong"


@pytest.mark.skipif(qx.backend().name != "native", reason="the extension is not built")
def test_eight_bits_that_differ_are_found(monkeypatch):
    assert by_name()["convolutions in int8"].state == "ok"
    right = selftest.convolve

    def wrong(*args, back_end, **settings):
        y = right(*args, back_end=back_end, **settings)
        return y + (torch.arange(y.shape[-1]) == 0) if back_end == "native" else y

    monkeypatch.setattr(selftest, "convolve", wrong)
    found = by_name()["convolutions in int8"]
    assert found.state == "wrong"
    assert "differ from the reference" in found.said


def test_values_that_are_not_finite_are_wrong(monkeypatch):
    right = selftest.sampled_conv2d
    monkeypatch.setattr(
        selftest, "sampled_conv2d", lambda *args, **settings: right(*args, **settings) * float("nan")
    )
    assert by_name()["convolutions in float32"].state == "wrong"


def test_a_fused_network_that_answers_wrongly_is_found(monkeypatch):
    monkeypatch.setattr(selftest, "fuse", lambda model, *_, **__: lambda x: model(x) + 1)
    assert by_name()["a fused network in float32"].state == "wrong"


def test_what_is_missing_or_in_the_way_is_noted(monkeypatch, tmp_path):
    def version(package):
        if package == "tensorly":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(selftest, "version", version)
    monkeypatch.setattr(selftest, "_openmp", lambda: ["libgomp", "libiomp5"])
    monkeypatch.setattr(
        selftest, "backend", lambda: qx.ops.Backend("reference", "QUINCUNX_BACKEND=reference")
    )
    monkeypatch.setenv("QUINCUNX_CACHE", "")
    found = by_name()
    assert found["extra methods"] == Finding(
        "extra methods", "note", "tensorly not installed: pip install 'quincunx[methods]'"
    )
    assert "libgomp and libiomp5" in found["threads"].said
    assert "saves no time" in found["back end"].said
    assert "measures anew" in found["cache"].said
    line = report_line(list(found.values()))
    assert line.startswith("quincunx ")
    assert torch.__version__ in line
    assert line.endswith("| without methods")
    assert "note: threads (libgomp and libiomp5" in line
    assert "\n" not in line


def test_the_line_has_what_changes_what_computes(monkeypatch):
    monkeypatch.setenv("QUINCUNX_ISA", "avx2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1" * 99)
    monkeypatch.setenv("QUINCUNX_RESULTS", "https://name:password@example.org")
    line = report_line([])
    assert "| QUINCUNX_ISA=avx2 |" in line
    assert line.endswith(f"| OMP_NUM_THREADS={'1' * 40}")
    assert "password" not in line


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("triton", "ok", "a card, triton"),
        ("reference", "note", "a card, reference, which saves no time: old"),
    ],
)
def test_a_gpu_is_named_with_what_computes_there(monkeypatch, name, state, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(
        selftest, "backend", lambda device="cpu": qx.ops.Backend("native" if device == "cpu" else name, "old")
    )
    assert selftest._gpu() == Finding("GPU", state, said)
    assert f"| {said}" in report_line([])


def test_the_cache_says_what_it_holds(monkeypatch, tmp_path):
    monkeypatch.setenv("QUINCUNX_CACHE", str(tmp_path))
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "a.json").write_text("{}")
    assert selftest._cache().said == f"{tmp_path}: 1 file of measurements"


def test_the_command_says_it_and_ends_with_1_where_an_answer_is_wrong(monkeypatch):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "ok    gradients: equal torch's" in result.output
    assert "To report a problem, send this line:" in result.output
    monkeypatch.setattr(selftest, "fuse", lambda model, *_, **__: lambda x: model(x) + 1)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told["wrong"] is True
    assert "wrong: a fused network in float32" in told["report"]
