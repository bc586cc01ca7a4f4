"""Find images by class in folders and archives, decode them, apply their orientation, and resize them."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quincunx.data import memory
from quincunx.data.archives import Member, TooLarge, members, plain, resolved

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".gif",
    ".tif", ".tiff", ".jp2",
}  # fmt: skip
# files beside images that are not images
_BESIDE = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".md", ".rst", ".html",
    ".htm", ".py", ".ini", ".cfg", ".log", ".db", ".sqlite", ".pkl", ".npy", ".npz", ".mat", ".h5", ".pt",
    ".pth", ".gz", ".zip", ".tar", ".md5", ".sha256",
}  # fmt: skip
_NAMES_BESIDE = {"license", "readme", "copying", "notice", "makefile", "checksums"}
# the first bytes of image files
_BEGINNINGS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS",
)  # fmt: skip
_TRAIN_PARTS = {"train", "training"}
_TEST_PARTS = {"test", "val", "valid", "validation"}
# limits of a task of the pool, in images and in bytes of their files: large enough to be worth handing over
_DECODE_AT_ONCE, _DECODE_BYTES = 64, 1 << 22
# limits of bytes of files that wait to be decoded, and of decoded images that wait to be used
_WAITING_FILES, _WAITING = 1 << 26, 1 << 28
# Pixels that a file of any length may claim; larger images are decoded one at a time. Beyond this, a limit
# per byte of the file, up to a total that fits into a gigabyte; and a limit per byte for images of any size.
_PIXELS, _PIXELS_PER_BYTE, _LARGE, _LARGE_PER_BYTE = 1 << 23, 400, 1 << 26, 32
# images with a larger ratio of sides are cropped before resizing
_STRIP = 16

Pixels = NDArray[np.uint8]


class ImageEntry(NamedTuple):
    """A found image: its name, class and part, and its path or content."""

    name: str
    label: str
    part: str | None
    content: str | bytes


# ---------------------------------------------------------------- finding


def is_image(name: str) -> bool:
    """Return whether a name has an image's suffix; hidden files do not count."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def may_be_image(name: str) -> bool:
    """Return whether the content has to decide: no known suffix of images or text."""
    stem, ending = os.path.splitext(name.lower())
    return not name.startswith(".") and ending not in _BESIDE and stem not in _NAMES_BESIDE


def begins_like_image(head: bytes) -> bool:
    """Return whether a file's first bytes are those of an image."""
    return (
        head.startswith(_BEGINNINGS)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
        # a bitmap's header has a length; a text may also start with "BM"
        or (
            head[:2] == b"BM" and head[14:18] in [bytes([n, 0, 0, 0]) for n in (12, 40, 52, 56, 64, 108, 124)]
        )
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n" and len(head) > 8)
    )


def _class_and_part(folders: tuple[str, ...], labelled: bool) -> tuple[str, str | None] | None:
    """Return (class, part) of the images in a folder below the root; None if its path names no class.

    Without labels a folder's name can only be a part, and the class is empty.
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


def folder_entries(root: Path, part: str | None, labelled: bool, left: list[str]) -> Iterator[ImageEntry]:
    """Yield images below a folder, in order; links to folders are followed, but no cycles.

    Args:
        root: the folder.
        part: the part of all images, if not None.
        labelled: whether folders name classes; if not, every image gets the class "".
        left: gets the names of files that may be images of an unreadable kind.
    """
    yield from _below(str(root), (), root.resolve().name, part, labelled, left, {})


def _below(
    folder: str,
    inside: tuple[str, ...],
    root_name: str,
    part: str | None,
    labelled: bool,
    left: list[str],
    seen: dict[tuple[str, object], None],
) -> Iterator[ImageEntry]:
    place = _class_and_part(inside, labelled)
    if place is None or place[1] is None:
        # the root's own name may be a part
        place = _class_and_part((root_name, *inside), labelled)
    # A folder with several links to it is read once for each class that they give it.
    way = (os.path.realpath(folder), place if place is not None else _part_of((root_name, *inside)))
    if way in seen:
        return
    seen[way] = None
    with os.scandir(folder) as listing:
        found = sorted(listing, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            if not _hidden(entry.name):
                inner = (*inside, entry.name)
                yield from _below(entry.path, inner, root_name, part, labelled, left, seen)
        elif place is None:
            continue
        # a dangling link counts as an unreadable image, not as a missing one
        elif is_image(entry.name):
            if entry.is_file() or not os.path.exists(entry.path):
                yield ImageEntry(entry.path, place[0], part or place[1], entry.path)
        elif may_be_image(entry.name) and entry.is_file():
            if begins_like_image(_beginning(entry.path)):
                yield ImageEntry(entry.path, place[0], part or place[1], entry.path)
            elif inside:
                left.append(printable(entry.path))


def _part_of(folders: tuple[str, ...]) -> str | None:
    return next((name.lower() for name in folders if name.lower() in _TRAIN_PARTS | _TEST_PARTS), None)


def _beginning(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError:
        # unreadable, whether it is an image or not
        return b""


def archive_entries(root: Path, part: str | None, labelled: bool, left: list[str]) -> Iterator[ImageEntry]:
    """Yield images inside an archive, in its order, then the targets of its links; nothing is written.

    Args:
        root: the archive.
        part: as for :func:`folder_entries`.
        labelled: as for :func:`folder_entries`.
        left: as for :func:`folder_entries`.

    Raises:
        ValueError: not a readable archive.
    """
    targets: dict[str, str] = {}
    links: list[tuple[str, str, tuple[str, str | None]]] = []
    files: set[str] = set()
    for member in members(root):
        *folders, name = PurePosixPath(member.name).parts or ("",)
        place = None if any(map(_hidden, folders)) else _class_and_part(tuple(folders), labelled)
        if member.target is not None:
            targets[plain(member.name)] = member.target
            if place is not None and may_be_image(name):
                links.append((member.name, plain(member.name), place))
            continue
        files.add(plain(member.name))
        if place is None:
            continue
        shown = f"{root}:{member.name}"
        if is_image(name) or (may_be_image(name) and begins_like_image(member.head())):
            yield ImageEntry(shown, place[0], part or place[1], _content(member))
        elif may_be_image(name) and folders:
            left.append(printable(shown))
    yield from _linked(root, part, links, resolved(targets, files))


def _linked(
    root: Path, part: str | None, links: list[tuple[str, str, tuple[str, str | None]]], ends: dict[str, str]
) -> Iterator[ImageEntry]:
    """Yield the images that links lead to, by reading the archive again, each file once for all its links."""
    wanted: dict[str, list[tuple[str, tuple[str, str | None]]]] = {}
    for name, link, place in links:
        if link in ends:
            wanted.setdefault(ends[link], []).append((name, place))
        elif is_image(name):
            # an unreadable image
            yield ImageEntry(f"{root}:{name}", place[0], part or place[1], b"")
    for member in members(root) if wanted else ():
        if member.target is None and plain(member.name) in wanted:
            content = _content(member)
            for name, place in wanted.pop(plain(member.name)):
                if is_image(name) or (isinstance(content, bytes) and begins_like_image(content[:64])):
                    yield ImageEntry(f"{root}:{name}", place[0], part or place[1], content)


def _content(member: Member) -> bytes:
    try:
        return member.content()
    except TooLarge:
        return b""


# ---------------------------------------------------------------- decoding


# Pillow's exceptions for damaged files; its plugins trust a file's content
_DAMAGE = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    EOFError, MemoryError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
_ONE_AT_A_TIME = threading.Lock()
# Pillow's names of the transpositions that undo EXIF's orientations
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 274


def decoded(entry: ImageEntry, use: Callable[[Image], Pixels], exif: bool = True) -> Pixels | str:
    """Return ``use(image)`` for an image of three channels, or a sentence that says why it cannot be read.

    Args:
        entry: the image.
        use: function of the decoded image.
        exif: whether to apply the EXIF orientation.
    """
    from PIL import Image

    source = entry.content if isinstance(entry.content, str) else io.BytesIO(entry.content)
    try:
        with Image.open(source) as image:
            length = os.path.getsize(source) if isinstance(source, str) else len(entry.content)
            pixels = image.width * image.height
            if pixels > max(_PIXELS, min(_PIXELS_PER_BYTE * length, _LARGE), _LARGE_PER_BYTE * length):
                raise ValueError(f"{image.width} x {image.height} pixels in a file of {length:,} bytes")
            with _ONE_AT_A_TIME if pixels > _PIXELS else nullcontext():
                found = _rgb(_loaded(image, exif))
    # if warnings are errors, Pillow's warnings also count as damage
    except (*_DAMAGE, Image.DecompressionBombError, Warning) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"{printable(entry.name)}: not a readable image ({reason})"
    try:
        return use(found)
    except MemoryError:
        size = f"{found.width} x {found.height} pixels"
        return f"{printable(entry.name)}: not a readable image (too little memory for {size})"


def printable(name: str) -> str:
    """Return a name on one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _loaded(image: Image, exif: bool) -> Image:
    """Return the pixels, with the EXIF orientation applied or as stored."""
    from PIL import Image as pillow

    # for this format Pillow applies the orientation itself and then removes the entry
    kept: Any = getattr(image, "tag_v2", None)
    before = _orientation(kept)
    image.load()
    if kept is not None:
        turned = before != 1 and _orientation(kept) == 1
        turn = (
            before if exif and not turned else {6: 8, 8: 6}.get(before, before) if turned and not exif else 1
        )
    else:
        turn = _exif_orientation(image) if exif else 1
    return image.transpose(pillow.Transpose[_TURNS[turn]]) if turn in _TURNS else image


def _orientation(tags: Any) -> int:
    found = tags.get(_ORIENTATION, 1) if tags is not None else 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _exif_orientation(image: Image) -> int:
    if not image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}:
        return 1
    try:
        return _orientation(image.getexif())
    except _DAMAGE:
        # an image with damaged metadata is shown as stored
        return 1


def _rgb(image: Image) -> Image:
    """Convert to three channels of eight bits; transparency is dropped."""
    from PIL import Image as pillow

    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("floating point values, expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        # Pillow would clip sixteen bits at 255 instead of scaling them
        image = pillow.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def centre(image: Image, shorter: int, side: int, resample: Resampling | None = None) -> Pixels:
    """Resize the shorter side to ``shorter`` pixels, bicubic by default, then crop the central square."""
    from PIL import Image as pillow

    width, height = image.size
    if max(width, height) > _STRIP * min(width, height):
        # enlarging a whole narrow strip would fill the memory; only its middle is used anyway
        side_of = min(width, height)
        across, down = min(width, _STRIP * side_of), min(height, _STRIP * side_of)
        left, top = (width - across) // 2, (height - down) // 2
        image = image.crop((left, top, left + across, top + down))
        width, height = image.size
    scale = shorter / min(width, height)
    resized = image.resize(
        (max(shorter, round(width * scale)), max(shorter, round(height * scale))),
        pillow.Resampling.BICUBIC if resample is None else resample,
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def first_size(entries: Iterable[ImageEntry]) -> tuple[int, int] | None:
    """Return (H, W) of the first image with a readable header; None if there is none."""
    return next((size for size in map(_head, entries) if size is not None), None)


def _head(entry: ImageEntry) -> tuple[int, int] | None:
    from PIL import Image

    try:
        with Image.open(entry.name) as image:
            return image.height, image.width
    except (*_DAMAGE, Image.DecompressionBombError, Warning):
        return None  # reading the set reports damaged images


def in_threads(
    entries: Iterable[ImageEntry], use: Callable[[Image], Pixels], exif: bool = True
) -> Iterator[tuple[ImageEntry, Pixels | str]]:
    """Yield every entry with its result, in order; decoding releases the interpreter's lock."""
    waiting: dict[int, int] = {}
    # several links in a row may lead to one file of an archive: decode it once
    latest: list[tuple[str | bytes, Pixels | str]] = []

    def some(number: int, task: list[ImageEntry]) -> list[Pixels | str | None]:
        found: list[Pixels | str | None] = []
        for entry in task:
            known = latest[:]
            if known and known[0][0] is entry.content and not isinstance(known[0][1], str):
                found.append(known[0][1])
            elif sum(list(waiting.values())) > _WAITING:
                # decode later: too many results are waiting
                found.append(None)
            else:
                image = decoded(entry, use, exif)
                found.append(image)
                latest[:] = [(entry.content, image)]
                waiting[number] = waiting.get(number, 0) + getattr(image, "nbytes", 0)
        return found

    tasks: deque[tuple[int, list[ImageEntry], Future[list[Pixels | str | None]]]] = deque()

    def taken() -> Iterator[tuple[ImageEntry, Pixels | str]]:
        number, task, future = tasks.popleft()
        for entry, image in zip(task, future.result(), strict=True):
            yield entry, decoded(entry, use, exif) if image is None else image
        waiting.pop(number, None)

    with ThreadPoolExecutor() as pool:
        try:
            for number, task in enumerate(_tasks(entries)):
                tasks.append((number, task, pool.submit(some, number, task)))
                # a few tasks ahead, so that an archive is read while its images are decoded
                while len(tasks) > 8 or (
                    tasks and sum(_bytes(task) for _, task, _ in tasks) > _WAITING_FILES
                ):
                    yield from taken()
            while tasks:
                yield from taken()
        finally:
            for _, _, future in tasks:
                future.cancel()


def _bytes(task: Sequence[ImageEntry]) -> int:
    """Return the bytes of the files in memory; a file with several links counts once."""
    contents = {id(entry.content): entry.content for entry in task if isinstance(entry.content, bytes)}
    return sum(map(len, contents.values()))


def _tasks(entries: Iterable[ImageEntry]) -> Iterator[list[ImageEntry]]:
    """Yield groups of images, smaller ones if their files are large."""
    task: list[ImageEntry] = []
    size = 0
    for entry in entries:
        shared = bool(task) and entry.content is task[-1].content
        task.append(entry)
        size += len(entry.content) if isinstance(entry.content, bytes) and not shared else 0
        if len(task) >= _DECODE_AT_ONCE or size > _DECODE_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


class Reader:
    """Reads images into memory.

    Args:
        size: shorter side after resizing and side of the centre crop; None keeps images as they are.
        skip_bad: count unreadable images instead of stopping.
        exif: whether to apply the EXIF orientation.
    """

    def __init__(self, size: int | None, skip_bad: bool, exif: bool = True) -> None:
        self.size, self.skip_bad, self.exif = size, skip_bad, exif
        self.images: list[Pixels] = []
        self.places: list[tuple[str, str | None]] = []
        self.bad: list[str] = []
        self._first: tuple[str, tuple[int, ...]] | None = None
        self._bytes, self._free = 0, memory.available()

    def read(self, entries: Iterable[ImageEntry], source: Path) -> None:
        """Decode and keep all images.

        Raises:
            ValueError: an unreadable image, one of another size, or too many for the memory.
        """
        for entry, image in in_threads(entries, self._pixels, self.exif):
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
                f"{printable(name)}: {image.shape[0]} x {image.shape[1]} pixels, but "
                f"{printable(self._first[0])} has "
                f"{self._first[1][0]} x {self._first[1][1]}; give --size to bring all to one size"
            )


def refuse_or_count(reason: str, entry: ImageEntry, skip_bad: bool, bad: list[str]) -> None:
    """Stop at an unreadable image, or count it if the user wants to skip it."""
    if not skip_bad:
        raise ValueError(f"{reason}; --skip-bad goes on without it")
    bad.append(printable(entry.name))
