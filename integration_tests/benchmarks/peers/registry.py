"""The peers: what to install, how they are set up, and where their documentation says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["PEERS", "Peer"]

# what unpickles the networks: their classes stand in files that read checkpoints and draw letters
_COMMON = ("torch==2.13.0", "safetensors", "matplotlib", "pillow")


@dataclass(frozen=True)
class Peer:
    """A tool.

    Attributes:
        title: as tables have it.
        requirements: for pip, in the peer's own environment; empty for this package, in the environment that runs this.
        settings: options of the peer's script by the name of a setting.
        makes: what its user gets in the end.
        page: its documentation.
        networks: what it is run on.
    """

    title: str
    requirements: tuple[str, ...]
    settings: dict[str, dict[str, Any]]
    makes: str
    page: str
    networks: tuple[str, ...]


_TORCHVISION = "torchvision==0.28.0"
_IMAGES = ("resnet20", "mobilenet", "vit", "recognizer")
_DECODERS = ("decoder",)
_TRANSFORMERS = ("minilm", *_DECODERS)

PEERS: dict[str, Peer] = {
    "ours": Peer(
        "adaround_plugin",
        (),
        {
            "nearest": {"method": "nearest", "affine": False},
            "default": {"method": "default", "affine": False},
            "default, affine": {"method": "default", "affine": True},
            "blocks, affine": {"method": "blocks", "affine": True},
        },
        "integers in the host's converted model",
        "docs/how-to/choose-a-method.md",
        (*_IMAGES, *_TRANSFORMERS),
    ),
    "ours_inc": Peer(
        "adaround_plugin in Neural Compressor",
        (),
        {"default": {}, "default, block by block": {"blocks": "model.layers"}},
        "packed integers",
        "docs/tutorials/neural-compressor.md",
        _DECODERS,
    ),
    "aimet": Peer(
        "AIMET",
        (*_COMMON, _TORCHVISION, "aimet-torch==2.42.0"),
        {
            "SeqMSE": {"method": "seq_mse"},
            "AdaRound": {"method": "adaround"},
            "AdaRound, 100 steps": {"method": "adaround", "iterations": 100},
            "AdaRound, 1,000 steps": {"method": "adaround", "iterations": 1000},
        },
        "floats, and the scales of their grid in a file; exported as ONNX with encodings",
        "https://quic.github.io/aimet-pages/releases/latest/techniques/adaround.html",
        _IMAGES,
    ),
    "brevitas": Peer(
        "Brevitas",
        (*_COMMON, _TORCHVISION, "brevitas[vision]==0.13.4"),
        {
            "GPTQ": {"method": "gptq"},
            "GPFQ": {"method": "gpfq"},
            "Qronos": {"method": "qronos"},
            "Qronos, MSE scales": {"method": "qronos", "scale": "mse"},
            "learned round": {"method": "learned_round"},
            "learned round, 100 steps": {"method": "learned_round", "iterations": 100},
        },
        "floats that are quantized where they are read; integers in an export to ONNX",
        "https://xilinx.github.io/brevitas/dev/user_guide/learned_round.html",
        _IMAGES,
    ),
    "mct": Peer(
        "MCT",
        (*_COMMON, _TORCHVISION, "model-compression-toolkit==2.6.1"),
        {"GPTQ": {}, "GPTQ, 10 epochs, no Hessian": {"epochs": 10, "hessian": False}},
        "floats that are quantized where they are read; exported as ONNX",
        "https://sony.github.io/model_optimization/api/api_docs/methods/pytorch_gradient_post_training_quantization.html",
        _IMAGES,
    ),
    "nncf": Peer(
        "NNCF",
        (*_COMMON, "transformers==5.24.0", "nncf==3.4.0"),
        {
            "nearest": {"awq": None, "scale_estimation": None},
            "scale estimation": {"awq": None, "scale_estimation": True},
            "AWQ and scale estimation": {"awq": True, "scale_estimation": True},
        },
        "packed integers",
        "https://openvinotoolkit.github.io/nncf/autoapi/nncf/index.html",
        _TRANSFORMERS,
    ),
    "autoround": Peer(
        "AutoRound",
        (*_COMMON, "transformers==5.24.0", "auto-round==0.16.1"),
        {"200 steps": {}, "20 steps": {"iters": 20}},
        "floats; packed integers in its formats",
        "https://github.com/intel/auto-round/blob/main/docs/step_by_step.md",
        _TRANSFORMERS,
    ),
    "inc": Peer(
        "Neural Compressor",
        (*_COMMON, _TORCHVISION, "transformers==5.24.0", "accelerate", "neural-compressor[pt]==3.10"),
        {"RTN": {"algorithm": "RTN"}, "GPTQ": {"algorithm": "GPTQ"}},
        "packed integers",
        "https://intel.github.io/neural-compressor/latest/docs/source/3x/PT_WeightOnlyQuant.html",
        _TRANSFORMERS,
    ),
    "torchao": Peer(
        "torchao",
        (*_COMMON, _TORCHVISION, "transformers==5.24.0", "torchao==0.18.0"),
        {"nearest": {}, "HQQ": {"algorithm": "hqq_scale_only"}},
        "its tensors, which hold integers",
        "https://docs.pytorch.org/ao/stable/generated/torchao.quantization.IntxWeightOnlyConfig.html",
        _DECODERS,
    ),
}
