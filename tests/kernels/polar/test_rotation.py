import numpy as np
import pytest
import torch

from polarcache.kernels.polar.rotation import rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_and_repeatable(head_dim: int) -> None:
    matrix = rotation(head_dim, 0, CPU)
    assert matrix.dtype == torch.float32
    identity = np.eye(head_dim)
    product = matrix.double().numpy() @ matrix.double().numpy().T
    assert abs(product - identity).max() < 1e-6
    rotation.cache_clear()
    assert torch.equal(rotation(head_dim, 0, CPU), matrix)
    assert not torch.allclose(rotation(head_dim, 1, CPU), matrix)


def test_rotation_of_seed_0_is_frozen() -> None:
    # Stored blocks depend on it: other numbers need another layout version.
    matrix = rotation(16, 0, CPU)
    expected = torch.tensor([-0.5947094, -0.2885758, 0.01790298, 0.02357178])
    torch.testing.assert_close(matrix[0, :4], expected, rtol=0, atol=1e-6)
