"""The trained network that a verb works on: an artifact, published weights, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import typer
from torch import nn

import quincunx as qx
from quincunx.cli.options import (
    artifact_in,
    build_from,
    parse_input,
    with_training_normalisation,
)
from quincunx.cli.task import error_words, imported
from quincunx.data import ImageData
from quincunx.deployment.onnx_in import has_channels_last, is_channels_last
from quincunx.measure.tasks import Task, classification
from quincunx.modules import inference_mode_of
from quincunx.networks.artifact import check_state
from quincunx.networks.checkpoints import read_weights
from quincunx.networks.spec import note_factory, read_spec
from quincunx.networks.weights import fill_parameters
from quincunx.train.evaluation import check_channels, check_finite, check_scores


@dataclass(frozen=True)
class NetworkOptions:
    """The trained network that a verb works on."""

    section: ClassVar[str] = "Network"

    network: Annotated[
        str | None,
        typer.Argument(
            help="Folder of an artifact or of a run, a network's name with --weights, or an ONNX file."
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Your own network instead: a function that returns it, as package.module:function; of an "
            "artifact that was made from an ONNX file, that file."
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(
            help="File of weights of the named network or of --model; for --model also an artifact."
        ),
    ] = None
    input_shape: Annotated[
        str | None,
        typer.Option("--input", help="Input shape, NxCxHxW; the network is run on it before data are read."),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(help="Mean of each channel in the network's training, in [0, 1], separated by commas."),
    ] = None
    std: Annotated[str | None, typer.Option(help="Standard deviation of each channel, as --mean.")] = None

    def load(self, seed: int = 0) -> Trained:
        """As :func:`load_trained`."""
        return load_trained(self.network, self.weights, self.model, self.input_shape, seed)

    def load_to_score(self) -> Trained:
        """As :func:`score_network`."""
        place = None if self.network is None else Path(self.network)
        return score_network(place, self.weights, self.model, self.input_shape)

    def load_other(self, folder: Path) -> nn.Module:
        """Return the network of another artifact, which --model may have made as well.

        Raises:
            ValueError: as :func:`read_artifact`.
        """
        if self.model is not None and _maker_of(folder) is not None:
            return build_own_network(self.model, folder).model
        return read_artifact(folder)


@dataclass(frozen=True)
class Trained:
    """A network, the file or folder whose normalisation it was trained with, and the input it takes."""

    model: nn.Module
    start: Path | None
    shape: tuple[int, ...] | None = None

    def suited(
        self,
        images: ImageData,
        mean: str | None = None,
        std: str | None = None,
        task: Task | None = None,
    ) -> ImageData:
        """The images as the network was trained to see them, once it has taken one of that size.

        Raises:
            ValueError: they have another size, other channels or other classes than the network.
        """
        if (mean is None) != (std is None):
            raise ValueError("mean, std: give both or none")
        images = with_training_normalisation(images, self.start)
        check_channels(self.model, images)
        shape = (images.in_channels, *images.size)
        if self.shape is not None and self.shape[1:] != shape:
            raise ValueError(
                f"input={_times(self.shape)!r}: the images of {images.name} are {_times(shape)} (--size says "
                "how large)"
            )
        output = _run_once(self.model, (1, *shape))
        if (task or classification()).classifies:
            check_scores(output, images)
        if mean is None or std is None:
            return images
        means, deviations = _each("mean", mean, shape[0]), _each("std", std, shape[0])
        if min(deviations) <= 0:
            raise ValueError(f"std={std!r}: expected numbers above 0")
        for name, text, values in (("mean", mean, means), ("std", std, deviations)):
            if min(values) < 0 or max(values) > 1:
                scaled = ",".join(f"{value / 255:.3f}" for value in values)
                raise ValueError(
                    f"{name}={text!r}: expected numbers in [0, 1], the scale of the pixels; those of "
                    f"pixels from 0 to 255 become {scaled}"
                )
        return replace(images, mean=means, std=deviations)


def load_trained(
    network: str | None, weights: Path | None, model: str | None, shape: str | None, seed: int = 0
) -> Trained:
    """The network of an artifact or a run, a named one with its published weights, or the user's own.

    Args:
        network: folder or name; None with ``model``.
        weights: file, or for ``model`` also the folder of an artifact.
        model: "package.module:function"; None with ``network``.
        shape: that the network is tried with, as NxCxHxW.
        seed: set before the user's function is called.

    Raises:
        ValueError: none or both of the two; a function that cannot be imported or called, or returns no
            network; weights that do not fit; an input that the network refuses.
        FileNotFoundError: no such weights.
    """
    if (network is None) == (model is None):
        raise ValueError(
            "network, model: give one of them: the folder of an artifact or a run, or a network's name; or "
            "--model package.module:function"
        )
    taken = None if shape is None else parse_input(shape)
    if model is None and str(network).endswith(".onnx"):
        model = network
    if model is not None:
        found = build_own_network(model, weights, seed, taken)
    elif weights is not None:
        found = Trained(build_from(str(network), weights, {}), weights)
    elif Path(str(network)).is_dir():
        found = Trained(read_artifact(Path(str(network))), Path(str(network)))
    else:
        raise ValueError(
            f"network={network!r}: not the folder of an artifact or a run; {_instead(str(network))}"
        )
    check_finite(found.model)
    if taken is not None:
        taken = _as_images(taken, getattr(found.model, "onnx_maps", None) is not None)
        _run_once(found.model, taken)
    elif fixed := getattr(found.model, "onnx_size", None):
        taken = (1, *fixed)
    return replace(found, shape=taken)


def _instead(given: str) -> str:
    """What a text that is no folder may stand for."""
    if ":" in given:
        return f"a function that returns your network is given as --model {given}"
    return "a network's name needs --weights"


def score_network(
    artifact: Path | None, weights: Path | None, model: str | None, shape: str | None
) -> Trained:
    """As :func:`load_trained`, for a verb that takes an artifact, with or without the function that makes it.

    With ``weights`` a network's name may stand for the artifact.

    Raises:
        ValueError, FileNotFoundError: as :func:`load_trained`; ``artifact`` and ``weights``.
    """
    if artifact is None:
        if model is None:
            raise ValueError("artifact, model: give the folder of an artifact or a run, or --model")
        return load_trained(None, weights, model, shape)
    if weights is not None:
        if model is not None:
            raise ValueError(f"weights={str(weights)!r}: {artifact} or --weights, not both, with --model")
        if artifact.is_dir():
            raise ValueError(f"weights={str(weights)!r}: the artifact in {artifact} has its own")
        return load_trained(str(artifact), weights, None, shape)
    if model is not None:
        return load_trained(None, artifact, model, shape)
    if artifact.suffix == ".onnx":
        return load_trained(str(artifact), None, None, shape)
    if not artifact.exists():
        raise ValueError(f"{artifact}: no such folder; {_instead(str(artifact))}")
    found, taken = read_artifact(artifact), None if shape is None else parse_input(shape)
    check_finite(found)
    return Trained(found, artifact, taken)


def read_artifact(folder: Path) -> nn.Module:
    """The network of an artifact or a run.

    Raises:
        ValueError: as ``qx.load``; an artifact of the user's own network says how to name its function.
    """
    if (named := _maker_of(folder)) is not None:
        raise ValueError(
            f"{folder}: holds a network made by {named!r}, and nothing that a file names is imported; "
            f"if you trust that module: --model {named} --weights {folder}"
        )
    return qx.load(artifact_in(folder))


def _maker_of(folder: Path) -> str | None:
    """The function or the ONNX file that made the network of an artifact, if one did."""
    described = read_spec(artifact_in(folder)).get("model")
    if not isinstance(described, dict) or described.get("kind") != "factory":
        return None
    return str(described.get("onnx") or described.get("factory"))


def build_own_network(
    text: str, weights: Path | None, seed: int = 0, shape: tuple[int, ...] | None = None
) -> Trained:
    """The network of the user's function, in evaluation mode, with its factory noted.

    An ONNX file that leaves sizes free is compared with ONNX Runtime on an input of ``shape``.

    Raises:
        ValueError, FileNotFoundError: as :func:`load_trained`.
    """
    make = _maker(text, shape)
    torch.manual_seed(seed)
    if weights is not None and weights.is_dir():
        model, start = qx.load(artifact_in(weights), factory=make), weights
    else:
        model, start = make(), None
        if weights is not None:
            state = read_weights(weights, known=model.state_dict())
            fill_parameters(model, state, f"{weights}: does not fit {text}")
    check_state(model)
    return Trained((model if _is_onnx(text) else note_factory(model, text)).eval(), start)


def _is_onnx(text: str) -> bool:
    return text.endswith(".onnx")


def _read_onnx(text: str, shape: tuple[int, ...] | None) -> nn.Module:
    nchw = has_channels_last(text)
    try:
        return qx.from_onnx(text, nchw=nchw)
    except ValueError:
        # the shape says what the file leaves free; one that fixes its sizes is compared at those
        if shape is None:
            raise
        return qx.from_onnx(text, torch.randn(_as_images(shape, nchw)), nchw=nchw)


def _as_images(shape: tuple[int, ...], nchw: bool) -> tuple[int, ...]:
    """The shape [N, C, H, W] of images, for a network that is given these in place of its file's layout."""
    return (shape[0], shape[3], *shape[1:3]) if nchw and is_channels_last(shape) else shape


def _maker(text: str, shape: tuple[int, ...] | None = None) -> Callable[[], nn.Module]:
    """The user's function, whose failures are bad input and no defect of the library.

    Raises:
        ValueError: it cannot be imported, or is none.
    """
    if _is_onnx(text):
        return lambda: _read_onnx(text, shape)
    function = imported(text, "model")
    if isinstance(function, nn.Module):
        kind = type(function).__name__
        raise ValueError(f"model={text!r}: is of type {kind}, expected a function that returns the network")

    def make() -> nn.Module:
        try:
            made: object = function()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"model={text!r}: calling it without arguments raised {error_words(error)}"
            ) from error
        if not isinstance(made, nn.Module):
            raise ValueError(f"model={text!r}: returned a {type(made).__name__}, expected a torch.nn.Module")
        return made

    return make


def _run_once(model: nn.Module, shape: tuple[int, ...]) -> object:
    """What a network answers to zeros of a shape.

    Raises:
        ValueError: it refuses them.
    """
    with inference_mode_of(model):
        try:
            return model(torch.zeros(shape))
        # a network of the user may raise anything
        except Exception as error:
            raise ValueError(f"model: refuses an input of {_times(shape)}: {error_words(error)}") from error


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _each(name: str, text: str, channels: int) -> tuple[float, ...]:
    """One number a channel; one alone stands for all."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, channels) or not all(map(math.isfinite, numbers)):
        many = "a number" if channels == 1 else f"{channels} numbers with commas"
        raise ValueError(f"{name}={text!r}: expected {many}, such as 0.5")
    return numbers * (channels if len(numbers) == 1 else 1)
