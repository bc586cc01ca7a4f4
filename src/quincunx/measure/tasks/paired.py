"""Compare two networks image by image: McNemar's test for right and wrong, Wilcoxon's for other scores."""

from __future__ import annotations

from torch import Tensor

__all__ = ["compare_paired", "mcnemar"]


def mcnemar(before: Tensor, after: Tensor) -> dict[str, float]:
    """McNemar's exact two-sided test of two networks on the same images, from their correct predictions.

    Returns:
        "lost" (right before, wrong after), "won", and "p" of a difference as large by chance.

    Example:
        >>> found = mcnemar(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        >>> found["lost"], found["won"], found["p"]
        (1, 0, 1.0)
    """
    from scipy.stats import binomtest

    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p = float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    return {"lost": lost, "won": won, "p": p}


def compare_paired(before: Tensor, after: Tensor, better: str = "higher") -> dict[str, float | str]:
    """Test two networks on the same images, from a score for each image.

    Scores that all are 0 or 1 get McNemar's exact test, others Wilcoxon's signed-rank test (two-sided; images
    of equal scores are left out, and if all are equal p is 1).

    Args:
        before: scores of the first network, [N].
        after: of the second, in the same order.
        better: "higher" or "lower".

    Returns:
        "lost" and "won", images that are worse and better after; "p"; "test", its name.

    Raises:
        ValueError: different numbers of images, or scores that are not finite.

    Source: McNemar, Psychometrika 12 (1947); Wilcoxon, Biometrics Bulletin 1 (1945).

    Example:
        >>> found = compare_paired(torch.tensor([30.0, 28.0, 31.0]), torch.tensor([29.0, 27.5, 31.0]))
        >>> found["lost"], found["won"], found["test"]
        (2, 0, 'Wilcoxon')
    """
    if before.shape != after.shape:
        raise ValueError(f"after: scores of {tuple(after.shape)} images, expected {tuple(before.shape)}")
    first, second = before.double(), after.double()
    if not bool(first.isfinite().all() & second.isfinite().all()):
        raise ValueError("before, after: scores that are not finite cannot be compared")
    if all(bool(((one == 0) | (one == 1)).all()) for one in (first, second)):
        right = [one == (1 if better == "higher" else 0) for one in (first, second)]
        return {**mcnemar(right[0], right[1]), "test": "McNemar"}
    from scipy.stats import wilcoxon

    change = second - first if better == "higher" else first - second
    p = float(wilcoxon(change.numpy()).pvalue) if bool((change != 0).any()) else 1.0
    return {"lost": int((change < 0).sum()), "won": int((change > 0).sum()), "p": p, "test": "Wilcoxon"}
