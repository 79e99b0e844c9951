"""How weights move: Adam, Muon, and the schedule of the learning rate."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from config import Config


def build_optimizer(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names.

    Muon moves the 3x3 convolutions but the last, nearly all of RCAN's weights; Adam moves the one to RGB, attention and biases.
    """
    learning = [weight for weight in network.parameters() if weight.requires_grad]
    if config.optimizer == "adam":
        return build_adam(learning, config, config.learning_rate)
    convolutions = [weight for weight in learning if weight.shape[2:] == (3, 3) and weight.shape[0] > 3]
    known = set(convolutions)
    others = [weight for weight in learning if weight not in known]
    return Muon(convolutions, build_adam(others, config, config.learning_rate))


def build_adam(weights: Any, config: Config, learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(weights, learning_rate, config.adam_betas, eps=1e-8, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, config: Config) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate of every group, by update."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: learning_rate_factor(config, update))


def learning_rate_factor(config: Config, update: int) -> float:
    """The factor of `learning_rate` in the update after `update` others: warm-up, then steps or a cosine."""
    rise = min(1.0, (update + 1) / (config.warmup_updates + 1))
    if config.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * min(update / config.total_updates, 1)))
    return rise * 0.5 ** (update // config.halve_every)


class Muon(torch.optim.Optimizer):
    """Muon for convolutions and Adam for other weights, as one optimizer with two groups (Jordan et al., "Muon", 2024).

    A convolution's weights are a matrix of output channels x (input channels · kernel). Its update is the average gradient with all
    singular values made about 1, so that rare directions move as far as common ones. Scaled by 0.2 · sqrt(max(rows, columns)), it
    is as large as Adam's (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2), and both share a learning rate. As every
    update has the same size, weights would grow without end; each update also makes them smaller by `DECAY` of the learning rate.

    Where `found_inf` is 1, `step` changes nothing, as fused Adam's.

    Args:
        convolutions: weights (out, in, k, k).
        adam: moves the other weights; this class takes over its group.
    """

    MOMENTUM = 0.95
    DECAY = 0.3

    def __init__(self, convolutions: Sequence[nn.Parameter], adam: torch.optim.Adam) -> None:
        (group,) = adam.param_groups
        self.adam = adam
        super().__init__([{"params": convolutions}, group], {"lr": group["lr"]})
        for weight in convolutions:
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        convolutions, others = self.param_groups
        rate = convolutions["lr"]
        self.adam.param_groups, self.adam.state = [others], self.state  # anew each time, as loading a state replaces both
        self.adam.found_inf = found_inf  # type: ignore[attr-defined]
        self.adam.step()
        weights = convolutions["params"]
        for shape in {weight.shape: None for weight in weights}:  # all matrices of one shape at once
            alike = [weight for weight in weights if weight.shape == shape]
            gradients = torch.stack([weight.grad.flatten(1) for weight in alike])  # (matrices, out, in · k · k)
            momentum = torch.stack([self.state[weight]["momentum"].flatten(1) for weight in alike])
            learned = momentum.lerp(gradients, 1 - self.MOMENTUM)
            update = orthogonalise(gradients.lerp(learned, self.MOMENTUM))  # Nesterov's momentum
            update *= rate * 0.2 * math.sqrt(max(update.shape[1:]))
            update += rate * self.DECAY * torch.stack([weight.flatten(1) for weight in alike])
            if found_inf is not None:
                learned = torch.where(found_inf > 0, momentum, learned)
                update = torch.where(found_inf > 0, 0, update)
            for weight, new, move in zip(alike, learned, update, strict=True):
                self.state[weight]["momentum"].copy_(new.view(shape))
                weight.sub_(move.view(shape))


NEGLIGIBLE_NORM = 1e-8  # gradients of L1 have norms of 1e-5 to 1e-3 here


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The matrices (…, rows, columns) with their singular values brought to between about 0.7 and 1.2.

    Newton and Schulz's iteration with the coefficients of Jordan et al., which values above about 1e-3 of the norm reach in 5 rounds.
    Matrices whose norm is far below `NEGLIGIBLE_NORM` stay small: the gradient of a block that has died must not move it on and on.
    """
    norm = matrices.norm(dim=(-2, -1), keepdim=True)
    x = matrices / norm.clamp(min=NEGLIGIBLE_NORM)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    gram = x @ x.mT  # small, so the iteration runs on it; its products are those of x
    factor = identity = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    x = factor @ x * (norm / (norm + NEGLIGIBLE_NORM))
    return x.mT if is_tall else x
