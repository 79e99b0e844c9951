"""Arithmetic on pixels: values that others published or that a hand can compute, and laws."""

import math

import numpy as np
import pytest
import skimage.data
from pytest import approx
from skimage.metrics import structural_similarity

import image_files
import imgproc
from helpers import drawn_image, noise_image
from image_files import read_image
from imgproc import crop_to_multiple, degrade, flip_rotate, imresize, imresize_to, psnr, ssim


def gray(value: int, height: int = 16, width: int = 20) -> imgproc.RGB:
    return np.full((height, width, 3), value, np.uint8)


# MATLAB's bicubic


def naive_imresize(image, scale):
    """MATLAB's imresize by its definition, one tap after the other; slow."""

    def kernel(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    def lines(image):
        size, support, squeeze = len(image), 4 / min(scale, 1), min(scale, 1)
        result = []
        for i in range(1, math.ceil(size * scale) + 1):
            u = i / scale + 0.5 * (1 - 1 / scale)
            left = math.floor(u - support / 2)
            taps = range(left, left + math.ceil(support) + 2)
            weights = np.array([kernel(squeeze * (u - tap)) for tap in taps])
            rows = np.stack([image[min(max(tap, 1), size) - 1].astype(float) for tap in taps], -1)
            result.append(np.clip(np.floor(rows @ (weights / weights.sum()) + 0.5), 0, 255).astype(np.uint8))
        return np.stack(result)

    return lines(lines(image).swapaxes(0, 1)).swapaxes(0, 1)


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 1 / 8, 1, 2, 3, 4, 8, 0.7])
def test_imresize_equals_its_definition(scale):
    for image in (noise_image(13, 17), noise_image(3, 2), drawn_image(31, 24)):
        assert abs(imresize(image, scale).astype(int) - naive_imresize(image, scale)).max() <= (0 if scale in (0.5, 0.25, 2, 4) else 1)
        assert (imresize(image, scale) != naive_imresize(image, scale)).mean() < 1e-3  # ties of thirds may fall either way


@pytest.mark.data
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_lr_images_equal_those_made_by_matlab(data_root, scale):
    files = image_files.list_images(data_root / "Set5" / f"LRbicx{scale}_matlab")
    assert len(files) == 5
    for file in files:
        gt = crop_to_multiple(read_image(data_root / "Set5" / "GT" / file.name), scale)
        assert (degrade(gt, scale) != read_image(file)).sum() == 0


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 3, 8])
def test_imresize_leaves_a_constant_alone(scale):
    assert (imresize(gray(137), scale) == 137).all()


def test_imresize_gives_sizes_rounded_up_and_takes_one_channel():
    assert imresize(gray(1, 10, 7), 1 / 3).shape == (4, 3, 3)
    image = noise_image(9, 8)
    assert (imresize(image[:, :, 0], 2) == imresize(image, 2)[:, :, 0]).all()


def test_imresize_to_a_size_is_imresize_by_a_scale():
    image = noise_image(12, 17)
    assert (imresize_to(image, 24, 34) == imresize(image, 2)).all()
    column = np.repeat(image[:, :1], 17, 1)  # all columns alike: only the rows' scale matters
    assert (imresize_to(column, 6, 17)[:, :9] == imresize(column, 0.5)).all()


def test_imresize_keeps_sixteen_bits():
    deep = np.random.default_rng(1).integers(0, 65536, (12, 17, 4), dtype=np.uint16)
    halved = imresize(deep, 0.5)
    assert halved.dtype == np.uint16
    assert abs(halved / 257 - imresize((deep // 257).astype(np.uint8), 0.5)).max() < 1.6  # of the 8 bits, which are rounded three times


@pytest.mark.parametrize(("image", "scale"), [(gray(1) / 1, 2), (gray(1)[:0], 2), (gray(1), 0), (gray(1), -1), (gray(1), math.inf)])
def test_imresize_refuses_what_it_cannot_do(image, scale):
    with pytest.raises(ValueError):
        imresize(image, scale)
    with pytest.raises(ValueError, match="0x3"):
        imresize_to(gray(1), 3, 0)


# Degradations


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bd_samples_the_middle_of_each_block(scale):
    """A blur leaves a ramp as it is, so that each LR pixel is the ramp at the middle of its block."""
    gt = np.repeat(np.arange(48, dtype=np.uint8)[None, :, None] * 4, 48, 0).repeat(3, 2)
    middle = {2: 0.5, 3: 1, 4: 1.5}[scale]
    expected = 4 * (np.arange(48 // scale) * scale + middle)
    inner = slice(math.ceil(7 / scale), -math.ceil(7 / scale))
    for lr in (degrade(gt, scale, "BD"), degrade(gt.swapaxes(0, 1).copy(), scale, "BD").swapaxes(0, 1)):
        assert (lr[:, inner] == expected[inner, None]).all()


def test_bd_at_x3_of_one_bright_pixel():
    gt = gray(0, 27, 27)
    gt[13, 13] = 255  # the middle of the block (4, 4)
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 1.6**2))
    weights /= weights.sum()
    lr = degrade(gt, 3, "BD")
    assert lr[4, 4, 0] == round(255 * weights[3] ** 2)
    assert lr[4, 5, 0] == round(255 * weights[3] * weights[0])
    assert lr[4, 6, 0] == 0


def test_dn_is_bicubic_and_noise_of_30():
    gt = gray(128, 400, 400)
    lr = degrade(gt, 2, "DN", seed=1)
    assert lr.mean() == approx(128, abs=0.5)
    assert lr.std() == approx(30, rel=0.02)
    assert (lr == degrade(gt, 2, "DN", seed=1)).all()
    assert (lr != degrade(gt, 2, "DN", seed=2)).any()


NOTHING = dict.fromkeys(imgproc.PHOTO, (0.0, 0.0))


def photo(gt, scale=2, **ranges):
    """Degraded by the named ranges alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imgproc, "PHOTO", NOTHING | {name.replace("_", " "): span for name, span in ranges.items()})
        return imgproc.degrade_photo(gt, scale, np.random.default_rng(0))


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_a_photo_without_damage_is_bicubic(scale):
    gt = drawn_image(48, 72)
    assert (photo(gt, scale) == degrade(gt, scale)).all()
    for area, bilinear in ((1, 0), (0, 1)):
        lr = photo(gt, scale, resampled=(area, bilinear))
        assert (lr != degrade(gt, scale)).any()
        assert abs(lr.astype(float).mean() - gt.mean()) < 2
    averages = gt.reshape(48 // scale, scale, 72 // scale, scale, 3).mean((1, 3))
    assert abs(photo(gt, scale, resampled=(1, 0)) - averages).max() <= 0.5 + 1e-9


def test_noise_of_a_photo_grows_with_the_light():
    """At black it is a fifth of that at white, and its square grows linearly."""
    for value, expected in ((255, 10), (0, 2), (128, (4 + 96 * 128 / 255) ** 0.5)):
        lr = photo(gray(value, 400, 400), noisy=(1, 0), noise=(10, 10), dark_noise=(0.2, 0.2))
        off = lr.astype(float) - value
        spread = off.std() if value == 128 else np.sqrt(2 * np.mean(off**2))  # half of it is clipped
        assert spread == approx(expected, rel=0.05)
    coloured, uncoloured = (photo(gray(128, 40, 40), noisy=(1, share), noise=(9, 9), dark_noise=(1, 1)) for share in (0, 1))
    assert np.ptp(coloured, 2).max() > 5 and not np.ptp(uncoloured, 2).any()


def test_blur_of_a_photo_is_wider_with_a_larger_sigma():
    gt = gray(0, 64, 64)
    gt[32, 32] = 255
    widths = []
    for sigma in (0.3, 0.6):
        spot = photo(gt, 2, blurred=(1, 1), sigma=(sigma, sigma))[..., 0].astype(float)
        place = np.arange(32) - (spot.sum(0) @ np.arange(32)) / spot.sum()
        widths.append(spot.sum(0) @ place**2 / spot.sum())
    assert widths[1] - widths[0] == approx(0.6**2 - 0.3**2, rel=0.25)  # variances add, less what is rounded to nothing


@pytest.mark.parametrize(("webp", "kind"), [((0, 1), "JPEG"), ((1, 1), "WEBP")])
def test_compression_of_a_photo_is_pillows(webp, kind):
    gt = drawn_image(64, 64)
    options = {"subsampling": 0} if kind == "JPEG" else {}
    once = imgproc.compress(degrade(gt, 2), kind, 40, **options)
    assert (photo(gt, compressed=(1, 0), quality=(40, 40), webp=webp) == once).all()
    assert (photo(gt, compressed=(1, 1), quality=(40, 40), webp=webp) == imgproc.compress(once, kind, 40, **options)).all()
    assert psnr(imgproc.compress(gt, kind, 90), gt, 0) > psnr(imgproc.compress(gt, kind, 40), gt, 0) + 2


def test_photos_are_drawn_by_the_seed_and_a_part_of_them_is_clean():
    gt = drawn_image(32, 32)
    assert (degrade(gt, 2, "photo", seed=3) == degrade(gt, 2, "photo", seed=3)).all()
    results = [degrade(gt, 2, "photo", seed=seed) for seed in range(200)]
    clean = sum(bool((lr == degrade(gt, 2)).all()) for lr in results)
    assert 3 <= clean <= 25  # 0.6 · 0.6 · 0.5 · 0.25 of them: 9
    assert len({lr.tobytes() for lr in results}) > 150


def test_degrade_refuses_odd_sizes_and_unknown_names():
    with pytest.raises(ValueError, match="upscale_factor=3"):
        degrade(gray(0), 3)
    with pytest.raises(ValueError, match="'XX'"):
        degrade(gray(0), 2, "XX")


def test_noise_is_estimated_and_edges_and_ramps_are_not_noise():
    ramp = np.clip(np.indices((160, 160)).sum(0), 0, 255).astype(np.uint8)[..., None].repeat(3, 2)
    ramp[:, 80:] //= 3  # an edge
    assert imgproc.noise_level(ramp) < 0.3
    for sigma in (4, 12):
        noise = np.random.default_rng(0).normal(0, sigma, (160, 160, 1)).repeat(3, 2)
        found = imgproc.noise_level(np.clip(ramp // 2 + 64 + noise, 0, 255).astype(np.uint8))
        assert 0.6 * sigma * 219 / 255 < found < sigma  # of luma, and of the smoothest places
    assert imgproc.noise_level(gray(3, 5, 9)) == 0


@pytest.mark.parametrize("phase", [0, 3])
def test_blocks_are_seen_wherever_they_begin(phase):
    image = skimage.data.astronaut()[:160, :160]
    seen = [imgproc.blockiness(imgproc.compress(image, "JPEG", quality)[phase:, phase:]) for quality in (30, 60)]
    assert seen[0] > seen[1] > 1.15 > imgproc.blockiness(image) >= 1
    assert imgproc.blockiness(gray(3, 5, 9)) == 1


# Metrics


def test_psnr_of_a_constant_offset():  # 20 log10(255 / 5)
    assert psnr(gray(100), gray(105), border=0, only_y_channel=False) == approx(34.1514, abs=1e-4)


def test_psnr_of_equal_images_is_infinite():
    assert psnr(gray(7), gray(7), border=2) == math.inf


def test_y_of_white_black_and_red():  # BT.601 in 16 … 235
    assert imgproc.rgb_to_y(gray(255))[0, 0] == approx(235)
    assert imgproc.rgb_to_y(gray(0))[0, 0] == 16
    assert imgproc.rgb_to_y(np.array([[[255, 0, 0]]], np.uint8))[0, 0] == approx(16 + 65.481)


def test_psnr_on_y_of_a_constant_offset():  # gray levels count 219/255 on Y
    assert psnr(gray(100), gray(105), border=0) == approx(20 * math.log10(255 / (5 * 219 / 255)), abs=1e-9)


def test_the_border_does_not_count():
    sr = gray(50)
    sr[:4], sr[-4:], sr[:, :4], sr[:, -4:] = 0, 255, 0, 255
    assert psnr(sr, gray(50), border=4) == math.inf
    assert psnr(sr, gray(50), border=3) < 30


@pytest.mark.parametrize("only_y_channel", [True, False])
def test_ssim_equals_scikit_image(only_y_channel):
    gt = drawn_image(60, 47)
    sr = np.clip(gt + np.random.default_rng(0).normal(0, 12, gt.shape), 0, 255).astype(np.uint8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    if only_y_channel:
        expected = structural_similarity(*(imgproc.rgb_to_y(image)[2:-2, 2:-2] for image in (sr, gt)), **options)
    else:
        expected = structural_similarity(sr[2:-2, 2:-2].astype(float), gt[2:-2, 2:-2].astype(float), channel_axis=2, **options)
    assert ssim(sr, gt, 2, only_y_channel) == approx(expected, abs=1e-9)
    assert ssim(gt, gt, 2, only_y_channel) == approx(1)


@pytest.mark.data
def test_official_images_score_what_the_paper_says(data_root):
    scores = []
    for file in image_files.list_images(data_root / "Set5" / "SRx4_rcan_official"):
        gt = crop_to_multiple(read_image(data_root / "Set5" / "GT" / file.name), 4)
        scores.append((psnr(read_image(file), gt, 4), ssim(read_image(file), gt, 4)))
    assert f"{np.mean(scores, 0)[0]:.2f} {np.mean(scores, 0)[1]:.4f}" == "32.63 0.9002"


@pytest.mark.data
@pytest.mark.parametrize(("scale", "published"), [(2, 33.66), (3, 30.39), (4, 28.42), (8, 24.40)])
def test_bicubic_scores_what_is_published(data_root, scale, published):
    gts = [crop_to_multiple(read_image(file), scale) for file in image_files.list_images(data_root / "Set5" / "GT")]
    assert np.mean([psnr(imresize(degrade(gt, scale), scale), gt, scale) for gt in gts]) == approx(published, abs=0.02)


def test_metrics_refuse_what_does_not_compare():
    with pytest.raises(ValueError, match=r"20x16.*20x17"):
        psnr(gray(0), gray(0, 17, 20), 0)
    with pytest.raises(ValueError, match="border=8"):
        psnr(gray(0), gray(0), 8)
    with pytest.raises(ValueError, match="11"):  # SSIM's window
        ssim(gray(0), gray(0), 4)
    with pytest.raises(ValueError, match="float64"):
        psnr(gray(0) / 255, gray(0), 0)


# Crops, flips and rotations


def test_flips_and_rotations_are_numpys():
    image = noise_image(5, 7)
    for orientation in range(8):
        flipped = image[:, ::-1] if orientation >= 4 else image
        assert (flip_rotate(image, orientation) == np.rot90(flipped, orientation % 4)).all()
    with pytest.raises(ValueError, match="8"):
        flip_rotate(image, 8)


def test_a_crop_keeps_the_top_left():
    image = noise_image(11, 7)
    assert (crop_to_multiple(image, 3) == image[:9, :6]).all()


# Names for other programs


def test_imgproc_reads_and_writes_files(tmp_path):
    image = noise_image(5, 7)
    imgproc.write_image(tmp_path / "a.png", image)
    assert (imgproc.read_image(tmp_path / "a.png") == image).all()


def test_hidden_pixels_take_the_colour_of_the_nearest_visible_one():
    image = np.zeros((1, 5, 3), np.uint8)
    image[0, 0], image[0, 4] = 10, 200
    hidden = np.array([[False, True, True, True, False]])
    spread = imgproc.spread_colours(image, hidden)[0, :, 0].tolist()
    assert spread in ([10, 10, 10, 200, 200], [10, 10, 200, 200, 200])  # the middle one is as near to both
    assert imgproc.spread_colours(image, np.ones((1, 5), bool)) is image
    deep = imgproc.spread_colours(image.astype(np.uint16) * 257, hidden)
    assert deep.dtype == np.uint16
    assert (deep[0, :, 0] == np.array(spread) * 257).all()


def test_an_image_is_flat_within_its_border():
    image = np.full((9, 9, 3), 77, np.uint8)
    image[0] = 5
    assert (imgproc.is_flat(image, 1), imgproc.is_flat(image, 0)) == (True, False)
