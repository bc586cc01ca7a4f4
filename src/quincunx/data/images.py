"""Images by class in folders and tar archives: found, decoded, brought to one size."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quincunx.data import memory

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}
_TRAIN_PARTS = {"train", "training"}
_TEST_PARTS = {"test", "val", "valid", "validation"}
# a task of the pool: large enough that handing it over costs little
_DECODE_AT_ONCE = 64

Pixels = NDArray[np.uint8]


class Entry(NamedTuple):
    """An image that was found: what to call it, its class and part, and where or what it is."""

    name: str
    label: str
    part: str | None
    content: str | bytes


# ---------------------------------------------------------------- finding


def is_image(name: str) -> bool:
    """By its suffix; hidden files are no images of a data set."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _class_and_part(folders: tuple[str, ...], labelled: bool) -> tuple[str, str | None] | None:
    """(class, part) of the images in a folder below the root; None where its path names no class.

    Without labels a folder's name means at most a part, and the class is empty.
    """
    for i, folder in enumerate(folders):
        part = (
            "train" if folder.lower() in _TRAIN_PARTS else "test" if folder.lower() in _TEST_PARTS else None
        )
        if part is not None:
            if not labelled:
                return "", part
            return (folders[i + 1], part) if i + 1 < len(folders) else None
    if not labelled:
        return "", None
    return (folders[-1], None) if folders else None


def _hidden(folder: str) -> bool:
    return folder.startswith(".") and folder != ".."


def folder_entries(root: Path, part: str | None, labelled: bool = True) -> Iterator[Entry]:
    """Images below a folder, in order; links to folders are followed, once round.

    Args:
        part: that all are in, if not None.
        labelled: whether folders name classes; if not, every image is taken, as of the class "".
    """
    yield from _below(str(root), (), root.resolve().name, part, labelled, ())


def _below(
    folder: str,
    inside: tuple[str, ...],
    root_name: str,
    part: str | None,
    labelled: bool,
    above: tuple[str, ...],
) -> Iterator[Entry]:
    here = os.path.realpath(folder)
    if here in above:
        return
    place = _class_and_part(inside, labelled)
    if place is None or place[1] is None:
        # the root's own name may say which part it is
        place = _class_and_part((root_name, *inside), labelled)
    with os.scandir(folder) as listing:
        found = sorted(listing, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            if not _hidden(entry.name):
                inner = (*inside, entry.name)
                yield from _below(entry.path, inner, root_name, part, labelled, (*above, here))
        # a link to nowhere is an image that cannot be read, not one that is not there
        elif (
            place is not None and is_image(entry.name) and (entry.is_file() or not os.path.exists(entry.path))
        ):
            yield Entry(entry.path, place[0], part or place[1], entry.path)


@contextmanager
def opened(root: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive, whatever its compression.

    Raises:
        ValueError: it is none, is damaged or cut short, found when opening or while it is read.
    """
    try:
        with tarfile.open(root, "r:*") as archive:
            yield archive
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{root}: not a readable tar archive, or cut short ({error})") from error


def archive_entries(root: Path, part: str | None, labelled: bool = True) -> Iterator[Entry]:
    """Images inside a tar archive, in its order; nothing is written to disk."""
    with opened(root) as archive:
        for member in archive:
            *folders, name = PurePosixPath(member.name).parts or ("",)
            # links are read from the archive itself
            if not is_image(name) or not (member.isfile() or member.islnk() or member.issym()):
                continue
            place = None if any(map(_hidden, folders)) else _class_and_part(tuple(folders), labelled)
            if place is not None:
                yield Entry(f"{root}:{member.name}", place[0], part or place[1], content_of(archive, member))
        check_end(archive)


def content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes; none if it is a link to what the archive does not hold."""
    try:
        file = archive.extractfile(member)
    except (KeyError, RecursionError):
        return b""
    return b"" if file is None else file.read()


def check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end; a whole archive ends with a block of zeros."""
    if archive.fileobj is not None:
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end after byte {archive.offset}")
        # a compressed file's checksum is only compared at its very end
        while archive.fileobj.read(1 << 20):
            pass


# ---------------------------------------------------------------- decoding


def decoded(entry: Entry, use: Callable[[Image], Pixels]) -> Pixels | str:
    """What ``use`` makes of an image of three channels, or the sentence that says why it cannot be read."""
    from PIL import Image

    name, content = entry.name, entry.content
    try:
        with Image.open(content if isinstance(content, str) else io.BytesIO(content)) as image:
            image.load()
            return use(_rgb(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{name}: not a readable image ({error})"


def _rgb(image: Image) -> Image:
    """Three channels of eight bits; transparency is dropped."""
    from PIL import Image as pillow

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow would cut sixteen bits off at 255 instead of scaling them
        image = pillow.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def centre(image: Image, shorter: int, side: int) -> Pixels:
    """The shorter side brought to ``shorter`` pixels, then the central square of ``side``."""
    from PIL import Image as pillow

    width, height = image.size
    scale = shorter / min(width, height)
    resized = image.resize(
        (max(shorter, round(width * scale)), max(shorter, round(height * scale))), pillow.Resampling.BICUBIC
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def first_size(entries: Iterable[Entry]) -> tuple[int, int] | None:
    """(H, W) of the first image whose head can be read; None if there is none."""
    return next((size for size in map(_head, entries) if size is not None), None)


def _head(entry: Entry) -> tuple[int, int] | None:
    from PIL import Image

    try:
        with Image.open(entry.name) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # reading the set says which images are bad


def in_threads(
    entries: Iterable[Entry], use: Callable[[Image], Pixels]
) -> Iterator[tuple[Entry, Pixels | str]]:
    """Every entry with what it became, in order; decoding releases the interpreter's lock."""

    def some(task: list[Entry]) -> list[tuple[Entry, Pixels | str]]:
        return [(entry, decoded(entry, use)) for entry in task]

    source = iter(entries)
    tasks: deque[Future[list[tuple[Entry, Pixels | str]]]] = deque()
    with ThreadPoolExecutor() as pool:
        try:
            while task := list(islice(source, _DECODE_AT_ONCE)):
                tasks.append(pool.submit(some, task))
                # a few tasks ahead, so that an archive is read while its images are decoded
                if len(tasks) > 8:
                    yield from tasks.popleft().result()
            while tasks:
                yield from tasks.popleft().result()
        finally:
            for waiting in tasks:
                waiting.cancel()


class Reader:
    """Reads images into memory.

    Args:
        size: shorter side after resizing and side of the centre crop; None leaves images as they are.
        skip_bad: count unreadable images instead of stopping.
    """

    def __init__(self, size: int | None, skip_bad: bool) -> None:
        self.size, self.skip_bad = size, skip_bad
        self.images: list[Pixels] = []
        self.places: list[tuple[str, str | None]] = []
        self.bad: list[str] = []
        self._first: tuple[str, tuple[int, ...]] | None = None
        self._bytes, self._free = 0, memory.available()

    def read(self, entries: Iterable[Entry], source: Path) -> None:
        """Decode and keep them all.

        Raises:
            ValueError: an unreadable image, one of another size, or more than memory holds.
        """
        for entry, image in in_threads(entries, self._pixels):
            if isinstance(image, str):
                refuse_or_count(image, entry, self.skip_bad, self.bad)
                continue
            self._check_shape(entry.name, image)
            self._bytes += 2 * image.nbytes
            if self._bytes > self._free:
                raise ValueError(
                    f"{source}: needs more than the {memory.gigabytes(self._free)} of memory that are free; "
                    "unpack an archive into a folder, and --stream reads images as they are needed"
                )
            self.images.append(image)
            self.places.append((entry.label, entry.part))

    def _pixels(self, image: Image) -> Pixels:
        return np.asarray(image) if self.size is None else centre(image, self.size, self.size)

    def _check_shape(self, name: str, image: Pixels) -> None:
        if self._first is None:
            self._first = (name, image.shape)
        elif image.shape != self._first[1]:
            raise ValueError(
                f"{name}: {image.shape[0]} x {image.shape[1]} pixels, but {self._first[0]} has "
                f"{self._first[1][0]} x {self._first[1][1]}; give --size to bring all to one size"
            )


def refuse_or_count(reason: str, entry: Entry, skip_bad: bool, bad: list[str]) -> None:
    """An unreadable image stops the reading, unless the user wants it left out."""
    if not skip_bad:
        raise ValueError(f"{reason}; --skip-bad goes on without it")
    bad.append(entry.name)
