"""AutoRound: roundings and ranges of a transformer's linear layers, learned by signed gradients.

https://github.com/intel/auto-round/blob/main/docs/step_by_step.md
"""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from integration_tests.benchmarks.peers.exchange import Job, Weights, serve, weights_of

__all__ = ["quantize"]

# it takes sequences of one length and drops shorter ones
_TOKENS = 64


def _sequences(samples: list[Any]) -> list[dict[str, Tensor]]:
    """All tokens one after the other, cut into sequences of one length."""
    tokens = torch.cat([sample["input_ids"] for sample in samples], 1)
    whole = tokens[:, : tokens.shape[1] // _TOKENS * _TOKENS].reshape(-1, 1, _TOKENS)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in whole]


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """Per channel and symmetric, steps and rates as by default unless the job has others."""
    assert isinstance(network, PreTrainedModel)
    sequences = _sequences(samples)
    rounder = AutoRound(
        network,
        tokenizer=AutoTokenizer.from_pretrained(network.name_or_path, local_files_only=True),
        bits=job.bits,
        group_size=-1,
        sym=True,
        dataset=sequences,
        seqlen=_TOKENS,
        nsamples=len(sequences),
        seed=job.seed,
        device_map="cpu",
        **job.options,
    )
    rounded, _ = rounder.quantize()
    return weights_of(rounded)


if __name__ == "__main__":
    serve(quantize, "auto-round")
