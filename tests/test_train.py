"""Training: resume bit for bit, updates that are skipped, learning rates, and what is refused before it starts."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from pytest import approx

import checkpoints
import dataset
import train
import utils
import weights
from config import Config
from helpers import REPOSITORY, tiny, write_set
from reports import RunLog
from runs import log_lines, same_checkpoints, small_runs, stop_after, tensors
from runtime import Runtime
from store import PairStore
from upscaling import upscale

CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def settings(tmp_path):
    return small_runs(Config, tmp_path)


CHANGES = ({"log_every": 2}, {"schedule": "cosine", "warmup_updates": 4, "num_workers": 2}, {"halve_every": 2, "ema_decay": 0.5})


@pytest.mark.parametrize(("changes", "stop"), [(CHANGES[0], 3), (CHANGES[1], 3), (CHANGES[2], 3), (CHANGES[0], 2), (CHANGES[0], 6)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_six_updates_equal_three_then_resume_then_three(settings, monkeypatch, precision, changes, stop):
    """… and two and four, where an evaluation was due as well, and six and none."""
    changes = {**changes, "precision": precision}
    whole, parted = settings(exp_name="whole", **changes), settings(exp_name="parted", **changes)
    assert train.train(whole, train.PixelStep)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert not train.train(parted, train.PixelStep)
    assert weights.read(parted.experiment_dir / "last.pth.tar")["update"] == stop
    assert train.train(parted, train.PixelStep)
    for name in ("last.pth.tar", "best.pth.tar"):
        assert same_checkpoints(whole.experiment_dir / name, parted.experiment_dir / name) == []
    assert log_lines(whole) == log_lines(parted)


def test_workers_and_a_second_run_change_nothing(settings):
    first, second, other = settings(exp_name="a"), settings(exp_name="b", num_workers=2), settings(exp_name="c", seed=1)
    for config in (first, second, other):
        train.train(config, train.PixelStep)
    found = same_checkpoints(first.experiment_dir / "last.pth.tar", second.experiment_dir / "last.pth.tar")
    assert found == ["/config/num_workers"]
    assert log_lines(first) == log_lines(second)
    assert log_lines(first) != log_lines(other)


def test_a_finished_run_is_left_alone(settings, capsys):
    config = settings()
    train.train(config, train.PixelStep)
    before = {path: path.stat().st_mtime_ns for path in config.experiment_dir.rglob("*")}
    assert train.train(config, train.PixelStep)
    assert "already finished at update 6" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in config.experiment_dir.rglob("*")} == before
    assert train.train(settings(epochs=4), train.PixelStep)  # with the step schedule, more epochs go on
    assert weights.read(config.experiment_dir / "last.pth.tar")["update"] == 8


def test_what_the_run_leaves(settings):
    config = settings(valid_sets=("Valid", "Train"))
    train.train(config, train.PixelStep)
    left = {path.name for path in config.experiment_dir.iterdir()}
    assert {"last.pth.tar", "best.pth.tar", "config.json", "log.jsonl", "samples"} < left
    assert any(name.startswith("events") for name in left)
    assert [path.name for path in sorted((config.experiment_dir / "samples").iterdir())] == ["0000002.png", "0000004.png", "0000006.png"]
    checkpoint = weights.read(config.experiment_dir / "best.pth.tar")
    assert checkpoint.keys() >= {"epoch", "best_psnr", "best_ssim", "state_dict", "ema_state_dict", "optimizer", "scheduler"}
    assert checkpoint["config"]["batch_size"] == 4
    evaluations = [line for line in log_lines(config) if line.get("event") == "evaluation"]
    assert [line["update"] for line in evaluations] == [2, 4, 6]
    assert checkpoint["best_psnr"] == max(line["Valid/psnr"] for line in evaluations)
    assert evaluations[0].keys() >= {"Train/psnr", "Train/ssim", "Valid/ssim"}
    assert json.loads((config.experiment_dir / "config.json").read_text())["batch_size"] == 4
    reports = [line for line in log_lines(config) if "loss/l1" in line]
    assert [line["update"] for line in reports] == [1, 2, 3, 4, 5, 6]


def test_the_averaged_weights_are_scored_and_saved(settings):
    config = settings(ema_decay=0.9)
    train.train(config, train.PixelStep)
    checkpoint = weights.read(config.experiment_dir / "last.pth.tar")
    assert not torch.equal(checkpoint["state_dict"]["conv1.weight"], checkpoint["ema_state_dict"]["conv1.weight"])
    network = weights.load(config.experiment_dir / "last.pth.tar")
    assert torch.equal(network.conv1.weight, checkpoint["ema_state_dict"]["conv1.weight"])
    images = train.open_validation(config, CPU, lambda _: None)["Valid"]
    scores = utils.evaluate(lambda lr: upscale(network, lr), images, 2, CPU)
    assert log_lines(config)[-1]["Valid/psnr"] == approx(scores["psnr"], abs=1e-6)


def test_training_learns(settings):
    config = settings(epochs=60, eval_every=120, save_every=120, log_every=20, learning_rate=3e-3)
    train.train(config, train.PixelStep)
    losses = [line["loss/l1"] for line in log_lines(config) if "loss/l1" in line]
    assert losses[-1] < 0.5 * losses[0]


# One update


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.rand(2, 3, 10, 10), torch.rand(2, 3, 20, 20)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_update_that_is_not_finite_changes_nothing(settings, precision):
    step = train.PixelStep(settings(), CPU, precision)
    step(*batch())
    before = {name: value.clone() for name, value in tensors([step.generator.state_dict(), step.optimizer.state_dict()["state"]]).items()}
    lr, gt = batch(1)
    terms = step(lr.index_fill(0, torch.tensor([0]), math.nan), gt)
    assert terms["optimizer/skipped"] == 1
    assert not torch.isfinite(terms["loss/l1"])
    after = tensors([step.generator.state_dict(), step.optimizer.state_dict()["state"]])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert step(*batch(2))["optimizer/skipped"] == 0
    assert not torch.equal(step.generator.conv1.weight, before["/0/conv1.weight"])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(settings, bad):
    """L1's gradient is the sign of the difference, which infinity has too."""
    step = train.PixelStep(settings(), CPU, "fp32")
    before = step.generator.conv1.weight.clone()
    lr, gt = batch()
    gt[0, 0, 0, 0] = bad
    assert step(lr, gt)["optimizer/skipped"] == 1
    assert torch.equal(step.generator.conv1.weight, before)


def test_a_row_of_skipped_updates_between_reports_ends_the_run_too(settings, monkeypatch):
    poison(monkeypatch, 2, 3, 4)
    config = settings(max_skipped=3, log_every=100, save_every=100, valid_sets=())
    with pytest.raises(ValueError, match="3 updates in a row were skipped"):
        train.train(config, train.PixelStep)
    assert not (config.experiment_dir / "last.pth.tar").exists()


def test_another_runs_best_is_not_this_runs(settings):
    train.train(settings(), train.PixelStep)
    other = settings(exp_name="other", resume=str(settings().experiment_dir / "last.pth.tar"), epochs=4, learning_rate=1e-3)
    assert train.train(other, train.PixelStep)
    assert (other.experiment_dir / "best.pth.tar").exists()


def poison(monkeypatch, *updates, factor=math.nan):
    """Spoil what these updates of a sitting see, counted from 1."""
    call, calls = train.PixelStep.__call__, []

    def poisoned(self, lr, gt):
        calls.append(1)
        return call(self, lr * factor if len(calls) in updates else lr, gt)

    monkeypatch.setattr(train.PixelStep, "__call__", poisoned)


def test_a_checkpoint_of_another_version_is_refused_in_a_sentence(settings):
    config = settings(epochs=1)
    assert train.train(config, train.PixelStep)
    path = config.experiment_dir / "last.pth.tar"
    state = weights.read(path)
    state["guard"]["new"] = torch.zeros(())
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"last\.pth\.tar: its guard is not as this version writes it \(.*Unexpected key.*\); to start"):
        train.train(settings(epochs=2), train.PixelStep)
    assert path.read_bytes() == before


def test_a_skipped_update_leaves_the_whole_run_as_it_was(settings, monkeypatch):
    """Weights, Adam's moments and steps, averaged weights: bit for bit those of the update before."""
    poison(monkeypatch, 3, 4)
    config = settings(steps_per_epoch=1, epochs=4, save_every=1, keep_last=9, ema_decay=0.9, log_every=4)
    assert train.train(config, train.PixelStep)
    before, after = config.experiment_dir / "update_0000002.pth.tar", config.experiment_dir / "last.pth.tar"
    assert weights.read(after)["update"] == 4
    progress = ("/epoch", "/update", "/evaluated", "/scheduler", "/best", "/guard/in_a_row")
    found = same_checkpoints(before, after, "/meter", *progress)
    assert found == []
    (report,) = (line for line in log_lines(config) if "loss/l1" in line)
    first, second = weights.read(before)["meter"]["values"][:, 0].tolist()  # what the two good updates had
    assert report["loss/l1"] == approx((first + second) / 2, rel=1e-12)


def test_a_report_of_skipped_updates_alone_has_no_means(settings, monkeypatch):
    poison(monkeypatch, 1, 2)
    config = settings(log_every=2)
    assert train.train(config, train.PixelStep)
    reports = [line for line in log_lines(config) if "loss/l1" in line]
    assert [line["loss/l1"] is None for line in reports] == [True, False, False]
    assert [line["optimizer/skipped"] for line in reports] == [1, 0, 0]


@pytest.mark.parametrize("stop", [2, 3])
def test_what_was_skipped_before_a_stop_is_reported_after_it(settings, monkeypatch, stop):
    logs = []
    for name in ("whole", "parted"):
        config = settings(exp_name=name, log_every=5, eval_every=6)
        with monkeypatch.context() as patch:
            poison(patch, 2)
            if name == "parted":
                stop_after(patch, stop)
                assert not train.train(config, train.PixelStep)
            else:
                assert train.train(config, train.PixelStep)
        if name == "parted":
            assert train.train(config, train.PixelStep)
        logs.append(log_lines(config))
    assert logs[0] == logs[1]
    assert any(line.get("skipped") == 2 and line["not_finite"] for line in logs[0])


def test_skipped_updates_in_a_row_are_counted_across_a_stop(settings, monkeypatch):
    config = settings(max_skipped=4, log_every=2, save_every=1)
    with monkeypatch.context() as patch:
        poison(patch, 1, 2, 3)
        stop_after(patch, 3)
        assert not train.train(config, train.PixelStep)
    with monkeypatch.context() as patch:
        poison(patch, 1)
        with pytest.raises(ValueError, match="4 updates in a row were skipped"):
            train.train(config, train.PixelStep)


def test_a_spike_is_skipped_by_choice(settings, monkeypatch, capsys):
    """The 26th update's loss is some hundred times the running one."""
    poison(monkeypatch, 26, factor=1000)
    changes = {"epochs": 15, "eval_every": 30, "save_every": 1, "keep_last": 40, "log_every": 10}
    chosen, plain = settings(exp_name="chosen", skip_threshold=10.0, **changes), settings(exp_name="plain", **changes)
    assert train.train(chosen, train.PixelStep)
    said = capsys.readouterr().out
    assert "update 26 was skipped and has changed nothing, its loss far above the running one; its patches were cut from " in said
    assert said.count("was skipped") == 1
    before, after = (weights.read(chosen.experiment_dir / f"update_00000{update}.pth.tar") for update in (25, 26))
    assert all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in before["state_dict"])
    assert after["guard"]["accepted"] == 25
    monkeypatch.undo()
    poison(monkeypatch, 26, factor=1000)
    assert train.train(plain, train.PixelStep)
    assert "was skipped" not in capsys.readouterr().out


def test_the_running_loss_by_hand():
    guard = train.UpdateGuard(threshold=3.0, world_size=1)
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
    for _ in range(300):
        guard(torch.tensor(5.0), fine)
    assert (guard.in_a_row, guard.accepted) == (0, guard.LONG)
    expected = guard.running_loss.item() * 100 / 101 + 7 / 101
    guard(torch.tensor(7.0), fine)
    assert guard.running_loss.item() == approx(expected)


def test_the_log_names_the_term_and_the_images_and_stays_finite(settings, monkeypatch, capsys):
    poison(monkeypatch, 2)
    config = settings(log_every=3)
    assert train.train(config, train.PixelStep)
    said = capsys.readouterr().out
    assert "update 2 was skipped and has changed nothing, loss/l1, optimizer/gradient_norm not finite; its patches were cut from " in said
    (skip,) = (line for line in log_lines(config) if line.get("event") == "skipped")
    assert (skip["update"], skip["skipped"], skip["not_finite"]) == (3, 2, ["loss/l1", "optimizer/gradient_norm"])
    seen = dataset.TrainBatches(store_of(config), 4, 10, config.seed).names(1)
    assert skip["images"] == seen
    assert set(seen) <= {"a.png", "b.png", "c.png"}
    reports = [line for line in log_lines(config) if "loss/l1" in line]
    assert all(math.isfinite(line["loss/l1"]) for line in reports)
    assert [line["optimizer/skipped"] for line in reports] == approx([1 / 3, 0])


def store_of(config):
    sets = {"Train": dataset.find_pairs(f"{config.data_root}/Train", 2)}
    return PairStore.open_or_build(sets, 2, "BI", config.cache_dir)


def test_too_many_skipped_updates_end_the_run_and_keep_the_last_good_file(settings, monkeypatch):
    poison(monkeypatch, *range(5, 99))
    config = settings(epochs=6, max_skipped=3)
    with pytest.raises(ValueError, match=r"3 updates in a row were skipped, their loss or .* learning_rate below 0\.001"):
        train.train(config, train.PixelStep)
    assert weights.read(config.experiment_dir / "last.pth.tar")["update"] == 6


# Less memory, the same update


@pytest.mark.parametrize("changes", [{"accumulation_steps": 2}, {"accumulation_steps": 4}, {"activation_checkpointing": True}])
def test_what_saves_memory_gives_the_plain_run(settings, changes):
    plain, other = settings(exp_name="plain", epochs=10, learning_rate=1e-4), settings(epochs=10, learning_rate=1e-4, **changes)
    for config in (plain, other):
        assert train.train(config, train.PixelStep)
    first, second = (weights.read(config.experiment_dir / "last.pth.tar") for config in (plain, other))
    exact = "activation_checkpointing" in changes
    for part in ("state_dict", "ema_state_dict"):
        for name, tensor in first[part].items():
            assert second[part][name].numpy() == approx(tensor.numpy(), abs=0 if exact else 1e-6), name
    losses = [[line["loss/l1"] for line in log_lines(config) if "loss/l1" in line] for config in (plain, other)]
    assert losses[1] == approx(losses[0], rel=1e-6)


def test_activation_checkpointing_keeps_less(settings):
    """What the groups compute is not kept for backward, but computed again."""

    def kept(**changes):
        step, sizes = train.PixelStep(settings(num_rcab=6, **changes), CPU, "fp32"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
            step.upscale(batch()[0])
        return sum(sizes)

    assert kept(activation_checkpointing=True) < 0.2 * kept()


def test_parts_cut_the_largest_batch(settings):
    step, seen = train.PixelStep(settings(accumulation_steps=2), CPU, "fp32"), []
    step.generator.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    step(*batch())
    assert seen == [1, 1]


# Stopping and saving


def test_it_saves_by_time_too(settings, monkeypatch):
    clock = iter(range(0, 10**6, 25))  # each look at the clock is 25 seconds after the one before
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    config = settings(save_every=10**6, save_every_minutes=1.0, epochs=6, keep_last=99, eval_every=10**6)
    assert train.train(config, train.PixelStep)
    saved = [weights.read(path)["update"] for path in checkpoints.present(config.experiment_dir)]
    assert saved[0] == 12
    assert 4 <= len(saved) <= 7  # every second or third update
    plain = settings(exp_name="plain", save_every_minutes=0.0, save_every=10**6, epochs=6, eval_every=10**6)
    assert train.train(plain, train.PixelStep)
    assert checkpoints.present(plain.experiment_dir) == [plain.experiment_dir / name for name in ("last.pth.tar", "best.pth.tar")]
    changed = ("/config/save_every_minutes", "/config/keep_last")
    assert same_checkpoints(config.experiment_dir / "last.pth.tar", plain.experiment_dir / "last.pth.tar", *changed) == []


def test_what_is_logged_is_on_the_disk_before_the_checkpoint_that_counts_on_it(settings, monkeypatch):
    order, put, save = [], RunLog.put_on_disk, checkpoints.save_last
    monkeypatch.setattr(RunLog, "put_on_disk", lambda log: order.append("log") or put(log))
    monkeypatch.setattr(checkpoints, "save_last", lambda *given: order.append("checkpoint") or save(*given))
    assert train.train(settings(save_every=2), train.PixelStep)
    assert order == ["log", "checkpoint"] * 3


def test_what_a_killed_run_was_writing_is_removed(settings):
    config = settings()
    left = config.experiment_dir / ".last.pth.tar.99999.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert train.train(config, train.PixelStep)
    assert not left.exists()


def test_a_stop_during_an_evaluation_leaves_it_due(settings, monkeypatch):
    """It isn't waited for, and the run that goes on is the one that was never stopped."""
    whole, parted = settings(exp_name="whole"), settings(exp_name="parted")
    assert train.train(whole, train.PixelStep)
    with monkeypatch.context() as patch:
        enlarge, calls = train.upscale, []

        def counted(*arguments):
            calls.append(1)
            if len(calls) == 3:  # the first picture of the second evaluation
                os.kill(os.getpid(), signal.SIGTERM)
            return enlarge(*arguments)

        patch.setattr(train, "upscale", counted)
        assert not train.train(parted, train.PixelStep)
        assert len(calls) == 3
    stopped = weights.read(parted.experiment_dir / "last.pth.tar")
    assert (stopped["update"], stopped["evaluated"]) == (4, 2)
    assert train.train(parted, train.PixelStep)
    for name in ("last.pth.tar", "best.pth.tar"):
        assert same_checkpoints(whole.experiment_dir / name, parted.experiment_dir / name) == []
    assert log_lines(whole) == log_lines(parted)


def test_a_second_training_of_one_run_is_refused(settings, monkeypatch):
    config, call = settings(), train.PixelStep.__call__
    code = f"import train, utils; from config import Config\nrun_script(lambda: train.train({config!r}, train.PixelStep))"
    ended = []

    def while_another_starts(self, lr, gt):
        if not ended:
            ended.append(subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True))
        return call(self, lr, gt)

    monkeypatch.setattr(train.PixelStep, "__call__", while_another_starts)
    assert train.train(config, train.PixelStep)
    assert ended[0].returncode == 1
    assert f"error: {config.experiment_dir}: another training is using it (process {os.getpid()} on " in ended[0].stderr
    assert not (config.experiment_dir / ".lock").exists()


def test_gradients_are_clipped(settings):
    config = settings(clip_grad_norm=0.01)
    step = train.PixelStep(config, CPU, "fp32")
    norm = step(*batch())["optimizer/gradient_norm"]
    assert norm > 0.01
    clipped = torch.cat([parameter.grad.flatten() for parameter in step.generator.parameters()]).norm()
    assert clipped.item() == approx(0.01, rel=1e-3)


def test_one_update_is_adams(settings):
    """Adam's first step moves each weight by the learning rate against its gradient's sign."""
    step = train.PixelStep(settings(), CPU, "fp32")
    before = step.generator.conv3.bias.clone()
    step(*batch())
    moved = step.generator.conv3.bias - before
    assert moved.detach().numpy() == approx((-1e-3 * step.generator.conv3.bias.grad.sign()).numpy(), rel=1e-3)


def test_bf16_trains_as_fp32_does(settings):
    final = {}
    for precision in ("fp32", "bf16"):
        config = settings(exp_name=precision, precision=precision, epochs=40, eval_every=80, save_every=80, log_every=80)
        train.train(config, train.PixelStep)
        final[precision] = log_lines(config)[-1]["Valid/psnr"]
    assert final["bf16"] == approx(final["fp32"], abs=0.3)


def test_learning_rates(settings):
    step = settings(halve_every=200, warmup_updates=0, epochs=500)
    assert [train.learning_rate_factor(step, update) for update in (0, 199, 200, 399, 400)] == [1, 1, 0.5, 0.5, 0.25]
    warm = settings(halve_every=200, warmup_updates=9)
    assert [train.learning_rate_factor(warm, update) for update in (0, 4, 9, 10)] == approx([0.1, 0.5, 1, 1])
    cosine = settings(schedule="cosine", epochs=50)  # 100 updates
    factors = [train.learning_rate_factor(cosine, update) for update in (0, 25, 50, 100)]
    assert factors == approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_memory_layout_and_compilation_change_nothing_but_rounding(settings):
    changed = [{}, {"channels_last": False}, *([{"compile": True}] if shutil.which("g++") else [])]
    losses = []
    for changes in changed:
        torch.manual_seed(1)
        step = train.PixelStep(settings(**changes), CPU, "fp32")
        losses.append([step(*batch(seed))["loss/l1"].item() for seed in range(2)])
    for other in losses[1:]:
        assert other == approx(losses[0], rel=1e-4)


# Resuming, refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, "started with other settings .batch_size was 4, is 2.: set them back, or set another exp_name"),
        ({"learning_rate": 1e-4, "seed": 3}, "seed was 0, is 3; learning_rate was 0.001, is 0.0001"),
        ({"schedule": "cosine", "epochs": 9}, "epochs was 3, is 9; schedule was 'step', is 'cosine'"),
        ({"start_epoch": 2}, "start_epoch=2, but .* stopped in epoch 3: set start_epoch=0"),
        ({"resume": "never"}, "resume='never', but .* exists: set resume='auto' to go on with it, or another exp_name"),
        ({"resume": "results/run/best.pth.tar"}, "best.pth.tar', but .* exists"),
        ({"pretrained_model_path": "w.pth"}, "pretrained_model_path was '', is 'w.pth'"),
        ({"precision": "bf16"}, "precision was 'fp32', is 'bf16'"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_listed(settings, changes, message):
    config = settings()
    train.train(config, train.PixelStep)
    before = (config.experiment_dir / "last.pth.tar").read_bytes()
    with pytest.raises(ValueError, match=message):
        train.train(settings(**changes), train.PixelStep)
    assert (config.experiment_dir / "last.pth.tar").read_bytes() == before


def test_settings_that_may_change_do(settings):
    train.train(settings(), train.PixelStep)
    changed = settings(epochs=4, num_workers=2, log_every=2, eval_every=8, precision="auto", start_epoch=3)
    assert train.train(changed, train.PixelStep)
    checkpoint = weights.read(changed.experiment_dir / "last.pth.tar")
    assert (checkpoint["update"], checkpoint["precision"]) == (8, "fp32")


def test_a_run_goes_on_from_another_file_under_another_name(settings):
    config = settings()
    train.train(config, train.PixelStep)
    last = config.experiment_dir / "last.pth.tar"
    other = settings(exp_name="other", resume=str(last), epochs=4)
    assert train.train(other, train.PixelStep)
    assert weights.read(other.experiment_dir / "last.pth.tar")["update"] == 8
    assert train.train(settings(exp_name="other", resume=str(last), epochs=5), train.PixelStep)  # the same command goes on
    assert weights.read(other.experiment_dir / "last.pth.tar")["update"] == 10
    assert weights.read(last)["update"] == 6


def test_other_training_images_are_noticed(settings, tmp_path):
    train.train(settings(), train.PixelStep)
    write_set(tmp_path / "data" / "Train", [(24, 30), (40, 26), (33, 33), (40, 40)])
    with pytest.raises(ValueError, match=r"training images have changed .*were 3 images of .*, are 4 images of"):
        train.train(settings(epochs=4), train.PixelStep)


def test_a_file_of_weights_alone_is_not_resumed_and_kept(settings):
    config = settings()
    train.train(config, train.PixelStep)
    last = config.experiment_dir / "last.pth.tar"
    weights.export(weights.load(last), last)
    before = last.read_bytes()
    with pytest.raises(ValueError, match=r"can't be resumed, lacking ema_state_dict, optimizer, .*set pretrained_model_path"):
        train.train(config, train.PixelStep)
    assert last.read_bytes() == before


@pytest.mark.parametrize(("harm", "update"), [("cut", 5), ("flipped", 5), ("empty", 5), ("gone", 5), ("last two", 4)])
def test_the_newest_whole_checkpoint_is_gone_on_from(settings, monkeypatch, capsys, harm, update):
    whole, config = settings(exp_name="whole", save_every=1), settings(save_every=1)  # evaluated, and so perhaps best, after 2, 4 and 6
    train.train(whole, train.PixelStep)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train.train(config, train.PixelStep)
    last, before = config.experiment_dir / "last.pth.tar", config.experiment_dir / "update_0000005.pth.tar"
    spoil(last, harm)
    if harm == "last two":
        spoil(before, harm)
    damaged = last.read_bytes() if last.exists() else None
    capsys.readouterr()
    assert train.train(config, train.PixelStep)
    said = capsys.readouterr().out
    assert f"an older checkpoint is taken instead\ngoing on from {config.experiment_dir}" in said
    assert f": update {update}, epoch {update // 2}" in said
    assert same_checkpoints(whole.experiment_dir / "last.pth.tar", last) == []
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
        path.write_bytes(data[: {"empty": 0}.get(harm, 1000)])


def test_a_run_without_a_whole_checkpoint_is_refused_and_kept(settings):
    config = settings()
    train.train(config, train.PixelStep)
    for path in config.experiment_dir.glob("*.pth.tar"):
        spoil(path, "cut")
    before = {path: path.read_bytes() for path in config.experiment_dir.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"last\.pth\.tar: not a file .*, and no other checkpoint in .* can either; bring a copy back"):
        train.train(config, train.PixelStep)
    assert {path: path.read_bytes() for path in config.experiment_dir.iterdir() if path.is_file()} == before


def test_nothing_to_resume(settings):
    with pytest.raises(ValueError, match=r"start_epoch=2, but there is no .*last.pth.tar to go on from: set start_epoch=0"):
        train.train(settings(start_epoch=2), train.PixelStep)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth: no such weights"):
        train.train(settings(resume="gone.pth"), train.PixelStep)


# Before the loop


def test_the_preflight_says_what_will_be_used(settings, capsys, tmp_path):
    train.train(settings(), train.PixelStep)
    said = capsys.readouterr().out
    assert f"valid Valid: 2 images in {tmp_path / 'data' / 'Valid' / 'GT'}, LR made exactly from the originals\n    a.png, b.png\n" in said
    assert f"train Train: 3 images in {tmp_path / 'data' / 'Train' / 'GT'}" in said
    assert "batch_size=4" in said
    assert "commit " in said


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_sets": ("Gone",)}, FileNotFoundError, "Gone: no such folder; put the originals into .*GT"),
        ({"valid_sets": ("Gone",)}, FileNotFoundError, "Gone: no such folder"),
        ({"lr_patch_size": 13}, ValueError, r"a\.png: 30x24 is smaller than a GT patch of 26, as are 1 of 3 images"),
        ({"pretrained_model_path": "gone.pth"}, FileNotFoundError, r"gone\.pth: no such weights"),
        ({"channels": 3}, ValueError, "channels=3, reduction=4.*reduction at most channels"),
        ({"train_sets": ()}, ValueError, "train_sets is empty"),
    ],
)
def test_what_cannot_start_leaves_nothing(settings, tmp_path, changes, error, message):
    config = settings(**changes)
    with pytest.raises(error, match=message):
        train.train(config, train.PixelStep)
    assert not config.experiment_dir.exists()
    assert not (tmp_path / "cache").exists()


def test_a_run_without_validation_keeps_its_last_weights(settings):
    config = settings(valid_sets=())
    assert train.train(config, train.PixelStep)
    assert (config.experiment_dir / "last.pth.tar").is_file()
    assert not (config.experiment_dir / "best.pth.tar").exists()


def test_a_warm_start_says_what_was_taken(settings, tmp_path, capsys):
    weights.export(tiny(4), tmp_path / "x4.pth")
    train.train(settings(pretrained_model_path=str(tmp_path / "x4.pth"), epochs=1, learning_rate=1e-12), train.PixelStep)
    assert "x4.pth, native layout, [0, 1] inside, weights as trained (x4): " in capsys.readouterr().out
    found = weights.load(settings().experiment_dir / "last.pth.tar")
    assert found.conv2.weight.detach().numpy() == approx(tiny(4).conv2.weight.detach().numpy(), abs=1e-6)


def test_every_part_that_has_a_state_is_in_the_checkpoint(settings):
    train.train(settings(), train.PixelStep)
    step = train.PixelStep(settings(), CPU, "fp32")
    assert step.parts().keys() == {"state_dict", "optimizer", "scheduler", "scaler", "guard"}
    assert weights.read(settings().experiment_dir / "last.pth.tar").keys() >= step.parts().keys()
    owned = {name for name, value in vars(step).items() if hasattr(value, "state_dict")} - {"forward", "criterion"}
    assert {id(getattr(step, name)) for name in owned} == {id(part) for part in step.parts().values()}
