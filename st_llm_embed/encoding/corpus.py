"""A whole corpus to vectors in a folder, by any number of workers, none of which knows of the others.

The corpus is cut into shards of ``shard_size`` rows, in its own order. Whoever runs the same encoding on the same
folder takes the next shard that is neither there nor leased, until all are there; a worker that dies costs one shard.
The folder is that of ``shards.py``: ``manifest.json``, ``000000.npy`` and ``000000.rows.parquet``, and so on, and at
the end ``report.json``. A shard that is there is compared with the corpus, text by text.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from sentence_transformers.util.quantization import quantize_embeddings
from tqdm.auto import tqdm

from st_llm_embed.data.sources import joined
from st_llm_embed.encoding.cache import SHARD_SIZE, check_finite
from st_llm_embed.encoding.encoder import TextEncoder
from st_llm_embed.encoding.lease import Piece, complete
from st_llm_embed.encoding.manifest import is_same_space, space_of, write_manifest
from st_llm_embed.encoding.ranges import range_of, ranges_of
from st_llm_embed.encoding.shards import (
    FORMATS,
    is_whole,
    read_hashes,
    rows_file,
    shard_file,
    text_hashes,
    write_shard,
)
from st_llm_embed.files import check_room, write_array, written_beside

Precision = Literal["float32", "float16", "int8", "binary"]
PRECISIONS: dict[Precision, float] = {"float32": 4, "float16": 2, "int8": 1, "binary": 1 / 8}  # bytes of a number
CALIBRATED_ON = 1_000  # texts, from the first on: the range of each dimension in int8, unless ranges are given
RANGES = "ranges.npy"
REPORT = "report.json"
IDS = ("id", "_id")


@dataclass(frozen=True)
class EncodingReport:
    """What was encoded.

    Args:
        texts: the number of texts.
        shards: the number of shards.
        tokens: the number of tokens, of what was not cut.
        cut: the number of texts with more tokens than the model takes.
        empty: the number of texts of white space alone.
        duplicates: the number of texts that came before.
    """

    texts: int
    shards: int
    tokens: int
    cut: int
    empty: int
    duplicates: int


class _Rows(NamedTuple):
    """The rows of one shard."""

    ids: list[Any]
    texts: list[str]


class CorpusEncoding:
    """The encoding of a corpus into a folder.

    Args:
        encoder: whoever gives the vectors.
        corpus: the data set, with a column ``text``, perhaps ``title`` (they are joined) and ``id`` or ``_id``; a
            stream is read anew by each worker.
        folder: the folder of the vectors: a new one, or that of the same encoding.
        shard_size: the number of texts in a shard.
        precision: how the vectors are kept: ``float32``, ``float16``, ``int8`` (in 256 steps of each dimension's
            range, that of the first 1,000 texts or of ``ranges``) or ``binary`` (the signs, eight in a byte).
        file_format: ``npy``, or ``parquet`` with the columns ``id`` and ``embedding``.
        source: the name of the corpus in the manifest.
        ranges: the file of the ranges for ``int8``, or the folder that it is in, as a model's: so that the vectors of
            several corpora are kept in the same steps.
        show_progress_bar: whether to show how far the whole corpus is.

    Raises:
        FileNotFoundError: if the file of the ranges is not there.
        ValueError: for settings out of range, ranges of another model, a corpus without ``text`` or with a text that
            is missing, ids that repeat or are missing, and a folder of another model, prompt, corpus or precision.
        OSError: if the disk has no room for the vectors.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        corpus: Dataset | IterableDataset,
        folder: str | Path,
        *,
        shard_size: int = SHARD_SIZE,
        precision: Precision = "float32",
        file_format: str = "npy",
        source: str | None = None,
        ranges: str | Path | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size} must be at least 1.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown. Valid values: {', '.join(PRECISIONS)}.")
        if file_format not in FORMATS:
            raise ValueError(f"file_format={file_format!r} is unknown. Valid values: {', '.join(FORMATS)}.")
        if ranges is not None and precision != "int8":
            raise ValueError(f"ranges={str(ranges)!r} is of int8, and precision={precision!r}. Leave one of them out.")
        columns = list(corpus.column_names or next(iter(corpus), {}))  # of some streams they are not known before
        if "text" not in columns:
            raise ValueError(f"The corpus has the columns {columns}, and no 'text'. Rename one of them.")
        self.encoder = encoder
        self.folder = Path(folder)
        self.shard_size = shard_size
        self.precision: Precision = precision
        self.file_format = file_format
        self.show_progress_bar = show_progress_bar
        self.id_column = next((name for name in IDS if name in columns), None)
        self.corpus = corpus
        self.rows = len(corpus) if isinstance(corpus, Dataset) else None
        if isinstance(corpus, Dataset):
            self._check_rows(corpus)
        space = space_of(encoder)
        self.dim = len(space["reference"][0])
        if self.rows is not None and not self.folder.exists():
            check_room(self.folder, int(self.rows * self.dim * PRECISIONS[precision]))
        settings = {"precision": precision, "file_format": file_format, "shard_size": shard_size, "rows": self.rows}
        self._ranges = None if ranges is None else range_of(Path(ranges), self.dim, space)
        if self._ranges is not None:
            settings["ranges"] = hashlib.sha256(self._ranges.tobytes()).hexdigest()[:16]
        manifest = {**space, **settings, "dim": self.dim, "corpus": source}
        self._compare(space, settings, write_manifest(self.folder, manifest))
        if self._ranges is not None and not (self.folder / RANGES).is_file():
            _write_ranges(self.folder / RANGES, self._ranges)
        self._compared: set[int] = set()  # shards whose texts are the corpus's

    def run(self) -> EncodingReport:
        """Encode what is left, together with whoever else does, and report on the whole corpus.

        Raises:
            ValueError: for a text or id that is missing, vectors that are not finite, and a corpus that is not that of
                the shards that are there.
        """
        with _Progress(self.rows, self.show_progress_bar, self._there) as progress:
            complete(partial(self._pieces, progress))
        return self.report()

    def encode_shard(self, number: int) -> bool:
        """Encode one shard of a corpus that is no stream, unless it is there or another worker does; whether it was
        done here. For whoever hands out each number once, as Ray does: on return the shard is there, also where
        whoever had begun it died."""
        with _Progress(None, show=False, there=self._there) as progress:
            piece = self._piece(number, self._read(number), progress)
            return complete(lambda: [piece]) > 0

    @property
    def shards(self) -> int | None:
        """The number of shards, or None of a stream."""
        return None if self.rows is None else -(-self.rows // self.shard_size)

    def report(self) -> EncodingReport:
        """What the shards have, which is kept beside them as ``report.json``.

        Raises:
            ValueError: if one is missing, or one too many.
        """
        files = self._files()
        count = self.shards if self.shards is not None else len(self._compared)
        expected = [self._file(number) for number in range(count)]
        if missing := sorted(set(expected) - set(files)):
            raise ValueError(f"{self.folder} lacks {len(missing)} of {count} shards, such as {missing[0].name}.")
        if further := sorted(set(files) - set(expected)):
            raise ValueError(
                f"{self.folder} has {further[0].name}, and the corpus only {count} shards. It was longer when they "
                "were encoded: choose another folder."
            )
        tables = [pq.read_table(rows_file(file), columns=["tokens", "characters"]) for file in files]
        tokens = np.concatenate([np.empty(0, np.int32), *(table["tokens"].to_numpy() for table in tables)])
        hashes = [read_hashes(file) for file in files]
        longest = self.encoder.longest
        report = EncodingReport(
            texts=len(tokens),
            shards=len(files),
            tokens=self._computed(tokens),
            cut=0 if longest is None else int((tokens > longest).sum()),
            empty=sum(int((table["characters"].to_numpy() == 0).sum()) for table in tables),
            duplicates=len(tokens) - (len(np.unique(np.concatenate(hashes))) if hashes else 0),
        )
        with written_beside(self.folder / REPORT) as staged:
            staged.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        return report

    def _compare(self, space: dict[str, Any], settings: dict[str, Any], manifest: dict[str, Any]) -> None:
        """The manifest is this encoding's."""
        if not is_same_space(space, manifest):
            theirs = ", ".join(f"{name}={manifest.get(name)!r}" for name in self.encoder.description)
            ours = ", ".join(f"{name}={value!r}" for name, value in self.encoder.description.items())
            raise ValueError(
                f"{self.folder} has the vectors of {theirs}, and these are of {ours}, or of other weights or settings "
                "of it. Choose another folder."
            )
        for name, value in {"ranges": None, **settings}.items():
            if manifest.get(name) == value:
                continue
            if name == "rows":
                raise ValueError(
                    f"{self.folder} has the vectors of a corpus of {manifest.get(name)} rows, and this one has "
                    f"{value}. It has changed: choose another folder."
                )
            raise ValueError(
                f"{self.folder} was begun with {name}={manifest.get(name)}, and this is {value}. Go on with that, or "
                "choose another folder."
            )

    def _check_rows(self, corpus: Dataset) -> None:
        names = [name for name in ("text", self.id_column) if name is not None]
        hashes, first = [], 0
        for batch in corpus.with_format("arrow").select_columns(names).iter(SHARD_SIZE):
            for name in names:
                if batch[name].null_count:
                    row = first + int(pc.index(pc.is_null(batch[name]), True).as_py())
                    raise ValueError(f"Row {row} of the corpus has no {name}. Leave the row out, or give it one.")
            if self.id_column is not None:
                hashes.append(text_hashes(map(str, batch[self.id_column].to_pylist())))
            first += len(batch)
        _check_different(hashes)

    def _pieces(self, progress: _Progress) -> Iterator[Piece]:
        if isinstance(self.corpus, Dataset):
            assert self.shards is not None
            for number in range(self.shards):
                if number not in self._compared:
                    yield self._piece(number, self._read(number), progress)
            return
        hashes: list[np.ndarray] = []
        rows = iter(self.corpus)
        for number in range(sys.maxsize):
            part = list(islice(rows, self.shard_size))
            if not part:
                _check_different(hashes)
                return
            batch = {name: [row[name] for row in part] for name in part[0]}
            content = self._rows(batch, number * self.shard_size)
            if self.id_column is not None:
                hashes.append(text_hashes(map(str, content.ids)))
            yield self._piece(number, content, progress)

    def _read(self, number: int) -> _Rows:
        assert isinstance(self.corpus, Dataset)
        start = number * self.shard_size
        return self._rows(self.corpus.with_format(None)[start : start + self.shard_size], start)

    def _rows(self, batch: dict[str, list[Any]], first: int) -> _Rows:
        for row, text in enumerate(batch["text"], first):
            if not isinstance(text, str):
                raise ValueError(f"Row {row} of the corpus has the text {text!r}. Leave the row out, or give it one.")
        titles = batch.get("title", [""] * len(batch["text"]))
        texts = [joined(title or "", text) for title, text in zip(titles, batch["text"], strict=True)]  # as in mining
        ids = batch[self.id_column] if self.id_column else list(range(first, first + len(texts)))
        return _Rows(ids, texts)

    def _piece(self, number: int, rows: _Rows, progress: _Progress) -> Piece:
        file = self._file(number)
        is_done = partial(self._is_done, number, rows, progress)
        return Piece(file, is_done, partial(self._encode, number, rows, progress))

    def _files(self) -> list[Path]:
        """The shards that are there."""
        return sorted(file for file in self.folder.glob(f"*.{self.file_format}") if file.stem.isdecimal())

    def _there(self) -> int:
        """How many texts have their vectors, by whoever."""
        return self.shard_size * len(self._files())

    def _file(self, number: int) -> Path:
        return shard_file(self.folder, number, self.file_format)

    def _is_done(self, number: int, rows: _Rows, progress: _Progress) -> bool:
        if number in self._compared:
            return True
        file = self._file(number)
        if not is_whole(file):
            return False
        ours, theirs = text_hashes(rows.texts), read_hashes(file)
        if len(ours) != len(theirs) or (ours != theirs).any():
            row = int((ours[: len(theirs)] != theirs[: len(ours)]).argmax()) if len(theirs) else 0
            raise ValueError(
                f"{file} was encoded from another text than the corpus has in row {number * self.shard_size + row}. "
                "The corpus has changed: choose another folder, or delete the shard."
            )
        self._compared.add(number)
        progress.add(len(ours))
        return True

    def _encode(self, number: int, rows: _Rows, progress: _Progress) -> None:
        texts = list(dict.fromkeys(rows.texts))
        tokens = self.encoder.count_tokens(texts)
        progress.begin(self._computed(tokens), len(rows.texts))
        vectors = self._kept(check_finite(self.encoder.encode(texts, progress.count), texts))
        place = {text: i for i, text in enumerate(texts)}
        of_row = np.array([place[text] for text in rows.texts])
        write_shard(
            self._file(number),
            vectors[of_row],
            rows.ids,
            text_hashes(rows.texts),
            tokens=tokens[of_row],
            characters=[len(text.strip()) for text in rows.texts],
        )
        self._compared.add(number)
        progress.end()

    def _computed(self, tokens: np.ndarray) -> int:
        longest = self.encoder.longest
        return int((tokens if longest is None else tokens.clip(max=longest)).sum())

    def _kept(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors in the precision of the folder."""
        if self.precision in ("float32", "float16"):
            return vectors.astype(self.precision)
        return quantize_embeddings(vectors, self.precision, ranges=self._range() if self.precision == "int8" else None)

    def _range(self) -> np.ndarray:
        """``(2, dim)``: the least and the largest number of each dimension, which all workers share."""
        if self._ranges is None:
            file = self.folder / RANGES
            complete(lambda: [Piece(file, file.is_file, partial(self._calibrate, file))])
            self._ranges = np.load(file)
        return self._ranges

    def _calibrate(self, file: Path) -> None:
        rows = list(islice(iter(self.corpus), CALIBRATED_ON))
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        _write_ranges(file, ranges_of(self.encoder.encode(self._rows(batch, 0).texts)))


class _Progress:
    """How far the whole corpus is: a bar on a terminal, a line for each shard in a log.

    Args:
        rows: the number of texts, if it is known.
        show: whether to show anything.
        there: says how many texts have their vectors by now, by whatever worker.
    """

    def __init__(self, rows: int | None, show: bool, there: Callable[[], int]) -> None:
        self.rows = rows
        self.there = there
        self.in_lines = show and not sys.stderr.isatty()
        self.bar = tqdm(total=rows, desc="Encoding", unit="text", disable=not show or self.in_lines)
        self.begun_with = there()
        self.started = time.perf_counter()
        self.texts = self.tokens = 0  # of this worker
        self.shard = (0, 0, 0)  # tokens, texts, and texts that are done

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def add(self, texts: int) -> None:
        """A shard that was there."""
        self.bar.update(texts)

    def begin(self, tokens: int, texts: int) -> None:
        self.shard = tokens, texts, 0

    def count(self, texts: int) -> None:
        """Some of a shard's texts."""
        tokens, rows, counted = self.shard
        self.shard = tokens, rows, counted + texts
        self.bar.update(texts)

    def end(self) -> None:
        tokens, texts, counted = self.shard
        self.bar.update(texts - counted)  # duplicates
        self.texts += texts
        self.tokens += tokens
        seconds = time.perf_counter() - self.started
        rates = f"{self.texts / seconds:,.0f} texts/s, {self.tokens / seconds:,.0f} tokens/s"
        self.bar.set_postfix_str(rates)
        if self.in_lines:
            there, of = self.there(), ""
            if self.rows is not None:
                there = min(there, self.rows)
                minutes = (self.rows - there) * seconds / max(there - self.begun_with, texts) / 60
                of = f" of {self.rows:,}, {minutes:,.0f} min left"
            print(f"Encoded {there:,}{of}; this worker: {rates}", file=sys.stderr, flush=True)


def _write_ranges(file: Path, ranges: np.ndarray) -> None:
    with written_beside(file) as staged:
        write_array(staged, ranges)


def _check_different(hashes: list[np.ndarray]) -> None:
    """Of the ids of all rows."""
    if not hashes:
        return
    ids = np.concatenate(hashes)
    _, first, number = np.unique(ids, return_index=True, return_inverse=True)
    if len(first) < len(ids):
        row = int((first[number] != np.arange(len(ids))).argmax())
        raise ValueError(
            f"Rows {first[number[row]]} and {row} of the corpus have the same id. Leave one of them out; without a "
            "column of ids, rows are numbered."
        )
