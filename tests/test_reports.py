"""What a run reports: the meter's means, the log, the sample sheet, tables, provenance."""

import json
import math

import numpy as np
import pytest
import torch
from pytest import approx

import imgproc
import reports
from helpers import drawn_image
from reports import SKIPPED, Meter, RunLog, SampleSheet, markdown_table, provenance
from runtime import Runtime

CPU = Runtime(torch.device("cpu"))


def test_the_log_drops_what_is_done_again(tmp_path):
    log = RunLog(tmp_path, 0, 10)
    for update in (2, 4, 6):
        log.write(update, {"loss/l1": 1 / update})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('garbled\n{"update": 7, "cut')
    log = RunLog(tmp_path, 4, 10)
    log.write(6, {"loss/l1": 0.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"update": 2, "loss/l1": 0.5}, {"update": 4, "loss/l1": 0.25}, {"update": 6, "loss/l1": 0.5}]


def test_other_processes_log_nothing(tmp_path):
    log = RunLog(tmp_path / "run", 0, 10, enabled=False)
    log.step()
    log.write(1, {})
    log.say("nothing")
    log.close()
    assert not (tmp_path / "run").exists()


def terms(loss, skipped=0.0, norm=1.0):
    return {"loss/l1": torch.tensor(loss), "norm": torch.tensor(norm), SKIPPED: torch.tensor(skipped)}


def filled(*updates):
    meter = Meter(CPU)
    meter.resume()
    for number, update in enumerate(updates):
        meter.add(number, update)
    meter.pause()
    return meter


def test_the_meter_means_over_accepted_updates_and_names_what_was_not_finite():
    meter = filled(terms(1.0), terms(math.nan, 1.0, math.inf), terms(2.0))
    means, skipped = meter.take()
    assert (means["loss/l1"], means["norm"]) == approx((1.5, 1.0))
    assert means[SKIPPED] == approx(1 / 3)
    assert skipped == {1: ["loss/l1", "norm"]}
    assert meter.updates == []  # it starts anew


def test_the_meter_goes_on_from_a_checkpoint_of_finite_values():
    one, other = filled(terms(1.0), terms(math.inf, 1.0)), Meter(CPU)
    state = one.state_dict()
    assert torch.isfinite(state["values"]).all()
    other.load_state_dict(state)
    other.resume()
    other.add(2, terms(4.0))
    other.pause()
    means, skipped = other.take()
    assert means["loss/l1"] == approx(2.5)
    assert skipped == {1: ["loss/l1"]}
    assert means["time/updates_per_second"] * other.passed == approx(0) or means["time/updates_per_second"] > 0


def test_skipped_updates_are_all_in_the_log_and_a_few_on_the_screen(tmp_path, capsys):
    with RunLog(tmp_path, 0, 10) as log:
        log.write_skipped(9, {number: (["loss/l1"], [f"{number}.png"] * 20) for number in range(5)})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[4] == {"update": 9, "event": "skipped", "skipped": 5, "not_finite": ["loss/l1"], "images": ["4.png"] * 20}
    said = capsys.readouterr().out
    assert "0.png" in said
    assert "4.png" not in said


@pytest.mark.parametrize("size", [(300, 260), (60, 90)])
def test_the_sample_sheet_shows_the_middle_of_the_first_three_images(size):
    gts = {name: drawn_image(*size, seed) for seed, name in enumerate("dcba")}
    sheet = SampleSheet("dcb", 2)
    for name, gt in gts.items():
        sheet.add(name, imgproc.degrade(gt, 2), 255 - gt, gt)
    rows = sheet.gather(CPU)
    assert rows.shape == (3 * (26 + 256 + 4), 3 * (2 + 256 + 2), 3)
    panels = rows.reshape(3, 286, 3, 260, 3).swapaxes(1, 2)  # (row, column, height, width, RGB)
    height, width = (min(128, side) for side in size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    for row, name in enumerate("bcd"):
        gt = gts[name][top : top + height, left : left + width]
        bicubic, sr, shown = panels[row, :, 26 : 26 + 2 * height : 2, 2 : 2 + 2 * width : 2]
        assert (shown == gt).all()
        assert (sr == 255 - gt).all()
        whole = imgproc.imresize(imgproc.degrade(gts[name], 2), 2)
        assert (bicubic == whole[top : top + height, left : left + width]).all()
        gt_panel = np.zeros((128, 128, 3), np.uint8)
        labels = (f"bicubic  {imgproc.psnr(whole, gts[name], 2):.2f} dB", f"SR  {imgproc.psnr(255 - gts[name], gts[name], 2):.2f} dB")
        for panel, label in zip(panels[row], (*labels, f"GT  {name}"), strict=True):
            assert (panel[:26] == reports.draw_panel(gt_panel, label)[:26]).all()
    assert SampleSheet([], 2).gather(CPU) is None


def test_a_label_stands_above_its_panel_and_never_beside_it():
    crop = drawn_image(20, 60)
    blank, short, other, long = (reports.draw_panel(crop, label, zoom=3) for label in ("", "SR", "GT", "an image's long name" * 9))
    assert blank.shape == (26 + 60 + 4, 2 + 180 + 2, 3)
    for panel in (short, other, long):
        assert (panel[26:] == blank[26:]).all()
        assert (panel[:, [0, -1]] == 255).all()
        assert (panel[:26] != blank[:26]).any()
    assert (short != other).any()
    assert (reports.draw_panel(crop[:, :3], "SR", zoom=1)[:26] == 255).all()  # no room


def test_a_markdown_table():
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_provenance_is_of_plain_texts():
    about = provenance()
    assert about["numpy"] == np.__version__
    assert about.keys() >= {"command", "commit", "python", "torch", "device"}
    assert all(type(value) is str for value in about.values())


def test_json_has_no_infinity_and_no_nan():
    values = {"a": math.inf, "b": [1.5, -math.inf, {"c": (math.nan, "x", None, True, 2)}]}
    found = json.loads(reports.to_json(values), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [1.5, None, {"c": [None, "x", None, True, 2]}]}
