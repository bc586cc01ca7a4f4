"""Read CIFAR-10 and CIFAR-100 from their official archives (Krizhevsky 2009), binary and python."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quincunx.data import memory
from quincunx.data.archives import LARGEST, TooLarge, members
from quincunx.data.download import Progress, check_sum, data_folder, fetch
from quincunx.data.images import Pixels, begins_like_image, centre, is_image, may_be_image
from quincunx.data.sets import ImageData, Split, statistics
from quincunx.data.unpickle import Array, read_cifar_pickle

SITE = "https://www.cs.toronto.edu/~kriz/"
# the checksums published there
CHECKSUMS = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
_SIDE, _PLANES = 32, 3
_IMAGE_BYTES = _PLANES * _SIDE * _SIDE


@dataclass(frozen=True)
class Form:
    """One official archive.

    Attributes:
        of: the data set's name.
        archive: name of the packed form.
        folder: name of the unpacked form.
        train: file names of the training images, in order.
        test: file name of the test images.
        meta: file name of the class names.
        classes: number of classes.
        labels: for binary files, the number of bytes before each image, the last being the (fine) class; for
            python files, the entry with the classes.
        names: the entry with the class names, in python files.
        counts: official numbers of training and test images.
    """

    of: str
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    classes: int
    labels: int | str
    names: str = ""
    counts: tuple[int, int] = (50_000, 10_000)

    @property
    def files(self) -> tuple[str, ...]:
        return *self.train, self.test, self.meta


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
FORMS = (
    Form(
        "cifar10",
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        "test_batch.bin",
        "batches.meta.txt",
        10,
        1,
    ),
    Form(
        "cifar10",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        _BATCHES,
        "test_batch",
        "batches.meta",
        10,
        "labels",
        "label_names",
    ),
    Form(
        "cifar100",
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        100,
        2,
    ),
    Form(
        "cifar100",
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        ("train",),
        "test",
        "meta",
        100,
        "fine_labels",
        "fine_label_names",
    ),
)
SETS = tuple(dict.fromkeys(form.of for form in FORMS))
_WANTED = {name for form in FORMS for name in form.files}


def obtain(name: str, progress: Progress | None = None) -> Path:
    """Return the archive or folder of "cifar10" or "cifar100" in the data folder, downloaded if needed."""
    forms = [form for form in FORMS if form.of == name]
    for form in forms:
        for path in (data_folder() / form.archive, data_folder() / form.folder):
            if path.exists():
                return path
    # the binary form, since it contains no pickles
    archive = forms[0].archive
    return fetch(SITE + archive, CHECKSUMS[archive], progress)


def find(root: Path) -> tuple[Form, dict[str, bytes]] | None:
    """Return the official form of a folder or archive and its files; None for any other.

    Raises:
        ValueError: an archive that is not readable, or has an official name and another checksum.
    """
    files: dict[str, bytes] = {}
    if root.is_dir():
        form = _form({path.name for path in root.iterdir() if path.is_file()})
        for name in () if form is None else form.files:
            if (root / name).is_file():
                _check_length(f"{root}/{name}", (root / name).stat().st_size)
                files[name] = (root / name).read_bytes()
        return None if form is None else (form, files)
    if root.name in CHECKSUMS:
        check_sum(root, CHECKSUMS[root.name])
    for member in members(root):
        name = PurePosixPath(member.name).name
        # a folder of images by class may be large; its first image identifies it
        if is_image(name):
            return None
        if member.target is None and name in _WANTED:
            _check_length(f"{root}/{name}", member.size)
            try:
                files[name] = member.content()
            except TooLarge as error:
                raise ValueError(f"{root}/{name}: {error}") from error
        elif member.target is None and may_be_image(name) and begins_like_image(member.head()):
            return None
    form = _form(set(files))
    return None if form is None else (form, files)


def _form(names: set[str]) -> Form | None:
    images = [(len(names & {*form.train, form.test}), form) for form in FORMS]
    # an unrelated folder may contain a file "test" or "train"
    likely = [(count, form) for count, form in images if count and (count > 1 or form.meta in names)]
    return max(likely, key=lambda pair: pair[0])[1] if likely else None


def load(root: Path, form: Form, files: dict[str, bytes], size: int | None) -> ImageData:
    """Return the data set in the files of an official folder or archive.

    Args:
        root: the folder or archive, for messages.
        form: from :func:`find`.
        files: from :func:`find`.
        size: side of the images; None for their own 32.

    Raises:
        ValueError: a missing or damaged file, or a class out of range (the message names file and record).
    """
    side = _SIDE if size is None else size
    memory.check(str(root), memory.needed(sum(form.counts), side * side), "it cannot be read here")
    lacking = [name for name in form.files if name not in files]
    if lacking:
        raise ValueError(f"{root}: is like {form.archive}, but lacks {', '.join(lacking)}")
    classes = _class_names(f"{root}/{form.meta}", files[form.meta], form)
    read = partial(_binary, width=form.labels) if isinstance(form.labels, int) else _python
    parts = []
    for names in (form.train, (form.test,)):
        found = [read(f"{root}/{name}", files.pop(name), form) for name in names]
        images = torch.cat([images for images, _ in found])
        parts.append(Split(_resized(images, size), torch.cat([labels for _, labels in found])))
    train, test = parts
    notes = []
    if (len(train), len(test)) != form.counts:
        notes.append(
            f"{len(train)} training and {len(test)} test images; the official set has "
            f"{form.counts[0]} and {form.counts[1]}"
        )
    mean, std = statistics(train.images)
    return ImageData(form.of, train, test, classes, mean, std, augment="cifar", notes=tuple(notes))


def _check_length(name: str, length: int) -> None:
    if length > LARGEST:
        raise ValueError(f"{name}: {memory.gigabytes(length)}, but no file of an official set is so large")


def _class_names(name: str, content: bytes, form: Form) -> tuple[str, ...]:
    if form.names:
        found = read_cifar_pickle(name, content).get(form.names)
        listed = found if isinstance(found, list) else []
        names = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in listed]
    else:
        names = content.decode("utf-8", "replace").split()
    if len(names) != form.classes or len(set(map(str, names))) != form.classes:
        raise ValueError(f"{name}: {len(names)} class names, expected {form.classes} different ones")
    return tuple(str(item) for item in names)


def _binary(name: str, content: bytes, form: Form, width: int) -> tuple[Tensor, Tensor]:
    """Read records of ``width`` label bytes and the image, plane by plane."""
    record = width + _IMAGE_BYTES
    if not content or len(content) % record:
        raise ValueError(f"{name}: {len(content)} bytes, expected a multiple of {record}; it is cut short")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    labels = rows[:, width - 1].astype(np.int64)
    _check_range(name, labels, form)
    return _by_pixel(rows[:, width:]), torch.from_numpy(labels)


def _python(name: str, content: bytes, form: Form) -> tuple[Tensor, Tensor]:
    """Read a pickled dictionary of an array of images, plane by plane, and a list of classes."""
    batch = read_cifar_pickle(name, content)
    images, listed = batch.get("data"), batch.get(str(form.labels))
    if not isinstance(images, Array) or not isinstance(listed, list):
        raise ValueError(f"{name}: expected entries data (an array) and {form.labels} (a list)")
    if len(images.shape) != 2 or images.shape[1] != _IMAGE_BYTES or images.shape[0] != len(listed):
        raise ValueError(
            f"{name}: an array of {images.shape} and {len(listed)} classes, expected N x {_IMAGE_BYTES} and N"
        )
    if not listed:
        raise ValueError(f"{name}: no images")
    wrong = next((i for i, item in enumerate(listed) if type(item) is not int), None)
    if wrong is not None:
        raise ValueError(
            f"{name}: record {wrong} (from 0) is labelled by a {type(listed[wrong]).__name__}, expected int"
        )
    # clamp numbers beyond 64 bits so that they can be refused without overflow
    labels = np.array([min(max(item, -1), form.classes) for item in listed], dtype=np.int64)
    _check_range(name, labels, form, listed)
    rows = np.frombuffer(images.content, dtype=np.uint8).reshape(images.shape)
    return _by_pixel(rows), torch.from_numpy(labels)


def _check_range(name: str, labels: NDArray[np.int64], form: Form, original: list[int] | None = None) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= form.classes))
    if len(wrong):
        first = int(wrong[0])
        value = int(labels[first]) if original is None else original[first]
        raise ValueError(
            f"{name}: record {first} (from 0) has the class {value}, expected 0 to {form.classes - 1}"
        )


def _by_pixel(rows: Pixels) -> Tensor:
    """Rearrange [N, 3072], plane by plane, to [N, 32, 32, 3]."""
    planes = rows.reshape(-1, _PLANES, _SIDE, _SIDE)
    return torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or size == _SIDE:
        return images
    from PIL import Image

    found = [centre(Image.fromarray(image), size, size) for image in images.numpy()]
    return torch.from_numpy(np.stack(found))
