"""Real archives, where they lie beside the checkout: every image is found, in the right part."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT
from quincunx.data import batches, load_data

FOLDER = ROOT.parent / "shared" / "data"


def archive(name):
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def cifar10():
    return load_data(archive("cifar10-jpeg-train.tar.gz"), test_source=archive("cifar10-jpeg-test.tar.gz"))


def test_all_training_images_are_trained_on_and_all_test_images_are_tested(cifar10):
    assert (len(cifar10.train), len(cifar10.test)) == (50_000, 5_000)
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert cifar10.classes[::3] == ("airplane", "cat", "frog", "truck")
    assert (cifar10.size, cifar10.augment, cifar10.notes) == ((32, 32), "cifar", ())
    # as everyone computed them, and a JPEG copy is close
    assert cifar10.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
    assert cifar10.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-3)


def test_a_training_epoch_meets_every_image_once(cifar10):
    seen = torch.zeros(10, dtype=torch.long)
    for images, labels in batches(cifar10.train, cifar10, 512, generator=torch.Generator(), augment="cifar"):
        seen += labels.bincount(minlength=10)
        assert images.shape[1:] == (3, 32, 32)
    assert seen.tolist() == [5000] * 10


def test_photographs_of_different_sizes_are_brought_to_one():
    path = archive("clothing-small-128.tar.gz")
    with pytest.raises(ValueError, match="give --size"):
        load_data(path)
    data = load_data(path, size=128)
    assert (len(data.train), len(data.test)) == (3_068, 341)
    assert (len(data.classes), data.size) == (10, (128, 128))


def unpack_some(path, root, names, count):
    """The first images of the named classes of each part, unpacked by hand."""
    with tarfile.open(path) as packed:
        for member in packed:
            *_, part, name, file = ("", "", *member.name.split("/"))
            if member.isfile() and name in names:
                folder = root / part / name
                folder.mkdir(parents=True, exist_ok=True)
                if len(list(folder.iterdir())) < count:
                    (folder / file).write_bytes(packed.extractfile(member).read())


def test_a_part_of_tiny_imagenet_as_a_folder_is_the_same_in_memory_and_streamed(tmp_path):
    path = archive("tiny-imagenet-50.tar.gz")
    unpack_some(path, tmp_path, ("n01443537", "n01644900", "n09246464"), 8)
    kept, streamed = load_data(tmp_path), load_data(tmp_path, stream=True, size=56)
    assert (kept.size, len(kept.train), len(kept.test)) == ((64, 64), 24, 24)
    assert torch.equal(kept.train.labels, streamed.train.labels)
    for index in range(len(streamed.train)):
        with Image.open(streamed.train.path(index)) as image:
            assert np.array_equal(kept.train.images[index].numpy(), np.asarray(image.convert("RGB")))
    # 64 is 256/224 of 56: at test the centre is cut and nothing is resized
    (found, _), *_ = batches(streamed.test, streamed, 1000, workers=2)
    pixels = found * torch.tensor(streamed.std).view(1, 3, 1, 1)
    pixels = ((pixels + torch.tensor(streamed.mean).view(1, 3, 1, 1)) * 255).round().to(torch.uint8)
    assert torch.equal(pixels.permute(0, 2, 3, 1), kept.test.images[:, 4:60, 4:60])


def test_all_of_tiny_imagenet_is_found():
    data = load_data(archive("tiny-imagenet-50.tar.gz"))
    assert (len(data.train), len(data.test), len(data.classes)) == (25_000, 2_500, 50)
    assert data.size == (64, 64)
    assert set(data.train.labels.bincount().tolist()) == {500}
    assert set(data.test.labels.bincount().tolist()) == {50}
