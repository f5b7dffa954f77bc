"""Numbers of features: how near two sets of pictures are, and how far each number can be trusted. No picture is read."""
