"""What the updates of a relative rule are measured in: the size that each parameter had at first.

A rule goes coordinate by coordinate and sees gradients whose scale says nothing, so it cannot know that a step of 0.05
is small for an embedding of numbers around 1 and large for one of 784 weights of a sum. The size of the numbers that a
network starts from can: whoever chose them made them small where many are added up.

A tensor of at least two dimensions has as its unit the root mean square of its numbers, but at least 1 / (4 sqrt(fan
in)), where torch's own initialisation of linear layers has 1 / sqrt(3 fan in): a tensor may well start from zero. It is
counted in tenths, the output scale of RNNprop, so that nothing changes for networks whose weights start around 0.1, and
is at most 3: embeddings, which start around 1, are not to be moved by as much. Vectors (biases, gains of norms, single
coordinates) have the unit 1.

See docs/own-networks.md for what it is worth. As in LARS (You et al. 2017) and Adafactor (Shazeer and Stern 2018), but
taken once: a unit that goes along with a growing tensor makes it grow ever faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIZE = 0.1
"""Of a tensor whose unit is 1."""
LEAST = 0.25
"""Of a tensor's size times the root of its fan in."""
MOST = 3.0
"""Of a unit."""


def unit_of(param: Tensor) -> Tensor:
    """The unit of a parameter as it is now, 0-d. Of a DTensor all processes that have parts of it work together."""
    if param.dim() < 2 or not param.numel():
        return torch.ones((), device=param.device)
    # In float64, so that the last bit does not depend on how a parameter is dealt out to processes.
    norm = torch.linalg.vector_norm(param.detach(), dtype=torch.float64)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    # Numbers that are not finite are no size: their tensor counts as one of unit 1.
    size = (norm / math.sqrt(param.numel())).nan_to_num(nan=SIZE, posinf=SIZE)
    return (size.clamp(min=LEAST / math.sqrt(math.prod(param.shape[1:]))) / SIZE).clamp(max=MOST)


def units(theta: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
    """The unit of every coordinate [N] of tensors of these shapes, which lie one after the other in theta [N]."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = zip(theta.split(sizes), shapes, sizes, strict=True)
    return torch.cat([unit_of(part.view(tuple(shape))).to(theta.dtype).expand(size) for part, shape, size in parts])
