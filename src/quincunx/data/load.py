"""Load a data set by name or path."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.data import cifar, memory
from quincunx.data.download import Progress
from quincunx.data.images import (
    SUFFIXES,
    ImageEntry,
    Reader,
    archive_entries,
    first_size,
    folder_entries,
    in_threads,
    printable,
    refuse_or_count,
)
from quincunx.data.sets import IMAGENET_MEAN, IMAGENET_STD, ImageData, Split, Stream, statistics
from quincunx.data.stream import readable
from quincunx.data.table import Table, find_table, label_entries, numbered_classes

_STREAM_SIDE = 224
# larger images count as photographs: random crops of them are better than one crop in memory
_LARGE = 256 * 256
_NAMES = ("digits", *cifar.SETS)


def load_data(
    source: str | Path,
    *,
    test_source: str | Path | None = None,
    size: int | None = None,
    skip_bad: bool = False,
    holdout: float = 0.1,
    seed: int = 0,
    stream: bool | None = None,
    labelled: bool = True,
    exif: bool = True,
    test_alone: bool = False,
    progress: Progress | None = None,
) -> ImageData:
    """Load a data set by name or path.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits, resized to 32 x 32); "cifar10" or
            "cifar100" (Krizhevsky 2009), from the data folder, which the environment variable
            QUINCUNX_DATA names (default ~/.cache/quincunx), else downloaded into it; the path of an
            official CIFAR archive, binary or python, packed or unpacked; or a folder or archive (tar, also
            compressed by gz, bz2 or xz, or zip) of images by class, in parts ``train/CLASS/*.png`` and
            ``test/CLASS/*.png`` (or val/, validation/). Without parts, or without a test part, a share of
            the images is held out, evenly by class. If folders do not name classes, a file ``labels.csv``
            may, with the columns ``file`` and ``label`` and optionally ``part``; numeric labels are
            class numbers.
        test_source: location of the test part, if not in ``source``.
        size: in memory, the shorter side after resizing and the side of the centre crop, needed if
            images differ in size; streamed, the side of the crops, by default 224.
        skip_bad: skip unreadable images (and count them in ``notes``) instead of stopping. To
            find them, every file of a streamed set is read once first.
        holdout: share held out if there is no test part.
        seed: of that draw.
        stream: decode images whenever they are needed, in worker processes (folders only), or keep
            them in memory. By default folders are streamed if they need more than half of the
            available memory, or if ``size`` is not given and the first image is larger than 256 x 256.
        labelled: whether a folder or archive has its images by class. If not, all its images are used,
            wherever they are, in the parts train/ and test/ if there are such folders.
        exif: rotate photographs according to their EXIF orientation, as every viewer does.
            Otherwise they are used as stored.
        test_alone: accept a test part without a training part, for an evaluation; the training part may then
            be empty, and mean and deviation are those of the test images.
        progress: called while downloading, with the bytes so far and total bytes (None if unknown).

    Images are recognised by their suffixes (.jpg, .jpeg, .jfif, .png, .bmp, .webp, .gif, .tif, .ppm and
    similar, in any case) and, for another suffix or none, by their content; of an animation the first
    frame is used. Files in class folders that are neither images nor text are counted in ``notes``.

    Raises:
        FileNotFoundError: nothing at that path.
        ConnectionError: a set that is not in the data folder cannot be downloaded.
        ValueError: unknown name, a named set without its labels, no images, one class only, an unreadable
            image (the message names it), images of different sizes without ``size``, an archive that is cut
            short or altered, labels out of range, more images than memory holds.

    Example:
        >>> data = load_data("digits")
        >>> len(data.train), len(data.test), data.size
        (1437, 360, (32, 32))
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size}: expected a positive number of pixels")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout}: expected a share in (0, 1)")
    name, path = str(source), Path(source)
    if name not in _NAMES and not path.exists():
        raise FileNotFoundError(
            f"data={name!r}: neither a path nor a known data set (known: {', '.join(_NAMES)})"
        )
    if not labelled and name in _NAMES:
        raise ValueError(f"labelled=False: {name} brings its labels")
    if test_source is not None and name in _NAMES:
        raise ValueError(f"test_source: {name} brings its own test part")
    if stream and (name in _NAMES or not path.is_dir()):
        raise ValueError(f"stream=True: only a folder of images is streamed, which {name} is not")
    if test_source is not None and not Path(test_source).exists():
        raise FileNotFoundError(f"test_source={str(test_source)!r}: no such file or folder")
    if name == "digits":
        return _digits(size)
    if name in cifar.SETS:
        path = cifar.obtain(name, progress)
    official = cifar.find(path)
    if official is not None:
        for option, given in (
            ("stream=True", stream),
            (f"test_source={str(test_source)!r}", test_source),
            ("labelled=False", not labelled),
        ):
            if given:
                raise ValueError(
                    f"{option}: {name} is an official CIFAR set, in memory with its own test part"
                )
        return cifar.load(path, *official, size)
    sources = [(path, None), *([(Path(test_source), "test")] if test_source is not None else [])]
    if stream and not all(place.is_dir() for place, _ in sources):
        raise ValueError(f"stream=True: test_source={str(test_source)!r} is an archive; unpack it")
    order = _Order(path, size, skip_bad, holdout, seed, stream, exif, test_alone)
    try:
        return _read(order, sources, labelled, {})
    except _NoClasses as error:
        # if folders do not name classes, a table may
        tables = {place: table for place, _ in sources if labelled and (table := find_table(place))}
        if not tables:
            raise ValueError(str(error)) from error
    return _read(order, sources, False, tables)


class _NoClasses(ValueError):
    """The images' folders name fewer than two classes."""


@dataclass(frozen=True)
class _Order:
    """The request: arguments of :func:`load_data`."""

    root: Path
    size: int | None
    skip_bad: bool
    holdout: float
    seed: int
    stream: bool | None
    exif: bool
    test_alone: bool


def _read(
    order: _Order, sources: Sequence[tuple[Path, str | None]], labelled: bool, tables: Mapping[Path, Table]
) -> ImageData:
    left: list[str] = []
    unnamed: list[str] = []

    def entries(place: Path, part: str | None) -> Iterator[ImageEntry]:
        found = (folder_entries if place.is_dir() else archive_entries)(place, part, labelled, left)
        return label_entries(found, tables[place], part, unnamed) if place in tables else found

    if tables and set(tables) != {place for place, _ in sources}:
        lacking = next(place for place, _ in sources if place not in tables)
        raise ValueError(f"{lacking}: has no labels.csv, but {next(iter(tables))} has one")
    reader = Reader(order.size, order.skip_bad, order.exif)
    if not all(place.is_dir() for place, _ in sources):
        for place, part in sources:
            reader.read(entries(place, part), place)
        return _in_memory(order, reader, left, unnamed, tables)
    found = [entry for place, part in sources for entry in entries(place, part)]
    reason = _why_stream(order.root, found, order.size, order.stream)
    if reason is not None:
        return _streamed(order, found, left, unnamed, tables, reason)
    reader.read(found, order.root)
    return _in_memory(order, reader, left, unnamed, tables)


def _why_stream(root: Path, found: Sequence[ImageEntry], size: int | None, stream: bool | None) -> str | None:
    """Return the reason for streaming the images; None to keep them in memory."""
    if stream:
        return "as asked for"
    shape = (size, size) if size is not None else first_size(found)
    if shape is None:
        return None
    need = memory.needed(len(found), shape[0] * shape[1])
    if stream is False:
        memory.check(str(root), need, "a smaller --size needs less, and --stream reads them as needed")
        return None
    if need > memory.available():
        return f"{memory.gigabytes(need)} of memory would be needed to keep them"
    if size is None and shape[0] * shape[1] > _LARGE:
        return f"they are large, the first is {shape[0]} x {shape[1]} pixels; --size keeps smaller ones"
    return None


def _digits(size: int | None) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    side = 32 if size is None else size
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32)).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    byte_images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    targets = torch.from_numpy(np.asarray(labels)).long()
    train_part, test_part = (
        Split(byte_images[torch.from_numpy(i)], targets[torch.from_numpy(i)]) for i in (train, test)
    )
    mean, std = statistics(train_part.images)
    return ImageData(
        "digits", train_part, test_part, tuple(str(d) for d in range(10)), mean, std, augment="none"
    )


# ---------------------------------------------------------------- folders and archives


def _in_memory(
    order: _Order, reader: Reader, left: Sequence[str], unnamed: Sequence[str], tables: Mapping[Path, Table]
) -> ImageData:
    found = _arranged(order, reader.places, reader.bad, left, unnamed, tables)

    def part(chosen: Tensor) -> Split:
        images = [reader.images[i] for i in chosen.nonzero().flatten().tolist()]
        pixels = np.stack(images) if images else np.empty((0, *reader.images[0].shape), dtype=np.uint8)
        return Split(torch.from_numpy(pixels), found.labels[chosen])

    train, test = part(~found.in_test), part(found.in_test)
    mean, std = statistics((train if len(train) else test).images)
    return ImageData(
        order.root.name,
        train,
        test,
        found.classes,
        mean,
        std,
        augment="cifar",
        notes=tuple(found.notes),
        labelled=bool(found.classes),
        exif=order.exif,
    )


def _streamed(
    order: _Order,
    entries: Sequence[ImageEntry],
    left: Sequence[str],
    unnamed: Sequence[str],
    tables: Mapping[Path, Table],
    reason: str,
) -> ImageData:
    bad: list[str] = []
    side = order.size or _STREAM_SIDE
    if order.skip_bad:
        good = []
        for entry, outcome in in_threads(entries, readable, order.exif):
            if isinstance(outcome, str):
                refuse_or_count(outcome, entry, order.skip_bad, bad)
            else:
                good.append(entry)
        entries = good
    places = [(entry.label, entry.part) for entry in entries]
    found = _arranged(order, places, bad, left, unnamed, tables)
    files = np.array([os.fsencode(os.path.abspath(entry.name)) for entry in entries])
    found.notes.append(f"images are streamed in crops of {side} x {side}: {reason}")

    def part(chosen: Tensor) -> Stream:
        return Stream(files[chosen.numpy()], found.labels[chosen], side, order.exif)

    return ImageData(
        order.root.name,
        part(~found.in_test),
        part(found.in_test),
        found.classes,
        IMAGENET_MEAN,
        IMAGENET_STD,
        augment="imagenet",
        notes=tuple(found.notes),
        labelled=bool(found.classes),
        exif=order.exif,
    )


@dataclass(frozen=True)
class _Arranged:
    """Class names, class number of each image, whether it is a test image, and notes."""

    classes: tuple[str, ...]
    labels: Tensor
    in_test: Tensor
    notes: list[str]


_LAYOUT = (
    "expected train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png, of which a share is held out, or "
    "images and a labels.csv with the columns file and label"
)
_BARE = "; accelerate and compare take images without classes with --unlabelled"


def _arranged(
    order: _Order,
    places: Sequence[tuple[str, str | None]],
    bad: Sequence[str],
    left: Sequence[str],
    unnamed: Sequence[str],
    tables: Mapping[Path, Table],
) -> _Arranged:
    root = order.root
    notes = [
        *_note(bad, "unreadable image", "left out"),
        *_note(left, "file", "left out whose content is no image that can be read"),
        *_note(unnamed, "image", "left out that labels.csv does not name"),
    ]
    if not places:
        others = f"; {'; '.join(notes)}" if notes else ""
        raise _NoClasses(
            f"{root}: no images found ({', '.join(sorted(SUFFIXES))}, or by their content), {_LAYOUT}{_BARE}"
            f"{others}"
        )
    # images without labels all have one class, which has no name
    named = {name for name, _ in places} != {""}
    trained = sorted({name for name, part in places if part != "test"})
    classes = tuple(trained or (sorted({name for name, _ in places}) if order.test_alone else ()))
    if tables and all(name.isdecimal() for name, _ in places):
        classes = numbered_classes(tables.values(), [name for name, _ in places])
    if len(classes) < (2 if named else 1):
        if trained:
            hint = _BARE
        else:
            hint = (
                "; all of them are test images, by the name of a folder (test, val, valid or validation): "
                "evaluate takes test images alone, anything else needs training images, with these as "
                "--test-data"
            )
        raise _NoClasses(
            f"{root}: {len(classes)} class of training images found, at least two are needed: {_LAYOUT}{hint}"
        )
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted({name for name, _ in places} - set(classes))
    if unknown:
        shown = ", ".join(map(printable, unknown[:10])) + (
            f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        )
        raise ValueError(f"{root}: test images of classes without training images: {shown}")
    labels = torch.tensor([number[name] for name, _ in places])
    in_test = torch.tensor([part == "test" for _, part in places])
    if bool(in_test.all()):
        notes.append("test images alone: nothing can be trained on or fitted to them")
    elif not bool(in_test.any()):
        in_test = _held_out(root, labels, order.holdout, order.seed)
        notes.append(
            f"no test part: {int(in_test.sum())} of {len(labels)} images held out for testing"
            f"{', evenly by class' if named else ''}"
        )
    return _Arranged(classes if named else (), labels, in_test, notes)


def _note(names: Sequence[str], what: str, reason: str) -> list[str]:
    """Return a note with the number of names and the first of them; nothing if there are none."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    plural = "s" if len(names) > 1 else ""
    return [f"{len(names)} {what}{plural} {reason}: {shown}"] if names else []


def _held_out(root: Path, labels: Tensor, share: float, seed: int) -> Tensor:
    """Return a mask of about ``share`` of each class, at least one image of a class that has two."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(labels.shape[0], generator=generator)
    held = torch.zeros(labels.shape[0], dtype=torch.bool)
    for label, count in Counter(labels.tolist()).items():
        members = (labels == label).nonzero().flatten()
        take = min(count - 1, max(1, round(share * count)))
        held[members[order[members].argsort()[:take]]] = True
    if not bool(held.any()):
        raise ValueError(f"{root}: every class has a single image: none can be held out for testing")
    return held
