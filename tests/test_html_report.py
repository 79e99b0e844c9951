"""The page to compare images: exact pixels, nothing from elsewhere, and nothing left out silently."""

import re

import numpy as np

import html_report
import imgproc
from helpers import Page, drawn_image, noise_image
from html_report import Report, beside_bicubic
from image_files import Photo

NAME = """<img src="http://x/y" onerror='alert(1)'> & ü.png"""


def test_images_come_back_to_the_exact_pixels_and_every_text_as_it_is(tmp_path):
    page = Report(f"title {NAME}", [f"line {NAME}"], [[["a", NAME], [f"**{NAME}**", "31.5"]]])
    before, after, gt = (noise_image(20, 31, seed) for seed in range(3))
    page.add(NAME, f"note {NAME}", [(f"left {NAME}", before), ("right", after), ("GT", gt)])
    assert page.write(tmp_path / "new" / "report.html") == []
    found = Page(tmp_path / "new" / "report.html")
    assert list(found.figures) == [NAME]
    assert list(found.figures[NAME]) == [f"left {NAME}", "right", "GT"]
    assert all((one == two).all() for one, two in zip(found.figures[NAME].values(), (before, after, gt), strict=True))
    assert found.text.count(NAME) == 7  # twice the title, a line, two cells, the heading and the note
    assert "31.5" in found.text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = Report("title")
    page.add("a", "", [("one", noise_image(8, 8)), ("two", noise_image(8, 8))])
    page.write(tmp_path / "report.html")
    found = Page(tmp_path / "report.html")
    assert found.addresses and all(address.startswith("data:") for address in found.addresses)
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(|XMLHttp", re.sub('base64,[^"]*', "", found.source))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert f'content="{policy}"' in found.source  # with which browsers refuse it too


def test_figures_are_sorted_by_their_rank(tmp_path):
    page = Report("title", count=3)
    for name, rank in {"second": 0.5, "first": -1, "third": 0.5, "last": np.inf}.items():
        page.add(name, "", [("one", noise_image(8, 8)), ("two", noise_image(8, 8))], rank)
    page.write(tmp_path / "report.html")
    assert list(Page(tmp_path / "report.html").figures) == ["first", "second", "third", "last"]


def test_a_full_page_names_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "MAX_BYTES", 30_000)
    page = Report("title")
    for index, side in enumerate((40, 40, 60, 8, 8)):  # noise takes 3 bytes a pixel, and 4 in base64: 2 * 6,400 bytes for 40x40
        page.add(f"{index}.png", "", [("one", noise_image(side, side)), ("two", noise_image(side, side, 1))])
    (note,) = page.write(tmp_path / "report.html")
    found = Page(tmp_path / "report.html")
    assert list(found.figures) == ["0.png", "1.png"]
    assert all(f"{index}.png" in note for index in (2, 3, 4)) and "0.png" not in note
    assert note in found.text


def test_images_that_would_not_all_fit_exactly_are_webp_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "MAX_BYTES", 100_000)
    image = drawn_image(100, 120)
    for count, exact in ((1, True), (2, False)):  # 2 * 100 * 120 * 3 bytes are 72,000
        page = Report("title", count=count)
        page.add("a", "", [("one", image), ("two", image)])
        notes = page.write(tmp_path / "report.html")
        found = Page(tmp_path / "report.html").figures["a"]["two"]
        assert (not notes, bool((found == image).all())) == (exact, exact)
        assert abs(found.astype(float) - image).mean() < 10  # WebP halves the resolution of colour


def test_of_a_large_image_the_middle_is_shown_and_both_show_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "MAX_PIXELS", 3000)
    monkeypatch.setattr(html_report, "SIDE", 60)
    lr = drawn_image(50, 40)
    bicubic = imgproc.imresize(lr, 3)
    before, after, note = beside_bicubic(Photo(lr), Photo(bicubic))
    assert (after == bicubic[45 - 15 : 45 + 45, 30:90]).all()  # of 50x40, 20x20 from (15, 10); starts are multiples of 10
    assert (before[9:-9, 9:-9] == after[9:-9, 9:-9]).all()  # but for the edge, where bicubic sees no neighbours
    assert "60x60" in note and "120x150" in note
    page = Report("title")
    page.add("a", "", [("one", bicubic), ("two", bicubic)])
    page.write(tmp_path / "report.html")
    assert "60x60 of 120x150" in Page(tmp_path / "report.html").text


def test_transparency_is_shown_on_white_and_16_bits_as_8():
    pixels = np.array([[[0, 0, 0], [65535, 0, 257], [100 * 257] * 3]], np.uint16)
    alpha = np.array([[0, 65535, 13107]], np.uint16)  # 0, 1, 0.2
    _, after, note = beside_bicubic(Photo(pixels, alpha), Photo(pixels, alpha))
    assert after.tolist() == [[[255] * 3, [255, 0, 1], [224] * 3]]  # 0.2 * 100 + 0.8 * 255
    assert "white" in note
    assert beside_bicubic(Photo(pixels), Photo(pixels))[1].tolist() == [[[0] * 3, [255, 0, 1], [100] * 3]]
