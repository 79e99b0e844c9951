"""The settings by which improved training differs from config.py: CBAM attention, the composite loss, and presets of both.

CBAM is a variant of the published one that scored better on the light network (IMPROVED_USAGE.md, "Is it better?").

    python train_improved.py --preset psnr          # CBAM, L1; best.pth.tar by PSNR
    python train_improved.py --preset perceptual --pretrained_model_path results/rcan_cbam_x4_psnr/best.pth.tar
    python train_improved.py --preset light         # for a CPU; also light_perceptual

A value on the command line wins over the preset's, the preset's over the lines of ImprovedConfig, and these over config.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from config import Config, ModelName, parse

Preset = Literal["psnr", "perceptual", "light", "light_perceptual"]


@dataclass(frozen=True, kw_only=True)
class ImprovedConfig(Config):
    """The lines of `psnr`; `preset(name)` and the command line's `--preset` lay another preset's values over them."""

    preset: Preset = "psnr"  # named settings, the table PRESETS in config_improved.py; what else is given wins over them
    model_arch_name: ModelName = "rcan_cbam_x4"  # the paper's size, or rcan_light_… for CPUs; …_cbam_… has CBAM attention
    attention: Literal["channel", "cbam", "cbam_average"] | None = "cbam_average"  # CBAM without its maxima; cbam: as published
    initial_spatial_gate: float | None = 0.95  # where CBAM's factor of each pixel starts, 0 to 1; None: as published, near 0.5

    # Composite loss; its weights are in config.py
    perceptual_layers: tuple[str, ...] = ("conv5_4",)  # VGG19's, all with weight 1: conv… before its activation, relu… after
    vgg19_weights_path: str = ""  # vgg19-dcbb9e9d.pth; empty: in pretrained/, else torchvision's download; random: for tests only
    adversarial_loss: Literal["relativistic", "vanilla"] = "relativistic"  # relativistic average as in ESRGAN, or the plain one
    discriminator_channels: int = 64  # width of its first layer; the last ones have 8 times as many
    discriminator_learning_rate: float = 1e-4  # of its Adam, at its highest; the schedule is the generator's

    @property
    def experiment_dir(self) -> Path:
        """Where the run leaves its checkpoints, logs and pictures: without exp_name, results/<model>_<preset>."""
        return Path(self.results_dir) / (self.exp_name or f"{self.model_arch_name}_{self.preset}")

    def _check_pairs(self) -> None:
        super()._check_pairs()
        if not self.use_composite_loss:
            return
        if not self.l1_weight + self.perceptual_weight + self.adversarial_weight:
            raise ValueError("l1_weight, perceptual_weight and adversarial_weight are all 0, so that nothing is trained: raise one")
        if self.perceptual_weight and not self.perceptual_layers:
            raise ValueError(
                f"perceptual_weight={self.perceptual_weight} contradicts perceptual_layers=(): name a layer, or set the weight to 0"
            )
        if len(set(self.perceptual_layers)) < len(self.perceptual_layers):
            raise ValueError(f"perceptual_layers={self.perceptual_layers} names a layer twice: name each once")
        self._check_patch()

    def _check_patch(self) -> None:
        """VGG19 halves a patch four times, the discriminator five times, and normalises over what is left of the batch."""
        for name, least in (("perceptual_weight", 16), ("adversarial_weight", 32)):
            if getattr(self, name) and self.gt_patch_size < least:
                raise ValueError(
                    f"lr_patch_size={self.lr_patch_size} at upscale_factor={self.upscale_factor} gives GT patches of {self.gt_patch_size}, "
                    f"but {name}={getattr(self, name)} needs {least}: set lr_patch_size to at least {-(-least // self.upscale_factor)}"
                )
        if self.adversarial_weight and self.batch_size == 1 and self.gt_patch_size < 64:
            raise ValueError(
                f"batch_size=1 contradicts adversarial_weight={self.adversarial_weight} with GT patches of {self.gt_patch_size}: "
                "the discriminator normalises over a batch; set batch_size to at least 2, or larger patches"
            )

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.discriminator_channels < 1:
            raise ValueError(f"discriminator_channels={self.discriminator_channels} must be at least 1; ESRGAN's has 64")
        if not 0 < self.discriminator_learning_rate < 1:
            raise ValueError(f"discriminator_learning_rate={self.discriminator_learning_rate} must lie between 0 and 1; ESRGAN's is 1e-4")


# What each preset sets; everything else is as in ImprovedConfig and config.py
_COMPOSITE: dict[str, Any] = {"use_composite_loss": True, "best_metric": "newest"}  # as a GAN lowers PSNR from its first update on
_LIGHT: dict[str, Any] = {
    "model_arch_name": "rcan_light_cbam_x4", "initial_channel_gate": 0.95,  # which was measured on this size only
    "train_sets": ("DemoTrain",), "valid_sets": ("DemoTest",), "small_images": "skip",
    "lr_patch_size": 24, "batch_size": 8, "schedule": "cosine", "warmup_updates": 50, "clip_grad_norm": 0.1, "ema_decay": 0.99,
    "epochs": 1, "log_every": 20, "eval_every": 200, "save_every": 200,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "psnr": {},
    "perceptual": {**_COMPOSITE, "epochs": 100, "learning_rate": 1e-5},
    "light": {**_LIGHT, "steps_per_epoch": 600, "learning_rate": 1e-3},
    "light_perceptual": {
        **_LIGHT,
        **_COMPOSITE,
        "batch_size": 4,
        "steps_per_epoch": 400,
        "learning_rate": 1e-4,
        "discriminator_channels": 32,
    },
}


def preset(name: str, **changes: Any) -> ImprovedConfig:
    """The settings that a preset names, with changes.

    Raises:
        ValueError: an unknown preset, which lists the known ones; impossible settings.
    """
    return ImprovedConfig(**{**_values(name), **changes})


def parse_improved(argv: Sequence[str] | None = None) -> ImprovedConfig:
    """The settings of a training: the preset that `--preset` or the file names, replaced by what else is on the command line.

    Raises:
        ValueError: settings that contradict each other or training. A slip, a wrong type or preset ends with exit code 2.
    """
    import tyro  # only here, so that importing the settings stays cheap

    chosen, _ = tyro.cli(_Choice, args=argv, return_unknown_args=True, add_help=False, use_underscores=True)
    return parse(_start(chosen.preset), "train", argv)


def _start(name: str) -> ImprovedConfig:
    """As `preset`, but unchecked, as the command line may still resolve what the file and the preset contradict."""
    start = object.__new__(ImprovedConfig)
    for field_name, value in {**{field.name: field.default for field in fields(ImprovedConfig)}, **_values(name)}.items():
        object.__setattr__(start, field_name, value)
    return start


def _values(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; known are {', '.join(map(repr, PRESETS))}")
    unknown = PRESETS[name].keys() - {field.name for field in fields(ImprovedConfig)}
    if unknown:
        raise ValueError(f"PRESETS in config_improved.py: {name!r} sets {', '.join(sorted(unknown))}, but there is no such setting")
    return {**PRESETS[name], "preset": name}


@dataclass(frozen=True, kw_only=True)
class _Choice:
    preset: Preset = ImprovedConfig.preset
