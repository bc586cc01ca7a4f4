"""Draw computed positions: on a sample image, on impact maps, or on a plain grid."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from quincunx.report.figures import Picture, draw_map, draw_sampling
from quincunx.sampling import Sampling, from_spec

__all__ = ["draw_on_sample", "draw_plain"]

# of a picture; cells of small maps are larger
_SIDE = 256
# a file may claim any size of a map, and a mask of that size would be made
_LARGEST = 4096
# a skipped position keeps this share of its brightness, the rest is a purple that photographs rarely have
_LEFT, _SKIPPED = 0.3, (204, 121, 167)
# names that a title holds before "and N more"
_NAMED = 4


def _halves(replaced: Mapping[str, Any]) -> list[str]:
    """Return the samplings of one replaced layer: two if it was split into halves."""
    return replaced.get("masks") or [replaced[key] for key in ("sampling",) if key in replaced]


def _title(name: str, number: int, count: int) -> str:
    return f"{name}, {'vertical' if number == 1 else 'horizontal'}" if count > 1 else name


def draw_on_sample(sample: Mapping[str, Any] | None, replaced: Mapping[str, Any]) -> list[Picture]:
    """Draw every layer's computed positions over the sample image of a result, equal maps once.

    Args:
        sample: what :func:`quincunx.acceleration.sample.sample_record` recorded; None gives no picture.
        replaced: layer -> spec of its replacement, as an artifact has it.

    Raises:
        ValueError: the image is not a PNG in base64.
    """
    if not sample:
        return []
    image = _decoded(sample["image"])
    found: dict[tuple[str, int, int], list[str]] = {}
    for name, spec in replaced.items():
        texts = _halves(spec)
        for i, text in enumerate(texts, 1):
            size = _grid(from_spec(text), spec, sample["maps"].get(name), first=i < len(texts))
            if size is not None:
                found.setdefault((text, *size), []).append(_title(name, i, len(texts)))
    return [_over(image, from_spec(text), (h, w), names) for (text, h, w), names in found.items()]


def _grid(
    sampling: Sampling, spec: Mapping[str, Any], both: list[list[int]] | None, *, first: bool
) -> tuple[int, int] | None:
    """Return height and width of the map whose positions are sampled; None if it is not known."""
    own = getattr(sampling, "size", None)
    if own is not None:
        return int(own[0]), int(own[1])
    if both is None:
        return None
    taken, given = both
    if not all(type(side) is int and 0 < side <= _LARGEST for side in (*taken, *given)) or len(taken) != 2:
        raise ValueError(f"sample: {str(both)[:80]} where sizes of a map belong")
    if first:
        # a vertical half has the height of the output and the width of the input
        return given[0], taken[1]
    # a transposed convolution spreads its sampled input
    height, width = taken if "transpose" in str(spec.get("kind", "")) else given
    return height, width


def _decoded(text: str) -> np.ndarray[Any, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > _SIDE:
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
            return np.asarray(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(f"sample: not a small PNG image in base64 ({str(error)[:80]})") from None


def _over(
    image: np.ndarray[Any, Any], sampling: Sampling, size: tuple[int, int], names: list[str]
) -> Picture:
    from PIL import Image

    height, width = size
    mask = sampling.mask(height, width).numpy()
    # in the image's shape, also where a half has another: its cells are then wide or high
    longest = max(image.shape[:2])
    down, across = (
        max(1, round(_SIDE * side / longest / cells)) for side, cells in zip(image.shape, size, strict=False)
    )
    target = (across * width, down * height)
    pixels = np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC), dtype=np.float32)
    computed = mask.repeat(down, 0).repeat(across, 1)[..., None]
    faded = _LEFT * pixels.mean(2, keepdims=True) + (1 - _LEFT) * np.array(_SKIPPED, dtype=np.float32)
    drawn = np.where(computed, pixels, faded).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, format="PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED + 1 else ""
    shown = ", ".join(names[:_NAMED] if more else names) + more
    count = int(mask.sum())
    title = f"{shown}: {count} of {height} x {width} ({100 * count / mask.size:.0f}%)"
    return Picture(
        title, source, f"{', '.join(names)}: {count} of {height} x {width} positions are computed."
    )


def draw_plain(result: Mapping[str, Any], replaced: Mapping[str, Any], *, grids: bool) -> list[Picture]:
    """Draw the impact map of every layer that has one, and, with ``grids``, the other layers' samplings."""
    pictures: list[Picture] = []
    plain: dict[str, list[str]] = {}
    for name, spec in replaced.items():
        texts = _halves(spec)
        maps = result["maps"].get(name, {})
        for i, text in enumerate(texts, 1):
            sampling, values = from_spec(text), maps.get(f"impact{i}")
            title = _title(name, i, len(texts))
            if values is None:
                plain.setdefault(text, []).append(title)
            else:
                computed = sampling.mask(len(values), len(values[0])).tolist()
                pictures.append(draw_map(values, computed, title))
    for text, titles in plain.items() if grids else ():
        title = titles[0] if len(titles) == 1 else f"{titles[0]} and {len(titles) - 1} more"
        pictures.append(draw_sampling(from_spec(text), title))
    return pictures
