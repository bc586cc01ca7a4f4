"""Several processes accelerate a network as one does, the first speaks, and a killed one ends no job."""

import json

import pytest
import torch

import quincunx as qx
from helpers.acceleration import DATA
from helpers.processes import launch, launched
from quincunx.acceleration import together
from quincunx.acceleration.free import scaled_inputs
from quincunx.train.evaluation import score_images, score_shared
from quincunx.train.processes import ALONE, Ranks, as_known, to_be_told

# a clock that counts multiplications decides the same on every machine
WORKER = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import quincunx as qx
from helpers.acceleration import DATA, MACS_AS_TIME, METHOD, network
from quincunx.acceleration import pipeline
from quincunx.acceleration.pipeline import accelerate_trained, plan_for_target
from quincunx.acceleration.scores import Scores
from quincunx.acceleration.target import Search, Target
from quincunx.acceleration.together import PATIENCE
from quincunx.experiments.compare import compare_methods, points_named
from quincunx.methods.fitting.moments import Accumulator
from quincunx.train.evaluation import label_with
from quincunx.train.processes import joined
from quincunx.train.recipes import Recipe

torch.set_num_threads(1)
for place in MACS_AS_TIME:
    setattr(*place)
# whether the format is faster here does not matter
pipeline.format_served = lambda model, example, dtype: (dtype, None)

RECIPE = Recipe("tiny", epochs=2, batch_size=20, lr=0.02, augment="none")
SHORT = dict(calibration=40, normalisation=60, batch=2, rounds=3)
counted, measure = [], Scores.measure_losses

def counting(self, numbers, seconds):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    counted.append(len(numbers))
    if "kill" in sys.argv and ranks.rank == 1 and first and len(counted) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, numbers, seconds)

Scores.measure_losses = counting
added, add = [], Accumulator.add

def noting(self, *given):
    added.append(len(given[0]))
    return add(self, *given)

Accumulator.add = noting

def run(case, out):
    told = []
    options = dict(SHORT, tell=told.append, ranks=ranks)
    # few candidates of many kinds
    search = Search(Target(macs="75%"), ("spatialbottleneck", "espace"))
    options["calibration"] = 60 if case in ("method", "budget") else 40
    if case == "method":
        found = accelerate_trained(network(), METHOD, DATA, out, recipe=RECIPE, **options)
    elif case == "budget":
        found = accelerate_trained(network(), qx.LowRank(budget=0.5), DATA, out, **options)
    elif case in ("search", "kill"):
        found = accelerate_trained(network(), search, DATA, out, layers=["layer[12].*"], **options)
    elif case == "plan":
        del options["normalisation"], options["rounds"]
        lines = Search(Target(macs="75%"), ("lowrank", "perforate"))
        found = plan_for_target(network(), lines, DATA, out, **options)
    elif case == "bfloat16":
        found = accelerate_trained(network(), METHOD, DATA, out, dtype=torch.bfloat16, **options)
    elif case == "int8":
        found = accelerate_trained(
            network(), METHOD, DATA, out, recipe=RECIPE, dtype=torch.int8, keep_best=False, **options
        )
    elif case == "diverged":
        wild = replace(RECIPE, lr=1e30)
        found = accelerate_trained(
            network(), METHOD, DATA, out, recipe=wild, keep_diverged=True, **options
        )
    elif case == "refused":
        try:
            accelerate_trained(network(), METHOD, DATA, out, layers=["none.*"], **options)
        except ValueError as error:
            found = str(error)
    elif case == "labels":
        data = label_with(network(), replace(DATA, classes=()), ranks=ranks)
        found = [data.classes, data.train.labels.tolist(), data.test.labels.tolist()]
    elif case == "compare":
        points = points_named(["lowrank", "spatialbottleneck"], ["*0.25", "*2of4"])
        points = points[:2]
        rows = compare_methods(network(), points, DATA, out, **options)
        found = [[row.series, row.label, row.drop, row.mac_ratio] for row in rows]
    place = Path(f"{out}-{ranks.rank}.json")
    counts = {"told": len(told), "losses": sum(counted), "added": len(added)}
    place.write_text(json.dumps({"found": found, **counts}))

with joined(patience=PATIENCE) as ranks:
    for case in sys.argv[2:]:
        run(case, os.path.join(sys.argv[1], case))
"""
CASES = ("method", "budget", "search", "plan", "bfloat16", "int8", "diverged", "refused", "labels", "compare")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What each process of a job of so many found of each case; each job is made once."""
    made = {}

    def job(processes):
        if processes not in made:
            folder = tmp_path_factory.mktemp("together") / str(processes)
            code, text = launch(folder, CASES, processes, worker=WORKER)
            assert code == 0, text
            made[processes] = {
                case: [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(processes)]
                for case in CASES
            }
        return made[processes]

    return job


def same(case, jobs, processes=2):
    """What several processes found of a case, and what one did."""
    of_all, [alone] = jobs(processes)[case], jobs(1)[case]
    for one in of_all[1:]:
        assert one["found"] == of_all[0]["found"], "all processes have the result"
        assert one["told"] == 0, "the first one speaks"
    assert of_all[0]["told"] == alone["told"]
    return of_all[0]["found"], alone["found"]


def assert_same_stages(ours, theirs, *, loss=1e-4):
    assert len(ours["stages"]) == len(theirs["stages"])
    for one, other in zip(ours["stages"], theirs["stages"], strict=True):
        assert one["name"] == other["name"]
        assert one["error"] == other["error"]
        assert one["loss"] == pytest.approx(other["loss"], rel=loss)


@pytest.mark.parametrize("case", ["method", "bfloat16"])
def test_a_method_gives_the_errors_of_one_process(jobs, case):
    ours, theirs = same(case, jobs)
    # batch norm sums over processes in another order in fine-tuning
    assert_same_stages(ours, theirs, loss=5e-3)
    assert [row["name"] for row in ours["layers"]] == [row["name"] for row in theirs["layers"]]
    assert ours["epochs"] == theirs["epochs"] == (2 if case == "method" else None)


def test_fine_tuning_in_eight_bits_is_that_of_one_process(jobs):
    ours, theirs = same("int8", jobs)
    names = [stage["name"] for stage in ours["stages"]]
    assert names[-3:] == ["in int8, before fine-tuning", "after fine-tuning", "in int8"]
    assert names == [stage["name"] for stage in theirs["stages"]]
    for one, other in zip(ours["stages"], theirs["stages"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
    assert ours["epochs"] == theirs["epochs"] == 2
    assert ours["int8"]["kept"] == theirs["int8"]["kept"]


@pytest.mark.parametrize("case", ["method", "budget"])
def test_passes_through_the_calibration_images_are_shared_and_added_up(jobs, case):
    ours, theirs = same(case, jobs)
    assert ours["layers"], "something was replaced"
    for one, other in zip(ours["layers"], theirs["layers"], strict=True):
        assert one["name"] == other["name"]
        assert one["rank"] == other["rank"]
        assert one["response_error"] == pytest.approx(other["response_error"], rel=1e-6)
    if case == "method":
        assert ours["maps"] == theirs["maps"], "the positions of highest impact"
    # of two batches each process reads one
    [alone] = jobs(1)["method"]
    assert [one["added"] for one in jobs(2)["method"]] == [alone["added"] // 2] * 2 != [0, 0]


@pytest.mark.parametrize("case", ["search", "plan"])
def test_a_search_makes_the_choice_of_one_process(jobs, case):
    ours, theirs = same(case, jobs)
    chosen = [found["search"]["chosen"] if case == "search" else found["chosen"] for found in (ours, theirs)]
    assert chosen[0] == chosen[1] != []
    rows = [(found["search"] if case == "search" else found)["candidates"] for found in (ours, theirs)]
    for one, other in zip(*rows, strict=True):
        assert (one["layers"], one["method"], one["why_not"]) == (
            other["layers"],
            other["method"],
            other["why_not"],
        )
        # each candidate is scored by one process, on all images
        assert one["loss"] == other["loss"]
        assert one["macs_saved"] == other["macs_saved"]
    if case == "search":
        assert_same_stages(ours, theirs)


def test_the_candidates_are_shared_out(jobs):
    counts = [one["losses"] for one in jobs(2)["search"]]
    assert min(counts) > 0.3 * sum(counts) > 0


def test_fine_tuning_that_diverges_is_left_by_all_in_the_same_step(jobs):
    ours, theirs = same("diverged", jobs)
    assert ours["diverged"] is not None
    assert theirs["diverged"] is not None
    assert ours["stages"][-1]["error"] == theirs["stages"][-1]["error"]


def test_what_the_first_process_refuses_all_refuse(jobs):
    ours, theirs = same("refused", jobs)
    assert ours == theirs
    assert "layers='none.*': no layer has such a name" in ours


def test_images_without_labels_get_those_of_one_process_on_all(jobs):
    ours, theirs = same("labels", jobs)
    assert ours == theirs
    assert len(ours[1]) == len(DATA.train)


def test_methods_are_compared_as_by_one_process(jobs):
    ours, theirs = same("compare", jobs)
    assert len(ours) == 2
    assert ours == theirs


def test_a_search_whose_process_was_killed_goes_on_from_its_scores(jobs, tmp_path):
    code, text = launch(tmp_path / "job", ["kill"], 2, restarts=1, worker=WORKER)
    assert code == 0, text
    assert "exitcode: -9" in text, "nothing was killed"
    found = [json.loads((tmp_path / "job" / f"kill-{rank}.json").read_text()) for rank in range(2)]
    [alone] = jobs(1)["search"]
    assert found[0]["found"]["search"]["chosen"] == alone["found"]["search"]["chosen"]
    assert_same_stages(found[0]["found"], alone["found"])
    whole = sum(one["losses"] for one in jobs(2)["search"])
    assert 0 < sum(one["losses"] for one in found) < whole, "what was scored is not scored again"


def test_the_first_process_alone_speaks_and_its_code_is_the_jobs(tmp_path):
    """Of a target that is missed, and of bad input; results are written once."""
    model = qx.networks.build("cifar-resnet8", 10, 1).eval()
    qx.save(model, tmp_path / "net")
    command = ["-m", "quincunx", "--quiet", "accelerate", "net", "--data", "digits", "--calibration", "50"]
    command += ["--rounds", "3", "--layers", "layer3.0.conv2", "--method", "lowrank", "--threads", "1"]
    code, text = launched([*command, "--speedup", "50"], 2, cwd=tmp_path)
    assert code == 1, text
    assert text.count("Target missed: ") == 1, text
    assert "failed (exitcode: 1) local_rank: 0 " in text, text
    assert text.count("Traceback") == 1, "but for the launcher's own"
    assert (tmp_path / "fast" / "report.html").is_file()
    code, text = launched(
        [*command, "--layers", "none.*", "--speedup", "50", "--out", "other"], 2, cwd=tmp_path
    )
    assert code == 1, text
    assert text.count("error: layers='none.*'") == 1, text
    assert "failed (exitcode: 2) local_rank: 0 " in text, text


# ---------------------------------------------------------------- without other processes


@pytest.mark.parametrize("world", [2, 3, 40])
def test_the_shares_of_the_test_images_are_put_in_their_order(world, monkeypatch):
    """Also if a process has no image."""
    model = qx.networks.build("cifar-resnet8", 3, 3).eval()
    alone = score_images(model, DATA.test, DATA)

    def score(rank, world):
        return score_images(model, DATA.test, DATA, rank=rank, world=world)

    monkeypatch.setattr(Ranks, "gathered", lambda self, _: [score(rank, world) for rank in range(world)])
    found = score_shared(score, len(DATA.test), 256, Ranks(0, world))
    # a batch of one image is computed in another order than one of many
    torch.testing.assert_close(found.losses, alone.losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.scores, alone.scores)
    assert found.sums.keys() == alone.sums.keys()
    for name, value in found.sums.items():
        assert torch.equal(value, alone.sums[name])


@pytest.mark.parametrize("fused", [False, True])
def test_a_network_is_sent_with_its_replaced_layers_and_the_size_that_it_takes(fused):
    model = qx.networks.build("cifar-resnet8", 3, 3).eval()
    x = torch.randn(8, 3, 16, 16)
    fast = qx.accelerate(model, qx.SpatialBottleneck(data=False), example_input=x).model
    network = qx.fuse(fast) if fused else fast
    with scaled_inputs(network, (8, 8)):
        received = together._unpacked(together._packed(network))
        assert torch.equal(received(x), network(x))
    assert not torch.equal(received(x), network(x)), "the size is no part of the network"


def test_a_network_that_cannot_be_sent_is_refused_in_one_sentence():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    model.activation = lambda x: x
    with pytest.raises(ValueError, match=r"model: cannot be sent to the other processes .* in one process"):
        together._packed(model)


def test_an_exception_that_cannot_be_sent_keeps_its_words():
    class Local(ValueError):
        pass

    assert str(together._portable(Local("no such layer"))) == "no such layer"
    sent = ValueError("as it is")
    assert together._portable(sent) is sent


def test_who_tells_a_failure(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    error = ValueError("the disk of this machine is full")
    assert to_be_told(error), "nobody else knows it"
    assert not to_be_told(as_known(error))
    assert not to_be_told("stopped")
    monkeypatch.setenv("RANK", "0")
    assert to_be_told(error)


def test_alone_what_fails_fails_at_once():
    with pytest.raises(ValueError, match="no"), ALONE.agreed():
        raise ValueError("no")
