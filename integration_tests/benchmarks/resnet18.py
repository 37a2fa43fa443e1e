"""Time and memory of AdaRound on the ResNet-18 topology at 224x224, beside the two forward passes that are its floor.

Random images and weights from initialization, batch-norm statistics set by a few batches: speed and memory do not
depend on what the network has learned. `python -m integration_tests.benchmarks.resnet18 --images 1024`; with
`--device cuda` on a GPU, whose memory is what is counted then.
"""

import argparse
import resource
import time

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

from adaround_plugin import adaround, get_adaround_qconfig_mapping, get_report
from integration_tests.benchmarks import networks


def peak_gigabytes(device: str) -> float:
    """Largest memory so far: resident in this process, or allocated on the accelerator."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def set_statistics(network: nn.Module, batches: list[Tensor]) -> None:
    """Set the batch-norm statistics by a few batches."""
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    network.eval()


def forward_seconds(network: nn.Module, batches: list[Tensor]) -> float:
    """Wall time of one pass over all batches."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches[:-1]:
            network(batch)
        # an accelerator has done its work when its result is read
        float(network(batches[-1]).sum())
    return time.perf_counter() - start


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    network = networks.resnet18().to(options.device)
    images = torch.randn(options.images, 3, options.size, options.size, generator=generator).to(options.device)
    batches = list(torch.split(images, options.batch))
    set_statistics(network, batches[:4])
    mapping = get_adaround_qconfig_mapping("x86", weight_bits=options.bits)
    prepared = prepare_fx(network, mapping, (batches[0],))
    with torch.no_grad():
        for batch in batches[:4]:
            prepared(batch)
    before = peak_gigabytes(options.device)
    learned = adaround(prepared, batches)
    after = peak_gigabytes(options.device)
    report = get_report(learned)
    print(report)
    floor = forward_seconds(network, batches), forward_seconds(convert_to_reference_fx(learned), batches)
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"\n{options.images} images of {options.size}x{options.size}, {where}")
    for phase, seconds in report.seconds.items():
        print(f"{phase:10s} {seconds:8.1f} s")
    print(f"floor      {sum(floor):8.1f} s   (float pass {floor[0]:.1f} s, quantized pass {floor[1]:.1f} s)")
    print(f"peak memory {after:.1f} GB ({before:.1f} GB before, of which images {images.nbytes / 2**30:.1f} GB)")


if __name__ == "__main__":
    main()
