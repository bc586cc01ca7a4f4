"""Builds the native CPU back end if possible; everything else is in pyproject.toml.

The extension is optional: without torch, a compiler or a compiler that works the package is
installed without it, and one warning says why. QUINCUNX_REQUIRE_NATIVE=1 makes that an error.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from setuptools import setup

REQUIRED = os.environ.get("QUINCUNX_REQUIRE_NATIVE", "") not in ("", "0")
SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("csrc").glob("*.h"))


def skip(reason: object) -> None:
    message = f"quincunx is installed without its native CPU back end: {reason}"
    if REQUIRED:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def native() -> dict[str, Any]:
    """Return the arguments of setup() for the extension; none without torch."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        skip(f"torch cannot be imported ({error}); install torch first and use --no-build-isolation")
        return {}

    class OptionalBuild(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # noqa: BLE001  # whatever a compiler can do wrong
                skip(error)

    extension = CppExtension(
        "quincunx._native",
        SOURCES,
        depends=HEADERS,
        # torch 2.10: the oldest that has all of the stable ABI that is used here
        define_macros=[("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-fvisibility=hidden"],
        py_limited_api=True,
        optional=not REQUIRED,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
