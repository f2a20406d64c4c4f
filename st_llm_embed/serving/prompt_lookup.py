"""Which tokens of a row are its prompt's, told by token ids alone.

``exact_instruction_mask`` (``modules/prompt_tokens.py``) decides it by character offsets, which a graph or a server
that is given ids does not have. But the bytes that the tokens of prompt + text stand for, one after another, begin
with the prompt's own bytes, however the tokens were merged: ``"Query: apple"`` may be ``[Query] [:] [▁apple]``. So a
row has a prompt where each token that ends within it spells that place of it, and the one that crosses its end, if
any, begins with what is left. Both are tables over places and vocabulary, prepared once from the tokenizer, and proven
then: texts of all kinds are tokenized after every prompt, and what the tables would tell otherwise than the offsets is
refused.

In: ``input_ids`` and ``attention_mask`` ``(batch, seq)``, padded on either side. Out: ``instruction_mask``
``(batch, seq)``. It needs torch and tokenizers only, and is traced into a graph as constants.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import cache

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

TEXT = "{text}"
# What a text may begin with that a tokenizer may join with a prompt's end: marks that a normaliser composes, spaces
# that it collapses or strips, controls that it drops.
JOINING = {"Mn", "Mc", "Me", "Zs", "Zl", "Zp", "Cc", "Cf", "Lm", "Sk"}
HANGUL = range(0x1160, 0x1200)  # vowels and finals, which join the syllable before
PROBES = (
    *("", "a", "Z", "apple", "are", "the cat", " a", "  a", "\ta", "\n", "\n\nA", "\r\n", "1", "007", "3.14", ":"),
    *(
        "::",
        ".",
        "...",
        "...a",
        ",",
        "-",
        "--",
        "_x",
        "'s",
        "'re",
        '"quoted"',
        "(a)",
        "[b]",
        "{c}",
        "</s>",
        "<s>",
        "#",
    ),
    *("é", "É", "e\u0301", "ß", "ﬁ", "①", "№1", "日本語", "、", "：", "中文 a", "가", "नमस्ते", "שלום", "مرحبا", "🐈"),
    *("👩\u200d🚀", "\u200b", "#", "@a"),
)


class PromptLookup(nn.Module):
    """The tokens of saved prompts in rows of token ids.

    Of a row that begins with one of the prompts they are those wholly inside it and the BOS tokens before them, of
    several prompts those of the longest. A text without a prompt that begins with the very words of one has the same
    ids, and so the same tokens are told.

    Args:
        tokenizer: the tokenizer of the rows, as it is saved with the model.
        prompts: the saved prompts. The part before ``{text}`` is looked for in one that has it: as tokens of its own,
            unless it ends in a space.
        columns: whether to tell as many columns as the prompt alone has tokens, from the first on, as
            ``instruction_mask="nv-embed"`` counts on rows that are padded on the right.

    Raises:
        ValueError: for a prompt whose tokens cannot be told by ids with this tokenizer.
    """

    lengths: Tensor
    codes: Tensor
    ends: Tensor
    inside: Tensor
    tail_rows: Tensor
    crossing: Tensor
    counts: Tensor

    def __init__(self, tokenizer: Tokenizer, prompts: Iterable[str], columns: bool = False) -> None:
        super().__init__()
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = tokenizer.encode("a").special_tokens_mask
        self.before = special.index(0)
        self.after = special[::-1].index(0)
        self.columns = columns
        surfaces = _surfaces(tokenizer)
        codes = {surface: number for number, surface in enumerate(dict.fromkeys(surfaces))}
        # By their bytes and, where they are tokens of their own, these: the prompt, and how many tokens it has alone.
        patterns: dict[tuple[bytes, tuple[int, ...] | None], tuple[str, int]] = {}
        for prompt in prompts:
            prefix, template, _ = prompt.partition(TEXT)
            ids = tokenizer.encode(prefix, add_special_tokens=False).ids
            if not ids:
                continue
            if template and not prefix[-1].isspace():
                patterns.setdefault((b"".join(surfaces[i] for i in ids), tuple(ids)), (prefix, len(ids)))
            else:
                patterns.setdefault((self._bytes_of(tokenizer, prefix, surfaces), None), (prefix, len(ids)))
        widest = max((len(surface) for surface in surfaces), default=0)
        longest = max((len(spelt) for spelt, _ in patterns), default=0)
        inside = torch.full((len(patterns), longest + 1, min(widest, longest) + 1), -1, dtype=torch.int32)
        tails: dict[bytes, int] = {}
        tail_rows = torch.zeros(len(patterns), longest + 1, dtype=torch.int64)  # row 0: nothing may cross
        for number, (spelt, own) in enumerate(patterns):
            if own is not None:
                place = 0
                for i in own:
                    inside[number, place, len(surfaces[i])] = codes[surfaces[i]]
                    place += len(surfaces[i])
                continue
            for place in range(len(spelt)):
                for length in range(1, min(widest, len(spelt) - place) + 1):
                    inside[number, place, length] = codes.get(spelt[place : place + length], -1)
                tail_rows[number, len(spelt) - place] = tails.setdefault(spelt[place:], len(tails) + 1)
        crossing = torch.zeros(len(tails) + 1, len(surfaces), dtype=torch.bool)
        for i, surface in enumerate(surfaces):
            for length in range(1, len(surface)):
                if (row := tails.get(surface[:length])) is not None:
                    crossing[row, i] = True
        kept = crossing.any(dim=1).nonzero().squeeze(1)  # of most tails, no token begins with one
        moved = torch.zeros(len(crossing), dtype=torch.int64)
        moved[kept] = torch.arange(1, len(kept) + 1)
        lengths = torch.tensor([len(surface) for surface in surfaces], dtype=torch.int64)
        self.register_buffer("lengths", lengths)  # (vocabulary,): bytes
        self.register_buffer("codes", torch.tensor([codes[surface] for surface in surfaces], dtype=torch.int32))
        self.register_buffer(
            "ends", torch.tensor([len(spelt) for spelt, _ in patterns], dtype=torch.int64)
        )  # (prompts,)
        self.register_buffer("inside", inside)  # (prompts, places, lengths): the code of the token that fits
        self.register_buffer("tail_rows", moved[tail_rows])  # (prompts, bytes left): a row of crossing
        self.register_buffer("crossing", torch.cat([crossing[:1], crossing[kept]]))  # (tails, vocabulary)
        self.register_buffer("counts", torch.tensor([count for _, count in patterns.values()], dtype=torch.int64))
        for number, ((_, own), (prefix, _)) in enumerate(patterns.items()):
            if own is None:
                self._prove(tokenizer, prefix, number)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(batch, seq)``: 1 on each token of the row's prompt, and on BOS before it."""
        if not len(self.ends):
            return torch.zeros_like(attention_mask)
        has_prompt, whole, real_number = self._find(input_ids, attention_mask)
        longest, chosen = (has_prompt * self.ends).max(dim=1, keepdim=True)  # (batch, 1)
        if self.columns:
            told = torch.arange(input_ids.shape[1], device=input_ids.device) < self.counts[chosen]
        else:
            of_chosen = whole.gather(2, chosen.unsqueeze(-1).expand(-1, whole.shape[1], -1)).squeeze(-1)
            told = of_chosen | (real_number < self.before)
        return (told & (longest > 0)) * attention_mask

    def _find(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which prompts a row begins with ``(batch, prompts)``, which tokens are wholly inside each ``(batch, seq,
        prompts)``, and the number of each real token in its row ``(batch, seq)``."""
        number = attention_mask.cumsum(dim=1) - 1
        counted = attention_mask.bool() & (number >= self.before)
        length = self.lengths[input_ids] * counted
        end = length.cumsum(dim=1).unsqueeze(-1)  # (batch, seq, 1): bytes spelt up to here
        length = length.unsqueeze(-1)
        start = end - length
        within = counted.unsqueeze(-1) & (start < self.ends)  # (batch, seq, prompts)
        whole = within & (end <= self.ends)
        prompts = torch.arange(len(self.ends), device=input_ids.device)
        _, places, lengths = self.inside.shape
        place = (prompts * places + start.clamp(max=places - 1)) * lengths + length.clamp(max=lengths - 1)
        fits = (length < lengths) & (self.inside.flatten()[place] == self.codes[input_ids].unsqueeze(-1))
        left = (self.ends - start).clamp(0, places - 1)
        row = self.tail_rows.flatten()[prompts * places + left]
        crosses = self.crossing.flatten()[row * len(self.codes) + input_ids.unsqueeze(-1)]
        wrong = within & ~((whole & fits) | (~whole & crosses))
        spelt = (end >= self.ends).any(dim=1) & whole.any(dim=1)
        return spelt & ~wrong.any(dim=1), whole, number

    def _bytes_of(self, tokenizer: Tokenizer, prefix: str, surfaces: list[bytes]) -> bytes:
        ids = tokenizer.encode(prefix + "a").ids
        spelt = b"".join(surfaces[i] for i in ids[self.before : len(ids) - self.after])
        if not spelt.endswith(b"a"):
            raise ValueError(_refusal(prefix, "a"))
        return spelt[:-1]

    def _prove(self, tokenizer: Tokenizer, prefix: str, number: int) -> None:
        """Compare with the offsets, text by text."""
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        texts = [*PROBES, *added, *(_joining_characters() if tokenizer.normalizer is not None else ())]
        rows = tokenizer.encode_batch([prefix + text for text in texts])
        width = max(map(len, rows))
        ids = torch.tensor([row.ids + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        has_prompt, whole, _ = self._find(ids, mask)
        counts = has_prompt[:, number] * (whole[:, :, number].sum(dim=1) + self.before)
        for text, row, count in zip(texts, rows, counts.tolist(), strict=True):
            if count != _inside_by_offsets(row.offsets, len(prefix)):
                raise ValueError(_refusal(prefix, text))


def _surfaces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token of the vocabulary stands for, by id."""
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    byte_level = any(
        '"ByteLevel"' in json.dumps(state[part]) for part in ("normalizer", "pre_tokenizer", "decoder") if state[part]
    )
    prefix = model.get("continuing_subword_prefix") or ""
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    surfaces = [b""] * (max(vocabulary.values()) + 1)
    characters = _byte_characters()
    for token, i in vocabulary.items():
        if i in added:
            surfaces[i] = added[i].encode()
        elif byte_level and all(character in characters for character in token):
            surfaces[i] = bytes(characters[character] for character in token)
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            surfaces[i] = bytes([int(token[3:5], 16)])
        else:
            surfaces[i] = token.removeprefix(prefix).encode()
    return surfaces


@cache
def _joining_characters() -> list[str]:
    characters = map(chr, range(sys.maxunicode + 1))
    return [one for one in characters if unicodedata.category(one) in JOINING or ord(one) in HANGUL]


def _byte_characters() -> dict[str, int]:
    """The characters that a byte-level vocabulary writes for bytes (GPT-2): printable ones for themselves, the others
    from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _inside_by_offsets(offsets: list[tuple[int, int]], length: int) -> int:
    """How many tokens there are up to the last that lies wholly inside the prompt: see ``exact_instruction_mask``."""
    inside = [number for number, (start, end) in enumerate(offsets) if start < end <= length]
    return inside[-1] + 1 if inside else 0


def _refusal(prefix: str, text: str) -> str:
    return (
        f"Which tokens are the prompt's cannot be told by token ids alone: with this tokenizer the prompt {prefix!r} "
        f"joins with a text that begins with {text!r} in another way than byte by byte. End it with a colon, a space "
        "or a line break, or let the pooling include it (include_prompt=True)."
    )
