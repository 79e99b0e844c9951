"""The networks: equal to their definitions, their keys, their sizes, and what they refuse."""

from typing import get_args

import pytest
import torch
from pytest import approx
from torch import nn
from torch.nn import functional

import config
import model
from helpers import COMPILES, TINY, tiny

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


def test_keys_are_those_of_published_files():
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
        assert 0.5e6 <= parameters(model.rcan_light_x4()) <= 0.93e6
        choices = {"attention": "channel", "activation": "relu", "upsampler_activation": False}
        assert model.rcan_x4().arguments == {**model.PAPER_SIZE, "upscale_factor": 4, "mean": model.DIV2K_MEAN, **choices}


@pytest.mark.parametrize("name", model.ARCHITECTURES)
def test_every_named_network_is_what_its_name_says(name):
    build = getattr(model, name)
    assert build is model.ARCHITECTURES[name]
    (scale,), arguments = build.args, build.keywords
    size = model.LIGHT_SIZE if "light" in name else model.PAPER_SIZE
    assert name == f"rcan{'_light' * ('light' in name)}{'_cbam' * ('cbam' in name)}_x{scale}"
    assert arguments == {**size, **({"attention": "cbam"} if "cbam" in name else {})}


def test_the_settings_know_the_same_names():
    assert get_args(config.ModelName) == tuple(model.ARCHITECTURES)


def test_cbam_adds_keys_of_its_own_alone():
    plain, cbam = tiny(2).state_dict(), tiny(2, "cbam").state_dict()
    assert plain.keys() < cbam.keys()
    assert all(".3.spatial_attention_layer.0." in name for name in cbam.keys() - plain.keys())


@pytest.mark.parametrize("scale", SCALES)
def test_any_size_and_batch_and_the_input_is_left_alone(scale):
    network = tiny(scale, "cbam")
    for shape in ((1, 3, 1, 1), (3, 3, 1, 5), (2, 3, 13, 8)):
        x = torch.rand(shape)
        before = x.clone()
        with torch.no_grad():
            assert network(x).shape == (shape[0], 3, shape[2] * scale, shape[3] * scale)
        assert torch.equal(x, before)


def test_images_of_a_batch_do_not_see_each_other():
    network, x = tiny(2, "cbam").double(), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert network(x)[1:2].numpy() == approx(network(x[1:2]).numpy(), abs=1e-12)


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
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_reaches_every_weight(attention, recompute):
    network = tiny(4, attention, reduction=1).double()  # with fewer channels, an attention's ReLU can be off altogether
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    expected = torch.autograd.grad((network(x) - 0.7).abs().mean(), list(network.parameters()))
    network.train().activation_checkpointing = recompute
    (network(x) - 0.7).abs().mean().backward()
    for (name, parameter), gradient in zip(network.named_parameters(), expected, strict=True):
        assert parameter.grad.abs().sum() > 0, name
        assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-15), name


@pytest.mark.parametrize("scale", SCALES)
def test_a_pointwise_upsampler_is_one_convolution(scale):
    """… that computes what its layers compute, borders too, and the same gradients."""
    network = tiny(scale, channels=48, pointwise_upsampler=True).double()
    assert network.has_pointwise_upsampler() and not tiny(scale).has_pointwise_upsampler()
    x = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    results = []
    for network.folds_upsampler in (False, True):
        network.zero_grad()
        sr = network(x)
        sr.square().mean().backward()
        results.append([sr.detach(), *(weight.grad for weight in network.parameters() if weight.requires_grad)])
    assert results[0][0].std() > 0.01
    for layers, folded in zip(*results, strict=True):
        assert folded.numpy() == approx(layers.numpy(), rel=1e-9, abs=1e-12)


def test_layers_that_mix_channels_of_single_pixels_are_folded_too():
    network, x = tiny(8).double(), torch.rand(1, 3, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        for layer in (network.upsampling[1].upsample_block[0], network.upsampling[2].upsample_block[0], network.conv3):
            layer.weight.copy_(functional.pad(layer.weight[:, :, 1:2, 1:2], (1, 1, 1, 1)))
        assert network.has_pointwise_upsampler()
        layers, network.folds_upsampler = network(x), True
        assert network(x).numpy() == approx(layers.numpy(), rel=1e-9, abs=1e-12)


def test_a_pointwise_upsampler_needs_channels_and_linearity():
    with pytest.raises(ValueError, match="48 channels"):
        model.RCAN(8, 32, 4, 1, 1, pointwise_upsampler=True)
    with pytest.raises(ValueError, match="upsampler_activation"):
        model.RCAN(2, 16, 4, 1, 1, pointwise_upsampler=True, upsampler_activation=True)


def test_a_pointwise_upsampler_refuses_weights_that_it_would_ignore():
    network = tiny(4, channels=12, pointwise_upsampler=True)
    network.load_state_dict(network.state_dict())
    with pytest.raises(ValueError, match="pointwise_upsampler=False"):
        network.load_state_dict(tiny(4, channels=12).state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(not COMPILES, reason="no compiler for this processor")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "AVX2", reason="PyTorch 2.14 compiles bf16 to NaN on AVX2")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiled_bf16_gradients_are_those_of_eager_fp32(attention):
    """`amax` searches for its maxima again in backward; compiled in bf16 it found none, and every gradient was nan."""

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


@pytest.mark.filterwarnings("ignore:.*deprecated")  # torch.jit.trace, which Core ML's and ncnn's converters still want
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_traced_network_has_operations_that_converters_know_and_is_the_same(scale, attention):
    network = tiny(scale, attention)
    traced = torch.jit.trace(network, torch.rand(1, 3, 9, 8))
    operations = [node.kind() for node in traced.inlined_graph.nodes()]
    assert operations.count("aten::pixel_shuffle") == len(network.upsampling)
    assert not {"aten::movedim", "aten::unflatten", "aten::view_as"} & {*operations}
    for shape in ((2, 3, 12, 7), (1, 3, 5, 20)):
        x = torch.rand(shape)
        with torch.no_grad():
            assert traced(x).numpy() == approx(network(x).numpy(), abs=1e-4)


@pytest.mark.slow
def test_an_exported_program_keeps_the_pixel_shuffle_and_is_the_same():
    network, x = tiny(4, "cbam"), torch.rand(2, 3, 9, 8)
    program = torch.export.export(network, (x,))
    if hasattr(torch.compiler, "is_exporting"):
        assert str(program.graph).count("pixel_shuffle.default") == 2
    with torch.no_grad():
        assert program.module()(x).numpy() == approx(network(x).numpy(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_and_eager_training_rearrange_whole_pixels():
    """One graph, without nn.PixelShuffle, whose forward hook would tell."""
    network, x, graphs, shuffled = tiny(4, "cbam").train(), torch.rand(2, 3, 9, 8), [], []
    for upsampler in network.upsampling:
        upsampler.upsample_block[1].register_forward_hook(lambda *_: shuffled.append(True))
    expected = network(x)

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(network, backend=keep, fullgraph=True)(x), expected)
    assert len(graphs) == 1
    assert not shuffled and "pixel_shuffle" not in graphs[0].code


def test_an_initial_spatial_gate_is_a_constant_factor_that_learns():
    attention = model.RCAN(2, **TINY, attention="cbam_average", initial_spatial_gate=0.9).trunk[0].residual_group[1]
    attention, x = attention.residual_channel_attention_block[3], torch.randn(2, 8, 9, 11)
    found = attention(x)
    assert found.detach().numpy() == approx((0.9 * x * attention.channel_gate(x)).detach().numpy(), rel=1e-5)
    found.square().sum().backward()
    assert attention.spatial_attention_layer[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_channel_gates_start_nearly_open(attention):
    """The features are small, so that the bias decides: 1 / (1 + exp(-ln 4)) = 0.8."""
    for initial, expected in ((None, 0.5), (0.8, 0.8)):
        torch.manual_seed(1)
        network = model.RCAN(2, channels=32, num_rg=1, num_rcab=1, attention=attention, initial_channel_gate=initial)
        layer = network.trunk[0].residual_group[0].residual_channel_attention_block[3]
        gates = layer.channel_gate(0.1 * torch.randn(2, 32, 12, 12))
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
    ("arguments", "named"),
    [
        ({"upscale_factor": 5}, "upscale_factor=5"),
        ({"attention": "se"}, "attention='se'"),
        ({"activation": "elu"}, "activation='elu'"),
        ({"channels": 12}, "channels=12, reduction=16"),
        ({"num_rg": 0}, "num_rg=0"),
        ({"initial_channel_gate": 0.0}, "initial_channel_gate=0.0"),
        ({"initial_spatial_gate": 0.9}, "initial_spatial_gate=0.9 .*attention='channel'"),
        ({"attention": "cbam", "initial_spatial_gate": 1.0}, "initial_spatial_gate=1.0"),
    ],
)
def test_impossible_networks_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        model.RCAN(**{"upscale_factor": 4, **arguments})


# Discriminator


def discriminator(channels=4, seed=0):
    """With normalisations that matter: scale and shift differ from neutral."""
    torch.manual_seed(seed)
    network = model.Discriminator(channels)
    for layer in network.features:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return network


def discriminator_by_definition(state, x):
    """ESRGAN's network as its released code has it, from the weights by name."""
    x = functional.leaky_relu(functional.conv2d(x - 0.5, state["features.0.weight"], state["features.0.bias"], padding=1), 0.2)
    for number in range(9):
        conv, norm = f"features.{2 + 3 * number}.weight", f"features.{3 + 3 * number}."
        x = functional.conv2d(x, state[conv], stride=1 if number % 2 else 2, padding=1)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = functional.leaky_relu(x * state[norm + "weight"].view(-1, 1, 1) + state[norm + "bias"].view(-1, 1, 1), 0.2)
    x = functional.adaptive_avg_pool2d(x, 4).flatten(1)
    x = functional.leaky_relu(x @ state["classifier.1.weight"].T + state["classifier.1.bias"], 0.2)
    return x @ state["classifier.3.weight"].T + state["classifier.3.bias"]


@pytest.mark.parametrize("size", [(128, 128), (96, 96), (192, 96), (47, 200), (32, 33)])
def test_the_discriminator_equals_its_definition_at_any_size(size):
    network, x = discriminator().double(), torch.rand(2, 3, *size, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        found, expected = network(x), discriminator_by_definition(network.state_dict(), x)
    assert found.numpy() == approx(expected.numpy(), abs=1e-10)
    assert abs(found[0] - found[1]) > 1e-3  # so that the tolerance means something
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(2, 3, 31, 64), (4, 3, 64, 16), (1, 3, 32, 32), (1, 3, 63, 47)])
def test_images_too_small_for_the_discriminator_are_refused(shape):
    with pytest.raises(ValueError, match=f"{shape[0]} .* {shape[3]}x{shape[2]}"):
        discriminator()(torch.rand(shape))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 3, 32, 64), (2, 3, 32, 32)])
def test_the_smallest_images_have_logits(shape):
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
    assert network.features(torch.empty(1, 3, 128, 128, device="meta")).shape == (1, 512, 4, 4)  # 128, ESRGAN's patches, aren't averaged
    assert parameters(network) == 14_499_401  # also of Discriminator_VGG_128
    with pytest.raises(ValueError, match="channels=0"):
        model.Discriminator(0)


def test_the_discriminator_has_no_buffers_and_eval_changes_nothing():
    network, x = discriminator(), torch.rand(3, 3, 64, 64)
    assert network.state_dict().keys() == dict(network.named_parameters()).keys()
    with torch.no_grad():
        once = network.train()(x)
        for again in (network.eval(), network.train(), discriminator()):  # and nothing is remembered of earlier images
            assert again(x).numpy() == approx(once.numpy(), abs=1e-6)


def test_logits_are_float32_under_autocast():
    network, x = discriminator(), torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the last layers weren't rounded
    assert 0 < abs(rounded - exact).max() < 0.05
