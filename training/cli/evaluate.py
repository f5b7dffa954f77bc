"""`dalle-train evaluate`: `dalle evaluate`, with what is known here alone, the truth about the built-in world."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dalle.cli.command import parse
from dalle.cli.evaluation.evaluate import Evaluate
from dalle.evaluation.bundle import Measurement
from dalle.evaluation.nested.sample import Checker
from dvae.images import resize_and_crop
from training.drawings.shape_checker import check
from training.stages.exchanged_captions import is_of_the_world, measure_exchanged


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Evaluate):
    """Measure a bundle, or a folder of pictures with their captions, as `dalle evaluate`.

    Where all captions are of the built-in world, a checker says of every picture whether it is right.
    """

    def checker(self, captions: Sequence[str]) -> Checker | None:
        """Return the built-in world's checker if all captions are of that world."""
        return shows if is_of_the_world(captions) else None

    def also(self) -> Measurement:
        """Measure exchanged captions, too."""
        return measure_exchanged


def shows(image: Image.Image, caption: str) -> bool:
    """Return whether a picture shows exactly what a caption of the built-in world says."""
    return check(resize_and_crop(image, min(image.size)), caption).right


def read(arguments: Sequence[str]) -> EvaluateCommand:
    """Return the command that the arguments after the verb say."""
    command: EvaluateCommand = parse(EvaluateCommand, arguments, prog="dalle-train evaluate")
    return command
