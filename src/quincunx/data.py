"""Labelled images in memory: digits, or folders of images by class, also inside a tar archive.

Images are kept as bytes [N, H, W, C] and are normalised, padded, cropped and flipped a whole batch at
a time, so that loading never starves a small network.
"""

from __future__ import annotations

import io
import lzma
import math
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageData", "Split", "batches", "load_data"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}
_TRAIN_PARTS = {"train", "training"}
_TEST_PARTS = {"test", "val", "valid", "validation"}
_DECODE_AT_ONCE = 256
AUGMENTATIONS = ("none", "cifar", "imagenet")


@dataclass(frozen=True)
class Split:
    """Images as bytes [N, H, W, C] and class numbers [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])


@dataclass(frozen=True)
class ImageData:
    """A data set in two parts.

    Attributes:
        name: what it was loaded from.
        train, test: the parts.
        classes: class names, by number.
        mean, std: per channel, of the training images in [0, 1].
        augment: the augmentation that suits it, as :func:`batches` names them.
        notes: what a person should know, such as a part that was held out.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    notes: tuple[str, ...] = ()

    @property
    def in_channels(self) -> int:
        return int(self.train.images.shape[3])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return int(self.train.images.shape[1]), int(self.train.images.shape[2])

    def describe(self) -> dict[str, object]:
        """JSON-ready facts that tell two data sets apart."""
        return {
            "name": self.name,
            "train": len(self.train),
            "test": len(self.test),
            "size": list(self.size),
            "in_channels": self.in_channels,
            "classes": list(self.classes),
            "mean": [round(v, 6) for v in self.mean],
            "std": [round(v, 6) for v in self.std],
        }


def load_data(
    source: str | Path,
    *,
    test_source: str | Path | None = None,
    size: int | None = None,
    skip_bad: bool = False,
    holdout: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """A data set by name or path.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits, resized to 32 x 32), or a folder or
            tar archive of images by class, in parts train/ and test/ (or val/, validation/). Without
            parts, or without a test part, a share of the images is held out, evenly by class.
        test_source: where the test part is, if not in ``source``.
        size: shorter side after resizing, and side of the centre crop; needed when images differ in size.
        skip_bad: leave unreadable images out (they are counted in ``notes``) instead of stopping.
        holdout: share held out where there is no test part.
        seed: of that draw.

    Raises:
        FileNotFoundError: nothing at that path.
        ValueError: unknown name, no images, one class only, an unreadable image (named), images of
            different sizes without ``size``.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size}: expected a positive number of pixels")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout}: expected a share in (0, 1)")
    if str(source) == "digits":
        if test_source is not None:
            raise ValueError("test_source: digits brings its own test part")
        return _digits(size)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"data={str(source)!r}: neither a path nor a known data set (known: digits)")
    found = _Found(size, skip_bad)
    found.read(path, None)
    if test_source is not None:
        if not Path(test_source).exists():
            raise FileNotFoundError(f"test_source={str(test_source)!r}: no such file or folder")
        found.read(Path(test_source), "test")
    return found.finish(path, holdout, seed)


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
    mean, std = _statistics(train_part.images)
    return ImageData(
        "digits", train_part, test_part, tuple(str(d) for d in range(10)), mean, std, augment="none"
    )


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of byte images, in [0, 1], by their histograms."""
    means, deviations = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[3]):
        share = torch.bincount(images[..., channel].flatten().int(), minlength=256).double()
        share /= share.sum()
        mean = float((share * levels).sum())
        means.append(mean)
        # a constant channel is left as it is instead of being divided by zero
        deviations.append(math.sqrt(float((share * (levels - mean) ** 2).sum())) or 1.0)
    return tuple(means), tuple(deviations)


def _is_image(path: PurePosixPath) -> bool:
    """By its suffix; hidden files and what lies in hidden folders are no images of a data set."""
    hidden = any(part.startswith(".") and part != ".." for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and not hidden


def _class_and_part(path: PurePosixPath) -> tuple[str, str | None] | None:
    """(class, part) of an image's path below the root; None where the path names no class."""
    folders = path.parts[:-1]
    for i, folder in enumerate(folders):
        part = (
            "train" if folder.lower() in _TRAIN_PARTS else "test" if folder.lower() in _TEST_PARTS else None
        )
        if part is not None:
            return (folders[i + 1], part) if i + 1 < len(folders) else None
    return (folders[-1], None) if folders else None


class _Found:
    """Images read so far."""

    def __init__(self, size: int | None, skip_bad: bool) -> None:
        self.size, self.skip_bad = size, skip_bad
        self.images: list[np.ndarray] = []
        self.labels: list[tuple[str, str | None]] = []
        self.bad: list[str] = []
        self.first: tuple[str, tuple[int, ...]] | None = None

    def read(self, root: Path, force_part: str | None) -> None:
        """Decode every image below a folder or inside an archive."""
        entries = _folder_entries(root) if root.is_dir() else _archive_entries(root)
        with ThreadPoolExecutor() as pool:
            for chunk in _chunks(entries, _DECODE_AT_ONCE):
                # decoding releases the interpreter lock, so threads suffice
                for (name, place, _), image in zip(chunk, pool.map(self._decode, chunk), strict=True):
                    self._add(name, place, image, force_part)

    def _decode(self, entry: _Entry) -> np.ndarray | str:
        from PIL import Image

        name, _, content = entry
        try:
            with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
                image.load()
                pixels = _rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{name}: not a readable image ({error})"
        return np.asarray(pixels if self.size is None else _resized(pixels, self.size))

    def _add(
        self, name: str, place: tuple[str, str | None], image: np.ndarray | str, force_part: str | None
    ) -> None:
        if isinstance(image, str):
            if not self.skip_bad:
                raise ValueError(f"{image}; --skip-bad goes on without it")
            self.bad.append(name)
            return
        if self.first is None:
            self.first = (name, image.shape)
        elif image.shape != self.first[1]:
            raise ValueError(
                f"{name}: {image.shape[0]} x {image.shape[1]} pixels, but {self.first[0]} has "
                f"{self.first[1][0]} x {self.first[1][1]}; give --size to bring all to one size"
            )
        self.images.append(image)
        self.labels.append((place[0], force_part or place[1]))

    def finish(self, root: Path, holdout: float, seed: int) -> ImageData:
        if not self.images:
            raise ValueError(
                f"{root}: no images found ({', '.join(sorted(_SUFFIXES))}, in one folder a class)"
            )
        classes = tuple(sorted({name for name, part in self.labels if part != "test"}))
        if len(classes) < 2:
            raise ValueError(
                f"{root}: {len(classes)} class of training images found, at least two are needed"
            )
        number = {name: i for i, name in enumerate(classes)}
        unknown = sorted({name for name, _ in self.labels} - set(classes))
        if unknown:
            raise ValueError(f"{root}: test images of classes without training images: {', '.join(unknown)}")
        images = torch.from_numpy(np.stack(self.images))
        labels = torch.tensor([number[name] for name, _ in self.labels])
        in_test = torch.tensor([part == "test" for _, part in self.labels])
        notes: list[str] = []
        if self.bad:
            shown = ", ".join(self.bad[:3]) + (", ..." if len(self.bad) > 3 else "")
            plural = "s" if len(self.bad) > 1 else ""
            notes.append(f"{len(self.bad)} unreadable image{plural} left out: {shown}")
        if not bool(in_test.any()):
            in_test = _held_out(labels, holdout, seed)
            notes.append(
                f"no test part: {int(in_test.sum())} of {len(labels)} images held out for testing, "
                "evenly by class"
            )
        train = Split(images[~in_test], labels[~in_test])
        test = Split(images[in_test], labels[in_test])
        if not len(train):
            raise ValueError(f"{root}: no training images")
        mean, std = _statistics(train.images)
        return ImageData(root.name, train, test, classes, mean, std, augment="cifar", notes=tuple(notes))


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


def _rgb(image: Image) -> Image:
    """Three channels of eight bits; transparency is dropped."""
    from PIL import Image as pillow

    if image.mode.startswith("I"):
        # Pillow would cut sixteen bits off at 255 instead of scaling them
        image = pillow.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _resized(image: Image, size: int) -> Image:
    """Shorter side to ``size``, then the central square."""
    from PIL import Image as pillow

    width, height = image.size
    scale = size / min(width, height)
    resized = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), pillow.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


# name to show, class and part, and the encoded image or where it lies
_Entry = tuple[str, tuple[str, str | None], Path | bytes]


def _folder_entries(root: Path) -> Iterator[_Entry]:
    for path in _files(root):
        inside = PurePosixPath(*path.relative_to(root).parts)
        # a link to nowhere is an image that cannot be read, not one that is not there
        if _is_image(inside) and (path.is_file() or not path.exists()):
            place = _class_and_part(inside)
            if place is None or place[1] is None:
                # the root's own name may say which part it is
                place = _class_and_part(PurePosixPath(root.resolve().name, inside))
            if place is not None:
                yield str(path), place, path


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Everything below a folder but folders, in order; links to folders are followed, once round."""
    here = folder.resolve()
    if here in above:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, (*above, here))
        else:
            yield path


def _archive_entries(root: Path) -> Iterator[_Entry]:
    try:
        with tarfile.open(root, "r:*") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                # links are read from the archive itself; nothing is written to disk
                if not _is_image(path) or not (member.isfile() or member.islnk() or member.issym()):
                    continue
                place = _class_and_part(path)
                if place is not None:
                    yield f"{root}:{member.name}", place, _content(archive, member)
            _check_end(archive)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{root}: not a readable tar archive, or cut short ({error})") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes; none if it is a link to what the archive does not hold."""
    try:
        file = archive.extractfile(member)
    except (KeyError, RecursionError):
        return b""
    return b"" if file is None else file.read()


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end; a whole archive ends with a block of zeros."""
    if archive.fileobj is not None:
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end after byte {archive.offset}")
        # a compressed file's checksum is only compared at its very end
        while archive.fileobj.read(1 << 20):
            pass


def _chunks(entries: Iterable[_Entry], size: int) -> Iterator[list[_Entry]]:
    chunk: list[_Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Byte images [N, H, W, C] as floats of mean 0 and deviation 1, same layout."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return images.float().mul_(scale).add_(shift)


def batches(
    split: Split,
    data: ImageData,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    augment: str = "none",
    channels_last: bool = True,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of normalised images [B, C, H, W] and labels [B].

    Args:
        split: the images; ``data`` has their mean and deviation.
        batch_size: images a step, of all processes together.
        generator: draws the order and the augmentation; without one, in order and unaugmented.
        augment: "none"; "cifar": pad an eighth of the side (4 pixels of 32) on each side with the mean
            colour, crop at a random place, flip at random (He et al. 2016; Peng et al.,
            arXiv:1809.02601, section 4.1); "imagenet" is for photographs.
        channels_last: memory format of the batch.
        rank, world: this process and how many there are. All draw the same; of each batch of b images
            a process takes those from rank b / world to (rank + 1) b / world, which may be none.
        workers: processes that decode; images in memory need none.

    Raises:
        ValueError: a value out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment={augment!r}: expected one of {', '.join(AUGMENTATIONS)}")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank}, world={world}: expected a rank from 0 to world - 1")
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers}: expected at least 0")
    return _from_memory(split, data, batch_size, generator, augment, channels_last, rank, world)


def _from_memory(
    split: Split,
    data: ImageData,
    batch_size: int,
    generator: torch.Generator | None,
    augment: str,
    channels_last: bool,
    rank: int,
    world: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    count = len(split)
    order = torch.randperm(count, generator=generator) if generator is not None else torch.arange(count)
    for start in range(0, count, batch_size):
        whole = order[start : start + batch_size]
        ours = slice(rank * len(whole) // world, (rank + 1) * len(whole) // world)
        chosen = whole[ours]
        images = normalised(split.images[chosen], data.mean, data.std)
        if augment == "cifar" and generator is not None:
            images = _crop_and_flip(images, len(whole), ours, generator)
        elif augment == "imagenet":
            raise NotImplementedError("augment='imagenet'")
        batch = images.permute(0, 3, 1, 2)
        yield (batch if channels_last else batch.contiguous()), split.labels[chosen]


def _crop_and_flip(images: Tensor, drawn: int, ours: slice, generator: torch.Generator) -> Tensor:
    """Each image [H, W, C] shifted by up to an eighth of its side and flipped, by one gather.

    ``drawn`` images are drawn for, of which ``images`` are ``ours``.
    """
    count, height, width, _ = images.shape
    margin = max(1, round(min(height, width) / 8))
    padded = F.pad(images, (0, 0, margin, margin, margin, margin))
    shifts = torch.randint(0, 2 * margin + 1, (2, drawn, 1), generator=generator)[:, ours]
    flip = torch.rand(drawn, 1, generator=generator)[ours] < 0.5
    rows = shifts[0] + torch.arange(height)
    ahead = torch.arange(width)
    cols = shifts[1] + torch.where(flip, width - 1 - ahead, ahead)
    which = torch.arange(count)[:, None, None]
    return padded[which, rows[:, :, None], cols[:, None, :]]
