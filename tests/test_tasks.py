"""The tasks of public data sets, and what a task demands of its data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources

import pytest

from st_llm_embed.tasks import KINDS, Task, encoding_prompts, known_task

KNOWN = json.loads(resources.files("st_llm_embed").joinpath("tasks.json").read_text(encoding="utf-8"))


def test_every_known_task_is_a_plain_sentence():
    kinds = {known_task(name).kind for name in KNOWN}
    assert kinds == set(KINDS) and len(KNOWN) > 100
    for name in KNOWN:
        task = known_task(name)
        assert (task.name, task.instruction) == (name, KNOWN[name]["instruction"])
        assert re.fullmatch(r"[A-Z][^.\n]{15,110}", task.instruction), name
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert (task.kind == "retrieval") == task.instruction.startswith("Given "), name


def test_the_workplaces_data_sets_are_known(shared):
    kinds = {"sts": "sts", "nli": "pair", "pair classification": "pair", "classification": "classification"}
    kinds |= {"classification (clustering)": "clustering"}
    folders = [folder for folder in (shared / "data").iterdir() if folder.is_dir()]
    assert len(folders) > 30
    for folder in folders:
        kind = json.loads((folder / "META.json").read_text())["type"]
        assert known_task(folder.name).kind == kinds.get(kind, "retrieval"), folder.name


def test_an_unknown_task_names_its_neighbours():
    with pytest.raises(ValueError, match=r"No task is known as 'SciFacts'. Near it: scifact.*Task\('SciFacts', "):
        known_task("SciFacts")
    with pytest.raises(ValueError, match="No task is known as 'q'. Known: amazon_qa, arguana, "):
        known_task("q")


def test_negatives_and_weight_are_checked():
    task = replace(known_task("scifact"), negatives=7, weight=0.5)
    assert (task.negatives, task.weight, task.in_batch_negatives) == (7, 0.5, True)
    assert Task("x", "y").negatives is None and Task("x", "y").weight == 1
    with pytest.raises(ValueError, match="Task 'x' has negatives=-1. It must be 0 or more"):
        Task("x", "y", negatives=-1)
    for name in ("query", "document", "passage", "corpus", "similarity"):
        with pytest.raises(ValueError, match=f"A task cannot be called '{name}'.*such as 'my_{name}'"):
            Task(name, "y")
    with pytest.raises(ValueError, match="Task 'x' has '{text}' in its instruction"):
        Task("x", "Find {text} here")
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"Task 'x' has weight={weight}. It must be a positive number"):
            Task("x", "y", weight=weight)


def test_documents_may_have_a_prompt_of_their_own():
    """The first retrieval task's is every document's; another's goes by its name."""
    docs = Task("docs", "Find it", document_prompt="passage: ")
    news = Task("news", "Find news", document_prompt="{text} (news)")
    plain = Task("plain", "Find all")
    assert docs.column_prompts(["anchor", "positive", "negative_1"], {"document": "other"}) == {
        "anchor": "Instruct: Find it\nQuery: ",
        "positive": "passage: ",
        "negative_1": "passage: ",
    }
    prompts = encoding_prompts([docs, news], {})
    assert prompts["document"] == prompts["docs-document"] == "passage: "
    assert prompts["news-document"] == "{text} (news)" and prompts["query"] == prompts["docs"]
    assert "document" not in encoding_prompts([plain, docs], {})
    llara = {"document": "{text} The original sentence:"}
    assert docs.column_prompts(["positive"], llara) == {"positive": "passage: {text} The original sentence:"}
    assert encoding_prompts([docs], llara)["document"] == "passage: {text} The original sentence:"
    assert news.column_prompts(["positive"], llara) == {"positive": "{text} (news)"}
    assert Task("docs", "Find it", document_prompt="").column_prompts(["positive"], {"document": "other"}) == {}
    with pytest.raises(ValueError, match="document_prompt, and is of the kind 'sts', whose texts are all of one sort"):
        Task("docs", "Tell", "sts", document_prompt="passage: ")
