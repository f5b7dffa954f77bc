"""Completes captions: the text part of a transformer, sampled token by token.

The paper trains it with an eighth of the loss (§2.2) and samples no text; so this is not in the paper.

Legend: N completions  n tokens so far  M tokens to draw  V text ids that are predicted
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.family.captions import CaptionModel, is_text, next_text_logits
from dalle.sampler.draw import uniforms
from dalle.sampling import Sampling, choose, undisturbed
from storage.errors import check_whole

AT_ONCE = 64
"""Completions that are drawn together."""


@dataclass(frozen=True, kw_only=True)
class DrawnText:
    """The tokens of a completion."""

    tokens: tuple[int, ...]
    """Ids of the tokenizer, without the beginning."""
    log_likelihoods: tuple[float, ...]
    """Nats: log p(id | those before it) under the unmodified model, of each token, and of the end if it was drawn."""
    ended: bool
    """Whether the model ended the caption."""


def complete(
    model: CaptionModel, beginning: Sequence[int], seeds: Sequence[int], sampling: Sampling, *, n_tokens: int
) -> list[DrawnText]:
    """Draw completions of a caption.

    Args:
        model: a transformer that predicts text.
        beginning: ids of its tokenizer.
        seeds: N of them, one for each: see `candidate_seed`.
        sampling: temperature, top-k and top-p; there is no guidance of text.
        n_tokens: M, tokens to draw at most, at least 1; fewer if the model ends the caption, or has room for no more.

    Raises:
        ValueError: an argument out of range, or a beginning that leaves no room.
    """
    check_whole("n_tokens", n_tokens)
    if n_tokens < 1:
        raise ValueError(f"n_tokens is {n_tokens}; at least 1 token must be drawn")
    if sampling.is_guided:
        raise ValueError(f"guidance is {sampling.guidance:g}, but captions are sampled without: leave it at 1")
    is_text_V = is_text(model).to(model.device)
    if sampling.top_k is not None and sampling.top_k > len(is_text_V):
        raise ValueError(f"top_k ({sampling.top_k}) must be at most {len(is_text_V)}, the text ids that are predicted")
    n_room = model.config.max_caption - len(beginning)
    n_drawn = max(1, min(n_tokens, n_room))  # without room the first of them raises
    found = []
    with undisturbed(), torch.inference_mode():
        for first in range(0, len(seeds), AT_ONCE):
            some = seeds[first : first + AT_ONCE]
            tokens_Nn = torch.tensor(beginning, dtype=torch.int64, device=model.device).expand(len(some), -1)
            uniforms_NM = uniforms(some, n_drawn).to(model.device)
            each_N: list[Tensor] = []
            is_open_N = torch.ones(len(some), dtype=torch.bool, device=model.device)
            for uniforms_N in uniforms_NM.unbind(1):
                logits_NV = next_text_logits(model, tokens_Nn)
                drawn_N = choose(logits_NV.clone(), uniforms_N, sampling)
                each_N.append(logits_NV.double().log_softmax(-1).gather(1, drawn_N[:, None])[:, 0])
                tokens_Nn = torch.cat([tokens_Nn, drawn_N[:, None]], dim=1)
                is_open_N = is_open_N & is_text_V[drawn_N]
                if not bool(is_open_N.any()):
                    break
            rows = zip(tokens_Nn[:, len(beginning) :].tolist(), torch.stack(each_N, dim=1).tolist(), strict=True)
            found += [_until_its_end(ids, nats, is_text_V) for ids, nats in rows]
    return found


def _until_its_end(ids: list[int], nats: list[float], is_text_V: Tensor) -> DrawnText:
    """Return a completion without what was drawn after its end, in step with others."""
    n = next((place for place, number in enumerate(ids) if not is_text_V[number]), len(ids))
    return DrawnText(tokens=tuple(ids[:n]), log_likelihoods=tuple(nats[: n + 1]), ended=n < len(ids))
