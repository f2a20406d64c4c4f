"""The study's tables and pictures, from the figures that run.py left.

    python -m examples.study.report --output study-cpu

Writes ``report.md``, ``groups.png`` and ``differences.png`` into the folder of the study; with ``--readme``, the first
table into a README too. A row's figure is the mean
over its seeds, with their standard deviation. Its difference from another row (the first, or that which ``study.yaml``
says) is taken test by test, over the seeds that both have; its 95 % interval is a bootstrap over the test sets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from examples.study.study import STUDY
from st_llm_embed.tasks import known_task

RESAMPLES = 10_000
PARTS = ("test splits", "other sets")  # of the retrieval sets

Scores = dict[str, float]  # by test set
Runs = dict[str, dict[int, Scores]]  # by row and seed


def read_runs(folder: Path) -> tuple[Runs, str]:
    """The figures that are there, and the size that they are of.

    Raises:
        FileNotFoundError: if no row has been run.
    """
    runs: Runs = {}
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} has no figures: run.py writes them, row by row.")
    for file in files:
        row = json.loads(file.read_text(encoding="utf-8"))
        runs.setdefault(row["row"], {})[row["seed"]] = row["scores"]
    return runs, row["size"]


def groups_of(train: Mapping[str, list[str]], test: list[str]) -> dict[str, list[str]]:
    """The test sets of each column, retrieval first."""
    trained = {name for names in train.values() for name in names}
    groups: dict[str, list[str]] = {f"retrieval, {where}": [] for where in PARTS}
    for name in test:
        kind = known_task(name).kind
        where = PARTS[0] if name in trained else PARTS[1]
        groups.setdefault(f"{kind}, {where}" if kind == "retrieval" else kind, []).append(name)
    return groups


def group_mean(scores: Scores, names: list[str]) -> float | None:
    """None if the row was not tested on all."""
    return mean(scores[name] for name in names) if set(names) <= set(scores) else None


def cell(values: list[float | None]) -> str:
    if None in values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def common_tests(runs: Runs, row: str, base: str) -> list[str]:
    """The tests that both rows have in all their seeds."""
    scores = [*runs[row].values(), *runs[base].values()]
    return sorted(set.intersection(*map(set, scores)))


def difference(runs: Runs, row: str, base: str) -> tuple[float, float, float] | None:
    """Mean over the tests that both have, and the ends of its 95 % interval. None while they have not been run on the
    same seeds."""
    seeds = sorted(set(runs[row]) & set(runs.get(base, {})))
    if row == base or not seeds:
        return None
    tests = common_tests(runs, row, base)
    gained = np.array([mean(runs[row][seed][test] - runs[base][seed][test] for seed in seeds) for test in tests])
    resampled = np.random.default_rng(0).choice(gained, (RESAMPLES, len(gained))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(gained.mean()), float(low), float(high)


def read_searches(folder: Path) -> Runs:
    """What the students' queries find in the teacher's index, of the rows that have one."""
    found: Runs = {}
    for file in sorted(folder.glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        if scores := row.get("on_the_teachers_index"):
            found.setdefault(row["row"], {})[row["seed"]] = scores
    return found


def table(runs: Runs, groups: Mapping[str, list[str]], bases: Mapping[str, str], searches: Runs) -> str:
    """Every row's mean of each group, and its difference from its base; where there are students of a teacher, what
    their queries find in its index."""
    first = next(iter(bases.values()))
    columns = [*groups.values(), [name for names in groups.values() for name in names]]
    asked = {f"its queries on the teacher's index, {name}": groups[f"retrieval, {name}"] for name in PARTS}
    asked = asked if searches else {}
    lines = [
        f"| | seeds | {' | '.join([*groups, 'all', *asked, f'against {first}'])} |",
        f"| --- | --- |{' --- |' * (len(groups) + len(asked) + 2)}",
    ]
    for row, seeds in runs.items():
        figures = [cell([group_mean(scores, names) for scores in seeds.values()]) for names in columns]
        for names in asked.values():
            found = searches.get(row, {}).values()
            figures.append(cell([group_mean(scores, names) for scores in found]) if found else "")
        gained = difference(runs, row, bases[row])
        against = f"{gained[0]:+.3f} [{gained[1]:+.3f}, {gained[2]:+.3f}]" if gained else ""
        if gained and len(tests := common_tests(runs, row, bases[row])) < len(columns[-1]):
            against += f" over {len(tests)} sets"
        if gained and bases[row] != first:
            against += f" (against {bases[row]})"
        lines.append(f"| {row} | {len(seeds)} | {' | '.join(figures)} | {against} |")
    return "\n".join(lines) + "\n"


def details(runs: Runs, tests: list[str]) -> str:
    """Every row's figure on each test set."""
    lines = [f"| | {' | '.join(tests)} |", f"| --- |{' --- |' * len(tests)}"]
    for row, seeds in runs.items():
        figures = [cell([scores.get(test) for scores in seeds.values()]) for test in tests]
        lines.append(f"| {row} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def draw_groups(runs: Runs, groups: Mapping[str, list[str]], bases: Mapping[str, str], file: Path) -> None:
    """A panel for each group, a bar for each row, the seeds' standard deviation on it."""
    figure = Figure(figsize=(2.6 * len(groups) + 2, 0.32 * len(runs) + 1.2), layout="constrained")
    for axis, (name, tests) in zip(figure.subplots(1, len(groups), sharey=True), groups.items(), strict=True):
        for place, (row, seeds) in enumerate(runs.items()):
            values = [group_mean(scores, tests) for scores in seeds.values()]
            if None in values:
                continue
            spread = stdev(values) if len(values) > 1 else None
            axis.barh(place, mean(values), xerr=spread, color="#3b6fb6" if row in bases.values() else "#9db7d9")
        axis.set_title(name.replace(", ", "\n"), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_yticks(range(len(runs)), list(runs))
    figure.axes[0].margins(y=0.01)
    figure.axes[0].invert_yaxis()
    figure.savefig(file, dpi=120)


def draw_differences(runs: Runs, bases: Mapping[str, str], file: Path) -> None:
    """Each trained row against its base, with its interval."""
    first = next(iter(bases.values()))
    found = {}
    for row, base in bases.items():
        if gained := difference(runs, row, base):
            found[row if base == first else f"{row}\nagainst {base}"] = gained
    figure = Figure(figsize=(7.5, 0.36 * len(found) + 1.2), layout="constrained")
    axis = figure.subplots()
    for place, (middle, low, high) in enumerate(found.values()):
        axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="#3b6fb6", capsize=3)
    axis.axvline(0, color="#999999", linewidth=1)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(f"difference from {first}, mean over the test sets, 95 % interval")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def summarize(folder: Path) -> tuple[str, str]:
    """The two tables of a study: each group's means, and every test set.

    Args:
        folder: the study's, with the figures that run.py left in ``rows``.
    """
    runs, groups, bases, tests = read_study(folder)
    return table(runs, groups, bases, read_searches(folder / "rows")), details(runs, tests)


def read_study(folder: Path) -> tuple[Runs, dict[str, list[str]], dict[str, str], list[str]]:
    """The figures of a study, its groups of tests, the row that each is compared with, and all tests."""
    runs, size = read_runs(folder / "rows")
    runs = {row: runs[row] for row in [*STUDY["peers"], *STUDY["rows"]] if row in runs}
    first = next(row for row in STUDY["rows"] if row in runs)
    bases = {row: STUDY["rows"].get(row, {}).get("against", first) for row in runs}
    sets = STUDY["sets"][STUDY["sizes"][size]["sets"]]
    return runs, groups_of(sets["train"], sets["test"]), bases, sets["test"]


def insert_table(file: Path, name: str, text: str) -> None:
    """Put a table between the marks ``<!-- table: NAME -->`` and ``<!-- end -->`` of a Markdown file."""
    before, mark, rest = file.read_text(encoding="utf-8").partition(f"<!-- table: {name} -->\n")
    if not mark:
        raise ValueError(f"{file} has no mark '<!-- table: {name} -->' for the table.")
    _, end, after = rest.partition("<!-- end -->")
    file.write_text(f"{before}{mark}{text}{end}{after}", encoding="utf-8")


def main() -> None:
    """Write the tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder of the study")
    parser.add_argument(
        "--readme", type=Path, help="the Markdown file that shows the table, at the mark of its folder"
    )
    arguments = parser.parse_args()
    runs, groups, bases, tests = read_study(arguments.output)
    summary, every = summarize(arguments.output)
    text = f"# The study\n\n{summary}\n## Every test set\n\n{every}"
    (arguments.output / "report.md").write_text(text, encoding="utf-8")
    if arguments.readme:
        insert_table(arguments.readme, arguments.output.name, summary)
    trained = {row: bases[row] for row in runs if STUDY["rows"].get(row, {"stages": []}).get("stages") != []}
    draw_groups(runs, groups, bases, arguments.output / "groups.png")
    draw_differences(runs, trained, arguments.output / "differences.png")
    print(summary)


if __name__ == "__main__":
    main()
