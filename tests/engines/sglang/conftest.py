"""SGLang on a machine without a GPU: its controller and pools, without its kernels and models."""

import sys
from unittest import mock

import pytest

pytest.importorskip("sglang", reason="make test-sglang installs SGLang")

from transformers.utils.import_utils import is_torchvision_available

if not is_torchvision_available():
    # SGLang's configurations of vision models import it; nothing here uses them. PyPI's
    # torchvision would bring CUDA.
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = mock.MagicMock(name=name)
