"""The pages of explain.py: their data are inert, they refer to nothing outside, and they work in a browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from kqv.pages import attention_page, loss_page

HOSTILE = ["</script><script>document.title='run'</script>", "<img src=x onerror=\"document.title='run'\">", "{{data}}"]
TOKENS = ["The", "␣pizza", "漢", "🙂", "مرحبا", "\\xe2", "⏎", *HOSTILE, "\u2028", "&amp;"]
T = len(TOKENS)


def attention_numbers() -> dict:
    scores = torch.randn(3, 2, T, T, generator=torch.Generator().manual_seed(0))
    weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(dim=-1)
    return {"tokens": TOKENS, "weights": weights.tolist(), "rollout": weights.mean(dim=(0, 1)).tolist()}


def loss_numbers() -> dict:
    top = [None] + [[[TOKENS[(i + n) % T], 0.5 / 2**n] for n in range(5)] for i in range(1, T)]
    lens = [[None] + [[TOKENS[(i + layer) % T], 0.25] for i in range(1, T)] for layer in range(3)]
    losses = [None] + [0.5 * i for i in range(1, T)]
    return {"tokens": TOKENS, "losses": losses, "top": top, "lens": lens, "loss": 3.25, "bits_per_byte": 1.5}


PAGES = {"attention": (attention_page, attention_numbers), "loss": (loss_page, loss_numbers)}


class Elements(HTMLParser):
    """What a page consists of: tags with their attributes, and the text of each script."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script" and text.strip():
            self.scripts.append(text)


@pytest.mark.parametrize("kind", PAGES)
def test_data_survive_and_are_inert(kind):
    page_of, numbers_of = PAGES[kind]
    page = page_of(numbers_of(), "<b>a & b</b> {{data}}")
    found = Elements(page)
    assert [tag for tag, _ in found.tags].count("script") == 2 and len(found.scripts) == 2
    assert json.loads(found.scripts[0])["tokens"] == TOKENS
    assert "<img" not in page and "&lt;b&gt;a &amp; b&lt;/b&gt;" in page
    assert not any({"src", "href"} & attributes.keys() for _, attributes in found.tags)
    assert not re.search(r"https?:|url\(|@import|innerHTML|eval\(", page)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and its driver (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    for flag in (*flags, "disable-component-update", "disable-sync", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    def open_page(kind: str) -> dict:
        page_of, numbers_of = PAGES[kind]
        (tmp_path / "page.html").write_text(page_of(numbers_of(), f"{kind} of out"), encoding="utf-8")
        browser.get(f"file://{tmp_path / 'page.html'}")
        return numbers_of()

    yield open_page
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.title.endswith(" of out")  # the hostile tokens would have changed it
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def says(browser) -> str:
    return browser.find_element("id", "says").text.replace("\u2068", "").replace("\u2069", "")


def test_the_attention_page_shows_what_a_token_attends_to(browser, open_page):
    from selenium.webdriver import ActionChains

    numbers = open_page("attention")
    heads = browser.find_elements("css selector", "#heads button")
    assert len(heads) == 3 * 3 and browser.find_element("id", "name").text == "mean of all heads"
    heads[4].click()
    assert browser.find_element("id", "name").text == "layer 1, head 1"
    weights = numbers["weights"][1][1]
    tokens = browser.find_elements("css selector", "#tokens button")
    ActionChains(browser).move_to_element(tokens[3]).perform()
    best = max(range(4), key=lambda key: weights[3][key])
    assert says(browser).startswith(f"🙂 (token 3) attends to: {TOKENS[best]} ({best}) {weights[3][best]:.3f}")

    tokens[1].click()  # stays, wherever the pointer goes
    ActionChains(browser).move_to_element(tokens[4]).perform()
    assert "(token 1) attends to" in says(browser)
    browser.find_element("css selector", "input[value=from]").click()
    reader = max(range(1, T), key=lambda query: weights[query][1])
    assert f"␣pizza (token 1) is attended to by: {TOKENS[reader]} ({reader}) {weights[reader][1]:.3f}" in says(browser)

    browser.find_element("id", "rollout").click()
    assert browser.find_element("id", "name").text == "rollout"


def test_the_attention_page_reads_its_map(browser, open_page):
    from selenium.webdriver import ActionChains

    numbers = open_page("attention")
    canvas = browser.find_element("id", "map")
    cell, margin = (int(canvas.get_attribute(f"data-{name}")) for name in ("cell", "margin"))
    x, y = (
        margin + int((place + 0.5) * cell) - size // 2
        for place, size in ((0, canvas.size["width"]), (2, canvas.size["height"]))
    )
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(browser).move_to_element_with_offset(canvas, x, y).perform()
    mean = torch.tensor(numbers["weights"]).mean(dim=(0, 1))[2, 0]
    assert says(browser) == f"漢 (2) attends to The (0): {mean:.3f}"


def test_the_loss_page_shows_a_token_and_its_alternatives(browser, open_page):
    from selenium.webdriver import ActionChains

    numbers = open_page("loss")
    assert f"{T} tokens, loss 3.2500 nats per token, 1.5000 bits per byte" in browser.page_source
    assert browser.find_element("id", "token").text.startswith(f"token {T - 1}")  # the largest loss
    tokens = browser.find_elements("css selector", "#tokens button")
    ActionChains(browser).move_to_element(tokens[2]).perform()
    assert "漢" in browser.find_element("id", "token").text
    assert browser.find_element("id", "numbers").text == "loss 1.0000 nats, probability 36.8%"
    rows = [row.text.split("\n")[0] for row in browser.find_elements("css selector", "#top tr")]
    assert len(rows) == 5 and rows[0] == f"{numbers['top'][2][0][0]} 50.0%"
    layers = [row.text for row in browser.find_elements("css selector", "#column tr")]
    assert layers[1] == f"layer 1 {numbers['lens'][1][2][0]} 25.0%"
    ActionChains(browser).move_to_element(tokens[0]).perform()
    assert "Nothing comes before the first token" in browser.find_element("id", "numbers").text
    browser.find_element("tag name", "summary").click()
    assert len(browser.find_elements("css selector", "#lens tr")) == 1 + 3
