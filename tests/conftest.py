"""Hypothesis profiles and the devices that tests run on."""

import os

import hypothesis
import pytest
import torch
from torch._dynamo.utils import counters

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("LQ_HYPOTHESIS_PROFILE", "ci"))

# Tests are many and small: a second thread takes longer to start than what it would do, far longer on a busy machine.
torch.set_num_threads(1)

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request) -> torch.device:
    """Each device in turn; CUDA is skipped where there is none."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fresh():
    """No compiled code, no counts from another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
