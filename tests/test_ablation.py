"""scripts/ablation.py: which commands it starts, what it concludes from their scores, and how it goes on and stops."""

import dataclasses
import importlib
import json
import os
import signal
import sys
import threading
import time

import pytest

import weights
from config import Config, parse
from config_improved import ImprovedConfig, parse_improved
from helpers import REPOSITORY, write_set
from runtime import STOPPED

sys.path.insert(0, str(REPOSITORY / "scripts"))
ablation = importlib.import_module("ablation")


def settings(script, *run, **changes):
    """What train.py or train_improved.py makes of the command of a run."""
    words = next(ablation.commands(ablation.AblationConfig(**changes), *run))
    assert words[:2] == [sys.executable, str(REPOSITORY / script)]
    return dataclasses.asdict(parse(Config, "train", words[2:]) if script == "train.py" else parse_improved(words[2:]))


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("rcan", {"model_arch_name": "rcan_light_x4"}),
        ("rcan_open", {"model_arch_name": "rcan_light_x4", "initial_channel_gate": 0.95}),
        ("cbam", {"model_arch_name": "rcan_light_cbam_x4"}),
        ("average", {"model_arch_name": "rcan_light_cbam_x4", "attention": "cbam_average", "initial_spatial_gate": 0.95}),
        (
            "open",
            {
                "model_arch_name": "rcan_light_cbam_x4", "attention": "cbam_average", "initial_spatial_gate": 0.95,
                "initial_channel_gate": 0.95,
            },
        ),
    ],
)  # fmt: skip
def test_the_documented_l1_runs(variant, changed):
    """The settings behind assets/logs/ablation_x4.json; with any other, train.py would not go on with such runs."""
    recipe = {
        "train_sets": ("T91", "BSDS200"), "small_images": "skip", "lr_patch_size": 32, "batch_size": 8, "schedule": "cosine",
        "learning_rate": 1e-3, "adam_betas": (0.9, 0.99), "warmup_updates": 100, "clip_grad_norm": 0.1, "compile": True, "epochs": 1,
        "steps_per_epoch": 2000, "eval_every": 500, "save_every": 500, "log_every": 50, "exp_name": f"ablation/{variant}_l1_seed2",
    }  # fmt: skip
    assert settings("train.py", variant, "l1", 2) == {**dataclasses.asdict(Config()), "seed": 2, **recipe, **changed}


@pytest.mark.parametrize("loss", ["gan", "composite"])
@pytest.mark.parametrize(("variant", "scale"), [("rcan", 4), ("cbam", 2), ("average", 4)])
def test_a_composite_run_and_its_control_differ_by_the_loss_alone(variant, scale, loss):
    control, composite = (
        settings(script, variant, kind, 0, upscale_factor=scale) for script, kind in (("train.py", "l1more"), ("train_improved.py", loss))
    )
    changed = {name for name, value in control.items() if composite[name] != value}
    assert changed - {"perceptual_weight"} == {"exp_name", "use_composite_loss", "best_metric"}  # the last is about best.pth.tar only
    assert ("perceptual_weight" in changed) == (loss == "gan")
    assert (control["learning_rate"], control["warmup_updates"], control["steps_per_epoch"]) == (1e-4, 20, 400)
    assert control["pretrained_model_path"] == f"results/ablation/{variant}_l1_seed0/last.pth.tar"
    own = {name: value for name, value in composite.items() if name not in control}
    default = dataclasses.asdict(ImprovedConfig())
    assert own == {**{name: default[name] for name in own}, "discriminator_channels": 32, "discriminator_learning_rate": 1e-4}


def write_scores(config, variant, loss, seed, psnr, ssim=0.85, name="Set5"):
    path = ablation.run_folder(config, variant, loss, seed) / "test" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({name: {"psnr": psnr, "ssim": ssim}}))


def test_a_comparison_by_hand(tmp_path):
    """Deviations: of 30.2 and 30.4, 0.141; of 30.1 and 30.4, 0.212. Seed 2 has no partner."""
    losses = ("l1", "l1more", "gan")
    config = ablation.AblationConfig(variants=("rcan", "cbam", "open"), losses=losses, seeds=(0, 1, 2), results_dir=str(tmp_path))
    for variant, loss, scores in (
        ("rcan", "l1", (30.2, 30.4)), ("cbam", "l1", (30.1, 30.4, 31.0)), ("rcan", "l1more", (30.25,)), ("rcan", "gan", (29.0,)),
    ):  # fmt: skip
        for seed, psnr in enumerate(scores):
            write_scores(config, variant, loss, seed, psnr)
    rows = {row[0]: row[1:] for row in ablation.compare(config, ["Set5", "Set14"])}
    assert rows[""] == ["Set5", "difference", "Set14", "difference"]
    assert rows["rcan, l1"] == ["30.300 ± 0.141 / 0.8500 (2)", "", "–", ""]
    assert rows["cbam, l1"] == ["30.500 ± 0.458 / 0.8500 (3)", "-0.050 to rcan l1 (-0.100, +0.000)", "–", ""]
    assert rows["rcan, l1more"][:2] == ["30.250 / 0.8500 (1)", "+0.050 to rcan l1 (+0.050)"]
    assert rows["rcan, gan"][:2] == ["29.000 / 0.8500 (1)", "-1.250 to rcan l1more (-1.250)"]
    assert rows["open, gan"] == ["–", "", "–", ""]
    assert len(rows) == 10


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("T91", "BSDS200"):
        write_set(tmp_path / "data" / name, [(40, 44)])
    write_set(tmp_path / "data" / "Set5", [(32, 32)] * 5)
    return tmp_path


TINY = "--channels 8 --reduction 4 --num_rg 1 --num_rcab 1 --compile False --batch_size 2 --lr_patch_size 8 --num_workers 0 --log_every 1"
ONE = ["--variants", "rcan", "--seeds", "0", "--test_sets", "Set5", "Gone", f"--extra={TINY}"]


def test_report_only_trains_nothing_and_without_sets_nothing_begins(place, monkeypatch):
    monkeypatch.setattr(ablation, "perform", None)
    write_scores(ablation.AblationConfig(), "rcan", "l1", 0, 30.0)
    ablation.main([*ONE, "--report_only", "True"])
    assert "| rcan, l1 | 30.000 / 0.8500 (1) |" in (place / "results/ablation/report.md").read_text()
    with pytest.raises(ValueError, match="test_sets"):
        ablation.main([*ONE, "--test_sets", "Gone"])


def test_other_runs_go_on_after_a_failure_which_is_named(place, monkeypatch):
    started = []
    monkeypatch.setattr(ablation, "perform", lambda words: started.append(words) or int("cbam" in " ".join(words)))
    with pytest.raises(ValueError, match=r"1 of 2 .*cbam_l1_seed0"):
        ablation.main([*ONE, "--variants", "cbam", "rcan"])
    assert [words[1].rsplit("/")[-1] for words in started] == ["train.py", "train.py", "test.py"]
    assert (place / "results/ablation/report.md").is_file()


@pytest.mark.slow
def test_from_training_to_the_report_and_the_same_command_again(place):
    """Two updates with L1, and from there two with L1 and a discriminator."""
    command = [*ONE, "--losses", "gan", "--updates", "2", "--more_updates", "2"]
    ablation.main(command)
    folder = place / "results" / "ablation"
    metrics = json.loads((folder / "rcan_gan_seed0/test/metrics.json").read_text())
    assert f"| rcan, gan | {metrics['Set5']['psnr']:.3f} / " in (folder / "report.md").read_text()
    start, trained = (weights.read(folder / f"rcan_{loss}_seed0" / "last.pth.tar") for loss in ("l1", "gan"))
    moved = (trained["ema_state_dict"]["conv1.weight"] - start["ema_state_dict"]["conv1.weight"]).abs().max()
    assert 0 < moved < 1e-3  # two steps of at most 1e-4
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/**/*")}
    ablation.main(command)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/**/*")} == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_request_to_stop_is_passed_on_to_the_training_which_saves_itself(place):
    log = place / "results/ablation/rcan_l1_seed0/log.jsonl"

    def stop():
        while not log.is_file() or len(log.read_text().splitlines()) < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        ablation.main([*ONE, "--updates", "100000"])
    assert end.value.code == STOPPED
    assert 0 < weights.read(log.with_name("last.pth.tar"))["update"] < 100000
    assert not (log.parent / "test").exists()
