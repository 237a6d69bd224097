"""The public operators: what the model calls, whatever the device."""

import kernels.dequantize  # noqa: F401  (registers the operator behind Weight.dequantized)
from kernels._common import fix_cache_keys, pdl_disabled, pdl_supported, runs_kernels
from kernels._matmul import FoldedNorm, append_ref, beats_cublas, reads_permuted
from kernels._random import gumbel_ref as gumbel
from kernels._random import token_positions
from kernels._ring import ring_serves_qkv
from kernels.accept import accept, feed
from kernels.choose import choose, choose_and_advance
from kernels.flash_decode import HEAD_SIZES, flash_decode
from kernels.flash_prefill import flash_prefill, flash_runs
from kernels.flash_prefill import launched as attention_launched
from kernels.gate_up import gate_up, takes_gate_up
from kernels.head import advance, head, partial_argmax
from kernels.linear import MAX_ROWS, linear, linear_folding, qkv_rope_append
from kernels.lookup import lookup
from kernels.rows import fold_norm, rms_norm, rope_append, silu_mul
from kernels.scaled import QuantizedRows, rounding_activations, scaled_linear, scaled_runs, takes_scaled
from kernels.tiles import PLAIN_ROWS, batch_invariant, folds_norm, is_batch_invariant

__all__ = [
    "HEAD_SIZES",
    "MAX_ROWS",
    "PLAIN_ROWS",
    "FoldedNorm",
    "QuantizedRows",
    "accept",
    "advance",
    "append_ref",
    "attention_launched",
    "batch_invariant",
    "beats_cublas",
    "choose",
    "choose_and_advance",
    "feed",
    "flash_decode",
    "flash_prefill",
    "flash_runs",
    "fold_norm",
    "folds_norm",
    "gate_up",
    "gumbel",
    "head",
    "is_batch_invariant",
    "linear",
    "linear_folding",
    "lookup",
    "partial_argmax",
    "pdl_disabled",
    "pdl_supported",
    "qkv_rope_append",
    "reads_permuted",
    "ring_serves_qkv",
    "rms_norm",
    "rope_append",
    "rounding_activations",
    "runs_kernels",
    "scaled_linear",
    "scaled_runs",
    "silu_mul",
    "takes_gate_up",
    "takes_scaled",
    "token_positions",
]

fix_cache_keys(__name__)
