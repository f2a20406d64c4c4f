"""The curve over the budget: what a student of a teacher finds after minutes, an hour and more hours of one core.

    python -m examples.study.curve examples/study/results/taught*

Takes the folders of studies of those sizes that have ``core_hours`` in ``study.yaml``; prints a table of the rows of
``ROWS`` and draws ``curve.png`` into the first folder. ``--readme`` puts the table into a README, at the mark "curve".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.figure import Figure

from examples.study.report import PARTS, group_mean, groups_of, insert_table, read_runs, read_searches
from examples.study.study import STUDY

ROWS = {"mean, contrastive alone": "#999999", "mean, distilled": "#3b6fb6", "latent, distilled": "#c8642a"}
PEERS = {"all-MiniLM-L6-v2, the teacher": 0.676, "BM25": 0.649}  # on the other sets: results/cpu-long
ALL = "all"  # of "texts"
COLUMNS = ("retrieval, test splits", "retrieval, other sets", "all", "its queries on the teacher's index, other sets")


class Point(NamedTuple):
    """A row at one budget, on so many texts."""

    row: str
    hours: float
    texts: int | str
    figures: list[float | None]  # of COLUMNS, each the mean over the seeds


def read_points(folders: list[Path]) -> list[Point]:
    """The figures of ROWS in the folders' studies, by row and budget."""
    found = []
    for folder in folders:
        runs, name = read_runs(folder / "rows")
        searches = read_searches(folder / "rows")
        size = STUDY["sizes"][name]
        sets = STUDY["sets"][size["sets"]]
        groups = groups_of(sets["train"], sets["test"])
        splits, others = (groups[f"retrieval, {part}"] for part in PARTS)
        for row in set(ROWS) & set(runs):
            asked = (runs, splits), (runs, others), (runs, sets["test"]), (searches, others)
            figures = [[group_mean(seed, tests) for seed in of.get(row, {}).values()] for of, tests in asked]
            texts = size["texts"] if row in searches else ""
            found.append(Point(row, size["core_hours"], texts, [mean(seeds) if seeds else None for seeds in figures]))
    return sorted(found, key=lambda point: ([*ROWS].index(point.row), point.hours, point.texts == ALL))


def table(points: list[Point]) -> str:
    """A line for each point."""
    lines = [f"| | hours of a core | texts | {' | '.join(COLUMNS)} |", f"| --- | --- | --- |{' --- |' * len(COLUMNS)}"]
    for row, hours, texts, figures in points:
        cells = ["" if figure is None else f"{figure:.3f}" for figure in figures]
        count = f"{texts:,}" if isinstance(texts, int) else texts
        lines.append(f"| {row} | {hours:g} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(points: list[Point], file: Path) -> None:
    """Retrieval on the other sets over the budget: on the student's own index, and dashed on the teacher's; squares
    where all texts were taken, on a line that leaves the other at the budget before."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for row, color in ROWS.items():
        some = [point for point in points if point.row == row and point.texts != ALL]
        every = [point for point in points if point.row == row and point.texts == ALL]
        left = [point for point in some if every and point.hours < every[0].hours][-1:]
        axis.plot([], [], "-", color=color, label=row)
        for column, line, face in ((1, "-", color), (3, "--", "white")):
            for marker, marked, drawn in (("o", some, some), ("s", every, left + every)):
                xs, ys = [p.hours for p in drawn], [p.figures[column] for p in drawn]
                places = [place for place, point in enumerate(drawn) if point in marked]
                axis.plot(xs, ys, f"{marker}{line}", color=color, markerfacecolor=face, markevery=places)
    for name, level in PEERS.items():
        axis.axhline(level, color="#999999", linewidth=1, linestyle=":")
        axis.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axis.plot([], [], "s-", color="black", label="on all texts")
    axis.plot([], [], "o--", color="black", markerfacecolor="white", label="queries on the teacher's index")
    axis.set_xscale("log")
    hours = sorted({point.hours for point in points})
    axis.set_xticks(hours, [f"{hour:g}" for hour in hours])
    axis.minorticks_off()
    axis.set_xlabel("hours of one core")
    axis.set_ylabel("nDCG@10, five sets never trained on")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY", help="folders that run.py wrote")
    parser.add_argument("--readme", type=Path, help="the Markdown file that shows the table")
    arguments = parser.parse_args()
    points = read_points(arguments.studies)
    draw(points, arguments.studies[0] / "curve.png")
    if arguments.readme:
        insert_table(arguments.readme, "curve", table(points))
    print(table(points))


if __name__ == "__main__":
    main()
