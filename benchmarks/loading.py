"""How long a network with our kernels takes to load in each engine, and what memory it holds while loaded.

Each row is a new process that first loads the engine and a tiny network in it, then the file, and answers one
image. Seconds are the least of some processes, from the file to a model that can answer, on the clock and of
the processor. Memory is what the process holds more than before the file was loaded, over the bytes of the
weights: ``held`` without pages that the system may drop at any time, since they are also in the file;
``peak`` the most at any time, such pages included.

    OMP_NUM_THREADS=1 python benchmarks/loading.py --out results/loading.json   # two minutes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import quincunx as qx
from quincunx.fusion.serialise import program_bytes
from quincunx.measure.environment import environment
from quincunx.ops.libraries import library_path
from quincunx.writing import write_json

# before each engine's lines: what is loaded and warm when the clock starts
ENGINES = {
    "libquincunx": (
        "import ctypes\nlib = ctypes.CDLL(LIBRARY)\nmodel, first = ctypes.c_void_p(), ctypes.c_void_p()",
        "assert lib.qx_load_file(FILE.encode(), ctypes.byref(model)) == 0",
        "",
    ),
    "ONNX Runtime": (
        "import numpy, onnxruntime\noptions = onnxruntime.SessionOptions()\n"
        "options.intra_op_num_threads = 1\noptions.register_custom_ops_library(LIBRARY)",
        "model = onnxruntime.InferenceSession(FILE, options, providers=['CPUExecutionProvider'])",
        "model.run(None, {'input': numpy.zeros(SHAPE, numpy.float32)})",
    ),
    "OpenVINO": (
        "import numpy, openvino\nimport quincunx as qx\ncore = openvino.Core()\n"
        "qx.openvino.register(core, 1)\ncore.get_versions('CPU')",
        "model = core.compile_model(FILE, 'CPU', {'INFERENCE_NUM_THREADS': 1})",
        "model(numpy.zeros(SHAPE, numpy.float32))",
    ),
    "PyTorch": (
        "import torch\ntorch.ops.load_library(LIBRARY)\nimport torch.export.pt2_archive",
        "model = torch.export.load(FILE).module()",
        "model(torch.zeros(SHAPE))",
    ),
}
TINY = 16
_COMMON = """
import json, time
def memory(word, file):
    return 1024 * sum(int(l.split()[1]) for l in open(f"/proc/self/{file}") if l.startswith(word))
def anonymous():
    return memory("Anonymous:", "smaps_rollup")
"""
_MEASURED = """
anonymous_before, resident_before = anonymous(), memory("VmRSS:", "status")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
began, busy = time.perf_counter(), time.process_time()
LOAD
seconds, busy = time.perf_counter() - began, time.process_time() - busy
CALL
print(json.dumps({"seconds": seconds, "busy": busy, "held": anonymous() - anonymous_before,
                  "peak": memory("VmHWM:", "status") - resident_before}))
"""


def measure(engine: str, file: Path, library: str, size: int) -> dict[str, float]:
    """Return what one process found; beside the file is a tiny one of the same format."""
    before, load, call = ENGINES[engine]
    tiny = file.with_name(f"tiny{file.suffix}")
    names = f"LIBRARY, FILE, TINY = {library!r}, {str(file)!r}, {str(tiny)!r}\n"
    names += f"SHAPE, TINY_SHAPE = {(1, 3, size, size)}, {(1, 3, TINY, TINY)}"
    warm = (load + "\n" + call).replace("FILE", "TINY").replace("SHAPE", "TINY_SHAPE")
    warm = re.sub(r"\bmodel\b", "first", warm)
    lines = [_COMMON, names, before, warm, _MEASURED.replace("LOAD", load).replace("CALL", call)]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{engine}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def files(model: torch.nn.Module, x: torch.Tensor, folder: Path, name: str) -> dict[str, Any]:
    """Return engine, file and library of each row."""
    made: dict[str, tuple[str, Path, str]] = {}
    (folder / f"{name}.quincunx").write_bytes(program_bytes(qx.fuse(model).program0, x.shape))
    made["libquincunx"] = ("libquincunx", folder / f"{name}.quincunx", library_path("quincunx"))
    for row, engine, file, settings in (
        ("ONNX Runtime", "ONNX Runtime", f"{name}.onnx", {}),
        ("ONNX Runtime, external data", "ONNX Runtime", f"{name}-outside.onnx", {"external_data": True}),
        ("OpenVINO", "OpenVINO", f"{name}.xml", {}),
        ("PyTorch", "PyTorch", f"{name}.pt2", {}),
    ):
        done = qx.export(model, folder / file, x, plugin=True, rounds=0, **settings)
        path = re.search(r'load_library\("([^"]+)"', "\n".join(done.lines["Python"]))
        library = library_path("quincunx_ort") if path is None else path[1]
        made[row] = (engine, folder / file, library)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="sb-resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, x = qx.networks.build(given.network).eval(), torch.randn(1, 3, given.size, given.size)
    weights = sum(4 * p.numel() for p in model.parameters())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        files(qx.networks.build("rsbn8").eval(), torch.randn(1, 3, TINY, TINY), Path(name), "tiny")
        found = files(model, x, Path(name), "net")
        runs: dict[str, list[dict[str, float]]] = {row: [] for row in found}
        for _ in range(given.rounds):
            for row, (engine, file, library) in found.items():
                runs[row].append(measure(engine, file, library, given.size))
    for row, results in runs.items():
        best = {key: min(result[key] for result in results) for key in results[0]}
        rows.append(
            {
                "engine": row,
                "seconds": round(best["seconds"], 3),
                "processor_seconds": round(best["busy"], 3),
                "held_over_weights": round(best["held"] / weights, 2),
                "peak_over_weights": round(best["peak"] / weights, 2),
            }
        )
        print(rows[-1], flush=True)
    if given.out is not None:
        head = {"kind": "loading", "network": given.network, "weights": weights, "cores": os.cpu_count()}
        write_json(given.out, {**head, "environment": environment(), "at": time.strftime("%F"), "rows": rows})


if __name__ == "__main__":
    main()
