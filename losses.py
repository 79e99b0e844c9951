"""Criteria: tensors in, a dict of named terms out.

    terms = losses.L1Loss()(sr, gt)                                # {"l1": scalar}
    criterion = losses.CompositeLoss(vgg19=weights.read_vgg19())
    terms = criterion(sr, gt, sr_logits, gt_logits)                # {"total": …, "l1": …, "perceptual": …, "adversarial": …}

ESRGAN: Wang et al., "Enhanced Super-Resolution Generative Adversarial Networks", ECCV Workshops 2018.
VGG19: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class L1Loss(nn.Module):
    """Mean absolute difference of `sr` and `gt`, (N, 3, H, W) RGB in [0, 1], in float32 (the paper's equation 2).

    Args:
        luma_share: the result is (1 - luma_share) times this and luma_share times the same of luma, Y of ITU-R BT.601.
    """

    def __init__(self, luma_share: float = 0.0) -> None:
        super().__init__()
        self.luma_share = luma_share

    def forward(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        _check_shapes(sr, gt)
        difference = sr.float() - gt.float()
        loss = difference.abs().mean()
        if self.luma_share:
            luma = sum(weight * difference[:, channel] for channel, weight in enumerate(LUMA))
            loss = loss.lerp(torch.as_tensor(luma).abs().mean(), self.luma_share)
        return {"l1": loss}


class PerceptualLoss(nn.Module):
    """Mean absolute difference of VGG19's features, before their activation as in ESRGAN (section 3.3).

    VGG19 is frozen, computes in fp32 even under autocast, follows the images to their device, and is in no state dict.

    Args:
        vgg19: its tensors, "features.0.weight" …, as `weights.read_vgg19` returns them.
        layers: weight of each layer by its name, "conv1_1" … "conv5_4", before its activation, or "relu1_1" … "relu5_4", after it;
            None: conv5_4 alone, as ESRGAN.

    Raises:
        ValueError: unknown layers or impossible weights; in the first call, images outside [0, 1].
    """

    def __init__(self, vgg19: Mapping[str, Tensor], layers: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.layers = {"conv5_4": 1.0} if layers is None else dict(layers)
        check_layers(self.layers)
        if not all(0 < weight < math.inf for weight in self.layers.values()):
            raise ValueError(f"layers={self.layers}: every weight must be positive and finite; leave out the layers that shall not count")
        self._depth = 1 + max(VGG19_LAYERS[name] for name in self.layers)
        self._vgg19 = {name: vgg19[name].detach().float() for name in VGG19_SHAPES if int(name.split(".")[1]) < self._depth}
        self._vgg19 |= {"mean": torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), "std": torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)}
        self._checked = False

    def forward(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """`sr` and `gt`, (N, 3, H, W) RGB in [0, 1], with sides of at least 16 for conv5_4; a network's `sr` may leave [0, 1] a little."""
        _check_shapes(sr, gt)
        least = 2 ** (max(int(name[4]) for name in self.layers) - 1)  # pixels: VGG19 halves them before each block but the first
        if min(sr.shape[2:]) < least:
            raise ValueError(f"images of {sr.shape[3]}x{sr.shape[2]} are too small for these layers of VGG19, which need {least} at least")
        if not self._checked:  # only once, because reading values waits for the device
            _check_range(sr, gt)
            self._checked = True
        of_sr = self.features(sr)
        with torch.no_grad():
            of_gt = self.features(gt)
        terms = [weight * functional.l1_loss(of_sr[name], of_gt[name]) for name, weight in self.layers.items()]
        return {"perceptual": functools.reduce(torch.add, terms)}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The output of each layer in `layers`, for RGB in [0, 1]."""
        if self._vgg19["mean"].device != images.device:
            self._vgg19 = {name: tensor.to(images.device) for name, tensor in self._vgg19.items()}
        found = {}
        with torch.autocast(images.device.type, enabled=False):
            x = (images.float() - self._vgg19["mean"]) / self._vgg19["std"]  # (N, 3, H, W)
            for name, index in VGG19_LAYERS.items():
                if index >= self._depth:
                    break
                if name.startswith("relu"):
                    x = x.relu()
                else:
                    x = functional.max_pool2d(x, 2) if name.endswith("_1") and index else x
                    x = functional.conv2d(x, self._vgg19[f"features.{index}.weight"], self._vgg19[f"features.{index}.bias"], padding=1)
                if name in self.layers:
                    found[name] = x
        return found


class AdversarialLoss(nn.Module):
    """Losses of the discriminator's logits, (N, 1) each, for the generator's update and for the discriminator's own.

    Args:
        kind: "relativistic": gt shall look more real than the average sr, and sr less real than the average gt (ESRGAN, equations
            1 to 3); "vanilla": each is judged alone. Both are the mean of a part on gt and a part on sr, so that ln 2 = 0.693 is a draw.
    """

    def __init__(self, kind: str = "relativistic") -> None:
        super().__init__()
        if kind not in ADVERSARIAL_KINDS:
            raise ValueError(f"kind={kind!r} is unknown; known are {', '.join(map(repr, ADVERSARIAL_KINDS))}")
        self.relativistic = kind == "relativistic"

    def generator(self, sr_logits: Tensor, gt_logits: Tensor | None = None) -> dict[str, Tensor]:
        """Low when sr is taken for real; "vanilla" ignores `gt_logits`."""
        if not self.relativistic:
            return {"adversarial": _cross_entropy(sr_logits, 1)}
        if gt_logits is None:
            raise ValueError("gt_logits is missing: the relativistic loss compares sr with gt")
        gt_logits = gt_logits.detach()
        on_sr, on_gt = _cross_entropy(sr_logits - gt_logits.mean(), 1), _cross_entropy(gt_logits - sr_logits.mean(), 0)
        return {"adversarial": (on_sr + on_gt) / 2}

    def discriminator(self, sr_logits: Tensor, gt_logits: Tensor) -> dict[str, Tensor]:
        """Low when sr and gt are told apart."""
        of_sr, of_gt = (sr_logits.mean(), gt_logits.mean()) if self.relativistic else (0, 0)
        on_gt, on_sr = _cross_entropy(gt_logits - of_sr, 1), _cross_entropy(sr_logits - of_gt, 0)
        return {"discriminator": (on_gt + on_sr) / 2}


class CompositeLoss(nn.Module):
    """The generator's loss: `total` is the weighted sum of the terms, which are in the result by name, unweighted.

    A term of weight 0 is neither computed nor in the result.

    Args:
        vgg19: see `PerceptualLoss`; may be None where `perceptual_weight` is 0.
        perceptual_layers: see `PerceptualLoss`.
        adversarial: see `AdversarialLoss`.

    Raises:
        ValueError: weights that are negative, infinite or all 0; perceptual_weight without vgg19; see also the terms.
    """

    def __init__(
        self,
        l1_weight: float = 1.0,
        perceptual_weight: float = 0.006,
        adversarial_weight: float = 0.001,
        *,
        vgg19: Mapping[str, Tensor] | None = None,
        perceptual_layers: Mapping[str, float] | None = None,
        adversarial: str = "relativistic",
        luma_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights = {"l1": float(l1_weight), "perceptual": float(perceptual_weight), "adversarial": float(adversarial_weight)}
        if not all(0 <= weight < math.inf for weight in self.weights.values()) or not any(self.weights.values()):
            shown = ", ".join(f"{name}_weight={weight}" for name, weight in self.weights.items())
            raise ValueError(f"{shown}: all must be finite and none negative, and at least one positive")
        self.l1 = L1Loss(luma_share)
        self.perceptual = None
        if perceptual_weight:
            if vgg19 is None:
                raise ValueError(f"perceptual_weight={perceptual_weight} needs vgg19, the tensors that weights.read_vgg19() returns")
            self.perceptual = PerceptualLoss(vgg19, perceptual_layers)
        self.adversarial = AdversarialLoss(adversarial)

    def forward(self, sr: Tensor, gt: Tensor, sr_logits: Tensor | None = None, gt_logits: Tensor | None = None) -> dict[str, Tensor]:
        """`sr` and `gt`, (N, 3, H, W) RGB in [0, 1]; the discriminator's logits of them, (N, 1), where that term has a weight."""
        terms: dict[str, Tensor] = {}
        if self.weights["l1"]:
            terms |= self.l1(sr, gt)
        if self.perceptual:
            terms |= self.perceptual(sr, gt)
        if self.weights["adversarial"]:
            if sr_logits is None:
                raise ValueError(f"sr_logits is missing: adversarial_weight={self.weights['adversarial']} needs the discriminator's logits")
            terms |= self.adversarial.generator(sr_logits.float(), None if gt_logits is None else gt_logits.float())
        return {"total": functools.reduce(torch.add, (self.weights[name] * term for name, term in terms.items())), **terms}


ADVERSARIAL_KINDS = ("relativistic", "vanilla")
LUMA = (0.299, 0.587, 0.114)  # of R, G and B
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB, of the images that VGG19 was trained on


def _vgg19() -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Blocks of convolutions with a ReLU each, then pooling."""
    layers: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    index, before = 0, 3
    for block, (convolutions, channels) in enumerate(((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)), 1):
        for number in range(1, convolutions + 1):
            layers |= {f"conv{block}_{number}": index, f"relu{block}_{number}": index + 1}
            shapes |= {f"features.{index}.weight": (channels, before, 3, 3), f"features.{index}.bias": (channels,)}
            index, before = index + 2, channels
        index += 1  # the pooling
    return layers, shapes


VGG19_LAYERS, VGG19_SHAPES = _vgg19()  # each layer's index in torchvision's `vgg19().features`; shapes in its state dict


def check_layers(names: Iterable[str]) -> None:
    """Raise a ValueError for no names at all, and for names that VGG19 has not."""
    names = list(names)
    unknown = [name for name in names if name not in VGG19_LAYERS]
    if unknown or not names:
        raise ValueError(f"layers={names}: {unknown or 'none'} can't be used; known are {', '.join(VGG19_LAYERS)}")


def _check_shapes(sr: Tensor, gt: Tensor) -> None:
    if sr.shape != gt.shape:
        raise ValueError(f"sr is {tuple(sr.shape)}, but gt {tuple(gt.shape)}; they must have the same shape")


def _check_range(sr: Tensor, gt: Tensor) -> None:
    for name, images, lowest, highest in (("gt", gt, 0, 1), ("sr", sr, -16, 16)):  # an untrained network may overshoot by far
        low, high = (value.item() for value in images.detach().float().aminmax())
        if low < lowest or high > highest:
            raise ValueError(
                f"{name} lies in [{low:.3g}, {high:.3g}], but the perceptual loss needs RGB in [0, 1]: divide by 255, or add 1 and halve"
            )


def _cross_entropy(logits: Tensor, real: int) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, real, dtype=torch.float32))
