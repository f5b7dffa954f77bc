"""`dalle-train`: every step from pictures to a bundle. This file knows the commands; the one that is named is imported.

Look-ups are in look.py and evaluate.py, data in data.py, training in train.py, whose options are in options.py.
"""

import sys

from dalle.cli.start import begin

TYPE_CHECKING = False  # as in dalle/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence

    from dalle.cli.command import Command

COMMANDS = {
    "everything": {
        "demo": "draw a small world, train everything on it, sample and check: minutes on two CPU cores",
        "all": "train tokenizer, dVAE, CLIP and transformer with one recipe; with --validation, measure them",
    },
    "data": {
        "shards": "make shards from pictures and captions",
        "check-data": "read everything in shards once, and say what is wrong",
        "duplicates": "find near-duplicates by CLIP's features",
    },
    "one stage": {
        "tokenizer": "train the BPE on the captions",
        "dvae": "train the dVAE on the pictures",
        "clip": "train CLIP, the reranker",
        "encode": "turn pictures into image tokens, once",
        "transformer": "train the transformer on captions and image tokens",
        "decoder": "train DALL·E 2's decoder, from CLIP's embeddings to pictures",
        "prior": "train DALL·E 2's prior, from captions to CLIP's embeddings",
        "upsampler": "train DALL·E 2's upsampler, from small pictures to large ones",
    },
    "results": {
        "status": "show how a run is going",
        "report": "write a run as one HTML page",
        "evaluate": "measure a bundle on pictures it was not trained on",
    },
    "choices": {
        "plan": "show what a recipe needs, and what to train it with; or list the recipes",
        "presets": "list the DeepSpeed configurations that --preset takes, or print one",
    },
}
"""What `dalle-train --help` says, by group."""


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run `dalle-train`; returns the exit code: 1 after an error, otherwise 0.

    An interruption that saved everything is a success too: the scheduler that asked for it repeats the command.
    """
    begin()
    from dalle.cli.command import run_program
    from training.ranks.stop import Ended, Interrupted

    try:
        return run_program(read, argv)
    except Interrupted:
        return 0
    except Ended as ended:
        return ended.code


def read(arguments: "Sequence[str]") -> "Command":
    """Return the command that the arguments say.

    Raises:
        ValueError: there is no such command, or no such recipe.
        SystemExit: after help, or an error of usage, which is explained on stderr.
    """
    verbs = [verb for group in COMMANDS.values() for verb in group]
    if not arguments:
        print(overview(), file=sys.stderr)
        raise SystemExit(2)
    verb, *rest = sorted(arguments, key="--debug".__eq__)  # which may stand anywhere, goes last
    if verb in ("-h", "--help"):
        print(overview())
        raise SystemExit(0)
    if verb not in verbs:
        from difflib import get_close_matches

        close = get_close_matches(verb, verbs, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"dalle-train has no command {verb!r}: {hint}there are {', '.join(verbs)}")
    if verb in COMMANDS["data"]:
        from training.cli import data

        return data.read(verb, rest)
    if verb == "evaluate":
        from training.cli import evaluate

        return evaluate.read(rest)
    if verb in COMMANDS["results"] | COMMANDS["choices"]:
        from training.cli import look

        return look.read(verb, rest)
    from training.cli import train

    return train.read(verb, rest)


def overview() -> str:
    """Return what `dalle-train --help` prints."""
    groups = [
        "\n".join([f"{title}:", *(f"  {verb:<12} {what}" for verb, what in group.items())])
        for title, group in COMMANDS.items()
    ]
    return "\n\n".join(
        [
            "usage: dalle-train COMMAND [OPTIONS]",
            "Train every part of a bundle: tokenizer, dVAE, CLIP and transformer.",
            *groups,
            "`dalle-train COMMAND --help` shows a command's options. --debug shows the traceback of an error.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
