"""What fewer dimensions and bits keep of the study's students, on its retrieval sets; and of their teacher.

    python -m examples.study.shorter --data DATA --output study --size taught --rows "mean, distilled" \\
        "mean, distilled, Matryoshka" --readme examples/study/README.md

The models are those of run.py, trained if they are not there. Each figure is the mean over the retrieval sets, as
``st-llm-embed evaluate --dims --precision`` has it; beside it what share of the whole vectors' figure that is.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from examples.study.prepare import TEACHER
from examples.study.report import insert_table
from examples.study.run import file_name, model_folder
from examples.study.study import STUDY, parser_of
from st_llm_embed.evaluation import evaluate_compressed
from st_llm_embed.evaluation.compressed_encoder import bytes_of
from st_llm_embed.files import read_json, write_json, written_beside

DIMS, PRECISIONS = (384, 192, 96), ("float32", "int8", "ubinary")
PEER = "all-MiniLM-L6-v2"


def evaluate_shorter(
    folder: Path, tests: list[Path], longest: int | None, output: Path
) -> dict[str, dict[str, float]]:
    """nDCG@10 by test, of each form ``"WIDTH PRECISION"``."""
    how = {"batch_size": 64, "dtype": "float32", "max_seq_length": longest}
    found = evaluate_compressed(folder, tests, output, dims=DIMS, precision=PRECISIONS, **how)
    return {
        f"{form.width} {form.precision}": {result.task_name: round(result.get_score(), 5) for result in results}
        for form, results in found.results.items()
    }


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line for each form, a column for each row."""
    lines = [
        f"| dimensions | precision | bytes | {' | '.join(rows)} |",
        "| ---: | --- | ---: |" + " ---: |" * len(rows),
    ]
    for form in next(iter(rows.values())):
        width, precision = form.split()
        cells = []
        for forms in rows.values():
            own, whole = (mean(forms[key].values()) for key in (form, next(iter(forms))))
            cells.append(f"{own:.3f} ({own / whole:.1%})")
        lines.append(f"| {width} | {precision} | {bytes_of(int(width), precision):,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Evaluate what is missing, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", nargs="+", required=True, choices=[PEER, *STUDY["rows"]], metavar="ROW")
    parser.add_argument("--readme", type=Path, help='the Markdown file that shows the table, at the mark "shorter"')
    arguments = parser.parse_args()
    size = STUDY["sizes"][arguments.size]
    tests = [arguments.output / "data" / "test" / test for test in STUDY["sets"][size["sets"]]["test"]]
    tests = [test for test in tests if (test / "qrels").is_dir()]
    rows = {}
    for name in arguments.rows:
        file = arguments.output / "shorter" / f"{file_name(name)}.json"
        if not file.is_file():
            folder = TEACHER if name == PEER else model_folder(name, 0, arguments)
            longest = None if name == PEER else size.get("test_max_seq_length")
            figures = evaluate_shorter(folder, tests, longest, arguments.output / "results")
            with written_beside(file) as staged:
                write_json(staged, figures)
        rows[name] = read_json(file)
    if arguments.readme:
        insert_table(arguments.readme, "shorter", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
