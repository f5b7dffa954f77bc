"""Files of DALLE-pytorch, as its training scripts save them: vae.pt and dalle.pt."""
