"""A server of a bundle with both models: DALL·E 2 edits and varies, DALL·E draws captions, and `model` names one."""

import base64
import io
import json
import shutil
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
from dalle.unclip.metadata import settings_of
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.settings import Drawing
from dvae.images import to_image
from rerank import score
from unclip import Decoder

CUBE = "a red cube on a blue cube"
STEPS = 2
DRAWING = Drawing(steps=STEPS)
SIDE = 24
"""Of DALL·E 2's pictures; DALL·E's have 16 pixels."""


@pytest.fixture(scope="session")
def unclip(bundle, tmp_path_factory):
    """DALL·E 2 that edits, of the CLIP of the other tests."""
    path = write_unclip(tmp_path_factory.mktemp("both") / "tiny", bundle / "clip", side=SIDE // 2)
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


def told(picture):
    """What a PNG tells of itself."""
    texts = {name: value for name, value in picture.text.items() if name != "XML:com.adobe.xmp"}
    return {name: json.loads(value) if is_json(value) else value for name, value in texts.items()}


def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


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
    assert about["score"] == pytest.approx(float(expected.scores[order[0]]))
    assert about["log_likelihood"] is None
    assert about["native_size"] == f"{SIDE}x{SIDE}"
    texts = told(pictures[0])
    assert texts.pop("score") == pytest.approx(about["score"])
    assert texts == {
        "caption": "",
        "rank": 1,
        "ranked_by": "clip",
        "candidate": order[0],
        "seed": 5,
        "eta": 0.7,
        "best_of": 3,
        "hashes": unclip.hashes,
        **settings_of(unclip, DRAWING, 1, 3),
    }


def test_variations_with_a_caption_are_ranked_by_it(both, unclip, picture):
    _, body, pictures = asked(both, "variations", picture, prompt=CUBE, n=3, best_of=3, seed=5, steps=STEPS)
    small = UnCLIP(clip=unclip.clip, decoder=unclip.decoder, hashes={})
    scores = score(unclip.clip, [CUBE], small.variations(picture, n=3, eta=0.5, seed=5, drawing=DRAWING).images)[0]
    expected = unclip.variations(picture, n=3, eta=0.5, seed=5, drawing=DRAWING)
    order = scores.argsort(descending=True).tolist()
    assert_are(pictures, expected.images[order])
    assert [one["dalle"]["score"] for one in body["data"]] == pytest.approx(scores[order].tolist(), abs=1e-6)


def test_edits_are_dalle_2s_and_what_is_kept_is_exact(both, unclip, picture):
    is_new = np.zeros((SIDE, SIDE), dtype=bool)
    is_new[:, 12:] = True
    alpha = np.where(is_new, 0, 255).astype(np.uint8)
    mask = file_of(Image.fromarray(np.dstack([np.asarray(picture), alpha])))
    fields = {"prompt": CUBE, "n": 2, "best_of": 2, "seed": 4, "steps": STEPS}
    status, body, pictures = asked(both, "edits", picture, mask, **fields)
    assert status == 200, body
    expected = unclip.edit(picture, is_new, CUBE, n=2, keep=2, seed=4, drawing=DRAWING)
    assert_are(pictures, expected.images)
    assert np.array_equal(np.asarray(pictures[0])[:, :12], np.asarray(picture)[:, :12])
    texts = told(pictures[0])
    assert (texts["guidance"], texts["prior_steps"], texts["upsampler_steps"]) == (3.0, 64, [27])
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
    assert told(pictures[0])["guidance"] == 2


def test_a_caption_is_cut_and_counted_as_dalle_2_reads_it(both):
    fields = {"prompt": 30 * "cube ", "best_of": 1, "steps": STEPS, "model": "tiny/unclip"}
    _, body, _ = asked(both, "generations", **fields)
    assert body["usage"]["input_tokens_details"]["text_tokens"] == 22  # of the 24 that CLIP reads, less start and end
    assert body["data"][0]["dalle"]["caption_cut"] > 0


def test_a_stream_of_dalle_2_has_finished_pictures_alone(both, picture):
    fields = {"n": "2", "best_of": "2", "steps": str(STEPS), "stream": "true", "partial_images": "2"}
    answer = both.ask("POST", "/v1/images/variations", files={"image": file_of(picture)}, data=fields)
    assert [line for line in answer.text.splitlines() if line.startswith("event: ")] == 2 * [
        "event: image_variation.completed"
    ]


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


def test_without_a_prior_dalle_2_varies_alone(pipe, bundle, tmp_path, picture):
    path = write_unclip(tmp_path / "tiny", bundle / "clip")
    decoder = Decoder.load(path / "decoder")
    with_random_weights(decoder.inpainting()).save(path / "decoder", decoder.metadata)
    shutil.rmtree(path / "prior")
    names = ("tiny", *names_of_both("tiny"))
    with running(LiveServer(lambda: pipe, load_unclip=lambda: UnCLIP.load(path), models=names)) as server:
        assert server.ask("GET", "/api/info").json()["by_unclip"] == ["variations"]
        status, body, _ = asked(server, "edits", picture, prompt=CUBE, keep_rows=2, best_of=1)
        assert (status, body["data"][0]["dalle"]["native_size"]) == (200, "16x16")
        status, body, _ = asked(server, "generations", prompt=CUBE, model="tiny/unclip")
        assert (status, body["error"]["param"]) == (400, "model")
        status, body, _ = asked(server, "generations", prompt=CUBE, steps=3)
        assert "tiny/unclip" not in body["error"]["message"]


def test_a_page_job_without_a_caption_ends(both, picture):
    image = base64.b64encode(file_of(picture)).decode()
    for model, more in (("tiny/unclip", {"steps": STEPS}), ("tiny/dalle", {})):
        fields = {"prompt": "", "image": image, "strength": 0.5, "best_of": 1, "n": 1, "model": model, **more}
        job = both.ask("POST", "/api/jobs", json=fields).json()["id"]
        assert "event: done" in both.ask("GET", f"/api/jobs/{job}/events").text


def test_the_page_is_told_how_far_dalle_2_is_and_it_can_be_cancelled(both, picture):
    assert both.ask("GET", "/api/info").json()["by_unclip"] == ["edits", "variations"]
    image = base64.b64encode(file_of(picture)).decode()
    fields = {"prompt": CUBE, "image": image, "strength": 0.5, "best_of": 4, "n": 4, "steps": 4}
    job = both.ask("POST", "/api/jobs", json=fields).json()["id"]
    told = both.ask("GET", f"/api/jobs/{job}/events").text
    assert "event: rows" in told
    assert "event: done" in told
    long = both.ask("POST", "/api/jobs", json={**fields, "best_of": 500, "n": 4, "steps": 1000}).json()["id"]
    queue = both.state.engine.queue
    wait_until(lambda: queue.n_running)
    both.ask("DELETE", f"/api/jobs/{long}")
    begun = time.monotonic()
    wait_until(lambda: queue.is_idle)
    assert time.monotonic() - begun < 5, "it takes minutes to its end"
    failed = both.ask("GET", f"/api/jobs/{long}/events").text.partition("event: failed\ndata: ")[2]
    assert json.loads(failed.splitlines()[0])["state"] == "cancelled"


@pytest.mark.slow
def test_in_a_browser_dalle_2_varies_the_open_picture_and_draws_captions_if_chosen(both):
    with page_of(both) as page:
        draw(page)
        page.get_by_text("4 candidates, best first").wait_for()
        page.locator("#ranked button").first.click()
        page.locator("#status").evaluate("status => (status.textContent = '')")  # of the first job
        page.get_by_role("button", name="Variations").click()
        page.locator("#status", has_text="candidates, best first, in").wait_for()
        page.locator("#ranked button").first.click()
        facts = page.locator("#detail-facts").inner_text()
        assert "tiny, DALL·E 2" in facts
        assert "Log-likelihood" not in facts
        page.keyboard.press("Escape")
        page.locator("summary").click()
        assert page.get_by_label("Temperature").is_enabled()
        page.locator("#ranked button").first.click()
        page.locator("#edit-this").click()
        page.locator("#edit-picture").wait_for()
        assert page.get_by_label("Temperature").is_disabled(), "DALL·E 2 edits"
        page.get_by_label("Drawn by").select_option("DALL·E")
        assert page.get_by_label("Temperature").is_enabled()
        page.get_by_role("button", name="Draw whole pictures again").click()
        assert page.get_by_label("Temperature").is_enabled()
        page.get_by_label("Drawn by").select_option("DALL·E 2")
        assert page.get_by_label("Temperature").is_disabled()
        draw(page, "a blue cube")
        page.locator("#status", has_text="candidates, best first, in").wait_for()
        page.locator("#ranked button").first.click()
        assert "Variation" not in page.locator("#detail-facts").inner_text()
        assert "tiny, DALL·E 2" in page.locator("#detail-facts").inner_text()
