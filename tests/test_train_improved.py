"""Improved training: who moves whom, equality with L1, resume bit for bit, several processes, and what is refused.

VGG19 has random weights here, up to a low layer: what is tested does not depend on what it has learned.
"""

import copy
import json
import math
import shutil

import pytest
import torch
from pytest import approx

import losses
import train
import train_improved
import weights
from config import Config
from config_improved import ImprovedConfig, preset
from helpers import tiny, write_set
from reports import SKIPPED
from runs import in_processes, log_lines, same_checkpoints, small_runs, stop_after, tensors
from runtime import Runtime
from train_improved import AdversarialStep, Balance

CPU = Runtime(torch.device("cpu"))
COMPOSITE = {
    "model_arch_name": "rcan_cbam_x2", "use_composite_loss": True, "vgg19_weights_path": "random", "perceptual_layers": ("conv2_1",),
    "perceptual_weight": 0.1, "adversarial_weight": 0.01, "discriminator_channels": 4, "discriminator_learning_rate": 1e-3,
    "lr_patch_size": 16, "best_metric": "newest",
}  # fmt: skip
trains = pytest.mark.slow


@pytest.fixture
def settings(tmp_path):
    make = small_runs(ImprovedConfig, tmp_path)
    write_set(tmp_path / "data" / "Train", [(48, 60), (40, 36), (33, 33)])
    return lambda **changes: make(**{**COMPOSITE, **changes})


def batch(seed=0, size=16, scale=2, count=2):
    generator = torch.Generator().manual_seed(seed)
    lr = torch.rand(count, 3, size, size, generator=generator)
    return lr, torch.rand(count, 3, scale * size, scale * size, generator=generator)


def state(step):
    """Every number that a step would save, as copies."""
    return copy.deepcopy(tensors({name: part.state_dict() for name, part in step.parts().items()}))


def moved(before, after):
    """The parts of which a number has changed, or is new."""

    def same(name):
        one, other = before.get(name), after.get(name)
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return torch.equal(one, other) if both else one is other or one == other

    return {name.split("/")[1] for name in before.keys() | after.keys() if not same(name)}


def run(config):
    assert train.train(config, AdversarialStep)
    return config


# Who moves whom


@pytest.mark.parametrize("term", ["l1", "perceptual", "adversarial"])
def test_each_term_alone_trains_the_generator(settings, term):
    only = {name: float(name == f"{term}_weight") for name in ("l1_weight", "perceptual_weight", "adversarial_weight")}
    step = AdversarialStep(settings(**only), CPU, "fp32")
    before = state(step)
    terms = step(*batch())
    assert {name for name in terms if name.startswith(("loss/", "weighted/"))} == {"loss/total", f"loss/{term}", f"weighted/{term}"}
    assert terms["loss/total"] == terms[f"loss/{term}"]
    expected = {"state_dict", "optimizer", "scheduler"}
    own = {"discriminator_state_dict", "discriminator_optimizer", "discriminator_scheduler"}
    assert moved(before, state(step)) - {"balance"} == (expected | own if term == "adversarial" else expected)


@pytest.mark.parametrize("adversarial", losses.ADVERSARIAL_KINDS)
@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2}, {"channels_last": False}, {"activation_checkpointing": True}])
def test_both_gradients_are_those_of_networks_that_stand_still(settings, adversarial, changes):
    """Each loss reaches its own network alone, with the discriminator normalised over the whole batch; all in float64."""
    lr, gt = (tensor.double() for tensor in batch(count=4))
    step = AdversarialStep(settings(adversarial_loss=adversarial, clip_grad_norm=0.0, **changes), CPU, "fp32")
    step.generator.double()
    step.discriminator.double()
    generator, discriminator = copy.deepcopy(step.generator), copy.deepcopy(step.discriminator)
    step(lr, gt)

    sr = generator(lr)
    terms = step.criterion(sr, gt, discriminator(sr), discriminator(gt).detach())
    found = torch.autograd.grad(terms["total"], list(generator.parameters()))
    loss = step.criterion.adversarial.discriminator(discriminator(sr.detach()), discriminator(gt))["discriminator"]
    judged = torch.autograd.grad(loss, list(discriminator.parameters()))
    for network, gradients in ((step.generator, found), (step.discriminator, judged)):
        for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
            size = gradient.abs().max().item()  # losses and VGG19 compute in float32
            assert parameter.grad.numpy() == approx(gradient.numpy(), rel=1e-4, abs=1e-4 * size + 1e-9), name


def test_the_terms_that_are_logged_add_up(settings):
    step = AdversarialStep(settings(), CPU, "fp32")
    lr, gt = batch()
    generator, discriminator = copy.deepcopy(step.generator), copy.deepcopy(step.discriminator)
    terms = {name: value.item() for name, value in step(lr, gt).items()}
    assert terms["weighted/l1"] == approx(terms["loss/l1"])
    assert terms["weighted/perceptual"] == approx(0.1 * terms["loss/perceptual"])
    assert terms["weighted/adversarial"] == approx(0.01 * terms["loss/adversarial"])
    assert terms["loss/total"] == approx(sum(value for name, value in terms.items() if name.startswith("weighted/")))
    with torch.no_grad():
        sr = generator(lr)
        gt_logits, sr_logits = discriminator(gt), discriminator(sr)
    assert terms["loss/l1"] == approx((sr - gt).abs().mean().item())
    assert (terms["discriminator/gt"], terms["discriminator/sr"]) == approx((gt_logits.mean().item(), sr_logits.mean().item()), abs=1e-4)
    right = [*(gt_logits > sr_logits.mean()).flatten().tolist(), *(sr_logits < gt_logits.mean()).flatten().tolist()]
    assert terms["discriminator/accuracy"] == approx(sum(right) / len(right))
    assert terms["optimizer/gradient_norm"] > 0
    assert terms["discriminator/gradient_norm"] > 0
    assert terms[SKIPPED] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("harm", ["generator", "discriminator"])
def test_an_update_that_is_not_finite_changes_neither_network(settings, precision, harm, monkeypatch):
    step = AdversarialStep(settings(), CPU, precision)
    step(*batch())
    before = state(step)
    lr, gt = batch(1)
    if harm == "generator":
        assert step(lr * math.nan, gt)[SKIPPED] == 1
    else:
        with monkeypatch.context() as patch:
            judge = step.criterion.adversarial.discriminator
            spoiled = lambda *logits: {"discriminator": judge(*logits)["discriminator"] * math.nan}  # noqa: E731
            patch.setattr(step.criterion.adversarial, "discriminator", spoiled)
            assert step(lr, gt)[SKIPPED] == 1
    assert moved(before, state(step)) <= {"scheduler", "discriminator_scheduler", "scaler", "guard"}
    assert step(*batch(2))[SKIPPED] == 0
    assert moved(before, state(step)) >= {"state_dict", "discriminator_state_dict", "optimizer", "discriminator_optimizer"}


@trains
def test_a_fixed_batch_falls_by_half_with_all_terms_on(settings):
    step = AdversarialStep(settings(learning_rate=3e-3), CPU, "fp32")
    gt = torch.nn.functional.interpolate(batch(size=8)[0], scale_factor=4, mode="bilinear")
    lr = torch.nn.functional.avg_pool2d(gt, 2)
    found = [{name: value.item() for name, value in step(lr, gt).items()} for _ in range(200)]
    assert found[-1]["loss/l1"] < 0.5 * found[0]["loss/l1"]
    assert found[-1]["loss/perceptual"] < found[0]["loss/perceptual"]
    assert all(math.isfinite(value) for terms in found for value in terms.values())


@pytest.mark.parametrize(("scale", "gt_size"), [(2, 24), (8, 24), (2, 32), (3, 96), (4, 128), (8, 192)])
def test_every_patch_runs_an_update_or_is_refused_before_data_is_read(settings, scale, gt_size):
    changes = {"model_arch_name": f"rcan_cbam_x{scale}", "upscale_factor": scale, "lr_patch_size": gt_size // scale, "num_rg": 1,
               "discriminator_channels": 2, "perceptual_layers": ("conv1_1",)}  # fmt: skip
    if gt_size < 32:
        with pytest.raises(ValueError, match=r"lr_patch_size=.*adversarial_weight=0\.01.* 32"):
            settings(**changes)
        return
    step = AdversarialStep(settings(**changes), CPU, "fp32")
    assert all(torch.isfinite(value) for value in step(*batch(0, gt_size // scale, scale)).values())


def test_parts_cut_the_generators_largest_batch(settings):
    step, seen = AdversarialStep(settings(accumulation_steps=2), CPU, "fp32"), []
    step.generator.register_forward_pre_hook(lambda _, arguments: seen.append((len(arguments[0]), torch.is_grad_enabled())))
    step(*batch())
    assert seen == [(1, False), (1, False), (1, True), (1, True)]


# Equality with L1


@trains
def test_zero_weights_are_an_l1_run_bit_for_bit(settings, monkeypatch):
    def never(*_):
        raise AssertionError("read for nothing")

    monkeypatch.setattr(weights, "read_vgg19", never)
    monkeypatch.setattr(weights, "find_vgg19", never)
    changes = {"perceptual_weight": 0.0, "adversarial_weight": 0.0, "best_metric": "psnr"}
    composite, plain = run(settings(exp_name="composite", **changes)), settings(exp_name="plain", **changes)
    train.train(plain, train.PixelStep)
    found = same_checkpoints(composite.experiment_dir / "last.pth.tar", plain.experiment_dir / "last.pth.tar")
    assert not [name for name in found if not name.startswith("/meter")]  # which has the terms' names
    added = ("weighted/", "loss/total")
    lines = [
        [{name: value for name, value in line.items() if not name.startswith(added)} for line in log_lines(config)]
        for config in (composite, plain)
    ]
    assert lines[0] == lines[1]


@trains
def test_without_the_composite_loss_it_is_train_py(settings, tmp_path):
    """The two commands, with the same settings, on the same network."""
    cbam = {name: getattr(ImprovedConfig, name) for name in ("attention", "initial_spatial_gate")}
    plain = small_runs(Config, tmp_path)(model_arch_name="rcan_cbam_x2", lr_patch_size=16, exp_name="plain", **cbam)
    write_set(tmp_path / "data" / "Train", [(48, 60), (40, 36), (33, 33)])
    names = ("results_dir", "data_root", "cache_dir", "train_sets", "valid_sets", "model_arch_name", "upscale_factor", "channels",
             "reduction", "num_rg", "num_rcab", "epochs", "steps_per_epoch", "batch_size", "lr_patch_size", "num_workers", "learning_rate",
             "precision", "log_every", "eval_every", "save_every", *cbam)  # fmt: skip
    values = {name: getattr(plain, name) for name in names}
    words = [f"--{name}={value}" for name, value in values.items() if not isinstance(value, tuple)]
    words += [word for name, value in values.items() if isinstance(value, tuple) for word in (f"--{name}", *value)]
    train_improved.main([*words, "--exp_name", "improved"])
    train.main([*words, "--exp_name", "plain"])
    for name in ("last.pth.tar", "best.pth.tar"):
        improved = plain.experiment_dir.with_name("improved") / name
        assert same_checkpoints(improved, plain.experiment_dir / name, "/config") == []


# Resume


@trains
@pytest.mark.parametrize(
    ("changes", "stop", "precision"),
    [({"log_every": 2}, 3, "fp32"), ({"schedule": "cosine", "num_workers": 2, "warmup_updates": 2}, 4, "bf16"), ({}, 3, "fp16")],
)
def test_six_updates_equal_three_then_resume_then_three(settings, monkeypatch, precision, changes, stop):
    changes = {**changes, "precision": precision}
    whole, parted = run(settings(exp_name="whole", **changes)), settings(exp_name="parted", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, stop, AdversarialStep)
        assert not train.train(parted, AdversarialStep)
    assert weights.read(parted.experiment_dir / "last.pth.tar")["update"] == stop
    run(parted)
    for name in ("last.pth.tar", "best.pth.tar"):
        assert same_checkpoints(whole.experiment_dir / name, parted.experiment_dir / name) == []
    assert log_lines(whole) == log_lines(parted)


@trains
def test_both_optimizers_survive_another_memory_layout(settings):
    config = run(settings())
    shutil.copytree(config.experiment_dir, config.experiment_dir.with_name("other"))
    run(settings(epochs=6))
    run(settings(epochs=6, exp_name="other", channels_last=False))
    logs = [[line for line in log_lines(settings(exp_name=name)) if "loss/l1" in line] for name in ("run", "other")]
    for one, other in zip(*logs, strict=True):
        for name in ("loss/l1", "loss/adversarial", "discriminator/loss"):
            assert other[name] == approx(one[name], rel=1e-2), (one["update"], name)


@trains
def test_what_a_run_leaves(settings):
    config = run(settings())
    step = AdversarialStep(config, CPU, "fp32")
    owned = {name for name, value in vars(step).items() if hasattr(value, "state_dict")} - {"forward", "criterion", "judge"}
    parts = {id(part) for part in step.parts().values()}
    assert {id(getattr(step, name)) for name in owned} == parts  # every part that has a state is in the checkpoint
    checkpoint = weights.read(config.experiment_dir / "last.pth.tar")
    assert checkpoint.keys() >= step.parts().keys()
    assert not [name for name in tensors(checkpoint) if "vgg" in name.lower() and "config" not in name]
    assert checkpoint["best_metric"] == "newest"
    assert weights.load(config.experiment_dir / "last.pth.tar").arguments["attention"] == "cbam_average"
    found = [line for line in log_lines(config) if "loss/l1" in line]
    wanted = {f"{kind}/{name}" for kind in ("loss", "weighted") for name in ("l1", "perceptual", "adversarial")}
    wanted |= {f"discriminator/{name}" for name in ("loss", "gt", "sr", "accuracy", "gradient_norm")}
    assert all(line.keys() >= wanted | {"loss/total", "optimizer/gradient_norm", "optimizer/learning_rate"} for line in found)
    assert len(found) == 6
    with pytest.raises(ValueError, match="vgg19_weights_path was 'random', is ''"):  # another loss
        train.train(settings(vgg19_weights_path="", epochs=4), AdversarialStep)


@trains
def test_a_run_without_the_l1_term_reports(settings):
    found = [line for line in log_lines(run(settings(l1_weight=0.0))) if "loss/total" in line]
    assert len(found) == 6
    assert not any("loss/l1" in line for line in found)


@trains
def test_a_composite_run_does_not_go_on_from_an_l1_run(settings):
    train.train(settings(use_composite_loss=False), train.PixelStep)
    with pytest.raises(ValueError, match="use_composite_loss was False, is True"):
        train.train(settings(), AdversarialStep)


@trains
def test_without_validation_the_newest_weights_are_kept(settings):
    assert weights.read(run(settings(valid_sets=())).experiment_dir / "best.pth.tar")["update"] == 6


# Starts


@trains
def test_plain_weights_start_cbam(settings, tmp_path, capsys):
    weights.export(tiny(2), tmp_path / "plain.pth")
    config = run(settings(pretrained_model_path=str(tmp_path / "plain.pth"), epochs=1, learning_rate=1e-12))
    assert "spatial_attention_layer" in capsys.readouterr().out
    found = weights.load(config.experiment_dir / "last.pth.tar")
    assert found.conv1.weight.detach().numpy() == approx(tiny(2).conv1.weight.detach().numpy(), abs=1e-6)


@trains
def test_unusual_settings_are_allowed_with_a_warning(settings, capsys):
    def said(**changes):
        train_improved.warn_of_unusual_settings(settings(**changes))
        return capsys.readouterr().err

    assert said(use_composite_loss=False) == ""
    assert said(pretrained_model_path="w.pth") == ""
    assert said().count("warning: ") == 1
    assert "--pretrained_model_path" in said()
    assert "best_metric='ssim'" in said(best_metric="ssim", pretrained_model_path="w.pth")
    run(settings(epochs=1))
    capsys.readouterr()
    assert said(epochs=2) == ""  # resumes


@trains
def test_a_dry_run_tries_the_composite_loss(settings, capsys):
    config = run(settings(dry_run=True))
    assert "GiB" in capsys.readouterr().out
    assert not config.experiment_dir.exists()


def test_vgg19_that_cannot_be_had_is_said_before_anything_is_written(settings, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    config = settings(vgg19_weights_path="")
    with pytest.raises(OSError, match=rf"no route to host.*{weights.VGG19.name}"):
        train.train(config, AdversarialStep)
    assert not config.experiment_dir.exists()
    assert not (tmp_path / "cache").exists()


def test_one_patch_a_process_is_refused(settings):
    with pytest.raises(ValueError, match=r"batch_size=2.*lr_patch_size"):
        AdversarialStep(settings(batch_size=2), Runtime(torch.device("cpu"), 0, 2), "fp32")


# The discriminator wins


def test_a_discriminator_that_wins_for_long_is_reported():
    balance, long = Balance(total_updates=10**6), 500
    zero, one = torch.zeros(()), torch.ones(())
    # from 0.5, the average passes 0.99 after the first n with 0.5 · 0.95^n < 0.01: n = 77
    for _ in range(76 + long - 1):
        balance.update(one, zero)
    assert balance.lopsided == long - 1
    assert balance.check() == []
    balance.update(one, one)  # skipped
    assert balance.lopsided == long - 1
    balance.update(one, zero)
    (text,) = balance.check()
    assert "500" in text
    balance.update(zero, zero)
    assert (balance.lopsided, balance.check()) == (0, [])


@pytest.mark.parametrize("updates", [1, 7, 60, 10**6])
def test_a_fair_discriminator_is_never_reported(updates):
    balance = Balance(total_updates=updates)
    for _ in range(10):
        balance.update(torch.tensor(0.5), torch.zeros(()))
        assert balance.check() == []


def test_the_warning_can_come_in_every_preset_with_a_discriminator():
    for name in ("perceptual", "light_perceptual"):
        assert 77 + Balance(preset(name).total_updates).long < preset(name).total_updates


@trains
def test_the_warning_is_shown_and_the_run_goes_on(settings, monkeypatch, capsys):
    monkeypatch.setattr(Balance, "check", lambda _: ["warning: the discriminator has won"])
    run(settings())
    assert "the discriminator has won" in capsys.readouterr().out


# Several processes

TOGETHER = """
import json, sys, train, train_improved
from config_improved import ImprovedConfig
from runtime import run_script
class Watched(train_improved.AdversarialStep):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        Watched.last = self
def main():
    train.train(eval(sys.argv[1]), Watched)
    networks = (Watched.last.generator, Watched.last.discriminator)
    print(json.dumps([parameter.detach().double().flatten().tolist() for network in networks for parameter in network.parameters()]))
run_script(main)
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(settings):
    first, second = (json.loads(out.splitlines()[-1]) for out in in_processes(TOGETHER, repr(settings(exp_name="two", epochs=2))))
    assert first == second
    saved = weights.read(settings(exp_name="two").experiment_dir / "last.pth.tar")
    assert saved["state_dict"]["conv1.weight"].double().flatten().tolist() == first[0]
