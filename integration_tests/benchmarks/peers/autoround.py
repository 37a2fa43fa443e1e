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

# it takes sequences of one length and drops shorter ones; where they differ they are cut to this one
_TOKENS = 64


def _sequences(samples: list[Any]) -> list[dict[str, Tensor]]:
    """The samples if they are of one length; else all tokens one after the other, cut into such."""
    lengths = {sample["input_ids"].shape[1] for sample in samples}
    length = lengths.pop() if len(lengths) == 1 else _TOKENS
    tokens = torch.cat([sample["input_ids"] for sample in samples], 1)
    whole = tokens[:, : tokens.shape[1] // length * length].reshape(-1, 1, length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in whole]


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """Symmetric, steps and rates as by default unless the job has others."""
    assert isinstance(network, PreTrainedModel)
    sequences = _sequences(samples)
    rounder = AutoRound(
        network,
        tokenizer=AutoTokenizer.from_pretrained(network.name_or_path, local_files_only=True),
        bits=job.bits,
        group_size=-1 if job.group is None else job.group,
        sym=True,
        dataset=sequences,
        seqlen=sequences[0]["input_ids"].shape[1],
        nsamples=len(sequences),
        seed=job.seed,
        device_map="cpu",
        **job.options,
    )
    rounded, _ = rounder.quantize()
    return weights_of(rounded)


if __name__ == "__main__":
    serve(quantize, "auto-round", has_groups=True)
