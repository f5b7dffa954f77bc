"""DALL·E 2: decoder, prior and upsamplers, beside a CLIP that is trained before."""
