"""Captions that are wrong by an exchange: hard negatives for CLIP, and its table of exchanged captions.

A contrastive batch of random captions never asks for the order of words: nearly every caption of another picture has
other words. So wrong captions are made of a picture's own, with the same or nearly the same words (Yuksekgonul et al.
2023, "When and why vision-language models behave like bags-of-words", arXiv 2210.01936, 4).

Order of the file: the protocol, captions of the built-in world, which are parsed and so exact, and other captions, in
which words of a few lists are exchanged or replaced.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, Protocol

import numpy as np

from training.drawings.shapes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    OUTLINES,
    SIZES,
    Relation,
    Scene,
    Thing,
    captions,
    held_out_reason,
    parse,
)


class WrongCaption(Protocol):
    """Makes a caption that is wrong where the given one is right, a function of caption and generator."""

    def __call__(self, caption: str, rng: np.random.Generator, *, of_few_kinds: bool = False) -> str | None:
        """Return the wrong caption, or None if none can be made.

        Args:
            caption: the right one.
            rng: the source of all randomness.
            of_few_kinds: wrong in the ways that are hardest to hear, and so learnt alone in the warm-up.
        """


Source = Literal["world", "words"]


# ---- captions of the built-in world -----------------------------------------------------------------------

Exchange = Literal["things", "colours", "shapes", "sizes", "relation", "axis"]
Replacement = Literal["a colour", "a shape", "a size", "the background"]

EXCHANGES: tuple[Exchange, ...] = ("things", "colours", "shapes", "sizes", "relation", "axis")
"""Two things exchange these; or the relation becomes its inverse ("left of" → "right of") or that of the other axis
("left of" → "above")."""
REPLACEMENTS: tuple[Replacement, ...] = ("a colour", "a shape", "a size", "the background")
"""One of these becomes another of its kind."""
KINDS: tuple[Exchange | Replacement, ...] = (*EXCHANGES, *REPLACEMENTS)
FEW_KINDS: tuple[Exchange | Replacement, ...] = ("things", "a shape")
"""The hardest kinds to learn beside all the others: the order of the things, and their shapes."""

_OTHER_AXIS: dict[str, Relation] = {
    "left of": "above",
    "right of": "below",
    "above": "left of",
    "below": "right of",
}
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "things": ("colour", "shape", "size"),
    "colours": ("colour",),
    "shapes": ("shape",),
    "sizes": ("size",),
    "a colour": ("colour",),
    "a shape": ("shape",),
    "a size": ("size",),
}
_WORDS: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": tuple(OUTLINES), "size": tuple(SIZES)}


def wrong_scene(scene: Scene, kind: Exchange | Replacement, rng: np.random.Generator) -> Scene | None:
    """Return another scene that differs by one exchange or replacement, canonical; all are about as likely.

    Returns:
        None if nothing of the kind differs, or no such scene exists in this world.
    """
    scene = scene.canonical()
    if kind == "relation":
        return replace(scene, relation=INVERSE[scene.relation]).canonical()
    if kind == "axis":
        return replace(scene, relation=_OTHER_AXIS[scene.relation]).canonical()
    if kind == "the background":
        others = [word for word in BACKGROUNDS if word != scene.background]
        return replace(scene, background=others[int(rng.integers(len(others)))]) if others else None
    changes = _changes(scene.things, kind)
    for number in rng.permutation(len(changes)).tolist():
        things = [replace(thing, **changes[number].get(place, {})) for place, thing in enumerate(scene.things)]
        try:
            other = replace(scene, things=tuple(things)).canonical()
        except ValueError:  # a large thing among three
            continue
        if other != scene:
            return other
    return None


def _changes(things: Sequence[Thing], kind: Exchange | Replacement) -> list[dict[int, dict[str, str]]]:
    """Return every way of exchanging or replacing: new attributes of things, by their places."""
    names = _ATTRIBUTES[kind]
    if kind in EXCHANGES:
        told = [{name: str(getattr(thing, name)) for name in names} for thing in things]
        return [{i: told[j], j: told[i]} for i, j in combinations(range(len(things)), 2) if told[i] != told[j]]
    (name,) = names
    return [
        {place: {name: word}}
        for place, thing in enumerate(things)
        for word in _WORDS[name]
        if word != getattr(thing, name)
    ]


def told_alike(caption: str, scene: Scene, kind: Exchange | Replacement) -> str:
    """Return the caption of another scene that differs least from a caption, word by word.

    After an exchange of the kind "relation" or "axis" the relation's words change, after all others they stay: so
    "things" and "relation", which make the same scene of two things, make two captions.

    Args:
        caption: of the built-in world.
        scene: told by the result.
        kind: of the exchange or replacement.
    """
    told = next(name for name in INVERSE if f" {name} " in caption)
    relation = {"relation": INVERSE[told], "axis": _OTHER_AXIS[told]}.get(kind, told)
    words = caption.replace(f" {told} ", " <relation> ").split()

    def difference(other: str) -> int:
        theirs = other.replace(f" {relation} ", " <relation> ").split()
        return abs(len(theirs) - len(words)) + sum(a != b for a, b in zip(words, theirs, strict=False))

    return min((other for other in captions(scene) if f" {relation} " in other), key=difference)


def wrong_drawn_caption(caption: str, rng: np.random.Generator, *, of_few_kinds: bool = False) -> str | None:
    """Return a wrong caption for a caption of the built-in world: of a scene of another meaning, phrased alike.

    The possible kinds of exchanges and replacements are equally likely. Combinations that are never trained do not
    occur here either: a model that read them as wrong answers only would shun them.

    Returns:
        None for a caption that is not of this world.
    """
    try:
        scene = parse(caption)
    except ValueError:
        return None
    kinds = FEW_KINDS if of_few_kinds else KINDS
    for number in rng.permutation(len(kinds)).tolist():
        kind = kinds[number]
        other = wrong_scene(scene, kind, rng)
        if other is not None and held_out_reason(other) is None:
            return told_alike(" ".join(caption.lower().split()), other, kind)
    return None


# ---- other captions ---------------------------------------------------------------------------------------

# Words of one kind, in groups that mean nearly the same: only words of two groups make a caption wrong.
_GROUPS: dict[str, Sequence[Sequence[str]]] = {
    "colour": [
        ["red"],
        ["green"],
        ["blue"],
        ["yellow"],
        ["orange"],
        ["purple", "violet"],
        ["pink"],
        ["brown"],
        ["black"],
        ["white"],
        ["grey", "gray"],
    ],
    "size": [
        ["large", "big", "huge", "giant", "enormous"],
        ["small", "little", "tiny"],
        ["medium", "medium-sized"],
    ],
    "length": [["long", "tall"], ["short"]],
    "age": [["old"], ["young", "new"]],
    "number": [["two"], ["three"], ["four"], ["five"], ["six"], ["seven"], ["eight"], ["nine"], ["ten"]],
    "side": [["left"], ["right"]],
    "height": [["above"], ["below", "beneath", "underneath"]],
    "depth": [["in front of"], ["behind"]],
    "containment": [["inside"], ["outside"]],
}
_KIND_AND_GROUP = {
    word: (kind, number) for kind, groups in _GROUPS.items() for number, words in enumerate(groups) for word in words
}
_LONGEST_FIRST = sorted(_KIND_AND_GROUP, key=len, reverse=True)
# left and right are sides in these phrases only: "the right one" and "right next to" say something else
_LISTED = re.compile(
    rf"(?<![\w-])(?:(?:{'|'.join(word for word in _LONGEST_FIRST if word not in ('left', 'right'))})(?![\w-])"
    r"|(?:left|right)(?= of\b| side\b)|(?<=\bon the )(?:left|right)(?![\w-]))"
)
_JOINERS = re.compile(r"\b(?:and|or|with)\b|[\W_]+")
"""Joins words that describe one thing together, as in "a black and white dog"."""

# Prepositions after which the other order says something else; "and", "beside" and "near" say the same both ways.
_ONE_WAY = (
    "to the left of",
    "to the right of",
    "left of",
    "right of",
    "on top of",
    "in front of",
    "above",
    "below",
    "under",
    "beneath",
    "underneath",
    "behind",
    "inside",
    "on",
    "in",
)
_DETERMINER = r"(?:a|an|the|some|two|three|four|five)"
_NOT_IN_A_PHRASE = rf"(?!(?:{'|'.join(_ONE_WAY)}|{_DETERMINER}|to|of|at|and|or|with|by|is|are)\b)"
_PHRASE = rf"{_DETERMINER}(?: {_NOT_IN_A_PHRASE}[\w'-]+){{1,3}}"
_VERB = r"(?: (?:is|are|sits|sitting|stands|standing|lies|lying))?"
_TWO_PHRASES = re.compile(
    rf"(?<![\w-])(?P<first>{_PHRASE}?)(?P<between>{_VERB} (?:{'|'.join(_ONE_WAY)}) )(?P<second>{_PHRASE})(?=[.,;!]|$)"
)


def wrong_real_caption(caption: str, rng: np.random.Generator, *, of_few_kinds: bool = False) -> str | None:
    """Return a wrong caption for any English one: two words exchanged, or one replaced, that word lists know.

    Exchanged are two colours, sizes, numbers, … of a caption that describe different things as far as that can be told
    without a tagger, or the two things around a preposition such as "under"; replaced is a word by one of its kind that
    means something else. An exchange is taken as often as a replacement where both are possible; of few kinds, only
    exchanges. The result is in lower case, as CLIP's tokenizer reads all captions.

    Returns:
        None for a caption without such words.
    """
    told = " ".join(caption.lower().split())
    exchanged = [*_exchanged_words(told), *_exchanged_phrases(told)]
    replaced = [] if of_few_kinds else list(_replaced_words(told))
    choices = [options for options in (exchanged, replaced) if options]
    if not choices:
        return None
    options = choices[int(rng.integers(len(choices)))]
    return _with_articles(options[int(rng.integers(len(options)))])


def _exchanged_words(told: str) -> Iterator[str]:
    """Yield a caption with two words of a kind, but of two groups, exchanged."""
    for a, b in combinations(_LISTED.finditer(told), 2):
        kind, group = _KIND_AND_GROUP[a[0]]
        other_kind, other_group = _KIND_AND_GROUP[b[0]]
        between = told[a.end() : b.start()]
        of_the_kind = {word for word in _LISTED.findall(between) if _KIND_AND_GROUP[word][0] == kind}
        describes_another = any(word not in of_the_kind for word in _JOINERS.split(between) if word)
        if kind == other_kind and group != other_group and describes_another:
            yield told[: a.start()] + b[0] + between + a[0] + told[b.end() :]


def _exchanged_phrases(told: str) -> Iterator[str]:
    """Yield a caption with the things before and after a preposition exchanged, if they end the caption or a clause."""
    for match in _TWO_PHRASES.finditer(told):
        if match["first"] != match["second"]:
            exchanged = match["second"] + match["between"] + match["first"]
            yield told[: match.start()] + exchanged + told[match.end() :]


def _replaced_words(told: str) -> Iterator[str]:
    """Yield a caption with a word replaced by the first of each other group of its kind."""
    for match in _LISTED.finditer(told):
        kind, group = _KIND_AND_GROUP[match[0]]
        for number, words in enumerate(_GROUPS[kind]):
            if number != group:
                yield told[: match.start()] + words[0] + told[match.end() :]


def _with_articles(told: str) -> str:
    """Return a caption with "a" or "an" as the listed word after it wants it: errors would give wrong captions away."""

    def article(match: re.Match[str]) -> str:
        return ("an " if match[1][0] in "aeiou" else "a ") + match[1]

    return re.sub(rf"\ban? ({'|'.join(_LONGEST_FIRST)})\b", article, told)


# ---- both -------------------------------------------------------------------------------------------------

SOURCES: dict[Source, WrongCaption] = {"world": wrong_drawn_caption, "words": wrong_real_caption}
