"""Commands killed at random moments, and on a full disk: the same command goes on and ends as if undisturbed.

Run by hand for a long campaign: PYTHONPATH=tests python -m soak.interruptions --kills 50 --full-disks 20.
Each command runs once undisturbed. Then it is killed with SIGKILL at a random moment, up to three times in
one folder, and run again until it ends; and it meets a disk that is full at a random write, which has to be
one sentence, and is run again. What it leaves must be what the undisturbed one left: weights to the bit,
results but for times, and their numbers to 1e-5 or 1e-7 of one: a search that goes on computes the maps in
front of a layer in other pieces, their sums are rounded otherwise, and a small loss is the difference of sums
near one. The clock that searches read counts multiplications, so
that a choice does not depend on how busy the machine is. What goes wrong is printed with the seed that
repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.acceleration import MACS_AS_TIME
from quincunx.cli import app

FORK = multiprocessing.get_context("fork")
TRAIN = [
    "train",
    "--network",
    "rrn8",
    "--width",
    "4",
    "--data",
    "digits",
    "--threads",
    "1",
    "--resume",
    "--json",
]
SMALL = [
    "--data",
    "digits",
    "--calibration",
    "100",
    "--rounds",
    "3",
    "--batch",
    "2",
    "--threads",
    "1",
    "--json",
]
TUNED = ["--finetune-epochs", "2", "--recipe", "digits", "--lr", "0.02"]
# what each leaves in "out"; the others begin with the network that the first one trains
COMMANDS: dict[str, list[str]] = {
    "train": [*TRAIN, "--epochs", "3", "--out", "out"],
    "accelerate": [
        "accelerate", "start", *SMALL, *TUNED, "--method", "perforate", "--keep-slower", "--out", "out",
    ],
    "search": ["accelerate", "start", *SMALL, "--speedup", "1.2", "--method", "lowrank", "--out", "out"],
    "compare": [
        "compare", "start", *SMALL, *TUNED, "--methods", "lowrank,input", "--points", "LRD-rank-0.25,*0.5*",
        "--out", "out",
    ],
    "export": ["export", "start/model", "--format", "onnx", "--out", "out/net.onnx", "--force"],
}  # fmt: skip
# of a result file: what depends on the clock, the machine, or how often the command was run
VARYING = (
    "environment", "seconds", "images_per_second", "speedup", "speedup_range", "seconds_before",
    "seconds_after", "layers_speedup", "fitting", "recalled", "before_s", "after", "predicted", "times",
    "peers", "q1", "q3", "median", "seconds_saved", "fronts", "words", "found", "verdict", "timed",
    "peak_memory",
)  # fmt: skip


def fill_disk_at(write: int) -> None:
    """Let the disk be full when a file is flushed for the n-th time, and from then on."""
    flush, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    os.fsync = full


def run_command(folder: Path, arguments: list[str], prepare: Callable[[], None]) -> None:
    """Run a command in this process, with what it says in files, and exit with its code."""
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    # those of the parent may be a test runner's
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    for place in MACS_AS_TIME:
        setattr(*place)
    prepare()
    try:
        app(arguments, prog_name="quincunx")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(folder: Path, arguments: list[str], prepare: Callable[[], None] = lambda: None) -> Any:
    """Start a command in a process of its own."""
    child = FORK.Process(target=run_command, args=(folder, arguments, prepare))
    child.start()
    return child


def end(child: Any, folder: Path) -> int:
    """Wait for a command and return its exit code.

    Raises:
        AssertionError: it hangs, or ends with a traceback.
    """
    child.join(600)
    if child.is_alive():
        child.kill()
        raise AssertionError("it hangs")
    said = (folder / "stderr").read_text()
    assert "Traceback" not in said, said[-1500:]
    return int(child.exitcode)


def fresh(start_from: Path | None) -> Path:
    """Return a new folder with the network to begin with."""
    folder = Path(tempfile.mkdtemp(prefix="quincunx-soak-"))
    (folder / "out").mkdir()
    if start_from is not None:
        (folder / "start").symlink_to(start_from)
    return folder


def left_in(folder: Path) -> dict[str, Any]:
    """Return what a command left by file: values of JSON without what varies, digests of other content."""
    found = {}
    for path in sorted((folder / "out").rglob("*")):
        name = str(path.relative_to(folder / "out"))
        if (
            path.is_dir()
            or path.name in (".lock",)
            or name.endswith((".html", ".svg", "checkpoint.pt", ".onnx"))
        ):
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = content.splitlines() if path.suffix == ".jsonl" else [content]
            found[name] = [without_varying(json.loads(line)) for line in lines]
        else:
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def same(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are equal, fractions to 1e-5 of themselves or 1e-7."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-7)
    return bool(one == other)


def without_varying(value: Any) -> Any:
    """Return a JSON value without times."""
    if isinstance(value, dict):
        return {key: without_varying(each) for key, each in value.items() if key not in VARYING}
    return [without_varying(each) for each in value] if isinstance(value, list) else value


def leftovers(folder: Path) -> list[str]:
    """Return files that only a dead writer leaves."""
    return [
        str(p) for p in (folder / "out").rglob(".*") if p.name != ".lock" and not p.name.endswith(".lock")
    ]


class Soak:
    """Runs one command undisturbed and then disturbed, again and again."""

    def __init__(self, name: str, start_from: Path | None, seed: int) -> None:
        self.name, self.start_from, self.arguments = name, start_from, COMMANDS[name]
        self.seed, self.dice = seed, random.Random(f"{name} {seed}")
        folder = fresh(start_from)
        began = time.monotonic()
        self.code = end(start(folder, self.arguments), folder)
        self.seconds = time.monotonic() - began
        assert self.code in (0, 1), (folder / "stderr").read_text()
        self.wanted, self.folder = left_in(folder), folder
        assert self.wanted or name == "export"

    def kill(self) -> None:
        """Kill it at one to three moments, then let it end."""
        folder, moments = fresh(self.start_from), []
        for _ in range(self.dice.randint(1, 3)):
            moments.append(self.dice.uniform(0, self.seconds))
            child = start(folder, self.arguments)
            time.sleep(moments[-1])
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        self.finish(folder, f"killed after {', '.join(f'{m:.2f}' for m in moments)} s")

    def fill_disk(self) -> None:
        """Let the disk be full at a random write, then let it end."""
        folder, write = fresh(self.start_from), self.dice.randint(1, 25)
        code = end(start(folder, self.arguments, lambda: fill_disk_at(write)), folder)
        said = (folder / "stderr").read_text()
        if code != self.code:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert (code, len(errors)) == (1, 1), (
                f"{self.name}, write {write}: exit code {code}: {said[-800:]}"
            )
            assert "No space left" in errors[0], errors
        self.finish(folder, f"full disk at write {write}")

    def finish(self, folder: Path, what: str) -> None:
        code = end(start(folder, self.arguments), folder)
        said = (folder / "stderr").read_text()
        where = f"{self.name}, seed {self.seed}, {what}, in {folder}"
        assert code == self.code, f"{where}: exit code {code}, not {self.code}: {said[-1500:]}"
        found = left_in(folder)
        differing = sorted(n for n in {*found, *self.wanted} if not same(found.get(n), self.wanted.get(n)))
        assert not differing, f"{where}: other content than undisturbed: {', '.join(differing)}"
        assert not leftovers(folder), f"{where}: left {leftovers(folder)}"


def campaign(names: list[str], kills: int, full_disks: int, seed: int) -> list[str]:
    """Disturb some commands so many times each; return what went wrong."""
    wrong: list[str] = []
    base = fresh(None)
    assert end(start(base, [*TRAIN, "--epochs", "2", "--out", "out"]), base) == 0, (
        base / "stderr"
    ).read_text()
    for name in names:
        soak = Soak(name, None if name == "train" else base / "out", seed)
        for disturb in [soak.kill] * kills + [soak.fill_disk] * full_disks:
            found = failure_of(disturb)
            wrong += found
            sys.stdout.writelines(f"wrong: {line}\n" for line in found)
        sys.stdout.write(f"{name}: {soak.seconds:.1f} s, {kills} kills, {full_disks} full disks\n")
        sys.stdout.flush()
    return wrong


def failure_of(disturb: Callable[[], None]) -> list[str]:
    """Return what went wrong, or nothing."""
    try:
        disturb()
    except AssertionError as error:
        return [str(error)]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each command")
    parser.add_argument("--full-disks", type=int, default=4, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        return bool(campaign(given.commands.split(","), given.kills, given.full_disks, given.seed))
    return 130


if __name__ == "__main__":
    sys.exit(main())
