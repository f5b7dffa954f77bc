"""Features of pictures: networks that make them, and how pictures reach the networks."""
