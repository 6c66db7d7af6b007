"""LPIPS v0.1 with AlexNet: how different two images look, by what five layers of a network see in them.

At each layer the features of a place are divided by their length; the squared differences are weighted per channel,
averaged over places, and the layers' numbers are added: d = sum_l mean_hw w_l · (f_l / |f_l| - g_l / |g_l|)². 0 for
equal images, symmetric, and with weights that are not negative never below 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.rewards.networks import read_state

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""By channel; an image in [-1, 1] enters the network as (image - SHIFT) / SCALE."""
LAYERS = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1)}
LAYERS |= {10: (256, 256, 3, 1, 1)}
"""Convolutions by their place in AlexNet: channels in and out, size, stride, padding; a ReLU follows each."""
MIN_SIDE = 31
"""Smallest height and width that leave a place in the last layer."""

_POOLED = (3, 6)
"""Convolutions that a 3x3 maximum with stride 2 precedes."""
_EPS = 1e-10


@runtime_checkable
class PerceptualDistance(Protocol):
    """A distance of two images through features that are computed once an image."""

    @property
    def version(self) -> str: ...

    def features(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """What the network sees in RGB images in [0, 1]."""
        ...

    def between(
        self, one: Sequence[Float[Tensor, "b _ _ _"]], other: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, " b"]:
        """Distance of each row of features from the same row of others."""
        ...


class LPIPS(nn.Module):
    """LPIPS v0.1 (AlexNet), about 0 to 1; smaller is more alike.

    Licence: BSD-2-Clause (linear heads), BSD-3-Clause (torchvision's AlexNet).

    Paper: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924.
    """

    def __init__(self) -> None:
        """The network with random weights and heads of 1; `load_lpips` reads the published ones."""
        super().__init__()
        self.features_net = nn.ModuleDict(
            {
                str(place): nn.Conv2d(inside, outside, size, stride=stride, padding=padding)
                for place, (inside, outside, size, stride, padding) in LAYERS.items()
            }
        )
        self.heads = nn.ParameterList(torch.ones(outside) for _, outside, *_ in LAYERS.values())
        self.version = "lpips 0.1, alexnet, random"
        self.eval().requires_grad_(False)

    def forward(self, one: Float[Tensor, "b 3 h w"], other: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Distance of each image from the same row of the others, RGB in [0, 1]; has a gradient to both."""
        return self.between(self.features(one), self.features(other))

    def features(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """Unit features of the five layers.

        Raises:
            InputError: An image too small for the network.
        """
        if min(images.shape[2:]) < MIN_SIDE:
            raise InputError(f"lpips must get images of at least {MIN_SIDE} pixels a side, got {images.shape[2:]}")
        shift, scale = (images.new_tensor(v).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
        hidden = (2 * images - 1 - shift) / scale
        found = []
        for place, layer in self.features_net.items():
            if int(place) in _POOLED:
                hidden = F.max_pool2d(hidden, 3, stride=2)
            hidden = F.relu(layer(hidden))
            found.append(hidden / (torch.linalg.vector_norm(hidden, dim=1, keepdim=True) + _EPS))
        return tuple(found)

    def between(
        self, one: Sequence[Float[Tensor, "b _ _ _"]], other: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, " b"]:
        """Weighted squared difference of unit features, averaged over places, added over layers."""
        layers = [
            torch.einsum("c,bchw->b", head, (f - g).square()) / f[0, 0].numel()
            for head, f, g in zip(self.heads, one, other, strict=True)
        ]
        return torch.stack(layers).sum(0)


def load_lpips(backbone: str | Path, heads: str | Path, *, device: torch.device | str = "cpu") -> LPIPS:
    """LPIPS from two published files, read without running code; .pth or .safetensors.

    Args:
        backbone: torchvision's AlexNet (`alexnet-owt-7be5be79.pth`): `features.{0,3,6,8,10}.{weight,bias}`.
        heads: `lpips/weights/v0.1/alex.pth` of richzhang/PerceptualSimilarity: `lin{0..4}.model.1.weight`,
            each [1, C, 1, 1].

    Raises:
        InputError: A file that is missing or damaged, lacks a tensor, or holds one of another shape or a negative head.
    """
    layers, lines = _read(Path(backbone), "backbone"), _read(Path(heads), "heads")
    shapes = {
        f"features.{place}.{kind}": shape
        for place, (inside, outside, size, *_) in LAYERS.items()
        for kind, shape in (("weight", (outside, inside, size, size)), ("bias", (outside,)))
    }
    line_shapes = {f"lin{i}.model.1.weight": (1, outside, 1, 1) for i, (_, outside, *_) in enumerate(LAYERS.values())}
    _check(layers, shapes, f"backbone {str(backbone)!r}")
    _check(lines, line_shapes, f"heads {str(heads)!r}")
    if any(bool((lines[name] < 0).any()) for name in line_shapes):
        raise InputError(f"lpips heads {str(heads)!r} must not be negative, got weights below 0")
    state = {name.replace("features.", "features_net."): layers[name] for name in shapes}
    state |= {f"heads.{i}": lines[name].flatten() for i, name in enumerate(line_shapes)}
    with torch.device("meta"):
        made = LPIPS()
    made.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    made.version = "lpips 0.1, alexnet"
    return made.eval().requires_grad_(False).to(device)


def _read(file: Path, what: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"lpips {what} must be a .pth or .safetensors file, got {str(file)!r}, which is missing")
    return read_state(file, f"lpips {what}")


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    missing = [name for name in shapes if name not in state]
    if missing:
        raise InputError(f"lpips {what} must hold {missing[0]}, got {', '.join(sorted(state)[:4]) or 'nothing'}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise InputError(f"lpips {what}: {name} must have shape {shape}, got {tuple(state[name].shape)}")
