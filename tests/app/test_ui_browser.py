"""The page in headless Chromium with the bundled checkpoint: skipped where playwright or a Chromium is missing.

Screenshots land in out/ui/. Install: pip install playwright, and Debian's ``chromium`` package.
"""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.types import TextDelta

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

SHOTS = Path("out") / "ui"
PATIENCE = 45_000  # milliseconds, on a busy machine
NAMELESS = """() => {
  const seen = (e) => e.offsetParent !== null && e.type !== "hidden";
  const name = (e) => (e.getAttribute("aria-label") || e.title || [...(e.labels || [])].map((l) => l.innerText).join(" ")
    || e.innerText || e.placeholder || [...e.querySelectorAll("img")].map((i) => i.alt).join(" ") || "").trim();
  const controls = "button, input, textarea, select, a[href], [role=button], [role=slider], [role=tab]";
  const bad = [...document.querySelectorAll(controls)].filter((e) => seen(e) && !name(e));
  const mute = [...document.querySelectorAll("img")].filter((e) => seen(e) && !e.hasAttribute("alt"));
  return [...bad, ...mute].map((e) => e.outerHTML.slice(0, 200));
}"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page, served on a free port."""
    with served(NextFlowPipeline.from_pretrained("nano")) as found:
        yield found


@contextmanager
def served(pipeline: NextFlowPipeline) -> Iterator[str]:
    from nextflow_ar.app.ui import build_page, launch_options

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = build_page(pipeline)
    options: dict[str, Any] = {**launch_options(), "quiet": True, "ssr_mode": False}
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, **options)
    yield f"http://127.0.0.1:{port}/"
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """An open page that keeps what its console complains of and which hosts it asks."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda r: self.hosts.add(re.sub(r"^(\w+://[^/]+)/.*", r"\1/", r.url)))
        self.page.goto(address)
        self.page.wait_for_selector("#nf-draw")
        self.address = address

    def tab(self, name: str) -> None:
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():  # a narrow page keeps some tabs behind a button
            self.page.locator(".overflow-menu > button").click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()

    def draw(self, words: str, seed: int) -> None:
        self.page.get_by_label("Seed", exact=True).first.fill(str(seed))
        fresh = self.page.get_by_label("A new seed each time").first
        if fresh.is_checked():
            fresh.uncheck()
        self.page.fill("#nf-prompt textarea", words)
        self.page.focus("#nf-prompt textarea")
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(
            f"document.querySelector('#nf-draw-status').innerText.includes('seed {seed}.')"
        )

    def shot(self, name: str, **options: Any) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(900)
        self.page.screenshot(path=SHOTS / f"{name}.png", **options)

    def end(self) -> None:
        """No console error, and nothing was asked of another host."""
        assert self.complaints == []
        assert self.hosts <= {self.address, self.address.replace("http", "ws", 1)} | {
            h for h in self.hosts if ":" in h[:5]
        }
        assert not [h for h in self.hosts if h.startswith("http") and h != self.address]
        self.page.close()


def test_draw_by_keyboard(browser: Any, address: str) -> None:
    visit = Visit(browser, address, viewport={"width": 1280, "height": 860})
    page = visit.page
    visit.draw("a cat left of a rocket", 4)
    assert page.locator("#nf-draw-stage button.nf-step").count() == 8
    final = page.locator("#nf-draw-stage .nf-big").get_attribute("src")
    page.locator("#nf-draw-stage button.nf-step").nth(7).focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    big = page.locator("#nf-draw-stage .nf-big")
    assert big.get_attribute("src") != final
    assert big.get_attribute("alt") == "Picture 1: a cat left of a rocket, after scale 3 of 8"
    page.keyboard.press("End")
    page.locator("#nf-draw-stage button.nf-step").nth(7).click()
    assert (
        big.get_attribute("src") == final and big.get_attribute("alt") == "Picture 1: a cat left of a rocket"
    )
    with page.expect_download() as download:
        page.click("#nf-draw-stage .nf-save")
    assert download.value.suggested_filename == "nextflow-a-cat-left-of-a-rocket-1.png"
    assert page.locator("#nf-draw-status [role=status][aria-live=polite]").count() == 1
    visit.draw("a cat left of a rocket", 6)
    page.wait_for_selector(".nf-gallery img >> nth=1")
    page.set_viewport_size({"width": 1200, "height": 1000})
    page.locator("#nf-draw-stage button.nf-step").nth(7).click()
    visit.shot("draw")
    visit.end()


def test_an_error_is_one_line(browser: Any, address: str, tmp_path: Path) -> None:
    visit = Visit(browser, address)
    visit.page.click("#nf-draw")
    visit.page.wait_for_selector("#nf-draw-status .nf-failed")
    assert visit.page.inner_text("#nf-draw-status").startswith("the prompt is empty")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    visit.tab("Describe")
    visit.page.locator("input[type=file]:not([webkitdirectory])").last.set_input_files(broken)
    visit.page.wait_for_timeout(1500)
    visit.page.click("#nf-describe")
    visit.page.wait_for_selector("#nf-describe-status .nf-failed")
    told = visit.page.inner_text("#nf-describe-status")
    assert "not a picture" in told and "/" not in told, told
    visit.complaints = [line for line in visit.complaints if "Failed to load resource" not in line]
    visit.end()


def test_edit_with_a_mask(browser: Any, address: str) -> None:
    visit = Visit(browser, address, viewport={"width": 1200, "height": 1000})
    page = visit.page
    visit.draw("a cat left of a rocket", 6)
    page.wait_for_selector(".nf-gallery img")
    page.get_by_role("button", name="Edit it").click()
    canvas = page.locator("#nf-editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(2500)  # the editor lays its picture out
    box = canvas.bounding_box()
    side = 0.86 * box["height"]
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    page.mouse.move(left + side * 0.05, top + side * 0.05)
    page.mouse.down()
    for line in range(14):  # the left half, in zigzag
        page.mouse.move(left + side * (0.05, 0.44)[line % 2], top + side * (0.05 + 0.069 * line))
        page.mouse.move(left + side * (0.44, 0.05)[line % 2], top + side * (0.05 + 0.069 * line))
    page.mouse.up()
    page.wait_for_timeout(800)
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#nf-editor"))
    panel.get_by_role("button", name="More settings").click()
    panel.get_by_label("Seed", exact=True).fill("1")
    panel.get_by_label("A new seed each time").uncheck()
    panel.get_by_role("button", name="More settings").click()
    page.fill("#nf-instruction textarea", "a dog and a rocket on a white background")
    page.evaluate("window.scrollTo(0, 0)")
    page.click("#nf-edit")
    page.wait_for_selector("#nf-edit-stage .nf-compare input")
    assert "redrawn" in page.inner_text("#nf-edit-status")
    compare = page.locator("#nf-edit-stage .nf-compare")
    slider = compare.locator("input")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert compare.evaluate("e => e.style.getPropertyValue('--at')") == "49%"
    sources = [compare.locator(f".nf-{name}").get_attribute("src") for name in ("before", "big")]
    assert sources[0] != sources[1]
    left_half = "e => { e.value = 24; e.dispatchEvent(new Event('input', { bubbles: true })); e.blur(); }"
    slider.evaluate(left_half)
    visit.shot("edit")
    visit.end()


def test_chat(browser: Any, address: str) -> None:
    visit = Visit(browser, address, viewport={"width": 1280, "height": 860})
    page = visit.page
    visit.tab("Chat")
    page.fill("#nf-chat-box textarea", "a red circle on a blue background")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#nf-chat-status').innerText.includes('Done')")
    assert page.locator("#nf-chat .bot").count() >= 1
    visit.shot("chat")
    page.get_by_role("button", name="Take back the last turn").click()
    page.wait_for_function("document.querySelectorAll('#nf-chat .bot').length === 0")
    visit.end()


def test_every_control_has_a_name(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    for name in ("Draw", "Edit", "Chat", "Story", "Animate", "Describe"):
        visit.tab(name)
        for more in visit.page.locator("button:has-text('More settings'):visible").all():
            more.click()
        visit.page.wait_for_timeout(400)
        assert visit.page.evaluate(NAMELESS) == [], name
    visit.end()


class Endless(NextFlowPipeline):
    """Draws for a minute, unless somebody stops it."""

    began, stopped = threading.Event(), threading.Event()

    def generate(self, *_: Any, on_event: Any = None, **__: Any) -> Any:
        try:
            for _ in range(1200):
                on_event(TextDelta(0, "a"))
                self.began.set()
                time.sleep(0.05)
        except BaseException:
            self.stopped.set()
            raise


def test_stop_stops_the_work(browser: Any, bundle: Bundle) -> None:
    with served(Endless(bundle)) as address:
        visit = Visit(browser, address)
        visit.page.fill("#nf-prompt textarea", "a cat")
        visit.page.click("#nf-draw")
        assert Endless.began.wait(20)
        visit.page.click("#nf-draw-stop")
        visit.page.wait_for_function("document.querySelector('#nf-draw-status').innerText === 'Stopped.'")
        assert Endless.stopped.wait(5)
        visit.end()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser: Any, address: str, scheme: str) -> None:
    options = {
        "viewport": {"width": 390, "height": 844},
        "is_mobile": True,
        "has_touch": True,
        "color_scheme": scheme,
    }
    visit = Visit(browser, address, **options)
    page = visit.page
    visit.draw("three frogs on an orange background", 2)
    stage = page.locator("#nf-draw-stage .nf-figure").bounding_box()
    settings = page.get_by_label("Seed", exact=True).first.bounding_box()
    assert stage["width"] <= 390 and stage["y"] < settings["y"]  # the picture comes before the settings
    for name in ("Draw", "Edit", "Chat", "Story", "Animate", "Describe"):
        visit.tab(name)
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    visit.tab("Draw")
    page.locator("#nf-draw").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('#nf-draw').scrollIntoView()")
    visit.shot(f"phone-{scheme}")
    visit.end()
