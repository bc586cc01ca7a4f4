"""The command line as a user meets it: what it prints where, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import quincunx as qx
from helpers.commands import call, document, refused
from quincunx.__main__ import main
from quincunx.cli import printing as console
from quincunx.cli.printing import _kept, warn_in_one_line
from quincunx.networks.spec import read_spec
from quincunx.ops import native

SMALL = ("--network", "rsbn8", "--width", "4")
VERBS = ("train", "evaluate", "cost", "report", "info", "demo", "reproduce", "accelerate", "compare", "cache")


@pytest.fixture(autouse=True)
def _own_folder_and_threads(tmp_path, monkeypatch):
    """Each test in an empty folder, on one thread, in a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_and_shows_an_example(verb):
    text = call(verb, "--help").stdout
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "--json" in text
    example = text.partition("Example:\n")[2].strip()
    assert all(line.strip().startswith(f"quincunx {verb}") for line in example.splitlines())
    assert 1 <= len(example.splitlines()) <= 3
    # an option without a word of explanation stands alone on its line
    for line in text.partition("Options:")[2].splitlines():
        if line.startswith("  --"):
            assert len(line.split("  ")) > 2, line


def test_the_first_help_lists_every_verb_whole():
    text = call("--help").stdout
    for verb in VERBS:
        assert f"\n  {verb} " in text
    assert "..." not in text.partition("Commands:")[2]
    assert call("--version").stdout.startswith(f"quincunx {qx.__version__} (commit ")


def test_train_evaluate_report(tmp_path):
    """The main road: each verb's JSON agrees with the files and with the next verb."""
    result = document("train", *SMALL, "--epochs", 2, "--threads", 1)
    folder = tmp_path / "runs" / "rsbn8-2of4-width-4"
    assert result == json.loads((folder / "run.json").read_text())
    assert len(result["history"]) == 2
    assert result["recipe"]["name"] == "digits"
    assert result["environment"]["threads"] == 1
    evaluated = document("evaluate", folder / "model")
    assert evaluated["error"] == result["test_error"]
    assert evaluated["images"] == 360
    # a run's folder stands for the artifact in it
    assert document("evaluate", folder)["artifact"] == str(folder / "model")
    assert "test error" in call("evaluate", folder).stdout
    low = document("evaluate", folder, "--dtype", "int8", "--calibration", 64, "--max-drop", 100)
    assert (low["dtype"], low["int8"]["images"], low["images"]) == ("int8", 64, 360)
    assert low["error"] == pytest.approx(result["test_error"], abs=0.1)
    said = call("evaluate", folder, "--dtype", "int8", "--calibration", 64, "--max-drop", 100).stdout
    # whether layers are kept depends on what was trained, and its last digits on the processor
    kept = f" ({', '.join(low['int8']['kept'])} in {low['int8']['rest']})" if low["int8"]["kept"] else ""
    assert low["int8"]["rest"] in ("bfloat16", "float32")
    assert f"fused in int8{kept}: test error" in " ".join(said.split())
    assert "observer='best'" in refused("evaluate", folder, "--dtype", "int8", "--observer", "best")
    small = qx.calibrate(qx.load(folder / "model"), torch.rand(16, 1, 8, 8), max_drop=100)
    qx.save(small, tmp_path / "small", info=read_spec(folder / "model")["info"])
    own = document("evaluate", tmp_path / "small")
    assert (own["dtype"], own["int8"]["images"]) == ("int8", 16)
    assert "fused in int8" in " ".join(call("evaluate", tmp_path / "small").stdout.split())
    assert document("evaluate", tmp_path / "small", "--dtype", "float32")["dtype"] == "float32"
    page = document("report", "runs")["report"]
    assert "rsbn8 2/4, width 4" in (tmp_path / page).read_text()
    assert call("report", "runs", "--out", "page.html").stdout == "wrote page.html\n"
    # a second call does not destroy the first, other settings do not meet it
    before = (folder / "run.json").read_bytes()
    assert "--resume" in refused("train", *SMALL, "--epochs", 2)
    assert "another recipe: epochs was 2, now 1" in refused("train", *SMALL, "--epochs", 1, "--resume")
    assert "another network: name was 'rsbn8', now 'rsbn14'" in refused(
        "train", "--network", "rsbn14", "--width", 4, "--epochs", 2, "--resume", "--out", folder
    )
    assert (folder / "run.json").read_bytes() == before
    assert call("train", *SMALL, "--epochs", 1, "--sampling", "1/4", "--seed", 3).exit_code == 0
    assert (tmp_path / "runs" / "rsbn8-1of4-width-4-seed3" / "run.json").exists()


def test_training_ends_with_the_next_steps(tmp_path):
    said = call("train", *SMALL, "--epochs", 1, "--out", "run").stdout.splitlines()
    assert said[-1] == (
        "next: quincunx accelerate run --data digits makes it faster; quincunx evaluate run --data digits "
        "judges it again"
    )


def test_cost():
    found = document("cost", "rsbn8", "--sampling", "1/4", "--input", "2x1x32x32")
    model = qx.networks.build("rsbn8", 10, 1, sampling="1/4")
    expected = qx.cost(model, torch.zeros(2, 1, 32, 32))
    assert (found["macs"], found["params"], found["input"]) == (
        expected.macs,
        expected.params,
        [2, 1, 32, 32],
    )
    text = call("cost", "rsbn8", "--sampling", "1/4", "--input", "2x1x32x32").stdout
    assert f"{expected.macs:,}" in text
    assert f"{expected.params:,}" in text


def test_info():
    found = document("info")
    assert found["quincunx"] == qx.__version__
    assert found["networks"] == qx.networks.names()
    assert (found["backend"], found["backend_reason"]) == (qx.backend().name, qx.backend().reason)
    assert qx.backend().name in call("info").stdout
    assert all(float(found[kind].split(" times as fast")[0]) > 0 for kind in ("bfloat16", "int8"))
    if qx.backend().name == "native":
        assert found["AMX tiles"].startswith("used for bfloat16") == (qx.backend().isa == "amx")
        assert native.tiles_refused() in found["AMX tiles"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--network", "rsbm20"], ["unknown network", "nearest first: rsbn20,"]),
        (["train", "--network", "rsbn21"], ["6n + 2", "such as 20"]),
        (["train", "--data", "digit"], ["data='digit'", "known: digits"]),
        (["train", "--recipe", "shrt"], ["unknown recipe; nearest first: short,"]),
        (["train", "--sampling", "5/4"], ["sampling='5/4'", "2/4"]),
        (["train", "--sampling", "chesboard"], ["sampling='chesboard'", "chessboard"]),
        (["train", "--sampling", "cosets:1:0,0"], ["period=1", ">= 2"]),
        (["train", "--sampling", "cosets:2:0,2"], ["(0, 2)", "[0, 2)"]),
        (["train", "--sampling", "random:2"], ["rate=2.0", "(0, 1]"]),
        (["train", "--network", "rrn8", "--sampling", "1/4"], ["rrn8 has no such setting"]),
        (["train", "--down", "max"], ["'stride' or 'avgpool'"]),
        (["train", "--threads", "0"], ["--threads"]),
        (["train", "--epochs", "0"], ["epochs=0: expected at least 1"]),
        (["train", "--lr", "nan"], ["lr=nan: expected a positive number"]),
        (["train", "--lr", "fast"], ["--lr"]),
        (["train", "--seed", "-1"], ["--seed"]),
        (["train", "--data", "empty"], ["empty: no images found"]),
        (["train", "--out", "file"], ["out='file'", "not a folder"]),
        (["train", "--out", "file/below"], ["out='file/below'", "file is not a folder"]),
        (["report", "nothing", "--out", "file/page.html"], ["out='file/page.html'", "file is not a folder"]),
        (["demo", "--out", "file"], ["out='file'", "not a folder"]),
        (["cost", "rsbn20", "--input", "1x3x32"], ["input='1x3x32'", "1x3x32x32"]),
        (["cost", "rsbn20", "--input", "1x3x1x1"], ["grid 1 x 1", "K=2"]),
        (["cost", "nosuch"], ["unknown network"]),
        (["evaluate", "empty"], ["empty: no artifact here"]),
        (
            ["evaluate", "cifar-resnet20"],
            ["cifar-resnet20: no such folder; a network's name needs --weights"],
        ),
        (["report", "empty"], ["empty: no results"]),
        (["report", "nosuch"], ["nosuch: no such folder"]),
        (["report", "file"], ["file: not a folder"]),
        (["nosuch"], ["nosuch"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    sentence = refused(*arguments)
    for word in words:
        assert word in sentence
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]
    # with --json nothing else goes to standard output either
    if arguments != ["nosuch"]:
        assert refused(*arguments, "--json") == sentence


def test_an_artifact_for_other_images(tmp_path):
    qx.save(qx.networks.build("rrn8", in_channels=3), tmp_path / "rgb")
    assert "channels" in refused("evaluate", "rgb")
    qx.save(qx.networks.build("rrn8", num_classes=7, in_channels=1), tmp_path / "seven")
    assert "10 classes" in refused("evaluate", "seven")


def test_a_run_that_diverges_fails_with_1(tmp_path):
    sentence = refused("train", *SMALL, "--lr", 1e9, "--epochs", 1, "--out", "run", "--json", code=1)
    assert "loss is" in sentence
    assert "--lr" in sentence
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_full_disk_fails_with_1(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("quincunx.train.loop.write_text", full)
    assert "No space left on device" in refused("train", *SMALL, "--epochs", 1, "--json", code=1)


def test_too_little_memory_is_said(monkeypatch):
    def hungry(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 48 bytes.")

    monkeypatch.setattr("quincunx.cli.cost.cost", hungry)
    assert "not enough memory for 48 bytes" in refused("cost", "rsbn8", code=1)


def test_a_defect_is_not_dressed_up_as_bad_input(monkeypatch):
    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr("quincunx.cli.cost.cost", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        call("cost", "rsbn8")


@pytest.mark.parametrize(
    ("missing", "verb", "extra"),
    [
        ("typer", ["info"], "train"),
        ("rich", ["--help"], "train"),
        ("sklearn", ["train", *SMALL], "train"),
        ("matplotlib", ["demo"], "report"),
        ("jinja2", ["report", "."], "report"),
    ],
)
def test_without_an_extra_the_extra_is_named(tmp_path, monkeypatch, capsys, missing, verb, extra):
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing in ("typer", "rich"):
        for name in ("cli", "cli.printing"):
            monkeypatch.delitem(sys.modules, f"quincunx.{name}")
    monkeypatch.setattr(sys, "argv", ["quincunx", *verb])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    needed = err.splitlines()[-1]
    assert needed == (
        f"error: this command needs {missing}, which is not installed; pip install 'quincunx[{extra}]'"
    )
    assert not list(tmp_path.iterdir())


def test_a_warning_of_the_package_is_one_line_without_its_place_in_the_code(capsys, monkeypatch):
    others = []
    monkeypatch.setattr(console, "_show_warning", lambda *given: others.append(given[2]))
    here = Path(qx.__file__).parent / "acceleration.py"
    warn_in_one_line(UserWarning("nothing was replaced"), UserWarning, str(here), 7)
    assert capsys.readouterr().err == "warning: nothing was replaced\n"
    warn_in_one_line(UserWarning("theirs"), UserWarning, "/elsewhere/torch/nn.py", 7)
    assert (others, capsys.readouterr().err) == (["/elsewhere/torch/nn.py"], "")


def test_layers_that_stay_for_one_reason_are_one_line():
    skipped = {f"l{i}": "left out by where" for i in range(9)} | {"m": "no gain", "n": "no gain"}
    assert _kept(skipped) == ["kept m, n: no gain", "kept l0, l1, l2, l3, l4, l5, 3 more: left out by where"]


def test_a_pipe_that_closes_early_is_no_traceback():
    command = f"{sys.executable} -m quincunx cost rsbn110 --json | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == '{\n  "netwo'
    assert done.stderr == ""


def test_ctrl_c_keeps_the_checkpoint_and_resume_finishes(tmp_path):
    arguments = ["train", *SMALL, "--epochs", "9", "--threads", "1", "--out", "run"]
    # where the tests run in the background it may be ignored, which children would inherit
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "quincunx", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") >= 1):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, ""), err
    sentence = err.splitlines()[-1]
    assert sentence.startswith("error: stopped")
    assert "--resume" in sentence
    assert "Traceback" not in err
    kept = [json.loads(line) for line in log.read_text().splitlines()]
    resumed = document(*arguments, "--resume")
    assert 1 <= len(kept) < len(resumed["history"]) == 9
    assert resumed["history"][: len(kept)] == kept


def test_a_table_is_planned_without_any_data_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("reproduce", "table2", "--plan", "--depths", "20", "--seeds", "0,1", "--json")
    planned = json.loads(done.stdout)
    assert [row["label"] for row in planned["rows"]] == ["rrn20", "rsbn20 1/4", "rsbn20 2/4", "rsbn20 3/4"]
    assert planned["recipe"]["epochs"] == 400
    assert not list(tmp_path.iterdir())
    text = call("reproduce", "table2", "--plan", "--depths", "20").stdout
    assert "hours left" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table9",), "experiment='table9': unknown; nearest first: table"),
        (("table1", "--depths", "21"), "depths=21: table1 has 20"),
        (("table1", "--depths", "a"), "depths='a': expected different numbers with commas"),
        (("table1", "--seeds", "0,0"), "seeds='0,0': expected different numbers with commas"),
        (("table4",), "ImageNet has to be there already; give its folder with --data"),
        (("table1", "--data", "nowhere"), "neither a path nor a known data set"),
        (("espace-figure3", "--data", "nowhere"), "neither a path nor a known data set"),
        (("espace-figure3", "--weights", "w.pt"), "its errors need --data"),
        (("espace-figure3", "--weights", "w.pt", "--data", "digits"), "w.pt: no such file"),
        (("espace-table2", "--data", "digits"), "data: espace-table2 replaces many layers"),
        (("espace-figure3", "--peers", "nobody"), "peers='nobody': expected some of"),
        # what would do nothing
        (
            ("espace-figure3", "--recipe", "short"),
            "--recipe does nothing for espace-figure3; leave it out",
        ),
        (("espace-figure3", "--lr", "0.1"), "lr: --lr does nothing for espace-figure3"),
        (
            ("espace-figure3", "--epochs", "3"),
            "--epochs does nothing for espace-figure3 without --weights and",
        ),
        (("espace-figure3", "--seeds", "0,1,2"), "--seeds does nothing"),
        (("espace-figure3", "--device", "cpu"), "--device does nothing"),
        (
            ("espace-figure3", "--workers", "2"),
            "--workers does nothing for espace-figure3 without --weights and",
        ),
        (("espace-figure3", "--data", "digits", "--epochs", "1"), "--epochs does nothing for espace-figure3"),
        (
            ("espace-figure3", "--weights", "w", "--data", "d", "--peers", "onnxruntime"),
            "--peers does nothing for espace-figure3 with --weights; leave it out",
        ),
        (
            ("espace-figure3", "--weights", "w", "--data", "d", "--batch-size", "8"),
            "--batch-size does nothing",
        ),
        (("espace-figure3", "--plan", "--out", "x"), "--out does nothing for espace-figure3 with --plan"),
        (("table1", "--weights", "w.pt"), "--weights does nothing for table1; leave it out"),
        (("table1", "--batch", "8"), "batch: --batch does nothing for table1"),
        (("table1", "--peers", "torch eager"), "--peers does nothing for table1"),
        (("table1", "--plan", "--device", "cpu"), "--device does nothing for table1 with --plan"),
    ],
)
def test_what_cannot_be_reproduced_is_said_and_leaves_nothing(tmp_path, arguments, message):
    assert message in refused("reproduce", *arguments)
    assert not list(tmp_path.iterdir())


def test_training_starts_from_an_artifact_or_published_weights_and_learns_from_a_teacher(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "ab":
            (data / part / label).mkdir(parents=True)
            for i in range(3):
                pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / part / label / f"{i}.png")
    common = ("--data", data, "--epochs", "1", "--json")
    first = call("train", "--network", "cifar-resnet8", *common, "--out", "first")
    assert first.exit_code == 0, first.stderr
    further = call("train", "--start", "first", "--recipe", "finetune", *common, "--out", "second")
    result = json.loads(further.stdout)
    assert result["network"]["name"] == "cifar-resnet8"
    assert result["recipe"]["every"] == 10_000
    taught = ("train", "--network", "cifar-resnet8", "--teacher", "first/model", "--distill", "0.5", *common)
    assert json.loads(call(*taught, "--out", "third").stdout)["recipe"]["distill"] == 0.5
    refused = call("train", "--start", "first", "--width", "8", *common, "--out", "fourth")
    assert refused.exit_code == 2
    assert "the artifact says its own width" in refused.stderr

    state = qx.networks.build("cifar-resnet8", 2, 3).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, "published.th")
    published = call(
        "train", "--network", "cifar-resnet8", "--start", "published.th", *common, "--out", "fifth"
    )
    assert json.loads(published.stdout)["data"]["mean"] == [0.485, 0.456, 0.406]


# ---------------------------------------------------------------- what is kept on the machine


def test_what_was_measured_is_shown_and_removed(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUINCUNX_CACHE", str(folder))
    (folder / "decisions").mkdir(parents=True)
    for path in ("decisions/one.json", "tiles-card.json", "cifar-10.tar.gz"):
        (folder / path).write_text("{}")
    found = document("cache")
    assert found["measurements"] == ["one.json", "tiles-card.json"]
    assert not found["removed"]
    assert "removed 2 files of measurements" in call("cache", "--clear").stdout
    assert [path.name for path in folder.iterdir()] == ["cifar-10.tar.gz"]
    assert document("cache")["measurements"] == []
    monkeypatch.setenv("QUINCUNX_CACHE", "")
    assert "nothing is kept" in call("cache").stdout
