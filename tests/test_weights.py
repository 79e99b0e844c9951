"""Files of weights: what is saved comes back equal; anything else is refused whole, and said."""

import pickle
import re

import pytest
import torch

import model
import weights
from helpers import tiny


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("attention", ["channel", "cbam"])
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
    assert weights.describe(network).endswith("both.pth, averaged weights (EMA)")
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
        return (open, ("/tmp/should-not-exist", "w"))


def files(folder):
    torch.save(tiny(2).state_dict(), folder / "whole")
    data = (folder / "whole").read_bytes()
    return {
        "empty.pth": b"",
        "cut.pth": data[: len(data) // 2],
        "page.pth": b"<!DOCTYPE html><html>quota exceeded</html>",
        "harmful.pth": pickle.dumps(Harmful()),
    }


@pytest.mark.parametrize("name", ["empty.pth", "cut.pth", "page.pth", "harmful.pth"])
def test_a_broken_or_harmful_file_is_named_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(files(tmp_path)[name])
    with pytest.raises(ValueError, match=f"{name}: not a file of weights that can be read safely") as error:
        weights.load(tmp_path / name)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


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


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout='caffe' is unknown; known are 'native'"):
        weights.export(tiny(), tmp_path / "w.pth", "caffe")


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
