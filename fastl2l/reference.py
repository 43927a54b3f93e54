"""The oracle: every rule in plain PyTorch, in any floating dtype, differentiable any number of times.

Slow and obvious on purpose. Kernels are right when they agree with this file evaluated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def features(gradient: Tensor, preprocess: str, constant: float) -> Tensor:
    """Inputs of the first layer (Andrychowicz et al. 2016, App. A).

    Args:
        gradient: [N].
        preprocess: ``"raw"``: ``constant * g``; ``"log_sign"``: ``(log|g| / p, sign g)`` where ``|g| >= exp(-p)``,
            else ``(-1, exp(p) * g)``, with ``p = constant``.

    Returns:
        [features, N].
    """
    if preprocess == "raw":
        return (constant * gradient).unsqueeze(0)
    threshold = torch.tensor(math.exp(-constant), dtype=gradient.dtype, device=gradient.device)
    large = gradient.abs() >= threshold  # rounded as the gradients are
    # The branch that is not taken must not send NaN back through autograd: feed it a harmless 1.
    log = torch.where(large, gradient, 1.0).abs().log() / constant
    # NaN compares false, so it takes the linear branch; the first feature must not hide it.
    first = torch.where(large, log, torch.where(gradient.isnan(), gradient, -1.0))
    second = torch.where(large, gradient.sign(), gradient * math.exp(constant))
    return torch.stack([first, second])


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM layer for all coordinates: x [inputs, N], h and c [hidden, N] -> new h and c."""
    i, f, g, o = (w_ih @ x + w_hh @ h + bias.unsqueeze(1)).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def step(
    gradient: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_constant: float,
    update_scale: float,
) -> tuple[Tensor, Tensor]:
    """One step of the LSTM rule for all coordinates.

    Args:
        gradient: [N].
        state: [2 * layers * hidden, N]; for each layer its h rows, then its c rows.
        weights: in the order of ``LSTMConfig.weight_shapes``.
        preprocess, preprocess_constant: see :func:`features`.
        update_scale: factor on the update.

    Returns:
        update [N], to be added to the parameters, and the new state, shaped as ``state``.
    """
    *layers, w_out, b_out = weights
    num_layers, hidden = len(layers) // 3, w_out.numel()
    x = features(gradient, preprocess, preprocess_constant)
    rows = state.reshape(num_layers, 2, hidden, -1)
    new_rows = []
    for layer in range(num_layers):
        x, c = lstm_cell(x, rows[layer, 0], rows[layer, 1], *layers[3 * layer : 3 * layer + 3])
        new_rows += [x, c]
    return update_scale * (w_out @ x + b_out), torch.cat(new_rows)
