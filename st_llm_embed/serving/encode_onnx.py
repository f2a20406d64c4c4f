"""Texts to vectors by an ONNX folder, with onnxruntime, tokenizers and numpy alone.

``export_onnx`` puts a copy of this file into each folder that it writes. Used from there, or copied:

    python encode_onnx.py . "how do I sort a list?" --prompt-name query

    encoder = OnnxEncoder("my-model-onnx")
    vectors = encoder.encode(["how do I sort a list?"], prompt_name="query")  # (texts, dim) float32

A text's tokens are those of the model's own ``encode``: the prompt before it, or around it where that has ``{text}``;
cut to the model's longest; ended by EOS where the model does so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

TEXT = "{text}"
TOKENS_ON_CPU = 512  # at once, padding included: 2.2 times as fast as 32 texts of 8 to 128 tokens at once


class OnnxEncoder:
    """An ONNX folder as an encoder.

    Args:
        folder: the folder that ``export_onnx`` wrote.
        **session: the arguments of ``onnxruntime.InferenceSession``, such as ``providers`` and ``sess_options``.
    """

    def __init__(self, folder: str | Path, **session: Any) -> None:
        root = Path(folder)
        settings = json.loads((root / "onnx" / "export.json").read_text(encoding="utf-8"))
        self.prompts: dict[str, str] = settings["prompts"]
        self.default_prompt_name: str | None = settings["default_prompt_name"]
        self.max_seq_length: int | None = settings["max_seq_length"]
        self.ends_in_text: bool = settings["eos_in_text"]
        self.eos_token: str | None = settings["eos_token"]
        self.pads_left = settings["padding_side"] == "left"
        self.pad_token_id: int = settings["pad_token_id"]
        self.tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        special = self.tokenizer.encode("a").special_tokens_mask
        self.before, self.after = special.index(0), special[::-1].index(0)  # BOS and EOS
        session = {"providers": ["CPUExecutionProvider"], **session}
        self.session = onnxruntime.InferenceSession(root / "onnx" / "model.onnx", **session)
        on_cpu = self.session.get_providers() == ["CPUExecutionProvider"]
        self.tokens_at_once = TOKENS_ON_CPU if on_cpu else 1 << 62

    def encode(
        self,
        texts: Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
    ) -> np.ndarray:
        """``(texts, dim)`` float32 vectors.

        Args:
            texts: the texts.
            prompt_name: the name of a saved prompt. Default: the model's default prompt, if it has one.
            prompt: a prompt in its place; ``""`` for none. A pooling that leaves the prompt out knows saved ones only.
            batch_size: the number of texts encoded at once, at most.

        Raises:
            ValueError: for a prompt that is not saved, or leaves no room for text.
        """
        if prompt is None:
            name = prompt_name if prompt_name is not None else self.default_prompt_name
            if name is not None and name not in self.prompts:
                raise ValueError(f"There is no prompt {name!r}. Saved ones: {', '.join(self.prompts)}.")
            prompt = self.prompts[name] if name is not None else ""
        rows = [self.token_ids(text, prompt) for text in texts]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))  # rows of like length together
        vectors, start = [], 0
        while start < len(order):
            fit = self.tokens_at_once // max(1, len(rows[order[start]]))
            batch = order[start : start + max(1, min(batch_size, fit))]
            vectors.append(self.run(*self.pad([rows[number] for number in batch])))
            start += len(batch)
        return np.concatenate(vectors)[np.argsort(order)] if vectors else np.zeros((0, 0), np.float32)

    def token_ids(self, text: str, prompt: str = "") -> list[int]:
        """The tokens of one text under a prompt."""
        prefix, template, suffix = prompt.partition(TEXT)
        if self.ends_in_text:
            text += self.eos_token or ""
        elif not (prompt or self.before or self.after):
            text = text if text.strip() else self.eos_token or text
        # A template's parts are tokens of their own, but for a space that the first word takes along.
        own = self._ids(prefix) if template and prefix and not prefix[-1].isspace() else []
        tail = self._ids(suffix) if suffix else []
        text = text if own else prefix + text
        if self.max_seq_length is not None:
            room = self.max_seq_length - len(own) - len(tail)
            if len(self._ids(prefix)) + len(tail) + self.before + self.after >= self.max_seq_length and prompt:
                raise ValueError(
                    f"The prompt {prompt!r} leaves no room for text within max_seq_length={self.max_seq_length}."
                )
            self.tokenizer.enable_truncation(room)
        ids = self.tokenizer.encode(text).ids
        self.tokenizer.no_truncation()
        stop = len(ids) - self.after
        if self.ends_in_text and tail and ids[-1:] == self._ids(self.eos_token or ""):
            stop -= 1
        return [*ids[: self.before], *own, *ids[self.before : stop], *tail, *ids[stop:]]

    def pad(self, rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of token ids as ``input_ids`` and ``attention_mask``, each ``(batch, seq)``."""
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            columns = slice(width - len(row), width) if self.pads_left else slice(0, len(row))
            ids[number, columns], mask[number, columns] = row, 1
        return ids, mask

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """``(batch, dim)``: the graph's vectors."""
        return self.session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})[0]

    def _ids(self, part: str) -> list[int]:
        return self.tokenizer.encode(part, add_special_tokens=False).ids


def main() -> None:
    """Print one JSON array a text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="the ONNX folder")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--prompt-name", help="the name of a saved prompt (default: the model's default prompt)")
    arguments = parser.parse_args()
    for vector in OnnxEncoder(arguments.folder).encode(arguments.texts, arguments.prompt_name):
        print(json.dumps(vector.tolist()))


if __name__ == "__main__":
    main()
