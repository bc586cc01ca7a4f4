"""Jobs of several processes on this machine."""

import json
import os
import subprocess
import sys

import pytest

from helpers import ROOT

# 20 images in batches of 8: the last batch is odd, and with three processes one has a single image. A job
# makes several runs, one after the other, since to start its processes takes longer than to train
WORKER = """
import os, signal, sys
import torch
from torch import nn
from dataclasses import replace
import quincunx as qx
from helpers import training
from quincunx.train.loop import fit, RunFailed
from quincunx.train.processes import joined

torch.set_num_threads(1)

def run(folder, case, ranks):
    recipe = replace(training.TINY, epochs=3, accumulate=3 if case == "accumulate" else 1)
    model = training.network("rsbn14")
    if case == "int8":
        images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        model = qx.calibrate(model.eval(), images, max_drop=100)
    calls = []

    def watch(module, inputs):
        if module.training:
            calls.append(len(inputs[0]))
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if case == "kill" and ranks.rank == 1 and first and len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            if case == "nan" and ranks.rank == 1 and len(calls) == 5:
                return (inputs[0] * float("nan"),)

    model.register_forward_pre_hook(watch)
    try:
        fit(model, training.DATA, recipe, folder, ranks=ranks)
    except RunFailed as error:
        open(os.path.join(folder, f"error{ranks.rank}"), "w").write(str(error))
        return
    assert "forward" not in vars(model.norm), "batch norm is left as it was"
    torch.save([t for t in model.state_dict().values()], os.path.join(folder, f"state{ranks.rank}"))
    open(os.path.join(folder, f"calls{ranks.rank}"), "w").write(repr(calls))

with joined() as ranks:
    for case in sys.argv[2:]:
        run(os.path.join(sys.argv[1], case), case, ranks)
"""

# starts a job as torchrun does, but its processes begin as copies of this one, which has imported torch and
# what a run imports of it late: that takes longer than most runs. torchrun itself starts those of launched()
LAUNCHER = """
import runpy, sys
import torch._dynamo, torch.utils.benchmark
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
import helpers.acceleration, helpers.training
import quincunx.acceleration.pipeline

def work(script, *given):
    sys.argv = [script, *given]
    runpy.run_path(script, run_name="__main__")

processes, restarts, script, *given = sys.argv[1:]
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=int(processes), max_restarts=int(restarts), monitor_interval=0.1,
    start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=script,
)
elastic_launch(config, work)(script, *given)
"""


def launch(folder, cases, processes, *, restarts=0, worker=WORKER):
    """The exit code, and what the job printed, of ``processes`` processes on this machine."""
    folder.mkdir()
    for case in cases:
        (folder / case).mkdir()
    script = folder / "worker.py"
    script.write_text(worker)
    return ended(["-c", LAUNCHER, str(processes), str(restarts), str(script), str(folder), *cases])


def launched(command, processes, *, cwd=None):
    """The exit code, and what the job printed, of a command under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
    return ended([*torchrun, "--nproc-per-node", str(processes), *command], cwd)


def ended(arguments, cwd=None):
    """The exit code and all output of Python with arguments."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_curve(ours, theirs, near=2e-3):
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        for key in ("lr", "train_loss", "train_error", "test_loss", "test_error"):
            assert one[key] == pytest.approx(other[key], rel=near, abs=1e-6), (one["epoch"], key)
