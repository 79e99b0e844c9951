"""Measure what CBAM and the composite loss change, each against what they replace, over several seeds:

    python scripts/ablation.py                                   # everything; the same command goes on where it stopped
    python scripts/ablation.py --lanes 2 --only l1_seed          # two trainings at once, and only the runs that are called so
    python scripts/ablation.py --report_only True                # train nothing: report.md, ablation.json and pictures from what is there

Three comparisons, with `VARIANTS` of the light network: L1 after equal updates; L1 after equal time, by this script's own timing
of updates; and, from the same L1 weights, more L1 against L1 with a discriminator and VGG19. Each training is train.py or
train_improved.py in a process of its own. Runs lie in results/ablation/<run>, what they said in results/ablation/<run>.txt.
"""

import importlib.util
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from reports import provenance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import files
import image_files
import imgproc
import losses
import model
import utils
import weights
from config import Config, parse
from config_improved import ImprovedConfig, parse_improved, preset
from runtime import REPOSITORY, StopRequest, run_script, start_runtime
from upscaling import upscale

Variant = Literal["rcan", "rcan_open", "cbam", "average", "open"]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    upscale_factor: Literal[2, 3, 4, 8] = 4  # of all networks
    seeds: tuple[int, ...] = (0, 1, 2)  # of the L1 runs; what goes on from them takes the first
    updates: int = 2000  # of an L1 run; those at equal time have fewer or more
    composite_updates: int = 400  # of a run that goes on from L1 weights
    time_variants: tuple[Variant, ...] = ("cbam", "open")  # to train with L1 for the time of rcan's runs; rcan_open costs what rcan does
    composite_variants: tuple[Variant, ...] = ("rcan", "open")  # whose L1 weights such runs go on from
    test_sets: tuple[str, ...] = ("Set5", "Set14", "B100")  # sets to score the last weights on
    data_root: str = "data"  # where the sets lie
    results_dir: str = "results"  # everything goes to its folder ablation
    cache_dir: str = ".cache"  # decoded training images
    vgg19_weights_path: str = ""  # vgg19-dcbb9e9d.pth; empty: in pretrained/, else in torch.hub's cache
    download: bool = False  # whether VGG19's weights may be downloaded; without them the perceptual term is left out
    timing_rounds: int = 10  # of the timing, one update of each kind in each
    lanes: int = 1  # trainings at once; with more than one, each has cores // lanes threads
    only: tuple[str, ...] = ()  # train and score the runs whose name contains one of these; the report is of all
    report_only: bool = False  # train, time and score nothing
    crops: tuple[str, ...] = tuple(f"data/DemoTest/GT/{name}.png" for name in ("astronaut", "chelsea", "coffee"))  # shown, if there
    extra: str = ""  # added to every training's arguments, for tests: --extra="--channels 8 --compile False"
    worker: str = ""  # for the processes that this script starts: "timing", or VARIANT/LOSS, whose memory to measure

    def __post_init__(self) -> None:
        for name in ("updates", "composite_updates", "timing_rounds", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds} must be at least one, all different and none negative")
        if not self.test_sets:
            raise ValueError("test_sets is empty: name at least one, as in --test_sets Set5")

    @property
    def folder(self) -> Path:
        return Path(self.results_dir) / "ablation"


@dataclass(frozen=True)
class Run:
    """One training."""

    variant: Variant
    kind: str  # l1, l1_time, l1more, l1more_time, composite or gan
    seed: int
    updates: int | None  # None: at equal time, and nothing has been timed

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.kind}_seed{self.seed}"

    @property
    def base(self) -> str:
        """The run whose last weights it goes on from, or none."""
        return "" if self.kind in ("l1", "l1_time") else f"{self.variant}_l1_seed{self.seed}"

    @property
    def improved(self) -> bool:
        return self.kind in ("composite", "gan")


def main(argv: Sequence[str] | None = None) -> None:
    """Time, train, score and report; exit code 1 where a training failed."""
    config = tyro.cli(AblationConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    if config.worker:
        print(json.dumps(work(config)))
        return
    vgg19 = find_vgg19(config)
    timing = read_timing(config)
    if timing is None and not config.report_only:
        chosen(plan(config, None, vgg19 is not None), config)  # so that a slip is said before minutes of timing
        timing = measure(config)
    runs = plan(config, timing, vgg19 is not None or _has_composite(config))
    failures = {}
    if not config.report_only:
        failures = run_all(chosen(runs, config), config, vgg19)
        measure_lpips([run for run in runs if is_finished(run, config)], config)
    outcomes = {run.name: read_outcome(run, config) for run in runs}
    print(write_report(Findings(config, outcomes, timing, failures)))
    for name, problem in failures.items():
        print(f"error: {name} failed: {problem}", file=sys.stderr)
    if failures:
        sys.exit(1)


# What is trained


VARIANTS: dict[Variant, str] = {
    "rcan": "--model_arch_name rcan_light_x{scale}",
    "rcan_open": "--model_arch_name rcan_light_x{scale} --initial_channel_gate 0.95",
    "cbam": "--model_arch_name rcan_light_cbam_x{scale}",
    "average": "--model_arch_name rcan_light_cbam_x{scale} --attention cbam_average --initial_spatial_gate 0.95",
    "open": "--model_arch_name rcan_light_cbam_x{scale} --attention cbam_average --initial_channel_gate 0.95 --initial_spatial_gate 0.95",
}
ABOUT: dict[Variant, str] = {
    "rcan": "channel attention, as in the paper",
    "rcan_open": "as rcan, with channel gates that start near 0.95",
    "cbam": "CBAM as published",
    "average": "CBAM without maxima over the picture in channel attention, with spatial gates that start at 0.95",
    "open": "as average, with channel gates that start near 0.95 too; what train_improved.py takes",
}
REFERENCE: Variant = "rcan"
RECIPE = (
    "--train_sets T91 BSDS200 --small_images skip --lr_patch_size 32 --batch_size 8 --schedule cosine --learning_rate {learning_rate} "
    "--adam_betas 0.9 0.99 --warmup_updates {warmup} --clip_grad_norm 0.1 --compile True --epochs 1 --steps_per_epoch {updates} "
    "--eval_every 500 --save_every 500 --log_every 50"
)
FROM_NOTHING = {"learning_rate": "1e-3", "warmup": 100}
FROM_L1 = {"learning_rate": "1e-4", "warmup": 20}
PRESET = "light_perceptual"
IMPROVED = {"preset": PRESET, "discriminator_channels": 32, "discriminator_learning_rate": "1e-4"}
OF_THE_LOSS = ("use_composite_loss", "best_metric", "perceptual_weight")  # what may differ between the loss's run and its control


def plan(config: AblationConfig, timing: Mapping[str, Any] | None, perceptual: bool) -> list[Run]:
    """All runs, those first that others go on from; the composite ones are called gan where they have no perceptual term."""
    kind, first = "composite" if perceptual else "gan", config.seeds[0]
    runs = [Run(variant, "l1", seed, config.updates) for seed in config.seeds for variant in VARIANTS]
    for seed in config.seeds:
        runs += [
            Run(variant, "l1_time", seed, fitting(config.updates, timing, (REFERENCE, "l1"), (variant, "l1")))
            for variant in config.time_variants
        ]
    for variant in config.composite_variants:
        fit = fitting(config.composite_updates, timing, (variant, kind), (variant, "l1"))
        runs += [Run(variant, "l1more", first, config.composite_updates), Run(variant, kind, first, config.composite_updates)]
        runs.append(Run(variant, "l1more_time", first, fit))
    return runs


def fitting(updates: int, timing: Mapping[str, Any] | None, whole: tuple[str, str], part: tuple[str, str]) -> int | None:
    """How many updates of `part`, a variant and a loss, take the time of `updates` of `whole`; None where they were not timed.

    By the best times: what else runs on a machine only adds to a time, and can add a lot to the median.
    """
    times = [timing["variants"].get(variant, {}).get(loss) for variant, loss in (whole, part)] if timing else []
    if not all(times) or not times:
        return None
    whole_seconds, part_seconds = (time["best"] for time in times)
    return max(1, round(updates * whole_seconds / part_seconds))


def chosen(runs: Sequence[Run], config: AblationConfig) -> list[Run]:
    """The runs that `only` leaves.

    Raises:
        ValueError: it leaves none.
    """
    left = [run for run in runs if not config.only or any(text in run.name for text in config.only)]
    if not left:
        raise ValueError(f"only={config.only}: no run is called so; they are {', '.join(run.name for run in runs)}")
    return left


def command(run: Run, config: AblationConfig, vgg19: Path | None = None) -> list[str]:
    """What trains it; the same command goes on with it."""
    options = VARIANTS[run.variant].format(scale=config.upscale_factor)
    recipe = RECIPE.format(**(FROM_L1 if run.base else FROM_NOTHING), updates=run.updates)
    words = f"{options} --seed {run.seed} --exp_name ablation/{run.name} {recipe}".split()
    if config.upscale_factor != Config.upscale_factor:
        words += ["--upscale_factor", str(config.upscale_factor)]
    if run.base:
        words += ["--pretrained_model_path", str(config.folder / run.base / "last.pth.tar")]
    words += ["--data_root", config.data_root, "--results_dir", config.results_dir, "--cache_dir", config.cache_dir]
    words += shlex.split(config.extra)
    script = "train_improved.py" if run.improved else "train.py"
    return [sys.executable, str(REPOSITORY / script), *words, *(_loss_options(run, words, vgg19) if run.improved else ())]


def _loss_options(run: Run, words: Sequence[str], vgg19: Path | None) -> list[str]:
    """What train_improved.py is told beside train.py's arguments, and all that its preset has otherwise than train.py."""
    control, improved = parse(Config, "train", words), preset(PRESET)
    names = [each.name for each in fields(Config) if f"--{each.name}" not in words and each.name not in OF_THE_LOSS]
    same = {name: getattr(control, name) for name in names if getattr(control, name) != getattr(improved, name)}
    own = {"vgg19_weights_path": vgg19} if run.kind == "composite" else {"perceptual_weight": 0}
    return [
        word
        for name, value in {**same, **IMPROVED, **own}.items()
        for word in (f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
    ]


def score_command(run: Run, config: AblationConfig) -> list[str]:
    """What scores its last weights, and writes the pictures."""
    where = ["--data_root", config.data_root, "--results_dir", config.results_dir]
    model_path = str(config.folder / run.name / "last.pth.tar")
    words = ["--model_path", model_path, "--exp_name", f"ablation/{run.name}", "--test_sets", *config.test_sets, *where]
    return [sys.executable, str(REPOSITORY / "test.py"), *words]


def find_vgg19(config: AblationConfig) -> Path | None:
    """VGG19's weights, downloaded only if that is asked for; None where they are absent.

    Raises:
        OSError: the named file is absent, or the download fails.
        ValueError: random weights, whose features mean nothing.
    """
    if config.vgg19_weights_path == "random":
        raise ValueError("vgg19_weights_path='random': features that were never trained are not what this measures; name a file, or none")
    places = (Path(losses.VGG19_FOLDER), Path(torch.hub.get_dir()) / "checkpoints")
    found = next((place / losses.VGG19_FILE for place in places if (place / losses.VGG19_FILE).is_file()), None)
    if config.vgg19_weights_path or (config.download and not config.report_only):
        return losses.find_vgg19(config.vgg19_weights_path)
    return found


def _has_composite(config: AblationConfig) -> bool:
    """Whether a report is asked of runs that had VGG19's weights, which are no longer here."""
    return config.report_only and any(config.folder.glob("*_composite_seed*/last.pth.tar"))


# Training


POLL = 0.2  # seconds between two looks at the trainings


def run_all(runs: Sequence[Run], config: AblationConfig, vgg19: Path | None) -> dict[str, str]:
    """Train and score, `lanes` at once; what went wrong, by the run's name.

    Ctrl-C is passed on to the trainings, which save themselves, and ends this too; so is a second one, which ends them at once.
    """
    waiting, active, failures = list(runs), {}, {}
    with StopRequest() as stop:
        try:
            while active or (waiting and not stop):
                while not stop and len(active) < config.lanes and (run := _next(waiting, active)):
                    waiting.remove(run)
                    active[run.name] = _Job(run, config, vgg19)
                time.sleep(POLL)
                for name, job in list(active.items()):
                    job.look(bool(stop))
                    if job.done:
                        del active[name]
                        failures |= {name: job.problem} if job.problem else {}
        finally:
            for job in active.values():
                job.end()
    if stop:
        raise KeyboardInterrupt
    return failures


def _next(waiting: Sequence[Run], active: Mapping[str, Any]) -> Run | None:
    """The first whose base is not being trained nor about to be."""
    pending = {*active, *(run.name for run in waiting)}
    return next((run for run in waiting if run.base not in pending), None)


class _Job:
    """The processes of one run, one after the other: training, then scoring."""

    def __init__(self, run: Run, config: AblationConfig, vgg19: Path | None) -> None:
        self.run = run
        self.log = config.folder / f"{run.name}.txt"
        self.commands = _commands(run, config, vgg19)
        self.environment = {**os.environ, **_threads(config)}
        self.process: subprocess.Popen | None = None
        self.told = self.done = False
        self.problem = ""
        base = Run(run.variant, "l1", run.seed, config.updates)
        if run.base and not is_finished(base, config):
            self.done, self.problem = True, f"it goes on from {run.base}, which is not finished: {problem_of(base, config)}"
        else:
            self._start()

    def _start(self) -> None:
        words = next(self.commands, None)
        self.done = words is None
        if words is None:
            return
        print(f"{datetime.now():%H:%M} {self.run.name}: {Path(words[1]).name}, log {self.log}", flush=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            log.flush()  # a session of its own: the terminal's Ctrl-C would reach it beside ours, and two end it unsaved
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def look(self, stopping: bool) -> None:
        """Go on when a process has ended, or pass the request to stop on, once."""
        if self.done:
            return
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            if stopping and not self.told:
                self.process.send_signal(signal.SIGINT)
                self.told = True
        elif stopping:
            self.done = True
        elif code:
            self.done, self.problem = True, f"exit code {code}; {self.log} ends with\n{_last_lines(self.log)}"
        else:
            self._start()

    def end(self) -> None:
        """Interrupt what still runs, and wait for it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()


def _commands(run: Run, config: AblationConfig, vgg19: Path | None) -> Iterator[list[str]]:
    yield command(run, config, vgg19)  # also of a finished run: it says so, or that its settings were others
    if not is_scored(run, config):
        yield score_command(run, config)


def _threads(config: AblationConfig) -> dict[str, str]:
    """What a training's environment says of threads: with one lane, nothing new."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // config.lanes))} if config.lanes > 1 else {}


def _last_lines(log: Path, count: int = 8) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join([f"    {line}" for line in text.splitlines() if line.strip()][-count:])


# What has been reached


def problem_of(run: Run, config: AblationConfig) -> str:
    """Why a training is not finished; empty if it is."""
    path = config.folder / run.name / "last.pth.tar"
    if run.updates is None:
        return "how many updates take equal time was not measured"
    if not path.is_file():
        return "absent"
    done = weights.read(path)["update"]
    return "" if done == run.updates else f"at update {done}, not {run.updates}"


def is_finished(run: Run, config: AblationConfig) -> bool:
    return not problem_of(run, config)


def is_scored(run: Run, config: AblationConfig) -> bool:
    """Whether there are scores of exactly the last weights, on every set that is here."""
    run_folder = config.folder / run.name
    scores, last = run_folder / "test" / "metrics.json", run_folder / "last.pth.tar"
    if not (scores.is_file() and last.is_file() and scores.stat().st_mtime_ns >= last.stat().st_mtime_ns):
        return False
    absent = dataset.absent_sets(config.data_root, config.test_sets)
    return set(config.test_sets) - set(absent) <= json.loads(scores.read_text(encoding="utf-8")).keys()


@dataclass(frozen=True)
class Outcome:
    """What a run has reached."""

    run: Run
    problem: str = ""  # why there are no scores
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # {set: {"psnr": dB, "ssim": 0..1, "lpips": …}}
    curve: Sequence[tuple[int, float]] = ()  # (update, dB) of each evaluation during training
    minutes: float | None = None  # that training took, evaluations included
    about: str = ""  # what it was trained with


def read_outcome(run: Run, config: AblationConfig) -> Outcome:
    problem = problem_of(run, config) or ("" if is_scored(run, config) else "trained, but its last weights are not scored")
    if problem:
        return Outcome(run, problem)
    run_folder = config.folder / run.name
    metrics = json.loads((run_folder / "test" / "metrics.json").read_text(encoding="utf-8"))
    distances = _read_lpips(run, config)
    scores = {
        name: {"psnr": metrics[name]["psnr"], "ssim": metrics[name]["ssim"], **({"lpips": distances[name]} if name in distances else {})}
        for name in config.test_sets
        if name in metrics
    }
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if line.get("event") == "evaluation"]
    curve = [(line["update"], line[f"{_VALID_SET}/psnr"]) for line in evaluations if f"{_VALID_SET}/psnr" in line]
    checkpoint = weights.read(run_folder / "last.pth.tar")
    origin = {**checkpoint.get("provenance", {}), "precision": checkpoint.get("precision")}
    about = ", ".join(f"{name} {origin[name]}" for name in ("commit", "torch", "device", "precision") if origin.get(name))
    minutes = checkpoint["seconds"] / 60 if "seconds" in checkpoint else None
    return Outcome(run, "", scores, curve, minutes, about)


_VALID_SET = Config.valid_sets[0]


# LPIPS: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018


ALEXNET_FILE = "alexnet-owt-7be5be79.pth"  # torchvision's name


def lpips_problem() -> str:
    """Why LPIPS can't be measured here without a download; empty if it can."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    if "lpips" not in sys.modules and importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed"
    return "" if cached.is_file() else f"AlexNet's weights are not in torch.hub's cache, {cached}"


def measure_lpips(runs: Sequence[Run], config: AblationConfig) -> None:
    """Leave test/lpips.json, {set: mean}, beside the scores of each of these runs, from the pictures that were written."""
    runs = [run for run in runs if is_scored(run, config) and not _read_lpips(run, config)]
    if lpips_problem() or not runs:
        return
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how lpips asks for its weights
        network = lpips.LPIPS(net="alex", verbose=False).eval()
    present = [name for name in config.test_sets if name not in dataset.absent_sets(config.data_root, config.test_sets)]
    sets = dataset.open_test_sets(config.data_root, present, config.upscale_factor)
    for run in runs:
        pictures = config.folder / run.name / "test"
        found = {name: statistics.fmean(_distances(network, images, pictures / name)) for name, images in sets.items()}
        files.write_text(pictures / "lpips.json", json.dumps(found, indent=2) + "\n")


@torch.inference_mode()
def _distances(network: torch.nn.Module, images: dataset.EvaluationSet, folder: Path) -> Iterator[float]:
    for pair in images.pairs:
        gt = imgproc.crop_to_multiple(image_files.read_image(pair.gt), images.upscale_factor)
        both = (image_files.read_image(folder / f"{pair.name}.png"), gt)
        sr, gt = (torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in both)  # (1, 3, H, W), -1..1
        yield network(sr, gt).item()


def _read_lpips(run: Run, config: AblationConfig) -> dict[str, float]:
    """What was measured of the pictures that belong to the scores."""
    found, scores = (config.folder / run.name / "test" / name for name in ("lpips.json", "metrics.json"))
    fresh = found.is_file() and scores.is_file() and found.stat().st_mtime_ns >= scores.stat().st_mtime_ns
    return json.loads(found.read_text(encoding="utf-8")) if fresh else {}


# Timing


LOSSES = ("l1", "gan", "composite")  # gan: L1 and the discriminator; composite: and VGG19
WARM_UP = 2  # rounds, or updates, that are not counted: compilation, first allocations


def read_timing(config: AblationConfig) -> dict[str, Any] | None:
    """What was measured before, so that the runs at equal time stay the same.

    Raises:
        ValueError: it was measured for other networks.
    """
    path = config.folder / "timing.json"
    if not path.is_file():
        return None
    timing = json.loads(path.read_text(encoding="utf-8"))
    wanted = _timed_settings(config)
    if timing["settings"] != wanted:
        raise ValueError(f"{path}: was measured with {timing['settings']}, not {wanted}: set these back, or another results_dir")
    return timing


def measure(config: AblationConfig) -> dict[str, Any]:
    """Seconds and memory of an update of each variant with each loss, in processes of their own; also left in timing.json."""
    print("timing updates; what else runs here now would be measured too", flush=True)
    timing = {"settings": _timed_settings(config), "date": _now(), **_ask(config, "timing")}
    for variant, loss in timed_updates(config):
        timing["variants"][variant][loss] |= _ask(config, f"{variant}/{loss}")
    files.write_text(config.folder / "timing.json", json.dumps(timing, indent=2) + "\n")
    return timing


def timed_updates(config: AblationConfig) -> list[tuple[Variant, str]]:
    """What is timed: L1 of every variant, and the other losses of those that go on with them."""
    return [(variant, loss) for variant in VARIANTS for loss in LOSSES if loss == "l1" or variant in config.composite_variants]


def _timed_settings(config: AblationConfig) -> dict[str, Any]:
    return {"upscale_factor": config.upscale_factor, "extra": config.extra}


def _ask(config: AblationConfig, worker: str) -> dict[str, Any]:
    """What a process of this script finds."""
    settings = {"upscale_factor": config.upscale_factor, "extra": config.extra, "timing_rounds": config.timing_rounds, "worker": worker}
    words = [sys.executable, __file__, *(f"--{name}={value}" for name, value in settings.items())]
    words += ["--composite_variants", *config.composite_variants]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **_threads(config)})
    if done.returncode:
        raise ValueError(f"measuring {worker} ended with code {done.returncode} (-9: out of memory): {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(config: AblationConfig) -> dict[str, Any]:
    """What a process that this script has started is for."""
    if config.worker == "timing":
        return time_updates(config)
    variant, _, loss = config.worker.partition("/")
    if variant not in VARIANTS or loss not in LOSSES:
        raise ValueError(f"worker={config.worker!r} must be timing, or one of {', '.join(VARIANTS)}, / and one of {', '.join(LOSSES)}")
    return {"peak_memory_gib": measure_memory(config, variant, loss)}


def time_updates(config: AblationConfig) -> dict[str, Any]:
    """Median and best seconds of an update of each kind, which take turns, so that what disturbs one disturbs all."""
    device = start_runtime().device
    updates = {(variant, loss): Update(update_settings(config, variant, loss), device) for variant, loss in timed_updates(config)}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in updates}
    for _ in range(WARM_UP + config.timing_rounds):
        for key, update in updates.items():
            start = time.perf_counter()
            update()
            seconds[key].append(time.perf_counter() - start)
    found: dict[str, Any] = {}
    for (variant, loss), taken in seconds.items():
        count = sum(parameter.numel() for parameter in updates[variant, loss].network.parameters())
        counted = taken[WARM_UP:]
        found.setdefault(variant, {"parameters": count})[loss] = {"median": statistics.median(counted), "best": min(counted)}
    about = {"rounds": config.timing_rounds, "threads": torch.get_num_threads(), "precision": updates[REFERENCE, "l1"].precision}
    return {**about, "provenance": provenance(), "variants": found}


def measure_memory(config: AblationConfig, variant: Variant, loss: str) -> float | None:
    """GiB at the most in an update; on a CPU of the whole process, Python and PyTorch included."""
    device = start_runtime().device
    update = Update(update_settings(config, variant, loss), device)
    for _ in range(WARM_UP):
        update()
    utils.reset_peak_memory(device)
    update()
    return utils.peak_memory(device)


def update_settings(config: AblationConfig, variant: Variant, loss: str) -> ImprovedConfig:
    """Those of the training itself, with VGG19 at random, which takes as long."""
    settings = parse_improved(command(Run(variant, "composite", config.seeds[0], 1), config, Path("random"))[2:])
    terms = {"l1": {"perceptual_weight": 0.0, "adversarial_weight": 0.0}, "gan": {"perceptual_weight": 0.0}, "composite": {}}
    return replace(settings, **terms[loss])


class Update:
    """One update as train.py's and train_improved.py's steps do it, on made-up patches: all but the data, the average and the log."""

    def __init__(self, settings: ImprovedConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.settings, self.device = settings, device
        self.precision = utils.choose_precision(settings.precision, device)
        self.layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.network = model.ARCHITECTURES[settings.model_arch_name](**settings.model_arguments).to(device, memory_format=self.layout)
        if settings.compile:
            for group in self.network.trunk:  # as train.build_generator
                group.compile()
        self.criterion = losses.CompositeLoss(
            settings.l1_weight,
            settings.perceptual_weight,
            settings.adversarial_weight,
            perceptual_layers=dict.fromkeys(settings.perceptual_layers, 1.0),
            vgg19_weights_path=settings.vgg19_weights_path,
            adversarial=settings.adversarial_loss,
        )
        self.discriminator = None
        if settings.adversarial_weight:
            self.discriminator = model.Discriminator(settings.discriminator_channels).to(device, memory_format=self.layout)
        networks = filter(None, (self.network, self.discriminator))
        self.optimizers = [
            torch.optim.Adam(each.parameters(), settings.learning_rate, settings.adam_betas, fused=True) for each in networks
        ]
        self.lr, self.gt = self._patches(settings.lr_patch_size), self._patches(settings.gt_patch_size)

    def __call__(self) -> None:
        with self._autocast():
            sr = self.network(self.lr)  # (n, 3, H, W)
        logits = self._judge(sr) if self.discriminator else ()
        self._find_gradient(self.network, self.optimizers[0], self.criterion(sr, self.gt, *logits)["total"])
        for optimizer in self.optimizers:
            optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _judge(self, sr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The discriminator's gradient; then its logits of sr and gt for the generator's loss, no gradient of which reaches it."""
        with self._autocast():
            gt_logits, sr_logits = self.discriminator(self.gt), self.discriminator(sr.detach())  # (n, 1) each
        loss = self.criterion.adversarial.discriminator(sr_logits, gt_logits)["discriminator"]
        self._find_gradient(self.discriminator, self.optimizers[1], loss)
        self.discriminator.requires_grad_(False)
        with self._autocast():
            sr_logits = self.discriminator(sr)  # (n, 1)
        self.discriminator.requires_grad_(True)
        return sr_logits, gt_logits.detach()

    def _find_gradient(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), self.settings.clip_grad_norm or float("inf"))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, utils.PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def _patches(self, side: int) -> torch.Tensor:
        return torch.rand(self.settings.batch_size, 3, side, side, device=self.device).to(memory_format=self.layout)


# Comparing


METRICS = {"psnr": ("PSNR, dB", ".3f", 1), "ssim": ("SSIM", ".4f", 1), "lpips": ("LPIPS", ".4f", -1)}  # 1: more is better
WITHIN = "within the spread of the seeds"
UNKNOWN = "no verdict, as the spread of the seeds is unknown"


def compare(values: Mapping[int, float], references: Mapping[int, float], metric: str, yardstick: float | None = None) -> dict[str, Any]:
    """Differences of runs of one seed, and what they say beside the larger standard deviation of the two groups.

    Args:
        values, references: scores by seed; seeds that only one of them has don't count.
        yardstick: the standard deviation to take where one seed is all there is.
    """
    seeds = sorted(values.keys() & references.keys())
    differences = [values[seed] - references[seed] for seed in seeds]
    spreads = [statistics.stdev(group[seed] for seed in seeds) for group in (values, references)] if len(seeds) > 1 else []
    spread = max(spreads) if spreads else yardstick
    return {
        "differences": dict(zip(seeds, differences, strict=True)),
        "mean": statistics.fmean(differences) if differences else None,
        "spread": spread,
        "verdict": verdict(differences, spread, METRICS[metric][2]),
    }


def verdict(differences: Sequence[float], spread: float | None, sign: int = 1) -> str:
    """Gain or loss, if the seeds agree and their mean is no less than the spread; `sign` is -1 where less is better."""
    if not differences:
        return "not measured"
    if spread is None:
        return UNKNOWN
    agree = all(value > 0 for value in differences) or all(value < 0 for value in differences)
    mean = statistics.fmean(differences)
    if not agree or abs(mean) < spread:
        return WITHIN
    return "gain" if sign * mean > 0 else "loss"


def by_seed(outcomes: Mapping[str, Outcome], variant: str, kind: str, set_name: str, metric: str) -> dict[int, float]:
    """The scores of a group of runs."""
    members = [outcome for outcome in outcomes.values() if (outcome.run.variant, outcome.run.kind) == (variant, kind)]
    return {member.run.seed: member.scores[set_name][metric] for member in members if metric in member.scores.get(set_name, {})}


def compare_variants(outcomes: Mapping[str, Outcome], kind: str, config: AblationConfig) -> list[dict[str, Any]]:
    """Every variant of this kind of run, on every set and by PSNR and SSIM, against RCAN after `updates`."""
    found = []
    for metric in ("psnr", "ssim"):
        for variant in VARIANTS if kind == "l1" else (REFERENCE, *config.time_variants):
            for name in config.test_sets:
                own_kind = "l1" if variant == REFERENCE else kind
                values, references = (by_seed(outcomes, *of, name, metric) for of in ((variant, own_kind), (REFERENCE, "l1")))
                difference = {} if variant == REFERENCE else {"against": REFERENCE, **compare(values, references, metric)}
                found.append({"kind": own_kind, "variant": variant, "set": name, "metric": metric, "values": values, **difference})
    return found


def compare_losses(outcomes: Mapping[str, Outcome], kind: str, config: AblationConfig) -> list[dict[str, Any]]:
    """The composite loss against more L1, after equal updates and after equal time; one seed, so beside the spread of the L1 runs."""
    found = []
    for variant in config.composite_variants:
        for control in ("l1more", "l1more_time"):
            for metric in METRICS:
                for name in config.test_sets:
                    values, references = (by_seed(outcomes, variant, each, name, metric) for each in (kind, control))
                    seeds = by_seed(outcomes, variant, "l1", name, metric)
                    yardstick = statistics.stdev(seeds.values()) if len(seeds) > 1 else None
                    head = {"kind": kind, "variant": variant, "against": control, "set": name, "metric": metric}
                    found.append({**head, **compare(values, references, metric, yardstick)})
    return found


# The report


@dataclass(frozen=True)
class Findings:
    """All that the report is about."""

    config: AblationConfig
    outcomes: Mapping[str, Outcome]  # by the run's name
    timing: Mapping[str, Any] | None
    failures: Mapping[str, str]

    @cached_property
    def kind(self) -> str:
        """What the runs with a discriminator are called."""
        return "gan" if any(outcome.run.kind == "gan" for outcome in self.outcomes.values()) else "composite"

    @cached_property
    def comparisons(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "equal_updates": compare_variants(self.outcomes, "l1", self.config),
            "equal_time": compare_variants(self.outcomes, "l1_time", self.config),
            "losses": compare_losses(self.outcomes, self.kind, self.config),
        }


def write_report(found: Findings) -> str:
    """Leave report.md, ablation.json, ablation.png and crops.png; where the first is, and how many runs it is of."""
    folder = found.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "report.md", "\n\n".join([*describe(found), *draw(found)]) + "\n")
    plain = {
        "date": _now(),
        "provenance": provenance(),
        "settings": asdict(found.config),
        "timing": found.timing,
        "comparisons": found.comparisons,
        "failures": found.failures,
        "runs": {name: asdict(outcome) for name, outcome in found.outcomes.items()},
    }
    files.write_text(folder / "ablation.json", json.dumps(plain, indent=2) + "\n")
    scored = sum(not outcome.problem for outcome in found.outcomes.values())
    return f"{(folder / 'report.md').absolute()}: of {scored} of {len(found.outcomes)} runs"


def describe(found: Findings) -> list[str]:
    """The paragraphs of the report."""
    loss = "L1, VGG19 and a discriminator (composite)" if found.kind == "composite" else "L1 and a discriminator (gan)"
    return [
        "# Ablation: attention and loss",
        "\n".join(f"- {line}." for line in (*_origin(found), *_protocol(found.config))),
        *_gaps(found),
        "## Cost of an update",
        *_cost(found.timing),
        f"## L1 after equal updates ({found.config.updates})",
        *_variants(found, "equal_updates"),
        f"## L1 after equal time (that of {found.config.updates} updates of {REFERENCE})",
        "Updates follow from the medians above, which leave out reading data and evaluating; minutes are those of the trainings, with all "
        f"that ran beside them. {REFERENCE} is that of the table before.",
        *_variants(found, "equal_time"),
        f"## More L1 against {loss}",
        *_losses(found),
    ]


def _origin(found: Findings) -> list[str]:
    """Where, when and by which commands the numbers were made."""
    config, about = found.config, provenance()
    trained = Counter(outcome.about for outcome in found.outcomes.values() if outcome.about)
    example = command(Run(REFERENCE, "l1", config.seeds[0], config.updates), config)
    threads = "".join(f", {name}={value}" for name, value in _threads(config).items())
    return [
        f"Written {_now()} by `{about['command']}`; " + ", ".join(f"{name} {text}" for name, text in about.items() if name != "command"),
        *(f"Trained with {text}: {count} run(s)" for text, count in trained.items()),
        f"Processor: {_processor()}; {config.lanes} training(s) at once{threads}",
        f"First run: `{Path(example[1]).name} {shlex.join(example[2:])}`; the others' commands are in their logs, <run>.txt",
        *(f"{variant}: {text} (`{VARIANTS[variant].format(scale=config.upscale_factor)}`)" for variant, text in ABOUT.items()),
    ]


def _protocol(config: AblationConfig) -> list[str]:
    """How the numbers were made, and what a verdict means."""
    scale = config.upscale_factor
    return [
        f"x{scale}, bicubic LR (BI). {utils.PROTOCOL.format(scale=scale)}, whole pictures, fp32, no self-ensemble",
        "Scored are the averaged weights (EMA) after the last update, not those that were best on Set5, so that nothing is chosen on a "
        "test set",
        f"Seeds: {', '.join(map(str, config.seeds))}. A seed sets the first weights and the patches; runs of one seed are compared in "
        "pairs. ± is the standard deviation over seeds (n - 1)",
        f"A verdict is '{WITHIN}' where the seeds disagree in sign, or the mean difference is below the larger standard deviation of the "
        f"two groups. With {len(config.seeds)} seed(s), that is a rule of thumb and no test of significance, and it is applied many times",
    ]


def _gaps(found: Findings) -> list[str]:
    """What is not in the report, and why."""
    parts = []
    absent = [f"- {name}: {outcome.problem}" for name, outcome in found.outcomes.items() if outcome.problem]
    if absent:
        parts.append(f"Absent: {len(absent)} of {len(found.outcomes)} runs.\n\n" + "\n".join(absent))
    if found.failures:
        parts.append("Failed:\n\n" + "\n".join(f"- {name}: {problem}" for name, problem in found.failures.items()))
    if found.kind == "gan":
        parts.append(
            f"The perceptual term was not measured, since VGG19's weights ({losses.VGG19_FILE}) were absent: the runs in its place have "
            "L1 and the discriminator alone (perceptual_weight=0), and are called gan, not composite."
        )
    return parts


def _cost(timing: Mapping[str, Any] | None) -> list[str]:
    if timing is None:
        return ["Not measured."]
    rows = [["variant", "parameters", "loss", "ms an update, median (best)", "updates a second", "peak memory, GiB"]]
    for variant, entry in timing["variants"].items():
        for loss in (loss for loss in LOSSES if loss in entry):
            median, best, memory = (entry[loss].get(name) for name in ("median", "best", "peak_memory_gib"))
            cells = [f"{median * 1e3:.1f} ({best * 1e3:.1f})", f"{1 / median:.2f}", "–" if memory is None else f"{memory:.2f}"]
            rows.append([variant, f"{entry['parameters']:,}", loss, *cells])
    return [
        "l1; gan, with a discriminator; composite, also with VGG19 (at random, which takes as long). Forward, backward, clipping and Adam "
        f"on made-up patches of the recipe's size, {timing['precision']}, compiled as in training, {timing['threads']} thread(s), "
        f"{timing['rounds']} rounds in which all take turns; {timing['date']}, {timing['provenance']['device']}, "
        f"torch {timing['provenance']['torch']}. Memory is that of a process of its own, on a CPU with Python and PyTorch.",
        _table(rows),
    ]


def _variants(found: Findings, group: str) -> list[str]:
    """A table by PSNR and one by SSIM, and the verdicts by PSNR as sentences."""
    parts, comparisons = [], found.comparisons[group]
    for metric in ("psnr", "ssim"):
        title, form, _ = METRICS[metric]
        rows = [["variant", "updates", "minutes", "seeds", "set", f"{title}: mean ± spread (min…max)"]]
        rows[0] += [f"minus {REFERENCE}: mean (each seed)", "verdict"]
        for one in (each for each in comparisons if each["metric"] == metric):
            members = [found.outcomes[f"{one['variant']}_{one['kind']}_seed{seed}"] for seed in one["values"]]
            seeds = ", ".join(map(str, one["values"])) or "absent"
            scores = _spread_cell(list(one["values"].values()), form)
            rows.append([one["variant"], *_effort_cells(members), seeds, one["set"], scores, *_difference_cells(one, form)])
        parts.append(_table(rows))
    sentences = [f"- {_sentence(one)}" for one in comparisons if one["metric"] == "psnr" and "against" in one]
    return [*parts, "\n".join(sentences)]


def _effort_cells(members: Sequence[Outcome]) -> list[str]:
    """Updates, and minutes that the trainings took, evaluations included."""
    updates = ", ".join(dict.fromkeys(str(member.run.updates) for member in members))
    minutes = [member.minutes for member in members if member.minutes is not None]
    return [updates or "–", f"{statistics.fmean(minutes):.1f}" if minutes else "–"]


def _spread_cell(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "–"
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}} ({min(values):{form}}…{max(values):{form}})"


def _difference_cells(one: Mapping[str, Any], form: str) -> list[str]:
    if "against" not in one:
        return ["", ""]
    return ["–" if one["mean"] is None else f"{one['mean']:+{form}} ({_each(one, form)})", one["verdict"]]


def _each(one: Mapping[str, Any], form: str) -> str:
    return ", ".join(f"{difference:+{form}}" for difference in one["differences"].values())


def _sentence(one: Mapping[str, Any]) -> str:
    """What a comparison says, in words."""
    title, form, _ = METRICS[one["metric"]]
    name, _, unit = title.partition(", ")
    head, unit = f"{one['variant']}, {one['kind']} against {one['against']}, {one['set']}: {name}", unit and f" {unit}"
    if one["mean"] is None:
        return f"{head} not measured."
    spread = "unknown" if one["spread"] is None else f"{one['spread']:{form}}{unit}"
    seeds = f"{len(one['differences'])} seeds: {_each(one, form)}" if len(one["differences"]) > 1 else "one seed"
    return f"{head} {one['mean']:+{form}}{unit} ({seeds}; spread {spread}): {one['verdict']}."


def _losses(found: Findings) -> list[str]:
    """A table of the runs that go on from L1 weights, and the verdicts as sentences."""
    config, kind = found.config, found.kind
    has_lpips = any("lpips" in score for outcome in found.outcomes.values() for score in outcome.scores.values())
    measured = [metric for metric in METRICS if metric != "lpips" or has_lpips]
    columns = [(name, metric) for name in config.test_sets for metric in measured]
    rows = [["variant", "run", "updates", "minutes", *(f"{name}, {METRICS[metric][0]}" for name, metric in columns)]]
    for variant in config.composite_variants:
        for each in ("l1", "l1more", "l1more_time", kind):
            outcome = found.outcomes[f"{variant}_{each}_seed{config.seeds[0]}"]
            values = [outcome.scores.get(name, {}).get(metric) for name, metric in columns]
            cells = ["–" if value is None else f"{value:{METRICS[metric][1]}}" for value, (_, metric) in zip(values, columns, strict=True)]
            rows.append([variant, each, *_effort_cells([] if outcome.problem else [outcome]), *cells])
    about = (
        f"All go on from the last weights of l1 with seed {config.seeds[0]}: l1more and {kind} for {config.composite_updates} updates, "
        f"l1more_time for as many as take the time of {kind}. It is one seed, so the spread beside a difference is that of the variant's "
        "L1 runs over seeds. PSNR and SSIM say little of texture, which is what a discriminator is for."
    )
    without = "" if has_lpips else f" LPIPS is not measured, as {lpips_problem() or 'no run was scored with it'}."
    sentences = [f"- {_sentence(one)}" for one in found.comparisons["losses"] if one["metric"] in measured]
    return [about + without, _table(rows), "\n".join(sentences)]


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8", errors="replace").splitlines() if cpu.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _now() -> str:
    return datetime.now().isoformat(sep=" ", timespec="minutes")


# Pictures


def draw(found: Findings) -> list[str]:
    """Write ablation.png and crops.png; what the report says of them."""
    if importlib.util.find_spec("matplotlib") is None:
        return ["No pictures, as matplotlib is not installed (requirements-dev.txt)."]
    if all(outcome.problem for outcome in found.outcomes.values()):
        return ["No pictures, as no run is finished and scored."]
    draw_curves(found)
    shown = draw_crops(found)
    crops = [f"![The same parts](crops.png)\n\n{shown}"] if shown else []
    return ["![PSNR over updates, and differences from RCAN](ablation.png)", *crops]


def draw_curves(found: Findings) -> None:
    """ablation.png: PSNR on the validation set during training, and the last difference from RCAN on each set."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(13, 5), dpi=110)
    for index, variant in enumerate(VARIANTS):
        of_variant = [each for each in found.outcomes.values() if (each.run.variant, each.run.kind) == (variant, "l1") and each.curve]
        for outcome in of_variant:
            left.plot(*zip(*outcome.curve, strict=True), color=f"C{index}", linewidth=0.8, alpha=0.5)
        if curve := mean_curve([outcome.curve for outcome in of_variant]):
            label = f"{variant}, mean of {len(of_variant)} seed(s)"
            left.plot(*zip(*curve, strict=True), color=f"C{index}", linewidth=2.5, marker="o", markersize=4, label=label)
        if variant != REFERENCE:
            _draw_differences(right, found, variant, index)
    left.set(xlabel="updates", ylabel=f"{_VALID_SET}, PSNR on Y (dB)", title="L1, averaged weights during training")
    right.set(ylabel=f"PSNR minus that of {REFERENCE} (dB)", title="filled: equal updates; hollow: equal time; bar: mean; dot: a seed")
    right.axhline(0, color="gray", linewidth=1)
    right.set_xticks(range(len(found.config.test_sets)), found.config.test_sets)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    _write_figure(figure, found.config.folder / "ablation.png")


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over curves, at the updates that all have."""
    values = [dict(curve) for curve in curves]
    common = set.intersection(*map(set, values)) if values else set()
    return [(update, statistics.fmean(value[update] for value in values)) for update in sorted(common)]


def _draw_differences(axes: Any, found: Findings, variant: str, index: int) -> None:
    """A column for each set, by equal updates and beside it by equal time."""
    color, width = f"C{index}", 0.8 / len(VARIANTS)
    label: str | None = variant  # once
    for group, shift, face in (("equal_updates", -0.05, color), ("equal_time", 0.05, "none")):
        for one in found.comparisons[group]:
            if (one["variant"], one["metric"]) != (variant, "psnr") or one["mean"] is None:
                continue
            x = found.config.test_sets.index(one["set"]) + (index - len(VARIANTS) / 2) * width + shift
            differences = list(one["differences"].values())
            axes.scatter([x] * len(differences), differences, s=28, facecolors=face, edgecolors=color, alpha=0.8)
            axes.hlines(one["mean"], x - 0.04, x + 0.04, color=color, linewidth=2.5, label=label)
            label = None


def draw_crops(found: Findings) -> str:
    """crops.png, of the first variant that has both runs; what it shows, or nothing where there are no runs or no pictures."""
    config = found.config
    paths = [Path(path) for path in config.crops if Path(path).is_file()]
    pairs = [[f"{variant}_{kind}_seed{config.seeds[0]}" for kind in ("l1more", found.kind)] for variant in config.composite_variants]
    names = next((pair for pair in pairs if not any(found.outcomes[name].problem for name in pair)), None)
    if not paths or names is None:
        return ""
    labels = ("L1", "composite" if found.kind == "composite" else "L1 + GAN")
    networks = {label: weights.load(config.folder / name / "last.pth.tar") for label, name in zip(labels, names, strict=True)}
    figure, grid = _pyplot().subplots(len(paths), 4, figsize=(13, 3.5 * len(paths)), dpi=110, squeeze=False)
    for row, path in zip(grid, paths, strict=True):
        for axes, (label, picture) in zip(row, crop(path, networks, config.upscale_factor).items(), strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(label, fontsize=10)
            axes.set_axis_off()
    _write_figure(figure, config.folder / "crops.png")
    return f"Bicubic, {labels[0]} ({names[0]}), {labels[1]} ({names[1]}), and GT; PSNR on Y, of the whole picture."


def crop(path: Path, networks: Mapping[str, model.RCAN], scale: int, side: int = 96) -> dict[str, imgproc.RGB]:
    """The same part of bicubic, of each network's picture and of GT, labelled; where the first network gains most on bicubic."""
    from figure import find_part  # beside this file

    gt = imgproc.crop_to_multiple(image_files.read_image(path), scale)
    lr = imgproc.degrade(gt, scale)
    pictures = {"bicubic": imgproc.imresize(lr, scale), **{label: upscale(network, lr) for label, network in networks.items()}}
    side = min(side, *gt.shape[:2])
    top, left = find_part(pictures["bicubic"], pictures[next(iter(networks))], gt, side)
    labelled = {f"{label}  {imgproc.psnr(picture, gt, scale):.2f} dB": picture for label, picture in pictures.items()}
    return {label: picture[top : top + side, left : left + side] for label, picture in {**labelled, f"GT  {path.stem}": gt}.items()}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _write_figure(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    _pyplot().close(figure)


if __name__ == "__main__":
    run_script(main)
