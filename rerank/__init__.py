"""CLIP reranking (Radford et al. 2021; §2.6 of Ramesh et al. 2021): how well an image fits a caption."""

from rerank.config import CLIPConfig
from rerank.model import CLIP
from rerank.score import score
from rerank.tokenizer import CLIPTokenizer

__all__ = ["CLIP", "CLIPConfig", "CLIPTokenizer", "score"]
