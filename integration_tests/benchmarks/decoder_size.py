"""A Llama of half a billion random weights in bfloat16, block by block: time and memory.

Weights are random: errors say nothing of a trained model. The blocks are alike, so that the first few tell the time of
all. The model has all of them, in memory or in a file.

    python -m integration_tests.benchmarks.decoder_size --blocks 1 --no-trials
    python -m integration_tests.benchmarks.decoder_size --blocks 1 --no-trials --on-disk
"""

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401
from integration_tests.benchmarks.quiet import quiet

# isort: split
import argparse
import multiprocessing
import tempfile
import time
from dataclasses import replace
from itertools import islice

import torch
from transformers import LlamaForCausalLM

from adaround_plugin import LayerWise
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.sequential.learning import learned_blocks, together
from adaround_plugin.sequential.weights import empty_weights, stored_weights
from integration_tests.benchmarks.llama import llama
from integration_tests.benchmarks.peers.exchange import memory

BLOCKS, VOCABULARY = 28, 32_000
ONE = LayerWise(propagate_error=True, correct_bias=True, column_weighting="none", damping=0.1, output_hessian=False)


def build() -> LlamaForCausalLM:
    """The model."""
    return llama(
        BLOCKS,
        torch.bfloat16,
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=8,
        initializer_range=0.02,
        use_cache=True,
    )


def write(folder: str) -> None:
    """Save the model there."""
    build().save_pretrained(folder)


def build_on_disk(folder: str) -> LlamaForCausalLM:
    """The model without its weights, which another process writes, so that this one's memory tells nothing of it."""
    process = multiprocessing.get_context("spawn").Process(target=write, args=(folder,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the model was not written: exit code {process.exitcode}")
    with empty_weights():
        return build()


def run(options: argparse.Namespace, model: LlamaForCausalLM, folder: str | None) -> str:
    """Learn the first blocks, and say what it took."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.sequences, options.tokens), generator=generator)
    quantizer = AdaRoundWeightOnlyQuantizer(
        weight_bits=options.bits, group_size=options.group, scale_dtype=torch.bfloat16
    )
    # what the default would choose from, all of it tried with so few sequences
    method = replace(ONE, solver=options.solver) if options.no_trials else "default"
    before, start, clock = memory("VmRSS"), time.process_time(), time.perf_counter()
    blocks = learned_blocks(
        model,
        [{"input_ids": batch} for batch in torch.split(ids, options.batch)],
        "model.layers",
        lambda *_: quantizer,
        weights=stored_weights(model, folder),
        method=method,
        progress=False,
    )
    report = together([block.report for block in islice(blocks, options.blocks)])
    seconds, wall = time.process_time() - start, time.perf_counter() - clock
    return (
        f"{weights / 1e9:.2f} B weights {'in memory' if folder is None else 'on disk'}, {options.blocks} of {BLOCKS} "
        f"blocks: {seconds:.0f} CPU s, {wall:.0f} s, {seconds / options.blocks:.0f} CPU s a block; {before:.0f} MB "
        f"before, {memory('VmHWM'):.0f} MB at most; output error {report.output_error:.4f}, {len(report.layers)} "
        f"layers; {', '.join(f'{phase} {value:.0f}' for phase, value in report.seconds.items())}"
    )


@quiet()
def main() -> None:
    """Run, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="stop behind so many")
    parser.add_argument("--on-disk", action="store_true", help="leave the weights in a file until their turn")
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
    if not options.on_disk:
        print(run(options, build(), None))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(run(options, build_on_disk(folder), folder))


if __name__ == "__main__":
    main()
