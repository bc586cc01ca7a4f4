"""The layers that replaced others train first, then everything."""

from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import quincunx as qx
from helpers.training import TINY, assert_equal_states, network, run, stop_in
from quincunx.networks.spec import spec_of
from quincunx.train.loop import Interrupted
from quincunx.train.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def perforated():
    """A network some of whose layers have fitted fills."""
    model = network("rrn8").eval()
    return qx.accelerate(model, qx.Perforate(), example_input=torch.zeros(1, 1, 8, 8)).model


def own_and_others(model):
    replaced = set(spec_of(model)["replaced"])
    inside = {n: p for name in replaced for n, p in model.get_submodule(name).named_parameters(name)}
    return inside, {n: p for n, p in model.named_parameters() if n not in inside}


def test_nothing_else_moves_at_first(tmp_path):
    """Neither by a gradient nor by weight decay; then everything does."""
    model = perforated()
    inside, others = own_and_others(model)
    assert any("filling" in name for name in inside)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = replace(TINY, epochs=2, first=0.5, weight_decay=0.1)  # 3 steps of 6
    steps = []

    def look(*_):
        steps.append(
            (
                all(torch.equal(p, before[n]) for n, p in others.items()),
                all(p.grad is None for p in others.values()),
                all(p.grad is not None for p in inside.values()),
            )
        )

    handle = register_optimizer_step_pre_hook(look)
    try:
        run(tmp_path / "run", model=model, recipe=recipe)
    finally:
        handle.remove()
    assert steps == [(True, True, True)] * 3 + [(True, False, True)] + [(False, False, True)] * 2


def test_a_stopped_run_goes_on_in_the_same_stage(tmp_path):
    recipe = replace(TINY, first=0.5)
    whole, model = run(tmp_path / "whole", model=perforated(), recipe=recipe)
    assert whole["recipe"]["first"] == 0.5
    with pytest.raises(Interrupted):
        run(tmp_path / "part", model=stop_in(perforated(), 5, KeyboardInterrupt()), recipe=recipe)
    _, again = run(tmp_path / "part", model=perforated(), recipe=recipe, resume=True)
    assert_equal_states(again.state_dict(), model.state_dict())


def test_without_replaced_layers_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="first: no layer of this network replaced another"):
        run(tmp_path / "run", model=network("rrn8"), recipe=replace(TINY, first=0.1))
    with pytest.raises(ValueError, match=r"first=1.5: expected a share of the steps"):
        Recipe(first=1.5)
