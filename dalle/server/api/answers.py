"""The bodies of answers, and the events of streams, as the official clients read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dalle.server.api.requests import Ask, Endpoint

KINDS: dict[Endpoint, str] = {
    "generations": "image_generation",
    "edits": "image_edit",
    "variations": "image_variation",
}
"""Of events; the clients know no stream of variations."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture to be answered."""

    place: str
    """Its bytes in base64, or its URL."""
    score: float | None
    """CLIP's cosine with the caption, or, of DALL·E 2 without one, with the picture; of DALL·E None then."""
    log_likelihood: float | None
    """None where DALL·E 2 draws."""
    rank: int
    """1 is the best."""
    candidate: int
    details: Mapping[str, float] = field(default_factory=dict)
    """Of an edit its seam, of a variation how many tokens are new."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request cost, in tokens."""

    text_tokens: int
    """Of the caption."""
    image_tokens: int
    """Of the picture that was given."""
    output_tokens: int
    """Image tokens that were sampled, of all candidates."""

    def json(self) -> dict[str, Any]:
        """Return it as the API has it."""
        n_input = self.text_tokens + self.image_tokens
        return {
            "input_tokens": n_input,
            "input_tokens_details": {"text_tokens": self.text_tokens, "image_tokens": self.image_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": self.output_tokens},
            "total_tokens": n_input + self.output_tokens,
        }


def answer(ask: Ask, drawn: list[Drawn], usage: Usage, *, created: int, caption_cut: int) -> dict[str, Any]:
    """Return the body of the answer, as JSON has it."""
    body: dict[str, Any] = {
        "created": created,
        "data": [
            {"url" if ask.as_url else "b64_json": one.place, "dalle": about(ask, one, caption_cut)} for one in drawn
        ],
        **_common(ask),
        "usage": usage.json(),
        "dalle": {"best_of": ask.best_of, "seed": ask.seed, "ignored": list(ask.ignored)},
    }
    if ask.safety_identifier is not None:
        body["safety_identifier"] = ask.safety_identifier
    return body


def about(ask: Ask, one: Drawn, caption_cut: int) -> dict[str, Any]:
    """Return what is told of a picture beyond the API."""
    return {
        "score": one.score,
        "log_likelihood": one.log_likelihood,
        "rank": one.rank,
        "candidate": one.candidate,
        "seed": ask.seed,
        "best_of": ask.best_of,
        "caption_cut": caption_cut,
        "native_size": f"{ask.native}x{ask.native}",
        **one.details,
    }


def _common(ask: Ask) -> dict[str, Any]:
    size = f"{ask.side}x{ask.side}"
    return {"background": "opaque", "output_format": ask.output_format, "quality": ask.quality, "size": size}


def partial_event(ask: Ask, endpoint: Endpoint, b64_json: str, *, index: int, created: int) -> dict[str, Any]:
    """Return the event of an unfinished picture."""
    event = {"type": f"{KINDS[endpoint]}.partial_image", "b64_json": b64_json, "partial_image_index": index}
    return {**event, "created_at": created, **_common(ask)}


def completed_event(
    ask: Ask, endpoint: Endpoint, one: Drawn, usage: Usage, *, created: int, caption_cut: int
) -> dict[str, Any]:
    """Return the event of a finished picture."""
    event = {"type": f"{KINDS[endpoint]}.completed", "b64_json": one.place, "created_at": created, **_common(ask)}
    return {**event, "usage": usage.json(), "dalle": about(ask, one, caption_cut)}
