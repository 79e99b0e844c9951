"""Criteria: tensors in, a dict of named terms out.

terms = losses.L1Loss()(sr, gt)        # {"l1": scalar}
"""

from torch import Tensor, nn
from torch.nn import functional


class L1Loss(nn.Module):
    """Mean absolute difference of `sr` and `gt`, (N, 3, H, W) in [0, 1], in float32 (the paper's equation 2)."""

    def forward(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        if sr.shape != gt.shape:
            raise ValueError(f"sr is {tuple(sr.shape)}, but gt {tuple(gt.shape)}; they must be of one shape")
        return {"l1": functional.l1_loss(sr.float(), gt.float())}
