"""MACs and parameters: the papers' figures, formulas by hand, and a network left as it was."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import quincunx as qx
from quincunx.cli.printing import print_cost
from quincunx.modules import inference_mode_of

PICTURE = torch.zeros(1, 3, 32, 32)

# DESIGN.md section 2: millions of multiply-adds for a 32 x 32 picture
TABLE = {
    "rrn20": 40.5,
    "rrn44": 97.2,
    "rrn62": 139.6,
    "rrn86": 196.3,
    "rrn110": 252.9,
    "rsbn20": 24.0,
    "rsbn44": 52.3,
    "rsbn62": 73.6,
    "rsbn86": 101.9,
    "rsbn110": 130.2,
    "crn29": 41.9,
    "crn47": 68.6,
    "crn65": 95.3,
    "crn83": 122.1,
}


@pytest.mark.parametrize(("name", "millions"), TABLE.items())
def test_the_papers_table(name, millions):
    found = qx.cost(qx.networks.build(name), PICTURE)
    classifier = next(row.macs for row in found.rows if row.name == "classifier")
    assert (found.macs - classifier) / 1e6 == pytest.approx(millions, abs=0.051)


@pytest.mark.parametrize(("depth", "paper"), [(29, 7.0), (47, 14.2), (65, 21.2), (83, 28.5)])
def test_a_channel_bottleneck_saves_half_a_3x3_per_replaced_block(depth, paper):
    dense, sparse = (qx.cost(qx.networks.build(f"{family}{depth}"), PICTURE) for family in ("crn", "csbn"))
    replaced = 3 * ((depth - 2) // 9 - 1)
    block = 32 * 32 * 9 * 16 * 16 // 2  # 1.18 M, the same in each stage
    assert dense.macs - sparse.macs == replaced * block
    assert (dense.macs - sparse.macs) / 1e6 == pytest.approx(paper, abs=0.2)
    assert dense.params == sparse.params


@pytest.mark.parametrize(("sampling", "share"), [("1/4", 0.25), ("2/4", 0.5), ("3/4", 0.75)])
@pytest.mark.parametrize("down", ["stride", "avgpool"])
def test_a_regular_block_costs_its_density(sampling, share, down):
    dense = qx.cost(qx.networks.build("rrn20"), PICTURE)
    sparse = qx.cost(qx.networks.build("rsbn20", sampling=sampling, down=down), PICTURE)
    block = 2 * 32 * 32 * 9 * 16 * 16
    assert dense.macs - sparse.macs == int(7 * block * (1 - share))
    assert dense.params == sparse.params == 269722


class Attention(nn.Module):
    """Multiplications in the network's own forward."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(4, 2)

    def forward(self, q, k):
        return self.out(F.scaled_dot_product_attention(q, k, k)), (q @ k.mT).sum() * self.scale.sum()


class Shared(nn.Module):
    """One layer twice, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.same = self.first
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.same(self.first(x)))


IMAGE = torch.zeros(2, 4, 9, 7)
MODELS = {
    "dense": (nn.Conv2d(4, 6, 3), IMAGE, 2 * 7 * 5 * 9 * 4 * 6, 6 * 4 * 9 + 6),
    "strided": (nn.Conv2d(4, 6, (3, 1), 2, bias=False), IMAGE, 2 * 4 * 4 * 3 * 4 * 6, 6 * 4 * 3),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), IMAGE, 2 * 9 * 7 * 9 * 2 * 6, 6 * 2 * 9 + 6),
    "depthwise": (nn.Conv2d(4, 4, 5, padding=2, groups=4), IMAGE, 2 * 9 * 7 * 25 * 4, 4 * 25 + 4),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), IMAGE, 2 * 9 * 7 * 9 * 4 * 6, 4 * 6 * 9 + 6),
    "linear": (nn.Linear(7, 5), IMAGE, 2 * 4 * 9 * 7 * 5, 7 * 5 + 5),
    "sampled": (
        qx.SampledConv2d(4, 6, 3, padding=1, sampling=qx.QUARTER),
        IMAGE,
        2 * 20 * 9 * 4 * 6,
        6 * 4 * 9 + 6,
    ),
    "sampled-grouped": (
        qx.SampledConv2d(4, 6, 3, padding=1, groups=2, sampling=qx.CHESSBOARD),
        IMAGE,
        2 * 32 * 9 * 2 * 6,
        6 * 2 * 9 + 6,
    ),
    "bottleneck": (
        qx.SpatialBottleneck2d(4, 6, sampling=qx.QUARTER, mid_channels=5, bias=False),
        IMAGE,
        2 * 20 * 9 * (4 * 5 + 5 * 6),
        9 * (4 * 5 + 5 * 6),
    ),
    "perforated": (
        qx.PerforatedConv2d(4, 6, 3, padding=1, sampling=qx.Random(0.3, 1)),
        IMAGE,
        2 * round(0.3 * 63) * 9 * 4 * 6,
        6 * 4 * 9 + 6,
    ),
    "attention": (
        Attention(),
        (torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)),
        2 * 5 * 5 * 4 + 5 * 4 * 2 + 5 * 5 * 4,
        3 + 4 * 2 + 2,
    ),
    "shared": (Shared(), torch.zeros(3, 4), 3 * 3 * 16, 16 + 4),
    "free": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4)), IMAGE, 0, 8),
}
models = pytest.mark.parametrize(("model", "example", "macs", "params"), MODELS.values(), ids=MODELS.keys())


@models
def test_counts_by_hand(model, example, macs, params):
    found = qx.cost(model, example)
    assert (found.macs, found.params) == (macs, params)


@models
def test_rows_add_up_and_agree_with_torch(model, example, macs, params):
    found = qx.cost(model, example)
    assert sum(row.macs for row in found.rows) == found.macs
    assert sum(row.params for row in found.rows) == found.params
    math = sdpa_kernel(SDPBackend.MATH)  # torch counts no fused attention of the CPU
    with math, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(*(example if isinstance(example, tuple) else (example,)))
    assert counter.get_total_flops() == 2 * found.macs


def test_rows_say_which_layer_and_what_it_gave():
    network = qx.networks.build("rsbn8", num_classes=7, width=4)
    found = qx.cost(network, torch.zeros(2, 3, 16, 12))
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {
        name for name, module in network.named_modules() if list(module.parameters(recurse=False))
    }
    assert rows["stem"] == type(found.rows[0])("stem", "Conv2d", 2 * 16 * 12 * 9 * 3 * 4, 108, (2, 4, 16, 12))
    assert rows["classifier"].output == (2, 7)
    assert rows["stages.0.0.down"].output == (2, 4, 96, 1)
    assert rows["stages.0.0.up"].macs == 2 * 96 * 9 * 4 * 4
    assert rows["norm"].macs == 0
    assert [row.name for row in found.rows] == [n for n, _ in network.named_modules() if n in rows]


def test_what_the_networks_own_forward_multiplies_has_a_row():
    model, example, _, _ = MODELS["attention"]
    rows = {row.name: row for row in qx.cost(model, example).rows}
    assert rows["(network)"].macs == 3 * 5 * 5 * 4
    assert rows["(network)"].params == 3
    assert rows["out"].macs == 5 * 4 * 2


def test_a_layer_inside_a_layer_is_counted_once():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(7, 7)))
    found = qx.cost(nn.Sequential(inner, nn.Conv2d(4, 1, 1)), IMAGE)
    assert {row.name: row.macs for row in found.rows} == {
        "0.0": 2 * 63 * 16,
        "0.1.0": 2 * 63 * 16,
        "0.1.1": 2 * 63 * 4 * 7,
        "1": 2 * 63 * 4,
    }


@given(batch=st.integers(1, 4), height=st.integers(4, 20), width=st.integers(4, 20))
def test_macs_grow_with_the_batch_and_with_the_sampled_positions(batch, height, width):
    model = qx.SpatialBottleneck2d(2, 3, sampling=qx.CHESSBOARD, mid_channels=3, bias=False)
    found = qx.cost(model, torch.zeros(batch, 2, height, width))
    one = qx.cost(model, torch.zeros(1, 2, height, width))
    assert found.macs == batch * one.macs
    assert one.macs == qx.CHESSBOARD.count(height, width) * 9 * (2 * 3 + 3 * 3)


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, x):
        if x.shape[0] > 1:
            raise RuntimeError("on purpose")
        return self.frozen(self.norm(x))


def state_of(model):
    modes = [module.training for module in model.modules()]
    hooks = [
        len(store)
        for module in model.modules()
        for store in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    return modes, hooks, {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("batch", [1, 2], ids=["well", "failing"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(batch, training):
    model = Failing()
    model.norm.train(training)
    modes, hooks, state = state_of(model)
    example = torch.randn(batch, 3, 8, 8)
    if batch > 1:
        with pytest.raises(RuntimeError, match="on purpose"):
            qx.cost(model, example)
    else:
        qx.cost(model, example)
    modes_after, hooks_after, state_after = state_of(model)
    assert modes_after == modes
    assert hooks_after == hooks
    assert all(torch.equal(state[k], state_after[k]) for k in state)
    assert torch.is_grad_enabled()
    # and nothing counts on behind its back
    model.eval()(torch.randn(1, 3, 8, 8)).sum().backward()


def test_inference_mode_holds_only_within():
    model = Failing()
    within = []

    def look():
        within.extend((model.training, model.norm.training, torch.is_grad_enabled()))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), inference_mode_of(model):
        look()
    assert within == [False, False, False]
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("example", [[PICTURE], (1, 3, 32, 32)[0], "1x3x32x32", None])
def test_another_kind_of_example_is_refused(example):
    with pytest.raises(TypeError, match="example_input: expected a tensor or a tuple"):
        qx.cost(nn.Conv2d(3, 4, 3), example)


def test_the_dictionary_is_json():
    found = qx.cost(qx.networks.build("rsbn8", width=4), PICTURE)
    assert json.loads(json.dumps(found.to_dict()))["macs"] == found.macs


# ---------------------------------------------------------------- what torch runs in one call


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)


def _attention(n, length, width):
    """Four projections, and the two products of attention."""
    return 4 * n * length * width**2 + 2 * n * length**2 * width


ONE_CALL = {
    "lstm": (nn.LSTM(7, 5, num_layers=2), [(4, 3, 7)], 4 * 3 * 4 * 5 * (7 + 5 + 5 + 5)),
    "gru": (nn.GRU(7, 5, bidirectional=True), [(4, 3, 7)], 2 * 4 * 3 * 3 * 5 * (7 + 5)),
    "self-attention": (
        nn.MultiheadAttention(12, 3, batch_first=True),
        [(2, 9, 12)] * 3,
        _attention(2, 9, 12),
    ),
    "encoder layer": (
        nn.TransformerEncoderLayer(12, 3, 20, batch_first=True),
        [(2, 9, 12)],
        _attention(2, 9, 12) + 2 * 2 * 9 * 12 * 20,
    ),
    "encoder": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2),
        [(2, 9, 12)],
        2 * (_attention(2, 9, 12) + 2 * 2 * 9 * 12 * 20),
    ),
    "scaled dot product": (
        Calls(lambda q, k: F.scaled_dot_product_attention(q, k, k)),
        [(2, 3, 5, 8), (2, 3, 7, 8)],
        2 * 2 * 3 * 5 * 7 * 8,
    ),
    "bilinear": (nn.Bilinear(6, 5, 4), [(3, 6), (3, 5)], 3 * 6 * 5 * 4),
    "einsum": (Calls(lambda a, b: torch.einsum("nci,ncj->nij", a, b)), [(2, 6, 3), (2, 6, 4)], 2 * 6 * 3 * 4),
    "matrix and vector": (Calls(torch.mv), [(6, 5), (5,)], 30),
    "addmv": (Calls(torch.addmv), [(6,), (6, 5), (5,)], 30),
    "dot": (Calls(torch.dot), [(6,), (6,)], 6),
}


@pytest.mark.parametrize("case", ONE_CALL)
def test_what_runs_in_one_call_counts_as_the_products_it_consists_of(case):
    model, shapes, macs = ONE_CALL[case]
    before = torch.backends.mha.get_fastpath_enabled()
    found = qx.cost(model, tuple(torch.randn(shape) for shape in shapes))
    assert found.macs == macs
    assert found.uncounted == ()
    assert sum(row.macs for row in found.rows) == macs
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_what_is_not_counted_is_named_with_its_layer(capsys):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.transform = nn.Conv2d(3, 4, 3), Calls(torch.fft.rfft2)

        def forward(self, x):
            return torch.linalg.inv(self.transform(self.conv(x)).abs()[..., :4, :4] + 9 * torch.eye(4))

    found = qx.cost(Mixed(), torch.randn(1, 3, 8, 8))
    assert found.macs == 3 * 4 * 9 * 36
    assert found.uncounted == ("transform (Calls): aten::_fft_r2c", "(network) (Mixed): aten::linalg_inv_ex")
    assert json.loads(json.dumps(found.to_dict()))["uncounted"] == list(found.uncounted)
    print_cost("mixed", (1, 3, 8, 8), found)
    assert "transform (Calls)" in (shown := capsys.readouterr().out)
    assert "not counted" in shown


def test_an_operator_of_another_library_is_named():
    with torch.library._scoped_library("a_strangers_own", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        found = qx.cost(nn.Sequential(nn.ReLU(), Calls(torch.ops.a_strangers_own.twice)), torch.randn(1, 3))
    assert found.uncounted == ("1 (Calls): a_strangers_own::twice",)


def test_norms_activations_and_poolings_are_nothing_that_is_left_out():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
        *(nn.LocalResponseNorm(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1), nn.LayerNorm(4)),
        Calls(lambda x: F.normalize(x.sort()[0].cumsum(0))),
    )
    assert qx.cost(model, torch.randn(2, 3, 9, 9)).uncounted == ()


def test_layers_in_containers_that_nobody_calls_count_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)])
            self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(8, 4, 1))})
            self.inner = nn.Module()
            self.inner.encode = nn.Conv2d(8, 8, 1)
            self.norm = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.heads["a"](self.inner.encode(self.norm(x))) @ x.new_ones(5, 3)

    found = qx.cost(Net().eval(), torch.randn(1, 8, 6, 5))
    macs = {row.name: row.macs for row in found.rows}
    positions = 30
    assert macs["layers.0"] == macs["layers.1"] == positions * 8 * 8 * 9
    assert macs["heads.a.0"] == positions * 8 * 4
    assert macs["inner.encode"] == positions * 64
    assert macs["(network)"] == 4 * 6 * 5 * 3
    assert min(macs.values()) >= 0
    assert sum(macs.values()) == found.macs
    assert not macs.keys() & {"layers", "heads", "inner"}


def test_layers_that_several_modules_hold_count_where_they_run_and_failures_leave_nothing_open():
    shared = nn.Conv2d(8, 8, 3, padding=1)

    class Part(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own, self.shared = nn.Conv2d(8, 8, own), shared

        def forward(self, x):
            return self.shared(x)[..., :1] @ x.new_ones(1, 5) + self.own(x).sum()

    class Refuses(nn.Module):
        def forward(self, x):
            shared(x)
            raise NotImplementedError

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.refuses = Part(1), Part(3), Refuses()

        def forward(self, x):
            try:
                self.refuses(x)
            except NotImplementedError:
                x = self.first(x)
            return self.second(x) + torch.fft.fft2(x).real

    found = qx.cost(Net().eval(), torch.randn(1, 8, 6, 5))
    rows = {row.name: row.macs for row in found.rows}
    assert rows == {
        "first": 8 * 6 * 5,
        "first.own": 30 * 8 * 8,
        "first.shared": 3 * 30 * 8 * 8 * 9,
        "second": 8 * 6 * 5,
        "second.own": 12 * 8 * 8 * 9,
    }
    assert sum(rows.values()) == found.macs
    assert [said.partition("::")[0] for said in found.uncounted] == ["(network) (Net): aten"]
