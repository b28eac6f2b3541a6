"""The chat page in a real browser: Debian's Chromium, driven by Playwright (pytest -m slow)."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")]
PHONE = {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server, request):
    context = browser.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.foreign, page.broken = [], []
    page.on("request", lambda r: page.foreign.append(r.url) if not r.url.startswith(server.url) else None)
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    assert not page.foreign, "nothing is fetched from elsewhere"
    assert not page.broken
    context.close()


def ask(page, text, tokens="12", model="tiny:latest"):
    page.select_option("#model", model)
    page.locator("#settings").evaluate("node => node.open = true")
    page.fill("#num_predict", tokens)
    page.press("#num_predict", "Escape")
    page.fill("#input", text)
    page.press("#input", "Enter")


def answered(page):
    page.wait_for_selector("#send", state="visible")
    return page.locator(".turn.assistant").last


def shot(page, name):
    if folder := os.environ.get("TIERCEL_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_a_conversation_streams_and_says_what_was_reused(page):
    ask(page, "Hello there, how are you today?")
    last = answered(page)
    assert re.search(r"\d tok/s", last.inner_text()) and "of" in last.inner_text()
    ask(page, "And now?")
    found = re.search(r"(\d+) of (\d+) prompt tokens reused", answered(page).inner_text())
    assert found and int(found[1]) > int(found[2]) / 2
    assert page.locator(".turn").count() == 4
    shot(page, "desktop")


def test_stop_and_regenerate(page):
    ask(page, "Go on for ever", "400")
    page.wait_for_selector("#stop", state="visible")
    page.keyboard.press("Escape")
    assert "stopped" in answered(page).inner_text() or "tok/s" in answered(page).inner_text()
    page.get_by_role("button", name="Regenerate").click()
    answered(page)
    assert page.locator(".turn").count() == 2


def test_reasoning_is_folded_away(page):
    ask(page, "Think", model="thinker:latest")
    last = answered(page)
    reasoning = last.locator("details.reasoning")
    assert reasoning.count() == 1 and not reasoning.evaluate("node => node.open")
    page.locator("#think").uncheck()
    ask(page, "Do not think", model="thinker:latest")
    assert answered(page).locator("details.reasoning").count() == 0


def test_conversations_are_kept_renamed_and_deleted(page):
    ask(page, "The first one")
    answered(page)
    page.get_by_role("button", name="New conversation").click()
    ask(page, "The second one")
    answered(page)
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    names = page.locator("#talks .name")
    assert names.all_inner_texts() == ["The second one", "The first one"]
    page.get_by_role("button", name="Rename The first one").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["The second one", "Renamed"]
    names.last.click()
    assert "The first one" in page.locator("#log").inner_text()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Renamed").click()
    assert names.all_inner_texts() == ["The second one"]


def test_by_keyboard_alone(page):
    assert page.evaluate("() => document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".turn.user").inner_text() == "one\ntwo"
    seen = []
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate("() => document.activeElement.id || document.activeElement.className"))
    assert "model" in seen and "new" in seen, seen
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea')].filter(node => !(
        node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length || node.ariaLabel))
        .map(node => node.outerHTML)"""
    )
    assert unnamed == []


def test_what_a_model_says_is_never_markup(page):
    page.fill("#input", "<img src=x onerror=alert(1)> <b>bold</b>")
    page.press("#input", "Enter")
    answered(page)
    assert page.locator("#log img, #log b").count() == 0


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_on_a_phone(page):
    ask(page, "Hello from a phone, in one hand, on a train that shakes")
    answered(page)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "nothing to scroll sideways"
    assert not page.locator("#talks").is_visible()
    shot(page, "phone")
    page.get_by_role("button", name="Show the list of conversations").click()
    assert page.locator("#talks .name").is_visible()
    rename = page.locator("#talks .icon").first.bounding_box()
    assert rename["x"] + rename["width"] <= 390
    shot(page, "phone-side")
    page.keyboard.press("Escape")
    assert not page.locator("#talks").is_visible()
