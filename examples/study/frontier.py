"""What an index and an encoder cost: nDCG@10 against bytes a document, and against documents encoded a second.

    python -m examples.study.frontier --data DATA --output study --size taught --rows "mean, distilled" \
        "late interaction" --readme examples/study/README.md

Takes the rows that run.py wrote, their models, and the shorter forms of those that shorter.py evaluated. The rates are
measured here, of all models in turns on the same documents, so that they compare with one another and with nothing
else: run it on an idle machine. Figures are means over the retrieval sets. Writes ``frontier.png`` into the study's
folder; the table is at the mark "frontier".
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from matplotlib.figure import Figure
from sentence_transformers.base import BaseModel

from examples.study.prepare import TEACHER
from examples.study.report import insert_table
from examples.study.run import file_name, model_folder
from examples.study.shorter import PEER
from examples.study.study import STUDY, parser_of
from st_llm_embed.data import load_corpus
from st_llm_embed.evaluation.compressed_encoder import bytes_of
from st_llm_embed.files import read_json
from st_llm_embed.trust import load_any

DOCUMENTS, TURNS = 300, 3
COLORS = ("#3b6fb6", "#c8642a", "#4d9a57", "#8a5aa8", "#999999", "#b0a030", "#d07a9a")


class Form(NamedTuple):
    """One way to keep a row's vectors.

    Args:
        row: the row.
        bytes: the bytes of a document in the index.
        figure: nDCG@10, the mean over the retrieval sets.
    """

    row: str
    bytes: int
    figure: float


def read_forms(row: str, output: Path, tests: list[str]) -> list[Form]:
    """The forms of a row; the whole vectors first, those of several vectors or of sparse ones alone."""
    shorter = output / "shorter" / f"{file_name(row)}.json"
    if shorter.is_file():
        forms = []
        for form, scores in read_json(shorter).items():
            width, precision = form.split()
            forms.append(Form(row, bytes_of(int(width), precision), mean(scores[test] for test in tests)))
        return forms
    content = read_json(output / "rows" / f"{file_name(row)}-0.json")
    figure = mean(content["scores"][test] for test in tests)
    return [Form(row, content["bytes_a_document"], figure)]


def measure(models: dict[str, BaseModel], texts: list[str]) -> dict[str, float]:
    """Documents a second, the median over the turns."""
    seconds: dict[str, list[float]] = {row: [] for row in models}
    for model in models.values():
        model.encode_document(texts[:32])
    for _ in range(TURNS):
        for row, model in models.items():
            start = time.perf_counter()
            model.encode_document(texts, batch_size=32)
            seconds[row].append(time.perf_counter() - start)
    return {row: len(texts) / median(seconds[row]) for row in models}


def table(forms: list[Form], rates: dict[str, float]) -> str:
    """A line for the whole vectors of each row."""
    lines = ["| | bytes a document | nDCG@10, retrieval | documents a second |", "| --- | ---: | ---: | ---: |"]
    whole = {form.row: form for form in reversed(forms)}
    for row in rates:
        lines.append(f"| {row} | {whole[row].bytes:,} | {whole[row].figure:.3f} | {rates[row]:.1f} |")
    return "\n".join(lines) + "\n"


def draw(forms: list[Form], rates: dict[str, float], file: Path) -> None:
    """Both pictures, side by side; on the left all forms of each row, and the frontier in grey."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_bytes, by_rate = figure.subplots(1, 2, sharey=True)
    best: list[Form] = []
    for form in sorted(forms, key=lambda form: (form.bytes, -form.figure)):
        if not best or form.figure > best[-1].figure:
            best.append(form)
    by_bytes.step([f.bytes for f in best], [f.figure for f in best], where="post", color="#cccccc", linewidth=4)
    for (row, rate), color in zip(rates.items(), COLORS, strict=False):
        own = sorted((form for form in forms if form.row == row), key=lambda form: form.bytes)
        by_bytes.plot([f.bytes for f in own], [f.figure for f in own], "o", color=color, label=row)
        by_rate.plot([rate], [next(form.figure for form in forms if form.row == row)], "o", color=color)
    by_bytes.set_xscale("log")
    by_rate.set_xlim(left=0)
    for axis, label in ((by_bytes, "bytes a document"), (by_rate, "documents a second")):
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    by_bytes.set_ylabel("nDCG@10, retrieval")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure the rates, write the table and the pictures."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", nargs="+", required=True, choices=[PEER, *STUDY["rows"]], metavar="ROW")
    parser.add_argument("--readme", type=Path, help='the Markdown file that shows the table, at the mark "frontier"')
    arguments = parser.parse_args()
    size, sets = STUDY["sizes"][arguments.size], STUDY["sets"][STUDY["sizes"][arguments.size]["sets"]]
    places = {test: arguments.output / "data" / "test" / test for test in sets["test"]}
    tests = [test for test, place in places.items() if (place / "qrels").is_dir()]
    texts = [text for test in tests for text in load_corpus(str(places[test]))["text"][: DOCUMENTS // len(tests)]]
    models = {row: load_any(TEACHER if row == PEER else model_folder(row, 0, arguments)) for row in arguments.rows}
    for model in models.values():
        model.max_seq_length = min(size.get("test_max_seq_length") or model.max_seq_length, model.max_seq_length)
    rates = measure(models, texts)
    forms = [form for row in arguments.rows for form in read_forms(row, arguments.output, tests)]
    draw(forms, rates, arguments.output / "frontier.png")
    if arguments.readme:
        insert_table(arguments.readme, "frontier", table(forms, rates))
    print(table(forms, rates))


if __name__ == "__main__":
    main()
