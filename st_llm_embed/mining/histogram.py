"""What mining leaves for people to read: the rows, what each rule dropped, why rows are missing, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from st_llm_embed.files import written_beside
from st_llm_embed.mining.negatives import BINS, Mined, MiningReport


def write_mined(mined: Mined, folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Write ``train.jsonl``, ``report.json`` and ``histogram.png``; and, where rows were dropped, ``dropped.jsonl``.

    Args:
        mined: what ``mine_negatives`` found.
        folder: the folder to write; must not exist, or be empty.
        settings: the arguments of the mining, to be kept in ``report.json``.

    Returns:
        The path of ``train.jsonl``.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder = Path(folder).resolve()
    with written_beside(folder) as staged:
        staged.mkdir()
        mined.rows.to_json(staged / "train.jsonl")
        if len(mined.dropped):
            mined.dropped.to_json(staged / "dropped.jsonl")
        draw_histogram(mined.report, staged / "histogram.png")
        text = json.dumps({"settings": dict(settings), **asdict(mined.report)}, indent=2)
        (staged / "report.json").write_text(text + "\n", encoding="utf-8")
    return folder / "train.jsonl"


def draw_histogram(report: MiningReport, file: Path) -> None:
    """The cosines of the positives and of the mined negatives as two histograms in one picture."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, counts in report.histograms.items():
        share = np.array(counts) / sum(counts)
        axis.stairs(share, BINS, fill=True, alpha=0.5, label=f"{name} (mean {report.scores[name]['mean']:.2f})")
    filled_bins = np.flatnonzero(np.sum(list(report.histograms.values()), axis=0))
    axis.set(xlim=(BINS[filled_bins[0]], BINS[filled_bins[-1] + 1]), xlabel="cosine with the anchor", ylabel="share")
    axis.set_title(f"{report.rows - report.rows_dropped} of {report.rows} rows mined")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
