"""A server of a bundle with both models: DALL·E 2 edits and varies, DALL·E draws captions, and `model` names one."""

import base64
import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import with_random_weights
from servers.browser import draw, page_of
from servers.images import LiveServer, running, wait_until
from tiny_unclip import write_unclip

from dalle.best_of_n import Request
from dalle.sampling import Sampling
from dalle.server.api.requests import names_of_both
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.settings import Drawing
from dvae.images import to_image
from rerank import score
from unclip import Decoder

CUBE = "a red cube on a blue cube"
STEPS = 2
DRAWING = Drawing(steps=STEPS)
SIDE = 16
"""Of the pictures of both models."""


@pytest.fixture(scope="session")
def unclip(bundle, tmp_path_factory):
    """DALL·E 2 that edits, of the CLIP of the other tests."""
    path = write_unclip(tmp_path_factory.mktemp("both") / "tiny", bundle / "clip")
    decoder = Decoder.load(path / "decoder")
    with_random_weights(decoder.inpainting()).save(path / "decoder", decoder.metadata)
    return UnCLIP.load(path)


@pytest.fixture(scope="session")
def both(pipe, unclip):
    live = LiveServer(lambda: pipe, load_unclip=lambda: unclip, models=("tiny", *names_of_both("tiny")))
    with running(live):
        yield live


@pytest.fixture(scope="session")
def picture():
    return to_image(torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))


def file_of(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def asked(server, endpoint, picture=None, mask=None, **fields):
    """The answer's body, and its pictures."""
    if endpoint == "generations":
        answer = server.ask("POST", f"/v1/images/{endpoint}", json=fields)
    else:
        files = {"image": file_of(picture)} | ({} if mask is None else {"mask": mask})
        texts = {name: str(value) for name, value in fields.items()}
        answer = server.ask("POST", f"/v1/images/{endpoint}", files=files, data=texts)
    body = answer.json()
    opened = [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in body.get("data", ())]
    return answer.status_code, body, opened


def assert_are(pictures, images):
    assert len(pictures) == len(images)
    for found, expected in zip(pictures, images, strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(to_image(expected)))


def test_variations_are_dalle_2s_by_its_own_seed_strength_and_steps(both, unclip, picture):
    status, body, pictures = asked(both, "variations", picture, n=2, best_of=3, seed=5, strength=0.7, steps=STEPS)
    assert status == 200, body
    expected = unclip.variations(picture, n=3, eta=0.7, seed=5, drawing=DRAWING)
    order = expected.scores.argsort(descending=True).tolist()
    assert_are(pictures, expected.images[order[:2]])
    assert [one["dalle"]["candidate"] for one in body["data"]] == order[:2]
    about = body["data"][0]["dalle"]
    assert about["log_likelihood"] is None
    assert about["native_size"] == f"{SIDE}x{SIDE}"
    texts = pictures[0].text
    assert (texts["seed"], texts["eta"], texts["steps"], texts["best_of"]) == ("5", "0.7", str(STEPS), "3")
    assert json.loads(texts["hashes"]) == unclip.hashes
    assert "temperature" not in texts


def test_variations_with_a_caption_are_ranked_by_it(both, unclip, picture):
    _, body, pictures = asked(both, "variations", picture, prompt=CUBE, n=3, best_of=3, seed=5, steps=STEPS)
    expected = unclip.variations(picture, n=3, eta=0.5, seed=5, drawing=DRAWING)
    scores = score(unclip.clip, [CUBE], expected.images)[0]
    order = scores.argsort(descending=True).tolist()
    assert_are(pictures, expected.images[order])
    assert [one["dalle"]["score"] for one in body["data"]] == pytest.approx(scores[order].tolist(), abs=1e-6)


def test_edits_are_dalle_2s_and_what_is_kept_is_exact(both, unclip, picture):
    is_new = np.zeros((SIDE, SIDE), dtype=bool)
    is_new[:, 8:] = True
    alpha = np.where(is_new, 0, 255).astype(np.uint8)
    mask = file_of(Image.fromarray(np.dstack([np.asarray(picture), alpha])))
    fields = {"prompt": CUBE, "n": 2, "best_of": 2, "seed": 4, "steps": STEPS}
    status, body, pictures = asked(both, "edits", picture, mask, **fields)
    assert status == 200, body
    expected = unclip.edit(picture, is_new, CUBE, n=2, keep=2, seed=4, drawing=DRAWING)
    assert_are(pictures, expected.images)
    assert np.array_equal(np.asarray(pictures[0])[:, :8], np.asarray(picture)[:, :8])
    assert body["data"][0]["dalle"]["seam"] == pytest.approx(float(expected.seams[0]))


def test_captions_are_dalles_unless_dalle_2_is_named(both, pipe, unclip):
    _, body, pictures = asked(both, "generations", prompt=CUBE, best_of=1, seed=3)
    assert_are(pictures, pipe.best(Request(caption=CUBE, n=1, keep=1), Sampling(seed=3)).images)
    assert body["usage"]["output_tokens"] == 16
    fields = {"prompt": CUBE, "best_of": 1, "seed": 3, "steps": STEPS, "guidance": 2, "model": "tiny/unclip"}
    _, body, pictures = asked(both, "generations", **fields)
    drawing = Drawing(steps=STEPS, guidance=2.0)
    assert_are(pictures, unclip.best(Request(caption=CUBE, n=1, keep=1), drawing, seed=3).images)
    assert body["usage"]["output_tokens"] == 0


def test_dalle_varies_where_it_is_named(both, picture):
    _, body, _ = asked(both, "variations", picture, model="tiny/dalle", best_of=2, seed=3)
    assert "changed_tokens" in body["data"][0]["dalle"]


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "says"),
    [
        ("variations", {"temperature": 0.5}, "temperature", "DALL·E 2 draws this"),
        ("variations", {"rank": "likelihood"}, "rank", "tiny/dalle"),
        ("variations", {"steps": 0}, "steps", "at least 1"),
        ("variations", {"steps": 2000}, "steps", "1 to 1000"),
        ("variations", {"guidance": -1}, "guidance", "guidance is -1"),
        ("generations", {"prompt": CUBE, "steps": 3}, "steps", "tiny/unclip"),
        ("generations", {"prompt": CUBE, "model": "tiny/glide"}, "model", "tiny/unclip"),
    ],
)
def test_what_the_other_model_reads_is_refused(both, picture, endpoint, fields, param, says):
    status, body, _ = asked(both, endpoint, picture, **fields)
    assert status in (400, 404)
    assert body["error"]["param"] == param
    assert says in body["error"]["message"]


def test_a_bundle_that_cannot_edit_lets_dalle_do_it(pipe, bundle, tmp_path, picture):
    path = write_unclip(tmp_path / "tiny", bundle / "clip")
    plain = LiveServer(lambda: pipe, load_unclip=lambda: UnCLIP.load(path), models=("tiny", *names_of_both("tiny")))
    with running(plain) as server:
        _, body, _ = asked(server, "edits", picture, prompt=CUBE, keep_rows=2, best_of=1, seed=3)
        assert body["data"][0]["dalle"]["log_likelihood"] is not None
        status, body, _ = asked(server, "edits", picture, prompt=CUBE, keep_rows=2, model="tiny/unclip")
        assert (status, body["error"]["param"]) == (400, "model")


def test_the_page_is_told_how_far_dalle_2_is_and_it_can_be_cancelled(both, picture):
    assert both.ask("GET", "/api/info").json()["by_unclip"] == ["edits", "variations"]
    image = base64.b64encode(file_of(picture)).decode()
    fields = {"prompt": CUBE, "image": image, "strength": 0.5, "best_of": 4, "n": 4, "steps": 4}
    job = both.ask("POST", "/api/jobs", json=fields).json()["id"]
    told = both.ask("GET", f"/api/jobs/{job}/events").text
    assert "event: rows" in told
    assert "event: done" in told
    long = both.ask("POST", "/api/jobs", json={**fields, "steps": 1000}).json()["id"]
    time.sleep(0.2)
    both.ask("DELETE", f"/api/jobs/{long}")
    assert '"state": "cancelled"' in both.ask("GET", f"/api/jobs/{long}/events").text.replace('":"', '": "')
    wait_until(lambda: both.state.engine.queue.is_idle)


@pytest.mark.slow
def test_in_a_browser_dalle_2_varies_the_open_picture_and_draws_captions_if_chosen(both):
    with page_of(both) as page:
        draw(page)
        page.get_by_text("4 candidates, best first").wait_for()
        page.locator("#ranked button").first.click()
        page.get_by_role("button", name="Variations").click()
        page.locator("#status", has_text="candidates, best first, in").wait_for()
        page.locator("#ranked button").first.click()
        facts = page.locator("#detail-facts").inner_text()
        assert "tiny, DALL·E 2" in facts
        assert "Log-likelihood" not in facts
        page.keyboard.press("Escape")
        page.locator("summary").click()
        page.get_by_label("Drawn by").select_option("DALL·E 2")
        draw(page, "a blue cube")
        page.locator("#status", has_text="candidates, best first, in").wait_for()
        page.locator("#ranked button").first.click()
        assert "Variation" not in page.locator("#detail-facts").inner_text()
        assert "tiny, DALL·E 2" in page.locator("#detail-facts").inner_text()
