"""Improved training: who moves whom, equality with L1, resume bit for bit, several processes, and what is refused.

VGG19 has random weights here, up to a low layer: what is tested doesn't depend on what it has learned.
"""

import copy
import itertools
import json
import math

import pytest
import torch
from pytest import approx

import losses
import train
import train_improved
import utils
import weights
from config import Config
from config_improved import ImprovedConfig, preset
from helpers import tiny, write_set
from runs import in_processes, log_lines, same_checkpoints, small_runs, stop_after, tensors
from runtime import Runtime
from train_improved import AdversarialStep

CPU = Runtime(torch.device("cpu"))
COMPOSITE = {
    "model_arch_name": "rcan_cbam_x2", "use_composite_loss": True, "vgg19_weights_path": "random", "perceptual_layers": ("conv2_1",),
    "perceptual_weight": 0.1, "adversarial_weight": 0.01, "discriminator_channels": 4, "discriminator_learning_rate": 1e-3,
    "lr_patch_size": 16, "best_metric": "newest",
}  # fmt: skip

CBAM = {name: getattr(ImprovedConfig, name) for name in ("attention", "initial_channel_gate", "initial_spatial_gate")}


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
        return (
            torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one is other or one == other
        )

    return {name.split("/")[1] for name in before.keys() | after.keys() if not same(name)}


# Who moves whom


@pytest.mark.parametrize("adversarial", losses.ADVERSARIAL_KINDS)
def test_each_loss_reaches_exactly_its_own_network(settings, adversarial):
    step = AdversarialStep(settings(adversarial_loss=adversarial), CPU, "fp32")
    lr, gt = batch()
    sr = step.upscale(lr)
    step._generator_terms(sr, gt, step.discriminator(gt).detach())["total"].backward()
    assert all(parameter.grad is not None for parameter in step.generator.parameters())
    assert step.generator.conv1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in step.discriminator.parameters())
    step.generator.zero_grad()
    step._judge(step.upscale(lr).detach(), gt)[0].backward()
    assert all(parameter.grad is not None for parameter in step.discriminator.parameters())
    assert step.discriminator.features[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in step.generator.parameters())


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


def test_both_gradients_are_found_before_either_network_moves(settings):
    """The update of each network is the one it would do if the other stood still."""
    lr, gt = batch()
    both = AdversarialStep(settings(), CPU, "fp32")
    generator, discriminator = copy.deepcopy(both.generator), copy.deepcopy(both.discriminator)
    both(lr, gt)

    sr = generator(lr)
    terms = both.criterion(sr, gt, discriminator(sr), discriminator(gt))
    discriminator.zero_grad()
    found = torch.autograd.grad(terms["total"], list(generator.parameters()))
    loss = both.criterion.adversarial.discriminator(discriminator(sr.detach()), discriminator(gt))["discriminator"]
    judged = torch.autograd.grad(loss, list(discriminator.parameters()))
    for network, gradients in ((both.generator, found), (both.discriminator, judged)):
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        factor = min(1, 1 / norm.item())  # clip_grad_norm=1
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            assert parameter.grad.numpy() == approx(factor * gradient.numpy(), abs=1e-6)


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
    assert (terms["discriminator/gt"], terms["discriminator/sr"]) == approx((gt_logits.mean().item(), sr_logits.mean().item()), abs=1e-5)
    right = [*(gt_logits > sr_logits.mean()).flatten().tolist(), *(sr_logits < gt_logits.mean()).flatten().tolist()]
    assert terms["discriminator/accuracy"] == approx(sum(right) / len(right))
    assert terms["optimizer/gradient_norm"] > 0
    assert terms["discriminator/gradient_norm"] > 0
    assert terms["optimizer/skipped"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("harm", ["generator", "discriminator"])
def test_an_update_that_is_not_finite_changes_neither_network(settings, precision, harm, monkeypatch):
    step = AdversarialStep(settings(), CPU, precision)
    step(*batch())
    before = state(step)
    lr, gt = batch(1)
    if harm == "generator":
        assert step(lr * math.nan, gt)["optimizer/skipped"] == 1
    else:
        with monkeypatch.context() as patch:
            judge = step._judge
            patch.setattr(step, "_judge", lambda sr, gt: (judge(sr, gt)[0] * math.nan, *judge(sr, gt)[1:]))
            assert step(lr, gt)["optimizer/skipped"] == 1
    assert moved(before, state(step)) <= {"scheduler", "discriminator_scheduler", "scaler", "guard"}
    assert step(*batch(2))["optimizer/skipped"] == 0
    assert moved(before, state(step)) >= {"state_dict", "discriminator_state_dict", "optimizer", "discriminator_optimizer"}


def test_a_fixed_batch_falls_by_half_with_all_terms_on(settings):
    step = AdversarialStep(settings(learning_rate=3e-3), CPU, "fp32")
    gt = torch.nn.functional.interpolate(batch(size=8)[0], scale_factor=4, mode="bilinear")
    lr = torch.nn.functional.avg_pool2d(gt, 2)
    found = [{name: value.item() for name, value in step(lr, gt).items()} for _ in range(200)]
    assert found[-1]["loss/l1"] < 0.5 * found[0]["loss/l1"]
    assert found[-1]["loss/perceptual"] < found[0]["loss/perceptual"]
    assert all(math.isfinite(value) for terms in found for value in terms.values())


PATCHES = [(scale, gt) for scale, gt in itertools.product((2, 3, 4, 8), (24, 32, 96, 128, 144, 192, 256))]


@pytest.mark.parametrize(("scale", "gt_size"), PATCHES)
def test_every_patch_runs_an_update_or_is_refused_before_data_is_read(settings, scale, gt_size):
    changes = {"model_arch_name": f"rcan_cbam_x{scale}", "upscale_factor": scale, "lr_patch_size": gt_size // scale, "num_rg": 1,
               "discriminator_channels": 2, "perceptual_layers": ("conv1_1",)}  # fmt: skip
    if gt_size // scale * scale < 32:
        with pytest.raises(ValueError, match=r"lr_patch_size=.*adversarial_weight=0\.01 needs 32"):
            settings(**changes)
        return
    step = AdversarialStep(settings(**changes), CPU, "fp32")
    assert all(torch.isfinite(value) for value in step(*batch(0, gt_size // scale, scale)).values())


@pytest.mark.parametrize("changes", [{"accumulation_steps": 2}, {"accumulation_steps": 4}, {"activation_checkpointing": True}])
def test_what_saves_memory_gives_the_plain_run(settings, changes):
    """In parts too, the discriminator sees and normalises over the whole batch."""
    rates = {"learning_rate": 1e-4, "discriminator_learning_rate": 1e-4}
    plain, other = settings(exp_name="plain", **rates), settings(**rates, **changes)
    for config in (plain, other):
        assert train.train(config, AdversarialStep)
    first, second = (weights.read(config.experiment_dir / "last.pth.tar") for config in (plain, other))
    exact = "activation_checkpointing" in changes
    for part in ("state_dict", "ema_state_dict", "discriminator_state_dict"):
        for name, tensor in first[part].items():
            if name != "classifier.3.bias":  # which a relativistic loss doesn't see: its gradient is nothing but rounding
                assert second[part][name].numpy() == approx(tensor.numpy(), abs=0 if exact else 1e-6), name
    for alone, parted in zip(log_lines(plain), log_lines(other), strict=True):
        losses = {name: value for name, value in alone.items() if name.startswith("loss/")}
        assert {name: parted[name] for name in losses} == approx(losses, rel=1e-4)


def test_parts_cut_the_generators_largest_batch(settings):
    step, seen = AdversarialStep(settings(accumulation_steps=2), CPU, "fp32"), []
    step.generator.register_forward_pre_hook(lambda _, arguments: seen.append((len(arguments[0]), torch.is_grad_enabled())))
    step(*batch())
    assert seen == [(1, False), (1, False), (1, True), (1, True)]


# Equality with L1


def test_zero_weights_are_an_l1_run_bit_for_bit(settings, monkeypatch):
    def never(*_):
        raise AssertionError("built for nothing")

    monkeypatch.setattr(losses, "build_vgg19", never)
    monkeypatch.setattr(losses, "find_vgg19", never)
    changes = {"perceptual_weight": 0.0, "adversarial_weight": 0.0, "best_metric": "psnr"}
    composite, plain = settings(exp_name="composite", **changes), settings(exp_name="plain", **changes)
    train.train(composite, AdversarialStep)
    train.train(plain, train.PixelStep)
    found = same_checkpoints(composite.experiment_dir / "last.pth.tar", plain.experiment_dir / "last.pth.tar")
    assert not [name for name in found if not name.startswith("/meter")]  # which has the terms' names
    added = ("weighted/", "loss/total")
    lines = [
        [{name: value for name, value in line.items() if not name.startswith(added)} for line in log_lines(config)]
        for config in (composite, plain)
    ]
    assert lines[0] == lines[1]


def test_without_the_composite_loss_it_is_train_py(settings, tmp_path):
    """The two commands, with the same settings, on the same network."""
    improved = settings(use_composite_loss=False, exp_name="improved", best_metric="psnr")
    plain = small_runs(Config, tmp_path)(model_arch_name="rcan_cbam_x2", lr_patch_size=16, exp_name="plain", **CBAM)
    write_set(tmp_path / "data" / "Train", [(48, 60), (40, 36), (33, 33)])
    for config, main in ((improved, train_improved.main), (plain, train.main)):
        names = [name for name in plain.__dataclass_fields__ if getattr(plain, name) is not None and name not in ("exp_name", "mode")]
        values = {name: getattr(plain, name) for name in names if getattr(plain, name) != ()} | {"exp_name": config.exp_name}
        values.pop("model_path")
        arguments = [text for name, value in values.items() for text in (f"--{name}", *_words(value))]
        main(arguments)
    for name in ("last.pth.tar", "best.pth.tar"):
        found = same_checkpoints(improved.experiment_dir / name, plain.experiment_dir / name, "/config")
        assert found == []
    assert log_lines(improved) == log_lines(plain)


def _words(value):
    return map(str, value) if isinstance(value, tuple) else (str(value),)


# Resume


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("changes", "stop"), [({"log_every": 2}, 3), ({"schedule": "cosine", "num_workers": 2, "warmup_updates": 2}, 4)])
def test_six_updates_equal_three_then_resume_then_three(settings, monkeypatch, precision, changes, stop):
    changes = {**changes, "precision": precision}
    whole, parted = settings(exp_name="whole", **changes), settings(exp_name="parted", **changes)
    assert train.train(whole, AdversarialStep)
    with monkeypatch.context() as patch:
        stop_after(patch, stop, AdversarialStep)
        assert not train.train(parted, AdversarialStep)
    assert weights.read(parted.experiment_dir / "last.pth.tar")["update"] == stop
    assert train.train(parted, AdversarialStep)
    for name in ("last.pth.tar", "best.pth.tar"):
        assert same_checkpoints(whole.experiment_dir / name, parted.experiment_dir / name) == []
    assert log_lines(whole) == log_lines(parted)


def test_everything_that_has_a_state_is_in_the_checkpoint(settings):
    config = settings()
    train.train(config, AdversarialStep)
    step = AdversarialStep(config, CPU, "fp32")
    owned = {name for name, value in vars(step).items() if hasattr(value, "state_dict")} - {"forward", "criterion", "forward_discriminator"}
    assert {id(getattr(step, name)) for name in owned} == {id(part) for part in step.parts().values()}
    checkpoint = weights.read(config.experiment_dir / "last.pth.tar")
    assert checkpoint.keys() >= step.parts().keys()
    assert not [name for name in tensors(checkpoint) if "vgg" in name.lower() and "config" not in name]
    assert checkpoint["best_metric"] == "newest"
    assert weights.load(config.experiment_dir / "last.pth.tar").arguments["attention"] == "cbam_average"


def test_random_vgg19_is_not_swapped_for_another_in_a_run(settings):
    train.train(settings(), AdversarialStep)
    with pytest.raises(ValueError, match="vgg19_weights_path was 'random', is ''"):
        train.train(settings(vgg19_weights_path="", epochs=4), AdversarialStep)


def test_without_validation_the_newest_weights_are_kept(settings):
    train.train(settings(valid_sets=()), AdversarialStep)
    assert weights.read(settings().experiment_dir / "best.pth.tar")["update"] == 6


def test_a_composite_run_does_not_go_on_from_an_l1_run(settings):
    train.train(settings(use_composite_loss=False), train.PixelStep)
    with pytest.raises(ValueError, match="use_composite_loss was False, is True"):
        train.train(settings(), AdversarialStep)


@pytest.mark.parametrize(("metric", "best"), [("newest", 6), ("psnr", 2), ("ssim", 4)])
def test_best_is_judged_by_the_metric_that_is_named(settings, monkeypatch, metric, best):
    scores = iter([{"psnr": 30.0, "ssim": 0.5}, {"psnr": 29.0, "ssim": 0.9}, {"psnr": 28.0, "ssim": 0.6}])
    monkeypatch.setattr(utils, "evaluate", lambda *_, **__: next(scores))
    config = settings(best_metric=metric, use_composite_loss=False)
    train.train(config, train.PixelStep)
    found = weights.read(config.experiment_dir / "best.pth.tar")
    assert (found["update"], found["best_metric"]) == (best, metric)
    assert (found["best_psnr"], found["best_ssim"]) == {2: (30.0, 0.5), 4: (29.0, 0.9), 6: (28.0, 0.6)}[best]


# Starts


def test_plain_weights_start_cbam_and_what_was_kept_is_said(settings, tmp_path, capsys):
    weights.export(tiny(2), tmp_path / "plain.pth")
    config = settings(pretrained_model_path=str(tmp_path / "plain.pth"), epochs=1, learning_rate=1e-12)
    train_improved._warn_of_what_is_seldom_meant(config)
    train.train(config, AdversarialStep)
    said = capsys.readouterr()
    assert "warning: the composite loss starts" not in said.err
    assert "spatial_attention_layer" in said.out
    found = weights.load(config.experiment_dir / "last.pth.tar")
    assert found.conv1.weight.detach().numpy() == approx(tiny(2).conv1.weight.detach().numpy(), abs=1e-6)


def test_a_start_from_nothing_is_allowed_with_a_warning(settings, capsys):
    train_improved._warn_of_what_is_seldom_meant(settings(use_composite_loss=False))
    assert capsys.readouterr().err == ""
    train_improved._warn_of_what_is_seldom_meant(settings())
    said = capsys.readouterr().err
    assert "starts from random weights" in said
    assert "best_metric" not in said
    train_improved._warn_of_what_is_seldom_meant(settings(best_metric="ssim"))
    assert "best_metric='ssim' keeps the weights that the discriminator has changed least, as it lowers SSIM" in capsys.readouterr().err
    train.train(settings(epochs=1), AdversarialStep)
    capsys.readouterr()
    train_improved._warn_of_what_is_seldom_meant(settings(epochs=1))  # resumes
    assert capsys.readouterr().err == ""


def test_vgg19_that_cannot_be_had_is_said_before_anything_is_written(settings, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    config = settings(vgg19_weights_path="")
    with pytest.raises(OSError, match=r"no route to host.*vgg19-dcbb9e9d\.pth .*download\.pytorch\.org.*pretrained/"):
        train.train(config, AdversarialStep)
    assert not config.experiment_dir.exists()
    assert not (tmp_path / "cache").exists()


def test_one_patch_a_process_is_refused(settings):
    with pytest.raises(ValueError, match="batch_size=2 leaves 2 processes one patch of 32 each"):
        AdversarialStep(settings(batch_size=2), Runtime(torch.device("cpu"), 0, 2), "fp32")


# The discriminator wins


def test_a_discriminator_that_wins_for_long_is_reported():
    balance = train_improved._Balance(train_improved.LONG)
    zero, one = torch.zeros(()), torch.ones(())
    # from 0.5, the average passes 0.99 after the first n with 0.5 · 0.95^n < 0.01: n = 77
    for _ in range(76 + train_improved.LONG - 1):
        balance.update(one, zero)
    assert balance.lopsided == train_improved.LONG - 1
    assert balance.check() == []
    balance.update(one, one)  # skipped
    assert balance.lopsided == train_improved.LONG - 1
    balance.update(one, zero)
    (text,) = balance.check()
    assert f"for {train_improved.LONG} updates, the discriminator has told 100.0% of the patches apart" in text
    balance.update(zero, zero)
    assert (balance.lopsided, balance.check()) == (0, [])


def test_the_warning_can_come_in_every_preset_with_a_discriminator():
    for name in ("perceptual", "light_perceptual"):
        config = preset(name, vgg19_weights_path="random", perceptual_layers=("conv1_1",), channels=8, reduction=4, num_rg=1, num_rcab=1)
        step = AdversarialStep(config, CPU, "fp32")
        assert 77 + step.balance.long < config.total_updates


def test_the_warning_is_shown_and_the_run_goes_on(settings, monkeypatch, capsys):
    monkeypatch.setattr(train_improved._Balance, "check", lambda _: ["warning: the discriminator has won"])
    assert train.train(settings(), AdversarialStep)
    assert "update 2: warning: the discriminator has won" in capsys.readouterr().out


def test_the_log_has_every_term(settings):
    train.train(settings(), AdversarialStep)
    reports = [line for line in log_lines(settings()) if "loss/l1" in line]
    wanted = {f"{kind}/{name}" for kind in ("loss", "weighted") for name in ("l1", "perceptual", "adversarial")}
    wanted |= {f"discriminator/{name}" for name in ("loss", "gt", "sr", "accuracy", "gradient_norm")}
    assert all(line.keys() >= wanted | {"loss/total", "optimizer/gradient_norm", "optimizer/learning_rate"} for line in reports)
    assert len(reports) == 6


# Several processes

TOGETHER = """
import json, sys, train, train_improved, torch, utils
from config_improved import ImprovedConfig, preset
from runtime import Runtime, run_script
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
    start = AdversarialStep(settings(), CPU, "fp32")
    assert saved["discriminator_state_dict"].keys() == start.discriminator.state_dict().keys()
    assert saved["state_dict"]["conv1.weight"].double().flatten().tolist() == first[0]
