"""The verbs that import published models."""
