"""The ablation: exactly which runs it makes, what it concludes from scores, and what it does when something is missing or fails."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from pytest import approx

import dataset
import image_files
import imgproc
import losses
import train_improved
import utils
import weights
from config import Config, parse
from config_improved import parse_improved
from helpers import REPOSITORY, drawn_image, tiny, write_set
from reports import provenance
from runtime import Runtime

sys.path.insert(0, str(REPOSITORY / "scripts"))
ablation, figure = (importlib.import_module(name) for name in ("ablation", "figure"))
Run = ablation.Run

TINY = "--channels 8 --reduction 4 --num_rg 1 --num_rcab 1 --compile False --batch_size 2 --lr_patch_size 8 --num_workers 0"
SECONDS = {"rcan": (0.2, 0.25, 0.6), "cbam": (0.25, 0.3, 0.65), "open": (0.25, 0.3, 0.65), "average": (0.3, 0.36, 0.75)}


def make_timing(config):
    """As it is left in timing.json."""
    variants = {
        name: {"parameters": 1000, **{loss: {"median": value, "best": value / 2, "peak_memory_gib": 1.5}
                                      for loss, value in zip(ablation.LOSSES, seconds, strict=True)}}
        for name, seconds in SECONDS.items()
    }  # fmt: skip
    about = {"rounds": 3, "threads": 1, "precision": "fp32", "date": "today", "provenance": provenance(), "variants": variants}
    return {"settings": {"upscale_factor": config.upscale_factor, "extra": config.extra}, **about}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Settings with everything in a folder of the test's own, where no VGG19 is, and which has been timed."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(losses, "VGG19_FOLDER", str(tmp_path / "pretrained"))
    monkeypatch.setattr(ablation, "POLL", 0.01)

    def settings(**changes):
        places = {f"{name}_{kind}": str(tmp_path / name) for name, kind in (("data", "root"), ("results", "dir"), ("cache", "dir"))}
        compared = {"time_variants": ("cbam", "average", "open"), "composite_variants": ("rcan", "cbam", "average")}
        config = ablation.AblationConfig(**{**places, **compared, "crops": (), **changes})
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "timing.json").write_text(json.dumps(make_timing(config)))
        return config

    return settings


def argv(config):
    """The command line that gives these settings."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}", *map(str, value)] if isinstance(value, tuple) else [f"--{field.name}={value}"]
    return words


def fake_run(config, run, psnr=30.0, ssim=0.85, curve=(), done=None, sets=None):
    """What a finished and scored run leaves, in that order; on other sets, PSNR is one lower."""
    folder = config.folder / run.name
    (folder / "test").mkdir(parents=True)
    lines = [{"update": update, "event": "evaluation", "seconds": 60.0, "Set5/psnr": value} for update, value in curve]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ({"update": 50, "loss/l1": 0.1}, *lines)))
    state = {"update": run.updates if done is None else done, "seconds": 150.0, "precision": "bf16", "provenance": {"commit": "abc123"}}
    torch.save(state, folder / "last.pth.tar")
    scores = {name: {"psnr": psnr - (name != "Set5"), "ssim": ssim} for name in (config.test_sets if sets is None else sets)}
    (folder / "test" / "metrics.json").write_text(json.dumps(scores))


def the_report(config):
    return (config.folder / "report.md").read_text(encoding="utf-8")


def row(text, *starts):
    """The cells of the only line of the report's tables that has these, after its first ones."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (one,) = [cells for cells in found if all(start in cells for start in starts)]
    return one


# Which runs


COMMON = (
    "--train_sets T91 BSDS200 --small_images skip --lr_patch_size 32 --batch_size 8 --schedule cosine --learning_rate 1e-3 "
    "--adam_betas 0.9 0.99 --warmup_updates 100 --clip_grad_norm 0.1 --compile True --epochs 1 --steps_per_epoch 2000 "
    "--eval_every 500 --save_every 500 --log_every 50 --data_root data --results_dir results --cache_dir .cache"
)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("rcan", "--model_arch_name rcan_light_x4"),
        ("cbam", "--model_arch_name rcan_light_cbam_x4"),
        ("rcan_open", "--model_arch_name rcan_light_x4 --initial_channel_gate 0.95"),
        (
            "open",
            "--model_arch_name rcan_light_cbam_x4 --attention cbam_average --initial_channel_gate 0.95 --initial_spatial_gate 0.95",
        ),
        ("average", "--model_arch_name rcan_light_cbam_x4 --attention cbam_average --initial_spatial_gate 0.95"),
    ],
)
def test_the_commands_of_l1_runs_to_the_letter(variant, options):
    """Runs of that command exist, and with any other one train.py would refuse to go on with them."""
    python, script, *words = ablation.command(Run(variant, "l1", 2, 2000), ablation.AblationConfig())
    assert (python, script) == (sys.executable, str(REPOSITORY / "train.py"))
    assert " ".join(words) == f"{options} --seed 2 --exp_name ablation/{variant}_l1_seed2 {COMMON}"


def test_a_run_at_equal_time_differs_by_its_length_and_name():
    one, other = (
        ablation.command(Run("cbam", kind, 1, count), ablation.AblationConfig()) for kind, count in (("l1", 2000), ("l1_time", 1600))
    )
    differences = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    assert differences == [("ablation/cbam_l1_seed1", "ablation/cbam_l1_time_seed1"), ("2000", "1600")]


@pytest.mark.parametrize("kind", ["composite", "gan"])
@pytest.mark.parametrize("scale", [2, 4])
def test_the_composite_run_and_its_control_differ_by_the_loss_alone(make, kind, scale):
    """As the settings are resolved, so that a preset can't bring anything in."""
    config = make(upscale_factor=scale)
    control, loss = (ablation.command(Run("average", each, 0, 400), config, "v.pth") for each in ("l1more", kind))
    assert [words[1].rsplit("/")[-1] for words in (control, loss)] == ["train.py", "train_improved.py"]
    control, loss = parse(Config, "train", control[2:]), parse_improved(loss[2:])
    changed = {name for name, value in dataclasses.asdict(control).items() if getattr(loss, name) != value}
    assert changed - {"perceptual_weight"} == {"exp_name", "use_composite_loss", "best_metric"}  # the last decides on best.pth.tar only
    assert (control.learning_rate, control.warmup_updates, control.total_updates) == (1e-4, 20, 400)
    assert control.pretrained_model_path == str(config.folder / "average_l1_seed0" / "last.pth.tar")
    assert (loss.use_composite_loss, loss.discriminator_channels, loss.discriminator_learning_rate) == (True, 32, 1e-4)
    assert (loss.perceptual_weight, loss.vgg19_weights_path) == ((0.006, "v.pth") if kind == "composite" else (0, ""))
    assert (loss.attention, loss.initial_spatial_gate, loss.upscale_factor) == ("cbam_average", 0.95, scale)


def test_all_runs(make):
    config = make(seeds=(3, 5), composite_variants=("rcan", "average"), time_variants=("cbam", "average"))
    runs = ablation.plan(config, make_timing(config), perceptual=True)
    fitting = (("cbam", 1600), ("average", 1333))  # 2000 * 0.2 / 0.25, 2000 * 0.2 / 0.3
    assert [(run.name, run.updates) for run in runs] == [
        *((f"{variant}_l1_seed{seed}", 2000) for seed in (3, 5) for variant in ("rcan", "rcan_open", "cbam", "average", "open")),
        *((f"{variant}_l1_time_seed{seed}", count) for seed in (3, 5) for variant, count in fitting),
        ("rcan_l1more_seed3", 400), ("rcan_composite_seed3", 400), ("rcan_l1more_time_seed3", 1200),
        ("average_l1more_seed3", 400), ("average_composite_seed3", 400), ("average_l1more_time_seed3", 1000),
    ]  # fmt: skip
    runs = ablation.plan(config, make_timing(config), perceptual=False)
    assert [(run.name, run.updates) for run in runs[-3:-1]] == [("average_l1more_seed3", 400), ("average_gan_seed3", 400)]
    assert runs[-1].updates == 480  # 400 * 0.36 / 0.3
    assert {run.base for run in runs} == {"", "rcan_l1_seed3", "average_l1_seed3"}
    assert {run.updates for run in ablation.plan(config, None, True) if "_time" in run.kind} == {None}


def test_only(make):
    runs = ablation.plan(make(), None, False)
    chosen = ablation.chosen(runs, make(only=("cbam_l1_seed", "rcan_gan")))
    assert [run.name for run in chosen] == ["cbam_l1_seed0", "cbam_l1_seed1", "cbam_l1_seed2", "rcan_gan_seed0"]
    with pytest.raises(
        ValueError, match=r"only=\('nothing',\): no run is called so; they are rcan_l1_seed0, rcan_open_l1_seed0, cbam_l1_seed0"
    ):
        ablation.chosen(runs, make(only=("nothing",)))


def test_impossible_settings_are_refused():
    for changes, message in (
        ({"lanes": 0}, "lanes=0"),
        ({"seeds": (1, 1)}, "seeds="),
        ({"seeds": ()}, "seeds="),
        ({"test_sets": ()}, "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ablation.AblationConfig(**changes)


def test_lanes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(7)), raising=False)
    threads = [ablation._threads(ablation.AblationConfig(lanes=lanes)) for lanes in (1, 2, 3, 9)]
    assert threads == [{}, {"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "1"}]


# VGG19


def test_vgg19_is_looked_for_and_never_downloaded_unasked(make, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: asked.append(1))
    config = make()
    assert ablation.find_vgg19(config) is None
    for place in (tmp_path / "hub" / "checkpoints", tmp_path / "pretrained"):  # the second is preferred, as in losses.find_vgg19
        place.mkdir(parents=True)
        (place / losses.VGG19_FILE).touch()
        assert ablation.find_vgg19(config) == place / losses.VGG19_FILE == losses.find_vgg19()
        (place / losses.VGG19_FILE).rename(place / "mine.pth")
    assert ablation.find_vgg19(make(vgg19_weights_path=str(place / "mine.pth"))) == place / "mine.pth"
    with pytest.raises(FileNotFoundError, match="no such file"):
        ablation.find_vgg19(make(vgg19_weights_path=str(tmp_path / "gone.pth")))
    with pytest.raises(ValueError, match="never trained"):
        ablation.find_vgg19(make(vgg19_weights_path="random"))
    assert not asked
    ablation.find_vgg19(make(download=True, report_only=True))
    assert not asked
    ablation.find_vgg19(make(download=True))
    assert asked


# Timing


def test_medians_without_the_first_rounds(monkeypatch):
    """Each update takes 9, 9, 1, 2, 6 seconds of a clock of ours."""
    clock, turns = [0.0], []

    class Fake:
        precision = "fp32"

        def __init__(self, settings, _device):
            self.network, self.left, self.name = torch.nn.Linear(4, 2), [9, 9, 1, 2, 6], settings

        def __call__(self):
            clock[0] += self.left.pop(0)
            turns.append(self.name)

    monkeypatch.setattr(ablation, "Update", Fake)
    monkeypatch.setattr(ablation, "update_settings", lambda _config, variant, loss: (variant, loss))
    monkeypatch.setattr(ablation.time, "perf_counter", lambda: clock[0])
    found = ablation.time_updates(ablation.AblationConfig(timing_rounds=3))
    assert found["variants"].keys() == ablation.VARIANTS.keys()
    assert found["variants"]["open"] == {"parameters": 10, **{loss: {"median": 2, "best": 1} for loss in ablation.LOSSES}}
    assert len(turns) == 5 * 9  # L1 of five variants, two more losses of the two that go on with them
    assert turns[:9] == turns[9:18]
    assert len(set(turns[:9])) == 9  # they take turns


@pytest.mark.parametrize("loss", ["l1", "gan", "composite"])
def test_what_is_timed_is_the_update_of_training(make, monkeypatch, loss):
    """To the last bit, from the same weights and patches."""
    if loss == "composite":
        pytest.importorskip("torchvision")
    config = make(extra=f"{TINY} --precision fp32 --warmup_updates 0")
    settings = ablation.update_settings(config, "cbam", loss)
    assert (settings.perceptual_weight, settings.adversarial_weight) == {"l1": (0, 0), "gan": (0, 0.001), "composite": (0.006, 0.001)}[loss]
    runtime = Runtime(torch.device("cpu"))
    update = ablation.Update(settings, runtime.device)
    utils.seed_everything(0)
    step = train_improved.AdversarialStep(settings, runtime, "fp32")
    step(update.lr, update.gt)
    assert sum(map(torch.numel, update.network.parameters())) == sum(map(torch.numel, step.generator.parameters()))
    before = [parameter.clone() for parameter in update.network.parameters()]
    update()
    for own, theirs, old in zip(update.network.parameters(), step.generator.parameters(), before, strict=True):
        assert torch.equal(own, theirs)
        assert not torch.equal(own, old)
    assert (update.discriminator is None) == (loss == "l1")
    if update.discriminator:
        for own, theirs in zip(update.discriminator.parameters(), step.discriminator.parameters(), strict=True):
            assert torch.equal(own, theirs)


def test_a_timing_is_kept_and_never_taken_for_another(make, monkeypatch):
    config = make()
    assert ablation.read_timing(config) == make_timing(config)
    with pytest.raises(ValueError, match=r"timing\.json: was measured with .*'upscale_factor': 4.* not .*'upscale_factor': 2"):
        ablation.read_timing(dataclasses.replace(config, upscale_factor=2))
    (config.folder / "timing.json").unlink()
    assert ablation.read_timing(config) is None
    asked = []

    def ask(_config, worker):
        asked.append(worker)
        found = {name: {"parameters": 1, **{loss: {"median": 1.0, "best": 1.0} for loss in ablation.LOSSES}} for name in ablation.VARIANTS}
        return {"rounds": 1, "variants": found} if worker == "timing" else {"peak_memory_gib": 2.5}

    monkeypatch.setattr(ablation, "_ask", ask)
    measured = ablation.measure(config)
    assert ablation.read_timing(config) == measured
    assert measured["variants"]["cbam"]["gan"] == {"median": 1.0, "best": 1.0, "peak_memory_gib": 2.5}
    assert asked == ["timing", *(f"{variant}/{loss}" for variant, loss in ablation.timed_updates(config))]
    assert {"open/l1", "cbam/composite"} < set(asked)
    assert "open/gan" not in asked


def test_a_worker_measures_one_variant(make, monkeypatch, capsys):
    monkeypatch.setattr(utils, "peak_memory", lambda _device: 1.25)
    monkeypatch.setattr(utils, "reset_peak_memory", lambda _device: None)  # of the tests' own process
    ablation.main(["--worker", "cbam/gan", f"--extra={TINY}"])
    assert json.loads(capsys.readouterr().out) == {"peak_memory_gib": 1.25}
    with pytest.raises(ValueError, match="worker='cbam/l2' must be timing, or one of rcan, rcan_open, cbam"):
        ablation.main(["--worker", "cbam/l2"])


# Comparing


@pytest.mark.parametrize(
    ("differences", "spread", "sign", "expected"),
    [
        ([0.1, 0.2, 0.3], 0.15, 1, "gain"),
        ([0.1, 0.2, 0.3], 0.25, 1, ablation.WITHIN),  # mean 0.2
        ([0.1, 0.2, 0.3], 0.15, -1, "loss"),
        ([-0.1, -0.2], 0.1, 1, "loss"),
        ([-0.1, -0.2], 0.1, -1, "gain"),
        ([-0.1, 0.9], 0.1, 1, ablation.WITHIN),  # mean 0.4, but the seeds disagree
        ([0.0, 0.9], 0.1, 1, ablation.WITHIN),
        ([0.2, 0.2], 0.2, 1, "gain"),  # no less than the spread
        ([0.0, 0.0], 0.0, 1, ablation.WITHIN),
        ([0.5], None, 1, ablation.UNKNOWN),
        ([], 0.1, 1, "not measured"),
    ],
)
def test_verdicts(differences, spread, sign, expected):
    assert ablation.verdict(differences, spread, sign) == expected


def test_a_comparison_by_hand():
    """Differences 0.2, 0.4; deviations: 30 and 31 have 0.7071, 30.2 and 31.4 have 0.8485; seed 7 has no partner."""
    found = ablation.compare({0: 30.2, 1: 31.4, 7: 50.0}, {1: 31.0, 0: 30.0}, "psnr")
    assert found["differences"] == {0: approx(0.2), 1: approx(0.4)}
    assert found["mean"] == approx(0.3)
    assert found["spread"] == approx(0.848528, abs=1e-6)
    assert found["verdict"] == ablation.WITHIN
    assert ablation.compare({0: 0.2}, {0: 0.3}, "lpips", 0.05)["verdict"] == "gain"  # less is better
    assert ablation.compare({0: 0.2}, {0: 0.3}, "psnr", 0.05)["verdict"] == "loss"
    assert ablation.compare({0: 0.2}, {0: 0.3}, "psnr")["verdict"] == ablation.UNKNOWN
    assert ablation.compare({0: 0.2}, {1: 0.3}, "psnr", 0.05) == {
        "differences": {},
        "mean": None,
        "spread": 0.05,
        "verdict": "not measured",
    }


def test_the_mean_curve_is_over_updates_that_all_have():
    assert ablation.mean_curve([[(1, 30.0), (2, 31.0), (3, 32.0)], [(2, 32.0), (1, 31.0)]]) == [(1, 30.5), (2, 31.5)]
    assert ablation.mean_curve([]) == []


# The report


def fake_study(config, perceptual):
    """All runs but open's, rcan_open's and one of average's: cbam 0.1 dB below at equal updates, but within the spread at equal time."""
    runs = ablation.plan(config, make_timing(config), perceptual)
    offsets = {"l1": {"rcan": 0.0, "cbam": -0.1, "average": 0.5}, "l1_time": {"cbam": -0.001, "average": 0.4}}
    for run in runs:
        if run.variant in ("open", "rcan_open") or run.name == "average_l1_seed1":
            continue
        psnr = (
            30
            + 0.02 * run.seed
            + offsets.get(run.kind, {"l1more": 0.3, "l1more_time": 0.35}).get(run.variant if run.kind in offsets else run.kind, -0.7)
        )
        fake_run(config, run, psnr, curve=[(1000, psnr - 1), (2000, psnr)])


def test_the_report_by_hand(make):
    """Spread over seeds 0, 1, 2 of 30, 30.02, 30.04: 0.02; more L1 gives 30.3, the loss with a discriminator 29.3."""
    config = make(report_only=True, crops=())
    fake_study(config, perceptual=False)
    ablation.main(argv(config))
    text = the_report(config)
    equal_updates, equal_time, more = (
        text[text.index(f"## {title}") :] for title in ("L1 after equal updates", "L1 after equal time", "More L1")
    )
    equal_updates, equal_time = equal_updates[: -len(equal_time)], equal_time[: -len(more)]
    psnr, ssim = (part.split("\n\n")[0] for part in re.split(r"(?m)^(?=\| variant)", equal_updates)[1:])
    assert row(psnr, "rcan", "Set5") == ["rcan", "2000", "2.5", "0, 1, 2", "Set5", "30.020 ± 0.020 (30.000…30.040)", "", ""]
    assert row(psnr, "cbam", "B100")[5:] == ["28.920 ± 0.020 (28.900…28.940)", "-0.100 (-0.100, -0.100, -0.100)", "loss"]
    assert row(psnr, "average", "Set5")[3:] == ["0, 2", "Set5", "30.520 ± 0.028 (30.500…30.540)", "+0.500 (+0.500, +0.500)", "gain"]
    assert row(psnr, "open", "Set5") == ["open", "–", "–", "absent", "Set5", "–", "–", "not measured"]
    assert row(ssim, "cbam", "Set5")[5:] == ["0.8500 ± 0.0000 (0.8500…0.8500)", "+0.0000 (+0.0000, +0.0000, +0.0000)", ablation.WITHIN]
    assert "cbam, l1 against rcan, Set5: PSNR -0.100 dB (3 seeds: -0.100, -0.100, -0.100; spread 0.020 dB): loss." in equal_updates
    psnr = re.split(r"(?m)^(?=\| variant)", equal_time)[1]
    assert row(psnr, "cbam", "Set5")[1:] == [
        "1600", "2.5", "0, 1, 2", "Set5", "30.019 ± 0.020 (29.999…30.039)", "-0.001 (-0.001, -0.001, -0.001)", ablation.WITHIN,
    ]  # fmt: skip
    assert row(more, "rcan", "gan") == ["rcan", "gan", "400", "2.5", "29.300", "0.8500", "28.300", "0.8500", "28.300", "0.8500"]
    assert row(more, "rcan", "l1more_time")[2] == "500"  # 400 * 0.25 / 0.2
    assert "rcan, gan against l1more, Set5: PSNR -1.000 dB (one seed; spread 0.020 dB): loss." in more
    assert "rcan, gan against l1more_time, Set5: PSNR -1.050 dB (one seed; spread 0.020 dB): loss." in more
    assert row(text, "cbam", "gan", "3.33") == ["cbam", "1,000", "gan", "300.0 (150.0)", "3.33", "1.50"]


def test_what_the_report_says_about_itself(make, monkeypatch):
    config = make(report_only=True)
    fake_study(config, perceptual=False)
    monkeypatch.setattr(sys, "argv", ["scripts/ablation.py", "--report_only", "True"])
    provenance.cache_clear()
    ablation.main(argv(config))
    provenance.cache_clear()
    text = the_report(config)
    assert "by `ablation.py --report_only True`; commit" in text
    assert "Absent: 10 of 33 runs.\n\n- rcan_open_l1_seed0: absent" in text
    assert "- average_l1_seed1: absent" in text
    assert "Trained with commit abc123, precision bf16: 23 run(s)" in text
    assert "not those that were best on Set5, so that nothing is chosen on a test set" in text
    assert "The perceptual term was not measured, since VGG19's weights (vgg19-dcbb9e9d.pth) were absent" in text
    assert "LPIPS is not measured, as " in text
    assert "4 border pixels dropped" in text
    assert "train.py --model_arch_name rcan_light_x4 --seed 0 --exp_name ablation/rcan_l1_seed0 --train_sets T91 BSDS200" in text
    found = json.loads((config.folder / "ablation.json").read_text())
    assert found["runs"]["cbam_l1_seed2"]["scores"]["Set5"]["psnr"] == approx(29.94)
    assert found["runs"]["cbam_l1_seed2"]["curve"] == [[1000, approx(28.94)], [2000, approx(29.94)]]
    assert found["comparisons"]["losses"][0]["mean"] == approx(-1)
    assert found["settings"]["composite_updates"] == 400


def test_runs_with_vgg19_are_called_composite_also_after_it_is_gone(make, monkeypatch):
    config = make(report_only=True, seeds=(0, 1))
    fake_study(config, perceptual=True)
    ablation.main(argv(config))
    text = the_report(config)
    assert "perceptual term was not measured" not in text
    assert "## More L1 against L1, VGG19 and a discriminator (composite)" in text
    assert row(text[text.index("## More") :], "cbam", "composite")[4] == "29.300"
    monkeypatch.setattr(ablation, "run_all", lambda *_: {})
    ablation.main(argv(dataclasses.replace(config, report_only=False)))  # which could not train them, so it is about others
    assert "perceptual term was not measured" in the_report(config)


def test_the_report_of_nothing(make, capsys):
    config = make(report_only=True)
    (config.folder / "timing.json").unlink()
    ablation.main(argv(config))
    assert "of 0 of 33 runs" in capsys.readouterr().out
    text = the_report(config)
    assert "Absent: 33 of 33 runs." in text
    assert "- cbam_l1_time_seed0: how many updates take equal time was not measured" in text
    assert "No pictures, as no run is finished and scored." in text
    assert not list(config.folder.glob("*.png"))


def test_what_counts_as_finished_and_scored(make):
    config = make(test_sets=("Set5", "Set14"))
    for name in config.test_sets:
        write_set(config.folder.parent.parent / "data" / name, [(32, 32)])
    stopped, partly, stale, good = (Run("rcan", "l1", seed, 2000) for seed in range(4))
    fake_run(config, stopped, done=1500)
    fake_run(config, partly, sets=("Set5",))
    fake_run(config, stale)
    fake_run(config, good)
    last = config.folder / stale.name / "last.pth.tar"
    os.utime(last, ns=(time.time_ns() + 10**9,) * 2)
    assert ablation.problem_of(stopped, config) == "at update 1500, not 2000"
    assert [ablation.is_scored(run, config) for run in (partly, stale, good)] == [False, False, True]
    assert [ablation.read_outcome(run, config).problem for run in (stale, good)] == ["trained, but its last weights are not scored", ""]
    assert ablation.read_outcome(good, config).scores == {"Set5": {"psnr": 30, "ssim": 0.85}, "Set14": {"psnr": 29, "ssim": 0.85}}
    again = [[words[1].rsplit("/")[-1] for words in ablation._commands(run, config, None)] for run in (stale, good)]
    assert again == [["train.py", "test.py"], ["train.py"]]


def test_pictures(make, tmp_path):
    pytest.importorskip("matplotlib")
    photo = tmp_path / "photo.png"
    image_files.write_image(photo, drawn_image(97, 120))
    config = make(report_only=True, crops=(str(photo), str(tmp_path / "gone.png")))
    fake_study(config, perceptual=False)
    for name in ("rcan_l1more_seed0", "rcan_gan_seed0"):  # as fake_study has left them, but with a network in them
        path = config.folder / name / "last.pth.tar"
        network, times = tiny(4), path.stat()
        torch.save({**weights.read(path), "state_dict": network.state_dict()}, path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    ablation.main(argv(config))
    for name in ("ablation.png", "crops.png"):
        assert np.ptp(image_files.read_image(config.folder / name)) == 255
    assert "Bicubic, L1 (rcan_l1more_seed0), L1 + GAN (rcan_gan_seed0), and GT" in the_report(config)


def test_crops_show_one_part_of_all(tmp_path):
    gt = drawn_image(99, 122)
    image_files.write_image(tmp_path / "photo.png", gt)
    networks = {"L1": tiny(4), "composite": tiny(4, "cbam")}
    panels = ablation.crop(tmp_path / "photo.png", networks, 4, side=40)
    gt = gt[:96, :120]
    lr = imgproc.degrade(gt, 4)
    pictures = [imgproc.imresize(lr, 4), *(ablation.upscale(network, lr) for network in networks.values()), gt]
    top, left = figure.find_part(pictures[0], pictures[1], gt, 40)
    for (label, panel), name, picture in zip(panels.items(), ("bicubic", "L1", "composite", "GT"), pictures, strict=True):
        assert label == (f"{name}  {imgproc.psnr(picture, gt, 4):.2f} dB" if picture is not gt else "GT  photo")
        assert (panel == picture[top : top + 40, left : left + 40]).all()


def test_lpips_of_the_written_pictures(make, tmp_path, monkeypatch):
    """With a network that gives the mean difference on -1..1: pictures darker than GT by 51 have 0.4, a copy 0."""
    assert ablation.lpips_problem()
    stand_in = types.SimpleNamespace(LPIPS=lambda **_: types.SimpleNamespace(eval=lambda: lambda sr, gt: (gt - sr).abs().mean()))
    monkeypatch.setitem(sys.modules, "lpips", stand_in)
    assert f"AlexNet's weights are not in torch.hub's cache, {tmp_path / 'hub'}" in ablation.lpips_problem()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / ablation.ALEXNET_FILE).touch()
    assert not ablation.lpips_problem()
    config = make(test_sets=("Own",))
    write_set(tmp_path / "data" / "Own", [(33, 34), (35, 32)])
    run = Run("rcan", "l1", 0, 2000)
    fake_run(config, run)
    for name, offset in (("a", 51), ("b", 0)):
        path = tmp_path / "data" / "Own" / "GT" / f"{name}.png"
        gt = imgproc.crop_to_multiple(image_files.read_image(path), 4)
        bright = np.maximum(gt, 51)
        image_files.write_image(path, bright)
        image_files.write_image(config.folder / run.name / "test" / "Own" / f"{name}.png", bright - np.uint8(offset))
    ablation.measure_lpips([run], config)
    assert ablation.read_outcome(run, config).scores["Own"]["lpips"] == approx(0.2)
    monkeypatch.setattr(dataset, "open_test_sets", None)
    ablation.measure_lpips([run], config)  # is there


# Training


SAY = "import sys; print('first line'); print('what went wrong', file=sys.stderr); sys.exit({code})"


def test_a_failed_training_is_named_and_the_others_go_on(make, monkeypatch, capsys):
    """cbam fails, so that nothing can go on from it; rcan leaves a run."""
    config = make(lanes=2, seeds=(0,), only=("rcan_l1_seed0", "cbam_l1_seed0", "cbam_gan"))

    def command(run, config, _vgg19=None):
        if run.name == "rcan_l1_seed0" and not (config.folder / run.name).exists():  # the report asks for the command again
            fake_run(config, run)
        return [sys.executable, "-c", SAY.format(code=3 if run.variant == "cbam" else 0)]

    monkeypatch.setattr(ablation, "command", command)
    with pytest.raises(SystemExit) as raised:
        ablation.main(argv(config))
    assert raised.value.code == 1
    said = capsys.readouterr().err
    log = config.folder / "cbam_l1_seed0.txt"
    assert f"error: cbam_l1_seed0 failed: exit code 3; {log} ends with\n" in said
    assert "what went wrong" in said
    assert "error: cbam_gan_seed0 failed: it goes on from cbam_l1_seed0, which is not finished: absent" in said
    assert "rcan_l1_seed0 failed" not in said
    assert "first line" in (config.folder / "rcan_l1_seed0.txt").read_text()
    assert "- cbam_l1_seed0: exit code 3" in the_report(config)
    assert "rcan, gan against l1more, Set5: PSNR not measured." in the_report(config)


WAIT = """
import os, pathlib, signal, sys, time
from runtime import Runtime
import image_files
assert os.getpgid(0) != int(sys.argv[2])  # the terminal's own Ctrl-C doesn't reach it
signal.signal(signal.SIGINT, lambda *_: (pathlib.Path(sys.argv[1] + "_stopped").touch(), sys.exit(130)))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_a_stop_is_passed_on_to_the_trainings(make, tmp_path, monkeypatch):
    config = make(lanes=2)
    runs = [Run("rcan", "l1", seed, 2000) for seed in range(3)]
    monkeypatch.setattr(ablation, "command", lambda run, *_: [sys.executable, "-c", WAIT, str(tmp_path / run.name), str(os.getpgid(0))])
    sleep, asked = time.sleep, []

    def sleep_then_stop(seconds):
        sleep(seconds)
        if not asked and all((tmp_path / run.name).exists() for run in runs[:2]):
            asked.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ablation.time, "sleep", sleep_then_stop)
    with pytest.raises(KeyboardInterrupt):
        ablation.run_all(runs, config, None)
    left = sorted(path.name for path in tmp_path.glob("rcan*"))
    assert left == ["rcan_l1_seed0", "rcan_l1_seed0_stopped", "rcan_l1_seed1", "rcan_l1_seed1_stopped"]  # and the third never began
    assert "test.py" not in (config.folder / "rcan_l1_seed0.txt").read_text()


def test_the_end_of_a_log_is_without_the_progress_bar_before_it(tmp_path):
    (tmp_path / "run.txt").write_bytes(b"first\n 1%\r 2%\rwarning\n\nerror\n")
    assert ablation._last_lines(tmp_path / "run.txt", 2) == "    warning\n    error"


def test_runs_wait_for_the_one_that_they_go_on_from():
    base, more, other = Run("rcan", "l1", 0, 9), Run("rcan", "l1more", 0, 9), Run("cbam", "l1", 0, 9)
    assert ablation._next([more, other], {base.name: None}) == other
    assert ablation._next([more], {base.name: None}) is None
    assert ablation._next([more, base], {}) == base
    assert ablation._next([more], {}) == more


class InThisProcess:
    """Runs a script as a process of its own would, without the seconds in which one imports torch."""

    def __init__(self, words, stdout, **_options):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.TextIOWrapper(stdout, write_through=True)):
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
            sys.stdout.detach()

    def poll(self):
        return 0


def test_from_training_to_the_report(make, tmp_path, monkeypatch, capfd):
    """Trainings of two updates: L1, and from it, L1 and a discriminator; and the same command again."""
    for name, sizes in (("T91", [(40, 44)]), ("BSDS200", [(48, 40)]), ("Set5", [(32, 36), (36, 32), (40, 40), (32, 32), (36, 36)])):
        write_set(tmp_path / "data" / name, sizes)
    names = {"Popen": InThisProcess, "DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(ablation, "subprocess", types.SimpleNamespace(**names))
    config = make(updates=2, composite_updates=2, seeds=(0,), test_sets=("Set5",), only=("rcan_l1_seed0", "rcan_gan"), extra=TINY)
    ablation.main(argv(config))
    assert "of 2 of 17 runs" in capfd.readouterr().out
    text, found = the_report(config), {}
    for kind in ("l1", "gan"):
        folder = config.folder / f"rcan_{kind}_seed0"
        found[kind] = json.loads((folder / "test" / "metrics.json").read_text())["Set5"]
        assert row(text[text.index("## More") :], "rcan", kind)[4:] == [f"{found[kind]['psnr']:.3f}", f"{found[kind]['ssim']:.4f}"]
        assert (folder / "test" / "Set5" / "a.png").is_file()
        assert f"--exp_name ablation/{folder.name}" in (log := folder.with_suffix(".txt").read_text())
        assert "finished: update 2" in log
    assert found["l1"] != found["gan"]
    start, trained = (weights.read(config.folder / f"rcan_{kind}_seed0" / "last.pth.tar") for kind in ("l1", "gan"))
    moved = (trained["ema_state_dict"]["conv1.weight"] - start["ema_state_dict"]["conv1.weight"]).abs().max()
    assert 0 < moved < 1e-3  # two steps of at most 1e-4 from the averaged weights of L1
    before = {path: path.stat().st_mtime_ns for path in config.folder.glob("*/**/*")}
    ablation.main(argv(config))
    assert "already finished at update 2" in (config.folder / "rcan_gan_seed0.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in config.folder.glob("*/**/*")} == before
