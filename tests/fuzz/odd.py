"""Odd texts, bytes and JSON, as strategies of hypothesis."""

import copy
import io
import json
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from dalle.data.index_file import with_prefix
from storage.text import is_visible

ODD_TEXTS = (
    *(
        "",
        " ",
        "\t",
        "a",
        "Ünï",
        "日本語",
        "🙂",
        "👩‍👩‍👧",
        "a\u0301",
        "\u200b",
        "\u2028",
        "\ufeff",
        "\x85",
        "\x0b",
        "\x1b[2J",
        "\x7f",
    ),
    *(
        "\0",
        "a\0b",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x",
        "-",
        "--help",
        ".hidden",
        "~",
        "$(x)",
        "pipe:x",
    ),
    *(
        "http://x/y.jpg",
        '"',
        '""',
        "'",
        ",",
        ";",
        "|",
        "a,b",
        'a "b" c',
        "\ud800",
        "NaN",
        "null",
        "1" * 400,
        "%s",
        "{}",
    ),
    *("x" * 300, "é" * 150, "caption", "image", "sep=;", "\u3164", "\u2800", "a" * 5000),
)
WORDS = st.sampled_from(("a", "red", "cube", "on", "blue", "2", "–", "Äpfel", "雪", "🙂"))
CAPTIONS = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12), CAPTIONS)

ODD_JSON: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *(2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, [], {}, [[]], [None], [1, 2], {"a": 1}, {"a": {"b": []}}),
    *ODD_TEXTS,
)
DEPTH = 100_000


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, most: int = 3) -> bytes:
    """Bytes with up to some changes: flipped bits, other numbers, cuts, pieces left out, doubled or moved."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, most))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        n = draw(st.sampled_from((1, 2, 4, 8, 64, 512, 4096)))
        match draw(st.sampled_from(("bit", "byte", "number", "cut", "drop", "double", "insert", "swap", "zero"))):
            case "bit":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                data[at] = draw(st.integers(0, 255))
            case "number":
                n = min(n, 8)
                value = draw(st.sampled_from((0, 1, (1 << (8 * n)) - 1, 1 << (8 * n - 1), (1 << (8 * n - 1)) - 1)))
                data[at : at + n] = value.to_bytes(n, draw(st.sampled_from(("big", "little"))))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + n]
            case "double":
                data[at:at] = data[at : at + n]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "swap":
                piece = data[at : at + n]
                del data[at : at + n]
                to = draw(st.integers(0, len(data)))
                data[to:to] = piece
            case "zero":
                data[at : at + n] = bytes(len(data[at : at + n]))
    return bytes(data)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[tuple[Any, Any]] = []
    for key, inner in items:
        found += [(value, key), *_places(inner)]
    return found


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A JSON value with up to some values replaced, left out, added or wrapped."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(0, most))):
        places = _places(root)
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        odd = copy.deepcopy(draw(st.sampled_from(ODD_JSON)))
        match draw(st.sampled_from(("replace", "replace", "replace", "drop", "add", "wrap"))):
            case "replace":
                container[key] = odd
            case "drop" if container is not root:
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(TEXTS)] = odd
            case "add":
                container.insert(key, odd)
            case "wrap":
                container[key] = draw(st.sampled_from(([container[key]], {"a": container[key]})))
    return root[0] if root else None


@st.composite
def json_files(draw: st.DrawFn, value: Any) -> bytes:
    """The bytes of a JSON file: of a changed value, or damaged as a text."""
    data = json.dumps(draw(changed(value)), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    match draw(
        st.sampled_from((*("as it is",) * 12, "damaged", "damaged", "mark", "utf-16", "deep", "number", "latin"))
    ):
        case "damaged":
            return draw(damaged(data))
        case "mark":
            return b"\xef\xbb\xbf" + data
        case "utf-16":
            return data.decode("utf-8", "replace").encode("utf-16")
        case "deep":
            return b'{"a":' * DEPTH if draw(st.booleans()) else b"[" * DEPTH
        case "number":
            return data.replace(b"1", b"1" * 5000, 1)
        case "latin":
            return data + "é".encode("latin-1")
    return data


@st.composite
def index_files(draw: st.DrawFn, whole: bytes) -> bytes:
    """An index file, damaged, or with other values in its header and all digests right."""
    if draw(st.booleans()):
        return draw(damaged(whole))
    length = int.from_bytes(whole[12:16], "little")
    header, body = json.loads(whole[32 : 32 + length]), whole[32 + length :]
    return with_prefix(json.dumps(draw(changed(header))).encode()) + body


def expected_captions(data: bytes) -> list[str]:
    """The captions of a text file: its lines with something to see in them."""
    is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) and len(data) > 2
    text = data.decode("utf-16" if is_wide else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.split("\n") if is_visible(line.strip())]


def picture(kind: str = "PNG", side: int = 9) -> bytes:
    """A picture in memory."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, kind)
    return file.getvalue()
