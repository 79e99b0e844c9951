"""Other programs' RCAN, written plainly from their published layouts, to compare ours with; not fast, not for use.

`BasicSR` names its layers as BasicSR does (layout C), `RCANit` as RCAN-it (D). spandrel and torchSR stand for the official layout
(A) themselves; test_model.py defines ours (B). BasicSR takes and gives [0, 1], RCANit [0, 255].
"""

import torch
from torch import Tensor, nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


def conv(inputs: int, outputs: int, side: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2)


class Gate(nn.Module):
    """Channel attention whose layers lie in a Sequential of a given name; `pooled` says whether that pools itself."""

    def __init__(self, name: str, pooled: bool, channels: int, squeezed: int, activation: type[nn.Module]) -> None:
        super().__init__()
        layers = [conv(channels, squeezed, 1), activation(), conv(squeezed, channels, 1), nn.Sigmoid()]
        self.add_module(name, nn.Sequential(*([nn.AdaptiveAvgPool2d(1)] if pooled else []), *layers))
        self.name, self.pooled = name, pooled

    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, self.name)(x if self.pooled else x.mean((2, 3), keepdim=True))


class Block(nn.Module):
    """conv, activation, conv, gate, added to the input; `name` is that of the Sequential."""

    def __init__(self, name: str, gate: Gate, channels: int, activation: type[nn.Module], scale: float = 1.0) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(conv(channels, channels), activation(), conv(channels, channels), gate))
        self.name, self.scale = name, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, self.name)(x) * self.scale


def steps(upscale_factor: int, channels: int, activation: type[nn.Module] | None = None) -> list[list[nn.Module]]:
    """The upsampler's modules, step by step."""
    factors = {2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}[upscale_factor]
    after = [activation()] if activation else []
    return [[conv(channels, channels * factor**2), nn.PixelShuffle(factor), *after] for factor in factors]


class Group(nn.Module):
    def __init__(self, name: str, blocks: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(*blocks, last))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, self.name)(x)


class BasicSRGroup(nn.Module):
    def __init__(self, blocks: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.residual_group = nn.Sequential(*blocks)
        self.conv = last

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.residual_group(x))


class BasicSR(nn.Module):
    def __init__(self, upscale_factor: int, groups: int, blocks: int, channels: int, squeezed: int) -> None:
        super().__init__()

        def block() -> Block:
            return Block("rcab", Gate("attention", True, channels, squeezed, nn.ReLU), channels, nn.ReLU)

        self.conv_first = conv(3, channels)
        self.body = nn.Sequential(*(BasicSRGroup([block() for _ in range(blocks)], conv(channels, channels)) for _ in range(groups)))
        self.conv_after_body = conv(channels, channels)
        self.upsample = nn.Sequential(*(module for step in steps(upscale_factor, channels) for module in step))
        self.conv_last = conv(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor(DIV2K_MEAN, dtype=x.dtype).view(1, 3, 1, 1)
        x = self.conv_first((x - mean) * 255)
        return self.conv_last(self.upsample(self.conv_after_body(self.body(x)) + x)) / 255 + mean


class RCANit(nn.Module):
    def __init__(self, upscale_factor: int, groups: int, blocks: int, channels: int, squeezed: int) -> None:
        super().__init__()

        def block() -> Block:
            return Block("body", Gate("excitation", False, channels, squeezed, nn.SiLU), channels, nn.SiLU, scale=0.1)

        self.sub_mean, self.add_mean = (mean_shift(sign) for sign in (-1, 1))
        self.head = nn.Sequential(conv(3, channels))
        bodies = [Group("body", [block() for _ in range(blocks)], conv(channels, channels)) for _ in range(groups)]
        self.body = nn.Sequential(*bodies, conv(channels, channels))
        modules = [module for step in steps(upscale_factor, channels, nn.SiLU) for module in step]
        self.tail = nn.Sequential(nn.Sequential(*modules), conv(channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(self.body(x) + x))


def mean_shift(sign: int) -> nn.Conv2d:
    shift = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        shift.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        shift.bias.copy_(sign * 255 * torch.tensor(DIV2K_MEAN))
    return shift
