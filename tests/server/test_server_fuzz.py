"""Requests that nobody would write: none fails the server, stops it, or is answered in another shape."""

import io
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from servers.images import LiveServer, running

from dalle.server.api.requests import EDIT_FIELDS, IGNORED, QUALITIES, VARIATION_FIELDS

NAMES = sorted({*EDIT_FIELDS, *VARIATION_FIELDS, *IGNORED, "image", "mask", "sead", "N", ""})
WORDS = [
    "",
    "auto",
    "png",
    "jpeg",
    "webp",
    "url",
    "b64_json",
    "256x256",
    "16x16",
    "true",
    "0",
    "1",
    "NaN",
    "2",
    *QUALITIES,
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=20),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), VALUES, max_size=6)


def png(side: int, alpha: int, cut: int) -> bytes:
    """The first bytes of a picture whose left half may be transparent."""
    image = Image.new("RGBA", (side, side), "red")
    image.paste((0, 0, 255, alpha), (0, 0, side // 2, side))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()[:cut]


PICTURES = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=80).map(lambda data: b"\x89PNG\r\n\x1a\n" + data),
    st.builds(png, st.integers(1, 40), st.sampled_from([0, 1, 255]), st.integers(20, 90) | st.just(10_000)),
)
PATHS = [
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/models",
    "/api/jobs",
    "/pictures/0",
    "/",
]
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def small(pipe):
    with running(LiveServer(lambda: pipe, best_of=1, max_candidates=6, max_n=3)) as live:
        yield live


def check(server, answer):
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}
    assert server.ask("GET", "/readyz").status_code == 200


@pytest.mark.slow
@MANY
@given(body=BODIES, has_prompt=st.booleans())
def test_any_json_is_answered(small, body, has_prompt):
    body = {**body, "prompt": "a red cube"} if has_prompt else body
    data = json.dumps(body, ensure_ascii=True).encode()
    check(small, small.ask("POST", PATHS[0], content=data, headers={"content-type": "application/json"}))


@pytest.mark.slow
@MANY
@given(
    fields=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(WORDS) | st.text(max_size=9), max_size=5),
    path=st.sampled_from(PATHS[1:3]),
    files=st.dictionaries(st.sampled_from(["image", "mask", "other"]), PICTURES, min_size=1),
)
def test_any_form_is_answered(small, fields, path, files):
    fields = {name: value.encode("utf-8", "replace").decode() for name, value in fields.items() if name}
    check(small, small.ask("POST", path, data={"prompt": "a red cube", **fields}, files=files))


@pytest.mark.slow
@MANY
@given(
    path=st.sampled_from(PATHS),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    kind=st.sampled_from(
        ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""]
    ),
    data=st.binary(max_size=200) | st.text(string.printable, max_size=100).map(str.encode),
)
def test_any_bytes_are_answered(small, path, method, kind, data):
    answer = small.ask(method, path, content=data, headers={"content-type": kind})
    check(small, answer)
