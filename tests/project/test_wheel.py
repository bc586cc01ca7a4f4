"""What others get: the source distribution, a wheel without a compiler, and libraries for 64-bit ARM."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import quincunx as qx
from helpers import ROOT
from helpers.programs import called, examples
from quincunx.fusion.serialise import pieces

PACKAGE = Path(qx.__file__).parent
LIBRARIES = ["_native.abi3.so", "ops/lib/libquincunx.so", "ops/lib/libquincunx_ort.so"]
built_here = pytest.mark.skipif(
    not all((PACKAGE / name).is_file() for name in LIBRARIES),
    reason="the native libraries are not built here",
)


def run(*command, env=None, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def committed(*under):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    return set(run("git", "ls-files", *under, cwd=ROOT).split())


# ---------------------------------------------------------------- sources


def test_the_source_distribution_has_all_that_is_committed(tmp_path):
    wanted = committed()
    command = ["setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    run(sys.executable, *command, cwd=ROOT)
    [archive] = tmp_path.glob("*.tar.gz")
    listed = run("tar", "tzf", archive).split()
    found = {name.partition("/")[2] for name in listed if not name.endswith("/")}
    assert wanted - found == set()
    # a build's products would be taken for this machine's
    assert [name for name in found if name.endswith((".so", ".o", ".pyc"))] == []
    if shutil.which("git"):
        assert "src/quincunx/measure/commit.txt" in found


# ---------------------------------------------------------------- a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout's files with the libraries that are built in it: all but the compiling."""
    folder = tmp_path_factory.mktemp("wheel")
    library = folder / "lib"
    (folder / "egg").mkdir()
    (folder / "config").write_text(
        f"[build]\nbuild_lib = {library}\n[egg_info]\negg_base = {folder / 'egg'}\n"
    )
    env = {**os.environ, "DIST_EXTRA_CONFIG": str(folder / "config")}
    run(sys.executable, "setup.py", "-q", "build_py", cwd=ROOT, env=env)
    for name in LIBRARIES:
        (library / "quincunx" / name).parent.mkdir(exist_ok=True)
        shutil.copy(PACKAGE / name, library / "quincunx" / name)
    command = ["bdist_wheel", "--skip-build", "-b", folder / "unpacked", "-d", folder / "dist"]
    run(sys.executable, "setup.py", "-q", *command, cwd=ROOT, env=env)
    [found] = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel, beside the libraries that are installed here."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    command = ["--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", *command, env=alone(python))
    [packages] = folder.glob("lib/python*/site-packages")
    # a file of paths is not read for further files of paths: the checkout's own package stays out
    (packages / "beside.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def alone(python):
    """What a process may know of this one: neither its paths nor a compiler."""
    kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS", "TMPDIR") if name in os.environ}
    return {**kept, "PATH": str(python.parent), "QUINCUNX_CACHE": ""}


@built_here
def test_one_wheel_serves_every_python(wheel):
    assert re.fullmatch(r"quincunx-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)


@built_here
def test_a_wheel_has_every_file_of_the_package(wheel):
    names = {name for name in run(sys.executable, "-m", "zipfile", "-l", wheel).split() if "/" in name}
    for source in committed("src/quincunx"):
        assert source.removeprefix("src/") in names, source
    assert {f"quincunx/{name}" for name in LIBRARIES} <= names


@built_here
def test_the_quick_start_runs_from_a_wheel_without_a_compiler(installed, tmp_path):
    env = alone(installed)
    assert [c for c in ("cc", "c++", "gcc", "g++", "clang") if shutil.which(c, path=env["PATH"])] == []
    [program] = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    quick = program.replace("cifar-resnet20", "cifar-resnet8").replace("min_run_time=1", "min_run_time=0.1")
    (tmp_path / "quick.py").write_text(quick + "print(qx.__file__, qx.backend('cpu'))\n")
    said = run(installed, "-I", "quick.py", cwd=tmp_path, env=env).splitlines()
    assert re.search(r"^\w+: \d+ layers replaced", said[0])
    assert [line.partition(":")[0] for line in said[-3:-1]] == ["before", "after"]
    assert said[-1].startswith(f"{installed.parents[1]}/lib")
    assert " native (" in said[-1]
    version = run(installed.parent / "quincunx", "--version", env=env)
    assert version.startswith("quincunx ")


@built_here
def test_strict_types_accept_a_users_file_over_a_wheel(installed, tmp_path):
    shutil.copy(ROOT / "tests" / "project" / "typed_use.py", tmp_path / "use.py")
    (tmp_path / "wrong.py").write_text("import quincunx as qx\nqx.Uniform('half')\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", installed]
    env = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(
        [*map(str, command), "--cache-dir", str(ROOT / ".mypy_cache" / "wheel"), "use.py", "wrong.py"],
        capture_output=True, text=True, cwd=tmp_path, env=env,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert errors[0].startswith("wrong.py:2: error: Argument 1 to ")


# ---------------------------------------------------------------- 64-bit ARM

CROSS = "aarch64-linux-gnu"
FOR_ARM = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "CC": f"{CROSS}-gcc", "CXX": f"{CROSS}-g++"}
cross_compiler = pytest.mark.skipif(
    shutil.which(f"{CROSS}-g++") is None or os.uname().machine == "aarch64", reason=f"needs {CROSS}-g++"
)


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """All that setup.py compiles, for 64-bit ARM."""
    folder = tmp_path_factory.mktemp("aarch64")
    # nothing is measured: what is not optimised is compiled in half of the time
    env = {**os.environ, **FOR_ARM, "QUINCUNX_REQUIRE_NATIVE": "1", "CXXFLAGS": "-O0"}
    command = ["build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    run(sys.executable, "setup.py", "-q", *command, cwd=ROOT, env=env)
    return folder / "lib" / "quincunx"


@cross_compiler
@pytest.mark.timeout(900)
def test_the_libraries_for_arm_need_what_every_system_with_torch_has(arm):
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-aarch64.so.1"}
    for name in LIBRARIES:
        assert "Machine: AArch64" in " ".join(run("readelf", "-h", arm / name).split()), name
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", arm / name)))
        assert needed - system == ({"libtorch_cpu.so"} if name == LIBRARIES[0] else set()), name
        assert needed >= {"libstdc++.so.6", "libc.so.6"}, name
        # paths of this machine, where another may have anything
        assert "RUNPATH" not in run("readelf", "-d", arm / name), name


@cross_compiler
@pytest.mark.timeout(900)
def test_the_extension_for_arm_asks_for_torchs_stable_functions_and_pythons_limited_ones(arm):
    """The stand-in that it is linked with has no symbols, so the linker does not look."""
    names = re.findall(r" UND (\S+)$", run("readelf", "-W", "--dyn-syms", arm / LIBRARIES[0]), re.MULTILINE)
    functions = [name for name in names if name.startswith(("aoti_", "torch_"))]
    assert len(functions) > 20
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert [name for name in functions if not hasattr(library, name)] == []
    # what is left has a version of the C and C++ libraries, or is optional
    rest = [name for name in names if "@" not in name and name not in functions]
    assert [name for name in rest if not name.startswith(("Py", "_ITM_", "__gmon"))] == []


@cross_compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["two", "mean"])
def test_programs_answer_in_an_emulator_of_arm(arm, name, tmp_path):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64")
    model, x = examples()[name]
    program, arguments, _ = called(qx.fuse(model), x)[-1]
    [piece] = pieces(program, *(a.shape for a in arguments))
    (tmp_path / "program").write_bytes(piece.data)
    host, flags = ROOT / "examples" / "host_c.c", ["-O1", "-Wall", "-Werror", "-I", ROOT / "csrc" / "capi"]
    run(f"{CROSS}-gcc", *flags, host, arm / "ops" / "lib" / "libquincunx.so", "-o", tmp_path / "host")
    emulator = ["qemu-aarch64", "-L", f"/usr/{CROSS}", "-E", f"LD_LIBRARY_PATH={arm / 'ops' / 'lib'}"]
    for threads in (1, 2):
        sizes = [str(len(arguments[0])), str(threads)]
        done = subprocess.run(
            [*emulator, str(tmp_path / "host"), str(tmp_path / "program"), *sizes],
            input=b"".join(a.contiguous().numpy().tobytes() for a in arguments),
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr.decode().startswith(f"baseline, {threads} threads: ")
        wanted = np.concatenate([y.numpy().ravel() for y in program(*arguments)])
        found = np.frombuffer(done.stdout, np.float32)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("compiler", "said"),
    [(None, "CXX is not set"), ("c++", "CXX is 'c++', whose target is"), ("gone", "'unknown'")],
)
def test_a_compiler_for_another_processor_is_refused(compiler, said, tmp_path):
    env = {**os.environ, "_PYTHON_HOST_PLATFORM": "linux-riscv64", "QUINCUNX_REQUIRE_NATIVE": "1"}
    env.pop("CXX", None)
    if compiler is not None:
        env["CXX"] = compiler
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert said in last
    assert "needs a compiler such as riscv64-linux-gnu-g++" in last
