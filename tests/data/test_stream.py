"""Streamed photographs: the same whoever decodes them, bad ones named, dead workers reported."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from quincunx.data import Stream, WorkerFailed, batches, load_data, memory
from quincunx.data import stream as streaming


def picture(index, width=40, height=30):
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A small ImageNet: train/ and val/ by WordNet id, sizes differing."""
    root = tmp_path_factory.mktemp("net") / "imagenet"
    index = 0
    for part, count in (("train", 6), ("val", 3)):
        for name in ("n01440764", "n02093754"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                index += 1
                picture(index, 30 + index, 45 - index).save(root / part / name / f"{name}_{i}.JPEG")
    return root


@pytest.fixture
def own(photographs, tmp_path):
    """A copy that a test may damage."""
    for path in photographs.rglob("*.JPEG"):
        target = tmp_path / "own" / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "own"


def streamed(root, **options):
    return load_data(root, stream=True, size=16, **options)


def epoch(data, size=5, seed=None, part="train", **options):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    options = {"augment": "imagenet", "workers": 0, **options}
    return list(batches(getattr(data, part), data, size, generator=generator, **options))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, y) and torch.equal(a, b) for (x, a), (y, b) in zip(first, second, strict=True)
    )


# ---- what is streamed


def test_a_folder_is_streamed_with_parts_classes_and_usual_statistics(photographs):
    data = streamed(photographs)
    assert isinstance(data.train, Stream)
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.classes == ("n01440764", "n02093754")
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    assert (data.size, data.in_channels, data.augment) == ((16, 16), 3, "imagenet")
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.std == (0.229, 0.224, 0.225)
    facts = data.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["streamed"]
    assert "streamed" not in load_data(photographs, stream=False, size=16).describe()
    assert load_data(photographs, stream=True).size == (224, 224)
    for index in range(len(data.train)):
        assert os.path.exists(data.train.path(index))


def test_at_test_the_shorter_side_is_256_of_224_and_the_centre_is_cut(photographs):
    data = load_data(photographs, stream=True, size=28)
    images = torch.cat([x for x, _ in epoch(data, part="test")])
    shape = (1, 3, 1, 1)
    pixels = (
        (images * torch.tensor(data.std).view(shape) + torch.tensor(data.mean).view(shape)) * 255
    ).round()
    for index, found in enumerate(pixels):
        with Image.open(data.test.path(index)) as image:
            scale = 32 / min(image.size)
            resized = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (resized.width - 28) // 2, (resized.height - 28) // 2
        wanted = np.asarray(resized)[top : top + 28, left : left + 28]
        assert np.array_equal(found.permute(1, 2, 0).numpy(), wanted)


def test_a_share_is_held_out_where_there_is_no_test_part(photographs):
    data = streamed(photographs / "train", holdout=0.34)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert data.test.labels.bincount().tolist() == [2, 2]
    paths = [part.path(i) for part in (data.train, data.test) for i in range(len(part))]
    assert len(set(paths)) == 12
    assert "held out" in data.notes[0]


def test_the_parts_in_two_folders(photographs):
    data = streamed(photographs / "train", test_source=photographs / "val")
    assert (len(data.train), len(data.test)) == (12, 6)


# ---- in memory or streamed


def test_large_images_without_a_size_are_streamed(own):
    assert not isinstance(load_data(own, size=300).train, Stream)
    # the first image by name tells
    picture(0, 300, 250).save(own / "train" / "n01440764" / "a.png")
    data = load_data(own)
    assert isinstance(data.train, Stream)
    assert "250 x 300" in data.notes[-1]
    assert not isinstance(load_data(own, size=20).train, Stream)


def test_what_does_not_fit_is_streamed_or_refused_before_reading(own, monkeypatch):
    (own / "train" / "n01440764" / "a.png").write_bytes(b"never read")
    need = 2 * 19 * 300 * 300 * 3
    monkeypatch.setattr(memory, "available", lambda: need)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        load_data(own, size=300)
    monkeypatch.setattr(memory, "available", lambda: need - 1)
    data = load_data(own, size=300)
    assert isinstance(data.train, Stream)
    assert "9.8 MB of memory would be needed" in data.notes[-1]
    with pytest.raises(ValueError, match=r"own: needs 9\.8 MB of memory, 9\.8 MB are free; .*--stream"):
        load_data(own, size=300, stream=False)


def as_archive(root, path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root, "pictures")
    return path


def test_an_archive_is_read_into_memory_while_it_fits(photographs, tmp_path, monkeypatch):
    path = as_archive(photographs, tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match="stream=True: only a folder"):
        load_data(path, stream=True)
    with pytest.raises(ValueError, match=r"test_source=.*a\.tar\.gz' is an archive"):
        load_data(photographs, test_source=path, stream=True)
    monkeypatch.setattr(memory, "available", lambda: 2 * 18 * 64 * 64 * 3)
    assert len(load_data(path, size=64).train) == 12
    monkeypatch.setattr(memory, "available", lambda: 2 * 18 * 64 * 64 * 3 - 1)
    with pytest.raises(ValueError, match=r"a\.tar\.gz: needs more than the 0\.4 MB of memory .*--stream"):
        load_data(path, size=64)


def test_available_memory_is_some_and_no_more_than_the_machine_has():
    assert 2**20 < memory.available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    whole = memory.available()
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() == pytest.approx(whole, rel=0.2)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available() == 500_000


# ---- the same whoever decodes


@pytest.mark.parametrize("kind", ["none", "cifar", "imagenet"])
def test_batches_do_not_depend_on_the_number_of_workers(photographs, kind):
    data = streamed(photographs)
    first = epoch(data, seed=1, augment=kind)
    assert [len(labels) for _, labels in first] == [5, 5, 2]
    for workers in (1, 2):
        assert same(first, epoch(data, seed=1, augment=kind, workers=workers))
    assert not same(first, epoch(data, seed=2, augment=kind))


def test_an_image_is_augmented_alike_wherever_it_comes(photographs):
    """The epoch's key and the image's number alone say how, not the batch or what came before."""
    data = streamed(photographs)
    found = [
        sorted(image.numpy().tobytes() for images, _ in epoch(data, size, 3) for image in images)
        for size in (1, 4, 12)
    ]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 12
    other = {image.numpy().tobytes() for images, _ in epoch(data, 4, 4) for image in images}
    assert other.isdisjoint(found[0])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
def test_what_all_processes_get_is_what_one_gets(photographs, world, kind):
    data = streamed(photographs)
    for seed in (None, 4):
        whole = epoch(data, 5, seed, augment=kind)
        shares = [epoch(data, 5, seed, augment=kind, rank=rank, world=world) for rank in range(world)]
        joined = [
            tuple(torch.cat([share[step][i] for share in shares]) for i in (0, 1))
            for step in range(len(whole))
        ]
        assert same(whole, joined)
    assert [len(labels) for _, labels in epoch(data, 11, rank=0, world=2)] == [5, 0]


def test_the_global_generator_is_left_alone(photographs):
    data = streamed(photographs)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epoch(data, seed=1, workers=1)
    assert torch.equal(before, torch.get_rng_state())


# ---- what goes wrong


def damaged(root):
    path = root / "train" / "n02093754" / "n02093754_3.JPEG"
    path.write_bytes(path.read_bytes()[:500])
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_epoch_with_its_name(own, workers):
    path = damaged(own)
    data = streamed(own)
    with pytest.raises(ValueError, match=f"{path}: not a readable image .*--skip-bad"):
        epoch(data, workers=workers)
    assert not multiprocessing.active_children()


def test_unreadable_images_can_be_left_out_from_the_start(own):
    path = damaged(own)
    data = streamed(own, skip_bad=True)
    assert data.notes[0] == f"1 unreadable image left out: {path}"
    assert len(data.train) == sum(len(labels) for _, labels in epoch(data, seed=1)) == 11


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_where_its_batch_is_wanted_and_not_a_hang(photographs):
    data = streamed(photographs)
    before = signal.getsignal(signal.SIGCHLD)
    found = batches(data.train, data, 1, generator=torch.Generator(), augment="imagenet", workers=2)
    next(found)
    assert signal.getsignal(signal.SIGCHLD) == before
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    time.sleep(0.2)  # a training step, which must not be struck
    with pytest.raises(WorkerFailed, match=r"decodes images failed: DataLoader worker.*exited unexpectedly"):
        list(found)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("raised", "caught"),
    [(RuntimeError("boom 7"), WorkerFailed), (ZeroDivisionError("boom 7"), ZeroDivisionError)],
)
def test_an_exception_in_a_worker_comes_with_its_message(photographs, monkeypatch, raised, caught):
    def broken(*_):
        raise raised

    monkeypatch.setattr(streaming, "photograph", broken)
    data = streamed(photographs)
    with pytest.raises(caught, match="boom 7"):
        epoch(data, seed=1, workers=1)
    assert not multiprocessing.active_children()


def test_an_epoch_that_is_broken_off_leaves_no_worker(photographs):
    data = streamed(photographs)
    found = batches(data.train, data, 2, workers=2)
    next(found)
    assert len(multiprocessing.active_children()) == 2
    del found
    assert not multiprocessing.active_children()


def test_one_worker_a_core_up_to_eight(monkeypatch):
    for cores, wanted in ((1, 1), (3, 3), (64, 8)):
        monkeypatch.setattr(streaming.os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        assert streaming.default_workers() == wanted


def test_every_mode_is_streamed_in_three_channels(own):
    folder = own / "train" / "n01440764"
    picture(3).convert("L").save(folder / "a.png")
    picture(4).convert("CMYK").save(folder / "b.jpg")
    file = io.BytesIO()
    picture(5).convert("P").save(file, "gif")
    (folder / "c.gif").write_bytes(file.getvalue())
    images = torch.cat([x for x, _ in epoch(streamed(own), seed=2)])
    assert images.shape == (15, 3, 16, 16)
