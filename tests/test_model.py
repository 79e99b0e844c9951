"""The network: equal to its definition, its names, its sizes, and what it refuses."""

import shutil
from typing import get_args

import pytest
import torch
from pytest import approx
from torch.nn import functional

import config
import model
from helpers import TINY, tiny

SCALES = (2, 3, 4, 8)
ATTENTIONS = ("channel", "cbam", "cbam_average")


def parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def by_definition(state, x, upscale_factor):
    """RCAN as the paper draws it, from the weights by name."""

    def conv(name, x, padding=1):
        return functional.conv2d(x, state[name + ".weight"], state[name + ".bias"], padding=padding)

    def attention(name, x):
        def perceptron(pooled):
            return conv(name + ".channel_attention_layer.3", conv(name + ".channel_attention_layer.1", pooled, 0).relu(), 0)

        spatial = name + ".spatial_attention_layer.0"
        gates = perceptron(x.mean((2, 3), keepdim=True))
        if spatial + ".weight" not in state:
            return x * gates.sigmoid()
        maxima = 0 if "cbam_average" in state else perceptron(x.flatten(2).max(2).values[..., None, None])
        x = x * (gates + maxima).sigmoid()
        return x * conv(spatial, torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True).values), 1), 3).sigmoid()

    mean = state["mean"]
    x = shallow = conv("conv1", x - mean)
    for group in range(TINY["num_rg"]):
        start, prefix = x, f"trunk.{group}.residual_group."
        for block in range(TINY["num_rcab"]):
            name = f"{prefix}{block}.residual_channel_attention_block."
            x = x + attention(name + "3", conv(name + "2", conv(name + "0", x).relu()))
        x = start + conv(prefix + str(TINY["num_rcab"]), x)
    x = shallow + conv("conv2", x)
    for stage, factor in enumerate({2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}[upscale_factor]):
        x = functional.pixel_shuffle(conv(f"upsampling.{stage}.upsample_block.0", x), factor)
    return conv("conv3", x) + mean


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_forward_equals_the_definition(scale, attention):
    network, x = tiny(scale, attention).double(), torch.rand(2, 3, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        assert network(x).numpy() == approx(by_definition(network.state_dict(), x, scale).numpy(), abs=1e-12)


def test_names_are_those_of_published_files():
    names = set(tiny(4).state_dict())
    assert names == {
        "mean",
        *(f"{layer}.{kind}" for kind in ("weight", "bias") for layer in (
            "conv1", "conv2", "conv3", "upsampling.0.upsample_block.0", "upsampling.1.upsample_block.0",
            *(f"trunk.{g}.residual_group.2" for g in range(2)),
            *(f"trunk.{g}.residual_group.{b}.residual_channel_attention_block.{part}" for g in range(2) for b in range(2)
              for part in ("0", "2", "3.channel_attention_layer.1", "3.channel_attention_layer.3")),
        )),
    }  # fmt: skip


def test_the_papers_network_has_its_published_size():
    with torch.device("meta"):
        assert parameters(model.rcan_x4()) == 15_592_355
        choices = {"attention": "channel", "activation": "relu", "upsampler_activation": False}
        assert model.rcan_x4().arguments == {**model.PAPER_SIZE, "upscale_factor": 4, "mean": model.DIV2K_MEAN, **choices}


@pytest.mark.parametrize("name", model.ARCHITECTURES)
def test_every_named_network_is_what_its_name_says(name):
    with torch.device("meta"):
        network = model.ARCHITECTURES[name]()
    assert name.endswith(f"_x{network.upscale_factor}")
    assert network.arguments["attention"] == ("cbam" if "cbam" in name else "channel")
    if "light" in name:
        assert 0.5e6 <= parameters(network) <= 0.93e6
    assert getattr(model, name) is model.ARCHITECTURES[name]


def test_the_settings_know_the_same_names():
    assert get_args(config.ModelName) == tuple(model.ARCHITECTURES)


def test_attention_starts_from_the_same_random_numbers_and_cbam_adds_a_gate_for_pixels():
    plain, cbam = tiny(2).state_dict(), tiny(2, "cbam").state_dict()
    assert plain.keys() < cbam.keys()
    assert all(".3.spatial_attention_layer.0." in name for name in cbam.keys() - plain.keys())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_any_size_and_batch_and_the_input_is_left_alone(scale, attention):
    network = tiny(scale, attention)
    for shape in ((1, 3, 1, 1), (3, 3, 1, 5), (2, 3, 13, 8)):
        x = torch.rand(shape)
        before = x.clone()
        with torch.no_grad():
            assert network(x).shape == (shape[0], 3, shape[2] * scale, shape[3] * scale)
        assert torch.equal(x, before)


def test_pictures_of_a_batch_do_not_see_each_other():
    network, x = tiny(2, "cbam"), torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert network(x)[1:2].numpy() == approx(network(x[1:2]).numpy(), abs=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bf16_autocast_stays_close(attention):
    network, x = tiny(2, attention), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x)
    assert rounded.dtype == torch.float32  # the mean is added in float32
    assert 0 < abs(exact - rounded).max() < 0.02


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_gradient_reaches_every_weight(attention):
    network = tiny(4, attention, reduction=1)  # with fewer, an attention's ReLU can be off altogether
    (network(torch.rand(2, 3, 6, 6)) - 0.7).abs().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs g++")
@pytest.mark.parametrize("attention", ("cbam", "cbam_average"))
def test_compiled_bf16_gradients_are_those_of_eager_fp32(attention):
    """`amax` finds its maxima again in backward; compiled in bf16 it found none, and every gradient was nan."""

    def gradient(compiled, dtype):
        group = tiny(2, attention, channels=16).trunk[0].train()
        if compiled:
            group.compile()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            group(x).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in group.parameters()])

    x = torch.randn(2, 16, 12, 12)
    exact, found = gradient(False, torch.float32), gradient(True, torch.bfloat16)
    assert functional.cosine_similarity(exact, found, dim=0) > 0.99


def test_an_open_spatial_gate_is_a_constant_factor_that_learns():
    """A gate of 0.9 for each pixel: what is left is 0.9 times channel attention, to the last bit of the logarithm."""
    attention = model.RCAN(2, **TINY, attention="cbam_average", initial_spatial_gate=0.9).trunk[0].residual_group[1]
    attention, x = attention.residual_channel_attention_block[3], torch.randn(2, 8, 9, 11)
    expected = 0.9 * x * attention.channel_gate(x)
    found = attention(x)
    assert found.detach().numpy() == approx(expected.detach().numpy(), rel=1e-5)
    found.square().sum().backward()
    assert attention.spatial_attention_layer[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_channel_gates_start_nearly_open(attention):
    """The first convolutions' outputs are small, so that the bias decides: 1 / (1 + exp(-ln 19)) = 0.95."""
    for initial, expected in ((None, 0.5), (0.95, 0.95)):
        torch.manual_seed(1)
        network = model.RCAN(2, channels=32, num_rg=1, num_rcab=1, attention=attention, initial_channel_gate=initial)
        layer = network.trunk[0].residual_group[0].residual_channel_attention_block[3]
        gates = layer.gates[0](0.1 * torch.randn(2, 32, 12, 12))
        assert gates.mean().item() == approx(expected, abs=0.05)
        assert gates.std() < 0.25


def test_plain_weights_in_cbam_without_maxima_differ_by_the_gate_alone():
    plain = tiny(2)
    start = tiny(2, "cbam_average", initial_spatial_gate=1 - 1e-7)
    start.load_state_dict({**start.state_dict(), **plain.state_dict()})
    x = torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        assert start(x).numpy() == approx(plain(x).numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upscale_factor": 5}, "upscale_factor=5 is unknown; known are 2, 3, 4, 8"),
        ({"upscale_factor": 4, "attention": "se"}, "attention='se' is unknown; known are 'channel', 'cbam'"),
        ({"upscale_factor": 4, "channels": 12}, "channels=12, reduction=16.*reduction at most channels"),
        ({"upscale_factor": 4, "activation": "elu"}, "activation='elu' is unknown; known are 'relu', 'silu'"),
        ({"upscale_factor": 4, "num_rg": 0}, "num_rg=0.*at least 1"),
        ({"upscale_factor": 4, "initial_channel_gate": 0.0}, "initial_channel_gate=0.0 must lie between 0 and 1"),
        ({"upscale_factor": 4, "initial_spatial_gate": 0.9}, "initial_spatial_gate=0.9 contradicts attention='channel'"),
        ({"upscale_factor": 4, "attention": "cbam", "initial_spatial_gate": 1.0}, "initial_spatial_gate=1.0 must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model.RCAN(**arguments)
