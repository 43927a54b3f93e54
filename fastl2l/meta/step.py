"""A step of the meta-optimizer, without a word from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastl2l.rules import Rule, all_weights


def meta_step(
    rules: Mapping[str, Rule], adam: torch.optim.Adam, gradients: Tensor, norm: Tensor, clip_norm: float | None
) -> None:
    """One step of `adam` on `rules` along `gradients` [weights], whose norm is `norm` and is clipped to `clip_norm`.

    Weights that do not require grad stay as they are.
    """
    if clip_norm is not None:
        share = torch.full_like(norm, clip_norm, dtype=torch.float64) / norm
        gradients = gradients * share.clamp(max=1).to(gradients.dtype)
    weights = all_weights(rules)
    parts = gradients.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        if weight.requires_grad:
            weight.grad = part.view_as(weight)
    adam.step()
    adam.zero_grad()
