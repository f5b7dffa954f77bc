"""The autoregressive prior of DALL·E 2's paper, beside which the diffusion prior is shown there."""
