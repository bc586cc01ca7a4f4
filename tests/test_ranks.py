"""Several processes train as one does, and a killed one does not end the job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quincunx.ranks import ALONE, joined

# 20 images in batches of 8: the last batch is odd, and with three processes one has a single image. A job
# makes several runs, one after the other, since to start its processes takes longer than to train
WORKER = """
import os, signal, sys
import torch
from torch import nn
import test_train as common
from quincunx.ranks import joined
from quincunx.train import fit, RunFailed

torch.set_num_threads(1)

def run(folder, case, ranks):
    recipe = common.replace(common.TINY, epochs=3, accumulate=3 if case == "accumulate" else 1)
    model = common.network("rsbn14")
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
        fit(model, common.DATA, recipe, folder, ranks=ranks)
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


def launch(folder, cases, processes, *, restarts=0):
    """The exit code, and what the job printed, of ``processes`` processes on this machine."""
    folder.mkdir()
    for case in cases:
        (folder / case).mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent / "src")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"),
            *("--nproc-per-node", str(processes), "--max-restarts", str(restarts)),
            *(str(script), str(folder), *cases),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_curve(ours, theirs):
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        for key in ("lr", "train_loss", "train_error", "test_loss", "test_error"):
            assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-6), (one["epoch"], key)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of a job of so many processes, and what it printed; each job is made once."""
    cases = {1: ("plain", "accumulate"), 2: ("plain", "accumulate", "nan"), 3: ("plain",)}
    made = {}

    def job(processes):
        if processes not in made:
            folder = tmp_path_factory.mktemp("ranks") / str(processes)
            code, text = launch(folder, cases[processes], processes)
            assert code == 0, text
            made[processes] = folder, text
        return made[processes]

    return job


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_have_the_loss_curve_of_one(jobs, processes):
    folder, text = jobs(processes)
    run, alone = folder / "plain", jobs(1)[0] / "plain"
    assert "Warning" not in text
    assert_same_curve(log_of(run), log_of(alone))
    wanted = torch.load(alone / "state0")
    for rank in range(processes):
        for ours, theirs in zip(torch.load(run / f"state{rank}"), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)
    shares = [eval((run / f"calls{rank}").read_text()) for rank in range(processes)]
    assert [sum(parts) for parts in zip(*shares, strict=True)] == [8, 8, 4] * 3
    assert json.loads((run / "run.json").read_text())["processes"] == processes


def test_parts_of_a_batch_meet_across_processes(jobs):
    """Also where a process has fewer images than there are parts."""
    # batch norm takes each part by itself, and the parts of two processes hold other images than one's
    ours, theirs = (log_of(jobs(processes)[0] / "accumulate") for processes in (2, 1))
    assert [e["lr"] for e in ours] == [e["lr"] for e in theirs]
    assert ours[0]["train_loss"] == pytest.approx(theirs[0]["train_loss"], rel=0.3)
    shares = [eval((jobs(2)[0] / "accumulate" / f"calls{rank}").read_text()) for rank in (0, 1)]
    assert [len(s) for s in shares] == [27, 27]
    assert 0 in shares[0]


def test_a_job_whose_process_was_killed_goes_on_and_ends_as_if_nothing_had_been(jobs, tmp_path):
    code, text = launch(tmp_path / "job", ["kill"], 2, restarts=1)
    assert code == 0, text
    assert "exitcode: -9" in text, "nothing was killed"
    run = tmp_path / "job" / "kill"
    assert_same_curve(log_of(run), log_of(jobs(1)[0] / "plain"))
    # started again after the first of three epochs, five steps in
    assert len(eval((run / "calls1").read_text())) == 6


def test_without_restarts_a_killed_process_ends_the_job(tmp_path):
    code, _ = launch(tmp_path / "job", ["kill"], 2)
    assert code == 1
    assert not (tmp_path / "job" / "kill" / "run.json").exists()
    assert len(log_of(tmp_path / "job" / "kill")) == 1


def test_a_loss_that_is_not_finite_on_one_stops_all_in_the_same_step(jobs):
    one, two = ((jobs(2)[0] / "nan" / f"error{rank}").read_text() for rank in (0, 1))
    assert one == two
    assert "the loss is nan in epoch 2, step 2, at learning rate" in one


def test_alone_without_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks == ALONE
        assert ranks.total([1.5, 2]) == [1.5, 2]
        assert ranks.from_first(lambda: "x") == "x"
