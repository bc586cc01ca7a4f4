"""The formats that networks are exported to: one table."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = ["FORMATS", "Format", "format_for"]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: as ``qx.export(format=...)`` takes it.
        title: for people.
        suffix: how its files end.
        needs: packages that write, load and check it.
        engine: that loads it to be verified and timed.
        dynamic: whether its batch may be free.
        loads: what reads such a file, besides ``engine``.
    """

    name: str
    title: str
    suffix: str
    needs: tuple[str, ...]
    engine: str
    dynamic: bool
    loads: str

    def check(self) -> None:
        """
        Raises:
            ValueError: a package that it needs is not installed.
        """
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"format={self.name!r}: needs {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed; pip install 'quincunx[export]'"
            )


FORMATS = {
    made.name: made
    for made in (
        Format(
            "onnx",
            "ONNX",
            ".onnx",
            ("onnx", "onnxscript", "onnxruntime"),
            "onnxruntime",
            True,
            "OpenVINO and other engines that read ONNX",
        ),
        Format(
            "openvino",
            "OpenVINO",
            ".xml",
            ("openvino", "onnx", "onnxscript"),
            "openvino",
            True,
            "OpenVINO only",
        ),
        Format("torch", "torch.export", ".pt2", (), "torch", True, "PyTorch of this or a later release"),
        Format(
            "aoti",
            "AOTInductor",
            ".aoti.pt2",
            (),
            "aoti",
            True,
            "PyTorch of this release, in Python and C++, on a processor like this one",
        ),
    )
}


def format_for(path: str | Path, name: str | None) -> Format:
    """Return the format of a name, or of a file's ending.

    Raises:
        ValueError: no such format; an ending of another one, or of none.

    Example:
        >>> format_for("model.onnx", None).engine, format_for("fast.aoti.pt2", None).name
        ('onnxruntime', 'aoti')
    """
    text = str(path)
    if name is None:
        ends = [kind for kind in FORMATS.values() if text.endswith(kind.suffix)]
        if not ends:
            suffixes = ", ".join(kind.suffix for kind in FORMATS.values())
            raise ValueError(f"path={text!r}: expected a file that ends in one of {suffixes}, or a format")
        return max(ends, key=lambda kind: len(kind.suffix))
    if name not in FORMATS:
        raise ValueError(f"format={name!r}: expected one of {', '.join(FORMATS)}")
    if not text.endswith(FORMATS[name].suffix):
        raise ValueError(f"path={text!r}: a file in format {name} ends in {FORMATS[name].suffix}")
    return FORMATS[name]
