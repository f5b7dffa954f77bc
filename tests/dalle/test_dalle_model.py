import dataclasses

import pytest
import torch
from torch.nn import functional as F

from dalle import cross_entropy
from dalle.attention import KINDS
from dalle.cache import Decoder
from dalle.loss import stream_loss, training_loss
from dalle.model import DALLE, DALLEConfig
from dalle.stream import null_caption, text_row
from dvae import compilation

SMALL = DALLEConfig(
    n_layers=4, d_model=32, n_heads=2, text_len=6, grid=4, text_vocab=300, image_vocab=20, conv_kernel=3
)
EVERY_ATTENTION = ["paper", *KINDS]


def awake(config, seed=0):
    """A model whose every parameter matters: fresh heads are zero, and fresh branches hardly change the stream."""
    generator = torch.Generator().manual_seed(seed)
    model = DALLE(config)
    model.initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def stream(config, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 0, config.text_len, 1]
    captions = [torch.randint(config.text_vocab, (lengths[b % 4],), generator=generator).tolist() for b in range(batch)]
    text = torch.tensor([text_row(ids, config.text_vocab, config.text_len) for ids in captions])
    image_tokens = torch.randint(config.image_vocab, (batch, config.stream.n_image), generator=generator)
    return text, image_tokens


def test_the_default_is_the_papers_model_with_12_billion_parameters():
    with torch.device("meta"):
        model = DALLE(DALLEConfig())
    counts = model.n_parameters()
    assert counts["total"] == pytest.approx(12.3e9, rel=0.005)
    assert counts["attention"] + counts["mlp"] == pytest.approx(12 * 64 * 3968**2, rel=0.001)


def test_parameter_groups_count_every_parameter_once():
    model = DALLE(SMALL)
    counts = model.n_parameters()
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["heads"] == 32 * (300 + 20)
    assert counts["embeddings"] == 32 * (300 + 1 + 6 + 6 + 20 + 1 + 4 + 4)


def test_a_fresh_model_predicts_every_token_equally():
    text_logits, image_logits = DALLE(SMALL)(*stream(SMALL))
    assert text_logits.shape == (2, 6, 300)
    assert image_logits.shape == (2, 16, 20)
    assert not text_logits.any()
    assert not image_logits.any()


def test_initial_scales_are_the_sparse_transformers():
    config = dataclasses.replace(SMALL, d_model=256)
    model = DALLE(config)
    model.initialise(torch.Generator().manual_seed(0))
    scale = 0.125 / 256**0.5
    block = model.blocks[2]
    assert model.text_embedding.weight.std().item() == pytest.approx(scale, rel=0.05)
    assert model.row_embedding.weight.std().item() == pytest.approx(scale / 2**0.5, rel=0.1)
    assert block.attention.qkv.weight.std().item() == pytest.approx(scale, rel=0.05)
    assert block.attention.out.weight.std().item() == pytest.approx(scale / 8**0.5, rel=0.05)
    assert block.mlp.out.weight.std().item() == pytest.approx(scale / 2 / 8**0.5, rel=0.05)
    assert not block.mlp.out.bias.any()


def test_a_scale_multiplies_every_initial_weight_but_the_heads():
    plain, scaled = DALLE(SMALL), DALLE(SMALL)
    plain.initialise(torch.Generator().manual_seed(0))
    scaled.initialise(torch.Generator().manual_seed(0), scale=8.0)
    for (name, weight), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 8.0 if weight.ndim == 2 else 1.0
        torch.testing.assert_close(other, factor * weight, msg=name)
    assert not scaled.text_head.weight.any()
    assert scaled.blocks[0].attention.qkv.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="must be a number above 0"):
        DALLE(SMALL).initialise(scale=scale)


def test_a_model_built_on_meta_is_the_same_once_initialised():
    with torch.device("meta"):
        model = DALLE(SMALL)
    model.to_empty(device="cpu").initialise(torch.Generator().manual_seed(3))
    other = DALLE(SMALL)
    other.initialise(torch.Generator().manual_seed(3))
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model(*stream(SMALL))[1], other(*stream(SMALL))[1])


def test_masks_are_not_part_of_the_weights():
    model = DALLE(SMALL)
    model(*stream(SMALL))
    assert list(model.buffers()) == []
    assert not [name for name in model.state_dict() if "mask" in name]


@pytest.mark.parametrize("attention", EVERY_ATTENTION)
def test_no_token_changes_an_earlier_logit(attention):
    config = dataclasses.replace(SMALL, attention=attention)
    model = awake(config)
    text, image_tokens = stream(config, batch=1)
    T, S = config.text_len, config.stream.length

    @torch.no_grad()
    def logits(text, image_tokens):
        text_logits, image_logits = model(text, image_tokens)
        return torch.nn.functional.pad(text_logits, (0, 20)), torch.nn.functional.pad(image_logits, (0, 300))

    before = torch.cat(logits(text, image_tokens), dim=1)[0]
    for token in range(1, S):
        changed_text, changed_image = text.clone(), image_tokens.clone()
        if token < T:
            changed_text[0, token] = (text[0, token] + 1) % config.text_vocab
            first = token  # a text token is the input of its own position
        else:
            changed_image[0, token - T] = (image_tokens[0, token - T] + 1) % config.image_vocab
            first = token + 1  # an image token is the input of the position after it
        after = torch.cat(logits(changed_text, changed_image), dim=1)[0]
        changed = (after != before).any(-1)
        assert not changed[:first].any()
        assert first == S or changed[first]


def test_the_last_image_token_is_never_an_input():
    model = awake(SMALL)
    text, image_tokens = stream(SMALL)
    other = image_tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % SMALL.image_vocab
    assert torch.equal(model(text, image_tokens)[1], model(text, other)[1])


def test_every_image_logit_depends_on_the_pads():
    model = awake(SMALL)
    text, image_tokens = stream(SMALL, batch=1)
    before = model(text, image_tokens)[1]
    with torch.no_grad():
        model.text_embedding.weight[text[0, -1]] += 1.0
    assert (model(text, image_tokens)[1] != before).any(-1).all()


def test_text_and_image_tokens_of_the_same_number_have_different_vectors():
    model = awake(SMALL)
    assert not torch.allclose(model.text_embedding.weight[:20], model.image_embedding.weight[:20])
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(shared) == len(list(model.parameters()))


def decoded(model, text, image_tokens, counts, m):
    """Cached logits of the image positions from m, fed with the given tokens; (B, I-m, V)."""
    prompts = torch.arange(len(text)).repeat_interleave(torch.tensor(counts))
    tokens = image_tokens[prompts]
    prefix = image_tokens[:, :m] if m else None
    decoder = Decoder(model, text, counts, prefix)
    start = torch.full_like(tokens[:, 0], model.config.image_vocab)
    steps = range(m, model.config.stream.n_image)
    return torch.stack([decoder.step(tokens[:, i - 1] if i else start) for i in steps], dim=1)


@pytest.mark.parametrize("m", [0, 1, 7])
@pytest.mark.parametrize("attention", EVERY_ATTENTION)
def test_cached_logits_equal_uncached_ones(attention, m):
    config = dataclasses.replace(SMALL, attention=attention)
    model = awake(config)
    text, image_tokens = stream(config, batch=4)
    with torch.no_grad():
        expected = model(text, image_tokens)[1][:, m:]
    counts = [1, 3, 3, 2]
    actual = decoded(model, text, image_tokens, counts, m)
    torch.testing.assert_close(actual, expected.repeat_interleave(torch.tensor(counts), dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", EVERY_ATTENTION)
def test_no_token_changes_an_earlier_cached_logit(attention):
    config = dataclasses.replace(SMALL, attention=attention)
    model = awake(config)
    text, image_tokens = stream(config, batch=1)
    before = decoded(model, text, image_tokens, [1], 0)[0]
    for token in range(config.stream.n_image - 1):
        changed_tokens = image_tokens.clone()
        changed_tokens[0, token] = (changed_tokens[0, token] + 1) % config.image_vocab
        changed = (decoded(model, text, changed_tokens, [1], 0)[0] != before).any(-1)
        assert not changed[: token + 1].any()
        assert changed[token + 1]


def test_a_decoder_ends_with_the_image():
    text, image_tokens = stream(SMALL, batch=1)
    decoder = Decoder(DALLE(SMALL), text, [1], image_tokens)
    with pytest.raises(ValueError, match="all 16 image tokens are decoded"):
        decoder.step(image_tokens[:, -1])


def test_recomputing_activations_changes_no_gradient():
    text, image_tokens = stream(SMALL)
    gradients = []
    for recompute in (False, True):
        model = awake(SMALL)
        model.activation_checkpointing = recompute
        stream_loss(*model(text, image_tokens), text, image_tokens, SMALL).total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_logits_are_float32_in_a_bfloat16_model_and_under_autocast():
    text, image_tokens = stream(SMALL)
    for logits in awake(SMALL).to(torch.bfloat16)(text, image_tokens):
        assert logits.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for logits in awake(SMALL)(text, image_tokens):
            assert logits.dtype == torch.float32


def test_the_loss_is_an_eighth_text_and_seven_eighths_image_over_all_tokens_of_a_kind():
    text, image_tokens = stream(SMALL, batch=4)
    text_logits, image_logits = awake(SMALL)(text, image_tokens)
    loss = stream_loss(text_logits, image_logits, text, image_tokens, SMALL)
    log_p = text_logits.log_softmax(-1)
    nats = [-log_p[b, t, text[b, t + 1]] for b in range(4) for t in range(5) if text[b, t + 1] < SMALL.text_vocab]
    assert len(nats) == 3 + 0 + 5 + 1
    assert loss.text.item() == pytest.approx(sum(nats).item() / len(nats), rel=1e-5)
    picked = image_logits.log_softmax(-1).gather(-1, image_tokens[..., None])
    assert loss.image.item() == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.text.item() / 8 + 7 * loss.image.item() / 8, rel=1e-6)


def test_a_batch_of_empty_captions_has_no_text_loss():
    model = awake(SMALL)
    _, image_tokens = stream(SMALL)
    text = null_caption(SMALL.text_vocab, SMALL.text_len).repeat(2, 1)
    loss = stream_loss(*model(text, image_tokens), text, image_tokens, SMALL)
    assert loss.text == 0
    loss.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def loss_curve(n_steps, seed):
    model = DALLE(SMALL)
    model.initialise(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.96))
    text, image_tokens = stream(SMALL)
    losses = []
    for _ in range(n_steps):
        loss = stream_loss(*model(text, image_tokens), text, image_tokens, SMALL)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.image.item())
    return losses


@pytest.mark.slow
def test_one_batch_can_be_overfitted():
    assert loss_curve(200, seed=0)[-1] < 0.05


def test_the_same_seed_gives_the_same_loss_curve():
    assert loss_curve(10, seed=0) == loss_curve(10, seed=0)
    assert loss_curve(10, seed=0) != loss_curve(10, seed=1)


def test_inputs_are_never_modified():
    model = awake(SMALL)
    text, image_tokens = stream(SMALL)
    kept = text.clone(), image_tokens.clone()
    stream_loss(*model(text, image_tokens), text, image_tokens, SMALL).total.backward()
    decoded(model, text, image_tokens, [2, 2], 5)
    assert torch.equal(text, kept[0])
    assert torch.equal(image_tokens, kept[1])


def test_save_and_load_give_the_same_model_and_metadata(tmp_path):
    model = awake(SMALL)
    metadata = {"tokenizer_hash": "0123456789abcdef", "dvae_hash": "fedcba9876543210"}
    model.save(tmp_path / "dalle", metadata)
    loaded = DALLE.load(tmp_path / "dalle")
    assert loaded.config == SMALL
    assert loaded.metadata.items() >= metadata.items()
    text, image_tokens = stream(SMALL)
    for one, other in zip(model(text, image_tokens), loaded(text, image_tokens), strict=True):
        assert torch.equal(one, other)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_what_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DALLE.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 33}, "multiple of n_heads"),
        ({"n_layers": 0}, "n_layers"),
        ({"conv_kernel": 4}, "must be odd"),
        ({"attention": "diagonal"}, "unknown attention"),
        ({"text_len": 1}, "text_len"),
        ({"grid": 0}, "grid"),
        ({"image_vocab": 0}, "image_vocab"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text, image: (text[:, :-1], image), r"text has shape \(2, 5\), expected \(batch, 6\)"),
        (lambda text, image: (text, image.unflatten(1, (4, 4))), r"image_tokens has shape \(2, 4, 4\)"),
        (lambda text, image: (text, image.float()), "image_tokens is torch.float32"),
        (lambda text, image: (text[:1], image), "1 captions and 2 images"),
        (lambda text, image: (text, image + 20), "expected 0 to 19"),
        (lambda text, image: (text - 301, image), "expected 0 to 306"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DALLE(SMALL)(*change(*stream(SMALL)))


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_the_training_loss_is_the_loss_of_all_logits_with_the_same_gradients(chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", chunk)
    text, image_tokens = stream(SMALL, batch=4)

    def run(loss_of):
        model = awake(SMALL)
        loss = loss_of(model)
        loss.total.backward()
        return [loss.total, loss.text, loss.image], [parameter.grad for parameter in model.parameters()]

    ours, our_gradients = run(lambda model: training_loss(model, text, image_tokens))
    reference, gradients = run(lambda model: stream_loss(*model(text, image_tokens), text, image_tokens, SMALL))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    for ours, reference in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_training_loss_in_bfloat16_is_the_loss_of_float32_logits(autocast):
    text, image_tokens = stream(SMALL, batch=4)
    model = awake(SMALL) if autocast else awake(SMALL).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = training_loss(model, text, image_tokens)
        reference = stream_loss(*model(text, image_tokens), text, image_tokens, SMALL)
    torch.testing.assert_close(ours.total, reference.total, rtol=1e-5, atol=1e-5)
    ours_gradient, gradient = (
        torch.autograd.grad(loss.total, model.image_head.weight, retain_graph=True)[0] for loss in (ours, reference)
    )
    assert (ours_gradient - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.gpu
def test_the_training_loss_on_a_gpu_is_the_loss_of_all_logits():
    for text, image_tokens in ([x.cuda() for x in stream(SMALL, batch=4)], empty_captions("cuda")):
        model = awake(SMALL).cuda()
        ours = training_loss(model, text, image_tokens)
        reference = stream_loss(*model(text, image_tokens), text, image_tokens, SMALL)
        gradients = [torch.autograd.grad(loss.total, list(model.parameters())) for loss in (ours, reference)]
        torch.testing.assert_close(ours.total, reference.total, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def empty_captions(device="cpu"):
    _, image_tokens = stream(SMALL)
    return null_caption(SMALL.text_vocab, SMALL.text_len).repeat(2, 1).to(device), image_tokens.to(device)


def test_the_training_loss_of_empty_captions_has_no_text_part():
    model = awake(SMALL)
    loss = training_loss(model, *empty_captions())
    loss.total.backward()
    assert loss.text == 0
    assert model.text_head.weight.grad.abs().max() == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradients_of_the_training_loss_are_given_once():
    loss = training_loss(awake(SMALL), *stream(SMALL)).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be computed once"):
        loss.backward()


def test_the_training_loss_names_wrong_inputs():
    text, image_tokens = stream(SMALL)
    with pytest.raises(ValueError, match="text has shape"):
        training_loss(awake(SMALL), text[0], image_tokens)


def test_the_training_loss_is_a_loss_without_gradients_too():
    text, image_tokens = stream(SMALL)
    model = awake(SMALL)
    with torch.no_grad():
        ours = training_loss(model, text, image_tokens)
    assert not ours.total.requires_grad
    assert ours.total.item() == pytest.approx(training_loss(model, text, image_tokens).total.item(), rel=1e-6)


def test_the_mlp_is_two_linear_layers_around_the_sigmoid_gelu():
    mlp = awake(SMALL).blocks[0].mlp
    x = torch.randn(2, 3, SMALL.d_model, generator=torch.Generator().manual_seed(0))
    wide = F.linear(x, mlp.wide.weight, mlp.wide.bias)
    torch.testing.assert_close(mlp(x), F.linear(wide * torch.sigmoid(1.702 * wide), mlp.out.weight, mlp.out.bias))


@pytest.mark.slow
def test_compiled_layers_compute_the_same_loss_and_gradients():
    text, image_tokens = stream(SMALL)

    def run(compiled):
        model = awake(SMALL)
        if compiled:
            model.compile_layers()
        loss = training_loss(model, text, image_tokens).total
        loss.backward()
        return loss, [parameter.grad for parameter in model.parameters()]

    loss, gradients = run(compiled=True)
    reference, reference_gradients = run(compiled=False)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    for ours, reference in zip(gradients, reference_gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no C++ compiler found")

    compilation._can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", refuse)
    yield
    compilation._can_compile.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_where_nothing_can_be_compiled_a_warning_says_why_and_layers_stay(caplog):
    model = awake(SMALL)
    model.compile_layers()
    assert "no C++ compiler found" in caplog.text
    assert all(block._compiled_call_impl is None for block in model.blocks)
    training_loss(model, *stream(SMALL)).total.backward()


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_the_image_loss_by_row_is_that_of_the_logits_of_each_row(chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", chunk)
    text, image_tokens = stream(SMALL, batch=4)
    model, grid = awake(SMALL), SMALL.grid
    ours = training_loss(model, text, image_tokens)
    _, logits = model(text, image_tokens)
    rows = [slice(row * grid, (row + 1) * grid) for row in range(grid)]
    expected = [
        torch.nn.functional.cross_entropy(logits[:, row].flatten(0, 1), image_tokens[:, row].flatten()) for row in rows
    ]
    assert not ours.image_by_row.requires_grad
    torch.testing.assert_close(ours.image_by_row, torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
    assert len({round(value, 4) for value in ours.image_by_row.tolist()}) == grid, "the rows can be told apart"
    reference = stream_loss(*model(text, image_tokens), text, image_tokens, SMALL)
    torch.testing.assert_close(ours.image_by_row, reference.image_by_row, rtol=1e-5, atol=1e-6)


def test_image_tokens_that_look_alike_begin_alike_where_the_codebook_is_given():
    config = dataclasses.replace(SMALL, image_vocab=64, d_model=256, n_heads=4)
    torch.manual_seed(0)
    model = DALLE(config)
    before = model.image_embedding.weight.detach().clone()
    codebook = torch.randn(64, 5)
    codebook[1] = codebook[0]
    model.initialise_from_codebook(codebook)
    embedding, head = model.image_embedding.weight.detach(), model.image_head.weight.detach()
    assert torch.equal(embedding[64], before[64])
    assert embedding[:64].std().item() == pytest.approx(before[:64].std().item(), rel=0.1)
    alike = torch.nn.functional.cosine_similarity(embedding[0], embedding[1], dim=0)
    assert 0.5 < alike < 0.9
    assert torch.equal(head[0], head[1])
    centred = codebook - codebook.mean(dim=0)
    shown, expected = (torch.nn.functional.normalize(rows) for rows in (head, centred))
    torch.testing.assert_close(shown @ shown.T, expected @ expected.T, atol=0.35, rtol=0)
    with pytest.raises(ValueError, match="the codebook has 63 rows, and the model 64 image tokens"):
        model.initialise_from_codebook(codebook[1:])
