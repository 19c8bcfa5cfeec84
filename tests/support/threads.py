"""For tests that are not about threads."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Threads would wait for those of the tests that run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
