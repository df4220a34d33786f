"""A headless Chromium for tests of pages, where one and its driver are installed; nothing is downloaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


def why_not() -> str | None:
    """None where pages can be driven, else the reason why not."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"no {program} here: install Debian's chromium and chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed: pip install 'vig-kernels[test]'"
    return None


@contextmanager
def chromium(width: int = 1280, height: int = 1000) -> Iterator:
    """A browser with a profile and a folder of downloads of its own (`downloads`)."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as folder:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={folder}/profile"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.downloads = Path(folder) / "downloads"
            driver.downloads.mkdir()
            driver.execute_cdp_cmd(
                "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(driver.downloads)}
            )
            resize(driver, width, height)
            yield driver
        finally:
            driver.quit()


def resize(driver, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def media(driver, **features: str) -> None:
    """prefers_color_scheme="dark", media="print"."""
    named = [
        {"name": name.replace("_", "-"), "value": value}
        for name, value in features.items()
        if name != "media"
    ]
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": features.get("media", ""), "features": named}
    )
