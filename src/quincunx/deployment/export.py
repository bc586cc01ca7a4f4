"""``qx.export``: a network as a file for an engine, compared with the network and timed there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quincunx.deployment.baseline import dense_twin, describe_layers
from quincunx.deployment.formats import Format, format_for
from quincunx.deployment.lowering import Node, OnnxNode, TorchNode, decoded, lower
from quincunx.deployment.onnx_in import as_in_file
from quincunx.deployment.usage import lines_to_use
from quincunx.deployment.verification import Candidate, Found, difference, drawn_like, run_apart
from quincunx.deployment.writers import WRITERS, Traced, Write, check_names, onnx_writer, trace_for_export
from quincunx.fusion.fuse import fuse, fuse_shared
from quincunx.fusion.fused import Fused
from quincunx.measure.cost import cost
from quincunx.measure.environment import environment
from quincunx.modules import copied
from quincunx.ops.libraries import library_path
from quincunx.writing import work_beside

__all__ = ["ExportFailed", "Exported", "export"]

_NODES: dict[str, Node] = {"onnx": OnnxNode, "openvino": OnnxNode, "torch": TorchNode, "aoti": TorchNode}
_BATCHES = (1, 2, 7)


class ExportFailed(RuntimeError):
    """A file answers otherwise than the network or is not faster than the dense one; nothing was written.

    Example:
        >>> raise ExportFailed("fast.onnx: not faster")
        Traceback (most recent call last):
        ...
        quincunx.deployment.export.ExportFailed: fast.onnx: not faster
    """


class NotFaster(ExportFailed):
    """A file is right but not faster than the dense network; it would be written with ``force=True``.

    Args:
        found: what was measured, as a sentence without its full stop.
        plugin: whether our kernels ran in it.
    """

    def __init__(self, found: str, plugin: bool) -> None:
        self.found, self.plugin = found, plugin
        super().__init__(self.advising("plugin=True", "force=True"))

    def advising(self, plugin: str, force: str) -> str:
        """Return the sentence with what to write for the two remedies."""
        kernels = "" if self.plugin else f"{plugin} runs our kernels in it, "
        return f"{self.found}; nothing was written; {kernels}{force} writes it all the same"


@dataclass(frozen=True)
class Exported:
    """What :func:`quincunx.export` wrote and measured.

    Attributes:
        path: the file; OpenVINO's has a .bin beside it, ONNX's beyond 2 GB a .data.
        format: name of the format.
        plugin: whether the engine runs our kernels in it.
        inputs, outputs: names.
        dynamic_batch: whether the batch is free.
        size: bytes of all files.
        macs: multiply-adds of one image, and "dense" those of the dense network.
        difference: the largest deviation from the network, relative to the largest value of an
            output, by batch.
        times: median milliseconds by candidate: "ours", "dense", and others that run here.
        speedup: time of the dense network over ours in the same engine, median of the rounds; None if the
            network has no layer of this package and the file no kernel of it, with ``rounds=0``, or if the
            engine does not run the dense network.
        faster: other candidates that were faster than ours, and by which factor.
        lines: how to load it, for "Python" and "C++".
        dtype: what our kernels compute in.

    Example:
        >>> made = Exported(Path("a.onnx"), "onnx", False, ("x",), ("y",), True, 9, {}, {}, {}, 1.5, {}, {})
        >>> made.sentence()
        'a.onnx: 1.50x as fast as the dense network in ONNX Runtime, as plain operators'
    """

    path: Path
    format: str
    plugin: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    size: int
    macs: dict[str, int]
    difference: dict[int, float]
    times: dict[str, float]
    speedup: float | None
    faster: dict[str, float]
    lines: dict[str, list[str]] = field(repr=False)
    dtype: str = "float32"

    def sentence(self) -> str:
        """Return how fast the file is, and what is faster on this machine."""
        engine = _ENGINES[self.format]
        how = "with our kernels" if self.plugin else "as plain operators"
        how += "" if self.dtype == "float32" else f" in {self.dtype}"
        if self.speedup is not None:
            text = f"{self.path}: {self.speedup:.2f}x as fast as the dense network in {engine}, {how}"
        elif self.plugin or "dense" in self.macs:
            text = f"{self.path}: for {engine}, {how}, not timed beside the dense network"
        else:
            text = f"{self.path}: dense operators for {engine}"
        for name, factor in self.faster.items():
            text += f"; {name} is {factor:.2f}x as fast as this here"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "path": str(self.path)}


_ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch", "aoti": "AOTInductor"}


def export(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    format: str | None = None,
    plugin: bool = False,
    dtype: torch.dtype | None = None,
    calibration: Any = None,
    baseline: nn.Module | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    opset: int = 18,
    external_data: bool = False,
    tolerance: float | None = None,
    force: bool = False,
    threads: int | None = None,
    rounds: int = 11,
) -> Exported:
    """Write a network as a file for another engine, checked and timed in that engine.

    The network is fused and then written in one of two ways. As plain operators any engine reads it: sampled
    convolutions at cosets become convolutions of larger stride, those at masks gathered rows times a matrix.
    With ``plugin`` each of its programs is one operator that our kernels run inside the engine, which needs
    our library there. Sizes of maps are those of the example; the batch is free.

    The file is then loaded by its engine in a new process, with all of the engine's optimisations, and
    compared with the network on inputs drawn from the example's values (half to one and a half of an example
    of one value, normal ones for zeros), in batches of 1, 2 and 7; a file in eight bits is compared with the
    fused network in eight bits, whose integers it has. It is timed there beside the dense network in the same
    format, in turn. A file that is not faster is not written unless forced.

    Args:
        model: a network on the CPU that :func:`quincunx.fuse` takes, with float32 weights.
        path: of the file; its ending names the format if ``format`` is None: .onnx, .xml (OpenVINO), .pt2
            (torch.export), .aoti.pt2 (AOTInductor).
        example_input: its input [N, C, H, W], or a tuple of inputs.
        format: "onnx", "openvino", "torch" or "aoti".
        plugin: whether our kernels compute inside the engine.
        dtype: with ``plugin``, the number format of our kernels, ``torch.bfloat16`` or ``torch.int8``; inputs
            and outputs stay float32.
        calibration: for ``torch.int8``, and no other: images as of :func:`quincunx.fuse`. Left out for a
            network that :func:`quincunx.calibrate` made, or that was loaded as one.
        baseline: the dense network to be timed beside it; by default the network with a dense layer of
            the same settings in place of each layer of this package.
        input_names: by default those of the ONNX file that the network was read from; else "input", or
            "input0" and so on.
        output_names: likewise, or the keys of a dictionary or the fields of a named tuple that the network
            returns; else "output", or "output0" and so on. A file has a list of tensors: lists, tuples and
            dictionaries are taken apart.
        dynamic_batch: whether the batch is free.
        opset: of ONNX, 18 to 23; ONNX Runtime optimises less from 22 on.
        external_data: of ONNX, weights in a second file <name>.data, as always beyond 2 GB. ONNX Runtime maps
            it instead of keeping a copy of programs beside their packed weights.
        tolerance: largest accepted deviation, relative to the largest value of an output; by default
            1e-4, and 0.05 with ``dtype``.
        force: write a file that is not faster, too.
        threads: of the engine; by default torch's number.
        rounds: of timing; 0 times nothing, and then nothing is known of its speed.

    Raises:
        ValueError: a path, format, name, opset or type that does not fit; ``calibration`` that is missing,
            too small or needless; a package that is not installed; a network that torch.export cannot trace.
        TypeError: not a network, or one that cannot be fused; inputs that are not float32 tensors.
        ExportFailed: the engine refuses the file, or its answers differ, or it is not faster. An older
            file of that name stays.

    Example:
        >>> export(networks.build("rsbn8"), "model.tflite", torch.randn(1, 3, 32, 32))
        Traceback (most recent call last):
        ...
        ValueError: path='model.tflite': expected a file that ends in one of .onnx, .xml, .pt2, ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Fused):
        raise TypeError("model: a fused network; export the network that was given to qx.fuse")
    kind = format_for(path, format)
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: no folder {str(target.parent)!r}")
    kind.check()
    library = _library(kind) if plugin else None
    examples = _checked_examples(example_input)
    _check_settings(kind, plugin, dtype, calibration, external_data, rounds)
    limit = tolerance if tolerance is not None else 1e-4 if dtype in (None, torch.float32) else 0.05
    workers = torch.get_num_threads() if threads is None else threads
    own = copied(model, share=True).eval().requires_grad_(False)
    twin = baseline if baseline is not None else dense_twin(own)
    dense = copied(twin, share=True) if twin is not None else own
    # what was read with nchw=True is written in its file's layout again
    examples = as_in_file(examples, own, dense)
    answer = _answer(own, examples)
    inputs, results = _names(own, examples, answer, input_names, output_names)
    engines = decoded(own)
    fused = (
        fuse(engines, dtype, calibration=calibration, force=True)
        if dtype is not None
        else fuse_shared(engines)
    )
    used = fused.meta["dtype"]["used"] if dtype is not None else "float32"
    node = _NODES[kind.name] if plugin else None
    compared = rounds > 0 and (twin is not None or plugin)
    facts = {
        "quincunx": environment()["quincunx"],
        "format": kind.name,
        "plugin": plugin,
        "dtype": used,
        **({"int8": {**fused.meta["int8"], "rest": fused.meta["dtype"]["rest"]}} if used == "int8" else {}),
        **describe_layers(own),
        "macs": {"ours": _macs(own, examples), **({} if twin is None else {"dense": _macs(dense, examples)})},
        **_normalisation(model),
    }
    with work_beside(target) as folder:
        place = folder / target.name
        traced = trace_for_export(lower(fused, examples, node), examples, inputs, results, dynamic_batch)
        write = _written(path, traced, kind, opset, external_data, place, facts)
        candidates = [Candidate("ours", str(place), kind.engine, _loads(kind, library))]
        if compared:
            candidates += _dense_candidates(kind, dense, examples, folder, dynamic_batch, opset)
        sets = _inputs(examples, dynamic_batch)
        try:
            found = run_apart(candidates, sets, examples, threads=workers, rounds=rounds if compared else 0)
            gaps = _gaps(fused if used == "int8" else own, sets, found)
        except (RuntimeError, ValueError) as error:
            raise ExportFailed(f"{path}: {error}; nothing was written") from error
        if max(gaps.values()) > limit:
            raise ExportFailed(
                f"{path}: answers differ from the network's by {max(gaps.values()):.1e} of the largest "
                f"value, more than {limit:g}; nothing was written"
            )
        speedup = found.ratio("dense", "ours") if compared and found.times.get("dense") else None
        faster = _faster(found)
        made = Exported(
            path=Path(path),
            format=kind.name,
            plugin=plugin,
            inputs=inputs,
            outputs=results,
            dynamic_batch=dynamic_batch,
            size=0,
            macs=facts["macs"],
            difference=gaps,
            times={name: sorted(times)[len(times) // 2] for name, times in found.times.items() if times},
            speedup=speedup,
            faster=faster,
            lines=lines_to_use(
                kind.name,
                target.name,
                dict(zip(inputs, (tuple(x.shape) for x in examples), strict=True)),
                results,
                library,
            ),
            dtype=used,
        )
        if speedup is not None and speedup <= 1 and not force:
            raise NotFaster(made.sentence(), plugin)
        if kind.name != "aoti":
            # the same graph; a package of AOTInductor would have to be compiled again
            write(place, {**facts, "difference": max(gaps.values()), "speedup": speedup})
        for part in folder.iterdir():
            if part.name.startswith("dense."):
                part.unlink()
        size = sum(part.stat().st_size for part in folder.iterdir())
        for part in folder.iterdir():
            os.replace(part, target.parent / part.name)
    return Exported(**{**vars(made), "size": size})


# ---------------------------------------------------------------- before


def _checked_examples(given: Any) -> tuple[Tensor, ...]:
    examples = given if isinstance(given, tuple) else (given,)
    if not examples or not all(isinstance(x, Tensor) for x in examples):
        raise TypeError("example_input: expected a tensor or a tuple of tensors")
    for x in examples:
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() < 1 or not x.numel():
            raise TypeError(
                f"example_input: expected float32 tensors [N, ...] on the CPU, got {x.dtype} of shape "
                f"{list(x.shape)} on {x.device.type}"
            )
    if len({x.shape[0] for x in examples}) > 1:
        raise ValueError(f"example_input: batches differ, {[list(x.shape) for x in examples]}")
    return examples


def _check_settings(
    kind: Format, plugin: bool, dtype: torch.dtype | None, calibration: Any, external: bool, rounds: int
) -> None:
    if external and kind.name != "onnx":
        raise ValueError(f"external_data=True: files of format {kind.name} have their own place for weights")
    if dtype not in (None, torch.float32) and not plugin:
        raise ValueError(
            f"dtype={dtype}: plain operators are written in float32; the engine's own setting makes them "
            "faster, or plugin=True"
        )
    if calibration is not None and dtype != torch.int8:
        raise ValueError(f"calibration: dtype={dtype} needs none; it is for torch.int8")
    if rounds and rounds < 3:
        raise ValueError(f"rounds={rounds}: expected 0, or at least 3")


def _answer(model: nn.Module, examples: Sequence[Tensor]) -> Any:
    """
    Raises:
        ValueError: the network refuses the example.
    """
    try:
        with torch.no_grad():
            found = model(*examples)
    # a network of the user may raise anything
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in examples)
        raise ValueError(
            f"example_input: the network refuses {shapes}: {type(error).__name__}: {error}"[:500]
        ) from error
    return found


def _written(
    path: str | Path,
    traced: Traced,
    kind: Format,
    opset: int,
    external: bool,
    place: Path,
    facts: dict[str, Any],
) -> Write:
    """Write a file, and return the function that does it again with other metadata.

    Raises:
        ValueError: an opset that there is not.
        ExportFailed: the exporter fails.
    """
    try:
        write = onnx_writer(traced, opset, external) if external else WRITERS[kind.name](traced, opset)
        write(place, facts)
    except ValueError:
        raise
    # exporters and compilers have exceptions of their own
    except Exception as error:
        raise ExportFailed(f"{path}: the exporter of format {kind.name} failed: {_cause(error)}") from error
    return write


def _cause(error: BaseException) -> str:
    """Return what an exception goes back to, in one line, and the node at which an exporter met it."""
    node = ""
    while True:
        found = re.search(r"translating node %(\w+)", str(error))
        node = f" (at the node {found[1]})" if found else node
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None:
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return f"{type(error).__name__}: {said}"[:400] + node
        error = before


def _tensors(found: Any) -> list[Tensor]:
    """The outputs in the order of the file's: a file has a list of tensors, whatever holds them here.

    Raises:
        TypeError: the network returns something else.
    """
    values = pytree.tree_leaves(found)
    if not values or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(dict.fromkeys(type(value).__name__ for value in values)) or "nothing"
        raise TypeError(f"model: returns {kinds}; an exported network returns tensors")
    return values


def _names(
    model: nn.Module,
    examples: Sequence[Tensor],
    answer: Any,
    given: Sequence[str] | None,
    results: Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kept, outputs = getattr(model, "onnx_names", {}), len(_tensors(answer))
    named = answer if isinstance(answer, Mapping) else getattr(answer, "_fields", ())
    keys = list(named) if len(named) == outputs else []
    chosen = results is not None
    if results is None and keys and all(isinstance(key, str) and key.isidentifier() for key in keys):
        results = keys
    if given is None:
        given = kept.get("inputs") or (
            ["input"] if len(examples) == 1 else [f"input{number}" for number in range(len(examples))]
        )
    if results is None:
        results = kept.get("outputs") or (
            ["output"] if outputs == 1 else [f"output{number}" for number in range(outputs)]
        )
    inputs = check_names("input_names", given, len(examples))
    if not chosen:
        # no file has one name for both
        results = [f"{name}_output" if name in inputs else name for name in results]
    names = check_names("output_names", results, outputs)
    if both := set(inputs) & set(names):
        raise ValueError(f"input_names, output_names: {min(both)!r} is in both")
    return inputs, names


def _normalisation(model: nn.Module) -> dict[str, Any]:
    see = getattr(model, "preprocess", None)
    mean, std = getattr(see, "mean", None), getattr(see, "std", None)
    return {"mean": list(mean), "std": list(std)} if mean is not None and std is not None else {}


def _macs(model: nn.Module, examples: Sequence[Tensor]) -> int:
    # a network may fix its batch
    whole = cost(model, tuple(examples) if len(examples) > 1 else examples[0]).macs
    return whole // examples[0].shape[0]


# ---------------------------------------------------------------- candidates and answers


def _library(kind: Format) -> str:
    """The path of the library that has our kernels for an engine.

    Raises:
        ValueError: it was not built.
    """
    if kind.name in ("onnx", "openvino"):
        try:
            return library_path("quincunx_ort" if kind.name == "onnx" else "quincunx")
        except FileNotFoundError as error:
            raise ValueError(f"plugin=True: {error}") from None
    found = find_spec("quincunx._native")
    if found is None or found.origin is None:
        raise ValueError("plugin=True: the native back end was not built; see quincunx info")
    return found.origin


def _loads(kind: Format, library: str | None) -> tuple[str, ...]:
    """What the engine's process loads: OpenVINO's operation in Python is a module over the library."""
    if library is None:
        return ()
    return ("quincunx.openvino",) if kind.name == "openvino" else (library,)


def _dense_candidates(
    kind: Format,
    dense: nn.Module,
    examples: tuple[Tensor, ...],
    folder: Path,
    dynamic: bool,
    opset: int,
) -> list[Candidate]:
    """The dense network in the same format, and where OpenVINO is installed in its formats."""
    own = copied(dense, share=True).eval().requires_grad_(False)
    names = [f"input{number}" for number in range(len(examples))]
    with torch.no_grad():
        count = len(_tensors(own(*examples)))
    outputs = [f"output{number}" for number in range(count)]
    traced = trace_for_export(lower(fuse_shared(own), examples), examples, names, outputs, dynamic)
    place = folder / f"dense.{kind.name}{kind.suffix}"
    WRITERS[kind.name](traced, opset)(place, {})
    found = [Candidate("dense", str(place), kind.engine)]
    if kind.name in ("onnx", "openvino") and find_spec("openvino") is not None:
        found += [
            Candidate(f"OpenVINO {words} of the dense network", str(place), "openvino", (), precision)
            for words, precision in (("float32", "f32"), ("bfloat16", "bf16"))
            if (kind.name, precision) != ("openvino", "f32")
        ]
    return found


def _inputs(examples: Sequence[Tensor], dynamic: bool) -> list[tuple[Tensor, ...]]:
    """Random inputs like the examples, in other batches where the batch is free."""
    source = torch.Generator().manual_seed(1)
    batches = _BATCHES if dynamic else (examples[0].shape[0],)
    return [tuple(drawn_like(x, (batch, *x.shape[1:]), source) for x in examples) for batch in batches]


def _gaps(model: nn.Module, sets: Sequence[tuple[Tensor, ...]], found: Found) -> dict[int, float]:
    gaps = {}
    for inputs, answers in zip(sets, found.answers, strict=True):
        with torch.no_grad():
            gaps[inputs[0].shape[0]] = difference(answers, _tensors(model(*inputs)))
    return gaps


def _faster(found: Found) -> dict[str, float]:
    ours = found.times.get("ours") or []
    others = [name for name, times in found.times.items() if name not in ("ours", "dense") and times]
    ratios = {name: 1 / found.ratio(name, "ours") for name in others} if ours else {}
    return {name: ratio for name, ratio in ratios.items() if ratio > 1}
