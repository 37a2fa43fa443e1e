"""Cross-layer equalization: what it computes stays, ranges become equal, and hosts take the result as the model."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.prune import l1_unstructured
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from adaround_plugin import (
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    NonFiniteError,
    equalize,
    get_equalization_report,
    get_report,
)
from adaround_plugin.equalization.capped_relu import CappedReLU
from adaround_plugin.graph.operators import module_op
from integration_tests.benchmarks import glyphs, networks
from integration_tests.equalization_models import LONELY, ZOO, Net, randomized, sequence
from integration_tests.models import images, learn, prepared_model
from integration_tests.pt2e_models import exported, xnnpack


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.clone())


def folded_ranges(model: nn.Module, name: str, norm: str | None) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each output and of each input channel of a layer, by probing it with unit inputs."""
    layer = copy.deepcopy(model.get_submodule(name)).double()
    op = module_op(layer)
    rows = op.rows(layer.weight.detach())
    factor = torch.ones(rows.shape[0] * rows.shape[1]).double()
    if norm is not None:
        bn = copy.deepcopy(model.get_submodule(norm)).double()
        factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    inputs = layer.in_features if op.kind == "linear" else layer.in_channels
    magnitude = (rows * factor.reshape(*rows.shape[:2], 1)).abs()
    magnitude = magnitude.reshape(*rows.shape[:2], inputs // op.groups, -1).amax(3)
    return magnitude.amax(2).flatten(), magnitude.amax(1).flatten()


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_the_function_stays_and_all_pairs_are_found(case):
    model = randomized(case.build()).double()
    x = images(3, *case.shape).double()
    equalized = equalize(model, (x[:2],), limit=math.inf)
    report = get_equalization_report(equalized)
    assert [(pair.first, pair.second) for pair in report.pairs] == case.pairs
    assert report.converged
    before, after = outputs(model, x), outputs(equalized, x)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10 * float(before.abs().max()))
    assert report.difference < 1e-10
    for pair in report.pairs:
        assert pair.scales[0] < 0.9 or pair.scales[1] > 1.1, "a pair that was equal already tests nothing"
        assert pair.after[0].smallest == pytest.approx(pair.after[1].smallest, rel=0.01)
        assert pair.after[0].largest == pytest.approx(pair.after[1].largest, rel=0.01)


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_every_layer_is_first_in_a_pair_or_has_a_reason(case):
    report = get_equalization_report(equalize(case.build().eval(), (images(2, *case.shape),)))
    layers = [name for name, module in case.build().named_modules() if module_op(module) is not None]
    told = [pair.first for pair in report.pairs] + [name for name, _, _ in report.skipped]
    assert sorted(told) == sorted(layers)


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_the_model_is_not_touched_and_the_result_looks_like_it(case):
    model = randomized(case.build())
    before, x = copy.deepcopy(model.state_dict()), images(2, *case.shape)
    kept = x.clone()
    equalized = equalize(model, (x,))
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(equalized) is type(model)
    assert [(name, type(module)) for name, module in equalized.named_modules()] == [
        (name, type(module)) for name, module in model.named_modules()
    ]
    # so that the equalized weights load into the original architecture
    fresh = case.build().eval()
    fresh.load_state_dict(equalized.state_dict())
    assert torch.equal(outputs(fresh, x), outputs(equalized, x))


def test_a_traced_model_is_equalized_too():
    case = ZOO["inverted residual"]
    traced, x = fx.symbolic_trace(randomized(case.build())), images(2, *case.shape)
    equalized = equalize(traced, (x,))
    assert isinstance(equalized, fx.GraphModule)
    assert [(pair.first, pair.second) for pair in get_equalization_report(equalized).pairs] == case.pairs
    torch.testing.assert_close(outputs(equalized, x), outputs(traced, x))


def test_ranges_of_the_folded_weights_are_equal():
    model = randomized(ZOO["inverted residual"].build())
    before = folded_ranges(model, "0", "1")[0]
    equalized = equalize(model, (images(2, 3, 6, 6),), tolerance=1e-6, limit=math.inf)
    expand, (depthwise, filtered), project = (
        folded_ranges(equalized, name, norm) for name, norm in (("0", "1"), ("3", "4"), ("6", "7"))
    )
    torch.testing.assert_close(expand[0], filtered, rtol=1e-4, atol=0)
    torch.testing.assert_close(depthwise, project[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(expand[0], project[1], rtol=1e-4, atol=0)
    assert float(before.max() / before.min()) > 2 * float(expand[0].max() / expand[0].min())
    pair = get_equalization_report(equalized).pairs[0]
    spread, after = pair.before[0], pair.after[0]
    assert (spread.smallest, spread.largest) == pytest.approx((float(before.min()), float(before.max())), rel=1e-5)
    assert (after.smallest, after.largest) == pytest.approx((float(expand[0].min()), float(expand[0].max())), rel=1e-5)


@pytest.mark.parametrize(("build", "shape", "name", "words"), LONELY.values(), ids=LONELY)
def test_what_is_no_pair_is_told(build, shape, name, words):
    model = randomized(build())
    x = images(2, *shape)
    equalized = equalize(model, (x,))
    report = get_equalization_report(equalized)
    assert name not in [pair.first for pair in report.pairs]
    (told,) = [why for skipped, _, why in report.skipped if skipped == name]
    assert all(word in told for word in words)
    torch.testing.assert_close(outputs(equalized, x), outputs(model, x))


def test_all_tensors_of_an_output_are_compared():
    run = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2), "act": nn.ReLU6()}
    model = Net(lambda net, x: {"plain": x, "rest": [net.b(net.act(net.a(x))), x.shape[0]]}, **run).eval()
    report = get_equalization_report(equalize(model, (100 * images(2, 3),), relu6="replace"))
    assert len(report.pairs) == 1
    assert report.difference > 0


def test_a_model_without_layers_is_returned_as_it_is():
    report = get_equalization_report(equalize(nn.Sequential(nn.ReLU()).eval(), (images(2, 3),)))
    assert (report.pairs, report.skipped, report.difference) == ([], [], 0.0)


# --- ReLU6

CLIPPED = sequence(
    *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)),
    *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.AvgPool2d(2), nn.Hardtanh(0.0, 2.0)),
    *(nn.Flatten(), nn.ReLU6(), nn.Linear(54, 3)),
)


def clipped() -> tuple[nn.Module, Tensor]:
    """A network that clips many of its activations, and an input."""
    model, x = randomized(CLIPPED()).double(), 20 * images(4, 3, 8, 8).double()
    activations = model[:2](x)
    assert float((activations > 6).double().mean()) > 0.05
    return model, x


def test_caps_of_channels_keep_relu6():
    model, x = clipped()
    equalized = equalize(model, (x,))
    report = get_equalization_report(equalized)
    assert [(pair.first, pair.second) for pair in report.pairs] == [("0", "3"), ("3", "8")]
    assert report.pairs[1].between == ("4", "5", "6", "7")
    torch.testing.assert_close(outputs(equalized, x), outputs(model, x), rtol=1e-10, atol=1e-10)
    assert [name for name, module in equalized.named_modules() if isinstance(module, CappedReLU)] == ["2", "5", "7"]
    assert equalized[2].cap.shape == (6, 1, 1)
    assert equalized[7].cap.shape == (54,)
    # the later cap is of the same channels, each nine times, and three times as high
    torch.testing.assert_close(equalized[7].cap, 3 * equalized[5].cap.flatten().repeat_interleave(9))
    assert repr(equalized[2]) == "CappedReLU(channels=6)"


def test_relu6_replaced_is_relu_everywhere():
    model, x = clipped()
    equalized = equalize(model, (x,), relu6="replace")
    report = get_equalization_report(equalized)
    assert [(pair.first, pair.second) for pair in report.pairs] == [("0", "3"), ("3", "8")]
    assert [type(equalized[i]) for i in (2, 5, 7)] == [nn.ReLU] * 3
    assert equalized[2].inplace
    unclipped = copy.deepcopy(model)
    for i in (2, 5, 7):
        unclipped[i] = nn.ReLU()
    torch.testing.assert_close(outputs(equalized, x), outputs(unclipped, x), rtol=1e-10, atol=1e-10)
    assert report.difference > 0.01
    assert [type(model[i]) for i in (2, 5, 7)] == [nn.ReLU6, nn.Hardtanh, nn.ReLU6]


def test_relu6_kept_parts_the_layers():
    model, x = clipped()
    equalized = equalize(model, (x,), relu6="keep")
    report = get_equalization_report(equalized)
    assert report.pairs == []
    told = {name: reason for name, _, reason in report.skipped}
    assert "'2'" in told["0"]
    assert "'5'" in told["3"]
    assert all("kept" in told[name] for name in ("0", "3"))
    assert torch.equal(outputs(equalized, x), outputs(model, x))


# --- activations


def between(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a module is called with."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for x in batches:
        outputs(model, x)
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_activations_get_one_range_and_the_function_stays(case):
    model = randomized(case.build())
    batches = [images(n, *case.shape, seed=n) for n in (3, 5)]
    equalized = equalize(model, (batches[0],), activations=batches, limit=math.inf)
    report = get_equalization_report(equalized)
    assert [(pair.first, pair.second) for pair in report.pairs] == case.pairs
    assert (report.iterations, report.converged) == (1, True)
    assert report.difference < 1e-3
    for x in batches:
        torch.testing.assert_close(outputs(equalized, x), outputs(model, x), rtol=1e-3, atol=1e-3)
    for pair in report.pairs:
        assert pair.scales[0] < 0.9 or pair.scales[1] > 1.1, "activations that were level already test nothing"
        assert pair.after[0].smallest == pytest.approx(pair.after[0].largest, rel=1e-6)
        assert pair.after[0].median == pytest.approx(pair.before[0].median, rel=1e-6)
    # a second time there is nothing left to do
    again = get_equalization_report(equalize(equalized, (batches[0],), activations=batches))
    assert all(scale == pytest.approx(1, abs=1e-3) for pair in again.pairs for scale in pair.scales)


def test_a_range_is_what_one_activation_in_a_thousand_exceeds():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(0.5), nn.Conv2d(4, 2, 1)))
    batches = [images(n, 3, 25, 20, seed=n) for n in (8, 4)]
    (pair,) = get_equalization_report(equalize(model, (batches[0],), activations=batches)).pairs
    seen = [between(model, "2", [x]).abs().transpose(0, 1).flatten(1).sort(1).values.double() for x in batches]
    # four of 4,000 are larger, two of 2,000
    expected = (8 * seen[0][:, -5] + 4 * seen[1][:, -3]) / 12
    assert pair.before[0].smallest == pytest.approx(float(expected.min()), rel=1e-6)
    assert pair.before[0].largest == pytest.approx(float(expected.max()), rel=1e-6)


def test_flattened_positions_share_the_range_of_their_channel():
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    x = images(5, 2, 4, 4)
    equalized = equalize(model, (x,), activations=[x], limit=math.inf)
    leveled = between(equalized, "3", [x]).unflatten(1, (3, 4)).amax((0, 2))
    torch.testing.assert_close(leveled, leveled[:1].expand(3))


def test_labels_are_dropped_and_batches_may_be_an_iterator():
    model = randomized(ZOO["residual"].build())
    batches = [images(2, *ZOO["residual"].shape, seed=i) for i in range(2)]
    plain = equalize(model, (batches[0],), activations=batches)
    labelled = equalize(
        *(model, (batches[0],)), activations=((x, torch.zeros(2)) for x in batches), inputs=lambda batch: batch[0]
    )
    assert get_equalization_report(plain) == get_equalization_report(labelled)
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in labelled.state_dict().items())


def test_relu6_replaced_shows_what_it_clipped():
    model, x = clipped()
    model, x = model.float(), x.float()
    capped, replaced = (equalize(model, (x,), activations=[x], relu6=relu6) for relu6 in ("cap", "replace"))
    torch.testing.assert_close(outputs(capped, x), outputs(model, x), rtol=1e-4, atol=1e-4)
    assert get_equalization_report(capped).pairs[0].before[0].largest == pytest.approx(6)
    assert get_equalization_report(replaced).pairs[0].before[0].largest > 7


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], InvalidBatchError, "activations: .*no batches"),
        (images(2, 3), InvalidBatchError, "activations: .*Tensor"),
        ([images(2, 4)], InvalidBatchError, "batch 0: the model does not run on it"),
        (
            [images(2, 3), (images(2, 3), images(2, 3))],
            InvalidBatchError,
            "batch 1: .* does not fit the model's inputs",
        ),
        ([1e38 * torch.ones(2, 3)], NonFiniteError, "batch 0: layer '2' reads NaN or infinity"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batches, error, message):
    model = randomized(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    with torch.no_grad():
        model[0].weight.fill_(1e2)
    with pytest.raises(error, match=message):
        equalize(model, (images(2, 3),), activations=batches)


def test_one_activation_that_is_not_finite_is_refused():
    model = randomized(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)))
    batches = [images(2, 3, 40, 40), images(2, 3, 40, 40)]
    batches[1][0, 0, 7, 7] = 3e38
    with torch.no_grad():
        model[0].weight.fill_(1e2)
    with pytest.raises(NonFiniteError, match="batch 1: layer '2' reads NaN or infinity"):
        equalize(model, (batches[0],), activations=batches)


def test_batches_and_model_are_not_touched_and_no_hook_is_left():
    model = randomized(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)))
    batches, state = [images(4, 3), images(4, 3, seed=1)], copy.deepcopy(model.state_dict())
    kept = copy.deepcopy(batches)
    equalized = equalize(model, (batches[0],), activations=batches)
    assert all(torch.equal(one, other) for one, other in zip(batches, kept, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in (*model.modules(), *equalized.modules()))


@pytest.mark.parametrize("options", [{"inputs": len}, {"activations": [images(2, 3)], "inputs": 1}])
def test_inputs_map_a_batch_of_activations(options):
    with pytest.raises(InvalidOptionError, match="inputs: "):
        equalize(nn.Sequential(nn.Linear(3, 3)).eval(), (images(2, 3),), **options)


def test_activations_want_a_model_in_float32():
    with pytest.raises(InvalidModelError, match=r"parameter '0.weight': is torch.float64"):
        equalize(nn.Sequential(nn.Linear(3, 3)).eval().double(), (images(2, 3).double(),), activations=[images(2, 3)])


# --- high biases


def biased(second: nn.Module, act: nn.Module) -> nn.Module:
    """A network with a batch norm that puts some channels far above zero."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, second)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -0.5, 1.0, 1.0]))
        model[1].bias.copy_(torch.tensor([4.0, 3.0, 1.0, -5.0]))
        # statistics of these very inputs: no activation is more than three deviations below its mean
        activations = model[0](BIASED_INPUT)
        model[1].running_mean.copy_(activations.mean((0, 2, 3)))
        model[1].running_var.copy_(activations.var((0, 2, 3)))
    return model


BIASED_INPUT = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 2, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="replicate"),
        nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2)),
    ],
    ids=["bias", "no bias", "depthwise, replicated", "batch norm"],
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1)], ids=lambda act: type(act).__name__)
def test_absorbed_biases_lower_the_activations_and_keep_the_function(second, act):
    model = biased(copy.deepcopy(second), act)
    plain, equalized = (equalize(model, (BIASED_INPUT,), absorb_bias=absorb) for absorb in (False, True))
    assert [pair.absorbed for pair in get_equalization_report(plain).pairs] == [0]
    (pair,) = get_equalization_report(equalized).pairs
    assert (pair.absorbed, pair.note) == (2, "")
    torch.testing.assert_close(outputs(equalized, BIASED_INPUT), outputs(model, BIASED_INPUT), rtol=1e-10, atol=1e-10)
    high, low = (outputs(one[:3], BIASED_INPUT).amax((0, 2, 3)) for one in (plain, equalized))
    assert (low[:2] < 0.7 * high[:2]).all()
    torch.testing.assert_close(low[2:], high[2:])


def test_a_channel_always_at_its_cap_becomes_a_constant():
    model = biased(nn.Conv2d(4, 2, 1), nn.ReLU6())
    with torch.no_grad():
        model[1].bias[0] = 20
    equalized = equalize(model, (BIASED_INPUT,), absorb_bias=True)
    torch.testing.assert_close(outputs(equalized, BIASED_INPUT), outputs(model, BIASED_INPUT), rtol=1e-10, atol=1e-10)
    assert equalized[2].cap.flatten()[0] == 0


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (sequence(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), "affine batch norm"),
        (
            sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            "affine batch norm",
        ),
        (sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)), "zeros"),
        (sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3)), "zeros"),
        (
            sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 4, 1)),
            "activation function",
        ),
    ],
)
def test_biases_that_cannot_be_absorbed_are_told(model, note):
    float_model = randomized(model()).double()
    equalized = equalize(float_model, (BIASED_INPUT,), absorb_bias=True)
    (pair,) = get_equalization_report(equalized).pairs
    assert pair.absorbed == 0
    assert note in pair.note
    torch.testing.assert_close(outputs(equalized, BIASED_INPUT), outputs(float_model, BIASED_INPUT))


# --- options, errors, report


def test_a_limit_keeps_scales_small():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 1e-9
    (pair,) = get_equalization_report(equalize(model, (images(2, 3),))).pairs
    assert pair.scales[0] == pytest.approx(1e-2)
    (pair,) = get_equalization_report(equalize(model, (images(2, 3),), limit=math.inf)).pairs
    assert pair.scales[0] < 1e-3


def test_equalizing_twice_changes_little():
    case = ZOO["inverted residual"]
    x = images(2, *case.shape)
    once = equalize(randomized(case.build()), (x,), tolerance=1e-6, limit=math.inf)
    report = get_equalization_report(equalize(once, (x,), limit=math.inf))
    assert report.iterations == 1
    assert all(scale == pytest.approx(1, abs=1e-3) for pair in report.pairs for scale in pair.scales)


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        ({"relu6": "clip"}, "relu6"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"limit": 0.5}, "limit"),
    ],
)
def test_options_out_of_range_are_refused(options, subject):
    with pytest.raises(InvalidOptionError) as error:
        equalize(nn.Sequential(nn.Linear(3, 3)).eval(), (images(2, 3),), **options)
    assert error.value.subject == subject


@pytest.mark.parametrize("inputs", [images(2, 3), (images(2, 4),), (), (images(2, 3), 1)])
def test_inputs_that_do_not_fit_are_refused(inputs):
    with pytest.raises(InvalidOptionError) as error:
        equalize(nn.Sequential(nn.Linear(3, 3)).eval(), inputs)
    assert error.value.subject == "example_inputs"


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (nn.Sequential(nn.Linear(3, 3)), "model: is in train mode"),
        (nn.Sequential(nn.Linear(3, 3).train()).eval().append(nn.Dropout()), "module '1': is in train mode"),
        (nn.Sequential(nn.Linear(3, 3)).eval().bfloat16(), "parameter '0.weight': is torch.bfloat16"),
        (Branching().eval(), "torch.fx cannot trace it"),
    ],
)
def test_models_that_do_not_fit_are_refused(model, problem):
    with pytest.raises(InvalidModelError, match=problem):
        equalize(model, (images(2, 3),))


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(InvalidModelError, match="cannot be copied"):
        equalize(model, (images(2, 3),))


def test_a_prepared_model_is_refused():
    prepared = prepared_model(nn.Sequential(nn.Linear(3, 3)), [images(2, 3)])
    with pytest.raises(InvalidModelError, match="is prepared already"):
        equalize(prepared, (images(2, 3),))


def test_weights_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="layer '2'"):
        equalize(model, (images(2, 3),))


def test_the_report_is_plain_data():
    case = ZOO["residual"]
    equalized = equalize(randomized(case.build()), (images(2, *case.shape),))
    report = get_equalization_report(copy.deepcopy(equalized))
    kept = json.loads(report.to_json())
    assert kept["pairs"][0]["between"] == ["act"]
    assert [name for name, _, _ in kept["skipped"]] == ["stem", "conv2", "head"]
    text = str(report)
    assert all(name in text for name in ("conv1", "conv2", "stem", "head", "converged"))
    with pytest.raises(InvalidModelError, match="carries no report"):
        get_equalization_report(case.build())


# --- hosts


@pytest.mark.parametrize("name", ["inverted residual", "flatten", "residual"])
def test_fx_takes_the_result_as_the_model(name):
    case = ZOO[name]
    model = randomized(case.build())
    data = [images(6, *case.shape, seed=i) for i in range(2)]
    equalized = equalize(model, (data[0],))
    options = {"weight_bits": 8, "per_channel": False}
    learned, plain = (learn(prepared_model(one, data, **options), data) for one in (equalized, model))
    names = [layer.name for layer in get_report(plain).layers]
    assert [layer.name for layer in get_report(learned).layers] == names
    assert [layer.kind for layer in get_report(learned).layers] == [layer.kind for layer in get_report(plain).layers]
    reference = convert_to_reference_fx(copy.deepcopy(learned))
    quantized = convert_fx(learned)
    x = data[0]
    exact = outputs(model, x)
    for converted in (reference, quantized):
        assert float((outputs(converted, x) - exact).pow(2).mean() / exact.var()) < 0.02


def test_fx_takes_caps_of_channels():
    model = randomized(CLIPPED())
    data = [5 * images(6, 3, 8, 8, seed=i) for i in range(2)]
    learned = learn(prepared_model(equalize(model, (data[0],)), data, weight_bits=8), data)
    assert [layer.name for layer in get_report(learned).layers] == ["0", "3", "8"]
    exact = outputs(model, data[0])
    error = outputs(convert_to_reference_fx(learned), data[0]) - exact
    assert float(error.pow(2).mean() / exact.var()) < 0.01


@pytest.mark.parametrize("relu6", ["cap", "replace"])
def test_pt2e_takes_the_result_as_the_model(relu6):
    model = randomized(CLIPPED())
    data = [5 * images(6, 3, 8, 8, seed=i) for i in range(2)]
    equalized = equalize(model, (data[0],), relu6=relu6)
    prepared = prepare_pt2e(exported(equalized, data[0]), xnnpack(8, per_channel=False))
    for x in data:
        prepared(x)
    learned = learn(prepared, data, solver="gptq")
    assert [layer.name for layer in get_report(learned).layers] == ["0", "3", "8"]
    exact = outputs(equalized, data[0])
    error = convert_pt2e(learned)(data[0]) - exact
    assert float(error.pow(2).mean() / exact.var()) < 0.01


# --- what it is for


def test_activations_of_4_bits_fit_channels_of_one_range_better():
    network = networks.load("mobilenet")
    calibration, _ = glyphs.load("train", 128, seed=1)
    x, _ = glyphs.load("test", 200, seed=1)
    batches = list(calibration.split(64))
    exact, errors = outputs(network, x), []
    for model in (network, equalize(network, (batches[0],), activations=batches)):
        prepared = prepared_model(model, batches, weight_bits=8, activation_bits=4)
        learned = learn(prepared, batches, "nearest", max_columns=256)
        errors.append(float((outputs(convert_to_reference_fx(learned), x) - exact).pow(2).mean() / exact.var()))
    assert errors[1] < 0.9 * errors[0]


def rounded_per_tensor(model: nn.Module) -> nn.Module:
    """The model with batch norm folded and each weight rounded to nearest on one symmetric grid of 4 bits."""
    model = fuse(model)
    for module in model.modules():
        if module_op(module) is not None:
            scale = module.weight.detach().abs().max() / 7
            module.weight.data = (module.weight / scale).round() * scale
    return model


def test_a_grid_per_tensor_fits_the_equalized_mobilenet_better():
    network = networks.load("mobilenet")
    x, labels = glyphs.load("test", 200, seed=1)
    equalized = equalize(network, (x[:2],))
    assert get_equalization_report(equalized).difference < 1e-5
    exact = outputs(network, x)
    plain, better = (outputs(rounded_per_tensor(model), x) for model in (network, equalized))
    assert (better - exact).pow(2).mean() < 0.7 * (plain - exact).pow(2).mean()
    assert (better.argmax(1) == labels).sum() > (plain.argmax(1) == labels).sum()


class Named(nn.Module):
    """An activation that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU6()
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 6, 3), self.act), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_caps_take_every_name_of_an_activation():
    model, x = randomized(Named()).double(), 20 * images(4, 3, 8, 8).double()
    equalized = equalize(model, (x,))
    assert [(pair.first, pair.second) for pair in get_equalization_report(equalized).pairs] == [("first.0", "second")]
    assert equalized.act is equalized.first[1]
    torch.testing.assert_close(outputs(equalized, x), outputs(model, x), rtol=1e-10, atol=1e-10)


class Optional(nn.Module):
    """Takes another path where an input is left out, which a trace does not see."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.a, self.b, self.shape = nn.Linear(3, 4), nn.Linear(4, 3), shape

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.a(x)
        if self.shape == "fails" and other is not None:
            x = x * other
        if self.shape == "computes something else" and other is None:
            x = torch.tanh(x)
        return self.b(torch.relu(x))


@pytest.mark.parametrize("problem", ["fails", "computes something else"])
def test_a_trace_that_is_not_the_model_is_refused(problem):
    with pytest.raises(InvalidModelError, match=f"model: {problem}.* when torch.fx has traced it"):
        equalize(Optional(problem).eval(), (images(2, 3),))
