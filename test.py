"""Score weights on benchmark sets:

    python test.py --model_path results/rcan_x4/best.pth.tar --data_root data --test_sets Set5 Set14 B100

The network is rebuilt from the file alone; the settings of its training need not be given. Pictures, metrics.json, metrics.csv and
report.txt go to results/<exp_name>/test, named after the weights where exp_name is empty. Scores are those of the pictures as
written, by the papers' protocol.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import dataset
import imgproc
import utils
import weights
from config import Config, parse
from utils import Scores


def main(argv: Sequence[str] | None = None) -> None:
    """Score `model_path` on `test_sets`, beside bicubic."""
    config = parse(Config, "test", argv)
    runtime = utils.start_runtime()
    network = weights.load(config.weights_path).to(runtime.device)
    if not config.test_sets:
        raise ValueError("test_sets is empty: name at least one, as in --test_sets Set5 Set14")
    sets = dataset.open_test_sets(config.data_root, config.test_sets, network.upscale_factor, config.degradation)
    if runtime.is_main:
        print(weights.describe(network))
    sr_scores, bicubic_scores = {}, {}
    for name, images in sets.items():
        write = partial(_write_picture, config.test_dir / name) if config.save_images else None
        upscaler = partial(utils.upscale, network, self_ensemble=config.self_ensemble)
        sr_scores[name] = utils.evaluate(upscaler, images, network.upscale_factor, runtime, write, progress=name)
        bicubic = partial(imgproc.imresize, scale=network.upscale_factor)
        bicubic_scores[name] = utils.evaluate(bicubic, images, network.upscale_factor, runtime)
    if runtime.is_main:
        report = table(sr_scores, bicubic_scores, network.upscale_factor, config)
        print(report)
        about = "\n".join(f"{name} {value}" for name, value in utils.provenance().items())
        utils.write_text(config.test_dir / "report.txt", f"{weights.describe(network)}\n{report}\n\n{about}\n")
        write_metrics(config.test_dir, sr_scores, bicubic_scores)
        print(f"{'pictures and ' if config.save_images else ''}metrics: {config.test_dir.absolute()}")


def table(sr: Mapping[str, Scores], bicubic: Mapping[str, Scores], upscale_factor: int, config: Config) -> str:
    """The scores for reading, with the protocol that they were made by."""
    ensemble = "self-ensemble of 8" if config.self_ensemble else "no self-ensemble"
    lines = [
        f"x{upscale_factor}, {config.degradation}: {utils.PROTOCOL.format(scale=upscale_factor)}, whole pictures, fp32, {ensemble}",
        f"{'':12} {'images':>6}   {'this network':>16}   {'bicubic':>16}   {'gain':>8}",
    ]
    for name, scores in sr.items():
        ours, theirs = (f"{entry['psnr']:7.3f} / {entry['ssim']:.4f}" for entry in (scores, bicubic[name]))
        gain = scores["psnr"] - bicubic[name]["psnr"]
        lines.append(f"{name:12} {len(scores['images']):6}   {ours:>16}   {theirs:>16}   {gain:+5.2f} dB")
    return "\n".join(lines)


def write_metrics(folder: Path, sr: Mapping[str, Scores], bicubic: Mapping[str, Scores]) -> None:
    """metrics.json, and the same by picture in metrics.csv."""
    text = json.dumps({name: {**scores, "bicubic": bicubic[name]} for name, scores in sr.items()}, indent=2)
    utils.write_text(folder / "metrics.json", text + "\n")
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(("set", "image", "psnr", "ssim", "bicubic_psnr", "bicubic_ssim"))
    for name, scores in sr.items():
        for image, score in {**scores["images"], "mean": scores}.items():
            plain = bicubic[name]["images"].get(image, bicubic[name])
            writer.writerow((name, image, score["psnr"], score["ssim"], plain["psnr"], plain["ssim"]))
    utils.write_text(folder / "metrics.csv", rows.getvalue())


def _write_picture(folder: Path, name: str, _lr: imgproc.Picture, sr: imgproc.Picture, _gt: imgproc.Picture) -> None:
    imgproc.write_image(folder / f"{name}.png", sr)


if __name__ == "__main__":
    utils.run(main)
