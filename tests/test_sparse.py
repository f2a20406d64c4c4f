"""Models of sparse vectors: SPLADE over the LLM's own LM head, trained by tasks, sealed, evaluated; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import save_llm, train_tokenizer
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from test_evaluation import lines, make_retrieval, text
from test_late_interaction import ALIKE, FIND, arguments, rows
from transformers import AutoModel, AutoModelForCausalLM, CohereConfig, GraniteConfig, PhiConfig

from st_llm_embed import InstructionContrastiveLoss, LLMEmbedTrainer, build_model
from st_llm_embed.evaluation import evaluate
from st_llm_embed.files import read_json
from st_llm_embed.hub import check, save_sealed
from st_llm_embed.hub.engine_keys import engines
from st_llm_embed.training import train_stages
from st_llm_embed.trust import load_any
from st_llm_embed.weights.merging import merge_adapter


@pytest.fixture(scope="module", params=["tied", "untied", "biased"])
def base(request, tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sparse") / request.param
    if request.param != "biased":
        return save_llm(folder, tie_word_embeddings=request.param == "tied")
    tokenizer = train_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = PhiConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, initializer_range=0.2, **shape)
    save_llm(folder, config, tokenizer)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(whole.get_output_embeddings().bias)
    whole.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_the_weights_are_the_lm_heads(base, strategy):
    """Of a causal model: log(1 + relu(logits)) of transformers' own causal LLM, over the text."""
    model = build_model(base, "sparse", attention="causal", pooling_strategy=strategy, chunk_size=3)
    assert type(model) is SparseEncoder and model.similarity_fn_name == "dot"
    assert [type(module).__name__ for module in model] == ["LLMBackbone", "Dense", "SpladePooling"]
    whole = AutoModelForCausalLM.from_pretrained(base)
    for words in ("a cat sat on a mat", "seven"):
        ids = model.preprocess([words])["input_ids"]
        with torch.no_grad():
            logits = whole(ids).logits[0].relu().log1p()
        expected = logits.amax(dim=0) if strategy == "max" else logits.sum(dim=0)
        torch.testing.assert_close(model.encode(words).to_dense(), expected, atol=1e-5, rtol=1e-5)
    assert model[1].linear.weight.data_ptr() != model[0].model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_what_an_llm_scales_its_logits_by_is_in_the_head(kind, tmp_path):
    tokenizer = train_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    scaled = {"cohere": (CohereConfig, {"logit_scale": 0.0625}), "granite": (GraniteConfig, {"logits_scaling": 8.0})}
    config_of, own = scaled[kind]
    config = config_of(vocab_size=len(tokenizer), initializer_range=0.2, num_key_value_heads=2, **shape, **own)
    base = save_llm(tmp_path / kind, config, tokenizer)
    model = build_model(base, "sparse", attention="causal")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(model.preprocess(["a cat sat"])["input_ids"]).logits[0]
    expected = logits.relu().log1p().amax(dim=0)
    torch.testing.assert_close(model.encode("a cat sat").to_dense(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_one_in_half_precision_is_sealed(llm, tmp_path, dtype, strategy):
    model = build_model(llm, "sparse", pooling_strategy=strategy, model_kwargs={"dtype": dtype})
    folder = save_sealed(model, tmp_path / "sealed")
    check(folder)
    assert f"the {strategy} over the text" in (folder / "README.md").read_text()


def test_a_search_keeps_one_growth_of_weights(llm, tmp_path):
    """Of the trial's own loss: another one's would hold its model in memory, and log its weights."""
    args = arguments(tmp_path, document_regularizer_weight=0.5)
    made = lambda trial=None: build_model(llm, "sparse", max_seq_length=48)  # noqa: E731
    trainer = LLMEmbedTrainer(None, args, {"find": rows()}, tasks=[FIND], model_init=made)
    for _ in range(2):
        trainer._hp_search_setup({})
    callbacks = trainer.callback_handler.callbacks
    growing = [one for one in callbacks if isinstance(one, SpladeRegularizerWeightSchedulerCallback)]
    assert len(growing) == 1 and growing[0].loss is trainer.loss


def test_an_llm_without_a_head_is_refused(base, tmp_path):
    folder = tmp_path / "headless"
    AutoModel.from_pretrained(base).save_pretrained(folder)
    build_model(base, "mean").tokenizer.save_pretrained(folder)
    if read_json(folder / "config.json")["tie_word_embeddings"]:
        build_model(folder, "sparse")
    else:
        with pytest.raises(ValueError, match="holds no weights of an LM head"):
            build_model(folder, "sparse")


@pytest.fixture
def model(llm):
    torch.manual_seed(0)
    return build_model(llm, "sparse", max_seq_length=48).eval()


def test_without_guards_it_is_the_hosts_loss(model):
    columns = [model.encode([text(place, row) for row in range(4)]).to_dense() for place in range(3)]
    contrastive = InstructionContrastiveLoss(model, scale=1.0, similarity="dot")
    theirs = SparseMultipleNegativesRankingLoss(model)  # dot products, scale 1
    expected = theirs.compute_loss_from_embeddings(columns, None)
    assert contrastive.compute_loss_from_embeddings(columns).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"stage": 2}, {"blended": True, "mini_batch_size": 3}])
def test_tasks_train_it_and_the_sealed_model_is_it(model, tmp_path, changes):
    data = {"find": rows(2), "alike": rows(1, seed=5)}
    args = arguments(tmp_path, query_regularizer_weight=0.5, document_regularizer_weight=0.25, max_steps=4, **changes)
    trainer = LLMEmbedTrainer(model, args, data, tasks=[FIND, ALIKE])
    kind = CachedSpladeLoss if "mini_batch_size" in changes else SpladeLoss
    assert type(trainer.loss) is kind and trainer.loss.loss.scale == 1
    growing = [
        c for c in trainer.callback_handler.callbacks if isinstance(c, SpladeRegularizerWeightSchedulerCallback)
    ]
    assert len(growing) == 1 and growing[0].loss is trainer.loss
    trainer.train()
    assert (trainer.loss.query_regularizer_weight, trainer.loss.document_regularizer_weight) == (0.5, 0.25)
    log = trainer.state.log_history[2]
    assert log["query_regularizer_loss"] > 0 and log["document_regularizer_loss"] > 0
    folder = save_sealed(model, tmp_path / "sealed")
    assert check(folder).difference == 0.0 and not list(folder.glob("*.py"))
    again = SparseEncoder(str(folder))
    for side in ("query", "document"):
        ours, theirs = (getattr(one, f"encode_{side}")([text(9), text(8)]).to_dense() for one in (model, again))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert set(engines(folder).values()) == {"refused"}
    assert "from sentence_transformers import SparseEncoder" in (folder / "README.md").read_text()
    assert (folder / "reference.json").stat().st_size < 100_000  # a digest, and not the vocabulary


def test_the_regulariser_makes_it_sparse(model, tmp_path):
    """The dearer a weight, the fewer of them there are after the same steps."""
    active = {}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for weight in (0.0, 1.0):
        model.load_state_dict(start)
        args = arguments(
            tmp_path,
            query_regularizer_weight=weight,
            document_regularizer_weight=weight,
            learning_rate=3e-3,
            max_steps=20,
        )
        LLMEmbedTrainer(model, args, {"find": rows()}, tasks=[FIND]).train()
        active[weight] = (
            (model.encode_document([text(0, i, 1) for i in range(8)]).to_dense() > 0).float().mean().item()
        )
    assert active[1.0] < 0.9 * active[0.0]


def test_lora_trains_the_llm_and_the_whole_head(llm, tmp_path):
    torch.manual_seed(2)
    model = build_model(llm, "sparse", lora={"r": 2, "lora_alpha": 4})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "1.linear.weight" in trained and all("lora_" in name for name in trained - {"1.linear.weight"})
    LLMEmbedTrainer(model, arguments(tmp_path), {"find": rows()}, tasks=[FIND]).train()
    merged = merge_adapter(model)
    torch.testing.assert_close(
        merged.encode("a cat").to_dense(), model.encode("a cat").to_dense(), atol=1e-4, rtol=1e-4
    )


def test_evaluation_is_a_naive_search_and_says_the_bytes(model, tmp_path):
    sealed = save_sealed(model, tmp_path / "sealed")
    folder = make_retrieval(tmp_path / "docs")
    lines(
        tmp_path / "pairs" / "test.jsonl",
        [{"sentence1": text(i), "sentence2": text(2, i), "score": i % 5} for i in range(9)],
    )
    found = evaluate(sealed, [folder, tmp_path / "pairs"], tmp_path / "results")
    documents = model.encode_document([text(0, i) for i in range(40)]).to_dense()
    queries = model.encode_query([text(1, i) for i in range(12)]).to_dense()
    total = 0.0
    for i, ranked in enumerate((queries @ documents.T).argsort(dim=1, descending=True)[:, :10].tolist()):
        grade = {(7 * i + k) % 40: 2 - k for k in range(2)}
        gain = sum(grade.get(d, 0) / np.log2(place + 2) for place, d in enumerate(ranked))
        total += gain / (2 + 1 / np.log2(3))
    assert found.results[0].get_score() == pytest.approx(total / 12, abs=1e-5)
    assert f"| {8 * (documents > 0).sum().item() / 40:,.0f} |" in found.table
    assert found.results[1].get_score() > -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"soft_label_weight": 1.0}, "there is a teacher, or a soft_label_weight"),
        ({"spread_weight": 0.1}, "spread_weight=0.1 has no effect: it is of one dense vector, and a SparseEncoder"),
        ({"query_regularizer_weight": -1.0}, "query_regularizer_weight=-1.0 must be 0 or more"),
    ],
)
def test_what_it_cannot_learn_is_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        LLMEmbedTrainer(model, arguments(tmp_path, **changes), {"find": rows()}, tasks=[FIND])


def test_in_a_configuration(llm, tmp_path):
    lines(tmp_path / "pairs.jsonl", [{"anchor": text(i), "positive": text(1, i)} for i in range(12)])
    config = {
        "output": str(tmp_path / "run"),
        "model": {"base": llm, "recipe": "sparse", "max_seq_length": 48, "activation_function": "log1p_relu"},
        "arguments": {"use_cpu": True, "disable_tqdm": True, "max_steps": 1, "per_device_train_batch_size": 4},
        "data": {"find": {"read": "from_columns", "source": str(tmp_path / "pairs.jsonl"), "instruction": "Find it"}},
        "stages": [{"name": "pairs", "data": ["find"], "arguments": {"document_regularizer_weight": 1e-3}}],
        "seal": True,
    }
    model = load_any(train_stages(config))
    assert type(model) is SparseEncoder and model[2].activation_function == "log1p_relu"
    config |= {"output": str(tmp_path / "other"), "model": {"base": llm, "recipe": "mean"}}
    with pytest.raises(ValueError, match="document_regularizer_weight=0.001 has no effect: the model has no sparse"):
        train_stages(config)
