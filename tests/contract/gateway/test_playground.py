"""The page, driven as a person would: in headless Chromium where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from specprefill.core.chunks import Chunks
from specprefill.core.explanation import explain
from specprefill.core.protection import KeptBy
from specprefill.core.selection import chunk_scores, select
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason, Selection, Span
from tests.contract.conftest import API_KEY
from tests.contract.gateway.conftest import ScoringGateway
from tests.policies import SHIPPED

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium and chromedriver: apt-get install chromium chromium-driver",
    ),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # the driver's own sockets
]
PATIENCE_S = 60.0
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,1000",
)  # fmt: skip
TEXT = " ".join(f"Fact {n}: the door of house {n} is painted blue. \U0001f3e0" for n in range(50))
QUESTION = "What colour is the door of house 7?"


@pytest.fixture(scope="module")
def address(scoring_gateway: ScoringGateway) -> Iterator[str]:
    """The gateway on a real port."""
    config = uvicorn.Config(scoring_gateway.app, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        thread.join()


@dataclass(frozen=True)
class Page:
    """The page in a browser."""

    driver: Any
    address: str
    downloads: Path

    def find(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def wait(self, what: str, condition: Any) -> None:
        WebDriverWait(self.driver, PATIENCE_S, 0.05).until(lambda _: condition(), what)

    def open(self) -> None:
        self.driver.get_log("browser")  # forgets another test's
        self.driver.get(f"{self.address}/playground")

    def give_key(self) -> None:
        self.find("key").send_keys(API_KEY, Keys.TAB)
        self.wait("the model's name", lambda: "demo" in self.find("model").text)

    def paste(self, name: str, text: str) -> None:
        self.find(name).click()
        self.driver.execute_cdp_cmd("Input.insertText", {"text": text})

    def select(self, text: str = TEXT, question: str = QUESTION) -> None:
        """Open the page and select, by the keyboard from the question on."""
        self.open()
        self.give_key()
        self.paste("context", text)
        self.paste("question", question)
        self.find("question").send_keys(Keys.ENTER)
        self.wait("a selection", lambda: self.find("selection").is_displayed())

    def kept(self) -> list[bool]:
        """Whether each span of the prompt is shown as kept."""
        script = "return [...document.querySelectorAll('#prompt .span')]"
        return self.driver.execute_script(f"{script}.map(s => s.classList.contains('kept'))")

    def errors(self) -> list[str]:
        """What the console has since `open`, beside hints for developers."""
        log = self.driver.get_log("browser")
        return [f"{each['level']}: {each['message']}" for each in log if each["level"] != "DEBUG"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """One Chromium, with an empty profile."""
    profile, downloads = tmp_path_factory.mktemp("profile"), tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver, downloads
    driver.quit()


@pytest.fixture
def page(browser: tuple[Any, Path], address: str, scoring_gateway: ScoringGateway) -> Page:
    scoring_gateway.speculator.fails = None
    return Page(browser[0], address, browser[1])


def ask(address: str, **fields: Any) -> dict[str, Any]:
    """The server's own selection."""
    body = {"context": TEXT, "question": QUESTION, **fields}
    key = {"authorization": f"Bearer {API_KEY}"}
    answer = httpx.post(f"{address}/v1/selections", json=body, headers=key, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_person_selects_by_the_keyboard_and_reads_why(page: Page) -> None:
    page.select()
    found = ask(page.address, keep=0.2)
    assert f"Keeps {found['kept_tokens']} of" in page.find("sentence").text.replace(",", "")
    assert "because this keep rate was asked for" in page.find("sentence").text
    assert (
        page.driver.execute_script("return document.getElementById('prompt').textContent")
        == (found["text"])
    )
    assert page.kept() == [each["kept"] for each in found["spans"]]

    first = page.driver.find_element(By.CSS_SELECTOR, "#prompt .span[tabindex='0']")
    first.send_keys("")  # focus
    assert "chat template" in page.find("detail").text
    read = set()
    for _ in range(12):
        page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        read.add(page.find("detail").text.split(" ")[0])
    assert read == {"Kept:", "Dropped:"}
    dropped = page.driver.find_element(By.CSS_SELECTOR, "#prompt .dropped")
    assert dropped.aria_role == "deletion"
    assert dropped.get_attribute("title").startswith("Dropped: tokens")
    assert "line-through" in dropped.value_of_css_property("text-decoration")
    assert page.errors() == []


def test_the_slider_selects_what_the_server_would(page: Page) -> None:
    page.select()
    slider = page.find("keep")
    slider.send_keys("")
    seen = set()
    for keys, keep in (
        ([Keys.ARROW_RIGHT] * 5, 0.25), ([Keys.HOME], 0.01), ([Keys.PAGE_UP] * 5, None),
        ([Keys.ARROW_LEFT] * 3, None),
    ):  # fmt: skip
        slider.send_keys(*keys)
        shown = float(slider.get_attribute("value")) / 100
        assert keep is None or shown == keep
        found = ask(page.address, keep=shown)
        assert page.kept() == [each["kept"] for each in found["spans"]], shown
        assert f"{shown:.0%}".replace("%", " %") == page.find("keep-value").text
        seen.add(found["kept_tokens"])
    assert len(seen) > 2
    page.find("auto").send_keys(Keys.ENTER)
    found = ask(page.address, keep="auto")
    assert page.kept() == [each["kept"] for each in found["spans"]]
    assert page.errors() == []


def uneven_chunks(rng: np.random.Generator, tokens: int, size: int) -> Chunks:
    """Chunks such as those that follow a text."""
    sizes = rng.integers(max(1, size // 2), 2 * size + 1, tokens)
    starts = np.append(0, np.cumsum(sizes))
    return Chunks(starts[starts < tokens], tokens)


def made_up_view(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    """A response of the server for made-up scores, and the server's rule for another rate."""
    tokens, size = int(rng.integers(20, 900)), int(rng.choice([1, 7, 32]))
    policy = replace(
        SHIPPED,
        chunk_tokens=size,
        min_kept_tokens=int(rng.integers(1, 200)),
        sink_tokens=int(rng.integers(0, 8)),
        tail_tokens=int(rng.integers(0, 60)),
        block_tokens=int(rng.choice([1, 16])),
    )
    starts = rng.integers(0, tokens, int(rng.integers(0, 4)))
    spans = tuple(Span(int(each), min(tokens, int(each + rng.integers(1, 80)))) for each in starts)
    levels = int(rng.choice([1, 2, 5, 10**6]))  # few levels: ties everywhere; one: flat
    scores = (rng.integers(0, levels, tokens) / levels).astype(np.float32) ** int(
        rng.choice([1, 40])
    )
    certainty = float(rng.choice([0.5, 0.99]))
    chunks = rng.choice([Chunks.of_equal_length(tokens, size), uneven_chunks(rng, tokens, size)])
    bounds = KeepRange(0.05, 0.9)

    def server(keep: float | str) -> Selection:
        plan = (
            Plan(PlanKind.PRUNE, Reason.AUTO, within=bounds)
            if keep == "auto"
            else Plan(PlanKind.PRUNE, Reason.ASKED, keep)
        )
        return select(scores, plan, spans, policy, certainty, chunks)

    found = chunk_scores(scores, spans, policy, certainty, chunks)
    first = Selection(tokens, (Span(0, tokens),), Plan(PlanKind.DENSE, Reason.ASKED), scores=found)
    view = {
        "prompt_tokens": tokens,
        "certainty": certainty,
        "chunk_scores": found.worth,
        "spans": [
            {
                "first_token": each.tokens.start,
                "end_token": each.tokens.stop,
                "chunk": each.chunk,
                "reasons": [reason.value for reason in each.reasons],
            }
            for each in explain(first, {KeptBy.PROTECTED: spans}, policy).spans
        ],
        "rule": {
            "chunk_tokens": size,
            "min_kept_tokens": policy.min_kept_tokens,
            "is_flat": found.is_flat,
            "least_certainty": policy.auto.least_certainty,
            "peak_share": policy.auto.setting,
            "unsure_share": policy.auto.unsure_share,
            "most_chunks": policy.auto.most_chunks,
            "floor": bounds.floor,
            "ceiling": bounds.ceiling,
        },
    }
    return view, server


def test_the_browsers_rule_is_the_servers(page: Page) -> None:
    rng = np.random.default_rng(5)
    cases = []
    for _ in range(150):
        view, server = made_up_view(rng)
        rates = [0.05, 0.1, 0.3, 0.5, 0.9, 1.0, "auto", float(rng.uniform(0.01, 1.0))]
        cases.append((view, rates, [server(each) for each in rates]))
    page.open()
    script = """
        const [cases, done] = arguments;
        import("/playground/selection.js").then(({ selectAgain }) => done(
          cases.map(([view, rates]) => rates.map((keep) => selectAgain(view, keep)))));
    """
    sent = [[view, rates] for view, rates, _ in cases]
    answers = page.driver.execute_async_script(script, sent)
    reasons = set()
    for (view, rates, expected), given in zip(cases, answers, strict=True):
        for keep, server, browser in zip(rates, expected, given, strict=True):
            mask = np.zeros(view["prompt_tokens"], dtype=bool)
            for run in server.runs:
                mask[run.start : run.stop] = True
            kept = [bool(mask[each["first_token"]]) for each in view["spans"]]
            assert browser["kept"] == kept, (keep, server.plan)
            assert (browser["plan"], browser["reason"]) == (server.plan.kind, server.plan.reason)
            assert browser["keptTokens"] == server.kept_tokens
            assert browser["keep"] == server.plan.keep
            reasons.add(browser["reason"])
    assert reasons >= {
        "asked", "auto", "keep_is_one", "short_prompt", "protected_spans", "spread_scores",
        "uncertain", "flat_scores",
    }  # fmt: skip


def test_the_race_streams_both_answers_and_their_times(page: Page) -> None:
    page.select()
    page.find("run").send_keys(Keys.ENTER)
    page.wait("both answers", lambda: len(page.driver.find_elements(By.CLASS_NAME, "wf-row")) == 2)
    page.wait("the end of the race", lambda: page.find("run").is_enabled())
    for lane, words in (("pruned", "was asked for"), ("dense", "pruning was switched off")):
        assert page.find(f"{lane}-answer").text.startswith("<")  # a fake's tokens
        assert words in page.find(f"{lane}-words").text
        assert page.find(f"{lane}-clock").text.split()[1] in ("s", "ms")
    waterfall = page.find("waterfall").text
    for words in ("speculate 31 ms", "prefill 500 ms", "transfer 125 ms", "first decode 63 ms"):
        assert words in waterfall
    assert page.errors() == []


def test_a_trace_and_commands_are_taken_along(page: Page) -> None:
    page.select()
    page.find("run").click()
    page.wait("a trace", lambda: page.find("trace").is_enabled() and page.find("run").is_enabled())
    page.find("trace").click()
    path = page.downloads / "specprefill-trace.json"
    page.wait("the download", path.exists)
    events = json.loads(path.read_text())["traceEvents"]
    stages = [
        each for each in events if each["ph"] == "X" and each["pid"] == 1 and each["tid"] == 1
    ]
    assert [each["name"] for each in stages] == [
        "queue", "speculate", "prefill", "transfer", "first decode",
    ]  # fmt: skip
    assert stages[2]["dur"] == 500_000
    assert stages[2]["ts"] == stages[1]["ts"] + stages[1]["dur"]
    assert {each["args"]["name"] for each in events if each["ph"] == "M"} == {"Pruned", "Dense"}

    page.find("curl").click()
    commands = page.find("curl-text").text
    assert API_KEY not in commands
    environ = {**os.environ, "SPECPREFILL_API_KEY": API_KEY}
    outcome = subprocess.run(
        ["bash", "-c", commands.replace("curl ", "curl -s ")],
        capture_output=True, text=True, check=True, env=environ,
    )  # fmt: skip
    decoder = json.JSONDecoder()
    selection, end = decoder.raw_decode(outcome.stdout)
    answer, _ = decoder.raw_decode(outcome.stdout[end:].strip())
    assert selection["text"] == ask(page.address)["text"]
    assert answer["specprefill"]["kept_tokens"] == selection["kept_tokens"]
    assert page.errors() == []


def test_the_example_asks_about_its_own_text(page: Page) -> None:
    page.open()
    page.give_key()
    page.find("example").click()
    page.wait("the example", lambda: page.find("context").get_attribute("value") != "")
    first = page.find("context").get_attribute("value")
    question = page.find("question").get_attribute("value")
    assert " ".join(question.rstrip("?").split()[-2:]) in first
    page.find("example").click()
    page.wait("another", lambda: page.find("context").get_attribute("value") != first)
    assert page.errors() == []


def test_a_refusal_is_shown_in_the_services_words(page: Page) -> None:
    page.open()
    assert page.find("model").text == "Give your API key to begin."
    assert page.driver.switch_to.active_element == page.find("key")
    page.find("key").send_keys("wrong", Keys.TAB)
    page.wait("a refusal", lambda: page.find("problem").is_displayed())
    assert "API key" in page.find("problem").text
    page.find("key").clear()
    page.give_key()
    page.find("select").click()
    page.wait("a hint", lambda: "Give a text" in page.find("problem").text)
    page.paste("context", "word " * 3000)
    page.find("select").click()
    page.wait("vLLM's", lambda: "maximum context length" in page.find("problem").text)


@pytest.mark.parametrize("width", [360, 800])
def test_a_narrow_screen_shows_everything(page: Page, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.select()
        page.find("run").click()
        page.wait("a race", lambda: page.find("trace").is_enabled())
        page.find("curl").click()
        script = "return document.documentElement.scrollWidth"
        assert page.driver.execute_script(script) <= width
        assert page.errors() == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_has_a_name_and_is_reached_by_the_keyboard(page: Page) -> None:
    page.select()
    for element in page.driver.find_elements(By.CSS_SELECTOR, "button, input, textarea"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    page.find("key").send_keys("")
    reached = set()
    for _ in range(30):
        active = page.driver.switch_to.active_element
        reached.add(active.get_attribute("id") or active.get_attribute("data-index"))
        active.send_keys(Keys.TAB)
    assert reached >= {
        "key", "example", "context", "question", "select", "keep", "auto", "only-kept", "0",
        "cold", "together", "run", "curl",
    }  # fmt: skip


def test_the_page_follows_the_systems_colours(page: Page) -> None:
    def background(scheme: str) -> str:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        return page.driver.find_element(By.TAG_NAME, "body").value_of_css_property(
            "background-color"
        )

    page.open()
    light, dark = background("light"), background("dark")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert light != dark


def test_the_policy_of_the_page_stops_foreign_code(page: Page) -> None:
    page.open()
    script = """
        const script = document.createElement("script");
        script.textContent = "window.foreign = true";
        document.body.append(script);
        return window.foreign === true;
    """
    assert page.driver.execute_script(script) is False
    assert any("Content Security Policy" in each for each in page.errors())
