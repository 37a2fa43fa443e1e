"""Fixtures of the host tests."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from adaround_plugin.learning.passes import Pass

# transformers, of which the documentation has examples, imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401
from integration_tests.models import keep_passes

# torch.ao's own advice, given in its own code, about flows the user is free to use
_TORCH_ADVICE = (
    "ignore:Please use quant_min and quant_max to specify the range for observers:UserWarning",
    "ignore:Using padding='same' with even kernel lengths:UserWarning",
    # torch.utils.mkldnn, which torchao's quantizer for x86 imports
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    # X86InductorQuantizer, of a pooling whose input is not quantized
    "ignore:The input of maxpool2d is not quantized:UserWarning",
    # export of a model of transformers, whose forward collects outputs on the side
    "ignore:While compiling, we found certain side effects happened in the model.forward:UserWarning",
    # a deep copy of any exported program, by torch's own pytree
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
    # executorch, which reads its own files by an old function, and its runtime
    "ignore:(open_text|read_text|read_binary) is deprecated:DeprecationWarning",
    "ignore:This API is experimental and subject to change without notice:Warning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in _TORCH_ADVICE:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking at it over and over takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The passes that `adaround` makes, without those of trials."""
    return keep_passes(monkeypatch)


@pytest.fixture
def engine() -> Iterator[Callable[[str], None]]:
    """Sets torch's quantized engine, and restores it."""
    before = torch.backends.quantized.engine

    def select(name: str) -> None:
        if name not in torch.backends.quantized.supported_engines:
            pytest.skip(f"this torch has no {name}")
        torch.backends.quantized.engine = name

    yield select
    torch.backends.quantized.engine = before
