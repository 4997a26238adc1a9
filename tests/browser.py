"""Debian's Chromium, headless, for the tests of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager


def missing() -> list[str]:
    """What is not installed of what `open_browser` needs."""
    return [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]


@contextmanager
def open_browser(*, width: int = 1200, height: int = 900) -> Iterator:
    """A selenium driver whose `get_log("browser")` has everything that pages write to the console."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", f"window-size={width},{height}"):
        options.add_argument(f"--{flag}")
    driver = Chrome(options, ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
