"""DALL·E 2: from captions and pictures to pictures, by a bundle's CLIP, prior, decoder and upsamplers."""
