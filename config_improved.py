"""The settings by which improved training differs from config.py: CBAM attention, the composite loss, and presets of both.

The CBAM here is the variant that scored best on the light network (IMPROVED_USAGE.md, "Is it better?").

    python train_improved.py --preset psnr          # CBAM, L1; best.pth.tar by PSNR
    python train_improved.py --preset perceptual --pretrained_model_path results/rcan_cbam_x4_psnr/best.pth.tar
    python train_improved.py --preset light         # for a CPU; also light_perceptual

The command line wins over the preset, the preset over the lines of ImprovedConfig, and these over config.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from config import Config, ModelName, parse

Preset = Literal["psnr", "perceptual", "light", "light_perceptual"]


@dataclass(frozen=True, kw_only=True)
class ImprovedConfig(Config):
    """The lines of `psnr`; `preset(name)` and `--preset` replace them by another preset's values."""

    # The run
    preset: Preset = "psnr"  # named values for other settings, the table PRESETS in config_improved.py

    # The network
    model_arch_name: ModelName = "rcan_cbam_x4"  # rcan_…: the paper's size; rcan_light_…: for CPUs; …_cbam_…: with CBAM attention
    attention: Literal["channel", "cbam", "cbam_average"] | None = "cbam_average"  # cbam: as published; cbam_average: no max pooling
    initial_spatial_gate: float | None = 0.95  # CBAM's spatial gate initialisation, 0 to 1; None: as published, near 0.5

    # Composite loss; its weights are in config.py
    perceptual_layers: tuple[str, ...] = ("conv5_4",)  # of VGG19, weighted equally; conv…: before ReLU; relu…: after (ESRGAN: conv5_4)
    vgg19_weights_path: str = ""  # vgg19-dcbb9e9d.pth; empty: in pretrained/, else torchvision's download; random: for tests only
    adversarial_loss: Literal["relativistic", "vanilla"] = "relativistic"  # relativistic average as in ESRGAN, or the plain one
    discriminator_channels: int = 64  # width of the first layer; the last ones are 8 times as wide (ESRGAN: 64)
    discriminator_learning_rate: float = 1e-4  # the discriminator's at its peak, on the generator's schedule (ESRGAN: 1e-4)

    NOT_IN_TRAINING: ClassVar = Config.TESTING_ALONE
    IDLE: ClassVar = {
        **Config.IDLE,
        "use_composite_loss": (False, frozenset({
            "l1_weight", "perceptual_weight", "adversarial_weight", "perceptual_layers", "vgg19_weights_path", "adversarial_loss",
            "discriminator_channels", "discriminator_learning_rate",
        })),
        "perceptual_weight": (0, frozenset({"perceptual_layers", "vgg19_weights_path"})),
        "l1_weight": (0, frozenset({"luma_share"})),
        "adversarial_weight": (0, frozenset({"adversarial_loss", "discriminator_channels", "discriminator_learning_rate"})),
    }  # fmt: skip
    FREE_AT_RESUME: ClassVar = Config.FREE_AT_RESUME | {"vgg19_weights_path"}  # to or from another file, but not "random"
    OF_ONE_MACHINE: ClassVar = Config.OF_ONE_MACHINE | {"vgg19_weights_path"}
    RANGES: ClassVar = {
        **Config.RANGES,
        "discriminator_channels": "at least 1",
        "discriminator_learning_rate": "more than 0 and less than 1",
    }

    @property
    def experiment_dir(self) -> Path:
        """The run's folder: without exp_name, results/<model>_<preset>."""
        return Path(self.results_dir) / (self.exp_name or f"{self.model_arch_name}_{self.preset}{self._differences()}")

    def _check_pairs(self) -> None:
        super()._check_pairs()
        if not self.use_composite_loss:
            return
        if not self.l1_weight + self.perceptual_weight + self.adversarial_weight:
            raise ValueError("l1_weight, perceptual_weight and adversarial_weight are all 0, which trains nothing: raise one")
        if self.perceptual_weight and not self.perceptual_layers:
            raise ValueError(
                f"perceptual_weight={self.perceptual_weight} contradicts perceptual_layers=(): name a layer, or set the weight to 0"
            )
        if len(set(self.perceptual_layers)) < len(self.perceptual_layers):
            raise ValueError(f"perceptual_layers={self.perceptual_layers} names a layer twice: name each once")
        for name, least in (("perceptual_weight", 16), ("adversarial_weight", 32)):  # VGG19 halves a patch 4 times, the discriminator 5
            if getattr(self, name) and self.gt_patch_size < least:
                raise ValueError(
                    f"lr_patch_size={self.lr_patch_size} at upscale_factor={self.upscale_factor} gives GT patches of {self.gt_patch_size}, "
                    f"but {name}={getattr(self, name)} needs {least}: set lr_patch_size to at least {-(-least // self.upscale_factor)}"
                )
        if self.adversarial_weight and self.batch_size == 1 and self.gt_patch_size < 64:
            raise ValueError(
                f"batch_size=1 contradicts adversarial_weight={self.adversarial_weight} with GT patches of {self.gt_patch_size}, "
                "over which the discriminator can't normalise: set batch_size to at least 2, or larger patches"
            )


# What each preset sets; everything else is as in ImprovedConfig and config.py
_COMPOSITE: dict[str, Any] = {"use_composite_loss": True, "best_metric": "newest"}  # as a GAN lowers PSNR from its first update on
_LIGHT: dict[str, Any] = {
    "model_arch_name": "rcan_light_cbam_x4", "initial_channel_gate": 0.95,  # which was measured on this size only
    "train_sets": ("DemoTrain",), "valid_sets": ("DemoTest",), "small_images": "skip",
    "lr_patch_size": 24, "batch_size": 8, "schedule": "cosine", "warmup_updates": 50, "clip_grad_norm": 0.1, "ema_decay": 0.99,
    "epochs": 1, "log_every": 20, "eval_every": 200, "save_every": 200,
}  # fmt: skip
_SMALL_GAN = {"batch_size": 4, "steps_per_epoch": 400, "learning_rate": 1e-4, "discriminator_channels": 32}
PRESETS: dict[str, dict[str, Any]] = {
    "psnr": {},
    "perceptual": {**_COMPOSITE, "epochs": 100, "learning_rate": 1e-5},
    "light": {**_LIGHT, "steps_per_epoch": 600, "learning_rate": 1e-3},
    "light_perceptual": {**_LIGHT, **_COMPOSITE, **_SMALL_GAN},
}


def preset(name: str, **changes: Any) -> ImprovedConfig:
    """The settings of a preset, with changes.

    Raises:
        ValueError: an unknown preset, and the known ones; impossible settings.
    """
    return ImprovedConfig(**{**_values(name), **changes})


def parse_improved(argv: Sequence[str] | None = None) -> ImprovedConfig:
    """The settings of a training: those of the preset that the command line or the file names, replaced by the command line.

    Raises:
        ValueError, SystemExit: as `config.parse`; an unknown preset exits with 2.
    """
    import tyro  # only here, so that importing the settings stays cheap

    def chosen(preset: Preset = ImprovedConfig.preset) -> str:
        return preset

    name, _ = tyro.cli(chosen, args=argv, return_unknown_args=True, add_help=False, use_underscores=True)
    return parse(ImprovedConfig, "train", argv, _values(name))


def _values(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; known are {', '.join(map(repr, PRESETS))}")
    unknown = PRESETS[name].keys() - {field.name for field in fields(ImprovedConfig)}
    if unknown:
        raise ValueError(f"PRESETS in config_improved.py: {name!r} sets {', '.join(sorted(unknown))}, but there is no such setting")
    return {**PRESETS[name], "preset": name}
