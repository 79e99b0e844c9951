"""scripts/export.py: as a user runs it, for every layout; the file is compared before success is reported."""

import importlib
import sys

import pytest
import torch

import weights
from helpers import REPOSITORY, tiny

sys.path.insert(0, str(REPOSITORY / "scripts"))
export = importlib.import_module("export")


def run(folder, layout, output, *more):
    arguments = ["--model_path", str(folder / "w.pth"), "--layout", layout, "--output", str(folder / output), *more]
    export.main(arguments)


@pytest.fixture
def folder(tmp_path):
    network = tiny(2, num_rg=1, num_rcab=1)
    network.mean.copy_(torch.tensor(weights.model.DIV2K_MEAN).view(1, 3, 1, 1))
    weights.export(network, tmp_path / "w.pth")
    return tmp_path


@pytest.mark.parametrize(("layout", "output"), [("official", "a.pth"), ("basicsr", "a.safetensors"), ("native", "sub/a.pth.tar")])
def test_each_layout_is_written_and_compared(folder, capsys, layout, output):
    run(folder, layout, output)
    said = capsys.readouterr().out
    assert f"{folder / output}: {layout} layout, " in said
    assert "MB; differs by at most " in said
    assert f"{layout} layout" in weights.load(folder / output).source
    with pytest.raises(ValueError, match=r"already there; choose another --output, or set --overwrite True"):
        run(folder, layout, output)
    run(folder, layout, output, "--overwrite", "True")


def test_onnx_is_written_and_compared(folder, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run(folder, "onnx", "a.onnx")
    assert "onnx layout" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"a\.pth: unknown ending; files in the onnx layout end in \.onnx"):
        run(folder, "onnx", "a.pth")


def test_without_onnx_the_remedy_is_said(folder, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"ONNX needs onnx and onnxscript: pip install onnx onnxscript"):
        run(folder, "onnx", "a.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["w.pth"]


@pytest.mark.parametrize("already_there", [False, True])
def test_a_file_that_differs_is_not_left_behind(folder, monkeypatch, already_there):
    other = tiny(2, num_rg=1, num_rcab=1)
    other.load_state_dict(weights.load(folder / "w.pth").state_dict())
    other.conv3.bias.data += 2e-5
    if already_there:
        (folder / "a.pth").write_bytes(b"before")
    monkeypatch.setattr(export.weights, "export", lambda network, path, layout: torch.save(other.state_dict(), path))
    with pytest.raises(ValueError, match=r"a\.pth: not written, as it would differ by 2\.0e-05 of the range, over 1e-05"):
        run(folder, "native", "a.pth", "--overwrite", "True")
    assert sorted(path.name for path in folder.iterdir()) == ["a.pth", "w.pth"][not already_there :]
    assert not already_there or (folder / "a.pth").read_bytes() == b"before"


def test_the_file_that_is_read_is_never_overwritten(folder):
    before = (folder / "w.pth").read_bytes()
    with pytest.raises(ValueError, match=r"w\.pth: is the file that is read, and may hold more than its weights"):
        run(folder, "official", "w.pth", "--overwrite", "True")
    assert (folder / "w.pth").read_bytes() == before
