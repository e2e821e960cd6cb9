"""Products with int8 weights at the speed of memory, for the few rows of a decoding step.

torchao makes, saves and loads the quantised weights, but outside torch.compile it turns a whole
matrix into floating point for every token, which is slower than not quantising at all; PyTorch's
own int8 kernel is fast for bfloat16 inputs only. Here the weights are read once, as int8, and all
else stays float32. One row times a 768 x 35,000 matrix took 6.5 ms in float32, 11.2 ms with
torchao, 0.89 ms with PyTorch's kernel and 0.66 ms here (two threads of an AMD EPYC).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i3lm.layers import Linear
from i3lm.ops.linear.numba import few_rows

# From here on a matrix product on weights turned into floating point is faster.
_MANY_ROWS = 16


class Int8Linear(Linear):
    """A linear map whose weight torchao has quantised: ``y = (W x) * scale + bias``.

    W is int8 of shape (out, in), with one float32 scale per output channel. On the CPU, few rows
    go through the int8 weights; many rows, gradients, compilers and other devices get what
    torchao does.
    """

    _parts: tuple[Tensor, Tensor]

    def read_weights(self) -> None:
        """Looks up weight and scale once, not at every product."""
        weight: Any = self.weight
        self._parts = weight.qdata.contiguous(), weight.scale.detach().float().reshape(-1)

    def stored(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The int8 matrix, its scale and the bias."""
        return *self._parts, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features), in the dtype of the input."""
        rows = x.numel() // max(x.shape[-1], 1)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if x.device.type != "cpu" or differentiable or torch.compiler.is_compiling():
            return super().forward(x)
        if not 1 <= rows < _MANY_ROWS:
            # Under autocast the product runs in bfloat16, like that of any other linear map.
            whole: Any = self.weight
            return F.linear(x, whole.dequantize(x.dtype), self.bias)
        weight, scale = self._parts
        output = few_rows(x.detach().reshape(rows, -1).float(), weight, self.bias, scale)
        return output.view(*x.shape[:-1], -1).to(x.dtype)


def use_int8_products(model: nn.Module) -> int:
    """Makes the linear maps that torchao has quantised run as `Int8Linear`; gives their number.

    Parameters and state dict stay as they are, so the model is saved as before.
    """
    count = 0
    for module in model.modules():
        if type(module) in (nn.Linear, Linear) and _is_int8_weight_only(module.weight):
            quick: Any = module
            quick.__class__ = Int8Linear
            quick.read_weights()
            count += 1
    return count


def _is_int8_weight_only(weight: Any) -> bool:
    """Whether a weight is torchao's int8 on the CPU, one scale per output channel."""
    qdata = getattr(weight, "qdata", None)
    return (
        isinstance(qdata, Tensor)
        and (qdata.dtype, qdata.device.type) == (torch.int8, "cpu")
        and weight.scale.numel() == qdata.shape[0]
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
        and (weight.zero_point is None or not bool(weight.zero_point.any()))
    )
