"""What is fast, against what: one program per question, peers in the same process. See docs/performance.md.

`make bench` runs them all; `python -m benchmarks.decode --help` says what one of them can do alone. Nothing of the
product imports this package.
"""
