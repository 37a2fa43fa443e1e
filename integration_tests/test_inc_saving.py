"""An int8 model comes back from its folder bit for bit, in a fresh process."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from neural_compressor.torch import quantization as inc
from torch import Tensor, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.inc import AdaRoundConfig, load, save
from integration_tests.inc_models import RECIPE, calibrate, data, network
from integration_tests.models import assert_unchanged, snapshot

# torch's own warning while it saves and loads quantized tensors
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


class Functional(nn.Module):
    """Functional operators, whose packed weights torch keeps as script objects."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.matrix = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.conv2d(x, self.kernel, None, (1, 1), (0, 0), (1, 1), 1).relu(), self.matrix, None)


def functional() -> nn.Module:
    """As `network`: always the same."""
    return Functional().eval()


def mixed() -> AdaRoundConfig:
    """Parts of every kind."""
    config = AdaRoundConfig(bits=3, **RECIPE)
    config.set_local("0.0", AdaRoundConfig(bits=8, use_sym=False))
    return config.set_local("3", AdaRoundConfig(dtype="fp32"))


@pytest.mark.parametrize("case", ["network", "functional"])
def test_a_fresh_process_loads_the_same_model(tmp_path: Path, case: str) -> None:
    model, config = (network(), mixed()) if case == "network" else (functional(), AdaRoundConfig(bits=3, **RECIPE))
    quantized = inc.quantize(model, config, run_fn=calibrate(data()))
    # a copy: INC's attributes are lost in it
    save(copy.deepcopy(quantized), tmp_path / "saved")
    torch.save({"x": data()[0], "expected": quantized(data()[0])}, tmp_path / "case.pt")
    code = (
        "import sys, torch\n"
        "from adaround_plugin.inc import load, save\n"
        f"from integration_tests.test_inc_saving import {case}\n"
        "torch.set_num_threads(1)\n"
        "case = torch.load(sys.argv[1] + '/case.pt')\n"
        f"model = load(sys.argv[1] + '/saved', {case}())\n"
        "assert torch.equal(model(case['x']), case['expected'])\n"
        "save(model, sys.argv[1] + '/again')\n"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "must run observer" not in run.stderr
    again = load(tmp_path / "again", model)
    assert torch.equal(again(data()[0]), quantized(data()[0]))


def test_the_stock_save_is_ours(tmp_path: Path) -> None:
    quantized = inc.quantize(network(), mixed(), run_fn=calibrate(data()))
    inc.save(quantized, str(tmp_path / "stock"))
    quantized.save(tmp_path / "method")
    for folder in ("stock", "method"):
        assert torch.equal(load(tmp_path / folder, network())(data()[0]), quantized(data()[0]))


def test_loading_leaves_the_float_model_alone(tmp_path: Path) -> None:
    save(inc.quantize(network(), AdaRoundConfig(**RECIPE), run_fn=calibrate(data())), tmp_path)
    model = network()
    before = snapshot(model)
    load(tmp_path, model)
    assert_unchanged(before, model)


def test_only_quantized_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="was not quantized with AdaRoundConfig"):
        save(network(), tmp_path)


def test_loading_into_another_model_is_an_error(tmp_path: Path) -> None:
    save(inc.quantize(network(), AdaRoundConfig(**RECIPE), run_fn=calibrate(data())), tmp_path)
    with pytest.raises(InvalidModelError, match="lacks"):
        load(tmp_path, nn.Sequential(nn.Linear(3, 4)).eval())
    with pytest.raises(InvalidModelError, match=r"differs in .*6\.scale"):
        load(tmp_path, nn.Sequential(*network(), nn.Linear(5, 5)).eval())
    with pytest.raises(InvalidModelError, match="train mode"):
        load(tmp_path, network().train())


def test_the_stock_load_says_that_the_folder_is_not_its_own(tmp_path: Path) -> None:
    """It would return None for a folder of its own format with an unknown configuration."""
    save(inc.quantize(network(), AdaRoundConfig(**RECIPE), run_fn=calibrate(data())), tmp_path)
    with pytest.raises(ValueError, match=r"qconfig\.json"):
        inc.load(str(tmp_path), original_model=network())
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere", network())
