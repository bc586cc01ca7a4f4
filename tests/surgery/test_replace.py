"""Surgery on networks of any shape: what stays, what is kept, what is said, and what data arrives."""

import copy
import json
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import quincunx as qx
from helpers.graphs import Graph, steps
from quincunx.surgery.calibration import Calibration, Context, run_order
from quincunx.surgery.method import Replacement, each


@dataclass
class Same:
    """The method that puts a copy in every layer's place, and remembers what it was shown."""

    name: str = "same"
    targets: tuple = (nn.Conv2d,)
    seen: list = field(default_factory=list)
    stays: str | None = None

    def refuse(self, layer, context):
        return None

    def begin(self, layers, context):
        def make(layer):
            self.seen.append((layer, context))
            return self.stays or Replacement(copy.deepcopy(layer.module), {"kind": "none"}, {})

        return each(make)


EXACT = {
    "same": Same(),
    "full rank": qx.LowRank("full"),
    "all positions": qx.Espace("full", rate=1, mask="uniform", pointwise=True),
}


# ---------------------------------------------------------------- random networks


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT.keys())
@given(st.lists(steps, min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=15)
def test_an_exact_method_changes_no_network(method, choices, seed):
    torch.manual_seed(seed)
    model, x = Graph([("conv", 0, 2), *choices]).eval(), torch.randn(2, 3, 7, 6, dtype=torch.float64)
    result = qx.accelerate(model, method, example_input=x)
    assert set(result.replaced) | set(result.skipped) == {
        name for name, module in model.named_modules() if type(module) is nn.Conv2d
    }
    want = model(x)
    torch.testing.assert_close(result.model(x), want, rtol=0, atol=1e-10 * float(want.detach().abs().max()))


# ---------------------------------------------------------------- what stays


def small(**change):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, **change), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)
    )


def batches(count=2, dtype=torch.float32):
    return [torch.randn(4, 3, 8, 8, dtype=dtype) for _ in range(count)]


def test_the_model_that_is_passed_stays_as_it_is():
    model, data = small(), batches()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[2].register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = qx.accelerate(model, qx.Espace(2, loss=lambda y, _: y.square().sum()), calibration=data)
    assert sorted(result.replaced) == ["0", "2"]
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert [len(m._forward_hooks) for m in model] == [0, 0, 1]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}
    assert not shared


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_mode_dtype_layout_and_frozen_weights_are_kept(training, frozen):
    model = small().to(torch.bfloat16).to(memory_format=torch.channels_last).train(training)
    model[2].train(not training)
    model[0].requires_grad_(not frozen)
    for method in (qx.LowRank(2), qx.Espace(2, mask="random")):
        new = qx.accelerate(model, method, example_input=batches(1)[0].bfloat16()).model
        assert all(p.dtype == torch.bfloat16 for p in new.parameters())
        assert all(
            p.is_contiguous(memory_format=torch.channels_last) for p in new.parameters() if p.dim() == 4
        )
        assert {m.training for m in new[0].modules()} == {training}
        assert {m.training for m in new[2].modules()} == {not training}
        assert {p.requires_grad for p in new[0].parameters()} == {not frozen}
        assert {p.requires_grad for p in new[2].parameters()} == {True}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("conv", "method"),
    [
        (nn.Conv2d(1, 8, 3, padding=1), qx.LowRank(2)),
        (nn.Conv2d(1, 8, 3, padding=1), qx.Espace(2, mask="random")),
        (nn.Conv2d(8, 8, 1), qx.Espace(mask="random", pointwise=True)),
    ],
)
def test_a_weight_that_lies_in_both_layouts_takes_its_networks(tmp_path, conv, method, layout):
    def make():
        return nn.Sequential(copy.deepcopy(conv), nn.Conv2d(conv.out_channels, 8, 3))

    model, x = make().to(memory_format=layout).eval(), torch.randn(2, conv.in_channels, 8, 8)
    new = qx.accelerate(model, method, where=["0"], calibration=[x]).model
    weights = [p for p in new[0].parameters() if p.dim() == 4]
    assert [p.stride() for p in weights] == [p.to(memory_format=layout).stride() for p in weights]
    if layout == torch.contiguous_format:
        # a loaded network is laid out so; its answers are the saved one's to the bit
        loaded = qx.load(qx.save(new, tmp_path / "model", factory="my:make"), factory=make)
        assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in new.parameters()]
        assert torch.equal(loaded(x), new(x))


def test_hooks_go_on_and_the_fit_does_not_see_them():
    model, data, calls = small(), batches(), []
    model[2].register_forward_hook(lambda m, args, out: calls.append(type(m).__name__) or out * 2)
    model[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    model[2].register_full_backward_hook(lambda m, a, b: calls.append("backward"))
    result = qx.accelerate(model, qx.LowRank("full"), calibration=data)
    assert result.replaced["2"]["hooks"] == 3
    assert "hooks" not in result.replaced["0"]
    assert result.replaced["2"]["response_error"] < 1e-10
    calls.clear()
    got, want = result.model(data[0]), model(data[0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert calls == ["SeparableConv2d", "Conv2d", "backward"]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.inner = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), self.first])
        self.again = self.first

    def forward(self, x):
        return self.again(self.first(self.inner[0](x)))


def test_a_shared_module_is_replaced_once_and_stays_shared():
    model, x = Shared(), batches(1)[0]
    result = qx.accelerate(model, qx.LowRank("full"), example_input=x)
    assert sorted(result.replaced) == ["first", "inner.0"]
    assert result.replaced["first"]["names"] == ["first", "inner.1", "again"]
    new = result.model
    assert new.first is new.again is new.inner[1]
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_are_taken_in_the_order_in_which_they_run():
    method = Same()
    qx.accelerate(Shared(), method, example_input=batches(1)[0])
    assert [(layer.name, layer.calls) for layer, _ in method.seen] == [("inner.0", 1), ("first", 2)]
    assert method.seen[1][0].grid == (8, 8)
    method = Same()
    qx.accelerate(Shared(), method)
    assert [(layer.name, layer.calls) for layer, _ in method.seen] == [("first", None), ("inner.0", None)]
    with pytest.raises(ValueError, match="example_input=None: the size of layer 'first'"):
        _ = method.seen[0][0].grid


def test_a_network_that_is_one_layer():
    layer, x = nn.Conv2d(3, 4, 3), batches(1)[0]
    result = qx.accelerate(layer, qx.LowRank("full"), calibration=[x])
    assert isinstance(result.model, qx.SeparableConv2d)
    assert list(result.replaced) == [""]
    torch.testing.assert_close(result.model(x), layer(x), rtol=1e-4, atol=1e-5)


def test_twice_accelerated():
    model, x = small(), batches(1)[0]
    first = qx.accelerate(model, qx.LowRank(2), where=lambda name, _: name == "0", example_input=x).model
    second = qx.accelerate(first, qx.Espace(2, mask="uniform"), where=lambda n, _: n == "2").model
    assert [type(m) for m in second] == [qx.SeparableConv2d, nn.ReLU, qx.EspaceConv2d]
    assert sorted(second.quincunx_replaced) == ["0", "2"]


# ---------------------------------------------------------------- what is left, and why


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.used(input=x) if x.shape[0] == 1 else self.used(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - x.mean())


def tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    return model


def with_state_hook():
    model = small()
    model[0].register_state_dict_post_hook(lambda *_: None)
    return model


def subclassed():
    return nn.Sequential(Standardised(3, 4, 3))


def one_by_one():
    return nn.Sequential(nn.Conv2d(3, 6, 1))


def depthwise():
    return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3))


class OfTheMean(nn.Module):
    """The second layer sees one map [C, H, W], which ``nn.Conv2d`` takes as well."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.second(self.first(x).mean(0))


def old_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)))
    with torch.no_grad():
        model(torch.zeros(1, 3, 8, 8))  # until then the weight is no leaf, and torch copies no such module
    return model


def test_a_network_that_torch_cannot_copy():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    # a list of what a forward computed
    model[0].seen = [model[0].weight * 2]
    with pytest.raises(TypeError, match=r"model: its part '0', a Conv2d, cannot be copied .*graph leaves"):
        qx.accelerate(model, qx.LowRank())


def new_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))


SKIPPED = {
    "unused": (Unused, {"unused": "never called for this input"}),
    "by keyword": (Unused, {"used": "called with or returns something else than one tensor"}),
    "no batch": (OfTheMean, {"second": "called with a map [4, 6, 6] without a batch dimension, which"}),
    "shared": (Shared, {"first": "called 2 times in a forward: there is no one input to fit it to"}),
    "tied": (tied, {"0": "its weight is shared with 1", "1": "its weight is shared with 0"}),
    "subclass": (subclassed, {"0": "a Standardised, whose forward may be another one"}),
    "parametrised": (new_norm, {"0": "a ParametrizedConv2d, whose forward may"}),
    "weight norm": (old_norm, {"0": "its weight is computed anew at each call"}),
    "state hooks": (with_state_hook, {"0": "it has state-dict hooks"}),
    "1 x 1": (one_by_one, {"0": "a 1 x 1 kernel has no columns and rows"}),
    "depthwise": (depthwise, {"0": "depthwise"}),
}


@pytest.mark.filterwarnings("ignore:accelerate. lowrank replaced nothing")
@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_skipped_and_why(case):
    make, reasons = SKIPPED[case]
    model = make()
    data = [torch.randn(1 if case == "by keyword" else 4, 3, 8, 8)]
    result = qx.accelerate(model, qx.LowRank(1), calibration=data)
    for name, reason in reasons.items():
        assert name not in result.replaced
        assert result.skipped[name].startswith(reason)
        assert type(result.model.get_submodule(name)) is type(model.get_submodule(name))


def test_where_is_asked_with_name_and_module():
    asked = []

    def where(name, module):
        asked.append((name, type(module)))
        return name == "2"

    result = qx.accelerate(small(), qx.LowRank(2), where=where)
    assert asked == [("0", nn.Conv2d), ("2", nn.Conv2d)]
    assert (list(result.replaced), result.skipped) == (["2"], {"0": "left out by where"})


def test_espace_says_why_a_one_by_one_stays_and_that_impact_needs_one_call():
    result = qx.accelerate(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), qx.Espace(2, mask="uniform")
    )
    assert result.skipped == {"1": "1 x 1: no low rank here; pointwise=True masks it"}
    method = qx.Espace("full", data=False, loss=lambda y, _: y.sum())
    result = qx.accelerate(Shared(), method, calibration=batches())
    assert result.skipped == {"first": "called 2 times in a forward: its positions have no one impact"}


def test_a_method_may_leave_a_layer():
    with pytest.warns(UserWarning, match="accelerate: same replaced nothing: 0: no gain, and 1 more"):
        result = qx.accelerate(small(), Same(stays="no gain"))
    assert result.skipped == {"0": "no gain", "2": "no gain"}


def test_nothing_replaced_is_a_warning():
    with pytest.warns(UserWarning, match="lowrank replaced nothing: the network has no layer of its kind"):
        result = qx.accelerate(nn.Sequential(nn.Linear(3, 4)), qx.LowRank())
    assert (result.replaced, result.skipped) == ({}, {})


def wrapped(kind):
    model = small()
    if kind == "compiled":
        return torch.compile(model)
    if kind == "scripted":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.script(model)
    if kind == "parallel":
        return nn.DataParallel(model)
    if kind == "distributed":
        outer = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(outer)
        outer.module = model
        return nn.Sequential(outer)
    return nn.Sequential(model, torch.ao.nn.quantized.Hardswish(1.0, 0))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("compiled", r"model: it is a OptimizedModule; .*_orig_mod"),
        ("scripted", r"model: it is a RecursiveScriptModule"),
        ("parallel", r"model: it is a DataParallel; pass what it wraps \(its \.module\)"),
        ("distributed", r"model: its part '0' is a DistributedDataParallel; .*\.module"),
        ("quantised", r"model: its part '1' is a Hardswish; replace layers first"),
    ],
)
def test_wrapped_and_quantised_networks_are_refused(kind, match):
    with pytest.raises(TypeError, match=match):
        qx.accelerate(wrapped(kind), qx.LowRank())


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "model: expected a torch.nn.Module, got str", {"model": "rrn20"}),
        (TypeError, "method='espace'", {"method": "espace"}),
        (TypeError, "method=<class .*LowRank", {"method": qx.LowRank}),
        (TypeError, "example_input: .* got list", {"example_input": [1]}),
        (
            TypeError,
            r"calibration: expected .* got Tensor; one batch is \[batch\]",
            {"calibration": torch.zeros(1)},
        ),
        (TypeError, "calibration: .* got int", {"calibration": 3}),
        (TypeError, "calibration: a list_iterator can be read only once", {"calibration": iter([])}),
        (TypeError, "calibration: a generator can", {"calibration": (b for b in batches())}),
        (ValueError, "calibration: holds no batches", {"calibration": []}),
        (TypeError, "calibration: batch 1 is a str", {"calibration": [*batches(1), "x"]}),
        (TypeError, "calibration: batch 0 is a tuple", {"calibration": [tuple(batches(3))]}),
    ],
)
def test_bad_input(error, match, change):
    arguments = {"model": small(), "method": qx.LowRank(2), **change}
    with pytest.raises(error, match=match):
        qx.accelerate(**arguments)


# ---------------------------------------------------------------- data


def test_a_layer_sees_the_changed_input_and_the_original_response():
    original, data = small(), batches(3)
    network = copy.deepcopy(original)
    with torch.no_grad():
        network[0].weight.mul_(1.5)
    method = Same()
    qx.accelerate(original, method, calibration=[(x, torch.zeros(4)) for x in data])
    layer = method.seen[1][0]
    context = Context(original, network, Calibration(data, original))
    context.changed = True
    for _ in range(2):  # it can be read again
        pairs = list(context.responses(layer))
        assert len(pairs) == 3
        for x, (seen, response) in zip(data, pairs, strict=True):
            with torch.no_grad():
                assert torch.equal(seen, network[:2](x))
                assert torch.equal(response, original(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in original.modules())


def test_a_forward_ends_at_the_layer_and_runs_in_evaluation_mode():
    model, later = small(), []
    model[1].register_forward_hook(lambda m, *_: later.append(m.training))
    method = Same()
    qx.accelerate(model, method, calibration=batches())
    later.clear()
    layer, context = method.seen[0]
    assert len(list(context.responses(layer))) == 2
    assert later == []
    layer, context = method.seen[1]
    assert len(list(context.responses(layer))) == 2
    assert later == [False] * 4  # both networks, both batches
    assert model.training


def test_a_survey_sees_every_layer_of_the_original_in_one_pass():
    model, data, seen = small(), batches(2), []
    method = Same()
    qx.accelerate(model, method, calibration=data)
    layers, context = [layer for layer, _ in method.seen], method.seen[0][1]
    context.survey(layers, lambda *found: seen.append(found))
    assert [name for name, _, _ in seen] == ["0", "2"] * 2
    with torch.no_grad():
        assert torch.equal(seen[3][1], model[:2](data[1]))
        assert torch.equal(seen[3][2], model(data[1]))


@pytest.mark.parametrize("method", [qx.LowRank(2), qx.LowRank(budget=0.5, multiple=1), qx.Espace(2)])
def test_a_value_that_is_not_finite_names_layer_and_batch(method):
    data = batches(3)
    data[2][1, 0, 4, 4] = torch.inf
    with pytest.raises(ValueError, match="calibration: layer '0': batch 2 gives a value that is not finite"):
        qx.accelerate(small(), method, calibration=data)


def test_a_layer_that_a_batch_does_not_reach():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.a(x) if x.mean() > 0 else self.b(x)

    data = [torch.ones(9, 3, 8, 8), -torch.ones(9, 3, 8, 8)]
    with pytest.raises(ValueError, match="calibration: batch 1 never reaches layer 'a'"):
        qx.accelerate(Fork(), qx.LowRank(1), calibration=data)


def test_order_counts_calls_of_modules():
    order = run_order(Shared(), (batches(1)[0],), None)
    assert list(order) == ["", "inner.0", "first"]
    assert order["first"] == (2, (4, 4, 8, 8), (4, 4, 8, 8))


@dataclass
class Book:
    """A journal in memory, that writes what a journal on disk would."""

    kept: dict = field(default_factory=dict)
    recalled: list = field(default_factory=list)

    def recall(self, layer):
        if layer.name not in self.kept:
            return None
        self.recalled.append(layer.name)
        spec, record, state = self.kept[layer.name]
        from quincunx.layers.build import build_module

        module = build_module(json.loads(spec))
        module.load_state_dict(state)
        return Replacement(module, json.loads(spec), json.loads(record))

    def keep(self, layer, made):
        if len(self.kept) == 1 and not self.recalled:
            raise KeyboardInterrupt
        self.kept[layer.name] = (json.dumps(made.spec), json.dumps(made.record), made.module.state_dict())


@pytest.mark.parametrize("method", [qx.LowRank(2), qx.Espace(2, loss=lambda y, _: y.square().sum())])
def test_an_interrupted_run_goes_on_where_it_was(method):
    model, data, book = small(), batches(), Book()
    with pytest.raises(KeyboardInterrupt):
        qx.accelerate(model, method, calibration=data, journal=book)
    assert list(book.kept) == ["0"]
    resumed = qx.accelerate(model, method, calibration=data, journal=book)
    assert book.recalled == ["0"]
    whole = qx.accelerate(model, method, calibration=data)
    assert resumed.replaced == whole.replaced
    for got, want in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)


# ---------------------------------------------------------------- on disk


@pytest.mark.filterwarnings("ignore:calibration. 8 images are few:UserWarning")
@pytest.mark.parametrize(
    "method", [qx.LowRank(2), qx.Espace(2, pointwise=True, resize_masks=True), qx.Espace(2, mask="random")]
)
def test_saved_and_loaded(tmp_path, method):
    model = qx.networks.build("crn11", width=4).eval()
    x = torch.randn(4, 3, 16, 16)
    new = qx.accelerate(model, method, calibration=[x, x]).model
    folder = qx.save(new, tmp_path / "model")
    assert "masks" not in new.state_dict()
    loaded = qx.load(folder)
    assert torch.equal(loaded(x), new(x))
    again = qx.load(qx.save(loaded, tmp_path / "again"))
    assert torch.equal(again(x), new(x))
    assert json.loads((folder / "spec.json").read_text()) == json.loads(
        (tmp_path / "again/spec.json").read_text()
    )


def test_shared_modules_are_shared_after_loading(tmp_path):
    model = qx.networks.build("rrn8", width=4).eval()
    model.stages[0][0].conv2 = model.stages[0][0].conv1
    new = qx.accelerate(model, qx.LowRank(2, data=False)).model
    spec = new.quincunx_replaced
    assert spec["stages.0.0.conv2"] == {"kind": "same", "as": "stages.0.0.conv1"}
    loaded = qx.load(qx.save(new, tmp_path / "model"))
    assert loaded.stages[0][0].conv1 is loaded.stages[0][0].conv2


@pytest.mark.parametrize(
    "change",
    [
        {"stem": {"kind": "nothing"}},
        {"stem": {"kind": "separable", "rank": 0}},
        {"nowhere": {"kind": "conv"}},
        {"stem": {"kind": "same", "as": "later"}},
        [],
        {"stem": {}},
    ],
)
def test_an_altered_spec_is_refused(tmp_path, change):
    new = qx.accelerate(qx.networks.build("rrn8", width=4), qx.LowRank(2)).model
    folder = qx.save(new, tmp_path / "model")
    spec = json.loads((folder / "spec.json").read_text())
    spec["model"]["replaced"] = change
    (folder / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"spec.json|weights.safetensors: does not fit"):
        qx.load(folder)
