"""Upscaling: rounding, strips that change nothing, memory that runs out, half precision that overflows, tiles."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import torch
from pytest import approx
from torch import nn

import imgproc
import model
import upscaling
import weights
from helpers import REPOSITORY, Enlarge, drawn_image, noise_image, tiny
from upscaling import upscale


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_the_result_is_rounded_and_clipped(self_ensemble):
    lr = drawn_image(5, 7)
    blocks = lr.repeat(2, 0).repeat(2, 1)
    before = lr.copy()
    assert (upscale(Enlarge(), lr, self_ensemble) == blocks).all()
    assert (upscale(Enlarge(0.4 / 255), lr, self_ensemble) == blocks).all()
    assert (upscale(Enlarge(0.6 / 255), lr, self_ensemble) == np.minimum(blocks, 254) + 1).all()
    assert (upscale(Enlarge(2.0), lr, self_ensemble) == 255).all()
    assert (upscale(Enlarge(-2.0), lr, self_ensemble) == 0).all()
    assert (lr == before).all()


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_sixteen_bits_stay_sixteen_bits(self_ensemble):
    lr = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    blocks = lr.repeat(2, 0).repeat(2, 1)
    sr = upscale(Enlarge(), lr, self_ensemble)
    assert sr.dtype == np.uint16
    assert (sr == blocks).all()
    assert (upscale(Enlarge(0.6 / 65535), lr, self_ensemble) == np.minimum(blocks, 65534) + 1).all()


def test_self_ensemble_is_the_mean_over_the_eight_turns():
    network, lr = tiny(2), drawn_image(9, 7)
    total = np.zeros((18, 14, 3))
    back = {0: 0, 1: 3, 2: 2, 3: 1, 4: 4, 5: 5, 6: 6, 7: 7}  # mirrored turns undo themselves
    for orientation in range(8):
        turned = torch.from_numpy(imgproc.flip_rotate(lr, orientation).copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            sr = network(turned)[0].permute(1, 2, 0).numpy()
        total += imgproc.flip_rotate(sr.copy(), back[orientation])
    expected = np.clip(total / 8, 0, 1) * 255
    assert np.abs(upscale(network, lr, self_ensemble=True) - expected).max() <= 0.5 + 1e-3


# Strips


@pytest.mark.parametrize("attention", ["channel", "cbam", "cbam_average"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 4, 5, 18])
def test_strips_change_nothing(scale, attention, rows):
    network = tiny(scale, attention)
    x = torch.rand(2, 3, 19, 13)
    before = x.clone()
    with torch.inference_mode():
        expected = network(x)
        strips = list(upscaling._strips(network, x, rows))
    assert [top for top, _ in strips] == [scale * top for top in range(0, 19, rows)]
    assert (torch.cat([strip for _, strip in strips], 2) - expected).abs().max() < 1e-6
    assert torch.equal(x, before)


def test_strips_of_other_activations_change_nothing():
    torch.manual_seed(0)
    network = model.RCAN(4, 8, 4, 2, 2, activation="silu", upsampler_activation=True).eval()
    x = torch.rand(1, 3, 19, 13)
    with torch.inference_mode():
        parts = torch.cat([strip for _, strip in upscaling._strips(network, x, 4)], 2)
        assert (parts - network(x)).abs().max() < 1e-6


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_a_picture_in_strips_is_that_in_one_piece(self_ensemble):
    lr = drawn_image(21, 16)
    whole, parts = (upscale(tiny(3), lr, self_ensemble, strip_rows=rows) for rows in (100, 4))
    assert abs(whole.astype(int) - parts).max() <= 1  # where a value lies at a half
    assert (whole != parts).mean() < 0.001


def test_strips_are_chosen_by_their_size():
    light, full = model.rcan_light_x4(), model.rcan_x4()
    assert upscaling._affordable_rows(light, 1920) == 384 * 2**20 // (3 * 4 * 48 * 16 * 1920)
    assert upscaling._affordable_rows(full, 10**6) == upscaling.MIN_ROWS
    assert upscaling._affordable_rows(light, 48) > 48
    assert upscaling._affordable_rows(Enlarge(), 9) > 10**6


def test_turned_pictures_have_strips_of_their_own(monkeypatch):
    asked, strips = [], upscaling._strips
    monkeypatch.setattr(upscaling, "STRIP_BYTES", 3 * 4 * 8 * 4 * 30 * 10)  # ten rows of 30 LR pixels
    monkeypatch.setattr(upscaling, "_strips", lambda network, x, rows: asked.append((x.shape[3], rows)) or strips(network, x, rows))
    upscale(tiny(2), drawn_image(30, 10), self_ensemble=True)
    assert sorted(set(asked)) == [(10, 30), (30, 10)]


def test_sixteen_bits_are_computed_in_fp32():
    lr = np.full((4, 5, 3), 12345, np.uint16)
    assert (upscale(Overflowing(), lr, precision="bf16") == 12345).all()  # without a warning


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_falls_fourfold():
    code = """
import sys, numpy as np, torch, model, upscaling
torch.set_num_threads(1); torch.manual_seed(0)
upscaling.STRIP_BYTES = 32 * 2**20
peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
network, lr = model.RCAN(4, 32, 4, 1, 1).eval(), np.zeros((256, 320, 3), np.uint8)
upscaling.upscale(network, lr[:16, :16])
before = peak()
upscaling.upscale(network, lr, strip_rows=int(sys.argv[1]) or None)
print(peak() - before)
"""
    whole, strips = (
        float(subprocess.run([sys.executable, "-c", code, rows], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)
        for rows in ("1000", "0")
    )
    assert whole > 4 * strips


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_full_hd_takes_under_3_gb():
    code = """
import numpy as np, torch, model, upscaling, utils
network = model.RCAN(4, **{**model.LIGHT_SIZE, "num_rg": 1, "num_rcab": 1}).eval()  # more groups take turns in the same memory
upscaling.upscale(network, np.zeros((1080, 1920, 3), np.uint8))
print(utils.peak_memory(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) * 2**30 / 1e9 < 3


# Memory that runs out


def out_of_memory_above(rows, monkeypatch, error):
    strips, tried = upscaling._strips, []

    def limited(network, x, wanted):
        tried.append(min(wanted, x.shape[2]))
        if tried[-1] > rows:
            raise error
        return strips(network, x, wanted)

    monkeypatch.setattr(upscaling, "_strips", limited)
    return tried


CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), CPU_ERROR, MemoryError()], ids=["cuda", "cpu", "numpy"])
def test_a_smaller_strip_is_tried_when_memory_runs_out(monkeypatch, error):
    lr = drawn_image(30, 16)
    expected = upscale(tiny(2), lr)
    tried = out_of_memory_above(8, monkeypatch, error)
    with pytest.warns(UserWarning, match="out of memory; trying again with") as said:
        found = upscale(tiny(2), lr)
    assert tried == [30, 15, 7]
    assert len(said) == 2
    assert abs(found.astype(int) - expected).max() <= 1


def test_there_is_a_minimum_and_then_a_sentence(monkeypatch):
    tried = out_of_memory_above(0, monkeypatch, CPU_ERROR)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"picture of 16x30 doesn't fit into memory, even 4 rows .* --tile 256"):
        upscale(tiny(2), drawn_image(30, 16))
    assert tried == [30, 15, 7, 4]


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    out_of_memory_above(0, monkeypatch, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        upscale(tiny(2), drawn_image(30, 16))


# Output that is not finite


class Overflowing(Enlarge):
    """Infinite in half precision only."""

    def forward(self, x):
        return super().forward(x) + (torch.inf if torch.is_autocast_enabled(x.device.type) else 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_overflows_is_computed_again_in_fp32(precision):
    lr = drawn_image(5, 7)
    with pytest.warns(UserWarning, match=f"the output in {precision} is not finite; this picture is computed again in fp32"):
        sr = upscale(Overflowing(), lr, precision=precision)
    assert (sr == lr.repeat(2, 0).repeat(2, 1)).all()


def test_output_that_is_not_finite_never_becomes_a_picture():
    with pytest.raises(ValueError, match="picture of 7x5 is not finite"):
        upscale(Enlarge(float("nan")), drawn_image(5, 7))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="is not finite"):
        upscale(Enlarge(float("inf")), drawn_image(5, 7), precision="bf16")


def test_bf16_is_near_fp32():
    network, lr = tiny(2), drawn_image(24, 24)
    exact, rounded = upscale(network, lr), upscale(network, lr, precision="bf16")
    assert (exact != rounded).any()
    assert imgproc.psnr(rounded, exact, 0) > 40


# Tiles


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (9, 4), (16, 5), (33, 16), (64, 8)])
def test_tiles_cover_every_pixel_of_every_size(factor, tile, overlap):
    network = Enlarge(factor=factor)
    for height, width in itertools.product((8, 9, 17, 33, 47, 70), (8, 15, 32, 69)):
        lr = noise_image(height, width)
        assert (upscale(network, lr, tile=tile, tile_overlap=overlap) == lr.repeat(factor, 0).repeat(factor, 1)).all()


class Neutral(nn.Module):
    gates = ()

    def forward(self, x):
        return x


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_without_attention_tiles_change_nothing(scale):
    network = tiny(scale, num_rg=1, num_rcab=1)
    network.trunk[0].residual_group[0].residual_channel_attention_block[3] = Neutral()
    lr = noise_image(61, 50)
    x = torch.from_numpy(lr).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        whole = network(x)
        tiled = torch.cat([part for _, part in upscaling._tiles(network, x, 100, 40, 32)], 2)
    assert (tiled - whole).abs().max() < 1e-5  # each tile's outer 8 rows aren't used; the network looks 7 and a bit far


def test_with_attention_tiles_change_the_result_and_seams_are_no_worse():
    network = weights.load(REPOSITORY / "assets/weights/rcan_light_x2.pth.tar")
    lr = imgproc.imresize(skimage.data.astronaut(), 1 / 4)  # 128 x 128
    x = torch.from_numpy(lr).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        whole = network(x)
        tiled = torch.cat([part for _, part in upscaling._tiles(network, x, 100, 48, 16)], 2)
    difference = (tiled - whole).abs().mean((0, 1))  # (H, W)
    assert 1e-5 < difference.mean() < 1e-2
    starts = upscaling._starts(128, 48, 16)
    shared = np.zeros(256, bool)
    for before, start in itertools.pairwise(starts):
        shared[2 * start : 2 * (before + 48)] = True
    seams = torch.from_numpy(shared[:, None] | shared)
    assert difference[seams].mean() <= 1.5 * difference[~seams].mean()


def test_starts_by_hand():
    assert upscaling._starts(100, 100, 10) == [0]
    assert upscaling._starts(101, 100, 10) == [0, 1]
    assert upscaling._starts(190, 100, 10) == [0, 90]
    assert upscaling._starts(191, 100, 10) == [0, 46, 91]


def test_shares_sum_to_one_and_leave_out_the_cut_edges():
    shares = upscaling._blending([0, 16], 32, 48, 16, 1)
    assert torch.allclose(shares.sum(0), torch.ones(48))
    assert shares[0, :20].tolist() == [1] * 20  # 16 to 31 are shared; the outer 4 of each tile are not used
    assert shares[0, 20:28].tolist() == approx([8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9])
    assert shares[0, 28:].tolist() == [0] * 20


def test_self_ensemble_and_memory_work_in_tiles(monkeypatch):
    lr = drawn_image(40, 30)
    sr = upscale(tiny(2), lr, self_ensemble=True, tile=24, tile_overlap=8)
    assert sr.shape == (80, 60, 3)
    assert imgproc.psnr(sr, upscale(tiny(2), lr, self_ensemble=True), 0) > 25
    out_of_memory_above(8, monkeypatch, CPU_ERROR)
    with pytest.warns(UserWarning, match="out of memory"):
        again = upscale(tiny(2), lr, self_ensemble=True, tile=24, tile_overlap=8)
    assert abs(sr.astype(int) - again).max() <= 1
