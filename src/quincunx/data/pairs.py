"""Data sets of items: folders of pairs, degraded copies of images, functions of the user's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quincunx.data import memory
from quincunx.data.images import ImageEntry, Pixels, centre, decoded, is_image, printable
from quincunx.data.items import Items, Own, Pictures
from quincunx.data.sets import ImageData, Split, statistics

if TYPE_CHECKING:
    pass

__all__ = ["degraded", "load_function", "load_pairs"]

INPUTS = ("input", "inputs", "image", "images", "img", "imgs", "jpegimages", "low", "noisy")
TARGETS = (
    *("target", "targets", "mask", "masks", "label", "labels", "gt", "annotation", "annotations"),
    *("segmentationclass", "high", "clean"),
)
_ALSO_CLASSES = {"low", "noisy", "high", "clean"}
_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation")
_LAYOUT = (
    "expected input/NAME.png and target/NAME.png (or image/ and mask/), also below train/ and test/, or "
    "NAME_input.png (or NAME.png) beside NAME_target.png"
)
# masks' pixels without a class
_IGNORED = 255
_ENDS = re.compile(rf"^(?P<stem>.+)[-_](?P<kind>{'|'.join((*INPUTS, *TARGETS))})$", re.IGNORECASE)


def load_pairs(
    root: str | Path,
    *,
    masks: bool = False,
    size: int | None = None,
    patch: int | None = None,
    exif: bool = True,
    holdout: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """Load images with the images or masks of the same names.

    Args:
        root: a folder with input/NAME.png and target/NAME.png, or with NAME_input.png beside NAME_target.png;
            both also below train/ and test/. Instead of "input" the names may say "image", "low" or "noisy",
            instead of "target" "mask", "label", "high" or "clean", each also with an s. Suffixes may differ.
        masks: whether targets are masks: one channel of class numbers, 255 for pixels without a class. A file
            classes.txt in the folder names the classes, a line each; otherwise there are as many as the
            largest number says.
        size: resize the shorter side to this, then crop the centre; masks without interpolation.
        patch: side of the parts that training sees.
        exif: whether to apply the EXIF orientation to inputs and targets that are photographs.
        holdout: share held out if there is no test part.
        seed: of that draw.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pairs, an image without its target, an unreadable file, a target of another size than
            its input, images of different sizes without ``size``, a mask in colours, a class number that
            classes.txt does not have, a patch larger than the images.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"data={str(root)!r}: no such folder")
    if not root.is_dir():
        raise ValueError(f"data={str(root)!r}: pairs are read from a folder; unpack the archive")
    found = _found(root)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    notes: list[str] = []
    if not any(test for *_, test in found):
        held = max(1, round(holdout * len(found)))
        if len(found) < 2:
            raise ValueError(f"{root}: one pair only, which cannot be both trained on and tested")
        chosen = set(order[:held])
        found = [(one, other, i in chosen) for i, (one, other, _) in enumerate(found)]
        notes.append(f"{held} of {len(found)} pairs were held out for the test")
    if all(test for *_, test in found):
        raise ValueError(f"{root}: all pairs are in the test part, none are left for training")
    inputs, targets = _read(found, masks, size, exif)
    in_test = torch.tensor([test for *_, test in found])
    names: tuple[str, ...] = ()
    if masks:
        names = _classes(root, targets, found)
    check_patch(patch, inputs.shape[1:3])
    facts = {"pairs": "masks" if masks else "images", "patch": patch}

    def part(which: Tensor) -> Items:
        pictures = Pictures(inputs[which], targets[which], masks=masks, patch=patch)
        return Items(pictures, tuple(inputs.shape[1:3]), int(inputs.shape[3]), facts, patch)  # type: ignore[arg-type]

    channels = int(inputs.shape[3])
    # an image is compared with an image in [0, 1]; a network of classes sees what networks of classes see
    mean, std = statistics(inputs[~in_test]) if masks else ((0.0,) * channels, (1.0,) * channels)
    return ImageData(
        root.name,
        part(~in_test),
        part(in_test),
        names,
        mean,
        std,
        augment="patches",
        notes=tuple(notes),
        exif=exif,
    )


def are_sides(names: Sequence[str]) -> bool:
    """Return whether folders of these names, taken for classes, are rather inputs and targets.

    Names that may also be classes, such as low and high, say nothing.

    Example:
        >>> are_sides(["images", "masks"]), are_sides(["low", "high"])
        (True, False)
    """
    inputs, targets = (set(side) - _ALSO_CLASSES for side in (INPUTS, TARGETS))
    known = {name.lower() for name in names}
    return bool(known & inputs) and bool(known & targets) and known <= inputs | targets


def _found(root: Path) -> list[tuple[Path, Path, bool]]:
    """Return (input, target, whether in the test part), in order of the inputs' names."""
    sides: tuple[dict[tuple[str, ...], Path], dict[tuple[str, ...], Path]] = ({}, {})
    bare: dict[tuple[str, ...], Path] = {}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).parts
        if not is_image(path.name) or any(part.startswith(".") for part in inside):
            continue
        folders = [part.lower() for part in inside[:-1]]
        kinds = [part for part in folders if part in (*INPUTS, *TARGETS)]
        named = _ENDS.match(path.stem)
        if kinds:
            kind, stem = kinds[-1], path.stem
            if named and (named["kind"].lower() in INPUTS) == (kind in INPUTS):
                # masks/NAME_mask.png
                stem = named["stem"]
        elif named:
            kind, stem = named["kind"].lower(), named["stem"]
        else:
            # an input if a target of its name is there
            bare[(*folders, path.stem)] = path
            continue
        key = (*(part for part in folders if part not in (*INPUTS, *TARGETS)), stem)
        side = sides[0 if kind in INPUTS else 1]
        if key in side:
            raise ValueError(f"{path}: {side[key].name} is another file for the same pair")
        side[key] = path
    sides[0].update({key: path for key, path in bare.items() if key in sides[1] and key not in sides[0]})
    if not sides[0] and not sides[1]:
        raise ValueError(f"{root}: no pairs of images, {_LAYOUT}")
    for here, there, what in ((sides[0], sides[1], "target"), (sides[1], sides[0], "input")):
        alone = [path for key, path in here.items() if key not in there]
        if alone:
            more = f" ({len(alone):,} such files)" if len(alone) > 1 else ""
            raise ValueError(f"{alone[0]}: has no {what} of the same name{more}; {_LAYOUT}")
    return [(path, sides[1][key], any(part in _TEST for part in key[:-1])) for key, path in sides[0].items()]


def _read(
    found: Sequence[tuple[Path, Path, bool]], masks: bool, size: int | None, exif: bool
) -> tuple[Tensor, Tensor]:
    inputs: list[Pixels] = []
    targets: list[Pixels] = []
    for one, other, _ in found:
        image, target = _pixels(one, exif), _mask(other) if masks else _pixels(other, exif)
        if image.shape[:2] != target.shape[:2]:
            what = "mask" if masks else "target"
            raise ValueError(
                f"{other}: a {what} of {target.shape[0]} x {target.shape[1]} pixels, but the image "
                f"{one.name} has {image.shape[0]} x {image.shape[1]}"
            )
        if size is not None:
            image, target = _resized(image, size, False), _resized(target, size, masks)
        if inputs and image.shape != inputs[0].shape:
            raise ValueError(
                f"{one}: {image.shape[0]} x {image.shape[1]} pixels, but {found[0][0].name} has "
                f"{inputs[0].shape[0]} x {inputs[0].shape[1]}; give --size to bring all to one size"
            )
        if not inputs:
            need = 2 * len(found) * (image.nbytes + target.nbytes)
            memory.check(f"{len(found):,} pairs", need, "a smaller --size needs less")
        inputs.append(image)
        targets.append(target)
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


def _pixels(path: Path, exif: bool) -> Pixels:
    found = decoded(ImageEntry(str(path), "", None, str(path)), lambda image: np.asarray(image).copy(), exif)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _mask(path: Path) -> Pixels:
    """Return the class numbers of a mask, [H, W]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("L", "P", "1", "I;16", "I"):
                raise ValueError(
                    f"{printable(str(path))}: a mask of mode {image.mode}, expected one channel of "
                    "class numbers "
                    "(a grey or palette image)"
                )
            numbers = np.asarray(image).astype(np.int64)
    except ValueError:
        raise
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{printable(str(path))}: not a readable mask ({str(error)[:200]})") from error
    if numbers.min() < 0 or numbers.max() > _IGNORED:
        raise ValueError(
            f"{printable(str(path))}: class numbers up to {numbers.max()}, expected at most "
            f"{_IGNORED - 1}, and "
            f"{_IGNORED} for pixels without a class"
        )
    return numbers.astype(np.uint8)


def _resized(pixels: Pixels, side: int, mask: bool) -> Pixels:
    from PIL import Image

    resample = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
    return centre(Image.fromarray(pixels), side, side, resample).copy()


def _classes(root: Path, masks: Tensor, found: Sequence[tuple[Path, Path, bool]]) -> tuple[str, ...]:
    known = masks[masks != _IGNORED]
    if not known.numel():
        raise ValueError(f"{root}: all pixels of all masks are {_IGNORED}, which means no class")
    most, place = int(known.max()), root / "classes.txt"
    if not place.is_file() and most == 0:
        ignored = f" and {_IGNORED}, which means no class" if len(known) < masks.numel() else ""
        raise ValueError(
            f"{root}: the masks hold 0{ignored}, so there is one class only and nothing to tell apart; "
            "expected class numbers, such as 0 and 1, or a classes.txt with a name for each class"
        )
    if not place.is_file():
        return tuple(map(str, range(most + 1)))
    names = tuple(line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip())
    if most >= len(names):
        first = next(i for i, mask in enumerate(masks) if ((mask >= len(names)) & (mask != _IGNORED)).any())
        raise ValueError(
            f"{found[first][1]}: class {most} occurs, but {place.name} names {len(names)}, 0 to "
            f"{len(names) - 1}"
        )
    return names


def check_patch(patch: int | None, size: Sequence[int]) -> None:
    """Check that parts of a size can be cut out of images [H, W].

    Raises:
        ValueError: they cannot.
    """
    if patch is not None and not 1 <= patch <= min(size):
        raise ValueError(f"patch={patch}: expected 1 to {min(size)}, the shorter side of the images")


def degraded(
    data: ImageData, *, noise: float = 0.0, downscale: int = 1, patch: int | None = None, seed: int = 0
) -> ImageData:
    """Return images with themselves as targets, made worse as inputs: by noise, by scaling down, or both.

    Args:
        data: images in memory; labels are dropped.
        noise: standard deviation of Gaussian noise in levels of 255, added at each reading and not cut off:
            in training drawn anew, in an evaluation fixed by ``seed`` and the image.
        downscale: inputs are scaled down by this factor and up again, both bicubic (Pillow), so that they
            have the size of their targets.
        patch: side of the parts that training sees.
        seed: of the noise.

    Raises:
        ValueError: streamed images, a value out of its range, neither noise nor a factor.

    Example:
        >>> from quincunx.data import load_data
        >>> noisy = degraded(load_data("digits"), noise=25)
        >>> noisy.mean, noisy.train.facts["noise"]
        ((0.0,), 25)
    """
    if not 0 <= noise < 1000:
        raise ValueError(f"noise={noise!r}: expected a standard deviation from 0 up, in levels of 255")
    if isinstance(downscale, bool) or not isinstance(downscale, int) or not 1 <= downscale <= min(data.size):
        raise ValueError(f"downscale={downscale!r}: expected a whole factor from 1 to {min(data.size)}")
    if not noise and downscale == 1:
        raise ValueError("noise=0, downscale=1: nothing makes the inputs worse than their targets")
    check_patch(patch, data.size)
    facts = {"noise": noise, "downscale": downscale, "patch": patch, "seed": seed}

    def part(given: Any) -> Items:
        if not isinstance(given, Split):
            raise ValueError(
                f"{data.name}: streamed images cannot be made worse on the fly; --in-memory, or a "
                "--size, keeps "
                "them in memory"
            )
        inputs, targets = given.images, None
        if downscale > 1:
            inputs, targets = _scaled(given.images, downscale), given.images
        pictures = Pictures(inputs, targets, noise=noise, patch=patch, seed=seed)
        return Items(pictures, given.size, given.channels, facts, patch)

    plain = (0.0,) * data.in_channels, (1.0,) * data.in_channels
    return replace(
        data,
        train=part(data.train),
        test=part(data.test),
        classes=(),
        mean=plain[0],
        std=plain[1],
        augment="patches",
        labelled=True,
    )


def _scaled(images: Tensor, factor: int) -> Tensor:
    from PIL import Image

    found = torch.empty_like(images)
    for i, pixels in enumerate(images.numpy()):
        flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        image = Image.fromarray(np.ascontiguousarray(flat))
        small = (max(1, round(image.width / factor)), max(1, round(image.height / factor)))
        again = image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
        found[i] = torch.from_numpy(np.asarray(again).reshape(pixels.shape).copy())
    return found


def load_function(
    name: str,
    make: Callable[[], Any],
    read: Callable[[Any], tuple[Any, Any]],
    *,
    classes: int | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """Load data sets that a function of the user's makes.

    Args:
        name: of the function, as package.module:function.
        make: returns a pair (train, test) of data sets, a dictionary with these keys, or one data set, of
            which a share is held out. A data set has a length and numbered items; items are collated as
            torch's DataLoader does.
        read: a collated batch -> (input, target); inputs are floats [N, C, H, W] as the network takes them.
        classes: number of classes, if the data set has no attribute ``classes`` with their names.
        holdout: share held out.
        seed: of that draw.

    Raises:
        ValueError: the function returns something else, or the first items of the parts differ.
    """
    made: Any = make()
    if isinstance(made, dict):
        made = tuple(made.get(key) for key in ("train", "test"))
    if not (isinstance(made, (tuple, list)) and len(made) == 2):
        made = (made, None)
    for part in made:
        if part is not None and not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
            raise ValueError(
                f"data={name!r}: returned a {type(part).__name__}, expected (train, test) of data sets "
                "with a "
                "length and numbered items"
            )
    train, test = made
    if train is None or not len(train):
        raise ValueError(f"data={name!r}: its training part has no items")
    notes: tuple[str, ...] = ()
    if test is None:
        if len(train) < 2:
            raise ValueError(f"data={name!r}: one item only, which cannot be both trained on and tested")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(1, round(holdout * len(train)))
        notes = (f"{held} of {len(train)} items were held out for the test",)
        whole = train
        train = torch.utils.data.Subset(whole, order[held:])
        test = torch.utils.data.Subset(whole, order[:held])
        names = getattr(whole, "classes", None)
    else:
        names = getattr(train, "classes", None)
    parts = []
    for items in (train, test):
        own = Own(items, read, name)
        inputs, target = own.batch([0], None)
        parts.append(Items(own, tuple(inputs.shape[2:]), int(inputs.shape[1]), {"function": name}))  # type: ignore[arg-type]
    if parts[0].channels != parts[1].channels:
        raise ValueError(
            f"data={name!r}: training inputs have {parts[0].channels} channels, test inputs "
            f"{parts[1].channels}"
        )
    if names is None and classes is not None:
        names = [str(i) for i in range(classes)]
    channels = parts[0].channels
    return ImageData(
        name,
        parts[0],
        parts[1],
        tuple(map(str, names or ())),
        (0.0,) * channels,
        (1.0,) * channels,
        augment="none",
        notes=notes,
        labelled=target is not None,
    )
