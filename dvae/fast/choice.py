"""The token of each position: logits in bfloat16, and again in float32 for those that may be the largest.

Shapes: N positions  C channels  V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_CANDIDATES = 16
"""Candidates for the largest logit, on average over the positions; with more, all logits are computed in float32."""


class Choice:
    """The encoder's output convolution and the token with the largest logit, as float32 chooses it.

    For features h, rows w of the weights and their roundings h', w' to bfloat16, h·w differs from h'·w' by at most
    |h|·|w - w'| + |h - h'|·|w'|, besides the rounding of the sum. Logits further below the largest than this bound
    cannot be the largest; the few others are computed again.

    Args:
        weight: float32 (V,C).
        bias: float32 (V).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.rounded_weight, self.rounded_bias = self.weight.bfloat16(), self.bias.bfloat16()
        norms = self.rounded_weight.float().norm(dim=1)
        # 1e-4: of summing thousands of products in float32, and of these norms
        self.weight_error = float(((self.weight - self.rounded_weight.float()).norm(dim=1) + 1e-4 * norms).max())
        self.weight_norm = float(norms.max())
        self.bias_error = float((self.bias - self.rounded_bias.float()).abs().max())

    def __call__(self, h_NC: Tensor) -> Tensor:
        """Return the tokens (N) of features after the last ReLU, float32."""
        rounded_NC = h_NC.bfloat16()
        logits_NV = F.linear(rounded_NC, self.rounded_weight, self.rounded_bias)
        highest_N1 = logits_NV.amax(dim=1, keepdim=True).float()
        error_N1 = (
            h_NC.norm(dim=1, keepdim=True) * self.weight_error
            + (h_NC - rounded_NC.float()).norm(dim=1, keepdim=True) * self.weight_norm
            + self.bias_error
        )
        # both the largest and a candidate may be off by that, and by half a unit in the last of bfloat16's 8 places
        threshold_N1 = highest_N1 - 2 * error_N1 - 2**-7 * (highest_N1.abs() + error_N1)
        is_candidate_NV = logits_NV >= threshold_N1.bfloat16().float()
        position, token = is_candidate_NV.nonzero(as_tuple=True)
        if len(position) > MAX_CANDIDATES * len(h_NC):
            return F.linear(h_NC, self.weight, self.bias).argmax(dim=1)
        logits = (h_NC[position] * self.weight[token]).sum(dim=1) + self.bias[token]
        best_N = logits.new_full((len(h_NC),), -torch.inf).scatter_reduce_(0, position, logits, "amax")
        is_best = logits == best_N[position]
        return torch.empty(len(h_NC), dtype=torch.int64).scatter_(0, position[is_best], token[is_best])
