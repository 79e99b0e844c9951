"""Upscaling: rounding, strips that change nothing, memory that runs out, half precision that overflows, tiles.

Images of 16 bits show differences of 1.5e-5 in what `upscale` returns.
"""

import io
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

import imgproc
import model
import upscaling
import weights
from helpers import REPOSITORY, Enlarge, drawn_image, noise_image, tiny
from upscaling import upscale


def noise_of_16_bits(height, width):
    return np.random.default_rng(0).integers(0, 65536, (height, width, 3), dtype=np.uint16)


def in_one_piece(network, lr):
    """The network's output for an image of 16 bits, in 65535ths."""
    with torch.no_grad():
        sr = network(torch.from_numpy(lr.astype(np.float32)).permute(2, 0, 1)[None] / 65535)[0].permute(1, 2, 0).numpy()
    assert 0.01 < sr.std() < 0.5 and (np.abs(sr - 0.5) < 0.5).mean() > 0.9  # little is clipped, so that equality says something
    return sr.clip(0, 1) * 65535


def same(one, other):
    return np.abs(one.astype(float) - other).max() <= 1.5  # a rounding to the other side, and float32's own


@pytest.mark.parametrize("self_ensemble", [False, True])
@pytest.mark.parametrize(("dtype", "peak"), [(np.uint8, 255), (np.uint16, 65535)])
def test_the_result_is_rounded_and_clipped(self_ensemble, dtype, peak):
    lr = np.random.default_rng(0).integers(0, peak + 1, (5, 7, 3), dtype=dtype)
    blocks, before = lr.repeat(2, 0).repeat(2, 1), lr.copy()
    assert upscale(Enlarge(), lr, self_ensemble).dtype == dtype
    assert (upscale(Enlarge(), lr, self_ensemble) == blocks).all()
    assert (upscale(Enlarge(0.4 / peak), lr, self_ensemble) == blocks).all()
    assert (upscale(Enlarge(0.6 / peak), lr, self_ensemble) == np.minimum(blocks, peak - 1) + 1).all()
    assert (upscale(Enlarge(2.0), lr, self_ensemble) == peak).all()
    assert (upscale(Enlarge(-2.0), lr, self_ensemble) == 0).all()
    assert (lr == before).all()


def test_self_ensemble_is_the_mean_of_the_eight_orientations():
    network, lr = tiny(2), drawn_image(9, 7)
    total = np.zeros((18, 14, 3))
    back = {0: 0, 1: 3, 2: 2, 3: 1, 4: 4, 5: 5, 6: 6, 7: 7}  # flips undo themselves
    for orientation in range(8):
        oriented = torch.from_numpy(imgproc.flip_rotate(lr, orientation).copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            sr = network(oriented)[0].permute(1, 2, 0).numpy()
        total += imgproc.flip_rotate(sr.copy(), back[orientation])
    expected = np.clip(total / 8, 0, 1) * 255
    assert np.abs(upscale(network, lr, self_ensemble=True) - expected).max() <= 0.5 + 1e-3


# Strips


@pytest.mark.parametrize("attention", ["channel", "cbam", "cbam_average"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_strips_change_nothing(scale, attention):
    network, lr = tiny(scale, attention), noise_of_16_bits(19, 13)
    expected = in_one_piece(network, lr)
    for rows in (1, 4, 5, 18):
        assert same(upscale(network, lr, strip_rows=rows), expected)


@pytest.mark.parametrize("scale", [2, 4])
def test_strips_of_a_pointwise_upsampler_change_nothing(scale):
    torch.manual_seed(1)
    network, lr = model.RCAN(scale, 12, 4, 2, 2, pointwise_upsampler=True).eval(), noise_of_16_bits(19, 13)
    network.folds_upsampler = False
    expected = in_one_piece(network, lr)
    network.folds_upsampler = True
    for rows in (1, 4, 18, 30):
        assert same(upscale(network, lr, strip_rows=rows), expected)


def test_strips_of_other_activations_and_orientations_change_nothing():
    torch.manual_seed(0)
    network, lr = model.RCAN(4, 8, 4, 2, 2, activation="silu", upsampler_activation=True).eval(), noise_of_16_bits(19, 13)
    assert same(upscale(network, lr, strip_rows=4), in_one_piece(network, lr))
    assert same(upscale(network, lr, True, strip_rows=4), upscale(network, lr, True))


def upsampled(network, error=None, more_than=0):
    """The (width, rows) that the upsampler is given from now on; above so many rows it raises the error."""
    seen = []

    def note(_, arguments):
        seen.append((arguments[0].shape[3], arguments[0].shape[2]))
        if error and seen[-1][1] > more_than:
            raise error

    network.upsampling[0].register_forward_pre_hook(note)
    return seen


def test_strips_have_the_rows_that_fit_into_their_bytes_in_each_orientation(monkeypatch):
    network = tiny(2)
    monkeypatch.setattr(upscaling, "STRIP_BYTES", 3 * 4 * 8 * 4 * 30 * 10)  # three maps, float32, 8 channels, 2 x 2 pixels, 10 rows of 30
    seen = upsampled(network)
    upscale(network, drawn_image(30, 20), self_ensemble=True)
    reach = 3  # rows above or below, for the convolutions
    assert set(seen) == {(20, 15 + reach), (30, 10 + reach)}
    monkeypatch.setattr(upscaling, "STRIP_BYTES", 1)
    seen.clear()
    upscale(network, drawn_image(30, 20))
    assert max(rows for _, rows in seen) == upscaling.MIN_ROWS + 2 * reach


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_strips_bound_the_memory():
    code = """
import numpy as np, torch, model, upscaling
torch.set_num_threads(1)
upscaling.STRIP_BYTES = 8 * 2**20
peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
network, lr = model.RCAN(4, 24, 4, 1, 1).eval(), np.zeros((400, 480, 3), np.uint8)
upscaling.upscale(network, lr[:16, :16])
start = peak()
upscaling.upscale(network, lr)
strips = peak()
upscaling.upscale(network, lr, strip_rows=1000)
print(strips - start, peak() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    strips, whole = map(float, done.stdout.split())  # MiB
    assert whole > 4 * strips
    trunk = 3 * 24 * 400 * 480 * 4 / 2**20  # three feature maps in float32
    assert strips < trunk + 4 * 8  # a strip of the upsampler, its parts, the images


# Memory that runs out

CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
MEMORY_ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory."),
    "cpu": CPU_ERROR,
    "numpy": MemoryError(),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn's plan": RuntimeError("GET was unable to find an engine to execute this computation"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
}


@pytest.mark.parametrize("kind", MEMORY_ERRORS)
def test_smaller_strips_are_tried_when_memory_runs_out(kind):
    network, lr = tiny(2), noise_of_16_bits(30, 16)
    expected = in_one_piece(network, lr)
    tried = upsampled(network, MEMORY_ERRORS[kind], more_than=13)
    with pytest.warns(UserWarning, match="15 instead of 30"), pytest.warns(UserWarning, match="7 instead of 15"):
        found = upscale(network, lr)
    assert [rows for _, rows in tried] == [30, 15 + 3, 7 + 3, 7 + 6, 7 + 6, 7 + 5, 2 + 3]
    assert same(found, expected)


def test_when_the_smallest_strips_are_too_large_the_image_and_the_remedy_are_named():
    network = tiny(2)
    tried = upsampled(network, CPU_ERROR)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"16x30.* --tile 256"):
        upscale(network, drawn_image(30, 16))
    assert [rows for _, rows in tried] == [30, 15 + 3, 7 + 3, 4 + 3]


def test_other_errors_are_not_taken_for_memory():
    network = tiny(2)
    upsampled(network, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        upscale(network, drawn_image(30, 16))


# Output that is not finite


class Overflowing(Enlarge):
    """Infinite in half precision only."""

    def forward(self, x):
        return super().forward(x) + (torch.inf if torch.is_autocast_enabled(x.device.type) else 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_output_that_overflows_is_computed_again_in_fp32(precision):
    lr = drawn_image(5, 7)
    with pytest.warns(UserWarning, match=precision):
        sr = upscale(Overflowing(), lr, precision=precision)
    assert (sr == lr.repeat(2, 0).repeat(2, 1)).all()
    lr = noise_of_16_bits(5, 7)  # always in fp32, without a warning
    assert (upscale(Overflowing(), lr, precision=precision) == lr.repeat(2, 0).repeat(2, 1)).all()


def test_output_that_is_not_finite_never_becomes_an_image():
    with pytest.raises(ValueError, match="7x5"):
        upscale(Enlarge(float("nan")), drawn_image(5, 7))
    with pytest.warns(UserWarning, match="bf16"), pytest.raises(ValueError, match="7x5"):
        upscale(Enlarge(float("inf")), drawn_image(5, 7), precision="bf16")


def test_bf16_is_near_fp32_and_leaves_the_network_alone():
    network, lr = tiny(2), drawn_image(24, 24)
    exact, rounded = upscale(network, lr), upscale(network, lr, precision="bf16")
    assert (exact != rounded).any()
    assert imgproc.psnr(rounded, exact, 0) > 40
    assert imgproc.psnr(upscale(network, lr, precision="bf16", strip_rows=5), exact, 0) > 40
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert (upscale(network, lr) == exact).all()


def test_bf16_takes_the_weights_as_they_are_now():
    network, lr = tiny(2), drawn_image(24, 24)
    before = upscale(network, lr, precision="bf16")
    with torch.no_grad():
        network.conv3.bias += 0.2
    assert (upscale(network, lr, precision="bf16").astype(int) - before).mean() > 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_feature_map_that_waits_in_a_file_comes_back_as_it_was(monkeypatch, precision):
    network, lr = tiny(3), drawn_image(31, 22)
    expected = upscale(network, lr, precision=precision, strip_rows=5)
    monkeypatch.setattr(upscaling, "ASIDE_BYTES", 0)
    files = []
    monkeypatch.setattr(upscaling.tempfile, "TemporaryFile", lambda: files.append(io.BytesIO()) or files[-1])
    assert (upscale(network, lr, precision=precision, strip_rows=5) == expected).all()
    assert len(files) == len(network.trunk) and all(file.closed for file in files)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full, as Linux has")
def test_a_full_folder_for_temporary_files_is_named(monkeypatch):
    monkeypatch.setattr(upscaling, "ASIDE_BYTES", 0)
    monkeypatch.setattr(upscaling.tempfile, "TemporaryFile", partial(Path("/dev/full").open, "wb+"))
    with pytest.raises(ValueError, match="TMPDIR"):
        upscale(tiny(3), drawn_image(31, 22), strip_rows=5)


@pytest.mark.parametrize("options", [{}, {"strip_rows": 5}, {"tile": 16, "tile_overlap": 4}, {"strip_rows": 4, "self_ensemble": True}])
def test_parts_of_the_progress_add_up_to_the_whole(options):
    parts = []
    upscale(tiny(2), drawn_image(31, 22), **options, progress=parts.append)
    assert sum(parts) == pytest.approx(1) and min(parts) > 0
    assert len(parts) >= (10 if "strip_rows" in options else len(options))


# Tiles


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (9, 4), (16, 5), (33, 16)])
def test_tiles_cover_every_pixel_of_every_size(factor, tile, overlap):
    for height, width in itertools.product((8, 9, 17, 33, 70), (8, 15, 32, 69)):
        lr = noise_image(height, width)
        assert (upscale(Enlarge(factor=factor), lr, tile=tile, tile_overlap=overlap) == lr.repeat(factor, 0).repeat(factor, 1)).all()


class First(Enlarge):
    """1 for the first image that it is given, 0 for all others."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return torch.full_like(super().forward(x), float(self.calls == 1))


def test_shares_of_tiles_by_hand():
    """48 columns are tiles at 0 and 16; of the 16 that both have, the outer 4 of each tile aren't used: 1, then 8/9 … 1/9, then 0."""
    sr = upscale(First(factor=1), noise_of_16_bits(32, 48), tile=32, tile_overlap=16)
    shares = [*20 * [1], *(ninth / 9 for ninth in range(8, 0, -1)), *20 * [0]]
    assert np.abs(sr / 65535 - np.array(shares)[:, None]).max() < 1e-4


class Neutral(model.ChannelAttention):
    gates = ()


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_without_attention_tiles_change_nothing(scale):
    network, lr = tiny(scale, num_rg=1, num_rcab=1), noise_of_16_bits(61, 50)
    network.trunk[0].residual_group[0].residual_channel_attention_block[3] = Neutral(8, 4)
    found = upscale(network, lr, tile=40, tile_overlap=32)
    assert same(found, in_one_piece(network, lr))  # each tile's outer 8 rows aren't used; the network looks 7 and a bit far


def test_with_attention_tiles_change_the_result_and_seams_are_no_worse():
    network = weights.load(REPOSITORY / "assets/weights/rcan_light_x2.pth.tar")
    lr = imgproc.imresize(skimage.data.astronaut(), 1 / 4).astype(np.uint16) * 257  # 128 x 128
    tiled, whole = (upscale(network, lr, tile=tile, tile_overlap=16) / 65535 for tile in (48, 0))
    difference = np.abs(tiled - whole).mean(2)  # (H, W)
    assert 1e-5 < difference.mean() < 1e-2
    shared = np.zeros(256, bool)
    for before, start in itertools.pairwise((0, 27, 53, 80)):  # four tiles of 48, evenly spread over 128
        shared[2 * start : 2 * (before + 48)] = True
    seams = shared[:, None] | shared
    assert difference[seams].mean() <= max(1.5 * difference[~seams].mean(), 0.1 / 255)  # or below what 8 bits show


def test_self_ensemble_and_memory_work_in_tiles():
    network, lr = tiny(2), drawn_image(40, 30)
    sr = upscale(network, lr, self_ensemble=True, tile=24, tile_overlap=8)
    assert sr.shape == (80, 60, 3)
    assert imgproc.psnr(sr, upscale(network, lr, self_ensemble=True), 0) > 25
    upsampled(network, CPU_ERROR, more_than=15)
    with pytest.warns(UserWarning, match="12 instead of 24"):
        again = upscale(network, lr, self_ensemble=True, tile=24, tile_overlap=8)
    assert abs(sr.astype(int) - again).max() <= 1
