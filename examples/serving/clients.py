"""A sealed model in the libraries that people put before it: the line that is right, and what the default does.

    python clients.py MODEL [CLIENT ...]

Queries get their prompt, documents theirs. The vectors are compared with ``encode_query`` and ``encode_document`` of
plain sentence-transformers; ``clients.sh`` makes the environment with all of them. Prints a row of a table for each;
ends with 1 where a right line is not right.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable

import numpy as np
from sentence_transformers import SentenceTransformer

QUERIES = ["how do I parse command line arguments?", "Café №1", "日本語 word"]
DOCUMENTS = ["argparse parses them.", "A cat sat on the mat. " * 60, "sys.argv has them."]
ALIKE = 1e-5  # the largest difference of a component that is rounding
Vectors = tuple[list, list]  # of the queries, of the documents


def prompts_of(model: str) -> dict[str, str]:
    return SentenceTransformer(model, trust_remote_code=True).prompts


def langchain(model: str) -> Vectors:
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(
        model_name=model,
        model_kwargs={"trust_remote_code": True},
        encode_kwargs={"prompt_name": "document"},
        query_encode_kwargs={"prompt_name": "query"},
    )
    return [embeddings.embed_query(text) for text in QUERIES], embeddings.embed_documents(DOCUMENTS)


def langchain_default(model: str) -> Vectors:
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(model_name=model, model_kwargs={"trust_remote_code": True})
    return [embeddings.embed_query(text) for text in QUERIES], embeddings.embed_documents(DOCUMENTS)


def llama_index(model: str) -> Vectors:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    prompts = prompts_of(model)
    embedding = HuggingFaceEmbedding(
        model_name=model,
        trust_remote_code=True,
        query_instruction=prompts["query"],
        text_instruction=prompts["document"],
    )
    return [embedding.get_query_embedding(text) for text in QUERIES], embedding.get_text_embedding_batch(DOCUMENTS)


def llama_index_default(model: str) -> Vectors:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    embedding = HuggingFaceEmbedding(model_name=model, trust_remote_code=True)
    return [embedding.get_query_embedding(text) for text in QUERIES], embedding.get_text_embedding_batch(DOCUMENTS)


def haystack(model: str) -> Vectors:
    of_queries, of_documents = ({"encode_kwargs": {"prompt_name": name}} for name in ("query", "document"))
    return in_haystack(model, of_queries, of_documents)


def haystack_default(model: str) -> Vectors:
    return in_haystack(model, {}, {})


def haystack_prefix(model: str) -> Vectors:
    """The prompts as prefixes: right where all tokens are pooled, and not where the prompt's are left out."""
    prompts = prompts_of(model)
    return in_haystack(model, {"prefix": prompts["query"]}, {"prefix": prompts["document"]})


def in_haystack(model: str, of_queries: dict, of_documents: dict) -> Vectors:
    from haystack import Document
    from haystack_integrations.components.embedders.sentence_transformers import (
        SentenceTransformersDocumentEmbedder,
        SentenceTransformersTextEmbedder,
    )

    settings = {"model": model, "trust_remote_code": True, "progress_bar": False}
    queries = SentenceTransformersTextEmbedder(**settings, **of_queries)
    documents = SentenceTransformersDocumentEmbedder(**settings, **of_documents)
    queries.warm_up()
    documents.warm_up()
    embedded = documents.run([Document(content=text) for text in DOCUMENTS])["documents"]
    return [queries.run(text)["embedding"] for text in QUERIES], [document.embedding for document in embedded]


def chroma(model: str) -> Vectors:
    import chromadb

    class ModelEmbedding(chromadb.EmbeddingFunction):
        def __init__(self, name: str) -> None:
            self.model = SentenceTransformer(name, trust_remote_code=True)

        def __call__(self, input: list[str]) -> list:  # noqa: A002 (Chroma's name)
            return list(self.model.encode_document(list(input)))

        def embed_query(self, input: list[str]) -> list:  # noqa: A002
            return list(self.model.encode_query(list(input)))

    return in_chroma(ModelEmbedding(model))


def chroma_default(model: str) -> Vectors:
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    return in_chroma(SentenceTransformerEmbeddingFunction(model, trust_remote_code=True))


def in_chroma(function: object) -> Vectors:
    import chromadb

    with tempfile.TemporaryDirectory() as folder:
        client = chromadb.PersistentClient(folder, chromadb.Settings(anonymized_telemetry=False))
        collection = client.create_collection("documents", embedding_function=function)
        collection.add(ids=[str(row) for row in range(len(DOCUMENTS))], documents=DOCUMENTS)
        kept = collection.get(include=["embeddings"])
        assert kept["ids"] == [str(row) for row in range(len(DOCUMENTS))]
        return list(function.embed_query(QUERIES)), list(kept["embeddings"])


def lancedb(model: str) -> Vectors:
    from lancedb.embeddings import SentenceTransformerEmbeddings, register

    @register("sealed-model")
    class SealedModel(SentenceTransformerEmbeddings):
        def generate_embeddings(self, texts: list[str]) -> list:
            return self.embedding_model.encode_document(list(texts)).tolist()

        def compute_query_embeddings(self, query: str, *arguments: object, **settings: object) -> list:
            return self.embedding_model.encode_query([query]).tolist()

    return in_lancedb(SealedModel.create(name=model))


def lancedb_default(model: str) -> Vectors:
    from lancedb.embeddings import SentenceTransformerEmbeddings

    return in_lancedb(SentenceTransformerEmbeddings.create(name=model))


def in_lancedb(function: object) -> Vectors:
    from lancedb import connect
    from lancedb.pydantic import LanceModel, Vector

    class Row(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    with tempfile.TemporaryDirectory() as folder:
        table = connect(folder).create_table("documents", schema=Row)
        table.add([{"text": text} for text in DOCUMENTS])
        kept = {row["text"]: row["vector"] for row in table.to_arrow().to_pylist()}
        queries = [function.compute_query_embeddings(text)[0] for text in QUERIES]
        return queries, [kept[text] for text in DOCUMENTS]


def txtai(model: str, **settings: object) -> Vectors:
    from txtai import Embeddings

    settings = settings or {"method": "sentence-transformers", "vectors": {"trust_remote_code": True}}
    embeddings = Embeddings(path=model, **settings)
    return embeddings.batchtransform(QUERIES, "query"), embeddings.batchtransform(DOCUMENTS, "data")


def txtai_default(model: str) -> Vectors:
    return txtai(model, gpu=False)


def mteb(model: str) -> Vectors:
    import mteb as library
    from datasets import Dataset
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

    encoder = SentenceTransformerEncoderWrapper(SentenceTransformer(model, trust_remote_code=True))
    task = library.get_task("NFCorpus").metadata

    def encode(texts: list[str], kind: PromptType) -> list:
        loader = DataLoader(Dataset.from_dict({"text": texts}), batch_size=8)
        return list(encoder.encode(loader, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=kind))

    return encode(QUERIES, PromptType.query), encode(DOCUMENTS, PromptType.document)


def mteb_default(model: str) -> Vectors:
    import mteb as library

    return library.get_model(model)  # which takes no folder


def truncate_dim(model: str) -> Vectors:
    """``normalize_embeddings`` after the cut, which ``Normalize`` came before."""
    short = SentenceTransformer(model, trust_remote_code=True, truncate_dim=16)
    settings = {"normalize_embeddings": True}
    return short.encode_query(QUERIES, **settings), short.encode_document(DOCUMENTS, **settings)


def truncate_dim_default(model: str) -> Vectors:
    short = SentenceTransformer(model, trust_remote_code=True, truncate_dim=16)
    return short.encode_query(QUERIES), short.encode_document(DOCUMENTS)


CLIENTS: dict[str, tuple[Callable[[str], Vectors], list[Callable[[str], Vectors]]]] = {
    "langchain": (langchain, [langchain_default]),
    "llama_index": (llama_index, [llama_index_default]),
    "haystack": (haystack, [haystack_default, haystack_prefix]),
    "chroma": (chroma, [chroma_default]),
    "lancedb": (lancedb, [lancedb_default]),
    "txtai": (txtai, [txtai_default]),
    "mteb": (mteb, [mteb_default]),
    "truncate_dim": (truncate_dim, [truncate_dim_default]),
}


def differences(vectors: Vectors, expected: Vectors) -> list[float]:
    """The largest difference of a component, of queries and of documents."""
    found = []
    for ours, theirs in zip(vectors, expected, strict=True):
        theirs = np.array(theirs)[:, : np.array(ours).shape[1]]
        theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
        found.append(float(np.abs(np.array(ours) - theirs).max()))
    return found


def main(model: str, *names: str) -> int:
    reference = SentenceTransformer(model, trust_remote_code=True)
    expected = reference.encode_query(QUERIES), reference.encode_document(DOCUMENTS)
    wrong = 0
    for name in names or CLIENTS:
        right, others = CLIENTS[name]
        for way in [right, *others]:
            try:
                of_queries, of_documents = differences(way(model), expected)
                told = f"queries {of_queries:.1e}, documents {of_documents:.1e}"
            except Exception as error:  # a client's refusal, of whatever kind, is what is asked for
                of_queries, of_documents = np.inf, np.inf
                told = f"refused: {type(error).__name__}: {str(error)[:100]}"
            print(f"| {name} | {way.__name__} | {told} |", flush=True)
            wrong += way is right and max(of_queries, of_documents) > ALIKE
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(*sys.argv[1:]))
