"""What the fields of a request mean, and what pictures look like on their way in and out."""

import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dalle.sampling import SamplingDefaults
from dalle.server.api.errors import APIError
from dalle.server.api.requests import FIELDS, IGNORED, Limits, read_ask
from dalle.server.pictures import MAX_UPLOAD_PIXELS, Results, encode, open_upload, region_of, unfinished
from dalle.server.security import Rules, read_keys
from dalle.server.serving import Process, make_state
from dalle.server.state import Settings
from dvae.images import resize_and_crop

LIMITS = Limits(
    models=("tiny", "dall-e-2"),
    native=48,
    grid=12,
    image_vocab=32,
    defaults=SamplingDefaults(temperature=0.3, guidance=2.0),
)


def ask(endpoint="generations", **values):
    return read_ask({"prompt": "a red cube", **values}, LIMITS, endpoint)


def test_null_is_the_same_as_left_out():
    everything = dict.fromkeys(FIELDS, None) | {"prompt": "a red cube", "seed": 5}
    assert read_ask(everything, LIMITS) == ask(seed=5)


def test_texts_of_forms_are_the_values_of_json():
    values = {"n": 2, "stream": False, "output_compression": 80, "output_format": "jpeg", "top_p": 0.5, "seed": -4}
    texts = {"n": "2", "stream": "false", "output_compression": "80", "output_format": "jpeg", "top_p": "0.5"}
    assert ask("edits", keep_rows="3", seed="-4", **texts) == ask("edits", keep_rows=3, **values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (1, 16)),
        ({"quality": "auto"}, (1, 16)),
        ({"quality": "standard"}, (1, 16)),
        ({"quality": "low"}, (1, 1)),
        ({"quality": "low", "n": 3}, (3, 3)),
        ({"quality": "medium"}, (1, 8)),
        ({"quality": "hd"}, (1, 32)),
        ({"quality": "max"}, (1, 512)),
        ({"quality": "low", "best_of": 5, "n": 5}, (5, 5)),
        ({"n": 10}, (10, 16)),
    ],
)
def test_quality_and_best_of_say_how_many_candidates(values, expected):
    found = ask(**values)
    assert (found.n, found.best_of) == expected


@pytest.mark.parametrize(
    ("size", "side"), [("auto", 48), ("48x48", 48), ("256x256", 256), ("1024X1024", 1024), (" 512x512 ", 512), ("", 48)]
)
def test_square_sizes_are_resized_and_auto_is_native(size, side):
    assert ask(size=size).side == side


def test_what_old_clients_send_by_default_is_ignored_by_name():
    sent = dict.fromkeys(IGNORED, "anything")
    assert ask(seed=1, **sent).ignored == IGNORED
    assert ask(user="somebody", safety_identifier="id").safety_identifier == "id"


def test_settings_are_the_bundles_unless_told():
    assert ask().settings == LIMITS.defaults
    assert ask(temperature=1, guidance=1, rank="both").settings == SamplingDefaults(rank="both")


def test_a_seed_that_is_drawn_survives_javascript():
    seeds = {ask().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(float(seed) == seed and seed < 2**53 for seed in seeds)


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"sead": 3}, "sead", "did you mean seed"),
        ({"bestof": 3}, "bestof", "did you mean best_of"),
        ({"keep_rows": 3}, "keep_rows", "a field of /v1/images/edits"),
        ({"markup": "x"}, "markup", "not supported"),
        ({"size": "1792x1024"}, "size", "square: expected auto, 48x48"),
        ({"size": "1x1"}, "size", "another square from 16x16 to 1024x1024"),
        ({"n": 0}, "n", "expected 1 to 10"),
        ({"best_of": 3, "n": 4}, "best_of", "expected 4 to 512"),
        ({"top_k": 33}, "top_k", "expected 1 to 32"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"prompt": " \n"}, "prompt", "empty"),
        ({"model": "gpt-5"}, "model", "expected tiny or dall-e-2"),
    ],
)
def test_a_refusal_names_the_field_and_says_what_to_do(values, param, words):
    with pytest.raises(APIError) as refused:
        ask(**values)
    assert refused.value.param == param
    assert words in refused.value.message


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("metadata", [True, False])
def test_every_format_says_that_it_is_made_and_how_unless_told_not_to(output_format, metadata):
    texts = {"caption": "a red cube, größer", "seed": 3, "hashes": {"dalle": "12ab"}} if metadata else None
    pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"output_format": output_format, "compression": 90, "texts": texts}
    data = encode(pixels, side=32, **options)
    assert data == encode(pixels, side=32, **options)
    image = Image.open(io.BytesIO(data))
    assert (image.format.lower(), image.size) == (output_format, (32, 32))
    said = str(image.info) + str(dict(image.getexif()))
    assert "trainedAlgorithmicMedia" in str(image.info.get("xmp") or image.info["XML:com.adobe.xmp"])
    assert ("a red cube" in said) == metadata
    if output_format == "png" and metadata:
        assert (image.text["caption"], image.text["seed"]) == (texts["caption"], "3")
        assert json.loads(image.text["hashes"]) == texts["hashes"]


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def with_alpha(is_kept):
    """A picture of noise, transparent where it is not kept."""
    array = np.random.default_rng(0).integers(0, 256, (*is_kept.shape, 4), np.uint8)
    array[..., 3] = 255 * is_kept
    return array


def region(picture, mask=None, keep_rows=None):
    return region_of(png(picture), None if mask is None else png(mask), keep_rows, side=48, grid=12)


RING = np.ones((48, 48), bool)
RING[10:30, 20:40] = False
RING[15:25, 25:35] = True


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_what_is_transparent_in_a_mask_is_drawn_anew_and_all_else_is_kept(scale):
    picture = with_alpha(np.ones((48 * scale, 48 * scale), bool))[..., :3]
    found = region(picture, with_alpha(RING.repeat(scale, 0).repeat(scale, 1)))
    assert np.array_equal(found.is_new.numpy(), ~RING)
    expected = resize_and_crop(Image.fromarray(picture), 48)
    assert np.array_equal(np.asarray(found.original()), np.asarray(expected))
    assert found.is_new.equal(region(picture, with_alpha(RING)).is_new)  # a mask of the same proportions


def test_without_a_mask_the_pictures_own_transparency_counts():
    assert np.array_equal(region(with_alpha(RING)).is_new.numpy(), ~RING)
    half = with_alpha(RING)
    half[..., 3] = np.where(RING, 128, 0)  # only what is fully transparent
    assert np.array_equal(region(half).is_new.numpy(), ~RING)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_is_stored_turned_is_masked_as_it_is_seen(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = io.BytesIO()
    Image.fromarray(with_alpha(RING)).save(stored, format="PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(stored)))
    found = region_of(stored.getvalue(), None, None, side=48, grid=12)
    assert np.array_equal(found.is_new.numpy(), upright[..., 3] == 0)
    by_mask = region_of(stored.getvalue(), png(upright), None, side=48, grid=12)
    assert by_mask.is_new.equal(found.is_new)
    assert by_mask.pixels.equal(found.pixels)


def test_keep_rows_keeps_the_top():
    found = region(with_alpha(RING)[..., :3], keep_rows=5).is_new
    assert not found[:20].any()
    assert found[20:].all()


@pytest.mark.parametrize(
    ("picture", "mask", "words"),
    [
        (with_alpha(RING)[..., :3], None, "there is no mask"),
        (with_alpha(RING | True), None, "there is no mask"),
        (with_alpha(RING), with_alpha(RING | True), "the mask has nothing transparent"),
        (with_alpha(RING), with_alpha(RING)[..., :3], "the mask has nothing transparent"),
        (with_alpha(RING), with_alpha(RING[:, :40]), "same size"),
        (with_alpha(np.ones((48, 96), bool)), with_alpha(np.arange(96)[None].repeat(48, 0) > 20), "middle square"),
    ],
)
def test_a_mask_that_says_nothing_is_refused(picture, mask, words):
    with pytest.raises(APIError, match=words) as refused:
        region(picture, mask)
    assert refused.value.param == "mask"


def test_uploads_are_told_by_their_bytes_and_bounded_in_pixels():
    assert open_upload(png(np.zeros((20, 30, 3), np.uint8))).size == (30, 20)
    huge = png(np.zeros((8, 8), np.uint8))
    side = int(MAX_UPLOAD_PIXELS**0.5) + 1
    forged = huge[:16] + side.to_bytes(4, "big") * 2 + huge[24:]
    for data in (b"", b"GIF89a", b"<svg/>", huge[:20], forged):
        with pytest.raises(APIError) as refused:
            open_upload(data)
        assert refused.value.param == "image"


def test_an_unfinished_picture_fades_into_grey():
    whole = unfinished(torch.ones(3, 12, 16), 16, 4)
    assert whole.shape == (3, 16, 16)
    assert (whole[:, :4] == 1).all()
    assert (whole[:, 4:12].diff(dim=1) < 0).all()
    assert (whole[:, 12:] == 0.5).all()


def test_results_are_forgotten_when_there_are_too_many_or_they_are_old(monkeypatch):
    results = Results(100, keep_s=10)
    first, second = results.add(b"a" * 60, "image/png"), results.add(b"b" * 60, "image/png")
    assert first != second
    assert results.get(first) is None
    assert results.get(second).data == b"b" * 60
    assert results.get("../etc/passwd") is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 11)
    assert results.get(second) is None
    assert results.n_bytes == 0


@pytest.mark.parametrize(
    ("rules", "host", "allowed"),
    [
        ({}, "127.0.0.1:8000", True),
        ({}, "localhost", True),
        ({}, "[::1]:8000", True),
        ({}, "evil.example", False),
        ({}, "127.0.0.1.evil.example", False),
        ({}, "192.168.1.5", False),
        ({}, "", False),
        ({}, "localhost:8000@evil.example", False),
        ({"host": "0.0.0.0"}, "192.168.1.5:8000", True),
        ({"host": "0.0.0.0"}, "rebound.example:8000", False),
        ({"allowed_hosts": ("Draw.example.org",)}, "draw.example.org", True),
    ],
)
def test_only_names_of_this_server_are_answered(rules, host, allowed):
    if allowed:
        Rules(**rules).check_host(host)
    else:
        with pytest.raises(APIError, match="allowed-host"):
            Rules(**rules).check_host(host)


def test_keys_are_one_a_line_with_or_without_names(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nalice sk-1\n\nsk-2\n")
    assert read_keys(file) == {"sk-1": "alice", "sk-2": "key 2"}
    file.write_bytes(b"\xef\xbb\xbfsk-1\r\n")  # as some editors save it
    assert read_keys(file) == {"sk-1": "key 1"}
    for text in ("", "# nothing\n", "one two three\n", "schlüssel\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected"):
            read_keys(file)
    file.write_bytes(b"\xe9\n")
    with pytest.raises(ValueError, match="keys is not UTF-8"):
        read_keys(file)


def test_n_is_bounded_by_the_candidates_too(pipe):
    state = make_state(lambda: pipe, Settings(models=("tiny",), best_of=2, max_candidates=4), Process())
    state.engine.pipe = pipe
    with pytest.raises(APIError, match="expected 1 to 4 pictures"):
        read_ask({"prompt": "a red cube", "n": 5}, state.limits())
