"""A stage's program under way: its data and ranks, its runs, and whether it is warmed up first."""

import dataclasses
import shutil
from dataclasses import dataclass
from typing import Any, Self

from dalle.data.reader import ShardData
from dalle.output.text import Say
from training.config import TrainConfig
from training.engine.checkpoints import latest_tag
from training.loop.fit import fit
from training.loop.run_folder import RunSpec
from training.loop.stage import Stage
from training.ranks.ranks import Ranks, on_first_rank
from training.run_files import CHECKPOINTS
from training.stage_recipes import CLIPRecipe, DVAERecipe, TransformerRecipe
from training.stages.inputs import Inputs, note_data
from training.unclip_recipes import DecoderRecipe, PriorRecipe, UpsamplerRecipe

StageRecipe = DVAERecipe | CLIPRecipe | TransformerRecipe | DecoderRecipe | PriorRecipe | UpsamplerRecipe
_AT_THE_START = {
    "model",
    "autoregressive",
    "prior_kind",
    "train",
    "warmup",
    "init_scale",
    "init_from_codebook",
    "embedding_scale",
}
"""Fields of a recipe that say nothing to a resumed run, or that are written down elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a stage is trained from, and where."""

    inputs: Inputs
    data: ShardData
    """Samples to train on."""
    validation: ShardData | None
    ranks: Ranks
    say: Say
    """Told how far the run is."""

    @classmethod
    def open(cls, inputs: Inputs, ranks: Ranks, say: Say, *, captions: bool, encoded: bool = False) -> Self:
        """Open the data; arguments and errors as those of `Inputs.open`."""
        data, validation = inputs.open(captions=captions, encoded=encoded)
        return cls(inputs=inputs, data=data, validation=validation, ranks=ranks, say=say)

    def spec(
        self,
        stage: str,
        description: dict[str, Any],
        recipe: StageRecipe,
        flops_per_sample: float | None = None,
    ) -> RunSpec:
        """Return where a stage's run reads and writes, how it starts, and which of its options may change."""
        inputs = self.inputs
        options = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in _AT_THE_START}
        return RunSpec(
            directory=inputs.run_directory(stage),
            description={"stage": stage, **description},
            options=options,
            fresh=inputs.fresh,
            resume=inputs.resume,
            resume_from=inputs.resume_from,
            flops_per_sample=flops_per_sample,
        )

    def fit(self, stage: Stage, config: TrainConfig, spec: RunSpec) -> None:
        """Train a stage; write down first which samples it is trained on."""
        note_data(spec, self.data, self.validation, self.ranks)
        fit(stage, config, self.ranks, self.data, self.validation, spec, self.say)

    def needs_warmup(self, stage: str) -> bool:
        """Return whether a stage starts without a checkpoint; deletes its checkpoints if it is fresh. Collective.

        Otherwise a command interrupted in a fresh warm-up would later resume from the stage's old checkpoint.
        """
        checkpoints = self.inputs.run_directory(stage) / CHECKPOINTS
        if self.inputs.fresh:
            on_first_rank(lambda: shutil.rmtree(checkpoints, ignore_errors=True), self.ranks)
        return not self.has_checkpoint(stage)

    def has_checkpoint(self, stage: str) -> bool:
        """Return whether a stage's run resumes from a checkpoint."""
        return not self.inputs.fresh and latest_tag(self.inputs.run_directory(stage) / CHECKPOINTS) is not None

    def warm_up(self, stage: Stage, config: TrainConfig, description: dict[str, Any], recipe: StageRecipe) -> Self:
        """Train a warm-up, in a run of its own; returns the program for the stage after it, which does not resume."""
        self.fit(stage, config, self.spec(stage.name, description, recipe))
        return dataclasses.replace(self, inputs=dataclasses.replace(self.inputs, resume=False, resume_from=None))
