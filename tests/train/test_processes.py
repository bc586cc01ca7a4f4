"""Several processes train as one does, and a killed one does not end the job."""

import json

import pytest
import torch

from helpers.processes import assert_same_curve, launch, log_of
from quincunx.train.processes import ALONE, joined


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of a job of so many processes, and what it printed; each job is made once."""
    cases = {
        1: ("plain", "accumulate", "int8"),
        2: ("plain", "accumulate", "nan", "int8"),
        3: ("plain", "int8"),
    }
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


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_in_eight_bits_as_one_does(jobs, processes):
    """Sums in another order may move a number halfway between two integers to either; few are there."""
    ours, theirs = jobs(processes)[0] / "int8", jobs(1)[0] / "int8"
    assert_same_curve(log_of(ours), log_of(theirs), near=2e-2)
    # and it is no run in float32
    assert log_of(ours)[0]["train_loss"] != pytest.approx(
        log_of(jobs(1)[0] / "plain")[0]["train_loss"], rel=1e-5
    )
    states = [torch.load(ours / f"state{rank}") for rank in range(processes)]
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True)), "all have one network"


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
