"""What requests leave behind in the server's process: nothing."""

import base64
import gc
import io

import numpy as np
import pytest
from PIL import Image
from servers.images import LiveServer, running, wait_until

CUBE = "a red cube on a blue cube"


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    pixels[..., 3] = np.where(np.arange(16) < 8, 255, 0)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def all_kinds(server, number):
    """One request of each kind, of which one is refused and one cancelled."""
    fields = {"prompt": CUBE, "best_of": 2, "n": 1, "seed": number}
    image = picture()
    generations = "/v1/images/generations"
    assert server.ask("POST", generations, json=fields).status_code == 200
    assert server.ask("POST", generations, json={**fields, "n": -1}).status_code == 400
    streamed = {**fields, "stream": True, "partial_images": 2}
    assert "completed" in server.ask("POST", generations, json=streamed).text
    assert server.ask("POST", "/v1/images/edits", data=fields, files={"image": image}).status_code == 200
    varied = server.ask("POST", "/v1/images/variations", data=fields, files={"image": image})
    assert varied.status_code == 200
    encoded = base64.b64encode(image).decode()
    for path in (
        f"/api/jobs/{job}" for job in (page_job(server, fields), page_job(server, {**fields, "image": encoded}))
    ):
        assert "event: done" in server.ask("GET", f"{path}/events").text
        assert server.ask("GET", f"{path}/pictures/0").status_code == 200
    cancelled = page_job(server, {**fields, "best_of": 4})
    assert server.ask("DELETE", f"/api/jobs/{cancelled}").status_code == 204
    assert server.ask("GET", f"/api/jobs/{cancelled}/events").status_code == 200


def page_job(server, fields):
    return server.ask("POST", "/api/jobs", json=fields).json()["id"]


@pytest.mark.slow
def test_requests_leave_no_objects_behind(pipe, monkeypatch):
    monkeypatch.setattr("dalle.server.page.MAX_JOBS", 3)
    with running(LiveServer(lambda: pipe, result_bytes=20_000)) as server:

        def objects(first, rounds):
            for number in range(first, first + rounds):
                all_kinds(server, number)
            wait_until(lambda: server.state.engine.queue.is_idle)
            server.slow.drawn.clear()
            gc.collect()
            return len(gc.get_objects())

        objects(0, 8)  # what is kept for a while has its full size
        before = objects(8, 2)
        assert objects(10, 20) - before < 100  # a job alone is more than ten objects, and there are 160 requests
