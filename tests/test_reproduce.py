"""The paper's tables: which runs they take, what is made again, and what is said about the results."""

import json
from dataclasses import replace

import pytest
import torch
from scipy import stats

from quincunx import experiments
from quincunx.cost import cost
from quincunx.experiments import EXPERIMENTS, Entry, by_name
from quincunx.networks import build
from quincunx.recipes import Recipe
from quincunx.reproduce import compare, plan, reproduce
from quincunx.train import Interrupted
from test_train import pictures, stop_in

RECIPE = Recipe("tiny", epochs=2, batch_size=16, lr=0.01, augment="none")
DATA = pictures(count=20, channels=3)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_of_every_table_can_be_built_and_is_tested_against_a_dense_or_earlier_one(name):
    experiment = by_name(name)
    for i, entry in enumerate(experiment.entries):
        assert str(entry.depth) in entry.network
        assert entry.versus is None or entry.versus < i
        if entry.versus is not None:
            versus = experiment.entries[entry.versus]
            assert (versus.depth, versus.versus) == (entry.depth, None)
    # the largest ones take long to build
    shallowest = min(entry.depth for entry in experiment.entries)
    for entry in experiment.at_depths([shallowest]).entries:
        build(entry.network, 10, **dict(entry.settings))


def test_the_tables_are_the_papers():
    networks = {name: [e.network for e in by_name(name).entries] for name in EXPERIMENTS}
    assert networks["table1"][:4] == ["rrn20", "rsbn20", "rrn44", "rsbn44"]
    assert networks["table1"][-2:] == ["crn101", "csbn101"]
    assert len(networks["table1"]) == len(networks["table2"]) == len(networks["downsampling"]) == 20
    assert networks["table3"] == [
        f"{sb}pyramidnet{d}-a{a}" for d in (110, 164) for a in (84, 270) for sb in ("", "sb-")
    ]
    assert networks["table4"] == [f"{sb}resnet{d}" for d in (18, 34, 50, 101) for sb in ("", "sb-")]
    samplings = [dict(e.settings).get("sampling", "2/4") for e in by_name("table2").entries[1:4]]
    assert samplings == ["1/4", "2/4", "3/4"]
    assert by_name("figure3") == by_name("table1")


def test_tables_share_the_runs_that_they_have_in_common():
    one, two = (set(by_name(name).entries) for name in ("table1", "table2"))
    names = lambda entries: {(e.network, e.settings) for e in entries}  # noqa: E731
    assert ("rsbn20", ()) in names(one) & names(two)


def test_printed_macs_are_those_of_the_networks_where_the_design_says_so():
    for entry in by_name("table1").at_depths([20, 44, 62]).entries:
        macs = cost(build(entry.network), torch.zeros(1, 3, 32, 32)).macs
        assert macs / 1e6 == pytest.approx(entry.paper_macs, abs=0.06)
    assert Entry("rsbn20", (("sampling", "1/4"),)).paper_macs is None
    assert Entry("rsbn110").paper_error("cifar100") == 25.13
    assert Entry("rsbn110").paper_error("cifar10") is None


def test_depths_choose_rows_and_unknown_ones_are_refused():
    chosen = by_name("table2").at_depths([44])
    assert [e.depth for e in chosen.entries] == [44] * 4
    assert [e.versus for e in chosen.entries] == [None, 0, 0, 0]
    with pytest.raises(ValueError, match=r"depths=21: table1 has 20, 29, 44"):
        by_name("table1").at_depths([20, 21])
    with pytest.raises(ValueError, match=r"experiment='table9': unknown; nearest first: table"):
        by_name("table9")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce")
    return out, reproduce(by_name("table1").at_depths([20]), RECIPE, [0, 1], out, DATA)


def test_a_table_leaves_one_result_a_run_and_its_figure(made):
    out, rows = made
    names = {f"{n}-seed{s}" for n in ("rrn20", "rsbn20-2of4") for s in (0, 1)}
    assert {p.stem for p in out.glob("*.json")} == names
    assert {p.name for p in (out / "runs").iterdir()} == names
    assert b"<svg" in (out / "figure3.svg").read_bytes()
    assert [row.label for row in rows] == ["rrn20", "rsbn20 2/4"]
    for row in rows:
        name = "rrn20" if row.baseline is None else "rsbn20-2of4"
        errors = [100 * json.loads((out / f"{name}-seed{s}.json").read_text())["test_error"] for s in (0, 1)]
        assert row.errors == tuple(errors)
        assert row.mean == pytest.approx(sum(errors) / 2)


def test_the_same_command_again_makes_nothing_and_says_the_same(made, monkeypatch):
    out, rows = made
    monkeypatch.setattr("quincunx.reproduce.fit", lambda *_, **__: pytest.fail("it trained"))
    assert reproduce(by_name("table1").at_depths([20]), RECIPE, [0, 1], out, DATA) == rows


def test_a_folder_with_runs_of_another_recipe_is_refused(made):
    out, _ = made
    with pytest.raises(ValueError, match=r"a run of another recipe: lr was 0\.01, now 0\.02; another --out"):
        reproduce(by_name("table1").at_depths([20]), replace(RECIPE, lr=0.02), [0], out, DATA)


def test_a_run_that_was_stopped_goes_on(made, tmp_path, monkeypatch):
    real = build

    def stopping(*args, **settings):
        return stop_in(real(*args, **settings), 3, KeyboardInterrupt())

    experiment = by_name("table1").at_depths([20])
    monkeypatch.setattr("quincunx.reproduce.networks.build", stopping)
    with pytest.raises(Interrupted, match="after 1 of 2"):
        reproduce(experiment, RECIPE, [0, 1], tmp_path, DATA)
    monkeypatch.undo()
    assert reproduce(experiment, RECIPE, [0, 1], tmp_path, DATA) == made[1]


def test_the_p_value_is_students(made):
    runs = json.loads(next(made[0].glob("*.json")).read_text())
    errors = ([0.10, 0.11, 0.13], [0.12, 0.15, 0.13])
    results = [[{**runs, "test_error": e} for e in seeds] for seeds in errors]
    rows = compare(by_name("table1").at_depths([20]), results)
    wanted = stats.ttest_ind(*errors, equal_var=True).pvalue
    assert rows[0].p is None
    assert rows[1].p == pytest.approx(wanted)
    assert rows[1].deviation == pytest.approx(stats.tstd([12, 15, 13]))
    # one run, or no variance at all, allow no test
    one = compare(by_name("table1").at_depths([20]), [r[:1] for r in results])
    assert (one[1].p, one[1].deviation) == (None, None)
    same = compare(by_name("table1").at_depths([20]), [[runs, runs]] * 2)
    assert same[1].p is None


def test_a_plan_knows_macs_and_what_is_done(made, tmp_path):
    experiment = by_name("table1").at_depths([20])
    rows = plan(experiment, RECIPE, [0, 1, 2], made[0], data=DATA, timed=False)
    assert [(row.done, row.seeds, row.hours) for row in rows] == [(2, 3, None)] * 2
    planned = plan(experiment, Recipe(), [0], tmp_path)
    assert planned[0].macs == pytest.approx(40.55e6, rel=1e-3)
    assert all(0 < row.hours < 1000 for row in planned)
    assert not list(tmp_path.iterdir())


def test_no_experiment_is_left_out():
    assert {f().name for f in set(EXPERIMENTS.values())} <= set(EXPERIMENTS)
    assert experiments.table4().data == "imagenet"
