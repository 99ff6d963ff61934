"""Prompts with responses, and conversations -> token ids, of which only the responses are learned."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kqv.documents import json_lines
from kqv.errors import UserError
from kqv.meta import mask_bit
from kqv.splits import split_of
from kqv.tokenizer import JsonTokenizer, Tokenizer, utf8
from kqv.writer import Encoded

Segment = tuple[str, bool]  # a piece of text, and whether it is learned
ROLES = (("user", "prompt"), ("assistant", "response"))


def is_exchange(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "response"))


def is_conversation(row: Any) -> bool:
    """Whether a row has "messages", some of the assistant."""
    messages = row.get("messages") if isinstance(row, dict) else None
    return (
        isinstance(messages, list)
        and all(isinstance(message, dict) for message in messages)
        and all(isinstance(message.get(key), str) for message in messages for key in ("role", "content"))
        and any(message["role"] == "assistant" for message in messages)
    )


def find_template(tokenizer: Tokenizer) -> Any:
    """transformers' tokenizer, which writes messages with this one's chat template; None if it has none."""
    if not isinstance(tokenizer, JsonTokenizer) or not tokenizer.config.get("chat_template"):
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.bpe, **tokenizer.config)


def render(template: Any, messages: list[dict[str, str]], to_answer: bool) -> str:
    """The text of messages; `to_answer`: up to where the assistant's answer begins."""
    from jinja2 import TemplateError

    try:
        return template.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from None


def segments(row: dict[str, Any], template: Any) -> list[Segment]:
    """A row's text in pieces: the assistant's are learned, with what ends them; all else is read only.

    Without a chat template a prompt and its response stand side by side, as they are.
    """
    if is_exchange(row):
        if template is None:
            return [(row["prompt"], False), (row["response"], True)]
        row = {"messages": [{"role": role, "content": row[key]} for role, key in ROLES]}
    if template is None:
        raise UserError('"messages" need a tokenizer with a chat template: --tokenizer=FOLDER of a chat model')
    found, text, messages = [], "", row["messages"]
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, answered = render(template, messages[:n], True), render(template, messages[: n + 1], False)
            if not asked.startswith(text) or not answered.startswith(asked):
                raise UserError("the tokenizer's chat template rewrites earlier messages, so responses cannot be told")
            found += [(asked[len(text) :], False), (answered[len(asked) :], True)]
            text = answered
    return found


def encode_segments(parts: list[Segment], tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    """Ids (n,) of the pieces, one after the other, and the end of text; ids that are not learned have their mask bit.

    A prompt is encoded by itself, as it is when the model is asked.
    """
    ids = []
    for text, learned in parts:
        own = np.array(tokenizer.encode_special(text), dtype=dtype)
        ids.append(own if learned else own | dtype.type(mask_bit(dtype.name)))
    if tokenizer.end_of_text is not None:
        ids.append(np.array([tokenizer.end_of_text], dtype=dtype))
    return np.concatenate(ids)


def encode_rows(paths: list[Path], tokenizer: Tokenizer, dtype: np.dtype, val_fraction: float) -> Iterator[Encoded]:
    """The ids of each row of JSON-lines files, in the split that a hash of the row chooses; the first row is val.

    Raises UserError if a row is neither an exchange nor a conversation.
    """
    template, first = find_template(tokenizer), None
    for where, row in itertools.chain.from_iterable(map(json_lines, paths)):
        if not is_exchange(row) and not is_conversation(row):
            raise UserError(f'{where}: neither "prompt" and "response" nor "messages" with "role" and "content"')
        try:
            parts = segments(row, template)
            ids = encode_segments(parts, tokenizer, dtype)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
        first = first or digest
        yield {split_of(digest, first, val_fraction): (ids, sum(len(utf8(text)) for text, _ in parts))}
