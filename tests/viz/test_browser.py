"""The page and the app as someone in front of a browser meets them: headless Chromium, moved by the keyboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from foveate import nano

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
COMMAND = (sys.executable, "-u", "-m", "foveate", "view")
CHOSEN = ("--method", "vispruner", "--method", "visionzip", "--keep", "16", "--keep", "64", "--repeats", "1")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    opened = context.new_page()
    opened.set_default_timeout(120_000)
    opened.mistakes, opened.hosts = [], set()
    opened.on("pageerror", lambda error: opened.mistakes.append(str(error)))
    opened.on("request", lambda request: opened.hosts.add(urlsplit(request.url).hostname))
    yield opened
    context.close()
    assert opened.mistakes == []


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    subprocess.run(
        [*COMMAND, str(nano.SAMPLE), nano.sample().question, *CHOSEN, "--out", str(out)], check=True, timeout=600
    )
    return out


def _pixel(tab: Any, x: int, y: int) -> list[int]:
    """Return the colour of the first picture at a point, in shares of 16 of its side."""
    return tab.evaluate(
        "([x, y]) => { const c = document.querySelector('canvas'); return [...c.getContext('2d').getImageData("
        "(x + 0.5) * c.width / 16, (y + 0.5) * c.height / 16, 1, 1).data]; }",
        [x, y],
    )


def test_the_slider_and_the_layers_follow_the_keyboard(tab: Any, written: Path) -> None:
    data = json.loads((written / "view.json").read_text())
    small, large = ({*arm["kept"][0]} for arm in data["methods"][0]["arms"])
    tab.goto((written / "view.html").as_uri())
    tab.wait_for_selector("body[data-ready]")
    more = min(large - small)
    row, column = divmod(more, 16)
    dim = _pixel(tab, column, row)
    slider = tab.get_by_role("slider")
    assert slider.get_attribute("aria-valuetext") == "16"
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "64"
    assert sum(_pixel(tab, column, row)[:3]) > sum(dim[:3]), "a token that is kept now is bright"
    card = tab.locator(".card").first
    assert re.search(r"tokens\s*64\s*.75.0 %", card.inner_text())
    assert card.locator(".answer").inner_text().startswith(data["methods"][0]["arms"][1]["answer"])
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    assert tab.get_by_label("saliency").is_checked()
    tab.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        tab.keyboard.press(key)
    told = tab.locator("#status").inner_text()
    assert told.startswith("vispruner, row 2, column 2 ·")
    assert "attention" in told
    assert tab.hosts <= {None, ""}, "nothing but the file and what is in it"


def test_merged_tokens_say_where_they_went(tab: Any, written: Path) -> None:
    arm = json.loads((written / "view.json").read_text())["methods"][1]["arms"][0]
    position = next(i for i, into in enumerate(arm["into"][0]) if into >= 0 and i not in arm["kept"][0])
    row, column = divmod(arm["kept"][0][arm["into"][0][position]], 16)
    tab.goto((written / "view.html").as_uri())
    tab.wait_for_selector("body[data-ready]")
    picture = tab.locator("canvas").nth(1)
    side = picture.bounding_box()["width"] / 16
    picture.hover(position={"x": (position % 16 + 0.5) * side, "y": (position // 16 + 0.5) * side})
    assert f"merged into row {row + 1}, column {column + 1}" in tab.locator("#status").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, written: Path, scheme: str) -> None:
    """Text has the contrast of 4.5 that WCAG asks for, on every background of the page."""
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    tab.goto((written / "view.html").as_uri())
    names = ["page", "card", "ink", "soft", "good", "good-bg", "bad", "bad-bg"]
    colors = tab.evaluate(
        """names => {
            const context = document.createElement('canvas').getContext('2d');
            const style = getComputedStyle(document.documentElement);
            return Object.fromEntries(names.map((name) => {
                context.fillStyle = style.getPropertyValue('--' + name).trim();
                context.fillRect(0, 0, 1, 1);
                return [name, [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)];
            }));
        }""",
        names,
    )
    context.close()

    def luminance(name: str) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (x / 255 for x in colors[name])]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    pairs = [
        ("ink", "page"),
        ("ink", "card"),
        ("soft", "page"),
        ("soft", "card"),
        ("good", "good-bg"),
        ("bad", "bad-bg"),
    ]
    for pair in pairs:
        dark, light = sorted(map(luminance, pair))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


def test_the_app_from_upload_to_answer(tab: Any) -> None:
    pytest.importorskip("gradio", reason="needs gradio")
    running = subprocess.Popen([*COMMAND, "--app", "--port", "0", *CHOSEN], stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        address = next(found[1] for line in running.stderr if (found := re.search(r"open (http\S+)", line)))
        assert urlsplit(address).hostname == "127.0.0.1"
        tab.goto(address)
        compare = tab.get_by_role("button", name="Compare")
        compare.click()
        tab.get_by_text("there is no image yet").wait_for()
        tab.locator("input[type=file]").set_input_files(nano.SAMPLE)
        tab.locator("img[src*=sample]").first.wait_for()
        tab.get_by_label("Question").fill(nano.sample().question)
        tab.get_by_label("Budgets").fill("16 0.5")
        compare.click()
        inside = tab.frame_locator("#result iframe")
        inside.locator("body[data-ready]").wait_for()
        assert inside.locator("h2").all_inner_texts() == ["vispruner", "visionzip"]
        rows = inside.locator("tbody tr").all_inner_texts()
        assert [re.split(r"\s+", row)[:2] for row in rows[1:]] == [
            ["vispruner", "16"], ["vispruner", "0.5"], ["visionzip", "16"], ["visionzip", "0.5"],
        ]  # fmt: skip
        assert nano.sample().answer in rows[0]
        inside.get_by_role("slider").focus()
        tab.keyboard.press("ArrowRight")
        assert inside.get_by_role("slider").get_attribute("aria-valuetext") == "0.5"
        assert tab.hosts <= {"127.0.0.1", None, ""}, "no other host is asked for anything"
    finally:
        running.terminate()
        running.wait(60)
