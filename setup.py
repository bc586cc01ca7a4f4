"""Builds the native CPU back end if possible; everything else is in pyproject.toml.

Three libraries share the objects of the kernels: the extension of torch, libquincunx with the C interface,
and libquincunx_ort with the operator of ONNX Runtime. All are optional: without torch, a compiler or a
compiler that works the package is installed without them, and one warning says why.
QUINCUNX_REQUIRE_NATIVE=1 makes that an error.

For another processor than this machine's: CC and CXX name a cross compiler, _PYTHON_HOST_PLATFORM the target,
such as linux-aarch64 (``make wheel-aarch64``). Every target has the same list of sources: each asks the
compiler for its target, and the preprocessor leaves out what another instruction set needs. CXXFLAGS come
behind the flags that are chosen here.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.modified import newer_group

REQUIRED = os.environ.get("QUINCUNX_REQUIRE_NATIVE", "") not in ("", "0")
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))
BINDINGS = sorted(str(p) for p in Path("csrc").glob("bindings*.cpp"))
CORE = sorted(str(p) for p in Path("csrc").glob("*.cpp") if str(p) not in BINDINGS)
# libraries without torch: name, sources besides the core's
LIBRARIES = {
    "libquincunx.so": "csrc/capi/quincunx.cpp",
    "libquincunx_ort.so": "csrc/onnxruntime/plugin.cpp",
}
# inside, where Python does not take them for modules
FOLDER = ("quincunx", "ops", "lib")
# such as linux-aarch64; _PYTHON_HOST_PLATFORM changes it
TARGET = sysconfig.get_platform()
CROSS = TARGET.startswith("linux-") and f"linux-{platform.machine()}" != TARGET
# a builder's own flags come last, so that they win
OWN_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
FLAGS = ["-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", *OWN_FLAGS]


def skip(reason: object) -> None:
    message = f"quincunx is installed without its native CPU back end: {reason}"
    if REQUIRED:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def check_compiler() -> None:
    """Refuse a compiler for another processor than the wheel's name will say.

    Raises:
        RuntimeError: CXX names none, or one of another target.
    """
    compiler, wanted = os.environ.get("CXX", ""), TARGET.partition("-")[2]
    made = ""
    if compiler and shutil.which(compiler.split()[0]):
        run = subprocess.run([*compiler.split(), "-dumpmachine"], capture_output=True, text=True, check=True)
        made = run.stdout.strip()
    if made.partition("-")[0] != wanted:
        found = f"is {compiler!r}, whose target is {made or 'unknown'!r}" if compiler else "is not set"
        raise RuntimeError(
            f"CXX {found}; building for {TARGET} needs a compiler such as {wanted}-linux-gnu-g++"
        )


def write_commit(package: str) -> None:
    """Write the checkout's commit beside what ``quincunx --version`` reads; without a checkout, nothing."""
    # unpacked inside of another project's checkout, that project's commit would be found
    if Path(".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        if done.returncode == 0:
            Path(package, "measure", "commit.txt").write_text(done.stdout, encoding="utf-8")


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(str(Path(self.build_lib, "quincunx")))


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(str(Path(base_dir, "src", "quincunx")))


def with_libraries(base: type[build_ext]) -> type[build_ext]:
    """Return a build_ext that also builds what needs no torch, from the same objects."""

    class Build(base):  # type: ignore[misc, valid-type]
        def build_extensions(self) -> None:
            try:
                if CROSS:
                    check_compiler()
                # before torch replaces the compiler's functions
                core = self._objects(CORE)
                for name, source in LIBRARIES.items():
                    self._link(name, core + self._objects([source]))
                for extension in self.extensions:
                    extension.extra_objects = core
                    if CROSS and extension.sources:
                        extension.libraries = []
                        extension.extra_link_args = ["-Wl,--no-as-needed", self._stand_in("libtorch_cpu.so")]
                if self.extensions[0].sources:
                    super().build_extensions()
            except Exception as error:  # noqa: BLE001  # whatever a compiler can do wrong
                skip(error)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            for built, name in self._libraries().items():
                Path("src", *FOLDER).mkdir(exist_ok=True)
                self.copy_file(built, str(Path("src", *FOLDER, name)))

        def get_outputs(self) -> list[str]:
            return [*super().get_outputs(), *([] if self.inplace else self._libraries())]

        def get_output_mapping(self) -> dict[str, str]:
            found = {built: str(Path("src", *FOLDER, name)) for built, name in self._libraries().items()}
            return {**super().get_output_mapping(), **(found if self.inplace else {})}

        def _libraries(self) -> dict[str, str]:
            """Return those that were built, by path."""
            paths = {str(Path(self.build_lib, *FOLDER, name)): name for name in LIBRARIES}
            return {path: name for path, name in paths.items() if Path(path).is_file()}

        def _objects(self, sources: list[str]) -> list[str]:
            def compiled(source: str) -> str:
                made = str(Path(self.build_temp, source).with_suffix(".o"))
                if newer_group([source, *HEADERS], made, "newer"):
                    self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=FLAGS)
                return str(Path(made).resolve())

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(compiled, sources))

        def _stand_in(self, name: str) -> str:
            """Make an empty library of a name, which the linker records in place of the target's own.

            The torch that is installed here is this machine's. Its headers are the same for every processor,
            and libtorch_cpu has all functions of the stable ABI.
            """
            empty = Path(self.build_temp, "empty.cpp")
            empty.parent.mkdir(parents=True, exist_ok=True)
            empty.write_text("", encoding="utf-8")
            made = str(Path(self.build_temp, name).resolve())
            objects = self.compiler.compile([str(empty)], extra_postargs=FLAGS)
            flags = [f"-Wl,-soname,{name}"]
            self.compiler.link_shared_object(objects, made, extra_postargs=flags, target_lang="c++")
            return made

        def _link(self, name: str, objects: list[str]) -> None:
            # the process may hold other copies of the core: symbols inside are bound to this one
            linux = ["-pthread", "-Wl,-Bsymbolic", f"-Wl,-soname,{name}", "-s"]
            flags = linux if TARGET.startswith("linux-") else []
            target = Path(self.build_lib, *FOLDER, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(objects, str(target), extra_postargs=flags, target_lang="c++")

    return Build


def native() -> dict[str, Any]:
    """Return the arguments of setup() for what is compiled; without torch, for the libraries without it."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        skip(f"torch cannot be imported ({error}); install torch first and use --no-build-isolation")
        return {
            "ext_modules": [Extension("quincunx._native", [], optional=True)],
            "cmdclass": {"build_ext": with_libraries(build_ext)},
        }

    extension = CppExtension(
        "quincunx._native",
        BINDINGS,
        depends=HEADERS,
        # torch 2.10: the oldest that has all of the stable ABI that is used here
        define_macros=[("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", *OWN_FLAGS],
        py_limited_api=True,
        optional=not REQUIRED,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": with_libraries(BuildExtension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


found = native()
setup(**{**found, "cmdclass": {**found["cmdclass"], "build_py": BuildPython, "sdist": SourceDistribution}})
