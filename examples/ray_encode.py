"""Encode a corpus on a Ray cluster, by as many workers as it has room for: ``python examples/ray_encode.py``.

Ray starts and stops the workers and hands out the numbers of the shards. The result is the folder that ``st-llm-embed
encode`` writes, byte for byte; run again, it goes on where it was. All machines see the paths.
"""

from pathlib import Path

import ray
from sentence_transformers import SentenceTransformer

from st_llm_embed.data import load_corpus
from st_llm_embed.encoding import CorpusEncoding, ModelEncoder

MODEL = str(Path("my-model").resolve())  # or a Hub id
CORPUS = str(Path("corpus.jsonl").resolve())
VECTORS = Path("vectors").resolve()
SHARD_SIZE = 10_000
WORKERS = 1, 8  # at least and at most
GPUS = 0  # of a worker


def open_encoding() -> CorpusEncoding:
    """Load the model, and join the encoding in the folder."""
    model = SentenceTransformer(MODEL, trust_remote_code=True)
    encoder = ModelEncoder(model, "document", name=MODEL)
    return CorpusEncoding(encoder, load_corpus(CORPUS), VECTORS, shard_size=SHARD_SIZE, source=CORPUS)


class Worker:
    """Loads the model once."""

    def __init__(self) -> None:
        self.encoding = open_encoding()

    def __call__(self, batch: dict) -> dict:
        done = [self.encoding.encode_shard(int(number)) for number in batch["item"]]
        return {"shard": batch["item"], "done": done}


encoding = open_encoding()  # checks the corpus, and says whose vectors the folder has, before any worker starts
# Of items: ray.data.range would need a CPU of its own, and wait for ever where a worker has the only one.
shards = ray.data.from_items(list(range(encoding.shards)), override_num_blocks=encoding.shards)
workers = ray.data.ActorPoolStrategy(min_size=WORKERS[0], max_size=WORKERS[1])
encoded = shards.map_batches(Worker, batch_size=1, compute=workers, num_gpus=GPUS).take_all()
print(f"{sum(row['done'] for row in encoded)} of {encoding.shards} shards were encoded now: {encoding.report()}")
