"""Numbers of features: how near two sets of pictures are, and how far each number can be trusted."""
