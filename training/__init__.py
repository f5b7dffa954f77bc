"""Programs that train the dVAE, the transformer and CLIP, and make the data they train on."""
