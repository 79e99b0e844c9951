"""Files of weights: what is saved comes back equal; anything else is refused whole, and named."""

import argparse
import collections
import datetime
import functools
import hashlib
import json
import os
import pickle
import re
import socket
import types
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.error import URLError

import numpy as np
import pytest
import reference_networks
import safetensors.torch
import torch
from torch import nn

import losses
import model
import weights
from helpers import REPOSITORY, tiny

STATE = {name: tensor.clone() for name, tensor in tiny(2).state_dict().items()}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first, second):
    """Equal but for the last bit."""
    return first.keys() == second.keys() and all(torch.allclose(first[name], second[name], rtol=2e-7, atol=0) for name in first)


def saved(content, path):
    torch.save(content, path)
    return path


def refusal(path):
    """The message of a refused file, which names it, in one line."""
    with pytest.raises(ValueError) as error:
        weights.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# Round trips


@pytest.mark.parametrize("attention", ["channel", "cbam", "cbam_average"])
def test_a_saved_network_comes_back_equal(tmp_path, attention):
    network = tiny(3, attention, channels=12, reduction=3, num_rg=3, num_rcab=1, activation="silu", upsampler_activation=True)
    weights.export(network, tmp_path / "w.pth.tar")
    found = weights.load(tmp_path / "w.pth.tar")
    assert found.arguments == {**network.arguments, "mean": pytest.approx(network.arguments["mean"], abs=1e-7)}
    assert equal(found.state_dict(), network.state_dict())
    assert not found.training
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth.tar"]


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["native", "official", "basicsr"])
def test_a_round_trip_through_every_layout_loses_a_last_bit_at_most(tmp_path, layout, scale):
    network = tiny(scale)
    network.mean.copy_(torch.tensor(model.DIV2K_MEAN).view(1, 3, 1, 1))
    network.degradation = "BD"
    for ending in ("pth", "pt", "safetensors"):
        path = tmp_path / f"w.{ending}"
        weights.export(network, path, layout)
        found = weights.load(path)
        assert close(found.state_dict(), network.state_dict())
        changed = {name for name, tensor in found.state_dict().items() if not torch.equal(tensor, network.state_dict()[name])}
        assert changed <= (set() if layout == "native" else {"conv1.weight", "conv3.weight", "conv3.bias"})
        assert found.arguments == network.arguments | {"mean": found.arguments["mean"]}
        records = layout == "native" or ending == "safetensors"  # the others' programs want nothing beside the weights
        assert found.degradation == ("BD" if records else None)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("layout", ["native", "official", "basicsr"])
def test_a_pointwise_upsampler_is_recognised_by_its_zeros(tmp_path, layout):
    network = model.RCAN(4, 12, 4, 2, 2, pointwise_upsampler=True)
    weights.export(network, tmp_path / "w.pth", layout)
    found = weights.load(tmp_path / "w.pth")
    assert found.folds_upsampler and "pointwise" in weights.describe(found)
    x = torch.rand(1, 3, 12, 10)
    with torch.no_grad():
        assert found(x).numpy() == pytest.approx(network(x).numpy(), abs=1e-6)
        network.upsampling[1].upsample_block[0].weight[5, 3, 2, 1] = 1e-9
    weights.export(network, tmp_path / "other.pth", layout)
    assert not weights.load(tmp_path / "other.pth").folds_upsampler


def test_the_last_bit_is_lost_in_about_one_percent(tmp_path):
    network = model.rcan_light_x2()
    weights.export(network, tmp_path / "w.pth", "official")
    found = weights.load(tmp_path / "w.pth")
    for name in ("conv1.weight", "conv3.weight"):
        assert (found.get_parameter(name) != network.get_parameter(name)).float().mean() < 0.03
    assert torch.equal(found.mean, network.mean)


def test_the_degradation_is_found_in_checkpoints_and_bare_weights_have_none(tmp_path):
    network = weights.load(saved({"state_dict": STATE, "config": {"degradation": "DN"}}, tmp_path / "w.pth.tar"))
    assert network.degradation == "DN"
    assert "DN" in weights.describe(network)
    assert weights.load(saved(STATE, tmp_path / "bare.pth")).degradation is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_other_precisions_are_converted_and_named(dtype):
    network = weights.build({name: tensor.to(dtype) for name, tensor in STATE.items()})
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.conv1.weight, STATE["conv1.weight"].to(dtype).float())
    assert str(dtype).removeprefix("torch.") in network.source


def test_safetensors_are_known_by_their_content(tmp_path):
    weights.export(tiny(2), tmp_path / "w.safetensors")
    assert equal(weights.load((tmp_path / "w.safetensors").rename(tmp_path / "w.pth")).state_dict(), STATE)


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


PROGRAMS = {  # how to build its network; the layout and the range that are recognised
    "spandrel": (spandrel_network, "official layout, [0, 255] inside"),
    "spandrel without a mean shift": (lambda scale: spandrel_network(scale, norm=False), "official layout, [0, 1] inside"),
    "torchSR": (torchsr_network, "official layout, [0, 255] inside"),
    "basicsr": (lambda scale: reference_networks.BasicSR(scale, **SIZE), "basicsr layout, [0, 255] inside"),
    "rcan-it": (lambda scale: reference_networks.RCANit(scale, **SIZE), "rcan-it layout, [0, 255] inside"),
}


def small_output(network, x):
    """The weights of the last convolution divided, so that the image lies about [0, 1], as a trained network's does."""
    run = (lambda image: network(image * 255) / 255) if isinstance(network, reference_networks.RCANit) else network
    last = [layer for name, layer in network.named_modules() if getattr(layer, "out_channels", 0) == 3 and "mean" not in name][-1]
    with torch.no_grad():
        spread = run(x.clone()).std()
        last.weight.div_(4 * spread)
        last.bias.div_(4 * spread)
        return run(x.clone())


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("program", PROGRAMS)
def test_another_programs_file_gives_its_image(tmp_path, program, scale):
    build, recognised = PROGRAMS[program]
    network, x = shaken(build(scale)), torch.rand(2, 3, 9, 12)
    expected = small_output(network, x)
    assert 0.1 < expected.std() < 1
    found = weights.load(saved(network.state_dict(), tmp_path / "w.pth"))
    with torch.no_grad():
        assert (found(x) - expected).abs().max() < 1e-5
    assert f"w.pth, {recognised}" in weights.describe(found)
    size = {"upscale_factor": scale, "num_rg": 2, "num_rcab": 3, "channels": 10, "reduction": 3}
    differs = {"activation": "silu", "upsampler_activation": True} if program == "rcan-it" else {"activation": "relu"}
    assert found.arguments.items() >= {**size, **differs}.items()


@pytest.mark.parametrize(
    ("channels", "reduction", "groups", "blocks"), [(7, 7, 1, 1), (64, 16, 1, 2), (50, 16, 11, 1), (33, 1, 1, 12), (12, 5, 2, 2)]
)
def test_any_size_is_read_off_the_file(channels, reduction, groups, blocks):
    network, x = shaken(reference_networks.BasicSR(2, groups, blocks, channels, channels // reduction)), torch.rand(1, 3, 4, 5)
    expected = small_output(network, x)
    with torch.no_grad():
        assert (weights.build(network.state_dict())(x) - expected).abs().max() <= 1e-4


# What surrounds the weights. Every wrapper stands beside every sibling in every nesting.


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def averaged(state):
    return {"n_averaged": torch.tensor(7), **prefixed("module.", state)}


def compiled_inside(state):
    return {re.sub(r"^(trunk\.1\.)", r"module.\1_orig_mod.", name): tensor for name, tensor in state.items()}


WITHOUT_A_NAME = {  # nothing tells which of the other tensors are the network's
    **{prefix: functools.partial(prefixed, prefix) for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.")},
    "compiled inside": compiled_inside,
    "averaged": averaged,
}
PREFIXES = ("netG.", "net_g.", "generator.", "sr_model.", "model.net.", "netG.module.model._orig_mod.")
WITH_A_NAME = {
    **{prefix: functools.partial(prefixed, prefix) for prefix in PREFIXES},
    "averaged in a model": lambda state: prefixed("model.", averaged(state)),
}
WRAPPERS = WITHOUT_A_NAME | WITH_A_NAME
SIBLINGS = (
    {},
    {"discriminator.body.0.weight": torch.ones(1), "discriminator.conv1.weight": torch.ones(8, 3, 3, 3)},
    {"val_psnr.total": torch.tensor(31.2)},
    {"loss_fn.vgg.weight": torch.ones(3), "loss_fn.mean": torch.ones(3)},
    {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-4}]}, "epoch": 3},
    {"best_psnr": np.float64(31.2)},
)
NESTINGS = {  # of the mapping to find, and another network's weights
    "bare": lambda content, _: content,
    "state_dict": lambda content, _: {"epoch": 3, "state_dict": content},
    "checkpoint.state_dict": lambda content, _: {"checkpoint": {"state_dict": content, "loss": torch.tensor(0.5)}},
    "params": lambda content, _: {"params": content, "params_ema": {}},
    "params_ema": lambda content, other: {"params": other, "params_ema": content},
    "model": lambda content, _: {"model": content, "netD": {"conv.weight": torch.ones(3)}},
    "twice": lambda content, _: {"last": content, "best": content},
    "list": lambda content, _: [3, content],
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_in_whatever_surrounds_them(tmp_path, wrapper, nesting):
    state = tiny(2, channels=4, reduction=2, num_rcab=1).state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    for siblings in SIBLINGS:
        content = {**WRAPPERS[wrapper](state), **siblings}
        path = saved(NESTINGS[nesting](content, other), tmp_path / "w.pth.tar")
        foreign = [name for name, value in siblings.items() if isinstance(value, torch.Tensor)]
        if foreign and wrapper in WITHOUT_A_NAME:  # they may be layers of another network
            message = refusal(path)
            assert all(name in message for name in foreign)
        else:
            network = weights.load(path)
            assert equal(network.state_dict(), state), siblings
            assert ("EMA" in network.source) == ("averaged" in wrapper or nesting == "params_ema")
            assert all(name.split(".")[0] in network.source for name in foreign)


@pytest.mark.parametrize("layout", ["native", "official", "basicsr"])
def test_every_layout_is_found_below_a_prefix(tmp_path, layout):
    network = weights.build({**STATE, "mean": torch.tensor(model.DIV2K_MEAN).view(1, 3, 1, 1)})
    weights.export(network, tmp_path / "w.pth", layout)
    state = weights.read(tmp_path / "w.pth")
    content = {**prefixed("body.0.", state.get("state_dict", state.get("params", state))), "discriminator.head.0.weight": torch.ones(1)}
    found = weights.load(saved(content, tmp_path / "w.pth"))
    assert close(found.state_dict(), network.state_dict())
    assert f"{layout} layout" in found.source


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("ema_state_dict", {"state_dict": OTHER, "ema_state_dict": STATE}),
        ("state_dict_ema", {"state_dict": OTHER, "state_dict_ema": prefixed("module.", STATE)}),
        ("model.params_ema", {"model": {"params": OTHER, "params_ema": STATE}}),
        ("generator_ema", {"state_dict": {**prefixed("generator.", OTHER), **prefixed("generator_ema.", STATE)}}),
        ("ema", {**OTHER, **prefixed("ema.", STATE)}),
        ("n_averaged", {**prefixed("model.", OTHER), **prefixed("average.", averaged(STATE))}),
    ],
)
def test_ema_weights_come_first_and_are_never_replaced_by_others(tmp_path, key, content):
    network = weights.load(saved(content, tmp_path / "w.pth"))
    assert equal(network.state_dict(), STATE)
    assert re.search(rf"EMA weights \((.*\.)?{key}\)", network.source)

    def without_a_bias(value):
        if value is STATE["conv3.bias"]:
            return value[1:]
        return {name: without_a_bias(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    assert "conv3.bias" in refusal(saved(without_a_bias(content), tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"first": STATE, "state_dict": OTHER}, ["first", "state_dict"]),
        ({"ema": STATE, "ema_slow": OTHER, "params": STATE}, ["ema", "ema_slow"]),
        ({"state_dict": {**prefixed("student.", STATE), **prefixed("teacher.", OTHER)}}, ["state_dict.student", "state_dict.teacher"]),
        ({**STATE, **prefixed("teacher.", OTHER)}, ["teacher"]),
        ({**STATE, **prefixed("module.", OTHER)}, ["module.mean"]),
        ({**STATE, "module.conv1.weight": STATE["conv1.weight"]}, ["module.conv1.weight"]),
        ({**STATE, "conv2.note": "a word"}, ["conv2.note"]),
        ({**STATE, 5: torch.ones(1)}, ["5"]),
        (prefixed("net.", {**STATE, "conv4.weight": torch.ones(1)}), ["conv4.weight"]),
        ({"small": {**STATE, "trunk.0.residual_group.0.x": torch.ones(1)}, "rest": {"trunk.0.residual_group.0.y": torch.ones(1)}}, ["0.x"]),
        ([1, 2], ["list"]),
        ({"epoch": 3}, ["epoch"]),
        ({}, ["nothing"]),
        ({"state_dict": {"conv1.weight": torch.zeros(8, 3, 3, 3)}}, ["state_dict"]),
    ],
)
def test_a_file_without_one_rcan_is_refused(tmp_path, content, named):
    message = refusal(saved(content, tmp_path / "w.pth"))
    assert all(name in message for name in named)


# What else is in a file

NUMBERS = [np.bool_(True), np.int8(-3), np.uint64(2**63), np.float16(0.5), np.float64(31.2), np.longdouble(0.1), np.complex64(1 - 2j)]
TEXTS = [np.str_("é"), np.str_(""), np.bytes_(b"ab")]
ARRAYS = [np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">i4"), np.array([True, False]), np.array(["a", "bc"]), np.zeros(0)]
SCALARS_AS_ARRAYS = [np.array(31.5), np.array(b"ab")]


def renamed(path, old, new):
    """In the pickle of a file, as another version of a library writes it."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, re.sub(old, new, content) if name.endswith(".pkl") else content)
    return path


@pytest.mark.parametrize("module", [b"numpy._core.", b"numpy.core."], ids=["NumPy 2", "NumPy 1"])
def test_numbers_and_arrays_of_numpy_are_read(tmp_path, module):
    for value in [*NUMBERS, *TEXTS, *ARRAYS, *SCALARS_AS_ARRAYS, np.random.RandomState(0).get_state()[1]]:
        path = saved({"state_dict": STATE, "beside": value}, tmp_path / "w.pth")
        found = weights.read(renamed(path, rb"numpy\._?core\.", module))["beside"]
        assert np.array_equal(found, np.atleast_1d(value) if isinstance(value, np.ndarray) else value), value
        assert isinstance(found, list) or found == value.item()
        assert equal(weights.load(path).state_dict(), STATE)


BESIDE = [
    argparse.Namespace(lr=1e-4),
    types.SimpleNamespace(lr=1e-4),
    collections.defaultdict(list, {"psnr": [31.2]}),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    datetime.timedelta(hours=2),
    PurePosixPath("a/b"),
    PureWindowsPath("a/b"),
    Path(),
    torch.__version__,
    *(b"", frozenset({1}), range(3), slice(1, 2)),
]


@pytest.mark.parametrize("module", [b"cpathlib\n", b"cpathlib._local\n"], ids=["pathlib", "pathlib of Python 3.13"])
def test_plain_objects_beside_the_weights_are_read(tmp_path, module):
    path = renamed(saved({"state_dict": STATE, "beside": BESIDE}, tmp_path / "w.pth"), rb"cpathlib(\._local)?\n", module)
    assert weights.read(path)["beside"] == BESIDE
    assert equal(weights.load(path).state_dict(), STATE)


# Damaged, harmful and other files


class Forged:
    """Pickled as a call of its own."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


HARMFUL = Forged(os.mkdir, ("trap",))
NUMPY_SCALAR = np.float64(0).__reduce__()[0]


def torch_file(content, folder):
    return saved(content, folder / "whole").read_bytes()


def with_a_changed_byte(folder):
    data = bytearray(torch_file(STATE, folder))
    data[len(data) // 2] ^= 1
    return bytes(data)


BROKEN = {  # content; what the reason names
    "empty": (lambda _: b"", "again"),
    "cut": (lambda folder: torch_file(STATE, folder)[:3000], "damaged"),
    "a byte changed": (with_a_changed_byte, "damaged"),
    "web page": (lambda _: b"<!DOCTYPE html><html>quota exceeded</html>", "browser"),
    "harmful": (lambda _: pickle.dumps(HARMFUL, protocol=2), "mkdir"),
    "harmful beside weights": (lambda folder: torch_file({"state_dict": STATE, "extra": HARMFUL}, folder), "mkdir"),
    "objects in an array": (lambda folder: torch_file({**STATE, "x": np.array([None])}, folder), "O8"),
    "fields in an array": (lambda folder: torch_file({**STATE, "x": np.zeros(1, "i4,f4")}, folder), "V8"),
    "objects in a number": (lambda folder: torch_file(Forged(NUMPY_SCALAR, (Forged(np.dtype, ("O8",)), b"12345678")), folder), "O8"),
    "forged byte order": (
        lambda folder: torch_file(
            Forged(NUMPY_SCALAR, (Forged(np.dtype, ("f8",), (3, "O,", None, None, None, -1, -1, 0)), bytes(16))), folder
        ),
        "O,f8",
    ),
    "a number without its bytes": (lambda folder: torch_file(Forged(NUMPY_SCALAR, (np.dtype("f8"), b"")), folder), ""),
    "pickle": (lambda _: pickle.dumps([1.5]), "pickle"),
    "cut pickle": (lambda _: b"\x80\x02J\x00", "damaged"),
    "pickled network": (lambda folder: torch_file(tiny(2), folder), "model.RCAN"),
    "text": (lambda _: b"notes", "PyTorch"),
    "safetensors": (lambda _: b"\x08\0\0\0\0\0\0\0{}      x", "safetensors"),
}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_or_harmful_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    content, named = BROKEN[kind]
    (tmp_path / name).write_bytes(content(tmp_path))
    message = refusal(tmp_path / name)
    assert named in message or name.endswith(".safetensors")
    assert "weights_only" not in message
    assert not (tmp_path / "trap").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_program_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.rand(1, 1, 2, 2)), tmp_path / "w.pt")
    assert "TorchScript" in refusal(tmp_path / "w.pt")


def test_absent_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth.* --model_path"):
        weights.load(tmp_path / "gone.pth")
    refusal(tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "no"), RuntimeError("[enforce fail] can't allocate memory")])
def test_trouble_of_the_machine_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    path = saved(STATE, tmp_path / "w.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        weights.read(path)


# Never a partial load


def official_state():
    return dict(torchsr_network(2).state_dict())


HARMS = {
    "missing": lambda state, name: state.pop(name),
    "renamed": lambda state, name: state.update({name + "s": state.pop(name)}),
    "shape": lambda state, name: state.update({name: state[name][1:]}),
    "not finite": lambda state, name: state.update({name: state[name] * torch.nan}),
    "integers": lambda state, name: state.update({name: state[name].to(torch.int8)}),
    "complex": lambda state, name: state.update({name: state[name].to(torch.complex64)}),
    "sparse": lambda state, name: state.update({name: state[name].to_sparse()}),
    "without values": lambda state, name: state.update({name: state[name].to("meta")}),
    "too large": lambda state, name: state.update({name: state[name].double() * 1e300 + 1e300}),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("native", "trunk.1.residual_group.0.residual_channel_attention_block.2.bias"),
        ("native", "conv1.weight"),
        ("official", "body.1.body.2.body.3.conv_du.2.bias"),
        ("official", "tail.0.0.weight"),
        ("official", "sub_mean.bias"),
    ],
)
def test_a_harmed_tensor_is_named(harm, layout, name):
    state = dict(STATE) if layout == "native" else official_state()
    HARMS[harm](state, name)
    shown = "mean" if (harm, name) == ("too large", "sub_mean.bias") else name  # as it is only too large when converted
    with pytest.raises(ValueError, match=f"^file: .*{re.escape(shown)}"):
        weights.build(state, "file")


def test_ten_misfits_are_named():
    state = official_state()
    lost = [name for name in state if name.startswith("body.1.body.0.")]
    state["body.9.x"] = state["body.9.y"] = torch.zeros(1)
    with pytest.raises(ValueError, match=f"^file: {len(lost) + 2} ") as error:
        weights.build({name: tensor for name, tensor in state.items() if name not in lost}, "file")
    assert len(lost) == 8
    assert all(name in str(error.value) for name in [*lost, "body.9.x", "body.9.y"])


@pytest.mark.parametrize("harm", HARMS)
def test_a_message_on_thousands_of_tensors_stays_short(harm):
    state = dict(tiny(2, num_rg=10, num_rcab=20).state_dict())
    harmed = [name for name in state if name.endswith(".bias")]
    for name in harmed:
        HARMS[harm](state, name)
    with pytest.raises(ValueError, match=str(len(harmed))) as error:
        weights.build(state)
    assert any(name in str(error.value) for name in harmed)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sub_mean.weight": torch.ones(3, 3, 1, 1)}, "sub_mean.weight"),  # has no inverse
        ({"body.99999999.body.7.body.0.weight": torch.zeros(1)}, "100000000 groups"),  # without a list of what is missing
        ({"head.1.weight": torch.zeros(1)}, "head.1"),  # traiNNer's unshuffle, another network
        ({"tail.0.0.weight": torch.zeros(50, 10, 3, 3)}, "tail.0.0.weight"),
    ],
)
def test_impossible_networks_are_refused(changes, named):
    with pytest.raises(ValueError, match=f"^file: .*{re.escape(named)}"):
        weights.build({**official_state(), **changes}, "file")


# Export


def test_what_a_layout_cannot_describe_is_refused_and_nothing_is_written(tmp_path):
    cbam, other_mean, silu = tiny(2, "cbam"), tiny(2), model.RCAN(2, 8, 4, 1, 1, activation="silu")
    for network, name, layout, named in (
        (cbam, "w.pth", "official", "cbam"),
        (silu, "w.pth", "basicsr", "silu"),
        (other_mean, "w.pth", "basicsr", "mean"),
        (other_mean, "w.pth", "caffe", "caffe.*'native', 'official', 'basicsr'"),
        (other_mean, "w.pth.tar", "official", r"w\.pth\.tar.*\.pth, \.pt, \.safetensors"),
        (other_mean, "w.zip", "native", r"w\.zip"),
    ):
        with pytest.raises(ValueError, match=named):
            weights.export(network, tmp_path / name, layout)
    with pytest.raises(ValueError, match=r"w\.pth"):
        weights.export_onnx(cbam, tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_the_official_layout_opens_in_spandrel_and_torchsr(tmp_path, scale, ending):
    spandrel = pytest.importorskip("spandrel")
    network, path, x = tiny(scale), tmp_path / f"w.{ending}", torch.rand(1, 3, 16, 18)
    weights.export(network, path, "official")
    opened = spandrel.ModelLoader().load_from_file(str(path))
    assert (opened.architecture.id, opened.scale) == ("RCAN", scale)
    torchsr = pytest.importorskip("torchsr.models.rcan").RCAN(2, 2, 8, 4, scale).eval()
    torchsr.load_state_dict(safetensors.torch.load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True))
    with torch.no_grad():
        expected = network(x)
        assert (opened(x.clone()) - expected.clamp(0, 1)).abs().max() < 1e-5
        assert (torchsr(x.clone()) - expected).abs().max() < 1e-5


def test_the_basicsr_layout_opens_in_basicsrs_network(tmp_path):
    network, x = model.RCAN(4, channels=10, reduction=3, num_rg=2, num_rcab=3).eval(), torch.rand(1, 3, 8, 9)
    weights.export(network, tmp_path / "w.pth", "basicsr")
    theirs = reference_networks.BasicSR(4, **SIZE).eval()
    theirs.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True)["params"])
    with torch.no_grad():
        assert (theirs(x) - network(x)).abs().max() < 1e-5


def test_silu_weights_can_not_be_taken_for_the_papers(tmp_path):
    network = model.RCAN(2, 8, 4, 1, 1, activation="silu", upsampler_activation=True)
    found = weights.load(saved(network.state_dict(), tmp_path / "bare.pth"))
    assert (found.arguments["activation"], found.arguments["upsampler_activation"]) == ("silu", True)
    with pytest.raises(RuntimeError, match="silu"):
        model.RCAN(2, 8, 4, 1, 1).load_state_dict(network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "attention"), [(2, "cbam"), (3, "channel"), (4, "cbam_average"), (8, "channel")])
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


@pytest.mark.slow
@pytest.mark.parametrize("degradation", [None, "BD"])
def test_an_onnx_file_says_what_it_takes_and_gives_and_shuffles_pixels_by_name(tmp_path, degradation):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    network = tiny(8, "cbam", num_rg=1, num_rcab=1)
    network.degradation = degradation
    weights.export_onnx(network, tmp_path / "w.onnx")
    found = onnx.load(tmp_path / "w.onnx")
    onnx.checker.check_model(found, full_check=True)
    metadata = {entry.key: entry.value for entry in found.metadata_props}
    assert json.loads(metadata.pop("arguments")) == {**network.arguments, "mean": [0.4, 0.5, 0.6]}
    assert metadata == {
        "upscale_factor": "8", "input": found.graph.input[0].name, "output": found.graph.output[0].name, "layout": "NCHW",
        "colour_order": "RGB", "value_range": "[0, 1]", "degradation": degradation or "unknown",
    }  # fmt: skip
    assert [node.op_type for node in found.graph.node].count("DepthToSpace") == 3
    assert str(REPOSITORY).encode() not in (tmp_path / "w.onnx").read_bytes()


# Warm start


def test_another_scale_gives_all_but_the_upsampler(tmp_path):
    source, network = tiny(2), tiny(4)
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights.export(source, tmp_path / "x2.pth")
    _, new, left_out = weights.transfer(network, tmp_path / "x2.pth").splitlines()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("upsampling.") else source.state_dict())[name]), name
    assert [name in new for name in ("upsampling.1.upsample_block.0.weight", "conv1.weight")] == [True, False]
    assert left_out.count("upsampling.") == 2


def test_the_same_scale_gives_everything(tmp_path):
    weights.export(tiny(4), tmp_path / "w.pth")
    network = model.RCAN(4, 8, 4, 2, 2)
    assert len(weights.transfer(network, tmp_path / "w.pth").splitlines()) == 1
    assert equal(network.state_dict(), tiny(4).state_dict())


def test_weights_that_are_not_pointwise_do_not_start_a_network_that_would_ignore_some(tmp_path):
    weights.export(tiny(4), tmp_path / "w.pth")
    network = model.RCAN(4, 12, 4, 2, 2, pointwise_upsampler=True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="pointwise_upsampler"):
        weights.transfer(network, tmp_path / "w.pth")
    assert equal(network.state_dict(), before)
    weights.export(network, tmp_path / "pointwise.pth")
    weights.transfer(tiny(4, channels=12), tmp_path / "pointwise.pth")


@pytest.mark.parametrize("attention", ["cbam", "cbam_average"])
def test_plain_weights_start_cbam_but_not_the_other_way(tmp_path, attention):
    weights.export(tiny(2), tmp_path / "plain.pth")
    weights.export(tiny(2, attention), tmp_path / "cbam.pth")
    cbam = tiny(2, attention)
    assert "spatial_attention_layer" in weights.transfer(cbam, tmp_path / "plain.pth")
    assert equal({name: cbam.state_dict()[name] for name in STATE}, STATE)
    with pytest.raises(ValueError, match=r"spatial_attention_layer|cbam_average"):
        weights.transfer(tiny(2), tmp_path / "cbam.pth")


@pytest.mark.parametrize("changes", [{"channels": 12}, {"num_rg": 3}, {"num_rcab": 1}])
def test_another_size_is_refused_and_nothing_is_taken(tmp_path, changes):
    weights.export(tiny(2), tmp_path / "w.pth")
    network = tiny(2, **changes)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=next(iter(changes))):
        weights.transfer(network, tmp_path / "w.pth")
    assert equal(network.state_dict(), before)


# VGG19's file

DOWNLOAD = torch.hub.download_url_to_file
NAME = "vgg19-dcbb9e9d.pth"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """The working folder of a computer without VGG19's file, on which a download fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """The first two convolutions, as if VGG19 had no others."""
    generator = torch.Generator().manual_seed(1)
    shapes = dict(list(losses.VGG19_SHAPES.items())[:4])
    monkeypatch.setattr(losses, "VGG19_SHAPES", shapes)
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def helpful(error):
    """The message, when it names what helps to get the file."""
    message = str(error.value)
    assert all(part in message for part in (NAME, f"https://download.pytorch.org/models/{NAME}", "pretrained/", "vgg19_weights_path"))
    assert "\n" not in message
    return message


def test_random_weights_are_always_the_same_and_leave_torchs_numbers_alone():
    before = torch.get_rng_state()
    state = weights.read_vgg19("random")
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == losses.VGG19_SHAPES
    assert state["features.2.weight"].std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # Kaiming's
    assert state["features.0.weight"][0, 0, 0, 0].item() == pytest.approx(-0.30641, abs=1e-4)  # in any version


def test_the_given_file_then_the_folder_then_torchvisions_own(nowhere):
    here, cached, given = nowhere / "pretrained" / NAME, nowhere / "torch" / "hub" / "checkpoints" / NAME, nowhere / "mine.pth"
    for path in (here, cached, given):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert weights.find_vgg19(str(given)) == given
    assert weights.find_vgg19().absolute() == here
    here.unlink()
    assert weights.find_vgg19() == cached
    for absent in ("absent.pth", "pretrained"):  # nothing else is taken instead
        with pytest.raises(FileNotFoundError, match=f"vgg19_weights_path='{absent}'") as error:
            weights.find_vgg19(absent)
        helpful(error)


def test_an_absent_file_is_downloaded_into_torchvisions_cache_and_checked(nowhere, monkeypatch):
    calls = []

    def download(url, dst, hash_prefix=None, progress=True):
        calls.append((url, hash_prefix))
        open(dst, "xb").close()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert weights.find_vgg19() == weights.find_vgg19() == nowhere / "torch" / "hub" / "checkpoints" / NAME
    assert calls == [(f"https://download.pytorch.org/models/{NAME}", "dcbb9e9d")]


@pytest.mark.parametrize("failure", [URLError("no route"), RuntimeError('invalid hash value (expected "dcbb9e9d", got "00")'), None])
def test_a_failed_download_names_what_helps_and_leaves_no_file(nowhere, monkeypatch, failure):
    def fail(*_, **__):
        raise failure or OSError("sockets are blocked")

    if failure:
        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    else:
        monkeypatch.setattr(torch.hub, "download_url_to_file", DOWNLOAD)
        monkeypatch.setattr(socket.socket, "connect", fail)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))])
    with pytest.raises(OSError) as error:
        weights.read_vgg19()
    assert str(failure or "sockets are blocked") in helpful(error)
    assert not [path for path in nowhere.rglob("*") if path.is_file()]


def test_a_name_that_promises_its_sha256_is_held_to_it(nowhere, small):
    (nowhere / "pretrained").mkdir()
    with pytest.raises(ValueError, match=f"{NAME}.* dcbb9e9d") as error:
        saved(small, nowhere / "pretrained" / NAME)
        weights.read_vgg19()
    helpful(error)
    digest = hashlib.sha256((nowhere / "pretrained" / NAME).read_bytes()).hexdigest()[:8]
    path = (nowhere / "pretrained" / NAME).rename(f"mine-{digest}.pth")
    assert equal(weights.read_vgg19(str(path)), small)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda state: {**state, "features.2.bias": torch.zeros(65)}, "features.2.bias"),
        (lambda state: {name: value for name, value in state.items() if "weight" not in name}, "features.0.weight"),
        (lambda state: {"state_dict": state}, "features.0.weight"),
        (lambda state: {**state, "features.0.weight": "a word"}, "features.0.weight"),
        (lambda state: list(state.values()), "features.0.weight"),
        (lambda state: {**state, "extra": HARMFUL}, "mkdir"),
    ],
)
def test_a_file_that_is_not_vgg19s_is_refused(nowhere, small, spoil, named):
    path = saved(spoil(small), nowhere / "other.pth")
    with pytest.raises(ValueError, match=f"^other.pth: .*{named}") as error:
        weights.read_vgg19("other.pth")
    assert path.exists() and not (nowhere / "trap").exists()
    helpful(error)


@pytest.mark.parametrize("kind", ["whole", "half", "parameters", "old format"])
def test_a_good_file_gives_its_tensors_in_fp32(nowhere, small, kind):
    content = small
    if kind == "whole":  # the published file also has a classifier
        content = {**small, "classifier.0.weight": torch.ones(2, 2), "classifier.0.bias": torch.ones(2)}
    if kind == "half":
        content = {name: tensor.half() for name, tensor in small.items()}
    if kind == "parameters":
        content = {name: nn.Parameter(tensor) for name, tensor in small.items()}
    torch.save(content, nowhere / "good.pth", _use_new_zipfile_serialization=kind != "old format")  # the published one is old
    found = weights.read_vgg19("good.pth")
    assert equal(found, {name: content[name].detach().float() for name in small})
    assert not any(tensor.requires_grad for tensor in found.values())
