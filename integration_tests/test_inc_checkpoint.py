"""A call of Neural Compressor that was interrupted goes on from its folder, and ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import TuningConfig, autotune, quantize
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from adaround_plugin import InvalidOptionError, get_report
from adaround_plugin.digests import digest
from adaround_plugin.inc import AdaRoundConfig
from adaround_plugin.learning import checkpoint as checkpoints
from integration_tests.inc_models import RECIPE, calibrate, data, network

# by name, what is quantized and how
RESULTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "integer kernels": (network, {}),
    "packed": (network, {"act_dtype": "fp32"}),
    "exported": (lambda: export(network(), (data()[0],)), {}),
    "exported, weights alone": (lambda: export(network(), (data()[0],)), {"act_dtype": "fp32"}),
}


class Stop(Exception):  # noqa: N818
    """Not an error."""


def state(model: nn.Module) -> dict[str, str]:
    """Digests of all that a fresh model holds and gives, packed parameters taken apart.

    The layers of INC change as they run.
    """
    leaves, _ = tree_flatten((dict(model.state_dict()), model(data()[0])))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    parts = [(leaf.int_repr(), leaf.dequantize()) if leaf.is_quantized else (leaf,) for leaf in tensors]
    return {str(number): digest(*of_leaf) for number, of_leaf in enumerate(parts)}


def run(name: str, folder: Path | None) -> nn.Module:
    make, options = RESULTS[name]
    kept = {} if folder is None else {"checkpoint": str(folder)}
    return quantize(make(), AdaRoundConfig(bits=3, **RECIPE, **options, **kept), run_fn=calibrate(data()))


@pytest.mark.parametrize("name", RESULTS)
def test_an_interrupted_call_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, plain = run(name, None), checkpoints.write_tensors

    def stop(path: Path, *args: Any) -> None:
        plain(path, *args)
        if len(list(path.parent.iterdir())) == 3:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", stop)
        with pytest.raises(Stop):
            run(name, tmp_path)
    resumed = run(name, tmp_path)
    assert get_report(resumed).recalled == 2
    found = state(resumed)
    assert len(found) > 5
    assert found == state(expected)


def test_each_configuration_that_autotune_tries_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = AdaRoundConfig(bits=[2, 8], seed=[0, 1], checkpoint=str(tmp_path / "kept"), **RECIPE)
    expanded = config.expand()
    assert [(one.bits, one.seed, Path(one.checkpoint).name) for one in expanded] == [
        (2, 0, "0"),
        (2, 1, "1"),
        (8, 0, "2"),
        (8, 1, "3"),
    ]
    scores: list[float] = []
    for recalled in (False, True):
        scores[:] = [1.0, 0.1, 0.2, 0.9]
        tuning = TuningConfig([config], tolerable_loss=0.5)
        best = autotune(network(), tuning, eval_fn=lambda model: scores.pop(0), run_fn=calibrate(data()))
        assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0", "1", "2"]
        assert [layer.bits for layer in get_report(best).layers] == [8] * 4
        assert (get_report(best).recalled > 0) == recalled


def test_a_folder_is_checked_when_it_is_named_and_when_it_is_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(InvalidOptionError, match=r"checkpoint: .* is a file"):
        AdaRoundConfig(checkpoint=str(tmp_path / "file"))
    for value in (3, tmp_path, ["a", "b"]):
        with pytest.raises(InvalidOptionError, match=r"checkpoint: .* is not accepted"):
            AdaRoundConfig(checkpoint=value)
    config = AdaRoundConfig.from_dict(AdaRoundConfig(checkpoint=str(tmp_path / "kept"), **RECIPE).to_dict())
    quantize(network(), config, run_fn=calibrate(data()))
    with pytest.raises(InvalidOptionError, match=r"checkpoint: .*is of a run with other settings \(seed\)"):
        quantize(network(), {"adaround": {**config.to_dict(), "seed": 1}}, run_fn=calibrate(data()))
