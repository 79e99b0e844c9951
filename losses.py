"""Criteria: tensors in, a dict of named terms out.

    terms = losses.L1Loss()(sr, gt)                               # {"l1": scalar}
    terms = losses.CompositeLoss()(sr, gt, sr_logits, gt_logits)  # {"total": …, "l1": …, "perceptual": …, "adversarial": …}

ESRGAN: Wang et al., "Enhanced Super-Resolution Generative Adversarial Networks", ECCV Workshops 2018.
VGG19: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

import hashlib
import math
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


class L1Loss(nn.Module):
    """Mean absolute difference of `sr` and `gt`, (N, 3, H, W) in [0, 1], in float32 (the paper's equation 2)."""

    def forward(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        _check_shapes(sr, gt)
        return {"l1": functional.l1_loss(sr.float(), gt.float())}


class PerceptualLoss(nn.Module):
    """Mean absolute difference of VGG19's features, before their activation as in ESRGAN (section 3.3).

    VGG19 is frozen, in eval mode and in fp32 whatever autocast says, moves to where the pictures are, and is in no state_dict.

    Args:
        layers: weight of each layer by its name, "conv1_1" … "conv5_4", before its activation, or "relu1_1" … "relu5_4", after it.
        weights_path: the file that torchvision publishes, `VGG19_FILE`; "": where `find_vgg19` finds it, else downloaded;
            "random": weights that were never trained, for tests only.

    Raises:
        ValueError: unknown layers; a file that isn't VGG19's; in the first call, pictures that aren't in [0, 1].
        OSError: no file, and no download.
    """

    def __init__(self, layers: Mapping[str, float] | None = None, weights_path: str = "") -> None:
        super().__init__()
        layers = {"conv5_4": 1.0} if layers is None else layers
        check_layers(layers)
        if not all(0 < weight < math.inf for weight in layers.values()):
            raise ValueError(f"layers={dict(layers)}: every weight must be positive and finite; leave out what shall not count")
        self.layers = {VGG19_LAYERS[name]: float(weight) for name, weight in layers.items()}
        self._vgg19 = (build_vgg19(1 + max(self.layers), weights_path),)  # in a tuple, so that it is no part of this module
        self._statistics = tuple(torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self._least_side = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self._vgg19[0])  # pixels
        self._checked = False

    def forward(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """`sr` and `gt`, (N, 3, H, W) RGB in [0, 1], with sides of at least 16 for conv5_4; a network's `sr` may leave [0, 1] a little."""
        _check_shapes(sr, gt)
        if min(sr.shape[2:]) < self._least_side:
            raise ValueError(
                f"pictures of {sr.shape[3]}x{sr.shape[2]} are too small for these layers of VGG19: {self._least_side} is the least"
            )
        if not self._checked:  # once, as looking at values waits for the device
            _check_range(sr, gt)
            self._checked = True
        found = self.features(sr)
        with torch.no_grad():
            wanted = self.features(gt)
        return {"perceptual": sum(weight * functional.l1_loss(found[index], wanted[index]) for index, weight in self.layers.items())}

    def features(self, images: Tensor) -> dict[int, Tensor]:
        """Of each layer, by its index in torchvision's `vgg19().features`, for RGB in [0, 1]."""
        (network,) = self._vgg19
        network.to(images.device)
        if self._statistics[0].device != images.device:  # not made anew, as copying to a GPU waits for it
            self._statistics = tuple(values.to(images.device) for values in self._statistics)
        mean, std = self._statistics
        found = {}
        with torch.autocast(images.device.type, enabled=False):
            x = (images.float() - mean) / std  # (N, 3, H, W)
            for index, layer in enumerate(network):
                x = layer(x)
                if index in self.layers:
                    found[index] = x
        return found


class AdversarialLoss(nn.Module):
    """What the discriminator's logits say, (N, 1) each, for the generator's update and for the discriminator's own.

    Args:
        kind: "relativistic", whether gt looks more real than the average sr, and sr less than the average gt (ESRGAN, equations 1
            to 3), or "vanilla", whether each is real. Both are the mean of their part on gt and on sr, so that 0.693 is a draw.
    """

    def __init__(self, kind: str = "relativistic") -> None:
        super().__init__()
        if kind not in ADVERSARIAL_KINDS:
            raise ValueError(f"kind={kind!r} is unknown; known are {', '.join(map(repr, ADVERSARIAL_KINDS))}")
        self.relativistic = kind == "relativistic"

    def generator(self, sr_logits: Tensor, gt_logits: Tensor | None = None) -> dict[str, Tensor]:
        """For the generator, whose pictures shall be taken for real; "vanilla" doesn't look at `gt_logits`."""
        if not self.relativistic:
            return {"adversarial": _cross_entropy(sr_logits, 1)}
        if gt_logits is None:
            raise ValueError("gt_logits is missing: the relativistic loss compares sr with gt")
        gt_logits = gt_logits.detach()
        on_sr, on_gt = _cross_entropy(sr_logits - gt_logits.mean(), 1), _cross_entropy(gt_logits - sr_logits.mean(), 0)
        return {"adversarial": (on_sr + on_gt) / 2}

    def discriminator(self, sr_logits: Tensor, gt_logits: Tensor) -> dict[str, Tensor]:
        """For the discriminator, which shall tell them apart."""
        of_sr, of_gt = (sr_logits.mean(), gt_logits.mean()) if self.relativistic else (0, 0)
        on_gt, on_sr = _cross_entropy(gt_logits - of_sr, 1), _cross_entropy(sr_logits - of_gt, 0)
        return {"discriminator": (on_gt + on_sr) / 2}


class CompositeLoss(nn.Module):
    """The generator's loss: `total` = the weighted sum of the terms, and each term by its name, unweighted.

    A term whose weight is 0 is neither computed nor in the result, and VGG19 is not built for it.

    Args:
        perceptual_layers, vgg19_weights_path: see `PerceptualLoss`.
        adversarial: see `AdversarialLoss`.

    Raises:
        ValueError: a negative weight, or none at all; see also the terms.
    """

    def __init__(
        self,
        l1_weight: float = 1.0,
        perceptual_weight: float = 0.006,
        adversarial_weight: float = 0.001,
        *,
        perceptual_layers: Mapping[str, float] | None = None,
        vgg19_weights_path: str = "",
        adversarial: str = "relativistic",
    ) -> None:
        super().__init__()
        self.weights = {"l1": float(l1_weight), "perceptual": float(perceptual_weight), "adversarial": float(adversarial_weight)}
        if not all(0 <= weight < math.inf for weight in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(
                f"l1_weight, perceptual_weight, adversarial_weight={tuple(self.weights.values())}: "
                "all must be finite, none negative, nor all 0"
            )
        self.l1 = L1Loss()
        self.perceptual = PerceptualLoss(perceptual_layers, vgg19_weights_path) if perceptual_weight else None
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
                raise ValueError(f"sr_logits is missing: adversarial_weight={self.weights['adversarial']} needs the discriminator's")
            terms |= self.adversarial.generator(sr_logits.float(), None if gt_logits is None else gt_logits.float())
        return {"total": sum(self.weights[name] * term for name, term in terms.items()), **terms}


ADVERSARIAL_KINDS = ("relativistic", "vanilla")

# VGG19

VGG19_FILE = "vgg19-dcbb9e9d.pth"  # torchvision's name; the end is how its sha256 begins
VGG19_ADDRESS = f"https://download.pytorch.org/models/{VGG19_FILE}"
VGG19_FOLDER = "pretrained"  # where scripts/download.py puts it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB, of the pictures that VGG19 was trained on


def _layer_indices() -> dict[str, int]:
    """Where torchvision's `vgg19().features` has each layer: blocks of convolutions with a ReLU each, then pooling."""
    indices, index = {}, 0
    for block, convolutions in enumerate((2, 2, 4, 4, 4), 1):
        for number in range(1, convolutions + 1):
            indices |= {f"conv{block}_{number}": index, f"relu{block}_{number}": index + 1}
            index += 2
        index += 1
    return indices


VGG19_LAYERS = _layer_indices()


def check_layers(names: Iterable[str]) -> None:
    """Refuse, with a ValueError, no names at all and such as VGG19 hasn't."""
    names = list(names)
    unknown = [name for name in names if name not in VGG19_LAYERS]
    if unknown or not names:
        raise ValueError(f"layers={names}: {unknown or 'none'} can't be used; known are {', '.join(VGG19_LAYERS)}")


def find_vgg19(weights_path: str = "") -> Path:
    """The file of VGG19's weights: the given one, else `VGG19_FOLDER`'s, else torchvision's own, downloaded where absent.

    Raises:
        OSError: there is none, and it can't be downloaded.
    """
    if weights_path:
        if not Path(weights_path).is_file():
            raise FileNotFoundError(f"vgg19_weights_path={weights_path!r}: no such file; {_HOW_TO_GET_IT}")
        return Path(weights_path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG19_FILE
    for path in (Path(VGG19_FOLDER) / VGG19_FILE, cached):
        if path.is_file():
            return path
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG19_ADDRESS, str(cached), hash_prefix="dcbb9e9d")
    except (OSError, RuntimeError, HTTPException) as error:  # no network; another file; a proxy's nonsense
        raise OSError(f"VGG19's weights are not here and could not be downloaded ({error}): {_HOW_TO_GET_IT}") from None
    return cached


_HOW_TO_GET_IT = (
    f"put {VGG19_FILE} (575 MB) from {VGG19_ADDRESS} into {VGG19_FOLDER}/ (python scripts/download.py --items vgg19), "
    "or name it with vgg19_weights_path, or train without it, perceptual_weight=0"
)


def build_vgg19(depth: int, weights_path: str = "") -> nn.Sequential:
    """The first `depth` layers of VGG19's features, frozen, in eval mode, in fp32, on the CPU; see `PerceptualLoss`.

    Raises:
        OSError, ValueError: no file, or not VGG19's.
    """
    from torchvision.models import vgg19  # only here, as it takes a second to import

    with torch.device("meta"):
        network = vgg19(weights=None).features[:depth]
    for layer in network:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # else a layer before its activation would be overwritten
    state = _random_state(network) if weights_path == "random" else _read_vgg19(find_vgg19(weights_path), network)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _random_state(network: nn.Module) -> dict[str, Tensor]:
    """Kaiming's normal numbers, always the same ones."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, tensor in network.state_dict().items():
        fan_in = tensor[0].numel()
        state[name] = (
            torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5 if tensor.ndim == 4 else torch.zeros(tensor.shape)
        )
    return state


def _read_vgg19(path: Path, network: nn.Module) -> dict[str, Tensor]:
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)  # torchvision's names say how the sha256 begins
    if promised:
        digest = _digest(path)
        if not digest.startswith(promised[1]):
            raise ValueError(f"{path}: is damaged, as its sha256 begins with {digest[:8]} and not {promised[1]}; {_HOW_TO_GET_IT}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _READING_ERRORS as error:
        damaged = isinstance(error, RuntimeError | EOFError | OSError)
        reason = "it is damaged or cut off" if damaged else "it is something else, or holds more than weights"
        raise ValueError(f"{path}: can't be read safely as weights ({reason}); {_HOW_TO_GET_IT}") from None
    wanted = network.state_dict()
    found = {name: state.get(f"features.{name}") if isinstance(state, Mapping) else None for name in wanted}
    misfits = [f"features.{name}" for name in wanted if not isinstance(found[name], Tensor) or found[name].shape != wanted[name].shape]
    if misfits:
        raise ValueError(
            f"{path}: these are not VGG19's weights, {len(misfits)} are absent or of another shape, first {misfits[0]}; {_HOW_TO_GET_IT}"
        )
    return {name: tensor.float() for name, tensor in found.items()}


# What torch.load raises for files that are cut off, or hold something else
_READING_ERRORS = (
    RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError,
    struct.error,
)  # fmt: skip


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_shapes(sr: Tensor, gt: Tensor) -> None:
    if sr.shape != gt.shape:
        raise ValueError(f"sr is {tuple(sr.shape)}, but gt {tuple(gt.shape)}; they must be of one shape")


def _check_range(sr: Tensor, gt: Tensor) -> None:
    for name, images, lowest, highest in (("gt", gt, 0, 1), ("sr", sr, -16, 16)):  # an untrained network may overshoot by far
        low, high = (value.item() for value in images.detach().float().aminmax())
        if low < lowest or high > highest:
            raise ValueError(
                f"{name} lies in [{low:.3g}, {high:.3g}], but the perceptual loss needs RGB in [0, 1]: divide by 255, or add 1 and halve"
            )


def _cross_entropy(logits: Tensor, real: int) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, real, dtype=torch.float32))
