"""One sampling of M candidates a caption, and from it the best of N for every N up to M."""
