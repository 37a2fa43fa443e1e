"""Deliberate faults in the package, and whether a test finds each.

Every fault replaces one passage of one file, in a temporary copy of the repository; the checkout itself is only read.
The tests that should find it run there until one fails. It is no part of the tests' command, because it takes minutes:

    python -m integration_tests.mutations
    python -m integration_tests.mutations --only "zero point" "held out"
    python -m integration_tests.mutations --check

It stops at once where a passage is not found exactly once: the table below must follow the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["FAULTS", "Fault", "main"]

ROOT: Final = Path(__file__).resolve().parent.parent
_COPIED: Final = ("adaround_plugin", "integration_tests", "pyproject.toml")
_UNIT: Final = "adaround_plugin/tests/"
_WHOLE: Final = "integration_tests/"
# exit statuses of pytest
_PASSED, _FAILED = 0, 1


@dataclass(frozen=True)
class Fault:
    """A fault, and what should find it.

    Attributes:
        name: what is wrong, in words.
        file: below `adaround_plugin`.
        old, new: a passage that the file has exactly once, and what stands there instead.
        tests: files or node ids, from the repository's root.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS: Final = (
    # --- grids and schemes
    Fault(
        "the range of integers ends one too early",
        "rounding/grid.py",
        "return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1",
        "return -(2 ** (bits - 1)), 2 ** (bits - 1) - 2",
        (f"{_UNIT}test_grid.py",),
    ),
    Fault(
        "the zero point is ignored where integers become weights",
        "rounding/grid.py",
        "return (integers - zero_point).float() * scale",
        "return integers.float() * scale",
        (f"{_UNIT}test_grid.py",),
    ),
    Fault(
        "scales run along the wrong axis of the weight",
        "rounding/grid.py",
        "view[self.ch_axis] = -1",
        "view[1 - self.ch_axis] = -1",
        (f"{_UNIT}test_grid.py",),
    ),
    Fault(
        "ceil and the integer above it, in place of floor and ceil",
        "rounding/schemes.py",
        "    low = _coordinates(grid, weight).floor()\n    return _clip(grid, low), _clip(grid, low + 1)",
        "    low = _coordinates(grid, weight).ceil()\n    return _clip(grid, low), _clip(grid, low + 1)",
        (f"{_UNIT}test_schemes.py",),
    ),
    Fault(
        "stochastic rounding takes no account of the fraction",
        "rounding/schemes.py",
        "low + (drawn < coordinates - low)",
        "low + (drawn < 0.5)",
        (f"{_UNIT}test_schemes.py",),
    ),
    Fault(
        "the range of a weight with the largest error is taken",
        "rounding/ranges.py",
        "ratios.gather(0, errors.argmin(0, keepdim=True))",
        "ratios.gather(0, errors.argmax(0, keepdim=True))",
        (f"{_UNIT}test_ranges.py",),
    ),
    # --- operators and moments
    Fault(
        "the outputs of a transposed convolution are looked for on the axis of its inputs",
        "rounding/linear_op.py",
        'return 1 if self.kind == "conv_transpose" else 0',
        "return 0",
        (f"{_UNIT}test_linear_op.py",),
    ),
    Fault(
        "every group of a convolution reads the channels of the first",
        "rounding/gather_numba.py",
        "(g * channels + c) * channel_step",
        "c * channel_step",
        (f"{_UNIT}test_linear_op.py",),
    ),
    Fault(
        "the padding mode is ignored",
        "rounding/linear_op.py",
        "F.pad(x, flat, mode=self.padding_mode).contiguous()",
        "F.pad(x, flat).contiguous()",
        (f"{_UNIT}test_linear_op.py",),
    ),
    Fault(
        "the kernel of a transposed convolution is not mirrored",
        "rounding/linear_op.py",
        'mirrored=self.kind == "conv_transpose"',
        "mirrored=False",
        (f"{_UNIT}test_linear_op.py",),
    ),
    Fault(
        "columns are not weighted in the second moments",
        "rounding/moments.py",
        "root = weight.sqrt().unsqueeze(-1)",
        "root = torch.ones_like(weight).unsqueeze(-1)",
        (f"{_UNIT}test_moments.py",),
    ),
    Fault(
        "the damping is ignored",
        "rounding/hessian.py",
        "torch.where(mean > noise, damping * mean, 1.0)",
        "torch.where(mean > noise, 0 * mean, torch.ones_like(mean))",
        (f"{_UNIT}test_hessian.py",),
    ),
    # --- whole networks
    Fault(
        "the leading axis of every layer's input is taken for the samples'",
        "guidance/orders.py",
        'order = self._found.get(site, "whole")',
        'order: Order | None = "whole"',
        (f"{_WHOLE}test_guidance.py",),
    ),
    Fault(
        "a batch norm that was folded is applied twice",
        "deployment/folded.py",
        "digest(weight.detach()) != learned_from",
        'learned_from == ""',
        (f"{_WHOLE}test_torchao_tensors.py", f"{_WHOLE}test_inc_weight_only.py"),
    ),
    Fault(
        "infinite outputs make all errors none",
        "learning/output_error.py",
        "if not bool(known.all()):",
        "if False:",
        (f"{_WHOLE}test_comparison.py",),
    ),
    Fault(
        "infinite targets make all gradients NaN",
        "regions/minibatches.py",
        "torch.where(torch.isfinite(target), output - target, 0.0).square()",
        "(output - target).square()",
        (f"{_WHOLE}test_comparison.py",),
    ),
    Fault(
        "every layer of a configuration is named, which keeps operators apart",
        "inc/parts.py",
        "if layer != ROOT and _settings(part) != common",
        "if layer != ROOT",
        (f"{_WHOLE}test_inc_exported.py",),
    ),
    # --- problems and solvers
    Fault(
        "the worse of two roundings of a row is kept",
        "rounding/problem.py",
        "better = candidate_loss < loss",
        "better = candidate_loss > loss",
        (f"{_UNIT}test_problem.py",),
    ),
    Fault(
        "GPTQ visits the columns in reverse order",
        "rounding/hessian.py",
        "argsort(dim=1, descending=True, stable=True)",
        "argsort(dim=1, descending=False, stable=True)",
        (f"{_UNIT}test_hessian.py",),
    ),
    Fault(
        "a full sweep forgets where a coordinate was",
        "solvers/sweep.py",
        "change = new if triangular else new - errors[j]",
        "change = new",
        (f"{_UNIT}test_sweep.py",),
    ),
    Fault(
        "weights move to the side on which the loss rises",
        "rounding/soft_rounding.py",
        "down = (slope > 0).long()",
        "down = (slope < 0).long()",
        (f"{_UNIT}test_soft_rounding.py",),
    ),
    Fault(
        "the regularizer is on during the warm-up alone",
        "rounding/soft_rounding.py",
        "if progress < warm_up:",
        "if progress >= warm_up:",
        (f"{_UNIT}test_soft_rounding.py",),
    ),
    Fault(
        "the cross-entropy method follows the worst samples",
        "paper/cross_entropy.py",
        "dim=2, largest=False",
        "dim=2, largest=True",
        (f"{_UNIT}test_cross_entropy.py",),
    ),
    # --- one layer
    Fault(
        "the check on held-out samples is turned round",
        "learning/layer.py",
        "learned = found.learned_holdout <= found.nearest_holdout",
        "learned = found.learned_holdout >= found.nearest_holdout",
        (f"{_UNIT}test_layer.py",),
    ),
    Fault(
        "biases are not corrected",
        "learning/layer.py",
        "        if recipe.correct_bias:\n",
        "        if False:\n",
        (f"{_UNIT}test_layer.py",),
    ),
    Fault(
        "errors of earlier layers are not propagated",
        "learning/layer.py",
        "        if recipe.propagate_error:\n",
        "        if False:\n",
        (f"{_UNIT}test_layer.py",),
    ),
    Fault(
        "the recipe's damping does not reach the hessian",
        "learning/layer.py",
        "Hessian.damped(second, recipe.ridge, moments.power_of_columns.mean(1))",
        "Hessian.damped(second, 0.01, moments.power_of_columns.mean(1))",
        (f"{_UNIT}test_layer.py",),
    ),
    Fault(
        "the scale is fitted again with the wrong sign",
        "learning/scale_search.py",
        "per_channel(pulled * target), per_channel(pulled * v)",
        "per_channel(-pulled * target), per_channel(pulled * v)",
        (f"{_UNIT}test_scale_search.py",),
    ),
    # --- calibration
    Fault(
        "a batch with NaN is accepted",
        "regions/binding.py",
        "            if not torch.isfinite(tensor).all():\n",
        "            if False:\n",
        (f"{_UNIT}test_calibration.py",),
    ),
    Fault(
        "the seed does not move the positions that are used",
        "regions/calibration.py",
        "offset = ((entry + self.seed % _SEEDS) * _GOLDEN).frac()[index]",
        "offset = (entry * _GOLDEN).frac()[index]",
        (f"{_UNIT}test_calibration.py",),
    ),
    # --- a pass
    Fault(
        "the float stream's input is taken for the quantized one's",
        "learning/columns.py",
        "x_quantized = quantized_stream.value(input_of(site.quantized_node), values[1])",
        "x_quantized = x_float",
        (f"{_WHOLE}test_columns.py",),
    ),
    Fault(
        "held-out samples are learned from",
        "learning/columns.py",
        "learning = (~held).nonzero().squeeze(1)",
        "learning = torch.arange(len(held), device=held.device)",
        (f"{_WHOLE}test_columns.py",),
    ),
    Fault(
        "massive activations weigh as much as they are large",
        "learning/columns.py",
        "torch.where(floor > 0, 1 / (power + floor), 0.0)",
        "torch.where(floor > 0, power + floor, 0.0)",
        (f"{_WHOLE}test_columns.py",),
    ),
    Fault(
        "columns are weighed alike in spite of their importance",
        "learning/column_weights.py",
        "return importance[:, order] + _EVEN_WEIGHT",
        "return torch.ones_like(importance[:, order])",
        (f"{_WHOLE}test_column_importance.py::test_what_the_output_hardly_sees_is_given_up_for_what_it_sees",),
    ),
    Fault(
        "derivatives start behind the last softmax",
        "graph/ends.py",
        "        return [end.all_input_nodes[0]]\n",
        "        return None\n",
        (f"{_WHOLE}test_column_importance.py::test_derivatives_start_before_a_last_softmax_or_sigmoid",),
    ),
    Fault(
        "loud samples count for more in the output Hessian",
        "regions/importance.py",
        "return by_output * power",
        "return by_output * torch.ones_like(power)",
        (f"{_WHOLE}test_column_importance.py::test_products_of_derivatives_count_every_sample_alike",),
    ),
    Fault(
        "outputs are taken to do together what a few samples do",
        "regions/importance.py",
        "ridge = max(_OUTPUT_RIDGE, ",
        "ridge = min(_OUTPUT_RIDGE, ",
        (f"{_WHOLE}test_column_importance.py::test_rows_stay_apart_as_far_as_few_samples_know_nothing_of_them",),
    ),
    Fault(
        "what samples differ by is taken about zero",
        "rounding/shrinkage.py",
        "        if mean is not None:\n",
        "        if mean is None:\n            mean = trace\n        if False:\n",
        (f"{_UNIT}test_shrinkage.py",),
    ),
    Fault(
        "columns are taken for those of other samples in the damping",
        "learning/columns.py",
        "sample = in_order([one.chosen.sample.unsqueeze(0) for one in parts])[0, :count]",
        "sample = in_order([one.chosen.sample.unsqueeze(0) for one in parts])[0, :count].roll(1)",
        (f"{_WHOLE}test_columns.py",),
    ),
    Fault(
        "few samples may carry all of the weight",
        "regions/importance.py",
        "    if suffices(1.0):\n",
        "    if suffices(0.0):\n",
        (f"{_WHOLE}test_columns.py",),
    ),
    Fault(
        "what is worse than nearest at the output is kept",
        "learning/comparison.py",
        "        if found <= nearest:\n            return",
        "        if True:\n            return",
        (f"{_WHOLE}test_comparison.py",),
    ),
    Fault(
        "layers are taken back that do no harm",
        "learning/comparison.py",
        "            if again < found:\n",
        "            if True:\n",
        (f"{_WHOLE}test_comparison.py",),
    ),
    Fault(
        "the sample axis is believed in where samples are mixed",
        "learning/comparison.py",
        "    if alone and bool(held.any()):\n",
        "    if bool(held.any()):\n",
        (f"{_WHOLE}test_comparison.py",),
    ),
    Fault(
        "rows that the network chooses are taken for pairs",
        "graph/selection.py",
        "return any(source in computed for source in sources if source is not taken)",
        "return False",
        (f"{_WHOLE}test_selection.py",),
    ),
    Fault(
        "rows that are written back are no pairs any more",
        "graph/selection.py",
        "            sources = sources[:1]\n",
        "            pass\n",
        (f"{_WHOLE}test_selection.py",),
    ),
    Fault(
        "rows move with the errors of the others instead of against them",
        "solvers/coupled.py",
        "integers = solved(part, -share[:, part] @ error, found[:, part])",
        "integers = solved(part, share[:, part] @ error, found[:, part])",
        (f"{_UNIT}test_coupled.py",),
    ),
    Fault(
        "a block of rows is kept where it is worse",
        "solvers/coupled.py",
        "sum((1, 2)) < 0)[:, None, None]",
        "sum((1, 2)) > 0)[:, None, None]",
        (f"{_UNIT}test_coupled.py",),
    ),
    Fault(
        "channels that make up for each other know nothing of the derivatives",
        "rounding/across.py",
        "hessian = (by_group * sides[:, :, None, :, None]).reshape(second.shape)",
        "hessian = by_group.reshape(second.shape)",
        (f"{_UNIT}test_across.py",),
    ),
    Fault(
        "a channel makes up for its own deviation alone",
        "rounding/across.py",
        "pulled = (sides @ cross)",
        "pulled = (sides.diagonal(dim1=1, dim2=2).unsqueeze(2) * cross)",
        (f"{_UNIT}test_across.py",),
    ),
    Fault(
        "halves of the samples agree with themselves",
        "rounding/across.py",
        "(by * first[number] * second[number]).sum()",
        "(by * first[number].square()).sum()",
        (f"{_UNIT}test_across.py",),
    ),
    Fault(
        "each process halves its samples by its own numbers",
        "learning/columns.py",
        "is_odd = (sample + sampling.first[0]) % 2 == 1",
        "is_odd = sample % 2 == 1",
        (f"{_WHOLE}test_distributed.py",),
    ),
    Fault(
        "derivatives of channels that are put together are of one column each",
        "regions/importance.py",
        "            by_output = put_together(by_output, joined[0])\n",
        "            by_output = put_together(by_output.flip(1), joined[0])\n",
        (f"{_WHOLE}test_column_importance.py",),
    ),
    Fault(
        "moments of channels together stay those of one process",
        "learning/columns.py",
        "for moments in of_learning:\n                moments.pool(",
        "for moments in of_learning[:1]:\n                moments.pool(",
        (f"{_WHOLE}test_distributed.py",),
    ),
    Fault(
        "the output's error is measured on the learning samples",
        "learning/output_error.py",
        "judged = self.samples[self.held_out] if",
        "judged = self.samples[~self.held_out] if",
        (f"{_WHOLE}test_fx_streams.py::test_output_error_is_that_of_the_reference_conversion_on_held_out_samples",),
    ),
    Fault(
        "excluded layers are learned",
        "learning/passes.py",
        "return [node for node in self.host.nodes if node.name not in self.excluded]",
        "return list(self.host.nodes)",
        (f"{_WHOLE}test_fx_streams.py::test_excluded_layers_are_nearest_on_their_own_grid",),
    ),
    Fault(
        "a recipe that is clearly worse replaces the first",
        "learning/trials.py",
        "one.margin(first) > _SURE",
        "one.margin(first) < _SURE",
        (f"{_WHOLE}test_trials.py",),
    ),
    Fault(
        "each trial searches scales of its own",
        "learning/layerwise.py",
        "run.shared.grids.setdefault(node.name, rounding.grid)",
        "pass",
        (f"{_WHOLE}test_kernels.py",),
    ),
    Fault(
        "columns are weighed by their norms where none is massive",
        "learning/trials.py",
        "self._shared.least_share < _MASSIVE",
        "True",
        (f"{_WHOLE}test_trials.py",),
    ),
    Fault(
        "columns of a piece are taken for those of the first samples",
        "regions/importance.py",
        "sampling.own_numbers(batch, patches.samples",
        "sampling.samples(batch, patches.samples",
        (f"{_WHOLE}test_trials.py",),
    ),
    Fault(
        "the user's model is changed though inplace is off",
        "api.py",
        "return handed_over(host, model, inplace, KEY)",
        "return handed_over(host, model, True, KEY)",
        (f"{_WHOLE}test_fx_streams.py::test_learning_leaves_everything_else_as_it_was",),
    ),
    # --- learning on samples
    Fault(
        "what was learned on samples is taken though it is worse",
        "learning/region_step.py",
        "        if not found.better:\n            return _Decided(report)\n",
        "",
        (f"{_WHOLE}test_finetuning.py::test_what_is_worse_on_held_out_samples_is_not_kept",),
    ),
    Fault(
        "the quantized stream is not rewound after a block",
        "learning/region_step.py",
        "            run.rewind(self.start)\n",
        "            pass\n",
        (f"{_WHOLE}test_blockwise.py::test_the_output_error_is_that_of_the_converted_model",),
    ),
    Fault(
        "scales that are the user's choice are learned",
        "learning/region_step.py",
        "self.learns_scale and self.layers.searches_scale(node) and not bounded",
        "self.learns_scale and not bounded",
        (f"{_WHOLE}test_finetuning.py::test_scales_that_are_the_users_choice_stay",),
    ),
    Fault(
        "blocks are learned from the float stream's input",
        "regions/region.py",
        "entries if propagate_error else floats",
        "floats",
        (f"{_WHOLE}test_region.py",),
    ),
    Fault(
        "minibatches do not follow the seed",
        "regions/reconstruction.py",
        "generator = torch.Generator().manual_seed(seed + processes.rank)",
        "generator = torch.Generator().manual_seed(0)",
        (f"{_WHOLE}test_paper_method.py::test_the_same_seed_gives_the_same_integers_and_another_seed_others",),
    ),
    Fault(
        "no quantization is dropped",
        "regions/forward.py",
        "return torch.where(chosen, exact, quantized)",
        "return quantized",
        (f"{_WHOLE}test_region.py",),
    ),
    Fault(
        "the paper's loss is taken before the activation function",
        "learning/paper.py",
        "layer_exits(run.host, run.host.nodes, self.activation)",
        "layer_exits(run.host, run.host.nodes, False)",
        (f"{_WHOLE}test_paper_method.py::test_the_loss_is_taken_behind_the_activation_function_or_before_it",),
    ),
    # --- hosts
    Fault(
        "a frozen observer reports another scale",
        "hosts/weight_observers.py",
        "return self._grid.scale.reshape(-1), self._grid.zero_point.reshape(-1)",
        "return self._grid.scale.reshape(-1) * 1.001, self._grid.zero_point.reshape(-1)",
        (f"{_UNIT}test_weight_observers.py",),
    ),
    Fault(
        "a tied weight is written once only",
        "hosts/fx/host.py",
        "            for name in node.names:\n                key",
        "            for name in node.names[:1]:\n                key",
        (f"{_WHOLE}test_fx_streams.py::test_tied_weights_get_one_set_of_integers_and_biases_of_their_own",),
    ),
    Fault(
        "corrected biases are not written into the model of FX",
        "hosts/fx/host.py",
        "        module.bias = nn.Parameter(bias.clone())\n",
        "        pass\n",
        (f"{_WHOLE}test_fx_streams.py::test_output_error_is_that_of_the_reference_conversion_on_held_out_samples",),
    ),
    Fault(
        "corrected biases are not written into the program of PT2E",
        "hosts/pt2e/host.py",
        "_put(model, bias, corrected, ",
        "_put(model, bias, attribute(model, str(bias.target)).detach(), ",
        (f"{_WHOLE}test_pt2e_streams.py::test_output_error_is_that_of_the_converted_program_on_held_out_samples",),
    ),
    Fault(
        "activations of few bits are not clamped",
        "hosts/fx/host.py",
        "        write_scales(model, scales)\n        insert_clamps(model)\n",
        "        write_scales(model, scales)\n",
        (f"{_WHOLE}test_fx_few_bit_activations.py::test_converted_models_hold_four_bits_beyond_the_calibrated_range",),
    ),
    Fault(
        "learned steps of activations are not written",
        "hosts/activation_quantizers.py",
        "        observer.keep(scale)\n",
        "        pass\n",
        (f"{_WHOLE}test_finetuning.py::test_observers_report_the_scales_that_were_learned",),
    ),
    # --- beside the pass
    Fault(
        "hooks are left on the user's modules",
        "equalization/channel_ranges.py",
        "            hook.remove()\n",
        "            pass\n",
        (f"{_WHOLE}test_equalization.py::test_batches_and_model_are_not_touched_and_no_hook_is_left",),
    ),
    Fault(
        "channels are equalized by the ratio of their ranges, not by its root",
        "equalization/channel_scales.py",
        "(first / second).sqrt()",
        "(first / second)",
        (f"{_UNIT}test_channel_scales.py",),
    ),
    Fault(
        "a name selects every name that begins like it",
        "names.py",
        'name.startswith(pattern + ".")',
        "name.startswith(pattern)",
        (f"{_UNIT}test_names.py",),
    ),
    # --- graphs
    Fault(
        "a write to a view does not reach what it is a view of",
        "graph/aliases.py",
        "        part.copy_(new)\n",
        "",
        (f"{_UNIT}test_aliases.py",),
    ),
    Fault(
        "a view is not taken again after a write",
        "graph/aliases.py",
        "return view if any(_owner(part, written) is not None for part in _tensors(view)) else old",
        "return old",
        (f"{_UNIT}test_aliases.py",),
    ),
    Fault(
        "the observer of a computed weight counts as an activation's",
        "hosts/fx/host.py",
        'argument(user, 1, "weight") is node for user in node.users',
        'argument(user, 1, "weight") is None for user in node.users',
        (f"{_WHOLE}test_fx_edge_cases.py::test_beside_a_computed_weight_the_other_layers_are_learned",),
    ),
    Fault(
        "a parametrization stays in the model that was learned",
        "hosts/fx/host.py",
        "    make_plain(module)\n",
        "",
        (f"{_WHOLE}test_fx_reparametrized.py",),
    ),
    Fault(
        "a write that conversion loses goes unnoticed",
        "hosts/original.py",
        "node.replace_input_with(source, before)",
        "node.replace_input_with(source, source)",
        (f"{_WHOLE}test_original.py::test_a_write_that_conversion_loses_is_named",),
    ),
    Fault(
        "a solver's integers are believed",
        "rounding/problem.py",
        "elif bool(((found < problem.lower) | (found > problem.upper)).any()):",
        "elif bool((found < problem.lower).all()):",
        (f"{_UNIT}test_layer.py::test_what_a_solver_returns_is_checked",),
    ),
    Fault(
        "an operator with out= writes into the caller's batches",
        "graph/transforms.py",
        "if outs := take_outs(node):",
        "if outs := []:",
        (f"{_WHOLE}test_side_effects.py::test_an_operator_with_out_does_not_write_into_the_batches",),
    ),
    Fault(
        "a save that is interrupted leaves its file behind",
        "files.py",
        "unfinished.unlink(missing_ok=True)",
        "pass",
        (f"{_WHOLE}test_interruptions.py::test_a_save_that_is_interrupted_leaves_the_folder_as_it_was",),
    ),
    Fault(
        "packed integers are off by one",
        "inc/packing.py",
        "packed.pack(weight.integers.int() + shift,",
        "packed.pack(weight.integers.int() + shift - 1,",
        (f"{_WHOLE}test_inc_packing.py::test_a_packed_layer_holds_exactly_the_integers",),
    ),
    # --- devices
    Fault(
        "biases are rounded down",
        "hosts/biases.py",
        "(corrected.double() / step).round()",
        "(corrected.double() / step).floor()",
        (_WHOLE + "test_integer_biases.py",),
    ),
    Fault(
        "the step of a bias leaves out the input's scale",
        "hosts/biases.py",
        "step = input_scale * node.op",
        "step = node.op",
        (_WHOLE + "test_integer_biases.py",),
    ),
    Fault(
        "integers of 8 are packed into 4 bits",
        "deployment/onnx_weights.py",
        "(ir.DataType.INT4, -8, 7, 21)",
        "(ir.DataType.INT4, -8, 8, 21)",
        (_WHOLE + "test_onnx.py",),
    ),
    Fault(
        "ONNX drops the range of activations of few bits",
        "deployment/onnx_translations.py",
        "if quant_min <= limits.min and quant_max >= limits.max:",
        "if True:",
        (_WHOLE + "test_onnx.py",),
    ),
    Fault(
        "a decomposed conversion ends where FX's observers do",
        "hosts/fx/host.py",
        "        _widen_ranges(converted)\n",
        "",
        (_WHOLE + "test_onnx.py",),
    ),
    Fault(
        "the paper's penalty is a sum over weights",
        "rounding/soft_rounding.py",
        "return None if beta is None else regularizer(self._share(progress), beta).mean()",
        "return None if beta is None else regularizer(self._share(progress), beta).sum()",
        (_WHOLE + "test_paper_preset.py",),
    ),
    Fault(
        "products below float32's smallest number are taken for data",
        "rounding/hessian.py",
        ".clamp(min=torch.finfo(torch.float32).tiny)",
        "",
        (_UNIT + "test_hessian.py",),
    ),
    # --- the report
    Fault(
        "a page of a report runs what names hold",
        "report/markup.py",
        "return escape(str(text), quote=True)",
        "return str(text)",
        (f"{_UNIT}test_report_page.py::test_texts_are_shown_as_they_are",),
    ),
    Fault(
        "a chart puts errors where they do not belong",
        "report/scale.py",
        "share = (math.log10(value) - self.low) / (self.high - self.low)",
        "share = value / 10.0**self.high",
        (f"{_UNIT}test_report_page.py",),
    ),
    Fault(
        "a report names another seed",
        "api.py",
        '"seed": seed,',
        '"seed": 0,',
        (f"{_WHOLE}test_report_settings.py",),
    ),
    Fault(
        "a file is written in place",
        "files.py",
        "        unfinished.replace(path)\n",
        "        path.write_bytes(content)\n        unfinished.unlink()\n",
        (f"{_UNIT}test_files.py",),
    ),
    Fault(
        "a report of another version is read",
        "report/stored.py",
        'if data.get("version") != _VERSION:',
        "if False:",
        (f"{_UNIT}test_report.py",),
    ),
    # --- guidance
    Fault(
        "rows that bits are suggested for never make up for each other",
        "guidance/candidates.py",
        "moments, HeldOut(), outputs)",
        "moments, HeldOut(), None)",
        (f"{_WHOLE}test_guidance.py::test_rows_make_up_for_each_other_as_they_do_by_default",),
    ),
    Fault(
        "columns count alike where bits are suggested",
        "guidance/moments.py",
        "moments.add(columns, _no_deviation(columns), weight)",
        "moments.add(columns, _no_deviation(columns))",
        (f"{_WHOLE}test_guidance.py::test_columns_count_by_what_they_do_to_the_output",),
    ),
    Fault(
        "what a bias takes up is lost at the output",
        "guidance/effects.py",
        "found.append(changes @ by_weight.T + offsets @ by_bias.T)",
        "found.append(changes @ by_weight.T)",
        (f"{_WHOLE}test_guidance.py",),
    ),
    Fault(
        "errors at the calls of one module never cancel",
        "guidance/effects.py",
        "return torch.stack(list(parts)).sum(0)",
        "return torch.stack(list(parts)).square().sum(0).sqrt()",
        (f"{_WHOLE}test_guidance.py",),
    ),
    Fault(
        "losses of bits are in no unit",
        "regions/derivatives.py",
        "sqrt(len(samples) / (entries * variance * known))",
        "1.0",
        (f"{_WHOLE}test_guidance.py",),
    ),
    Fault(
        "choices of bits are given up too early",
        "guidance/knapsack.py",
        "if bound <= value * (1 + _TOLERANCE):",
        "if bound <= value * 0.9:",
        (f"{_UNIT}test_knapsack.py",),
    ),
    # --- what is kept in files
    Fault(
        "a file that was changed is believed",
        "storage.py",
        '    if described.pop("checksum", None) != _checksum(described, tensors):',
        '    if described.pop("checksum", None) is None:',
        (f"{_UNIT}test_storage.py",),
    ),
    Fault(
        "a loaded model reports the range of its own calibration",
        "saving/observers.py",
        "            observer.restore(float(one.scale), int(one.zero_point))\n",
        "            pass\n",
        (f"{_WHOLE}test_saving.py",),
    ),
    Fault(
        "what was not learned may be another",
        "saving/rounding.py",
        'if others := differing(fingerprint(loaded), content["fingerprint"]):',
        "if others := []:",
        (f"{_WHOLE}test_saving.py",),
    ),
    Fault(
        "a run goes on in the folder of another",
        "learning/checkpoint.py",
        "            if others := differences(before, identity):",
        '            if others := "":',
        (f"{_WHOLE}test_checkpoint.py",),
    ),
    Fault(
        "a rounding that is recalled does not reach the quantized stream",
        "learning/layerwise.py",
        "        run.keep_rounding(node, decided.rounding)\n",
        "",
        (f"{_WHOLE}test_checkpoint.py",),
    ),
    # --- a memory budget
    Fault(
        "a part of a tensor comes back from its beginning",
        "graph/value_files.py",
        "offset = leaf.storage_offset() - one.start // leaf.element_size()",
        "offset = 0",
        (f"{_UNIT}test_memory.py",),
    ),
    Fault(
        "what is in files counts as in memory",
        "graph/memory.py",
        "return self.budget is None or not size or self._used + size <= self.budget",
        "return True",
        (f"{_WHOLE}test_memory_budget.py",),
    ),
    Fault(
        "files stay when what is in them is let go",
        "graph/memory.py",
        "            path.unlink()\n",
        "            pass\n",
        (f"{_UNIT}test_memory.py",),
    ),
    Fault(
        "a batch that is another one is taken",
        "regions/batches.py",
        "if batch_digest(arguments) != self._digests[number]:",
        "if False:",
        (f"{_WHOLE}test_memory_budget.py",),
    ),
    # --- several processes, tokens, blocks
    Fault(
        "each process learns from its own moments",
        "learning/columns.py",
        "for moments in of_learning:\n                moments.pool(",
        "for moments in ():\n                moments.pool(",
        (f"{_WHOLE}test_distributed.py::test_two_processes_learn_what_one_learns",),
    ),
    Fault(
        "all processes solve the same rows",
        "learning/division.py",
        "(_ALL, processes.part(rows))",
        "(_ALL, slice(0, rows // processes.size))",
        (f"{_WHOLE}test_distributed.py::test_two_processes_learn_what_one_learns",),
    ),
    Fault(
        "padding is learned from",
        "regions/calibration.py",
        "        return index[kept], position[kept]\n",
        "        return index, position\n",
        (f"{_WHOLE}test_token_mask.py",),
    ),
    Fault(
        "a block is learned from the hidden states of the float stream alone",
        "hosts/pt2e/host.py",
        "            _exchange(self.quantized_graph.graph, *prepared.meta[PAIR])\n",
        "            pass\n",
        (f"{_WHOLE}test_decoders.py",),
    ),
    Fault(
        "a head that is tied to the embedding needs a tensor of its own",
        "sequential/stored.py",
        "for other in tied[id(tensor)] if other in found",
        "for other in [name] if other in found",
        (f"{_WHOLE}test_stored_weights.py::test_the_result_is_that_of_weights_in_memory",),
    ),
    Fault(
        "a finished model stays mapped to the files of the float weights",
        "sequential/weights.py",
        "value.to(self.device, kind, copy=own)",
        "value.to(self.device, kind)",
        (f"{_WHOLE}test_stored_weights.py::test_the_result_is_that_of_weights_in_memory",),
    ),
    Fault(
        "a batch in which blocks are called otherwise is learned as the first",
        "sequential/inputs.py",
        "            _check_same_kind(found[0] if found else call, call, number)\n",
        "",
        (f"{_WHOLE}test_decoders.py::test_batches_in_which_blocks_are_called_otherwise_are_refused",),
    ),
    Fault(
        "a block's tensors take the dtype of its first",
        "sequential/blocks.py",
        "        kind, device = former.get(inside) or former",
        "        kind, device = next(iter(former.values())) or former",
        (f"{_WHOLE}test_decoders.py::test_each_tensor_keeps_its_dtype",),
    ),
    Fault(
        "batch norms are hidden from a conversion that may fold them",
        "hosts/pt2e/conversion.py",
        "    hidden = [] if any(_is_trained(norm) for norm in norms) else norms\n",
        "    hidden = norms\n",
        (f"{_WHOLE}test_pt2e_conversion.py::test_patterns_are_exported_where_one_may_be_found",),
    ),
    Fault(
        "a failed attempt goes on recording",
        "inc/weight_only.py",
        "            Recording.stop(model)\n",
        "            pass\n",
        (f"{_WHOLE}test_inc_weight_only.py::test_a_second_attempt_begins_anew",),
    ),
    Fault(
        "values between two integers are rounded as fake quantization does",
        "graph/paths.py",
        "_Valued.apply(made, exact)",
        "_Valued.apply(made, made.detach())",
        (f"{_WHOLE}test_region.py::test_a_region_computes_what_the_host_converts_to_where_values_are_quantized_twice",),
    ),
    Fault(
        "a block overwrites the hidden states of the next run",
        "sequential/learning.py",
        'program(**copied({**batch, "hidden": batch[hidden]}))',
        'program(**{**batch, "hidden": batch[hidden]})',
        (f"{_WHOLE}test_decoders.py::test_blocks_may_write_to_their_inputs",),
    ),
    Fault(
        "an interrupt leaves weights lent",
        "sequential/weights.py",
        "                _Return(loan, module),\n",
        "",
        (f"{_WHOLE}test_stored_weights.py::test_an_interrupt_leaves_nothing_lent",),
    ),
    Fault(
        "a functional weight is rounded in the module that it is of",
        "hosts/fx/nodes.py",
        " or self._is_float_modules(parameter)",
        "",
        (f"{_WHOLE}test_fx_edge_cases.py::test_a_functional_weight_of_a_module_in_float_stays_so",),
    ),
    Fault(
        "blocks are not emptied behind their run",
        "sequential/weights.py",
        "        put(module, self.former)\n",
        "",
        (f"{_WHOLE}test_stored_weights.py::test_one_block_is_there_at_a_time",),
    ),
    Fault(
        "the head of a language model is quantized where the configuration says not to",
        "inc/parts.py",
        "        if not part.quant_lm_head and any(",
        "        if part.quant_lm_head is None and any(",
        (f"{_WHOLE}test_stored_weights.py::test_the_head_is_left_in_float_where_that_is_asked",),
    ),
)


def _source(root: Path, fault: Fault) -> str:
    """The text of the file that a fault is in; stops unless it has the passage exactly once, and the tests exist."""
    text = (root / "adaround_plugin" / fault.file).read_text(encoding="utf-8")
    if (count := text.count(fault.old)) != 1:
        raise SystemExit(f"{fault.name!r}: {fault.file} has {count} times, not once:\n{fault.old}")
    for test in fault.tests:
        if not (root / test.partition("::")[0]).is_file():
            raise SystemExit(f"{fault.name!r}: there is no {test}")
    return text


def _copy(target: Path) -> None:
    """Copy what tests need, and make sure that they would import the copy."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, target / name)
    asked = [sys.executable, "-c", "import adaround_plugin; print(adaround_plugin.__file__)"]
    answer = subprocess.run(asked, cwd=target, env=_environment(target), capture_output=True, text=True, check=True)
    if not Path(answer.stdout.strip()).resolve().is_relative_to(target.resolve()):
        raise SystemExit(f"tests would import {answer.stdout.strip()}, not the copy in {target}")


def _environment(copy: Path) -> dict[str, str]:
    # sources change within a second: no bytecode may outlive them
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def _failure(copy: Path, tests: Sequence[str], seconds: float | None = None) -> str | None:
    """The first test that fails in the copy; None if all pass.

    Stops if pytest cannot collect the tests: what is no Python any more is no fault that a test finds.
    """
    # one process: several would cost more to start than these few tests take
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-x", "-q", "--tb=no", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        run = subprocess.run(
            command, cwd=copy, env=_environment(copy), capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"{', '.join(tests)} (no end after {seconds:.0f} s)"
    if run.returncode == _PASSED:
        return None
    found = [line.split(" ", 1)[1] for line in run.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if run.returncode != _FAILED or not found:
        raise SystemExit(f"pytest of {', '.join(tests)} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return found[0].partition(" - ")[0]


def main(arguments: list[str] | None = None) -> int:
    """Make the faults one by one and print a Markdown table; 1 if a fault survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="faults whose name or file has some of these words")
    parser.add_argument("--check", action="store_true", help="only look whether every passage is found exactly once")
    parser.add_argument("--seconds", type=float, default=600, help="a fault whose tests take longer is found")
    options = parser.parse_args(arguments)
    wanted = [""] if options.only is None else options.only
    chosen = [fault for fault in FAULTS if any(words in f"{fault.name} {fault.file}" for words in wanted)]
    for fault in FAULTS:
        _source(ROOT, fault)
    if options.check or not chosen:
        _show(f"{len(FAULTS)} faults, each in one place; {len(chosen)} chosen")
        return 0
    survived = 0
    with tempfile.TemporaryDirectory(prefix="adaround_mutations_") as folder:
        copy = Path(folder)
        _copy(copy)
        failed = _failure(copy, list(dict.fromkeys(test for fault in chosen for test in fault.tests)))
        if failed is not None:
            raise SystemExit(f"{failed} fails without any fault: mend it first")
        _show("| fault | in | killed by | seconds |\n|---|---|---|---|")
        for fault in chosen:
            text, start = _source(copy, fault), time.perf_counter()
            path = copy / "adaround_plugin" / fault.file
            path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
            found = _failure(copy, fault.tests, options.seconds)
            path.write_text(text, encoding="utf-8")
            survived += found is None
            seconds = f"{time.perf_counter() - start:.0f}"
            _show(f"| {fault.name} | {fault.file} | {found or 'SURVIVED'} | {seconds} |")
    _show(f"\n{len(chosen) - survived} of {len(chosen)} faults were found")
    return 1 if survived else 0


def _show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
