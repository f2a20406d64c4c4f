"""A whole run from one configuration: what it leaves, and that neither SIGKILL nor a second process changes it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from st_llm_embed.cli import main
from st_llm_embed.data import windows
from st_llm_embed.hub import save_sealed
from st_llm_embed.tasks import Task
from st_llm_embed.training import train_stages
from st_llm_embed.training.configuration import Given
from st_llm_embed.training.plan import describe_run
from st_llm_embed.training.run_config import RunConfig, Stage, stage_arguments
from st_llm_embed.training.run_folder import LOCK, last_checkpoint
from st_llm_embed.training.shared_stages import SharedStages
from st_llm_embed.training.stage_data import READERS, splitter
from st_llm_embed.training.stages import prepare_run
from st_llm_embed.weights.merging import merge_adapter

QUIET = {
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
}
ANIMALS = ["cat", "dog", "fox", "moon", "mat", "list", "number", "passage"]


def write_lines(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


@pytest.fixture
def settings(llm, tmp_path) -> dict:
    """Pretext on documents, retrieval with in-batch negatives, everything blended; the LLM by LoRA."""
    data = tmp_path / "data"
    data.mkdir()
    documents = [
        {"text": f"The {a} sat. The {b} jumped over it. And the {a} barked."} for a in ANIMALS for b in ANIMALS
    ]
    pairs = [
        {"query": f"where is {a} {n}", "pos": [f"the {a} number {n} sat"], "neg": [f"the {b} jumped {n}", f"{n} dogs"]}
        for a, b in zip(ANIMALS, ANIMALS[1:], strict=False)
        for n in range(4)
    ]
    texts = [{"text": f"{a} text number {n}", "label": a} for a in ANIMALS for n in range(4)]
    return {
        "output": str(tmp_path / "run"),
        "model": {"base": llm, "recipe": "nv-embed", "num_latents": 4, "lora": True, "max_seq_length": 64},
        "arguments": {**QUIET, "per_device_train_batch_size": 4},
        "data": {
            "documents": {
                "read": "consecutive_texts",
                "documents": write_lines(data / "documents.jsonl", documents),
                "split": "sentences",
            },
            "pairs": {
                "read": "from_judged_queries",
                "source": write_lines(data / "pairs.jsonl", pairs),
                "negatives": 2,
                "instruction": "Find it",
            },
            "banking77": {
                "read": "from_class_examples",
                "source": write_lines(data / "texts.jsonl", texts),
                "negatives": 1,
            },
        },
        "stages": [
            {"name": "pretext", "data": ["documents"], "arguments": {"max_steps": 2}},
            {"name": "retrieval", "data": ["pairs"], "arguments": {"stage": 1, "max_steps": 3}},
            {
                "name": "blended",
                "data": ["pairs", "banking77"],
                "arguments": {"stage": 2, "max_steps": 9, "save_steps": 1, "save_total_limit": 2},
            },
        ],
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_a_run_starts_from_the_model_that_another_left(settings, tmp_path):
    first, last = settings["stages"][0], settings["stages"][2]
    left = train_stages({**settings, "stages": [{**settings["stages"][1], "arguments": {"stage": 1, "max_steps": 1}}]})
    still = {**last, "data": ["banking77"], "arguments": {"stage": 2, "max_steps": 1, "learning_rate": 0.0}}
    went_on = {**settings, "output": str(tmp_path / "second"), "model": {"load": str(left)}, "stages": [still]}
    second = train_stages(went_on)
    for name, tensor in weights(left).items():
        torch.testing.assert_close(weights(second)[name], tensor, rtol=0, atol=0)
    assert {"pairs", "banking77"} <= set(SentenceTransformer(str(second), trust_remote_code=True).prompts)
    table = (second / "README.md").read_text().partition("## How it was trained")[2]
    assert table.index("| retrieval | 1 | pairs") < table.index("| blended | 2 | banking77")
    with pytest.raises(ValueError, match="is no model of sentence-transformers: it has no modules.json"):
        train_stages(
            {**went_on, "output": str(tmp_path / "third"), "model": {"load": str(tmp_path)}, "stages": [first]}
        )


def test_three_stages_and_what_they_leave(settings, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert main(["train", str(file)]) == 0
    last = tmp_path / "run" / "3-blended" / "model"
    assert capsys.readouterr().out.endswith(f"Wrote {last}.\n")
    stages = [tmp_path / "run" / name / "model" for name in ("1-pretext", "2-retrieval", "3-blended")]
    first, second, third = map(weights, stages)
    trained = {name for name in first if "lora_" in name}
    assert trained and all((first[name] != second[name]).any() for name in trained)
    assert all((second[name] != third[name]).any() for name in third)
    model = SentenceTransformer(str(last), trust_remote_code=True)
    assert model.prompts["query"] == model.prompts["pairs"] == "Instruct: Find it\nQuery: "
    assert model.prompts["banking77"].startswith("Instruct: ")
    sealed = save_sealed(merge_adapter(model), tmp_path / "published")
    card = (sealed / "README.md").read_text()
    assert card.index("## What this is") < card.index("## How it was trained") < card.index("## Model Details")
    assert "| pretext | pretext (EBAE + EBAR) | documents (a stream) |" in card
    assert (
        "| retrieval | 1 | pairs (28 rows) |" in card
        and "| blended | 2 | pairs (28 rows), banking77 (32 rows) |" in card
    )
    # Finished stages are kept; the last one, removed, comes out the same from the second's weights.
    seconds = stages[1].stat().st_mtime_ns
    last.rename(tmp_path / "before")
    for checkpoint in last.parent.glob("checkpoint-*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    assert train_stages(file) == last and stages[1].stat().st_mtime_ns == seconds
    for name, tensor in weights(last).items():
        torch.testing.assert_close(tensor, third[name], atol=1e-6, rtol=0)


def test_a_run_that_goes_on_has_the_prompts_of_the_stages_before(settings):
    """The last stage does not train the retrieval task, whose prompt its model must still have."""
    settings["stages"] = settings["stages"][1:]
    settings["stages"][1] |= {"data": ["banking77"], "arguments": {"stage": 2, "max_steps": 1}}
    last = train_stages(settings)
    expected = SentenceTransformer(str(last), trust_remote_code=True).prompts
    assert expected["pairs"] == expected["query"] and expected["banking77"].startswith("Instruct: ")
    last.rename(last.with_name("before"))
    assert train_stages(settings) == last
    assert SentenceTransformer(str(last), trust_remote_code=True).prompts == expected


def test_the_output_of_another_run_is_refused(settings, tmp_path):
    def changed(**changes) -> dict:
        return {**settings, "output": str(tmp_path / f"at-{time.monotonic_ns()}"), **changes}

    stage = settings["stages"][0]
    train_stages(changed(stages=[stage], output=settings["output"]))
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train_stages(changed(stages=[stage], output=settings["output"], seed=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something that is no run of this command"):
        train_stages(changed(output=str(tmp_path / "full")))


def test_numbers_as_text_train_as_numbers(settings, tmp_path):
    """As PyYAML writes 2e-2, and as people write it."""
    settings["stages"] = [{"name": "one", "data": [7], "arguments": {"stage": 1, "max_steps": 1}}]
    settings["data"] = {7: settings["data"]["pairs"]}
    settings["arguments"]["weight_decay"] = "1e-2"
    text = yaml.safe_dump({**settings, "seed": "3"})
    (tmp_path / "config.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 1e-2"))
    model = train_stages(tmp_path / "config.yaml")
    args = torch.load(next(model.parent.glob("checkpoint-*/training_args.bin")), weights_only=False)
    assert (args.learning_rate, args.weight_decay, args.seed) == (1e-2, 1e-2, 3)
    assert "7" in SentenceTransformer(str(model), trust_remote_code=True).prompts  # a name that YAML reads as a number


def test_a_run_that_never_began_gives_way_to_its_correction(settings, tmp_path):
    """It was claimed, and fell over before its first checkpoint."""
    output = tmp_path / "run"
    (output / "1-pretext").mkdir(parents=True)
    (output / "config.yaml").write_text("model: {base: too-large-for-this-machine}")
    settings["stages"] = [{**settings["stages"][1], "arguments": {"stage": 1, "max_steps": 1}}]
    last = train_stages(settings)
    assert last.is_dir() and yaml.safe_load((output / "config.yaml").read_text()) == settings
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train_stages({**settings, "seed": 1})


def test_two_processes_do_not_train_in_one_output(settings, tmp_path, monkeypatch):
    """The lock goes with its process, killed or not, and without it nothing is in the way."""
    settings["stages"] = [{**settings["stages"][1], "arguments": {"stage": 1, "max_steps": 1}}]
    output = tmp_path / "run"
    output.mkdir()
    script = "import sys, time\nfrom filelock import FileLock\nwith FileLock(sys.argv[1]):\n    print(1, flush=True)\n"
    command = [sys.executable, "-c", script + "    time.sleep(600)", str(output / LOCK)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.readline()
    monkeypatch.setattr("st_llm_embed.training.run_folder.WAIT", 0)
    with pytest.raises(RuntimeError, match="Another process is running in .*run. Wait for its end, or choose another"):
        train_stages(settings)
    assert not list(output.glob("*-*"))
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert train_stages(settings).is_dir()


def test_damaged_weights_are_passed_over_and_named(settings, caplog):
    """The newest checkpoints hold nothing, half and no weights; the one before them serves."""
    steps = {"stage": 1, "max_steps": 5, "save_steps": 1}
    settings["stages"] = [{**settings["stages"][1], "arguments": steps}]
    model = train_stages(settings)
    expected = weights(model)
    for step, damage in ((5, 0), (4, 1000), (3, None)):
        file = model.parent / f"checkpoint-{step}" / "1_LatentAttentionPooling" / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:damage])
    for file in (model.parent / "checkpoint-3").rglob("*.safetensors"):
        file.unlink()
    assert train_stages(settings) == model  # it is finished
    model.rename(model.with_name("before"))
    assert train_stages(settings) == model
    passed_over = [message for message in caplog.messages if "is passed over: cut off or missing are" in message]
    assert [message.partition(" ")[0][-1] for message in passed_over] == ["5", "4", "3"]
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    (model / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="adapter_model.safetensors. Remove that folder; its stage then goes on"):
        train_stages(settings)


@pytest.fixture
def sharing(settings, tmp_path):
    """A run of two stages, and what makes another one of it that shares its stages."""
    settings["stages"] = settings["stages"][1:]
    for stage in settings["stages"]:
        stage["arguments"] |= {"max_steps": 1, "save_steps": 1}
    settings["shared_stages"] = str(tmp_path / "shared")
    outputs = (str(tmp_path / f"run-{number}") for number in range(2, 9))
    return settings, lambda **changes: {**copy.deepcopy(settings), "output": next(outputs), **changes}


def trained(config: dict) -> list[bool]:
    """Whether a run has taken a step of each of its stages."""
    output, stages = Path(config["output"]), config["stages"]
    return [any((output / f"{n}-{stage['name']}").glob("checkpoint-*")) for n, stage in enumerate(stages, 1)]


def test_a_run_takes_the_stages_that_another_began_with(sharing, caplog, tmp_path):
    settings, other = sharing
    first = train_stages(settings).parents[1] / "1-retrieval" / "model"
    kept = sorted(folder.name for folder in (tmp_path / "shared").glob("[!.]*"))
    assert [name.rpartition("-")[0] for name in kept] == ["blended", "retrieval"]
    second = other()
    # What leaves the weights as they are, a default that is said, and another last stage.
    second["stages"][0]["arguments"] |= {"logging_steps": 3, "save_steps": 7, "max_grad_norm": 1.0}
    second["stages"][1]["arguments"]["learning_rate"] = 0.0
    assert f"is taken from another run: {tmp_path / 'shared' / kept[1]}" in describe_run(second)
    last = train_stages(second)
    assert trained(second) == [False, True] and any("Stage retrieval is taken from" in m for m in caplog.messages)
    taken = last.parents[1] / "1-retrieval" / "model"
    for folder in (taken, last):  # the last stage went on from it, and learned nothing
        assert weights(folder).keys() == weights(first).keys()
        for name, tensor in weights(folder).items():
            torch.testing.assert_close(tensor, weights(first)[name], rtol=0, atol=0)
    rows = (last / "README.md").read_text().partition("## How it was trained")[2]
    assert rows.count("| retrieval | 1 | pairs (28 rows) |") == 1 == rows.count("| blended | 2 | pairs (28 rows), ba")
    # A run that goes on is as ever, and may not begin otherwise.
    assert train_stages(second) == last
    with pytest.raises(ValueError, match="stages.retrieval.arguments.max_steps was 1 and is 2. That is done already"):
        train_stages({**second, "stages": [{**second["stages"][0], "arguments": {"max_steps": 2}}]})


def test_what_another_run_began_otherwise_is_not_taken(sharing, tmp_path):
    """Each beginning has a name of its own, which goes by what the weights go by."""
    settings, other = sharing
    settings["stages"] = settings["stages"][:1]
    settings["data"]["dev"] = {**settings["data"]["pairs"], "source": str(tmp_path / "data" / "dev.jsonl")}
    shutil.copy(tmp_path / "data" / "pairs.jsonl", tmp_path / "data" / "dev.jsonl")

    def place(config: dict) -> str:
        return prepare_run(config).shared._place(0).name

    evaluated = {"eval_data": ["dev"], "arguments": {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}}
    best = copy.deepcopy(evaluated)
    best["arguments"] |= {"load_best_model_at_end": True, "save_strategy": "steps"}
    (stage,) = settings["stages"]
    changes = [
        {},
        {"seed": 1},
        {"name": "Another"},
        {"model": {**settings["model"], "num_latents": 3}},
        {"stages": [{**stage, "arguments": {**stage["arguments"], "learning_rate": 1e-3}}]},
        {"stages": [{**stage, "loss": {"matryoshka_dims": [32, 8]}}]},
        {"stages": [{**stage, **evaluated}]},
        {"stages": [{**stage, **best}]},
        {"stages": [{**stage, **best, "early_stopping_patience": 2}]},
        {"stages": [{**stage, **best, "arguments": {**best["arguments"], "save_steps": 2}}]},
        {"data": {**settings["data"], "pairs": {**settings["data"]["pairs"], "negatives": 1}}},
    ]
    configs = [{**settings, **change} for change in changes]
    before = [place(config) for config in configs]
    assert len(set(before)) == len(configs)
    file = tmp_path / "data" / "dev.jsonl"
    content, state = file.read_text(), file.stat()
    file.write_text(content.replace("number 1 sat", "number 2 sat"))
    assert place(configs[0]) == before[0] and place(configs[6]) != before[6]
    file.write_text(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    assert place(configs[6]) == before[6], "it is the content that counts"
    # In the file's own folder, paths are relative.
    settings["data"]["pairs"]["source"] = "data/pairs.jsonl"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert place(tmp_path / "config.yaml") == before[0]


def test_only_whole_stages_are_shared_and_only_those_that_are_what_they_say(sharing, caplog, tmp_path, monkeypatch):
    settings, other = sharing
    settings["stages"] = settings["stages"][:1]
    (tmp_path / "shared" / ".retrieval-half").mkdir(parents=True)  # as a killed process leaves one
    train_stages(settings)
    (kept,) = (tmp_path / "shared").glob("[!.]*")
    file = kept / "model" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(whole[:1000]), file.unlink):
        damage()
        again = other()
        caplog.clear()
        train_stages(again)
        assert trained(again) == [True] and any(f"{kept} is passed over" in message for message in caplog.messages)
        assert file.read_bytes() == whole, "the new one took its place"
    # Of two that trained it at the same time, the first one's stays.
    first = file.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(SharedStages, "take", lambda self, number: None)
        model = train_stages(again := other())
    assert trained(again) == [True] and file.stat().st_ino == first
    assert {entry.name for entry in (tmp_path / "shared").iterdir()} - {LOCK} == {kept.name, ".retrieval-half"}
    # What began with other data than the file has now is kept by the run itself only.
    data = tmp_path / "data" / "pairs.jsonl"
    data.write_text(data.read_text().replace("number 1 sat", "number 2 sat"))
    shutil.rmtree(model)
    caplog.clear()
    assert train_stages(again) == model and any("is not kept for other runs" in message for message in caplog.messages)
    assert [*(tmp_path / "shared").glob("[!.]*")] == [kept]
    with pytest.raises(ValueError, match="shared_stages: .*lies in .*, which is this run's alone. Name a folder"):
        train_stages({**again, "shared_stages": f"{again['output']}/shared"})


def test_documents_without_rows_are_refused_before_anything_is_written(settings):
    settings["data"]["documents"]["split"] = "paragraphs"  # of which each document has one
    with pytest.raises(
        ValueError, match="Data set 'documents' cannot be read: No text has a next one: of 64 documents"
    ):
        train_stages(settings)
    assert not Path(settings["output"]).exists()


def test_shared_arguments_reach_the_stages_that_they_have_an_effect_on():
    """What no stage reads is refused, and so is a stage's own argument without effect."""
    stages = [Stage("a", ["text"]), Stage("b", ["docs"]), Stage("c", ["docs"], {"stage": 2})]
    data = {"text": None, "docs": (None, Task("docs", "Find it"))}
    shared = {"learning_rate": 1e-4, "temperature": 0.5, "false_negative_margin": 0.9}

    def arguments_of(stages: list[Stage], **shared: object) -> list[dict]:
        arguments = {"seed": 1, "report_to": [], **shared}
        classes = [SentenceTransformer] * len(stages)
        return stage_arguments(RunConfig("run", {}, data, stages, arguments), data, Given({}), {}, classes)

    always = {"seed": 1, "report_to": []}
    first, second, third = arguments_of(stages, **shared)
    assert first == {**always, "learning_rate": 1e-4} and second == {**always, **shared}
    assert third == {**always, "learning_rate": 1e-4, "temperature": 0.5, "stage": 2}
    with pytest.raises(ValueError, match="false_negative_margin=0.9 has no effect: it is read with tasks="):
        arguments_of(stages[:1], false_negative_margin=0.9)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 has no effect"):
        arguments_of(stages, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="temperature=0.5 has no effect"):
        arguments_of([Stage("a", ["text"], {"temperature": 0.5}), *stages[1:]])


def test_splits_and_readers_by_name():
    assert splitter(7)("a cat sat down") == windows(7)("a cat sat down")
    assert splitter("sentences")("A cat. A dog.") == ["A cat.", "A dog."] and splitter(None)("a\n\nb") == ["a", "b"]
    with pytest.raises(ValueError, match="split='words' is unknown"):
        splitter("words")
    assert {"from_beir", "from_nli", "load_from_disk"} < set(READERS) and "eval" not in READERS


def test_a_checkpoint_that_was_cut_off_is_not_resumed(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"weight": torch.ones(2)}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.slow
def test_killed_and_started_again_is_as_if_never_killed(settings, tmp_path):
    """SIGKILL in the middle of an epoch of the last stage, twice."""

    def command(name: str, output: str) -> list[str]:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**settings, "output": output}))
        return [sys.executable, "-m", "st_llm_embed", "train", str(file)]

    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums in the same order
    whole = tmp_path / "whole" / "3-blended" / "model"
    subprocess.run(command("whole", str(tmp_path / "whole")), check=True, capture_output=True, env=env)
    killed = command("killed", settings["output"])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env}
    folder = Path(settings["output"]) / "3-blended"
    for step in (2, 5):
        process = subprocess.Popen(killed, **quiet)
        while not (folder / f"checkpoint-{step}" / "trainer_state.json").is_file():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "model").exists()
    subprocess.run(killed, check=True, **quiet)
    expected = weights(whole)
    for name, tensor in weights(folder / "model").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    losses = []
    for run in (whole.parent, folder):
        state = json.loads((Path(last_checkpoint(run)) / "trainer_state.json").read_text())
        losses.append([row["loss"] for row in state["log_history"]])
    assert len(losses[0]) == 9 and losses[1] == pytest.approx(losses[0], abs=1e-4)


EXAMPLES = Path(__file__).parents[1] / "examples" / "distributed"
DDP = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611", "-m", "st_llm_embed"]
FSDP = [
    *("-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "fsdp.yaml"), "--num_processes=2"),
    *("--mixed_precision=no", "--main_process_port=29612", str(Path(__file__).with_name("fsdp_on_cpu.py"))),
]


def run(settings: dict, file: Path, launcher: list[str]) -> dict[str, list[float]]:
    """Train in a process of its own, or two; gives the losses of each stage."""
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, *launcher, "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {}
    for folder in Path(settings["output"]).glob("*-*"):
        state = json.loads((Path(last_checkpoint(folder)) / "trainer_state.json").read_text())
        losses[folder.name] = [row["loss"] for row in state["log_history"] if "loss" in row]
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [DDP, FSDP], ids=["DDP", "FSDP"])
def test_two_processes_give_the_losses_of_one(settings, tmp_path, launcher):
    """On gloo, half the batch each and negatives gathered, against the whole batch in one process."""
    # Plain gradient descent: Adam would blow up what rounding leaves of gradients that are zero.
    settings["arguments"] |= {"mini_batch_size": 3, "optim": "sgd", "learning_rate": 1e-4, "save_steps": 3}
    settings["arguments"] |= {"gather_across_devices": True}
    settings["stages"][2]["arguments"]["save_steps"] = 3
    settings["model"]["lora"] = False
    losses = []
    for processes in (1, 2):
        settings["output"] = str(tmp_path / f"with-{processes}")
        settings["arguments"]["per_device_train_batch_size"] = 8 // processes
        how = ["-m", "st_llm_embed"] if processes == 1 else launcher
        losses.append(run(settings, tmp_path / f"config-{processes}.yaml", how))
    one, two = losses
    assert {name: len(history) for name, history in one.items()} == {"1-pretext": 2, "2-retrieval": 3, "3-blended": 9}
    assert one["2-retrieval"][2] < one["2-retrieval"][0]
    for name, history in one.items():
        assert two[name] == pytest.approx(history, abs=1e-4)
        expected = weights(tmp_path / "with-1" / name / "model")
        for key, tensor in weights(tmp_path / "with-2" / name / "model").items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-4)
        shards = list((tmp_path / "with-2" / name).glob("checkpoint-*/pytorch_model_fsdp.bin"))
        assert bool(shards) == (launcher is FSDP)


@pytest.mark.slow
def test_under_fsdp_a_run_goes_on_from_its_last_checkpoint(settings, tmp_path):
    """By LoRA and in bf16, as the example's file says."""
    settings["stages"] = settings["stages"][2:]
    settings["stages"][0]["arguments"] |= {"max_steps": 4, "save_steps": 2}
    as_in_the_file = [argument for argument in FSDP if not argument.startswith("--mixed_precision")]
    whole = run(settings, tmp_path / "config.yaml", as_in_the_file)
    folder = tmp_path / "run" / "1-blended"
    (folder / "model").rename(tmp_path / "whole")
    (folder / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    assert run(settings, tmp_path / "config.yaml", as_in_the_file) == whole and len(whole["1-blended"]) == 4
    expected = weights(tmp_path / "whole")
    assert any("lora_" in name for name in expected)
    for name, tensor in weights(folder / "model").items():
        torch.testing.assert_close(tensor, expected[name.replace("model/", "whole/", 1)], atol=1e-6, rtol=0)


def test_accelerate_knows_every_key_of_the_distributed_examples():
    known = set(vars(launch_command_parser().parse_args(["script"])))
    for file, part in (("fsdp.yaml", "fsdp_config"), ("deepspeed.yaml", "deepspeed_config")):
        config = load_config_from_file(str(EXAMPLES / file))
        keys = set(getattr(config, part))
        assert keys and keys <= known and config.mixed_precision == "bf16"
