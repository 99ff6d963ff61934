"""Pages: one HTML file each, with its data, that needs no network. Those to look inside a model, and their frame."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

Map = list[list[float]]  # [query][key]
FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 1rem auto; padding: 0 1rem; }}
</style>
{style}</head>
<body>
<h1>{title}</h1>
{body}</body>
</html>
"""
STYLE = """<style>
:root { --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --mark: #56b4e9; } }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; }
.box { overflow: auto; }
</style>
"""


def attention_page(numbers: dict[str, Any], title: str) -> str:
    """A page to explore attention maps. `numbers`: "tokens", "weights" [layer][head][query][key], "rollout"."""
    weights = [[lower(one) for one in heads] for heads in numbers["weights"]]
    means = [mean(heads) for heads in weights]  # before rounding, so that their last digit is right
    data = {"weights": weights, "means": means, "mean": mean(means), "rollout": lower(numbers["rollout"])}
    return fill("attention.html", {"tokens": numbers["tokens"]} | rounded(data, 3), title)


def loss_page(numbers: dict[str, Any], title: str) -> str:
    """A page to explore the loss of each token. `numbers`: "tokens", "losses", "top", "lens", "loss", ..."""
    return fill("loss.html", rounded(numbers, 8), title)  # more digits than are shown: rounding twice could be wrong


def lower(weights: Map) -> Map:
    """The rows of a map up to the diagonal: above it all is 0, and would only make a page larger."""
    return [row[: query + 1] for query, row in enumerate(weights)]


def mean(maps: list[Map]) -> Map:
    return [[sum(cells) / len(maps) for cells in zip(*rows, strict=True)] for rows in zip(*maps, strict=True)]


def fill(template: str, data: Any, title: str) -> str:
    """A page from a template of this folder, a style element and a body. Data are inert, whatever text is in them."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # so that no tag, and no end of the script, can be in it
        text = text.replace(character, f"\\u{ord(character):04x}")
    style, end, body = (Path(__file__).parent / template).read_text(encoding="utf-8").partition("</style>\n")
    before, _, after = body.partition("{{data}}")
    return frame(title, STYLE + style + end, before + text + after)


def frame(title: str, style: str, body: str) -> str:
    """A whole page: `style` is one or more style elements, `body` what follows the title, both HTML."""
    return FRAME.format(title=escape(title), style=style, body=body)


def rounded(value: Any, digits: int) -> Any:
    """`value` with each float in it rounded; None for what JSON cannot hold, NaN and infinities."""
    if isinstance(value, float):
        return (round(value, digits) or 0) if math.isfinite(value) else None  # 0 is shorter than 0.0
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return {key: rounded(item, digits) for key, item in value.items()} if isinstance(value, dict) else value
