"""The server's page in Chromium, where that is installed."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium")


@contextmanager
def page_of(server, **options):
    """The page in Chromium; in the end, nothing was asked of other hosts, and nothing is in the console."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: `apt-get install chromium`")
    flags = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(**options)
        problems = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith((server.url, "blob:", "data:")) or problems.append(request.url),
        )
        page.goto(server.url)
        page.get_by_text("tiny ·").wait_for()
        yield page
        assert problems == []
        browser.close()


def draw(page, caption="a red cube on a blue cube"):
    page.get_by_label("Caption").fill(caption)
    page.get_by_label("Caption").press("Enter")
