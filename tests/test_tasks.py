"""The tasks of public data sets, and what a task demands of its data."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from importlib import resources

import pytest

from st_llm_embed.tasks import KINDS, Task, encoding_prompts, known_task, takes_instructions, template_of

KNOWN = json.loads(resources.files("st_llm_embed").joinpath("tasks.json").read_text(encoding="utf-8"))


def test_every_known_task_is_a_plain_sentence():
    kinds = {known_task(name).kind for name in KNOWN}
    assert kinds == set(KINDS) - {"documents"} and len(KNOWN) > 100
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


# Prompts as they are published, and the template in them.
WEB = "Given a web search query, retrieve relevant passages that answer the query"
PUBLISHED = {
    "Qwen3-Embedding": (f"Instruct: {WEB}\nQuery:", "Instruct: {instruction}\nQuery:"),
    "gte-Qwen2": (f"Instruct: {WEB}\nQuery: ", "Instruct: {instruction}\nQuery: "),
    "KaLM": (f"Instruct: {WEB} \n Query: ", "Instruct: {instruction} \n Query: "),
    "Youtu": (f"Instruction: {WEB} \nQuery: ", "Instruction: {instruction} \nQuery: "),
    "EmbeddingGemma": ("task: search result | query: ", "task: {instruction} | query: "),
    "sarashina": ("task: クエリを与えるので\nquery: ", "task: {instruction}\nquery: "),
    "GritLM": (f"<|user|>\n{WEB}\n<|embed|>\n", "<|user|>\n{instruction}\n<|embed|>\n"),
    "bge-multilingual-gemma2": (f"<instruct>{WEB}.\n<query>", "<instruct>{instruction}\n<query>"),
    "other line breaks": (f"Instruct: {WEB}\r\n\r\n질문：", "Instruct: {instruction}\r\n\r\n질문："),
    "several lines": ("Instruct: Find a | b.\nQuery: what?\nQuery: ", "Instruct: {instruction}\nQuery: "),
    "a text that ends": ("Instruct: Find\nQuery: {text}</s>", "Instruct: {instruction}\nQuery: "),
    "a template itself": ("Instruct: {instruction}\nQuery: ", "Instruct: {instruction}\nQuery: "),
    **{name: (prompt, prompt) for name, prompt in {
        "e5": "query: ",
        "nomic-embed": "search_query: ",
        "bge": "Represent this sentence for searching relevant passages: ",
        "instructor": "Represent the task: Wikipedia\nquestion: ",
        "GritLM without": "<|embed|>\n",
        "a chat's turn": "<|im_start|>user\nQuery: ",
        "an instruction to the end": "Instruct: find the answer to this question: ",
        "EmbeddingGemma's documents": "title: none | text: ",
    }.items()},
    "LLaRA": ("{text} The next sentence:", None),
    "LLaRA, released": ('"{text}", predict the following passage', None),
    "none": ("", None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_instruction_goes_into_the_template_of_the_models_query_prompt(name):
    prompt, template = PUBLISHED[name]
    assert template_of(prompt) == template
    suffix = "{text}" + prompt.partition("{text}")[2] if "{text}" in prompt else ""
    task = Task("docs", " Find {a} in: b |\nQuery:\n")  # braces, what looks like its end, a line break to strip
    form = "Instruct: {instruction}\nQuery: " if template is None else template
    expected = form.replace("{instruction}", "Find {a} in: b |\nQuery:") + suffix
    assert task.encoding_prompt({"query": prompt}) == task.encoding_prompt({"any": prompt}, "any") == expected
    assert takes_instructions({"query": prompt}) == (template is not None and "{instruction}" in template)
    # Of a template the next stage reads the same one.
    again = {"query": expected, "docs": expected, "document": "title: none | text: "}
    assert Task("other", "Find it").encoding_prompt(again) == form.replace("{instruction}", "Find it") + suffix
    assert task.column_prompts(["anchor", "positive"], again) == {"anchor": expected, "positive": again["document"]}


def test_which_prompt_a_symmetric_task_goes_by():
    """The model's for such texts; the template of its queries; none where those take no instruction."""
    same, qwen = Task("same", "Tell", "sts"), PUBLISHED["Qwen3-Embedding"][0]
    gemma = {"query": "task: search result | query: ", "document": "title: none | text: "}
    nomic = {"query": "search_query: ", "STS": "classification: ", "Classification": "label: "}
    assert same.encoding_prompt({"query": qwen, "document": ""}) == "Instruct: Tell\nQuery:"
    assert same.encoding_prompt(gemma) == same.encoding_prompt({**gemma, "STS": "task: x | query: "})
    assert same.encoding_prompt(gemma) == "task: Tell | query: "
    assert same.encoding_prompt(nomic) == "classification: "
    assert Task("moods", "Tell", "classification").encoding_prompt(nomic) == "label: "
    assert same.encoding_prompt({"query": qwen, "similarity": "Alike: "}) == "Alike: "
    assert same.encoding_prompt({"query": "query: "}) == ""
    assert same.encoding_prompt({"query": "query: ", "any": "text: "}, "any") == "text: "
    assert same.encoding_prompt({"query": qwen, "similarity": "{text} in a word"}) == (
        "Instruct: Tell\nQuery:{text} in a word"
    )


def test_prompts_by_other_names_show_the_template_too():
    e5_mistral = {"web_search_query": f"Instruct: {WEB}\nQuery:", "sts_query": "Instruct: Retrieve\nQuery:"}
    docs, same = Task("docs", "Find it"), Task("same", "Tell", "sts")
    for model_prompts in (e5_mistral, {"query": None, **e5_mistral}, {"query": "", **e5_mistral}):
        assert docs.encoding_prompt(model_prompts) == "Instruct: Find it\nQuery:"
        assert same.encoding_prompt(model_prompts) == "Instruct: Tell\nQuery:" and takes_instructions(model_prompts)
    of_documents = {"document": e5_mistral["sts_query"], "x-document": e5_mistral["sts_query"]}
    assert docs.encoding_prompt(of_documents) == docs.prompt and not takes_instructions(of_documents)
    assert not takes_instructions({}) and not takes_instructions({"query": "query: ", **e5_mistral})
    assert docs.encoding_prompt({"docs": "task: old | query: ", "query": "query: "}) == "task: Find it | query: "


def test_queries_may_have_a_prompt_of_their_own():
    def prompt(query_prompt: str, model_prompts: dict[str, str], kind: str = "retrieval") -> str:
        return Task("docs", "Find it", kind, query_prompt=query_prompt).encoding_prompt(model_prompts)

    for model_prompts in ({}, {"query": "query: "}, {"query": PUBLISHED["Qwen3-Embedding"][0]}):
        for kind in ("retrieval", "pair"):
            assert prompt("ask: ", model_prompts, kind) == "ask: " and prompt("", model_prompts, kind) == ""
            assert prompt("Task: {instruction}\nQ: ", model_prompts, kind) == "Task: Find it\nQ: "
    llara = {"query": "{text} The next sentence:"}
    assert prompt("ask: ", llara) == "ask: {text} The next sentence:" and prompt("", llara) == llara["query"]
    assert prompt("{instruction}: {text}.", llara) == "Find it: {text}."
    other = Task("other", "Find all")
    prompts = encoding_prompts([Task("docs", "Find it", query_prompt=""), other], {"query": "task: a | query: "})
    assert prompts == {"docs": "", "query": "", "other": "task: Find all | query: "}
    for wrong in ("Instruct: {task}\nQuery: {query}", "{}: ", "{text} {text}", "{instruction}, {instruction}: "):
        with pytest.raises(ValueError, match=r"query_prompt=.* In braces it may have '\{instruction\}'.* each once: "):
            Task("docs", "Find it", query_prompt=wrong)
    with pytest.raises(ValueError, match="Task 'x' has '{instruction}' in its instruction"):
        Task("x", "Do {instruction}")


def test_the_prompts_that_a_stage_leaves_are_those_of_the_next():
    """Also of a model whose prompts are anything, by any task."""
    parts = [
        "query: ",
        "{text}",
        "Instruct: ",
        "\n",
        "Query: ",
        "|",
        " ",
        "task: ",
        "x",
        "<|user|>",
        "\n<|embed|>\n",
        '"',
    ]

    def anything(without: str = "") -> str:
        prompt = "".join(random.choices([part for part in parts if part != without], k=random.randint(0, 6)))
        return prompt if prompt.count("{text}") < 2 else ""

    left = 0
    for _ in range(2000):
        prompts = {
            name: anything() for name in ("query", "similarity", "STS", "a", "b", "more") if random.random() < 0.4
        }
        prompts |= {"query": random.choice(list(PUBLISHED.values()))[0]} if random.random() < 0.5 else {}
        default = random.choice([None, *prompts])
        tasks = [
            Task(
                name,
                f"x{anything('{text}')}",
                random.choice(["retrieval", "sts", "pair"]),
                query_prompt=random.choice([None, None, anything(), "Say {instruction}: "]),
            )
            for name in "abc"
        ]
        written = encoding_prompts(tasks, prompts, default)
        assert encoding_prompts(tasks, {**prompts, **written}, default) == written
        left += any(task.instruction.strip() in written[task.name] for task in tasks)
    assert left > 500
