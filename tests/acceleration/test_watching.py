"""What a search tells while it runs: the best so far, predicted and then measured, and the time left."""

import warnings

import pytest
import torch
from rich.progress import Progress
from torch import nn

import quincunx as qx
from helpers.acceleration import clock_of_macs, network
from quincunx.acceleration.pipeline import run_search
from quincunx.acceleration.search import search
from quincunx.acceleration.target import Search, Target
from quincunx.acceleration.watching import Watch
from quincunx.progress import progress_bar, seconds_left


def told_by_search(target, monkeypatch, **options):
    clock_of_macs(monkeypatch)
    # a prediction at each step
    monkeypatch.setattr("quincunx.acceleration.watching._EVERY", 0.0)
    images = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)]
    told = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="calibration: .* images are few")
        found = search(
            network(),
            target,
            images,
            candidates=[qx.SpatialBottleneck()],
            tell=lambda what, share: told.append((what, share)),
            **options,
        )
    return found, told


def test_the_best_so_far_is_predicted_and_then_measured(monkeypatch):
    found, told = told_by_search(Target(speedup=1.2), monkeypatch)
    assert not told[0][0].startswith("best so far")
    predicted = [what for what, share in told if "(predicted)" in what]
    assert predicted[-1].startswith("best so far 1.2")
    assert "x of 1.2x asked, loss " in predicted[-1]
    measured = [what for what, _ in told if what.startswith("best so far") and "(predicted)" not in what]
    assert f"best so far {found.record['attempts'][-1]['speedup']:.2f}x of 1.2x asked" in measured[-1]
    assert any("fitting" in what for what, _ in told)
    shares = [share for _, share in told if share >= 0]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_search_for_a_loss_tells_what_is_lost(monkeypatch):
    found, told = told_by_search(Target(max_drop=100), monkeypatch)
    assert found.met
    assert any(what.startswith("best so far") and "(predicted)" in what for what, _ in told)
    watch = Watch(Target(max_drop=1.0), lambda what, share: told.append((what, share)))
    watch.measured({"speedup": 1.3}, met=True, lost="0.50 points lost")
    watch.measured({"speedup": 1.2}, met=True, lost="0.10 points lost")
    watch("fitting", -1.0)
    assert told[-1] == ("best so far 1.30x, 0.50 points lost; fitting", -1.0)


def test_a_choice_that_meets_the_target_is_better_than_a_faster_one_that_loses_more():
    told = []
    watch = Watch(Target(speedup=1.5), lambda what, share: told.append(what))
    for speed, loss, met in ((1.2, 0.01, False), (1.4, 0.02, False), (1.6, 0.5, True), (1.52, 0.1, True)):
        watch.measured({"speedup": speed, "loss": loss}, met=met)
    watch.measured({"speedup": 1.9, "loss": 0.9}, met=True)
    watch("now", -1.0)
    assert told == ["best so far 1.52x of 1.5x asked, loss 0.1; now"]


@pytest.mark.parametrize(
    ("given", "done", "elapsed", "left"),
    [
        ({"total": 10}, 2, 4.0, 16.0),
        ({"total": 1.0}, 0.25, 60.0, 180.0),
        # a budget ends it
        ({"total": 1.0, "limit": 90.0}, 0.25, 60.0, 30.0),
        ({"total": 1.0, "limit": 50.0}, 0.25, 60.0, 0.0),
        # a resumed task is judged by what it did since
        ({"total": 10, "completed": 8}, 9, 5.0, 5.0),
        ({"total": 10, "completed": 8}, 8, 5.0, None),
        ({"total": None}, 3, 5.0, None),
        # nothing is done yet, but the budget is known
        ({"total": 1.0, "limit": 90.0}, 0, 60.0, 30.0),
        ({"total": 10}, 10, 5.0, 0.0),
    ],
)
def test_time_left(given, done, elapsed, left):
    now = [0.0]
    with progress_bar(True) as bar:
        assert isinstance(bar, Progress)
        bar.get_time = lambda: now[0]
        task = bar.add_task("x", state="", **given)
        now[0] = elapsed
        bar.update(task, completed=done)
        assert seconds_left(bar.tasks[0]) == left


def test_the_bar_shows_a_share_in_percent_and_a_count_as_it_is(capsys):
    with progress_bar(True) as bar:
        bar.update(bar.add_task("searching", total=1.0, state=""), completed=0.5)
        bar.update(bar.add_task("layers", total=4, state=""), completed=1)
    shown = capsys.readouterr().err
    assert " 50% " in shown
    assert " 1/4 " in shown


def test_the_bar_of_a_search_says_when_it_begins_to_choose(monkeypatch, tmp_path, capsys):
    clock_of_macs(monkeypatch)
    images = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="calibration: .* images are few")
        run_search(
            network(),
            Search(Target(speedup=1.2), methods=("spatialbottleneck",)),
            images=images,
            out=tmp_path,
            where=lambda name, module: True,
            one=torch.zeros(1, 3, 8, 8),
            batch=2,
            progress=True,
        )
    shown = capsys.readouterr().err
    assert "searching" in shown
    assert "100%" in shown
    assert "best so far" in shown.partition("choosing")[2]


@pytest.mark.parametrize("shown", [True, False])
def test_the_python_call_shows_how_far_it_is_where_it_is_asked_to(shown, capsys):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    # enough for either layer: which one is chosen depends on times
    images = [torch.randn(16, 3, 8, 8)]
    qx.accelerate(net, "spatialbottleneck", calibration=images, macs="99%", progress=shown)
    assert ("searching" in capsys.readouterr().err) is shown
