"""Edits and variations through the official Python client; of an edit, what is not drawn anew comes back exactly."""

import base64
import io
import json
import socket

import numpy as np
import pytest
from PIL import Image
from servers.images import LiveServer, SlowDraw, running, wait_until

from dalle.best_of_n import Request
from dalle.sampling import Sampling
from dvae.images import resize_and_crop, to_image

CUBE = "a red cube on a blue cube"
IS_NEW = np.zeros((32, 32), bool)
IS_NEW[9:23, 11:32] = True
IS_NEW[14:17, 15:20] = False
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def file_of(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def masked(array, is_new):
    return file_of(np.dstack([array, np.where(is_new, 0, 255).astype(np.uint8)]))


def opened(b64_json):
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def pixels(image):
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("own", [False, True])
def test_any_part_is_drawn_as_the_pipeline_draws_it_and_the_rest_is_kept_exactly(server, pipe, own):
    if own:
        given = {"image": [masked(NOISE, IS_NEW)]}
    else:
        given = {"image": [file_of(NOISE)], "mask": masked(0 * NOISE, IS_NEW)}
    more = {"seed": 5, "best_of": 6, "rank": "both"}
    answer = server.client().images.edit(prompt=CUBE, n=3, extra_body=more, **given)
    # what is transparent is put on white
    picture = Image.fromarray(np.where(IS_NEW[..., None], 255, NOISE).astype(np.uint8) if own else NOISE)
    settings = pipe.defaults.updated(rank="both")
    expected = pipe.edit(picture, IS_NEW, CUBE, n=6, keep=3, seed=5, settings=settings)
    assert len(answer.data) == len(expected.images)
    is_new = expected.region.is_new.numpy()
    original = np.asarray(resize_and_crop(picture, 16))
    for i, item in enumerate(answer.data):
        found = pixels(opened(item.b64_json))
        assert np.array_equal(found, pixels(to_image(expected.images[i])))
        assert np.array_equal(found[~is_new], original[~is_new])
        assert (found[is_new] != original[is_new]).any()
        about = item.model_extra["dalle"]
        assert (about["candidate"], about["seam"]) == (expected.candidates[i], pytest.approx(float(expected.seams[i])))
        assert opened(item.b64_json).text["unknown_tokens"] == str(expected.n_unknown)
    assert answer.usage.input_tokens_details.image_tokens == 16 - expected.n_unknown
    assert answer.usage.output_tokens == 6 * expected.n_unknown


def test_keep_rows_completes_a_picture_from_its_top(server, pipe):
    answer = server.client().images.edit(image=file_of(NOISE), prompt=CUBE, n=2, extra_body={"keep_rows": 2, "seed": 5})
    picture = Image.fromarray(NOISE)
    all_four = pipe.best(Request(caption=CUBE, n=4, keep=4), Sampling(seed=5), prefix=pipe.prefix(picture, 2)).images
    drawn = {pixels(to_image(image))[8:].tobytes() for image in all_four}
    top = np.asarray(resize_and_crop(picture, 16))[:8]
    assert len(answer.data) == 2
    for item in answer.data:  # CLIP sees the picture's own top, and may rank otherwise
        found = pixels(opened(item.b64_json))
        assert found[8:].tobytes() in drawn
        assert np.array_equal(found[:8], top)


def test_empty_texts_of_a_form_are_left_out(server):
    empty = dict.fromkeys(("n", "size", "seed", "quality", "response_format", "mask"), "")
    fields = {"prompt": CUBE, "keep_rows": "1", **empty}
    answer = server.ask("POST", "/v1/images/edits", data=fields, files={"image": file_of(NOISE)})
    assert (answer.status_code, len(answer.json()["data"])) == (200, 1)


def test_an_edit_that_finds_fewer_different_pictures_answers_those(server):
    is_new = np.ones((32, 32), bool)
    answer = server.client().images.edit(
        image=file_of(NOISE), mask=masked(NOISE, is_new), prompt=CUBE, n=4, extra_body={"temperature": 0}
    )
    assert len(answer.data) == 1


def test_an_edit_streams_what_is_kept_and_what_is_drawn_so_far(server):
    is_new = np.zeros((32, 32), bool)
    is_new[:24, 8:24] = True
    given = {"image": file_of(NOISE), "mask": masked(NOISE, is_new), "prompt": CUBE}
    events = list(server.client().images.edit(stream=True, partial_images=2, extra_body={"seed": 2}, **given))
    kinds = [event.type for event in events]
    assert kinds == ["image_edit.partial_image", "image_edit.partial_image", "image_edit.completed"]
    kept = ~is_new[::2, ::2]
    original = np.asarray(resize_and_crop(Image.fromarray(NOISE), 16))
    for event in events:
        assert np.array_equal(pixels(opened(event.b64_json))[kept], original[kept])
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    direct = server.client().images.edit(extra_body={"seed": 2}, **given)
    assert direct.data[0].b64_json == events[-1].b64_json


def test_a_dropped_connection_ends_an_edit_within_a_token(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.1))) as server:
        boundary = b"--x\r\ncontent-disposition: form-data; name="
        body = boundary + b'"prompt"\r\n\r\n' + CUBE.encode() + b"\r\n"
        body += boundary + b'"image"; filename="a"\r\n\r\n' + masked(NOISE, IS_NEW) + b"\r\n--x--\r\n"
        head = "POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: server.slow.drawn)
        wait_until(lambda: server.slow.ended)
        wait_until(lambda: server.metric('dalle_jobs_total{kind="edits",outcome="cancelled"}') == 1)


def test_the_pages_job_takes_a_mask_in_base64(server, pipe):
    body = {"prompt": CUBE, "seed": 5, "best_of": 6, "n": 3}
    image, mask = (base64.b64encode(one).decode() for one in (file_of(NOISE), masked(NOISE, IS_NEW)))
    made = server.ask("POST", "/api/jobs", json={**body, "image": image, "mask": mask})
    assert made.status_code == 201
    text = server.ask("GET", f"/api/jobs/{made.json()['id']}/events").text
    kind, data = text.strip().split("\n\n")[-1].split("\n")
    assert kind == "event: done"
    expected = pipe.edit(Image.fromarray(NOISE), IS_NEW, CUBE, n=6, keep=3, seed=5)
    candidates = [picture["candidate"] for picture in json.loads(data.removeprefix("data: "))["pictures"]]
    assert tuple(candidates) == expected.candidates


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"image": "???", "keep_rows": 1}, "image"),
        ({"image": 5, "keep_rows": 1}, "image"),
        ({"image": base64.b64encode(file_of(NOISE)).decode()}, "mask"),
        ({"image": base64.b64encode(file_of(NOISE)).decode(), "mask": "???"}, "mask"),
        ({"image": base64.b64encode(file_of(NOISE)).decode(), "mask": "aaaa"}, "mask"),
        ({"mask": base64.b64encode(file_of(NOISE)).decode()}, "image"),
    ],
)
def test_a_bad_picture_of_the_page_is_named(server, values, param):
    answer = server.ask("POST", "/api/jobs", json={"prompt": CUBE, **values})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("caption", ["", CUBE])
def test_variations_are_those_of_the_pipeline(server, pipe, caption):
    more = {"seed": 5, "best_of": 6, "strength": 0.25, **({"prompt": caption} if caption else {})}
    answer = server.client().images.create_variation(image=file_of(NOISE), n=3, extra_body=more)
    expected = pipe.variations(Image.fromarray(NOISE), caption, n=6, keep=3, strength=0.25, seed=5)
    assert len(answer.data) == len(expected.images) > 1
    for i, item in enumerate(answer.data):
        image = opened(item.b64_json)
        assert np.array_equal(pixels(image), pixels(to_image(expected.images[i])))
        about = item.model_extra["dalle"]
        assert (about["candidate"], about["changed_tokens"]) == (expected.candidates[i], expected.n_changed[i])
        assert (about["score"] is None) == (caption == "")
        assert image.text["strength"] == "0.25"
    assert answer.usage.output_tokens == 6 * 4


def test_variations_of_no_strength_are_the_reconstruction(server, pipe):
    answer = server.client().images.create_variation(image=file_of(NOISE), n=2, extra_body={"strength": 0})
    expected = pipe.variations(Image.fromarray(NOISE), n=1, keep=1, strength=0).reconstruction
    assert [pixels(opened(item.b64_json)).tolist() for item in answer.data] == [pixels(to_image(expected)).tolist()]


def test_the_page_draws_variations(server, pipe):
    image = base64.b64encode(file_of(NOISE)).decode()
    body = {"prompt": CUBE, "seed": 5, "best_of": 6, "n": 3, "image": image, "strength": 0.5}
    made = server.ask("POST", "/api/jobs", json=body)
    assert made.status_code == 201
    text = server.ask("GET", f"/api/jobs/{made.json()['id']}/events").text
    pictures = json.loads(text.strip().rpartition("data: ")[2])["pictures"]
    expected = pipe.variations(Image.fromarray(NOISE), CUBE, n=6, keep=3, strength=0.5, seed=5)
    assert tuple(picture["candidate"] for picture in pictures) == expected.candidates
