"""URLs of files in object stores: which there are, how they are shown, and where their copies lie in a cache."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

EXTRAS = {
    **dict.fromkeys(("http", "https"), "http"),
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "az"),
    "hf": "hf",
}
"""By the scheme of a URL, the extra of this package that installs what reads it."""
_AZURE = "sv|ss|srt|sp|spr|se|st|sr|sig|sip|sdd|si|skoid|sktid|skt|ske|sks|skv|saoid|suoid|scid"
_SIGNING = re.compile(
    rf"((x-(amz|goog)-[^=]*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|token|{_AZURE})(=|$)|$)",
    re.IGNORECASE,
)
"""Parts of a query that sign it, and say nothing about which file it is."""
_URL = re.compile(r"\s*([a-z][a-z0-9+.-]+):/+(?=[^/\s])", re.IGNORECASE)


def is_remote(name: str | Path) -> bool:
    """Return whether a name is a URL of a store that can be read."""
    match = _URL.match(str(name))
    return match is not None and match.group(1).lower() in EXTRAS


def url_of(name: str | Path) -> str:
    """Return a URL as stores want it, also where Path has lost one of its slashes."""
    match = _URL.match(str(name))
    assert match is not None, f"{shown(str(name))} is no URL"
    return f"{match.group(1).lower()}://{str(name)[match.end() :].rstrip()}"


def scheme_of(url: str) -> str:
    """Return the scheme of a URL: "s3"."""
    return url.partition("://")[0]


def plain(url: str) -> str:
    """Return a URL without name and password, query and fragment, which may be secret."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https"):
        return f"{scheme}://{re.sub('^[^/@]*:[^/@]*@', '', rest)}"
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def shown(text: str) -> str:
    """Return a text, such as a library's error, with the URLs in it as `plain` has them."""
    return re.sub(r"\b[a-z][a-z0-9+.-]+://[^\s'\"<>]+", lambda match: plain(match.group()), text)


def has_magic(url: str) -> bool:
    """Return whether a URL is a pattern; in one of the web, a question mark begins the query."""
    return any(sign in url for sign in ("*[" if EXTRAS[scheme_of(url)] == "http" else "*?["))


def place_of(url: str) -> Path:
    """Return where a file's copy lies below the folder of a cache, such as s3/bucket/train/000000.tar.

    Raises:
        ValueError: the URL leads out of a folder, or names no file.
    """
    scheme, _, rest = plain(url).partition("://")
    parts = list(_parts(rest))
    if len(parts) < 2 or any(part in (".", "..") or part.startswith(".") or "\0" in part for part in parts):
        raise ValueError(f"{plain(url)} names no file in a store: expected one such as {scheme}://bucket/train/0.tar")
    asked = "" if scheme not in ("http", "https") else url.partition("#")[0].partition("?")[2]
    if query := "&".join(pair for pair in asked.split("&") if not _SIGNING.match(pair)):  # of another file each
        parts[-1] = f"{hashlib.blake2b(query.encode(), digest_size=4).hexdigest()}-{parts[-1]}"
    return Path(scheme, *parts)


def _parts(path: str) -> Iterator[str]:
    return (part for part in path.split("/") if part)
