"""A linear or convolutional module, with the batch norm after it, as a layer whose channels can be scaled.

Batch norm stays where it is and takes the scale of the outputs, so that the model keeps its architecture, the names of
its modules and the keys of its state dict, and hosts fold it as before. Ranges are those of the folded weight.

Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaround_plugin.equalization.channel_scales import kernels
from adaround_plugin.graph.operators import module_op
from adaround_plugin.rounding.linear_op import LinearOp

__all__ = ["ScaledLayer"]


@dataclass(frozen=True)
class ScaledLayer:
    """A layer in eval mode: `y = (W x + b - mean) gamma / sqrt(var + eps) + beta` with a batch norm.

    Attributes:
        name: qualified name of `module`.
        module: `nn.Linear`, or a convolution, transposed or not.
        norm: the batch norm of its output, with running statistics, or None.
    """

    name: str
    module: Any
    norm: Any = None

    @property
    def op(self) -> LinearOp:
        """The operator of the module."""
        op = module_op(self.module)
        assert op is not None
        return op

    def magnitudes(self) -> Tensor:
        """The largest magnitude in each kernel of the folded weight: `(groups, outputs, inputs)`, as `kernels`."""
        found = kernels(self.module.weight, self.op).abs().amax(3)
        if self.norm is None:
            return found
        factor: Tensor = (_exact(self.norm.running_var) + self.norm.eps).rsqrt()
        if self.norm.affine:
            factor *= _exact(self.norm.weight).abs()
        return found * factor.reshape(*found.shape[:2], 1)

    def divide_outputs(self, scale: Tensor) -> None:
        """Divide the outputs, in place, by a `(out,)` scale."""
        if self.norm is not None and self.norm.affine:
            _write(self.norm.weight, _exact(self.norm.weight) / scale)
            _write(self.norm.bias, _exact(self.norm.bias) / scale)
            return
        found = kernels(self.module.weight, self.op)
        self._write_kernels(found / scale.reshape(*found.shape[:2], 1, 1))
        if self.module.bias is not None:
            _write(self.module.bias, _exact(self.module.bias) / scale)
        if self.norm is not None:
            _write(self.norm.running_mean, _exact(self.norm.running_mean) / scale)

    def multiply_inputs(self, scale: Tensor) -> None:
        """Make up, in place, for inputs that were divided by a `(in,)` scale."""
        found = kernels(self.module.weight, self.op)
        groups, _, inputs, _ = found.shape
        self._write_kernels(found * scale.reshape(groups, 1, inputs, 1))

    def high_bias(self) -> Tensor | None:
        """`(out,)` of what nearly every output exceeds, at least 0; None without a batch norm that tells.

        "Absorbing high biases" in section 4.1 of the paper: outputs are taken for normal, with mean beta and deviation
        gamma, so that all but 0.135 % of them exceed `c = max(0, beta - 3 gamma)`.
        """
        if self.norm is None or not self.norm.affine:
            return None
        return (_exact(self.norm.bias) - 3 * _exact(self.norm.weight).abs()).clamp(min=0)

    def lower_outputs(self, constant: Tensor) -> None:
        """Subtract, in place, a `(out,)` constant; with an affine batch norm only."""
        _write(self.norm.bias, _exact(self.norm.bias) - constant)

    @property
    def absorbs(self) -> bool:
        """Whether a constant in all inputs is one in all outputs: nothing is padded with zeros."""
        op = self.op
        is_padded = op.padding_mode == "zeros" and any(map(any, op.padding))
        return op.kind != "conv_transpose" and not is_padded

    def absorb_inputs(self, constant: Tensor) -> None:
        """Make up, in place, for a `(in,)` constant that was subtracted from the inputs."""
        found = kernels(self.module.weight, self.op)
        # the constant is the same at all positions of a kernel
        shift = torch.einsum("goip,gi->go", found, constant.reshape(found.shape[0], -1)).flatten()
        if self.norm is not None:
            _write(self.norm.running_mean, _exact(self.norm.running_mean) - shift)
        elif self.module.bias is not None:
            _write(self.module.bias, _exact(self.module.bias) + shift)
        else:
            weight = self.module.weight
            self.module.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)

    def _write_kernels(self, found: Tensor) -> None:
        _write(self.module.weight, self.op.unrows(found.flatten(2), self.module.weight.shape))


def _exact(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _write(target: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        target.copy_(values)
