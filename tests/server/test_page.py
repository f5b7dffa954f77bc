"""The web page: its jobs over HTTP, and the page itself in Chromium, where that is installed."""

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from servers.browser import CHROMIUM, draw, page_of
from servers.images import LiveServer, SlowDraw, running, wait_until

from dalle.best_of_n import Request
from dalle.sampling import Sampling
from dalle.server.page import FILES
from dvae.images import resize_and_crop, to_image

CUBE = "a red cube on a blue cube"
SETTINGS = ("Caption", "Best of", "Seed", "Temperature", "Top-k", "Top-p", "Guidance", "Ranked by", "API key")


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


def test_a_job_shows_all_candidates_growing_then_ranked(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.05))) as server:
        job = create(server, seed=3, best_of=5, n=5)
        found = events(server, job["id"])
        rows = [data for kind, data, _ in found if kind == "rows"]
        assert [data["rows"] for data in rows] in (
            [1, 2, 3, 4][-n:] for n in range(1, 5)
        )  # from when it is listened to
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
        answer = server.ask("GET", f"/api/jobs/{job['id']}/events", headers={"last-event-id": b"\xb2"})  # a digit: ²
        assert answer.status_code == 200


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


def test_jobs_that_have_not_ended_are_remembered_whatever_comes_after(pipe, monkeypatch):
    monkeypatch.setattr("dalle.server.page.MAX_JOBS", 1)
    with running(LiveServer(lambda: pipe, slow=SlowDraw(60), process={"max_jobs": 1})) as server:
        running_one = create(server)["id"]
        wait_until(lambda: server.slow.drawn)
        waiting_one = create(server, temperature=0.5)["id"]
        for _ in range(3):
            assert server.ask("POST", "/api/jobs", json={"prompt": CUBE, "temperature": 2}).status_code == 429
        server.slow.go.set()
        assert events(server, running_one)[-1][0] == "done"
        assert events(server, waiting_one)[-1][0] == "done"
        wait_until(lambda: server.state.engine.queue.is_idle)
        create(server, seed=9)
        assert server.ask("GET", f"/api/jobs/{running_one}/events").status_code == 404


def test_the_page_itself_needs_no_key(pipe):
    with running(LiveServer(lambda: pipe, rules={"keys": {"sk-right": "alice"}})) as server:
        assert {server.ask("GET", path).status_code for path in FILES} == {200}
        assert server.ask("GET", "/api/info").status_code == 401


def test_the_page_loads_nothing_from_elsewhere(server):
    for path, kind in (
        ("/", "text/html"),
        ("/app.css", "text/css"),
        *((f"/{name}.js", "text/javascript") for name in ("app", "history", "paint")),
    ):
        answer = server.ask("GET", path)
        assert answer.headers["content-type"].startswith(kind)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "http" not in answer.text.replace("the server answered", "")
    info = server.ask("GET", "/api/info").json()
    assert (info["size"], info["grid"], info["best_of"]) == (16, 4, 4)


# ------------------------------------------------------------------------------------------------ in a browser


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
def test_in_a_browser_enter_that_is_hit_twice_draws_once(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.05))) as server, page_of(server) as page:
        page.get_by_label("Caption").fill(CUBE)
        page.evaluate("for (let i = 0; i < 3; i++) document.getElementById('form').requestSubmit()")
        page.get_by_text("4 candidates, best first").wait_for()
        wait_until(lambda: server.state.engine.queue.is_idle)
        assert len(server.slow.drawn) == 1


def edit_the_best(page):
    draw(page)
    page.get_by_text("4 candidates, best first").wait_for()
    page.locator("#ranked button").first.click()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("nothing is painted yet").wait_for()


def mask_on(page):
    """What is painted, bool (16, 16)."""
    values = page.evaluate("Array.from(painting.mask)")
    return np.array(values, dtype=bool).reshape(16, 16)


def pixels_of(page, script):
    """The pixels of a picture whose blob a script yields, (16, 16, 3)."""
    data = page.evaluate(f"(async () => base64({script}))()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.mark.slow
def test_in_a_browser_what_is_painted_is_drawn_anew_and_the_rest_is_kept_exactly(server):
    with page_of(server) as page:
        edit_the_best(page)
        before = pixels_of(page, "painting.blob")
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text("Paint over what is to be drawn anew.", exact=True).wait_for()
        box = page.locator("#edit-picture").bounding_box()
        cell = box["width"] / 16
        page.get_by_label("Brush size").fill("3")
        page.mouse.move(box["x"] + 4 * cell, box["y"] + 5 * cell)
        page.mouse.down()
        page.mouse.move(box["x"] + 12 * cell, box["y"] + 5 * cell, steps=4)
        page.mouse.up()
        painted = mask_on(page)
        assert painted[5, 4:12].all()
        assert not painted[8:].any()
        assert not painted[:2].any()
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text("different picture").wait_for()
        page.locator("#ranked button").first.click()
        assert "Drawn anew" in page.locator("#detail-facts").inner_text()
        after = pixels_of(page, "shown.pictures[0].blob")
        assert np.array_equal(after[~painted], before[~painted])
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Draw whole pictures again").click()
        draw(page)
        page.get_by_text("4 candidates, best first").wait_for()


@pytest.mark.slow
def test_in_a_browser_keys_paint_erase_undo_clear_and_invert(server):
    with page_of(server) as page:
        edit_the_best(page)
        page.get_by_label("Brush size").fill("2")
        page.get_by_label("Picture to paint on").focus()
        page.keyboard.press("Space")  # in the middle
        assert mask_on(page).sum() == mask_on(page)[7:9, 7:9].sum() == 4
        page.keyboard.press("Shift+ArrowRight")
        for _ in range(3):
            page.keyboard.press("Shift+ArrowDown")
        page.keyboard.press("Enter")
        assert mask_on(page)[10:12, 8:10].all()
        page.keyboard.press("Control+z")
        assert mask_on(page).sum() == 4
        page.get_by_role("button", name="Invert").click()
        assert mask_on(page).sum() == 252
        page.get_by_role("button", name="Undo").click()
        page.get_by_label("erase").check()
        page.get_by_label("Picture to paint on").focus()
        for _ in range(3):
            page.keyboard.press("Shift+ArrowUp")
        page.keyboard.press("Space")
        assert mask_on(page).sum() == 2
        page.get_by_role("button", name="Clear").first.click()
        assert not mask_on(page).any()
        page.get_by_text("nothing is painted yet").wait_for()


@pytest.mark.slow
def test_in_a_browser_a_finger_paints_and_does_not_scroll(server):
    with page_of(server, viewport={"width": 320, "height": 800}, has_touch=True) as page:
        edit_the_best(page)
        canvas = page.locator("#edit-picture")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        page.touchscreen.tap(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
        painted = mask_on(page)
        assert painted[4, 4]
        assert not painted[10:].any()
        assert canvas.evaluate("canvas => getComputedStyle(canvas).touchAction") == "none"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 57), (64, 40), (16, 16)])
def test_in_a_browser_a_picture_from_a_file_is_painted_in_its_middle_square(server, tmp_path, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with page_of(server) as page:
        page.get_by_label("Edit a picture").set_input_files(tmp_path / "noise.png")
        page.get_by_text("nothing is painted yet").wait_for()
        page.get_by_label("Picture to paint on").focus()
        page.keyboard.press("Space")
        painted = mask_on(page)
        draw(page)
        page.get_by_text("different picture").wait_for()
        after = pixels_of(page, "shown.pictures[0].blob")
        before = np.asarray(resize_and_crop(Image.fromarray(noise), 16))
        assert np.array_equal(after[~painted], before[~painted])
        assert (after[painted] != before[painted]).any()


@pytest.mark.slow
def test_in_a_browser_variations_start_from_the_picture_that_is_open(server):
    with page_of(server) as page:
        draw(page)
        page.get_by_text("4 candidates, best first").wait_for()
        page.locator("summary").click()
        page.get_by_label("Strength of variations").fill("0.25")
        page.locator("#ranked button").first.click()
        page.get_by_role("button", name="Variations").click()
        page.get_by_text("different picture").wait_for()
        page.locator("#ranked button").first.click()
        assert "Variation of strength\n0.25" in page.locator("#detail-facts").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (320, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser_every_control_has_a_name_and_fits(server, width, scheme):
    with page_of(server, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        draw(page)
        page.get_by_text("4 candidates, best first").wait_for()
        page.locator("#ranked button").first.click()
        page.get_by_role("button", name="Edit", exact=True).click()
        page.get_by_text("nothing is painted yet").wait_for()
        page.locator("summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tree = page.locator("body").aria_snapshot()
        for name in (*SETTINGS, "Picture to paint on", "paint", "erase", "Brush size", "Undo", "Edit a picture …"):
            assert f'"{name}"' in tree
        unnamed = [
            line
            for line in tree.splitlines()
            if line.strip() in ("- button", "- textbox", "- slider", "- img", "- radio")
        ]
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
