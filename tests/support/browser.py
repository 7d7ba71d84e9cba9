"""The Chromium of Debian without a display, its console messages and its requests."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tests.support.services import missing

_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


@contextmanager
def chromium(width: int = 1280, height: int = 2400) -> Iterator[webdriver.Chrome]:
    """Start a browser that records the console messages and the requests of its pages."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        missing("chromium", "sudo apt install chromium chromium-driver")
    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in [*_FLAGS, f"--window-size={width},{height}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def emulate(browser: webdriver.Chrome, width: int, height: int, *, is_dark: bool = False) -> None:
    """Give the browser a screen of this size, which may be smaller than any window, and a colour scheme."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def complaints(browser: webdriver.Chrome) -> list[str]:
    """Return the console messages since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: webdriver.Chrome) -> list[str]:
    """Return the addresses that pages have requested since the last call, except files and data."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))]


def open_page(browser: webdriver.Chrome, path: Path) -> None:
    """Open a local file in the browser."""
    browser.get(path.absolute().as_uri())
