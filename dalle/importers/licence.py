"""The licence that a folder of published weights states."""

import re
from pathlib import Path


def stated_licence(weights: Path) -> str | None:
    """Return what the README.md beside weights says in its head, as the model hub's pages have it; None for nothing."""
    page = weights.with_name("README.md")
    if not page.is_file():
        return None
    with page.open(encoding="utf-8", errors="replace") as file:
        head = file.read(20_000)
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", head, re.MULTILINE)
    return f"{found[1]}, as {page.name} says" if found else None
