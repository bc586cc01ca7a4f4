"""Data sets: what is read, how it is split, what is refused and what is named; and the batches."""

import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from quincunx.data import ImageData, Split, batches, load_data

SHADE = {"cat": 40, "dog": 200}  # a class is told by its brightness


def encoded(value=128, size=(8, 8), mode="RGB", suffix="png"):
    """A picture of one colour, as the bytes of a file; ``size`` is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).convert(mode).save(file, suffix)
    return file.getvalue()


def files_of(parts=("train", "test"), classes=("cat", "dog"), count=3):
    """{path: bytes} of a small data set."""
    return {
        "/".join(filter(None, (part, name, f"{i}.png"))): encoded((SHADE.get(name, 90) + i) % 256)
        for part in parts
        for name in classes
        for i in range(count)
    }


def as_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def as_archive(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def root(tmp_path):
    """A folder whose own name says nothing about the part."""
    (tmp_path / "animals").mkdir()
    return tmp_path / "animals"


def shades(split):
    return sorted(zip(split.labels.tolist(), split.images[:, 0, 0, 0].tolist(), strict=True))


WANTED = [(0, 40), (0, 41), (0, 42), (1, 200), (1, 201), (1, 202)]


# ---- digits


def test_digits_are_the_whole_set_once():
    sklearn = pytest.importorskip("sklearn.datasets")
    data = load_data("digits")
    assert len(data.train) + len(data.test) == 1797
    assert len(data.test) == 360
    assert data.train.images.shape[1:] == (32, 32, 1)
    assert data.train.images.dtype == torch.uint8
    assert (data.size, data.in_channels, data.augment) == ((32, 32), 1, "none")
    pixels, labels = sklearn.load_digits(return_X_y=True)
    # at the set's own size nothing is resampled, so every image can be found again
    small = load_data("digits", size=8)
    found = sorted(
        (int(label), tuple(image.flatten().tolist()))
        for split in (small.train, small.test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    wanted = sorted(
        (int(label), tuple(int(v) for v in np.rint(image * 255 / 16)))
        for image, label in zip(pixels, labels, strict=True)
    )
    assert found == wanted


def test_digits_are_split_evenly_and_always_alike():
    first, second = load_data("digits", size=8), load_data("digits", size=8)
    assert torch.equal(first.test.images, second.test.images)
    assert torch.equal(first.train.labels, second.train.labels)
    counts = first.test.labels.bincount(minlength=10)
    assert counts.min() >= 33
    assert counts.max() <= 39


# ---- folders and archives


@pytest.mark.parametrize("test_part", ["test", "val", "valid", "validation", "Test"])
@pytest.mark.parametrize("prefix", ["", "some/folder/"])
@pytest.mark.parametrize("form", ["folder", "w", "w:gz", "w:xz"])
def test_parts_and_classes(root, test_part, prefix, form):
    files = {prefix + name: content for name, content in files_of(("train", test_part)).items()}
    source = as_folder(root, files) if form == "folder" else as_archive(root / "animals.tar", files, form)
    data = load_data(source)
    assert data.classes == ("cat", "dog")
    assert shades(data.train) == shades(data.test) == WANTED
    assert data.augment == "cifar"
    assert data.notes == ()


@pytest.mark.parametrize("name", ["test", "train", "val"])
def test_a_root_named_like_a_part_hides_no_parts(tmp_path, name):
    data = load_data(as_folder(tmp_path / name, files_of()))
    assert data.classes == ("cat", "dog")
    assert shades(data.train) == shades(data.test) == WANTED


def test_the_parts_in_two_places(tmp_path):
    train = as_folder(tmp_path / "train", files_of([""]))
    test = as_archive(tmp_path / "rest.tar.gz", files_of(["held"], count=2))
    data = load_data(train, test_source=test)
    assert shades(data.train) == WANTED
    assert len(data.test) == 4


def test_no_test_part_holds_some_of_each_class_out(root):
    as_folder(root, files_of([""], count=10))
    data, again = load_data(root, holdout=0.3, seed=1), load_data(root, holdout=0.3, seed=1)
    assert data.test.labels.bincount().tolist() == [3, 3]
    assert sorted(shades(data.train) + shades(data.test)) == sorted(
        (k, v + i) for k, v in enumerate(SHADE.values()) for i in range(10)
    )
    assert torch.equal(data.test.images, again.test.images)
    assert not torch.equal(data.test.images, load_data(root, holdout=0.3, seed=2).test.images)
    assert "6 of 20 images held out" in data.notes[0]


def test_hidden_files_are_no_images(root):
    files = files_of()
    hidden = ["train/cat/._0.png", "train/.ipynb_checkpoints/0.png", "train/cat/.thumbs/0.png"]
    files |= dict.fromkeys(hidden, b"not an image")
    for source in (as_folder(root, files), as_archive(root / "a.tar", files)):
        data = load_data(source)
        assert data.classes == ("cat", "dog")
        assert shades(data.train) == WANTED


@pytest.fixture
def many_tasks(monkeypatch):
    """Few images a task, so that tasks wait for each other."""
    monkeypatch.setattr("quincunx.data.images._DECODE_AT_ONCE", 3)


@pytest.mark.usefixtures("many_tasks")
def test_order_is_by_name_whatever_the_disk_says(root):
    files = files_of(count=90)
    names = list(files)
    backwards = as_folder(root / "b", {name: files[name] for name in reversed(names)})
    forwards = as_folder(root / "f", files)
    numbers = sorted(range(90), key=lambda i: f"{i}.png")
    for source in (forwards, backwards):
        data = load_data(source, size=8)
        wanted = [(shade + i) % 256 for shade in SHADE.values() for i in numbers]
        for split in (data.train, data.test):
            assert split.labels.tolist() == [0] * 90 + [1] * 90
            assert split.images[:, 0, 0, 0].tolist() == wanted


@pytest.mark.usefixtures("many_tasks")
def test_an_archive_keeps_its_order(root):
    files = files_of(count=90)
    backwards = as_archive(root / "a.tar", {name: files[name] for name in reversed(list(files))})
    data = load_data(backwards)
    wanted = [(shade + i) % 256 for shade in reversed(SHADE.values()) for i in reversed(range(90))]
    for split in (data.train, data.test):
        assert split.labels.tolist() == [1] * 90 + [0] * 90
        assert split.images[:, 0, 0, 0].tolist() == wanted


# ---- pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_three_channels_of_eight_bits(root, mode):
    levels = (0, 255) if mode == "1" else (0, 128, 255)
    for name in SHADE:
        for value in levels:
            if mode == "I;16":
                picture = Image.fromarray(np.full((6, 6), value * 257, dtype=np.uint16))
            else:
                picture = Image.new("RGB", (6, 6), (value,) * 3)
                picture = picture.convert(mode, palette=Image.Palette.ADAPTIVE)
            (root / "train" / name).mkdir(parents=True, exist_ok=True)
            picture.save(root / "train" / name / f"{value}.{'tif' if mode == 'CMYK' else 'png'}")
    as_folder(root, {"test/cat/0.png": encoded(0, (6, 6))})
    images = load_data(root).train.images
    assert images.shape == (2 * len(levels), 6, 6, 3)
    assert images.unique().tolist() == list(levels)


def test_a_palette_with_transparency_keeps_its_colours(root):
    as_folder(root, files_of())
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(root / "train" / "cat" / "9.png", transparency=b"\x00\x80")
    assert [10, 20, 30] in load_data(root).train.images[:, 4, 4].tolist()


@pytest.mark.parametrize("shape", [(9, 13), (31, 5), (5, 5), (1, 40), (40, 1), (7, 8)])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_size_brings_all_to_one_square(root, shape, size):
    as_folder(root, files_of() | {"train/cat/odd.png": encoded(40, shape)})
    data = load_data(root, size=size)
    assert data.size == (size, size)
    assert len(data.train) == 7
    assert data.train.images.unique().tolist() == [40, 41, 42, 200, 201, 202]  # no border came in


def test_size_crops_the_centre(root):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 250
    as_folder(root, files_of())
    Image.fromarray(wide).save(root / "train" / "dog" / "0.png")
    images = load_data(root, size=8).train.images
    assert (images.flatten(1) == 250).all(1).any()


def test_mean_and_deviation_are_those_of_the_training_images(root):
    rng = np.random.default_rng(0)
    for i in range(4):
        for part, name in (("train", "cat"), ("train", "dog"), ("test", "cat")):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(
                root / part / name / f"{i}.png"
            )
    data = load_data(root)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 1, 2), correction=0).tolist(), abs=1e-12)
    images, _ = next(batches(data.train, data, 8))
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_a_constant_channel_is_not_divided_by_zero(root):
    as_folder(root, {f"train/{name}/{i}.png": encoded(77) for name in SHADE for i in range(2)})
    data = load_data(root)
    assert torch.isfinite(next(batches(data.train, data, 4))[0]).all()


# ---- without labels


@pytest.mark.parametrize("form", ["folder", "archive"])
@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        ({f"{i}.png": encoded() for i in range(10)}, 9, 1),
        ({"train/0.png": encoded(), "train/deep/er/1.png": encoded(), "test/2.png": encoded()}, 2, 1),
        (files_of(), 6, 6),
    ],
    ids=["flat", "parts", "by-class"],
)
def test_images_without_labels_are_taken_wherever_they_lie(root, files, train, test, form):
    source = as_folder(root, files) if form == "folder" else as_archive(root / "a.tar.gz", files)
    data = load_data(source, labelled=False)
    assert (len(data.train), len(data.test), data.classes, data.labelled) == (train, test, (), False)
    assert "class" not in " ".join(data.notes)


def test_sets_that_bring_labels_are_not_read_without(root):
    with pytest.raises(ValueError, match="digits brings its labels"):
        load_data("digits", labelled=False)
    with pytest.raises(
        ValueError, match="accelerate and compare take images without classes with --unlabelled"
    ):
        load_data(as_folder(root, files_of(classes=["cat"])))
    with pytest.raises(ValueError, match="0 class of training images"):
        load_data(as_folder(root / "b", {"test/0.png": encoded()}), labelled=False)


# ---- bad input


BAD_LAYOUTS = {
    "empty": ({}, "no images found"),
    "no-images": ({"train/cat/notes.txt": b"x"}, "no images found"),
    "no-class-folders": ({"train/0.png": encoded(), "test/1.png": encoded()}, "no images found"),
    "one-class": (files_of(classes=["cat"]), "1 class of training images"),
    "test-part-only": (files_of(["test"]), "0 class of training images"),
    "class-only-in-test": (
        files_of() | {"test/zebra/0.png": encoded()},
        "test images of classes without training images: zebra",
    ),
    "single-images": (files_of([""], count=1), "none can be held out"),
    "two-sizes": (
        files_of() | {"train/dog/7.png": encoded(size=(9, 8))},
        r"dog.7\.png: 8 x 9 pixels.*--size",
    ),
}


@pytest.mark.parametrize(("files", "message"), BAD_LAYOUTS.values(), ids=BAD_LAYOUTS.keys())
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_bad_layouts_are_refused(root, files, message, form):
    source = as_folder(root, files) if form == "folder" else as_archive(root / "a.tar.gz", files)
    with pytest.raises(ValueError, match=message):
        load_data(source)


BAD_ARGUMENTS = [
    ({"source": "digit"}, FileNotFoundError, "known: digits"),
    ({"source": "digits", "size": 0}, ValueError, "size=0"),
    ({"source": "digits", "test_source": "x"}, ValueError, "test_source"),
    ({"source": ".", "size": -3}, ValueError, "size=-3"),
    ({"source": ".", "holdout": 0}, ValueError, "holdout=0"),
    ({"source": ".", "holdout": 1.0}, ValueError, r"holdout=1\.0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        load_data(**arguments)


def test_a_missing_test_source_is_named(root):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_data(as_folder(root, files_of()), test_source=root / "nowhere")


NOISE = np.random.default_rng(3).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def noisy(suffix):
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, suffix)
    return file.getvalue()


BAD_IMAGES = {
    "truncated.png": noisy("png")[:900],
    "truncated.jpeg": noisy("jpeg")[:600],
    "truncated.bmp": noisy("bmp")[:600],
    "truncated.gif": noisy("gif")[:100],
    "empty.png": b"",
    "text.jpg": b"<html>404</html>",
    "flipped.png": noisy("png")[:200] + b"\xff" + noisy("png")[201:],
}


@pytest.mark.parametrize(("name", "content"), BAD_IMAGES.items(), ids=BAD_IMAGES.keys())
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_a_bad_image_is_named_or_left_out(root, name, content, form):
    files = files_of() | {f"train/cat/{name}": content}
    source = as_folder(root, files) if form == "folder" else as_archive(root / "a.tar", files)
    with pytest.raises(ValueError, match=f"train/cat/{name}: not a readable image.*--skip-bad"):
        load_data(source)
    data = load_data(source, skip_bad=True)
    assert shades(data.train) == shades(data.test) == WANTED
    assert len(data.notes) == 1
    assert data.notes[0].startswith("1 unreadable image left out: ")
    assert data.notes[0].endswith(f"train/cat/{name}")


def outcome(source, **options):
    """The data set, or the words of the refusal."""
    try:
        return load_data(source, **options)
    except ValueError as error:
        return str(error)


@given(st.data(), st.sampled_from(["png", "jpeg", "gif", "ppm"]))
def test_any_damage_to_an_image_is_either_named_or_harmless(tmp_path_factory, data, suffix):
    content = bytearray(noisy(suffix))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for place in data.draw(st.lists(st.integers(0, 1023), max_size=8)):
        # the bytes behind the first dozen say the size; a huge one is another matter
        if 40 <= place < len(content):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    root = tmp_path_factory.mktemp("damage")
    as_folder(root, files_of([""]) | {f"cat/hurt.{suffix}": bytes(content)})
    found, rest = outcome(root, size=8), load_data(root, size=8, skip_bad=True)
    images = len(rest.train) + len(rest.test)
    if isinstance(found, str):
        assert f"hurt.{suffix}: not a readable image" in found
        assert images == 6
    else:
        assert len(found.train) + len(found.test) == images == 7


def test_all_images_bad_is_no_images(root):
    as_folder(root, dict.fromkeys(files_of(), b"x"))
    with pytest.raises(ValueError, match="no images found"):
        load_data(root, skip_bad=True)


# ---- archives that are cut short, damaged or hostile


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_cut_archive_is_refused(root, mode, share):
    whole = as_archive(root / "a.tar", files_of(), mode)
    content = whole.read_bytes()
    # in a plain archive a cut between two members looks like an end
    cut = int(share * 12) * 1024 if mode == "w" else int(share * len(content))
    whole.write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"a\.tar: not a readable tar archive, or cut short"):
        load_data(whole)


@pytest.mark.parametrize("member", [1, 5, 11])
def test_a_damaged_header_in_the_middle_is_refused(root, member):
    whole = as_archive(root / "a.tar", files_of(), "w")
    content = bytearray(whole.read_bytes())
    content[1024 * member] ^= 0xFF  # a picture takes one block behind its header
    whole.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar: not a readable tar archive, or cut short"):
        load_data(whole)


@given(st.data())
def test_any_damage_to_a_compressed_archive_is_noticed(tmp_path_factory, data):
    mode = data.draw(st.sampled_from(["w:gz", "w:bz2", "w:xz"]))
    root = tmp_path_factory.mktemp("damage")
    whole = as_archive(root / "a.tar", files_of(), mode)
    wanted = load_data(whole)
    content = bytearray(whole.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    whole.write_bytes(content)
    found = outcome(whole)
    if isinstance(found, str):
        assert "a.tar: not a readable tar archive, or cut short" in found
    else:  # a time stamp, say
        assert torch.equal(found.train.images, wanted.train.images)
        assert torch.equal(found.test.images, wanted.test.images)


@pytest.mark.parametrize("content", [b"", b"x", b"\x1f\x8b\x08", encoded(), bytes(10240)[:100]])
def test_a_file_that_is_no_archive_is_refused(root, content):
    path = root / "a.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable tar archive"):
        load_data(path)


def test_hostile_names_in_an_archive_touch_nothing(root, monkeypatch):
    inside = root / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    absolute = str(root / "absolute" / "cat" / "0.png")
    hostile = ["../train/cat/a.png", "../../x/train/cat/b.png", absolute, "train/cat/../../../c.png"]
    archive = as_archive(inside / "a.tar", files_of() | dict.fromkeys(hostile, encoded(90)))
    before = sorted(root.rglob("*"))
    load_data(archive)
    assert sorted(root.rglob("*")) == before


def test_links_in_an_archive_lead_only_into_the_archive(root):
    outside = root / "secret.png"
    outside.write_bytes(encoded(99))
    path = as_archive(root / "a.tar", files_of())
    with tarfile.open(root / "b.tar.gz", "w:gz") as archive, tarfile.open(path) as other:
        for member in other:
            archive.addfile(member, other.extractfile(member))
        for name, kind, target in (
            ("train/dog/hard.png", tarfile.LNKTYPE, "train/dog/1.png"),
            ("train/dog/soft.png", tarfile.SYMTYPE, "../cat/2.png"),
            ("train/cat/outside.png", tarfile.SYMTYPE, str(outside)),
            ("train/cat/itself.png", tarfile.SYMTYPE, "itself.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    with pytest.raises(ValueError, match=r"outside\.png: not a readable image"):
        load_data(root / "b.tar.gz")
    data = load_data(root / "b.tar.gz", skip_bad=True)
    assert shades(data.train) == sorted([*WANTED, (1, 201), (1, 42)])
    assert data.notes[0].startswith("2 unreadable images left out")


def test_links_in_a_folder_are_followed_once(tmp_path):
    elsewhere = as_folder(tmp_path / "elsewhere", files_of(["train"]))
    root = as_folder(tmp_path / "animals", files_of(["test"]))
    (root / "train").mkdir()
    for name in SHADE:
        (root / "train" / name).symlink_to(elsewhere / "train" / name)
    (root / "train" / "cat" / "round").symlink_to(root / "train")
    (root / "test" / "cat" / "self").symlink_to(".")
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    for source in (root, linked):
        data = load_data(source)
        assert data.classes == ("cat", "dog")
        assert shades(data.test) == WANTED
        assert set(shades(data.train)) >= set(WANTED)


def test_a_link_to_nowhere_is_an_unreadable_image(root):
    as_folder(root, files_of())
    (root / "train" / "cat" / "lost.png").symlink_to(root / "gone.png")
    with pytest.raises(ValueError, match=r"lost\.png: not a readable image"):
        load_data(root)
    assert shades(load_data(root, skip_bad=True).train) == WANTED


def test_a_named_pipe_does_not_hang(root):
    as_folder(root, files_of())
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    assert shades(load_data(root).train) == WANTED


# ---- batches


def numbered(count, height=6, width=5, channels=2):
    """Every pixel of the data set has a value of its own, as far as bytes go."""
    images = torch.arange(count * height * width * channels) % 251 + 5
    images = images.view(count, height, width, channels).to(torch.uint8)
    split = Split(images, torch.arange(count))
    return split, ImageData(
        "numbered", split, split, ("a", "b"), (0.25,) * channels, (0.5,) * channels, augment="cifar"
    )


def pixels_of(images, data):
    """Normalised images back to bytes [N, H, W, C]."""
    shape = (1, -1, 1, 1)
    values = images * torch.tensor(data.std).view(shape) + torch.tensor(data.mean).view(shape)
    return (values * 255).round().permute(0, 2, 3, 1)


@pytest.mark.parametrize("channels_last", [True, False])
def test_without_a_generator_the_batches_are_the_images_in_order(channels_last):
    split, data = numbered(7)
    found = list(batches(split, data, 3, augment="cifar", channels_last=channels_last))
    assert [len(labels) for _, labels in found] == [3, 3, 1]
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(7))
    images = torch.cat([images for images, _ in found])
    assert torch.equal(pixels_of(images, data), split.images.float())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(images.is_contiguous(memory_format=layout) for images, _ in found)


@given(count=st.integers(1, 20), size=st.integers(1, 25), seed=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation_that_the_generator_fixes(count, size, seed):
    split, data = numbered(count)

    def epoch():
        generator = torch.Generator().manual_seed(seed)
        return list(batches(split, data, size, generator=generator))

    first, second = epoch(), epoch()
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(count))
    for (images, labels), (again, labels_again) in zip(first, second, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)
        assert torch.equal(pixels_of(images, data), split.images[labels].float())


@pytest.mark.parametrize("shape", [(6, 5), (8, 8), (3, 9), (1, 1), (32, 40)])
def test_every_augmented_image_is_a_shifted_and_perhaps_flipped_padded_original(shape):
    height, width = shape
    split, data = numbered(60, height, width)
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor(data.mean) * 255  # the colour of the margin
    margin = max(1, round(min(shape) / 8))
    padded = mean.round().expand(60, height + 2 * margin, width + 2 * margin, 2).clone()
    padded[:, margin:-margin, margin:-margin] = split.images.float()
    shifts = set()
    for images, labels in batches(split, data, 16, generator=generator, augment="cifar"):
        for image, label in zip(pixels_of(images, data), labels.tolist(), strict=True):
            fits = [
                (top, left, flipped)
                for top in range(2 * margin + 1)
                for left in range(2 * margin + 1)
                for flipped in (False, True)
                if torch.equal(
                    padded[label, top : top + height, left : left + width].flip([1] if flipped else []), image
                )
            ]
            assert fits
            shifts.update(fits[:1])
    if min(shape) > margin:  # a small image may leave the picture and fit in many ways
        assert {top for top, _, _ in shifts} == set(range(2 * margin + 1))
        assert {left for _, left, _ in shifts} == set(range(2 * margin + 1))
        assert {flipped for _, _, flipped in shifts} == {False, True}


def test_augmentation_is_fixed_by_the_generator_and_changes_with_it():
    split, data = numbered(20)

    def epoch(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([x for x, _ in batches(split, data, 8, generator=generator, augment="cifar")])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_describe_tells_data_sets_apart():
    _, data = numbered(5)
    assert data.describe() == numbered(5)[1].describe()
    for other in (
        numbered(6)[1],
        replace(data, classes=("a", "c")),
        replace(data, mean=(0.25, 0.26)),
        replace(data, name="another"),
    ):
        assert other.describe() != data.describe()
