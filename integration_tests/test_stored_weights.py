"""Language models whose weights lie in files until their turn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch.quantization import load, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer

from adaround_plugin import InvalidModelError, InvalidOptionError, LayerWise, NonFiniteError, get_report
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.inc import AdaRoundConfig
from adaround_plugin.sequential.blocks import adaround_blocks
from adaround_plugin.sequential.learning import learned_blocks
from adaround_plugin.sequential.weights import empty_weights, is_empty, stored_weights
from integration_tests.benchmarks.llama import llama
from integration_tests.models import RECIPE

# what transformers keeps in a global while it runs a model; the exported program does without
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
QUANTIZER = AdaRoundWeightOnlyQuantizer(weight_bits=4, group_size=16, scale_dtype=torch.bfloat16)
IDS = torch.randint(2, 60, (4, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": part} for part in IDS.split(2)]


def model(**options: Any) -> nn.Module:
    return llama(**{"blocks": 2, "dtype": torch.bfloat16, **SMALL, **options})


def empty(**options: Any) -> nn.Module:
    with empty_weights():
        return model(**options)


def by_block(network: nn.Module, **options: Any) -> nn.Module:
    options = {"method": LayerWise(**RECIPE), "progress": False, **options}
    return adaround_blocks(network, DATA, "model.layers", QUANTIZER, **options)


def plain(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model; of torchao's, what they hold."""
    parts = {}
    for name, value in (*network.named_parameters(remove_duplicate=False), *network.named_buffers()):
        if hasattr(value, "qdata"):
            parts |= {f"{name}.{part}": getattr(value, part) for part in ("qdata", "scale", "zero_point")}
        else:
            parts[name] = value
    return parts


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = plain(one), plain(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert value.device == second[name].device, name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {}),
        ({"dtype": torch.float32, "use_cache": True}, {}),
        ({}, {"max_shard_size": "3KB"}),
    ],
    ids=["one file", "tied", "float32 and a cache", "shards"],
)
def test_the_result_is_that_of_weights_in_memory(tmp_path: Path, options: Any, saved: Any) -> None:
    whole = model(**options)
    whole.save_pretrained(tmp_path, **saved)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (not saved)
    network = empty(**options)
    learned = by_block(network, weights=tmp_path)
    assert learned is network
    assert_same(learned, by_block(whole))
    assert len(get_report(learned).layers) == 14
    with torch.no_grad():
        assert torch.equal(learned(**DATA[0]).logits, whole(**DATA[0]).logits)
    # nothing is mapped to the files any more
    for file in tmp_path.glob("*.safetensors"):
        with file.open("r+b") as written:
            written.write(bytes(file.stat().st_size))
    with torch.no_grad():
        assert torch.equal(learned(**DATA[0]).logits, whole(**DATA[0]).logits)


def test_parts_may_be_in_memory(tmp_path: Path) -> None:
    """A block, or the embedding; what is in memory stays as it is."""
    whole = model()
    whole.save_pretrained(tmp_path)
    network: Any = empty()
    network.model.layers[1] = copy.deepcopy(whole.model.layers[1])
    network.model.embed_tokens = copy.deepcopy(whole.model.embed_tokens)
    file = tmp_path / "model.safetensors"
    stored = {
        name: value + 1 if "layers.1" in name or "embed" in name else value for name, value in load_file(file).items()
    }
    save_file(stored, file)
    assert_same(by_block(network, weights=file), by_block(whole))


def test_decisions_are_recalled_from_a_checkpoint(tmp_path: Path) -> None:
    """Of weights in memory, too."""
    whole = model()
    whole.save_pretrained(tmp_path / "model")
    one = by_block(empty(), weights=tmp_path / "model", checkpoint=tmp_path / "kept")
    other = by_block(empty(), weights=tmp_path / "model", checkpoint=tmp_path / "kept")
    third = by_block(whole, checkpoint=tmp_path / "kept")
    assert get_report(one).recalled == 0
    assert get_report(other).recalled == get_report(third).recalled > 0
    assert_same(one, other)
    assert_same(one, third)


def test_one_block_is_there_at_a_time(tmp_path: Path) -> None:
    """The embedding and the head while the model runs; in the model's own blocks nothing while they are learned."""
    model().save_pretrained(tmp_path)
    network: Any = empty()
    parts = [network.model.embed_tokens, *network.model.layers, network.lm_head]

    def there() -> list[bool]:
        return [not is_empty(part) for part in parts]

    stored = stored_weights(network, tmp_path)
    assert stored is not None
    seen: list[list[bool]] = []
    handles = stored.lend(network, "model.layers", ["model.layers.0", "model.layers.1"])
    handles.append(network.model.layers[1].mlp.register_forward_pre_hook(lambda *_: seen.append(there())))
    with torch.no_grad():
        network(**DATA[0])
    for handle in handles:
        handle.remove()
    assert seen == [[True, False, True, True]]
    assert there() == [False] * 4
    for _ in learned_blocks(network, DATA, "model.layers", lambda *_: QUANTIZER, weights=stored, method="nearest"):
        assert there() == [False] * 4


def test_a_model_is_changed_when_all_blocks_are_done(tmp_path: Path) -> None:
    whole: Any = model()
    whole.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    whole.save_pretrained(tmp_path)
    network = empty()
    before = dict(network.named_parameters(remove_duplicate=False))
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules()]
    with pytest.raises(NonFiniteError):
        by_block(network, weights=tmp_path)
    assert all(value is before[name] for name, value in network.named_parameters(remove_duplicate=False))
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules()] == hooks


# --- files again


@pytest.mark.parametrize("corrected", [False, True], ids=["as it was", "biases"])
def test_transformers_saves_and_loads(tmp_path: Path, corrected: bool) -> None:
    """With biases where each linear layer has one and the configuration says so."""
    model(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    method = LayerWise(**{**RECIPE, "correct_bias": corrected})
    learned: Any = by_block(empty(tie_word_embeddings=True), weights=tmp_path / "float", method=method)
    if corrected:
        linears = [module for module in learned.model.layers.modules() if isinstance(module, nn.Linear)]
        assert any(linear.bias is not None for linear in linears)
        for linear in linears:
            if linear.bias is None:
                linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=linear.weight.dtype))
        learned.config.attention_bias = learned.config.mlp_bias = True
    learned.config.quantization_config = TorchAoConfig(IntxWeightOnlyConfig(torch.int4))
    learned.hf_quantizer = AutoHfQuantizer.from_config(learned.config.quantization_config, pre_quantized=True)
    learned.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert_same(learned, loaded)
    assert type(loaded.model.layers[1].mlp.up_proj.weight) is IntxUnpackedToInt8Tensor
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(**DATA[0]).logits, learned(**DATA[0]).logits)


# --- Neural Compressor


def calibrate(network: nn.Module) -> None:
    with torch.no_grad():
        for batch in DATA:
            network(**batch)


def configuration(**options: Any) -> AdaRoundConfig:
    return AdaRoundConfig(**{"act_dtype": "fp32", "blocks": "model.layers", **RECIPE, **options})


def test_neural_compressor_reads_weights_block_by_block(tmp_path: Path) -> None:
    """In whatever dtype they are stored, as float32; its own load() fills an empty model."""
    whole = model(tie_word_embeddings=True)
    whole.save_pretrained(tmp_path / "float")
    expected = quantize(whole.float(), configuration(), run_fn=calibrate)
    config = configuration(model_path=str(tmp_path / "float"))
    packed = quantize(empty(tie_word_embeddings=True), config, run_fn=calibrate, inplace=False)
    assert_same(packed, expected)
    assert len(get_report(packed).layers) == 14
    packed.save(tmp_path / "packed")
    loaded = load(tmp_path / "packed", original_model=empty(tie_word_embeddings=True))
    with torch.no_grad():
        logits = packed(**DATA[0]).logits
        assert torch.equal(logits, expected(**DATA[0]).logits)
        assert torch.equal(logits, loaded(**DATA[0]).logits)


def test_neural_compressor_needs_blocks_and_files_of_empty_weights(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    path = str(tmp_path)
    for network, options, match in (
        (empty(), {}, "model: has tensors on the device meta. Pass model_path="),
        (empty(), {"blocks": None}, "model: has tensors on the device meta"),
        (empty(blocks=1), {"model_path": path}, "model_path: the files hold what the model has not"),
        (empty(), {"model_path": path, "blocks": None}, "model_path: is read block by block"),
        (model(dtype=torch.float32), {"model_path": path}, "model_path: is given, but"),
    ):
        with pytest.raises((InvalidModelError, InvalidOptionError), match=match):
            quantize(network, configuration(**options), run_fn=calibrate)


def test_the_head_is_left_in_float_where_that_is_asked() -> None:
    network = model(blocks=1, dtype=torch.float32)
    packed: Any = quantize(network, configuration(blocks=None, quant_lm_head=False), run_fn=calibrate)
    assert type(packed.lm_head) is nn.Linear
    assert len(get_report(packed).layers) == 7


# --- bad input


def edited(folder: Path, change: Any) -> Path:
    """The files of the model, with its tensors changed."""
    model().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def refused(weights: Any, match: str, kind: type[Exception] = InvalidModelError, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        by_block(empty(**options), weights=weights)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(NAME), rf"^weights: the files lack {NAME}\."),
        (lambda tensors: tensors.update(other=torch.ones(1)), r"hold what the model has not: other\."),
        (lambda tensors: tensors.update({NAME: torch.ones(32, 8)}), rf"hold {NAME} \(32, 8\) in place of \(32, 16\)"),
        (lambda tensors: tensors.update({NAME: torch.ones(32, 16).char()}), rf"that is not read {NAME} as I8"),
    ],
    ids=["missing", "unexpected", "another shape", "another dtype"],
)
def test_tensors_are_named_that_do_not_fit(tmp_path: Path, change: Any, match: str) -> None:
    refused(edited(tmp_path, change), match)


def test_more_than_a_few_names_are_counted(tmp_path: Path) -> None:
    model(blocks=1).save_pretrained(tmp_path)
    refused(tmp_path, r"lack model\.layers\.1\.\S+, .* and 5 more")


def test_tied_weights_need_one_tensor(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    refused(tmp_path, "hold both of what is tied in the model: .*embed_tokens.*lm_head", tie_word_embeddings=True)
    model(tie_word_embeddings=True).save_pretrained(tmp_path)
    refused(tmp_path, r"lack lm_head\.weight\.")


def test_buffers_that_no_file_has_must_have_been_computed(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    with torch.device("meta"):
        network = model()
    with pytest.raises(InvalidModelError, match=r"rotary_emb\.inv_freq.*empty_weights"):
        by_block(network, weights=tmp_path)


def test_buffers_that_files_have_are_read(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(2).eval()
    norm(torch.ones(3, 2))
    save_file({name: value + 1 for name, value in norm.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        made = nn.BatchNorm1d(2)
    stored = stored_weights(made, tmp_path)
    assert stored is not None
    stored.fill(made)
    for name, value in norm.state_dict().items():
        assert torch.equal(made.state_dict()[name], value + 1)


def test_files_are_needed_for_empty_weights_alone(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    refused(None, "model: has tensors on the device meta. Pass weights=")
    with pytest.raises(InvalidOptionError, match="weights: is given, but"):
        by_block(model(), weights=tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    refused(tmp_path, "is no file, nor a folder with model.safetensors", InvalidOptionError)
    refused("hub/name", "'hub/name' is no file", InvalidOptionError)
    file, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    refused(tmp_path, "index.json' is no index of shards", InvalidOptionError)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "a.safetensors"}}))
    refused(tmp_path, r"a\.safetensors' cannot be read", InvalidOptionError)
    model().save_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, r"model\.safetensors' cannot be read", InvalidOptionError)


def test_an_interrupt_leaves_nothing_lent(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    network: Any = empty()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = network.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        by_block(network, weights=tmp_path)
    handle.remove()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert len(get_report(by_block(network, weights=tmp_path)).layers) == 14
