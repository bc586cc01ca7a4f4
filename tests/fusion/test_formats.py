"""A fused copy in another number format: right to its rounding, used where it is faster, and said so."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.experiments.bench import peak_memory
from quincunx.fusion import formats
from quincunx.fusion import fuse as fuse_module
from quincunx.fusion.program import Program

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16
needs_native = pytest.mark.skipif(qx.backend().name != "native", reason="the reference has whole maps")


def programs(fused):
    return [module for module in fused.modules() if isinstance(module, Program)]


def away(found, expected):
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


class Branches(nn.Module):
    """Maps that leave a program for torch and come back, a second output, a dictionary."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x):
        y = torch.fft.rfft2(self.first(x)).abs()[..., : x.shape[-1] // 2 + 1]
        y = torch.relu(self.norm(self.second(y)))
        return {"map": y, "answer": self.head(y.mean((2, 3)))}


NETWORKS = {
    "rsbn14": (lambda: qx.networks.build("rsbn14", 10, 3), (2, 3, 16, 16)),
    "csbn29": (lambda: qx.networks.build("csbn29", 10, 3), (1, 3, 16, 16)),
    "sb-resnet18": (lambda: qx.networks.build("sb-resnet18", 10, 3), (1, 3, 64, 48)),
    "squeezenet1_1": (lambda: qx.networks.build("squeezenet1_1", 10, 3), (2, 3, 64, 64)),
    "perforated": (
        lambda: nn.Sequential(
            qx.PerforatedConv2d(3, 8, 3, padding=1, sampling=qx.CHESSBOARD, fill="fitted"),
            nn.SiLU(),
            qx.PerforatedConv2d(8, 8, 3, padding=1, sampling=qx.QUARTER, fill="fitted"),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
            nn.Hardswish(),
        ),
        (2, 3, 12, 10),
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3, stride=2), nn.Hardtanh()), (3, 6, 11, 13)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_those_of_the_network_to_the_formats_rounding(name):
    build, shape = NETWORKS[name]
    model, x = build().eval(), torch.randn(shape)
    fused = qx.fuse(model, BF16, check=x, force=True)
    assert all(program.dtype == BF16 and program.outside == torch.float32 for program in programs(fused))
    for batch in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
        found = fused(batch)
        assert found.dtype == torch.float32
        assert away(found, model(batch)) < 0.06
    assert fused.meta["dtype"] == {"asked": "bfloat16", "used": "bfloat16", "ratio": None}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_runs_in_torch_stays_float32():
    model, x = Branches().eval(), torch.randn(2, 3, 12, 12)
    found, expected = qx.fuse(model, BF16, check=x, force=True)(x), model(x)
    assert {key: value.dtype for key, value in found.items()} == {
        "map": torch.float32,
        "answer": torch.float32,
    }
    assert all(away(found[key], expected[key]) < 0.06 for key in found)


@pytest.mark.parametrize("back_end", ["native", "reference"])
def test_every_back_end_serves_it(back_end, monkeypatch):
    if qx.backend().name != "native" and back_end == "native":
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("QUINCUNX_BACKEND", back_end)
    model, x = qx.networks.build("rsbn8", 10, 3).eval(), torch.randn(2, 3, 9, 11)
    assert away(qx.fuse(model, BF16, force=True)(x), model(x)) < 0.06


def test_a_copy_in_another_format_copies_pickles_and_runs_in_threads_under_autocast_and_inference_mode():
    model, x = qx.networks.build("rsbn8", 10, 3).eval(), torch.randn(2, 3, 16, 16)
    fused = qx.fuse(model, BF16, force=True)
    expected, found = fused(x), []
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(other(x), expected)
        assert other.meta["dtype"]["used"] == "bfloat16"
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert away(fused(x).float(), expected) < 0.03
    threads = [threading.Thread(target=lambda: found.append(fused(x))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("checked", [False, True])
def test_a_format_that_is_slower_is_not_used_and_that_is_said(checked, monkeypatch):
    monkeypatch.setattr(formats, "_measured", lambda *_: 0.5)
    monkeypatch.setattr(formats, "decision", lambda _, measure: measure())
    monkeypatch.setattr(fuse_module, "speed_ratio", lambda *_: 0.5)
    model, x = qx.networks.build("rsbn8", 10, 3).eval(), torch.randn(1, 3, 16, 16)
    with pytest.warns(
        UserWarning, match=r"bfloat16 are 0.50 times as fast .* computes in float32 \(force=True"
    ):
        fused = qx.fuse(model, BF16, check=x if checked else None)
    assert fused.meta["dtype"] == {"asked": "bfloat16", "used": "float32", "ratio": 0.5}
    assert {program.dtype for program in programs(fused)} == {torch.float32}
    assert torch.equal(fused(x), qx.fuse(model)(x))


def test_the_copy_that_is_used_instead_is_compared_with_the_model_too(monkeypatch):
    compared = []
    monkeypatch.setattr(fuse_module, "speed_ratio", lambda *_: 0.5)
    monkeypatch.setattr(fuse_module.Comparison, "check", lambda _, model, fused, x: compared.append(fused))
    with pytest.warns(UserWarning, match="computes in float32"):
        fused = qx.fuse(nn.Conv2d(3, 4, 3).eval(), BF16, check=torch.randn(1, 3, 8, 8))
    assert any(one is fused for one in compared)


def test_a_format_that_is_faster_is_used_without_a_word(monkeypatch, recwarn):
    monkeypatch.setattr(formats, "_measured", lambda *_: 1.5)
    monkeypatch.setattr(formats, "decision", lambda _, measure: measure())
    fused = qx.fuse(qx.networks.build("rsbn8", 10, 3).eval(), BF16)
    assert fused.meta["dtype"] == {"asked": "bfloat16", "used": "bfloat16", "ratio": 1.5}
    assert not recwarn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int16}, r"dtype=torch.int16: expected torch.float32 or torch.bfloat16 on cpu"),
        ({"dtype": torch.float16}, "expected torch.float32 or torch.bfloat16"),
        ({"dtype": BF16, "calibration": [1]}, "calibration: torch.bfloat16 needs none"),
        ({"calibration": [1]}, "calibration: float32 and bfloat16 need none"),
    ],
)
def test_what_is_not_served_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        qx.fuse(nn.Conv2d(1, 1, 1), **options)


def test_networks_of_other_formats_keep_them():
    model, x = nn.Conv2d(3, 4, 3).double().eval(), torch.randn(1, 3, 8, 8).double()
    fused = qx.fuse(model, BF16)
    assert torch.equal(fused(x), model(x))
    assert fused.meta["dtype"]["used"] == "float32"  # nothing that is fused is in another
    low = nn.Conv2d(3, 4, 3).to(BF16).eval()
    assert qx.fuse(low, BF16)(x.to(BF16)).dtype == BF16


def test_a_gain_is_measured():
    assert formats.gain_of(BF16, "cpu") > 0


class Pooled(nn.Module):
    """A stem with max pooling, as in the ResNets, and pooling that must run in torch as it is."""

    def __init__(self, **settings):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(8), nn.MaxPool2d(**settings)

    def forward(self, x):
        return self.second(self.pool(torch.relu(self.norm(self.first(x)))))


@needs_native
@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1)},
    ],
)
def test_max_pooling_stays_between_the_convolutions_in_their_format(settings, dtype):
    model = Pooled(**settings).eval()
    fused = qx.fuse(model, dtype, force=True) if dtype else qx.fuse(model)
    assert [len(program.steps) for program in programs(fused)] == [3]
    for shape in ((2, 3, 17, 14), (1, 3, 9, 9)):
        x = torch.randn(shape)
        x[0, :, 3, 3] = -100.0
        assert away(fused(x), model(x)) < (2e-2 if dtype else 1e-5)
        with torch.profiler.profile() as profile:
            fused(x)
        names = {event.key for event in profile.key_averages()}
        assert "quincunx_native::window_max" in names
        assert "aten::max_pool2d" not in names


def test_a_window_that_does_not_fit_is_refused_as_torch_does():
    model = Pooled(kernel_size=8).eval()
    fused = qx.fuse(model)
    for x in (torch.randn(1, 3, 5, 12), torch.randn(1, 3, 12, 5)):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            model(x)
        with pytest.raises(RuntimeError, match="Output size is too small"):
            fused(x)


@needs_native
@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize("name", ["rsbn14", "rrn14", "resnet18", "sb-resnet50"])
def test_a_fused_network_needs_less_memory_than_the_network(name, dtype):
    model = qx.networks.build(name, 10, 3).eval()
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    lower = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    own = x.to(dtype)
    fused = qx.fuse(model, dtype, force=True) if dtype else qx.fuse(model)
    with torch.inference_mode():
        assert peak_memory(lambda: fused(x)) <= peak_memory(lambda: lower(own))


@pytest.mark.parametrize("dtype", [None, BF16])
def test_a_sum_may_take_the_place_of_its_shortcut_and_only_of_a_spent_one(dtype):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6))

        def forward(self, x):
            a = self.convs[0](x)
            b = self.convs[1](a) + a  # a is read again below
            c = torch.relu(self.convs[2](b) + b)
            d = self.convs[3](c) + a
            e = self.convs[4](d) + d[:, :, :, :]
            return self.convs[5](e)

    model = Chain().eval()
    fused = qx.fuse(model, dtype, force=True) if dtype else qx.fuse(model)
    for shape in ((1, 3, 9, 7), (5, 3, 8, 8), (16, 3, 24, 24)):
        x = torch.randn(shape)
        assert away(fused(x), model(x)) < (3e-2 if dtype else 1e-5)
