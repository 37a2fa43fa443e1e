"""Language models of transformers: through Neural Compressor's configuration as their users have them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from neural_compressor.torch.quantization import quantize
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaround_plugin import get_report
from adaround_plugin.inc import AdaRoundConfig
from integration_tests.models import RECIPE

# what transformers keeps in a global while it runs a model; the exported program does without
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")


def llama(use_cache: bool = False) -> LlamaForCausalLM:
    """One block, 32 wide."""
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
        use_cache=use_cache,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without those of the first and the last."""
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(seed))


def padded(batches: list[Tensor], by: int, token: int) -> list[dict[str, Tensor]]:
    """The same sequences, with `by` tokens behind them that do not count."""
    made = []
    for batch in batches:
        behind = batch.new_full((len(batch), by), token)
        mask = torch.cat([torch.ones_like(batch), torch.zeros_like(behind)], 1)
        made.append({"input_ids": torch.cat([batch, behind], 1), "attention_mask": mask})
    return made


def running(batches: list[Tensor]) -> Callable[[nn.Module], None]:
    """A `run_fn` as INC wants it."""

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch)

    return run


def test_a_model_that_keeps_keys_and_values_is_packed() -> None:
    """Sequences of several lengths; the caller's configuration stays as it is, and so does `generate`."""
    model = llama(use_cache=True)
    config = AdaRoundConfig(bits=3, act_dtype="fp32", group_size=16, **RECIPE)
    config.set_local("lm_head", AdaRoundConfig(dtype="fp32"))
    batches = [ids(4, 12), ids(4, 9, seed=1)]
    packed = quantize(copy.deepcopy(model), config, run_fn=running(batches))
    report = get_report(packed)
    assert len(report.layers) == 7
    assert report.output_error < report.nearest_output_error
    assert packed.config.use_cache
    assert type(packed.lm_head) is nn.Linear
    with torch.no_grad():
        output = packed(input_ids=batches[0])
        assert output.past_key_values is not None
        exact = model(input_ids=batches[0]).logits
    assert float((output.logits - exact).square().mean() / exact.var()) < 0.5
    assert packed.generate(batches[0][:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_padding_behind_a_decoders_tokens_changes_nothing() -> None:
    """What stands there, and through Neural Compressor's configuration."""
    config = AdaRoundConfig(bits=3, act_dtype="fp32", group_size=16, token_mask="attention_mask", **RECIPE)
    batches = [ids(2, 12), ids(2, 12, seed=1)]

    def packed(token: int) -> nn.Module:
        def run(model: nn.Module) -> None:
            with torch.no_grad():
                for batch in padded(batches, 5, token):
                    model(**batch)

        made: nn.Module = quantize(llama(), config, run_fn=run)
        return made

    one, other = packed(0), packed(7)
    assert get_report(one).output_error == get_report(other).output_error
    state = other.state_dict()
    assert state
    for name, value in one.state_dict().items():
        assert torch.equal(value, state[name])
