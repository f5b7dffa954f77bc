"""A model of which each rank holds a part, and none the whole: ZeRO stage 3, from its first weight to its export."""
