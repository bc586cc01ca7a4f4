"""Files and folders that are written whole or not at all: killed, without room, from several at once."""

import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import stat
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx import writing
from quincunx.acceleration.journal import FolderJournal
from quincunx.reading import read_json
from quincunx.surgery.calibration import Layer
from quincunx.surgery.method import Replacement
from quincunx.train.checkpoint import write_checkpoint
from quincunx.writing import fill_folder, restore, write_atomically, write_json

FORK = multiprocessing.get_context("fork")
KILLS = int(os.environ.get("QUINCUNX_KILLS", "30"))


def two_files(number):
    def write(folder):
        for name in ("a", "b"):
            (folder / name).write_text(str(number) * 2000)

    return write


def whole(folder):
    """The number that both files of a folder hold."""
    texts = {(folder / name).read_text() for name in ("a", "b")}
    assert len(texts) == 1
    (text,) = texts
    number = text[: len(text) // 2000]
    assert text == number * 2000
    return int(number)


def write_for_ever(place, exchange):
    if not exchange:
        writing._exchange = lambda one, other: False
    for number in range(10, 10**6):
        fill_folder(place, two_files(number))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-steps"])
def test_a_killed_writer_leaves_the_old_or_the_new_folder(tmp_path, exchange):
    dice, place = random.Random(1), tmp_path / "m"
    fill_folder(place, two_files(1))
    for _ in range(KILLS):
        child = FORK.Process(target=write_for_ever, args=(place, exchange))
        child.start()
        time.sleep(dice.uniform(0.001, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        restore(place)
        assert whole(place) >= 1
    # what the killed ones left goes with the next
    fill_folder(place, two_files(2))
    assert whole(place) == 2
    assert os.listdir(tmp_path) == ["m"]


def write_file_for_ever(place):
    for number in range(10**6):
        write_json(place, [number] * 3000)


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path):
    dice, place = random.Random(2), tmp_path / "r.json"
    write_json(place, [0] * 3000)
    for _ in range(KILLS // 2):
        child = FORK.Process(target=write_file_for_ever, args=(place,))
        child.start()
        time.sleep(dice.uniform(0.001, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert len(set(read_json(place))) == 1
    write_json(place, [])
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_folder_that_was_moved_aside_is_found_again(tmp_path):
    """The kill between two renames, where the system has no exchange."""
    model = qx.networks.build("rrn8", width=2).eval()
    folder = qx.save(model, tmp_path / "m")
    folder.rename(tmp_path / ".m.0123abcd.old")
    loaded = qx.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert os.listdir(tmp_path) == ["m"]
    folder.rename(tmp_path / ".m.0123abcd.old")
    qx.save(model, folder)
    assert os.listdir(tmp_path) == ["m"]


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    seen = []

    def slow(folder):
        two_files(1)(folder)
        # another process looks for what killed ones left
        child = FORK.Process(target=writing._clean, args=(tmp_path / "m",))
        child.start()
        child.join()
        seen.append(sorted(os.listdir(folder)))

    (tmp_path / ".m.01234567.part").mkdir()
    (tmp_path / ".m.0123456.part").mkdir()
    (tmp_path / ".mm.01234567.part").mkdir()
    fill_folder(tmp_path / "m", slow)
    assert seen == [["a", "b"]]
    assert sorted(os.listdir(tmp_path)) == [".m.0123456.part", ".mm.01234567.part", "m"]


def test_folders_of_unfinished_work_have_names_that_a_later_run_knows():
    """Whatever else makes a temporary folder beside a user's file leaves it for ever when it is killed."""
    sources = Path(writing.__file__).parent.rglob("*.py")
    made = re.compile(r"(TemporaryDirectory|NamedTemporaryFile|mkdtemp|mkstemp)\([^)\n]*\bdir\s*=")
    assert [source.name for source in sources if made.search(source.read_text(encoding="utf-8"))] == []
    assert made.search('with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as name:')


def test_what_a_server_did_and_full_disks_that_are_named_are_said_as_they_were(tmp_path):
    for error in (ConnectionError("server: ended early"), OSError(f"{tmp_path}: needs 2 GB, 1 GB is free")):
        with pytest.raises(type(error)) as caught, writing.work_beside(tmp_path / "m"):
            raise error
        assert caught.value is error
    with pytest.raises(OSError, match=r"encoder error: '.*m'") as caught, writing.work_beside(tmp_path / "m"):
        raise OSError("encoder error")
    assert os.listdir(tmp_path) == []


def save_often(place, number):
    torch.set_num_threads(1)
    model = qx.networks.build("rrn8", width=2)
    with torch.no_grad():
        model.stem.weight.fill_(number)
    for _ in range(10):
        qx.save(model, place)


def test_several_processes_may_save_to_one_place(tmp_path):
    children = [FORK.Process(target=save_often, args=(tmp_path / "m", n)) for n in (1, 2, 3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert float(qx.load(tmp_path / "m").stem.weight.detach()[0, 0, 0, 0]) in (1, 2, 3)
    assert os.listdir(tmp_path) == ["m"]


def test_a_folder_that_another_process_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    real, removed = os.open, []

    def opens(path, *given, **options):
        if str(path).endswith(".part") and not removed:
            removed.append(path)
            Path(path).rmdir()
        return real(path, *given, **options)

    monkeypatch.setattr(os, "open", opens)
    with writing.work_beside(tmp_path / "m") as folder:
        assert removed
        assert folder.is_dir()
        assert folder not in removed
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = qx.save(qx.networks.build("rrn8", width=2), tmp_path / "m")
        write_json(tmp_path / "r.json", {})
        journal(tmp_path / "j")
    finally:
        os.umask(before)
    files = [*folder.iterdir(), tmp_path / "r.json", *(tmp_path / "j").iterdir()]
    assert len(files) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


# ---------------------------------------------------------------- a full disk


@contextmanager
def no_room_beyond(size):
    """Within: the kernel refuses to let a file of this process grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def journal(folder, value=0.0):
    layer = Layer("head", ("head",), nn.Conv2d(2, 3, 1))
    made = nn.Conv2d(2, 3, 1)
    nn.init.constant_(made.weight, value)
    spec = {"kind": "conv", "in_channels": 2, "out_channels": 3, "kernel_size": 1}
    FolderJournal(folder, {"run": 1}).keep(layer, Replacement(made, spec, {"v": value}))
    found = FolderJournal(folder, {"run": 1}).recall(layer)
    return float(found.module.weight.detach()[0, 0])


WRITERS = {
    "json": lambda folder: write_json(folder / "r.json", ["x"] * 500),
    "text": lambda folder: writing.write_text(folder / "log.txt", "x" * 2000),
    "checkpoint": lambda folder: write_checkpoint(folder / "c.pt", {"model": {"w": torch.zeros(900)}}),
    "artifact": lambda folder: qx.save(qx.networks.build("rrn8", width=2), folder / "m"),
    "journal": lambda folder: journal(folder / "j"),
}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_without_room_one_sentence_names_the_file_and_nothing_is_lost(tmp_path, write, room):
    write(tmp_path)
    before = contents(tmp_path)
    with no_room_beyond(room), pytest.raises(OSError) as caught:
        write(tmp_path)
    assert "\n" not in str(caught.value)
    assert any(str(tmp_path / name) in str(caught.value) for name in ("r.json", "log.txt", "c.pt", "m", "j"))
    assert ".part" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "mkdir", "replace", "chmod", "rename"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_an_error_of_the_disk_at_any_call_loses_nothing(tmp_path, monkeypatch, write, call):
    write(tmp_path)
    before = contents(tmp_path)
    real, at, left = getattr(os, call), 0, []

    def failing(*arguments, **keywords):
        left.append(call)
        if len(left) == at + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, call, failing)
    for number in range(4):
        at, left = number, []
        try:
            write(tmp_path)
        except OSError as error:
            refusal = error
        else:
            break
        assert refusal.errno == errno.EIO
        assert str(tmp_path) in str(refusal)
        # the description of a layer stands for the pair, and is refused where the weights are another's
        now = contents(tmp_path)
        assert now.keys() == before.keys()
    monkeypatch.undo()
    write(tmp_path)
    assert not [name for name in contents(tmp_path) if name.endswith((".part", ".old"))]


def test_a_writer_that_raises_leaves_nothing(tmp_path):
    def half(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "deep" / "f", half)
    assert os.listdir(tmp_path / "deep") == []
