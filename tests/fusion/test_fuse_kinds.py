"""``fuse`` takes what it can prove: networks of all kinds answer as they do, or are refused in a sentence."""

import copy
import enum
import pickle
import threading
import types
import warnings
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize

import quincunx as qx
from quincunx.fusion import program
from quincunx.fusion.fuse import fuse
from quincunx.fusion.program import Program
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.ops import Backend

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """A forward made of a function of the module and the input."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs=3, outputs=4, size=3, **settings):
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **settings})


def programs(fused):
    return sum(isinstance(m, Program) for m in fused.modules())


def same(model, *arguments, fused=None, **named):
    fused = fuse(model) if fused is None else fused
    with torch.no_grad():
        expected = model.eval()(*arguments, **named)
    found = fused(*arguments, **named)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, **CLOSE)
    return fused


def refused(model, text):
    with pytest.raises(TypeError, match=text) as info:
        fuse(model)
    assert str(info.value).startswith("model: ")
    assert "\n" not in str(info.value)


# ---------------------------------------------------------------- exact types


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class Clipped(nn.ReLU):
    def forward(self, x):
        return super().forward(x).clamp(max=0.5)


class Gained(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.5 + 0.25


class Doubled(PerforatedConv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Named(nn.Conv2d):
    """Its forward is the parent's."""

    def __init__(self, channels):
        super().__init__(3, channels, 3)


def patched():
    layer = conv()
    layer.forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight.abs()), layer)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Scaled(3, 4, 3),
        Padded(3, 4, 3),
        nn.Sequential(conv(), Clipped()),
        nn.Sequential(conv(), Gained(4), nn.ReLU()),
        Doubled(3, 4, 3, sampling=qx.CHESSBOARD),
        patched(),
        Named(4),
        parametrizations.weight_norm(conv()),
        parametrizations.orthogonal(conv(3, 4, 1)),
        parametrize.register_parametrization(conv(), "weight", nn.Tanh()),
    ],
    ids=str,
)
def test_a_layer_of_another_kind_answers_as_it_does(layer):
    model = nn.Sequential(layer, conv(4, 4, 1), nn.ReLU()).eval()
    before = copy.deepcopy(model)
    fused = same(model, X)
    assert programs(fused) > 0
    same(before, X, fused=fused)
    same(model, X)  # the user's own is as it was


def test_weights_that_a_forward_computes_are_constants_of_a_program():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            weight = F.batch_norm(
                (self.weight - mean).reshape(1, self.out_channels, -1),
                None,
                None,
                training=True,
                momentum=0.0,
            )
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)

    class Active(nn.BatchNorm2d):
        def forward(self, x):
            torch._assert(x.ndim == 4, "maps")
            return F.relu(
                F.batch_norm(
                    x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
                )
            )

    norm = Active(4)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    fused = same(nn.Sequential(Standardised(3, 4, 3, padding=1), norm, Standardised(4, 4, 3)).eval(), X)
    assert [n.op for n in fused.graph.nodes].count("call_module") == programs(fused) == 1
    assert not [n for n in fused.graph.nodes if n.op == "call_method" or n.target is F.batch_norm]


def test_settings_that_were_changed_after_construction():
    layer = conv(padding=0)
    layer.padding, layer.stride = (1, 2), (2, 1)
    same(nn.Sequential(layer), X)
    same(nn.Sequential(conv(padding="same", dilation=2)), X)
    model = nn.Sequential(conv(), nn.BatchNorm2d(4))
    model[1].eps = 0.5
    same(model.eval(), X)


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize(
    "hook",
    [
        lambda m: m[0].register_forward_hook(lambda _, __, out: out * 0.5),
        lambda m: m[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
        lambda m: m[1].register_forward_hook(lambda _, args, kwargs, out: out - args[0], with_kwargs=True),
        lambda m: m[0].register_forward_pre_hook(
            lambda _, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
        ),
        lambda m: m[3].register_forward_hook(lambda _, __, out: out + 1),
        lambda m: m[3][0].register_forward_hook(lambda _, __, out: out + 1, always_call=True),
        lambda m: m.register_forward_hook(lambda _, __, out: out + 1),
        lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] - 1,)),
    ],
)
def test_hooks_stay_in_effect(hook):
    model = nn.Sequential(conv(), nn.ReLU(), conv(4), nn.Sequential(conv(4), nn.ReLU())).eval()
    hook(model)
    fused = same(model, X)
    same(model, X, fused=copy.deepcopy(fused))


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_are_refused(register):
    handle = register(lambda *_: None)
    try:
        refused(nn.Sequential(conv()), "registered for all modules")
    finally:
        handle.remove()


# ---------------------------------------------------------------- in place


def units(m, x):
    x = m.stem(x)
    for layer in (m.a, m.b, m.a):
        x = layer(m.act(x)) + x
    return x


def sliced(m, x):
    y = m.stem(x)
    y[:, 1:3] *= 2
    y[..., 0] = 0
    return m.a(y) + y


def into(m, x):
    y = m.stem(x)
    z = m.a(y)
    torch.add(y, z, out=y)
    return m.b(y) * z


def aliased(m, x):
    y = m.stem(x)
    z = y.squeeze(0).transpose(2, 3)
    z.exp_()
    return m.a(y)


def augmented(m, x):
    y = m.stem(x)
    z = m.a(y)
    kept = z
    z += y
    return m.b(kept) + z


def before_and_after(m, x):
    y = m.stem(x)
    first = m.a(y)
    F.hardtanh(y, 0.0, 0.5, inplace=True)
    return first + m.b(y)


@pytest.mark.parametrize("run", [units, sliced, into, aliased, augmented, before_and_after])
def test_who_sees_a_value_changed_in_place(run):
    same(Net(run, stem=conv(), a=conv(4), b=conv(4), act=nn.ReLU6(inplace=True)).eval(), X)


def test_arguments_are_not_changed():
    model = Net(lambda m, x: m.a(x.mul_(2)) + x.sum(), a=conv()).eval()
    given = X.clone()
    with torch.no_grad():
        expected = model(X.clone())
    torch.testing.assert_close(fuse(model)(given), expected, **CLOSE)
    assert torch.equal(given, X)


def test_a_forward_that_changes_the_network_is_refused():
    def count(m, x):
        m.scale.mul_(0.9)
        return m.a(x) * m.scale

    model = Net(count, a=conv())
    model.register_buffer("scale", torch.ones(1))
    refused(model, "scale")
    model.register_parameter("other", nn.Parameter(torch.ones(1)))
    model.run = lambda m, x: m.a(x) * m.other.data.add_(1)
    refused(model, "other")

    def number(m, x):
        m.calls = getattr(m, "calls", 0) + 1
        return m.a(x) * m.calls

    refused(Net(number, a=conv()), "sets 'calls'")


def test_a_parameter_that_scales_in_place_is_not_changed():
    model = Net(lambda m, x: m.b(m.a(x).mul_(m.gain)) * m.gain, a=conv(), b=conv(4))
    model.gain = nn.Parameter(torch.tensor(0.25))
    same(model, X)


def test_a_cache_that_the_first_call_fills_stays_in_its_module():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.found, self.bias = {}, nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            if "bias" not in self.found:
                self.found["bias"] = self.bias * x.new_ones(1)
            return x + self.found["bias"]

    fused = same(nn.Sequential(conv(), Cached(), conv(4)).eval(), X)
    assert programs(fused) == 2
    same(nn.Sequential(conv(), Cached(), conv(4)).eval(), X)


def test_the_layout_of_maps_in_memory():
    same(Net(lambda m, x: m.a(x).view(x.shape[0], -1), a=conv()), X)
    same(Net(lambda m, x: m.a(x).view_as(x), a=conv(3, 3)), X)
    fused = fuse(nn.Sequential(conv()))
    fused(X).view(2, -1)
    last = X.contiguous(memory_format=torch.channels_last)
    assert fused(last).is_contiguous(memory_format=torch.channels_last)
    refused(Net(lambda m, x: m.a(x).as_strided((2, 4), (4, 1)), a=conv()), "as_strided")

    def written(m, x):
        y = m.a(x)
        y.reshape(2, -1).clamp_(0)
        return y

    refused(Net(written, a=conv()), "reshape")

    class Viewing(nn.Module):
        def forward(self, x):
            return x.view(int(x.shape[0]), -1) if x.sum() > -1e9 else x

    same(Net(lambda m, x: m.view(m.a(x)), a=conv(), view=Viewing()), X)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        lambda m, x: m.one(x),
        lambda m, x: m.b(x).mean((2, 3), keepdim=True),
        lambda m, x: m.b(x)[:1],
        lambda m, x: m.b(x)[:, :, :1],
        lambda m, x: m.bias,
        lambda m, x: m.b(x).mean(),
        lambda m, x: m.b(x)[0, 0],
        lambda m, x: m.b(x).double(),
    ],
)
def test_sums_of_unequal_shapes(other, reference, monkeypatch):
    if reference:
        monkeypatch.setattr(program, "backend", lambda: Backend("reference", "asked for"))
    modules = {"a": conv(), "b": conv(), "one": conv(3, 1), "last": conv(4)}

    def run(m, x):
        y = other(m, x)
        z = F.relu(m.a(x) + y)
        return m.last(z.float()), (m.a(x) * y).sum()

    model = Net(run, **modules)
    model.bias = nn.Parameter(torch.randn(4, 1, 9))
    fused = same(model, X)
    same(model, X[:1], fused=fused)
    same(model, torch.randn(3, 3, 9, 9), fused=fused)


def test_the_smaller_one_is_the_convolution():
    same(Net(lambda m, x: F.relu(m.a(x.mean((2, 3), keepdim=True)) + m.b(x)), a=conv(), b=conv()), X)
    same(Net(lambda m, x: F.relu(m.a(x[:1]) + m.b(x)), a=conv(), b=conv()), X)
    same(
        Net(
            lambda m, x: m.n(m.a(x)[:, :, ::2, ::2] + m.b(x)).relu(),
            a=conv(),
            b=conv(stride=2),
            n=nn.BatchNorm2d(4),
        ).eval(),
        X,
    )


def test_no_images_one_size_after_another_and_maps_without_a_batch():
    model = nn.Sequential(conv(), nn.ReLU(), conv(4))
    fused = fuse(model)
    for shape in ((0, 3, 9, 9), (1, 3, 5, 12), (3, 9, 9), (2, 3, 9, 9)):
        same(model, torch.randn(shape), fused=fused)


# ---------------------------------------------------------------- calls


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.pool = conv(), nn.BatchNorm2d(4), nn.AvgPool2d(3)

    def forward(self, image, features=False, mode="mean", times=2, *, scale=1.5, extra=None):
        y = self.norm(input=self.a(input=image))
        y = torch.add(input=y, other=F.relu(input=y, inplace=False)) * scale
        if extra is not None:
            y = y + extra
        for _ in range(times):
            y = self.pool(y) if mode == "pool" else y + 1
        return y if features else y.mean((2, 3))


def test_arguments_by_name_flags_and_numbers():
    model = Calls().eval()
    fused = same(model, image=X)
    same(model, X, False, "mean", fused=fused)
    for named in ({"features": True}, {"mode": "pool"}, {"times": 3}, {"extra": torch.ones(1)}):
        with pytest.raises(TypeError, match=next(iter(named))):
            fused(X, **named)
    with pytest.raises(TypeError, match="unknown"):
        fused(X, unknown=1)


Pair = namedtuple("Pair", "first second")


class Kind(enum.Enum):
    ONE = 1


@dataclass
class Answer:
    map: torch.Tensor
    note: str = "none"


class Record(dict):
    """A dictionary of a library."""


class Row(list):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda y: OrderedDict(out=y, aux=y + 1),
        lambda y: Pair(y, [y, (y * 2, {"deep": y})]),
        lambda y: Record(out=y),
        lambda y: Row([y, y]),
        lambda y: defaultdict(list, out=[y]),
        lambda y: {"map": y, 3: "text", "none": None},
        lambda y: (y, y.shape[0], Kind.ONE),
        lambda y: [],
    ],
)
def test_answers_in_containers_keep_their_type(make):
    model = Net(lambda m, x: make(m.a(x)), a=conv())
    fused = fuse(model)
    found, expected = fused(X), model(X)

    def compare(a, b):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, **CLOSE)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert a == b

    compare(found, expected)
    again = pickle.loads(pickle.dumps(fused))
    compare(again(X), expected)


def test_dataclasses_and_what_cannot_be_made_again():
    model = Net(lambda m, x: Answer(m.a(x), note="mine"), a=conv())
    found = fuse(model)(X)
    assert type(found) is Answer
    assert found.note == "mine"

    class Marked(list):
        """It holds more than its elements."""

    def mark(m, x):
        found = Marked([m.a(x)])
        found.mark = 3
        return found

    refused(Net(mark, a=conv()), "cannot be made again")


def test_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, batch):
            first, second = batch["images"]
            return self.a(first) + self.a(second) * batch["scale"]

    same(Nested(), {"images": (X, X + 1), "scale": 2.0})


# ---------------------------------------------------------------- what a forward asks


def asked(m, x):
    if not isinstance(x, torch.Tensor):
        x = torch.as_tensor(x) / 255
    assert torch.is_tensor(x)
    return m.a(x)


def test_a_forward_that_asks_for_a_tensor_is_told_the_truth():
    fused = same(Net(asked, a=conv()), X)
    assert programs(fused) == 1
    with pytest.raises(TypeError, match="tensor"):
        fused([1.0])


def by_size(m, x):
    return m.a(x) * {9: 2.0}.get(x.shape[-1], 1.0)


def by_type_of_size(m, x):
    return m.a(x) * (2.0 if isinstance(x.shape[0], int) else 1.0)


def by_chance(m, x):
    return m.a(x) * torch.rand(1).item()


def by_noise(m, x):
    return m.a(x) + torch.rand(4, 1, 1)


def marked(m, x):
    y = m.a(x)
    y.mark = 3
    return y * y.mark


def inner_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.a(x)


@pytest.mark.parametrize("run", [by_size, by_type_of_size, marked, inner_autocast])
def test_what_only_a_value_knows_is_not_decided_while_tracing(run):
    refused(Net(run, a=conv()), "traced")
    inside = Net(lambda m, x: m.b(m.part(x).float()), part=Net(run, a=conv()), b=conv(4))
    fused = same(inside, X)
    assert set(fused.meta["whole"]) == {"part"}


@pytest.mark.parametrize("run", [by_chance, by_noise])
def test_a_forward_that_draws_random_numbers_is_refused(run):
    model = Net(run, a=conv())
    state = torch.get_rng_state()
    refused(model, "random")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "error",
    [ValueError("two\nlines"), AssertionError(), KeyError("x"), ZeroDivisionError("by zero"), IndexError()],
)
def test_whatever_a_forward_raises_is_one_sentence(error):
    def raising(m, x):
        if type(x) is not torch.Tensor:
            raise error
        return m.a(x)

    refused(Net(raising, a=conv()), "Net cannot be traced")
    assert programs(same(nn.Sequential(conv(), nn.Sequential(conv(4), Net(raising, a=conv(4)))), X)) == 1


@torch.fx.wrap
def opaque(x, weight):
    if x.sum() > 0:
        x.mul_(2)
    return x + weight.mean()


CHANGERS = {"torch's module": nn.SiLU(inplace=True), "hooked": nn.ReLU(inplace=True), "opaque": Net(None)}
CHANGERS["hooked"].register_forward_hook(lambda _, __, out: out * 2)
CHANGERS["method"] = Net(lambda _, x: x.mul_(2))
CHANGERS["opaque"].run = lambda _, x: x.mul_(2) if float(x.sum()) else x.mul_(3)


@pytest.mark.parametrize("change", CHANGERS.values(), ids=CHANGERS)
@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.contiguous(),
        lambda x: x.reshape(2, 4, 9, 9),
        lambda x: x.flatten(1).unflatten(1, (4, 9, 9)),
        lambda x: x.to(memory_format=torch.contiguous_format)[:, :],
    ],
)
def test_what_changes_a_view_or_a_copy_as_the_layout_has_it(change, other):
    def source_changed(m, x):
        y = m.a(x)
        z = other(y)
        m.change(y)
        return m.b(z)

    def other_changed(m, x):
        y = m.a(x)
        m.change(other(y))
        return m.b(y)

    def given_on(m, x):
        return m.b(m.change(other(m.a(x))))

    for run in (source_changed, other_changed):
        refused(Net(run, a=conv(), b=conv(4), change=change), "a view or a copy")
    # nobody reads the one that was not changed
    same(Net(given_on, a=conv(), b=conv(4), change=change), X)


def test_a_module_that_changes_a_tensor_of_the_networks_own():
    def run(m, x):
        return m.a(x) + m.change(m.scale)

    model = Net(run, a=conv(), change=nn.SiLU(inplace=True))
    model.register_buffer("scale", torch.rand(4, 1, 1))
    refused(model, "changes its own 'scale' in place")


def test_a_function_that_nobody_can_look_into():
    def run(m, x):
        y = m.a(x)
        z = m.b(y)
        w = opaque(y, m.a.weight)
        return m.b(y) + z + w

    same(Net(run, a=conv(), b=conv(4)), X)


def test_a_call_of_its_own_is_refused():
    class Called(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x) * 2

    refused(Called(conv()), "__call__")
    model = nn.Sequential(Called(conv(), nn.ReLU()), conv(4))
    same(model, X)


# ---------------------------------------------------------------- types of numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float16])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_types_without_kernels_run_in_torch(dtype):
    model, x = nn.Sequential(conv(), conv(4)).to(dtype), X.to(dtype)
    fused = fuse(model)
    assert programs(fused) == 0
    assert torch.equal(fused(x), model(x))


def test_mixed_types():
    model = Net(
        lambda m, x: m.b(m.n(m.a(x)).float()), a=conv().bfloat16(), n=nn.BatchNorm2d(4), b=conv(4)
    ).eval()
    with torch.no_grad():
        expected = model(X.bfloat16())
    found = fuse(model)(X.bfloat16())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    with pytest.raises(TypeError, match="bfloat16"):
        fuse(nn.Sequential(conv()))(X.bfloat16())


# ---------------------------------------------------------------- a fused network as an object


def test_check_names_the_first_module_that_differs(monkeypatch):
    model = nn.Sequential(
        OrderedDict(first=conv(), act=nn.ReLU(), second=conv(4), pool=nn.MaxPool2d(2), third=conv(4))
    )
    fuse(model, check=X)
    fuse(model, check=(X,))
    kept = Program._answer

    def off(self, arguments):
        return tuple(y * 1.5 if "third" not in self.outputs else y for y in kept(self, arguments))

    monkeypatch.setattr(Program, "_answer", off)
    with pytest.raises(TypeError, match=r"differs by .*'second' \(Conv2d\) by"):
        fuse(
            nn.Sequential(OrderedDict(first=conv(), second=conv(4), act=nn.Tanh(), third=conv(4))).eval(),
            check=X,
        )


def test_pickled_copied_and_from_several_threads():
    model = qx.accelerate(
        nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 4)).eval(),
        qx.Espace(rank="full", rate=0.5, mask="uniform"),
    ).model
    fused = fuse(model)
    for other in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused), copy.copy(fused)):
        same(model, X, fused=other)
    sizes = [(1, 3, 9, 9), (2, 3, 12, 7), (1, 3, 8, 16), (1, 3, 16, 8)]
    images = [torch.randn(size) for size in sizes]
    with torch.no_grad():
        expected = [model(image) for image in images]
    found = [[] for _ in images]

    def run(i):
        for _ in range(5):
            found[i].append(fused(images[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(images))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for several, wanted in zip(found, expected, strict=True):
        assert len(several) == 5
        for one in several:
            torch.testing.assert_close(one, wanted, **CLOSE)


def test_operations_in_place_outlive_pickling():
    model = Net(sliced, stem=conv(), a=conv(4)).eval()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a = conv(), conv(4)

        def forward(self, x, flag=False):
            return sliced(self, x)

    model = Own().eval()
    again = pickle.loads(pickle.dumps(fuse(model)))
    same(model, X, fused=again)
    with pytest.raises(TypeError, match="flag"):
        again(X, flag=True)


def test_under_autocast_and_inference_mode():
    model = Net(
        lambda m, x: m.last(m.up(m.a(x).relu()) + m.b(x)),
        a=conv(stride=2), up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1), b=conv(), last=conv(4),
    ).eval()  # fmt: skip
    fused = fuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused(X)
    assert (found.float() - model(X)).abs().max() < 0.05 * model(X).abs().max()
    with torch.inference_mode():
        made = fuse(model)
        made(X)
    same(model, X, fused=made)
    qx.SpatialBottleneck2d(4, 4)(torch.randn(1, 4, 9, 9, requires_grad=True)).sum().backward()


def test_traced_by_torch_jit_and_compiled():
    model = nn.Sequential(conv(), nn.ReLU(), conv(4)).eval()
    fused = fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fused, X)
    for shape in ((2, 3, 9, 9), (1, 3, 12, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), model(x), **CLOSE)
    compiled = torch.compile(fused, backend="eager")
    same(model, X, fused=compiled)


def test_a_program_of_the_users_own_name():
    model = Net(lambda m, x: m.program0(m.a(x)), a=conv(), program0=nn.Softplus())
    same(model, X)


def test_tracing_leaves_builtins_and_the_users_modules_alone():
    recorded = []

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, x):
            self.last = self.a(x)
            recorded.append(type(self.last))
            return self.last

    model = Keeping()
    assert isinstance(fuse(model), fx.GraphModule)
    assert "last" not in vars(model)
    assert isinstance(1, int)
    assert type(isinstance).__name__ == "builtin_function_or_method"


# ---------------------------------------------------------------- what a forward does besides


def changed_stride(m, x):
    m.a.stride = (2, 2)
    y = m.a(x)
    m.a.stride = (1, 1)
    return y


def trained_within(m, x):
    m.norm.train()
    y = m.norm(m.a(x))
    m.norm.eval()
    return y


def rebound(m, x):
    m.shift = torch.ones(4, 1, 1)
    return m.a(x) + m.shift


def caught(m, x):
    try:
        n = len(range(x.shape[2]))
    except Exception:  # noqa: BLE001 - as others wrote it
        n = 1
    return m.a(x) * n


def caught_length(m, x):
    try:
        return m.a(x) * float(x.sum())
    except Exception:  # noqa: BLE001 - as others wrote it
        return m.a(x)


@pytest.mark.parametrize("run", [changed_stride, trained_within, rebound, caught, caught_length])
def test_what_is_set_or_caught_within_a_forward_is_not_taken_for_constant(run):
    def made():
        net = Net(run, a=conv(), norm=nn.BatchNorm2d(4))
        net.register_buffer("shift", torch.zeros(4, 1, 1))
        return net.eval()

    refused(made(), "traced")
    inside = nn.Sequential(made(), conv(4)).eval()
    fused = fuse(inside)
    assert set(fused.meta["whole"]) == {"0"}
    with torch.no_grad():
        torch.testing.assert_close(fused(X), copy.deepcopy(inside)(X), **CLOSE)


def test_a_part_that_belongs_to_another_network_too_is_refused():
    model = nn.Sequential(conv(), nn.Sequential(conv(4), nn.BatchNorm2d(4)))
    forward = model[1].forward
    model[1].forward = lambda x: forward(x) * 2
    refused(model, "exchanged")

    class Shared(nn.Conv2d):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Shared(3, 4, 3)).train()
    refused(model, "copied")
    assert model[0].training
    assert model[0].weight.requires_grad


@torch.library.custom_op("quincunx_test::fill_with", mutates_args=("x",))
def fill_with(x: torch.Tensor, value: float) -> None:
    x.fill_(value)


def filled(m, x):
    y = m.a(x)
    fill_with(y[:, :2], 1.0)
    return m.b(y)


def through_einsum(m, x):
    y = m.a(x)
    z = m.b(y)
    torch.einsum("nchw->nhwc", y)[..., 0] = 0
    return z + y


def through_an_operator(m, x):
    y = m.a(x)
    torch.ops.aten.mul_(y, 2.0)
    return m.b(y) + y


@pytest.mark.parametrize("run", [filled, through_einsum, through_an_operator])
def test_operators_that_write(run):
    same(Net(run, a=conv(), b=conv(4)), X)


def test_an_opaque_module_that_writes_to_a_view():
    act = hooked_relu()
    refused(
        Net(lambda m, x: m.b(y := m.a(x)) + m.act(y.view(2, -1)).sum() + y, a=conv(), b=conv(4), act=act),
        "layout",
    )
    same(Net(lambda m, x: m.act(m.a(x).view(2, -1)), a=conv(), act=hooked_relu()), X)


def hooked_relu():
    layer = nn.ReLU(inplace=True)
    layer.register_forward_hook(lambda *_: None)
    return layer


def test_what_leaves_lies_as_the_networks_would():
    for run in (F.gelu, lambda y: y[:, 1:], lambda y: F.max_pool2d(y, 2), lambda y: torch.cat([y, y], 1)):
        model = Net(lambda m, x, run=run: run(m.a(x)), a=conv())
        assert fuse(model)(X).stride() == model(X).contiguous().stride()


def test_a_subclass_that_gives_other_attributes():
    class Giving(nn.Conv2d):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return value * 2 if name == "weight" else value

    layer = Giving(3, 4, 3)
    nn.init.normal_(layer._parameters["weight"])  # the constructor's own goes into what it is given
    same(nn.Sequential(layer, nn.ReLU()), X)


def test_maps_without_a_batch_before_an_activation():
    model = Net(lambda m, x: m.b(F.relu(y := m.a(x))) + y, a=conv(), b=conv(4))
    same(model, X[0])


def test_a_pair_called_for_several_sizes_in_turn():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(3, 4), conv(4, 4)

        def forward(self, x):
            maps = [self.first(v).relu() for v in (x, x[:, :, :6, :6])]
            return [self.second(y) for y in maps]

    made = Several().eval()
    pair = qx.SpatialBottleneck(singles=False)
    model = qx.accelerate(
        nn.Sequential(made.first, nn.ReLU(), made.second), pair, calibration=[torch.randn(64, 3, 9, 9)]
    ).model
    made.first, made.second = model[0], model[2]
    same(made, X)
