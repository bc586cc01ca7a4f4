"""Run quincunx on the networks of torchvision, timm and segmentation_models_pytorch, one after the other,
and record the results.

    python benchmarks/zoo.py                      # all, into results/zoo.json; under 30 minutes on two cores
    python benchmarks/zoo.py --only "timm/res*"   # some, into another file

Weights are random from a fixed seed, with batch norm statistics and affine parameters as a trained network
might have them. Each network has its own process, so that a crash or a hang is a row and does not end the
run; finished rows are kept beside the result, and the next run continues from them as long as neither
quincunx nor the libraries have changed. The exit code is 1 if an output was wrong or a call failed without a
sentence.

quincunx does not need the libraries; libraries that are not installed are skipped. torchvision and timm run
beside the CPU build of torch if they are installed without their dependencies:
pip install --no-deps torchvision timm segmentation_models_pytorch; pip install huggingface_hub
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import quincunx as qx
from quincunx.measure.environment import environment
from quincunx.surgery.calibration import Layer
from quincunx.surgery.replace import prepare
from quincunx.writing import write_json

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
# tolerance relative to the largest value of an output, in float32
TOLERANCE = 1e-4
# float32 rounding beyond this makes an output meaningless: other images are tried
CHAOS = 1e-2
SEEDS = (SEED, 10, 20, 30)
# two images whose outputs differ by less than this reveal little of the computation
DULL = 5e-3
BATCHES = (1, 2)
ROUNDS, ROUND_SECONDS = 7, 0.1
# a network whose calls take seconds is timed in fewer rounds: no round starts later, except the first three
TIMES_SECONDS = 20.0
# wall-clock limit as a multiple of the processor time limit: other processes may be running
CLOCK = 3
# number of parameters; for larger networks no layers are fitted, and no artifact is written
LARGE = 60_000_000
# heights and widths, the first that a network accepts; two if it accepts any
SIZES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((64, 64), (96, 64)),
    ((96, 96), (128, 96)),
    ((128, 128),),
)
# for networks with patches of 14 positions, which 64, 96 and 128 are not multiples of
PATCHES = (112, 112)
METHODS: dict[str, Any] = {
    "sb": qx.SpatialBottleneck(),
    "lowrank": qx.LowRank(rank=0.3),
    "espace": qx.Espace(rank=0.3, rate=0.25),
}
# statuses of a fused copy that are faults
FAULTS = ("wrong", "error", "crash", "timeout")

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        name: library/architecture.
        build: builds it, each time with other random weights.
        sized: builds it for one height and width; None if its library has no such setting.
    """

    name: str
    build: Build
    sized: Callable[[tuple[int, int]], nn.Module] | None = None


# ---------------------------------------------------------------- which networks


def torchvision_entries() -> Iterator[Entry]:
    """Yield every classification and segmentation network."""
    models = _torchvision()
    for name in models.list_models(module=models):
        own = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        sized: Callable[[tuple[int, int]], nn.Module] | None = None
        if name.startswith("vit_"):
            sized = _sized(models.get_model, name, lambda size: {"image_size": size[0]})
        elif name.startswith("maxvit"):
            sized = _sized(models.get_model, name, lambda size: {"input_size": size, "partition_size": 2})
        yield Entry(f"torchvision/{name}", _made(models.get_model, name, weights=None, **own), sized)
    for name in models.list_models(module=models.segmentation):
        made = _made(models.get_model, name, weights=None, weights_backbone=None)
        yield Entry(f"torchvision/{name}", made)


def timm_entries() -> Iterator[Entry]:
    """Yield the smallest network, by its name, of each family with convolutions."""
    timm = import_module("timm")
    families: dict[tuple[str, str], list[str]] = {}
    for module in timm.list_modules():
        if module not in ONLY_PATCHES:
            for name in timm.list_models(module=module):
                families.setdefault((module, family_of(name)), []).append(name)
    for names in families.values():
        name = min(names, key=size_by_name)
        yield Entry(
            f"timm/{name}",
            _made(timm.create_model, name, pretrained=False),
            _sized(timm.create_model, name, lambda size: {"img_size": size}),
        )


def smp_entries() -> Iterator[Entry]:
    """Yield every decoder on one encoder, and the smallest encoder of each family under one decoder."""
    smp = import_module("segmentation_models_pytorch")
    decoders = {model.__name__: model for model in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    for name, decoder in decoders.items():
        encoder = "tu-vit_tiny_patch16_224" if name == "DPT" else "resnet18"
        sized = _sized(decoder, encoder, lambda size: {"encoder_weights": None, "dynamic_img_size": True})
        yield Entry(
            f"smp/{name}-{encoder}",
            _made(decoder, encoder, encoder_weights=None),
            sized if name == "DPT" else None,
        )
    families: dict[str, list[str]] = {}
    for encoder in smp.encoders.encoders:
        families.setdefault(family_of(encoder), []).append(encoder)
    for names in families.values():
        encoder = min(names, key=size_by_name)
        if encoder != "resnet18":
            yield Entry(f"smp/Unet-{encoder}", _made(smp.Unet, encoder, encoder_weights=None))


# modules of timm whose networks only convolve the patches of an image
ONLY_PATCHES = {
    *(
        "beit",
        "cait",
        "convit",
        "crossvit",
        "deepseek_vit",
        "deit",
        "eva",
        "gemma4_vit",
        "hiera",
        "mlp_mixer",
    ),
    *("naflexvit", "qwen3_vit", "tnt", "vision_transformer", "vision_transformer_relpos"),
}
LIBRARIES: dict[str, tuple[str, Callable[[], Iterator[Entry]]]] = {
    "torchvision": ("torchvision", torchvision_entries),
    "timm": ("timm", timm_entries),
    "smp": ("segmentation_models_pytorch", smp_entries),
}
_SIZE_WORDS = (
    *(
        "test",
        "atto",
        "femto",
        "pico",
        "nano",
        "xxs",
        "xxtiny",
        "xs",
        "xtiny",
        "ti",
        "tiny",
        "mini",
        "s",
        "small",
    ),
    *("", "m", "medium", "b", "base", "l", "large", "xl", "xlarge", "xxl", "h", "huge", "giant", "gigantic"),
)
_PREFIXES = ("tf_", "timm-", "legacy_", "tu-")


def family_of(name: str) -> str:
    """Return the first word of a network's name without its library's prefix, in letters.

    Example:
        >>> family_of("tf_efficientnetv2_b0"), family_of("mit_b0")
        ('efficientnetv', 'mit')
    """
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    found = re.match(r"[a-zA-Z]+", name)
    return found.group().lower() if found else name


def size_by_name(name: str) -> tuple[int, int, int, str]:
    """Return a sort key for the names of one family by the size that they mention: a word, then the first
    number after the family's own.

    Example:
        >>> sorted(["edgenext_base", "edgenext_small", "edgenext_xx_small"], key=size_by_name)
        ['edgenext_xx_small', 'edgenext_small', 'edgenext_base']
    """
    plain = re.sub(r"(x+)_small", r"\1s", name)
    words = [_SIZE_WORDS.index(word) for word in re.split(r"[_-]", plain) if word in _SIZE_WORDS]
    number = re.search(r"\d+", re.sub(r"^[a-zA-Z_]+v\d(?=_|-|$)", "", name))
    rank = min(words, default=_SIZE_WORDS.index(""))
    return rank, int(number.group()) if number else 0, len(name), name


def _made(make: Callable[..., nn.Module], name: str, **settings: Any) -> Build:
    return lambda: make(name, **settings)


def _sized(
    make: Callable[..., nn.Module], name: str, settings: Callable[[tuple[int, int]], dict[str, Any]]
) -> Callable[[tuple[int, int]], nn.Module]:
    return lambda size: make(name, **settings(size))


_OPERATORS: list[Any] = []


def _torchvision() -> Any:
    """Import torchvision.models, even if torch and torchvision's own operators do not match."""
    try:
        return import_module("torchvision.models")
    except RuntimeError:
        # its import describes two operators, which must exist by then
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library
        _OPERATORS.append(library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _OPERATORS[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return import_module("torchvision.models")


def catalogue(pattern: str = "*") -> tuple[list[Entry], list[str]]:
    """Return the networks whose names match a pattern, and the packages that are not installed."""
    found, missing = [], []
    if find_spec("torchvision") is not None:
        _torchvision()  # timm and smp import it too
    for package, entries in LIBRARIES.values():
        if find_spec(package) is None:
            missing.append(package)
        else:
            found += [entry for entry in entries() if fnmatch(entry.name, pattern)]
    return found, missing


# ---------------------------------------------------------------- one network


def randomise(model: nn.Module, example: Tensor) -> None:
    """Give a network parameters as after training, so that no part of it is zero or idle.

    Parameters that are constant at the start (biases, scales, a last layer of zeros) get random values
    around that; batch norm gets the statistics of its input on ``example``, then shifted by a
    tenth to a third of their size.
    """
    norms: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.numel() == 1:
                # the gain of a whole branch, initially zero
                parameter.add_(0.5 * float(parameter == 0))
                continue
            fan_in, value = parameter[0].numel(), float(parameter.flatten()[0])
            if parameter.min() != parameter.max():
                # kernels may start so small that only biases or batch norm's epsilon matter
                if parameter.dim() > 1 and not 0.3 < float(parameter.std()) * math.sqrt(fan_in) < 3:
                    parameter.div_(parameter.std() * math.sqrt(fan_in))
            elif value == 0:
                parameter.normal_(0, 0.05 if parameter.dim() == 1 else 1 / math.sqrt(fan_in))
            elif abs(value) < 0.5:
                parameter.uniform_(0.1, 0.3)  # a scale that training would increase
            else:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.6, 1.4))
        model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        model(example)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            spread = norm.running_var.sqrt()
            norm.running_mean.add_(torch.randn_like(spread) * spread * 0.1)
            norm.running_var.mul_(torch.empty_like(spread).uniform_(0.8, 1.3)).add_(
                0.02 * norm.running_var.mean()
            )


def tensors(answer: Any) -> list[Tensor]:
    """Return the tensors of an output of any container type."""
    if hasattr(answer, "to_tuple"):
        answer = answer.to_tuple()
    return [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]


def distance(answer: Any, expected: Any) -> float:
    """Return the largest difference of two outputs, of each tensor relative to its largest value; infinite if
    they differ in type, number of tensors, shape or dtype, or if a value is not a number."""
    ours, theirs = tensors(answer), tensors(expected)
    if type(answer) is not type(expected) or len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return math.inf
        if one.numel():
            largest = float((one.detach().double() - other.detach().double()).abs().max())
            size = float(other.detach().double().abs().max())
            worst = max(worst, largest / size if size > 0 else largest * math.inf if largest else 0.0)
            if math.isnan(largest):
                return math.inf
    return worst


def spread_of(answer: Any) -> float:
    """Return how much the outputs for the first two images differ, relative to the largest value, or 0."""
    found = [
        t.detach().double() for t in tensors(answer) if t.is_floating_point() and t.dim() and t.shape[0] > 1
    ]
    shares = [float((t[0] - t[1]).abs().max() / t.abs().max().clamp_min(1e-30)) for t in found]
    return min(shares, default=0.0)


def images(size: tuple[int, int], batch: int, seed: int = SEED) -> Tensor:
    """Return noise that is smooth in parts, so that maps differ between positions."""
    generator = torch.Generator().manual_seed(seed + batch)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return smooth + 0.5 * torch.randn(batch, 3, *size, generator=generator)


def prepared(entry: Entry) -> tuple[nn.Module, Build, tuple[tuple[int, int], ...]]:
    """Return a network with random weights in evaluation mode, how to build it again, and its sizes.

    Raises:
        ValueError: it accepts no size.
    """
    reasons: list[str] = []
    attempts: list[tuple[Build, tuple[tuple[int, int], ...]]] = [(entry.build, sizes) for sizes in SIZES]
    if entry.sized is not None:
        sized = entry.sized
        attempts += [(partial(sized, size), (size,)) for size in (*(sizes[0] for sizes in SIZES), PATCHES)]
        attempts += [(entry.build, ((224, 224),)), (entry.build, ((256, 256),))]
    model, made_by = None, None
    for build, sizes in attempts:
        try:
            if made_by is not build:
                torch.manual_seed(SEED)
                model, made_by = build().eval(), build
            with torch.no_grad():
                for size in sizes:
                    model(images(size, 1))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - the network's own error about a size
            reasons.append(sentence(error))
            continue
        torch.manual_seed(SEED)
        model = build().eval().requires_grad_(False)
        randomise(model, images(sizes[0], 8))
        return model, build, sizes
    raise ValueError(f"takes no size from 64 to 256: {reasons[0]}")


def sentence(error: BaseException) -> str:
    """Return an exception's first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def is_refusal(error: BaseException) -> bool:
    """Return whether an exception is one of the library's sentences: of a documented type, and one line."""
    return type(error) in (TypeError, ValueError) and "\n" not in str(error).strip() and _raised_by_us(error)


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.is_relative_to(Path(qx.__file__).parent)


def kinds_called(model: nn.Module, x: Tensor) -> Counter[str]:
    """Count the convolution modules that a forward calls, by kind."""
    called: dict[int, str] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            kind = type(module).__name__
            if module.groups > 1:
                kind += ", depthwise" if module.groups == module.in_channels else ", groups"
            if module.padding_mode != "zeros":
                kind += f", {module.padding_mode} padding"
            handles.append(
                module.register_forward_hook(lambda m, _, __, k=kind: called.__setitem__(id(m), k))
            )
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return Counter(called.values())


def fused_record(
    model: nn.Module, sizes: Sequence[tuple[int, int]]
) -> tuple[dict[str, Any], nn.Module | None]:
    """Check the fused copy's outputs on each size and batch, and again on the first."""
    started = time.perf_counter()
    versions = [(p.data_ptr(), p._version) for p in (*model.parameters(), *model.buffers())]
    try:
        fused = qx.fuse(model)
    except Exception as error:  # noqa: BLE001 - the row reports any exception
        return failed(error), None
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 2)}
    # both batches of the first size, one image of the other: each new shape needs time for planning
    worst, calls = 0.0, [*((sizes[0], batch) for batch in BATCHES), *((size, 1) for size in sizes[1:])]
    started = time.perf_counter()
    for size, batch in [*calls, calls[0]]:
        for seed in SEEDS:
            x, own = images(size, batch, seed), 0.0
            with torch.no_grad():
                expected = model(x)
                try:
                    answer = fused(x)
                except Exception as error:  # noqa: BLE001 - as above
                    return {**failed(error), "answer": "error", "input": [batch, 3, *size]}, None
            off = distance(answer, expected)
            if off > TOLERANCE:
                own = own_rounding(model, x)
                told = {"images": seed, "off": shortened(off), "own_rounding": shortened(own)}
                found.setdefault("off", {}).setdefault(f"{batch}x{size[0]}x{size[1]}", []).append(told)
            if own <= CHAOS:
                break
        if off > max(TOLERANCE, 4 * min(own, CHAOS)):
            return {**found, "answer": "wrong", "error": shortened(off)}, fused
        worst = max(worst, off)
    if versions != [(p.data_ptr(), p._version) for p in (*model.parameters(), *model.buffers())]:
        return {**found, "answer": "wrong", "sentence": "the user's own network was changed"}, fused
    found["first_calls"] = round(time.perf_counter() - started, 2)
    return {"answer": "equal", "error": shortened(worst), **found}, fused


def own_rounding(model: nn.Module, x: Tensor) -> float:
    """Return how far the network's output is from its output in float64; infinite if it needs float32."""
    with torch.no_grad():
        try:
            exact = copy.deepcopy(model).double()(x.double())
        except Exception:  # noqa: BLE001 - a network that only supports float32
            return 0.0
        answer = model(x)
    pairs = zip(tensors(answer), tensors(exact), strict=True)
    return max((distance(one.double(), other.double()) for one, other in pairs), default=0.0)


def place(error: BaseException) -> str:
    """Return file and function of the innermost frames of ours, and of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "quincunx" in f.filename]
    return " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*ours[-1:], *frames[-1:]])


def shortened(value: float) -> float | None:
    """Return two digits; None for values that JSON cannot write."""
    return float(f"{value:.2g}") if math.isfinite(value) else None


def times_record(model: nn.Module, fused: nn.Module, x: Tensor) -> dict[str, Any]:
    """Time the fused copy against the unchanged network in channels_last, in turn; converts ``model`` to
    that.

    Uses the processor time of the one computing thread: another network runs at the same time, and on a
    busy machine a wall clock would also measure waiting.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {"eager": [], "fused": []}
    runs = {"eager": model, "fused": fused}
    with torch.inference_mode():
        calls = {name: calls_of(run, x) for name, run in runs.items()}
        ends = time.process_time() + TIMES_SECONDS
        for number in range(ROUNDS):
            if number >= 3 and time.process_time() > ends:
                break
            for name, run in runs.items():
                begin = time.process_time()
                for _ in range(calls[name]):
                    run(x)
                seconds[name].append((time.process_time() - begin) / calls[name])
    ratios = sorted(one / other for one, other in zip(seconds["eager"], seconds["fused"], strict=True))
    low, middle, high = quantiles(ratios, n=4)
    return {
        "eager_ms": float(f"{1e3 * median(seconds['eager']):.3g}"),
        "fused_ms": float(f"{1e3 * median(seconds['fused']):.3g}"),
        "speedup": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
    }


def calls_of(run: nn.Module, x: Tensor) -> int:
    """Return the number of calls in a round, after a warm-up.

    It is doubled until the calls take a measurable part of the round: if the system counts a process's
    time in steps, one short call may seem to take none.
    """
    for _ in range(2):
        run(x)
    calls = 1
    while True:
        begin = time.process_time()
        for _ in range(calls):
            run(x)
        seconds = time.process_time() - begin
        if seconds >= ROUND_SECONDS / 4:
            return max(1, round(calls * ROUND_SECONDS / seconds))
        calls *= 2


def methods_record(model: nn.Module, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return which layers each method takes and why it skips others; and a few cheap layers to fit."""
    found: dict[str, Any] = {}
    chosen: dict[str, list[str]] = {}
    calibration = few_images(size)
    for name, method in METHODS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                context, layers, skipped = prepare(model, method, calibration=calibration)
                said = {layer.name: method.refuse(layer, context) for layer in layers}
        except Exception as error:  # noqa: BLE001 - as in fused_record
            found[name] = failed(error)
            continue
        taken = [layer for layer in layers if said[layer.name] is None]
        left = [*skipped.values(), *(reason for reason in said.values() if reason is not None)]
        found[name] = {"takes": len(taken), "leaves": reasons(left)}
        others = {other for names in chosen.values() for other in names}
        chosen[name] = cheapest(taken, others, context.pairs)
    return found, chosen


def few_images(size: tuple[int, int]) -> list[Tensor]:
    """Return eight images in two batches; four if they are larger than the zoo's."""
    batch = 4 if max(size) <= 128 else 2
    return [images(size, batch, seed) for seed in (1, 2)]


def cheapest(layers: Sequence[Layer], taken: set[str], pairs: Sequence[tuple[Layer, Layer]]) -> list[str]:
    """Return a pair, if there are pairs, and two more layers outside pairs, those with the fewest weights."""
    free = [layer for layer in layers if layer.name not in taken]
    names = {layer.name for layer in free}
    whole = [pair for pair in pairs if pair[0].name in names and pair[1].name in names]
    both = min(whole, key=lambda pair: weights_of(*pair), default=())
    paired = {layer.name for pair in pairs for layer in pair}
    singles = sorted((x for x in free if x.name not in paired), key=weights_of)
    return [layer.name for layer in (*both, *singles[:2])]


def weights_of(*layers: Layer) -> int:
    """Return the number of weights of some layers together."""
    return sum(parameter.numel() for layer in layers for parameter in layer.module.parameters())


def accelerated_record(
    model: nn.Module, build: Build, size: tuple[int, int], chosen: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Check a copy in which each method fitted a few layers to eight images: fused, and as an artifact."""
    calibration = few_images(size)
    found: dict[str, Any] = {"replaced": {}}
    for name, names in chosen.items():
        if names:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made = qx.accelerate(model, METHODS[name], where=names, calibration=calibration)
            except Exception as error:  # noqa: BLE001 - as in fused_record
                found[name] = failed(error)
                continue
            model = made.model
            found["replaced"][name] = len(made.replaced)
            if made.skipped and (late := {n: r for n, r in made.skipped.items() if n in names}):
                found[name] = {"leaves": reasons(late.values())}
    if not sum(found["replaced"].values()):
        return found
    found["fused"] = fused_record(model, [size])[0]
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            qx.save(model, Path(folder) / "model", factory="zoo:build")
            again = qx.load(Path(folder) / "model", factory=build)
            x = images(size, 1)
            off = distance(again(x), model(x))
    except Exception as error:  # noqa: BLE001 - as in fused_record
        found["artifact"] = failed(error)
    else:
        found["artifact"] = {"answer": "equal" if off == 0 else "wrong", "error": shortened(off)}
    return found


def failed(error: BaseException) -> dict[str, Any]:
    """Return the record of a call that raised: refused with a sentence, or an error."""
    kind = "refused" if is_refusal(error) else "error"
    return {"answer": kind, "sentence": f"{type(error).__name__}: {sentence(error)}", "at": place(error)}


def reasons(said: Iterable[str]) -> dict[str, int]:
    """Count each reason, ignoring the names and numbers in it."""
    named = (re.sub(r"'[^']*'", "'...'", text) for text in said)
    plain = (
        re.sub(r"\b1 x 1\b|\d+(\.\d+)?", lambda m: m[0] if " x " in m[0] else "n", text) for text in named
    )
    return dict(Counter(plain).most_common())


def examine(entry: Entry, done: Callable[[str, Any], None]) -> None:
    """Examine one network; ``done`` gets each part as soon as it is known."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        model, build, sizes = prepared(entry)
    except Exception as error:  # noqa: BLE001 - not our error, and no output to check
        done("unusable", sentence(error))
        return
    done("params", sum(p.numel() for p in model.parameters()))
    done("sizes", [list(size) for size in sizes])
    with torch.no_grad():
        answer = model(images(sizes[0], 2))
    if not all(t.isfinite().all() for t in tensors(answer)) or spread_of(answer) < DULL:
        done("unusable", f"random weights give answers that show nothing (spread {spread_of(answer):.2g})")
        return
    done("spread", shortened(spread_of(answer)))
    record, fused = fused_record(model, sizes)
    done("fuse", record)
    kinds = kinds_called(model, images(sizes[0], 1))
    if fused is not None:
        left = kinds_called(fused, images(sizes[0], 1))
        done("convs", {"all": kinds.total(), "programs": kinds.total() - left.total(), "torch": dict(left)})
    else:
        done("convs", {"all": kinds.total(), "programs": 0, "torch": dict(kinds)})
    taken, chosen = methods_record(model, sizes[0])
    done("methods", taken)
    if sum(p.numel() for p in model.parameters()) <= LARGE:
        done("accelerated", accelerated_record(model, build, sizes[0], chosen))
    if fused is not None and record["answer"] == "equal":
        done("time", times_record(model, fused, images(sizes[-1], 1)))
    done("seconds", round(time.perf_counter() - started, 1))


# ---------------------------------------------------------------- all of them


@dataclass
class _Running:
    entry: Entry
    process: Any
    pipe: Connection
    ends: float
    row: dict[str, Any] = field(default_factory=dict)
    doing: str = "begin"


def _child(examiner: Callable[..., None], entry: Entry, pipe: Connection, limit: float) -> None:
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), most))

    def done(part: str, value: Any) -> None:
        pipe.send((part, value))

    examiner(entry, done)
    pipe.send(("end", True))


def rows_of(
    entries: Sequence[Entry],
    *,
    jobs: int,
    limit: float,
    examiner: Callable[..., None] = examine,
) -> Iterator[dict[str, Any]]:
    """Yield a row per network, in order of completion; each in its own process, ``jobs`` at a time."""
    context: Any = multiprocessing.get_context("fork")  # the libraries are imported once
    waiting, running = list(entries), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            entry = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(examiner, entry, theirs, limit), daemon=True)
            process.start()
            theirs.close()
            running.append(
                _Running(entry, process, ours, time.monotonic() + CLOCK * limit, {"name": entry.name})
            )
        multiprocessing.connection.wait([r.pipe for r in running], timeout=0.5)
        for one in list(running):
            if (row := _ended(one, limit)) is not None:
                running.remove(one)
                yield row


def _ended(one: _Running, limit: float) -> dict[str, Any] | None:
    """Return the row of a process that is over, or must end; None while it works."""
    try:
        while one.pipe.poll():
            part, value = one.pipe.recv()
            if part == "end":
                one.process.join()
                return one.row
            one.row[part] = value
    except EOFError:
        one.process.join()
        if one.process.exitcode == -signal.SIGXCPU:
            return {**one.row, "stopped": f"timeout: {limit:g} s, after {last_part(one.row)}"}
        return {**one.row, "stopped": f"crash: exit code {one.process.exitcode} after {last_part(one.row)}"}
    if time.monotonic() < one.ends:
        return None
    one.process.kill()
    one.process.join()
    return {**one.row, "stopped": f"timeout: {limit:g} s, after {last_part(one.row)}"}


def last_part(row: Mapping[str, Any]) -> str:
    """Return the name of the last part in a row."""
    return list(row)[-1]


def faults(row: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a row, one sentence per fault; a refusal is not a fault."""
    found = [f"{row['name']}: {row['stopped']}"] if "stopped" in row else []
    for part, record in answers_of(row):
        if record.get("answer") in FAULTS:
            said = record.get("sentence") or f"relative error {record.get('error')}"
            found.append(f"{row['name']}: {part}: {record['answer']}: {said}")
    return found


def answers_of(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of a row that can hold an output, with their subjects."""
    made = row.get("accelerated", {})
    yield "fuse", row.get("fuse", {})
    for name in METHODS:
        yield name, row.get("methods", {}).get(name, {})
        yield f"accelerate by {name}", made.get(name, {})
    yield "accelerated, fused", made.get("fused", {})
    yield "accelerated, saved and loaded", made.get("artifact", {})


def line_of(row: Mapping[str, Any]) -> str:
    """Return a row as text for people."""
    if "unusable" in row:
        return f"{row['name']}: left out: {row['unusable']}"
    parts = [f"{row['name']}:"]
    fuse = row.get("fuse", {})
    parts.append(f"{fuse.get('answer', '?')} {fuse.get('error', '')}".strip())
    if "convs" in row:
        parts.append(f"{row['convs']['programs']}/{row['convs']['all']} in programs")
    if "time" in row:
        parts.append(f"{row['time']['speedup']}x")
    for name, record in row.get("methods", {}).items():
        parts.append(f"{name} {record.get('takes', record.get('answer'))}")
    if "accelerated" in row:
        parts.append(f"artifact {row['accelerated'].get('artifact', {}).get('answer', 'none')}")
    if "seconds" in row:
        parts.append(f"{row['seconds']} s")
    return "  ".join(parts) + "".join(f"\n    {fault}" for fault in faults(row))


def versions_of() -> dict[str, str]:
    """Return the versions of the libraries with these networks."""
    packages = [package for package, _ in LIBRARIES.values()]
    return {package: version(package) for package in packages if find_spec(package) is not None}


def digest_of_code() -> str:
    """Return a digest of quincunx's own files and this one: rows of other code are computed again."""
    digest = hashlib.sha256()
    package = Path(qx.__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so"), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def kept_rows(side: Path, made_by: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return finished rows of an interrupted run with the same code and libraries; skip a torn last line."""
    if not side.is_file():
        return []
    found = [json.loads(line) for line in side.read_text(encoding="utf-8").split("\n")[:-1]]
    return found[1:] if found and found[0] == made_by else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="names of library/architecture, such as 'timm/res*'")
    parser.add_argument("--jobs", type=int, default=2, help="networks at a time, one thread each")
    parser.add_argument("--limit", type=float, default=180, help="processor seconds a network may take")
    parser.add_argument("--out", type=Path, help="default: results/zoo.json, of some a temporary one")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries, missing = catalogue(given.only)
    if len(missing) == len(LIBRARIES):
        print(f"skipped: {', '.join(missing)} are not installed, so there are no networks to run")
        return 0
    if missing:
        print(f"{', '.join(missing)}: not installed, its networks are left out")
    if given.list:
        print(*(entry.name for entry in entries), sep="\n")
        return 0
    if not entries:
        parser.error(f"--only {given.only!r}: no network has such a name")
    whole = given.only == "*"
    out = given.out or (ROOT / "results" if whole else Path(tempfile.gettempdir())) / "zoo.json"
    return run(entries, out, only=given.only, jobs=given.jobs, limit=given.limit)


def run(entries: Sequence[Entry], out: Path, *, only: str, jobs: int, limit: float) -> int:
    """Compute all rows, continuing from an earlier run; write the result's file and return the exit code."""
    made_by = {"code": digest_of_code(), "torch": torch.__version__, "only": only, **versions_of()}
    side = out.with_name(f".{out.name}.part")
    rows = kept_rows(side, made_by)
    have = {row["name"] for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with side.open("w", encoding="utf-8") as file:
        for line in (made_by, *rows):
            print(json.dumps(line), file=file, flush=True)
        left = [entry for entry in entries if entry.name not in have]
        for number, row in enumerate(rows_of(left, jobs=jobs, limit=limit), len(rows) + 1):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            print(f"[{number}/{len(entries)}] {line_of(row)}", flush=True)
    order = {entry.name: i for i, entry in enumerate(entries)}
    rows.sort(key=lambda row: order[row["name"]])
    head = {
        "schema": 1,
        "kind": "zoo",
        "how": "random weights, float32; processor time of one thread, batch 1, eager in channels_last",
        "seed": SEED,
        "tolerance": TOLERANCE,
        "batches": list(BATCHES),
        "methods": {name: repr(method) for name, method in METHODS.items()},
        "backend": str(qx.backend()),
        "jobs": jobs,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "environment": {**environment(), **versions_of()},
    }
    write_json(out, {**head, "rows": rows})
    side.unlink()
    wrong = [fault for row in rows for fault in faults(row)]
    print(summary(rows), *wrong, sep="\n")
    return int(bool(wrong))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line about all rows."""
    answers = Counter(row["fuse"]["answer"] for row in rows if "fuse" in row)
    told = ", ".join(f"{count} {answer}" for answer, count in answers.most_common())
    return f"{len(rows)} networks: {told}"


if __name__ == "__main__":
    sys.exit(main())
