"""The settings by which improved training differs from config.py: CBAM attention."""

from dataclasses import dataclass

from config import Config, ModelName


@dataclass(frozen=True, kw_only=True)
class ImprovedConfig(Config):
    model_arch_name: ModelName = "rcan_cbam_x4"  # the paper's size, or rcan_light_… for CPUs; …_cbam_… has CBAM attention
