"""Forward, loss and backward as one CUDA graph, for networks whose kernels are shorter than their launching.

An update of the full rcan_x4 launches about 10,000 kernels. Replaying a graph launches them all at once. Not yet measured on a GPU:
`python scripts/gpu_check.py` compares the graph with plain training and times both.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed
from torch import Tensor, nn

Replay = Callable[[], None]


class GraphedGradients:
    """Computes what `backward` would add to `parameter.grad`, part by part, on tensors that stay where they are.

    Clipping, the guard against bad updates and the optimizer run after it, as in plain training; only what is the same in each
    update is recorded. The weights that learn are copied to the type of the computation in one go, and their gradients come back as
    one tensor, which the processes of a group average.

    Args:
        network: computes `sr` from `lr`; never wrapped for a process group.
        criterion: of (sr, gt), a scalar in float32 by the name "l1".
        scaler: of the loss.
        dtype: of the computation.
        parts: in which a batch comes.
        record: turns work into its replay; another one stands in for CUDA graphs in tests.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Callable[[Tensor, Tensor], dict[str, Tensor]],
        scaler: torch.amp.GradScaler,
        dtype: torch.dtype,
        parts: int,
        record: Callable[[Replay], Replay] | None = None,
    ) -> None:
        self.network, self.criterion, self.scaler, self.dtype, self.parts = network, criterion, scaler, dtype, parts
        self.record = record or capture
        self.parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.replay: Replay | None = None

    def __call__(self, lr: Tensor, gt: Tensor, *, first: bool) -> Tensor:
        """The loss of one part, (n, 3, h, w) and (n, 3, H, W) in [0, 1]; `first` forgets the gradients of the update before.

        Raises:
            RuntimeError: in the first call, the work can't be recorded; nothing has changed then.
        """
        if self.replay is None:
            self.lr, self.gt = torch.empty_like(lr), torch.empty_like(gt)
            device, count = lr.device, sum(parameter.numel() for parameter in self.parameters.values())
            self.loss = torch.zeros((), device=device)
            self.copies = torch.empty(count, dtype=self.dtype, device=device)
            self.gradients, self.total = (torch.empty(count, device=device) for _ in range(2))
            self.lr.copy_(lr)
            self.gt.copy_(gt)
            self.replay = self.record(self._compute)
        self.lr.copy_(lr)
        self.gt.copy_(gt)
        self.replay()
        if first:
            self.total.copy_(self.gradients)
        else:
            self.total.add_(self.gradients)
        return self.loss.clone()

    def finish(self, world_size: int) -> None:
        """Average over the processes, and hand the gradients to the parameters."""
        if world_size > 1:
            self.total /= world_size
            torch.distributed.all_reduce(self.total)
        for parameter, gradient in zip(self.parameters.values(), self._split(self.total), strict=True):
            parameter.grad = gradient

    def _compute(self) -> None:
        with torch.no_grad():
            self.copies.copy_(_joined([*self.parameters.values()]))
        weights = [part.detach().requires_grad_() for part in self._split(self.copies)]
        with torch.autocast(self.lr.device.type, self.dtype, enabled=self.dtype != torch.float32):
            sr = torch.func.functional_call(self.network, dict(zip(self.parameters, weights, strict=True)), (self.lr,))
        loss = self.criterion(sr, self.gt)["l1"]
        found = torch.autograd.grad(self.scaler.scale(loss / self.parts), weights)
        self.gradients.copy_(_joined([_laid_out_as(weight, gradient) for weight, gradient in zip(weights, found, strict=True)]))
        self.loss.copy_(loss.detach())

    def _split(self, joined: Tensor) -> list[Tensor]:
        """The parameters' parts of a tensor, each laid out as its parameter."""
        wanted = self.parameters.values()
        parts = joined.split([parameter.numel() for parameter in wanted])
        return [part.as_strided(parameter.shape, parameter.stride()) for part, parameter in zip(parts, wanted, strict=True)]


def capture(work: Replay) -> Replay:
    """Record the kernels of `work`, after three rounds in which libraries choose and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # threads of the loader and of NCCL may call CUDA meanwhile
        work()
    return graph.replay


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, the values of each in the order in which they lie in memory."""
    return torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors])
