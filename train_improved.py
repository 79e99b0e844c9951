"""Train RCAN with CBAM attention and a composite loss: edit config_improved.py, or choose one of its presets, then

    python train_improved.py --preset psnr              # CBAM, L1: the same loop as train.py
    python train_improved.py --preset perceptual --pretrained_model_path results/rcan_cbam_x4_psnr/best.pth.tar
    torchrun --nproc_per_node 4 train_improved.py       # four GPUs; batch_size is that of all together

IMPROVED_USAGE.md is the guide. The loop is train.py's; `AdversarialStep` is one update, after ESRGAN (Wang et al., 2018).
"""

import environment  # noqa: F401 (names missing packages)

# isort: split
from config import answer_help
from config_improved import ImprovedConfig, parse_improved

if __name__ == "__main__":
    answer_help(parse_improved)

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import checkpoints
import losses
import model
import optimizers
import train
import weights
from reports import SKIPPED
from runtime import STOPPED, Runtime, parallel, run_script, synchronised


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_improved(argv)
    warn_of_unusual_settings(config)
    if not train.train(config, AdversarialStep if config.use_composite_loss else train.PixelStep):
        sys.exit(STOPPED)


class AdversarialStep(train.PixelStep):
    """One update of both networks: the discriminator learns from detached SR, the generator from the composite loss.

    Both gradients are computed before either network moves. If either is not finite, neither network changes. A term with weight 0
    costs nothing; without the adversarial term there is no discriminator, and with L1 alone, in one part, this is `PixelStep` bit for bit.
    """

    config: ImprovedConfig
    criterion: losses.CompositeLoss

    def __init__(self, config: ImprovedConfig, runtime: Runtime, precision: str) -> None:
        lonely = config.batch_size == runtime.world_size  # one patch a process
        if config.adversarial_weight and lonely and config.gt_patch_size < 2 * model.Discriminator.MIN_SIZE:
            raise ValueError(
                f"batch_size={config.batch_size} leaves {runtime.world_size} processes one patch of {config.gt_patch_size} each, too few "
                "pixels for the discriminator's normalisation: double batch_size, or set a larger lr_patch_size"
            )
        vgg19 = read_vgg19(config, runtime)  # before anything is built
        super().__init__(config, runtime, precision)
        if self.graph:
            runtime.say("cuda_graph=True has no effect with the composite loss")
            self.graph = None
        self.criterion = losses.CompositeLoss(
            config.l1_weight,
            config.perceptual_weight,
            config.adversarial_weight,
            vgg19=vgg19,
            perceptual_layers=dict.fromkeys(config.perceptual_layers, 1.0),
            adversarial=config.adversarial_loss,
            luma_share=config.luma_share,
        )
        self.discriminator: model.Discriminator | None = None
        if config.adversarial_weight:
            layout = torch.channels_last if config.channels_last else torch.contiguous_format
            self.discriminator = model.Discriminator(config.discriminator_channels).to(runtime.device).to(memory_format=layout)
            self.judge = parallel(self.discriminator, runtime)
            rate = config.discriminator_learning_rate
            self.discriminator_optimizer = optimizers.build_adam(self.discriminator.parameters(), config, rate)
            self.discriminator_scheduler = optimizers.build_schedule(self.discriminator_optimizer, config)
            self.balance = Balance(config.total_updates).to(runtime.device)

    def __call__(self, lr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        parts = self.config.accumulation_steps
        learning_rate = float(self.scheduler.get_last_lr()[0])
        if parts == 1:
            with self.autocast():
                sr = self.forward(lr)  # (n, 3, H, W)
        else:  # the discriminator normalises over the whole batch, so SR is first made without a graph, part by part
            with torch.no_grad(), self.autocast():
                sr = torch.cat([self.generator(part) for part in lr.chunk(parts)]).requires_grad_()
        judged: dict[str, Tensor] = {}
        sr_logits = gt_logits = None
        if self.discriminator:
            judged, gt_logits = self._discriminator_gradient(sr.detach(), gt)
            self.discriminator.requires_grad_(False)  # the generator's loss leaves no gradient there
            with self.autocast():
                sr_logits = self.discriminator(sr)  # (n, 1)
            self.discriminator.requires_grad_(True)
        terms = self.criterion(sr, gt, sr_logits, gt_logits)
        self.optimizer.zero_grad()
        self.scaler.scale(terms["total"]).backward()
        if parts > 1:  # SR once more, with a graph, into which the gradient of SR is fed
            for number, (part, gradient) in enumerate(zip(lr.chunk(parts), sr.grad.chunk(parts), strict=True), start=1):
                with synchronised(self.forward, number == parts):
                    with self.autocast():
                        again = self.forward(part)
                    again.backward(gradient)
        norm = self.clip(self.generator, self.optimizer)
        if self.discriminator:
            skipped = self.guard(terms["total"], [judged["discriminator/gradient_norm"], norm])
            self.balance.update(judged["discriminator/accuracy"], skipped)
            self.discriminator_optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as in PixelStep
            self.discriminator_optimizer.step()
            self.discriminator_scheduler.step()
        else:
            skipped = self.guard(terms["total"], [norm])
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        self.scheduler.step()
        return {
            **{f"loss/{name}": value.detach() for name, value in terms.items()},
            **{f"weighted/{name}": weight * terms[name].detach() for name, weight in self.criterion.weights.items() if name in terms},
            **judged,
            "optimizer/gradient_norm": norm,
            "optimizer/learning_rate": torch.full((), learning_rate, device=self.device),
            SKIPPED: skipped,
        }

    def _discriminator_gradient(self, sr: Tensor, gt: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Leave the discriminator's gradient in its weights; how well it tells sr from gt, and its logits of gt, (n, 1)."""
        assert self.discriminator is not None
        self.discriminator_optimizer.zero_grad()
        with self.autocast():  # two calls, as in ESRGAN, so each kind is normalised by its own statistics
            gt_logits, sr_logits = self.judge(gt), self.judge(sr)
        loss = self.criterion.adversarial.discriminator(sr_logits, gt_logits)["discriminator"]
        self.scaler.scale(loss).backward()
        norm = self.clip(self.discriminator, self.discriminator_optimizer)
        gt_logits, sr_logits = gt_logits.detach(), sr_logits.detach()
        threshold_gt, threshold_sr = (sr_logits.mean(), gt_logits.mean()) if self.criterion.adversarial.relativistic else (0, 0)
        right = ((gt_logits > threshold_gt).float().mean() + (sr_logits < threshold_sr).float().mean()) / 2
        judged = {
            "discriminator/loss": loss.detach(),
            "discriminator/gt": gt_logits.mean(),
            "discriminator/sr": sr_logits.mean(),
            "discriminator/accuracy": right,
            "discriminator/gradient_norm": norm,
        }
        return judged, gt_logits

    def parts(self) -> dict[str, Any]:
        if not self.discriminator:
            return super().parts()
        return {
            **super().parts(),
            "discriminator_state_dict": self.discriminator,
            "discriminator_optimizer": self.discriminator_optimizer,
            "discriminator_scheduler": self.discriminator_scheduler,
            "balance": self.balance,
        }

    def check(self) -> list[str]:
        return super().check() + (self.balance.check() if self.discriminator else [])


class Balance(nn.Module):
    """Notices when the discriminator has been winning for long; its gradient then tells the generator nothing."""

    WINNING = 0.99  # accuracy, averaged over about the last 20 updates
    accuracy: Tensor
    lopsided: Tensor  # updates in a row above WINNING

    def __init__(self, total_updates: int) -> None:
        super().__init__()
        self.long = max(20, min(500, total_updates // 8))  # updates; the average means little before 20
        self.register_buffer("accuracy", torch.tensor(0.5))
        self.register_buffer("lopsided", torch.zeros(()))

    def update(self, accuracy: Tensor, skipped: Tensor) -> None:
        """Take in the accuracy of an update, unless it was skipped."""
        average = torch.where(skipped > 0, self.accuracy, self.accuracy.lerp(accuracy, 0.05))
        self.lopsided = torch.where(average > self.WINNING, self.lopsided + 1 - skipped, torch.zeros_like(self.lopsided))
        self.accuracy = average

    def check(self) -> list[str]:
        if self.lopsided < self.long:
            return []
        return [
            f"warning: for {int(self.lopsided)} updates the discriminator has told {self.accuracy.item():.1%} of the patches apart, and no "
            "longer guides the generator: lower discriminator_learning_rate, or start from better L1 weights"
        ]


def read_vgg19(config: ImprovedConfig, runtime: Runtime) -> dict[str, Tensor] | None:
    """VGG19's weights, found or downloaded once on each disk; None if the perceptual loss has no weight."""
    if not config.perceptual_weight:
        return None
    losses.check_layers(config.perceptual_layers)
    runtime.check_agreement({"random VGG19": config.vgg19_weights_path == "random"})  # the file may lie elsewhere on another machine
    if config.vgg19_weights_path == "random":
        runtime.say("warning: vgg19_weights_path='random': this VGG19 was never trained; use it for tests only")
    else:
        runtime.in_turns(lambda: weights.find_vgg19(config.vgg19_weights_path))
    return weights.read_vgg19(config.vgg19_weights_path)


def warn_of_unusual_settings(config: ImprovedConfig) -> None:
    """Warn of what is allowed but seldom meant: a composite run without L1 weights, or one judged by PSNR."""
    resumes = config.resume not in ("auto", "never") or (config.experiment_dir / checkpoints.LAST).exists()
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
            "warning: the composite loss starts from random weights, where the discriminator wins at once: train with L1 first "
            f"(--preset {'light' if 'light' in config.preset else 'psnr'}), then give its best.pth.tar with --pretrained_model_path",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_script(main)
