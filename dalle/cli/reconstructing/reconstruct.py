"""`dalle reconstruct`: shows pictures beside their reconstructions by a dVAE, and measures these."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.command import resolve_device
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, Device, Flag, OwnDVAEs, PictureSources, check_writable
from dalle.cli.ranking import tell_left_out
from dalle.cli.reconstructing.compare import Choices, compare, finite
from dalle.cli.terminal import print_table, warn_of_skipped
from dalle.data.bundle import bundle_part
from dalle.data.pictures import Pictures
from dalle.evaluation.reconstruction import Measures, Reconstruction, mean, reconstructions
from dalle.evaluation.tokenizers.contenders import model_directory
from dalle.output.sheets import save_png, side_by_side
from dalle.output.text import counted, printable
from dvae.codec import load_codec
from dvae.remarks import REMARKS
from storage.atomic import replace_text
from storage.models.directory import directory_hash

HEADS = ("PSNR dB", "SSIM", "MS-SSIM", "bits/pixel", "codes", "picture")


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Show pictures beside what a dVAE makes of their tokens, and measure how close it comes.

    With several dVAEs or VQGANs after --dvae, or with --clip or --codes, they are compared: a column for each, the bits
    of a picture counted in three ways, the worst pictures, and rate against distortion.
    """

    pictures: PictureSources
    bundle: Bundle = DEFAULT_BUNDLE
    dvae: OwnDVAEs = ()
    size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="(default: the dVAE's)")] = None
    """Side in pixels to resize and crop to. Several dVAEs read at their own sizes, and are measured at the largest."""
    clip: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: no distance)")] = None
    """Directory of a CLIP, or of a bundle: adds the Fréchet distance of its features of originals and reconstructions.
    """
    codes: Flag = False
    """Also draw what each code draws, and where in pictures codes are used."""
    sheet_limit: int = 16
    """Pictures on the side-by-side sheet at most; all are measured."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/reconstructions")
    """Folder for reconstructions.png and metrics.json; of several dVAEs for comparison.json and more pictures."""
    follow_links: Flag = False
    """Read links to pictures and to folders that lie in folders, too."""
    device: Device = "auto"

    def run(self) -> None:
        """Print the table, and write the sheet and the numbers."""
        if self.sheet_limit < 1:
            raise ValueError(f"--sheet-limit is {self.sheet_limit}; it must be at least 1")
        is_comparison = len(self.dvae) > 1 or self.codes or self.clip is not None
        pictures = Pictures(self.pictures, follow_links=self.follow_links, captions=is_comparison)
        check_writable(self.out)
        if is_comparison:
            if not self.dvae:
                bundle_part(self.bundle, "dvae")  # else in words
            compare(
                pictures,
                Choices(
                    tokenizers=self.dvae or (self.bundle,),
                    clip=self.clip,
                    size=self.size,
                    sheet_limit=self.sheet_limit,
                    codes=self.codes,
                    out=self.out,
                    device=self.device,
                ),
            )
        else:
            self._reconstruct(pictures)

    def _reconstruct(self, pictures: Pictures) -> None:
        """Show and measure what one dVAE makes of pictures."""
        path = model_directory(self.dvae[0], "dvae") if self.dvae else bundle_part(self.bundle, "dvae")
        dvae = load_codec(path, resolve_device(self.device))
        size = self.size if self.size is not None else dvae.config.image_size
        measures: list[tuple[str, Measures]] = []
        shown: list[Reconstruction] = []
        for one in reconstructions(dvae, pictures, size):
            measures.append((one.name, one.measures))
            if len(shown) < self.sheet_limit:
                shown.append(one)
        tell_left_out(pictures.left_out)
        warn_of_skipped(pictures.skipped, pictures.problems)
        REMARKS.log_totals()
        means = mean([row for _, row in measures])
        print_table(HEADS, [_measure_row(name, row) for name, row in [*measures, ("mean", means)]])
        sheet = side_by_side(
            [one.original for one in shown],
            [one.image for one in shown],
            [f"{Path(one.name).name}\n{one.measures.psnr:.2f} dB" for one in shown],
        )
        save_png(sheet, self.out / "reconstructions.png")
        report = {
            "dvae": directory_hash(path),
            "size": size,
            "mean": finite(means),
            "pictures": [{"name": name, **finite(row)} for name, row in measures],
            "skipped": pictures.skipped,
            "left_out": +pictures.left_out,
        }
        replace_text(self.out / "metrics.json", json.dumps(report, indent=2))
        measured = counted(len(measures), "picture")
        print(f"{measured} measured: see reconstructions.png and metrics.json in {printable(str(self.out))}")


def _measure_row(name: str, measures: Measures) -> list[str]:
    ms_ssim = "-" if measures.ms_ssim is None else f"{measures.ms_ssim:.4f}"
    row = [f"{measures.psnr:.2f}", f"{measures.ssim:.4f}", ms_ssim, f"{measures.bits_per_pixel:.3f}"]
    return [*row, f"{measures.codes_used:.4g}", name]
