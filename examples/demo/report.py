"""What a run of the demo leaves for people to read: a table, a picture, and its part of the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def card_section(report: dict[str, Any]) -> str:
    """The model card's part on this run: training, results, limits."""
    settings, data = report["settings"], report["data"]
    return f"""## How it was trained

One run of st-llm-embed's demo (`examples/demo`), seed {settings["seed"]}, batches of {settings["batch_size"]} rows
of at most {settings["max_seq_length"]} tokens, on the documentation inside Python {report["versions"]["python"]}
({data["train entries"]} entries):

1. EBAE + EBAR ([LLaRA](https://arxiv.org/abs/2312.15503)) on consecutive paragraphs,
   {settings["pretext_steps"]} steps;
2. stage 1 of [NV-Embed](https://arxiv.org/abs/2405.17428): retrieval, in-batch and hard negatives,
   {settings["stage1_steps"]} steps;
3. stage 2: retrieval and classification, own hard negatives only, {settings["stage2_steps"]} steps.

## Results

{data["held-back queries"]} summaries of {data["held-back modules"]} held-back modules,
searched among their {data["held-back documents"]} entries:

{results_table(report["results"])}

## Limits

Its LLM's first {settings["num_layers"]} layers only. A demonstration: minutes of training on two CPU cores, on one
library's documentation, in English."""


def results_table(results: dict[str, dict[str, float]]) -> str:
    figures = list(next(iter(results.values())))
    rows = [["", *figures], ["---"] * (len(figures) + 1)]
    rows += [[name, *(f"{scores[figure]:.3f}" for figure in figures)] for name, scores in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_report(report: dict[str, Any], file: Path) -> None:
    """Loss curves of the three phases and nDCG@10 after each, as one picture."""
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    for axis, (name, log) in zip(axes, report["losses"].items(), strict=False):
        for part in sorted({key for row in log for key in row} - {"step"}):
            points = [(row["step"], row[part]) for row in log if part in row]
            axis.plot(*zip(*points, strict=True), label=part, marker=".", linewidth=1.5)
        axis.set(title=name, xlabel="step", ylabel="loss", ylim=(0, None))
        axis.legend(frameon=False)
    names = list(report["results"])
    bars = axes[-1].barh(
        names,
        [scores["ndcg@10"] for scores in report["results"].values()],
        color=["#999999" if name == "BM25" else "#3b6fb6" for name in names],
    )
    axes[-1].bar_label(bars, fmt="%.3f", padding=3)
    axes[-1].invert_yaxis()
    axes[-1].set(title="nDCG@10, held-back modules", xlim=(0, 1.15 * max(bar.get_width() for bar in bars)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
