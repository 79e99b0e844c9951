"""Train RCAN with L1: edit config.py, then

    python train.py                                     # the same command resumes where it stopped
    python train.py --dry_run True                      # try two updates, print what would run and how long it takes, and stop
    torchrun --nproc_per_node 4 train.py                # four GPUs; batch_size is that of all together

A run writes to results/<exp_name>: last.pth.tar, best.pth.tar, config.json, log.jsonl, TensorBoard's events and samples/.
`PixelStep` is one update, `Run.go` the only training loop; train_improved.py hands another step to the same loop.
"""

import environment  # noqa: F401 (names missing packages)

# isort: split
from config import Config, answer_help, parse

if __name__ == "__main__":
    answer_help(lambda: parse(Config, "train"))

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import checkpoints
import dataset
import files
import graphs
import image_files
import imgproc
import losses
import model
import optimizers
import utils
import weights
from reports import SKIPPED, Meter, RunLog, SampleSheet, provenance, to_json
from runtime import (
    STOPPED,
    STUCK,
    Interrupted,
    Poll,
    Runtime,
    StopRequest,
    missing_compiler,
    parallel,
    run_script,
    start_runtime,
    synchronised,
)  # fmt: skip
from store import PairStore
from upscaling import upscale


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, "train", argv)
    if config.use_composite_loss:
        raise ValueError("use_composite_loss=True contradicts train.py, which trains with L1: set it to False, or run train_improved.py")
    if not train(config, PixelStep):
        sys.exit(STOPPED)


class Step(Protocol):
    """Owns networks and optimizers, and performs one update."""

    generator: model.RCAN  # the network to evaluate; never wrapped

    def __call__(self, lr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Update from lr (n, 3, h, w) and gt (n, 3, H, W) in [0, 1]; detached scalars by name, with `SKIPPED` (1: nothing changed)."""

    def parts(self) -> dict[str, Any]:
        """Everything with a state, by its name in a checkpoint."""

    def check(self) -> list[str]:
        """Warnings for the log, a sentence each; ValueError if the run must end. Called before each report and save."""


class PixelStep:
    """One update with L1 (the paper's equation 2). Nothing in it waits for the device.

    Skipping relies on a contract between GradScaler and fused Adam that PyTorch does not document, and that a test holds: where
    `optimizer.found_inf` is 1, `step` leaves weights, moments and step count as they are.
    """

    def __init__(self, config: Config, runtime: Runtime, precision: str) -> None:
        self.config, self.runtime = config, runtime
        self.device = runtime.device
        self.dtype = utils.PRECISIONS[precision]
        self.generator = build_generator(config).to(runtime.device)
        self.forward = parallel(self.generator, runtime)
        self.criterion: nn.Module = losses.L1Loss(config.luma_share)
        self.optimizer = optimizers.build_optimizer(self.generator, config)
        self.scheduler = optimizers.build_schedule(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=precision == "fp16")
        self.guard = utils.UpdateGuard(config.skip_threshold, runtime.world_size).to(runtime.device)
        self.graph: graphs.GraphedGradients | None = None
        if config.cuda_graph and runtime.device.type == "cuda":
            self.graph = graphs.GraphedGradients(self.generator, self.criterion, self.scaler, self.dtype, config.accumulation_steps)
        elif config.cuda_graph:
            runtime.say(f"cuda_graph=True has no effect on the {runtime.device.type.upper()}")
        if config.optimizer == "muon" and config.learning_rate == Config.learning_rate:
            runtime.say(f"note: Muon learns fastest with a learning_rate of about 1e-3; this run has {config.learning_rate:g}")

    def __call__(self, lr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        parts = self.config.accumulation_steps
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.zero_grad()
        found = []
        for number, (lr_part, gt_part) in enumerate(zip(lr.chunk(parts), gt.chunk(parts), strict=True), start=1):
            loss = self.replay(lr_part, gt_part, number == 1)
            if loss is None:
                with synchronised(self.forward, number == parts):
                    with self.autocast():
                        sr = self.forward(lr_part)  # (n / parts, 3, H, W)
                    loss = self.criterion(sr, gt_part)["l1"]  # in fp32
                    self.scaler.scale(loss / parts).backward()
            found.append(loss.detach())
        if self.graph:
            self.graph.finish(self.runtime.world_size)
        loss = torch.stack(found).mean()
        norm = self.clip(self.generator, self.optimizer)
        skipped = self.guard(loss, [norm])
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # see the class
        self.optimizer.step()
        self.scaler.update()
        self.scheduler.step()
        return {
            "loss/l1": loss,
            "optimizer/gradient_norm": norm,
            "optimizer/learning_rate": torch.full((), learning_rate, device=self.device),
            SKIPPED: skipped,
        }

    def replay(self, lr: Tensor, gt: Tensor, first: bool) -> Tensor | None:
        """The loss of a part whose gradient a CUDA graph has computed; None where there is no graph, or none can be recorded."""
        try:
            return self.graph(lr, gt, first=first) if self.graph else None
        except RuntimeError as error:
            if (
                self.graph is None or self.graph.replay is not None or self.runtime.world_size > 1
            ):  # a later failure is no matter of recording
                raise
            self.graph = None
            self.runtime.say(f"cuda_graph: impossible here ({' '.join(str(error).split())[:200]}); kernels are launched one by one")
            return None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def clip(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """Unscale and clip the gradient; its norm before clipping."""
        self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(network.parameters(), self.config.clip_grad_norm or math.inf).detach()

    def parts(self) -> dict[str, Any]:
        updating = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler, "guard": self.guard}
        return {"state_dict": self.generator, **updating}

    def check(self) -> list[str]:
        self.guard.check(self.config.max_skipped)
        return []


# The loop

BuildStep = Callable[[Any, Runtime, str], Step]  # from settings, runtime and precision


def train(config: Config, build_step: BuildStep) -> bool:
    """Prepare and train a run, or only try it (`dry_run`); False if it was asked to stop before its end."""
    runtime = start_runtime()
    alone = runtime.is_main and not config.dry_run
    with files.FolderLock(config.experiment_dir) if alone else contextlib.nullcontext():
        run = prepare(config, build_step, runtime)
        return run.rehearse() if config.dry_run else run.go()


@dataclass
class Run:
    """A training run: how far it has come, and the loop. `prepare` makes one."""

    config: Config
    runtime: Runtime
    step: Step
    precision: str
    validation: Mapping[str, dataset.EvaluationSet]
    batches: dataset.TrainBatches
    degradation: str  # that the weights are trained for; `dataset.AS_GIVEN` where LR images on disk are no known one
    progress: checkpoints.Progress = field(default_factory=checkpoints.Progress)
    saved: int | None = None  # the update after which last.pth.tar was written
    warned: bool = False  # of slow data
    bicubic: dict[str, float] = field(default_factory=dict)  # its scores by name in the log, which no update changes

    def __post_init__(self) -> None:
        self.ema = utils.EMA(self.step.generator, self.config.ema_decay)
        first = next(iter(self.validation.values()), None)
        self.validated = self.runtime.gather(first.content() if first and self.runtime.is_main else "")[0]
        self.meter = Meter(self.runtime)
        self.saved_at = time.monotonic()

    def go(self) -> bool:
        """Train to the end, or until asked to stop; True at the end."""
        config, progress, first = self.config, self.progress, self.progress.update
        if self.finished:
            self.runtime.say(f"already finished at update {first}; raise epochs (schedule='step'), or set another exp_name to start anew")
            return True
        if self.runtime.is_main:
            for folder in (config.experiment_dir, config.experiment_dir / "samples"):
                files.remove_leftovers(folder, nested=False)  # in others, test.py may be writing
            settings = to_json({**asdict(config), "provenance": provenance()}, indent=2)
            files.write_text(config.experiment_dir / "config.json", settings + "\n")
        started, poll = time.perf_counter() - progress.seconds, Poll(self.runtime)
        stopped = late = False
        with RunLog(config.experiment_dir, first, config.total_updates, self.runtime.is_main) as log, StopRequest() as stop:
            batches = self._batches(stop)
            log.write(first, {"event": "start", "precision": self.precision, **provenance()})
            log.table(first, "settings", asdict(config))
            log.table(first, "provenance", provenance())
            while True:
                done = progress.update >= config.total_updates
                progress.seconds = time.perf_counter() - started
                if self._evaluation_due() and not stopped:
                    stopped = not self.evaluate(log, stop)
                if done and progress.update > first and progress.update % config.log_every:  # what no report has shown
                    self.report(log, time.perf_counter() - started)
                if done or stopped or late or (progress.update > first and progress.update % config.save_every == 0):
                    self.step.check()
                    log.put_on_disk()
                    self.save(checkpoints.LAST)
                if done or stopped:
                    break
                self.meter.resume()
                try:
                    batch = self.meter.timed(lambda: next(batches))
                    with stop.interrupting() if self._is_as_saved(first) else contextlib.nullcontext():
                        terms = self.step(batch["lr"], batch["gt"])
                except Interrupted:
                    if self.runtime.world_size > 1:
                        raise RuntimeError(STUCK) from None
                    if self._is_as_saved(first):
                        self.runtime.say("stopped before the first update; there is nothing to save")
                        return False
                    stopped = True
                    continue
                self.meter.add(progress.update, terms)
                progress.update += 1
                self.ema.update(self.step.generator, progress.update, terms[SKIPPED])
                self.meter.pause()
                log.step()
                if progress.update % config.log_every == 0:
                    self.report(log, time.perf_counter() - started)
                stopped, late = poll(bool(stop), self._save_is_late())
                late = late and (self.runtime.world_size == 1 or self.saved != progress.update - 1)  # an answer from before that save
            poll.finish()
        end = "finished" if self.finished else "stopped and saved; run the same command again to resume"
        score = f"; {progress.best_psnr:.3f} dB / {progress.best_ssim:.4f} in {checkpoints.BEST}, chosen by {config.best_metric}"
        best = score if math.isfinite(progress.best_psnr) else ""
        self.runtime.say(f"{end}: update {progress.update} after {progress.seconds / 60:.1f} min{best}\n{config.experiment_dir.absolute()}")
        return self.finished

    @property
    def finished(self) -> bool:
        return self.progress.update >= self.config.total_updates and not self._evaluation_due()

    def _is_as_saved(self, first: int) -> bool:
        """Whether a stop would lose nothing without saving, even in the middle of an update; only where nobody waits for this process."""
        return self.progress.update == first and self.runtime.world_size == 1

    def _evaluation_due(self) -> bool:
        update, last = self.progress.update, self.config.total_updates
        return (update % self.config.eval_every == 0 or update >= last) and self.progress.evaluated != update

    def _save_is_late(self) -> bool:
        minutes = self.config.save_every_minutes
        return minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes

    def _batches(self, stop: StopRequest | None = None) -> dataset.CPUPrefetcher:
        workers, ahead, sentence = dataset.fit_workers(self.batches, self.config.num_workers, self.runtime.local_world_size)
        if sentence:
            self.runtime.say(f"warning: {sentence}")
        on_gpu = self.runtime.device.type == "cuda"
        loader = dataset.load(self.batches, self.progress.update, self.config.total_updates, workers, on_gpu, ahead)
        return dataset.prefetch(loader, self.runtime.device, self.config.channels_last, stop)

    def rehearse(self) -> bool:
        """Try two updates in memory, and print the time and memory that the run would take."""
        files.check_folder(self.config.experiment_dir)
        left = self.config.total_updates - self.progress.update
        batches, seconds = self._batches(), 0.0
        for _ in range(min(2, left)):  # the second one is timed, as the first pays for what is done once
            start = time.perf_counter()
            batch = next(batches)
            float(self.step(batch["lr"], batch["gt"])[SKIPPED])  # waits for the device
            seconds = time.perf_counter() - start
        memory = utils.peak_memory(self.runtime.device)
        self.runtime.say(
            f"dry run: {left} updates of {seconds:.2f} s would take {left * seconds / 60:.0f} minutes, evaluations not counted; "
            f"peak memory of a process {'unknown' if memory is None else f'{memory:.2f} GiB'}; no checkpoint or log was written"
        )
        return True

    # Reports

    def report(self, log: RunLog, seconds: float) -> None:
        """Log the means since the last report; only here the loop waits for the device."""
        update = self.progress.update
        means, skipped = self.meter.take()
        log.write_skipped(update, {number: (terms, self.batches.names(number)) for number, terms in skipped.items()})
        for warning in self.step.check():
            log.say(f"update {update}: {warning}")
        waiting = means["time/waiting"] or 0.0
        memory = {"memory/peak_gib": utils.peak_memory(self.runtime.device)}
        values = {"epoch": update / self.config.steps_per_epoch, "seconds": round(seconds, 1), **means, **memory}
        loss = means["loss/total" if "loss/total" in means else "loss/l1"]
        shown = "no loss, all updates skipped" if loss is None else f"loss {loss:.4f}"
        best = f", best {self.progress.best_psnr:.2f} dB" if math.isfinite(self.progress.best_psnr) else ""
        log.write(update, values, f"{shown}, waiting for data {waiting:.0%}{best}")
        if waiting > 0.2 and not self.warned:
            self.warned = True
            log.say(f"update {update}: {waiting:.0%} of the time is spent waiting for data; raise num_workers")

    def evaluate(self, log: RunLog, stop: StopRequest) -> bool:
        """Score the EMA weights; the best ones, by `best_metric` on the first set, go to best.pth.tar.

        False if a stop was requested before the end; then nothing is kept, and the evaluation remains due.
        """
        config, progress = self.config, self.progress
        scores, uncounted = dict[str, float](), list[str]()
        sheet = SampleSheet([pair.name for images in self.validation.values() for pair in images.pairs], config.upscale_factor)
        for name, images in self.validation.items():
            score = partial(utils.evaluate, images=images, upscale_factor=config.upscale_factor, runtime=self.runtime, stop=stop)
            if f"{name}/bicubic_psnr" not in self.bicubic:
                found = score(partial(imgproc.imresize, scale=config.upscale_factor), progress=f"{name}, bicubic")
                if found is None:
                    return False
                self.bicubic |= {f"{name}/bicubic_psnr": found["psnr"], f"{name}/bicubic_ssim": found["ssim"]}
            keep = None if scores else sheet.add  # of the first set
            found = score(partial(upscale, self.ema.network), on_image=keep, progress=name)
            if found is None:
                return False
            scores |= {f"{name}/psnr": found["psnr"], f"{name}/ssim": found["ssim"]}
            uncounted += [f"{name}/{image} ({why})" for image, why in found.get("not_in_psnr", {}).items()]
        progress.evaluated = progress.update
        psnr, ssim = list(scores.values())[:2] or (-math.inf, -math.inf)
        higher = psnr > progress.best_psnr or psnr == math.inf  # infinite where no image counts
        better = {"psnr": higher, "ssim": ssim > progress.best_ssim, "newest": True}[config.best_metric]
        if scores:
            shown = scores | self.bicubic
            log.write(progress.update, {"event": "evaluation", "seconds": round(progress.seconds, 1), **shown})
            text = ", ".join(
                f"{name} {shown[f'{name}/psnr']:.2f} dB / {shown[f'{name}/ssim']:.4f} "
                f"(bicubic {shown[f'{name}/bicubic_psnr']:.2f} / {shown[f'{name}/bicubic_ssim']:.4f})"
                for name in self.validation
            )
            mark = f" (best by {config.best_metric})" if better else ""
            mark += f"; not in the mean PSNR: {', '.join(uncounted)}" if uncounted else ""
            log.say(f"update {progress.update}, {progress.seconds / 60:.1f} min: {text}{mark}")
        if better:
            progress.best_psnr, progress.best_ssim = psnr, ssim
            self.save(checkpoints.BEST)
        samples = sheet.gather(self.runtime)
        if samples is not None and self.runtime.is_main:
            image_files.write_image(config.experiment_dir / "samples" / f"{progress.update:07d}.png", samples)
            log.image(progress.update, "bicubic, SR, GT", samples)
        return True

    # Checkpoints

    def save(self, name: str) -> None:
        """Write last.pth.tar, from which the same command resumes, or best.pth.tar; both hold the whole state, in plain types."""
        state = {
            "epoch": self.progress.update // self.config.steps_per_epoch,
            **asdict(self.progress),
            "best_metric": self.config.best_metric,
            **{name: part.state_dict() for name, part in self.step.parts().items()},
            "ema_state_dict": self.ema.network.state_dict(),
            "arguments": self.step.generator.arguments,
            "meter": self.meter.state_dict(),  # every process contributes its part
            "data": self.batches.fingerprint,
            "degradation": self.degradation,
            "validation": self.validated,
            "config": asdict(self.config),
            "precision": self.precision,
            "random_states": utils.random_states(),
            "provenance": provenance(),
        }
        if self.runtime.is_main and name == checkpoints.LAST:
            checkpoints.save_last(self.config.experiment_dir, state, self.saved, self.config.keep_last)
        elif self.runtime.is_main:
            checkpoints.save(self.config.experiment_dir / name, state)
        if name == checkpoints.LAST:
            self.saved, self.saved_at = self.progress.update, time.monotonic()
        self.runtime.wait_for_all()

    def restore(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Continue from a checkpoint that `checkpoints.find` has accepted; ValueError if it does not fit the images or networks."""
        parts = {**self.step.parts(), "ema_state_dict": self.ema.network, "meter": self.meter}
        checkpoints.restore(parts, checkpoint, path, self.batches.fingerprint)
        self.progress = checkpoints.Progress(**{name: checkpoint[name] for name in asdict(self.progress)})
        if why := self.runtime.gather(checkpoints.outdated_best(checkpoint, path, self.config.experiment_dir, self.validated))[0]:
            self.runtime.say(f"warning: {why}: the best score up to now no longer counts, and the next one is kept as the best")
            self.progress.best_psnr = self.progress.best_ssim = -math.inf
        self.saved = self.progress.update if path == self.config.experiment_dir / checkpoints.LAST else None
        utils.restore_random_states(checkpoint["random_states"])


def prepare(config: Config, build_step: BuildStep = PixelStep, runtime: Runtime | None = None) -> Run:
    """Checkpoint, data and networks, ready for the first update. Only the cache is written. ValueError or OSError where they do not fit."""
    runtime = runtime or start_runtime()
    say = runtime.say
    checkpoints.check_folder(config.experiment_dir)
    found = checkpoints.find(config, say)
    where, scale, degradation = config.data_root, config.upscale_factor, config.degradation
    validation = dataset.open_test_sets(where, config.valid_sets, scale, degradation, decode=runtime.local_rank == 0)
    if not validation:
        say(f"warning: valid_sets is empty, so nothing is scored; {checkpoints.BEST} is only written with best_metric='newest'")
    parts = runtime.world_size * config.accumulation_steps
    if config.batch_size % parts:
        what = f"{runtime.world_size} processes times accumulation_steps={config.accumulation_steps}"
        raise ValueError(f"batch_size={config.batch_size} is not a multiple of {what}: set a multiple of {parts}")
    sets = dataset.open_training_sets(where, config.train_sets, scale, degradation)
    trained_for: str = degradation
    for name, images in validation.items() if runtime.is_main else ():
        say(dataset.describe_pairs("valid", name, images.pairs, dataset.check_lr(images.pairs, scale, degradation)[1]))
    for name, members in sets.items() if runtime.is_main else ():
        fits, found_lr = dataset.check_lr(members, scale, degradation)
        say(dataset.describe_pairs("train", name, members, found_lr))
        trained_for = trained_for if fits else dataset.AS_GIVEN
    pairs = [pair for members in sets.values() for pair in members]
    sizes = dataset.gt_sizes(pairs, scale)
    usable = dataset.fit_to_patch(pairs, sizes, config.gt_patch_size, config.small_images)
    if len(usable) < len(pairs):
        say(f"skipping {len(pairs) - len(usable)} of {len(pairs)} training images, smaller than a GT patch of {config.gt_patch_size}")
    utils.seed_everything(config.seed)
    precision = utils.choose_precision(config.precision, runtime.device)
    if found and found[1]["precision"] != precision:
        say(f"precision was {found[1]['precision']} on the device before, and is {precision} from here on")
    if config.compile and (lacking := missing_compiler(runtime.device)):
        raise ValueError(lacking)
    scored = {name: [pair.name for pair in images.pairs] for name, images in validation.items()}
    shared = {name: value for name, value in asdict(config).items() if name not in config.OF_ONE_MACHINE}
    runtime.check_agreement({"script": type(config).__name__, "valid images": scored, "resolved precision": precision, **shared})
    step = build_step(config, runtime, precision)
    if config.pretrained_model_path and not found:
        say(weights.transfer(step.generator, config.pretrained_model_path))
    draws_lr = degradation == "photo" and all(pair.lr is None for pair in pairs)
    if degradation == "photo" and not draws_lr and (without := [name for name, members in sets.items() if members[0].lr is None]):
        raise ValueError(
            f"degradation='photo': {without[0]} has no LR images, but other training sets do: move LRphotox{scale} away, and LR is drawn "
            "for all, or make it for all by scripts/prepare_dataset.py"
        )
    stored = "BI" if draws_lr else degradation
    build = partial(PairStore.open_or_build, sets, scale, stored, config.cache_dir, sizes=sizes, progress=runtime.is_main)
    store = runtime.in_turns(build)
    share = {"rank": runtime.rank, "world_size": runtime.world_size}
    batches = dataset.TrainBatches(store, config.batch_size, config.lr_patch_size, config.seed, usable=usable, draws_lr=draws_lr, **share)
    run = Run(config, runtime, step, precision, validation, batches, trained_for)
    if found:
        run.restore(*found)
    checksum = utils.checksum([part for part in (*step.parts().values(), run.ema.network) if isinstance(part, nn.Module)])
    runtime.check_agreement({"update": run.progress.update, "training images": batches.fingerprint, "checksum of the weights": checksum})
    size = sum(parameter.numel() for parameter in step.generator.parameters()) / 1e6
    say("settings: " + ", ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
    say(", ".join(f"{name} {value}" for name, value in provenance().items()))
    say(f"{config.model_arch_name}: {size:.2f} M parameters, {precision}, on {runtime.device} in {runtime.world_size} process(es)")
    patches = f"{config.batch_size} patches, GT {config.gt_patch_size}, LR {config.lr_patch_size}"
    say(f"updates {run.progress.update} to {config.total_updates} of {patches}; results in {config.experiment_dir}")
    return run


# What both trainings use


def build_generator(config: Config) -> model.RCAN:
    """The network that the settings name, in the memory layout that they ask for."""
    network = model.ARCHITECTURES[config.model_arch_name](**config.model_arguments)
    network = network.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    network.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        for group in network.trunk:  # regional: all groups are alike, and one compilation serves them
            group.compile()
    return network


if __name__ == "__main__":
    run_script(main)
