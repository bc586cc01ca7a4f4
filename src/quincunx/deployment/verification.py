"""Exported files in a fresh process: compared with the network, and timed beside the dense one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Candidate", "Found", "difference", "drawn_like", "run_apart"]


@dataclass(frozen=True)
class Candidate:
    """A file and how it is loaded.

    Attributes:
        name: in results.
        file: its path.
        engine: "onnxruntime", "openvino", "torch" or "aoti".
        libraries: of our operators, loaded before it; for OpenVINO modules with a function ``register``.
        precision: OpenVINO's hint.
    """

    name: str
    file: str
    engine: str
    libraries: tuple[str, ...] = ()
    precision: str = "f32"


@dataclass(frozen=True)
class Found:
    """What a fresh process found.

    Attributes:
        answers: of the first candidate, for each set of inputs.
        times: milliseconds of each candidate, round by round.
        failed: candidates other than the first that do not load, and why.
    """

    answers: list[list[np.ndarray]]
    times: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)

    def ratio(self, slower: str, faster: str) -> float:
        """The median over the rounds of the time of one candidate over another's."""
        pairs = zip(self.times[slower], self.times[faster], strict=True)
        return median(a / b for a, b in pairs)


def run_apart(
    candidates: Sequence[Candidate],
    sets: Sequence[Sequence[Tensor]],
    timed: Sequence[Tensor],
    *,
    threads: int,
    rounds: int,
    seconds: float = 0.05,
) -> Found:
    """Load candidates in a new Python process; the first answers all inputs, then all are timed in turn.

    Args:
        candidates: each loads there.
        sets: inputs that the first one answers.
        timed: inputs of the timing.
        threads: of each engine.
        rounds: how often each candidate has its turn; 0 times nothing.
        seconds: of one turn.

    Raises:
        RuntimeError: the first candidate does not load or does not answer; the sentence is the engine's.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays: dict[str, np.ndarray] = {}
        numbered: list[list[str]] = []
        for number, inputs in enumerate([timed, *sets]):
            names = [f"{number}.{place}" for place in range(len(inputs))]
            arrays |= {key: x.detach().contiguous().numpy() for key, x in zip(names, inputs, strict=True)}
            numbered.append(names)
        np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]
        job: dict[str, Any] = {
            "candidates": [vars(candidate) for candidate in candidates],
            "inputs": str(folder / "inputs.npz"),
            "timed": numbered[0],
            "sets": numbered[1:],
            "answers": str(folder / "answers.npz"),
            "result": str(folder / "result.json"),
            "threads": threads,
            "rounds": rounds,
            "seconds": seconds,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        worker = Path(__file__).with_name("worker.py")
        done = subprocess.run(
            [sys.executable, str(worker), str(folder / "job.json")], capture_output=True, text=True, cwd=name
        )
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = lines[-1] if lines else f"it ended with code {done.returncode}"
            raise RuntimeError(f"{candidates[0].engine} does not run {candidates[0].file}: {said[:500]}")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found = np.load(folder / "answers.npz")
        answers = [
            [found[key] for key in sorted(found.files, key=_places) if key.split(".")[0] == str(number)]
            for number in range(len(sets))
        ]
    return Found(answers, result["times"], result["failed"])


def drawn_like(example: Tensor, shape: Sequence[int], source: torch.Generator) -> Tensor:
    """Return random values of a shape: drawn from the example's own, so that they are of the kind that a
    network takes. Of one value a network shows little: then they are half to one and a half of it, and normal
    ones for zeros."""
    values = example.detach().flatten()
    if not bool(values.any()):
        return torch.randn(tuple(shape), generator=source)
    if bool((values == values[0]).all()):
        return values[0] * (0.5 + torch.rand(tuple(shape), generator=source))
    return values[torch.randint(len(values), tuple(shape), generator=source)]


def _places(key: str) -> tuple[int, ...]:
    return tuple(int(part) for part in key.split("."))


def difference(answers: Sequence[np.ndarray], wanted: Sequence[Tensor]) -> float:
    """Return the largest deviation of answers, relative to the largest value of each output.

    Where both have the same value that is not finite, such as the -inf of a mask, they agree.

    Raises:
        ValueError: another number of outputs or another shape; a value that is finite in one of both alone,
            or an output without a finite value, of which nothing could be said.

    Example:
        >>> difference([np.array([1.0, 2.02])], [torch.tensor([1.0, 2.0])])
        0.01...
    """
    if len(answers) != len(wanted):
        raise ValueError(f"{len(answers)} outputs instead of {len(wanted)}")
    worst = 0.0
    for number, (answer, tensor) in enumerate(zip(answers, wanted, strict=True)):
        right = tensor.detach().numpy()
        if answer.shape != right.shape:
            raise ValueError(f"output {number}: shape {list(answer.shape)} instead of {list(right.shape)}")
        if not right.size:
            continue
        known = np.isfinite(right)
        if not known.any():
            raise ValueError(f"output {number}: no value is finite, so that nothing can be compared")
        if not np.array_equal(answer[~known], right[~known], equal_nan=right.dtype.kind in "fc"):
            raise ValueError(f"output {number}: other values that are not finite")
        gap = np.abs(answer[known].astype(np.float64) - right[known].astype(np.float64))
        if not np.isfinite(gap).all():
            raise ValueError(f"output {number}: values that are not finite")
        worst = max(worst, float(gap.max() / max(np.abs(right[known]).max(), 1e-12)))
    return worst
