"""`dalle serve` through the official Python client, unchanged, and through requests that no client sends."""

import base64
import io
import json
import logging
import socket
import struct
import threading
import zlib

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from servers.images import LiveServer, SlowDraw, running, wait_until

from dalle.best_of_n import Request
from dalle.sampling import Sampling
from dvae.images import to_image

CUBE, SPHERE = "a red cube on a blue cube", "a green sphere left of a red cube"
GENERATE, EDIT, VARY = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))


def opened(b64_json):
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def png(width=24, height=24, mode="RGB", kept=None):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    array[..., 3] = 255
    if kept is not None:
        array[kept:, :, 3] = 0
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, format="PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ what works


def test_the_official_client_draws_what_the_pipeline_draws(server, pipe):
    answer = server.client().images.generate(prompt=CUBE, n=2, response_format="b64_json", extra_body={"seed": 3})
    expected = pipe.best(Request(caption=CUBE, n=4, keep=2), Sampling(seed=3))
    for i, item in enumerate(answer.data):
        image = opened(item.b64_json)
        assert np.array_equal(pixels(image), pixels(to_image(expected.images[i])))
        about = item.model_extra["dalle"]
        assert about["candidate"] == expected.candidates[i]
        assert about["score"] == pytest.approx(float(expected.scores[i]))
        assert (image.text["caption"], image.text["seed"], image.text["candidate"]) == (
            CUBE,
            "3",
            str(about["candidate"]),
        )
    scores = [item.model_extra["dalle"]["score"] for item in answer.data]
    assert scores == sorted(scores, reverse=True)
    assert (answer.size, answer.output_format, answer.background) == ("16x16", "png", "opaque")
    assert answer.usage.output_tokens == 4 * 16
    assert answer.usage.total_tokens == answer.usage.input_tokens + 64
    again = server.client().images.generate(prompt=CUBE, n=2, extra_body={"seed": 3})
    assert [item.b64_json for item in again.data] == [item.b64_json for item in answer.data]


def test_a_new_seed_is_told_and_draws_the_same_again(server):
    client = server.client()
    first = client.images.generate(prompt=CUBE, model="dall-e-2", quality="low")
    seed = first.data[0].model_extra["dalle"]["seed"]
    again = client.images.generate(prompt=CUBE, quality="low", extra_body={"seed": seed})
    assert again.data[0].b64_json == first.data[0].b64_json


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_size_and_format_are_as_asked_for(server, output_format):
    answer = server.client().images.generate(
        prompt=CUBE, size="256x256", output_format=output_format, output_compression=80, background="auto"
    )
    image = opened(answer.data[0].b64_json)
    assert (image.format.lower(), image.size) == (output_format, (256, 256))
    assert answer.data[0].model_extra["dalle"]["native_size"] == "16x16"


def test_a_link_leads_to_the_picture_without_a_key(server):
    answer = server.client().images.generate(prompt=CUBE, response_format="url", extra_body={"seed": 3})
    direct = server.client().images.generate(prompt=CUBE, extra_body={"seed": 3})
    found = httpx2.get(answer.data[0].url)
    assert found.headers["content-type"] == "image/png"
    assert found.content == base64.b64decode(direct.data[0].b64_json)
    assert server.ask("GET", "/pictures/" + "0" * 32).status_code == 404


def test_a_stream_shows_rows_of_the_finished_picture(server):
    events = list(
        server.client().images.generate(
            prompt=SPHERE, stream=True, partial_images=3, quality="low", extra_body={"seed": 1}
        )
    )
    assert [event.type.removeprefix("image_generation.") for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    final = pixels(opened(events[-1].b64_json))
    for rows, event in enumerate(events[:3], start=1):
        shown = pixels(opened(event.b64_json))[: 4 * max(0, rows - 2)]  # the last two are faded
        assert abs(shown - final[: len(shown)]).max(initial=0) <= 0.03 * 255
    assert events[-1].usage.output_tokens == 16
    direct = server.client().images.generate(prompt=SPHERE, quality="low", extra_body={"seed": 1})
    assert direct.data[0].b64_json == events[-1].b64_json


def test_a_stream_of_several_pictures_completes_each(server):
    events = list(server.client().images.generate(prompt=SPHERE, stream=True, n=3, partial_images=1))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", *["completed"] * 3]
    assert [event.model_extra["dalle"]["rank"] for event in events[1:]] == [1, 2, 3]


def test_models_are_the_bundle_and_its_other_names(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "dall-e-2"]
    assert client.models.retrieve("dall-e-2").created == 1_700_000_000
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.models.retrieve("gpt-5")


def test_what_is_ignored_is_named(server):
    body = {"prompt": CUBE, "style": "vivid", "moderation": "low", "user": "u", "seed": 1}
    answer = server.ask("POST", GENERATE, json=body)
    assert answer.headers["x-ignored-parameters"] == "style, moderation"
    assert answer.json()["dalle"]["ignored"] == ["style", "moderation"]


def test_a_caption_that_is_cut_is_told(server):
    answer = server.client().images.generate(prompt=f"{CUBE} " * 20, quality="low")
    assert answer.data[0].model_extra["dalle"]["caption_cut"] > 0


# ------------------------------------------------------------------------------------------------ what is refused


def forged_png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png()[33:]


def form(values=None, **files):
    return {"data": {"prompt": CUBE, **(values or {})}, "files": files}


JSON = {"content-type": "application/json"}
BAD_BODIES = [
    ({}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": " \u2800\n"}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": [CUBE]}, 400, "prompt"),
    ({"prompt": "x" * 32_001}, 400, "prompt"),
    ({"prompt": "x" * 1_000_000}, 400, "prompt"),
    ({"prompt": CUBE, "model": "gpt-5"}, 404, "model"),
    ({"prompt": CUBE, "model": 7}, 400, "model"),
    ({"prompt": CUBE, "n": 0}, 400, "n"),
    ({"prompt": CUBE, "n": 11}, 400, "n"),
    ({"prompt": CUBE, "n": 1.5}, 400, "n"),
    ({"prompt": CUBE, "n": True}, 400, "n"),
    ({"prompt": CUBE, "n": "two"}, 400, "n"),
    ({"prompt": CUBE, "n": 10**30}, 400, "n"),
    ({"prompt": CUBE, "size": "512"}, 400, "size"),
    ({"prompt": CUBE, "size": "1024x1792"}, 400, "size"),
    ({"prompt": CUBE, "size": "9999x9999"}, 400, "size"),
    ({"prompt": CUBE, "size": 256}, 400, "size"),
    ({"prompt": CUBE, "quality": "best"}, 400, "quality"),
    ({"prompt": CUBE, "response_format": "png"}, 400, "response_format"),
    ({"prompt": CUBE, "response_format": {}}, 400, "response_format"),
    ({"prompt": CUBE, "output_format": "gif"}, 400, "output_format"),
    ({"prompt": CUBE, "output_compression": 101, "output_format": "jpeg"}, 400, "output_compression"),
    ({"prompt": CUBE, "output_compression": 50}, 400, "output_compression"),
    ({"prompt": CUBE, "background": "transparent"}, 400, "background"),
    ({"prompt": CUBE, "stream": "maybe"}, 400, "stream"),
    ({"prompt": CUBE, "stream": True, "partial_images": 4}, 400, "partial_images"),
    ({"prompt": CUBE, "partial_images": 2}, 400, "partial_images"),
    ({"prompt": CUBE, "stream": True, "response_format": "url"}, 400, "response_format"),
    ({"prompt": CUBE, "seed": 1.5}, 400, "seed"),
    ({"prompt": CUBE, "seed": 2**63}, 400, "seed"),
    ({"prompt": CUBE, "sead": 3}, 400, "sead"),
    ({"prompt": CUBE, "best_of": 513}, 400, "best_of"),
    ({"prompt": CUBE, "best_of": 1, "n": 2}, 400, "best_of"),
    ({"prompt": CUBE, "temperature": -1}, 400, "temperature"),
    ({"prompt": CUBE, "temperature": "hot"}, 400, "temperature"),
    ({"prompt": CUBE, "top_k": 0}, 400, "top_k"),
    ({"prompt": CUBE, "top_k": 33}, 400, "top_k"),
    ({"prompt": CUBE, "top_p": 0}, 400, "top_p"),
    ({"prompt": CUBE, "guidance": 1e9}, 400, "guidance"),
    ({"prompt": CUBE, "rank": "taste"}, 400, "rank"),
    ({"prompt": CUBE, "keep_rows": 1}, 400, "keep_rows"),
    ({"prompt": CUBE, "image": "http://127.0.0.1/"}, 400, "image"),
    ({"prompt": CUBE, "frame_count": 3}, 400, "frame_count"),
    ({"prompt": CUBE, "metadata": "perhaps"}, 400, "metadata"),
    ({"prompt": CUBE, "user": 3}, 400, "user"),
]
BAD_REQUESTS = [
    ("POST", GENERATE, {"content": b'{"prompt": "\\ud800 cube"}', "headers": JSON}, 400, "prompt"),
    ("POST", GENERATE, {"content": b'{"prompt": "cube", "temperature": NaN}', "headers": JSON}, 400, "temperature"),
    ("POST", GENERATE, {"content": b'{"prompt": "cube", "seed": 1e400}', "headers": JSON}, 400, "seed"),
    ("POST", GENERATE, {"content": b'{"prompt": "cube"', "headers": JSON}, 400, None),
    ("POST", GENERATE, {"content": b"\xff\xfe", "headers": JSON}, 400, None),
    ("POST", GENERATE, {"content": b"[" * 100_000, "headers": JSON}, 400, None),
    ("POST", GENERATE, {"content": b'["prompt"]', "headers": JSON}, 400, None),
    ("POST", GENERATE, {"content": b"", "headers": JSON}, 400, None),
    ("POST", GENERATE, {"content": b'{"n": ' + b"9" * 5000 + b"}", "headers": JSON}, 400, None),
    ("POST", GENERATE, {"content": b'{"prompt": "cube"}', "headers": {"content-type": "text/plain"}}, 415, None),
    ("POST", GENERATE, {"data": {"prompt": CUBE}}, 415, None),
    ("POST", GENERATE, form(image=png()), 415, None),
    ("POST", GENERATE, {"json": {"prompt": CUBE}, "headers": {"content-encoding": "gzip"}}, 415, None),
    ("POST", GENERATE, {"content": b" " * 20_000_001, "headers": JSON}, 413, None),
    ("GET", GENERATE, {}, 405, None),
    ("DELETE", "/v1/models", {}, 405, None),
    ("GET", "/v1/images", {}, 404, None),
    ("POST", "/v1/chat/completions", {"json": {}}, 404, None),
    ("GET", "/pictures/..%2f..%2fetc%2fpasswd", {}, 404, None),
    ("GET", "/v1/models/nothing", {}, 404, "model"),
    ("POST", VARY, {"json": {"prompt": CUBE}}, 415, None),
    ("POST", VARY, form(mask=png()), 400, "mask"),
    ("POST", VARY, {"data": {}, "files": {"image": ("", b"")}}, 400, "image"),
    ("POST", VARY, form(image=b"not a picture"), 400, "image"),
    ("POST", VARY, form({"strength": "1.5"}, image=png()), 400, "strength"),
    ("POST", VARY, form({"strength": "strong"}, image=png()), 400, "strength"),
    ("POST", VARY, form({"keep_rows": "1"}, image=png()), 400, "keep_rows"),
    ("POST", VARY, form({"prompt": " "}, image=png()), 400, "prompt"),
    ("POST", VARY, {"data": {"rank": "clip"}, "files": {"image": png()}}, 400, "rank"),
    ("POST", VARY, {"data": {"guidance": "3"}, "files": {"image": png()}}, 400, "guidance"),
    ("POST", EDIT, form({"strength": "0.5"}, image=png()), 400, "strength"),
    ("POST", EDIT, {"json": {"prompt": CUBE}}, 415, None),
    ("POST", EDIT, form({"keep_rows": "1"}, mask=png()), 400, "image"),
    ("POST", EDIT, form(image=png()), 400, "mask"),
    ("POST", EDIT, form({"keep_rows": "1"}, image=b""), 400, "image"),
    ("POST", EDIT, form({"keep_rows": "1"}, image=b"not a picture"), 400, "image"),
    ("POST", EDIT, form({"keep_rows": "1"}, image=png()[:60]), 400, "image"),
    ("POST", EDIT, form({"keep_rows": "1"}, image=forged_png(30_000, 30_000)), 400, "image"),
    ("POST", EDIT, form({"keep_rows": "1"}, image=png(4, 4)), 400, "image"),
    ("POST", EDIT, form({"keep_rows": "4"}, image=png()), 400, "keep_rows"),
    ("POST", EDIT, form({"keep_rows": "1"}, image=png(), mask=png(24, 24, "RGBA", 12)), 400, "keep_rows"),
    ("POST", EDIT, form(image=png(), mask=png(20, 24, "RGBA", 10)), 400, "mask"),
    ("POST", EDIT, form(image=png(), mask=png(24, 24, "RGB")), 400, "mask"),
    ("POST", EDIT, form(image=png(), mask=b""), 400, "mask"),
    ("POST", EDIT, form(image=png(), mask=b"not a picture"), 400, "mask"),
    ("POST", EDIT, form(image=png(), mask=png(24, 24, "RGBA", 12)[:90]), 400, "mask"),
    ("POST", EDIT, form(image=png(), mask=forged_png(30_000, 30_000)), 400, "mask"),
    ("POST", EDIT, form({"mask": "white"}, image=png()), 400, "mask"),
    ("POST", EDIT, form({"prompt": "", "keep_rows": "1"}, image=png()), 400, "prompt"),
    ("POST", EDIT, form(image=png(), mask=png(24, 24, "RGBA")), 400, "mask"),
    ("POST", EDIT, form({"image": "http://127.0.0.1/cube.png"}), 415, None),
    ("POST", EDIT, form({"sead": "3"}, image=png()), 400, "sead"),
    ("POST", EDIT, form({"n": "two", "keep_rows": "1"}, image=png()), 400, "n"),
    ("POST", EDIT, form(picture=png()), 400, "picture"),
    ("POST", EDIT, {"data": {"prompt": CUBE}, "files": [("image[]", png()), ("image[]", png())]}, 400, "image"),
    ("POST", EDIT, {"data": {"prompt": CUBE}, "files": [("image", png())] * 5}, 400, None),
    ("POST", EDIT, {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
]


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "param"),
    [*(("POST", GENERATE, {"json": body}, status, param) for body, status, param in BAD_BODIES), *BAD_REQUESTS],
)
def test_a_bad_request_is_told_what_is_wrong_with_it(server, method, path, request_, status, param):
    drawn = len(server.slow.drawn)
    answer = server.ask(method, path, **request_)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"]
    assert error["type"]
    assert error["code"]
    assert answer.headers["x-request-id"].startswith("req_")
    assert len(server.slow.drawn) == drawn
    assert server.ask("GET", "/readyz").status_code == 200


def test_the_official_client_shows_what_was_wrong(server):
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().images.generate(prompt=CUBE, n=2, extra_body={"sead": 3})
    assert "did you mean seed?" in str(refused.value)
    assert (refused.value.param, refused.value.code) == ("sead", "unknown_parameter")
    assert refused.value.request_id.startswith("req_")


# ------------------------------------------------------------------------------------------------ who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),
        ({"origin": "http://evil.example", "host": "evil.example"}, 403),
    ],
)
def test_pages_of_others_make_no_job(server, headers, status):
    drawn = len(server.slow.drawn)
    for options in ({"json": {"prompt": CUBE}}, form({"keep_rows": "1"}, image=png())):
        path = GENERATE if "json" in options else EDIT
        answer = server.ask("POST", path, headers=headers, **options)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] in ("origin_not_allowed", "host_not_allowed")
        assert "access-control-allow-origin" not in answer.headers
    assert len(server.slow.drawn) == drawn


def test_the_servers_own_page_may_ask(server):
    answer = server.ask("POST", GENERATE, json={"prompt": CUBE}, headers={"origin": server.url})
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_keys_and_pages_that_are_allowed(pipe):
    rules = {"keys": {"sk-right": "alice"}, "origins": ("https://chat.example",)}
    with running(LiveServer(lambda: pipe, rules=rules)) as server:
        for key in ("sk-wrong", "sk-righ", "sk-right2"):
            with pytest.raises(openai.AuthenticationError, match="wrong API key") as refused:
                server.client(key).images.generate(prompt=CUBE)
            assert refused.value.code == "invalid_api_key"
        assert server.client("sk-right").images.generate(prompt=CUBE).data
        assert server.ask("GET", "/healthz").status_code == 200
        assert server.ask("GET", "/metrics").status_code == 401
        assert server.ask("GET", "/v1/models").json()["error"]["message"].startswith("no API key")
        page = {"origin": "https://chat.example"}
        wanted = {"access-control-request-headers": "authorization,x-stainless-lang,x-other"}
        asked = server.ask("OPTIONS", GENERATE, headers={**page, **wanted})
        assert asked.headers["access-control-allow-headers"] == "authorization, x-stainless-lang"
        answer = server.ask("GET", "/v1/models", headers={**page, "authorization": "Bearer sk-right"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-credentials" not in answer.headers
        with pytest.raises(openai.PermissionDeniedError):
            server.client("sk-right", default_headers={"origin": "https://other.example"}).models.list()


# ------------------------------------------------------------------------------------------------ many at once


def test_a_full_queue_is_told_and_the_client_comes_back(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(60), process={"max_jobs": 1})) as server:
        jobs = [threading.Thread(target=draw_one, args=(server, 0.5 + i)) for i in range(2)]
        for i, job in enumerate(jobs):
            job.start()
            wait_until(lambda i=i: len(server.slow.drawn) == 1 and server.state.engine.queue.n_jobs == i)
        answer = server.ask("POST", GENERATE, json={"prompt": CUBE, "temperature": 3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        threading.Timer(0.2, server.slow.go.set).start()
        assert draw_one(server, 3).data  # by itself, after a retry
        for job in jobs:
            job.join()
        # an answer may be there a moment before it is counted
        wait_until(lambda: server.metric('dalle_jobs_total{kind="generations",outcome="done"}') == 3)
        assert server.metric('dalle_jobs_total{kind="generations",outcome="refused"}') >= 2


def draw_one(server, temperature):
    return server.client(max_retries=5).images.generate(prompt=CUBE, extra_body={"temperature": temperature})


def test_requests_at_the_same_time_share_a_batch_and_get_their_own(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(60))) as server:
        first = threading.Thread(target=draw_one, args=(server, 0.5))
        first.start()
        wait_until(lambda: server.slow.drawn)
        found = {}

        def ask(seed):
            body = {"prompt": [CUBE, SPHERE][seed % 2], "seed": seed, "n": 1 + seed % 3}
            found[seed] = server.ask("POST", GENERATE, json=body).json()["data"]

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.state.engine.queue.n_jobs == 6)
        server.slow.go.set()
        for thread in [first, *threads]:
            thread.join()
        assert [len(works) for works in server.slow.drawn] == [1, 6]
        together = dict(found)
        for seed in range(6):
            ask(seed)
        assert len(server.slow.drawn) == 8
        assert found == together


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_the_engine(pipe, streams):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.1))) as server:
        body = json.dumps({"prompt": CUBE, "stream": streams}).encode()
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(server.server.servers[0].sockets[0].getsockname()) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: server.slow.drawn)
        wait_until(lambda: server.state.engine.queue.is_idle)
        assert server.slow.ended == 1
        wait_until(lambda: server.metric('dalle_jobs_total{kind="generations",outcome="cancelled"}') == 1)
        assert server.metric("dalle_tokens_sampled_total") == 0  # no batch was finished


@pytest.mark.slow
def test_a_client_that_gives_up_and_retries_leaves_one_job_running(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.4))) as server:
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=1.0, max_retries=2).images.generate(prompt=CUBE)
        wait_until(lambda: server.state.engine.queue.is_idle)
        assert server.metric('dalle_jobs_total{kind="generations",outcome="done"}') == 0
        assert len(server.slow.drawn) <= 3


def test_a_request_that_takes_too_long_is_not_sent_again(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.3), timeout_s=1.5)) as server:
        with pytest.raises(openai.InternalServerError, match="not done within") as refused:
            draw_one(server, 1)
        assert refused.value.status_code == 504
        assert len(server.slow.drawn) == 1


# ------------------------------------------------------------------------------------------------ its life


def test_while_the_bundle_is_loaded_it_answers_and_takes_no_requests(pipe):
    loaded = threading.Event()

    def load():
        assert loaded.wait(60)
        return pipe

    with LiveServer(load) as server:
        assert server.ask("GET", "/healthz").status_code == 200
        for answer in (server.ask("GET", "/readyz"), server.ask("POST", GENERATE, json={"prompt": CUBE})):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        loaded.set()
        server.ready()
        assert server.ask("GET", "/readyz").status_code == 200


def test_ending_finishes_what_is_under_way_and_takes_no_more(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(0.05))) as server:
        found = []
        thread = threading.Thread(target=lambda: found.append(draw_one(server, 1)))
        thread.start()
        wait_until(lambda: server.slow.drawn)
        server.server.stop_soon()
        wait_until(lambda: server.ask("GET", "/readyz").status_code == 503)
        refused = server.ask("POST", GENERATE, json={"prompt": CUBE})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        thread.join()
        assert found[0].data
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_ending_tells_streams_that_cannot_be_finished(pipe):
    with running(LiveServer(lambda: pipe, slow=SlowDraw(1.0), process={"grace_s": 0.2})) as server:
        stream = server.client(max_retries=0).images.generate(prompt=CUBE, stream=True, partial_images=1)
        wait_until(lambda: server.slow.drawn)
        server.server.stop_soon()
        with pytest.raises(openai.APIError, match="the server ends"):
            list(stream)
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_captions_stay_out_of_log_metrics_and_errors(server, caplog):
    marker = "xylophone-7193"
    with caplog.at_level(logging.DEBUG):
        answer = server.client().images.generate(prompt=f"a {marker} " * 30, user=marker)
        private = server.client().images.generate(prompt=f"a {marker}", extra_body={"metadata": False})
        for body in ({"prompt": marker, "n": 0}, {"prompt": f"{marker}\ud800"}):
            server.ask("POST", GENERATE, content=json.dumps(body).encode(), headers=JSON)
    assert "characters (" in caplog.text
    assert marker not in caplog.text
    assert marker not in server.ask("GET", "/metrics").text
    assert marker in opened(answer.data[0].b64_json).text["caption"]
    text = opened(private.data[0].b64_json).text
    assert list(text) == ["XML:com.adobe.xmp"]


def test_metrics_count_what_was_drawn(server):
    before = server.metric("dalle_candidates_sampled_total"), server.metric("dalle_tokens_sampled_total")
    server.client().images.generate(prompt=CUBE, quality="medium")
    wait_until(lambda: server.metric("dalle_candidates_sampled_total") == before[0] + 8)
    wait_until(lambda: server.metric("dalle_tokens_sampled_total") == before[1] + 8 * 16)
    assert server.metric("dalle_ready") == 1
    assert server.metric("process_resident_memory_bytes") > 1e6
