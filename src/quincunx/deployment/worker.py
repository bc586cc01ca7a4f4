"""A program of its own that loads exported files by their engine, answers inputs and is timed.

It imports nothing of quincunx but what a candidate names: it stands for the process in which a file is
deployed. It is started as ``python worker.py job.json``; what it does is in the job, what it found goes to
files that the job names.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# modules that lie beside this file are no part of what a deployed process has
sys.path[:] = sys.path[1:] if __name__ == "__main__" else sys.path

import numpy as np  # noqa: E402

Run = Callable[[Sequence[Any]], "list[Any]"]


def load_onnxruntime(candidate: dict[str, Any], threads: int) -> Run:
    """A session with full optimisation, as a user gets it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    for library in candidate["libraries"]:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(candidate["file"], options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs)))  # noqa: B905


def load_openvino(candidate: dict[str, Any], threads: int) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": candidate["precision"],
    }
    core = openvino.Core()
    for library in candidate["libraries"]:
        # the operation in Python is a module that a process of this engine needs besides
        importlib.import_module(library).register(core, threads)
    request = core.compile_model(core.read_model(candidate["file"]), "CPU", settings).create_infer_request()

    def run(inputs: Sequence[Any]) -> list[Any]:
        found = request.infer(dict(enumerate(inputs)), share_inputs=True, share_outputs=True)
        return list(found.values())

    return run


def load_torch(candidate: dict[str, Any], threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    for library in candidate["libraries"]:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    return _torch_run(torch.export.load(candidate["file"]).module())


def load_aoti(candidate: dict[str, Any], threads: int) -> Run:
    import torch
    import torch._inductor

    torch.set_num_threads(threads)
    for library in candidate["libraries"]:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    return _torch_run(torch._inductor.aoti_load_package(candidate["file"]))


def _torch_run(model: Any) -> Run:
    import torch
    from torch.utils import _pytree as pytree

    def run(inputs: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            return [value.numpy() for value in pytree.tree_leaves(model(*map(torch.from_numpy, inputs)))]

    return run


LOADERS: dict[str, Callable[[dict[str, Any], int], Run]] = {
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "torch": load_torch,
    "aoti": load_aoti,
}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Answer all inputs by the first candidate; then time each candidate on the first inputs, in turn.

    Returns:
        For each candidate its milliseconds in each round, or the sentence that says why it does not run.
    """
    arrays = np.load(job["inputs"])
    sets = [[arrays[name] for name in names] for names in job["sets"]]
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for number, candidate in enumerate(job["candidates"]):
        try:
            runs[candidate["name"]] = LOADERS[candidate["engine"]](candidate, job["threads"])
        # what an engine raises is an answer
        except Exception as error:  # noqa: PERF203
            if number == 0:
                raise
            failed[candidate["name"]] = f"{type(error).__name__}: {error}"[:300]
    first = job["candidates"][0]["name"]
    answers = {}
    for number, inputs in enumerate(sets):
        for place, value in enumerate(runs[first](inputs)):
            answers[f"{number}.{place}"] = np.array(value)
    np.savez(job["answers"], **answers)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {name: [] for name in runs}
    timed = [arrays[name] for name in job["timed"]] if job["rounds"] else []
    calls: dict[str, int] = {}
    for name, run in runs.items() if job["rounds"] else ():
        run(timed)
        start = time.perf_counter()
        run(timed)
        # a round takes about this many seconds
        calls[name] = max(1, round(job["seconds"] / max(1e-6, time.perf_counter() - start)))
    for number in range(job["rounds"]):
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                runs[name](timed)
            times[name].append(1000 * (time.perf_counter() - start) / calls[name])
    return {"times": times, "failed": failed}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as opened:
        given = json.load(opened)
    result = work(given)
    with open(given["result"], "w", encoding="utf-8") as written:
        json.dump(result, written)
