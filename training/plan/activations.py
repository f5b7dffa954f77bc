"""Computes the bytes of activations that a training step of the transformer keeps for its backward pass, and works in.

The terms are derived from the layers of dalle/model.py, the attention of dalle/sparse_attention.py and the loss of
dalle/cross_entropy.py. On a CPU they are what autograd saves, and tests hold them to it; on CUDA, with FlexAttention in
place of the CPU's two ways, they are derived, not measured. Compiled layers may keep less. Masked attention, which
heads narrower than 16 fall back to on CUDA, is not modelled.

Legend: B samples of a micro-batch  S stream = T+I  T text positions  I image positions  D width  H heads
        W width of the grid  L image keys that a block of the grid may see  V vocabulary
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from dalle.attention import Kind, offsets
from dalle.cross_entropy import CPU_CHUNK, GPU_CHUNK
from dalle.model import DALLEConfig
from dalle.sparse_attention import MIN_FUSED
from training.config import Precision

Device = Literal["cuda", "cpu"]

FLOAT, ID = 4, 8
"""Bytes of a float32, and of an int64."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bytes of a number, by its use."""

    weight: int
    """Parameters, and gradients as the backward pass makes them."""
    stream: int
    """The residual stream between layers."""
    branch: int
    """The products within a layer."""


def widths(precision: Precision) -> Widths:
    """Return the bytes of a number at a precision: float32, autocast, or weights of half precision."""
    if precision == "fp32":
        return Widths(weight=4, stream=4, branch=4)
    if precision in ("autocast", "autocast-fp16"):
        return Widths(weight=4, stream=4, branch=2)
    return Widths(weight=2, stream=2, branch=2)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch's activations on one device, from the end of the forward pass on."""

    kept: float
    """Kept between forward and backward pass."""
    logits: float
    """Logits that exist at a time while the loss is computed; freed before the backward pass."""
    in_loss: float
    """Working memory of the loss besides the logits: copies of its inputs, unfinished gradients."""
    layer: float
    """Working memory of one layer's backward pass, recomputed activations included."""
    casts: float
    """16-bit copies of the weights that autocast keeps; a part of `kept` unless layers are recomputed."""


def activations(
    config: DALLEConfig, precision: Precision, micro_batch: int, *, checkpointing: bool, device: Device = "cuda"
) -> Activations:
    """Return the bytes that one forward and backward pass of a micro-batch keeps and works in.

    Args:
        config: the transformer.
        precision: of its run.
        micro_batch: B, samples on this device.
        checkpointing: whether the backward pass recomputes each layer.
        device: determines how attention is computed; "cuda" is derived only.
    """
    blocks = {
        kind: (n, block_bytes(config, kind, precision, micro_batch, device))
        for kind, n in Counter(config.kinds).items()
    }
    width = widths(precision)
    B, S, D = micro_batch, config.stream.length, config.d_model
    casts = 12.0 * D * D * config.n_layers * 2 if precision in ("autocast", "autocast-fp16") else 0.0
    if checkpointing:
        largest = max(size for _, size in blocks.values())
        kept: float = width.stream * config.n_layers * B * S * D
        recomputed = largest - width.stream * B * S * D + casts / config.n_layers
    else:
        kept = sum(n * size for n, size in blocks.values()) + casts
        recomputed = 0.0
    logits, in_loss = _loss_bytes(config, precision, micro_batch, device)
    return Activations(
        kept=kept + outside_bytes(config, precision, micro_batch),
        logits=logits,
        in_loss=in_loss,
        layer=recomputed + _backward_bytes(config, precision, micro_batch),
        casts=casts,
    )


def block_bytes(config: DALLEConfig, kind: Kind, precision: Precision, micro_batch: int, device: Device) -> float:
    """Return the bytes that one layer keeps, without its weights and copies of them.

    Both norms keep their input and two numbers a position; the projection to queries, keys and values and the MLP's
    first layer their input; GELU and the MLP's second layer theirs, 4·D wide each; and attention, see there.
    """
    width = widths(precision)
    positions = micro_batch * config.stream.length
    norms = positions * 2 * (width.stream * config.d_model + 2 * width.stream)
    inputs = positions * width.branch * (1 + 1 + 4 + 4) * config.d_model
    return norms + inputs + attention_bytes(config, kind, precision, micro_batch, device)


def attention_bytes(config: DALLEConfig, kind: Kind, precision: Precision, micro_batch: int, device: Device) -> float:
    """Return the bytes that attention keeps, the input of the output projection included.

    The fused ways (two calls in float32 on a CPU, FlexAttention on CUDA, one causal call where attention is dense):
    queries, keys, values, output, and one float32 a query and head. The written-out way of a CPU (bfloat16, and grids
    of less than 256 positions): see `_written_out`.
    """
    width = widths(precision).branch
    small = config.grid**2 < MIN_FUSED
    if device == "cpu" and kind != "dense" and (width != FLOAT or small):
        return width * _written_out(config, kind, micro_batch)
    positions = micro_batch * config.stream.length
    return positions * (width * 4 * config.d_model + FLOAT * config.n_heads)


def _written_out(config: DALLEConfig, kind: Kind, micro_batch: int) -> float:
    """Return the numbers that the written-out attention keeps: the probabilities, and the factors of its products.

    Batched products copy what does not lie together: the queries, once for the text keys and once in blocks; the
    text's keys and values; the image's keys and values, once for every block that sees them; for column layers the
    probabilities of the text, which their blocks have in another order.
    """
    B, T, I = micro_batch, config.text_len, config.stream.n_image  # noqa: E741  # the legend's letters
    S, D, H, W = config.stream.length, config.d_model, config.n_heads, config.grid
    n_windows = 1 if kind == "column" else 1 - (-offsets(kind, W, config.conv_kernel)[-1] // W)
    queries = (S + I) * D
    # of one sample, or one head, text keys and values lie together: in the projection's output, which is kept for it
    text = 3 * (S if 1 in (B, H) else T) * D
    image = 2 * n_windows * I * D
    probabilities = H * (T * T + I * (T + n_windows * W) + (I * T if kind == "column" else 0))
    return float(B * (queries + text + image + probabilities + S * D))


def outside_bytes(config: DALLEConfig, precision: Precision, micro_batch: int) -> float:
    """Return the bytes kept outside of the layers: ids, the final norm, and the gradients that the loss has made.

    `linear_cross_entropy` keeps no logits but, computed in the forward pass, the gradients of its input and of both
    heads.
    """
    width = widths(precision)
    B, T, S, D = micro_batch, config.text_len, config.stream.length, config.d_model
    ids = ID * (B * S + T + 2 * config.stream.n_image)
    final_norm = B * S * (width.stream * D + 2 * width.stream)
    gradients = width.stream * B * S * D + width.weight * D * (config.text_vocab + config.image_vocab)
    return float(ids + final_norm + gradients)


def _loss_bytes(config: DALLEConfig, precision: Precision, micro_batch: int, device: Device) -> tuple[float, float]:
    """Return the bytes of the logits that exist at a time, and the other working bytes, of the larger loss."""
    width = widths(precision)
    D = config.d_model
    chunk = CPU_CHUNK if device == "cpu" else GPU_CHUNK
    found = []
    for rows, vocab in ((config.text_len, config.text_vocab), (config.stream.n_image, config.image_vocab)):
        n_logits = min(max(1, chunk // vocab), micro_batch * rows) * vocab
        logits = n_logits * (FLOAT + (width.branch if width.branch != FLOAT else 0))
        inputs = width.stream * micro_batch * (rows + config.stream.length) * D
        head = width.branch * vocab * D  # a chunk's part of the head's gradient
        if width.branch != FLOAT:
            head += width.branch * vocab * D if width.weight == FLOAT else 2 * FLOAT * vocab * D
        found.append((logits, inputs + head))
    return max(found, key=sum)


def _backward_bytes(config: DALLEConfig, precision: Precision, micro_batch: int) -> float:
    """Return the working bytes of the MLP's backward pass: gradients of stream, branch, hidden values, a matrix."""
    width = widths(precision)
    matrix = 4 * config.d_model**2 * (width.weight + (width.branch if width.branch != width.weight else 0))
    return float(micro_batch * config.stream.length * config.d_model * (2 * width.stream + 4 * width.branch) + matrix)
