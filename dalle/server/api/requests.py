"""The Images API in words: what the fields of a request mean here, and what is answered. No queue, and no HTTP.

The wire's shape is that of the official clients (openai-python 3.57, openai-node 6.49): that of the gpt-image models,
with the older fields of dall-e-2 and dall-e-3, which many programs still send. Fields beyond it have names of
`dalle generate`. What is asked for and cannot be had is refused; only what old clients send by default is ignored, and
named in the answer. A field that nobody knows is refused: a misspelt `sead` must not make another picture.
"""

import difflib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from reprlib import repr as short_repr
from typing import Any, Literal, get_args

from dalle.best_of_n import check_caption
from dalle.editing.variations import check_strength
from dalle.sampling import SamplingDefaults
from dalle.server.api.errors import APIError, wrong
from dalle.server.api.fields import number, one_of, switch, text, whole, within
from dalle.unclip.parts import Kind
from dalle.unclip.settings import Drawing
from storage.errors import reason_of

MAX_PROMPT = 32_000
"""Characters, as the API documents."""
MIN_SIDE, MAX_SIDE = 16, 1024
"""Pixels of an answered picture; larger sizes are not asked for by any client."""
SEED_BITS = 53
"""Of a seed that is drawn: more would not survive JavaScript's numbers, and with them the picture."""
QUALITIES = {
    "low": 1,
    "medium": 8,
    "auto": None,
    "standard": None,
    "high": 32,
    "hd": 32,
    "xhigh": 128,
    "max": 512,
}
"""Candidates that each quality is the best of; None: the server's default."""
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
DEFAULT_COMPRESSION = 95
"""Quality of JPEG and WebP unless told, the clients' `output_compression`."""
IGNORED = ("moderation", "style", "input_fidelity", "complexity")
"""They ask for what does not exist here, and clients send them by default."""
REFUSED = ("frame_count", "frame_duration_ms", "svg", "markup")

Endpoint = Literal["generations", "edits", "variations"]
OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, kw_only=True)
class UnCLIPLimits:
    """What requests may ask of DALL·E 2."""

    endpoints: frozenset[Endpoint]
    """Which it can answer: captions need its prior, edits a decoder that reads what is kept, too."""
    native: int
    """Side of its pictures in pixels."""
    n_steps: int
    """Steps of its decoder at most."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may ask for."""

    models: tuple[str, ...]
    """Names of the bundle, its own first, and of its two models, if it has both: see `names_of_both`."""
    native: int
    """Side of DALL·E's pictures in pixels."""
    grid: int
    """Rows of tokens."""
    image_vocab: int
    defaults: SamplingDefaults
    best_of: int = 16
    """Candidates unless told."""
    max_n: int = 10
    max_candidates: int = 512
    unclip: UnCLIPLimits | None = None
    """None for a bundle without DALL·E 2."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a request asks for, checked."""

    prompt: str
    """Of variations it may be empty."""
    model: str
    n: int = 1
    """Pictures to answer."""
    best_of: int
    """Candidates they are the best of."""
    side: int
    """Of the answered pictures in pixels."""
    native: int
    """Of the pictures as they are drawn."""
    quality: str
    """As told, or "auto"."""
    seed: int
    settings: SamplingDefaults
    as_url: bool = False
    output_format: OutputFormat = "png"
    compression: int = DEFAULT_COMPRESSION
    stream: bool = False
    partial_images: int = 0
    keep_rows: int | None = None
    strength: float | None = None
    """Share of the tokens, or of DALL·E 2's noise, that is drawn anew; of variations only."""
    drawing: Drawing | None = None
    """How DALL·E 2 draws; None where DALL·E does."""
    metadata: bool = True
    """Whether pictures say how they were made."""
    safety_identifier: str | None = None
    ignored: tuple[str, ...] = field(default=())


FIELDS: dict[str, Callable[[str, object], Any]] = {
    "prompt": text,
    "model": text,
    "n": whole,
    "size": text,
    "quality": one_of(*QUALITIES),
    "response_format": one_of("b64_json", "url"),
    "output_format": one_of(*FORMATS),
    "output_compression": within(0, 100),
    "stream": switch,
    "partial_images": within(0, 3),
    "background": one_of("opaque", "auto", "transparent"),
    "user": text,
    "safety_identifier": text,
    "seed": within(-(2**63), 2**63 - 1),
    "best_of": whole,
    "temperature": number,
    "top_k": whole,
    "top_p": number,
    "guidance": number,
    "steps": whole,
    "rank": one_of("clip", "likelihood", "both"),
    "metadata": switch,
}
"""Fields of all endpoints."""
EDIT_FIELDS = {**FIELDS, "keep_rows": whole}
VARIATION_FIELDS = {**FIELDS, "strength": number}
PICTURES = ("image", "mask")
"""Further fields of edits, which are files; variations have the first."""
DEFAULT_STRENGTH = 0.5

_KNOWN: dict[Endpoint, tuple[dict[str, Callable[[str, object], Any]], tuple[str, ...]]] = {
    "generations": (FIELDS, ()),
    "edits": (EDIT_FIELDS, PICTURES),
    "variations": (VARIATION_FIELDS, PICTURES[:1]),
}


def read_ask(values: Mapping[str, object], limits: Limits, endpoint: Endpoint = "generations") -> Ask:
    """Return what the fields of a request ask for.

    Args:
        values: the fields; of a form all are texts. None is the same as leaving a field out.
        limits: of this server.
        endpoint: an edit may also say `keep_rows`, variations `strength`; both send pictures beside these fields.

    Raises:
        APIError: a field is unknown, of a wrong type or out of range; its name is the error's `param`.
    """
    known, pictures = _KNOWN[endpoint]
    given = {name: value for name, value in values.items() if value is not None}
    ignored = tuple(name for name in given if name in IGNORED)
    for name in given:
        if name not in known and name not in ignored:
            raise _unknown(name, (*known, *pictures), endpoint)
    found = {name: known[name](name, value) for name, value in given.items() if name not in ignored}
    model = _model(found, limits)
    drawing = _drawing(found, limits) if _kind(model, limits, endpoint) == "unclip" else None
    native = limits.native if drawing is None or limits.unclip is None else limits.unclip.native
    n, best_of, quality = _numbers(found, limits)
    output_format = found.get("output_format", "png")
    if output_format == "png" and found.get("output_compression", 100) != 100:
        raise wrong("output_compression", "output_compression is for jpeg and webp; a png loses nothing")
    if found.get("background") == "transparent":
        raise wrong("background", "background transparent: these pictures are opaque; expected opaque or auto")
    stream = found.get("stream", False)
    if found.get("partial_images") and not stream:
        raise wrong("partial_images", "partial_images come as a stream: add stream true")
    if stream and found.get("response_format") == "url":
        raise wrong("response_format", "a stream sends pictures as b64_json: leave out response_format, or stream")
    return Ask(
        prompt=_prompt(found, may_be_empty=endpoint == "variations"),
        model=model,
        n=n,
        best_of=best_of,
        side=_side(found.get("size"), native),
        native=native,
        quality=quality,
        seed=found["seed"] if "seed" in found else secrets.randbits(SEED_BITS),
        settings=_settings(found, limits, endpoint) if drawing is None else limits.defaults.updated(rank="clip"),
        as_url=found.get("response_format") == "url",
        output_format=output_format,
        compression=found.get("output_compression", DEFAULT_COMPRESSION),
        stream=stream,
        partial_images=found.get("partial_images", 0),
        keep_rows=_keep_rows(found, limits),
        strength=_strength(found) if endpoint == "variations" else None,
        drawing=drawing,
        metadata=found.get("metadata", True),
        safety_identifier=found.get("safety_identifier"),
        ignored=ignored,
    )


def _unknown(name: str, known: tuple[str, ...], endpoint: Endpoint) -> APIError:
    """Return the refusal of a field."""
    shown = short_repr(name)
    if name in REFUSED:
        return wrong(name, f"{name} is not supported: leave it out", "unsupported_parameter")
    others = [other for other, (fields, pictures) in _KNOWN.items() if name in (*fields, *pictures)]
    if others:
        where = " and ".join(f"/v1/images/{other}" for other in others)
        return wrong(name, f"{name} is a field of {where}, not of /v1/images/{endpoint}", "unknown_parameter")
    near = difflib.get_close_matches(name[:60], known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
    return wrong(name[:60], f"unknown field {shown}: {hint}", "unknown_parameter")


def _prompt(found: Mapping[str, Any], *, may_be_empty: bool) -> str:
    prompt: str = found.get("prompt", "")
    if may_be_empty and not prompt:
        return ""
    if len(prompt) > MAX_PROMPT:
        raise wrong("prompt", f"the prompt has {len(prompt):,} characters; expected at most {MAX_PROMPT:,}")
    try:
        check_caption(prompt)
    except ValueError as error:
        raise wrong("prompt", f"prompt: {error}", "invalid_prompt") from error
    return prompt


def _model(found: Mapping[str, Any], limits: Limits) -> str:
    model: str = found.get("model") or limits.models[0]
    if model not in limits.models:
        raise unknown_model(model, limits.models)
    return model


def names_of_both(bundle: str) -> tuple[str, ...]:
    """Return the names of DALL·E and DALL·E 2 in a bundle that has both."""
    return tuple(f"{bundle}/{kind}" for kind in get_args(Kind))


def _kind(model: str, limits: Limits, endpoint: Endpoint) -> Kind:
    """Return the model that draws: the named one, or DALL·E 2 where it can and a picture is given, or else DALL·E."""
    endpoints = frozenset() if limits.unclip is None else limits.unclip.endpoints
    if model not in names_of_both(limits.models[0]):
        return "unclip" if endpoint in endpoints - {"generations"} else "dalle"
    kind: Kind = "unclip" if model.endswith("/unclip") else "dalle"
    if kind == "unclip" and endpoint not in endpoints:
        needed = {"generations": "a prior", "edits": "a prior, and a decoder that reads what is kept of a picture"}
        message = f"{model} cannot answer {endpoint}: the bundle lacks {needed[endpoint]}; leave model out"
        raise wrong("model", message, "unsupported_model")
    return kind


def _drawing(found: Mapping[str, Any], limits: Limits) -> Drawing:
    """Return how DALL·E 2 draws."""
    assert limits.unclip is not None
    for name in ("temperature", "top_k", "top_p", "rank"):
        if name in found and (name, found[name]) != ("rank", "clip"):
            other = f"{limits.models[0]}/dalle"
            message = f"{name} is for DALL·E, but DALL·E 2 draws this: leave it out, or send model {other}"
            raise wrong(name, message, "unsupported_parameter")
    drawing = Drawing()
    for name in ("guidance", "steps"):
        try:
            drawing = drawing.updated(**{name: found.get(name)})
        except ValueError as error:
            raise wrong(name, reason_of(error), "out_of_range") from error
    if drawing.steps > limits.unclip.n_steps:
        message = f"steps is {drawing.steps}; expected 1 to {limits.unclip.n_steps}, the decoder's own"
        raise wrong("steps", message, "out_of_range")
    return drawing


def unknown_model(model: str, models: tuple[str, ...]) -> APIError:
    """Return the refusal of a model that is not here."""
    message = f"there is no model {short_repr(model)} here: expected {' or '.join(models)}"
    return APIError(404, f"{message}; the server's --model-alias adds names", param="model", code="model_not_found")


def _numbers(found: Mapping[str, Any], limits: Limits) -> tuple[int, int, str]:
    """Return n, the candidates, and the quality."""
    n: int = found.get("n", 1)
    if not 1 <= n <= limits.max_n:
        raise wrong("n", f"n is {short_repr(n)}; expected 1 to {limits.max_n} pictures", "out_of_range")
    quality: str = found.get("quality", "auto")
    by_quality = QUALITIES[quality] or limits.best_of
    best_of: int = found.get("best_of", max(n, min(by_quality, limits.max_candidates)))
    if not n <= best_of <= limits.max_candidates:
        expected = f"expected {n} to {limits.max_candidates}, the candidates of which the n best are answered"
        raise wrong("best_of", f"best_of is {short_repr(best_of)}; {expected}", "out_of_range")
    return n, best_of, quality


def _side(size: str | None, native: int) -> int:
    """Return the side of the answered pictures."""
    if size is None or size.strip().lower() in ("", "auto"):
        return native
    match = re.fullmatch(r"([0-9]{1,5})[x×]([0-9]{1,5})", size.strip().lower())
    allowed = f"auto, {native}x{native}, or another square from {MIN_SIDE}x{MIN_SIDE} to {MAX_SIDE}x{MAX_SIDE}"
    if match is None:
        raise wrong("size", f"size is {short_repr(size)}; expected {allowed}")
    width, height = int(match[1]), int(match[2])
    if width != height:
        raise wrong("size", f"size is {width}x{height}, but these pictures are square: expected {allowed}")
    if not MIN_SIDE <= width <= max(MAX_SIDE, native):
        raise wrong("size", f"size is {width}x{height}; expected {allowed}", "out_of_range")
    return width


def _settings(found: Mapping[str, Any], limits: Limits, endpoint: Endpoint) -> SamplingDefaults:
    """Return how candidates are sampled and ranked."""
    settings = limits.defaults
    if "steps" in found:
        can = limits.unclip is not None and endpoint in limits.unclip.endpoints
        hint = f", or send model {limits.models[0]}/unclip" if can else ""
        raise wrong(
            "steps", f"steps is for DALL·E 2, but DALL·E draws this: leave it out{hint}", "unsupported_parameter"
        )
    if endpoint == "variations" and not found.get("prompt"):
        settings = settings.updated(rank="likelihood", guidance=1.0)
        for name, only in (("rank", "likelihood"), ("guidance", 1)):
            if found.get(name, only) != only:
                raise wrong(name, f"{name} {found[name]} needs a caption: send a prompt, or leave out {name}")
    for name in ("temperature", "top_k", "top_p", "guidance", "rank"):
        if name in found:
            try:
                settings = settings.updated(**{name: found[name]})
            except ValueError as error:
                raise wrong(name, f"{name}: {error}", "out_of_range") from error
    if settings.top_k is not None and settings.top_k > limits.image_vocab:
        if "top_k" in found:
            message = f"top_k is {settings.top_k}; expected 1 to {limits.image_vocab}, the image tokens"
            raise wrong("top_k", message, "out_of_range")
        settings = replace(settings, top_k=None)
    return settings


def _keep_rows(found: Mapping[str, Any], limits: Limits) -> int | None:
    keep_rows: int | None = found.get("keep_rows")
    if keep_rows is not None and not 0 <= keep_rows < limits.grid:
        message = f"keep_rows is {short_repr(keep_rows)}; expected 0 to {limits.grid - 1} of {limits.grid} rows"
        raise wrong("keep_rows", message, "out_of_range")
    return keep_rows


def _strength(found: Mapping[str, Any]) -> float:
    strength: float = found.get("strength", DEFAULT_STRENGTH)
    try:
        check_strength(strength)
    except ValueError as error:
        raise wrong("strength", str(error), "out_of_range") from error
    return strength
