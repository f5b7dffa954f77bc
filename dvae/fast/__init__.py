"""The same numbers as dvae/model.py in less time, on a CPU."""
