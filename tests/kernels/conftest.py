from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Registered here, so that a slow shared machine never turns a property into a failure.
settings.register_profile("kernels", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps torch on one core: test machines are shared, and small tensors gain nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
