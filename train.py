"""Train RCAN with L1: edit config.py, then

    python train.py                                     # the same command goes on where it stopped
    torchrun --nproc_per_node 4 train.py                # four GPUs; batch_size is that of all together

The run lies in results/<exp_name>: last.pth.tar, best.pth.tar, config.json, log.jsonl, TensorBoard's events, samples/.
This is the only training loop; what one update does is a `Step`, here `PixelStep`.
"""

import contextlib
import functools
import inspect
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoints
import dataset
import files
import image_files
import imgproc
import losses
import model
import utils
import weights
from config import Config, parse
from runtime import STOPPED, Poll, Runtime, StopRequest, run_script, start_runtime
from store import PairStore
from upscaling import upscale


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, "train", argv)
    if config.use_composite_loss:
        raise ValueError(
            "use_composite_loss=True contradicts train.py, which trains with L1 alone: set it to False or run train_improved.py"
        )
    if not train(config, PixelStep):
        sys.exit(STOPPED)


class Step(Protocol):
    """Owns networks and optimizers, and performs one update."""

    generator: nn.Module  # the network to evaluate; never wrapped

    def __call__(self, lr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Update from lr (n, 3, h, w) and gt (n, 3, H, W) in [0, 1]; the terms of the loss by name, detached scalars.

        One of them is SKIPPED: 1 if the update was left out, so that nothing has changed.
        """

    def parts(self) -> dict[str, Any]:
        """Everything with a state, by the name it has in a checkpoint."""

    def check(self) -> list[str]:
        """What the user should know by now, a sentence each; ValueError if the run can't go on. Called at each report."""


SKIPPED = "optimizer/skipped"


class PixelStep:
    """One update with L1 (the paper's equation 2): forward, backward, clipping, Adam, learning rate.

    An update that `UpdateGuard` refuses changes nothing and is counted as skipped. Nothing here waits for the device.
    """

    def __init__(self, config: Config, runtime: Runtime, precision: str) -> None:
        self.config = config
        self.device = runtime.device
        self.dtype = utils.PRECISIONS[precision]
        self.generator = build_generator(config).to(runtime.device)
        self.forward = parallel(self.generator, runtime)
        self.criterion = losses.L1Loss()
        self.optimizer, self.scheduler = build_optimizer(self.generator, config, config.learning_rate)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=precision == "fp16")
        self.guard = UpdateGuard(config.skip_threshold, runtime.world_size).to(runtime.device)

    def __call__(self, lr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        found = [self.add_gradient(*part) for part in self.in_parts(lr, gt)]
        terms = {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}
        norm = self.finish_gradient(self.generator, self.optimizer)
        return {
            **{f"loss/{name}": value for name, value in terms.items()},
            "optimizer/gradient_norm": norm,
            "optimizer/learning_rate": torch.full((), self.scheduler.get_last_lr()[0], device=self.device),
            SKIPPED: self.apply_gradients(terms["l1"], [norm], [self.optimizer], [self.scheduler]),
        }

    def in_parts(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """`accumulation_steps` equal parts of tensors of n, and with the last of them, True."""
        parts = zip(*(tensor.chunk(self.config.accumulation_steps) for tensor in tensors), strict=True)
        for number, part in enumerate(parts, start=1):
            yield *part, number == self.config.accumulation_steps

    def add_gradient(self, lr: Tensor, gt: Tensor, last: bool) -> dict[str, Tensor]:
        """Add one part's share to the gradient; the terms of its loss."""
        with self.synchronised(last):
            terms = self.criterion(self.upscale(lr), gt)
            self.scaler.scale(terms["l1"] / self.config.accumulation_steps).backward()
        return {name: value.detach() for name, value in terms.items()}

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes add up their gradients in the last part only."""
        return contextlib.nullcontext() if last or self.forward is self.generator else self.forward.no_sync()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def upscale(self, lr: Tensor) -> Tensor:
        with self.autocast():
            return self.forward(lr)  # (n, 3, H, W)

    def finish_gradient(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """Take the scaler's factor off the gradient in the network's weights, and clip it; its norm before that."""
        self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(network.parameters(), self.config.clip_grad_norm or math.inf).detach()

    def apply_gradients(
        self, loss: Tensor, norms: Sequence[Tensor], optimizers: Sequence[torch.optim.Adam], schedulers: Sequence[Any]
    ) -> Tensor:
        """One update of each optimizer, or of none where the guard says so, on the device itself; 1 if left out."""
        skipped = self.guard(loss, norms)
        for optimizer in optimizers:
            optimizer.found_inf = skipped  # as GradScaler tells the fused Adam to leave everything as it is
            optimizer.step()
        self.scaler.update()
        for scheduler in schedulers:
            scheduler.step()
        return skipped

    def parts(self) -> dict[str, Any]:
        return {
            "state_dict": self.generator,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "guard": self.guard,
        }

    def check(self) -> list[str]:
        if (skipped := self.guard.take_longest()) >= self.config.max_skipped:
            raise ValueError(
                f"{skipped} updates in a row were skipped, their loss or gradient not finite or far too large: the last "
                f"checkpoint is sound; start again from it with pretrained_model_path, another exp_name, and a learning_rate below "
                f"{self.config.learning_rate} or precision='fp32'"
            )
        return []


class UpdateGuard(nn.Module):
    """Which updates are left out: where a loss or gradient is not finite, or the loss is `threshold` times the running one.

    Decided on the device, and equally in all processes. The running loss is the mean of about the last 100 accepted updates; it
    has no say before it knows 20.
    """

    KNOWN, LONG = 20, 100  # updates

    def __init__(self, threshold: float, world_size: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.world_size = world_size
        self.register_buffer("in_a_row", torch.zeros(()))  # updates skipped, up to now
        self.register_buffer("longest", torch.zeros(()), persistent=False)  # such a row since it was last looked at, as before each save
        self.register_buffer("accepted", torch.zeros(()))  # updates, up to LONG
        self.register_buffer("running_loss", torch.zeros(()))

    @torch.no_grad()
    def forward(self, loss: Tensor, norms: Sequence[Tensor]) -> Tensor:
        """1 if the update is to be skipped, else 0, from its loss and the norms of its gradients, the same in all processes."""
        loss = loss.detach().float().clone()
        if self.world_size > 1:  # a gradient can be finite where the loss is not, as L1's, and in one process alone
            torch.distributed.all_reduce(loss)
            loss /= self.world_size
        refused = ~torch.isfinite(torch.stack([*norms, loss])).all()
        if self.threshold:
            refused |= (self.accepted >= self.KNOWN) & (loss > self.threshold * self.running_loss)
            learned = self.running_loss.lerp(loss, 1 / (self.accepted + 1))
            self.running_loss = torch.where(refused, self.running_loss, learned)
            self.accepted = (self.accepted + ~refused).clamp(max=self.LONG)
        skipped = refused.float()
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.longest = torch.maximum(self.longest, self.in_a_row)
        return skipped

    def take_longest(self) -> int:
        """The longest row of skipped updates since this was asked last; a row that goes on counts on."""
        longest, self.longest = int(self.longest), self.in_a_row.clone()
        return longest


def build_generator(config: Config) -> model.RCAN:
    """The network that the settings name, in the memory layout that they ask for."""
    network = model.ARCHITECTURES[config.model_arch_name](**config.model_arguments)
    network = network.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    network.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        for group in network.trunk:  # regional: the groups are alike, so that one compilation serves all
            group.compile()
    return network


def parallel(network: nn.Module, runtime: Runtime) -> Callable[..., Tensor]:
    """The network's forward, whose gradients are averaged over all processes."""
    if runtime.world_size == 1:
        return network
    device_ids = [runtime.device] if runtime.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # as PyTorch before 2.15 calls it
    return DistributedDataParallel(network, device_ids=device_ids, **{sync: False})  # buffers are constants


def build_optimizer(network: nn.Module, config: Config, learning_rate: float) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam, and its learning rate as a function of the update."""
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, config.adam_betas, eps=1e-8, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: learning_rate_factor(config, update))


def learning_rate_factor(config: Config, update: int) -> float:
    """What `learning_rate` is multiplied by in the update after `update` others: warm-up, then steps or a cosine."""
    rise = min(1.0, (update + 1) / (config.warmup_updates + 1))
    if config.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * min(update / config.total_updates, 1)))
    return rise * 0.5 ** (update // config.halve_every)


# The loop


def train(config: Config, build_step: Callable[[Config, Runtime, str], Step]) -> bool:
    """Train as the settings say; False if the run was asked to stop before its end.

    Raises:
        ValueError, OSError: settings, data or checkpoint that don't fit; said before anything is changed.
    """
    runtime = start_runtime()
    with files.FolderLock(config.experiment_dir) if runtime.is_main else contextlib.nullcontext():
        return _train(config, build_step, runtime)


def _train(config: Config, build_step: Callable[[Config, Runtime, str], Step], runtime: Runtime) -> bool:
    say = print if runtime.is_main else _silent
    checkpoints.check_folder(config.experiment_dir)
    found = find_checkpoint(config, say)
    path, checkpoint = found or (None, None)
    validation = open_validation(config, runtime, say)
    sets, usable = check_training(config, runtime, say)
    utils.seed_everything(config.seed)
    precision = checkpoint["precision"] if checkpoint else utils.choose_precision(config.precision, runtime.device)
    scored = {name: [pair.name for pair in images.pairs] for name, images in validation.items()}
    check_agreement(runtime, {"valid images": scored, "resolved precision": precision, **_shared_settings(config)})
    step = build_step(config, runtime, precision)
    if config.pretrained_model_path and not checkpoint:
        say(weights.transfer(step.generator, config.pretrained_model_path))
    batches = open_training(config, runtime, sets, usable)
    run = Run(config, runtime, step, precision=precision, validation=validation, batches=batches)
    if checkpoint:
        run.restore(checkpoint, path)
        del found, checkpoint  # as large as the run itself
    checksum = _checksum({**step.parts(), "ema": run.ema.network})
    check_agreement(runtime, {"update": run.update, "training images": batches.fingerprint, "checksum of the weights": checksum})
    say(describe_run(config, runtime, step.generator, precision, run.update))
    if run.finished:
        say(f"already finished at update {run.update}; raise epochs (schedule='step'), or set another exp_name to start anew")
        return True
    return run.go()


class Run:
    """A training run: what it has reached so far, and the loop."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        step: Step,
        *,
        precision: str,
        validation: Mapping[str, dataset.EvaluationSet],
        batches: dataset.TrainBatches,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.step = step
        self.precision = precision
        self.validation = validation
        self.batches = batches
        self.ema = utils.EMA(step.generator, config.ema_decay)
        self.meter = _Meter(runtime)
        self.update = 0  # how many have been done
        self.saved: int | None = None  # after which update last.pth.tar was written
        self.saved_at = time.monotonic()
        self.evaluated = 0  # after which update the last evaluation was
        self.seconds = 0.0  # spent in the loop, over all sittings
        self.best_psnr = -math.inf
        self.best_ssim = -math.inf
        self.warned = False  # of slow data

    @property
    def finished(self) -> bool:
        return self.update >= self.config.total_updates and not self._evaluation_due()

    def go(self) -> bool:
        """Train until the end or until asked to stop; True at the end."""
        config, first, started, meter = self.config, self.update, time.perf_counter() - self.seconds, self.meter
        self._prepare_folder()
        feed, poll = self._feed(), Poll(self.runtime)
        stopped = late = False
        with utils.RunLog(config.experiment_dir, first, config.total_updates, self.runtime.is_main) as log, StopRequest() as stop:
            log.write(first, {"event": "start", "precision": self.precision, **utils.provenance()})
            while True:
                done = self.update >= config.total_updates
                self.seconds = time.perf_counter() - started
                if self._evaluation_due() and not stopped:
                    stopped = not self.evaluate(log, stop)
                if done or stopped or late or (self.update > first and self.update % config.save_every == 0):
                    self.step.check()
                    log.put_on_disk()
                    self.save_last()
                if done or stopped:
                    break
                meter.resume()
                batch = meter.timed(lambda: next(feed))
                terms = self.step(batch["lr"], batch["gt"])
                meter.add(self.update, terms)
                self.update += 1
                self.ema.update(self.step.generator, self.update, terms[SKIPPED])
                meter.pause()
                log.step()
                if self.update % config.log_every == 0:
                    self.report(log, time.perf_counter() - started)
                stopped, late = poll(bool(stop), self._save_is_late())
                late = late and (self.runtime.world_size == 1 or self.saved != self.update - 1)  # an answer from before that save
            poll.finish()
        self._say_end(self.finished)
        return self.finished

    def _save_is_late(self) -> bool:
        minutes = self.config.save_every_minutes
        return minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes

    def _evaluation_due(self) -> bool:
        at_interval = self.update % self.config.eval_every == 0 or self.update >= self.config.total_updates
        return at_interval and self.evaluated != self.update

    def _feed(self) -> dataset.CPUPrefetcher:
        on_gpu = self.runtime.device.type == "cuda"
        loader = dataset.load(self.batches, self.update, self.config.total_updates, self.config.num_workers, pin_memory=on_gpu)
        return dataset.prefetch(loader, self.runtime.device, self.config.channels_last)

    def report(self, log: utils.RunLog, seconds: float) -> None:
        """Log the means since the last report; the only place where the device is waited for."""
        values, skipped = self.meter.take()
        self._report_skipped(log, skipped)
        for warning in self.step.check():
            log.say(f"update {self.update}: {warning}")
        epoch = self.update / self.config.steps_per_epoch
        values = {"epoch": epoch, "seconds": round(seconds, 1), **values, "memory/peak_gib": utils.peak_memory(self.runtime.device)}
        loss = values["loss/total"] if "loss/total" in values else values["loss/l1"]
        shown = "no loss, all updates skipped" if loss is None else f"loss {loss:.4f}"
        best = f", best {self.best_psnr:.2f} dB" if math.isfinite(self.best_psnr) else ""
        log.write(self.update, values, f"{shown}, waiting for data {values['time/waiting']:.0%}{best}")
        if values["time/waiting"] > 0.2 and not self.warned:
            self.warned = True
            log.say(f"update {self.update}: {values['time/waiting']:.0%} of the time went into waiting for data; raise num_workers")

    def _report_skipped(self, log: utils.RunLog, skipped: Mapping[int, Sequence[str]]) -> None:
        """Say which updates were left out, why, and what they had seen."""
        for number, (update, terms) in enumerate(skipped.items()):
            images = self.batches.names(update)
            log.write(self.update, {"event": "skipped", "skipped": update + 1, "not_finite": list(terms), "images": images})
            why = f"{', '.join(terms)} not finite" if terms else "its loss far above the running one"
            if number < _MANY:
                log.say(f"update {update + 1} was skipped and has changed nothing, {why}; its patches were cut from {_listed(images)}")
        if len(skipped) > _MANY:
            log.say(f"update {self.update}: {len(skipped) - _MANY} more were skipped since the last report; log.jsonl names them")

    def evaluate(self, log: utils.RunLog, stop: StopRequest) -> bool:
        """Score the averaged weights; the best ones, by `best_metric` on the first set, are kept in best.pth.tar.

        False if it was asked to stop before it was done; then nothing has been kept, and it remains due.
        """
        scores: dict[str, float] = {}
        samples: dict[str, imgproc.RGB] = {}  # this process's
        for name, images in self.validation.items():
            keep = _keep_samples(samples, images, self.config.upscale_factor) if not scores else None
            enlarge = functools.partial(upscale, self.ema.network)
            scale = self.config.upscale_factor
            found = utils.evaluate(enlarge, images, scale, self.runtime, on_image=keep, progress=name, stop=stop)
            if found is None:
                return False
            scores |= {f"{name}/psnr": found["psnr"], f"{name}/ssim": found["ssim"]}
        self.evaluated = self.update
        if not scores and self.config.best_metric == "newest":
            self.save(checkpoints.BEST)
        if not scores:
            return True
        psnr, ssim, *_ = scores.values()
        better = {"psnr": psnr > self.best_psnr, "ssim": ssim > self.best_ssim, "newest": True}[self.config.best_metric]
        log.write(self.update, {"event": "evaluation", "seconds": round(self.seconds, 1), **scores})
        if better:
            self.best_psnr, self.best_ssim = psnr, ssim
            self.save(checkpoints.BEST)
        text = ", ".join(f"{name} {scores[f'{name}/psnr']:.2f} dB / {scores[f'{name}/ssim']:.4f}" for name in self.validation)
        log.say(f"update {self.update}, {self.seconds / 60:.1f} min: {text}{f' (best by {self.config.best_metric})' if better else ''}")
        self._write_samples(log, samples)
        return True

    def _write_samples(self, log: utils.RunLog, own: Mapping[str, imgproc.RGB]) -> None:
        """Put the samples of all processes on one sheet."""
        samples = {name: sample for part in self.runtime.gather(own) for name, sample in part.items()}
        if samples and self.runtime.is_main:
            sheet = np.concatenate([samples[name] for name in sorted(samples)])
            image_files.write_image(self.config.experiment_dir / "samples" / f"{self.update:07d}.png", sheet)
            log.picture(self.update, "bicubic, SR, GT", sheet)

    def save_last(self) -> None:
        """Write last.pth.tar, everything that the same command needs to go on; the one before it is kept as `keep_last` says."""
        state = self.state()
        if self.runtime.is_main:
            checkpoints.save_last(self.config.experiment_dir, state, self.saved, self.config.keep_last)
        self.saved, self.saved_at = self.update, time.monotonic()
        self.runtime.wait_for_all()

    def save(self, name: str) -> None:
        """Write a checkpoint of another name."""
        state = self.state()
        if self.runtime.is_main:
            checkpoints.save(self.config.experiment_dir / name, state)
        self.runtime.wait_for_all()

    def state(self) -> dict[str, Any]:
        """Everything that belongs to a checkpoint, in plain types; all processes are asked for their part."""
        return {
            "epoch": self.update // self.config.steps_per_epoch,
            "update": self.update,
            "evaluated": self.evaluated,
            "seconds": self.seconds,
            "best_psnr": self.best_psnr,
            "best_ssim": self.best_ssim,
            "best_metric": self.config.best_metric,
            **{name: part.state_dict() for name, part in self.step.parts().items()},
            "ema_state_dict": self.ema.network.state_dict(),
            "arguments": self.step.generator.arguments,
            "meter": self.meter.state_dict(),
            "data": self.batches.fingerprint,
            "config": asdict(self.config),
            "precision": self.precision,
            "random_states": utils.random_states(),
            "provenance": utils.provenance(),
        }

    def restore(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Go on from a checkpoint that `find_checkpoint` has accepted.

        Raises:
            ValueError: the training images are others now, or a part of the state is missing.
        """
        if checkpoint["data"] != self.batches.fingerprint:
            raise ValueError(
                f"the training images have changed since the run was started (were {checkpoint['data']}, are {self.batches.fingerprint}): "
                "bring the old ones back, or set another exp_name and pretrained_model_path"
            )
        missing = self.step.parts().keys() - checkpoint.keys()
        if missing:
            raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; to start from its weights, set pretrained_model_path")
        for name, part in self.step.parts().items():
            try:
                part.load_state_dict(checkpoint[name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{path}: its {name} is not as this version writes it ({reason}); to start from its weights, set pretrained_model_path"
                ) from None
        self.ema.network.load_state_dict(checkpoint["ema_state_dict"])
        self.meter.load_state_dict(checkpoint["meter"])
        self.update, self.evaluated, self.seconds = checkpoint["update"], checkpoint["evaluated"], checkpoint["seconds"]
        if path.parent == self.config.experiment_dir:  # another run's best is not in this folder
            self.best_psnr, self.best_ssim = checkpoint["best_psnr"], checkpoint["best_ssim"]
        self.saved = self.update if path == self.config.experiment_dir / checkpoints.LAST else None
        utils.restore_random_states(checkpoint["random_states"])

    def _prepare_folder(self) -> None:
        if self.runtime.is_main:
            files.remove_leftovers(self.config.experiment_dir)
            text = json.dumps({**asdict(self.config), "provenance": utils.provenance()}, indent=2)
            files.write_text(self.config.experiment_dir / "config.json", text + "\n")

    def _say_end(self, done: bool) -> None:
        if self.runtime.is_main:
            folder, minutes = self.config.experiment_dir.absolute(), self.seconds / 60
            how = "finished" if done else "stopped and saved; the same command goes on from here"
            score = f"; {self.best_psnr:.3f} dB / {self.best_ssim:.4f} in best.pth.tar, chosen by {self.config.best_metric}"
            best = score if math.isfinite(self.best_psnr) else ""
            print(f"{how}: update {self.update} after {minutes:.1f} min{best}\n{folder}")


_MANY = 3  # skipped updates that are told apart in one report


def _listed(names: Sequence[str], most: int = 16) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:most]) + (f" and {len(distinct) - most} more" if len(distinct) > most else "")


class _Meter:
    """The terms of the updates since the last report, kept on the device, and where the time went."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.restart()

    def restart(self) -> None:
        self.names: list[str] = []
        self.updates: list[int] = []
        self.values: list[Tensor] = []  # (terms,) each
        self.passed = self.waited = 0.0  # seconds
        self.resumed_with = 0  # updates of an earlier sitting, whose time is not known

    def state_dict(self) -> dict[str, Any]:
        """What a report between two checkpoints needs of the time before the first, so that a resumed run logs the same."""
        values = torch.stack(self.values).cpu() if self.values else torch.empty(0, len(self.names))
        gathered = self.runtime.gather((self.updates, values))
        values = torch.cat([part for _, part in gathered])  # (updates, terms)
        return {
            "names": self.names,
            "updates": [update for updates, _ in gathered for update in updates],
            "values": values.nan_to_num(0, 0, 0),  # as a checkpoint holds finite values only
            "kind": torch.where(values.isnan(), 1, torch.where(values.isinf(), 2, 0)).to(torch.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """In the main process; the others' part is in it."""
        self.names = list(state["names"])
        if self.runtime.is_main:
            values = state["values"].clone()
            values[state["kind"] == 1], values[state["kind"] == 2] = math.nan, math.inf
            self.updates, self.values = list(state["updates"]), list(values.to(self.runtime.device))
            self.resumed_with = len(self.updates)

    def resume(self) -> None:
        self.resumed = time.perf_counter()

    def pause(self) -> None:
        """Evaluating and saving don't count into the updates per second."""
        self.passed += time.perf_counter() - self.resumed

    def timed(self, fetch: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = fetch()
        self.waited += time.perf_counter() - start
        return result

    def add(self, update: int, terms: Mapping[str, Tensor]) -> None:
        self.names = list(terms)
        self.updates.append(update)
        self.values.append(torch.stack([value.to(self.runtime.device, torch.float32) for value in terms.values()]))

    def take(self) -> tuple[dict[str, float | None], dict[int, list[str]]]:
        """The mean of each term over accepted updates and all processes, and for each skipped update, what was not finite."""
        gathered = self.runtime.gather((self.updates, torch.stack(self.values).tolist()))
        rows = [(update, dict(zip(self.names, row, strict=True))) for updates, part in gathered
                for update, row in zip(updates, part, strict=True)]  # fmt: skip
        kept = [row for _, row in rows if not row[SKIPPED]]
        means: dict[str, float | None] = {name: math.fsum(row[name] for row in kept) / len(kept) if kept else None for name in self.names}
        means[SKIPPED] = math.fsum(row[SKIPPED] for _, row in rows) / len(rows)
        skipped: dict[int, list[str]] = {}
        for update, row in sorted(rows, key=lambda found: found[0]):
            if row[SKIPPED]:
                known = skipped.setdefault(update, [])
                known += [name for name, value in row.items() if not math.isfinite(value) and name not in known]
        done = len(self.updates) - self.resumed_with
        means |= {"time/updates_per_second": done / self.passed, "time/waiting": self.waited / self.passed}
        self.restart()
        return means, skipped


# Before the loop


# What may differ when a run is resumed: where things lie, what is reported, and what only other scripts use
_FREE_TO_CHANGE = {
    "mode", "results_dir", "exp_name", "resume", "start_epoch", "data_root", "cache_dir", "num_workers",
    "log_every", "eval_every", "save_every", "save_every_minutes", "keep_last", "max_skipped", "skip_threshold",
    "compile", "channels_last", "accumulation_steps", "activation_checkpointing",
    "valid_sets", "test_sets", "model_path", "self_ensemble", "save_images",
}  # fmt: skip


_OF_A_MACHINE = {"data_root", "cache_dir", "num_workers", "vgg19_weights_path"}  # settings that machines may differ in


def find_checkpoint(config: Config, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, the newest that is whole, and its path; None for a new run.

    Raises:
        FileNotFoundError: `resume` names a file that is not there.
        ValueError: none is whole, or it contradicts the settings, or lacks what resuming needs.
    """
    folder = config.experiment_dir
    candidates = checkpoints.present(folder)
    if not candidates and config.resume not in ("auto", "never"):
        candidates = [Path(config.resume)]
    if candidates:
        return _read_checkpoint(config, candidates, say)
    if config.start_epoch:
        raise ValueError(f"start_epoch={config.start_epoch}, but there is no {folder / checkpoints.LAST} to go on from: set start_epoch=0")
    return None


def _read_checkpoint(config: Config, candidates: Sequence[Path], say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    path, checkpoint, problems = checkpoints.read_newest(candidates)
    _check_checkpoint(config, checkpoint, path)
    for problem in problems:
        say(f"warning: {problem}; an older checkpoint is taken instead")
    if path.name != checkpoints.LAST and path.parent == config.experiment_dir and not problems:
        say(f"warning: {path.parent / checkpoints.LAST} is missing; an older checkpoint is taken instead")
    say(f"going on from {path.absolute()}: update {checkpoint['update']}, epoch {checkpoint['epoch']}")
    return path, checkpoint


def _check_checkpoint(config: Config, checkpoint: Any, path: Path) -> None:
    needed = ("state_dict", "ema_state_dict", "optimizer", "scheduler", "scaler", "update", "meter", "data", "config", "random_states")
    missing = [name for name in needed if not isinstance(checkpoint, Mapping) or name not in checkpoint]
    if missing:
        raise ValueError(f"{path}: can't be resumed, lacking {', '.join(missing)}; to start from its weights, set pretrained_model_path")
    if config.start_epoch not in (0, checkpoint["epoch"]):
        raise ValueError(f"start_epoch={config.start_epoch}, but {path} stopped in epoch {checkpoint['epoch']}: set start_epoch=0")
    defaults = {field.name: field.default for field in fields(config)}  # of settings that are younger than the checkpoint
    before, now = {**defaults, **checkpoint["config"]}, asdict(config)
    own = path.parent == config.experiment_dir
    accepted = {"auto", before["resume"]} - {"never"}  # a run that was itself started from another file goes on
    if own and config.resume not in accepted:
        raise ValueError(f"resume={config.resume!r}, but {path} exists: set resume='auto' to go on with it, or another exp_name")
    free = _FREE_TO_CHANGE | ({"epochs"} if config.schedule == "step" else set())
    free |= {"precision"} if config.precision == "auto" else set()
    free |= {"vgg19_weights_path"} if "random" not in (before.get("vgg19_weights_path"), now.get("vgg19_weights_path")) else set()
    changed = [name for name in now if name not in free and before[name] != now[name]]
    if changed:
        differences = "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{path}: the run was started with other settings ({differences}): set them back, or set another exp_name")


def check_agreement(runtime: Runtime, own: Mapping[str, Any]) -> None:
    """All processes must be about to do the same, so the same by every name.

    Raises:
        ValueError: one starts elsewhere, sees other images or has other settings, as where machines don't share their disks.
    """
    for rank, other in enumerate(runtime.gather(dict(own))):
        differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        if differing:
            differences = "; ".join(f"{name} is {other.get(name)!r} and {own.get(name)!r}" for name in differing)
            raise ValueError(
                f"processes {rank} and {runtime.rank} are about to train differently ({differences}): give all machines the same "
                "settings and images, and a results_dir on a disk that they share"
            )


def _shared_settings(config: Config) -> dict[str, Any]:
    """What has to be the same in all processes; VGG19 may lie elsewhere, but not be drawn at random in one of them."""
    settings = {name: value for name, value in asdict(config).items() if name not in _OF_A_MACHINE}
    return {**settings, "settings": type(config).__name__, "random VGG19": getattr(config, "vgg19_weights_path", "") == "random"}


def _checksum(parts: Mapping[str, Any]) -> str:
    """Of all tensors of the networks among the parts of a state."""
    networks = (part.state_dict() for part in parts.values() if isinstance(part, nn.Module))
    tensors = (tensor for state in networks for tensor in state.values())
    return f"{functools.reduce(lambda crc, tensor: zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), crc), tensors, 0):08x}"


def open_validation(config: Config, runtime: Runtime, say: Callable[[str], None]) -> dict[str, dataset.EvaluationSet]:
    """The sets to score during training, each checked and described."""
    first = runtime.local_rank == 0
    sets = dataset.open_test_sets(config.data_root, config.valid_sets, config.upscale_factor, config.degradation, decode=first)
    for name, images in sets.items():
        say(dataset.describe_pairs("valid", name, images.pairs))
    return sets


def check_training(config: Config, runtime: Runtime, say: Callable[[str], None]) -> tuple[dict[str, list[dataset.Pair]], NDArray[np.intp]]:
    """The training sets, checked and described, and the indices of the images that a patch can be cut from."""
    if not config.train_sets:
        raise ValueError("train_sets is empty: name at least one, as in --train_sets DIV2K Flickr2K")
    parts = runtime.world_size * config.accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} can't be shared by {runtime.world_size} processes with accumulation_steps="
            f"{config.accumulation_steps}: set a multiple of {parts}"
        )
    sets = {}
    for name in config.train_sets:
        sets[name] = dataset.find_pairs(Path(config.data_root) / name, config.upscale_factor, config.degradation)
        say(dataset.describe_pairs("train", name, sets[name]))
    pairs = [pair for members in sets.values() for pair in members]
    sizes = dataset.gt_sizes(pairs, config.upscale_factor)
    usable = dataset.fit_to_patch(pairs, sizes, config.gt_patch_size, config.small_images)
    if len(usable) < len(pairs):
        say(f"skipping {len(pairs) - len(usable)} of {len(pairs)} training images, smaller than a GT patch of {config.gt_patch_size}")
    return sets, usable


def open_training(
    config: Config, runtime: Runtime, sets: Mapping[str, Sequence[dataset.Pair]], usable: NDArray[np.intp]
) -> dataset.TrainBatches:
    """This process's share of the batches, from the store, which is built once on each disk where there is none yet."""
    where = (sets, config.upscale_factor, config.degradation, config.cache_dir)
    store = runtime.in_turns(lambda: PairStore.open_or_build(*where, progress=runtime.is_main))
    return dataset.TrainBatches(
        store, config.batch_size, config.lr_patch_size, config.seed, usable=usable, rank=runtime.rank, world_size=runtime.world_size
    )


def describe_run(config: Config, runtime: Runtime, network: nn.Module, precision: str, update: int) -> str:
    """The resolved settings, as they are also stored, and what runs where."""
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    settings = ", ".join(f"{name}={value!r}" for name, value in asdict(config).items())
    about = ", ".join(f"{name} {value}" for name, value in utils.provenance().items())
    return (
        f"settings: {settings}\n{about}\n"
        f"{config.model_arch_name}: {size:.2f} M parameters, {precision}, on {runtime.device} in {runtime.world_size} process(es), "
        f"updates {update} to {config.total_updates} of {config.batch_size} patches, GT {config.gt_patch_size}, LR {config.lr_patch_size}"
    )


def _keep_samples(samples: dict[str, imgproc.RGB], images: dataset.EvaluationSet, scale: int) -> Callable[..., None]:
    """Collect the middle of the first three pictures: bicubic, SR and GT side by side."""
    names = [pair.name for pair in images.pairs[:3]]

    def keep(name: str, lr: imgproc.RGB, sr: imgproc.RGB, gt: imgproc.RGB) -> None:
        if name in names:
            samples[name] = np.concatenate([_middle(image) for image in (imgproc.imresize(lr, scale), sr, gt)], axis=1)

    return keep


def _middle(image: imgproc.RGB, side: int = 128) -> imgproc.RGB:
    """The middle, black where the picture is smaller."""
    height, width = min(side, image.shape[0]), min(side, image.shape[1])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[:height, :width] = image[top : top + height, left : left + width]
    return canvas


def _silent(_text: str) -> None:
    """What processes other than the main one say."""


if __name__ == "__main__":
    run_script(main)
