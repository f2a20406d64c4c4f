"""The table of architectures: what its README says is what this transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import MODEL_MAPPING, AutoModel

from examples.architectures.survey import (
    IMPLEMENTATIONS,
    _joint_equals_separate,
    as_markdown,
    decoder_types,
    examine,
    survey,
    tiny_config,
)
from examples.architectures.survey import main as run_survey
from st_llm_embed.losses.joint_prompts import check_llm
from st_llm_embed.modules.attention_mode import set_attention_mode

README = (Path(__file__).parents[1] / "examples" / "architectures" / "README.md").read_text()


@pytest.mark.slow
def test_no_decoder_is_causal_by_accident_and_the_readme_says_so():
    findings = survey(decoder_types())
    modes = [finding.mode for by_implementation in findings.values() for finding in by_implementation.values()]
    assert set(modes) <= {"config", "mask", "refused", "absent"}  # nothing failed, nothing was bidirectional in name
    for implementation in IMPLEMENTATIONS:
        column = [by_implementation[implementation] for by_implementation in findings.values()]
        bidirectional = [finding for finding in column if finding.mode in ("config", "mask")]
        assert len(bidirectional) >= {"sdpa": 85, "eager": 98}[implementation]  # of the lowest transformers
        # All but those that count positions by themselves, and the three whose convolutions run through both prompts.
        assert sum(not finding.joint for finding in bidirectional) <= 5
    if transformers.__version__ in README and torch.__version__.startswith("2.13"):
        table = as_markdown(findings)
        assert table.split("\n", 2)[2].strip() in README


@pytest.mark.slow
def test_llms_whose_two_prompts_cannot_share_a_row_are_refused():
    """Of all that attend causally, those whose joint row is measured to differ from its parts, and no others."""
    refused = set()
    for name in decoder_types():
        for implementation in IMPLEMENTATIONS:
            torch.manual_seed(0)
            try:
                model = AutoModel.from_config(tiny_config(name), attn_implementation=implementation).eval()
                set_attention_mode(model, "causal", "keep")
            except ValueError:  # it has no such attention, or is no causal LLM that can be proven
                continue
            try:
                check_llm(model)
            except ValueError:
                refused.add(name)
            assert (name not in refused) == _joint_equals_separate(model), (name, implementation)
    assert {"jamba", "qwen3_next", "mamba", "bloom", "gpt_neo"} <= refused and "llama" not in refused


def test_the_measurement_notices_a_model_that_is_causal_in_fact(monkeypatch):
    """Were ``set_attention_mode`` to do nothing, the table would not say ``config``."""
    monkeypatch.setattr("examples.architectures.survey.set_attention_mode", lambda model, *args, **kwargs: None)
    assert examine("llama", "sdpa").mode == "failed"


def test_the_command_measures_what_it_is_asked(tmp_path, capsys):
    run_survey(["llama", "gpt_neo", "--output", str(tmp_path / "table.md")])
    printed = capsys.readouterr().out
    assert "| config | config | yes | llama |" in printed and "| – | refused | no | gpt_neo (" in printed
    assert (tmp_path / "table.md").read_text() == printed.removesuffix("\n")
    with pytest.raises(ValueError, match=r"Unknown model types \['lama'\]"):
        run_survey(["lama"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["llama", "bloom", "gptj"])  # gptj has sdpa from transformers 5.24 on
def test_an_implementation_that_does_not_exist_is_absent(name, implementation):
    exists = implementation == "eager" or MODEL_MAPPING[type(tiny_config(name))]._supports_sdpa
    assert (examine(name, implementation).mode != "absent") == exists
    assert exists or name != "llama"
