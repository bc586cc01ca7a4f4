"""The CUDA operators and fused networks against float64 on the CPU, one test a job; skipped without a GPU."""

import sys

import pytest
import torch

from helpers import ROOT

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU that it can use here", allow_module_level=True)

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_correct


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("job", gpu_correct.jobs(), ids=lambda job: f"{job.part}-{job.name}-{job.precision}")
def test_equals_the_reference(job):
    assert gpu_correct.failures({"jobs": [gpu_correct.perform(job, "cuda")]}) == []
