"""The chat page in a real browser, beside real engines: what people do, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from shared.keys import KeyStore
from shared.storage import Layout
from tests.fleets import in_engines
from tests.running_node import RunningNode, running_node, wait_for
from workers.inference.tiny import CHECKPOINT
from workers.inference.tiny.scenes import PROMPT, encoded, scene

pytestmark = pytest.mark.timeout(180)

TINY = {"model": "tiny", "engine": "transformers"}
ECHO = {"model": "echo", "engine": "echo", "options": {"faults": True, "token_delay_s": 0.005}}
PATIENCE_S = 60.0


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: Chrome, node: RunningNode) -> None:
        self.browser = browser
        self._url = node.base_url.removesuffix("v1")

    def open(self) -> None:
        """Open it in a tab that remembers nothing."""
        self.browser.get(self._url)
        self.browser.execute_script("sessionStorage.clear()")
        self.browser.get_log("browser")
        self.browser.get(self._url)

    def find(self, css: str) -> WebElement:
        """The one element."""
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        """What all such elements say."""
        return [found.text for found in self.browser.find_elements(By.CSS_SELECTOR, css)]

    def choose(self, model: str, beside: str = "no other") -> None:
        """Choose models once they are known."""
        self.wait(lambda: bool(self.texts("#model option")), "the models")
        Select(self.find("#model")).select_by_visible_text(model)
        Select(self.find("#beside")).select_by_visible_text(beside)

    def ask(self, text: str) -> None:
        """Put a question in, which is faster than to type a long one, and send it."""
        field = self.find("#text")
        self.browser.execute_script("arguments[0].value = arguments[1]", field, text)
        field.send_keys(Keys.ENTER)

    def answers(self, count: int = 1) -> list[str]:
        """Wait for so many answers that have ended, and read them without what is told of them."""
        self.wait(lambda: len(self.texts(".answered .told")) == count, f"{count} answers")
        return [text.rpartition("\n")[0] for text in self.texts(".answered")]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until ``condition()`` holds."""
        wait_for(condition, what, PATIENCE_S, lambda: self.find("body").text)

    def complaints(self) -> list[str]:
        """What the browser logged as an error, a policy that was broken among it."""
        log = self.browser.get_log("browser")
        return [row["message"] for row in log if row["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    """A node that serves the trained model and one that repeats."""
    with running_node(models=(TINY, ECHO), checkpoints={"tiny": CHECKPOINT}) as running:
        yield running


@pytest.fixture
def page(browser: Chrome, node: RunningNode) -> Page:
    """The page, just opened."""
    found = Page(browser, node)
    found.open()
    return found


def test_a_picture_is_described(page: Page, tmp_path: Path) -> None:
    """Chosen, seen, sent, and answered by the model that was trained for it."""
    drawn = scene("held_out", 0)
    picture = tmp_path / "scene.jpg"
    picture.write_bytes(encoded(drawn.image))
    page.choose("tiny")
    page.find("#files").send_keys(str(picture))
    page.wait(lambda: page.texts("#pictures span") == ["scene.jpg"], "the picture")
    page.ask(PROMPT)
    assert page.answers() == [drawn.caption]
    told = page.texts(".told")[0]
    assert "first word after" in told
    assert "tokens in" in told
    assert page.find(".asked img").get_attribute("alt") == "scene.jpg"
    assert page.texts("#pictures span") == []
    assert page.complaints() == []


def test_two_models_answer_side_by_side_and_remember(page: Page) -> None:
    """Each has a conversation of its own; the second question goes with the first."""
    page.choose("tiny", "echo")
    page.ask("say this")
    assert page.answers(2)[1] == "say this"
    before = page.texts(".column:nth-child(2) .told")[0]
    page.ask("and that")
    assert page.answers(4)[3] == "and that"
    after = page.texts(".column:nth-child(2) .told")[1]
    assert tokens_in(after) > tokens_in(before)
    assert page.texts(".column h2") == ["tiny", "echo"]


def tokens_in(told: str) -> int:
    """How long the prompt was."""
    [words] = [part for part in told.split(" · ") if "tokens in" in part]
    return int(words.split()[0])


GIVE = """
const [kind, name, bytes] = arguments;
const data = new DataTransfer();
data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/jpeg" }));
const told = { bubbles: true, cancelable: true };
document.dispatchEvent(kind === "paste"
  ? new ClipboardEvent(kind, { ...told, clipboardData: data })
  : new DragEvent(kind, { ...told, dataTransfer: data }));
"""


def test_pictures_are_pasted_dropped_and_taken_away(page: Page) -> None:
    """What is left is sent, and nothing of the one that was removed."""
    page.choose("tiny")
    drawn = [scene("held_out", number) for number in range(2)]
    for kind, one in zip(("paste", "drop"), drawn, strict=True):
        page.browser.execute_script(GIVE, kind, f"{kind}.jpg", list(encoded(one.image)))
        page.wait(lambda kind=kind: f"{kind}.jpg" in page.texts("#pictures span"), kind)
    page.find("#pictures button").click()
    assert page.texts("#pictures span") == ["drop.jpg"]
    page.ask(PROMPT)
    assert page.answers() == [drawn[1].caption]


def test_settings_go_along(page: Page) -> None:
    """A bound of tokens is kept, and the page says that it cut the answer off."""
    page.choose("echo")
    page.find("summary").click()
    page.find("#max-tokens").send_keys("2")
    page.find("#temperature").send_keys("0.5")
    page.find("#system").send_keys("be brief")
    page.ask("one two three")
    assert page.answers() == ["one two"]
    assert "cut off" in page.texts(".told")[0]
    page.find("#max-tokens").clear()
    page.find("#temperature").clear()
    page.find("#temperature").send_keys("9")
    page.ask("too hot")
    page.wait(lambda: bool(page.texts(".failed")), "the refusal")
    assert "temperature" in page.texts(".failed")[0]


def test_a_new_line_is_no_end_and_a_new_chat_forgets(page: Page) -> None:
    """Shift-Enter, then Enter; and a chat that begins anew."""
    page.choose("echo")
    page.find("#text").send_keys("one", Keys.SHIFT + Keys.ENTER)
    page.find("#text").send_keys(Keys.NULL, "two", Keys.ENTER)
    page.answers()
    assert page.texts(".asked") == ["one\ntwo"]
    page.find("#anew").click()
    assert page.texts(".asked") == []


def test_an_answer_is_stopped_and_so_is_its_engine(page: Page, node: RunningNode) -> None:
    """What was read so far stays."""
    page.choose("echo")
    page.ask("word " * 3000)
    page.wait(lambda: "word" in page.texts(".answered")[0], "the first words")
    page.find("#stop").click()
    page.wait(lambda: page.texts(".answered .told") == ["stopped"], "the end")
    assert not page.find("#stop").is_displayed()
    page.wait(lambda: in_engines(node, "echo") == 0, "an idle engine")


def test_a_failure_is_told_and_may_be_tried_again(page: Page) -> None:
    """In the server's words, and the question is not lost."""
    page.choose("echo")
    page.ask("[[echo:error]]")
    page.wait(lambda: bool(page.texts(".failed")), "the failure")
    page.find(".answered button").click()
    page.wait(lambda: len(page.texts(".failed")) == 1 and not busy(page), "the second failure")
    assert page.texts(".asked") == ["[[echo:error]]"]
    page.ask("and now")
    assert page.answers()[-1] == "and now"


def busy(page: Page) -> bool:
    """Whether an answer is on its way."""
    return page.find("#stop").is_displayed()


def test_what_a_model_says_is_text_and_never_markup(page: Page) -> None:
    """Whoever made a model or a picture gets no code into the browser."""
    page.choose("echo")
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.ask(evil)
    assert page.answers() == [evil]
    assert page.browser.find_elements(By.CSS_SELECTOR, ".answered img, .answered script") == []
    assert page.complaints() == []


def test_what_is_no_picture_is_refused_by_name(page: Page, tmp_path: Path) -> None:
    """Before anything is sent; a picture that is broken is the server's to refuse."""
    words, broken = tmp_path / "words.txt", tmp_path / "broken.jpg"
    words.write_text("no picture")
    broken.write_bytes(encoded(scene("held_out", 1).image)[:300])
    page.choose("tiny")
    page.find("#files").send_keys(f"{words}\n{broken}")
    page.wait(lambda: page.texts("#pictures span") == ["broken.jpg"], "the other file")
    assert page.find("#notice").text == "words.txt is no picture."
    page.ask(PROMPT)
    page.wait(lambda: bool(page.texts(".failed")), "the refusal")
    assert "image" in page.texts(".failed")[0]


def test_a_server_with_keys_is_asked_with_one(browser: Chrome) -> None:
    """The page asks for it, says when it is wrong, and shows the models of its owner."""
    with running_node(models=(ECHO,), start=False) as node:
        secret = KeyStore(Layout(node.settings.data_dir).keys).create("ann")[1]
        node.start()
        page = Page(browser, node)
        page.open()
        wants = ["This server wants an API key.", "The server does not know this API key."]
        for said, given in zip(wants, ("vlmq-wrong", secret), strict=True):
            page.wait(lambda said=said: page.find("#notice").text == said, said)
            assert page.find("#key-dialog").is_displayed()
            page.find("#key").send_keys(given, Keys.ENTER)
        page.wait(lambda: page.texts("#model option") == ["echo"], "the models")
        assert not page.find("#notice").is_displayed()
        page.ask("who am I")
        assert page.answers() == ["who am I"]


def test_a_server_that_is_away_is_told(browser: Chrome) -> None:
    """And once it is back, the question is asked again by one click."""
    with running_node(models=(ECHO,)) as node:
        page = Page(browser, node)
        page.open()
        page.choose("echo")
        node.end()
        page.ask("are you there")
        page.wait(lambda: bool(page.texts(".failed")), "the failure")
        assert page.texts(".failed") == ["The server cannot be reached. Is it running?"]
        node.start()
        page.find(".answered button").click()
        assert page.answers() == ["are you there"]
