"""What the scripts share: EMA weights, evaluation, precision, random generators, checksums."""

import json
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

import imgproc
import reports
import utils
from helpers import drawn_image, tiny
from runtime import Runtime, StopRequest
from utils import EMA

CPU = Runtime(torch.device("cpu"))


# EMA


def one_weight(value):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_ema_by_hand():
    """The first update keeps 2/11, later ones the decay, as soon as it is the smaller."""
    ema = EMA(one_weight(0.0), decay=0.25)
    ema.update(one_weight(1.0), update=1)  # 2/11 of 0 and 9/11 of 1
    assert ema.network.weight.item() == approx(9 / 11)
    ema.update(one_weight(3.0), update=8)  # min(0.25, 9/18) of 9/11 and the rest of 3
    assert ema.network.weight.item() == approx(0.25 * 9 / 11 + 0.75 * 3)


def test_ema_of_many_updates_is_mostly_the_old():
    ema = EMA(one_weight(1.0), decay=0.999)
    ema.update(one_weight(2.0), update=10**6)
    assert ema.network.weight.item() == approx(1.001)


def test_ema_copies_buffers_and_is_a_network_of_its_own():
    network = tiny()
    ema = EMA(network, decay=0.9)
    network.mean.fill_(0.25)
    before = [parameter.clone() for parameter in network.parameters()]
    ema.update(network, 5)
    assert (ema.network.mean == 0.25).all()
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())


def test_without_a_decay_the_newest_weights_are_taken():
    ema = EMA(one_weight(0.0), decay=0)
    ema.update(one_weight(0.7), 1)
    assert ema.network.weight.item() == approx(0.7)


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_a_skipped_update_leaves_the_average_as_it_is(skipped):
    ema = EMA(one_weight(1.0), decay=0.5)
    ema.update(one_weight(2.0), update=10**6, skipped=torch.tensor(skipped))
    assert ema.network.weight.item() == (1.0 if skipped else 1.5)


# Evaluation


def test_evaluate_means_over_images():
    gts = [drawn_image(40, 44, seed) for seed in range(3)]
    images = [(name, imgproc.degrade(gt, 2), gt) for name, gt in zip("cab", gts, strict=True)]
    seen = []
    scores = utils.evaluate(lambda lr: imgproc.imresize(lr, 2), images, 2, CPU, on_image=lambda name, lr, sr, gt: seen.append((name, sr)))
    assert list(scores["images"]) == ["a", "b", "c"]
    expected = {name: imgproc.psnr(imgproc.imresize(lr, 2), gt, 2) for name, lr, gt in images}
    assert {name: score["psnr"] for name, score in scores["images"].items()} == expected
    assert scores["psnr"] == approx(sum(expected.values()) / 3, abs=1e-12)
    assert scores["ssim"] == approx(np.mean([imgproc.ssim(sr, gt, 2) for (_, sr), gt in zip(seen, gts, strict=True)]))


def test_a_stop_that_comes_with_the_last_image_loses_no_scores():
    images = [(name, drawn_image(20, 20, 1), drawn_image(40, 40, 1)) for name in "ab"]
    stop = StopRequest()

    def request(name, *_):
        stop.requested = 1.0 if name == last else None

    last = "b"
    assert utils.evaluate(lambda lr: imgproc.imresize(lr, 2), images, 2, CPU, on_image=request, stop=stop)["psnr"] > 0
    last, stop.requested = "a", None
    assert utils.evaluate(lambda lr: imgproc.imresize(lr, 2), images, 2, CPU, on_image=request, stop=stop) is None


# Precision, random generators, checksums


@pytest.mark.parametrize(
    ("flags", "chosen"), [("fma avx512_bf16 vaes", "bf16"), ("amx_bf16", "bf16"), ("fma avx2", "fp32"), (None, "fp32")]
)
def test_precision_is_as_asked_or_chosen(monkeypatch, flags, chosen):
    monkeypatch.setattr(utils.Path, "is_file", lambda _: flags is not None)
    monkeypatch.setattr(utils.Path, "read_text", lambda *_, **__: f"flags : {flags}")
    assert utils.choose_precision("fp16", CPU.device) == "fp16"
    assert utils.choose_precision("auto", CPU.device) == chosen


def test_random_states_continue():
    import random

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    utils.seed_everything(5)
    first = draw()
    states = utils.random_states()
    after = draw()
    utils.restore_random_states(states)
    assert draw() == after
    utils.seed_everything(5)
    assert draw() == first


def test_a_checksum_is_of_every_bit():
    network = tiny()
    first = utils.checksum([network, tiny()])
    assert utils.checksum([tiny(), tiny()]) == first
    with torch.no_grad():
        network.conv3.bias[0] = np.nextafter(network.conv3.bias[0].item(), np.inf, dtype=np.float32).item()
    assert utils.checksum([network, tiny()]) != first


def test_flat_images_and_equal_ones_do_not_count_in_the_mean_psnr():
    gts = {"plain": drawn_image(40, 40, 1), "flat": np.full((40, 40, 3), 9, np.uint8), "equal": drawn_image(40, 40, 2)}
    images = [(name, gt[::2, ::2].copy(), gt) for name, gt in gts.items()]
    answers = {"plain": drawn_image(40, 40, 3), "flat": np.full((40, 40, 3), 10, np.uint8), "equal": gts["equal"]}
    order = iter(answers.values())
    found = utils.evaluate(lambda lr: next(order), images, 2, CPU)
    assert found["psnr"] == imgproc.psnr(answers["plain"], gts["plain"], 2)
    assert found["ssim"] == approx(np.mean([imgproc.ssim(answers[name], gts[name], 2) for name in gts]))
    assert set(found["not_in_psnr"]) == {"flat", "equal"}
    alone = utils.evaluate(lambda lr: gts["equal"], images[2:], 2, CPU)
    assert alone["psnr"] == math.inf
    assert json.loads(reports.to_json(alone))["psnr"] is None


def test_a_stop_ends_an_image_in_the_middle():
    """… as one may take minutes."""
    images = [("a", drawn_image(20, 20), drawn_image(40, 40))]

    def endless(lr):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while True:
            time.sleep(0.01)

    start = time.monotonic()
    with StopRequest() as stop:
        assert utils.evaluate(endless, images, 2, CPU, stop=stop) is None
        assert stop
    assert time.monotonic() - start < 20
