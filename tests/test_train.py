"""Training: one update, skipped updates, resuming bit for bit, saving and stopping, and what is refused before it starts."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
import dataset
import image_files
import imgproc
import optimizers
import reports
import train
import utils
import weights
from config import Config
from helpers import COMPILES, REPOSITORY, tiny, write_set
from runs import log_lines, same_checkpoints, small_runs, stop_after, tensors
from runtime import Runtime
from train import PixelStep
from upscaling import upscale

CPU = Runtime(torch.device("cpu"))
trains = pytest.mark.slow


@pytest.fixture
def settings(tmp_path):
    return small_runs(Config, tmp_path)


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.rand(4, 3, 10, 10), torch.rand(4, 3, 20, 20)


def last(config):
    return weights.read(config.experiment_dir / checkpoints.LAST)


def run(config):
    assert train.train(config, PixelStep)
    return config


def files_of(config):
    return {path: path.read_bytes() for path in config.experiment_dir.rglob("*") if path.is_file()}


# One update


def test_muon_with_adams_learning_rate_is_remarked(settings, capsys):
    PixelStep(settings(optimizer="muon", learning_rate=1e-4), CPU, "fp32")
    assert "1e-3" in capsys.readouterr().out
    PixelStep(settings(optimizer="muon", learning_rate=1e-3), CPU, "fp32")
    assert not capsys.readouterr().out


def test_one_update_is_adams(settings):
    """Adam's first step moves each weight by the learning rate against the sign of its gradient."""
    step = PixelStep(settings(), CPU, "fp32")
    before = step.generator.conv3.bias.detach().clone()
    step(*batch())
    moved = step.generator.conv3.bias.detach() - before
    assert moved.numpy() == approx((-1e-3 * step.generator.conv3.bias.grad.sign()).numpy(), rel=1e-3)


def test_the_loss_is_the_mean_absolute_difference(settings):
    step = PixelStep(settings(), CPU, "fp32")
    lr, gt = batch()
    with torch.no_grad():
        expected = (step.generator(lr) - gt).abs().mean().item()
    terms = step(lr, gt)
    assert terms["loss/l1"].item() == approx(expected, rel=1e-6)
    assert terms["optimizer/learning_rate"].item() == approx(1e-3)
    assert not any(value.requires_grad for value in terms.values())


def test_gradients_are_clipped(settings):
    step = PixelStep(settings(clip_grad_norm=0.01), CPU, "fp32")
    assert step(*batch())["optimizer/gradient_norm"] > 0.01
    clipped = torch.cat([parameter.grad.flatten() for parameter in step.generator.parameters()]).norm()
    assert clipped.item() == approx(0.01, rel=1e-3)


def test_learning_rates(settings):
    steps = settings(halve_every=200, warmup_updates=0, epochs=500)
    assert [optimizers.learning_rate_factor(steps, update) for update in (0, 199, 200, 399, 400)] == [1, 1, 0.5, 0.5, 0.25]
    warm = settings(halve_every=200, warmup_updates=9)
    assert [optimizers.learning_rate_factor(warm, update) for update in (0, 4, 9, 10)] == approx([0.1, 0.5, 1, 1])
    cosine = settings(schedule="cosine", epochs=50)  # 100 updates
    factors = [optimizers.learning_rate_factor(cosine, update) for update in (0, 25, 50, 100)]
    assert factors == approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])


def gradients(step, double=True):
    """Those of one update, by weight, and its loss."""
    if double:
        step.generator.double()
    loss = step(*(tensor.double() if double else tensor for tensor in batch()))["loss/l1"].item()
    return {name: parameter.grad.clone() for name, parameter in step.generator.named_parameters()}, loss


@pytest.mark.parametrize("changes", [{"accumulation_steps": 2}, {"accumulation_steps": 4}, {"channels_last": False}])
def test_the_same_gradient_comes_in_parts_and_in_another_layout(settings, changes):
    """Both computed in float64, so that any CPU agrees; L1 itself is computed in float32."""
    results = []
    for more in ({}, changes):
        torch.manual_seed(3)
        results.append(gradients(PixelStep(settings(clip_grad_norm=0.0, **more), CPU, "fp32")))
    (expected, loss), (found, other) = results
    assert other == approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert found[name].numpy() == approx(gradient.numpy(), rel=1e-6, abs=1e-9), name


def test_activation_checkpointing_computes_the_same_bits_and_keeps_less(settings):
    results, kept = [], []
    for changes in ({}, {"activation_checkpointing": True}):
        torch.manual_seed(3)
        step, sizes = PixelStep(settings(num_rcab=6, **changes), CPU, "fp32"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda x: x):
            step.forward(batch()[0])
        kept.append(sum(sizes))
        results.append(gradients(step, double=False))
    assert kept[1] < 0.2 * kept[0]  # the groups are computed again instead
    assert results[0][1] == results[1][1]
    assert all(torch.equal(gradient, results[1][0][name]) for name, gradient in results[0][0].items())


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="no compiler for this processor")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiling_changes_nothing_but_rounding(settings):
    found = []
    for changes in ({}, {"compile": True}):
        torch.manual_seed(1)
        step = PixelStep(settings(**changes), CPU, "fp32")
        found.append([step(*batch(seed))["loss/l1"].item() for seed in range(2)])
    assert found[1] == approx(found[0], rel=1e-4)


def test_parts_see_their_share_of_the_batch(settings):
    step, seen = PixelStep(settings(accumulation_steps=2), CPU, "fp32"), []
    step.generator.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    step(*batch())
    assert seen == [2, 2]


def test_every_part_that_has_a_state_is_in_the_checkpoint(settings):
    step = PixelStep(settings(), CPU, "fp32")
    assert step.parts().keys() == {"state_dict", "optimizer", "scheduler", "scaler", "guard"}
    owned = {name for name, value in vars(step).items() if hasattr(value, "state_dict")} - {"forward", "criterion"}
    assert {id(getattr(step, name)) for name in owned} == {id(part) for part in step.parts().values()}


# Skipped updates


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_found_inf_makes_fused_adam_leave_everything_as_it_is(settings, precision, channels_last):
    """What PixelStep relies on and PyTorch does not document; run on the oldest and the newest PyTorch."""
    step = PixelStep(settings(channels_last=channels_last), CPU, precision)
    step(*batch())
    before = {name: value.clone() for name, value in tensors([step.generator.state_dict(), step.optimizer.state_dict()["state"]]).items()}
    lr, gt = batch(1)
    terms = step(lr.index_fill(0, torch.tensor([0]), math.nan), gt)
    assert terms[reports.SKIPPED] == 1
    assert not torch.isfinite(terms["loss/l1"])
    after = tensors([step.generator.state_dict(), step.optimizer.state_dict()["state"]])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(name.endswith("/step") for name in before)
    assert step(*batch(2))[reports.SKIPPED] == 0
    assert not torch.equal(step.generator.conv1.weight, before["/0/conv1.weight"])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(settings, bad):
    """L1's gradient is the sign of the difference, which infinity has too."""
    step = PixelStep(settings(), CPU, "fp32")
    before = step.generator.conv1.weight.clone()
    lr, gt = batch()
    gt[0, 0, 0, 0] = bad
    assert step(lr, gt)[reports.SKIPPED] == 1
    assert torch.equal(step.generator.conv1.weight, before)


def test_the_guards_running_loss_by_hand():
    guard = utils.UpdateGuard(threshold=3.0, world_size=1)
    fine = [torch.tensor(1.0)]
    for value in range(1, 21):
        assert guard(torch.tensor(float(value)), fine) == 0  # before 20 are known, nothing is a spike
    assert guard.running_loss.item() == approx(10.5)  # their mean
    assert guard(torch.tensor(31.6), fine) == 1
    assert guard.running_loss.item() == approx(10.5)
    assert guard(torch.tensor(31.4), fine) == 0
    assert guard.running_loss.item() == approx((20 * 10.5 + 31.4) / 21)
    assert guard(torch.tensor(math.nan), fine) == 1
    assert guard(torch.tensor(1.0), [torch.tensor(math.inf)]) == 1
    assert guard.in_a_row == 2
    guard.check(3)
    with pytest.raises(ValueError, match="2"):
        guard.check(2)
    for _ in range(300):
        guard(torch.tensor(5.0), fine)
    assert (guard.in_a_row, guard.accepted) == (0, guard.LONG)
    expected = guard.running_loss.item() * 100 / 101 + 7 / 101
    guard(torch.tensor(7.0), fine)
    assert guard.running_loss.item() == approx(expected)


def poison(monkeypatch, *updates, factor=math.nan):
    """Spoil what these updates of an attempt see, counted from 1."""
    call, calls = PixelStep.__call__, []

    def poisoned(self, lr, gt):
        calls.append(1)
        return call(self, lr * factor if len(calls) in updates else lr, gt)

    monkeypatch.setattr(PixelStep, "__call__", poisoned)


@trains
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_skipped_update_leaves_the_whole_run_as_it_was(settings, monkeypatch, optimizer):
    """Weights, the optimizer's moments and steps, EMA weights: bit for bit those of the update before."""
    poison(monkeypatch, 3, 4)
    config = run(settings(steps_per_epoch=1, epochs=4, save_every=1, keep_last=9, ema_decay=0.9, log_every=4, optimizer=optimizer))
    before, after = config.experiment_dir / "update_0000002.pth.tar", config.experiment_dir / "last.pth.tar"
    progress = ("/epoch", "/update", "/evaluated", "/scheduler", "/best", "/guard/in_a_row")
    assert same_checkpoints(before, after, "/meter", *progress) == []
    (report,) = (line for line in log_lines(config) if "loss/l1" in line)
    first, second = weights.read(before)["meter"]["values"][:, 0].tolist()  # of the two accepted updates
    assert report["loss/l1"] == approx((first + second) / 2, rel=1e-12)


@trains
def test_skipped_updates_are_logged_with_their_terms_and_images(settings, monkeypatch, capsys):
    poison(monkeypatch, 2)
    config = run(settings(log_every=3))
    (skip,) = (line for line in log_lines(config) if line.get("event") == "skipped")
    assert (skip["update"], skip["skipped"], skip["not_finite"]) == (3, 2, ["loss/l1", "optimizer/gradient_norm"])
    assert skip["images"] == train.prepare(settings(epochs=4)).batches.names(1)
    said = capsys.readouterr().out
    assert all(name in said for name in ("loss/l1", "optimizer/gradient_norm", *skip["images"]))
    found = [line for line in log_lines(config) if "loss/l1" in line]
    assert all(math.isfinite(line["loss/l1"]) for line in found)
    assert [line[reports.SKIPPED] for line in found] == approx([1 / 3, 0])


@trains
def test_a_report_of_skipped_updates_alone_has_no_means(settings, monkeypatch):
    poison(monkeypatch, 1, 2)
    found = [line for line in log_lines(run(settings(log_every=2))) if "loss/l1" in line]
    assert [line["loss/l1"] is None for line in found] == [True, False, False]
    assert [line[reports.SKIPPED] for line in found] == [1, 0, 0]


@trains
@pytest.mark.parametrize("stop", [2, 3])
def test_what_was_skipped_before_a_stop_is_reported_after_it(settings, monkeypatch, stop):
    logs = []
    for name in ("whole", "parted"):
        config = settings(exp_name=name, log_every=5, eval_every=6)
        with monkeypatch.context() as patch:
            poison(patch, 2)
            if name == "parted":
                stop_after(patch, stop)
            assert train.train(config, PixelStep) is (name == "whole")
        logs.append(log_lines(run(config)))
    assert logs[0] == logs[1]
    assert any(line.get("skipped") == 2 for line in logs[0])


@trains
@pytest.mark.parametrize("stopped", [False, True])
def test_too_many_skipped_updates_in_a_row_end_the_run_and_keep_the_last_good_file(settings, monkeypatch, stopped):
    """Also when nothing is reported meanwhile, and when a stop lies within the row."""
    config = settings(epochs=6, max_skipped=3, log_every=100, valid_sets=(), save_every=4)
    with monkeypatch.context() as patch:
        poison(patch, *range(6, 99))
        if stopped:
            stop_after(patch, 7)
            assert not train.train(config, PixelStep)
            poison(patch, 1, 2, 3)
        with pytest.raises(ValueError, match=r"[34]"):
            train.train(config, PixelStep)
    assert last(config)["update"] == (7 if stopped else 4)


@trains
def test_a_spike_is_skipped_by_choice(settings, monkeypatch):
    """The loss of update 26 is some hundred times the running one."""
    changes = {"epochs": 15, "eval_every": 30, "save_every": 1, "keep_last": 40, "log_every": 10}
    for name, threshold in (("chosen", 10.0), ("plain", 0.0)):
        with monkeypatch.context() as patch:
            poison(patch, 26, factor=1000)
            config = run(settings(exp_name=name, skip_threshold=threshold, **changes))
        skips = [line["skipped"] for line in log_lines(config) if line.get("event") == "skipped"]
        assert skips == ([26] if threshold else [])
        before, after = (weights.read(config.experiment_dir / f"update_00000{update}.pth.tar") for update in (25, 26))
        same = all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in before["state_dict"])
        assert same is bool(threshold)


def test_photo_with_lr_images_of_one_set_alone_is_refused(settings, tmp_path):
    write_set(tmp_path / "data/Other", [(24, 24)])
    image_files.write_image(tmp_path / "data/Other/LRphotox2/a.png", np.zeros((12, 12, 3), np.uint8))
    with pytest.raises(ValueError, match=r"Train.*LRphotox2"):
        run(settings(degradation="photo", train_sets=("Train", "Other")))


# Resuming


CHANGES = (
    {"log_every": 2},
    {"schedule": "cosine", "warmup_updates": 4, "num_workers": 2},
    {"halve_every": 2, "ema_decay": 0.5},
    {"optimizer": "muon", "pointwise_upsampler": True, "channels": 12},
    {"degradation": "photo", "num_workers": 2},
)
RESUMES = [
    (CHANGES[0], 3, "fp32"),
    (CHANGES[1], 3, "bf16"),
    (CHANGES[2], 3, "fp16"),
    (CHANGES[0], 2, "fp16"),
    (CHANGES[0], 6, "bf16"),
    (CHANGES[3], 2, "fp32"),
    (CHANGES[4], 3, "fp32"),
]


@trains
@pytest.mark.parametrize(("changes", "stop", "precision"), RESUMES)
def test_six_updates_equal_three_then_resume_then_three(settings, monkeypatch, precision, changes, stop):
    """… and two and four, where an evaluation was due as well, and six and none."""
    changes = {**changes, "precision": precision}
    whole, parted = run(settings(exp_name="whole", **changes)), settings(exp_name="parted", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert not train.train(parted, PixelStep)
    assert last(parted)["update"] == stop
    run(parted)
    for name in ("last.pth.tar", "best.pth.tar"):
        assert same_checkpoints(whole.experiment_dir / name, parted.experiment_dir / name) == []
    assert log_lines(whole) == log_lines(parted)


@trains
def test_prepare_and_go_workers_and_a_second_run_change_nothing(settings):
    first, second, other = run(settings(exp_name="a")), settings(exp_name="b", num_workers=2), run(settings(exp_name="c", seed=1))
    assert train.prepare(second).go()
    found = same_checkpoints(first.experiment_dir / "last.pth.tar", second.experiment_dir / "last.pth.tar")
    assert found == ["/config/num_workers"]
    assert log_lines(first) == log_lines(second)
    assert log_lines(first) != log_lines(other)


@trains
def test_adams_moments_survive_another_memory_layout(settings):
    """With moments in the old strides, the next updates would mix them up: the loss then differs from the third digit on."""
    config = run(settings(epochs=4, log_every=1, channels_last=True))
    shutil.copytree(config.experiment_dir, config.experiment_dir.with_name("other"))
    run(settings(epochs=8, log_every=1, channels_last=True))
    run(settings(epochs=8, log_every=1, channels_last=False, exp_name="other"))
    one, other = ([line["loss/l1"] for line in log_lines(settings(exp_name=name)) if "loss/l1" in line] for name in ("run", "other"))
    assert len(one) == 16
    assert other == approx(one, rel=1e-4)
    one, other = (last(settings(exp_name=name))["optimizer"]["state"][0]["exp_avg"] for name in ("run", "other"))
    assert other.numpy() == approx(one.numpy(), rel=1e-2, abs=1e-5)
    assert one.stride() != other.stride()


@trains
def test_a_finished_run_is_left_alone_and_more_epochs_go_on(settings):
    config = run(settings())
    before = {path: path.stat().st_mtime_ns for path in config.experiment_dir.rglob("*")}
    run(config)
    assert {path: path.stat().st_mtime_ns for path in config.experiment_dir.rglob("*")} == before
    assert last(run(settings(epochs=4)))["update"] == 8  # with the step schedule


@trains
def test_settings_that_contradict_the_checkpoint_are_listed(settings):
    config = run(settings())
    before = files_of(config)
    for changes in (
        {"batch_size": 2}, {"learning_rate": 1e-4, "seed": 3}, {"schedule": "cosine", "epochs": 9}, {"start_epoch": 2}, {"resume": "never"},
        {"resume": "results/run/best.pth.tar"}, {"pretrained_model_path": "w.pth"}, {"precision": "bf16"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=".*".join(sorted(changes, key=list(changes).index)[-1:])) as caught:
            train.train(settings(**changes), PixelStep)
        assert all(name in str(caught.value) for name in changes)
    assert files_of(config) == before


@trains
def test_a_run_shorter_than_its_reports_shows_its_loss(settings):
    config = run(settings(log_every=1000))
    lines = [line for line in log_lines(config) if "loss/l1" in line]
    assert [line["update"] for line in lines] == [config.total_updates]
    assert lines[0]["loss/l1"] > 0


@trains
def test_a_best_file_that_is_gone_is_written_again(settings):
    config = run(settings())
    (config.experiment_dir / "best.pth.tar").unlink()
    again = run(settings(epochs=4))
    assert (again.experiment_dir / "best.pth.tar").is_file()


@trains
def test_lr_images_of_another_kind_are_recorded_as_given(settings):
    config = settings()
    for name in config.train_sets:
        folder = Path(config.data_root) / name
        for file in sorted((folder / "GT").iterdir()):
            gt = image_files.read_image(file)
            scale = config.upscale_factor
            lr = gt[: gt.shape[0] // scale * scale : scale, : gt.shape[1] // scale * scale : scale]
            image_files.write_image(folder / f"LRbicx{scale}" / file.name, np.ascontiguousarray(lr))
    run(config)
    assert weights.load(config.experiment_dir / "best.pth.tar").degradation == "LR as given"


@pytest.mark.skipif(os.name == "nt", reason="sets PATH")
def test_compiling_without_a_compiler_is_refused(settings, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="compile=True"):
        train.prepare(settings(compile=True))


@trains
def test_settings_that_may_change_do(settings):
    run(settings())
    changed = run(settings(epochs=4, num_workers=2, log_every=2, eval_every=8, precision="auto", start_epoch=3))
    assert (last(changed)["update"], last(changed)["precision"]) == (8, utils.choose_precision("auto", CPU.device))  # this machine's


@trains
def test_a_run_goes_on_from_another_file_under_another_name(settings, monkeypatch):
    first = run(settings()).experiment_dir / "last.pth.tar"
    with monkeypatch.context() as patch:  # worse than all that the first run has reached
        patch.setattr(utils, "evaluate", lambda *_, **__: {"psnr": 1.0, "ssim": 0.1})
        other = run(settings(exp_name="other", resume=str(first), epochs=4))
    assert last(other)["update"] == 8
    assert (other.experiment_dir / "best.pth.tar").exists()  # the other run's best is not its own
    run(settings(exp_name="other", resume=str(first), epochs=5))  # the same command goes on
    assert (last(other)["update"], weights.read(first)["update"]) == (10, 6)


@trains
@pytest.mark.parametrize(("harm", "update"), [("cut", 5), ("flipped", 5), ("gone", 5), ("last two", 4)])
def test_the_newest_whole_checkpoint_is_taken(settings, monkeypatch, capsys, harm, update):
    whole, config = run(settings(exp_name="whole", save_every=1)), settings(save_every=1)  # evaluated after 2, 4 and 6
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train.train(config, PixelStep)
    newest, before = config.experiment_dir / "last.pth.tar", config.experiment_dir / "update_0000005.pth.tar"
    for path in (newest, before) if harm == "last two" else (newest,):
        spoil(path, harm)
    damaged = newest.read_bytes() if newest.exists() else None
    capsys.readouterr()
    run(config)
    said = capsys.readouterr().out
    assert str(newest) in said
    starts = [json.loads(line) for line in (config.experiment_dir / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in starts if line.get("event") == "start"][-1] == update
    assert same_checkpoints(whole.experiment_dir / "last.pth.tar", newest) == []
    assert log_lines(whole) == log_lines(config)
    kept = config.experiment_dir / "damaged_last.pth.tar"
    assert (kept.read_bytes() if damaged is not None else None) == damaged


def spoil(path, harm):
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "flipped":
        place = data.index(weights.read(path)["state_dict"]["conv1.bias"].numpy().tobytes()) + 5
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        path.write_bytes(data[:1000])


@trains
@pytest.mark.parametrize("harm", ["images", "part", "weights alone", "all cut"])
def test_what_cannot_be_resumed_is_refused_and_kept(settings, tmp_path, harm):
    config = run(settings())
    path = config.experiment_dir / "last.pth.tar"
    named = "last.pth.tar"
    if harm == "images":
        write_set(tmp_path / "data" / "Train", [(24, 30), (40, 26), (33, 33), (40, 40)])
        named = r"3 images .* 4 images"
    elif harm == "part":  # of another version
        state = weights.read(path)
        state["guard"]["new"] = torch.zeros(())
        torch.save(state, path)
        named = r"last\.pth\.tar.* guard"
    elif harm == "weights alone":
        weights.export(weights.load(path), path)
        named = r"last\.pth\.tar.* ema_state_dict.* pretrained_model_path"
    else:
        for each in config.experiment_dir.glob("*.pth.tar"):
            spoil(each, "cut")
    before = files_of(config)
    with pytest.raises(ValueError, match=named):
        train.train(settings(epochs=4), PixelStep)
    assert files_of(config) == before


def test_nothing_to_resume(settings):
    with pytest.raises(ValueError, match="start_epoch"):
        train.train(settings(start_epoch=2), PixelStep)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        train.train(settings(resume="gone.pth"), PixelStep)


# What a run leaves, saving and stopping


@trains
def test_what_a_run_leaves(settings):
    config = settings(valid_sets=("Valid", "Train"), ema_decay=0.9)
    left = config.experiment_dir / ".last.pth.tar.99999.part"  # what a killed run was writing
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    run(config)
    names = {path.name for path in config.experiment_dir.iterdir()}
    assert {"last.pth.tar", "best.pth.tar", "config.json", "log.jsonl", "samples"} < names
    assert any(name.startswith("events") for name in names)
    assert not left.exists()
    assert [path.name for path in sorted((config.experiment_dir / "samples").iterdir())] == ["0000002.png", "0000004.png", "0000006.png"]
    best = weights.read(config.experiment_dir / "best.pth.tar")
    assert best.keys() >= {"epoch", "best_psnr", "best_ssim", "state_dict", "ema_state_dict", "optimizer", "scheduler"}
    evaluations = [line for line in log_lines(config) if line.get("event") == "evaluation"]
    assert [line["update"] for line in evaluations] == [2, 4, 6]
    assert best["best_psnr"] == max(line["Valid/psnr"] for line in evaluations)
    assert evaluations[0].keys() >= {"Train/psnr", "Train/ssim", "Valid/ssim"}
    assert json.loads((config.experiment_dir / "config.json").read_text())["batch_size"] == 4
    assert [line["update"] for line in log_lines(config) if "loss/l1" in line] == [1, 2, 3, 4, 5, 6]
    # the EMA weights are the ones that are scored, and that a file gives
    newest = last(config)
    assert not torch.equal(newest["state_dict"]["conv1.weight"], newest["ema_state_dict"]["conv1.weight"])
    network = weights.load(config.experiment_dir / "last.pth.tar")
    assert torch.equal(network.conv1.weight, newest["ema_state_dict"]["conv1.weight"])
    images = dataset.open_test_sets(config.data_root, ["Valid"], 2)["Valid"]
    scores = utils.evaluate(lambda lr: upscale(network, lr), images, 2, CPU)
    assert evaluations[-1]["Valid/psnr"] == approx(scores["psnr"], abs=1e-6)


@trains
def test_bicubic_settings_and_command_stand_beside_the_scores(settings, monkeypatch, capsys):
    config = settings(valid_sets=("Valid", "Train"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train.train(config, PixelStep)
    run(config)  # after a resume, too
    expected = {}
    for name, images in dataset.open_test_sets(config.data_root, config.valid_sets, 2).items():
        scores = utils.evaluate(lambda lr: imgproc.imresize(lr, 2), images, 2, CPU)
        expected |= {f"{name}/bicubic_psnr": scores["psnr"], f"{name}/bicubic_ssim": scores["ssim"]}
    evaluations = [line for line in log_lines(config) if line.get("event") == "evaluation"]
    assert len(evaluations) == 3
    said = capsys.readouterr().out
    board = EventAccumulator(str(config.experiment_dir)).Reload()
    for name, value in expected.items():
        assert [line[name] for line in evaluations] == [value] * 3
        assert [event.value for event in board.Scalars(name)] == approx([value] * 3)
        assert said.count(f"{value:.2f}" if name.endswith("psnr") else f"{value:.4f}") >= 3
    recorded = json.loads((config.experiment_dir / "config.json").read_text())
    for name, values in (("provenance", recorded.pop("provenance")), ("settings", recorded)):
        texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{name}/text_summary")]
        assert len(texts) == 2  # starts
        cells = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in texts[1].splitlines()[2:]]
        assert {name: json.loads(value) for name, value in cells} == values


@trains
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_in_each_precision(settings, precision):
    config = run(settings(precision=precision, epochs=60, eval_every=120, save_every=120, log_every=20, learning_rate=3e-3))
    found = [line["loss/l1"] for line in log_lines(config) if "loss/l1" in line]
    assert found[-1] < 0.5 * found[0]


@trains
def test_a_run_without_validation_keeps_its_last_weights(settings):
    config = run(settings(valid_sets=()))
    assert (config.experiment_dir / "last.pth.tar").is_file()
    assert not (config.experiment_dir / "best.pth.tar").exists()


@trains
@pytest.mark.parametrize(("metric", "best"), [("newest", 6), ("psnr", 2), ("ssim", 4)])
def test_best_is_judged_by_the_metric_that_is_named(settings, monkeypatch, metric, best):
    scores = iter([{"psnr": 9.0, "ssim": 0.1}, {"psnr": 30.0, "ssim": 0.5}, {"psnr": 29.0, "ssim": 0.9}, {"psnr": 28.0, "ssim": 0.6}])
    monkeypatch.setattr(utils, "evaluate", lambda *_, **__: next(scores))
    config = run(settings(best_metric=metric))
    found = weights.read(config.experiment_dir / "best.pth.tar")
    assert (found["update"], found["best_metric"]) == (best, metric)
    assert (found["best_psnr"], found["best_ssim"]) == {2: (30.0, 0.5), 4: (29.0, 0.9), 6: (28.0, 0.6)}[best]


@trains
def test_it_saves_by_time_too(settings, monkeypatch):
    clock = iter(range(0, 10**6, 25))  # each look at the clock is 25 seconds after the one before
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    config = run(settings(save_every=10**6, save_every_minutes=1.0, epochs=6, keep_last=99, eval_every=10**6))
    saved = [weights.read(path)["update"] for path in checkpoints.present(config.experiment_dir)]
    assert saved[0] == 12
    assert 4 <= len(saved) <= 7  # every second or third update
    plain = run(settings(exp_name="plain", save_every_minutes=0.0, save_every=10**6, epochs=6, eval_every=10**6))
    assert checkpoints.present(plain.experiment_dir) == [plain.experiment_dir / name for name in ("last.pth.tar", "best.pth.tar")]
    changed = ("/config/save_every_minutes", "/config/keep_last")
    assert same_checkpoints(config.experiment_dir / "last.pth.tar", plain.experiment_dir / "last.pth.tar", *changed) == []


@trains
def test_what_is_logged_is_on_the_disk_before_the_checkpoint_that_counts_on_it(settings, monkeypatch):
    order, put, save = [], reports.RunLog.put_on_disk, checkpoints.save_last
    monkeypatch.setattr(reports.RunLog, "put_on_disk", lambda log: order.append("log") or put(log))
    monkeypatch.setattr(checkpoints, "save_last", lambda *given: order.append("checkpoint") or save(*given))
    run(settings(save_every=2))
    assert order == ["log", "checkpoint"] * 3


@trains
def test_a_stop_during_an_evaluation_leaves_it_due(settings, monkeypatch):
    """It isn't waited for, and the run that goes on is the one that was never stopped."""
    whole, parted = run(settings(exp_name="whole")), settings(exp_name="parted")
    enlarge, calls = train.upscale, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the first image of the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return enlarge(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "upscale", counted)
        assert not train.train(parted, PixelStep)
    assert len(calls) == 3
    assert (last(parted)["update"], last(parted)["evaluated"]) == (4, 2)
    run(parted)
    for name in ("last.pth.tar", "best.pth.tar"):
        assert same_checkpoints(whole.experiment_dir / name, parted.experiment_dir / name) == []
    assert log_lines(whole) == log_lines(parted)


@trains
def test_a_second_training_of_one_run_is_refused_and_a_dry_one_is_not(settings, monkeypatch):
    config, call, ended = settings(), PixelStep.__call__, []
    code = "import train\nfrom config import Config\nfrom runtime import run_script\nrun_script(lambda: train.train({!r}, train.PixelStep))"

    def while_another_starts(self, lr, gt):
        if not ended:
            for other in (config, settings(dry_run=True)):
                ended.append(subprocess.run([sys.executable, "-c", code.format(other)], cwd=REPOSITORY, capture_output=True, text=True))
        return call(self, lr, gt)

    monkeypatch.setattr(PixelStep, "__call__", while_another_starts)
    run(config)
    assert [done.returncode for done in ended] == [1, 0]
    assert ended[0].stderr.startswith(f"error: {config.experiment_dir}: ")
    assert str(os.getpid()) in ended[0].stderr
    assert not (config.experiment_dir / ".lock").exists()


# Before the loop


@trains
def test_a_dry_run_tells_what_would_run_and_writes_nothing(settings, capsys, tmp_path):
    config = settings(dry_run=True, batch_size=4)
    assert train.train(config, PixelStep)
    said = capsys.readouterr().out
    for part in (tmp_path / "data/Valid/GT", tmp_path / "data/Train/GT", "batch_size=4", "rcan_x2", "6 updates", "GiB", " minutes"):
        assert str(part) in said
    assert not config.experiment_dir.exists()
    run(settings())
    assert train.train(settings(dry_run=True), PixelStep)  # of a finished run, too


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"train_sets": ("Gone",)}, FileNotFoundError, "Gone"),
        ({"valid_sets": ("Gone",)}, FileNotFoundError, "Gone"),
        ({"lr_patch_size": 13}, ValueError, r"a\.png.*30x24.*26.*lr_patch_size"),
        ({"pretrained_model_path": "gone.pth"}, FileNotFoundError, r"gone\.pth"),
        ({"channels": 3}, ValueError, "channels=3, reduction=4"),
        ({"train_sets": ()}, ValueError, "train_sets"),
    ],
)
def test_what_cannot_start_leaves_nothing(settings, tmp_path, changes, error, named):
    config = settings(**changes)
    with pytest.raises(error, match=named):
        train.train(config, PixelStep)
    assert not config.experiment_dir.exists()
    assert not (tmp_path / "cache").exists()


@trains
def test_a_warm_start_says_what_was_taken(settings, tmp_path, capsys):
    weights.export(tiny(4), tmp_path / "x4.pth")
    config = run(settings(pretrained_model_path=str(tmp_path / "x4.pth"), epochs=1, learning_rate=1e-12))
    assert str(tmp_path / "x4.pth") in capsys.readouterr().out
    found = weights.load(config.experiment_dir / "last.pth.tar")
    assert found.conv2.weight.detach().numpy() == approx(tiny(4).conv2.weight.detach().numpy(), abs=1e-6)
