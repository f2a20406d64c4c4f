"""Compare what a server or a client gives with a published model's ``reference.json``, prompt by prompt.

A server gets each text as a client has to send it: after the prompt, or inside the prompt's ``{text}``. A long text is
sent whole first; where the server refuses that, cut to what the model takes. What differs is named
(``differences.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer

from st_llm_embed.encoding.json_server import AnsweredError
from st_llm_embed.encoding.server import (
    EmbeddingServer,
    Route,
    cut_text,
    published_tokenizer,
    with_prompt,
)
from st_llm_embed.files import read_json
from st_llm_embed.hub.checking import read_reference
from st_llm_embed.hub.teacher import REFERENCE
from st_llm_embed.serving.differences import Named, name_differences
from st_llm_embed.trust import fetch, load_trusted

ELSEWHERE = (404, 405)  # a server that has no such route
REFUSED = (400, 413, 422)  # a text that is too long
# What follows the address: OpenAI's, in two forms, and TEI's.
ROUTES: tuple[tuple[str, Route], ...] = (("/v1", "/embeddings"), ("", "/embed"), ("", "/embeddings"))


class Compared(NamedTuple):
    """Vectors that are the model's.

    Args:
        cosines: the least cosine with those of ``reference.json`` under each prompt.
        remarks: what else there is to know, such as the precision.
    """

    cosines: dict[str, float]
    remarks: list[str]


def check_server(
    source: str | Path,
    url: str,
    served_name: str | None = None,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> Compared:
    """Compare a running server's vectors with a published model's.

    Args:
        source: the model's folder or Hub id. Its weights are read only to find out what differs.
        url: the server's address, such as ``http://localhost:8000``. OpenAI's ``/v1/embeddings`` is asked for, then
            TEI's ``/embed``, then ``/embeddings``. Its key, if it wants one, is in the environment:
            ``OPENAI_API_KEY``.
        served_name: the name of the model on the server. Default: the one that it has, else ``source``.
        trust_remote_code: whether to run the code in ``source`` that is not this package's own.
        device: the device that the model is computed on, to find out what differs.
        revision: the branch, tag or commit of ``source``.
        token: the Hub token.

    Raises:
        FileNotFoundError: if ``source`` is no model folder, or has no ``reference.json``.
        ValueError: for a reference of another form, a server with several models, none of which is named, or one that
            answers something else than a finite vector of the model's width for each text.
        OSError: if the server does not answer, or answers an error.
        RuntimeError: if the vectors differ by more than rounding.
    """
    root, reference = _read(source, revision, token)
    server = find_server(url, served_name, str(source))
    tokenizer = published_tokenizer(root)
    found: dict[str, np.ndarray] = {}
    longest = ""
    for name, prompt in reference["prompts"].items():
        rows = []
        for text in reference["texts"]:
            try:
                rows.append(server.embed([with_prompt(text, prompt)]))
            except AnsweredError as error:
                fits = cut_text(text, prompt, tokenizer)
                if error.code not in REFUSED or fits == text:
                    raise
                rows.append(server.embed([with_prompt(fits, prompt)]))
                longest = f"It refuses long texts, which a client has to cut: {error}"
        found[name] = _one_width(rows, url)
    compared = _compare(reference, found, root, url, trust_remote_code=trust_remote_code, device=device)
    return compared._replace(remarks=[*compared.remarks, *([longest] if longest else [])])


def check_vectors(
    source: str | Path,
    file: str | Path,
    prompt_name: str | None = None,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> Compared:
    """Compare vectors that a client gave for the texts of ``reference.json`` with a published model's.

    Args:
        source: see ``check_server``.
        file: the vectors, in the order of those texts: a ``.json`` file with a list of them by the name of each
            prompt, ``{"query": [[0.1, ...], ...]}``; or, of one prompt, such a list alone or a ``.npy`` file
            ``(texts, dim)``.
        prompt_name: the name of that one prompt, under which the client should have embedded them.
        trust_remote_code, device, revision, token: see ``check_server``.

    Raises:
        FileNotFoundError: if there is no such file, ``source`` is no model folder, or has no ``reference.json``.
        ValueError: for a reference or vectors of another form, number or width, or an unknown prompt.
        RuntimeError: if the vectors differ by more than rounding.
    """
    root, reference = _read(source, revision, token)
    texts, prompts = reference["texts"], reference["prompts"]
    if prompt_name is not None and prompt_name not in prompts:
        raise ValueError(f"prompt_name={prompt_name!r} is unknown. {REFERENCE} has: {', '.join(prompts)}.")
    content = np.load(file, allow_pickle=False) if Path(file).suffix == ".npy" else read_json(Path(file))
    if isinstance(content, dict) and prompt_name is not None:
        content = {prompt_name: content.get(prompt_name)}
    elif not isinstance(content, dict):
        if prompt_name is None:
            raise ValueError(
                f"{file} does not say under which prompt the texts were embedded. Name it (prompt_name=, --prompt), "
                f"one of: {', '.join(prompts)}."
            )
        content = {prompt_name: content}
    if not content or (unknown := sorted(content.keys() - prompts.keys())):
        what = f"the prompts {', '.join(unknown)}" if content else "no prompt"
        raise ValueError(f"{file} has vectors under {what}. {REFERENCE} has: {', '.join(prompts)}.")
    found = {name: _vectors(rows, len(texts), f"{file}, under {name!r},") for name, rows in content.items()}
    return _compare(reference, found, root, str(file), trust_remote_code=trust_remote_code, device=device)


def find_server(url: str, served_name: str | None, source: str) -> EmbeddingServer:
    """The route by which a server gives vectors, found by asking.

    Args:
        url: the server's address, with or without ``/v1``.
        served_name: the name of the model on the server. Default: the one that it has; ``source``, where it has
            several or does not tell.
        source: the model's folder or Hub id.

    Raises:
        ValueError: if it has several models, none of which is called ``source``.
        OSError: if it does not answer, or has no such route.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if served_name is None:
        names = EmbeddingServer(f"{base}/v1", source).models()
        if len(names) > 1 and source not in names:
            raise ValueError(f"{url} has several models: {', '.join(names)}. Name one (served_name=, --served-name).")
        served_name = names[0] if len(names) == 1 else source
    answers = []
    for root, route in ROUTES:
        server = EmbeddingServer(f"{base}{root}", served_name, route)
        try:
            server.embed(["word"])
        except AnsweredError as error:
            if error.code not in ELSEWHERE:
                raise
            answers.append(f"{root}{route}: {error}")
        else:
            return server
    raise OSError(f"{url} gives no vectors by any route. {'; '.join(answers)}")


def _read(source: str | Path, revision: str | None, token: str | None) -> tuple[Path, dict[str, Any]]:
    root = fetch(source, revision, token)
    if not (root / REFERENCE).is_file():
        raise FileNotFoundError(
            f"{source} has no {REFERENCE}, so there is nothing to compare with. st-llm-embed seal and publish write "
            "one; a model that was trained and saved again has to be published again."
        )
    return root, read_reference(root / REFERENCE)


def _one_width(rows: Sequence[np.ndarray], url: str) -> np.ndarray:
    if len(widths := {row.shape[1] for row in rows}) > 1:
        raise ValueError(f"{url} answered vectors of {' and of '.join(map(str, sorted(widths)))} numbers.")
    return np.concatenate(rows)


def _vectors(rows: Any, count: int, what: str) -> np.ndarray:
    """``(count, dim)`` in float32, of what a file holds."""
    try:
        vectors = np.array(rows)
        if vectors.dtype.kind not in "fiu" or vectors.ndim != 2 or not vectors.size:
            raise ValueError(f"{vectors.dtype} {vectors.shape}")
    except ValueError as error:
        raise ValueError(f"{what} has no (texts, numbers): {error}.") from error
    if len(vectors) != count:
        raise ValueError(f"{what} has {len(vectors)} vectors, and {REFERENCE} has {count} texts.")
    if vectors.dtype.kind != "f" and vectors.dtype.itemsize == 1:
        raise ValueError(f"{what} has vectors of {vectors.dtype}. Give those of floating-point numbers.")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{what} has NaN or infinity.")
    return vectors.astype(np.float32)


def _compare(
    reference: dict[str, Any],
    found: dict[str, np.ndarray],
    root: Path,
    whose: str,
    **options: Any,
) -> Compared:
    for name, vectors in found.items():
        if vectors.shape[1] > (width := len(reference["embeddings"][name][0])):
            raise ValueError(f"{whose} has vectors of {vectors.shape[1]} numbers, and the model has {width}.")

    def load(**kwargs: Any) -> SentenceTransformer:
        return load_trusted(root, **options, **kwargs)

    named = name_differences(reference, found, load)
    if any(one.faults.keys() - {"precision"} for one in named.values()):
        raise RuntimeError(f"{whose} does not give the model's vectors. {' '.join(_told(named))}")
    return Compared({name: one.cosine for name, one in named.items()}, _told(named))


def _told(named: dict[str, Named]) -> list[str]:
    """A sentence for each set of faults, with the prompts that have it."""
    told: dict[str, list[str]] = {}
    for name, one in named.items():
        listed = "; ".join(f"{fault}: {how}" for fault, how in one.faults.items())
        told.setdefault(listed, []).append(f"{name!r} (cosine {one.cosine:.5f})")
    return [f"Under {', '.join(names)}: {listed}." for listed, names in told.items() if listed]
