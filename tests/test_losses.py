"""The terms by hand, and VGG19 against torchvision's.

VGG19 has random weights here, always the same ones: nothing in these tests depends on what it has learned.
"""

import copy
import math

import pytest
import torch
from pytest import approx
from torch import nn
from torch.nn import functional
from torchvision.models import vgg19

import losses
import weights

LAYERS = {"conv1_2": 0.5, "relu1_1": 2.0, "relu2_2": 0.25, "conv3_4": 1.0, "relu4_1": 0.125, "conv5_1": 3.0, "conv5_4": 0.75}
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # torchvision's, of VGG19
LN2 = math.log(2)
VGG19 = weights.read_vgg19("random")
SHALLOW = {"vgg19": VGG19, "perceptual_layers": {"conv1_1": 1.0}}


def images(size=16, count=2, seed=0):
    """sr and gt, which differ by noise of up to 0.1."""
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(count, 3, size, size, generator=generator)
    return (gt + 0.2 * torch.rand(gt.shape, generator=generator) - 0.1).clamp(0, 1), gt


def logits(*values):
    return torch.tensor(values).view(-1, 1)


@pytest.fixture(scope="module")
def published():
    """The output of each layer of torchvision's network for normalised images, by names found by walking through it."""
    with torch.device("meta"):
        network = vgg19(weights=None).features
    network.load_state_dict({name.removeprefix("features."): tensor for name, tensor in VGG19.items()}, assign=True)

    @torch.no_grad()
    def outputs(x):
        x, found, block, number = (x - MEAN) / STD, {}, 1, 0
        for layer in network[:-1]:  # the last pooling needs 32 pixels
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                block, number = block + 1, 0
            else:
                number += isinstance(layer, nn.Conv2d)
                found[f"{'conv' if isinstance(layer, nn.Conv2d) else 'relu'}{block}_{number}"] = x.clone()  # ReLU works in place
        return found

    return outputs


@pytest.fixture(scope="module")
def deep():
    return losses.PerceptualLoss(VGG19, LAYERS)


# L1


def test_l1_by_hand():
    sr, gt = torch.tensor([0.5, 0.0, 1.0]).view(1, 3, 1, 1), torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1)
    assert losses.L1Loss()(sr, gt)["l1"].item() == losses.L1Loss()(gt, sr)["l1"].item() == 0.25  # (0.25 + 0.5 + 0) / 3
    sr, gt = (x.bfloat16() for x in images())
    value = losses.L1Loss()(sr, gt)["l1"]
    assert value.dtype == torch.float32
    assert value.item() == approx((sr.double() - gt.double()).abs().mean().item(), rel=1e-6)


def test_luma_counts_as_its_share_says():
    """Differences of 0.4, -0.2 and 0 have a mean of 0.2, and a luma of 0.299 · 0.4 - 0.587 · 0.2."""
    sr, gt = torch.tensor([0.9, 0.3, 0.5]).view(1, 3, 1, 1), torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1)
    assert losses.L1Loss(0.75)(sr, gt)["l1"].item() == approx(0.25 * 0.2 + 0.75 * abs(0.299 * 0.4 - 0.587 * 0.2), rel=1e-5)
    assert losses.CompositeLoss(2, 0, 0, luma_share=0.75)(sr, gt)["total"].item() == approx(2 * losses.L1Loss(0.75)(sr, gt)["l1"].item())


def test_equal_images_cost_nothing(deep):
    _, gt = images()
    assert losses.L1Loss()(gt, gt)["l1"].item() == 0
    assert deep(gt, gt)["perceptual"].item() == 0


@pytest.mark.parametrize("shape", [(2, 3, 32, 31), (1, 3, 32, 32), (2, 1, 32, 32)])
def test_images_of_different_shape_are_refused_instead_of_broadcast(deep, shape):
    for criterion in (losses.L1Loss(), deep, losses.CompositeLoss(1, 0, 0)):
        with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
            criterion(torch.zeros(2, 3, 32, 32), torch.zeros(shape))


# Perceptual


def test_features_are_torchvisions_for_normalised_images(published, deep):
    _, gt = images()
    expected = published(gt)
    assert list(expected) == list(losses.VGG19_LAYERS)
    with torch.no_grad():
        found = deep.features(gt)
    assert found.keys() == LAYERS.keys()
    for name, features in found.items():
        assert (features - expected[name]).abs().max() < 1e-4 * expected[name].abs().max()
        assert (features.min() < 0) == name.startswith("conv")  # before its activation; relu… after


@pytest.mark.parametrize("layers", [LAYERS, None])
def test_the_perceptual_loss_is_the_weighted_sum_over_layers(published, layers):
    loss, (sr, gt) = losses.PerceptualLoss(VGG19, layers), images()
    of_sr, of_gt = published(sr), published(gt)
    chosen = layers or {"conv5_4": 1.0}  # ESRGAN's
    expected = sum(weight * (of_sr[name] - of_gt[name]).abs().mean().item() for name, weight in chosen.items())
    assert loss(sr, gt)["perceptual"].item() == approx(expected, rel=1e-4)
    assert loss(gt, sr)["perceptual"].item() == approx(expected, rel=1e-4)


@pytest.mark.parametrize(("layer", "value"), [("conv1_1", 0.6), ("relu1_1", 0.2)])
def test_the_perceptual_loss_by_hand(layer, value):
    """A first layer that copies normalised red, for reds at +0.2 and -0.4 standard deviations."""
    state = {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    state["features.0.weight"][:, 0, 1, 1] = 1
    state = {name: nn.Parameter(tensor) for name, tensor in state.items()}  # which are frozen all the same
    sr, gt = (
        torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 4, 4) for rgb in ((0.485 + 0.2 * 0.229, 0.1, 0.2), (0.485 - 0.4 * 0.229, 0.8, 0.9))
    )
    found = losses.PerceptualLoss(state, {layer: 1.0})(sr, gt)["perceptual"]
    assert found.item() == approx(value, abs=1e-6)
    assert not found.requires_grad


def test_the_deepest_layer_needs_16_pixels(deep):
    sr, gt = images(size=16)
    assert deep.features(gt)["conv5_4"].shape == (2, 512, 1, 1)
    with pytest.raises(ValueError, match="15x16"):
        deep(sr[..., :15], gt[..., :15])
    assert losses.PerceptualLoss(VGG19, {"conv3_1": 1.0})(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))["perceptual"] > 0
    with pytest.raises(ValueError, match="9x3"):
        losses.PerceptualLoss(VGG19, {"conv3_1": 1.0})(torch.zeros(1, 3, 3, 9), torch.zeros(1, 3, 3, 9))


def test_the_gradient_is_the_slope_and_reaches_sr_alone(deep):
    sr, gt = (x.requires_grad_() for x in images())
    deep(sr, gt)["perceptual"].backward()
    assert gt.grad is None
    assert (sr.grad != 0).float().mean() > 0.99
    assert not any(tensor.requires_grad for tensor in VGG19.values())
    step = 1e-3 * sr.grad.sign()
    with torch.no_grad():
        rise = deep(sr + step, gt)["perceptual"] - deep(sr - step, gt)["perceptual"]
    assert rise.item() == approx(2 * (sr.grad * step).sum().item(), rel=0.05)


def test_vgg19_is_no_part_of_the_module():
    loss, (sr, gt) = losses.CompositeLoss(0, 1, 0, **SHALLOW), images()
    expected = loss(sr, gt)["total"].item()
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == list(loss.buffers()) == []
    for module in (loss.train().bfloat16(), copy.deepcopy(loss).half()):  # what a training does to its modules
        assert module(sr, gt)["total"].item() == expected


def test_features_stay_in_fp32_under_autocast(deep):
    sr, gt = images()
    exact = deep(sr, gt)["perceptual"]
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv2d(gt, torch.ones(1, 3, 1, 1)).dtype == torch.bfloat16
        assert {features.dtype for features in deep.features(gt).values()} == {torch.float32}
        assert deep(sr, gt)["perceptual"].item() == approx(exact.item(), rel=1e-5)  # bf16 would be off by 1e-3
    rounded = sr.bfloat16()
    assert deep(rounded, gt)["perceptual"].item() == approx(deep(rounded.float(), gt)["perceptual"].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda sr, gt: (sr, gt * 255), r"gt .*\[0, 255\]"),
        (lambda sr, gt: (sr, gt * 2 - 1), r"gt .*\[-1, 1\]"),
        (lambda sr, gt: (sr * 255, gt), r"sr .*\[0, 255\]"),
        (lambda sr, gt: (sr * 40 - 20, gt), r"sr .*\[-20, 20\]"),
    ],
    ids=["gt to 255", "gt from -1", "sr to 255", "sr far out"],
)
def test_another_range_is_refused_until_a_call_was_right(change, named):
    loss, ramp = losses.PerceptualLoss(VGG19, {"conv1_1": 1.0}), torch.linspace(0, 1, 48).view(1, 3, 4, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=named):
            loss(*change(ramp, ramp))
    assert loss(ramp * 1.2 - 0.1, ramp)["perceptual"].item() > 0  # an untrained network may overshoot


@pytest.mark.parametrize(("layers", "named"), [({"conv9_9": 1}, "conv9_9"), ({"conv1_1": 1, "pool1": 1}, "pool1"), ({}, "layers")])
def test_unknown_layers_are_answered_with_the_known(layers, named):
    for refused in (lambda: losses.PerceptualLoss(VGG19, layers), lambda: losses.check_layers(layers)):
        with pytest.raises(ValueError, match=f"{named}.*conv1_1, relu1_1, .*conv5_4, relu5_4"):
            refused()


@pytest.mark.parametrize("weight", [-1.0, 0.0, math.inf])
def test_impossible_weights_of_layers_are_refused(weight):
    with pytest.raises(ValueError, match=f"conv1_1.*{weight}"):
        losses.PerceptualLoss(VGG19, {"conv1_1": weight})


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
    """Both halves pull sr's logits up, also by their mean: the slope of softplus is the sigmoid."""
    sr, gt = logits(0.5, -1.5).requires_grad_(), logits(2.0, 3.0).requires_grad_()
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2.0, 4.0, 2.5, 3.5)]
    losses.AdversarialLoss().generator(sr, gt)["adversarial"].backward()
    through_the_mean = (sigmoid[2] + sigmoid[3]) / 2
    assert gt.grad is None  # the generator doesn't move gt's logits
    assert sr.grad.flatten().tolist() == approx([-(sigmoid[0] + through_the_mean) / 4, -(sigmoid[1] + through_the_mean) / 4])
    sr.grad = None
    losses.AdversarialLoss().discriminator(sr, gt)["discriminator"].backward()
    assert (sr.grad > 0).all()
    assert sr.grad.sum().item() == approx(-gt.grad.sum().item())  # shifting all logits changes nothing


def test_the_vanilla_losses_by_hand():
    sr, gt, loss = logits(0.5, -1.5), logits(2.0, 3.0), losses.AdversarialLoss("vanilla")
    on_sr, on_gt = (softplus(0.5) + softplus(-1.5)) / 2, (softplus(-2.0) + softplus(-3.0)) / 2
    assert loss.generator(sr) == {"adversarial": approx((softplus(-0.5) + softplus(1.5)) / 2)}
    assert loss.discriminator(sr, gt) == {"discriminator": approx((on_sr + on_gt) / 2)}
    assert loss.generator(sr, torch.full((2, 1), math.nan)) == loss.generator(sr)


def test_far_logits_stay_finite_and_exact():
    loss = losses.AdversarialLoss()
    assert loss.generator(logits(-1000.0), logits(1000.0))["adversarial"].item() == 2000  # softplus(x) is x out there
    assert loss.generator(logits(1000.0), logits(-1000.0))["adversarial"].item() == 0


# Composite


@pytest.mark.parametrize("kind", losses.ADVERSARIAL_KINDS)
def test_the_total_is_the_weighted_sum_of_the_terms(kind):
    (sr, gt), sr_logits, gt_logits, layers = images(), logits(0.5, -1.5), logits(2.0, 3.0), {"conv1_2": 0.5, "relu2_1": 2.0}
    loss = losses.CompositeLoss(3.0, 0.25, 0.5, vgg19=VGG19, perceptual_layers=layers, adversarial=kind)
    raw = {
        "l1": (sr - gt).abs().mean().item(),
        "perceptual": losses.PerceptualLoss(VGG19, layers)(sr, gt)["perceptual"].item(),
        "adversarial": losses.AdversarialLoss(kind).generator(sr_logits, gt_logits)["adversarial"].item(),
    }
    terms = {name: value.item() for name, value in loss(sr, gt, sr_logits, gt_logits).items()}
    assert terms == {"total": approx(3 * raw["l1"] + 0.25 * raw["perceptual"] + 0.5 * raw["adversarial"]), **approx(raw).expected}


def test_the_default_weights_are_the_documented_ones():
    assert losses.CompositeLoss(**SHALLOW).weights == {"l1": 1.0, "perceptual": 0.006, "adversarial": 0.001}


@pytest.mark.parametrize("only", ["l1", "perceptual", "adversarial"])
def test_a_term_of_weight_0_is_neither_built_nor_computed(only, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("of weight 0")

    terms = {
        "l1": (losses.L1Loss, "forward"),
        "perceptual": (losses.PerceptualLoss, "__init__"),
        "adversarial": (losses.AdversarialLoss, "generator"),
    }
    for name, (kind, method) in terms.items():
        if name != only:
            monkeypatch.setattr(kind, method, refuse)
    loss = losses.CompositeLoss(*(2.0 * (name == only) for name in terms), **(SHALLOW if only == "perceptual" else {}))
    found = loss(*images(), *((logits(0.5), logits(0.0)) if only == "adversarial" else ()))
    assert found.keys() == {"total", only}
    assert found["total"] == 2 * found[only] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0, 0), "l1_weight=0.0"),
        ((-1, 0, 0), "l1_weight=-1.0"),
        ((1, -0.1, 0), "perceptual_weight=-0.1"),
        ((1, 0, math.inf), "adversarial_weight=inf"),
        ((math.nan, 0, 0), "l1_weight=nan"),
        ((1, 0.006, 0), "perceptual_weight=0.006"),  # without vgg19
    ],
)
def test_impossible_weights_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        losses.CompositeLoss(*arguments)


def test_missing_logits_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="wasserstein"):
        losses.CompositeLoss(1, 0, 0, adversarial="wasserstein")
    loss = losses.CompositeLoss(1, 0, 0.001)
    with pytest.raises(ValueError, match=r"sr_logits.*adversarial_weight=0\.001"):
        loss(*images())
    with pytest.raises(ValueError, match="gt_logits"):
        loss(*images(), logits(0.0))
    assert losses.CompositeLoss(1, 0, 1, adversarial="vanilla")(*images(), logits(0.0))["adversarial"].item() == approx(LN2)


def test_the_adversarial_term_of_bf16_logits_is_in_float32():
    sr, gt = logits(0.5, -1.25).bfloat16(), logits(100.0, 101.0).bfloat16()  # bf16 has no 100.5, which is their mean
    term = losses.CompositeLoss(1, 0, 1)(*images(), sr, gt)["adversarial"]
    assert term.item() == approx(losses.AdversarialLoss().generator(sr.float(), gt.float())["adversarial"].item())
    assert term.dtype == torch.float32
