"""The chat page in a real browser: a Chromium of the system, driven by Playwright; skipped where there is none."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
PHONE = {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
DONE = {"done": True, "done_reason": "stop", "eval_count": 9, "eval_duration": 10**9, "prompt_eval_count": 9}

MARKDOWN = r"""# Title

Text with **bold**, `code`, a [link](https://example.org), [another][ref], $x^2 < y$ and \(a_1\), $5 or $10.
Second line.

- one
- two
  - inner
    ```python
    print("<b>")
    ```

3. three

4. four, loose

> quoted
continued

| a | b |
|:--|--:|
| 1 | `2` |
| 3 | 4 |
| 5 | 6 |
| 7 | 8 |

```js
const a = "`";

b();
```

$$
\sum_i x_i
$$

\[ y = 1 \]

<div onclick="x()">raw <b>HTML</b></div>

* star
* star two

* star three, after a blank line

Setext
------

    indented code

![picture](https://example.org/p.png) line<br>break

[ref]: https://example.org/ref
"""


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
    yield opened(context, server)
    for page in context.pages:
        assert not page.foreign, "nothing is fetched from elsewhere"
        assert not page.broken
    context.close()


def opened(context, server):
    page = context.new_page()
    page.foreign, page.broken = [], []
    page.on("request", lambda r: page.foreign.append(r.url) if not r.url.startswith((server.url, "blob:")) else None)
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.on("console", lambda m: page.broken.append(m.text) if "Content Security Policy" in m.text else None)
    page.goto(server.url)
    ready(page)
    return page


def ready(page):
    page.wait_for_function("() => document.querySelector('#model').value && !document.querySelector('#memory:empty')")


def ask(page, text, tokens="12", model="tiny:latest"):
    page.select_option("#model", model)
    page.locator("#settings").evaluate("node => node.open = true")
    page.fill("#num_predict", tokens)
    page.press("#num_predict", "Escape")
    page.fill("#input", text)
    page.press("#input", "Enter")


def answered(page, count=None):
    page.wait_for_selector("#send", state="visible")
    page.wait_for_function(f"() => document.querySelectorAll('.figures').length >= {count or 1}")
    return page.locator(".turn.assistant").last


def replies(page, *answers, done=True):
    """/api/chat answers with these texts in turn, and the list of the requests' bodies."""
    asked, texts = [], iter(answers)

    def reply(route):
        asked.append(route.request.post_data_json)
        text = next(texts, None)
        if text is not None:
            lines = [{"message": {"role": "assistant", "content": text}, "done": False}]
            lines += [{"message": {"role": "assistant", "content": ""}, **DONE}] if done else []
            route.fulfill(content_type="application/x-ndjson", body="".join(json.dumps(line) + "\n" for line in lines))

    page.route("**/api/chat", reply)
    return asked


def arrived(page, asked, count):
    """Waits until so many requests of `replies` have come."""
    for _ in range(1000):
        if len(asked) >= count:
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"{len(asked)} requests came, not {count}")


def text_of(locator):
    return locator.locator(".text").inner_text()


def test_a_conversation_streams_and_says_what_was_reused(page):
    ask(page, "Hello there, how are you today?")
    last = answered(page)
    assert re.search(r"\d tok/s", last.inner_text()) and "of" in last.inner_text()
    ask(page, "And now?")
    found = re.search(r"(\d+) of (\d+) prompt tokens reused", answered(page, 2).inner_text())
    assert found and int(found[1]) > int(found[2]) / 2
    assert page.locator(".turn").count() == 4
    assert re.search(r"tiny: \d", page.locator("#memory").inner_text())
    page.wait_for_selector("#context", state="visible")
    assert re.search(r"\d+ of [\d,]+ tokens, [\d,]+ left", page.locator("#context").inner_text())


def test_stop_regenerate_and_the_versions_of_an_answer(page):
    asked = replies(page, None, "the second", "the third")
    ask(page, "Go on for ever", "400")
    arrived(page, asked, 1)
    page.keyboard.press("Escape")
    assert "stopped" in page.locator(".turn.assistant .figures").inner_text()
    for count in (2, 3):
        page.get_by_role("button", name="Regenerate").click()
        arrived(page, asked, count)
        answered(page)
    assert [len(body["messages"]) for body in asked] == [1, 1, 1] and page.locator(".turn").count() == 2
    assert "the third" in page.locator("#log").inner_text() and "3 / 3" in page.locator(".branch").inner_text()
    page.get_by_role("button", name="Previous version").click()
    page.get_by_text("the second").wait_for()
    page.reload()
    page.get_by_text("the second").wait_for()


def test_an_edited_question_is_a_branch(page):
    asked = replies(page, "one", "two", "three")
    ask(page, "First?")
    answered(page)
    page.fill("#input", "More?")
    page.press("#input", "Enter")
    answered(page, 2)
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").fill("Changed?")
    page.keyboard.press("Enter")
    page.get_by_text("three").wait_for()
    assert page.locator(".turn.user").all_inner_texts() == ["Changed?"]
    assert asked[-1]["messages"] == [{"role": "user", "content": "Changed?"}]
    page.get_by_role("button", name="Previous version").first.click()
    page.get_by_text("More?").wait_for()
    assert page.locator(".turn.user").all_inner_texts() == ["First?", "More?"]


def test_reasoning_is_folded_away(page):
    ask(page, "Think", model="thinker:latest")
    last = answered(page)
    reasoning = last.locator("details.reasoning")
    assert reasoning.count() == 1 and not reasoning.evaluate("node => node.open")
    page.locator("#think").uncheck()
    ask(page, "Do not think", model="thinker:latest")
    assert answered(page, 2).locator("details.reasoning").count() == 0


def test_conversations_are_kept_found_renamed_and_deleted(page):
    replies(page, "a", "b")
    for text in ("The first one", "The second one"):
        page.get_by_role("button", name="New conversation").click()
        ask(page, text, "4")
        answered(page)
    page.reload()
    ready(page)
    names = page.locator("#talks .name")
    assert names.all_inner_texts() == ["The second one", "The first one"]
    page.get_by_role("button", name="Rename The first one").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["The second one", "Renamed"]
    page.fill("#search", "FIRST one")
    page.wait_for_function("() => document.querySelectorAll('#talks .name').length === 1")
    assert names.inner_text().split("\n") == ["Renamed", "The first one"]
    names.click()
    page.fill("#search", "")
    assert "The first one" in page.locator("#log").inner_text()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Renamed").click()
    page.wait_for_function("() => document.querySelectorAll('#talks .name').length === 1")
    page.reload()
    page.wait_for_selector("#talks .name")
    assert names.all_inner_texts() == ["The second one"]


def test_a_reload_in_an_answer_asks_again_and_a_crash_goes_on_from_what_came(page, server):
    asked = replies(page, None)
    ask(page, "Of mountains")
    page.wait_for_selector("#stop", state="visible")
    arrived(page, asked, 1)
    page.reload()
    page.get_by_text("Of mountains").last.wait_for()
    arrived(page, asked, 2)
    assert len(asked) == 2 and asked[0]["messages"] == asked[1]["messages"]
    page.evaluate("""async () => {
        const store = await import('./page/store.js');
        const turn = (await store.allTurns()).find((turn) => turn.state === 'running');
        await store.putTurn({ ...turn, content: 'They are high ' });
    }""")  # as it is saved while it streams
    context = page.context
    with pytest.raises(Exception, match=r"crash|closed|Timeout"):
        page.goto("chrome://crash", timeout=2000)
    page.close()
    other = context.new_page()
    other.foreign, other.broken = [], []
    asked = replies(other, "and far.")
    other.goto(server.url)
    other.get_by_text("They are high and far.").wait_for()
    assert [m["content"] for m in asked[0]["messages"]] == ["Of mountains", "They are high "]
    assert asked[0]["messages"][-1]["role"] == "assistant"


def test_two_tabs_agree(page, server):
    other = opened(page.context, server)
    replies(page, "said in one")
    ask(page, "Asked in one")
    other.locator("#talks .name").click()
    other.get_by_text("said in one").wait_for()
    replies(other, "said in two")
    ask(other, "Asked in two")
    page.get_by_text("said in two").wait_for()
    assert page.locator(".turn").count() == other.locator(".turn").count() == 4
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Asked in one").click()
    other.get_by_text("Nothing has been said yet.").wait_for()


def test_an_answer_goes_on_while_another_conversation_is_open(page):
    asked = replies(page, None, "quick")
    ask(page, "A slow one")
    page.wait_for_selector("#stop", state="visible")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "A quick one")
    page.get_by_text("quick", exact=True).wait_for()
    assert len(asked) == 2 and page.get_by_role("img", name="Answering").count() == 1
    page.get_by_role("button", name="A slow one", exact=True).click()
    page.wait_for_selector("#stop", state="visible")


def test_a_cut_answer_is_continued(page):
    page.locator("#settings").evaluate("node => node.open = true")
    page.fill("#seed", "3")  # another answer could have no text
    ask(page, "Count", "16")
    last = answered(page)
    assert "cut off by the limit" in last.inner_text()
    before = text_of(last)
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("(old) => document.querySelector('.turn .text').innerText.length > old", arg=len(before))
    assert text_of(page.locator(".turn.assistant")).startswith(before.rstrip()) and page.locator(".turn").count() == 2
    page.wait_for_selector("#send", state="visible")


def test_settings_belong_to_a_conversation_and_are_sent(page):
    asked = replies(page, "a", "b")
    values = {"temperature": "0.5", "top_p": "0.9", "top_k": "7", "min_p": "0.05", "seed": "11", "system": "Be brief."}
    page.locator("#settings").evaluate("node => node.open = true")
    for name, value in values.items():
        page.fill(f"#{name}", value)
    ask(page, "one")
    answered(page)
    numbers = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": 11, "num_predict": 12}
    assert asked[0]["options"] == numbers
    assert asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="New conversation").click()
    page.locator("#settings").evaluate("node => node.open = true")
    page.fill("#seed", "12")
    ask(page, "two")
    answered(page)
    assert asked[1]["options"]["seed"] == 12 and asked[1]["messages"][0]["role"] == "user"
    page.get_by_role("button", name="one", exact=True).click()
    assert {name: page.input_value(f"#{name}") for name in values} == values


def test_a_thinking_budget_reaches_the_model(page):
    page.select_option("#model", "thinker:latest")
    page.locator("#settings").evaluate("node => node.open = true")
    page.wait_for_selector("#thinking_budget", state="visible")
    page.fill("#thinking_budget", "3")
    ask(page, "Think", "40", model="thinker:latest")
    assert re.search(r"\d tok/s", answered(page).inner_text())  # the server took the option
    assert page.locator("p.error:visible").count() == 0


def test_export_and_import_keep_everything(page, tmp_path):
    replies(page, "# Answer\n\n<!-- tiercel:user -->\n\\<!-- tiercel:user -->\n\n```\ncode\n```\n", "other version")
    ask(page, "A question\n\n## with a heading")
    answered(page)
    with page.expect_download() as found:
        page.locator("#more").evaluate("node => node.open = true")
        page.get_by_role("button", name="As Markdown, what is shown").click()
    found.value.save_as(tmp_path / "one.md")
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("other version").wait_for()
    answered(page)
    with page.expect_download() as found:
        page.get_by_role("button", name="Export all").click()
    found.value.save_as(tmp_path / "all.json")
    before = page.evaluate(KEPT)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete A question").click()
    page.get_by_text("Nothing has been said yet.").wait_for()
    page.set_input_files("#import-files", [tmp_path / "all.json", tmp_path / "one.md"])
    page.wait_for_function("() => document.querySelectorAll('#talks .name').length === 2")
    texts = page.evaluate(KEPT)
    for text in before:
        assert text in texts
    assert sorted(texts) == sorted([*before, *(text for text in before if text != "other version")])
    (tmp_path / "bad.json").write_text('{"conversations": []}')
    page.set_input_files("#import-files", tmp_path / "bad.json")
    page.get_by_text("bad.json holds no conversations of this page.").first.wait_for()


KEPT = "async () => (await (await import('./page/store.js')).allTurns()).map((turn) => turn.content)"


def test_text_files_go_with_a_message(page):
    asked = replies(page, "seen")
    files = [("a.py", b"x = '```'\n"), ("b.bin", b"\xff\x00")]
    page.set_input_files("#files", [{"name": n, "mimeType": "text/plain", "buffer": data} for n, data in files])
    page.get_by_text("b.bin is no text in UTF-8.").first.wait_for()
    ask(page, "What is it?")
    answered(page)
    assert asked[0]["messages"] == [{"role": "user", "content": "a.py\n````\nx = '```'\n````\n\nWhat is it?"}]
    assert page.locator(".file").inner_text().startswith("a.py")
    assert page.locator(".turn.user").inner_text() == "What is it?"


def test_a_model_is_pulled_with_progress(page):
    lines = [{"status": "a"}, {"status": "b", "total": 2000, "completed": 500}, {"error": "the hub is not there"}]
    page.route("**/api/pull", lambda route: route.fulfill(body="".join(json.dumps(line) + "\n" for line in lines)))
    page.get_by_role("button", name="Get a model").click()
    page.get_by_label("A short name").fill("smollm2")
    page.keyboard.press("Enter")
    page.get_by_text("It failed: the hub is not there").wait_for()
    assert page.locator("#pull-bar").evaluate("bar => [bar.value, bar.max]") == [500, 2000]
    page.keyboard.press("Escape")
    assert not page.locator("#pull").is_visible()


def test_by_keyboard_alone(page):
    replies(page, "```python\nx\n```\n\n$$x$$\n\n| a |\n|---|\n| b |")
    assert page.evaluate("() => document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".turn.user").inner_text() == "one\ntwo"
    seen = []
    for _ in range(24):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate("() => document.activeElement.id || document.activeElement.className"))
    assert "model" in seen and "new" in seen and "attach" in seen, seen
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, summary, [tabindex="0"]')]
        .filter(node => !(
        node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length || node.ariaLabel))
        .map(node => node.outerHTML)"""
    )
    assert unnamed == []


def test_colours_have_the_contrast_of_wcag_aa():
    css = (Path(__file__).parents[2] / "src/tiercel/serve/page/page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    schemes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(schemes) == 2

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    grounds = ("ground", "raised", "side", "mine")
    pairs = [(text, ground) for text in ("text", "soft", "accent", "bad") for ground in grounds]
    pairs += [(text, "raised") for text in ("keyword", "string", "number", "comment", "function", "type")]
    for scheme in schemes:
        for text, ground in [*pairs, ("on-accent", "accent")]:
            dark, bright = sorted((light(scheme[text]), light(scheme[ground])))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, ground, scheme[text], scheme[ground])


def test_what_a_model_says_is_never_markup(page):
    evil = """<img src=x onerror='window.ran=1'><script>window.ran=2</script><a href='javascript:window.ran=3'>a</a>
[b](javascript:window.ran=4)\n\n- <b onclick='window.ran=5'>bold</b>\n
$\\href{javascript:window.ran=6}{x}$ $\\htmlData{a=b}{y}$"""
    replies(page, evil)
    ask(page, "<img src=x onerror=alert(1)> <b>bold</b>")
    answered(page)
    page.wait_for_selector(".katex")
    assert page.locator("#log img, #log b, #log script, #log a[href^=javascript]").count() == 0
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize("seed", range(3))
def test_markdown_in_pieces_is_markdown_as_a_whole(page, seed):
    rng = random.Random(seed)
    text = MARKDOWN + ("" if seed else "\n" + "".join(f"{i}. item **{i}**\n" for i in range(1, 30)))
    cuts = sorted(rng.sample(range(1, len(text)), 120))
    whole, pieces = page.evaluate(
        """async ([text, cuts]) => {
            const { MarkdownView } = await import('./page/markdown.js');
            const make = () => { const node = document.createElement('div'); document.body.append(node); return node; };
            const whole = make(), pieces = make(), one = new MarkdownView(whole), other = new MarkdownView(pieces);
            one.update(text, true);
            while (!whole.querySelector('.katex')) await new Promise((resolve) => setTimeout(resolve, 20));
            for (const cut of cuts) { other.rested = 0; other.update(text.slice(0, cut), false); }
            other.update(text, true);
            const html = (node) => [...node.children].map((child) => child.outerHTML).filter(Boolean);
            return [html(whole), html(pieces)];
        }""",
        [text, cuts],
    )
    assert pieces == whole
    joined = "".join(whole)
    parts = ["<strong>", "<table", "<li>", 'class="katex"', "hljs-", "$5 or $10", "&lt;div", "<br>", "<h2>"]
    for part in [*parts, 'align="right"', 'start="3"']:
        assert part in joined, part


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_on_a_phone(page):
    replies(page, "A wide one: `" + 50 * "long_name_" + "` and $$" + 40 * "x + " + "x$$")
    ask(page, "Hello from a phone, in one hand, on a train that shakes")
    answered(page)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "nothing to scroll sideways"
    assert not page.locator("#talks").is_visible()
    page.get_by_role("button", name="Show the list of conversations").click()
    assert page.locator("#talks .name").is_visible()
    rename = page.locator("#talks .icon").first.bounding_box()
    assert rename["x"] + rename["width"] <= 390
    page.keyboard.press("Escape")
    assert not page.locator("#talks").is_visible()
