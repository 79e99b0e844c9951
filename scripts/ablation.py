"""Train variants of the light network over several seeds, score their last EMA weights, and compare them with what they replace:

    python scripts/ablation.py                                                        # attention: L1, three seeds, equal updates
    python scripts/ablation.py --variants rcan open --seeds 0 --losses l1more gan     # the loss, from those L1 weights
    python scripts/ablation.py --variants rcan cbam --report_only True                # train nothing, compare what is there

Each run is train.py or train_improved.py, then test.py, one after another; the same command goes on where it stopped. Runs go to
results/ablation/<variant>_<loss>_seed<seed>, the table to results/ablation/report.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import json
import shlex
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

import dataset
import files
import utils
from config import LAST
from reports import markdown_table, provenance
from runtime import REPOSITORY, STOPPED, StopRequest, run_script

VARIANTS = {
    "rcan": "--model_arch_name rcan_light_x{scale}",  # channel attention, as in the paper
    "rcan_open": "--model_arch_name rcan_light_x{scale} --initial_channel_gate 0.95",
    "cbam": "--model_arch_name rcan_light_cbam_x{scale}",  # as published
    "average": "--model_arch_name rcan_light_cbam_x{scale} --attention cbam_average --initial_spatial_gate 0.95",
    "open": "--model_arch_name rcan_light_cbam_x{scale} --attention cbam_average --initial_channel_gate 0.95 --initial_spatial_gate 0.95",
}
RECIPE = (
    "--upscale_factor {scale} --seed {seed} --train_sets T91 BSDS200 --small_images skip --lr_patch_size 32 --batch_size 8 --epochs 1 "
    "--schedule cosine --adam_betas 0.9 0.99 --clip_grad_norm 0.1 --compile True --eval_every 500 --save_every 500 --log_every 50"
)
FROM_L1 = "--learning_rate 1e-4 --warmup_updates 20 --steps_per_epoch {more_updates} --pretrained_model_path {base}"
COMPOSITE = (  # undoes the lines of ImprovedConfig: only the loss may differ from train.py
    "--preset psnr --attention None --initial_spatial_gate None --use_composite_loss True --best_metric newest "
    "--discriminator_channels 32 --discriminator_learning_rate 1e-4"
)
LOSSES = {
    "l1": ("train.py", "--learning_rate 1e-3 --warmup_updates 100 --steps_per_epoch {updates}"),
    "l1more": ("train.py", FROM_L1),
    "gan": ("train_improved.py", f"{FROM_L1} {COMPOSITE} --perceptual_weight 0"),
    "composite": ("train_improved.py", f"{FROM_L1} {COMPOSITE}"),
}


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    variants: tuple[Literal["rcan", "rcan_open", "cbam", "average", "open"], ...] = ("rcan", "rcan_open", "cbam", "average", "open")
    losses: tuple[Literal["l1", "l1more", "gan", "composite"], ...] = ("l1",)  # all but l1 start from its weights; only composite has VGG19
    seeds: tuple[int, ...] = (0, 1, 2)  # a seed decides on the first weights and on the patches
    upscale_factor: Literal[2, 3, 4, 8] = 4  # of all networks
    updates: int = 2000  # of an L1 run
    more_updates: int = 400  # of a run that starts from L1 weights
    test_sets: tuple[str, ...] = ("Set5", "Set14", "B100")  # sets to score
    data_root: str = "data"  # the folder of all sets
    results_dir: str = "results"  # runs and report go to its folder ablation
    extra: str = ""  # further settings of every training, as in --extra="--precision fp32"
    report_only: bool = False  # train and score nothing


def main(argv: Sequence[str] | None = None) -> None:
    """Train, score and compare; exit code 1 if a run failed, 75 if it was asked to stop."""
    config = tyro.cli(AblationConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    present = [name for name in config.test_sets if name not in dataset.absent_sets(config.data_root, config.test_sets)]
    if not present:
        raise ValueError(f"test_sets={config.test_sets}: none is in {Path(config.data_root).absolute()}; name one that is")
    losses = () if config.report_only else dict.fromkeys(("l1", *config.losses))  # l1 first, as the others start from it
    runs = [(variant, loss, seed) for loss in losses for seed in config.seeds for variant in config.variants]
    failed = [run for run in runs if any(map(perform, commands(config, *run)))]
    text = report(config, present)
    files.write_text(Path(config.results_dir) / "ablation" / "report.md", text)
    print(text)
    if failed:
        names = ", ".join(run_folder(config, *run).name for run in failed)
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed ({names}), for what they say above; the same command tries them again")


# Training


def run_folder(config: AblationConfig, variant: str, loss: str, seed: int) -> Path:
    return Path(config.results_dir) / "ablation" / f"{variant}_{loss}_seed{seed}"


def commands(config: AblationConfig, variant: str, loss: str, seed: int) -> Iterator[list[str]]:
    """What trains a run, or finds it finished; then, where its last weights have no scores yet, what scores them."""
    folder, base = run_folder(config, variant, loss, seed), run_folder(config, variant, "l1", seed)
    script, options = LOSSES[loss]
    values = {"scale": config.upscale_factor, "seed": seed, "updates": config.updates, "more_updates": config.more_updates}
    words = f"{options} {VARIANTS[variant]} {RECIPE}".format(**values, base=shlex.quote(str(base / LAST)))
    places = ["--exp_name", f"ablation/{folder.name}", "--data_root", config.data_root, "--results_dir", config.results_dir]
    yield [sys.executable, str(REPOSITORY / script), *shlex.split(f"{words} {config.extra}"), *places]
    last, metrics = folder / LAST, folder / "test" / "metrics.json"
    if not (last.is_file() and metrics.is_file() and metrics.stat().st_mtime_ns >= last.stat().st_mtime_ns):
        yield [sys.executable, str(REPOSITORY / "test.py"), *places, "--model_path", str(last), "--test_sets", *config.test_sets]


def perform(words: Sequence[str]) -> int:
    """Run a command and return its exit code; at a request to stop, pass it on, as a training then saves itself, and leave."""
    print(f"$ {shlex.join(words)}", flush=True)
    with StopRequest() as stop, subprocess.Popen(words) as process:
        while (code := process.poll()) is None and not stop:
            time.sleep(0.1)
        if code is None:
            process.send_signal(signal.SIGTERM)  # a training takes it and a terminal's Ctrl-C, within a second, for one request
            code = process.wait()
    if stop or code == STOPPED:
        sys.exit(STOPPED)
    return code


# Comparing


def report(config: AblationConfig, test_sets: Sequence[str]) -> str:
    """Protocol, table and provenance, as Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in provenance().items())
    return (
        f"x{config.upscale_factor}, {config.updates} updates with L1, {config.more_updates} from its weights; seeds "
        f"{', '.join(map(str, config.seeds))}. {utils.PROTOCOL.format(scale=config.upscale_factor)}, of the last EMA weights: nothing is "
        f"chosen on a test set. Mean ± standard deviation over seeds (their number), and the mean difference in PSNR (each seed's).\n\n"
        f"{markdown_table(compare(config, test_sets))}\n\n{about}\n"
    )


def compare(config: AblationConfig, test_sets: Sequence[str]) -> list[list[str]]:
    """A header and a row for each variant and loss: its scores, and its PSNR minus that of what it replaces."""
    rows = [["", *(text for name in test_sets for text in (name, "difference"))]]
    for loss in config.losses:
        for variant in config.variants:
            other = {"l1": ("rcan", "l1"), "l1more": (variant, "l1")}.get(loss, (variant, "l1more"))
            row = [f"{variant}, {loss}"]
            for name in test_sets:
                psnr, ssim = (read_scores(config, variant, loss, name, metric) for metric in ("psnr", "ssim"))
                reference = read_scores(config, *other, name, "psnr")
                differences = [psnr[seed] - reference[seed] for seed in psnr if seed in reference and other != (variant, loss)]
                spread = f" ± {statistics.stdev(psnr.values()):.3f}" if len(psnr) > 1 else ""
                means = [statistics.fmean(values.values()) for values in (psnr, ssim) if values]
                row.append(f"{means[0]:.3f}{spread} / {means[1]:.4f} ({len(psnr)})" if means else "–")
                each = ", ".join(f"{difference:+.3f}" for difference in differences)
                row.append(f"{statistics.fmean(differences):+.3f} to {' '.join(other)} ({each})" if differences else "")
            rows.append(row)
    return rows


def read_scores(config: AblationConfig, variant: str, loss: str, set_name: str, metric: str) -> dict[int, float]:
    """A score by seed, of the runs that have it."""
    paths = {seed: run_folder(config, variant, loss, seed) / "test" / "metrics.json" for seed in config.seeds}
    metrics = {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.is_file()}
    return {seed: scores[set_name][metric] for seed, scores in metrics.items() if set_name in scores}


if __name__ == "__main__":
    run_script(main)
