"""What every test starts from: the same random numbers, and hypothesis without a clock."""

import functools
import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported, by children too. One worker a core: their second threads would wait for
    # each other's cores. Tests of several threads set their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# no test judges a time, so rounds of timing may be short, in children too
os.environ["QUINCUNX_ROUND_SCALE"] = "0.1"

import torch
from hypothesis import settings

from quincunx.fusion.faster import speed_ratio

if not torch.cuda.is_available():
    # read when Triton is imported, which any library may do first: its kernels then run without a GPU
    os.environ["TRITON_INTERPRET"] = "1"

# nor what a fused network decides when it times its convolutions at their first map
assert speed_ratio.__kwdefaults__["round_seconds"] == 0.005
speed_ratio.__kwdefaults__["round_seconds"] = 0.0005

# what is measured here is no other process's business
os.environ["QUINCUNX_CACHE"] = ""

# derandomized: a run on one machine repeats the examples of every other
settings.register_profile("quincunx", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("quincunx")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _operators_of_onnx_are_read_once():
    """At each export torch.onnx parses the sources of some 500 operators anew, which takes a second."""
    exporter = sys.modules.get("torch.onnx._internal._lazy_import")
    if exporter is not None and "get_torchlib_ops" not in vars(exporter.onnxscript_apis):
        lazy = exporter.onnxscript_apis
        # its other attributes are those of the module that it imports when it is asked
        lazy.get_torchlib_ops = functools.cache(lambda: lazy.__getattr__("get_torchlib_ops")())


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost tiny networks more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
