"""Principal components of CLIP's embeddings as a directory of a bundle."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from storage.models.stored import StoredModel
from unclip.latents import PrincipalComponents

KIND = "components"


@dataclass(frozen=True, kw_only=True)
class ComponentsConfig:
    """Sizes."""

    embed_dim: int
    """Numbers of an embedding."""
    count: int
    """Components that are held."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.embed_dim:
            raise ValueError(f"count ({self.count}) must be from 1 to embed_dim ({self.embed_dim})")


class Components(StoredModel[ComponentsConfig]):
    """Principal components that are saved and loaded.

    Args:
        config: their sizes.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor

    kind = KIND
    config_type = ComponentsConfig

    def __init__(self, config: ComponentsConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.embed_dim, dtype=torch.float64))
        """Of `PrincipalComponents`, as the others."""
        self.register_buffer("components", torch.zeros(config.count, config.embed_dim, dtype=torch.float64))
        self.register_buffer("variances", torch.zeros(config.count, dtype=torch.float64))

    @classmethod
    def of(cls, found: PrincipalComponents) -> Self:
        """Return components to be saved."""
        count, embed_dim = found.components.shape
        stored = cls(ComponentsConfig(embed_dim=embed_dim, count=count))
        stored.load_state_dict(vars(found), strict=True)
        return stored

    @property
    def principal(self) -> PrincipalComponents:
        """The components."""
        return PrincipalComponents(self.mean, self.components, self.variances)
