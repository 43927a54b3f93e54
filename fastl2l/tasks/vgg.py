"""What VGG networks see in a picture: the features of neural art (Gatys et al. 2015; Andrychowicz et al. 2016, 3.4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastl2l.tasks._torchvision import torchvision

_BLOCKS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Convolutions in each block; 2 x 2 pooling follows a block."""
NETWORKS = tuple(_BLOCKS)
_WEIGHTS = {"vgg16": "IMAGENET1K_FEATURES", "vgg19": "IMAGENET1K_V1"}
_CHANNELS = (64, 128, 256, 512, 512)


class Normalization(NamedTuple):
    """Of RGB in [0, 1], by channel: (pixel - mean) / std is what a network is given."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


NORMALIZATION = {
    "vgg16": Normalization((0.48235, 0.45882, 0.40784), (1 / 255,) * 3),
    "vgg19": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Layer(NamedTuple):
    """A convolution with its ReLU."""

    pooled: bool
    """Whether pooling comes before it."""
    weight: Tensor
    bias: Tensor


class Features:
    """The first layers of a VGG network, by functions that `torch.func.vmap` takes and that have two derivatives.

    Pooling is by means, not maxima: gradients flow to all pixels, and pictures are smoother (Gatys et al. 2015).
    """

    def __init__(self, layers: Sequence[Layer], normalization: Normalization) -> None:
        self.layers = list(layers)
        like = self.layers[0].weight
        self.mean, self.std = (
            torch.tensor(numbers, dtype=like.dtype, device=like.device).view(3, 1, 1) for numbers in normalization
        )

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """What each layer makes of pixels [3, height, width] in [0, 1]: [channels, height, width] each."""
        x, found = ((pixels - self.mean) / self.std).unsqueeze(0), []
        for pooled, weight, bias in self.layers:
            if pooled:
                x = F.avg_pool2d(x, 2)
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            found.append(x.squeeze(0))
        return found


def layer_number(name: str, layer: object, network: str) -> int:
    """Which convolution, from 0 on, a layer such as "relu3_1" is.

    Raises:
        ValueError: it is none of this network. The message speaks of the argument `name`.
    """
    blocks = _BLOCKS[network]
    found = re.fullmatch(r"relu([1-5])_([1-4])", str(layer))
    if found is None or int(found[2]) > blocks[int(found[1]) - 1]:
        raise ValueError(f"{name}: expected layers of {network}, relu1_1 to relu5_{blocks[-1]}, got {layer!r}")
    return sum(blocks[: int(found[1]) - 1]) + int(found[2]) - 1


def block_of(number: int, network: str) -> int:
    """How often pictures have been halved, 0 to 4, where convolution `number` sees them."""
    block = 0
    for convolutions in _BLOCKS[network]:
        if number < convolutions:
            break
        number, block = number - convolutions, block + 1
    return block


def channels(number: int, network: str) -> int:
    """Of what convolution `number` makes."""
    return _CHANNELS[block_of(number, network)]


@cache
def load(network: str, convolutions: int, dtype: torch.dtype, device: torch.device) -> Features:
    """The first `convolutions` layers, with torchvision's weights. They are shared: never write to them.

    The file is that of `torchvision.models`, in TORCH_HOME/hub/checkpoints (~/.cache/torch), where it is downloaded to
    if it is not there.

    Raises:
        ImportError: torchvision is missing.
        FileNotFoundError: the weights are not there and cannot be downloaded.
        ValueError: the file holds something else.
    """
    enum = getattr(torchvision().models, f"{network.upper()}_Weights")
    url = enum[_WEIGHTS[network]].url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.exists():
        _download(network, url, file)
    stored = _state(network, file)
    layers = []
    for number, place in zip(range(convolutions), _places(network), strict=False):
        known = channels(number, network), (3 if number == 0 else channels(number - 1, network)), 3, 3
        weight, bias = (stored.get(f"features.{place}.{what}") for what in ("weight", "bias"))
        if weight is None or bias is None or tuple(weight.shape) != known or tuple(bias.shape) != known[:1]:
            raise _damaged(network, file, f"no convolution {place} of shape {list(known)}")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise _damaged(network, file, f"numbers that are not finite in convolution {place}")
        pooled = number > 0 and block_of(number, network) > block_of(number - 1, network)
        layers.append(Layer(pooled, weight.to(device, dtype, copy=True), bias.to(device, dtype, copy=True)))
    return Features(layers, NORMALIZATION[network])


def _places(network: str) -> list[int]:
    """Numbers of the convolutions in torchvision's `features`, in which a ReLU follows each and pooling each block."""
    places, place = [], 0
    for convolutions in _BLOCKS[network]:
        places += [place + 2 * number for number in range(convolutions)]
        place += 2 * convolutions + 1
    return places


def _state(network: str, file: Path) -> dict[str, Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # half a gigabyte, mostly unused
        except RuntimeError:  # of a file in torch's older format, which cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever the file is
        raise _damaged(network, file, " ".join(str(error).split())[:200]) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _damaged(network, file, "no dict of Tensors")
    return state


def _damaged(network: str, file: Path, got: str) -> ValueError:
    return ValueError(f"{file}: expected torchvision's weights of {network}, got {got}; remove the file, or replace it")


def _download(network: str, url: str, file: Path) -> None:
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # of the network
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"network: the weights of {network} are not in {file}, and the download failed: {reason}. Put the file "
            f"{url} there, or set TORCH_HOME to the folder whose hub/checkpoints has it."
        ) from error
