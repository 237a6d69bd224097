"""Weight formats: how a linear layer's weight is packed, and the `Weight` that carries it.

Owns packing and unpacking. Knows neither the model nor the kernels that read a format.
Letters: N rows (output features), K columns (input features).
"""

import torch
from torch import nn

PLAIN_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Weight(nn.Module):
    """A linear layer's weight [N, K] in one format, with what belongs to it. Quantising replaces Weights, not modules.

    Buffers: `weight` (packed), `scale` and `zero` (formats that have them, else None), `bias` [N] or None.
    `format` is one of bf16, fp16, fp32 (plain: `weight` is [N, K] in that dtype).
    """

    def __init__(self, out_features: int, in_features: int, *, bias: bool = False, dtype=torch.bfloat16, device=None):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.format = PLAIN_FORMATS[dtype]
        self.group_size = 0
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over this weight reads."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def dequantized(self) -> torch.Tensor:
        """The weight as a plain [N, K] tensor."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.out_features} x {self.in_features}, {self.format}, bias={self.bias is not None}"
