"""Averaged checkpoints: the formula, tensor by tensor, in folders that load."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import save_llm
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.weights.averaging import average_checkpoints


@pytest.fixture
def checkpoints(llm, tmp_path):
    folders = []
    for i in range(3):
        torch.manual_seed(i)
        model = build_model(llm, "nv-embed", num_latents=4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"checkpoint-{i}")
        (tmp_path / f"checkpoint-{i}" / "optimizer.pt").touch()
        folders.append(tmp_path / f"checkpoint-{i}")
    return folders


def weights(folder) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 2  # the LLM's and the pooling's
    return {
        f"{file.parent.name}/{k}" if file.parent != folder else k: v
        for file in files
        for k, v in load_file(file).items()
    }


def test_the_mean_is_the_mean_and_loads(checkpoints, tmp_path):
    out = average_checkpoints(checkpoints, tmp_path / "mean", weights=[1, 1, 2])
    assert not (out / "optimizer.pt").exists()
    sources = [weights(folder) for folder in checkpoints]
    for name, tensor in weights(out).items():
        expected = (sources[0][name] + sources[1][name] + 2 * sources[2][name]) / 4
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
    model = SentenceTransformer(str(out), trust_remote_code=True)
    vectors = [SentenceTransformer(str(f), trust_remote_code=True).encode("a cat") for f in [*checkpoints, out]]
    assert all(abs(vectors[3] - other).max() > 1e-3 for other in vectors[:3])
    assert model.encode("a cat").shape == (32,)


def test_the_base_is_one_more_checkpoint_of_the_llm_alone(checkpoints, llm, tmp_path):
    """Pooling stays that of the first; a cut model takes the base's first layers; another LLM is none."""
    sources = [weights(folder) for folder in checkpoints[:2]]
    plain = {name: tensor for name, tensor in AutoModel.from_pretrained(llm).state_dict().items()}
    out = weights(average_checkpoints(checkpoints[:2], tmp_path / "mean", weights=[1, 1, 2], base=llm))
    assert plain.keys() < out.keys() == sources[0].keys()
    for name, tensor in out.items():
        expected = (sources[0][name] + sources[1][name] + 2 * plain.get(name, sources[0][name])) / 4
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
    build_model(llm, "nv-embed", num_latents=4, num_layers=1).save_pretrained(tmp_path / "cut")
    same = weights(average_checkpoints([tmp_path / "cut"], tmp_path / "half", base=llm))
    for name, tensor in weights(tmp_path / "cut").items():
        torch.testing.assert_close(same[name], tensor)
    with pytest.raises(ValueError, match=r"differ in the tensors embed_tokens\.weight"):
        other = save_llm(tmp_path / "other", hidden_size=64)
        average_checkpoints(checkpoints[:1], tmp_path / "none", base=other)
    with pytest.raises(ValueError, match="two checkpoints or more, got 1. Give another, or a base"):
        average_checkpoints(checkpoints[:1], tmp_path / "none")
    with pytest.raises(ValueError, match=r"weights=\[1\] must be 2 positive numbers"):
        average_checkpoints(checkpoints[:1], tmp_path / "none", weights=[1], base=llm)
    assert not (tmp_path / "none").exists()


def test_slerp_walks_the_great_circle(checkpoints, tmp_path):
    out = weights(average_checkpoints(checkpoints[:2], tmp_path / "two", "slerp", weights=[3, 1]))
    first, second = weights(checkpoints[0]), weights(checkpoints[1])
    for name, tensor in out.items():
        a, b = first[name].double(), second[name].double()
        angle = math.acos((a * b).sum() / (a.norm() * b.norm()))
        expected = (math.sin(0.75 * angle) * a + math.sin(0.25 * angle) * b) / math.sin(angle)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-5, rtol=1e-5)
    same = average_checkpoints([checkpoints[0]] * 3, tmp_path / "same", "slerp")
    for name, tensor in weights(same).items():
        torch.testing.assert_close(tensor, first[name])


def test_the_command_writes_the_same(checkpoints, tmp_path, capsys):
    folders = [str(folder) for folder in checkpoints[:2]]
    assert main(["average", *folders, "--output", str(tmp_path / "out"), "--method", "slerp"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    expected = weights(average_checkpoints(folders, tmp_path / "again", "slerp"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "out").items())


def test_models_that_are_not_one_are_refused(checkpoints, tmp_path):
    def changed(name, change):
        folder = tmp_path / name
        shutil.copytree(checkpoints[1], folder)
        change(folder)
        return folder

    def other_config(folder):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))

    def other_tensor(folder):
        file = folder / "model.safetensors"
        save_file({**load_file(file), "norm.weight": torch.zeros(3)}, file)

    def fewer_files(folder):
        next(folder.glob("1_*/model.safetensors")).unlink()

    for i, (change, message) in enumerate(
        (
            (other_config, "differ in config.json: they are not checkpoints of one model"),
            (other_tensor, r"differ in the tensors norm\.weight"),
            (fewer_files, "has the weights"),
            (lambda folder: (folder / "adapter_config.json").write_text("{}"), "Merge each into its LLM first"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            average_checkpoints([checkpoints[0], changed(f"changed-{i}", change)], tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    with pytest.raises(FileNotFoundError, match="it has no modules.json"):
        bare = changed("bare", lambda folder: (folder / "modules.json").unlink())
        average_checkpoints([checkpoints[0], bare], tmp_path / "out")
    with pytest.raises(ValueError, match="two checkpoints or more, got 1"):
        average_checkpoints(checkpoints[:1], tmp_path / "out")
    with pytest.raises(ValueError, match="method='mean' is unknown. Valid methods: equal, slerp"):
        average_checkpoints(checkpoints, tmp_path / "out", "mean")
    with pytest.raises(ValueError, match="must be 3 positive numbers"):
        average_checkpoints(checkpoints, tmp_path / "out", weights=[1, 0, 1])
    for wrong in (math.nan, math.inf, -1):
        with pytest.raises(ValueError, match="must be 3 positive numbers"):
            average_checkpoints(checkpoints, tmp_path / "out", weights=[1, wrong, 1])
