"""One small image and the sizes of layers' maps: a report draws on them which positions are computed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from quincunx.modules import inference_mode_of
from quincunx.surgery.calibration import run_order

__all__ = ["sample_record"]

# a report shows pictures a few hundred pixels wide, and the image is in every result file
_LONGEST = 96


def sample_record(
    original: nn.Module, names: Iterable[str], image: Tensor, mean: Iterable[float], std: Iterable[float]
) -> dict[str, Any]:
    """Return what a report needs to draw computed positions on an image.

    Args:
        original: the network before, on the device of the image.
        names: its layers that were replaced.
        image: normalised, [1, C, H, W].
        mean: of each channel before normalisation, in [0, 1].
        std: of each channel.

    Returns:
        "image": a PNG in base64, at most 96 pixels wide and high, grey unless there are three channels;
        "maps": layer -> [height, width] of its input map and of its output map, where both are maps.
    """
    with inference_mode_of(original):
        order = run_order(original, image, None) or {}
    sizes = {name: [list(shape[2:]) for shape in order[name][1:]] for name in names if name in order}
    return {
        "image": _png(image, mean, std),
        "maps": {name: both for name, both in sizes.items() if all(len(size) == 2 for size in both)},
    }


def _png(image: Tensor, mean: Iterable[float], std: Iterable[float]) -> str:
    from PIL import Image

    shift, scale = (image.new_tensor(list(v)).view(1, -1, 1, 1) for v in (mean, std))
    pixels = (image * scale + shift).clamp(0, 1)
    if pixels.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    shrink = _LONGEST / max(pixels.shape[2:])
    if shrink < 1:
        size = [max(1, round(shrink * side)) for side in pixels.shape[2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    values = (255 * pixels[0]).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
