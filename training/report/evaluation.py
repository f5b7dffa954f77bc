"""What `dalle evaluate` has written in a folder, as a part of the page: curves over N and blur, tables, pictures.

Nothing here imports torch, and a damaged file is left out with a warning.
"""

import base64
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.text import parse_json
from training.report.curves import save_panels

logger = logging.getLogger(__name__)

Lines = dict[str, list[tuple[float, float]]]
"""By name, x and y."""

TABLE = ("fd", "spread", "floor", "limit", "kid", "mmd", "precision", "recall", "inception score")


def evaluation_section(folder: Path) -> dict[str, Any] | None:
    """Return what the page shows of a folder's evaluation of best of N; None if there is none."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return None
    try:
        record = parse_json(file.read_text(encoding="utf-8"))
        found = record.get("best_of")
        return None if found is None else _section(folder, record, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is left out of the report (%r)", file, error)
        return None


def _section(folder: Path, record: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    sheet = folder / "best_and_worst.png"
    protocol = {"protocol": found["protocol"], "environment": record.get("environment"), "seconds": found["seconds"]}
    rows = [*_rows("best of", found["distances"]), *_rows("blur radius", found["blurred"])]
    heads = ["distance", "of", *TABLE]
    return {
        "lines": [f"{found['captions']:,} captions, ranked by {found['ranked_by']}", *found["notes"]],
        "star": found["star"],
        "charts": [
            *_curves(found["curve"], found["titles"]),
            *_distances("best of N", found["distances"]),
            *_blur(found["blurred"]),
        ],
        "tables": [[heads, *rows]] if rows else [],
        "sheet": base64.b64encode(sheet.read_bytes()).decode() if sheet.is_file() else "",
        "protocol": json.dumps(protocol, indent=2, ensure_ascii=False),
    }


def _curves(points: list[Mapping[str, Any]], titles: Mapping[str, str]) -> list[dict[str, str]]:
    charts = []
    for metric, title in titles.items():
        is_rate = metric == "right"
        scale = 100 if is_rate else 1
        lines: Lines = {}
        for point in points:
            if (each := point.get(metric)) is not None:
                lines.setdefault(point["rank"], []).append((point["n"], scale * each["mean"]))
                if each["subsets"] is not None:
                    over_all = lines.setdefault(f"{point['rank']}, all subsets", [])
                    over_all.append((point["n"], scale * each["subsets"]))
        if any(len(line) > 1 for line in lines.values()):
            charts.append(_chart(title + ", %" * is_rate, lines, "best of N", (-3, 103) if is_rate else None))
    return charts


def _distances(of: str, distances: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    if len(distances) < 2:
        return []
    lines: Lines = {"distance": [(float(x), each["fd"]) for x, each in distances.items()]}
    floors = [(float(x), each["floor"]["distance"]) for x, each in distances.items() if each["floor"] is not None]
    if floors:
        lines["floor"] = floors
    return [_chart(next(iter(distances.values()))["name"], lines, of, None)]


def _blur(blurred: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    # radius 0 has no place on an axis to base 2
    return _distances("blur radius + 1", {str(float(radius) + 1): each for radius, each in blurred.items()})


def _chart(title: str, lines: Lines, x_label: str, limits: tuple[float, float] | None) -> dict[str, str]:
    buffer = io.BytesIO()
    save_panels({title: lines}, buffer, x_label=x_label, y_label="", legend="", limits=limits)
    return {"title": title, "png": base64.b64encode(buffer.getvalue()).decode()}


def _rows(of: str, distances: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [[each["name"], f"{of} {float(x):g}", *_cells(each)] for x, each in distances.items()]


def _cells(each: Mapping[str, Any]) -> list[str]:
    near, score = each["neighbours"], each["inception_score"]
    values = [
        each["fd"],
        each["spread"],
        None if each["floor"] is None else each["floor"]["distance"],
        each["limit"],
        None if each["kid"] is None else each["kid"]["mean"],
        each["mmd"],
        None if near is None else near["precision"],
        None if near is None else near["recall"],
        None if score is None else score["mean"],
    ]
    return ["–" if value is None else f"{value:.4g}" for value in values]
