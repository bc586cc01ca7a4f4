"""Timing: who runs when, what is computed from the times, and what is put back. No clock is judged."""

import json
import shlex
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quincunx.fusion import faster
from quincunx.fusion.faster import speed_ratio
from quincunx.measure import latency
from quincunx.measure.environment import environment
from quincunx.measure.latency import (
    Timing,
    measure,
    measure_models,
    round_scale,
    using_threads,
)


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch):
    """Elsewhere rounds are short."""
    monkeypatch.delenv("QUINCUNX_ROUND_SCALE")


times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)


# ---- what is computed from the times


def test_known_numbers():
    slow = Timing("slow", 1, (4.0, 8.0, 6.0, 40.0, 20.0))
    fast = Timing("fast", 1, (1.0, 2.0, 2.0, 4.0, 4.0))
    assert slow.median == 8
    assert slow.quartiles == (6, 20)
    assert fast.quartiles == (2, 4)
    # ratios by round: 4 4 3 10 5, not the ratio of the medians (8 / 2 = 4)
    assert fast.speedup_over(slow) == (4, 4, 5)
    middle, low, high = slow.speedup_over(fast)
    assert (middle, low, high) == (0.25, 0.2, 0.25)


def test_a_drift_of_the_machine_leaves_the_speedup():
    rng = np.random.default_rng(0)
    drift = np.exp(rng.normal(size=21))
    slow, fast = Timing("a", 1, tuple(3 * drift)), Timing("b", 1, tuple(drift))
    assert fast.speedup_over(slow) == pytest.approx((3, 3, 3))


@given(times)
def test_order_of_the_statistics(seconds):
    timing = Timing("a", 2, tuple(seconds))
    low, high = timing.quartiles
    assert min(seconds) <= low <= timing.median <= high <= max(seconds)
    assert timing.speedup_over(timing) == (1, 1, 1)


@given(times, st.floats(0.1, 10))
def test_speedup_scales(seconds, factor):
    timing = Timing("a", 1, tuple(seconds))
    slower = Timing("b", 1, tuple(factor * s for s in seconds))
    assert timing.speedup_over(slower) == pytest.approx((factor,) * 3)
    assert slower.speedup_over(timing) == pytest.approx((1 / factor,) * 3)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_rounds_of_another_measurement_are_not_paired(rounds):
    with pytest.raises(ValueError, match=f"b has {rounds} rounds, a has 3"):
        Timing("a", 1, (1.0,) * 3).speedup_over(Timing("b", 1, (1.0,) * rounds))


def test_faster_is_what_more_rounds_say_than_chance_would():
    def against(won, rounds):
        other = Timing("b", 1, (2.0,) * rounds)
        return Timing("a", 1, (1.0,) * won + (2.5,) * (rounds - won)).clearly_faster_than(other)

    # one-sided, 5%: of 11 rounds 9, of 42 rounds 27
    assert [against(won, 11) for won in (8, 9)] == [False, True]
    assert [against(won, 42) for won in (26, 27)] == [False, True]
    assert not against(4, 4), "too few rounds"
    same = Timing("a", 1, (1.0,) * 40)
    assert not same.clearly_faster_than(same), "a draw is no win"
    wild = Timing("a", 1, (1.0,) * 30 + (900.0,) * 12)
    assert wild.clearly_faster_than(Timing("b", 1, (1.1,) * 42)), "how wild the rest is does not matter"
    assert wild.and_more(same).seconds == wild.seconds + same.seconds


def test_the_dictionary_says_threads_rounds_and_spread():
    told = json.loads(json.dumps(Timing("a", 3, (1.0, 2.0, 3.0, 123.4567, 5.0)).to_dict(), allow_nan=False))
    assert told == {
        "name": "a",
        "threads": 3,
        "median_s": 3.0,
        "q1_s": 2.0,
        "q3_s": 5.0,
        "rounds": 5,
        "seconds": [1.0, 2.0, 3.0, 123.5, 5.0],
    }


# ---- who runs when


def runs_of(calls):
    """Consecutive calls of one candidate as one."""
    return [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("warmup", [0, 3])
def test_candidates_take_turns(rounds, warmup):
    calls = []
    found = measure(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        rounds=rounds,
        round_seconds=1e-9,  # one call a round
        warmup=warmup,
    )
    assert runs_of(calls) == list("abc") * (rounds + 1)  # once for warming up
    assert list(found) == ["a", "b", "c"]
    assert all(len(timing.seconds) == rounds for timing in found.values())
    assert all(s > 0 for timing in found.values() for s in timing.seconds)
    # at least the warm-up, one call to size the rounds, and one a round
    assert all(calls.count(name) >= warmup + 1 + rounds for name in "abc")


def test_before_each_turn_is_a_rest(monkeypatch):
    """So that threads of the candidate before have gone to sleep."""
    said: list[str] = []
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: said.append(f"rest {seconds}"))
    candidates = {"a": lambda: said.append("a"), "b": lambda: said.append("b")}
    measure(candidates, rounds=2, round_seconds=1e-9, warmup=0, rest=0.05)
    assert runs_of(said[said.index("rest 0.05") :]) == ["rest 0.05", "a", "rest 0.05", "b"] * 2


def test_one_slow_call_does_not_make_a_round_of_one_call(monkeypatch):
    """As on a busy machine: the first call that is timed takes a hundred times as long."""
    calls, now = [], [0.0]
    monkeypatch.setattr(latency.benchmark, "timer", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 2**-3 if len(calls) == 3 else 2**-10

    measure({"a": call}, rounds=2, round_seconds=50 * 2**-10)
    # two to warm up and three to size the rounds; each round has one before it
    assert len(calls) == 2 + 3 + 2 * (1 + 50)


def test_each_turn_begins_with_a_call_that_does_not_count(monkeypatch):
    """What another candidate left in the caches makes the first call slow."""
    last, now = [""], [0.0]
    monkeypatch.setattr(latency.benchmark, "timer", lambda: now[0])

    def call(name, seconds):
        now[0] += seconds * (1 if last[0] == name else 3)
        last[0] = name

    candidates = {name: partial(call, name, t) for name, t in (("a", 0.5), ("b", 0.25))}
    found = measure(candidates, rounds=4, round_seconds=0.5)
    assert found["a"].seconds == (0.5,) * 4
    assert found["b"].seconds == (0.25,) * 4


# ---- a decision at run time, by a clock that only calls move


class Clock:
    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(faster, "perf_counter", lambda: self.now)

    def function(self, name, *seconds):
        """One that takes each of these times in turn."""
        left = []

        def run():
            left[:] = left or list(seconds)
            self.calls.append(name)
            self.now += left.pop(0)

        return run


@pytest.mark.parametrize(
    ("one", "other", "options", "rounds"),
    [
        (0.010, 0.020, {}, 3),  # clear
        (0.020, 0.010, {}, 3),
        (0.010, 0.011, {}, 7),  # close: all rounds
        (0.011, 0.010, {}, 7),
        (0.010, 0.013, {"level": 1.25}, 7),  # clear of 1, but close to the level
        (0.010, 0.016, {"level": 1.25}, 3),
        (0.010, 0.010, {"level": 1.25}, 3),
        (0.010, 0.011, {"rounds": 4}, 4),
        (0.100, 0.110, {}, 3),  # close, but the budget is spent
        (0.100, 0.110, {"budget": 9.0}, 7),
        (0.020, 0.022, {}, 6),  # 0.084 s to begin with, 0.042 s a round
    ],
)
def test_a_decision_takes_no_longer_than_it_needs(one, other, options, rounds, monkeypatch):
    clock = Clock(monkeypatch)
    ratio = speed_ratio(clock.function("one", one), clock.function("other", other), **options)
    assert ratio == pytest.approx(other / one)
    # each once to warm up and once to size the rounds
    assert clock.calls == ["one"] * 2 + ["other"] * 2 + ["one", "other"] * rounds


def test_short_calls_are_repeated_in_a_round(monkeypatch):
    clock = Clock(monkeypatch)
    ratio = speed_ratio(
        clock.function("one", 2**-10), clock.function("other", 2**-8), round_seconds=2**-7, rounds=5
    )
    assert ratio == 4
    assert (clock.calls.count("one"), clock.calls.count("other")) == (2 + 3 * 8, 2 + 3 * 2)


def test_one_slow_round_decides_nothing(monkeypatch):
    clock = Clock(monkeypatch)
    # the third round of the first one is disturbed
    one = clock.function("one", 0.01, 0.01, 0.01, 0.01, 0.5, *[0.01] * 10)
    assert speed_ratio(one, clock.function("other", 0.02), budget=9.0) == pytest.approx(2)
    assert clock.calls.count("one") == 2 + 7


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds=2: expected at least 3"):
        speed_ratio(lambda: None, lambda: None, rounds=2)


@pytest.mark.parametrize("scale", [None, "", "0.25", "4"])
def test_rounds_are_as_long_as_asked_for(monkeypatch, scale):
    if scale is not None:
        monkeypatch.setenv("QUINCUNX_ROUND_SCALE", scale)
    factor = float(scale or 1)
    calls = []
    # a millisecond by the clock, so that a round is 50 calls
    clock = iter(range(10**6))
    monkeypatch.setattr(latency.benchmark, "timer", lambda: 5e-4 * next(clock))
    measure({"a": lambda: (calls.append(1), next(clock))}, rounds=3, warmup=0)
    # with some that warm up
    assert len(calls) == pytest.approx(3 * 50 * factor, abs=25)
    assert environment().get("round_scale") == (None if factor == 1 else factor)


@pytest.mark.parametrize("scale", ["0", "-1", "fast", "nan", "inf"])
def test_a_scale_that_is_no_number_above_zero_is_refused(monkeypatch, scale):
    monkeypatch.setenv("QUINCUNX_ROUND_SCALE", scale)
    for ask in (round_scale, lambda: measure({"a": lambda: None})):
        with pytest.raises(ValueError, match=f"QUINCUNX_ROUND_SCALE='{scale}': expected a number above 0"):
            ask()


# ---- what is put back


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_threads_hold_within_and_are_put_back(threads, wanted):
    torch.set_num_threads(2)
    seen = []
    found = measure({"a": lambda: seen.append(torch.get_num_threads())}, threads=wanted, rounds=2)
    assert set(seen) == {wanted}
    assert found["a"].threads == wanted
    assert torch.get_num_threads() == 2


def test_by_default_torchs_own_number_of_threads(threads):
    torch.set_num_threads(1)
    assert measure({"a": lambda: None}, rounds=1, round_seconds=1e-9)["a"].threads == 1


@pytest.mark.parametrize("after", [0, 1, 5], ids=["in-warm-up", "sizing", "in-a-round"])
def test_threads_are_put_back_after_a_failure(threads, after):
    torch.set_num_threads(2)
    left = [after]

    def candidate():
        left[0] -= 1
        if left[0] < 0:
            raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        measure({"a": candidate}, threads=1, rounds=10, round_seconds=1e-9, warmup=1)
    assert torch.get_num_threads() == 2
    with pytest.raises(ArithmeticError), using_threads(3):
        raise ArithmeticError
    assert torch.get_num_threads() == 2


class Seen(nn.Module):
    """Notes in which mode it is called."""

    def __init__(self, fail=False):
        super().__init__()
        self.norm, self.fail, self.calls = nn.BatchNorm2d(3), fail, []

    def forward(self, x):
        self.calls.append((self.training, self.norm.training, torch.is_grad_enabled(), x.shape))
        if self.fail:
            raise ArithmeticError("on purpose")
        return self.norm(x)


def test_models_run_in_evaluation_mode_without_gradients_and_are_left_as_they_were():
    models, example = {"a": Seen(), "b": Seen().eval()}, torch.randn(2, 3, 4, 4)
    models["a"].norm.eval()
    mean = models["a"].norm.running_mean.clone()
    found = measure_models(models, example, rounds=2, round_seconds=1e-9)
    assert list(found) == ["a", "b"]
    for model in models.values():
        assert set(model.calls) == {(False, False, False, example.shape)}
    assert (models["a"].training, models["a"].norm.training, models["b"].training) == (True, False, False)
    assert torch.equal(models["a"].norm.running_mean, mean)


def test_models_are_left_as_they_were_after_a_failure():
    models = {"a": Seen(), "b": Seen(fail=True)}
    with pytest.raises(ArithmeticError, match="on purpose"):
        measure_models(models, torch.randn(2, 3, 4, 4), rounds=2, round_seconds=1e-9)
    assert all(module.training for model in models.values() for module in model.modules())
    assert torch.is_grad_enabled()


BAD = [
    ({"candidates": {}}, "nothing to measure"),
    ({"rounds": 0}, "rounds=0"),
    ({"threads": 0}, "threads=0"),
    ({"threads": -1}, "threads=-1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused_before_anything_runs(options, message):
    calls = []
    with pytest.raises(ValueError, match=message):
        measure(**{"candidates": {"a": lambda: calls.append(0)}, **options})
    assert calls == []


# ---- where it was made


def test_the_environment_says_what_a_result_needs(monkeypatch):
    command = ["/usr/bin/quincunx", "train", "--data", "my photos", "--out", "it's"]
    monkeypatch.setattr(sys, "argv", command)
    told = json.loads(json.dumps(environment(), allow_nan=False))
    assert shlex.split(told["command"]) == ["quincunx", *command[1:]]
    assert told["torch"] == torch.__version__
    assert told["threads"] == torch.get_num_threads()
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["commit"] is None or len(told["commit"].rstrip("+")) == 12
    for key in ("time", "quincunx", "platform", "cpu", "capability", "cores"):
        assert told[key], key
