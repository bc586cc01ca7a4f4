"""A data set by name or path."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.data import cifar, memory
from quincunx.data.download import Progress
from quincunx.data.images import (
    SUFFIXES,
    Entry,
    Reader,
    archive_entries,
    first_size,
    folder_entries,
    in_threads,
    refuse_or_count,
)
from quincunx.data.sets import IMAGENET_MEAN, IMAGENET_STD, ImageData, Split, Stream, statistics
from quincunx.data.stream import readable

_STREAM_SIDE = 224
# larger images are photographs, of which random crops are worth more than one crop kept in memory
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
    progress: Progress | None = None,
) -> ImageData:
    """A data set by name or path.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits, resized to 32 x 32); "cifar10" or
            "cifar100" (Krizhevsky 2009), from the data folder, which the environment variable
            QUINCUNX_DATA names (~/.cache/quincunx without it), else downloaded into it; the path of an
            official CIFAR archive, binary or python, packed or unpacked; or a folder or tar archive of
            images by class, in parts train/ and test/ (or val/, validation/). Without parts, or
            without a test part, a share of the images is held out, evenly by class.
        test_source: where the test part is, if not in ``source``.
        size: in memory, the shorter side after resizing and the side of the centre crop, needed when
            images differ in size; streamed, the side of the crops, by default 224.
        skip_bad: leave unreadable images out (they are counted in ``notes``) instead of stopping. To
            know them, every file of a streamed set is read once first.
        holdout: share held out where there is no test part.
        seed: of that draw.
        stream: decode images whenever they are needed, in worker processes (folders only), or keep
            them in memory. By default folders are streamed when they do not fit into half of the
            available memory, or when ``size`` is not given and the first image is larger than 256 x 256.
        labelled: whether a folder or archive has its images by class. If not, all its images are taken,
            wherever they lie in it, in the parts train/ and test/ where there are such.
        progress: called while downloading, with the bytes so far and all bytes (None if unknown).

    Raises:
        FileNotFoundError: nothing at that path.
        ConnectionError: a set that is not in the data folder cannot be downloaded.
        ValueError: unknown name, a named set without its labels, no images, one class only, an unreadable
            image (named), images of different sizes without ``size``, an archive that is cut short
            or altered, labels out of range, more images than memory holds.

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
    folders = all(place.is_dir() for place, _ in sources)
    if stream and not folders:
        raise ValueError(f"stream=True: test_source={str(test_source)!r} is an archive; unpack it")
    if not folders:
        reader = Reader(size, skip_bad)
        for place, part in sources:
            entries = (folder_entries if place.is_dir() else archive_entries)(place, part, labelled)
            reader.read(entries, place)
        return _in_memory(path, reader, holdout, seed)
    found = [entry for place, part in sources for entry in folder_entries(place, part, labelled)]
    reason = _why_stream(path, found, size, stream)
    if reason is not None:
        return _streamed(path, found, size or _STREAM_SIDE, skip_bad, holdout, seed, reason)
    reader = Reader(size, skip_bad)
    reader.read(found, path)
    return _in_memory(path, reader, holdout, seed)


def _why_stream(root: Path, found: Sequence[Entry], size: int | None, stream: bool | None) -> str | None:
    """The reason for which images are streamed; None if they are to be in memory."""
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


def _in_memory(root: Path, reader: Reader, holdout: float, seed: int) -> ImageData:
    classes, labels, in_test, notes = _arranged(root, reader.places, reader.bad, holdout, seed)

    def part(chosen: Tensor) -> Split:
        images = [reader.images[i] for i in chosen.nonzero().flatten().tolist()]
        return Split(torch.from_numpy(np.stack(images)), labels[chosen])

    train, test = part(~in_test), part(in_test)
    mean, std = statistics(train.images)
    return ImageData(
        root.name,
        train,
        test,
        classes,
        mean,
        std,
        augment="cifar",
        notes=tuple(notes),
        labelled=bool(classes),
    )


def _streamed(
    root: Path, found: Sequence[Entry], side: int, skip_bad: bool, holdout: float, seed: int, reason: str
) -> ImageData:
    bad: list[str] = []
    if skip_bad:
        good = []
        for entry, outcome in in_threads(found, readable):
            if isinstance(outcome, str):
                refuse_or_count(outcome, entry, skip_bad, bad)
            else:
                good.append(entry)
        found = good
    places = [(entry.label, entry.part) for entry in found]
    classes, labels, in_test, notes = _arranged(root, places, bad, holdout, seed)
    files = np.array([os.fsencode(os.path.abspath(entry.name)) for entry in found])
    notes.append(f"images are streamed in crops of {side} x {side}: {reason}")

    def part(chosen: Tensor) -> Stream:
        return Stream(files[chosen.numpy()], labels[chosen], side)

    return ImageData(
        root.name,
        part(~in_test),
        part(in_test),
        classes,
        IMAGENET_MEAN,
        IMAGENET_STD,
        augment="imagenet",
        notes=tuple(notes),
        labelled=bool(classes),
    )


def _arranged(
    root: Path, places: Sequence[tuple[str, str | None]], bad: Sequence[str], holdout: float, seed: int
) -> tuple[tuple[str, ...], Tensor, Tensor, list[str]]:
    """(class names, class number of each image, whether it is a test image, notes)."""
    if not places:
        raise ValueError(
            f"{root}: no images found ({', '.join(sorted(SUFFIXES))}, in one folder a class; or --unlabelled)"
        )
    classes = tuple(sorted({name for name, part in places if part != "test"}))
    # images without labels are all of one class, which has no name
    labelled = classes != ("",)
    if labelled and len(classes) < 2:
        hint = "; if they have no labels: --unlabelled" if len(classes) == 1 else ""
        raise ValueError(
            f"{root}: {len(classes)} class of training images found, at least two are needed{hint}"
        )
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted({name for name, _ in places} - set(classes))
    if unknown:
        raise ValueError(f"{root}: test images of classes without training images: {', '.join(unknown)}")
    labels = torch.tensor([number[name] for name, _ in places])
    in_test = torch.tensor([part == "test" for _, part in places])
    notes: list[str] = []
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        plural = "s" if len(bad) > 1 else ""
        notes.append(f"{len(bad)} unreadable image{plural} left out: {shown}")
    if not bool(in_test.any()):
        in_test = _held_out(labels, holdout, seed)
        notes.append(
            f"no test part: {int(in_test.sum())} of {len(labels)} images held out for testing"
            f"{', evenly by class' if labelled else ''}"
        )
    return classes if labelled else (), labels, in_test, notes


def _held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """A mask of about ``share`` of each class, at least one image of a class that has two."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(labels.shape[0], generator=generator)
    held = torch.zeros(labels.shape[0], dtype=torch.bool)
    for label, count in Counter(labels.tolist()).items():
        members = (labels == label).nonzero().flatten()
        take = min(count - 1, max(1, round(share * count)))
        held[members[order[members].argsort()[:take]]] = True
    if not bool(held.any()):
        raise ValueError("every class has a single image: none can be held out for testing")
    return held
