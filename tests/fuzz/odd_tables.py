"""Inputs for the doors: odd tables."""

from hypothesis import strategies as st
from odd import TEXTS

NAMES = ("a.jpg", "b.PNG", "c d.jpeg", "é.jpg", "sub/e.jpg", "f.tif", "g,h.png", "100%.jpg")
"""Pictures that are there."""


OTHERS = ("gone.jpg", "../x.jpg", "a.heic", "http://x/y.jpg", "", "sub", "sub\\e.jpg", "./a.jpg", "/etc/passwd")


@st.composite
def tables_of_people(draw: st.DrawFn) -> tuple[list[str], str, str]:
    """Lines of a table of two columns, most as they stand, some with quotes and separators in wrong places."""
    delimiter = draw(st.sampled_from((",", ",", ";", "\t")))
    lines = [delimiter.join(("image", "caption"))]
    for _ in range(draw(st.integers(1, 8))):
        image, caption = draw(st.sampled_from((*NAMES[:3], *OTHERS))), draw(TEXTS)
        line = delimiter.join((image, caption))
        match draw(st.sampled_from(("plain", "plain", "plain", "quote", "open", "many", "few", "blank", "odd"))):
            case "quote":
                line = f'"{image}"{delimiter}"{caption}"'
            case "open":
                line = f'{image}{delimiter}"{caption}'
            case "many":
                line += delimiter + "more"
            case "few":
                line = image
            case "blank":
                line = draw(st.sampled_from(("", delimiter, "  ")))
            case "odd":
                line = draw(st.text(alphabet='",;\t|ab.jpg\0\r ', max_size=20))
        lines.append(line)
    return lines, delimiter, draw(st.sampled_from(("\n", "\r\n", "\r")))
