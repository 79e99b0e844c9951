"""The terms by hand, VGG19 against torchvision's, its file, and the discriminator against its definition.

VGG19 has random weights here, always the same ones: what is tested doesn't depend on what it has learned.
"""

import copy
import io
import math
import os
import pickle
import socket
from urllib.error import URLError

import pytest
import torch
from pytest import approx
from torch import nn
from torch.nn import functional
from torchvision.models import vgg19

import losses
import model

LAYERS = {"conv1_2": 0.5, "relu1_1": 2.0, "relu2_2": 0.25, "conv3_4": 1.0, "relu4_1": 0.125, "conv5_1": 3.0, "conv5_4": 0.75}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of torchvision's documentation of VGG19
LN2 = math.log(2)


def pictures(size=32, count=2, seed=0):
    """sr and gt, which differ by noise of up to 0.1."""
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(count, 3, size, size, generator=generator)
    return (gt + 0.2 * torch.rand(gt.shape, generator=generator) - 0.1).clamp(0, 1), gt


def flat(value, count=1, size=4):
    """Pictures of one colour."""
    return torch.tensor(value).view(1, 3, 1, 1).expand(count, 3, size, size)


def logits(*values):
    return torch.tensor(values).view(-1, 1)


def layer_indices(network):
    """Each layer's place, found by walking through torchvision's network."""
    indices, block, number = {}, 1, 0
    for index, layer in enumerate(network):
        if isinstance(layer, nn.Conv2d):
            number += 1
            indices[f"conv{block}_{number}"] = index
        elif isinstance(layer, nn.ReLU):
            indices[f"relu{block}_{number}"] = index
        else:
            block, number = block + 1, 0
    return indices


@pytest.fixture(scope="session")
def published():
    """torchvision's own features, all 37 layers, with the random weights."""
    with torch.device("meta"):
        network = vgg19(weights=None).features
    network.load_state_dict(losses.build_vgg19(len(network), "random").state_dict(), assign=True)
    return network.eval()


@pytest.fixture(scope="session")
def deep():
    return losses.PerceptualLoss(LAYERS, "random")


DOWNLOAD = torch.hub.download_url_to_file


@pytest.fixture(autouse=True)
def _no_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder of a computer without VGG19's file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_state(seed=1):
    """Weights and biases of the first two convolutions, by the names of the published file."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (64, 3, 3, 3), "0.bias": (64,), "2.weight": (64, 64, 3, 3), "2.bias": (64,)}
    return {f"features.{name}": torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def saved(state, path):
    torch.save(state, path)
    return str(path)


def features_by_hand(state, images):
    """conv1_2 from weights by their published names."""
    x = (images - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    x = functional.conv2d(x, state["features.0.weight"].float(), state["features.0.bias"].float(), padding=1).relu()
    return functional.conv2d(x, state["features.2.weight"].float(), state["features.2.bias"].float(), padding=1)


# L1


def test_l1_is_the_mean_absolute_difference():
    sr, gt = torch.tensor([0.5, 0.0, 1.0]).view(1, 3, 1, 1), torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1)
    assert losses.L1Loss()(sr, gt)["l1"].item() == 0.25  # (0.25 + 0.5 + 0) / 3
    assert losses.L1Loss()(gt, sr)["l1"].item() == 0.25


def test_l1_of_bf16_pictures_is_in_float32():
    sr, gt = (x.bfloat16() for x in pictures())
    value = losses.L1Loss()(sr, gt)["l1"]
    assert value.dtype == torch.float32
    assert value.item() == approx((sr.double() - gt.double()).abs().mean().item(), rel=1e-6)


def test_pictures_equal_to_gt_cost_nothing(deep):
    _, gt = pictures()
    assert losses.L1Loss()(gt, gt)["l1"].item() == 0
    assert deep(gt, gt)["perceptual"].item() == 0


@pytest.mark.parametrize("shape", [(2, 3, 32, 31), (1, 3, 32, 32), (2, 1, 32, 32)])
def test_pictures_of_different_shape_are_refused_instead_of_broadcast(deep, shape):
    for criterion in (losses.L1Loss(), deep, losses.CompositeLoss(1, 0, 0)):
        with pytest.raises(ValueError, match=r"sr is \(2, 3, 32, 32\), but gt \(.*\); they must be of one shape"):
            criterion(torch.zeros(2, 3, 32, 32), torch.zeros(shape))


# Perceptual


def test_the_layers_are_where_torchvision_has_them(published):
    assert layer_indices(published) == losses.VGG19_LAYERS
    assert losses.VGG19_LAYERS["conv5_4"] == 34  # ESRGAN's


@pytest.mark.parametrize("name", LAYERS)
def test_features_are_torchvisions_for_normalised_pictures(published, deep, name):
    _, gt = pictures()
    index = layer_indices(published)[name]
    with torch.no_grad():
        expected = published[: index + 1]((gt - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1))
        found = deep.features(gt)
    assert set(found) == {layer_indices(published)[layer] for layer in LAYERS}
    assert found[index].numpy() == approx(expected.numpy(), rel=1e-5, abs=1e-5)
    assert (found[index].min() < 0) == name.startswith("conv")  # before its activation; relu… after
    assert found[index].max() > 0


def test_the_perceptual_loss_is_the_weighted_sum_over_layers(published, deep):
    sr, gt = pictures()
    indices, expected = layer_indices(published), 0
    for name, weight in LAYERS.items():
        with torch.no_grad():
            of_sr, of_gt = (published[: indices[name] + 1]((x - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)) for x in (sr, gt))
        expected += weight * (of_sr - of_gt).abs().mean().item()
    assert deep(sr, gt)["perceptual"].item() == approx(expected, rel=1e-5)
    assert deep(gt, sr)["perceptual"].item() == approx(expected, rel=1e-5)


def test_without_layers_it_is_esrgans(deep, published, monkeypatch):
    built = []
    monkeypatch.setattr(losses, "build_vgg19", lambda depth, path: built.append((depth, path)) or deep._vgg19[0][:depth])
    sr, gt = pictures()
    value = losses.PerceptualLoss()(sr, gt)["perceptual"].item()
    assert built == [(35, "")]  # nothing after conv5_4 is built
    with torch.no_grad():
        of_sr, of_gt = (published[:35]((x - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)) for x in (sr, gt))
    assert value == approx((of_sr - of_gt).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("layer", "value"), [("conv1_1", 0.6), ("relu1_1", 0.2)])
def test_the_perceptual_loss_by_hand(tmp_path, layer, value):
    """A first layer that copies normalised red, for reds at +0.2 and -0.4 standard deviations."""
    state = {name: torch.zeros_like(tensor) for name, tensor in small_state().items()}
    state["features.0.weight"][:, 0, 1, 1] = 1
    loss = losses.PerceptualLoss({layer: 1.0}, saved(state, tmp_path / "red.pth"))
    sr, gt = flat((0.485 + 0.2 * 0.229, 0.1, 0.2)), flat((0.485 - 0.4 * 0.229, 0.8, 0.9))
    assert loss(sr, gt)["perceptual"].item() == approx(value, abs=1e-6)


def test_smallest_pictures_for_the_deepest_layer(deep):
    sr, gt = pictures(size=16)
    assert deep.features(gt)[34].shape == (2, 512, 1, 1)
    assert deep(sr, gt)["perceptual"].item() > 0


def test_the_gradient_reaches_sr_alone(deep):
    sr, gt = (x.requires_grad_() for x in pictures())
    deep(sr, gt)["perceptual"].backward()
    assert gt.grad is None
    assert (sr.grad != 0).float().mean() > 0.99
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in deep._vgg19[0].parameters())


def test_the_gradient_is_the_slope(deep):
    sr, gt = pictures(size=16)
    sr.requires_grad_()
    deep(sr, gt)["perceptual"].backward()
    step = 1e-3 * sr.grad.sign()
    with torch.no_grad():
        rise = deep(sr + step, gt)["perceptual"] - deep(sr - step, gt)["perceptual"]
    assert rise.item() == approx(2 * (sr.grad * step).sum().item(), rel=0.05)


@pytest.mark.parametrize("build", [losses.PerceptualLoss, lambda layers, path: losses.CompositeLoss(
    perceptual_layers=layers, vgg19_weights_path=path)])  # fmt: skip
def test_vgg19_is_no_part_of_the_module(build):
    loss = build({"conv1_1": 1.0}, "random")
    perceptual = getattr(loss, "perceptual", loss)
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == list(loss.buffers()) == []
    assert not any(isinstance(module, nn.Conv2d) for module in loss.modules())
    for module in (loss.train().bfloat16(), copy.deepcopy(loss).train()):  # what a training does to its modules
        (network,) = getattr(module, "perceptual", module)._vgg19
        assert not any(part.training for part in network.modules())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in perceptual._vgg19[0].parameters())


def test_features_stay_in_fp32_whatever_autocast_says(deep):
    sr, gt = pictures()
    exact = deep(sr, gt)["perceptual"]
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv2d(gt, torch.ones(1, 3, 1, 1)).dtype == torch.bfloat16
        inside = deep(sr, gt)["perceptual"]
        assert {found.dtype for found in deep.features(gt).values()} == {torch.float32}
    assert inside.item() == exact.item()
    assert deep(sr.bfloat16(), gt)["perceptual"].item() == approx(deep(sr.bfloat16().float(), gt)["perceptual"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sr, gt: (sr, gt * 255), r"gt lies in \[0, 255\], but the perceptual loss needs RGB in \[0, 1\]: divide by 255"),
        (lambda sr, gt: (sr, gt * 2 - 1), r"gt lies in \[-1, 1\], but the perceptual loss needs RGB in \[0, 1\]: .* or add 1 and halve"),
        (lambda sr, gt: (sr * 255, gt), r"sr lies in \[0, 255\], but the perceptual loss needs RGB in \[0, 1\]: divide by 255"),
        (lambda sr, gt: (sr * 255, gt * 255), "lies in .* needs RGB in"),
        (lambda sr, gt: (sr * 40 - 20, gt), r"sr lies in \[-20, 20\]"),
    ],
    ids=["gt to 255", "gt from -1", "sr to 255", "both to 255", "sr far out"],
)
def test_another_range_is_refused_in_the_first_call(change, message):
    loss = losses.PerceptualLoss({"conv1_1": 1.0}, "random")
    ramp = torch.linspace(0, 1, 48).view(1, 3, 4, 4)
    for _ in range(2):  # a refused call is not the first
        with pytest.raises(ValueError, match=message):
            loss(*change(ramp, ramp))


def test_an_untrained_network_may_overshoot():
    loss = losses.PerceptualLoss({"conv1_1": 1.0}, "random")
    ramp = torch.linspace(0, 1, 48).view(1, 3, 4, 4)
    assert loss(ramp * 1.2 - 0.1, ramp)["perceptual"].item() > 0


@pytest.mark.parametrize(("layers", "named"), [({"conv9_9": 1.0}, "conv9_9"), ({"conv1_1": 1.0, "pool1": 1.0}, "pool1"), ({}, "none")])
def test_unknown_layers_are_answered_with_the_known(layers, named):
    with pytest.raises(ValueError, match=f"{named}.*known are conv1_1, relu1_1, .*conv5_4, relu5_4"):
        losses.PerceptualLoss(layers, "random")
    with pytest.raises(ValueError, match=f"{named}.*known are conv1_1"):
        losses.check_layers(layers)


# Adversarial


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("kind", losses.ADVERSARIAL_KINDS)
def test_a_draw_costs_ln_2(kind):
    loss, draw = losses.AdversarialLoss(kind), torch.zeros(3, 1)
    assert loss.generator(draw, draw)["adversarial"].item() == approx(LN2)
    assert loss.discriminator(draw, draw)["discriminator"].item() == approx(LN2)


def test_the_relativistic_losses_by_hand():
    """Means: sr -0.5, gt 2.5. -log(sigmoid(x)) is softplus(-x), and -log(1 - sigmoid(x)) softplus(x)."""
    sr, gt, loss = logits(0.5, -1.5), logits(2.0, 3.0), losses.AdversarialLoss()
    generator = ((softplus(2.0) + softplus(4.0)) / 2 + (softplus(2.5) + softplus(3.5)) / 2) / 2  # sr - 2.5 shall be real, gt + 0.5 not
    discriminator = ((softplus(-2.5) + softplus(-3.5)) / 2 + (softplus(-2.0) + softplus(-4.0)) / 2) / 2
    assert loss.generator(sr, gt) == {"adversarial": approx(generator)}
    assert loss.discriminator(sr, gt) == {"discriminator": approx(discriminator)}


def test_the_relativistic_gradients_by_hand():
    """Both halves pull, the mean of sr too: softplus' slope is the sigmoid."""
    sr, gt = logits(0.5, -1.5).requires_grad_(), logits(2.0, 3.0).requires_grad_()
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2.0, 4.0, 2.5, 3.5)]
    losses.AdversarialLoss().generator(sr, gt)["adversarial"].backward()
    through_the_mean = (sigmoid[2] + sigmoid[3]) / 2
    assert sr.grad.flatten().tolist() == approx([-(sigmoid[0] + through_the_mean) / 4, -(sigmoid[1] + through_the_mean) / 4])
    sr.grad = None
    losses.AdversarialLoss().discriminator(sr, gt)["discriminator"].backward()
    assert sr.grad.sum().item() == approx(-gt.grad.sum().item())  # as a shift of all logits changes nothing


def test_the_vanilla_losses_by_hand():
    sr, gt, loss = logits(0.5, -1.5), logits(2.0, 3.0), losses.AdversarialLoss("vanilla")
    on_sr, on_gt = (softplus(0.5) + softplus(-1.5)) / 2, (softplus(-2.0) + softplus(-3.0)) / 2
    assert loss.generator(sr) == {"adversarial": approx((softplus(-0.5) + softplus(1.5)) / 2)}
    assert loss.discriminator(sr, gt) == {"discriminator": approx((on_sr + on_gt) / 2)}


def test_vanilla_does_not_look_at_gt_for_the_generator():
    loss, sr = losses.AdversarialLoss("vanilla"), logits(0.5, -1.5)
    assert loss.generator(sr, logits(9.0, -7.0)) == loss.generator(sr) == loss.generator(sr, torch.full((2, 1), math.nan))


def test_relativistic_generator_and_discriminator_are_each_other_with_swapped_roles():
    loss, one, other = losses.AdversarialLoss(), torch.randn(5, 1), 3 * torch.randn(5, 1) + 1
    assert loss.generator(one, other)["adversarial"].item() == approx(loss.discriminator(other, one)["discriminator"].item())
    assert loss.generator(one, other)["adversarial"].item() != approx(loss.discriminator(one, other)["discriminator"].item())


def test_relativistic_losses_only_see_differences():
    loss, sr, gt = losses.AdversarialLoss(), torch.randn(4, 1), torch.randn(4, 1)
    assert loss.generator(sr + 7, gt + 7)["adversarial"].item() == approx(loss.generator(sr, gt)["adversarial"].item(), rel=1e-5)
    assert loss.discriminator(sr + 7, gt + 7)["discriminator"].item() == approx(
        loss.discriminator(sr, gt)["discriminator"].item(), rel=1e-5
    )


@pytest.mark.parametrize("kind", losses.ADVERSARIAL_KINDS)
def test_each_side_pulls_the_logits_its_own_way(kind):
    loss = losses.AdversarialLoss(kind)
    sr, gt = torch.randn(4, 1, requires_grad=True), torch.randn(4, 1, requires_grad=True)
    loss.generator(sr, gt)["adversarial"].backward()
    assert gt.grad is None  # it is the discriminator's affair
    assert (sr.grad < 0).all()  # going down the slope raises sr's logits
    sr.grad = None
    loss.discriminator(sr, gt)["discriminator"].backward()
    assert (sr.grad > 0).all()
    assert (gt.grad < 0).all()


def test_far_logits_stay_finite_and_exact():
    loss = losses.AdversarialLoss()
    assert loss.generator(logits(-1000.0), logits(1000.0))["adversarial"].item() == 2000  # softplus(x) is x out there
    assert loss.generator(logits(1000.0), logits(-1000.0))["adversarial"].item() == 0


def test_unknown_kinds_and_missing_logits_are_refused():
    with pytest.raises(ValueError, match="kind='wasserstein' is unknown; known are 'relativistic', 'vanilla'"):
        losses.AdversarialLoss("wasserstein")
    with pytest.raises(ValueError, match="known are 'relativistic', 'vanilla'"):
        losses.CompositeLoss(1, 0, 0, adversarial="wasserstein")
    with pytest.raises(ValueError, match="gt_logits is missing: the relativistic loss compares"):
        losses.AdversarialLoss().generator(logits(0.0))


# Composite


@pytest.mark.parametrize("kind", losses.ADVERSARIAL_KINDS)
def test_the_total_is_the_weighted_sum_of_the_terms(kind):
    (sr, gt), sr_logits, gt_logits = pictures(), logits(0.5, -1.5), logits(2.0, 3.0)
    layers = {"conv1_2": 0.5, "relu2_1": 2.0}
    loss = losses.CompositeLoss(3.0, 0.25, 0.5, perceptual_layers=layers, vgg19_weights_path="random", adversarial=kind)
    terms = {name: value.item() for name, value in loss(sr, gt, sr_logits, gt_logits).items()}
    raw = {
        "l1": (sr - gt).abs().mean().item(),
        "perceptual": losses.PerceptualLoss(layers, "random")(sr, gt)["perceptual"].item(),
        "adversarial": losses.AdversarialLoss(kind).generator(sr_logits, gt_logits)["adversarial"].item(),
    }
    assert terms == {"total": approx(3 * raw["l1"] + 0.25 * raw["perceptual"] + 0.5 * raw["adversarial"]), **approx(raw).expected}


def test_the_default_weights_are_the_settings():
    assert losses.CompositeLoss(vgg19_weights_path="random", perceptual_layers={"conv1_1": 1}).weights == {
        "l1": 1.0, "perceptual": 0.006, "adversarial": 0.001,
    }  # fmt: skip


def test_the_totals_gradient_is_the_weighted_sum_of_the_terms_gradients():
    sr, gt = pictures(size=8)
    sr.requires_grad_()
    loss = losses.CompositeLoss(2.0, 0.5, 0.25, perceptual_layers={"conv1_1": 1.0}, vgg19_weights_path="random")
    terms = loss(sr, gt, sr.mean((1, 2, 3))[:, None], gt.mean((1, 2, 3))[:, None])
    total, l1, perceptual, adversarial = (torch.autograd.grad(terms[name], sr, retain_graph=True)[0] for name in terms)
    assert total.numpy() == approx((2 * l1 + 0.5 * perceptual + 0.25 * adversarial).numpy(), abs=1e-7)


@pytest.mark.parametrize("only", ["l1", "adversarial"])
def test_a_term_of_weight_0_is_neither_built_nor_computed(only, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("of weight 0")

    monkeypatch.setattr(losses, "build_vgg19", refuse)
    for name, method in (("l1", "L1Loss.forward"), ("perceptual", "PerceptualLoss.forward"), ("adversarial", "AdversarialLoss.generator")):
        if name != only:
            kind, function = method.split(".")
            monkeypatch.setattr(getattr(losses, kind), function, refuse)
    loss = losses.CompositeLoss(float(only == "l1"), 0, float(only == "adversarial"))
    terms = loss(*pictures(), *((logits(0.0), logits(0.0)) if only == "adversarial" else ()))
    assert terms.keys() == {"total", only}
    assert terms["total"] == terms[only]


def test_the_perceptual_term_alone():
    sr, gt = pictures()
    terms = losses.CompositeLoss(0, 2, 0, perceptual_layers={"conv1_1": 1.0}, vgg19_weights_path="random")(sr, gt)
    assert terms.keys() == {"total", "perceptual"}
    assert terms["total"].item() == approx(2 * terms["perceptual"].item())


def test_missing_logits_are_refused():
    loss = losses.CompositeLoss(1, 0, 0.001)
    with pytest.raises(ValueError, match=r"sr_logits is missing: adversarial_weight=0\.001 needs the discriminator's"):
        loss(*pictures())
    with pytest.raises(ValueError, match="gt_logits is missing"):
        loss(*pictures(), logits(0.0))
    assert losses.CompositeLoss(1, 0, 1, adversarial="vanilla")(*pictures(), logits(0.0))["adversarial"].item() == approx(LN2)


@pytest.mark.parametrize("weights", [(0, 0, 0), (-1, 0, 0), (1, -0.1, 0), (1, 0, -0.1)])
def test_negative_weights_and_none_at_all_are_refused(weights):
    shown = ", ".join(str(float(weight)) for weight in weights).replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"=\({shown}\): all must be finite, none negative, nor all 0"):
        losses.CompositeLoss(*weights, vgg19_weights_path="random", perceptual_layers={"conv1_1": 1.0})


def test_the_adversarial_term_of_bf16_logits_is_in_float32():
    sr, gt = logits(0.5, -1.25).bfloat16(), logits(100.0, 101.0).bfloat16()  # their mean, 100.5, has no bf16 beside 0.1
    term = losses.CompositeLoss(1, 0, 1)(*pictures(), sr, gt)["adversarial"]
    assert term.item() == approx(losses.AdversarialLoss().generator(sr.float(), gt.float())["adversarial"].item())
    assert term.dtype == torch.float32


# VGG19's file


def test_random_weights_are_always_the_same_and_leave_torchs_numbers_alone():
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    one = losses.build_vgg19(3, "random").state_dict()
    assert torch.equal(torch.rand(3), wanted)
    other = losses.build_vgg19(5, "random").state_dict()
    assert one.keys() <= other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert one["2.weight"].std().item() == approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # Kaiming, so that deep features don't vanish


def test_only_what_is_needed_is_built():
    assert sum(tensor.numel() for tensor in losses.build_vgg19(1, "random").parameters()) == 3 * 64 * 9 + 64
    assert len(losses.PerceptualLoss({"relu1_2": 1.0, "conv1_1": 1.0}, "random")._vgg19[0]) == 4


def test_the_given_file_then_the_folder_then_torchvisions_own(nowhere):
    here, cached = nowhere / "pretrained" / losses.VGG19_FILE, nowhere / "torch" / "hub" / "checkpoints" / losses.VGG19_FILE
    given = nowhere / "mine.pth"
    for path in (here, cached, given):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert losses.find_vgg19(str(given)) == given
    assert losses.find_vgg19().absolute() == here
    here.unlink()
    assert losses.find_vgg19() == cached


def test_the_cache_is_where_torch_hub_has_it(nowhere, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(nowhere / "elsewhere"))
    (nowhere / "elsewhere" / "checkpoints").mkdir(parents=True)
    (nowhere / "elsewhere" / "checkpoints" / losses.VGG19_FILE).touch()
    assert losses.find_vgg19() == nowhere / "elsewhere" / "checkpoints" / losses.VGG19_FILE


def test_an_absent_file_is_downloaded_into_torchvisions_cache_and_checked(nowhere, monkeypatch):
    calls = []

    def download(url, dst, hash_prefix=None, progress=True):
        calls.append((url, hash_prefix))
        with open(dst, "xb"):
            pass

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = losses.find_vgg19()
    assert path == nowhere / "torch" / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth"
    assert calls == [("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d")]
    assert losses.find_vgg19() == path  # without another download
    assert len(calls) == 1


def one_line(error):
    """The message, when it says what to do about VGG19's file."""
    message = str(error.value)
    assert "\n" not in message
    for said in ("vgg19-dcbb9e9d.pth", "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "pretrained/", "vgg19_weights_path"):
        assert said in message
    return message


@pytest.mark.parametrize("failure", [URLError("no route"), RuntimeError('invalid hash value (expected "dcbb9e9d", got "00")')])
def test_a_failed_download_says_what_to_do(nowhere, monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(OSError, match="could not be downloaded") as error:
        losses.PerceptualLoss()
    assert str(failure) in one_line(error)


def test_without_a_network_it_says_what_to_do_and_leaves_no_file(nowhere, monkeypatch):
    def blocked(*_):
        raise OSError("sockets are blocked")

    monkeypatch.setattr(torch.hub, "download_url_to_file", DOWNLOAD)
    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))])
    with pytest.raises(OSError, match="sockets are blocked") as error:
        losses.PerceptualLoss()
    one_line(error)
    assert not [path for path in nowhere.rglob("*") if path.is_file()]


def test_a_given_path_must_be_there(nowhere):
    (nowhere / "pretrained").mkdir()
    (nowhere / "pretrained" / losses.VGG19_FILE).touch()  # no stand-in for what was named
    for absent in ("absent.pth", "pretrained"):
        with pytest.raises(FileNotFoundError, match=f"vgg19_weights_path='{absent}': no such file") as error:
            losses.PerceptualLoss(weights_path=absent)
        one_line(error)


@pytest.mark.parametrize("folder", ["pretrained", "torch/hub/checkpoints"])
def test_a_damaged_file_of_the_published_name_is_refused(nowhere, folder, monkeypatch):
    path = nowhere / folder / losses.VGG19_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    for digest in (True, False):
        if not digest:
            monkeypatch.delattr(losses.hashlib, "file_digest", raising=False)  # as on Python 3.10
        with pytest.raises(ValueError, match="is damaged, as its sha256 begins with ba7816bf and not dcbb9e9d") as error:
            losses.PerceptualLoss({"conv1_2": 1.0})
        assert str(path.relative_to(nowhere)) in one_line(error)


def test_a_name_that_promises_its_sha256_is_held_to_it(tmp_path):
    state, path = small_state(), tmp_path / "mine-00000000.pth"
    with pytest.raises(ValueError, match="sha256"):
        losses.PerceptualLoss({"conv1_2": 1.0}, saved(state, path))
    digest = losses.hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    losses.PerceptualLoss({"conv1_2": 1.0}, str(path.rename(tmp_path / f"mine-{digest}.pth")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {**state, "features.2.bias": torch.zeros(65)}, "1 are absent or of another shape, first features.2.bias"),
        (lambda state: {name: value for name, value in state.items() if "weight" not in name}, "2 are absent .* first features.0.weight"),
        (lambda state: {"state_dict": state}, "4 are absent"),
        (lambda state: {**state, "features.0.weight": "a word"}, "1 are absent .* first features.0.weight"),
        (lambda state: list(state.values()), "4 are absent"),
        (lambda state: state["features.0.weight"], "4 are absent"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, spoil, message):
    with pytest.raises(ValueError, match=f"other.pth: these are not VGG19's weights, {message}") as error:
        losses.PerceptualLoss({"conv1_2": 1.0}, saved(spoil(small_state()), tmp_path / "other.pth"))
    one_line(error)


class MakesAFolder:
    """What an attacker would put into a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def plain_pickle(value):
    return pickle.dumps(value, protocol=2)  # of which torch doesn't warn


def torch_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("packed", [plain_pickle, torch_file])
def test_code_in_a_file_is_not_run(tmp_path, packed):
    path, trap = tmp_path / "evil.pth", tmp_path / "trap"
    path.write_bytes(packed({**small_state(), "extra": MakesAFolder(trap)}) if packed is torch_file else packed(MakesAFolder(trap)))
    with pytest.raises(ValueError, match=r"evil\.pth: can't be read safely as weights") as error:
        losses.PerceptualLoss({"conv1_2": 1.0}, str(path))
    one_line(error)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        torch_file(small_state())[:-100],
        torch_file(small_state())[:3000],
        b"<!DOCTYPE html><html>404</html>",
        b"",
        b"hello world",
        b"\x80\x02J\x00",
    ],
    ids=["cut at its end", "cut", "html", "empty", "text", "cut pickle"],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pth: can't be read safely as weights") as error:
        losses.PerceptualLoss({"conv1_2": 1.0}, str(tmp_path / "other.pth"))
    one_line(error)


@pytest.mark.parametrize("kind", ["features", "whole", "half", "parameters"])
def test_a_good_file_gives_the_features_of_its_weights(tmp_path, kind):
    state = small_state()
    if kind == "whole":  # the published file also has deeper layers and a classifier
        state |= {
            "features.5.weight": torch.ones(128, 64, 3, 3),
            "classifier.0.weight": torch.ones(2, 2),
            "classifier.0.bias": torch.ones(2),
        }
    elif kind == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
    elif kind == "parameters":
        state = {name: nn.Parameter(tensor) for name, tensor in state.items()}
    loss = losses.PerceptualLoss({"conv1_2": 1.0}, saved(state, tmp_path / "good.pth"))
    sr, gt = pictures()
    with torch.no_grad():
        of_sr, of_gt = features_by_hand(state, sr), features_by_hand(state, gt)
        found = loss.features(gt)[2]
    assert found.dtype == torch.float32
    assert found.numpy() == approx(of_gt.numpy(), abs=1e-5)
    assert loss(sr, gt)["perceptual"].item() == approx((of_sr - of_gt).abs().mean().item(), rel=1e-5)
    assert not any(parameter.requires_grad for parameter in loss._vgg19[0].parameters())


def test_the_published_name_is_read_where_its_sha256_fits(nowhere, monkeypatch):
    """With another promise, as the real file isn't here."""
    (nowhere / "pretrained").mkdir()
    path, state = nowhere / "pretrained" / "good.pth", small_state()
    saved(state, path)
    name = f"vgg19-{losses.hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    path.rename(path.with_name(name))
    monkeypatch.setattr(losses, "VGG19_FILE", name)
    _, gt = pictures()
    found = losses.PerceptualLoss({"conv1_2": 1.0}).features(gt)[2]
    assert found.numpy() == approx(features_by_hand(state, gt).numpy(), abs=1e-5)


# Discriminator (of model.py)


def discriminator(channels=4, seed=0):
    """With normalisations that matter: scale and shift differ from neutral."""
    torch.manual_seed(seed)
    network = model.Discriminator(channels)
    for layer in network.features:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return network


def averaged_to_4x4(x):
    """Each of 4x4 averages everything that its sixteenth of the area touches."""
    height, width = x.shape[2:]
    bins = [[(size * i // 4, -(-size * (i + 1) // 4)) for i in range(4)] for size in (height, width)]
    return torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in bins[1]], 2) for a, b in bins[0]], 2)  # (N, C, 4, 4)


def discriminator_by_definition(state, x):
    """ESRGAN's network as its released code has it, from the weights by name."""
    x = functional.leaky_relu(functional.conv2d(x - 0.5, state["features.0.weight"], state["features.0.bias"], padding=1), 0.2)
    for number in range(9):
        conv, norm = f"features.{2 + 3 * number}.weight", f"features.{3 + 3 * number}."
        x = functional.conv2d(x, state[conv], stride=1 if number % 2 else 2, padding=1)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = functional.leaky_relu(x * state[norm + "weight"].view(-1, 1, 1) + state[norm + "bias"].view(-1, 1, 1), 0.2)
    x = averaged_to_4x4(x).flatten(1)
    x = functional.leaky_relu(x @ state["classifier.1.weight"].T + state["classifier.1.bias"], 0.2)
    return x @ state["classifier.3.weight"].T + state["classifier.3.bias"]


@pytest.mark.parametrize("size", [(128, 128), (96, 96), (192, 96), (47, 200)])
def test_the_discriminator_equals_its_definition(size):
    network = discriminator()
    network.features.double()  # the last two layers are in float32 whatever comes
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        found, expected = network(x), discriminator_by_definition(state, x)
        x[1] = x[1].flip(0)
        other = discriminator_by_definition(state, x)
    assert found.numpy() == approx(expected.numpy(), abs=1e-6)
    assert abs(other - expected).max() > 1e-3  # so that the tolerance means something


def test_patches_of_128_are_not_averaged():
    assert model.Discriminator(4).features(torch.rand(1, 3, 128, 128)).shape == (1, 32, 4, 4)
    x = torch.rand(2, 8, 4, 4)
    assert averaged_to_4x4(x).numpy() == approx(x.numpy())


@pytest.mark.parametrize("size", [32, 33, 47, 64, 96, 100, 128, 144, 192, 256, 384])
def test_any_gt_patch_fits(size):
    with torch.no_grad():
        found = discriminator()(torch.rand(2, 3, size, size))
    assert (found.shape, found.dtype) == ((2, 1), torch.float32)
    assert found.isfinite().all()
    assert found[0] != found[1]


@pytest.mark.parametrize("shape", [(2, 3, 31, 31), (2, 3, 31, 64), (4, 3, 64, 16), (1, 3, 32, 32), (1, 3, 63, 63), (1, 3, 47, 33)])
def test_too_small_pictures_are_refused_with_the_remedy(shape):
    count, _, height, width = shape
    said = rf"{count} picture\(s\) of {width}x{height} are too small .* at least 32, or 64 for a single picture"
    with pytest.raises(ValueError, match=said):
        discriminator()(torch.rand(shape))


def test_a_single_picture_fits_where_its_last_feature_maps_have_two_pixels():
    for shape in ((1, 3, 64, 64), (1, 3, 32, 64)):
        with torch.no_grad():
            assert discriminator()(torch.rand(shape)).isfinite().all()


def test_the_discriminator_has_esrgans_layers():
    with torch.device("meta"):
        network = model.Discriminator()
    convolutions = [layer for layer in network.features if isinstance(layer, nn.Conv2d)]
    shapes = [(layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0]) for layer in convolutions]
    assert shapes == [
        (3, 64, 3, 1, 1), (64, 64, 4, 2, 1), (64, 128, 3, 1, 1), (128, 128, 4, 2, 1), (128, 256, 3, 1, 1), (256, 256, 4, 2, 1),
        (256, 512, 3, 1, 1), (512, 512, 4, 2, 1), (512, 512, 3, 1, 1), (512, 512, 4, 2, 1),
    ]  # fmt: skip
    assert [layer.bias is not None for layer in convolutions] == [True] + 9 * [False]  # a normalisation would undo it
    kinds = [type(layer) for layer in network.features]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, *9 * [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]]
    assert {layer.negative_slope for layer in network.modules() if isinstance(layer, nn.LeakyReLU)} == {0.2}
    assert sum(parameter.numel() for parameter in network.parameters()) == 14_499_401  # also of Discriminator_VGG_128


def test_the_discriminator_has_no_buffers_and_eval_changes_nothing():
    network, x = discriminator(), torch.rand(3, 3, 64, 64)
    assert list(network.buffers()) == []
    assert network.state_dict().keys() == dict(network.named_parameters()).keys()
    with torch.no_grad():
        once = network.train()(x)
        assert torch.equal(network.eval()(x), once)
        assert torch.equal(network.train()(x), once)
        assert torch.equal(discriminator()(x), once)  # and nothing is remembered of what was seen


def test_the_discriminator_leaves_pictures_alone():
    x = torch.rand(2, 3, 64, 64)
    before = x.clone()
    discriminator()(x).sum().backward()
    assert torch.equal(x, before)


def test_logits_are_float32_under_autocast():
    network, x = discriminator(), torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the last layers weren't rounded
    assert 0 < abs(rounded - exact).max() < 0.05


def test_the_gradient_reaches_the_whole_discriminator_and_the_picture():
    network, x = discriminator(), torch.rand(2, 3, 64, 64, requires_grad=True)
    network(x)[0].sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert x.grad[0].abs().sum() > 0


def test_the_discriminator_learns_to_tell_pictures_apart():
    network, adversarial = discriminator(), losses.AdversarialLoss()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    gt = torch.rand(4, 3, 32, 32)
    sr = functional.avg_pool2d(gt, 3, 1, 1)  # blurred
    for _ in range(20):
        optimizer.zero_grad()
        loss = adversarial.discriminator(network(sr), network(gt))["discriminator"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * LN2


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        model.Discriminator(0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: losses.CompositeLoss(float("nan"), 0, 0), "all must be finite"),
        (lambda: losses.CompositeLoss(1, 0, float("inf")), "all must be finite"),
        (lambda: losses.PerceptualLoss({"conv1_1": -1.0}, "random"), "every weight must be positive and finite"),
        (lambda: losses.PerceptualLoss({"conv1_1": 0.0}, "random"), "every weight must be positive and finite"),
        (
            lambda: losses.PerceptualLoss({"conv3_1": 1.0}, "random")(torch.rand(1, 3, 3, 9), torch.rand(1, 3, 3, 9)),
            "9x3 are too small .* 4 is",
        ),
    ],
)
def test_weights_and_sides_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_smallest_picture_that_fits_has_features():
    loss = losses.PerceptualLoss({"conv3_1": 1.0}, "random")
    assert loss(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))["perceptual"] > 0


def test_a_discriminator_in_double_precision_stays_close():
    torch.manual_seed(0)
    network, x = model.Discriminator(4), torch.rand(2, 3, 40, 32)
    assert network(x).detach().numpy() == approx(network.double()(x.double()).detach().numpy(), abs=1e-4)
