"""A Llama of half a billion random weights in bfloat16, block by block: time and memory.

Weights are random: errors say nothing of a trained model. The blocks are alike, so that the first few tell the time of
all; with `--blocks` the others are left out of the model.

    python -m integration_tests.benchmarks.decoder_size --blocks 2
"""

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401
from integration_tests.benchmarks.quiet import quiet

# isort: split
import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaround_plugin import LayerWise, get_report
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.sequential.blocks import adaround_blocks
from integration_tests.benchmarks.peers.exchange import memory

BLOCKS, VOCABULARY = 28, 32_000
ONE = LayerWise(propagate_error=True, correct_bias=True, column_weighting="none", damping=0.1, output_hessian=False)


def build(blocks: int) -> tuple[LlamaForCausalLM, int]:
    """The first blocks of the model, and the number of weights that it has with all of them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model: LlamaForCausalLM = made.eval()
    of_block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    return model, sum(parameter.numel() for parameter in model.parameters()) + (BLOCKS - blocks) * of_block


@quiet()
def main() -> None:
    """Run, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--no-trials", action="store_true", help="take one recipe, without derivatives")
    parser.add_argument("--solver", default="annealing", help="of each layer, without trials")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, weights = build(options.blocks)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.sequences, options.tokens), generator=generator)
    quantizer = AdaRoundWeightOnlyQuantizer(
        weight_bits=options.bits, group_size=options.group, scale_dtype=torch.bfloat16
    )
    # what the default would choose from, all of it tried with so few sequences
    method = replace(ONE, solver=options.solver) if options.no_trials else "default"
    before, start, clock = memory("VmRSS"), time.process_time(), time.perf_counter()
    data = [{"input_ids": batch} for batch in torch.split(ids, options.batch)]
    made = adaround_blocks(model, data, "model.layers", quantizer, method=method, progress=False)
    seconds, wall = time.process_time() - start, time.perf_counter() - clock
    report = get_report(made)
    print(
        f"{weights / 1e9:.2f} B weights, {options.blocks} of {BLOCKS} blocks: {seconds:.0f} CPU s, {wall:.0f} s, "
        f"{seconds / options.blocks:.0f} CPU s a block; {before:.0f} MB before, {memory('VmHWM'):.0f} MB at most; "
        f"output error {report.output_error:.4f}, {len(report.layers)} layers; "
        f"{', '.join(f'{phase} {value:.0f}' for phase, value in report.seconds.items())}"
    )


if __name__ == "__main__":
    main()
