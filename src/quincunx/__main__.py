"""``quincunx`` and ``python -m quincunx``: run the command line, or say which extra it needs."""

from __future__ import annotations

import sys

__all__ = ["main"]

# the packages of each extra in pyproject.toml, by import name
_EXTRAS = {
    "train": ("PIL", "rich", "scipy", "sklearn", "typer"),
    "report": ("jinja2", "matplotlib"),
    "bench": ("onnx", "onnxruntime", "openvino"),
}


def main() -> None:
    """Run the console script. Exit code 0; 2 for bad input or a missing extra; 1 for a run that failed."""
    if sys.argv[1:] == ["--version"]:
        from quincunx.measure.version import version_line

        sys.stdout.write(f"{version_line()}\n")
        return
    try:
        from quincunx.cli import main as run

        run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        for extra, brings in _EXTRAS.items():
            if missing in brings:
                sys.stderr.write(
                    f"error: this command needs {missing}, which is not installed; "
                    f"pip install 'quincunx[{extra}]'\n"
                )
                raise SystemExit(2) from None
        raise
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
