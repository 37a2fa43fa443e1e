"""An int8 model comes back from its folder bit for bit, in a fresh process."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from neural_compressor.torch import quantization as inc
from torch import nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.inc import AdaRoundConfig, load, save
from integration_tests.inc_models import RECIPE, Functional, calibrate, data, network, run_afresh
from integration_tests.models import assert_unchanged, snapshot

# torch's own warning while it saves and loads quantized tensors
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


@functools.cache
def quantized() -> nn.Module:
    """`network` with parts of every kind; not to be changed."""
    config = AdaRoundConfig(bits=3, **RECIPE)
    config.set_local("0.0", AdaRoundConfig(bits=8, use_sym=False))
    config.set_local("3", AdaRoundConfig(dtype="fp32"))
    return inc.quantize(network(), config, run_fn=calibrate(data()))


def test_a_fresh_process_loads_the_same_models(tmp_path: Path) -> None:
    functional = inc.quantize(Functional().eval(), AdaRoundConfig(bits=3, **RECIPE), run_fn=calibrate(data()))
    models = {"network": quantized(), "functional": functional}
    for name, model in models.items():
        # a copy: INC's attributes are lost in it
        save(copy.deepcopy(model), tmp_path / name)
    outputs = {name: model(data()[0]) for name, model in models.items()}
    torch.save({"x": data()[0], **outputs}, tmp_path / "case.pt")
    said = run_afresh(
        "from adaround_plugin.inc import load, save\n"
        "from integration_tests.inc_models import Functional, network\n"
        "case = torch.load(f'{folder}/case.pt')\n"
        "for name, model in {'network': network(), 'functional': Functional().eval()}.items():\n"
        "    model = load(f'{folder}/{name}', model)\n"
        "    assert torch.equal(model(case['x']), case[name])\n"
        "    save(model, f'{folder}/{name} again')\n",
        tmp_path,
    )
    assert "must run observer" not in said
    for name, original in {"network": network(), "functional": Functional().eval()}.items():
        again = load(tmp_path / f"{name} again", original)
        assert torch.equal(again(data()[0]), outputs[name])


def test_the_stock_save_is_ours(tmp_path: Path) -> None:
    inc.save(quantized(), str(tmp_path / "stock"))
    quantized().save(tmp_path / "method")
    for folder in ("stock", "method"):
        assert torch.equal(load(tmp_path / folder, network())(data()[0]), quantized()(data()[0]))


def test_loading_leaves_the_float_model_alone(tmp_path: Path) -> None:
    save(quantized(), tmp_path)
    model = network()
    before = snapshot(model)
    load(tmp_path, model)
    assert_unchanged(before, model)


def test_only_quantized_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="was not quantized with AdaRoundConfig"):
        save(network(), tmp_path)


def test_loading_into_another_model_is_an_error(tmp_path: Path) -> None:
    save(quantized(), tmp_path)
    with pytest.raises(InvalidModelError, match="lacks"):
        load(tmp_path, nn.Sequential(nn.Linear(3, 4)).eval())
    with pytest.raises(InvalidModelError, match=r"differs in .*6\.scale"):
        load(tmp_path, nn.Sequential(*network(), nn.Linear(5, 5)).eval())
    with pytest.raises(InvalidModelError, match="train mode"):
        load(tmp_path, network().train())


def test_the_stock_load_says_that_the_folder_is_not_its_own(tmp_path: Path) -> None:
    """It would return None for a folder of its own format with an unknown configuration."""
    save(quantized(), tmp_path)
    with pytest.raises(ValueError, match=r"qconfig\.json"):
        inc.load(str(tmp_path), original_model=network())
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere", network())
