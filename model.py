"""Networks: RCAN with channel or CBAM attention, and the named sizes.

    network = model.rcan_x4()                                   # the paper's size, 15.6 M parameters
    network = model.rcan_light_x4()                             # for CPUs
    network = model.RCAN(4, channels=32, num_rg=2, num_rcab=4)  # your own
    sr = network(lr)                                            # RGB in [0, 1]; (N, 3, h, w) -> (N, 3, 4h, 4w)
    logits = model.Discriminator()(sr)                          # (N, 1), for train_improved.py

RCAN: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018.
CBAM: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
ESRGAN: Wang et al., "Enhanced Super-Resolution Generative Adversarial Networks", ECCV Workshops 2018.
State-dict keys are those of the weights that people download for this repository, so such files load as they are.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SCALES = (2, 3, 4, 8)
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB mean of DIV2K's training images, which the paper's network subtracts


class RCAN(nn.Module):
    """Residual channel attention network, section 3 of the paper.

    Args:
        upscale_factor: 2, 3, 4 or 8.
        channels: width of every feature map between the first and the last convolution.
        reduction: the attention's bottleneck has `channels // reduction` channels; at most `channels`.
        num_rg: residual groups.
        num_rcab: residual channel attention blocks in each group.
        attention: "channel" as in the paper; "cbam"; or "cbam_average", CBAM without the maxima over the image (see `CBAM`).
        mean: RGB in [0, 1], subtracted before the first convolution and added after the last.
        activation: "relu" as in the paper, or "silu" as in RCAN-it (Lin et al., "Revisiting RCAN", 2022).
        upsampler_activation: whether an activation follows each step of the upsampler, as in RCAN-it.
        initial_channel_gate: factor of every channel before training, approximately, between 0 and 1; None: near 0.5, as published.
        initial_spatial_gate: CBAM's factor of every pixel before training, exactly; None: near 0.5, as published. Both gate
            initialisations only matter for training; checkpoints don't record them.
        pointwise_upsampler: train the upsampler's first convolution alone, as in ESPCN (Shi et al., 2016); those after it pass
            channels on. All are computed as one, which makes light networks 1.6 times as fast. Keys and shapes stay.

    Raises:
        ValueError: an unknown scale, attention or activation, or impossible sizes or gates; too few channels for a pointwise upsampler.
    """

    mean: Tensor  # (1, 3, 1, 1)

    def __init__(
        self,
        upscale_factor: int,
        channels: int = 64,
        reduction: int = 16,
        num_rg: int = 10,
        num_rcab: int = 20,
        attention: str = "channel",
        mean: tuple[float, float, float] = DIV2K_MEAN,
        activation: str = "relu",
        upsampler_activation: bool = False,
        initial_channel_gate: float | None = None,
        initial_spatial_gate: float | None = None,
        pointwise_upsampler: bool = False,
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "upscale_factor": upscale_factor,
            "channels": channels,
            "reduction": reduction,
            "num_rg": num_rg,
            "num_rcab": num_rcab,
            "attention": attention,
            "mean": tuple(float(value) for value in mean),
            "activation": activation,
            "upsampler_activation": upsampler_activation,
        }
        _check(self.arguments, initial_channel_gate, initial_spatial_gate)
        if pointwise_upsampler and upsampler_activation:
            raise ValueError("pointwise_upsampler=True contradicts upsampler_activation=True: set one of them to False")
        self.source = "random weights"  # where the weights come from, for messages
        self.degradation: str | None = None  # "BI", "BD", "DN" or "photo", which the weights were trained for, where that is known
        self.upscale_factor = upscale_factor
        self.activation_checkpointing = False  # while training, recompute groups and upsampler in backward instead of storing them
        self.folds_upsampler = pointwise_upsampler  # `enlarge` computes one convolution; only right if `has_pointwise_upsampler`
        self.register_buffer("mean", torch.tensor(self.arguments["mean"]).view(1, 3, 1, 1))
        self.conv1 = _conv3x3(3, channels)
        self.trunk = nn.Sequential(*(ResidualGroup(channels, reduction, num_rcab, attention, activation) for _ in range(num_rg)))
        self.conv2 = _conv3x3(channels, channels)
        after = activation if upsampler_activation else None
        self.upsampling = nn.Sequential(*(Upsampler(channels, factor, after) for factor in _UPSAMPLING_FACTORS[upscale_factor]))
        self.conv3 = _conv3x3(channels, 3)
        for mark in self.marks():  # in the state dict, so that a network of the paper refuses these weights
            self.register_buffer(mark, torch.empty(0))
        for layer in self.modules():
            if isinstance(layer, ChannelAttention):
                layer.initialise_gates(initial_channel_gate, initial_spatial_gate)
        if pointwise_upsampler:
            self._place_pixels()
        self.register_load_state_dict_post_hook(RCAN._check_folding)

    def marks(self) -> list[str]:
        """Names of the empty buffers that record what no other key or shape shows; none for the paper's network."""
        return [mark for mark, (name, value) in MARKS.items() if self.arguments[name] == value]

    def forward(self, x: Tensor) -> Tensor:
        """Upscale `x`, RGB in [0, 1], without changing it; the result may leave [0, 1] a little."""
        shallow = self.shallow_features(x)  # (N, C, h, w)
        deep = self.conv2(self._compute(self.trunk, shallow)) + shallow  # (N, C, h, w)
        return self.enlarge(deep) + self.mean  # (N, 3, scale h, scale w)

    def shallow_features(self, x: Tensor) -> Tensor:
        """The first convolution: RGB in [0, 1], (N, 3, h, w) -> (N, C, h, w)."""
        return self.conv1((x - self.mean).to(self.conv1.weight.dtype))

    def enlarge(self, deep: Tensor) -> Tensor:
        """The upsampler and the last convolution: features (N, C, h, w) -> RGB less the mean, (N, 3, scale h, scale w)."""
        if self.folds_upsampler and not (torch.jit.is_tracing() or _is_exporting()):
            return functional.pixel_shuffle(functional.conv2d(deep, *self._folded_upsampler(), padding=1), self.upscale_factor)
        return self.conv3(self._compute(self.upsampling, deep))

    def has_pointwise_upsampler(self) -> bool:
        """Whether the convolutions after the upsampler's first one see single pixels, so that `enlarge` may compute all as one."""
        centre = torch.zeros(3, 3, dtype=torch.bool)
        centre[1, 1] = True
        later = [layer.weight[..., ~centre] for layer in self._enlarging_layers()[1:]]
        return not self.arguments["upsampler_activation"] and not any(bool(taps.any()) for taps in later)

    def _check_folding(self, _: object) -> None:
        """After `load_state_dict`."""
        if self.folds_upsampler and not self.has_pointwise_upsampler():
            raise ValueError("these weights' upsampler is not pointwise: make the network with pointwise_upsampler=False")

    def _place_pixels(self) -> None:
        """Let the upsampler's first convolution compute all pixels; the later ones only pass channels on, and do not learn."""
        first, *later = self._enlarging_layers()
        count = 3
        for layer, factor in zip(reversed(later), (1, *reversed(_UPSAMPLING_FACTORS[self.upscale_factor][1:])), strict=True):
            count *= factor**2
            if count > layer.in_channels:
                raise ValueError(f"pointwise_upsampler=True needs at least {count} channels here: set channels={count}")
            nn.init.zeros_(layer.weight.requires_grad_(False))[range(count), range(count), 1, 1] = 1
            nn.init.zeros_(layer.get_parameter("bias").requires_grad_(False))
        count *= _UPSAMPLING_FACTORS[self.upscale_factor][0] ** 2
        for parameter in first.parameters():
            nn.init.zeros_(parameter[count:])

    def _enlarging_layers(self) -> list[nn.Conv2d]:
        layers = [*(upsampler.get_submodule("upsample_block.0") for upsampler in self.upsampling), self.conv3]
        return [layer for layer in layers if isinstance(layer, nn.Conv2d)]

    def _folded_upsampler(self) -> tuple[Tensor, Tensor]:
        """One convolution before a pixel shuffle, for a pointwise upsampler: weight (3 scale², C, 3, 3) and bias.

        Without activations the layers are linear, so their matrices are multiplied, from the last one to the first.
        """
        *layers, last = self._enlarging_layers()
        assert last.bias is not None
        matrix, bias = last.weight[:, None, None, :, 1, 1], last.bias[:, None, None]  # (3, y, x, C), (3, y, x)
        for number, factor in reversed([*enumerate(_UPSAMPLING_FACTORS[self.upscale_factor])]):
            layer = layers[number]
            assert layer.bias is not None
            weight, offset = (tensor.unflatten(0, (-1, factor, factor)) for tensor in (layer.weight, layer.bias))
            weight = weight[..., 1, 1] if number else weight  # (C, i, j, C) or (C, i, j, C, 3, 3)
            bias = (torch.einsum("oyxc,cij->oiyjx", matrix, offset) + bias[:, None, :, None]).flatten(3).flatten(1, 2)
            matrix = torch.einsum("oyxc,cijn...->oiyjxn...", matrix, weight).flatten(3, 4).flatten(1, 2)
        return matrix.flatten(0, 2), bias.flatten()

    def _compute(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        for layer in layers:
            recompute = self.activation_checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if recompute else layer(x)  # (N, C, …)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a convolution, and the short skip around both (equation 5)."""

    def __init__(self, channels: int, reduction: int, num_rcab: int, attention: str, activation: str = "relu") -> None:
        super().__init__()
        blocks = [ResidualChannelAttentionBlock(channels, reduction, attention, activation) for _ in range(num_rcab)]
        self.residual_group = nn.Sequential(*blocks, _conv3x3(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual_group(x)  # (N, C, h, w)


class ResidualChannelAttentionBlock(nn.Module):
    """Two convolutions whose result is weighted by attention, added to the input (equation 12)."""

    def __init__(self, channels: int, reduction: int, attention: str, activation: str = "relu") -> None:
        super().__init__()
        self.residual_channel_attention_block = nn.Sequential(
            _conv3x3(channels, channels),
            ACTIVATIONS[activation](),
            _conv3x3(channels, channels),
            ATTENTIONS[attention](channels, reduction, activation),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual_channel_attention_block(x)  # (N, C, h, w)


class ChannelAttention(nn.Module):
    """A factor for each channel, from its average over the whole image (section 3.3)."""

    summands = 1  # outputs of the perceptron that are added before the sigmoid

    def __init__(self, channels: int, reduction: int, activation: str = "relu") -> None:
        super().__init__()
        self.channel_attention_layer = nn.Sequential(
            nn.Identity(),  # in published files the pooling has this index; `mean` needs no copies in backward, and gives the same bits
            nn.Conv2d(channels, channels // reduction, 1),
            ACTIVATIONS[activation](),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    @property
    def gates(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Functions of the features, whose results multiply them one after the other."""
        return (self.channel_gate,)

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.gates:
            x = x * gate(x)  # (N, C, h, w) * (N, C, 1, 1) or (N, 1, h, w)
        return x

    def channel_gate(self, x: Tensor) -> Tensor:
        return self.channel_attention_layer(_mean_over_pixels(x))  # (N, C, 1, 1), 0..1

    def initialise_gates(self, channel: float | None, spatial: float | None) -> None:
        """Make the factors before training about `channel` and exactly `spatial`; None leaves them as they are."""
        if channel is not None:
            nn.init.constant_(self.channel_attention_layer.get_parameter("3.bias"), _logit(channel) / self.summands)


class CBAM(ChannelAttention):
    """A factor for each channel, then a factor for each pixel (CBAM, equations 1 to 3).

    The keys of the channel part are those of `ChannelAttention`, so that plain RCAN weights can start CBAM.
    `max` returns indices, which backward uses. `amax` searches for its maxima again in backward; compiled in bf16 it finds none
    and divides 0 by 0.

    Args:
        use_maximum: whether a channel's factor also depends on its maximum over the image, as published. Maxima grow with the
            image, so training patches see smaller ones than whole images; without them the channel part is RCAN's.
    """

    def __init__(self, channels: int, reduction: int, activation: str = "relu", use_maximum: bool = True) -> None:
        super().__init__(channels, reduction, activation)
        self.summands = 2 if use_maximum else 1
        self.spatial_attention_layer = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3), nn.Sigmoid())

    @property
    def gates(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return self.channel_gate, self.spatial_gate

    def channel_gate(self, x: Tensor) -> Tensor:
        if self.summands == 1:
            return super().channel_gate(x)
        _, squeeze, activation, excite, sigmoid = self.channel_attention_layer
        pooled = torch.cat((_mean_over_pixels(x), functional.adaptive_max_pool2d(x, 1)), 3)  # (N, C, 1, 2)
        gates = excite(activation(squeeze(pooled)))  # (N, C, 1, 2), one perceptron for both
        return sigmoid(gates.sum(3, keepdim=True))  # (N, C, 1, 1), 0..1

    def spatial_gate(self, x: Tensor) -> Tensor:
        summary = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True).values), 1)  # (N, 2, h, w)
        return self.spatial_attention_layer(summary)  # (N, 1, h, w), 0..1

    def initialise_gates(self, channel: float | None, spatial: float | None) -> None:
        super().initialise_gates(channel, spatial)
        if spatial is not None:
            nn.init.zeros_(self.spatial_attention_layer.get_parameter("0.weight"))
            nn.init.constant_(self.spatial_attention_layer.get_parameter("0.bias"), _logit(spatial))


class Upsampler(nn.Module):
    """Sub-pixel convolution: `factor`² as many channels, rearranged to pixels.

    The convolution's output channels are ordered (row, column, channel) before it runs, so that the rearrangement moves whole
    pixels instead of single values. The result is the same; an update takes about 0.9 of the time on a CPU (0.8 compiled).
    Traced and exported graphs keep `nn.PixelShuffle`: Core ML's and ncnn's converters fail on the rearrangement.
    """

    def __init__(self, channels: int, factor: int, activation: str | None = None) -> None:
        super().__init__()
        self.channels, self.factor = channels, factor
        self.upsample_block = nn.Sequential(_conv3x3(channels, channels * factor**2), nn.PixelShuffle(factor))
        if activation:
            self.upsample_block.append(ACTIVATIONS[activation]())

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or _is_exporting():
            return self.upsample_block(x)  # (N, C, factor h, factor w)
        convolution, _, *activation = self.upsample_block
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
        channels, factor = self.channels, self.factor
        weight = convolution.weight.unflatten(0, (channels, factor**2)).transpose(0, 1).flatten(0, 1)
        bias = convolution.bias.unflatten(0, (channels, factor**2)).t().flatten()
        x = functional.conv2d(x, weight, bias, padding=1).movedim(1, 3)  # (N, h, w, factor factor C)
        x = x.unflatten(3, (factor, factor, channels)).transpose(2, 3)  # (N, h, factor, w, factor, C)
        x = x.flatten(3, 4).flatten(1, 2).movedim(3, 1)  # (N, C, factor h, factor w)
        return activation[0](x) if activation else x


_is_exporting = getattr(torch.compiler, "is_exporting", torch.jit.is_tracing)  # new in PyTorch 2.7


class Discriminator(nn.Module):
    """One logit for each image, high for GT images and low for SR: ESRGAN's VGG-style network (its released training code).

    Pairs of a 3x3 convolution and a 4x4 one of stride 2, with 1, 2, 4, 8 and 8 times `channels`, batch normalisation and
    LeakyReLU(0.2), then two linear layers. The last feature maps are averaged to 4x4, the size that they have for patches of 128,
    so that patches of any size fit. Normalisation always uses the batch's statistics: there are no buffers, and eval mode changes
    nothing.

    Raises:
        ValueError: images smaller than `MIN_SIZE`, or a single one smaller than twice that, whose last feature maps are one pixel.
    """

    MIN_SIZE = 32  # pixels, halved five times

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} must be at least 1")
        widths = [channels * factor for factor in (1, 2, 4, 8, 8)]
        layers: list[nn.Module] = [_conv3x3(3, channels), nn.LeakyReLU(0.2), *_halving(channels)]
        for before, after in itertools.pairwise(widths):
            layers += [*_normalised(nn.Conv2d(before, after, 3, padding=1, bias=False)), *_halving(after)]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * 16, 100), nn.LeakyReLU(0.2), nn.Linear(100, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 1) in float32 of `x`, (N, 3, H, W) RGB in [0, 1]."""
        if min(x.shape[2:]) < self.MIN_SIZE or (x.shape[0] == 1 and max(x.shape[2:]) < 2 * self.MIN_SIZE):
            raise ValueError(
                f"{x.shape[0]} image(s) of {x.shape[3]}x{x.shape[2]} are too small for the discriminator: "
                f"sides must be at least {self.MIN_SIZE}, or {2 * self.MIN_SIZE} for a single image"
            )
        x = self.pool(self.features(x - 0.5))  # (N, 8 C, 4, 4)
        with torch.autocast(x.device.type, enabled=False):  # the relativistic loss compares small differences
            return self.classifier(x.to(next(self.classifier.parameters()).dtype))  # (N, 1)


ATTENTIONS: dict[str, Callable[[int, int, str], nn.Module]] = {
    "channel": ChannelAttention,
    "cbam": CBAM,
    "cbam_average": partial(CBAM, use_maximum=False),
}
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
MARKS = {  # buffer: the argument that it records, and its value
    "silu": ("activation", "silu"),
    "upsampler_activation": ("upsampler_activation", True),
    "cbam_average": ("attention", "cbam_average"),
}
_UPSAMPLING_FACTORS = {2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}

PAPER_SIZE: dict[str, Any] = {"channels": 64, "reduction": 16, "num_rg": 10, "num_rcab": 20}
LIGHT_SIZE: dict[str, Any] = {"channels": 48, "reduction": 16, "num_rg": 3, "num_rcab": 4}

rcan_x2, rcan_x3, rcan_x4, rcan_x8 = (partial(RCAN, scale, **PAPER_SIZE) for scale in SCALES)
rcan_cbam_x2, rcan_cbam_x3, rcan_cbam_x4, rcan_cbam_x8 = (partial(RCAN, scale, **PAPER_SIZE, attention="cbam") for scale in SCALES)
rcan_light_x2, rcan_light_x3, rcan_light_x4, rcan_light_x8 = (partial(RCAN, scale, **LIGHT_SIZE) for scale in SCALES)
rcan_light_cbam_x2, rcan_light_cbam_x3, rcan_light_cbam_x4, rcan_light_cbam_x8 = (
    partial(RCAN, scale, **LIGHT_SIZE, attention="cbam") for scale in SCALES
)

# By their names in config.py
ARCHITECTURES: dict[str, Callable[..., RCAN]] = {name: build for name, build in globals().items() if name.startswith("rcan_")}


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _halving(channels: int) -> list[nn.Module]:
    return _normalised(nn.Conv2d(channels, channels, 4, stride=2, padding=1, bias=False))


def _normalised(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels, track_running_stats=False), nn.LeakyReLU(0.2)]


def _mean_over_pixels(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, 1, 1). On a CPU `mean` first converts a whole map in half precision to float32: too much for large images."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu" or not torch.is_inference_mode_enabled():
        return x.mean((2, 3), keepdim=True)
    sums = [rows.sum((2, 3), keepdim=True, dtype=torch.float32) for rows in x.split(64, 2)]
    return (torch.stack(sums).sum(0) / (x.shape[2] * x.shape[3])).to(x.dtype)


def _logit(value: float) -> float:
    return math.log(value / (1 - value))


def _check(arguments: dict[str, Any], initial_channel_gate: float | None, initial_spatial_gate: float | None) -> None:
    for name, known in (("upscale_factor", SCALES), ("attention", ATTENTIONS), ("activation", ACTIVATIONS)):
        if arguments[name] not in known:
            raise ValueError(f"{name}={arguments[name]!r} is unknown; known are {', '.join(map(repr, known))}")
    sizes = {name: arguments[name] for name in PAPER_SIZE}
    if min(sizes.values()) < 1 or sizes["reduction"] > sizes["channels"]:
        shown = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(f"{shown}: all must be at least 1, and reduction at most channels")
    for name, value in (("initial_channel_gate", initial_channel_gate), ("initial_spatial_gate", initial_spatial_gate)):
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name}={value} must be greater than 0 and less than 1")
    if initial_spatial_gate is not None and arguments["attention"] == "channel":
        raise ValueError(
            f"initial_spatial_gate={initial_spatial_gate} contradicts attention='channel', which has no such gate: "
            "set initial_spatial_gate=None, or choose CBAM"
        )
