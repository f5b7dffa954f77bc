"""The web page: its jobs over HTTP, and the page itself in Chromium, where that is installed."""

import base64
import io
import json
import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from servers.images import LiveServer, SlowDraw, running, wait_until

from dalle.best_of_n import Request
from dalle.sampling import Sampling
from dvae.images import to_image

CUBE = "a red cube on a blue cube"
CHROMIUM = shutil.which("chromium")


def create(server, **values):
    answer = server.ask("POST", "/api/jobs", json={"prompt": CUBE, **values})
    assert answer.status_code == 201, answer.text
    return answer.json()


def events(server, job, after=None):
    headers = {} if after is None else {"last-event-id": str(after)}
    text = server.ask("GET", f"/api/jobs/{job}/events", headers=headers).text
    blocks = [block.split("\n") for block in text.split("\n\n") if not block.startswith(":") and block]
    fields = [dict(line.split(": ", 1) for line in block) for block in blocks]
    return [(one["event"], json.loads(one["data"]), one.get("id")) for one in fields]


def test_a_job_shows_all_candidates_growing_then_ranked(server, pipe):
    job = create(server, seed=3, best_of=5, n=5)
    found = events(server, job["id"])
    rows = [data for kind, data, _ in found if kind == "rows"]
    assert [data["rows"] for data in rows] in ([1, 2, 3, 4][-n:] for n in range(1, 5))  # from when it is listened to
    for data in rows:
        if "sheet" in data:
            sheet = Image.open(io.BytesIO(base64.b64decode(data["sheet"])))
            assert sheet.size == (5 * 16, 4 * data["rows"])
            assert (data["count"], data["columns"], data["height"]) == (5, 5, 4 * data["rows"])
    assert "sheet" in rows[0]
    kind, done, _ = found[-1]
    assert kind == "done"
    expected = pipe.best(Request(caption=CUBE, n=5, keep=5), Sampling(seed=3))
    assert [picture["candidate"] for picture in done["pictures"]] == list(expected.candidates)
    for k in range(5):
        data = server.ask("GET", f"/api/jobs/{job['id']}/pictures/{k}").content
        image = Image.open(io.BytesIO(data))
        assert np.array_equal(np.asarray(image), np.asarray(to_image(expected.images[k])))
        assert (image.text["caption"], image.text["seed"]) == (CUBE, "3")
    assert server.ask("GET", f"/api/jobs/{job['id']}/pictures/5").status_code == 404
    assert events(server, job["id"], after=4)[0][0] == "done"  # a page that comes back


def test_a_job_outlives_its_connection_and_is_cancelled_when_told_to(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.05))) as server:
        job = create(server)["id"]
        wait_until(lambda: server.slow.drawn)
        assert events(server, job)[-1][0] == "done"
        doomed = create(server, seed=1)["id"]
        wait_until(lambda: len(server.slow.drawn) == 2)
        assert server.ask("DELETE", f"/api/jobs/{doomed}").status_code == 204
        (kind, data, _) = events(server, doomed)[-1]
        assert (kind, data["state"]) == ("failed", "cancelled")
        wait_until(lambda: server.state.engine.queue.is_idle)
        assert server.ask("GET", "/api/jobs/0000/events").status_code == 404


def test_the_page_loads_nothing_from_elsewhere(server):
    for path, kind in (("/", "text/html"), ("/app.css", "text/css"), ("/app.js", "text/javascript")):
        answer = server.ask("GET", path)
        assert answer.headers["content-type"].startswith(kind)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "http" not in answer.text.replace("the server answered", "")
    info = server.ask("GET", "/api/info").json()
    assert (info["size"], info["grid"], info["best_of"]) == (16, 4, 4)


# ------------------------------------------------------------------------------------------------ in a browser


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


def draw(page, caption=CUBE):
    page.get_by_label("Caption").fill(caption)
    page.get_by_label("Caption").press("Enter")


@pytest.mark.slow
def test_in_a_browser_pictures_grow_are_ranked_and_saved(server, tmp_path):
    with page_of(server) as page:
        page.get_by_label("Best of").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        draw(page)
        page.get_by_text("2 candidates, best first").wait_for()
        assert page.locator("#ranked img").count() == 2
        assert page.locator("#ranked img").first.get_attribute("alt") == f"{CUBE}, rank 1"
        page.locator("#ranked button").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert "2 of 2" in page.locator("#detail-facts").inner_text()
        with page.expect_download() as download:
            page.get_by_role("link", name="Save").click()
        saved = tmp_path / "saved.png"
        download.value.save_as(saved)
        text = Image.open(saved).text
        assert (text["caption"], text["rank"]) == (CUBE, "2")
        assert int(text["seed"]) < 2**53
        page.get_by_role("button", name="Close").click()
        page.locator("#history button").wait_for()
        # a picture that is dropped brings its settings back
        page.get_by_label("Caption").fill("something else")
        data = base64.b64encode(saved.read_bytes()).decode()
        transfer = page.evaluate_handle(
            """data => { const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "saved.png", {type: "image/png"})); return transfer; }""",
            data,
        )
        page.dispatch_event("body", "drop", {"dataTransfer": transfer})
        page.get_by_text("The settings of the picture are back.").wait_for()
        assert page.get_by_label("Caption").input_value() == CUBE
        assert page.locator("#seed").input_value() == text["seed"]


@pytest.mark.slow
def test_in_a_browser_a_job_is_cancelled_or_found_again(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.1))) as server, page_of(server) as page:
        draw(page)
        page.get_by_text("Row 1 of 4").wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("Cancelled.").wait_for()
        wait_until(lambda: server.state.engine.queue.is_idle)
        draw(page)
        seen = set()
        deadline = time.monotonic() + 60
        while len(seen) < 2 and time.monotonic() < deadline:
            seen |= {page.get_by_role("status").inner_text()} & {f"Row {i} of 4" for i in range(1, 5)}
        page.reload()
        page.get_by_text("4 candidates, best first").wait_for()
        assert page.locator("#ranked img").count() == 4
        assert len(seen) == 2
        assert len(server.slow.drawn) == 2


@pytest.mark.slow
def test_in_a_browser_the_top_of_a_picture_is_kept(server):
    with page_of(server) as page:
        draw(page)
        page.locator("#ranked button").first.click()
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Keep rows at the top").press("End")
        assert page.locator("#keep-count").inner_text() == "3 of 4"
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text("4 candidates, best first").wait_for()
        page.locator("#ranked button").first.click()
        assert "Rows kept" in page.locator("#detail-facts").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (320, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser_every_control_has_a_name_and_fits(server, width, scheme):
    with page_of(server, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        draw(page)
        page.get_by_text("4 candidates, best first").wait_for()
        page.locator("summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tree = page.locator("body").aria_snapshot()
        for name in ("Caption", "Best of", "Seed", "Temperature", "Top-k", "Top-p", "Guidance", "Ranked by", "API key"):
            assert f'"{name}"' in tree
        unnamed = [line for line in tree.splitlines() if line.strip() in ("- button", "- textbox", "- slider", "- img")]
        assert unnamed == []


@pytest.mark.slow
def test_in_a_browser_a_key_is_asked_for_and_sent(pipe):
    with running(LiveServer(lambda: pipe, rules={"keys": {"sk-right": "alice"}})) as server:
        playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
        if CHROMIUM is None:
            pytest.skip("Chromium is not installed: `apt-get install chromium`")
        with playwright.sync_playwright() as driver:
            page = driver.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"]).new_page()
            page.goto(server.url)
            page.get_by_text("no API key").wait_for()
            page.get_by_label("API key").fill("sk-right")
            page.get_by_label("API key").press("Tab")
            page.get_by_text("tiny ·").wait_for()
            draw(page)
            page.get_by_text("4 candidates, best first").wait_for()
