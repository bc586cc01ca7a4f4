"""Tasks: what a network is for, in one interface that calibration, searches, training and judging share.

Example:
    >>> from quincunx.measure import tasks
    >>> tasks.image_to_image().scale
    Scale(name='PSNR', unit='dB', better='higher')
"""

from quincunx.measure.tasks.paired import compare_paired, mcnemar
from quincunx.measure.tasks.ready import (
    READY,
    agreement,
    classification,
    image_to_image,
    multilabel,
    named,
    segmentation,
)
from quincunx.measure.tasks.scale import Scale
from quincunx.measure.tasks.task import BadTask, Figure, Task, read_pair, relative_distance

__all__ = [
    "READY",
    "BadTask",
    "Figure",
    "Scale",
    "Task",
    "agreement",
    "classification",
    "compare_paired",
    "image_to_image",
    "mcnemar",
    "multilabel",
    "named",
    "read_pair",
    "relative_distance",
    "segmentation",
]
