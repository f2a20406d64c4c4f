"""One row's model, sealed, with a card that shows the study's table: after run.py and report.py.

    python examples/study/card.py --data ../shared/data --output study --size cpu-long --row "reversed, longer"

Writes ``OUTPUT/published``, which ``st-llm-embed publish`` takes as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from huggingface_hub import metadata_load, metadata_save
from run import model_folder

from st_llm_embed.demo import BUNDLED_ID
from st_llm_embed.hub import load_trusted, save_sealed

ABOUT = {"base_model": BUNDLED_ID, "language": ["en"]}
SECTION = """## Results

The row "{row}" of st-llm-embed's study (`examples/study`, size `{size}`): nDCG@10, Spearman's rank correlation
and accuracy on samples of test splits, and of other sets nothing of which was trained on; {tests[queries]} queries and
{tests[documents]} documents beside the relevant ones for each retrieval set.

{table}
## Limits

The LLM's first {layers} layers only, trained on two CPU cores, in English. Some of its training sets are licensed for
research only (WikiQA) or not for commerce (SICK), hence its licence."""


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--size", required=True, help="of study.yaml")
    parser.add_argument("--row", required=True, help="of study.yaml")
    arguments = parser.parse_args()
    study = yaml.safe_load(Path(__file__).with_name("study.yaml").read_text(encoding="utf-8"))
    size = study["sizes"][arguments.size]
    report = (arguments.output / "report.md").read_text(encoding="utf-8")
    section = SECTION.format(
        row=arguments.row,
        size=arguments.size,
        tests=size["tests"],
        table=report.partition("\n\n")[2].replace("## ", "### "),
        layers=size["layers"],
    )
    model = load_trusted(model_folder(arguments.row, 0, study, arguments))
    model.model_card_data.base_model = BUNDLED_ID
    model.model_card_data.set_license("cc-by-nc-4.0")
    folder = save_sealed(model, arguments.output / "published", section)
    card = folder / "README.md"
    # The host's part is the last stage's: it knows nothing of ABOUT, and shows rows of data that are not ours to show.
    ours, _, _ = card.read_text(encoding="utf-8").partition("## Model Details")
    card.write_text(ours.rstrip() + "\n", encoding="utf-8")
    about = metadata_load(card)
    del about["widget"]
    metadata_save(card, {**about, **ABOUT})


if __name__ == "__main__":
    main()
