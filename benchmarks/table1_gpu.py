"""The paper's Table 1 (Peng et al., arXiv:1809.02601) on one GPU, several networks at a time.

    PYTHONPATH=src python3 benchmarks/table1_gpu.py --train TRAIN.tar.gz --test TEST.tar.gz --out FILE.json

Depth 20 first: the dense network, the spatial bottleneck at 1/4, 2/4 and 3/4 of the positions, average
pooling instead of strides, and the dense network on smaller images with as many multiply-adds; then deeper
networks in the remaining time, with fewer epochs if needed. One seed of all networks comes before the next
seed. Each run is a thread with its own stream and graph, since one small network does not fill a GPU.
The file is rewritten after each run, so that it has all finished runs whatever ends the script.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quincunx import networks
from quincunx.data import ImageData, Split, load_data
from quincunx.data.sets import statistics as statistics_of
from quincunx.measure.cost import cost
from quincunx.measure.environment import environment
from quincunx.ops import backend
from quincunx.report.results import label_of
from quincunx.train.loop import fit
from quincunx.train.recipes import Recipe, cifar
from quincunx.writing import file_name, write_json


def age() -> float:
    """Return seconds since this process started, including imports; 0 where the system does not say."""
    try:
        started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


BEGAN = time.perf_counter() - max(0.0, age())
# (name without depth, settings), in the order of the table; the others are compared with the first
NETWORKS: tuple[tuple[str, dict[str, str]], ...] = (
    ("rrn", {}),
    ("rsbn", {}),
    ("rsbn", {"sampling": "1/4"}),
    ("rsbn", {"sampling": "3/4"}),
    ("rsbn", {"down": "avgpool"}),
    ("rsbn", {"sampling": "1/4", "down": "avgpool"}),
)
# the first networks at larger depths
DEEP = NETWORKS[:2]
# seconds for the last evaluation and the file, and share of the time that a plan may use
_END, _SURE = 3.0, 0.9
# assumed speed-up of several runs together over one until it is measured; seconds over which it is measured
_TOGETHER, _SEEN_OVER = 1.5, 15.0
# seconds before any run is given up, since runs start one by one
_PATIENCE = 45.0


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        depth: of the network.
        network: its name.
        settings: of the network.
        side: of its images.
        seed: of weights, order and augmentation.
        whole: whether the images have their original size.
        work: of an epoch, in images through a network of the first depth.
    """

    depth: int
    network: str
    settings: tuple[tuple[str, str], ...]
    side: int
    seed: int
    whole: bool = True
    work: float = 0.0

    @property
    def label(self) -> str:
        name = label_of({"name": self.network, "settings": dict(self.settings)})
        return name if self.whole else f"{name} at {self.side} x {self.side}"

    def build(self, classes: int) -> nn.Module:
        torch.manual_seed(self.seed)
        return networks.build(self.network, classes, 3, **dict(self.settings))


def side_of_equal_cost(dense: nn.Module, other: nn.Module, side: int) -> int:
    """Return the image size at which the dense network's multiply-adds are nearest to the other's."""

    def macs(model: nn.Module, at: int) -> int:
        return cost(model, torch.zeros(1, 3, at, at)).macs

    wanted = macs(other, side)
    about = round(side * math.sqrt(wanted / macs(dense, side)))
    near = range(max(1, about - 4), min(side, about + 5))
    return min(near, key=lambda at: abs(macs(dense, at) - wanted))


def jobs_of(depths: Sequence[int], seeds: Sequence[int], side: int, only: str, images: int = 1) -> list[Job]:
    """Return all runs on this many images, the most important first."""

    def job(depth: int, name: str, settings: Mapping[str, str], seed: int, at: int = side) -> Job:
        work = images * depth / depths[0]
        return Job(depth, f"{name}{depth}", tuple(settings.items()), at, seed, at == side, work)

    found: list[Job] = []
    first, *deeper = depths
    dense = networks.build(f"rrn{first}", 10, 3)
    sizes = [
        side_of_equal_cost(dense, networks.build(f"rsbn{first}", 10, 3, sampling=s), side)
        for s in ("2/4", "1/4")
    ]
    for seed in seeds:
        found += [job(first, name, settings, seed) for name, settings in NETWORKS]
        found.append(job(first, "rrn", {}, seed, sizes[0]))
    found += [job(depth, name, settings, seeds[0]) for depth in deeper for name, settings in DEEP]
    found += [job(first, "rrn", {}, seed, sizes[1]) for seed in seeds]
    for seed in seeds:
        for depth in deeper:
            found += [job(depth, name, settings, seed) for name, settings in NETWORKS]
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    unique = dict.fromkeys(found)
    return [j for j in unique if not wanted or any(part in (j.label, j.network) for part in wanted)]


def resized(data: ImageData, side: int, device: torch.device) -> ImageData:
    """Return the same images resized (bicubic, antialiased), with their own mean and deviation."""

    def part(split: Split) -> Split:
        pieces = []
        for some in split.images.split(8192):
            floats = some.to(device).permute(0, 3, 1, 2).float()
            small = F.interpolate(floats, (side, side), mode="bicubic", antialias=True)
            pieces.append(small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return Split(torch.cat(pieces).contiguous(), split.labels)

    train, test = part(data.train), part(data.test)  # type: ignore[arg-type]
    mean, std = statistics_of(train.images)
    return replace(data, train=train, test=test, mean=mean, std=std)


class Watch:
    """One run's progress: the time of its epochs, and when it has to end."""

    def __init__(self, table: Table | None, job: Job, epochs: int) -> None:
        self.table, self.job, self.epochs = table, job, epochs
        self.before = time.perf_counter()
        self.done, self.each, self.why = 0, 0.0, ""

    @property
    def left(self) -> float:
        """Return the remaining work, in images through a network of the first depth."""
        return self.job.work * (self.epochs - self.done) if self.table is not None else 0.0

    def reason(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Act as a :class:`quincunx.train.loop.StopRule`: called after each epoch, and again at the end."""
        now = time.perf_counter()
        if len(history) > self.done:
            # the first epoch includes the set-up before it
            self.each = (now - self.before) / (len(history) - self.done)
            self.done, self.before = len(history), now
            if self.table is not None:
                self.table.note(self, now)
        return self.why or None


class Table:
    """The planned runs, the finished runs, and the file."""

    def __init__(self, given: argparse.Namespace, data: ImageData, jobs: list[Job]) -> None:
        self.given, self.data, self.left = given, data, jobs
        self.device = torch.device(given.device)
        self.deadline = BEGAN + given.budget if given.budget else math.inf
        self.lock = threading.Lock()
        self.sizes: dict[int, ImageData] = {data.size[0]: data}
        for side in {job.side for job in jobs} - self.sizes.keys():
            self.sizes[side] = resized(data, side, self.device)
        # before any training: the process has one generator, which draws the weights
        self.models = {job: job.build(len(data.classes)) for job in jobs}
        self.runs: list[dict[str, Any]] = []
        self.unfinished: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.skipped: list[Job] = []
        self.watches: list[Watch] = []
        self.active: list[Watch] = []
        self.ended: list[tuple[float, float]] = []
        self.deep: dict[int, int] = {}
        self.alone: dict[str, Any] | None = None
        # work per second: of one run with the GPU to itself, and of all together
        self.alone_rate, self.rate, self.seen = math.inf, math.inf, False
        self.environment = environment()
        self.started = time.perf_counter()

    # ---- which run is next

    def recipe(self, epochs: int) -> Recipe:
        given = self.given
        plain = cifar()
        # rates are proportional to the batch; the first epoch warms up to a rate larger than the paper's
        rate = given.lr or plain.lr * given.batch_size / plain.batch_size
        warm = 1 / epochs if rate > plain.lr and epochs > 4 else 0.0
        return replace(
            plain,
            name="cifar, shorter",
            epochs=epochs,
            batch_size=given.batch_size,
            lr=rate,
            warmup=warm,
            augment="cifar",
            precision=given.precision,
        )

    def note(self, watch: Watch, now: float) -> None:
        """Record the end of an epoch: how fast all runs are, and which have to end."""
        with self.lock:
            self.ended.append((now, watch.job.work))
            self.ended = [(when, work) for when, work in self.ended if when > now - _SEEN_OVER]
            if now - self.started > _SEEN_OVER + 3:
                rate = sum(work for _, work in self.ended) / _SEEN_OVER
                self.rate, self.seen = max(rate, self.rate if self.seen else 0.0), True
            if now + watch.each > self.deadline and watch.done < watch.epochs:
                watch.why = "the time is up"
            self._shed(now)

    def _shed(self, now: float) -> None:
        """Give up the least important runs if not all can end in time, so that the others can."""
        if not self.seen or now - self.started < _PATIENCE or math.isinf(self.deadline):
            return
        going = [watch for watch in self.active if not watch.why]
        while len(going) > 1 and sum(w.left for w in going) > 1.1 * self.rate * (self.deadline - now):
            going.pop().why = "given up for more important runs"

    def _epochs(self, job: Job) -> int | None:
        """Return the epochs of a run; None if there is no time for it."""
        given = self.given
        seconds = _SURE * (self.deadline - time.perf_counter() - _END)
        if math.isinf(seconds):
            return given.epochs
        if seconds <= 0:
            return None
        going = sum(watch.left for watch in self.active if not watch.why)
        alone, together = self.alone_rate * seconds, self.rate * seconds - going
        epochs = self.deep.get(job.depth, given.epochs)
        if job.depth != given.depths[0] and job.depth not in self.deep:
            # all networks of a depth are trained alike, and at least two are compared
            most = min(alone, together / len(DEEP)) / job.work
            epochs = given.epochs if most >= given.epochs else int(most)
        enough = epochs >= min(given.least, given.epochs)
        return epochs if enough and job.work * epochs <= min(alone, together) else None

    def _chosen(self) -> Watch | None:
        """Start the most important run that there is time for beside the others."""
        # until the common speed is measured, nothing overtakes a more important run
        for job in self.left if self.seen else self.left[:1]:
            epochs = self._epochs(job)
            if epochs is not None:
                if job.depth != self.given.depths[0]:
                    self.deep[job.depth] = epochs
                self.left.remove(job)
                watch = Watch(self, job, epochs)
                self.watches.append(watch)
                self.active.append(watch)
                return watch
        return None

    def next(self) -> Watch | None:
        """Return a thread's next run; None if there is none left."""
        while True:
            with self.lock:
                watch = self._chosen()
                if watch is not None or not self.left:
                    return watch
                if not self.active:
                    self.skipped, self.left = [*self.skipped, *self.left], []
                    return None
            # others may end earlier than expected
            time.sleep(0.25)

    # ---- results

    def train(self, watch: Watch, folder: Path) -> dict[str, Any]:
        job = watch.job
        name = f"{file_name(job.label)}-seed{job.seed}"
        return fit(
            self.models.pop(job).to(self.device),
            self.sizes[job.side],
            self.recipe(watch.epochs),
            folder / name,
            seed=job.seed,
            stop=watch,
        )

    def keep(self, job: Job, result: dict[str, Any]) -> None:
        entry = {"label": job.label, "depth": job.depth, "side": job.side, **short(result)}
        with self.lock:
            (self.unfinished if "stopped" in result else self.runs).append(entry)
            self.write()
        last = result["history"][-1]
        print(
            f"{time.perf_counter() - BEGAN:6.0f} s  {job.label}, seed {job.seed}: "
            f"{100 * result['test_error']:.2f}% after {len(result['history'])} epochs, "
            f"{last['images_per_second']:,.0f} images/s, graph {result.get('graph')}",
            flush=True,
        )

    def fail(self, job: Job, error: str) -> None:
        with self.lock:
            self.failures.append({"label": job.label, "seed": job.seed, "error": error})
            self.write()
        print(f"{job.label}, seed {job.seed} failed:\n{error}", flush=True)

    def summary(self) -> list[dict[str, Any]]:
        """Return a row per network: its errors in percent, and its difference from the dense network, on the
        same images and on smaller ones with as many multiply-adds: means over the seeds that both have."""
        by_label: dict[str, dict[int, dict[str, Any]]] = {}
        for run in self.runs:
            by_label.setdefault(run["label"], {})[run["seed"]] = run
        macs = {label: next(iter(found.values()))["cost"]["macs"] for label, found in by_label.items()}

        def beyond(label: str, other: str | None) -> float | None:
            ours, theirs = by_label[label], by_label.get(other or "", {})
            both = [
                100 * (ours[seed]["test_error"] - theirs[seed]["test_error"])
                for seed in ours
                if seed in theirs
            ]
            return statistics.fmean(both) if both else None

        rows = []
        for label, found in by_label.items():
            first = next(iter(found.values()))
            errors = [100 * run["test_error"] for run in found.values()]
            of_depth = [name for name in by_label if name.startswith(f"rrn{first['depth']} at ")]
            small = min(of_depth, key=lambda name: abs(macs[name] - macs[label]), default=None)
            speeds = [
                statistics.median(entry["images_per_second"] for entry in run["history"])
                for run in found.values()
            ]
            rows.append(
                {
                    "label": label,
                    "depth": first["depth"],
                    "side": first["side"],
                    "macs": macs[label],
                    "params": first["cost"]["params"],
                    "epochs": first["recipe"]["epochs"],
                    "seeds": list(found),
                    "errors": errors,
                    "error": statistics.fmean(errors),
                    "deviation": statistics.stdev(errors) if len(errors) > 1 else None,
                    "over_dense": beyond(label, f"rrn{first['depth']}"),
                    "small_images": small,
                    "over_small_images": beyond(label, small),
                    "images_per_second": round(statistics.fmean(speeds), 1),
                }
            )
        return sorted(rows, key=lambda row: (row["depth"], -row["side"], -row["macs"]))

    def write(self) -> None:
        given = self.given
        seconds = time.perf_counter() - self.started
        images = len(self.data.train) * sum(watch.done for watch in self.watches)
        gpu = self.device.type == "cuda"
        write_json(
            given.out,
            {
                "schema": 1,
                "kind": "table1",
                "data": self.data.describe(),
                "recipe": self.recipe(given.epochs).to_dict(),
                "device": self.device.type,
                "gpu": torch.cuda.get_device_name(self.device) if gpu else None,
                "cuda": torch.version.cuda if gpu else None,
                "backend": str(backend(self.device)),
                "jobs": given.jobs,
                "budget": given.budget,
                "seconds": round(seconds, 2),
                "seconds_before": round(self.started - BEGAN, 2),
                "images_per_second": round(images / seconds, 1),
                "alone": self.alone,
                "summary": self.summary(),
                "runs": self.runs,
                "unfinished": self.unfinished,
                "not_started": [f"{job.label}, seed {job.seed}" for job in self.skipped],
                "failures": self.failures,
                "environment": self.environment,
            },
        )


def short(result: dict[str, Any]) -> dict[str, Any]:
    """Return a run without the facts that all runs share."""
    left_out = ("schema", "data", "environment", "device", "gpu", "augment", "processes")
    kept = {key: value for key, value in result.items() if key not in left_out}
    history = [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in entry.items()}
        for entry in result["history"]
    ]
    return {**kept, "history": history}


@contextmanager
def stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Run this thread's work on one stream within the context, whichever run it belongs to."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def work(table: Table, folder: Path) -> None:
    """Run one thread: one run after the other as long as there are any."""
    in_a_row = 0
    with stream_of_its_own(table.device):
        while in_a_row < 3 and (watch := table.next()) is not None:
            try:
                result = table.train(watch, folder)
                in_a_row = 0
            except Exception:  # noqa: BLE001 - the other runs continue, and the file records the error
                result, error = None, traceback.format_exc(limit=12)
                in_a_row += 1
            with table.lock:
                table.active.remove(watch)
            if result is None:
                table.fail(watch.job, error)
            else:
                table.keep(watch.job, result)


def run_alone(table: Table, folder: Path) -> None:
    """Measure how fast one network trains with the GPU to itself; this also compiles its kernels."""
    given = table.given
    side = table.data.size[0]
    # a seed that no run of the table has
    depth, seed = given.depths[0], 1 + max(given.seeds)
    watch = Watch(None, Job(depth, f"rsbn{depth}", (), side, seed), given.alone)
    job = watch.job
    table.models[job] = job.build(len(table.data.classes))
    try:
        with stream_of_its_own(table.device):
            result = table.train(watch, folder / "alone")
    except Exception:  # noqa: BLE001 - as for any run
        table.fail(job, traceback.format_exc(limit=12))
        return
    if watch.done > 1:
        table.alone_rate = len(table.data.train) / watch.each
        table.rate = _TOGETHER * table.alone_rate
    fastest = max(entry["images_per_second"] for entry in result["history"])
    table.alone = {
        "label": job.label,
        "images_per_second": round(fastest, 1),
        "graph": result.get("graph"),
        "history": short(result)["history"],
    }
    print(
        f"{time.perf_counter() - BEGAN:6.0f} s  {job.label} alone: {fastest:,.0f} images/s, "
        f"graph {result.get('graph')}",
        flush=True,
    )


def loaded(given: argparse.Namespace) -> ImageData:
    """Load the images while the GPU starts."""
    device = torch.device(given.device)
    begins = threading.Thread(target=lambda: torch.zeros(1, device=device).add_(1).cpu(), daemon=True)
    begins.start()
    data = load_data(given.train, test_source=given.test, size=given.size)
    if not isinstance(data.train, Split):
        raise SystemExit(f"{given.train}: images that fit into memory are expected")
    begins.join()
    return data


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="training images by class: a folder or an archive")
    parser.add_argument("--test", required=True, help="test images, likewise")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--size", type=int, help="shorter side of the images; as they are by default")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument(
        "--least", type=int, default=20, help="epochs below which a deeper network is left out"
    )
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument(
        "--depths", type=numbers, default=[20, 44, 110], help="the first one is planned whole"
    )
    parser.add_argument("--only", default="", help="names or labels of networks, with commas")
    parser.add_argument("--jobs", type=int, default=7, help="runs at a time")
    parser.add_argument("--budget", type=float, default=0, help="seconds from the start; 0 for no end")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, help="by default the paper's 0.1 at 64 images, in proportion")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--alone", type=int, default=4, help="epochs of rsbn by itself first; 0 for none")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms")
    parser.add_argument("--commit", help="of this code, where there is no repository")
    parser.add_argument("--folder", type=Path, help="of the runs' checkpoints; a temporary one by default")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    # read when CUDA starts: streams must not share a queue
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if given.commit:
        os.environ["QUINCUNX_COMMIT"] = given.commit
    torch.backends.cudnn.benchmark = given.cudnn_benchmark
    # threads that wait for the interpreter keep a GPU waiting
    sys.setswitchinterval(0.001)
    data = loaded(given)
    print(f"{time.perf_counter() - BEGAN:6.1f} s  {len(data.train):,} images read", flush=True)
    jobs = jobs_of(given.depths, given.seeds, data.size[0], given.only, len(data.train))
    table = Table(given, data, jobs)
    # each run has its own thread
    torch.set_num_threads(1)
    table.environment = environment()
    with nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if given.alone:
            run_alone(table, folder)
        table.started = time.perf_counter()
        threads = [
            threading.Thread(target=work, args=(table, folder), daemon=True)
            for _ in range(min(given.jobs, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        # do not wait for a run that hangs
        while any(thread.is_alive() for thread in threads) and time.perf_counter() < table.deadline + 20:
            time.sleep(0.1)
        with table.lock:
            table.write()
            rows = table.summary()
        for row in rows:
            errors = ", ".join(f"{error:.2f}" for error in row["errors"])
            print(
                f"{row['label']:28s} {row['macs'] / 1e6:7.2f} M MACs, {row['epochs']} epochs: "
                f"{row['error']:6.2f}% ({errors}), {row['images_per_second']:,.0f} images/s"
            )
        print(
            f"{len(table.runs)} runs, {len(table.unfinished)} unfinished, {len(table.skipped)} not started, "
            f"{len(table.failures)} failed; {given.out}",
            flush=True,
        )
        if any(thread.is_alive() for thread in threads):
            print("a run did not end in time", flush=True)
            os._exit(1)


if __name__ == "__main__":
    main()
