"""Captions as DALL·E mini reads them: plain letters, commas for all punctuation.

The same results as borisdayma/dalle-mini at f0be4de, src/dalle_mini/model/text.py, but for two things: words behind #
stay whole, which it splits by a list of 34 MB that is published apart from the weights, and `<person>`, a mark of one
of its data sets, is always "a person".
"""

import html
import re

_STEPS: tuple[tuple[str, str], ...] = (
    (r"<person>([,\s]*(and)*[,\s]*<person>)+", " people "),
    ("<person>", " a person "),
    (r"\A\s*\[\d+\]", ""),  # a reference of Wikipedia
    (r"\[\d+\]\s*\Z", ""),
    ("<[^<]+?>", " "),
    (r"http\S+", ""),
    (r"(\d),(\d{3})", r"\1\2"),
    (r"(\d),(\d{3})", r"\1\2"),
    # dots in numbers and names, quotes of 's and 'll, and slashes of dates are put aside
    (r"(\w)\.(\w)", r"\1xtokxdotxtokx\2"),
    (r"'(?=([stdm]|ll|re|ve)\b)", "xtokxquotextokx"),
    (r"(\d)/(\d)", r"\1xtokxslashxtokx\2"),
    (r"(\w)-(\w)", r"\1 \2"),
    (r"([%&/$*])", r" \1 "),
    (r"#(\w+)", r"\1"),
    (r"[_#\\]", " "),
    ("['\"`]", ' " '),
    (r"[()\[\].,|:;?!=+~\-/{}]", ","),
    ("xtokxdotxtokx", "."),
    ("xtokxquotextokx", "'"),
    ("xtokxslashxtokx", "/"),
    (r"(\D)\1{3,}", r"\1"),  # four and more of one character
    (r"\s+", " "),
    (r' ?"[ "]*', ' " '),
    (" ?,[ ,]*", ", "),
    (r"\s+", " "),
)
"""What is replaced by what, one after the other."""


def normalised(caption: str) -> str:
    """Return a caption as DALL·E mini reads it, with a space in front.

    Raises:
        ValueError: it is no ASCII, and what spells such characters in ASCII is not installed.
    """
    import ftfy  # here, because only this needs it

    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    text = (text if text.isascii() else _in_ascii(text)).lower()
    for pattern, replacement in _STEPS:
        text = re.sub(pattern, replacement, text)
    return " " + text.strip().removesuffix(",").removeprefix(",").strip()


def _in_ascii(text: str) -> str:
    """Return a text with emoji as their names, and all other characters as similar ones of ASCII."""
    try:
        import emoji
        import unidecode
    except ImportError as error:
        raise ValueError(
            f"the caption {text[:40]!r} has characters that DALL·E mini reads in ASCII, and {error.name} is not "
            "installed: pip install 'dalle[import]', or write the caption in ASCII"
        ) from error
    spelled: str = unidecode.unidecode(emoji.demojize(text))
    return spelled
