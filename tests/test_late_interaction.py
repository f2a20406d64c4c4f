"""Models of several vectors: the loss against naive loops and the host, training, sealing, evaluation, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from test_evaluation import lines, make_retrieval, text
from test_instruction_contrastive_loss import naive
from test_stages import DDP, run

from st_llm_embed import (
    InstructionContrastiveLoss,
    LLMBackbone,
    LLMEmbedTrainer,
    LLMEmbedTrainingArguments,
    Task,
    build_model,
)
from st_llm_embed.cli import main
from st_llm_embed.evaluation import evaluate, evaluate_compressed, parity
from st_llm_embed.files import read_json, write_json
from st_llm_embed.hub import check, save_sealed
from st_llm_embed.hub.engine_keys import engines
from st_llm_embed.losses import DistillationLoss, LateInteractionLoss
from st_llm_embed.losses.distillation import Supervision
from st_llm_embed.losses.row_labels import NONE
from st_llm_embed.training import train_stages
from st_llm_embed.trust import load_any, load_trusted
from st_llm_embed.weights.averaging import average_checkpoints
from st_llm_embed.weights.merging import merge_adapter

FIND = Task("find", "Find what answers the question", in_batch_negatives=True)
ALIKE = Task("alike", "Find what means the same", "sts")


@pytest.fixture
def model(llm):
    torch.manual_seed(0)
    return build_model(llm, "multi-vector", token_dim=8, max_seq_length=48).eval()


@pytest.fixture(scope="module")
def sealed(llm, tmp_path_factory):
    """A model under the prompts of a task, published."""
    torch.manual_seed(1)
    model = build_model(llm, "multi-vector", token_dim=8, skiplist_words=["."], max_seq_length=48)
    model.prompts = {"query": "ask: ", "document": ""}
    return save_sealed(model, tmp_path_factory.mktemp("several") / "sealed")


def rows(negatives: int = 0, count: int = 12, seed: int = 0) -> Dataset:
    columns = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(negatives))]
    return Dataset.from_list(
        [{column: text(seed, i, place) for place, column in enumerate(columns)} for i in range(count)]
    )


def arguments(tmp_path, **changes) -> LLMEmbedTrainingArguments:
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "use_cpu": True, "report_to": [], "logging_steps": 1}
    return LLMEmbedTrainingArguments(str(tmp_path / "run"), **{**settings, **changes})


def max_sim(query: torch.Tensor, document: torch.Tensor) -> float:
    """The score as in words: each token's best match, and their mean."""
    best = [max(float(token @ other) for other in document) for token in query]
    return sum(best) / len(best)


def draw(columns: int, count: int = 5) -> list[torch.Tensor]:
    """Vectors of length 1 with marks of those that count, some of which do not."""
    drawn = []
    for place in range(columns):
        vectors = F.normalize(torch.randn(count, 3 + place, 6, dtype=torch.float64), dim=-1)
        marks = torch.rand(count, 3 + place, 1) < 0.7
        marks[:, 0] = True
        drawn.append(torch.cat([vectors, marks.double()], dim=-1).requires_grad_())
    return drawn


def tokens(packed: torch.Tensor) -> torch.Tensor:
    return packed[packed[:, -1] == 1, :-1].detach()


def test_the_recipe_is_the_hosts_modules(model):
    assert type(model) is MultiVectorEncoder and model.similarity_fn_name == "meanmaxsim"
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["LLMBackbone", "Dense", "MultiVectorMask", "Normalize"] and model[0].attention == "bidirectional"
    query, document = model.encode_query("a cat sat"), model.encode_document(["a cat", "seven dogs barking at"])
    assert query.shape[1] == 8 and torch.allclose(query.norm(dim=1), torch.ones(len(query)))
    expected = [[max_sim(query, one) for one in document]]
    np.testing.assert_allclose(model.similarity([query], document), expected, atol=1e-6)


def test_skipped_words_of_documents_have_no_vector(llm):
    whole, skips = (build_model(llm, "multi-vector", skiplist_words=words) for words in ([], ["."]))
    sizes = {(side, kind): len(getattr(one, f"encode_{side}")("a cat. seven dogs."))
             for side in ("query", "document") for kind, one in (("whole", whole), ("skips", skips))}  # fmt: skip
    assert sizes["query", "whole"] == sizes["query", "skips"] == sizes["document", "whole"]
    assert sizes["document", "skips"] == sizes["document", "whole"] - 2


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("margin", [None, 0.9])
def test_the_loss_equals_the_naive_loop(model, in_batch, margin):
    """Groups, classes, missing texts and margins as for one vector: that loop, with another score."""
    embeddings = draw(4)
    group, label = [0, 0, 1, 1, 0] if in_batch else [NONE] * 5, [7, NONE, 7, 8, 7]
    texts = [[row * 10 + column for column in range(4)] for row in range(5)]
    texts[1][2] = texts[3][1]  # another row's positive
    texts[2][3] = NONE
    loss = LateInteractionLoss(model, 20.0, false_negative_margin=margin)
    labels = torch.tensor([[group[row], label[row], *texts[row]] for row in range(5)])
    value = loss.compute_loss_from_embeddings(embeddings, labels)
    expected = naive(
        embeddings, 20.0, group, label, texts, margin, lambda query, other: max_sim(tokens(query), tokens(other))
    )
    assert value.item() == pytest.approx(expected, rel=1e-6)  # the host scores in float32
    value.backward()
    assert all(column.grad[..., :-1].abs().sum() > 0 for column in embeddings)


def test_without_guards_it_is_the_hosts_loss(model):
    columns = [[text(place, row) for row in range(4)] for place in range(3)]
    features = [dict(model.preprocess(column, task="document" if place else "query"))
                for place, column in enumerate(columns)]  # fmt: skip
    theirs = MultiVectorMultipleNegativesRankingLoss(model, scale=50.0, similarity_fct=mean_colbert_scores)
    assert LateInteractionLoss(model)(features).item() == pytest.approx(theirs(features).item(), rel=1e-5)


def test_the_gradient_cache_gives_the_plain_gradients(model):
    model.train()
    gradients = []
    for mini_batch_size in (None, 3):
        model.zero_grad()
        features = [model.preprocess([text(place, row) for row in range(5)]) for place in range(3)]
        LateInteractionLoss(model, mini_batch_size=mini_batch_size)(features).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, cached in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, plain, atol=1e-5, rtol=1e-4)


def test_scores_of_a_teacher_of_one_vector_are_learned(model):
    """KL of the softmax of cosines and of late interaction, over all documents of the batch."""
    contrastive = LateInteractionLoss(model)
    loss = DistillationLoss(model, contrastive, distill_weight=0, score_weight=2.0, contrastive_weight=0)
    embeddings = draw(3, 4)
    teacher = [F.normalize(torch.randn(4, 5, dtype=torch.float64), dim=-1) for _ in embeddings]
    value = loss.compute_loss_from_embeddings(embeddings, Supervision(None, teacher, None))
    total = 0.0
    for row in range(4):
        documents = [(other, column) for other in range(4) for column in (1, 2)]
        found = torch.tensor([max_sim(tokens(embeddings[0][row]), tokens(embeddings[c][r])) for r, c in documents])
        wanted = torch.stack([teacher[0][row] @ teacher[c][r] for r, c in documents])
        p, q = (wanted / 0.05).softmax(0), (found / 0.05).log_softmax(0)
        total += float((p * (p.log() - q)).sum())
    assert value.item() == pytest.approx(2.0 * total / 4, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"stage": 2}, {"blended": True, "mini_batch_size": 3}])
def test_tasks_train_it_and_the_sealed_model_is_it(model, tmp_path, changes):
    """In stage 2 and in blended batches rows without a negative have an empty text in its place."""
    data = {"find": rows(2), "alike": rows(1, seed=5)}
    before = model[1].linear.weight.clone()
    trainer = LLMEmbedTrainer(model, arguments(tmp_path, **changes), data, tasks=[FIND, ALIKE])
    assert type(trainer.loss) is LateInteractionLoss and trainer.loss.scale == 50
    trainer.train()
    assert not torch.equal(before, model[1].linear.weight)
    assert model.prompts["query"] == "Instruct: Find what answers the question\nQuery: "
    folder = save_sealed(model, tmp_path / "sealed")
    assert not list(folder.glob("*.py"))
    again = MultiVectorEncoder(str(folder))  # no code, no consent
    assert again.similarity_fn_name == "meanmaxsim"
    for side in ("query", "document"):
        ours, theirs = (getattr(one, f"encode_{side}")([text(9), text(8)]) for one in (model, again))
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, atol=1e-6, rtol=0)


def test_a_token_that_changes_is_found(sealed, tmp_path):
    """By check, and at each loading; the reference is a digest, however long the texts."""
    assert check(sealed).difference == 0.0
    assert (sealed / "reference.json").stat().st_size < 10_000
    changed = shutil.copytree(sealed, tmp_path / "changed")
    write_json(
        changed / "2_MultiVectorMask" / "config.json", {"skiplist_words": ["a"], "skiplist_tasks": ["document"]}
    )
    reference = read_json(changed / "reference.json")
    write_json(changed / "reference.json", {**reference, "texts": ["a cat sat on a mat"] * 3})
    with pytest.raises(RuntimeError, match="gives other vectors in a fresh process"):
        check(changed)


def test_a_model_with_code_warns_of_other_vectors(model, tmp_path):
    """Truncation on the left that spares the prompt is the backbone's own: the folder keeps its code."""
    model.tokenizer.truncation_side = "left"
    folder = save_sealed(model, tmp_path / "sealed")
    assert type(load_any(folder)[0]).__name__ == "LLMBackbone" and read_json(folder / "config.json")["backbone_config"]
    weights = load_file(folder / "1_Dense" / "model.safetensors")
    save_file({name: -weight for name, weight in weights.items()}, folder / "1_Dense" / "model.safetensors")
    with pytest.warns(UserWarning, match="does not give the embeddings that it gave"):
        load_any(folder)


def test_engines_of_one_vector_refuse_it(sealed):
    """vLLM, SGLang and llama.cpp go by the name in architectures; TEI finds no pooling."""
    assert all(name.startswith("SentenceTransformers") for name in read_json(sealed / "config.json")["architectures"])
    assert set(engines(sealed).values()) == {"refused"}
    card = (sealed / "README.md").read_text()
    assert "from sentence_transformers import MultiVectorEncoder" in card and "refuse it" in card


def test_lora_merges_and_checkpoints_average(llm, tmp_path):
    torch.manual_seed(2)
    model = build_model(llm, "multi-vector", token_dim=8, lora={"r": 2, "lora_alpha": 64})
    trainer = LLMEmbedTrainer(model, arguments(tmp_path, learning_rate=0.01), {"find": rows()}, tasks=[FIND])
    trainer.train()
    merged = merge_adapter(model)
    assert type(merged) is MultiVectorEncoder
    torch.testing.assert_close(merged.encode_query("a cat"), model.encode_query("a cat"), atol=1e-5, rtol=0)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        build_model(llm, "multi-vector", token_dim=8).save_pretrained(str(folder))
    average = load_any(average_checkpoints(folders, tmp_path / "average"))
    parts = [load_any(folder)[1].linear.weight for folder in folders]
    torch.testing.assert_close(average[1].linear.weight, (parts[0] + parts[1]) / 2)


def test_evaluation_is_a_naive_search_and_says_the_bytes(sealed, tmp_path):
    folder = make_retrieval(tmp_path / "docs")
    found = evaluate(sealed, [folder], tmp_path / "results")
    model = MultiVectorEncoder(str(sealed))
    documents = [model.encode_document(text(0, i)) for i in range(40)]
    total = 0.0
    for i in range(12):
        query = model.encode_query(text(1, i))
        ranked = sorted(range(40), key=lambda d: -max_sim(query, documents[d]))[:10]
        grade = {(7 * i + k) % 40: 2 - k for k in range(2)}
        gain = sum(grade.get(d, 0) / np.log2(place + 2) for place, d in enumerate(ranked))
        total += gain / (2 + 1 / np.log2(3))
    assert found.results[0].get_score() == pytest.approx(total / 12, abs=1e-5)
    size = np.mean([4 * vectors.numel() for vectors in documents])
    assert f"| {size:,.0f} |" in found.table
    assert evaluate(sealed, [folder], tmp_path / "results").table == found.table  # nothing is computed anew
    lines(tmp_path / "pairs" / "test.jsonl", [{"sentence1": text(i), "sentence2": text(2, i), "score": i % 5}
                                              for i in range(9)])  # fmt: skip
    with pytest.raises(ValueError, match=r"The tasks \['pairs'\] compare or classify single vectors"):
        evaluate(sealed, [tmp_path / "pairs"], tmp_path / "results")
    with pytest.raises(ValueError, match="parity compares models of one dense vector"):
        parity(sealed, [folder])
    with pytest.raises(ValueError, match="dims and precision are of one dense vector"):
        evaluate_compressed(sealed, [folder], tmp_path / "results", dims=[4])


@pytest.mark.parametrize(
    "command",
    [
        ["encode", "MODEL", "docs.jsonl", "--output", "OUT"],
        ["mine", "pairs.jsonl", "MODEL", "--output", "OUT"],
        ["export-onnx", "MODEL", "OUT"],
        ["align", "MODEL", "MODEL", "OUT", "--documents", "docs.jsonl"],
    ],
)
def test_what_needs_one_vector_names_the_model(sealed, tmp_path, monkeypatch, command, capsys):
    if command[0] == "export-onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'st-llm-embed[onnx]'")
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "docs.jsonl", [{"text": text(i)} for i in range(30)])
    lines(tmp_path / "pairs.jsonl", [{"anchor": text(i), "positive": text(1, i)} for i in range(9)])
    assert main([str(sealed) if word == "MODEL" else word for word in command]) == 2
    assert "is a MultiVectorEncoder" in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()


def test_one_vector_and_several_are_not_mixed_up(llm, sealed):
    with pytest.raises(ValueError, match="takes a MultiVectorEncoder, and the model is a SentenceTransformer"):
        LateInteractionLoss(build_model(llm, "mean"))
    with pytest.raises(ValueError, match="is a MultiVectorEncoder, and this takes models of one dense vector"):
        load_trusted(sealed)
    with pytest.raises(ValueError, match="similarity='euclid' is unknown. Valid values: cosine, dot"):
        InstructionContrastiveLoss(build_model(llm, "mean"), similarity="euclid")
    with pytest.raises(ValueError, match="InstructionContrastiveLoss compares texts of one vector"):
        InstructionContrastiveLoss(build_model(llm, "multi-vector"))
    for changes, message in (
        ({"token_dim": 0}, "token_dim=0 must be 1 or more"),
        ({"skiplist_words": "</s>"}, "skiplist_words='</s>' is one text"),
        ({"skiplist_words": [".", "nope"]}, r"skiplist_words=\['nope'\] are no tokens of the tokenizer"),
        ({"query_expansion": {"length": 9}}, "unknown arguments .'query_expansion'."),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(llm, "multi-vector", **changes)
    with pytest.raises(ValueError, match="an LLMBackbone adds no tokens to queries"):
        LLMBackbone(llm, query_expansion={"strategy": "fixed", "length": 9, "attend": False})


@pytest.mark.parametrize("name", ["CrossEncoder", "Nope", 7, ["SparseEncoder"], None])
def test_a_folder_of_another_class_is_refused(sealed, tmp_path, name):
    folder = shutil.copytree(sealed, tmp_path / "other")
    file = folder / "config_sentence_transformers.json"
    write_json(file, {**read_json(file), "model_type": name})
    for act in (load_any, check):
        with pytest.raises(ValueError, match=r"model_type=.*, and this opens SentenceTransformer, MultiVectorEncoder"):
            act(folder)


def test_pylates_name_is_that_class(sealed, tmp_path):
    folder = shutil.copytree(sealed, tmp_path / "other")
    file = folder / "config_sentence_transformers.json"
    write_json(file, {**read_json(file), "model_type": "ColBERT"})
    assert type(load_any(folder)) is MultiVectorEncoder


def test_lengths_and_skipped_words_are_a_sides_under_every_prompt(llm, tmp_path):
    """A task's prompt is of queries; the card and the reference say so."""
    model = build_model(llm, "multi-vector", skiplist_words=["."], query_length=12)
    model.prompts = {"query": "ask: ", "find": "ask: "}
    folder = save_sealed(model, tmp_path / "sealed")
    embeddings = read_json(folder / "reference.json")["embeddings"]
    assert embeddings["find"] == embeddings["query"]
    assert 'model.encode_query(texts, prompt_name="find")' in (folder / "README.md").read_text()


def test_a_token_pooling_of_the_host_is_published_too(model, tmp_path):
    model.append(HierarchicalTokenPooling(pool_factor=2))
    whole = len(MultiVectorEncoder(modules=list(model)[:-1]).encode_document("a cat sat on a mat"))
    folder = save_sealed(model, tmp_path / "sealed")
    assert len(load_any(folder).encode_document("a cat sat on a mat")) < whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"spread_weight": 0.1},
            "spread_weight=0.1 has no effect: it is of one dense vector, and a MultiVectorEncoder",
        ),
        ({"query_regularizer_weight": 1.0}, "query_regularizer_weight=1.0 has no effect: the model has no sparse"),
    ],
)
def test_arguments_of_other_models_are_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        LLMEmbedTrainer(model, arguments(tmp_path, **changes), {"find": rows()}, tasks=[FIND])


@pytest.fixture
def settings(llm, tmp_path):
    lines(tmp_path / "pairs.jsonl", [{"anchor": text(i), "positive": text(1, i)} for i in range(12)])
    lines(tmp_path / "docs.jsonl", [{"text": ". ".join(text(i, j).capitalize() for j in range(4))} for i in range(12)])
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": 4}
    return {
        "output": str(tmp_path / "run"),
        "model": {"base": llm, "recipe": "multi-vector", "token_dim": 8, "max_seq_length": 48},
        "arguments": {**quiet, "max_steps": 2},
        "data": {
            "raw": {"read": "consecutive_texts", "documents": str(tmp_path / "docs.jsonl"), "split": "sentences"},
            "find": {"read": "from_columns", "source": str(tmp_path / "pairs.jsonl"), "instruction": "Find it"},
        },
        "stages": [{"name": "pretext", "data": ["raw"]}, {"name": "pairs", "data": ["find"]}],
    }


def test_a_configuration_adapts_trains_seals_and_evaluates(settings, tmp_path):
    folder = make_retrieval(tmp_path / "docs")
    last = train_stages({**settings, "seal": True, "evaluate": {"tasks": [str(folder)]}})
    assert type(load_any(last)) is MultiVectorEncoder and check(last).difference == 0.0
    assert "bytes a document" in next((tmp_path / "run" / "results").rglob("results.md")).read_text()
    further = {**settings, "output": str(tmp_path / "further"), "model": {"load": str(last)}}
    further["stages"] = [{"name": "more", "data": ["find"], "model": {"lora": {"r": 2}}}]
    assert type(load_any(train_stages(further))) is MultiVectorEncoder


def test_a_teachers_scores_in_a_configuration(settings, llm, tmp_path):
    build_model(llm, "mean").save_pretrained(str(tmp_path / "teacher"))
    stage = {"name": "taught", "data": ["find"], "teach": {"teacher": str(tmp_path / "teacher")}}
    settings["stages"] = [stage]
    with pytest.raises(ValueError, match="Match its scores: teach: {projection: false}, distill_weight: 0"):
        train_stages(settings)
    stage["teach"]["projection"] = False
    stage["arguments"] = {"distill_weight": 0, "score_weight": 1.0}
    train_stages(settings)
    state = next((tmp_path / "run").rglob("trainer_state.json"))
    assert json.loads(state.read_text())["log_history"][0]["scores"] > 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("stages", 1, "loss"),
            {"matryoshka_dims": [8, 4]},
            "matryoshka_dims, and a MultiVectorEncoder has no",
        ),
        (("stages", 1, "arguments"), {"spread_weight": 0.1}, "spread_weight=0.1 has no effect: it is of one dense"),
        (("data", "find", "mine"), {"teacher": "pretext"}, "mined and judged by models of one dense vector"),
        (("evaluate",), {"tasks": ["docs"], "dims": [4]}, "dims or precision, of dense vectors"),
        (("evaluate",), {"tasks": ["pairs"]}, "'pairs'. compare or classify single vectors"),
        (("stages", 1, "eval_tasks"), ["pairs"], "'pairs'. compare or classify single vectors"),
        (("model", "token_dim"), 0, "token_dim"),
        (("model", "num_latents"), 4, "num_latents"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_work(settings, tmp_path, monkeypatch, path, value, message):
    monkeypatch.chdir(tmp_path)
    make_retrieval(tmp_path / "docs")
    scored = [{"sentence1": text(i), "sentence2": text(2, i), "score": i % 5} for i in range(9)]
    for split in ("dev", "test"):
        lines(tmp_path / "pairs" / f"{split}.jsonl", scored)
    settings["stages"][1]["arguments"] = {"eval_strategy": "steps", "eval_steps": 1} if "eval_tasks" in path else {}
    *where, key = path
    part = settings
    for step in where:
        part = part[step]
    part[key] = value
    with pytest.raises(ValueError, match=message):
        train_stages(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_are_one(settings, tmp_path):
    """On gloo, half the batch each and all documents gathered, against the whole batch in one process."""
    del settings["stages"][0]
    settings["arguments"] |= {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 3, "gather_across_devices": True}
    losses = []
    for processes in (1, 2):
        settings["output"] = str(tmp_path / f"with-{processes}")
        settings["arguments"]["per_device_train_batch_size"] = 4 // processes
        how = ["-m", "st_llm_embed"] if processes == 1 else DDP
        losses.append(run(settings, tmp_path / f"config-{processes}.yaml", how))
    assert losses[1]["1-pairs"] == pytest.approx(losses[0]["1-pairs"], abs=1e-4)
    one, two = (load_any(tmp_path / f"with-{processes}" / "1-pairs" / "model") for processes in (1, 2))
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, atol=1e-5, rtol=1e-4)


def test_a_plain_sentence_transformer_stays_one(llm, tmp_path):
    model = build_model(llm, "mean")
    model.save_pretrained(str(tmp_path / "plain"))
    assert type(load_any(tmp_path / "plain")) is SentenceTransformer
