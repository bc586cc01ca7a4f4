"""What every test starts from: the same random numbers, and hypothesis without a clock."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # read when Triton is imported, which any library may do first: its kernels then run without a GPU
    os.environ["TRITON_INTERPRET"] = "1"

# what is measured here is no other process's business
os.environ["QUINCUNX_CACHE"] = ""

# derandomized: a run on one machine repeats the examples of every other
settings.register_profile("quincunx", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("quincunx")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost tiny networks more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
