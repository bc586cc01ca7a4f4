"""The verdict on a target: judged on final figures, what failed named first, and what to do about it."""

import pytest

from quincunx.report.verdict import (
    asked_in_words,
    better_for_free,
    judge,
    restored_in_words,
    shortcoming,
    worse,
)


def result(
    target,
    *,
    speed=1.53,
    wrong=(0.085, 0.092),
    p=0.2,
    tuned=None,
    tested=1000,
    chosen=1,
    labelled=True,
    late=0,
):
    """As accelerate.json has it."""
    candidates = [{"why_not": None}, *[{"why_not": "not scored: the time budget was used up"}] * late]
    search = {"target": target, "chosen": [{}] * chosen, "candidates": candidates}
    return {
        "search": search if target is not None else None,
        "stages": [{"error": wrong[0]}, {"error": 0.5}, {"error": wrong[1], "p": p}],
        "whole": {"speedup": {"median": speed}, "seconds_before": 0.006, "seconds_after": 0.006 / speed},
        "cost": {"before": {"macs": 40_000_000}, "after": {"macs": 25_000_000}},
        "recipe": tuned,
        "images": {"train": 1, "test": tested},
        "data": {"labelled": labelled},
    }


def test_both_halves_are_judged_on_the_end_and_the_sentence_says_on_what():
    found = judge(result({"speedup": 1.5, "max_drop": 1.0}, tuned={"epochs": 5, "distill": 0.5}))
    assert found["met"]
    assert found["next"] is None
    assert found["words"] == (
        "Target met: 1.53x faster (asked: 1.5x); 0.70 points of accuracy lost on 1,000 test images, after "
        "fine-tuning (asked: at most 1)."
    )


def test_the_half_that_failed_comes_first_with_the_next_step_and_what_less_costs():
    lost = result({"speedup": 1.5, "max_drop": 1}, wrong=(0.085, 0.125))
    found = judge(lost, [{"speedup": 1.31, "drop": 0.8}])
    assert not found["met"]
    assert found["words"].startswith(
        "Target missed: 4.00 points of accuracy lost on 1,000 test images, without"
    )
    assert (
        found["next"] == "add --finetune-epochs 5; 1.3x costs 0.8 points before fine-tuning (--speedup 1.3)"
    )
    tuned = judge({**lost, "recipe": {"epochs": 3, "distill": 0.0}})
    assert "--finetune-epochs 6 --distill 0.5" in tuned["next"]


def test_after_fine_tuning_that_ruined_a_lower_rate_is_what_to_try():
    lost = result({"max_drop": 1}, wrong=(0.085, 0.2), p=1e-9, tuned={"epochs": 3, "distill": 0.0, "lr": 0.5})
    lost["stages"][-1]["name"] = "after fine-tuning (not kept: 84.20% after its best epoch)"
    assert judge(lost)["next"] == "fine-tune at a lower rate, as with --lr 0.05"
    assert "; fine-tune at a lower rate, as with --lr 0.05, or ask for less." in worse(lost)


def test_a_speed_that_is_missed_at_the_end_is_missed_whatever_the_search_measured():
    found = judge(result({"speedup": 1.5}, speed=1.46))
    assert (found["met"], found["words"]) == (False, "Target missed: 1.46x faster (asked: 1.5x).")
    assert found["next"] == "--speedup 1.45 is within reach"
    assert "7 candidates were not tried" in judge(result({"speedup": 2}, late=7))["next"]
    assert "saves time" in judge(result({"speedup": 2}, chosen=0, speed=1.0))["next"]


def test_a_network_that_was_put_back_is_said_with_what_to_try():
    back = {**result({"speedup": 1.5, "max_drop": 1}, speed=1.0, wrong=(0.1, 0.1)), "put_back": 0.97}
    said = restored_in_words(back)
    assert said.startswith(
        "Nothing was gained: the finished network was 0.97 times as fast as before, so all"
    )
    assert "--keep-slower" not in said, "a search has no such option"
    found = judge({**back, "recipe": {"epochs": 3}})
    assert found["words"] == (
        "Target missed: 1.00x faster (asked: 1.5x); no accuracy lost on 1,000 test images, without "
        "fine-tuning (asked: at most 1)."
    )
    assert found["next"].startswith("nothing here saves time; a larger --batch")
    assert "--keep-slower" in restored_in_words({**back, "search": None})
    assert restored_in_words(result({"speedup": 1.5})) is None


def test_of_a_speed_that_is_hardly_one_no_less_can_be_asked_for():
    assert judge(result({"speedup": 1.5}, speed=1.03))["next"].startswith(
        "a larger --batch, or other --method"
    )


@pytest.mark.parametrize(
    ("target", "met", "words"),
    [
        ({"latency_ms": 4.0}, True, "3.92 ms a batch (asked: at most 4 ms)"),
        ({"latency_ms": 3.9}, False, "3.92 ms a batch (asked: at most 3.9 ms)"),
        ({"macs": "60%"}, False, "25.0 M MACs, 62.5% (asked: at most 60% of the MACs)"),
        ({"macs": 25e6}, True, "25.0 M MACs, 62.5% (asked: at most 25 M MACs)"),
        ({"max_drop": 0.7}, True, "0.70 points of accuracy lost"),
    ],
)
def test_every_kind_of_target(target, met, words):
    found = judge(result(target))
    assert found["met"] == met
    assert words in found["words"]
    assert (found["next"] is None) == met


def test_without_a_target_there_is_no_verdict():
    assert judge(result(None)) is None


def test_without_labels_it_is_answers_that_are_lost():
    assert "the network's own answers to 1,000" in judge(result({"max_drop": 1}, labelled=False))["words"]


def test_targets_as_people_write_them():
    assert asked_in_words({"speedup": 2.0, "max_drop": 1.0}) == (
        "at least 2x faster, at most 1 point of accuracy lost"
    )
    assert asked_in_words({"macs": "50%"}) == "at most 50% of the MACs"
    assert asked_in_words({"latency_ms": 12.5}) == "at most 12.5 ms"


def test_a_ruined_network_is_said_in_one_line_with_what_to_do():
    said = worse(result(None, wrong=(0.085, 0.733), p=1e-9))
    assert said.startswith(
        "Much worse than before: 8.50% became 73.30% wrong of 1,000 test images; add --fine"
    )
    assert "--max-drop 1" in said
    assert worse(result(None, wrong=(0.085, 0.1), p=1e-9)) is None, "a little is said with the stages"
    assert worse(result(None, wrong=(0.0, 0.1), p=0.3)) is None, "of ten images one is chance"
    assert worse(result({"max_drop": 70}, wrong=(0.085, 0.733), p=1e-9)) is None, "it was asked for"


def test_a_search_before_fine_tuning_names_what_it_missed():
    attempt = {"speedup": 2.1, "after": 0.004}
    record = {"target": {"speedup": 2, "max_drop": 1}, "attempts": [attempt], "drop": 3.0, "images": 64}
    assert shortcoming(record) == [
        "3.0 points lost on 64 calibration images, before fine-tuning, where 1 are allowed"
    ]
    assert shortcoming({**record, "drop": 0.5}) == []
    assert "2.10x faster, where 3x is asked" in shortcoming({**record, "target": {"speedup": 3}})[0]
    assert "4.00 ms, where 3 ms" in shortcoming({**record, "target": {"latency_ms": 3}})[0]


@pytest.mark.parametrize(
    ("target", "free", "said"),
    [
        # slower than the result, but all that is asked for
        ({"speedup": 1.5, "max_drop": 1}, [("int8", 1.5, 0.06)], "Another number format meets the target"),
        ({"latency_ms": 4.0, "max_drop": 1}, [("int8", 1.5, 1.0)], "Another number format meets the target"),
        ({"max_drop": 1}, [("int8", 1.2, 0.5)], "Another number format meets the target"),
        # of two the one that loses less
        ({"speedup": 1.5, "max_drop": 1}, [("bfloat16", 1.6, 0.0), ("int8", 1.9, 0.3)], "bfloat16 is 1.60x"),
        ({"speedup": 1.5, "max_drop": 1}, [("int8", 1.49, 0.0)], None),
        ({"speedup": 1.5, "max_drop": 1}, [("int8", 1.52, 1.2)], None),
        ({"latency_ms": 3.9, "max_drop": 1}, [("int8", 1.5, 0.0)], None),
        ({"macs": "50%", "max_drop": 1}, [("int8", 1.52, 0.0)], None),
        ({"macs": "50%", "max_drop": 1}, [("int8", 1.54, 0.0)], "is the better answer"),
        # without a limit a target of speed is met at any loss
        ({"speedup": 1.6}, [("int8", 1.7, 25.8)], "meets the target at a higher loss here"),
        ({"speedup": 1.6}, [("int8", 1.7, 3.9)], "meets the target here"),
        # the result meets the target too
        ({"speedup": 1.5, "max_drop": 5}, [("int8", 1.5, 0.06)], None),
    ],
)
def test_what_is_free_and_meets_the_target_is_named(target, free, said):
    missed = result(target, wrong=(0.085, 0.125))
    rows = [
        {"name": name, "dtype": name, "size": None, "speedup": {"median": speed}, "drop": drop}
        for name, speed, drop in free
    ]
    missed |= {"free": {"rows": rows}, "verdict": judge(missed)}
    found = better_for_free(missed)
    assert found is None if said is None else said in found
