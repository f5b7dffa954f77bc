"""Remarks on pictures, counted: a data set of animations gets a few lines, not one for each picture at each reading.

Counts are those of this process.
"""

import logging
from collections import defaultdict

logger = logging.getLogger(__name__)

MAX_COUNTED = 100_000
"""Pictures of a kind that are counted; more are not, so that memory stays small."""
_TOLD_AT = (10, 100, 1_000, 10_000, MAX_COUNTED)


class Remarks:
    """Names the first picture of each kind, then tells when there are 10, 100, 1,000 … of them."""

    def __init__(self) -> None:
        self._pictures: defaultdict[str, set[int]] = defaultdict(set)

    def add(self, name: str, what: str, kind: str, level: int = logging.INFO) -> None:
        """Count a picture; one that is opened again counts once.

        Args:
            name: of the picture.
            what: holds of it: the rest of a sentence that begins with its name.
            kind: holds of all such pictures: the rest of a sentence that begins with their number.
            level: of the log.
        """
        pictures = self._pictures[kind]
        n_before = len(pictures)
        if n_before < MAX_COUNTED:
            pictures.add(hash(name))
        if len(pictures) == n_before:
            return
        if n_before == 0:
            logger.log(level, "%s %s", name, what)
        elif len(pictures) in _TOLD_AT:
            logger.log(level, "%s pictures so far %s", f"{len(pictures):,}", kind)

    def log_totals(self) -> None:
        """Log how many pictures there are of each kind, unless that was the last thing told, and begin anew."""
        for kind, pictures in self._pictures.items():
            if len(pictures) > 1 and len(pictures) not in _TOLD_AT:
                logger.info("%s pictures in all %s", f"{len(pictures):,}", kind)
        self._pictures.clear()


REMARKS = Remarks()
"""What this process remarked on."""
