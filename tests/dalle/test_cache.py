"""Decoding one position at a time is held to the whole stream at once; slots are held to `keys`."""

import pytest
import torch
from torch import Tensor

from dalle.attention import KINDS, Kind, keys
from dalle.cache import Decoder, bytes_per_candidate, slot_pattern
from dalle.model import DALLE, DALLEConfig

CONFIG = DALLEConfig(
    n_layers=5, d_model=32, n_heads=2, text_len=7, grid=7, text_vocab=40, image_vocab=30, conv_kernel=5
)
"""In the paper's order: row, column, row, row, conv. Rings of 8 and of 17 slots, for 49 positions."""


def awake(config: DALLEConfig = CONFIG) -> DALLE:
    """A model whose logits depend on everything: fresh ones predict every token equally."""
    model = DALLE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


def streams(n: int, config: DALLEConfig = CONFIG) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, config.text_vocab, (n, config.text_len), generator=generator)
    return text, torch.randint(0, config.image_vocab, (n, config.stream.n_image), generator=generator)


def decoded(decoder: Decoder, tokens_BI: Tensor, first: int = 0) -> Tensor:
    """Logits of all positions from `first`, (B, I-first, V), the decoder being fed these tokens."""
    start = torch.full_like(tokens_BI[:, :1], decoder.model.config.image_vocab)
    inputs = torch.cat([start, tokens_BI], dim=1)
    return torch.stack([decoder.step(inputs[:, i]) for i in range(first, tokens_BI.shape[1])], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (4, 3), (5, 11), (7, 5)])
def test_at_every_position_the_slots_that_are_seen_hold_the_keys_of_the_mask(
    kind: Kind, grid: int, kernel: int
) -> None:
    pattern = slot_pattern(kind, grid, kernel, torch.device("cpu"))
    held: dict[tuple[int, int], int] = {}
    for i in range(grid * grid):
        lane = int(pattern.lanes[i])
        held[lane, int(pattern.slots[i])] = i
        seen = [held[lane, slot] for slot in range(pattern.n_slots) if pattern.bias[i, slot] == 0]
        assert sorted(seen) == keys(kind, i, grid, kernel)
        assert set(pattern.bias[i].tolist()) <= {0.0, -torch.inf}


@pytest.mark.parametrize("attention", ["paper", *KINDS])
def test_cached_logits_equal_uncached_ones_at_every_position(attention: str) -> None:
    config = DALLEConfig(**{**vars(CONFIG), "attention": attention})
    model = awake(config)
    text, tokens = streams(3, config)
    cached = decoded(Decoder(model, text, counts=[1, 1, 1]), tokens)
    torch.testing.assert_close(cached, model(text, tokens)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", range(0, 49, 6))
@pytest.mark.parametrize("attention", ["paper", "dense"])
def test_a_prefix_of_any_length_leaves_the_slots_as_steps_would(m: int, attention: str) -> None:
    config = DALLEConfig(**{**vars(CONFIG), "attention": attention})
    model = awake(config)
    text, tokens = streams(2, config)
    cached = decoded(Decoder(model, text, counts=[1, 1], prefix=tokens[:, :m]), tokens, first=m)
    torch.testing.assert_close(cached, model(text, tokens)[1][:, m:], rtol=1e-5, atol=1e-5)


def test_64_candidates_have_the_logits_that_each_has_alone() -> None:
    model = awake()
    text, _ = streams(1)
    _, tokens = streams(64)
    together = decoded(Decoder(model, text, counts=[64]), tokens)
    for k in (0, 17, 63):
        alone = decoded(Decoder(model, text, counts=[1]), tokens[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-5, atol=1e-5)


def test_prompts_may_have_different_numbers_of_candidates() -> None:
    model = awake()
    text, _ = streams(3)
    _, tokens = streams(6)
    together = decoded(Decoder(model, text, counts=[2, 1, 3]), tokens)
    reference = model(text.repeat_interleave(torch.tensor([2, 1, 3]), dim=0), tokens)[1]
    torch.testing.assert_close(together, reference, rtol=1e-5, atol=1e-5)


def test_candidates_that_are_kept_go_on_as_if_alone() -> None:
    model = awake()
    text, _ = streams(2)
    _, tokens = streams(7)
    decoder = Decoder(model, text, counts=[3, 4])
    decoded(decoder, tokens[:, :20])
    kept = torch.tensor([0, 2, 4])
    decoder.keep(kept)
    logits = torch.stack([decoder.step(tokens[kept, i - 1]) for i in range(20, 49)], dim=1)
    reference = model(text[[0, 0, 1]], tokens[kept])[1][:, 20:]
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_decoder_is_close_to_the_bfloat16_model() -> None:
    model = awake().bfloat16()
    text, tokens = streams(4)
    cached, uncached = decoded(Decoder(model, text, counts=[1] * 4), tokens), model(text, tokens)[1]
    assert (cached - uncached).norm() < 0.03 * uncached.norm()


def test_a_candidates_memory_is_what_is_told_and_a_third_of_full_attention() -> None:
    model = awake()
    text, _ = streams(1)
    one, four = (Decoder(model, text, counts=[n]) for n in (1, 4))
    sizes = [sum(x.nbytes for x in (*d._image_keys, *d._image_values)) for d in (one, four)]
    assert sizes[0] == bytes_per_candidate(CONFIG, torch.float32) == 2 * bytes_per_candidate(CONFIG, torch.bfloat16)
    assert sizes[1] == 4 * sizes[0]
    paper = DALLEConfig(n_layers=8, d_model=512, n_heads=8)
    full_attention = 2 * paper.n_layers * paper.stream.length * paper.d_model * 4
    assert bytes_per_candidate(paper, torch.float32) < full_attention / 3


def test_a_decoder_says_when_the_picture_is_complete() -> None:
    text, tokens = streams(1)
    decoder = Decoder(awake(), text, counts=[1], prefix=tokens)
    with pytest.raises(ValueError, match="all 49 image tokens are decoded"):
        decoder.step(tokens[:, -1])


@pytest.mark.parametrize("kept", [[0, 1], [3, 0], [2, 2, 3]])
def test_only_ascending_candidates_of_every_prompt_can_be_kept(kept: list[int]) -> None:
    decoder = Decoder(awake(), streams(2)[0], counts=[3, 4])
    with pytest.raises(ValueError, match="not ascending candidates"):
        decoder.keep(torch.tensor(kept))


def test_a_decoder_refuses_a_prompt_without_candidates() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Decoder(awake(), streams(2)[0], counts=[1, 0])


def test_a_decoder_refuses_more_counts_than_prompts() -> None:
    with pytest.raises(ValueError, match="2 counts for 1 prompts"):
        Decoder(awake(), streams(1)[0], counts=[1, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_compiled_step_computes_what_an_eager_one_does(dtype: torch.dtype, tolerance: float) -> None:
    model = awake().to(dtype)
    text, _ = streams(1)
    _, tokens = streams(3)
    compiled = decoded(Decoder(model, text, counts=[3], compile=True), tokens)
    eager = decoded(Decoder(model, text, counts=[3]), tokens)
    assert (compiled - eager).norm() <= tolerance * eager.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("attention", ["paper", *KINDS])
def test_recorded_steps_compute_what_the_whole_stream_does(attention: str, n: int) -> None:
    config = DALLEConfig(**{**vars(CONFIG), "attention": attention})
    model = awake(config).cuda()
    text, tokens = (x.cuda() for x in streams(n, config))
    decoder = Decoder(model, text, counts=[1] * n)
    start = torch.full_like(tokens[:, :1], config.image_vocab)
    inputs = torch.cat([start, tokens], dim=1)
    cached = torch.stack([decoder.step(inputs[:, i]).clone() for i in range(49)], dim=1)
    torch.testing.assert_close(cached, model(text, tokens)[1], rtol=1e-3, atol=1e-3)
