"""Filters of captioned pictures for `dalle-train shards`: the paper's, as far as it describes them.

Source: Ramesh et al. 2021, C: short captions, captions that mostly consist of boilerplate such as "photographed on
<date>" in many formats, and aspect ratios outside [1/2, 2] are dropped, as in Sharma et al. 2018. Neither the lengths
nor the boilerplate are given there: those here are ours. The paper's filter for English is not here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from storage.text import is_visible

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:[nr]d|st|th)?"
_YEAR = r"(?:1[89]|20)\d\d"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?,?\s+)?"
_CLOCK = r"(?:,?\s*(?:at\s+)?\d{1,2}[:.]\d\d(?:[:.]\d\d)?(?:\s*[ap]\.?m\b\.?)?)?"
DATE = (
    rf"{_WEEKDAY}(?:"
    rf"{_MONTH}\s+{_DAY}(?:,?\s+|\s*,\s*){_YEAR}"  # March 3rd, 2019
    rf"|{_DAY}(?:\s+of)?[\s.-]+{_MONTH},?[\s.-]+{_YEAR}"  # 3rd of March 2019, 03-Mar-2019
    rf"|{_MONTH},?\s+{_YEAR}"  # March 2019
    rf"|{_YEAR}[-/.]\d{{1,2}}[-/.]\d{{1,2}}"  # 2019-03-03
    rf"|\d{{1,2}}[-/.]\d{{1,2}}[-/.](?:{_YEAR}|\d\d)"  # 3/3/19
    rf"|{_YEAR}"  # 2019
    rf"){_CLOCK}"
)
"""A regular expression of dates in the formats that captions have them in."""

_MADE = r"(?:photograph(?:ed)?|photo|picture[ds]?|image[ds]?|snapshot|taken|shot|captured|filmed|seen)"
_PUT = r"(?:posted|uploaded|published|added|updated|modified|created|submitted|pinned|saved|shared)"
BOILERPLATE = {
    "date of the photograph": (
        rf"\b{_MADE}(?:\s+(?:was|were|is|made|taken|shot|captured))*\s+(?:on|in|at|from)?\s*{DATE}"
    ),
    "date of upload": rf"\b(?:{_MADE}\s+)?{_PUT}(?:\s+(?:on|in|at))?\s*:?\s*{DATE}",
    "date alone": rf"^\W*(?:date\W+)?{DATE}\W*$",
    "image may contain": r"\b(?:(?:this\s+)?image|picture|photo)\s+may\s+contain\s*:?",
    "stock photo": (
        r"\b(?:royalty[\s-]*free|rights[\s-]*managed|premium|free|vector)?\s*stock\s+"
        r"(?:photos?|photograph(?:y|s)?|images?|pictures?|illustrations?|vectors?|footage|videos?)\b"
    ),
    "royalty-free": r"\broyalty[\s-]*free(?:\s+(?:photos?|images?|pictures?|illustrations?|vectors?))?\b",
    "credit": (
        r"\b(?:photo(?:graph)?|image|picture|illustration)s?\s*(?:credit|courtesy|source|copyright)s?(?:\s+(?:of|by|to))?"
        r"\s*:?"
    ),
    "by": r"\b(?:photo(?:graph)?(?:ed)?|image|picture)\s+by\b\s*:?",
    "copyright": r"(?:©|\(c\)|\bcopyright\b)\s*(?:©|\(c\))?\s*(?:1[89]\d\d|20\d\d)?|\ball\s+rights\s+reserved\b",
    "agency": (
        r"\b(?:getty\s+images|shutterstock|istock(?:photo)?|alamy|dreamstime|adobe\s+stock|depositphotos|123rf)\b"
    ),
    "click": r"\bclick\s+(?:here\s+)?(?:to|for|on)\b[^.]*|\bview\s+(?:full|larger)\s+(?:size|image)\b",
    "file name": (
        r"\b(?:img|dsc|dscn|dscf|p|pict|image|photo|screenshot)[-_ ]?\d{3,}\b"
        r"|\b[\w-]+\.(?:jpe?g|png|gif|webp|tiff?)\b"
    ),
    "no description": (
        r"\b(?:no\s+(?:description|caption|title|alt(?:ernative)?\s+text)(?:\s+available)?|untitled|placeholder)\b"
    ),
    "web address": r"\b(?:https?://|www\.)\S+",
}
"""Regular expressions of phrases that do not describe the picture, by name; case does not matter."""
WORDS_BESIDE_BOILERPLATE = 3
"""A caption with boilerplate and fewer words than this besides is mostly boilerplate."""

EMPTY, TOO_SHORT, TOO_LONG = "empty caption", "caption too short", "caption too long"
TOO_FEW, TOO_MANY, MOSTLY = "caption of too few words", "caption of too many words", "caption mostly boilerplate"
REFUSALS = (EMPTY, TOO_SHORT, TOO_FEW, MOSTLY, TOO_LONG, TOO_MANY)
"""Reasons to leave a caption out; later ones are nearer to being kept."""

_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in BOILERPLATE.values()), re.IGNORECASE)
_MAX_SEARCHED = 2000  # characters: longer captions are no boilerplate


def is_boilerplate(caption: str) -> bool:
    """Return whether a caption has boilerplate in it and hardly anything else."""
    if len(caption) > _MAX_SEARCHED:
        return False
    rest, n_found = _PATTERN.subn(" ", caption)
    return n_found > 0 and len(re.findall(r"[^\W\d_]{2,}", rest)) < WORDS_BESIDE_BOILERPLATE


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Limits of the captioned pictures to keep."""

    min_caption_chars: int = 1
    """Captions of fewer characters are left out."""
    max_caption_chars: int | None = None
    """Captions of more characters are left out; by default none, since the tokenizer cuts them."""
    min_caption_words: int = 1
    """Captions of fewer words are left out; words are what spaces separate."""
    max_caption_words: int | None = None
    """Captions of more words are left out; by default none."""
    drop_boilerplate: bool = False
    """Leave out captions such as "photographed on 3 March 2019" or "stock photo", with hardly a word besides."""
    min_side: int = 1
    """Pictures with a side of fewer pixels are left out, as are those that are too small to open."""
    max_aspect_ratio: float | None = None
    """Pictures whose longer side is more than this times the shorter are left out; by default none. The paper's is
    2."""


@dataclass(frozen=True, kw_only=True)
class ShardFilter(FilterOptions):
    """Selects the pictures to keep; `ShardFilter.of_the_paper` has the paper's filters."""

    need_captions: bool = True
    """Leave out pictures without a caption; a dVAE can be trained on them, too."""
    check: bool = True
    """Decode every picture; without, those that cannot be decoded are found in training only."""

    def __post_init__(self) -> None:
        for name in ("min_caption_chars", "min_caption_words", "min_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for unit in ("chars", "words"):
            least, most = getattr(self, f"min_caption_{unit}"), getattr(self, f"max_caption_{unit}")
            if most is not None and most < least:
                raise ValueError(f"max_caption_{unit} ({most}) must be at least min_caption_{unit} ({least})")
        if not self.check and (self.min_side > 1 or self.max_aspect_ratio is not None):
            raise ValueError("min_side and max_aspect_ratio need check: without it no picture is opened")
        if self.max_aspect_ratio is not None and not self.max_aspect_ratio >= 1:  # which refuses nan, too
            raise ValueError(f"max_aspect_ratio must be at least 1, got {self.max_aspect_ratio}")

    @classmethod
    def of_the_paper(cls) -> Self:
        """Return the paper's filters (C).

        Deviation: the paper drops captions that are too short, without a number, here those below 3 words; and captions
        that are not in English, which is not done here.
        """
        return cls(min_caption_words=3, drop_boilerplate=True, max_aspect_ratio=2.0)

    def kept(self, captions: Sequence[str]) -> tuple[list[str], Counter[str]]:
        """Return the captions to keep, with single spaces, and the number left out, by reason."""
        kept: list[str] = []
        left_out: Counter[str] = Counter()
        for caption in captions:
            text = " ".join(caption.split())
            reason = self._refusal(text)
            if reason is None:
                kept.append(text)
            else:
                left_out[reason] += 1
        return kept, left_out

    def _refusal(self, text: str) -> str | None:
        n_words = len(text.split())
        if not is_visible(text):
            return EMPTY
        if len(text) < self.min_caption_chars:
            return TOO_SHORT
        if self.max_caption_chars is not None and len(text) > self.max_caption_chars:
            return TOO_LONG
        if n_words < self.min_caption_words:
            return TOO_FEW
        if self.max_caption_words is not None and n_words > self.max_caption_words:
            return TOO_MANY
        return MOSTLY if self.drop_boilerplate and is_boilerplate(text) else None
