"""DALL·E mini and mega, as published in flax and as min-dalle has them."""
