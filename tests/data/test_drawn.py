"""Calibration images that are read anew in each pass: the same values, in bounded memory."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import quincunx as qx
from quincunx.acceleration.judge import sample_batches
from quincunx.acceleration.scores import Scores
from quincunx.acceleration.together import Team
from quincunx.data import Drawn, ImageData, Items, Stream, batches, degraded, draw, load_data
from quincunx.data.drawn import most_kept
from quincunx.fusion.calibrate import calibrate
from quincunx.fusion.calibrated import read_images
from quincunx.layers.eightbits import quantisation_of
from quincunx.reading import Unreadable

SIDE = 24
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def streamed(folder, count=40, kept=8):
    """Photographs in files, each named several times, so that many images need few files."""
    draws = np.random.default_rng(0)
    files = []
    for number in range(kept):
        path = folder / f"{number}.png"
        Image.fromarray(draws.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
        files.append(str(path).encode())
    chosen = torch.arange(count) % kept
    part = Stream(np.array([files[i] for i in chosen.tolist()]), chosen % 4, SIDE)
    return ImageData("streamed", part, part, ("a", "b", "c", "d"), MEAN, STD, "imagenet")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and torch.equal(c, d) and a.stride() == b.stride()
        for (a, c), (b, d) in zip(one, other, strict=True)
    )


def kinds(folder):
    digits = load_data("digits")
    return {"memory": digits, "files": streamed(folder), "items": degraded(digits, noise=25)}


@pytest.mark.parametrize("kind", ["memory", "files", "items"])
@pytest.mark.parametrize("most", [0, 2 * 10 * SIDE * SIDE * 3 + 5, 1 << 30])
def test_each_pass_gives_the_first_images_of_an_epoch_whatever_is_kept(tmp_path, kind, most):
    data = kinds(tmp_path)[kind]
    epoch = batches(data.train, data, 10, generator=torch.Generator().manual_seed(3), workers=0)
    expected = [next(epoch) for _ in range(4)]
    expected[3] = expected[3][0][:5], expected[3][1][:5]
    found = draw(data, 35, 3, 10, workers=0, most=most)
    assert (len(found), found.images) == (4, 35)
    for _ in range(3):
        assert same(list(found), expected)
    assert same([found[3], found[0]], [expected[3], expected[0]])
    assert same(list(found[1:3]), expected[1:3])
    assert found[1:3].images == 20


def test_what_is_kept_is_the_first_that_fits_and_is_not_read_again(tmp_path, monkeypatch):
    data = streamed(tmp_path)
    read = []

    def crops(split, order, key, workers, real=sys.modules["quincunx.data.drawn"].crops):
        # as the real one does, only when the first batch is wanted
        read.append(len(order))
        yield from real(split, order, key, workers)

    monkeypatch.setattr("quincunx.data.drawn.crops", crops)
    found = draw(data, 40, 0, 10, workers=0, most=2 * 10 * SIDE * SIDE * 3)
    for _ in range(3):
        list(found)
    assert read == [4, 2, 2]
    # a slice shares what is kept, and a pass that ends early has kept what it read
    list(found[:2])
    assert read == [4, 2, 2]
    other = draw(data, 40, 0, 10, workers=0, most=1 << 30)
    assert torch.equal(other[0][0], next(iter(other))[0])
    assert read[3:] == [1]


def test_worker_processes_give_the_same(tmp_path):
    data = streamed(tmp_path)
    alone, helped = (list(draw(data, 30, 1, 8, workers=count, most=0)) for count in (0, 2))
    assert same(alone, helped)


def test_all_images_where_more_are_asked_for_and_none_without(tmp_path):
    data = streamed(tmp_path)
    assert draw(data, 10**6, 0, 50).images == 40
    empty = Stream(np.array([], dtype="S1"), torch.zeros(0, dtype=torch.long), SIDE)
    with pytest.raises(ValueError, match="streamed: no images to read"):
        draw(ImageData("streamed", empty, empty, ("a",), MEAN, STD, "imagenet"), 10, 0, 5)


def test_the_limit_is_a_share_of_the_free_memory_or_the_setting(monkeypatch):
    monkeypatch.setattr("quincunx.data.memory.available", lambda: 80 << 20)
    monkeypatch.delenv("QUINCUNX_CALIBRATION_MB", raising=False)
    assert most_kept() == 20 << 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert most_kept() == 5 << 20
    monkeypatch.setenv("QUINCUNX_CALIBRATION_MB", "3")
    assert most_kept() == 3 << 20
    monkeypatch.setenv("QUINCUNX_CALIBRATION_MB", "3 GB")
    with pytest.raises(ValueError, match=r"QUINCUNX_CALIBRATION_MB='3 GB': expected a whole number of mega"):
        most_kept()


@pytest.mark.parametrize(
    "method",
    [
        qx.SpatialBottleneck(),
        qx.Espace(rank=4, rate=0.5),
        qx.Espace(rank=4, rate=0.5, mask="residual", fill="fitted"),
        qx.Perforate(),
        qx.LowRank(rank=4),
        qx.QCNN(subspace=2, codewords=8),
    ],
    ids=lambda method: f"{method.name}-{getattr(method, 'mask', '')}",
)
def test_a_fit_to_images_in_files_is_that_to_images_in_memory_to_the_bit(tmp_path, method):
    data, model = streamed(tmp_path), network()
    found = sample_batches(data, 40, workers=0)
    found._held.most = 0
    results = [qx.accelerate(model, method, calibration=given).model for given in (list(found), found)]
    states = [result.state_dict() for result in results]
    assert states[0].keys() == states[1].keys()
    assert any(
        key not in model.state_dict() or not torch.equal(value, model.state_dict()[key])
        for key, value in states[0].items()
    )
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_eight_bits_are_the_same_too_and_large_answers_are_not_kept(tmp_path, monkeypatch):
    data, model = streamed(tmp_path), network()
    found = sample_batches(data, 40, workers=0)
    found._held.most = 0
    records = [quantisation_of(calibrate(model, [x for x, _ in found], max_drop=0.0))]
    # not even the answers of one batch
    monkeypatch.setattr("quincunx.fusion.calibrated._MOST_KEPT", 10)
    records.append(quantisation_of(calibrate(model, found, max_drop=0.0)))
    assert records[0].facts == records[1].facts
    assert records[0].grids == records[1].grids


def test_a_search_reads_images_from_files_and_an_image_that_vanishes_ends_it(tmp_path):
    data, model = streamed(tmp_path), network()
    found = sample_batches(data, 40, batch_size=10, workers=0)
    found._held.most = 0
    scores = [
        Scores(model, given, (qx.SpatialBottleneck(),), None, None, lambda *_: None)
        for given in (list(found), found)
    ]
    for one in scores:
        one.fill(None, None)
    assert [row.loss for row in scores[0].rows] == [row.loss for row in scores[1].rows]
    assert any(row.loss is not None for row in scores[0].rows)
    again = Scores(model, found, (qx.SpatialBottleneck(),), None, None, lambda *_: None)
    # what is gathered before the layers is kept in a search; without it each pass reads images
    again.tails.graph, again.kept = None, None
    (tmp_path / "5.png").write_bytes(b"no image")
    with pytest.raises(Unreadable, match=r"5\.png.*--skip-bad reads all images once"):
        again.fill(None, None)
    with pytest.raises(ValueError, match=r"5\.png.*--skip-bad reads all images once"):
        qx.accelerate(model, qx.Espace(rank=4, rate=0.5), calibration=found)


def test_an_item_of_ones_own_that_cannot_be_read_ends_a_pass():
    class Source:
        def __len__(self):
            return 20

        def batch(self, indices, key):
            if 7 in indices:
                raise ValueError("own: item 7 raises OSError: gone")
            return torch.rand(len(indices), 3, SIDE, SIDE), torch.tensor(indices)

    part = Items(Source(), (SIDE, SIDE), 3)
    data = ImageData("own", part, part, (), (0.0,) * 3, (1.0,) * 3, "none")
    with pytest.raises(Unreadable, match="own: item 7 raises OSError: gone"):
        list(Drawn(data, torch.arange(20), 5))


def test_data_that_can_be_read_once_is_refused_in_one_sentence():
    images = [torch.rand(20, 3, SIDE, SIDE)]
    own = dataclasses.replace(qx.tasks.classification(), read=lambda batch: (batch, None))
    once = "can be read only once, and .* a pass .*; pass a list or a DataLoader"
    for given in (iter(images), (x for x in images)):
        with pytest.raises(TypeError, match=once):
            qx.accelerate(network(), qx.LowRank(rank=4), calibration=given)
        with pytest.raises(TypeError, match=once):
            qx.accelerate(network(), qx.LowRank(rank=4), calibration=given, task=own)
        with pytest.raises(TypeError, match=once):
            read_images(given)


def test_processes_share_slices_of_what_is_kept(tmp_path):
    data = streamed(tmp_path)
    team = Team(None, network(), data, qx.tasks.classification(), 0, None, calibration=40)
    assert team.images is team.images
    part = team.images[0:1]
    list(part)
    assert team.images._held is part._held
    assert set(team.images._held.batches) == {0}
    assert team.marks == team.marks


_CHILD = """
import json, resource, sys
import numpy as np, torch
import quincunx as qx
from quincunx.acceleration.judge import inputs_of, reestimate_batch_norm, sample_batches
from quincunx.data import ImageData, Stream
from quincunx.fusion.calibrate import calibrate
from quincunx.methods.fitting import fills
from torch import nn

# fits keep maps up to a constant of their own, here so small that these images would reach it
fills.Held.__init__.__defaults__ = (1 << 20,)
files, side = sys.argv[1:], 160
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
layer = lambda name, module: name == "3"
peaks = []
for count in (60, 60, 480):
    chosen = torch.arange(count) % len(files)
    part = Stream(np.array([files[i].encode() for i in chosen.tolist()]), chosen % 4, side)
    data = ImageData("streamed", part, part, ("a", "b", "c", "d"), (0.5,) * 3, (0.2,) * 3, "imagenet")
    images = sample_batches(data, count, batch_size=20, workers=0)
    for method in (qx.Espace(rank=4, rate=0.5), qx.SpatialBottleneck(), qx.Perforate(refits=0)):
        qx.accelerate(model, method, calibration=images, where=layer)
    calibrate(model, images, max_drop=100)
    reestimate_batch_norm(nn.Sequential(*model), inputs_of(images))
    peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux tells it")
def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch):
    draws = np.random.default_rng(0)
    files = []
    for number in range(4):
        files.append(str(tmp_path / f"{number}.jpg"))
        Image.fromarray(draws.integers(0, 256, (100, 90, 3), dtype=np.uint8)).save(files[-1])
    monkeypatch.setenv("QUINCUNX_CALIBRATION_MB", "2")
    # freed blocks go back at once; otherwise the peak is that of the allocator's habits
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *files], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *_, before, after = json.loads(done.stdout)
    # half of what 420 more images take as bytes
    assert after - before < 420 * 160 * 160 * 3 / 2
