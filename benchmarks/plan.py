"""The memory that `dalle-train plan` predicts, beside measured memory: peaks of processes, and what autograd keeps.

All of it on this CPU. A peak is that of a fresh process that trains with the real engine, above what it held with
everything imported; of several ranks the first one's, which has the averaged weights.
"""

from benchmarks import measure, training_memory
from benchmarks.measure import MIB, Options, Report
from benchmarks.training_memory import CASES, kept_by_autograd
from dalle.attention import KINDS
from dalle.model import DALLEConfig
from training.config import Precision
from training.plan.activations import activations

TOLERANCE = 0.15
"""That a predicted peak may be off, as a fraction of the measured one."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "autocast", "bf16")


def peaks(options: Options, report: Report) -> None:
    """Peaks of processes."""
    rows: list[list[measure.Cell]] = []
    names = list(CASES)[:1] if options.quick else list(CASES)
    for name in names:
        moment, memory = CASES[name].predicted()
        found = training_memory.measured(name)
        rows.append([name, found / MIB, memory.total / MIB, memory.total / found, moment])
        report.samples[name] = {"measured": found, "predicted": memory.total}
    columns = ["", "measured, MiB", "predicted, MiB", "predicted ÷ measured", "predicted at"]
    report.table("Peak memory of training on a CPU", columns, rows)
    for row in rows:
        report.line(
            "predicted peak", str(row[0]), abs(float(row[3] or 0) - 1), TOLERANCE, at_most=True, unit=" of it off"
        )


def kept(options: Options, report: Report) -> None:
    """What autograd keeps of a forward pass, by kind of attention and precision."""
    rows: list[list[measure.Cell]] = []
    for kind in KINDS:
        config = DALLEConfig(
            n_layers=2,
            d_model=64,
            n_heads=4,
            text_len=32,
            grid=16,
            text_vocab=300,
            image_vocab=64,
            conv_kernel=5,
            attention=kind,
        )
        for precision in PRECISIONS:
            found = kept_by_autograd(config, precision, 2, checkpointing=False)
            predicted = activations(config, precision, 2, checkpointing=False, device="cpu").kept
            rows.append([f"{kind}, {precision}", found / 1024, predicted / 1024, predicted / found])
    columns = ["", "kept, KiB", "predicted, KiB", "predicted ÷ kept"]
    report.table("Activations that autograd keeps, two layers of one kind", columns, rows)


if __name__ == "__main__":
    measure.main("plan", __doc__, {"kept": kept, "peaks": peaks})
