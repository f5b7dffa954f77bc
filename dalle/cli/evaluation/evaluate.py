"""`dalle evaluate`: a bundle, or the pictures of any other system, measured as the paper measures."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from dalle.cli.command import resolve_device
from dalle.cli.computing import ComputeOptions
from dalle.cli.generate import SamplingOptions
from dalle.cli.options import Flag, check_writable
from dalle.data.bundle import bundle_part
from dalle.data.reader import ShardData
from dalle.evaluation.best_of import LEAST_FOR_DISTANCE, Judge, Real, evaluate_bundle_best_of, evaluate_pictures
from dalle.evaluation.bundle import Measurement, check_n_captions, distinct_captions, measure_bundle, sample_sheet
from dalle.evaluation.features.profiles import BLURS, ProfileName
from dalle.evaluation.given import given_files
from dalle.evaluation.nested.captions import Row, chosen_rows, list_hash, read_rows, rows_of
from dalle.evaluation.nested.cost import cost_of, matrix_speed
from dalle.evaluation.nested.sample import Checker
from dalle.evaluation.nested.settings import GENEVAL_PICTURES, NestedSettings
from dalle.evaluation.nested.shards import is_first_process, n_processes
from dalle.evaluation.networks import OWN, PictureNetwork, load_network
from dalle.evaluation.references import RealPictures, kept_of, stored_reference
from dalle.evaluation.result import Result
from dalle.evaluation.written import Layout, best_and_worst, write_lines, write_pictures
from dalle.family.transformers import sized_transformer
from dalle.output.sheets import save_png
from dalle.output.text import counted, printable, to_stderr
from dalle.sampling import SamplingDefaults
from dvae.codec import load_codec
from rerank import CLIP
from storage.atomic import replace_text
from storage.models.directory import directory_hash

SHARD_ROWS, LEAST_SHARDS = 64, 8
"""Captions of a shard by default, and the shards that few captions are cut into."""
SHARDS = "evaluation"
"""Folder of the run's shards and of the kept references, in OUT."""
AS_THE_BUNDLE, AS_ANYWHERE = SamplingOptions(), ComputeOptions()


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is measured, and against what."""

    features: tuple[str, ...] = (OWN,)
    """What distances are of: own, the image tower of the bundle's CLIP (of the judge's for a folder of pictures), or
    files of Inception's weights, which are never downloaded."""
    profile: Annotated[
        ProfileName | None,
        tyro.conf.arg(metavar="{own,tf,clean,dalle2021}", help_behavior_hint="(default: own, or tf for files)"),
    ] = None
    """Network, resize and crop as one: dalle2021 is the scale of the paper's figure, tf that of most later tables."""
    blur: str = ",".join(map(str, BLURS))
    """Radii in pixels at 256 × 256 by which both sides are blurred; the first must be 0."""
    reference: tuple[str, ...] = ()
    """Shards of real pictures, or a file with their moments (.safetensors); by default those of --data."""
    without: tuple[Path, ...] = ()
    """Lists of samples, as `dalle-train duplicates` writes them: all is told a second time without them, captions of
    --data and real pictures alike. Of other shards in --reference those go that the lists name; moments stay whole."""
    judge: Annotated[Path | None, tyro.conf.arg(metavar="BUNDLE")] = None
    """Another bundle, or a CLIP's directory, that judges the pictures and chooses none."""


@dataclass(frozen=True, kw_only=True)
class BestOfOptions:
    """What is sampled of a bundle."""

    images: int = 64
    """Captions to sample, the same ones every time; as many as there are at most."""
    best_of: str = "1,2,4,8,16"
    """N of best of N, ascending: all of them come from one sampling of the last."""
    seed: int = 0
    """Candidates are functions of seed, row, caption and their number."""
    shard_captions: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 64, or an eighth of few)")
    ] = None
    """Captions that are measured and written at a time: what is done anew at most when a run was killed."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a bundle, or a folder of pictures with their captions, and write evaluation.json.

    Of a bundle on --data: reconstruction, likelihood, retrieval; and best of N, for every N, from one sampling, which
    goes on where an earlier start has ended, and may be shared by the processes of a launcher. Of a folder: the same
    numbers of its pictures.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE|PICTURES")]
    """Directory of a bundle, or of pictures."""
    captions_file: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CAPTIONS]", help_behavior_hint="")
    ] = None
    """A text with one caption a line, or .jsonl; for a bundle by default the captions of --data."""
    data: tuple[str, ...] = ()
    """Shards of captioned pictures that it was not trained on."""
    captions: int = 5
    """Captions of --data to sample for samples.png."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for evaluation.json and the rest; by default the bundle, or the folder of pictures."""
    fresh: Flag = False
    """Begin anew, where DIR holds a run that was begun."""
    plan: Flag = False
    """Only tell what it will cost: hours and disk. The bundle's weights are not read."""
    save_pictures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write the pictures there, too: the best of each caption."""
    layout: Layout = "plain"
    """Of those: plain, or geneval, with four pictures of each caption, each the best of a quarter of the candidates."""
    best_of: tyro.conf.OmitArgPrefixes[BestOfOptions] = BestOfOptions()
    compare: tyro.conf.OmitArgPrefixes[CompareOptions] = CompareOptions()
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = AS_THE_BUNDLE
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = AS_ANYWHERE

    def run(self) -> None:
        """Print the tables, and write JSON, lines and sheets."""
        check_n_captions(self.captions)
        if not self.source.is_dir():
            raise FileNotFoundError(f"there is no folder {self.source}: give a bundle, or a folder of pictures")
        settings = self._settings()
        radii = _radii(self.compare.blur)
        data = ShardData.open(self.data, captions=True) if self.data else None
        if (self.source / "dalle").is_dir() or self.captions_file is None:
            self._run_bundle(settings, radii, data)
        else:
            self._run_pictures(radii, data)

    def checker(self, captions: Sequence[str]) -> Checker | None:
        """Return what knows the truth of these captions; None if nothing does."""
        return None

    def also(self) -> Measurement | None:
        """Return another measurement of the bundle on --data; None for none."""
        return None

    # -------------------------------------------------------------------------------------------- a bundle

    def _run_bundle(self, settings: NestedSettings, radii: tuple[float, ...], data: ShardData | None) -> None:
        if data is None and self.captions_file is None:
            raise ValueError("nothing to sample: give --data SHARDS, or a file of captions after the bundle")
        rows, keep_rows = self._rows(data)
        if self.best_of.shard_captions is None:
            settings = replace(settings, shard_rows=min(SHARD_ROWS, math.ceil(len(rows) / LEAST_SHARDS)))
        if self.plan:
            print(
                self._plan(settings, len(rows), radii, has_reference=data is not None or bool(self.compare.reference))
            )
            return
        out = self.out if self.out is not None else self.source
        check_writable(out)
        _share_cores()
        pipe = replace(self.compute, device=_device_of_process(self.compute.device)).load(self.source)
        chosen = self.sampling.of(pipe.defaults)
        settings = replace(settings, sampling=chosen.sampling(self.best_of.seed), rank=chosen.rank)
        judge = _judge(self.compare.judge, pipe.dalle.device)
        if judge is not None and judge.hash == pipe.hashes["clip"]:
            judge = None
        network = self._network(pipe.clip, pipe.hashes["clip"], pipe.dalle.device, data)
        real = self._real(network, data, radii, out / SHARDS)
        checker = self.checker([row.caption for row in rows])
        n_features, n_radii = (0, 1) if network is None else (network.n_numbers, len(radii))
        if is_first_process():
            cost = cost_of(
                pipe.dalle,
                pipe.dvae,
                pipe.clip,
                settings,
                len(rows),
                judge=None if judge is None else judge.clip,
                is_checked=checker is not None,
                n_features=n_features,
                n_radii=n_radii,
            )
            to_stderr(cost.text(matrix_speed(pipe.dalle.device, settings.precision), str(pipe.dalle.device)))
        done = evaluate_bundle_best_of(
            pipe,
            rows,
            settings,
            out / SHARDS,
            to_stderr,
            judge=judge,
            checker=checker,
            real=real,
            keep_rows=keep_rows,
            fresh=self.fresh,
        )
        if done is None:
            return
        nested, result = done
        measured = {} if data is None else measure_bundle(pipe, data, to_stderr, also=self.also())
        n_pictures = 0
        if self.save_pictures is not None:
            n_pictures = write_pictures(pipe, nested, self.save_pictures, self.layout)
        write_lines(nested, out / "captions.jsonl")
        save_png(best_and_worst(pipe, nested), out / "best_and_worst.png")
        if data is not None:
            sample_sheet(pipe, distinct_captions(data, self.captions), out / "samples.png", to_stderr)
        self._write(result, out, measured, pipe.dalle.device)
        if n_pictures:
            print(f"{counted(n_pictures, 'picture')} in {printable(str(self.save_pictures))}")

    def _settings(self) -> NestedSettings:
        """Return what is sampled, at the paper's settings until the bundle's are known."""
        self.sampling.of(SamplingDefaults()).sampling(self.best_of.seed)  # raises before a model is loaded
        best_of = _numbers("--best-of", self.best_of.best_of, int)
        return NestedSettings(
            best_of=best_of,
            precision=self.compute.precision,
            pictures=GENEVAL_PICTURES if self.layout == "geneval" else 1,
            shard_rows=SHARD_ROWS if self.best_of.shard_captions is None else self.best_of.shard_captions,
            batch_size=self.compute.batch_size,
        )

    def _rows(self, data: ShardData | None) -> tuple[list[Row], Tensor | None]:
        """Return the captions to sample, and which of them --without leaves."""
        rows = rows_of(data) if self.captions_file is None and data is not None else []
        if self.captions_file is not None:
            rows = read_rows(self.captions_file)
        chosen = chosen_rows(rows, self.best_of.images)
        if not self.compare.without:
            return chosen, None
        if data is None or self.captions_file is not None:
            raise ValueError(
                "--without names samples of shards, but the captions are those of a file: leave the file out and give "
                "--data SHARDS, or leave --without out"
            )
        return chosen, self._kept(data, chosen)

    def _kept(self, data: ShardData, rows: Sequence[Row]) -> Tensor:
        """Return which captions of the data --without leaves."""
        kept = kept_of(data, self.compare.without)
        last = max(row.number for row in rows)
        if last >= len(kept):
            raise ValueError(
                f"--without names samples of --data, which has {counted(len(kept), 'sample')}, but a caption has the "
                f"number {last}: give the captions of these samples, numbered from 0"
            )
        keep_rows = kept[[row.number for row in rows]]
        if not keep_rows.any():
            raise ValueError(
                f"--without names all {counted(len(rows), 'caption')}, and nothing is left: give a shorter list, or "
                "more --images"
            )
        return keep_rows

    def _plan(self, settings: NestedSettings, n_rows: int, radii: tuple[float, ...], *, has_reference: bool) -> str:
        dalle = sized_transformer(bundle_part(self.source, "dalle"))
        dvae = load_codec(bundle_part(self.source, "dvae"), torch.device("cpu"))
        clip = CLIP.load(bundle_part(self.source, "clip"))
        device = resolve_device(self.compute.device)
        network = self._network(clip, "", device, None) if has_reference else None
        judge = _judge(self.compare.judge, torch.device("cpu"))
        cost = cost_of(
            dalle,
            dvae,
            clip,
            settings,
            n_rows,
            judge=None if judge is None else judge.clip,
            n_features=0 if network is None else network.n_numbers,
            n_radii=len(radii),
        )
        return cost.text(matrix_speed(device, settings.precision), str(device))

    # -------------------------------------------------------------------------------------------- pictures

    def _run_pictures(self, radii: tuple[float, ...], data: ShardData | None) -> None:
        assert self.captions_file is not None
        if self.plan:
            raise ValueError(
                f"--plan tells what sampling a bundle costs, but {self.source} is a folder of pictures: leave it out"
            )
        if self.save_pictures is not None:
            raise ValueError(
                f"--save-pictures writes what a bundle samples, but {self.source} is a folder of pictures: leave it out"
            )
        rows = sorted(read_rows(self.captions_file), key=lambda row: row.number)
        files = given_files(self.source, rows)
        out = self.out if self.out is not None else self.source
        check_writable(out)
        device = resolve_device(self.compute.device)
        judge = _judge(self.compare.judge, device)
        keep_rows = None
        if self.compare.without:
            if data is None:
                raise ValueError("--without names samples of --data, but there are none: add --data SHARDS")
            keep_rows = self._kept(data, rows)
        clip, clip_hash = (None, "") if judge is None else (judge.clip, judge.hash)
        network = self._network(clip, clip_hash, device, data)
        real = self._real(network, data, radii, out / SHARDS)
        checker = self.checker([row.caption for row in rows])
        if judge is None and real is None and checker is None:
            raise ValueError(
                "nothing to measure the pictures with: add --judge BUNDLE for cosines, or --data or --reference SHARDS "
                "for distances"
            )
        captions = list_hash(rows)
        result = evaluate_pictures(
            files,
            rows,
            judge=judge,
            checker=checker,
            real=real,
            keep_rows=keep_rows,
            protocol={"pictures": str(self.source), "captions": captions, "n_captions": len(rows)},
            lines=[f"{counted(len(rows), 'picture')} of {printable(str(self.source))}, captions {captions[:8]}"],
        )
        self._write(result, out, {}, device)

    # -------------------------------------------------------------------------------------------- both

    def _network(
        self, clip: CLIP | None, clip_hash: str, device: torch.device, data: ShardData | None
    ) -> PictureNetwork | None:
        """Return what distances are of; None where there is nothing to compare with."""
        if data is None and not self.compare.reference and not self.plan:
            return None
        return load_network(self.compare.features, self.compare.profile, clip, clip_hash, device)

    def _real(
        self,
        network: PictureNetwork | None,
        data: ShardData | None,
        radii: tuple[float, ...],
        cache: Path,
    ) -> Real | None:
        """Return the real pictures, and which of them --without leaves."""
        if network is None:
            return None
        given = self.compare.reference
        if len(given) == 1 and given[0].endswith(".safetensors"):
            return Real(network=network, pictures=stored_reference(Path(given[0]), network))
        others = ShardData.open(given, captions=False) if given else data
        assert others is not None
        keep = kept_of(others, self.compare.without) if self.compare.without else None
        if keep is not None and (n_left := int(keep.sum())) < LEAST_FOR_DISTANCE:
            raise ValueError(
                f"--without leaves {n_left} of {counted(len(keep), 'real picture')}, but distances need "
                f"{LEAST_FOR_DISTANCE}: give a shorter list, or other shards with --reference"
            )
        return Real(network=network, pictures=RealPictures(others, network, cache), radii=radii, keep_pictures=keep)

    def _write(self, result: Result, out: Path, measured: dict[str, object], device: torch.device) -> None:
        """Print the tables, and write evaluation.json."""
        print(printable(result.text()))
        environment: dict[str, Any] = {
            "torch": torch.__version__,
            "device": str(device),
            "precision": self.compute.precision,
            "threads": torch.get_num_threads(),
        }
        record = {**measured, "best_of": result.as_json(), "environment": environment}
        replace_text(out / "evaluation.json", json.dumps(record, indent=2) + "\n")
        print(f"wrote {printable(str(out / 'evaluation.json'))}")


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Return the numbers of a list such as "1,2,4"."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; expected numbers with commas between them, such as 1,2,4,8") from None


def _radii(text: str) -> tuple[float, ...]:
    radii = _numbers("--blur", text, float)
    if radii[0] != 0 or list(radii) != sorted({*radii}) or radii[-1] == float("inf"):
        raise ValueError(f"--blur is {text!r}; expected ascending radii from 0 on, such as 0,1,2,4,8")
    return radii


def _judge(path: Path | None, device: torch.device) -> Judge | None:
    """Return the CLIP of a bundle, or in a directory of its own."""
    if path is None:
        return None
    own = bundle_part(path, "clip") if (path / "clip").is_dir() else path
    return Judge(clip=CLIP.load(own).to(device), hash=directory_hash(own))


def _device_of_process(device: str) -> str:
    """Return the GPU of this process of a launcher, where any will do."""
    n_gpus = torch.cuda.device_count()
    return (
        f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % n_gpus}" if device in ("auto", "cuda") and n_gpus else device
    )


def _share_cores() -> None:
    """Take this process's part of the cores, where a launcher has started several and does not say how many."""
    if n_processes() > 1 and "OMP_NUM_THREADS" not in os.environ:
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_local))
