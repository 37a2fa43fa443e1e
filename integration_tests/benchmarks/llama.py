"""A Llama of random weights, small unless told otherwise."""

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["llama"]

_SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
    "use_cache": False,
}


def llama(blocks: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    """A Llama in eval mode, the same at each call.

    Args:
        blocks: how many.
        dtype: of its weights.
        options: of its configuration, in place of those of a small one.
    """
    config = LlamaConfig(**{**_SMALL, **options}, num_hidden_layers=blocks)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model: LlamaForCausalLM = made.eval()
    return model
