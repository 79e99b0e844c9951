"""Draw PSNR over wall-clock time of one or more runs; needs matplotlib (requirements-dev.txt):

python scripts/learning_curve.py --runs results/a results/b --output curve.png
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    runs: tuple[str, ...]  # folders of runs, or their log.jsonl files
    output: str  # the picture to write
    valid_set: str = "Set5"  # the set whose PSNR is drawn
    levels: tuple[str, ...] = ()  # horizontal lines, as NAME=DB


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one line for each run."""
    config = tyro.cli(CurveConfig, args=argv, use_underscores=True)
    curves = {path: read_curve(Path(path), config.valid_set) for path in config.runs}
    levels = dict(_level(text) for text in config.levels)
    draw(curves, levels, config)
    print(Path(config.output).absolute())


def read_curve(path: Path, valid_set: str) -> list[tuple[float, float]]:
    """(minutes, dB) of each evaluation in a run's log.

    Raises:
        FileNotFoundError, ValueError: there is no log, or no evaluation of the set in it.
    """
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise FileNotFoundError(f"{log}: no such log; give the folder of a run with --runs")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    curve = [(line["seconds"] / 60, line[f"{valid_set}/psnr"]) for line in lines if f"{valid_set}/psnr" in line]
    if not curve:
        raise ValueError(f"{log}: no evaluation of {valid_set} in it; give another --valid_set")
    return curve


def draw(curves: dict[str, list[tuple[float, float]]], levels: dict[str, float], config: CurveConfig) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    for path, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=Path(path).stem)
    for name, level in levels.items():
        axes.axhline(level, color="gray", linewidth=0.8, linestyle="--")
        axes.text(0.01, level, f"{name} {level:.2f}", transform=axes.get_yaxis_transform(), fontsize=8, va="bottom", color="gray")
    axes.set(xlabel="wall-clock time (minutes)", ylabel=f"{config.valid_set}, PSNR on Y (dB)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output)


def _level(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--levels {text}: must be NAME=DB, as in VDSR=31.35") from None


if __name__ == "__main__":
    run_script(main)
