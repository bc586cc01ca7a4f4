"""Images with labels or other targets: small sets as bytes in memory, large ones streamed from files.

Small sets (digits, CIFAR, folders and archives that fit) are kept as bytes [N, H, W, C] and are
normalised, cropped and flipped a whole batch at a time, so that loading never starves a small network.
Larger ones, such as ImageNet, are decoded and augmented in worker processes.
"""

from quincunx.data.drawn import Drawn, draw
from quincunx.data.epoch import AUGMENTATIONS, batches, normalised
from quincunx.data.grey import greyed
from quincunx.data.items import Items
from quincunx.data.load import load_data
from quincunx.data.pairs import degraded, load_function, load_pairs
from quincunx.data.resident import Pass, Resident, can_reside
from quincunx.data.sets import ImageData, Part, Split, Stream, part_with
from quincunx.data.stream import WorkerFailed

__all__ = [
    "AUGMENTATIONS",
    "Drawn",
    "ImageData",
    "Items",
    "Part",
    "Pass",
    "Resident",
    "Split",
    "Stream",
    "WorkerFailed",
    "batches",
    "can_reside",
    "degraded",
    "draw",
    "greyed",
    "load_data",
    "load_function",
    "load_pairs",
    "normalised",
    "part_with",
]
