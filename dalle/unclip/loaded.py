"""DALL·E 2's models in memory, and what they are told of captions and pictures.

Letters: B batch  N pictures  E embedding  H, W pixels
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor

from dalle.budget import check_memory
from dalle.data.bundle import Precision, missing_part
from dalle.sampling import undisturbed
from dalle.unclip.parts import load_parts
from dvae.images import resize_and_crop, to_tensor
from rerank import CLIP
from storage.errors import wrong_type
from unclip import Decoder, Upsampler
from unclip.conditions import Text
from unclip.degradation import shrunk
from unclip.embeddings import AnyPrior
from unclip.latents import PrincipalComponents


class Seen(NamedTuple):
    """A picture as DALL·E 2 sees it."""

    embedding: Tensor
    """float32 (1, E), CLIP's, as the decoder reads it."""
    pixels: Tensor
    """float32 (1, 3, H, W) in [0, 1], of the decoder's size."""


class LoadedUnCLIP:
    """The models of DALL·E 2 in memory.

    Args:
        clip: of captions and pictures; it also ranks.
        decoder: embeddings and captions to small pictures.
        prior: captions to embeddings, of either kind; None if captions are not to be drawn.
        upsamplers: enlarge them, one after the other.
        components: of the embeddings of pictures, for `UnCLIP.probe`; None if they are not at hand.
        hashes: part -> hash, for the metadata of the pictures.
        memory: bytes that a batch may take, beside the models; by default 2 GiB on a CPU, and half of what is free on a
            GPU.

    Raises:
        ValueError: memory is not above 0.
    """

    def __init__(
        self,
        *,
        clip: CLIP,
        decoder: Decoder,
        prior: AnyPrior | None = None,
        upsamplers: Sequence[Upsampler] = (),
        components: PrincipalComponents | None = None,
        hashes: Mapping[str, str],
        memory: int | None = None,
    ) -> None:
        check_memory(memory)
        self.clip = clip.eval().requires_grad_(False)
        self.decoder = decoder.eval().requires_grad_(False)
        self.prior = None if prior is None else prior.eval().requires_grad_(False)
        self.upsamplers = tuple(upsampler.eval().requires_grad_(False) for upsampler in upsamplers)
        self.components = components
        self.hashes = dict(hashes)
        self.memory = memory
        self.device = clip.device
        self.image_size = self.upsamplers[-1].config.image_size if self.upsamplers else decoder.config.picture_size
        """Side in pixels of the pictures that are made."""
        self.precision: Precision = "fp32"
        """Of decoder and upsamplers."""
        self._bundle: Path | None = None

    @classmethod
    @undisturbed()
    def load(
        cls,
        bundle: str | Path,
        device: str | torch.device = "cpu",
        *,
        size: int | None = None,
        precision: Precision = "fp32",
        memory: int | None = None,
    ) -> Self:
        """Load DALL·E 2's parts of a bundle and check that they belong together.

        Args:
            bundle: the directory, with clip/, decoder/, and perhaps prior/ and upsampler-48/ or others.
            device: where to compute: cpu, cuda, cuda:1 …, or auto for a GPU if there is one.
            size: side in pixels of the pictures, the decoder's or an upsampler's; by default the largest.
            precision: of decoder and upsamplers; in bf16 they are faster, and a picture depends on its batch.
            memory: see `LoadedUnCLIP`.

        Raises:
            FileNotFoundError: the bundle, its CLIP, its decoder or the decoder's dVAE is missing.
            ValueError: a part is damaged or of another CLIP or dVAE, upsamplers do not follow each other, or an
                argument is out of range.
        """
        check_memory(memory)
        loaded = cls(**load_parts(Path(bundle), device, precision, size)._asdict(), memory=memory)
        loaded._bundle, loaded.precision = Path(bundle), precision
        return loaded

    @property
    def seen_size(self) -> int:
        """Side in pixels of what is seen of a picture: more than that changes nothing."""
        return max(self.decoder.config.picture_size, self.clip.config.image_size)

    def the_prior(self) -> AnyPrior:
        """Return the prior.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.prior is None:
            raise self._missing("prior")
        return self.prior

    def the_components(self) -> PrincipalComponents:
        """Return the principal components of embeddings.

        Raises:
            FileNotFoundError: there are none.
        """
        if self.components is None:
            raise self._missing("components")
        return self.components

    def _missing(self, part: str) -> FileNotFoundError:
        return missing_part(self._bundle or Path(), part)

    def captioned(self, caption: str) -> Text:
        """Return what the text tower makes of a caption; one that is too long is cut (logged)."""
        assert self.clip.tokenizer is not None
        ids = self.clip.tokenizer.tokenize([caption], self.clip.config.context_length)
        ids = ids[:, : int(ids.argmax(dim=1)) + 1]  # padding is seen by nobody
        return Text(*self.clip.text_states(ids.to(self.device), normalise=self.decoder.config.normalised))

    def uncaptioned(self) -> Text:
        """Return what stands in for a caption where there is none."""
        config = self.decoder.config
        shape = (1, 1, config.text_width)
        blank = Text(torch.zeros(1, config.embed_dim), torch.zeros(shape), torch.ones(1, 1, dtype=torch.bool))
        is_dropped = torch.ones(1, dtype=torch.bool, device=self.device)
        null: Text = self.decoder.null_text(blank.to(self.device), is_dropped)
        return null

    def seen(self, picture: Image.Image) -> Seen:
        """Return a picture as CLIP and the decoder see it: its centre, as in training.

        Raises:
            ValueError: it is no picture.
        """
        if not isinstance(picture, Image.Image):
            raise wrong_type("picture", picture, "a picture, opened by dvae.images.open_image")
        side = self.decoder.config.picture_size
        view = resize_and_crop(picture, self.seen_size)
        pixels, shown = (to_tensor(each)[None].to(self.device) for each in (shrunk(view, side), view))
        return Seen(self.clip.encode_image(shown, normalise=self.decoder.config.normalised), pixels)
