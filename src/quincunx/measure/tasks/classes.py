"""Labels in any usual form as class numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "class_labels"]

# the label that torch's losses ignore
IGNORED = -100


def class_labels(output: Tensor, target: Any, index: int | None = 0) -> Tensor:
    """Return the classes that a target means, int64 [N, ...] as :func:`self_loss` needs them.

    They may have any integer dtype, or be floats without a fraction; a list of numbers; a column [N, 1]; or
    one-hot. Rows [N, classes, ...] that are not negative and add up to 1 are probabilities and are returned.
    -100 excludes an image or a position.

    Args:
        output: logits [N, classes, ...].
        target: the target from the batch.
        index: the number of the batch of calibration data, for messages; None for other data.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, a class that the network does not have, numbers with a fraction.

    Example:
        >>> class_labels(torch.zeros(2, 3), [[2.0], [0.0]]).tolist()
        [2, 0]
    """
    where = "the labels" if index is None else f"calibration: the labels of batch {index}"
    classes = output.shape[1]
    wanted = (output.shape[0], *output.shape[2:])
    given = target
    if not isinstance(given, Tensor):
        try:
            given = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{where} are a {type(target).__name__} that holds more than numbers; expected class numbers "
                f"{list(wanted)} from 0 to {classes - 1}, or give a loss"
            ) from None
    given = given.detach().to(output.device)
    if given.is_complex():
        raise TypeError(f"{where} are complex; expected class numbers from 0 to {classes - 1}")
    if given.dim() == 0 and wanted == (1,):
        given = given[None]
    if tuple(given.shape) == (wanted[0], 1, *wanted[1:]):
        given = given.squeeze(1)
    if tuple(given.shape) == tuple(output.shape):
        rows = given.to(output.dtype)
        if not bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() < 1e-3).all()):
            raise ValueError(
                f"{where} have shape {tuple(given.shape)}, but their rows are no probabilities, which add up "
                f"to 1; expected class numbers {list(wanted)}, or give a loss"
            )
        # class numbers for one-hot rows, otherwise the probabilities
        return rows.argmax(1) if bool(((rows == 0) | (rows == 1)).all()) else rows
    if tuple(given.shape) != wanted:
        raise ValueError(
            f"{where} have shape {tuple(given.shape)}, but the network answers {tuple(output.shape)}; "
            f"expected class numbers {list(wanted)}, or give a loss"
        )
    numbers = given.to(torch.int64)
    if given.is_floating_point() and not bool((numbers == given).all()):
        raise ValueError(
            f"{where} are {str(given.dtype).removeprefix('torch.')} numbers with a fraction; expected class "
            f"numbers from 0 to {classes - 1}, or give a loss"
        )
    used = numbers[numbers != IGNORED]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < classes:
        raise ValueError(
            f"{where} are from {int(used.min())} to {int(used.max())}, but there are {classes} classes; "
            f"expected 0 to {classes - 1}, or {IGNORED} for what is left out"
        )
    return numbers
