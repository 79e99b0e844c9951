"""Train RCAN with CBAM attention and a composite loss: edit config_improved.py, or choose one of its presets, then

    python train_improved.py --preset psnr              # CBAM, L1: the same loop as train.py
    python train_improved.py --preset perceptual --pretrained_model_path results/rcan_cbam_x4_psnr/best.pth.tar
    torchrun --nproc_per_node 4 train_improved.py       # four GPUs; batch_size is that of all together

IMPROVED_USAGE.md is the guide. The loop is train.py's; what one update does is `AdversarialStep`, after ESRGAN (Wang et al., 2018).
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import losses
import model
import train
from config_improved import ImprovedConfig, parse_improved
from runtime import STOPPED, Runtime, run_script


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_improved(argv)
    _warn_of_what_is_seldom_meant(config)
    if not train.train(config, AdversarialStep if config.use_composite_loss else train.PixelStep):
        sys.exit(STOPPED)


class AdversarialStep(train.PixelStep):
    """One update of both networks: the discriminator's gradient on SR that is detached, then, while it is frozen, the generator's
    with the composite loss. Both gradients are found before either network moves.

    An update in which either gradient is not finite changes neither network. A term whose weight is 0 costs nothing, and without
    the adversarial one there is no discriminator: with L1 alone, this is `PixelStep` bit for bit.
    """

    config: ImprovedConfig

    def __init__(self, config: ImprovedConfig, runtime: Runtime, precision: str) -> None:
        _check_share(config, runtime)
        _fetch_vgg19(config, runtime)
        super().__init__(config, runtime, precision)
        self.criterion = losses.CompositeLoss(
            config.l1_weight,
            config.perceptual_weight,
            config.adversarial_weight,
            perceptual_layers=dict.fromkeys(config.perceptual_layers, 1.0),
            vgg19_weights_path=config.vgg19_weights_path,
            adversarial=config.adversarial_loss,
        )
        self.discriminator = None
        if config.adversarial_weight:
            self._build_discriminator(config, runtime)

    def _build_discriminator(self, config: ImprovedConfig, runtime: Runtime) -> None:
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        discriminator = model.Discriminator(config.discriminator_channels).to(runtime.device, memory_format=layout)
        self.discriminator = discriminator
        self.forward_discriminator = train.parallel(discriminator, runtime)
        built = train.build_optimizer(discriminator, config, config.discriminator_learning_rate)
        self.discriminator_optimizer, self.discriminator_scheduler = built
        self.balance = _Balance(min(LONG, config.total_updates // 8)).to(runtime.device)

    def __call__(self, lr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        sr = self._upscale_whole(lr)  # (n, 3, H, W)
        norms, optimizers, schedulers, judged, gt_logits = [], [self.optimizer], [self.scheduler], {}, None
        if self.discriminator:
            self.discriminator_optimizer.zero_grad()
            loss, judged, gt_logits = self._judge(sr.detach(), gt)
            self.scaler.scale(loss).backward()
            norms.append(self.finish_gradient(self.discriminator, self.discriminator_optimizer))
            judged["discriminator/gradient_norm"] = norms[0]
            optimizers.append(self.discriminator_optimizer)
            schedulers.append(self.discriminator_scheduler)
        terms = self._generator_terms(sr, gt, gt_logits)
        self._find_generator_gradient(lr, sr, terms["total"])
        norm = self.finish_gradient(self.generator, self.optimizer)
        learning_rate = torch.full((), self.scheduler.get_last_lr()[0], device=self.device)
        skipped = self.apply_gradients(terms["total"], [*norms, norm], optimizers, schedulers)
        if self.discriminator:
            self.balance.update(judged["discriminator/accuracy"], skipped)
        return {
            **{f"loss/{name}": value.detach() for name, value in terms.items()},
            **{f"weighted/{name}": weight * terms[name].detach() for name, weight in self.criterion.weights.items() if name in terms},
            **judged,
            "optimizer/gradient_norm": norm,
            "optimizer/learning_rate": learning_rate,
            train.SKIPPED: skipped,
        }

    def _upscale_whole(self, lr: Tensor) -> Tensor:
        """SR of the whole batch, as the discriminator normalises over it: in parts, it is first made without a graph."""
        if self.config.accumulation_steps == 1:
            return self.upscale(lr)  # (n, 3, H, W)
        with torch.no_grad(), self.autocast():
            return torch.cat([self.generator(part) for part, _ in self.in_parts(lr)]).requires_grad_()

    def _find_generator_gradient(self, lr: Tensor, sr: Tensor, loss: Tensor) -> None:
        """Leave the loss's gradient in the generator; in parts, by way of that of SR, which is made once more, so that it is the same."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.config.accumulation_steps == 1:
            return
        for part, gradient, last in self.in_parts(lr, sr.grad):
            with self.synchronised(last):
                self.upscale(part).backward(gradient)

    def _generator_terms(self, sr: Tensor, gt: Tensor, gt_logits: Tensor | None) -> dict[str, Tensor]:
        """The composite loss and its terms; no gradient reaches the discriminator, whose logits of gt are those of `_judge`."""
        if not self.discriminator:
            return self.criterion(sr, gt)
        self.discriminator.requires_grad_(False)
        with self.autocast():
            sr_logits = self.discriminator(sr)  # (n, 1)
        self.discriminator.requires_grad_(True)
        return self.criterion(sr, gt, sr_logits, gt_logits)

    def _judge(self, sr: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The discriminator's loss, how well it tells sr from gt, and its logits of gt, (n, 1)."""
        with self.autocast():  # two calls, as in ESRGAN, so that each kind is normalised by itself
            gt_logits, sr_logits = self.forward_discriminator(gt), self.forward_discriminator(sr)
        loss = self.criterion.adversarial.discriminator(sr_logits, gt_logits)["discriminator"]
        gt_logits, sr_logits = gt_logits.detach(), sr_logits.detach()
        threshold_gt, threshold_sr = (sr_logits.mean(), gt_logits.mean()) if self.criterion.adversarial.relativistic else (0, 0)
        right = ((gt_logits > threshold_gt).float().mean() + (sr_logits < threshold_sr).float().mean()) / 2
        judged = {
            "discriminator/loss": loss.detach(),
            "discriminator/gt": gt_logits.mean(),
            "discriminator/sr": sr_logits.mean(),
            "discriminator/accuracy": right,
        }
        return loss, judged, gt_logits

    def parts(self) -> dict[str, Any]:
        parts = super().parts()
        if not self.discriminator:
            return parts
        return {
            **parts,
            "discriminator_state_dict": self.discriminator,
            "discriminator_optimizer": self.discriminator_optimizer,
            "discriminator_scheduler": self.discriminator_scheduler,
            "balance": self.balance,
        }

    def check(self) -> list[str]:
        return super().check() + (self.balance.check() if self.discriminator else [])


class _Balance(nn.Module):
    """Whether the discriminator has been winning for long, as its gradient then says nothing any more."""

    def __init__(self, long: int) -> None:
        super().__init__()
        self.long = long  # updates
        self.register_buffer("accuracy", torch.tensor(0.5))  # average over about the last 20 updates
        self.register_buffer("lopsided", torch.zeros(()))  # updates in a row that it has been above LOPSIDED

    def update(self, accuracy: Tensor, skipped: Tensor) -> None:
        """Nothing of a skipped update counts."""
        average = torch.where(skipped > 0, self.accuracy, self.accuracy.lerp(accuracy, 0.05))
        self.lopsided = torch.where(average > LOPSIDED, self.lopsided + 1 - skipped, torch.zeros_like(self.lopsided))
        self.accuracy = average

    def check(self) -> list[str]:
        if self.lopsided < self.long:
            return []
        return [
            f"warning: for {int(self.lopsided)} updates, the discriminator has told {self.accuracy.item():.1%} of the patches apart, and "
            "no longer shows the generator a way: lower discriminator_learning_rate, or start from better L1 weights"
        ]


LOPSIDED = 0.99  # accuracy
LONG = 500  # updates, or an eighth of a short run


def _check_share(config: ImprovedConfig, runtime: Runtime) -> None:
    if config.adversarial_weight and config.batch_size == runtime.world_size and config.gt_patch_size < 2 * model.Discriminator.MIN_SIZE:
        raise ValueError(
            f"batch_size={config.batch_size} leaves {runtime.world_size} processes one patch of {config.gt_patch_size} each, "
            "over which the discriminator can't normalise: double batch_size, or set a larger lr_patch_size"
        )


def _fetch_vgg19(config: ImprovedConfig, runtime: Runtime) -> None:
    """Find or download VGG19, once on each disk, before all processes read it, and before anything is built."""
    if config.perceptual_weight:
        losses.check_layers(config.perceptual_layers)
    if config.perceptual_weight and config.vgg19_weights_path == "random":
        if runtime.is_main:
            print("warning: vgg19_weights_path='random': VGG19 was never trained; this is for tests, not for pictures", file=sys.stderr)
    elif config.perceptual_weight:
        runtime.in_turns(lambda: losses.find_vgg19(config.vgg19_weights_path))


def _warn_of_what_is_seldom_meant(config: ImprovedConfig) -> None:
    """Say what is allowed, but seldom meant: a composite run without L1 weights, and one that is judged by PSNR."""
    resumes = config.resume not in ("auto", "never") or (config.experiment_dir / "last.pth.tar").exists()
    is_main = os.environ.get("RANK", "0") == "0"
    adversarial = is_main and config.use_composite_loss and config.adversarial_weight > 0
    if adversarial and config.best_metric != "newest":
        print(
            f"warning: best_metric={config.best_metric!r} keeps the weights that the discriminator has changed least, as it lowers "
            f"{config.best_metric.upper()} from its first update on: set best_metric='newest', as --preset perceptual does",
            file=sys.stderr,
        )
    if adversarial and not config.pretrained_model_path and not resumes:
        print(
            "warning: the composite loss starts from random weights, where a discriminator wins at once: better train with L1 first "
            f"(--preset {'light' if 'light' in config.preset else 'psnr'}), then give its best.pth.tar with --pretrained_model_path",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_script(main)
