"""The report and the local page in headless Chromium (Debian: apt install chromium chromium-driver; pip install selenium)."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from helpers import REPOSITORY, drawn_image
from html_report import Report
from image_files import read_image, write_image
from imgproc import imresize

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SIZES = {"desktop": (1200, 900), "phone": (390, 844)}


@pytest.fixture(params=SIZES)
def browser(request):
    """A browser at the width of a desktop or, by touch, of a phone; at the end, no error may be on its console."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    width, height = SIZES[request.param]
    for option in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"window-size={width},{height}"):
        options.add_argument(f"--{option}")
    if request.param == "phone":
        metrics = {"width": width, "height": height, "pixelRatio": 2, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.is_phone = request.param == "phone"
    try:
        yield driver
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        driver.quit()


def check_layout(browser, count):
    """All images are loaded, and nothing is wider than the window."""
    WebDriverWait(browser, 20).until(
        lambda driver: driver.execute_script("return [...document.images].filter(image => image.naturalWidth > 0).length") >= count
    )
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def drag(browser, element, x, y=0):
    """Press the middle of an element, move by (x, y) CSS pixels, release; by touch on a phone."""
    if not browser.is_phone:
        ActionChains(browser).move_to_element(element).click_and_hold().move_by_offset(x, y).release().perform()
        return
    box = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]", element)
    for kind, *points in (("touchStart", box), ("touchMove", (box[0] + x, box[1] + y)), ("touchEnd",)):
        touched = [{"x": point[0], "y": point[1]} for point in points]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touched})


def test_the_report_compares_images_by_pointer_touch_and_keyboard(tmp_path, browser):
    gt = drawn_image(240, 320)
    page = Report("Report", ["protocol"], [[["x4", *["a wide column of a table"] * 6]] * 2], count=2)
    for name in ("a", "b"):
        page.add(name, "+1.00 dB", [("bicubic", imresize(imresize(gt, 0.25), 4)), ("network", gt), ("GT", gt)])
    page.write(tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    check_layout(browser, 4)  # the chosen two of each; others are loaded when they are chosen
    view, slider = (browser.find_element(By.CSS_SELECTOR, selector) for selector in (".view, .live", "input[type=range]"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", view)
    images, line = view.find_elements(By.TAG_NAME, "img"), view.find_element(By.CLASS_NAME, "line")
    width = view.size["width"]

    def state():
        """The slider's value, where the right image begins, and the line's place, in percent of the view."""
        clipped = float(images[1].value_of_css_property("clip-path").rpartition(" ")[2].rstrip("px)"))
        x, place = (browser.execute_script("return parseFloat(arguments[0].style.left)", each) for each in (images[1], line))
        return int(slider.get_property("value")), *(pytest.approx(100 * edge / view.size["width"], abs=1) for edge in (clipped + x, place))

    assert state() == (50, 50, 50)
    slider.send_keys(Keys.ARROW_RIGHT * 5)
    assert state() == (55, 55, 55)
    drag(browser, line, -width // 4)
    assert state() == (30, 30, 30)
    drag(browser, view, width // 4)  # anywhere, as long as all of the image is visible
    assert state() == (75, 75, 75)

    fitted = images[1].size["width"]
    assert fitted == width
    view.send_keys("++")
    assert images[1].size["width"] >= 1.5 * fitted
    assert images[1].value_of_css_property("image-rendering") == "pixelated"
    before = images[0].location["x"], images[1].location["x"]
    drag(browser, view, -30, -10)  # moves the image, not the slider
    assert [image.location["x"] for image in images[:2]] == [x - 30 for x in before]
    assert state() == (75, 75, 75)
    view.send_keys(Keys.ARROW_LEFT)
    assert images[0].location["x"] > before[0] - 30
    view.send_keys("-")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    view.send_keys("0")
    assert images[1].size["width"] == fitted
    browser.find_element(By.CSS_SELECTOR, "button[aria-label=larger]").click()
    assert images[1].size["width"] > fitted

    assert not images[2].is_displayed()
    Select(browser.find_elements(By.TAG_NAME, "select")[1]).select_by_visible_text("GT")
    assert images[2].is_displayed() and not images[1].is_displayed()
    check_layout(browser, 5)

    colours = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        colours.append(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
    assert colours[0] != colours[1]


@contextlib.contextmanager
def served(folder):
    """The address of the local page, in a process that ends at Ctrl-C without leaving a file in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    command = [sys.executable, str(REPOSITORY / "scripts/demo.py"), "--port", str(port), "--max_megapixels", "0.1"]
    options = {"env": {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **options, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, process.communicate()
        assert list(folder.glob("rcan_demo_*"))
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.2", port)) != 0  # it answers no other address
        again = subprocess.run(command, text=True, capture_output=True, env=options["env"], timeout=120)  # the port is taken
        assert again.returncode == 1 and f"port={port}" in again.stderr.splitlines()[-1]
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert not list(folder.iterdir())
    finally:
        process.kill()
        process.communicate()


def test_the_local_page_enlarges_an_upload(tmp_path, browser):
    pytest.importorskip("gradio")
    write_image(tmp_path / "a b.png", drawn_image(40, 50))
    write_image(tmp_path / "large.png", drawn_image(100, 120))
    with served(tmp_path / "temporary") as address:
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / "saved")})
        browser.get(address)
        wait = WebDriverWait(browser, 60)

        def press(label):
            button = wait.until(lambda driver: [each for each in driver.find_elements(By.TAG_NAME, "button") if each.text.strip() == label])
            button[0].click()

        def upload(path):
            wait.until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(path))
            wait.until(lambda driver: path.stem in driver.find_element(By.TAG_NAME, "body").text)

        upload(tmp_path / "large.png")
        press("Enlarge")
        wait.until(lambda driver: "large.png: 120x100 at x4" in driver.find_element(By.TAG_NAME, "body").text)
        for button in ("[data-testid=toast-close]", "button[aria-label='Clear']"):
            browser.find_element(By.CSS_SELECTOR, button).click()
            time.sleep(0.5)  # until the message has moved out of the way
        upload(tmp_path / "a b.png")
        browser.find_elements(By.CSS_SELECTOR, "input[type=radio]")[0].click()  # x2
        chosen = browser.find_element(By.CSS_SELECTOR, "input[aria-label=Weights]")
        wait.until(lambda driver: chosen.get_property("value") == "auto")
        press("Enlarge")
        press("Download a b_x2.png")
        check_layout(browser, 2)
        sizes = browser.execute_script("return [...document.images].map(image => [image.naturalWidth, image.naturalHeight])")
        assert sizes == [[100, 80], [100, 80]]
        wait.until(lambda driver: (tmp_path / "saved" / "a b_x2.png").is_file())
        assert read_image(tmp_path / "saved" / "a b_x2.png").shape == (80, 100, 3)

        def clipped():
            return browser.find_elements(By.TAG_NAME, "img")[1].value_of_css_property("clip-path")

        handle, before = browser.find_element(By.CSS_SELECTOR, "[data-testid=slider]"), clipped()
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
        drag(browser, handle, 40)
        wait.until(lambda driver: clipped() != before)
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []
        time.sleep(0.2)  # what the console has to say comes a moment later
