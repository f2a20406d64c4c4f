"""Models of strangers: whatever a folder names, no code of it runs unless the caller says so."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS, save_llm
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.hub import check, save_sealed
from st_llm_embed.trust import check_data, code_in, load_trusted
from st_llm_embed.trust.code import RELEASED
from st_llm_embed.weights.averaging import average_checkpoints
from st_llm_embed.weights.export import export_causal_lm

STORED = Path(__file__).with_name("stored")
EVIL = """open({marker!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
class Cfg(LlamaConfig):
    pass
class Llm(LlamaModel):
    pass
class Tok(PreTrainedTokenizerFast):
    pass
class Evil:
    @classmethod
    def load(cls, *args, **kwargs):
        raise SystemExit
def generate(*args, **kwargs):
    raise SystemExit
"""


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, llm) -> dict[str, Path]:
    """One folder with code of this package, a stock one, and an adapter."""
    root = tmp_path_factory.mktemp("sealed")
    own = save_sealed(build_model(llm, "nv-embed", num_latents=8, num_heads=2, head_dim=16), root / "own")
    stock = save_sealed(build_model(llm, "mean"), root / "stock")
    model = build_model(llm, "last-token")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return {"own": own, "stock": stock, "adapter": save_sealed(model, root / "adapter")}


def edit(file: Path, **changes: object) -> None:
    """Set keys of a JSON object, which may not be there yet."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, **changes}))


def add_module(folder: Path, kind: str, path: str = "9_Last", file: str = "config.json", **config: object) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    entry = {"idx": len(modules), "name": str(len(modules)), "path": path, "type": kind}
    (folder / "modules.json").write_text(json.dumps([*modules, entry]))
    edit(folder / path / file, **config)


def append(file: Path, evil: str) -> None:
    file.write_text(file.read_text() + "\n" + evil)


def put(file: Path, evil: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(evil)


class Opens:
    """A pickle that runs code when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def in_subfolder(folder: Path, evil: str, file: str, key: str) -> None:
    """The LLM in a folder of its own, whose configuration names code there."""
    (folder / "0_LLM").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder / name, folder / "0_LLM" / name)
    shutil.move(folder / "sentence_bert_config.json", folder / "0_LLM" / "sentence_bert_config.json")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_LLM"
    (folder / "modules.json").write_text(json.dumps(modules))
    put(folder / "0_LLM" / "evil.py", evil)
    edit(folder / "0_LLM" / file, auto_map=key_of(key, "0_LLM/evil"))


def key_of(key: str, module: str) -> dict[str, object]:
    name = {"AutoConfig": "Cfg", "AutoTokenizer": "Tok"}.get(key, "Llm")
    return {key: [None, f"{module}.{name}"] if key == "AutoTokenizer" else f"{module}.{name}"}


def mapped(file: str, key: str, module: str = "evil") -> Callable[[Path, str, Path], None]:
    """An ``auto_map`` in a configuration, to a file in the root, in a subfolder or elsewhere on the machine."""

    def make(folder: Path, evil: str, elsewhere: Path) -> None:
        put(elsewhere / "evil.py", evil)
        here = module.format(elsewhere=elsewhere)
        if "--" not in here:
            put(folder / f"{here}.py", evil)
        edit(folder / file, auto_map=key_of(key, here))

    return make


def escaped(file: str, key: str) -> Callable[[Path, str, Path], None]:
    def make(folder: Path, evil: str, elsewhere: Path) -> None:
        mapped(file, key, "1_LatentAttentionPooling/evil")(folder, evil, elsewhere)
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"auto_map"', '"auto\\u005fmap"'))

    return make


def nested(folder: Path, evil: str, _: Path) -> None:
    put(folder / "evil.py", evil)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "text_config": {**config, "auto_map": key_of("AutoConfig", "evil")}})
    )


def pickled(name: str) -> Callable[[Path, str, Path], None]:
    def make(folder: Path, evil: str, elsewhere: Path) -> None:
        marker = Path(evil.split("'")[1])
        for weights in (folder / name).parent.glob("*.safetensors"):
            weights.unlink()
        put(folder / name, "")
        (folder / name).write_bytes(pickle.dumps(Opens(marker)))

    return make


def router(types: dict[str, str], **more: str) -> Callable[[Path, str, Path], None]:
    def make(folder: Path, evil: str, _: Path) -> None:
        put(folder / "9_Last" / "evil.py", evil)
        config = {"types": types, "structure": {"q": list(types)}, "parameters": {}}
        add_module(
            folder, "sentence_transformers.base.modules.router.Router", file="router_config.json", **config, **more
        )

    return make


def module(kind: str, **config: object) -> Callable[[Path, str, Path], None]:
    def make(folder: Path, evil: str, _: Path) -> None:
        put(folder / "evil.py", evil)
        put(folder / "9_Last" / "evil.py", evil)
        add_module(folder, kind, **config)

    return make


def dense(activation: str) -> Callable[[Path, str, Path], None]:
    config = {"in_features": 32, "out_features": 32, "activation_function": activation}
    return module("sentence_transformers.base.modules.dense.Dense", **config)


def loading(key: str, **values: object) -> Callable[[Path, str, Path], None]:
    return lambda folder, evil, elsewhere: edit(folder / "sentence_bert_config.json", **{key: values})


def setting(file: str, **values: object) -> Callable[[Path, str, Path], None]:
    return lambda folder, evil, elsewhere: edit(folder / file, **values)


# Of the folder with classes of its own, which only trust_remote_code=True loads elsewhere. All must be refused.
REFUSED: dict[str, Callable[[Path, str, Path], None]] = {
    "config": mapped("config.json", "AutoConfig"),
    "config, model": mapped("config.json", "AutoModel"),
    "config, in a subfolder": mapped("config.json", "AutoConfig", "1_LatentAttentionPooling/evil"),
    "config, elsewhere": mapped("config.json", "AutoConfig", "{elsewhere}--evil"),
    "config, another repository": mapped("config.json", "AutoConfig", "org/other--evil"),
    "config, escaped": escaped("config.json", "AutoConfig"),
    "config, nested": nested,
    "tokenizer": mapped("tokenizer_config.json", "AutoTokenizer"),
    "tokenizer, elsewhere": mapped("tokenizer_config.json", "AutoTokenizer", "{elsewhere}--evil"),
    "tokenizer, escaped": escaped("tokenizer_config.json", "AutoTokenizer"),
    "processor": mapped("processor_config.json", "AutoProcessor"),
    "image processor": mapped("preprocessor_config.json", "AutoImageProcessor"),
    "video processor": mapped("video_preprocessor_config.json", "AutoVideoProcessor"),
    "feature extractor": mapped("preprocessor_config.json", "AutoFeatureExtractor"),
    "generation": mapped("generation_config.json", "AutoModelForCausalLM"),
    "pipelines": setting("config.json", custom_pipelines={"x": {"impl": "evil.Evil"}}),
    "LLM in a subfolder": lambda f, evil, _: in_subfolder(f, evil, "config.json", "AutoConfig"),
    "tokenizer in a subfolder": lambda f, evil, _: in_subfolder(f, evil, "tokenizer_config.json", "AutoTokenizer"),
    "kernel": setting("config.json", attn_implementation="org/kernel"),
    "kernel, private": setting("config.json", _attn_implementation="org/kernel:function"),
    "kernel of experts": setting("config.json", experts_implementation={"": "org/kernel"}),
    "backbone": lambda f, evil, _: append(f / "llm_backbone.py", evil),
    "its sibling": lambda f, evil, _: append(f / "attention_mode.py", evil),
    "a class": module("evil.Evil"),
    "a class in a subfolder": module("9_Last/evil.Evil"),
    "a class of another repository": module("org/other--evil.Evil"),
    "a function": module("os.system"),
    "a class of Python": module("subprocess.Popen"),
    "a function of this package": module("st_llm_embed.training.stages.train_stages"),
    "what a known file imports": module("llm_backbone.Path"),
    "what a stock file imports": module("sentence_transformers.base.model.pickle"),
    "a stock function": module("sentence_transformers.util.misc.import_from_string"),
    "router": router({"x": "9_Last/evil.Evil"}),
    "router, dotted": router({"x": "evil.Evil"}),
    "router, of Python": router({"x": "subprocess.Popen"}),
    "word embeddings": module(
        "sentence_transformers.sentence_transformer.modules.word_embeddings.WordEmbeddings",
        file="wordembedding_config.json",
        tokenizer_class="evil.Tok",
        update_embeddings=False,
        max_seq_length=8,
    ),
    "activation": dense("evil.Evil"),
    "activation of Python": dense("os.abort"),
    "activation of torch": dense("torch.utils.cpp_extension.load"),
    "trust": loading("model_kwargs", trust_remote_code=True),
    "pickles asked for": loading("model_kwargs", use_safetensors=False, weights_only=False),
    "a file elsewhere": loading("processor_kwargs", tokenizer_file="/etc/passwd"),
    "another tokenizer": loading("tokenizer_args", tokenizer_type="evil"),
    "kernels of anybody": loading("model_kwargs", allow_all_kernels=True),
    "kernels": loading("model_kwargs", use_kernels=True),
    "a tokenizer elsewhere": setting("sentence_bert_config.json", tokenizer_name_or_path="/elsewhere"),
    "an audio tokenizer elsewhere": setting(
        "processor_config.json", audio_tokenizer={"audio_tokenizer_name_or_path": "/elsewhere"}
    ),
    "a stock module that asks": module(
        "sentence_transformers.sparse_encoder.modules.sparse_static_embedding.SparseStaticEmbedding"
    ),
    "a stock tokenizer that asks": module(
        "sentence_transformers.sentence_transformer.modules.word_embeddings.WordEmbeddings",
        file="wordembedding_config.json",
        tokenizer_class="sentence_transformers.sentence_transformer.modules.tokenizer.word.TransformersTokenizerWrapper",
        update_embeddings=False,
        max_seq_length=8,
    ),
    "adapters of an adapter": setting(
        "adapter_config.json", base_model_name_or_path="./base", peft_type="XLORA", adapters={"0": "/elsewhere"}
    ),
    "weights": pickled("pytorch_model.bin"),
    "weights of a module": pickled("1_LatentAttentionPooling/pytorch_model.bin"),
    "weights in pickled shards": lambda f, evil, _: (
        pickled("shard.bin")(f, evil, _),
        edit(f / "pytorch_model.bin.index.json", weight_map={"x": "shard.bin"}),
    ),
    "adapter with a module of its choice": setting(
        "adapter_config.json", base_model_name_or_path="./base", megatron_config={"a": 1}, megatron_core="evil"
    ),
    "adapter in a subfolder": lambda f, evil, _: edit(
        f / "1_LatentAttentionPooling" / "adapter_config.json", tokenizer_kwargs={"trust_remote_code": True}
    ),
}


def hostile(sealed: Path, make: Callable[[Path, str, Path], None], scratch: Path) -> tuple[Path, Path]:
    """A copy of a sealed folder with one way to code in it, and the file that is there once the code has run."""
    folder, marker = scratch / "model", scratch / "ran"
    shutil.copytree(sealed, folder)
    (scratch / "elsewhere").mkdir()
    make(folder, EVIL.format(marker=str(marker)), scratch / "elsewhere")
    return folder, marker


@pytest.mark.parametrize("way", REFUSED)
def test_no_way_leads_to_code(sealed, tmp_path, way, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, marker = hostile(sealed["own"], REFUSED[way], tmp_path)
    for act in (load_trusted, check):
        with pytest.raises(ValueError, match="model.*(to run it|may run code when read|which is not a class)"):
            act(folder)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", REFUSED)
def test_nor_does_any_command(sealed, tmp_path, way, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, marker = hostile(sealed["own"], REFUSED[way], tmp_path)
    for command in ("merge", "publish", "export", "mine", "evaluate"):
        assert main(arguments(command, folder, tmp_path)) == 2
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("out")]
    main(arguments("average", folder, tmp_path))  # which loads weights alone
    assert not marker.exists()


def arguments(command: str, folder: Path, scratch: Path) -> list[str]:
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"anchor": f"q {i}", "positive": f"d {i}"}) + "\n" for i in range(8)))
    (scratch / "sts").mkdir(exist_ok=True)
    pairs = [{"sentence1": f"a {i}", "sentence2": f"b {i * i}", "score": i} for i in range(4)]
    (scratch / "sts" / "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = str(scratch / f"out-{command}")
    return {
        "check": ["check", str(folder)],
        "evaluate": ["evaluate", str(folder), "--tasks", str(scratch / "sts"), "--output", str(scratch / "results")],
        "merge": ["merge", str(folder), out],
        "average": ["average", str(folder), str(folder), "--output", out],
        "export": ["export", str(folder), str(folder), out],
        "publish": ["publish", str(folder), "org/model"],
        "mine": ["mine", str(rows), str(folder), "--output", out, "--num-negatives", "1"],
    }[command]


# Where stock modules do all, the hosts are never told to trust, and pass over what they are not told to run.
PASSED_OVER = {
    "config": mapped("config.json", "AutoConfig"),
    "config, elsewhere": mapped("config.json", "AutoConfig", "{elsewhere}--evil"),
    "tokenizer": mapped("tokenizer_config.json", "AutoTokenizer"),
    "generation": lambda f, evil, _: put(f / "custom_generate" / "generate.py", evil),
    "a template": setting("tokenizer_config.json", chat_template="{{ cycler.__init__.__globals__.os.abort() }}"),
    "a trainer's pickle": lambda f, evil, _: (f / "training_args.bin").write_bytes(
        pickle.dumps(Opens(Path(evil.split("'")[1])))
    ),
    "a script": lambda f, evil, _: put(f / "train.py", evil),
    "modules of Python's names": lambda f, evil, _: [
        put(f / f"{name}.py", evil) for name in ("torch", "json", "sitecustomize", "conftest", "st_llm_embed")
    ],
}


@pytest.mark.parametrize("way", PASSED_OVER)
def test_what_the_hosts_pass_over_is_no_reason_to_refuse(sealed, tmp_path, way, monkeypatch):
    folder, marker = hostile(sealed["stock"], PASSED_OVER[way], tmp_path)
    monkeypatch.chdir(folder)
    expected = SentenceTransformer(str(sealed["stock"])).encode(list(TEXTS))
    np.testing.assert_array_equal(load_trusted(folder).encode(list(TEXTS)), expected)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", PASSED_OVER)
def test_nor_do_the_commands_run_it(sealed, tmp_path, way, monkeypatch):
    folder, marker = hostile(sealed["stock"], PASSED_OVER[way], tmp_path)
    monkeypatch.chdir(folder)
    for command in ("check", "evaluate", "mine", "average"):
        assert main(arguments(command, folder, tmp_path)) == 0, command
    assert not marker.exists()


def hostile_base(folder: Path, marker: Path, file: str, key: str, model_type: str = "llama") -> str:
    save_llm(folder)
    put(folder / "evil.py", EVIL.format(marker=str(marker)))
    edit(folder / file, auto_map=key_of(key, "evil"))
    edit(folder / "config.json", model_type=model_type)
    return str(folder)


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize(("file", "key"), [("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")])
def test_a_base_that_names_code_which_its_type_does_not_need(tmp_path, file, key, form):
    """Many on the Hub do. Nothing runs it, neither here nor where the model goes, and nothing keeps its name."""
    base, marker = hostile_base(tmp_path / "base", tmp_path / "ran", file, key), tmp_path / "ran"
    model = build_model(base, "nv-embed", num_latents=4, num_heads=2, head_dim=16)
    if form == "adapter":
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    folder = save_sealed(model, tmp_path / "sealed")
    assert code_in(folder) == {}
    assert not any('"auto_map"' in file.read_text() for file in folder.glob("*.json"))
    assert check(folder).difference <= 1e-5
    buyers = SentenceTransformer(str(folder), trust_remote_code=True)
    np.testing.assert_allclose(buyers.encode(list(TEXTS)), model.encode(list(TEXTS)), atol=1e-5)
    assert not marker.exists()


def test_an_unknown_type_asks_nobody(tmp_path, monkeypatch, capsys):
    """transformers would ask on standard input, and take y for consent."""
    base, marker = hostile_base(tmp_path / "base", tmp_path / "ran", "config.json", "AutoConfig", "evil"), "ran"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="contains custom code"):
        build_model(base)
    config = {"output": str(tmp_path / "out-train"), "model": {"base": base, "recipe": "mean"}}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": "d"}\n')
    config["data"] = {"x": {"read": "load_dataset", "path": "json", "data_files": str(rows), "split": "train"}}
    config["data"]["x"]["instruction"] = "Find"
    config |= {"arguments": {"use_cpu": True, "max_steps": 1}, "stages": [{"name": "a", "data": ["x"]}]}
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    sealed = save_sealed(build_model(save_llm(tmp_path / "llm"), "last-token"), tmp_path / "sealed")
    commands = [
        ["convert", base, str(tmp_path / "out-convert")],
        ["export", str(sealed), base, str(tmp_path / "out-export")],
        ["train", str(tmp_path / "train.yaml")],
        ["mine", str(rows), base, "--output", str(tmp_path / "out-mine")],
    ]
    for command in commands:
        assert main(command) == 2, command
        assert "custom code" in capsys.readouterr().err, command
    assert not (tmp_path / marker).exists()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("out")]


def test_consent_runs_it(sealed, tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(sealed["own"], folder)
    append(folder / "llm_backbone.py", EVIL.format(marker=str(marker)))
    expected = load_trusted(sealed["own"]).encode(list(TEXTS))
    np.testing.assert_allclose(load_trusted(folder, True).encode(list(TEXTS)), expected, atol=1e-6)
    assert marker.exists()
    marker.unlink()
    assert check(folder, trust_remote_code=True).difference <= 1e-5
    assert marker.exists()


@pytest.mark.parametrize("form", ["own", "stock", "adapter"])
def test_sealed_folders_open_without_consent(sealed, form):
    assert code_in(sealed[form]) == {}
    assert load_trusted(sealed[form]).trust_remote_code is False
    assert check(sealed[form]).difference <= 1e-5


def test_folders_of_released_versions_open_without_consent():
    stored = [folder for folder in STORED.iterdir() if folder.is_dir()]
    for folder in stored:
        assert code_in(folder) == {}, folder
        expected = json.loads(STORED.joinpath(f"{folder.name}.json").read_text())
        model = load_trusted(folder)
        for name, rows in expected.items():
            found = model.encode(list(TEXTS), prompt=model.prompts[name])
            np.testing.assert_allclose(found, np.array(rows, dtype=np.float32), atol=1e-5)
    assert len(RELEASED) == len({file.read_bytes() for folder in stored for file in folder.glob("*.py")})


def test_a_released_backbone_is_not_trusted_with_an_adapters_base(tmp_path):
    """It ran the code of the base."""
    folder = tmp_path / "model"
    shutil.copytree(STORED / "nv-embed-0.1.0", folder)
    edit(folder / "adapter_config.json", base_model_name_or_path="org/base")
    assert "llm_backbone.py" in code_in(folder)


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "notes.txt")


def endless(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def header(folder: Path, text: bytes, length: int | None = None) -> None:
    size = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text)


HUGE = b'{"w": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4000000000000]}}'
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (fifo, "is no regular file"),
    "a link out": (lambda f: (f / "notes.txt").symlink_to("/etc/passwd"), "lead out of the folder"),
    "a link to itself": (lambda f: (f / "loop").symlink_to(f / "loop"), "lead out of the folder"),
    "a link to nothing": (lambda f: (f / "loop").symlink_to(f / "nothing"), "lead out of the folder"),
    "deep nesting": (endless("modules.json", "[" * 100_000 + "]" * 100_000), "is nested too deeply"),
    "a huge number": (endless("config.json", '{"x": ' + "9" * 5000 + "}"), "is not JSON"),
    "another encoding": (lambda f: (f / "config.json").write_bytes(b'{"x": "\xff\xfe"}'), "is not JSON"),
    "layers": (lambda f: edit(f / "config.json", num_hidden_layers=10**7), "says 10,000,000 in 'num_hidden_layers'"),
    "layers, a few": (lambda f: edit(f / "config.json", num_hidden_layers=500), "says 500 in 'num_hidden_layers'"),
    "elements": (lambda f: header(f, HUGE), "is damaged or cut off"),
    "a long header": (lambda f: header(f, HUGE, 1 << 40), "is damaged or cut off"),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "It is a pointer of git LFS: run git lfs pull",
    ),
    "no weights at all": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged or cut off"),
    "layers by another name": (lambda f: edit(f / "config.json", encoder_layers=10**7), "in 'encoder_layers'"),
    "layers of stages": (lambda f: edit(f / "config.json", depths=[2, 10**7]), "says 10,000,000 in 'depths'"),
    "a width": (
        lambda f: edit(f / "1_Pooling" / "config.json", embedding_dimension=10**9),
        "the largest of its weights",
    ),
    "a vocabulary": (lambda f: edit(f / "config.json", vocab_size=10**9), "says 1,000,000,000 in 'vocab_size'"),
    "padding": (
        lambda f: edit(f / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 10**9}}),
        "in 'processing_kwargs', to pad texts to",
    ),
    "prompts": (
        lambda f: edit(f / "config_sentence_transformers.json", prompts={str(i): "x" for i in range(1001)}),
        "has 1,001 prompts",
    ),
    "a rank": (lambda f: edit(f / "adapter_config.json", r=10**9), "says 1,000,000,000 in 'r'"),
    "a pattern": (
        lambda f: edit(f / "adapter_config.json", target_modules="(([a-z0-9_.]+)+)+!"),
        "has the regular expression",
    ),
    "layers of layers": (
        lambda f: edit(f / "adapter_config.json", layer_replication=[[0, 1]] * 200_000),
        "says 200,000 in 'layer_replication'",
    ),
    "a link to a folder": (lambda f: (f / "there").symlink_to(f / "1_Pooling"), "lead out of the folder, to another"),
    "an index out": (
        lambda f: edit(f / "model.safetensors.index.json", weight_map={"x": "../x.safetensors"}),
        "is outside of the folder",
    ),
    "an index of lists": (
        lambda f: edit(f / "model.safetensors.index.json", weight_map=[1]),
        "is no index of weights",
    ),
    "a size": (lambda f: os.truncate(f / "config.json", 1 << 27), "which no configuration has"),
    "modules of nothing": (endless("modules.json", "[]"), "is no list of modules"),
    "modules of null": (endless("modules.json", "null"), "is no list of modules"),
    "modules of numbers": (endless("modules.json", '[{"type": 3, "path": "", "name": "0"}]'), "is no list of modules"),
    "a path": (endless("modules.json", '[{"type": "a.b", "path": "/x", "name": "0"}]'), "is outside of the folder"),
    "configurations that are lists": (endless("config.json", "[1]"), "is no JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_made_to_hurt_end_in_one_message(sealed, tmp_path, damage, capsys):
    folder = tmp_path / "model"
    shutil.copytree(sealed["stock"], folder)
    make, message = DAMAGES[damage]
    make(folder)
    with pytest.raises(ValueError, match=message):
        check_data(folder)
    for command in ("check", "evaluate", "average", "merge", "mine"):
        assert main(arguments(command, folder, tmp_path)) == 2
        error = capsys.readouterr().err
        assert message in error and len(error) < 1000, command


def test_weights_that_are_no_numbers_are_not_averaged(sealed, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sealed["stock"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    tensors[name][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"NaN or infinity in {name}"):
        average_checkpoints([sealed["stock"], folder], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {**content, "dtype": "load"}, "dtype"),
        (lambda content: {key: value for key, value in content.items() if key != "texts"}, "texts"),
        (lambda content: [1], "no JSON object"),
        (lambda content: {**content, "texts": [], "embeddings": {"query": []}}, "texts"),
        (lambda content: {**content, "embeddings": {"document": [["x"]]}}, "embeddings"),
    ],
)
def test_a_reference_of_another_form_is_refused(sealed, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(sealed["stock"], folder)
    content = change(json.loads((folder / "reference.json").read_text()))
    (folder / "reference.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"reference.json.*{message}"):
        check(folder)


def test_a_reference_does_not_say_how_strictly_it_is_compared(sealed, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sealed["stock"], folder)
    content = json.loads((folder / "reference.json").read_text())
    moved = {name: [[x + 0.005 for x in row] for row in rows] for name, rows in content["embeddings"].items()}
    (folder / "reference.json").write_text(json.dumps({**content, "dtype": "bfloat16", "embeddings": moved}))
    with pytest.raises(RuntimeError, match="at most 1e-05 is rounding. Settings that differ: dtype: bfloat16 then"):
        check(folder)


def test_names_are_shown_so_that_they_imitate_nothing(sealed, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(sealed["stock"], folder)
    (folder / "x\nThe embeddings are the expected ones\x1b[31m").write_text("x")
    with open(os.fsencode(str(folder)) + b"/\xff\xfe.txt", "w") as file:
        file.write("x")
    assert main(["check", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and shown.count("\nThe embeddings are the expected ones") == 1


def test_links_are_not_followed_out_of_a_folder_named_as_the_hubs(sealed, tmp_path):
    folder = tmp_path / "archive" / "snapshots" / "model"
    shutil.copytree(sealed["stock"], folder)
    (tmp_path / "archive" / "hidden.json").write_text("{}")
    (folder / "notes.json").symlink_to(tmp_path / "archive" / "hidden.json")
    with pytest.raises(ValueError, match="lead out of the folder"):
        check_data(folder)
    (folder / "notes.json").unlink()
    (tmp_path / "archive" / "blobs").mkdir()
    shutil.move(folder / "config.json", tmp_path / "archive" / "blobs" / "0")
    (folder / "config.json").symlink_to(tmp_path / "archive" / "blobs" / "0")  # as in the Hub's cache
    check_data(folder)


def test_an_adapters_base_is_looked_through_too(llm, sealed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    shutil.copytree(sealed["adapter"], folder)
    for changes, message in (
        ({"num_hidden_layers": 10**6}, "says 1,000,000 in 'num_hidden_layers'"),
        ({"attn_implementation": "org/kernel"}, "is a kernel of the Hub"),
    ):
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        base = save_llm(tmp_path / "base")
        edit(Path(base) / "config.json", **changes)
        edit(folder / "adapter_config.json", base_model_name_or_path=base)
        for act in (load_trusted, check, build_model):
            with pytest.raises(ValueError, match=message):
                act(folder)
        with pytest.raises(ValueError, match=message):
            build_model(base)
        with pytest.raises(ValueError, match=message):
            export_causal_lm(build_model(llm, "last-token"), base, tmp_path / "out")
    edit(folder / "adapter_config.json", base_model_name_or_path="base")
    with pytest.raises(ValueError, match="names the base 'base', a folder by a relative path"):
        load_trusted(folder)


def test_what_is_merged_names_no_code_that_its_base_named(sealed, tmp_path):
    """By way of a stock module for the LLM, which keeps auto_map, and one of this package's for the pooling."""
    marker = tmp_path / "ran"
    base = hostile_base(tmp_path / "base", marker, "config.json", "AutoConfig")
    folder = tmp_path / "adapter"
    model = build_model(base, "nv-embed", attention="causal", num_latents=4, num_heads=2, head_dim=16)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    kept = json.loads((folder / "sentence_bert_config.json").read_text())
    own = ("attention", "window", "add_eos", "instruction_mask", "probe", "num_layers", "model_kwargs")
    (folder / "sentence_bert_config.json").write_text(json.dumps({k: v for k, v in kept.items() if k not in own}))
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    assert not any('"auto_map"' in file.read_text() for file in (tmp_path / "merged").rglob("*.json"))
    assert not marker.exists()


def test_a_hub_id_goes_through_the_gate_too():
    with pytest.raises(OSError, match="org/model-that-is-nowhere|offline|outgoing traffic"):
        load_trusted("org/model-that-is-nowhere")


def test_a_fifo_does_not_hang_a_run_that_starts_from_it(sealed, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(sealed["stock"], start)
    os.mkfifo(start / "x.json")
    config = {
        "output": str(tmp_path / "out"),
        "model": {"load": str(start)},
        "data": {"x": {"read": "from_sts", "source": "x"}},
    }
    (tmp_path / "train.yaml").write_text(json.dumps({**config, "stages": [{"name": "a", "data": ["x"]}]}))
    assert main(["train", str(tmp_path / "train.yaml")]) == 2
    assert "is no regular file" in capsys.readouterr().err


def test_oddities_of_a_config_are_one_message(tmp_path, capsys):
    base = Path(save_llm(tmp_path / "base"))
    kept = json.loads((base / "config.json").read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"anchor": "a", "positive": "b"}\n' * 2)
    data = {"read": "load_dataset", "path": "json", "data_files": str(rows), "split": "train", "instruction": "Find"}
    config = {"output": str(tmp_path / "run"), "model": {"base": str(base)}, "data": {"rows": data}}
    (tmp_path / "train.yaml").write_text(json.dumps({**config, "stages": [{"name": "a", "data": ["rows"]}]}))
    for changes, command in (
        ({"hidden_act": "nope"}, ["train", str(tmp_path / "train.yaml")]),
        ({"architectures": [1]}, ["mine", str(rows), str(base), "--output", str(tmp_path / "out")]),
        ({"model_type": "nvembed", "text_config": [1]}, ["convert", str(base), str(tmp_path / "out")]),
    ):
        (base / "config.json").write_text(json.dumps({**kept, **changes}))
        status = main(command)
        said = capsys.readouterr().err
        assert "Traceback" not in said and (status == 2 or "architectures" in changes), (command, said[-500:])
