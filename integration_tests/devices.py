"""Marks of the tests that want a GPU."""

from __future__ import annotations

import pytest
import torch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
