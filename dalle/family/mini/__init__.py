"""DALL·E mini and mega: an encoder of captions, and a decoder of image tokens that attends to it."""
