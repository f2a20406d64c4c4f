"""The causal LM that comes out predicts with the adapted weights, and is in everything else the one that went in."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXTS, save_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.hub import save_sealed
from st_llm_embed.weights.export import export_causal_lm


def adapted(llm: str, recipe: str = "llara", **kwargs):
    """A model whose trained weights, an adapter's where there is one, have moved."""
    model = build_model(llm, recipe, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.parametrize("recipe", ["llara", "llara-release"])
@pytest.mark.parametrize("how", [{}, {"lora": True}, {"num_layers": 1}], ids=["full", "lora", "cut"])
def test_the_same_hidden_states_and_the_bases_tokenizer(llm, tmp_path, recipe, how):
    model = adapted(llm, recipe, **how)
    folder = export_causal_lm(model, llm, tmp_path / "lm")
    lm, base = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(llm)
    tokenizer, before = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(llm)
    for text in filter(None, TEXTS):
        assert tokenizer(text)["input_ids"] == before(text)["input_ids"]  # no EOS, which would end a generation
    ids = tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.eval()[0]({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["token_embeddings"]
        logits = states @ model[0].model.get_input_embeddings().weight.T
        torch.testing.assert_close(lm(ids).logits, logits, atol=1e-4, rtol=1e-4)
        assert (lm(ids).logits[..., : base.config.vocab_size] - base(ids).logits).abs().max() > 1e-2
    if recipe == "llara-release":
        assert tokenizer.convert_tokens_to_ids("<s16>") == model.tokenizer.convert_tokens_to_ids("<s16>")
    again = build_model(folder, recipe)  # to be adapted further
    assert again[0].model.get_input_embeddings().num_embeddings == len(model[0].model.get_input_embeddings().weight)


def test_a_head_of_its_own(tmp_path):
    base = save_llm(tmp_path / "base", tie_word_embeddings=False)
    model = adapted(base, "llara-release")
    before = AutoModelForCausalLM.from_pretrained(base).get_output_embeddings()
    kept = AutoModelForCausalLM.from_pretrained(export_causal_lm(model, base, tmp_path / "kept"))
    rows = len(before.weight)
    torch.testing.assert_close(kept.get_output_embeddings().weight[:rows], before.weight)
    with torch.no_grad():
        before.weight.add_(1)
    trained = AutoModelForCausalLM.from_pretrained(export_causal_lm(model, base, tmp_path / "trained", before))
    torch.testing.assert_close(trained.get_output_embeddings().weight[:rows], before.weight)


def test_what_makes_no_sense_is_refused(llm, tmp_path, capsys):
    model = build_model(llm, "llara")
    other = save_llm(tmp_path / "other", hidden_size=64)
    head = AutoModelForCausalLM.from_pretrained(llm).get_output_embeddings()
    for arguments, message in (
        ((build_model(llm, "mean"), llm, tmp_path / "lm"), "attends in the mode 'bidirectional'"),
        ((model, other, tmp_path / "lm"), "is not the LLM that the model was built from"),
        ((model, llm, tmp_path / "lm", head), "leave out lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            export_causal_lm(*arguments)
    assert not (tmp_path / "lm").exists()
    model.save_pretrained(str(tmp_path / "model"))
    assert main(["export", str(tmp_path / "model"), llm, str(tmp_path / "lm")]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "model"), llm, str(tmp_path / "lm")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_merge_from_the_shell(llm, tmp_path, capsys):
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    save_sealed(adapted(llm, "llara-release", lora=True), adapter)
    assert main(["merge", adapter, merged]) == 0  # its base brings no code
    assert main(["check", merged, "--against", adapter]) == 0
    assert main(["merge", merged, str(tmp_path / "again")]) == 2
    assert "The model has no adapter to merge" in capsys.readouterr().err
