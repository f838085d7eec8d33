"""A real browser: Chromium without a screen, driven by its own chromedriver."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

WINDOW = "1100,800"


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """One for all tests; each opens its page anew."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver is here (Debian: chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", f"window-size={WINDOW}", "no-proxy-server", "disable-gpu"):
        options.add_argument(f"--{argument}")
    for service in ("background-networking", "component-update", "sync", "quic"):
        options.add_argument(f"--disable-{service}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own sandbox does not work for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = Chrome(options=options, service=ChromeService(driver))
    yield found
    found.quit()
