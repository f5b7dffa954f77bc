"""Keys and values while decoding: captions read once, then one image position at a time for all candidates.

All candidates of a prompt share its text, so its keys and values are held once per prompt and read as one matrix
product. Image keys and values belong to a candidate; each layer holds only those that its kind can still see, in
preallocated slots that are written in turn:

    kind     lanes  slots         image position i, W the width of the grid
    row      1      W + 1         slot i mod (W + 1): a ring
    column   W      W             lane i mod W, slot i div W: held whole, read one column at a time
    conv     1      5W + 6        slot i mod (5W + 6): a ring of the rows above, for the paper's 11×11 window
    dense    1      W²            slot i

Of the conv windows of published models, one that is cut at the border is held as conv, one on a torus as dense.

`SlotPattern` says which slots position i sees; it comes from `attention.image_mask`, as the mask does. A step reads the
slots of one lane as they lie, and a bias hides what it may not see. Text and image part share one maximum and one sum.

The blocks and their projections are those of training; only the attention differs. A step has the same shapes at every
position, so it can be compiled once, or recorded as a CUDA graph.

Legend: P prompts  n candidates of one prompt  B all candidates  T text positions  I image positions
        L slots of a lane  m image positions known beforehand  D width  H heads  K head dim  V vocabulary  Y, Z any
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.attention import Kind, image_mask, masked_attention, offsets
from dalle.family.decodable import Decodable
from dalle.model import DALLEConfig
from dvae.compilation import can_compile

Groups = tuple[tuple[int, int], ...]
"""Runs of prompts with equally many candidates: (prompts, candidates of each)."""


@dataclass(frozen=True)
class SlotPattern:
    """Where a kind of layer keeps the image positions, and which of those slots each position sees."""

    n_lanes: int
    n_slots: int
    """L: slots per lane."""
    lanes: Tensor
    """int64 (I,): the lane that position i is kept in, and reads."""
    slots: Tensor
    """int64 (I,): its slot there."""
    bias: Tensor
    """float32 (I, L): 0 where position i may attend to what the slot of its lane holds by then, else -inf."""


def pattern_sizes(kind: Kind, grid: int, kernel: int) -> tuple[int, int]:
    """Return (lanes, slots per lane) of a kind of layer."""
    if kind == "column":
        return grid, grid
    if kind == "conv torus":
        return 1, grid * grid
    return 1, offsets("conv" if kind == "conv cut" else kind, grid, kernel)[-1] + 1


@lru_cache(maxsize=32)
def slot_pattern(kind: Kind, grid: int, kernel: int, device: torch.device) -> SlotPattern:
    """Return the slots of a kind of layer and which of them each position sees, computed once per device."""
    n_lanes, n_slots = pattern_sizes(kind, grid, kernel)
    with torch.inference_mode(False):
        position_I = torch.arange(grid * grid, device=device)
        lane_I = position_I % n_lanes
        slot_I = position_I // n_lanes % n_slots
        # the keys of a column's position are in its own lane, and there is no other lane for the other kinds
        query_N, key_N = image_mask(kind, grid, kernel, device).nonzero(as_tuple=True)
        bias_IL = torch.full((len(position_I), n_slots), -torch.inf, dtype=torch.float32, device=device)
        bias_IL[query_N, slot_I[key_N]] = 0.0
        return SlotPattern(n_lanes, n_slots, lane_I, slot_I, bias_IL)


def bytes_per_candidate(config: DALLEConfig, dtype: torch.dtype) -> int:
    """Return the memory of one candidate's keys and values in a `Decoder`."""
    sizes = [pattern_sizes(kind, config.grid, config.conv_kernel) for kind in config.kinds]
    return sum(2 * lanes * slots * config.d_model * dtype.itemsize for lanes, slots in sizes)


def bytes_per_caption(config: DALLEConfig, dtype: torch.dtype) -> int:
    """Return the memory of a caption: keys and values of all layers, and the peak of reading it in one layer."""
    T, D = config.text_len, config.d_model
    kept = 2 * config.n_layers * T * D
    wide = 3 * 4 * D * T  # in the MLP, before, in and after its nonlinearity
    scores = 2 * config.n_heads * T * T
    return (kept + max(wide, scores)) * dtype.itemsize


def prompts_of(counts: Sequence[int]) -> Tensor:
    """Return the prompt of each candidate, int64 (B,), on the CPU, for the candidates that each prompt has."""
    return torch.arange(len(counts), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))


def groups_of(counts: Sequence[int]) -> Groups:
    """Return the runs of prompts with equally many candidates."""
    return tuple((len(list(same)), n) for n, same in groupby(counts))


def counts_left(counts: Sequence[int], candidates: Tensor) -> list[int]:
    """Return how many candidates of each prompt are left; arguments and errors are those of `Decoder.keep`."""
    candidates = candidates.cpu()
    left = prompts_of(counts)[candidates].bincount(minlength=len(counts)).tolist()
    if min(left) < 1 or not (candidates.diff() > 0).all():
        raise ValueError(f"{candidates.tolist()} are not ascending candidates, at least one of each prompt")
    return left


class _Layer(NamedTuple):
    """The memory that one layer reads and writes at one position."""

    text_keys: Tensor
    """(P, H, K, T)."""
    text_values: Tensor
    """(P, H, T, K)."""
    keys: Tensor
    """(B, H, L, K): one lane."""
    values: Tensor
    """(B, H, L, K)."""
    slot: Tensor
    """int64 (1,): where this position's key and value go."""
    bias: Tensor
    """float32 (L,): see `SlotPattern`."""


class Decoder:
    """Decodes a batch of candidates, one image position at a time.

    >>> decoder = Decoder(model, text, counts=[4, 4])
    >>> logits = decoder.step(inputs)               # of image position 0, for 8 candidates
    """

    def __init__(
        self,
        model: Decodable,
        text: Tensor,
        counts: Sequence[int],
        prefix: Tensor | None = None,
        *,
        compile: bool = False,
    ) -> None:
        """Read the prompts.

        Args:
            model: the transformer; its device and dtype are used.
            text: int64 (P, T), text ids of the prompts.
            counts: how many candidates each prompt has; candidates are numbered prompt by prompt.
            prefix: int64 (P, m), image tokens of the prompts that are known beforehand; None if none are.
            compile: on a CPU, compile the step: two to three times as fast, after a minute or so for each new
                number of candidates; the weights are held twice, and must not change afterwards. On a GPU steps are
                recorded and replayed instead, always.

        Raises:
            ValueError: there is not one count per prompt, or one is below 1.
        """
        if len(counts) != len(text) or min(counts) < 1:
            raise ValueError(f"{len(counts)} counts for {len(text)} prompts: expected one count per prompt, at least 1")
        if prefix is None:
            prefix = text.new_empty((len(text), 0))
        config = model.config
        self.model = model
        self.position = 0
        """The image position that the next step predicts."""
        self._counts = list(counts)
        self._patterns = [slot_pattern(kind, config.grid, config.conv_kernel, model.device) for kind in config.kinds]
        self._text_keys = [text.new_empty(0)] * config.n_layers
        self._text_values = [text.new_empty(0)] * config.n_layers
        is_here = [next(block.parameters(), None) is not None for block in model.blocks]
        with torch.inference_mode():
            self._places_ID = model.image_places()
            self._image_keys = [self._empty_slots(*each) for each in zip(self._patterns, is_here, strict=True)]
            self._image_values = [self._empty_slots(*each) for each in zip(self._patterns, is_here, strict=True)]
            self._read(text, prefix)
        self.position = prefix.shape[1]
        self._step: Callable[..., Tensor] = _step
        if model.device.type == "cuda" and all(is_here):
            self._step = _RecordedSteps()
        elif compile and can_compile(model.device):
            self._step = _compiled_steps()

    @torch.inference_mode()
    def step(self, inputs_B: Tensor) -> Tensor:
        """Advance all candidates by one image position.

        Args:
            inputs_B: int64 (B,), the image token before this position; start of image at position 0.

        Returns:
            Logits of the image token at this position, float32 (B, V); on a GPU, until the next step.

        Raises:
            ValueError: all positions are decoded.
        """
        i = self.position
        if i >= self.model.config.stream.n_image:
            raise ValueError(f"all {i} image tokens are decoded")
        # Contiguous: for a column of a matrix everything would be compiled once more.
        logits_BV = self._step(
            self.model, groups_of(self._counts), inputs_B.contiguous(), self._places_ID[i], self._layers(i)
        )
        self.position += 1
        return logits_BV

    @torch.inference_mode()
    def keep(self, candidates: Tensor) -> None:
        """Drop all but some candidates.

        Args:
            candidates: int64, ascending numbers of candidates; at least one of each prompt.

        Raises:
            ValueError: they are not ascending, or a prompt has none left.
        """
        self._counts = counts_left(self._counts, candidates)
        candidates = candidates.to(self.model.device)
        for cache in (self._image_keys, self._image_values):
            for layer, slots in enumerate(cache):
                cache[layer] = slots.index_select(1, candidates)
        if isinstance(self._step, _RecordedSteps):
            self._step = _RecordedSteps()  # those recorded read the old memory

    @torch.inference_mode()
    def reorder(self, candidates: Tensor) -> None:
        """Let every candidate go on from one of its prompt, int64 (B,): their numbers, with repetition."""
        for slots in (*self._image_keys, *self._image_values):
            slots.copy_(slots.index_select(1, candidates))  # in place: recorded steps read this memory

    def _empty_slots(self, pattern: SlotPattern, is_here: bool) -> Tensor:
        """Return memory for one layer's keys or values, (lanes, B, H, L, K); zeros, because hidden slots are read.

        A layer without weights, which another process computes, gets a tensor without values.
        """
        model, config = self.model, self.model.config
        size = (pattern.n_lanes, sum(self._counts), config.n_heads, pattern.n_slots, config.d_head)
        return torch.zeros(size, device=model.device if is_here else "meta", dtype=model.dtype)

    def _layers(self, i: int) -> list[_Layer]:
        """Return views of the memory that each layer reads and writes at position i."""
        grid = self.model.config.grid
        layers: list[_Layer] = []
        for layer, pattern in enumerate(self._patterns):
            lane = i % grid if pattern.n_lanes > 1 else 0
            layers.append(
                _Layer(
                    self._text_keys[layer],
                    self._text_values[layer],
                    self._image_keys[layer][lane],
                    self._image_values[layer][lane],
                    pattern.slots[i : i + 1],
                    pattern.bias[i],
                )
            )
        return layers

    def _read(self, text_PT: Tensor, prefix_Pm: Tensor) -> Tensor:
        """Run all known positions of the prompts through the model at once, keeping keys and values.

        Returns:
            The residual stream of the last of them after the last layer, (P, D).
        """
        model, config = self.model, self.model.config
        h_PSD = model.embed(text_PT, prefix_Pm)
        length = h_PSD.shape[1]
        prompt_of_B = prompts_of(self._counts).to(model.device, non_blocking=True)
        for layer, (block, kind) in enumerate(zip(model.blocks, config.kinds, strict=True)):
            mask_SS = model.mask(kind)[:length, :length]
            h_PSD = block(h_PSD, partial(self._read_attend, layer, mask_SS, prompt_of_B))
        return h_PSD[:, -1]

    def _read_attend(self, layer: int, mask_SS: Tensor, prompt_of_B: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep a layer's keys and values of the known positions, (P, H, T+m, K); attend as the mask says."""
        T, pattern = self.model.config.text_len, self._patterns[layer]
        m = k.shape[2] - T
        # Contiguous copies: a view would keep the layer's queries, keys and values alive together.
        self._text_keys[layer] = k[:, :, :T].transpose(2, 3).contiguous()
        self._text_values[layer] = v[:, :, :T].contiguous()
        # of a ring, only the positions that are not overwritten
        first = max(0, m - pattern.n_slots) if pattern.n_lanes == 1 else 0
        here = slice(first, m)
        for slots, x_PHSK in ((self._image_keys[layer], k), (self._image_values[layer], v)):
            known_BHmK = x_PHSK[:, :, T + first :].index_select(0, prompt_of_B)
            slots[pattern.lanes[here], :, :, pattern.slots[here]] = known_BHmK.permute(2, 0, 1, 3)
        return masked_attention(q, k, v, mask_SS)


def _step(model: Decodable, groups: Groups, inputs_B: Tensor, place_D: Tensor, layers: Sequence[_Layer]) -> Tensor:
    """Return the logits (B, V) of one image position, writing its keys and values: a function of tensors alone."""
    h_B1D = model.image_embedding(inputs_B[:, None]) + place_D
    for block, layer in zip(model.blocks, layers, strict=True):
        h_B1D = block(h_B1D, partial(_attend, layer, groups))
    # Deviation: a bfloat16 model's logits are rounded to bfloat16 here, as their inputs are. A float32 product, a
    # seventh of the arithmetic, would take twice as long.
    return F.linear(model.final_norm(h_B1D)[:, 0], model.image_head.weight, model.image_head.bias).float()


def _attend(layer: _Layer, groups: Groups, q_BH1K: Tensor, k_BH1K: Tensor, v_BH1K: Tensor) -> Tensor:
    """Attend to the prompt's text and the layer's slots, the current position among them; (B, H, 1, K)."""
    layer.keys.index_copy_(2, layer.slot, k_BH1K)
    layer.values.index_copy_(2, layer.slot, v_BH1K)
    dtype = q_BH1K.dtype
    q_BHK = q_BH1K[:, :, 0] * q_BH1K.shape[-1] ** -0.5
    text_BHT = per_prompt(q_BHK, layer.text_keys, groups).float()
    image_BHL = (layer.keys @ q_BHK[..., None])[..., 0].float() + layer.bias
    highest_BH1 = torch.maximum(text_BHT.amax(-1, keepdim=True), image_BHL.amax(-1, keepdim=True))
    text_BHT, image_BHL = (text_BHT - highest_BH1).exp(), (image_BHL - highest_BH1).exp()
    total_BH1 = text_BHT.sum(-1, keepdim=True) + image_BHL.sum(-1, keepdim=True)
    from_text_BHK = per_prompt(text_BHT.to(dtype), layer.text_values, groups)
    from_image_BHK = (image_BHL.to(dtype)[:, :, None] @ layer.values)[:, :, 0]
    output_BHK: Tensor = (from_text_BHK + from_image_BHK) / total_BH1.to(dtype)
    return output_BHK[:, :, None]


def per_prompt(x_BHY: Tensor, matrix_PHYZ: Tensor, groups: Groups) -> Tensor:
    """Return candidates' rows times their prompts' matrices, (B, H, Z), without a copy per candidate."""
    products: list[Tensor] = []
    prompt = candidate = 0
    for n_prompts, n in groups:
        x_PnHY = x_BHY[candidate : candidate + n_prompts * n].view(n_prompts, n, *x_BHY.shape[1:])
        product_PHnZ = x_PnHY.transpose(1, 2) @ matrix_PHYZ[prompt : prompt + n_prompts]
        products.append(product_PHnZ.transpose(1, 2).flatten(0, 1))
        prompt, candidate = prompt + n_prompts, candidate + n_prompts * n
    return products[0] if len(products) == 1 else torch.cat(products)


class CompiledSteps:
    """A step compiled, for all decoders, with the weights frozen and packed for the processor."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._compiled: Callable[..., Tensor] = torch.compile(step, dynamic=False)
        self._known: WeakKeyDictionary[Any, set[Groups]] = WeakKeyDictionary()

    def __call__(self, model: Any, groups: Groups, *inputs: Any) -> Tensor:
        """Return what the step does with a model."""
        known = self._known.setdefault(model, set())
        if groups in known:
            return self._compiled(model, groups, *inputs)
        known.add(groups)
        with torch._inductor.config.patch(freezing=True):  # `options` of torch.compile come too late for this one
            return self._compiled(model, groups, *inputs)


@lru_cache(maxsize=1)
def _compiled_steps() -> CompiledSteps:
    return CompiledSteps(_step)


class _RecordedSteps:
    """`_step` as CUDA graphs, one per column of the grid: a column layer reads other memory in each.

    A graph replays with the addresses it was recorded with, so inputs that change are copied to fixed places first.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, ...], tuple[Any, Tensor, list[Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        """Memory for intermediate results, shared by the graphs: only one of them runs at a time."""

    def __call__(
        self, model: Decodable, groups: Groups, inputs_B: Tensor, place_D: Tensor, layers: Sequence[_Layer]
    ) -> Tensor:
        """Return what `_step` does; the result is overwritten by the next call."""
        with torch.cuda.device(inputs_B.device):
            return self._replayed(model, groups, inputs_B, place_D, layers)

    def _replayed(
        self, model: Decodable, groups: Groups, inputs_B: Tensor, place_D: Tensor, layers: Sequence[_Layer]
    ) -> Tensor:
        # layers of a kind share their slot and bias: they are copied once
        changing = {x.data_ptr(): x for layer in layers for x in (layer.slot, layer.bias)}
        memory = tuple(layer.keys.data_ptr() for layer in layers)
        if memory not in self._graphs:
            fixed = {place: x.clone() for place, x in changing.items()}
            layers = [
                layer._replace(slot=fixed[layer.slot.data_ptr()], bias=fixed[layer.bias.data_ptr()]) for layer in layers
            ]
            self._graphs[memory] = self._record(
                model, groups, [inputs_B.clone(), place_D.clone(), *fixed.values()], layers
            )
        graph, logits_BV, targets = self._graphs[memory]
        for target, source in zip(targets, [inputs_B, place_D, *changing.values()], strict=True):
            target.copy_(source)
        graph.replay()
        return logits_BV

    def _record(
        self, model: Decodable, groups: Groups, fixed: list[Tensor], layers: Sequence[_Layer]
    ) -> tuple[Any, Tensor, list[Tensor]]:
        inputs_B, place_D = fixed[:2]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up at first use, which cannot be recorded
            _step(model, groups, inputs_B, place_D, layers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BV = _step(model, groups, inputs_B, place_D, layers)
        return graph, logits_BV, fixed
