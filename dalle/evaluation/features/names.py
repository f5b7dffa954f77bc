"""Names of numbers: each says its network, its weights and how many pictures it is of. There is no bare "FID"."""

from dalle.evaluation.features.nets import FeatureNet
from dalle.evaluation.numbers.kernels import KID, Estimator
from dalle.output.text import counted


def distance_name(net: FeatureNet, n: int) -> str:
    """Return the name of a Fréchet distance: "FD-inception-tf (n=30000, weights 6726825d)"."""
    return f"FD-{net.name} ({_of(net, n)})"


def extrapolated_name(net: FeatureNet, n: int) -> str:
    """Return the name of FD∞ from n pictures."""
    return f"FD∞-{net.name} ({_of(net, n)})"


def floor_name(net: FeatureNet, n: int) -> str:
    """Return the name of the distance of n pictures of the reference to the rest of it."""
    return f"floor of FD-{net.name} ({_of(net, n)})"


def kid_name(net: FeatureNet, n: int, kid: KID) -> str:
    """Return the name of a kernel Inception distance."""
    return f"KID-{net.name} ({counted(kid.subsets, 'subset')} of {kid.subset_size}, {_of(net, n)})"


def mmd_name(net: FeatureNet, n: int, estimator: Estimator, *, sigma: float = 10, scale: float = 1000) -> str:
    """Return the name of a Gaussian MMD."""
    return f"MMD-{net.name} ({estimator}, σ={sigma:g}, ×{scale:g}, {_of(net, n)})"


def score_name(net: FeatureNet, n: int, splits: int, *, bias: bool = False) -> str:
    """Return the name of an Inception Score."""
    return f"IS-{net.name} ({'with' if bias else 'no'} bias, {splits} splits in order, {_of(net, n)})"


def _of(net: FeatureNet, n: int) -> str:
    return f"n={n}, weights {net.hash[:8]}"
