"""The token ids of a text as ``LLMBackbone`` makes them, in a server that is given prompt and text as one string.

An endpoint hands on a string in which the prompt is typed already: before the text, or, of a template
(``"{text} The next sentence:"``), around it, or, by an endpoint that puts any prompt before the text, the template
itself. Saved templates are found in it again, so that their parts are tokens of their own and truncation cuts the text
alone. A text under no prompt gets the model's default one, as in ``encode``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT = "{text}"


class TextEncoder:
    """Prompt and text to token ids.

    Args:
        tokenizer: the model's tokenizer, of transformers.
        prompts: the saved prompts by name.
        default_prompt_name: the name of the prompt of texts that have none. Where a saved prompt is empty, a text
            without a prompt has that one.
        add_eos: ``LLMBackbone``'s setting.
    """

    def __init__(
        self, tokenizer: Any, prompts: Mapping[str, str], default_prompt_name: str | None, add_eos: bool | str
    ) -> None:
        self.tokenizer = tokenizer
        longest_first = sorted(set(prompts.values()), key=len, reverse=True)
        self.templates = [prompt for prompt in longest_first if TEXT in prompt]
        self.prefixes = [prompt for prompt in longest_first if TEXT not in prompt]
        self.default = prompts[default_prompt_name] if default_prompt_name and "" not in self.prefixes else ""
        special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.before = special.index(0)  # how many tokens the tokenizer puts before a text, and after it
        self.after = special[::-1].index(0)
        self.eos_in_text = add_eos == "nv-embed" and not self.after

    def __call__(self, typed: str, max_length: int | None = None) -> list[int]:
        """Token ids of a text with its prompt.

        Args:
            typed: the text with its prompt.
            max_length: how many tokens there may be at most; the text is cut on the right.

        Raises:
            ValueError: if the prompt leaves no room for text.
        """
        prefix, text, suffix = self.find_prompt(typed)
        prefix_ids = self._ids(prefix) if prefix and not prefix[-1].isspace() else []
        suffix_ids = self._ids(suffix)
        text = text if prefix_ids else prefix + text
        if self.eos_in_text:
            text += self.tokenizer.eos_token
        elif not (text.strip() or suffix or prefix_ids or self.before or self.after):
            text = self.tokenizer.eos_token
        around = len(prefix_ids) + len(suffix_ids)
        if max_length is not None and around + self.before + self.after >= max_length:
            raise ValueError(
                f"The prompt {prefix + TEXT + suffix!r} takes {around + self.before + self.after} tokens with BOS and "
                f"EOS, which leaves no room for text within {max_length}."
            )
        room = {} if max_length is None else {"truncation": True, "max_length": max_length - around}
        ids = self.tokenizer(text, **room)["input_ids"]
        end = len(ids) - self.after
        if suffix_ids and self.eos_in_text and ids[-1:] == [self.tokenizer.eos_token_id]:
            end -= 1
        return [*ids[: self.before], *prefix_ids, *ids[self.before : end], *suffix_ids, *ids[end:]]

    def find_prompt(self, typed: str) -> tuple[str, str, str]:
        """A template's part before the text, the text, and the part after it. Prompts that only stand before the text
        are left in it."""
        for template in self.templates:
            before, _, after = template.partition(TEXT)
            if typed.startswith(template):
                return before, typed[len(template) :], after
            if len(typed) >= len(before + after) and typed.startswith(before) and typed.endswith(after):
                return before, typed[len(before) : len(typed) - len(after)], after
        if not self.default or typed.startswith(tuple(self.prefixes)):
            return "", typed, ""
        before, template, after = self.default.partition(TEXT)
        return (before, typed, after) if template else ("", before + typed, "")

    def _ids(self, part: str) -> list[int]:
        return self.tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
