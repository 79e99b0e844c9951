"""scripts/export.py: each layout is written and compared, and a file that differs never reaches the output."""

import importlib
import sys

import numpy as np
import pytest
import torch

import weights
from helpers import REPOSITORY, tiny
from runtime import run_script

sys.path.insert(0, str(REPOSITORY / "scripts"))
export = importlib.import_module("export")


@pytest.fixture
def folder(tmp_path):
    network = tiny(2, num_rg=1, num_rcab=1)
    network.mean.copy_(torch.tensor(weights.model.DIV2K_MEAN).view(1, 3, 1, 1))
    weights.export(network, tmp_path / "w.pth")
    return tmp_path


def run(folder, layout, output, *more):
    export.main(["--model_path", str(folder / "w.pth"), "--layout", layout, "--output", str(folder / output), *more])


@pytest.mark.parametrize(("layout", "output"), [("official", "a.pth"), ("basicsr", "a.safetensors"), ("native", "sub/a.pth.tar")])
def test_each_layout_is_written_and_compared(folder, capsys, layout, output):
    run(folder, layout, output)
    assert str(folder / output) in capsys.readouterr().out
    written = weights.load(folder / output)
    assert f"{layout} layout" in written.source
    x = torch.rand(1, 3, 9, 8)
    torch.testing.assert_close(written(x), weights.load(folder / "w.pth")(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"a\.[\w.]+: .*--overwrite"):
        run(folder, layout, output)
    run(folder, layout, output, "--overwrite", "True")


@pytest.mark.slow
def test_onnx_is_written_and_compared(folder, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run(folder, "onnx", "a.onnx")
    assert str(folder / "a.onnx") in capsys.readouterr().out
    session = onnxruntime.InferenceSession(folder / "a.onnx", providers=["CPUExecutionProvider"])
    x = torch.rand(3, 3, 7, 33)
    (sr,) = session.run(["sr"], {"lr": x.numpy()})
    assert abs(weights.load(folder / "w.pth")(x).detach().numpy() - sr).max() < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the converter's own
@pytest.mark.parametrize(("scale", "attention"), [(3, "channel"), (4, "cbam"), (8, "cbam_average")])
def test_core_ml_converts_it(tmp_path, scale, attention):
    coremltools = pytest.importorskip("coremltools")
    traced = torch.jit.trace(tiny(scale, attention), torch.rand(1, 3, 32, 24))
    sides = [coremltools.RangeDim(16, 512, default=32) for _ in range(2)]
    lr, sr = coremltools.TensorType("lr", (1, 3, *sides)), coremltools.TensorType("sr")
    coremltools.convert(traced, inputs=[lr], outputs=[sr]).save(str(tmp_path / "a.mlpackage"))  # only macOS can run it
    program = coremltools.models.MLModel(str(tmp_path / "a.mlpackage"), skip_model_load=True).get_spec().mlProgram.functions["main"]
    (block,) = program.block_specializations.values()
    assert [operation.type for operation in block.operations].count("pixel_shuffle") == {3: 1, 4: 2, 8: 3}[scale]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the converter's own
@pytest.mark.parametrize(("scale", "attention"), [(3, "channel"), (4, "cbam"), (8, "cbam_average")])
def test_ncnn_gives_the_same(tmp_path, scale, attention):
    pnnx, ncnn = pytest.importorskip("pnnx"), pytest.importorskip("ncnn")
    network = tiny(scale, attention)
    pnnx.export(network, str(tmp_path / "a.pt"), torch.rand(1, 3, 32, 24), torch.rand(1, 3, 20, 40), fp16=False)
    net, x = ncnn.Net(), torch.rand(3, 17, 31)
    assert net.load_param(str(tmp_path / "a.ncnn.param")) == net.load_model(str(tmp_path / "a.ncnn.bin")) == 0
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(x.numpy()))
    _, sr = extractor.extract("out0")
    assert abs(network(x[None])[0].detach().numpy() - np.array(sr)).max() < 1e-4


@pytest.mark.slow
def test_openvino_gives_the_same_in_f32(folder):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    run(folder, "onnx", "a.onnx")
    network = openvino.Core().compile_model(folder / "a.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = torch.rand(2, 3, 7, 33)
    assert abs(weights.load(folder / "w.pth")(x).detach().numpy() - network(x.numpy())["sr"]).max() < 1e-4


@pytest.mark.parametrize(("layout", "output"), [("onnx", "a.pth"), ("official", "a.pth.tar"), ("native", "a.onnx"), ("basicsr", "a")])
def test_a_wrong_ending_is_named_before_anything_is_read(folder, capsys, layout, output):
    (folder / "w.pth").write_bytes(b"no weights")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: run(folder, layout, output))
    assert end.value.code == 1
    assert str(folder / output) in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["w.pth"]


def test_what_cannot_be_written_leaves_nothing(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"a\.pth"):
        run(folder, "onnx", "a.pth")
    with pytest.raises(ValueError, match=r"a\.onnx"):
        run(folder, "official", "a.onnx")
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        run(folder, "onnx", "a.onnx")
    assert [path.name for path in folder.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("there", [False, True])
def test_a_file_that_differs_never_reaches_the_output(folder, monkeypatch, there):
    other = weights.load(folder / "w.pth")
    other.conv3.bias.data += 2e-5
    if there:
        (folder / "a.pth").write_bytes(b"before")
    monkeypatch.setattr(weights, "export", lambda _network, path, _layout: torch.save(other.state_dict(), path))
    with pytest.raises(ValueError, match=r"a\.pth: .*2\.0e-05"):
        run(folder, "native", "a.pth", "--overwrite", "True")
    assert {path.name for path in folder.iterdir()} == {"w.pth", *(["a.pth"] if there else [])}
    assert not there or (folder / "a.pth").read_bytes() == b"before"


def test_the_input_is_never_overwritten(folder):
    before = (folder / "w.pth").read_bytes()
    with pytest.raises(ValueError, match=r"w\.pth"):
        run(folder, "official", "w.pth", "--overwrite", "True")
    assert (folder / "w.pth").read_bytes() == before
