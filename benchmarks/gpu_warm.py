"""Compile the benchmarks' kernels into Triton's cache, in several processes.

    python benchmarks/gpu_warm.py blocks networks training ops --budget 50

One process would compile one kernel after the other, for minutes. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from quincunx.experiments.bench_cuda import SUITES, Case
from quincunx.measure.latency_cuda import tf32
from quincunx.ops.cuda_graphs import on_stream


def shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    return int(number), int(count)


def call_ours(case: Case) -> None:
    """Call each of our candidates once, which compiles what it needs."""
    _, candidates = case.candidates()
    for name, candidate in candidates.items():
        if candidate.dense and not candidate.fused:
            continue
        try:
            candidate.make()()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - the benchmark reports the error
            print(f"{case.name}, batch {case.batch}, {case.dtype}, {name}: {type(error).__name__}")


def work(args: argparse.Namespace) -> None:
    number, count = args.shard
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    torch.backends.cudnn.benchmark = True
    dtypes = args.dtype.split(",")
    cases = [case for suite in args.suites for case in SUITES[suite](dtypes, compilers=False)]
    with tf32(True), on_stream():
        for case in cases[number::count]:
            if time.time() > args.until:
                break
            call_ours(case)
            gc.collect()
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="+", choices=list(SUITES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 4), help="processes")
    parser.add_argument("--budget", type=float, default=50.0, help="seconds after which all end")
    parser.add_argument("--shard", type=shard, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.shard is not None:
        work(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.time() + args.budget
    command = [sys.executable, __file__, *args.suites, "--dtype", args.dtype, "--until", str(end)]
    workers = [
        subprocess.Popen([*command, "--shard", f"{number}/{args.workers}"]) for number in range(args.workers)
    ]
    try:
        while time.time() < end and any(worker.poll() is None for worker in workers):
            time.sleep(0.2)
    finally:
        ended = sum(worker.poll() == 0 for worker in workers)
        for worker in workers:
            worker.kill()
            worker.wait()
    print(f"{ended} of {args.workers} processes came to their end")


if __name__ == "__main__":
    main()
