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


def attention_numbers(tokens: list[str] = TOKENS, layers: int = 3, heads: int = 2) -> dict:
    size = len(tokens)
    scores = torch.randn(layers, heads, size, size, generator=torch.Generator().manual_seed(0))
    weights = scores.masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf).softmax(dim=-1)
    rollout = weights[:, 0].prod(dim=0)  # any numbers that are unlike the mean
    return {"tokens": tokens, "weights": weights.tolist(), "rollout": rollout.tolist()}


def loss_numbers(tokens: list[str] = TOKENS, layers: int = 3) -> dict:
    places = range(1, len(tokens))
    top = [None] + [[[tokens[i - n], 0.5 / 2**n] for n in range(5)] for i in places]
    lens = [[None] + [[tokens[i - layer], 0.25] for i in places] for layer in range(layers)]
    losses = [None] + [0.5 * i for i in places]
    return {"tokens": tokens, "losses": losses, "top": top, "lens": lens, "loss": 3.25, "bits_per_byte": 1.5}


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
    names = {name for _, attributes in found.tags for name in attributes}
    assert not [name for name in names if name in ("src", "href", "srcset", "action") or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|import\(|innerHTML|outerHTML|document\.write|eval\(", page)


def embedded(page: str) -> dict:
    return json.loads(Elements(page).scripts[0])


def whole(rows: list) -> torch.Tensor:
    """A map from its rows, which end at the diagonal."""
    assert [len(row) for row in rows] == list(range(1, T + 1))
    return torch.tensor([row + [0] * (T - len(row)) for row in rows])


def test_the_attention_page_holds_the_maps_and_their_means():
    numbers = attention_numbers()
    data, weights = embedded(attention_page(numbers, "")), torch.tensor(numbers["weights"])
    pairs = [(data["rollout"], torch.tensor(numbers["rollout"])), (data["mean"], weights.mean(dim=(0, 1)))]
    pairs += zip(data["means"], weights.mean(dim=1), strict=True)
    for heads, maps in zip(data["weights"], weights, strict=True):
        pairs += zip(heads, maps, strict=True)
    assert len(pairs) == 2 + 3 + 3 * 2
    for rows, expected in pairs:
        assert torch.allclose(whole(rows), expected, rtol=0, atol=0.00051)


def test_the_loss_page_holds_the_numbers():
    assert embedded(loss_page(loss_numbers(), "")) == loss_numbers()
    damaged = loss_numbers() | {"loss": float("nan"), "bits_per_byte": float("inf")}  # no JSON
    assert embedded(loss_page(damaged, "")) == loss_numbers() | {"loss": None, "bits_per_byte": None}


def test_a_page_of_gpt2_is_small():
    assert len(attention_page(attention_numbers(["token"] * 64, 12, 12), "").encode()) < 4e6


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


def wait_until(browser, condition) -> None:
    """Chromium opens a page, and tells it that something was unfolded or that the colours changed, a little later."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 20).until(lambda _: condition())


@pytest.fixture
def open_page(browser, tmp_path):
    def open_page(kind: str, numbers: dict | None = None) -> dict:
        page_of, numbers_of = PAGES[kind]
        numbers = numbers or numbers_of()
        (tmp_path / "page.html").write_text(page_of(numbers, f"{kind} of out"), encoding="utf-8")
        address = (tmp_path / "page.html").as_uri()
        browser.get(address)
        loaded = "return document.readyState === 'complete' && location.href === arguments[0]"
        wait_until(browser, lambda: browser.execute_script(loaded, address))
        return numbers

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
    rollout = numbers["rollout"]
    reader = max(range(1, T), key=lambda query: rollout[query][1])
    assert f"attended to by: {TOKENS[reader]} ({reader}) {rollout[reader][1]:.3f}" in says(browser)
    heads[5].click()  # after the heads of a layer comes their mean
    assert browser.find_element("id", "name").text == "layer 1, mean of its heads"
    mean = torch.tensor(numbers["weights"])[1].mean(dim=0)[:, 1]
    assert f"attended to by: {TOKENS[mean.argmax()]} ({mean.argmax()}) {mean.max():.3f}" in says(browser)


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
    summary = browser.find_element("id", "summary").text
    assert summary == f"{T} tokens, loss 3.2500 nats per token, 1.5000 bits per byte"
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
    wait_until(browser, lambda: len(browser.find_elements("css selector", "#lens tr")) == 1 + 3)
    row = browser.find_elements("css selector", "#lens tr")[2].find_elements("css selector", "th, td")
    assert [cell.get_property("textContent") for cell in row] == [
        "layer 1",
        "",
        *(pair[0] for pair in numbers["lens"][1][1:]),
    ]


@pytest.mark.parametrize("kind", PAGES)
def test_the_arrow_keys_move_and_enter_keeps(browser, open_page, kind):
    from selenium.webdriver import Keys

    open_page(kind)
    chosen = browser.find_element("css selector", "#tokens button.chosen")
    assert chosen.text == TOKENS[-1]  # the last token; the one with the largest loss
    chosen.send_keys(Keys.ARROW_LEFT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    place = T - 3
    shown = says if kind == "attention" else lambda browser: browser.find_element("id", "token").text
    assert f"token {place}" in shown(browser)
    assert browser.switch_to.active_element.text == TOKENS[place]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert f"token {place}" in shown(browser)


def test_a_click_on_the_map_keeps_its_query(browser, open_page):
    from selenium.webdriver import ActionChains

    open_page("attention")
    canvas = browser.find_element("id", "map")
    cell, margin = (int(canvas.get_attribute(f"data-{name}")) for name in ("cell", "margin"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    x, y = (margin + int((place + 0.5) * cell) - canvas.size["width"] // 2 for place in (1, 4))
    ActionChains(browser).move_to_element_with_offset(canvas, x, y).click().perform()
    assert browser.find_element("css selector", "#tokens [aria-pressed=true]").text == TOKENS[4]
    ActionChains(browser).move_to_element(browser.find_elements("css selector", "#tokens button")[2]).perform()
    assert says(browser).startswith(f"{TOKENS[4]} (token 4) attends to")


@pytest.mark.parametrize("kind, numbers_of", [("attention", attention_numbers), ("loss", loss_numbers)])
@pytest.mark.parametrize("tokens", [["t"] * 256, ["long" * 100] * 20, ["one"]], ids=["many", "long", "one"])
def test_extreme_texts_fit_the_window(browser, open_page, kind, numbers_of, tokens):
    open_page(kind, numbers_of(tokens, 2))  # open_page compares the page's width with the window's
    assert len(browser.find_elements("css selector", "#tokens button")) == len(tokens)
    if kind == "loss":
        browser.find_element("tag name", "summary").click()
        wait_until(browser, lambda: len(browser.find_elements("css selector", "#lens tr")) == 1 + 2)


def test_dark_mode_draws_on_dark(browser, open_page):
    def color_of_map() -> list[int]:  # where the first weight is, which is 1
        cell, margin = (int(canvas.get_attribute(f"data-{name}")) for name in ("cell", "margin"))
        code = "return [...arguments[0].getContext('2d').getImageData(arguments[1], arguments[1], 1, 1).data]"
        return browser.execute_script(code, canvas, margin + cell // 2)[:3]

    open_page("attention")
    canvas = browser.find_element("id", "map")
    assert color_of_map() == [0, 114, 178]
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        wait_until(browser, lambda: color_of_map() == [86, 180, 233])
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
