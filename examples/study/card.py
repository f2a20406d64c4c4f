"""One row's model, sealed, with a card that shows the study's table: after run.py and report.py.

    python -m examples.study.card --data ../shared/data --output study --size cpu-long --row "reversed, longer, pairs"

Writes ``OUTPUT/published``, which ``st-llm-embed publish`` takes as it is.
"""

from __future__ import annotations

from huggingface_hub import metadata_load, metadata_save

from examples.demo.llm import BUNDLED_ID
from examples.study.run import model_folder
from examples.study.study import STUDY, parser_of
from st_llm_embed.hub import save_sealed
from st_llm_embed.trust import load_trusted

GENERAL = "wikiqa"  # the training set whose instruction suits most questions
SECTION = """## Results

The row "{row}" of st-llm-embed's study (`examples/study`, size `{size}`): nDCG@10, Spearman's rank correlation
and accuracy on samples of test splits, and of other sets nothing of which was trained on; {tests[queries]} queries and
{tests[documents]} documents beside the relevant ones for each retrieval set.

{table}
## Limits

{llm}, trained briefly, in English. Some of its training sets are licensed for research only (WikiQA) or not for
commerce (SICK), hence its licence."""


def main() -> None:
    """Write the folder."""
    parser = parser_of(__doc__)
    parser.add_argument("--row", required=True, help="of study.yaml")
    arguments = parser.parse_args()
    size = STUDY["sizes"][arguments.size]
    report = (arguments.output / "report.md").read_text(encoding="utf-8")
    section = SECTION.format(
        row=arguments.row,
        size=arguments.size,
        tests=size["tests"],
        table=report.partition("\n\n")[2].replace("## ", "### "),
        llm=f"The LLM's first {size['layers']} layers only" if size["layers"] else "The whole LLM",
    )
    model = load_trusted(model_folder(arguments.row, 0, arguments))
    model.max_seq_length = size.get("test_max_seq_length", size["max_seq_length"])
    model.prompts["query"] = model.prompts[GENERAL]
    model.model_card_data.base_model = BUNDLED_ID
    model.model_card_data.language = ["en"]
    model.model_card_data.set_license("cc-by-nc-4.0")
    folder = save_sealed(model, arguments.output / "published", section)
    card = folder / "README.md"
    # The host's part tells of the last stage only.
    ours, _, _ = card.read_text(encoding="utf-8").partition("## Model Details")
    card.write_text(ours.rstrip() + "\n", encoding="utf-8")
    metadata_save(card, {**metadata_load(card), "base_model": BUNDLED_ID})


if __name__ == "__main__":
    main()
