"""What a text-embedding model is asked to do, as data: the instruction, where it goes, and which negatives are safe.

One ``Task`` gives the prompts for training (``prompts=`` of the training arguments), for ``encode``
(``model.prompts``, saved with the model) and for evaluation. The prompt's form is the model's own where its prompts
show one (``template_of``), such as EmbeddingGemma's ``task: {instruction} | query: ``; in a model without prompts it
is NV-Embed's (arXiv 2405.17428): ``Instruct: {instruction}\\nQuery: `` before queries, nothing before documents.
Both sides of a symmetric task get it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources

# Kind -> (symmetric: the instruction goes on both sides, in-batch negatives are safe).
KINDS = {
    "retrieval": (False, True),
    "sts": (True, False),
    "classification": (True, False),
    "clustering": (True, False),
    "pair": (True, False),
    "bitext": (True, True),
    "documents": (False, False),  # single texts, which a teacher says something of
}

# The type of the symmetric kinds in mteb, by which EmbeddingGemma, nomic-embed and others name their prompts for them.
TYPES = {
    "sts": "STS",
    "classification": "Classification",
    "clustering": "Clustering",
    "pair": "PairClassification",
    "bitext": "BitextMining",
}
TEXT, INSTRUCTION = "{text}", "{instruction}"  # the places in a prompt
NV_EMBED = "Instruct: {instruction}\nQuery: "
TEMPLATE = re.compile(  # all repetitions but one are bounded: it is run on prompts that others wrote
    r"(?P<before>\s{0,9}(?:(?:instruct|task)\w{0,9}\s?[:：]|<\|?(?:instruct\w{0,9}|task|user)\|?>)\s{0,9})"
    r"\S(?:.*\S)?"
    r"(?P<after>\s{0,9}[\n\r|]\s{0,9}(?:\w{1,30}(?: \w{1,30})?\s?[:：]|<\|?\w{1,30}\|?>)\s{0,9})",
    re.IGNORECASE | re.DOTALL,
)

# The prompts that sentence-transformers looks for: the first that a model has, even an empty one.
OF_DOCUMENTS = "-document"  # ends the name of the prompt of one task's documents
QUERY, DOCUMENT, SIMILARITY = ("query",), ("document", "passage", "corpus"), ("similarity",)


@dataclass(frozen=True)
class Task:
    """One embedding task.

    Args:
        name: the key of its data set and of its prompt in ``model.prompts``; none of ``query``, ``document``,
            ``passage``, ``corpus``, ``similarity``, which are every task's.
        instruction: one sentence that says what to do, such as "Given a question, retrieve passages that answer it".
            It is put into the model's own template, where its prompts show one.
        kind: the kind of task: ``retrieval``, ``sts``, ``classification``, ``clustering``, ``pair``, ``bitext``; or
            ``documents``, single texts for a teacher to speak of, which need no instruction.
        in_batch_negatives: whether the texts of a batch's other rows may serve as negatives. Default: by kind; off
            where another row is likely to share the class.
        negatives: how many hard negatives each row of its data has. Default: any number.
        weight: the factor on the task's share of the batches.
        document_prompt: the prompt of its documents, such as ``"passage: "``. What the model's own has after the text
            (LLaRA's does) stays there, unless ``{text}`` says where the text goes. Default: what the model gives all
            documents.
        query_prompt: the prompt of its queries, or of its texts in a symmetric task, in place of the model's own: such
            as ``"query: "``, or ``"Search, {instruction}: "`` with the instruction at ``{instruction}``; ``""`` for
            none. What the model's own has after the text stays there, unless ``{text}`` says where the text goes.
            Default: the model's own, with the instruction in its template.

    Raises:
        ValueError: for an unknown kind, an empty or reserved name, an instruction that is empty or has ``{text}`` or
            ``{instruction}`` in it, a negative number of negatives, a weight that is not positive, a prompt of
            documents for a symmetric task, which has none, or a prompt of queries with other places than one
            ``{instruction}`` and one ``{text}``.
    """

    name: str
    instruction: str = ""
    kind: str = "retrieval"
    in_batch_negatives: bool | None = None
    negatives: int | None = None
    weight: float = 1.0
    document_prompt: str | None = None
    query_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Task {self.name!r} has kind={self.kind!r}. Valid kinds: {', '.join(KINDS)}.")
        if not self.name or bool(self.instruction.strip()) == (self.kind == "documents"):
            raise ValueError(
                f"A task needs a name and an instruction, but that one of the kind 'documents' has none; got "
                f"{self.name!r}, {self.instruction!r} and {self.kind!r}."
            )
        if self.name in (*QUERY, *DOCUMENT, *SIMILARITY):
            raise ValueError(
                f"A task cannot be called {self.name!r}: its prompt would be that of all queries, documents or texts, "
                f"whatever the task. Give it a name of its own, such as 'my_{self.name}'."
            )
        for place in (TEXT, INSTRUCTION):
            if place in self.instruction:
                raise ValueError(
                    f"Task {self.name!r} has {place!r} in its instruction {self.instruction!r}. The instruction is "
                    f"put before the text: leave {place!r} out."
                )
        places = re.findall(r"\{\w*\}", self.query_prompt or "")
        if set(places) - {TEXT, INSTRUCTION} or len(places) > len(set(places)):
            raise ValueError(
                f"Task {self.name!r} has query_prompt={self.query_prompt!r}. In braces it may have {INSTRUCTION!r}, "
                f"where the task's instruction goes, and {TEXT!r}, where the text goes, each once: {NV_EMBED!r}."
            )
        if self.negatives is not None and self.negatives < 0:
            raise ValueError(f"Task {self.name!r} has negatives={self.negatives}. It must be 0 or more, or None.")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"Task {self.name!r} has weight={self.weight}. It must be a positive number.")
        if self.document_prompt is not None and self.symmetric:
            raise ValueError(
                f"Task {self.name!r} has a document_prompt, and is of the kind {self.kind!r}, whose texts are all of "
                "one sort: the instruction goes before each. Leave it out."
            )
        if self.in_batch_negatives is None:
            object.__setattr__(self, "in_batch_negatives", KINDS[self.kind][1])

    @property
    def symmetric(self) -> bool:
        """Whether both sides are of one sort and get the instruction."""
        return KINDS[self.kind][0]

    @property
    def prompt(self) -> str:
        """The prompt of its queries or symmetric texts in a model that has no prompts: NV-Embed's form."""
        return self._instructed(NV_EMBED)

    def column_prompts(
        self, columns: Iterable[str], model_prompts: Mapping[str, str], default_prompt_name: str | None = None
    ) -> dict[str, str]:
        """The prompt of each column that gets one, in a model with prompts of its own.

        ``anchor`` is a query, the other columns are documents, under the task's prompt for them or else the one that
        ``encode_document`` gives them; a symmetric task's texts are all of one sort. What the model's prompt for
        queries or for such texts has after the text (LLaRA's do) stays there.
        """
        prompts = {}
        for column in columns:
            if self.symmetric or column == "anchor":
                prompt = self.encoding_prompt(model_prompts, default_prompt_name)
            else:
                prompt = self.encoding_document_prompt(model_prompts, default_prompt_name)
            if prompt:
                prompts[column] = prompt
        return prompts

    def encoding_prompt(self, model_prompts: Mapping[str, str], default_prompt_name: str | None = None) -> str:
        """The prompt of the task's queries, or of its texts where all are of one sort.

        It is ``query_prompt``, or else goes by the model's own prompt: the first of that by the task's name, which an
        earlier training left; ``query``, or for symmetric texts mteb's name of their kind and ``similarity``; and the
        default. The instruction takes the place of the one there. A prompt without a place for one stays as it is.
        Where the model has none, the template is that of queries or of another prompt, or NV-Embed's; but in a model
        whose queries take no instruction, symmetric texts take none either.
        """
        names = (self.name, *((TYPES[self.kind], *SIMILARITY) if self.symmetric else QUERY))
        own = prompt_of(names, model_prompts, default_prompt_name)
        form = template_of(own) if self.query_prompt is None else self.query_prompt
        if form is None and self.name not in model_prompts:
            form = _template_of_model(model_prompts, default_prompt_name) or NV_EMBED
            form = form if INSTRUCTION in form else None
        return own if form is None else before_text(self._instructed(form), own)

    def _instructed(self, form: str) -> str:
        # Stripped: the next training reads the template off what this one wrote.
        return form.replace(INSTRUCTION, self.instruction.strip())

    def encoding_document_prompt(
        self, model_prompts: Mapping[str, str], default_prompt_name: str | None = None
    ) -> str:
        """The prompt of the task's documents: its own, with what the model's has after the text, or the model's."""
        model_prompt = prompt_of(DOCUMENT, model_prompts, default_prompt_name)
        return model_prompt if self.document_prompt is None else before_text(self.document_prompt, model_prompt)

    def column_sides(self, columns: Iterable[str]) -> dict[str, str]:
        """Which columns are cut as queries and which as documents; a symmetric task's texts are neither."""
        if self.symmetric:
            return {}
        return {column: "query" if column == "anchor" else "document" for column in columns}


def known_task(name: str) -> Task:
    """The task of a public data set, with this package's instruction for it (``tasks.json``).

    Another setting is ``dataclasses.replace(known_task("scifact"), negatives=7)``. Its name may be written as mteb
    does, such as ``SciFact`` or ``Banking77Classification``.

    Raises:
        ValueError: for a name that is not there, with the nearest that are.
    """
    tasks = json.loads(resources.files(__package__).joinpath("tasks.json").read_text(encoding="utf-8"))
    task_name = next((task for task in tasks if same_task(task, name)), None)
    if task_name is None:
        near = get_close_matches(name.lower(), tasks, n=5)
        raise ValueError(
            f"No task is known as {name!r}. {'Near it' if near else 'Known'}: {', '.join(near or tasks)}. Fix: one of "
            f"these, or one of your own: Task({name!r}, 'what to do, in one sentence', kind); in a configuration, "
            "instruction: what to do, in one sentence."
        )
    return Task(task_name, **tasks[task_name])


def same_task(name: str, other: str) -> bool:
    """Whether two names are spellings of one: ``sts_13`` and ``STS13``, ``scifact`` and ``SciFactRetrieval.v2``."""
    return _spelled(name) == _spelled(other)


def _spelled(name: str) -> str:
    letters = re.sub(r"\.v\d+$|[^a-z0-9]", "", name.lower())
    return re.sub(r"(.)(pairclassification|classification|clustering|retrieval|reranking)$", r"\1", letters)


def prompt_of(names: Iterable[str], model_prompts: Mapping[str, str], default_prompt_name: str | None) -> str:
    """What ``encode_query`` (of ``QUERY``) and ``encode_document`` (of ``DOCUMENT``) put before a text: the first of
    these prompts that the model has, even an empty one, or else its default; "" for none."""
    prompt_name = next((name for name in names if name in model_prompts), default_prompt_name)
    return "" if prompt_name is None else model_prompts.get(prompt_name) or ""


def before_text(prompt: str, model_prompt: str) -> str:
    """``prompt`` before the text, and what ``model_prompt`` has after it, unless ``prompt`` says where the text is."""
    _, text, suffix = model_prompt.partition(TEXT)
    return prompt if TEXT in prompt else prompt + text + suffix


def template_of(prompt: str) -> str | None:
    """What a prompt has before the text, with ``{instruction}`` in place of the instruction in it.

    A prompt has an instruction in it if it says so itself: it begins with a label or tag of that name (``Instruct:``,
    ``Instruction:``, ``task:``, ``<instruct>``, ``<|user|>``), and after the instruction a line break or ``|`` and
    another label or tag lead over to the text (``Query:``, ``query:``, ``<|embed|>``). White space is kept as it is.
    So ``query: ``, ``search_query: `` and ``Represent this sentence for searching relevant passages: `` have no place
    for an instruction, and are given back as they are. A prompt that has ``{instruction}`` is a template already.

    Returns:
        None where nothing but a quotation mark (LLaRA's) is before the text.
    """
    before = prompt.partition(TEXT)[0]
    if INSTRUCTION not in before and (found := TEMPLATE.fullmatch(before)):
        return found["before"] + INSTRUCTION + found["after"]
    return before if before.strip().strip("\"'") else None


def takes_instructions(model_prompts: Mapping[str, str], default_prompt_name: str | None = None) -> bool:
    """Whether a model's prompts have a place for a task's instruction: that of its queries, or, where it has none for
    them, any but those of documents. False for a model without prompts."""
    return INSTRUCTION in (_template_of_model(model_prompts, default_prompt_name) or "")


def _template_of_model(model_prompts: Mapping[str, str], default_prompt_name: str | None) -> str | None:
    """What is before a model's queries, with ``{instruction}`` where it has a place for one; where nothing is, the
    template of another prompt (e5-mistral calls its prompts ``web_search_query`` and ``sts_query``); None for neither.
    """
    form = template_of(prompt_of(QUERY, model_prompts, default_prompt_name))
    if form is not None:
        return form
    of_documents = [name for name in model_prompts if name in DOCUMENT or name.endswith(OF_DOCUMENTS)]
    others = [template_of(prompt or "") for name, prompt in model_prompts.items() if name not in of_documents]
    return next((form for form in others if form is not None and INSTRUCTION in form), None)


def encoding_prompts(
    tasks: Iterable[Task], model_prompts: Mapping[str, str], default_prompt_name: str | None = None
) -> dict[str, str]:
    """What ``model.prompts`` gains by ``tasks``: one by name for each, and the first retrieval task's as ``query``,
    which ``encode_query`` uses; a task's own for documents as ``NAME-document``, and as ``document`` where the first
    retrieval task has one."""
    prompts: dict[str, str] = {}
    first = None
    for task in tasks:
        if task.kind != "documents":
            prompts[task.name] = task.encoding_prompt(model_prompts, default_prompt_name)
        if task.document_prompt is not None:
            own = task.encoding_document_prompt(model_prompts, default_prompt_name)
            prompts[f"{task.name}{OF_DOCUMENTS}"] = own
        if task.kind == "retrieval" and first is None:
            first = task
            prompts["query"] = prompts[task.name]
            if task.document_prompt is not None:
                prompts["document"] = own
    return prompts
