"""What files of the glyph networks take: of the float network, of the converted one, and of saved roundings.

python -m integration_tests.benchmarks.file_sizes
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from adaround_plugin import adaround, get_adaround_qconfig_mapping, load_rounding, save_rounding
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.quiet import quiet

__all__ = ["sizes"]


def sizes(name: str, bits: int) -> tuple[int, int, int]:
    """Bytes of the float network's state, of the converted network's, and of the saved rounding; and whether a fresh
    network that loads it computes the same is checked.

    Args:
        name: of a glyph network.
        bits: of its weights; activations have 8.
    """
    network, (images, _) = networks.load(name), glyphs.load("train", 32, seed=1)
    mapping = get_adaround_qconfig_mapping("x86", weight_bits=bits, symmetric=True)
    prepared = prepare_fx(network, mapping, (images,))
    with torch.no_grad():
        prepared(images)
    # how long was learned does not change what is stored
    learned = adaround(prepared, [images], "nearest", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounding.safetensors"
        save_rounding(learned, path)
        loaded = load_rounding(prepare_fx(networks.load(name), mapping, (images,)), path)
        stored = path.stat().st_size
    ours, theirs = convert_fx(loaded), convert_fx(learned)
    assert torch.equal(ours(images), theirs(images))
    return _bytes(network.state_dict()), _bytes(theirs.state_dict()), stored


def _bytes(state: dict[str, Any]) -> int:
    whole = io.BytesIO()
    torch.save(state, whole)
    return whole.getbuffer().nbytes


def main() -> None:
    print("network    bits  float, KB  converted, KB  rounding, KB  weights at their bits, KB")
    for name in ("resnet20", "mobilenet"):
        for bits in (8, 4, 3, 2):
            with quiet():
                exact, converted, stored = sizes(name, bits)
            weights = sum(p.numel() for p in networks.load(name).parameters() if p.dim() > 1) * bits / 8
            columns = (exact, converted, stored, weights)
            print(f"{name:<9}  {bits:>4}  " + "  ".join(f"{one / 1000:>9.1f}" for one in columns))


if __name__ == "__main__":
    main()
