"""Files of weights: what is saved comes back equal; anything else is refused whole, and said."""

import pickle
import re

import numpy as np
import pytest
import reference_networks
import safetensors.torch
import torch
from torch import nn

import model
import weights
from helpers import tiny
from layouts import LAYOUTS


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("attention", ["channel", "cbam", "cbam_average"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_a_saved_network_comes_back_equal(tmp_path, scale, attention):
    network = tiny(scale, attention, channels=12, reduction=3, num_rg=3, num_rcab=1)
    weights.export(network, tmp_path / "w.pth.tar")
    found = weights.load(tmp_path / "w.pth.tar")
    assert found.arguments == {**network.arguments, "mean": pytest.approx(network.arguments["mean"], abs=1e-7)}
    assert equal(found.state_dict(), network.state_dict())
    assert not found.training
    x = torch.rand(1, 3, 5, 6)
    with torch.no_grad():
        assert torch.allclose(found(x), network(x), atol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth.tar"]


def test_a_bare_state_dict_loads_as_it_is(tmp_path):
    torch.save(tiny(4).state_dict(), tmp_path / "bare.pth")
    assert equal(weights.load(tmp_path / "bare.pth").state_dict(), tiny(4).state_dict())


def test_averaged_weights_are_preferred_and_said(tmp_path):
    newest, averaged = tiny(2), tiny(2)
    torch.nn.init.constant_(averaged.conv1.weight, 0.125)
    torch.save({"state_dict": newest.state_dict(), "ema_state_dict": averaged.state_dict()}, tmp_path / "both.pth")
    network = weights.load(tmp_path / "both.pth")
    assert (network.conv1.weight == 0.125).all()
    assert weights.describe(network).endswith("both.pth, native layout, [0, 1] inside, averaged weights (EMA, ema_state_dict)")
    torch.save({"state_dict": newest.state_dict()}, tmp_path / "one.pth")
    assert "weights as trained" in weights.describe(weights.load(tmp_path / "one.pth"))


@pytest.mark.parametrize("harm", ["missing", "unexpected", "shape"])
def test_any_difference_is_listed_and_nothing_is_loaded(tmp_path, harm):
    state, name = tiny(2).state_dict(), "trunk.1.residual_group.0.residual_channel_attention_block.2.bias"
    if harm == "missing":
        del state[name]
    if harm == "unexpected":
        name = "conv4.bias"
        state[name] = torch.zeros(1)
    if harm == "shape":
        state[name] = torch.zeros(9)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth: 1 tensors don't fit .*{re.escape(name)}"):
        weights.load(tmp_path / "w.pth")


class Harmful:
    def __reduce__(self):
        return (open, ("should-not-exist", "w"))


def files(folder):
    torch.save(tiny(2).state_dict(), folder / "whole")
    data = (folder / "whole").read_bytes()
    return {
        "empty.pth": b"",
        "cut.pth": data[: len(data) // 2],
        "page.pth": b"<!DOCTYPE html><html>quota exceeded</html>",
        "harmful.pth": pickle.dumps(Harmful(), protocol=2),
        "pickle.pth": pickle.dumps(Harmful()),
        "notes.pth": b"notes",
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.pth", "it is empty; copy or download it again"),
        ("cut.pth", "it is damaged or cut off; copy or download it again"),
        ("page.pth", "it is a web page, .* download it with one"),
        ("harmful.pth", r"it holds code or objects beside the weights, as (io|_io)\.open; save a state_dict of tensors alone"),
        ("pickle.pth", "it is a pickle of another program, which may hold code; save a state_dict with torch.save"),
        ("notes.pth", "it is no file of PyTorch; copy or download it again"),
    ],
)
def test_a_broken_or_harmful_file_is_named_in_one_sentence(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(files(tmp_path)[name])
    with pytest.raises(ValueError, match=rf"{name}: not a file of weights that can be read safely \({reason}\)$") as error:
        weights.load(tmp_path / name)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "should-not-exist").exists()


def test_a_pickled_network_is_refused_by_its_class(tmp_path):
    torch.save(tiny(2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"module\.pth: .*beside the weights, as model\.RCAN; save a state_dict"):
        weights.load(tmp_path / "module.pth")


def test_safetensors_are_known_by_their_content(tmp_path):
    weights.export(tiny(2), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(tmp_path / "w.pth")
    assert equal(weights.load(tmp_path / "w.pth").state_dict(), tiny(2).state_dict())
    flat = {f"params_ema.{name}": tensor for name, tensor in tiny(2).state_dict().items()}
    safetensors.torch.save_file(flat, tmp_path / "ema.safetensors")
    assert weights.load(tmp_path / "ema.safetensors").source.endswith("averaged weights (EMA, state_dict.params_ema)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.int8), "conv1.weight is int8, not dense floating point"),
        (lambda tensor: tensor.to(torch.complex64), "conv1.weight is complex64, not dense floating point"),
        (lambda tensor: tensor.to_sparse(), "conv1.weight is float32 sparse_coo, not dense floating point"),
        (lambda tensor: tensor.to("meta"), "conv1.weight is without values, not dense floating point"),
        (lambda tensor: tensor.double() * 1e300, "conv1.weight is too large for float32"),
    ],
)
def test_tensors_that_are_no_plain_weights_are_refused(change, message):
    state = dict(tiny(2).state_dict())
    state["conv1.weight"] = change(state["conv1.weight"])
    with pytest.raises(ValueError, match=message):
        weights.build(state, "file")


def test_a_mean_shift_that_cannot_be_undone_is_refused():
    state = official_state()
    state["sub_mean.weight"] = torch.ones(3, 3, 1, 1)
    with pytest.raises(ValueError, match=r"file: sub_mean\.weight is \[\[1\.0.* can't be undone"):
        weights.build(state, "file")


def test_two_unknown_names_are_ambiguous(tmp_path):
    torch.save({"first": STATE, "second": STATE}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: holds several networks, first, second; save the state_dict of one"):
        weights.load(tmp_path / "w.pth")


def test_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth: no such weights; train them with train\.py, or .* --model_path"):
        weights.load(tmp_path / "gone.pth")


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {"layer.weight": torch.zeros(3)}, {"state_dict": {"conv1.weight": torch.zeros(8, 3, 3, 3)}}]
)
def test_a_file_without_rcan_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: holds no "):
        weights.load(tmp_path / "other.pth")


# Other programs' files. Random weights are made large enough that a wrong range, mean or activation shows.

SIZE = {"groups": 2, "blocks": 3, "channels": 10, "squeezed": 3}  # 10 // 3 = 3 = the reduction, and 10 // 3 = 3 squeezed


def shaken(network):
    """Random weights of such sizes that every path matters, and a mean shift that is no identity where there is one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.05 * noise if "_mean" in name else noise * (1.5 / max(1, parameter[0].numel()) ** 0.5))
    return network.eval()


def spandrel_network(scale, norm=True):
    rcan = pytest.importorskip("spandrel.architectures.RCAN").RCAN
    return rcan(scale=scale, n_resgroups=2, n_resblocks=3, n_feats=10, reduction=3, norm=norm)


def torchsr_network(scale):
    return pytest.importorskip("torchsr.models.rcan").RCAN(2, 3, 10, 3, scale)


def on_255(network):
    return lambda x: network(x * 255) / 255


PROGRAMS = {
    "native": lambda scale: reference_networks.Native(scale, **SIZE),
    "spandrel": spandrel_network,
    "spandrel without a mean shift": lambda scale: spandrel_network(scale, norm=False),
    "torchSR": torchsr_network,
    "basicsr": lambda scale: reference_networks.BasicSR(scale, **SIZE),
    "rcan-it": lambda scale: reference_networks.RCANit(scale, **SIZE),
}


def small_output(network, x):
    """The weights of the last convolution divided, so that the picture lies about [0, 1], as a trained network's does."""
    run = on_255(network) if isinstance(network, reference_networks.RCANit) else network
    with torch.no_grad():
        spread = run(x.clone()).std()
        last = next(
            module
            for name, module in reversed(list(network.named_modules()))
            if getattr(module, "out_channels", 0) == 3 and "mean" not in name
        )
        last.weight.div_(4 * spread)
        last.bias.div_(4 * spread)
        return run(x.clone())


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("program", PROGRAMS)
def test_another_programs_file_gives_its_picture(tmp_path, program, scale):
    network = shaken(PROGRAMS[program](scale))
    x = torch.rand(2, 3, 9, 12)
    expected = small_output(network, x)
    assert 0.1 < expected.std() < 1
    torch.save(network.state_dict(), tmp_path / "w.pth")
    found = weights.load(tmp_path / "w.pth")
    with torch.no_grad():
        assert (found(x) - expected).abs().max() < 1e-5
    layout = {"torchSR": "official", "spandrel": "official", "spandrel without a mean shift": "official"}.get(program, program)
    inside = "[0, 1]" if program in ("native", "spandrel without a mean shift") else "[0, 255]"
    assert f"w.pth, {layout} layout, {inside} inside, weights as trained" in weights.describe(found)
    size = {"upscale_factor": scale, "num_rg": 2, "num_rcab": 3, "channels": 10, "reduction": 3}
    assert found.arguments.items() >= size.items()
    assert (found.arguments["activation"], found.arguments["upsampler_activation"]) == (
        ("silu", True) if program == "rcan-it" else ("relu", False)
    )


def test_a_mean_shift_of_any_kind_is_folded_and_not_dropped():
    network = shaken(spandrel_network(2))
    plain = network.state_dict()
    plain["sub_mean.weight"] = torch.eye(3).view(3, 3, 1, 1)
    folded, dropped = weights.build(network.state_dict()), weights.build(plain)
    x = torch.rand(1, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(folded(x), network(x.clone()), atol=1e-4)
        assert not torch.allclose(dropped(x), network(x.clone()), atol=1e-2)


@pytest.mark.parametrize(("channels", "reduction"), [(7, 7), (64, 16), (50, 16), (33, 1), (12, 5)])
@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (11, 1), (1, 12)])
def test_any_size_is_read_off_the_file(channels, reduction, groups, blocks):
    network = shaken(reference_networks.BasicSR(2, groups, blocks, channels, channels // reduction))
    found = weights.build(network.state_dict())
    x = torch.rand(1, 3, 4, 5)
    with torch.no_grad():
        expected = network(x)
        assert (found(x) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


# What surrounds the weights

STATE = {name: tensor.clone() for name, tensor in tiny(2).state_dict().items()}


def prefixed(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def compiled_inside(state=STATE):
    return {name.replace("trunk.0.", "trunk.0._orig_mod.").replace("trunk.1.", "module.trunk.1."): tensor for name, tensor in state.items()}


OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
SURROUNDINGS = {
    "bare": (STATE, "weights as trained"),
    "params": ({"params": STATE}, "weights as trained"),
    "params_ema": ({"params": OTHER, "params_ema": STATE}, "averaged weights (EMA, params_ema)"),
    "params_ema is empty": ({"params": STATE, "params_ema": {}}, "weights as trained"),
    "checkpoint": (
        {"epoch": 3, "best_psnr": 1.0, "state_dict": OTHER, "ema_state_dict": STATE, "optimizer": {"param_groups": [{"lr": 1}]}},
        "averaged weights (EMA, ema_state_dict)",
    ),
    "no EMA": ({"epoch": 3, "state_dict": STATE, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "weights as trained"),
    "model": ({"model": STATE}, "weights as trained"),
    "net": ({"net": STATE, "epoch": 1}, "weights as trained"),
    "model_state_dict": ({"model_state_dict": STATE, "loss": 0.5}, "weights as trained"),
    "any single name": ({"gen_a": STATE, "epoch": 1}, "weights as trained"),
    "module": (prefixed("module."), "weights as trained"),
    "compiled": (prefixed("_orig_mod."), "weights as trained"),
    "compiled inside": (compiled_inside(), "weights as trained"),
    "netG": (prefixed("netG."), "weights as trained"),
    "module of compiled": (prefixed("module._orig_mod."), "weights as trained"),
    "compiled module": (prefixed("_orig_mod.module."), "weights as trained"),
    "netG of module of model": (prefixed("netG.module.model."), "weights as trained"),
    "averaged": ({"n_averaged": torch.tensor(7), **prefixed("module.")}, "averaged weights (EMA, n_averaged)"),
    "averaged in a wrapper": ({"params": {"n_averaged": torch.tensor(7), **prefixed("module.")}}, "averaged weights (EMA, n_averaged)"),
    "nested": ({"model": {"state_dict": prefixed("_orig_mod.module.")}, "epoch": 1}, "weights as trained"),
    "timm's name": ({"state_dict": OTHER, "state_dict_ema": STATE}, "averaged weights (EMA, state_dict_ema)"),
    "another name": ({"model_state_dict": OTHER, "ema_model_state_dict": STATE}, "averaged weights (EMA, ema_model_state_dict)"),
    "a tensor beside": ({"best_psnr": torch.tensor(31.2), "state_dict": STATE}, "weights as trained"),
    "a NumPy number beside": ({"best_psnr": np.float64(31.2), "state_dict": STATE}, "weights as trained"),
    "a discriminator beside": ({"netD": {"conv.weight": torch.ones(3)}, "netG": STATE}, "weights as trained"),
    "flat, with a discriminator": ({**prefixed("netG."), "netD.conv.weight": torch.ones(3)}, "weights as trained"),
    "flat EMA": ({**prefixed("generator.", OTHER), **prefixed("generator_ema.")}, "averaged weights (EMA, generator_ema)"),
    "nested EMA": ({"model": {"params": OTHER, "params_ema": prefixed("module.")}}, "averaged weights (EMA, model.params_ema)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("layout", ["native", "official"])
def test_what_surrounds_the_weights_is_taken_off(tmp_path, name, layout):
    found, kind = SURROUNDINGS[name]
    if layout == "official":  # the same around another layout
        network = weights.build(STATE)
        weights.export(network, tmp_path / "o.pth", "official")
        found = replace_states(found, weights.read(tmp_path / "o.pth"))
    torch.save(found, tmp_path / "w.pth.tar")
    network = weights.load(tmp_path / "w.pth.tar")
    assert close(network.state_dict(), STATE)
    assert f"{layout} layout" in network.source
    assert network.source.endswith(kind)


def replace_states(found, official):
    """`found` with the tensors of STATE (or OTHER) under official names, keeping prefixes."""
    markers = [name for name in found if name.endswith("conv1.weight")]
    if markers:
        others = {name: value for name, value in found.items() if name == "n_averaged" or name.startswith("netD")}
        for marker in markers:
            change = 1 if torch.equal(found[marker], OTHER["conv1.weight"]) else 0
            others |= {marker.removesuffix("conv1.weight") + name: tensor + change for name, tensor in official.items()}
        return others
    return {
        key: replace_states(value, official)
        if isinstance(value, dict) and key not in ("optimizer", "params_ema_empty") and value
        else value
        for key, value in found.items()
    }


def close(first, second):
    return first.keys() == second.keys() and all(torch.allclose(first[name], second[name], rtol=2e-7, atol=0) for name in first)


def test_a_name_with_and_without_a_prefix_is_refused(tmp_path):
    torch.save({**STATE, "module.conv1.weight": STATE["conv1.weight"]}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: holds conv1\.weight twice"):
        weights.load(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_and_said(dtype):
    network = weights.build({name: tensor.to(dtype) for name, tensor in STATE.items()})
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.conv1.weight, STATE["conv1.weight"].to(dtype).float())
    assert network.source.endswith(f"stored as {str(dtype).removeprefix('torch.')}")


# Never a partial load, in any layout


def official_state():
    return dict(torchsr_network(2).state_dict())


HARMS = {
    "missing": lambda state, name: state.pop(name),
    "renamed": lambda state, name: state.update({name + "s": state.pop(name)}),
    "shape": lambda state, name: state.update({name: state[name][1:]}),
    "not finite": lambda state, name: state[name].view(-1)[0].copy_(torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    "name", ["head.0.weight", "body.1.body.2.body.3.conv_du.2.bias", "tail.0.0.weight", "sub_mean.bias", "body.2.bias"]
)
def test_a_harmed_official_file_names_the_tensor(harm, name):
    state = official_state()
    HARMS[harm](state, name)
    with pytest.raises(ValueError, match=r"file: (1|2|upsampler|holds no whole) .*" + re.escape(name[:6])):
        weights.build(state, "file")


def test_every_missing_tensor_is_listed():
    state = official_state()
    lost = [name for name in state if name.startswith("body.1.body.0.")]
    for name in lost:
        del state[name]
    with pytest.raises(ValueError) as error:
        weights.build(state, "file")
    assert str(error.value).startswith(f"file: {len(lost)} tensors don't fit an RCAN in the official layout, none was loaded: missing ")
    assert all(f"missing {name}" in str(error.value) for name in lost)


def test_names_that_count_far_beyond_the_tensors_cost_nothing():
    state = official_state() | {"body.99999999.body.7.body.0.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="names count up to 100000000 groups of 8 blocks, but it holds"):
        weights.build(state, "file")


def test_traiNNers_unshuffle_is_another_network():
    state = official_state()
    state["head.1.weight"] = state.pop("head.0.weight")
    with pytest.raises(ValueError, match="folds pixels into channels"):
        weights.build(state, "file")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_program_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.rand(1, 1, 2, 2)), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: not a file .*it is a TorchScript program; save its state_dict"):
        weights.load(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      x", b"notes", b"\xff" * 64])
def test_a_broken_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors: (not a file of weights|holds no weights)"):
        weights.load(tmp_path / "w.safetensors")


# Export


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout='caffe' is unknown; known are 'native', 'official', 'basicsr'"):
        weights.export(tiny(), tmp_path / "w.pth", "caffe")


@pytest.mark.parametrize("ending", ["pth", "pt", "safetensors"])
@pytest.mark.parametrize("layout", ["native", "official", "basicsr"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_a_round_trip_through_every_layout_loses_a_last_bit_at_most(tmp_path, scale, layout, ending):
    network = tiny(scale)
    network.mean.copy_(torch.tensor(model.DIV2K_MEAN).view(1, 3, 1, 1))
    network.degradation = "BD"
    path = tmp_path / f"w.{ending}"
    weights.export(network, path, layout)
    found = weights.load(path)
    assert close(found.state_dict(), network.state_dict())
    changed = [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, network.state_dict()[name])]
    assert set(changed) <= (set() if layout == "native" else {"conv1.weight", "conv3.weight", "conv3.bias"})
    assert found.arguments == network.arguments | {"mean": found.arguments["mean"]}
    records = layout == "native" or ending == "safetensors"  # the others' programs want nothing beside the weights
    assert found.degradation == ("BD" if records else None)
    x = torch.rand(1, 3, 7, 8)
    with torch.no_grad():
        assert (found(x) - network(x)).abs().max() < 1e-6
    weights.export(found, tmp_path / f"again.{ending}", layout)
    assert close(weights.load(tmp_path / f"again.{ending}").state_dict(), network.state_dict())
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"again.{ending}", path.name]


def test_the_last_bit_is_lost_in_under_one_percent(tmp_path):
    network = model.rcan_light_x2()
    weights.export(network, tmp_path / "w.pth", "official")
    found = weights.load(tmp_path / "w.pth")
    for name in ("conv1.weight", "conv3.weight"):
        assert (found.get_parameter(name) != network.get_parameter(name)).float().mean() < 0.01
    assert torch.equal(found.mean, network.mean)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_the_official_layout_opens_in_spandrel_and_torchsr(tmp_path, scale, ending):
    spandrel = pytest.importorskip("spandrel")
    network = tiny(scale)
    path = tmp_path / f"w.{ending}"
    weights.export(network, path, "official")
    opened = spandrel.ModelLoader().load_from_file(str(path))
    assert (opened.architecture.id, opened.scale) == ("RCAN", scale)
    x = torch.rand(1, 3, 16, 18)
    torchsr = pytest.importorskip("torchsr.models.rcan").RCAN(2, 2, 8, 4, scale).eval()
    torchsr.load_state_dict(safetensors.torch.load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True))
    with torch.no_grad():
        expected = network(x)
        assert (opened(x.clone()) - expected.clamp(0, 1)).abs().max() < 1e-5
        assert (torchsr(x.clone()) - expected).abs().max() < 1e-5


def test_the_basicsr_layout_opens_in_basicsrs_network(tmp_path):
    network = model.RCAN(4, channels=10, reduction=3, num_rg=2, num_rcab=3).eval()
    weights.export(network, tmp_path / "w.pth", "basicsr")
    theirs = reference_networks.BasicSR(4, **SIZE).eval()
    theirs.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True)["params"])
    x = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        assert (theirs(x) - network(x)).abs().max() < 1e-5


def test_what_a_layout_cannot_say_is_refused_and_nothing_is_written(tmp_path):
    cbam, other_mean = tiny(2, "cbam"), tiny(2)
    silu = model.RCAN(2, 8, 4, 1, 1, activation="silu")
    for network, layout, message in (
        (cbam, "official", "layout='official' knows the paper's network only, not one with cbam attention"),
        (silu, "basicsr", "layout='basicsr' knows the paper's network only, not one with channel attention and silu"),
        (other_mean, "basicsr", r"layout='basicsr' has the mean \(0\.4488.* built in, but the network's is \[0\.4"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.export(network, tmp_path / "w.pth", layout)
    with pytest.raises(ValueError, match=r"w\.pth\.tar: unknown ending; files in the official layout end in \.pth, \.pt, \.safetensors"):
        weights.export(tiny(2), tmp_path / "w.pth.tar", "official")
    assert not list(tmp_path.iterdir())


def test_silu_weights_can_not_be_taken_for_the_papers(tmp_path):
    network = model.RCAN(2, 8, 4, 1, 1, activation="silu", upsampler_activation=True)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    found = weights.load(tmp_path / "bare.pth")
    assert (found.arguments["activation"], found.arguments["upsampler_activation"]) == ("silu", True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.RCAN(2, 8, 4, 1, 1).load_state_dict(network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["channel", "cbam", "cbam_average"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_onnx_gives_the_same_at_sizes_that_it_was_not_exported_with(tmp_path, scale, attention):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = tiny(scale, attention, num_rg=1, num_rcab=1)
    weights.export_onnx(network, tmp_path / "w.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["w.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "w.onnx")
    for shape in ((1, 3, 7, 9), (3, 3, 16, 5), (1, 3, 31, 40)):
        x = torch.rand(shape)
        with torch.no_grad():
            expected = network(x).numpy()
        (found,) = session.run(["sr"], {"lr": x.numpy()})
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-4


# What it was trained for


def test_the_degradation_is_found_in_checkpoints_and_exports(tmp_path):
    torch.save({"state_dict": STATE, "config": {"degradation": "DN"}}, tmp_path / "w.pth.tar")
    network = weights.load(tmp_path / "w.pth.tar")
    assert network.degradation == "DN"
    assert "trained for DN" in weights.describe(network)
    weights.export(network, tmp_path / "e.safetensors")
    assert weights.load(tmp_path / "e.safetensors").degradation == "DN"
    torch.save(STATE, tmp_path / "bare.pth")
    assert weights.load(tmp_path / "bare.pth").degradation is None
    assert "trained for" not in weights.describe(weights.load(tmp_path / "bare.pth"))


def test_names_are_never_shared_by_two_layouts():
    assert set(LAYOUTS) == {"native", "official", "basicsr", "rcan-it"}
    for program, build in PROGRAMS.items():
        names = list(build(4).state_dict())
        assert sum(any(re.match(layout.mark, name) for name in names) for layout in LAYOUTS.values()) == 1, program


# Warm start


def test_another_scale_gives_all_but_the_upsampler(tmp_path):
    source, network = tiny(2), tiny(4)
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights.export(source, tmp_path / "x2.pth")
    text = weights.transfer(network, tmp_path / "x2.pth")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("upsampling.") else source.state_dict())[name]), name
    assert "(x2)" in text
    new, left_out = text.splitlines()[1:]
    assert new.count("upsampling.") == 4
    assert "upsampling.1.upsample_block.0.weight" in new
    assert left_out.count("upsampling.") == 2


def test_the_same_scale_gives_everything(tmp_path):
    weights.export(tiny(4), tmp_path / "w.pth")
    network = model.RCAN(4, **{"channels": 8, "reduction": 4, "num_rg": 2, "num_rcab": 2})
    assert len(weights.transfer(network, tmp_path / "w.pth").splitlines()) == 1
    assert equal(network.state_dict(), tiny(4).state_dict())


def test_plain_weights_start_cbam_but_not_the_other_way(tmp_path):
    weights.export(tiny(2), tmp_path / "plain.pth")
    weights.export(tiny(2, "cbam"), tmp_path / "cbam.pth")
    cbam = tiny(2, "cbam")
    assert "spatial_attention_layer" in weights.transfer(cbam, tmp_path / "plain.pth")
    assert torch.equal(cbam.conv2.weight, tiny(2).conv2.weight)
    with pytest.raises(ValueError, match=r"8 weights don't fit the network to train, first trunk\.0.*spatial_attention_layer"):
        weights.transfer(tiny(2), tmp_path / "cbam.pth")


@pytest.mark.parametrize("changes", [{"channels": 12}, {"num_rg": 3}, {"num_rcab": 1}])
def test_another_size_is_refused_and_nothing_is_taken(tmp_path, changes):
    weights.export(tiny(2), tmp_path / "w.pth")
    network = tiny(2, **changes)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="don't fit the network to train"):
        weights.transfer(network, tmp_path / "w.pth")
    assert equal(network.state_dict(), before)
