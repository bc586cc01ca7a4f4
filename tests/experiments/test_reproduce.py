"""The paper's tables: which runs they take, what is made again, and what is said about the results."""

import json
import re
from dataclasses import replace

import pytest
import torch
from scipy import stats

from helpers.training import pictures, stop_in
from quincunx.cli.printing import print_comparison, print_plan
from quincunx.experiments import bottleneck_paper as experiments
from quincunx.experiments.bottleneck_paper import EXPERIMENTS, TableEntry, by_name
from quincunx.experiments.printed import Error
from quincunx.experiments.reproduce import compare, plan, reproduce
from quincunx.measure.cost import cost
from quincunx.networks import build
from quincunx.train.loop import Interrupted
from quincunx.train.recipes import Recipe

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
    # the paper's figure 4 has table 1's curves, its figure 3 the samplings
    assert (by_name("figure4"), by_name("figure3")) == (by_name("table1"), by_name("table2"))
    data = {name: by_name(name).data for name in ("table1", "table2", "table3", "table4", "downsampling")}
    assert data == {
        "table1": "cifar10",
        "table2": "cifar100",
        "table3": "cifar10",
        "table4": "imagenet",
        "downsampling": "cifar100",
    }
    sections = [re.findall(r"section ([\d.]+)", by_name(n).title) for n in data]
    assert sections == [[], ["4.3"], ["4.5"], ["5"], ["4.4"]]
    assert "average pooling is worse" in by_name("downsampling").note


def test_tables_share_the_runs_that_they_have_in_common():
    one, two = (set(by_name(name).entries) for name in ("table1", "table2"))
    names = lambda entries: {(e.network, e.settings) for e in entries}  # noqa: E731
    assert ("rsbn20", ()) in names(one) & names(two)


def test_printed_macs_are_those_of_the_networks_where_the_design_says_so():
    for entry in by_name("table1").at_depths([20, 44, 62]).entries:
        macs = cost(build(entry.network), torch.zeros(1, 3, 32, 32)).macs
        assert macs / 1e6 == pytest.approx(entry.paper_macs, abs=0.06)
    assert TableEntry("rsbn20", (("sampling", "1/4"),)).paper_macs is None


def test_every_row_of_a_table_has_the_error_that_the_paper_prints_for_it():
    def missing(name, data):
        return {
            (e.network, dict(e.settings).get("sampling"), dict(e.settings).get("down"))
            for e in by_name(name).entries
            if e.printed(data) is None
        }

    beyond = {("crn101", None, None), ("csbn101", None, None)}
    assert missing("table1", "cifar10") == missing("table1", "cifar100") == beyond
    assert not missing("table2", "cifar100")
    assert not missing("table3", "cifar10") | missing("table3", "cifar100")
    assert not missing("table4", "imagenet")
    assert missing("table4", "cifar10") == {(e.network, None, None) for e in by_name("table4").entries}
    # pooled only at 110 layers; strided rows are table 2's too
    pooled = {("rsbn" + str(d), s, "avgpool") for d in (20, 44, 62, 86) for s in ("1/4", None)}
    assert missing("downsampling", "cifar100") == pooled
    for name in ("table1", "table3", "table4"):
        entries = [e for e in by_name(name).entries if e.depth != 101 or name == "table4"]
        assert all(e.paper_macs for e in entries)
    assert all(e.printed_top5("imagenet").mean < e.paper_error("imagenet") for e in by_name("table4").entries)
    assert by_name("table1").entries[0].printed_top5("imagenet") is None


def test_printed_errors_are_the_papers():
    def said(name, row, data):
        return str(by_name(name).entries[row].printed(data))

    assert [said("table1", i, "cifar10") for i in (0, 1, 10, 17)] == [
        "6.99 ± 0.18",
        "7.15 ± 0.22",
        "6.42 ± 0.11",
        "4.96 ± 0.04",
    ]
    assert [said("table2", i, "cifar100") for i in (4, 5, 6, 7)] == [
        "27.28 ± 0.33",
        "28.39 ± 0.20",
        "27.35 ± 0.07",
        "27.65 ± 0.19",
    ]
    # the paper's two tables disagree about one deviation
    assert [said(name, 0, "cifar100") for name in ("table1", "table2")] == ["30.10 ± 0.57", "30.10 ± 0.39"]
    assert [said("table3", i, "cifar100") for i in (0, 7)] == ["20.21", "17.20"]
    assert [said("table4", i, "imagenet") for i in (0, 7)] == ["30.70 ± 0.07", "22.69 ± 0.05"]
    # what differs at 110 layers is the pooling alone, and it is worse
    strided, pooled = (by_name("downsampling").entries[16:18], by_name("downsampling").entries[18:20])
    for stride, pool in (strided, pooled):
        assert pool.versus is not None
        assert pool.paper_error("cifar100") > stride.paper_error("cifar100")
    assert TableEntry("rsbn110").paper_error("cifar100") == 25.13
    assert TableEntry("rsbn110").printed("cifar10") == Error(5.12, 0.14)
    assert TableEntry("rsbn110", (("width", "8"),)).printed("cifar10") is None
    assert TableEntry("rsbn110").paper_error("digits") is None


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
    assert b"<svg" in (out / "figure4.svg").read_bytes()
    assert [row.label for row in rows] == ["rrn20", "rsbn20 2/4"]
    for row in rows:
        name = "rrn20" if row.baseline is None else "rsbn20-2of4"
        errors = [100 * json.loads((out / f"{name}-seed{s}.json").read_text())["test_error"] for s in (0, 1)]
        assert row.errors == tuple(errors)
        assert row.mean == pytest.approx(sum(errors) / 2)


def test_the_same_command_again_makes_nothing_and_says_the_same(made, monkeypatch):
    out, rows = made
    monkeypatch.setattr("quincunx.experiments.reproduce.fit", lambda *_, **__: pytest.fail("it trained"))
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
    monkeypatch.setattr("quincunx.experiments.reproduce.networks.build", stopping)
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
    # images of one's own have no printed error; multiply-adds are the network's
    assert [(row.paper_macs, row.paper_error) for row in rows] == [(40.5, None), (24.0, None)]
    planned = plan(experiment, Recipe(), [0], tmp_path)
    printed = [(row.paper_macs, row.paper_error, row.paper_deviation, row.paper_top5) for row in planned]
    assert printed == [(40.5, 6.99, 0.18, None), (24.0, 7.15, 0.22, None)]
    assert planned[0].macs == pytest.approx(40.55e6, rel=1e-3)
    assert all(0 < row.hours < 1000 for row in planned)
    assert not list(tmp_path.iterdir())


def test_a_plan_shows_the_papers_values_of_its_data_set(tmp_path, capsys):
    other = plan(
        by_name("table1").at_depths([20]), Recipe(), [0], tmp_path, data_name="cifar100", timed=False
    )
    print_plan(other)
    said = capsys.readouterr().out
    assert all(text in said for text in ("30.10 ± 0.57", "30.57 ± 0.23", "40.5", "24"))
    assert "6.99" not in said
    # table 2 and the ablation are on CIFAR-100 without being told
    table = plan(by_name("table2").at_depths([20]), Recipe(), [0], tmp_path, timed=False)
    assert [row.paper_error for row in table] == [30.10, 31.06, 30.57, 30.51]
    assert [row.paper_macs for row in table] == [40.5, None, 24.0, None]
    pooled = plan(by_name("downsampling").at_depths([20]), Recipe(), [0], tmp_path, timed=False)
    print_plan(pooled)
    assert [row.paper_error for row in pooled] == [31.06, None, 30.57, None]
    assert " - " in capsys.readouterr().out
    large = plan(by_name("table4").at_depths([18]), Recipe(), [0], tmp_path, timed=False)
    print_plan(large)
    assert [(row.paper_macs, row.paper_error, row.paper_top5) for row in large] == [
        (1600.0, 30.70, 10.86),
        (1000.0, 30.20, 10.78),
    ]
    assert "10.78" in capsys.readouterr().out


def test_ours_stand_beside_the_printed_error_of_the_same_data_set(made, capsys):
    runs = json.loads(next(made[0].glob("*.json")).read_text())
    runs["data"] = {**runs["data"], "name": "cifar100"}
    rows = compare(by_name("table1").at_depths([20]), [[runs]] * 2)
    assert [(row.paper_error, row.paper_deviation) for row in rows] == [(30.10, 0.57), (30.57, 0.23)]
    print_comparison(rows)
    assert "30.57 ± 0.23" in capsys.readouterr().out
    assert rows[0].to_dict()["paper_deviation"] == 0.57


def test_no_experiment_is_left_out():
    assert {f().name for f in set(EXPERIMENTS.values())} <= set(EXPERIMENTS)
    assert experiments.table4().data == "imagenet"
