"""Captions of every kind that a tokenizer meets: scripts, emoji, HTML, odd spaces, long ones; and files of one."""

import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers.implementations import CharBPETokenizer

TEXT = (
    "a red cube on the blue sphere left of green cat sits chair painting by monet style photo of an astronaut riding "
    "horse don't rock'n'roll lake, tree. (old) 12 1234 3d красный куб на синем шаре слева от кошки сидит стул картина "
    "в стиле моне фото космонавт на лошади ёлка объект подъезд, Дом. Москва река"
)
EMOJI = ("😀", "🐱", "👩\u200d🚀", "🏳️\u200d🌈", "🇷🇺")
ODD = (
    "",
    " ",
    "\u2581",
    "\u2581\u2581кот\u2581на\u2581стуле",
    "a\u00a0b\u2003c",
    "e\u0301cole naïve ‘x’",
    "İstanbul ΣΑΣ ß ẞ ﬁne ﬀ",
    "aaaaaaaaaaaaaaaa",
    "<b>кот</b> &amp; dog &lt;3",
    "<a href='x'>[UNK] [PAD] </s> <unk>",
    "кот😀😀кот",
    "".join(EMOJI),
    "\x01кот\x7f\tкрасный\v\fкуб\r\n\x85\x1c\x1d",
    "猫 坐在 椅子上 ﾊﾝｶｸ",
    "שלום عالم हिन्दी",
    "\ufeffкот\u200b",
    "x" * 3000,
    "на" * 2000,
    "a red cat " * 200,
)
LETTERS = (
    "абвгдеёжзийклмнопрстуфхцчшщъыьэюя abcdefghijklmnopqrstuvwxyz 0123456789 ,.!?-'\"()&;<>\u2581\u00a0 😀猫é\u0301"
)


def captions(n: int = 500) -> list[str]:
    """The odd ones, then words, letters, characters of a few blocks, and words in capitals."""
    source, words = random.Random(0), TEXT.split()

    def some(values: Sequence[str], most: int) -> list[str]:
        count = 1 + int(source.random() * most)
        return [values[int(source.random() * len(values))] for _ in range(count)]

    blocks = [chr(code) for code in (*range(32, 0x250), *range(0x400, 0x460), *range(0x1F300, 0x1F650))]
    kinds = (
        lambda: " ".join(some(words, 30)),
        lambda: "".join(some(LETTERS, 80)),
        lambda: "".join(some(blocks, 40)),
        lambda: " ".join([*some(words, 10), *some(EMOJI, 2)]).upper(),
    )
    return [*ODD, *(kinds[i % len(kinds)]() for i in range(n - len(ODD)))]


def charbpe_files(folder: Path) -> tuple[Path, Path]:
    """vocab.json and merges.txt as the library writes them."""
    library = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    library.train_from_iterator([TEXT] * 3, vocab_size=160, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    library.save_model(str(folder), "bpe-16k")
    return folder / "bpe-16k-vocab.json", folder / "bpe-16k-merges.txt"
