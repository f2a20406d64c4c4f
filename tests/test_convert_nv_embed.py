"""NV-Embed checkpoints: the original's outputs, also without this package, through fine-tuning and re-saving."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, train_tokenizer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_latent_attention_pooling import our_name
from transformers import AutoModel, MistralConfig

from st_llm_embed import LatentAttentionPooling
from st_llm_embed.cli import main
from st_llm_embed.convert import convert_nv_embed, load_nv_embed
from st_llm_embed.convert.nv_embed import LATENT_NAMES

PROMPT = "Instruct: find it\nQuery: "
LIFE = """
import sys
sys.modules["st_llm_embed"] = None
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
folder, out = sys.argv[1:]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
texts = ["a cat", "seven dogs were barking", ""]
torch.save(model.encode(texts, prompt_name="query", convert_to_tensor=True), out + ".pt")
rows = {"anchor": ["a cat", "dogs"], "positive": ["it sat", "they bark"], "negative": ["x", "y"]}
rows = Dataset.from_dict(rows)
args = SentenceTransformerTrainingArguments(out + "-steps", max_steps=2, report_to=[], learning_rate=0.01, use_cpu=1)
SentenceTransformerTrainer(model, args, rows, loss=MultipleNegativesRankingLoss(model)).train()
tuned = model.encode(texts, prompt_name="query", convert_to_tensor=True)
model.save_pretrained(out)
again = SentenceTransformer(out, trust_remote_code=True, device="cpu")
print((again.encode(texts, prompt_name="query", convert_to_tensor=True) - tuned).abs().max().item())
print((tuned - torch.load(out + ".pt")).abs().max().item())
"""


def their_name(name: str) -> str:
    for theirs, ours in sorted(LATENT_NAMES.items(), key=lambda pair: -len(pair[1])):
        if ours and name.startswith(ours):
            return "latent_attention_model." + name.replace(ours, theirs)
    prefix = "" if name == "latents" else "cross_attend_blocks.0.fn."
    return f"latent_attention_model.{prefix}{name}"


def checkpoint(folder: Path, shards: int = 1, dtype: torch.dtype = torch.float32, **latent) -> Path:
    """A random model in the layout of nvidia/NV-Embed-v2."""
    folder.mkdir()
    tokenizer = train_tokenizer(byte_level=False)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    llm = AutoModel.from_config(MistralConfig(**text, initializer_range=0.2))
    sizes = {"num_latents_value": 6, "num_cross_heads": 2, "cross_dim_head": 32, **latent}
    layer = LatentAttentionPooling(32, sizes["num_latents_value"], sizes["num_cross_heads"], sizes["cross_dim_head"])
    weights = {f"embedding_model.{k}": v for k, v in llm.state_dict().items()}
    weights |= {their_name(k): v for k, v in layer.state_dict().items()}
    weights = {k: v.to(dtype).contiguous() for k, v in weights.items()}
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        files = {k: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, k in enumerate(names)}
        for file in set(files.values()):
            save_file({k: weights[k] for k in names if files[k] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {
        "model_type": "nvembed",
        "_name_or_path": "nvidia/NV-Embed-v2",
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "hidden_size": 32,
        "padding_side": "right",
        "add_eos": True,
        "add_pad_token": True,
        "is_mask_instruction": True,
        "text_config": {**text, "model_type": "bidir_mistral", "sliding_window": 4, "rope_theta": 10000.0},
        "latent_attention_config": {"model_type": "latent_attention", **sizes},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_nvembed.py").write_text("raise RuntimeError('remote code was run')")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", ["noinstr", "instr", "trunc", "instr_nomask", "left_instr"])
def test_equals_the_original(shared, tmp_path, case):
    source = shared / "fixtures" / "nvembed_tiny"
    spec = json.loads((source / "expected.json").read_text())["cases"][case]
    stored = {k.removeprefix(f"{case}."): v for k, v in load_file(source / "expected.safetensors").items()}
    model = load_nv_embed(source)
    model.max_seq_length = spec["max_length"]
    model.tokenizer.padding_side = spec["padding_side"]
    model[1].include_prompt = not spec["is_mask_instruction"]
    prompt = spec["instruction"] or None
    features = model.preprocess(spec["texts"], prompt=prompt)
    assert torch.equal(features["input_ids"], stored["input_ids"])
    assert torch.equal(features["attention_mask"], stored["attention_mask"])
    if "instruction_mask" in features and spec["is_mask_instruction"]:
        assert torch.equal(features["attention_mask"] - features["instruction_mask"], stored["pool_mask"])
    vectors = model.encode(spec["texts"], prompt=prompt, convert_to_tensor=True)
    torch.testing.assert_close(vectors, stored["embeddings"], atol=2e-6, rtol=0)
    with torch.no_grad():
        states = model[0](features)["token_embeddings"][features["attention_mask"].bool()]
        torch.testing.assert_close(states, stored["last_hidden_state_packed"], atol=5e-5, rtol=0)
        torch.testing.assert_close(
            model[1].attend_to_latents(states), stored["latent_hidden_packed"], atol=1e-4, rtol=0
        )


@pytest.mark.slow
def test_its_life_without_this_package(tmp_path):
    """Loaded, fine-tuned by plain sentence-transformers, saved, loaded: each generation has the code it needs."""
    source = checkpoint(tmp_path / "source", shards=3)
    folder = convert_nv_embed(source, tmp_path / "converted")
    command = [sys.executable, "-c", LIFE, str(folder), str(tmp_path / "tuned")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    reloaded, learned = map(float, done.stdout.split()[-2:])
    assert reloaded < 1e-6 and learned > 1e-3
    here = SentenceTransformer(str(folder), trust_remote_code=True)
    vectors = here.encode(["a cat", "seven dogs were barking", ""], prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(torch.load(tmp_path / "tuned.pt"), vectors.cpu(), atol=1e-6, rtol=0)


def test_shards_and_precision_are_kept(tmp_path):
    one = convert_nv_embed(checkpoint(tmp_path / "a"), tmp_path / "one")
    torch.manual_seed(0)
    source = checkpoint(tmp_path / "b", shards=4, dtype=torch.float16)
    many = convert_nv_embed(source, tmp_path / "many")
    assert (one / "model.safetensors").is_file() and len(list(many.glob("model-*.safetensors"))) == 4
    assert load_file(many / "1_LatentAttentionPooling" / "model.safetensors")["latents"].dtype == torch.float16
    half = SentenceTransformer(str(many), trust_remote_code=True)
    assert half[0].model.dtype == torch.float16
    full = load_nv_embed(source, model_kwargs={"dtype": "float32"})
    assert full[0].model.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(
        half.encode(TEXTS, convert_to_tensor=True).float(), full.encode(TEXTS, convert_to_tensor=True)
    )
    assert similarity.min() > 0.999
    # Right padding, and batches do not matter.
    alone = torch.stack([full.encode(text, prompt=PROMPT, convert_to_tensor=True) for text in TEXTS])
    together = full.encode(TEXTS, prompt=PROMPT, convert_to_tensor=True)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_licence_and_the_settings_are_written_down(tmp_path, capsys):
    source = checkpoint(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "CC-BY-NC-4.0" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "base_model: nvidia/NV-Embed-v2" in card
    assert not (tmp_path / "out" / "modeling_nvembed.py").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["backbone_config"]
    assert config["model_type"] == "mistral" and config["is_causal"] is False and config["sliding_window"] is None
    model = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True)
    assert model[0].add_eos == model[0].instruction_mask == "nv-embed" and model.prompts["query"].startswith(
        "Instruct"
    )
    ids = model.preprocess(["a cat"])["input_ids"][0].tolist()
    assert ids[0] == 1 and ids[-1] == 2
    model.max_seq_length = 8
    assert model.preprocess(["a cat sat on the mat " * 9])["input_ids"][0, -1] != 2  # theirs loses EOS


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    good = checkpoint(tmp_path / "good")
    sharded = checkpoint(tmp_path / "sharded", shards=3)

    def broken(name: str, source: Path = good) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    extra, lacking, wide, other, half, pickled, escaping, sizeless = map(
        broken, "abcdefgh", [good, good, good, good, sharded, good, sharded, good]
    )
    rewrite(extra, lambda weights: weights.update({"embedding_model.rotary": torch.zeros(1), "head": torch.zeros(1)}))
    rewrite(lacking, lambda weights: weights.pop("latent_attention_model.latents"))
    rewrite(wide, lambda weights: weights.update({"latent_attention_model.latents": torch.zeros(6, 48)}))
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (sizeless / "config.json").write_text(json.dumps({"model_type": "nvembed"}))
    (half / "model-00002-of-00003.safetensors").unlink()
    (pickled / "model.safetensors").unlink()
    torch.save({"x": Path}, pickled / "pytorch_model.bin")  # a class, which a pickle may run
    index = json.loads((escaping / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../good/model.safetensors"
    (escaping / "model.safetensors.index.json").write_text(json.dumps(index))
    for source, error, message in (
        (extra, ValueError, "unknown tensors: embedding_model.rotary, head"),
        (lacking, ValueError, "missing tensors: latent_attention_model.latents"),
        (wide, ValueError, r"latents is \(6, 48\), not \(6, 32\)"),
        (other, ValueError, "holds a 'llama' model"),
        (sizeless, ValueError, "has no text_config with the LLM's sizes"),
        (half, FileNotFoundError, r"lacks \['model-00002-of-00003.safetensors'\]. Finish the download"),
        (pickled, pickle.UnpicklingError, "Weights only load failed"),
        (escaping, ValueError, "is outside of the folder"),
    ):
        with pytest.raises(error, match=message):
            convert_nv_embed(source, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert_nv_embed(good, tmp_path / "full")


def test_the_card_names_the_release_and_no_path(tmp_path):
    """The published card advises to write the folder's path into config.json."""
    source = checkpoint(tmp_path / "downloaded")
    settings = json.loads((source / "config.json").read_text())
    for path, release in ((str(source), "2"), ("./models/NV-Embed-v1", "1"), ("models/mine", "2"), (None, "2")):
        (source / "config.json").write_text(json.dumps({**settings, "_name_or_path": path}))
        card = (convert_nv_embed(source, tmp_path / f"{path}".replace("/", "_")) / "README.md").read_text()
        assert (
            f"base_model: nvidia/NV-Embed-v{release}\n" in card and str(tmp_path) not in card and "models" not in card
        )


@pytest.mark.parametrize("most", [torch.bfloat16, torch.float16])
def test_the_precision_is_that_of_most_of_the_llm(tmp_path, most):
    """Not that of whichever tensor comes first: norms and the latent layer may be in float32."""
    source = checkpoint(tmp_path / "mixed")
    weights = load_file(source / "model.safetensors")
    half = {name: t.to(most) for name, t in weights.items() if name.startswith("embedding_model") and t.ndim > 1}
    save_file({**weights, **half}, source / "model.safetensors")
    folder = convert_nv_embed(source, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["backbone_config"]["dtype"] == str(most).removeprefix(
        "torch."
    )
    assert SentenceTransformer(str(folder), trust_remote_code=True).transformers_model.dtype == most


def test_every_published_name_has_one_here():
    layer = LatentAttentionPooling(8, 3, 2)
    assert {our_name(their_name(k).removeprefix("latent_attention_model.")) for k in layer.state_dict()} == set(
        layer.state_dict()
    )
