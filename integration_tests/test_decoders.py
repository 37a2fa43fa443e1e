"""Language models of transformers: through Neural Compressor's configuration, and block by block."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch.quantization import quantize
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin import (
    BlockWise,
    Finetune,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    LayerWise,
    NonFiniteError,
    adaround,
    get_report,
)
from adaround_plugin.graph.compat import tree_flatten
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.open import open_host
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.hosts.pt2e.host import PAIR
from adaround_plugin.inc import AdaRoundConfig
from adaround_plugin.sequential.blocks import adaround_blocks
from adaround_plugin.sequential.learning import learned_blocks
from adaround_plugin.sequential.programs import PairedBlock, exported
from integration_tests.benchmarks import decoder
from integration_tests.benchmarks.llama import llama
from integration_tests.models import QUICK, RECIPE

# what transformers keeps in a global while it runs a model; the exported program does without
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")

QUANTIZER = AdaRoundWeightOnlyQuantizer(weight_bits=3, group_size=16)


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


def test_blocks_are_learned_on_batches_of_one_sequence() -> None:
    """Values that only depend on the number of sequences are the same in all batches, but not in minibatches."""
    data = [{"input_ids": ids(1, 12, seed=seed)} for seed in range(4)]
    prepared = prepare_pt2e(decoder.export(decoder.Logits(llama()), data[0]), QUANTIZER)
    with torch.no_grad():
        prepared(**data[0])
    learned = adaround(prepared, data, BlockWise(layers=QUICK, iterations=3), progress=False)
    blocks = get_report(learned).blocks
    assert any(block.iterations for block in blocks)


OPTIONS: dict[str, Any] = {"method": LayerWise(**RECIPE), "progress": False}


def by_block(model: nn.Module, data: list[dict[str, Tensor]], **options: Any) -> nn.Module:
    return adaround_blocks(model, data, "model.layers", QUANTIZER, **{**OPTIONS, **options})


def error(model: nn.Module, exact: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """Of the logits, over the variance of the float model's."""
    with torch.no_grad():
        pairs = [(model(**batch).logits.float(), exact(**batch).logits.float()) for batch in data]
    square, variance = (
        sum(float(values) for values in each)
        for each in zip(*(((one - other).square().mean(), other.var()) for one, other in pairs), strict=True)
    )
    return square / variance


def test_blocks_are_learned_one_by_one() -> None:
    """Of several lengths, with a cache; what is outside of the blocks stays, and the report has all layers."""
    exact = llama(use_cache=True, blocks=2)
    data = [{"input_ids": ids(4, 12, seed=seed)} for seed in range(3)] + [{"input_ids": ids(4, 9)}]
    learned = by_block(copy.deepcopy(exact), data)
    nearest = by_block(copy.deepcopy(exact), data, method="nearest")
    assert error(learned, exact, data) < 0.8 * error(nearest, exact, data)
    report = get_report(learned)
    names = [layer.name for layer in report.layers]
    assert len(names) == 14
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"} < set(names)
    assert torch.equal(learned.lm_head.weight, exact.lm_head.weight)
    assert learned.generate(data[0]["input_ids"][:1], max_new_tokens=2, do_sample=False).shape == (1, 14)


def test_each_stream_of_a_pair_takes_its_own_hidden_states() -> None:
    block = nn.Linear(4, 4).eval()
    call = ((), {"input": torch.ones(2, 3, 4)})
    leaves, structure = tree_flatten(call)
    paired = PairedBlock(block, structure, [None] * len(leaves), 0)
    batch = {"hidden": torch.ones(2, 3, 4), "other": torch.full((2, 3, 4), 2.0), "tensors": {}}
    prepared = prepare_pt2e(exported(paired, [((), batch)]), AdaRoundWeightOnlyQuantizer(weight_bits=8))
    with torch.no_grad():
        prepared(**batch)
        prepared.meta[PAIR] = "hidden", "other"
        streams = open_streams(open_host(prepared))
        exact, quantized = (stream.outputs([batch["hidden"], batch["other"]], ends_of(stream))[0] for stream in streams)
        torch.testing.assert_close(exact, block(batch["hidden"]))
        torch.testing.assert_close(quantized, block(batch["other"]), atol=0.02, rtol=0)
        assert float((exact - quantized).abs().max()) > 0.1


def test_nothing_of_a_block_stays_behind() -> None:
    """Exports of torch leave the weights that they traced in its globals."""
    kept: list[weakref.ref[Any]] = []
    data = [{"input_ids": ids(4, 12)}]
    for block in learned_blocks(llama(blocks=2), data, "model.layers", lambda *_: QUANTIZER, **OPTIONS):
        kept += [weakref.ref(parameter) for parameter in (*block.paired.parameters(), *block.program.parameters())]
        del block
    gc.collect()
    assert len(kept) > 20
    assert not [one for one in kept if one() is not None]


def test_a_block_makes_up_for_the_errors_of_those_before_it() -> None:
    """The quantized stream's hidden states are those of the learned blocks, the targets the float stream's."""
    exact = llama(blocks=2)
    data = [{"input_ids": ids(4, 12, seed=seed)} for seed in range(3)]
    apart = by_block(copy.deepcopy(exact), data, method=LayerWise(**{**RECIPE, "propagate_error": False}))
    made = by_block(copy.deepcopy(exact), data)
    assert error(made, exact, data) < error(apart, exact, data)


def test_a_model_in_bfloat16_stays_so() -> None:
    model = llama(blocks=2).bfloat16()
    exact = copy.deepcopy(model)
    data = [{"input_ids": ids(4, 12, seed=seed)} for seed in range(3)]
    quantizer = AdaRoundWeightOnlyQuantizer(weight_bits=4, group_size=16, scale_dtype=torch.bfloat16)
    learned: Any = adaround_blocks(model, data, "model.layers", quantizer, **OPTIONS)
    assert learned is model
    block = learned.model.layers[1]
    assert block.input_layernorm.weight.dtype == torch.bfloat16
    weight = block.mlp.up_proj.weight
    assert weight.dtype == weight.scale.dtype == torch.bfloat16
    assert int(weight.qdata.min()) >= -8
    assert error(learned, exact, data) < 0.1


def test_padding_changes_nothing_block_by_block() -> None:
    batches = [ids(2, 12), ids(2, 12, seed=1)]
    one, other = (by_block(llama(), padded(batches, 5, token), token_mask="attention_mask") for token in (0, 7))
    state = other.state_dict()
    for name, value in one.state_dict().items():
        dense = [value.dequantize(), state[name].dequantize()] if hasattr(value, "qdata") else [value, state[name]]
        assert torch.equal(*dense)


class Uneven(nn.Module):
    """Blocks that are told their number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = self.told(block, x, number)
        return x

    @staticmethod
    def told(block: nn.Module, x: Tensor, number: int) -> Tensor:
        return block(x) if number == 0 else block(input=x)


def test_what_cannot_be_learned_block_by_block_is_refused() -> None:
    data = [{"input_ids": ids(2, 6)}]
    with pytest.raises(InvalidModelError, match=r"'layers' is no list of blocks; there are \['model.layers'\]"):
        adaround_blocks(llama(), data, "layers", QUANTIZER)
    with pytest.raises(InvalidModelError, match="train mode"):
        by_block(llama().train(), data)
    with pytest.raises(InvalidModelError, match=r"block 1.*other arguments"):
        adaround_blocks(Uneven().eval(), [torch.ones(2, 3, 4)], "blocks", QUANTIZER)
    with pytest.raises(InvalidBatchError, match="no batches"):
        by_block(llama(), [])
    with pytest.raises(InvalidBatchError, match=r"batch 0.*'mask'"):
        by_block(llama(), data, token_mask="mask")
    with pytest.raises(InvalidOptionError, match="quantizer"):
        adaround_blocks(llama(), data, "model.layers", "w4")  # type: ignore[arg-type]


def test_a_model_is_changed_when_all_blocks_are_done() -> None:
    model = llama(blocks=2)
    last: Any = model.model.layers[1]
    last.mlp.up_proj.weight.data[0, 0] = torch.nan
    before = list(model.model.layers)
    with pytest.raises(NonFiniteError):
        by_block(model, [{"input_ids": ids(2, 6)}])
    assert list(model.model.layers) == before
    assert not [name for name, value in model.state_dict().items() if hasattr(value, "qdata")]


def test_neural_compressor_packs_what_was_learned_block_by_block() -> None:
    exact = llama(use_cache=True, blocks=2)
    batches = [*(ids(4, 12, seed=seed) for seed in range(3)), ids(4, 9)]
    options: dict[str, Any] = {"bits": 3, "act_dtype": "fp32", "group_size": 16, "blocks": "model.layers"}
    packed = quantize(copy.deepcopy(exact), AdaRoundConfig(**options, **RECIPE), run_fn=running(batches))
    report = get_report(packed)
    assert len(report.layers) == 14
    assert ("lm_head", "Linear", "outside of model.layers: left in float") in report.skipped
    assert type(packed.lm_head) is nn.Linear
    assert type(packed.model.layers[1].mlp.up_proj).__name__ == "INCWeightOnlyLinear"
    nearest = quantize(copy.deepcopy(exact), AdaRoundConfig(**options, method="nearest"), run_fn=running(batches))
    data = [{"input_ids": batch} for batch in batches]
    assert error(packed, exact, data) < 0.8 * error(nearest, exact, data)


def test_blocks_are_those_of_an_eager_model_with_float_activations() -> None:
    with pytest.raises(InvalidOptionError, match="blocks"):
        quantize(llama(), AdaRoundConfig(blocks="model.layers"), run_fn=running([ids(2, 6)]))


def test_neural_compressor_takes_no_model_in_bfloat16() -> None:
    with pytest.raises(InvalidModelError, match=r"bfloat16.*float32"):
        quantize(llama().bfloat16(), AdaRoundConfig(act_dtype="fp32"), run_fn=running([ids(2, 6)]))


def test_blocks_are_recalled_from_a_checkpoint(tmp_path: Path) -> None:
    data = [{"input_ids": ids(4, 8, seed=seed)} for seed in range(2)]
    one, other = (by_block(llama(blocks=2), data, checkpoint=tmp_path / "kept") for _ in range(2))
    assert get_report(one).recalled == 0
    assert get_report(other).recalled > 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"model.layers.0", "model.layers.1"}
    assert error(one, llama(blocks=2), data) == error(other, llama(blocks=2), data)


class Stack(nn.Module):
    """Blocks one after the other, called with what else they take."""

    def __init__(self, *blocks: nn.Module, **others: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks, self.others = nn.ModuleList(blocks), others

    def forward(self, x: Tensor) -> Tensor:
        others = {name: other(x) for name, other in self.others.items()}
        for block in self.blocks:
            x = block(x, **others)
        return x


@torch.no_grad()
def stack_error(stack: nn.Module, exact: nn.Module) -> float:
    x = hidden(16)[0]
    return float((stack(x) - exact(x)).square().mean() / exact(x).var())


class Mixed(nn.Module):
    """A normalization in float32, and a layer in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
        self.register_buffer("steps", torch.arange(16) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((self.norm(x) + self.steps).to(self.layer.weight.dtype)).float() + x


def test_each_tensor_keeps_its_dtype() -> None:
    model = Stack(Mixed(), Mixed()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned: Any = adaround_blocks(model, hidden(16), "blocks", QUANTIZER, **OPTIONS)
    block = learned.blocks[0]
    assert block.layer.weight.dtype == block.layer.bias.dtype == torch.bfloat16
    for name in ("blocks.1.norm.weight", "blocks.1.steps"):
        assert learned.state_dict()[name].dtype == torch.float32
        assert torch.equal(learned.state_dict()[name], before[name])
    assert learned(hidden(16)[0]).isfinite().all()


def hidden(width: int) -> list[Tensor]:
    """Batches of hidden states, of several lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, length, width, generator=generator) for length in (6, 6, 5)]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.layer((x @ x.transpose(1, 2) / 4 + mask).softmax(2) @ x)


def test_masks_of_infinities_are_taken() -> None:
    """What is added to scores, as plain decoders of torch have it."""

    def ahead(x: Tensor) -> Tensor:
        return torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)

    exact = Stack(Attending(), Attending(), mask=ahead).eval()
    learned = adaround_blocks(copy.deepcopy(exact), hidden(16), "blocks", QUANTIZER, **OPTIONS)
    assert len(get_report(learned).layers) == 2
    assert stack_error(learned, exact) < 0.05


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, by: float) -> Tensor:
        return self.layer(x) * by


def test_batches_in_which_blocks_are_called_otherwise_are_refused() -> None:
    """One program takes all: numbers would be those of the first batch, and no mask is not a mask of ones."""
    scaled = Stack(Scaled(), by=lambda x: 1 / x.shape[1]).eval()
    differs = r"batch 2: calls the blocks with 0\.2 for \[1\]\['by'\], which is 0\.1"
    with pytest.raises(InvalidBatchError, match=differs):
        adaround_blocks(scaled, hidden(16), "blocks", QUANTIZER, **OPTIONS)
    data = [*padded([ids(2, 7)], 5, 0), {"input_ids": ids(2, 12), "attention_mask": torch.ones(2, 12).long()}]
    with pytest.raises(InvalidBatchError, match=r"batch 1: calls the blocks with None for .*mask.*pad some of each"):
        by_block(llama(), data, token_mask="attention_mask")


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.conv = nn.Linear(16, 16), nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.relu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x)


def test_blocks_may_be_of_several_kinds() -> None:
    """Options of layers that only some have, convolutions, which no tensor of torchao is for, and nothing to learn."""
    exact = Stack(Plain(), Convolving(), nn.LayerNorm(16)).eval()
    quantizer = AdaRoundWeightOnlyQuantizer({"block.mix": {"weight_bits": 8}}, weight_bits=4)
    learned: Any = adaround_blocks(copy.deepcopy(exact), hidden(16), "blocks", quantizer, **OPTIONS)
    report = get_report(learned)
    assert {layer.name: layer.bits for layer in report.layers} == {"blocks.0.up": 4, "blocks.1.mix": 8}
    assert report.skipped == [("blocks.1.conv", "Conv1d", "left in float by the quantizer")]
    assert torch.equal(learned.blocks[1].conv.weight, exact.blocks[1].conv.weight)
    assert stack_error(learned, exact) < 0.05
    wrong = AdaRoundWeightOnlyQuantizer({"block.down": None}, weight_bits=4)
    with pytest.raises(InvalidOptionError, match=r"layers\['block.down'\]"):
        adaround_blocks(exact, hidden(16), "blocks", wrong, **OPTIONS)
    with pytest.raises(InvalidModelError, match="no layer that is quantized"):
        adaround_blocks(Stack(nn.LayerNorm(16)).eval(), hidden(16), "blocks", QUANTIZER, **OPTIONS)


def test_a_block_may_be_left_in_float_through_neural_compressor() -> None:
    exact = llama(blocks=2)
    config = AdaRoundConfig(bits=3, act_dtype="fp32", group_size=16, blocks="model.layers", **RECIPE)
    config.set_local("model.layers.1", AdaRoundConfig(dtype="fp32"))
    packed: Any = quantize(copy.deepcopy(exact), config, run_fn=running([ids(4, 12), ids(4, 9)]))
    report = get_report(packed)
    assert len(report.layers) == 7
    assert ("model.layers.1.mlp.up_proj", "Linear", "left in float by the quantizer") in report.skipped
    assert type(packed.model.layers[1].mlp.up_proj) is nn.Linear
    assert type(packed.model.layers[0].mlp.up_proj).__name__ == "INCWeightOnlyLinear"


class Crossing(nn.Module):
    """Reads another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.layer((x @ other.transpose(1, 2) / 4).softmax(2) @ other)


def test_other_tensors_than_the_hidden_states_may_vary_in_length() -> None:
    lengths = iter([3, 3, 5, 3, 5])  # the first batch goes through twice

    def other(x: Tensor) -> Tensor:
        return torch.randn(len(x), next(lengths), 16, generator=torch.Generator().manual_seed(1))

    data = [one[:, :5] for one in hidden(16)]
    learned = adaround_blocks(Stack(Crossing(), Crossing(), other=other).eval(), data, "blocks", QUANTIZER, **OPTIONS)
    assert len(get_report(learned).layers) == 2


class Halving(nn.Module):
    """Writes to its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x.mul_(0.5)))


class Half(Halving):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x * 0.5))


def test_blocks_may_write_to_their_inputs() -> None:
    learned: list[Any] = []
    for kind in (Halving, Half):
        torch.manual_seed(0)
        data = hidden(16)
        learned.append(adaround_blocks(Stack(kind(), kind()).eval(), data, "blocks", QUANTIZER, **OPTIONS))
        assert all(map(torch.equal, data, hidden(16)))
    one, other = (get_report(model) for model in learned)
    assert one.output_error == other.output_error
    assert [layer.learned_error for layer in one.layers] == [layer.learned_error for layer in other.layers]


def test_the_report_has_what_was_done_to_each_block() -> None:
    layers = LayerWise(**{**RECIPE, "column_weighting": "auto"})
    options = {**OPTIONS, "method": BlockWise(layers=layers, iterations=3), "finetune": Finetune(iterations=2)}
    report = get_report(adaround_blocks(Stack(Plain(), Plain()).eval(), hidden(16), "blocks", QUANTIZER, **options))
    assert {layer for block in report.blocks for layer in block.layers} == {"blocks.0.up", "blocks.1.up"}
    assert [block.name for block in report.blocks if "network" in block.name] == [
        "blocks.0.network",
        "blocks.1.network",
    ]
    assert report.finetuning is None
    taken = [trial.recipe for trial in report.trials if trial.taken]
    assert [name.partition(":")[0] for name in taken] == ["blocks.0", "blocks.1"]
    if report.recipe == "chosen for each block":
        assert report.settings == {}
    else:
        assert all(name.endswith(report.recipe) for name in taken)
    assert report.memory["written"] == 0
    assert "reconstruct" in report.seconds
