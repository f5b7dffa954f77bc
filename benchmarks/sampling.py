"""How right a demonstration's samples are at other temperatures, top-p and guidance, by every ranking.

python -m benchmarks.sampling --bundle runs/demo

Captions, candidates and checker are those of the demonstration's table.
"""

import argparse
import json
from itertools import product
from pathlib import Path

from benchmarks.measure import RESULTS, commit, machine, say, versions
from dalle.pipeline import Pipeline
from training.demo.demo import SHARE_OF_THREE
from training.demo.samples import CANDIDATES, SPLITS, check_samples, different_captions, summary, table_of


def main() -> None:
    """Measure every combination that the command line asks for, print its table, and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("runs/demo"), help="of the demonstration")
    parser.add_argument("--captions", type=int, default=24, help="of each kind")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.85, 0.7, 0.5])
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling.json")
    arguments = parser.parse_args()
    pipe = Pipeline.load(arguments.bundle)
    captions = {split: different_captions(split, arguments.captions, share_of_three=SHARE_OF_THREE) for split in SPLITS}
    record = {"machine": machine(), "versions": versions(), "commit": commit(), "candidates": CANDIDATES}
    runs: list[dict[str, object]] = []
    for temperature, top_p, guidance in product(arguments.temperatures, arguments.top_p, arguments.guidance):
        pipe.defaults = pipe.defaults.updated(temperature=temperature, top_p=top_p, guidance=guidance)
        samples = [check_samples(pipe, split, captions[split], say)[0] for split in SPLITS]
        print(f"{pipe.defaults}\n{table_of(samples)}\n", flush=True)
        setting = {"temperature": temperature, "top_p": top_p, "guidance": guidance}
        runs.append({**setting, "samples": summary(samples)})
        arguments.out.write_text(json.dumps({**record, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
