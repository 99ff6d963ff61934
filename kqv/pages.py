"""Pages to look inside a model: one HTML file each, with its data, that needs no network."""

import json
from html import escape
from pathlib import Path
from typing import Any

DIGITS = 4  # of numbers in a page: more would only make it larger


def attention_page(numbers: dict[str, Any], title: str) -> str:
    """A page to explore attention maps. `numbers`: "tokens", "weights" [layer][head][query][key], "rollout"."""
    return fill("attention.html", rounded(numbers), title)


def loss_page(numbers: dict[str, Any], title: str) -> str:
    """A page to explore the loss of each token. `numbers`: "tokens", "losses", "top", "lens", "loss", ..."""
    return fill("loss.html", rounded(numbers), title)


def fill(template: str, data: Any, title: str) -> str:
    """A template of this folder with its title and data in place. Data are inert, whatever text is in them."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # so that no tag, and no end of the script, can be in it
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = (Path(__file__).parent / template).read_text(encoding="utf-8")
    before, _, after = page.partition("{{data}}")
    return before.replace("{{title}}", escape(title)) + text + after


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value
