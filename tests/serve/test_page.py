"""The page in a real browser: a click, an upload, an image that is dropped, the keyboard, a phone, the dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conftest import draft_patch
from dense import box_task, square_task
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.patch.envelope import make_statement, signature_path
from modelpatch.patch.keys import make_key, read_private_key, sign
from modelpatch.train import fit
from serving import TOKEN, Serving, damage, drafts, network, picture

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine"),
]
SHOTS = os.environ.get("MODELPATCH_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["light", "dark", "phone", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, server: Serving) -> Iterator[Any]:
    """The page, which asks only its own server and says nothing wrong on the console."""
    widths = {"phone": 390, "narrow": 320}
    context = browser.new_context(
        color_scheme="dark" if request.param == "dark" else "light",
        viewport={"width": widths.get(request.param, 1280), "height": 900},
    )
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda message: message.type != "error" or wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda sent: sent.url.startswith((server.url, "data:", "blob:")) or wrong.append(sent.url))
    opened.goto(server.url)
    opened.locator("#patches tr").nth(len(drafts())).wait_for()
    yield opened
    if SHOTS:
        opened.screenshot(path=Path(SHOTS) / f"{request.param}.png", full_page=True)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    for part in (".scroll", "#plan"):
        assert opened.evaluate(
            f"(({{scrollWidth, clientWidth}}) => scrollWidth <= clientWidth)(document.querySelector('{part}'))"
        )
    assert [words for words in wrong if "Failed to load resource" not in words] == []  # what the server refused
    context.close()


def test_a_sample_is_answered_by_every_task_and_the_plan_is_drawn(page: Any, server: Serving) -> None:
    page.get_by_label("Ask about a flower").click()
    page.locator(".card li").first.wait_for()
    assert page.locator(".card").count() == len(drafts()) + 1
    page.locator("#plan svg rect").first.wait_for()
    shared = server.service.engine.plan_for(1, ["base", *server.service.cache.sizes]).shared
    assert page.locator("#saved").inner_text() == f"{100 * shared:.0f} % of the work is saved"
    page.get_by_label("Ask birds", exact=True).click()
    page.locator(".card").nth(len(drafts())).wait_for(state="detached")
    assert "birds" not in page.locator(".card h3").all_inner_texts()


def test_one_damaged_patch_leaves_the_others_their_answers(page: Any, server: Serving) -> None:
    server.store.publish("broken", draft_patch(network(), ScaleBias(), seed=9))
    damage(server.store, "broken")
    page.reload()
    page.locator("#patches tr").nth(len(drafts()) + 1).wait_for()
    page.get_by_label("Ask about a flower").click()
    page.locator(".card.refused", has_text="broken").wait_for()
    assert page.locator(".card:not(.refused)").count() == len(drafts()) + 1
    page.locator("#plan svg rect").first.wait_for()


def test_long_names_fit(page: Any, server: Serving) -> None:
    server.store.publish(
        "w" * 64, draft_patch(network(), ScaleBias(), seed=9), tags=["latest", "candidate-of-november"]
    )
    page.reload()
    page.locator("#patches tr").nth(len(drafts()) + 1).wait_for()
    page.get_by_label("Ask about a flower").click()
    page.locator("#plan svg rect").first.wait_for()


def test_a_file_is_chosen_and_a_patch_is_uploaded_and_removed(page: Any, server: Serving, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(picture(pixels=64))
    page.locator("#file").set_input_files(tmp_path / "photo.png")
    page.locator(".card li").first.wait_for()
    path = draft_patch(network(), ScaleBias(), seed=5).save(tmp_path / "cars.safetensors")
    page.get_by_text("Add or remove patches").click()
    page.get_by_label("Name", exact=True).fill("cars")
    page.get_by_label("Patch file").set_input_files(path)
    key = make_key(tmp_path / "alice")
    signature_path(path).write_bytes(
        sign(make_statement(path.read_bytes(), path.name, {}), read_private_key(tmp_path / "alice"))
    )
    page.get_by_label("Signature").set_input_files(signature_path(path))
    page.get_by_label("Token").fill("a wrong token")
    page.get_by_role("button", name="Publish").click()
    page.get_by_text("The token is another").wait_for()
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Publish").click()
    page.get_by_text(f"signed: {key.id[:16]}").wait_for()
    page.locator(".card h3", has_text="cars").wait_for()
    assert server.store.resolve("cars")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Remove cars").click()
    page.locator(".card h3", has_text="cars").wait_for(state="detached")
    assert "cars" not in {version.name for version in server.store.list()}


def test_everything_is_reached_with_the_keyboard_and_bad_images_are_explained(page: Any, tmp_path: Path) -> None:
    page.get_by_label("Ask about a digit").focus()
    page.keyboard.press("Enter")
    page.locator(".card li").first.wait_for()
    page.keyboard.press("Tab")
    reached = {page.evaluate("(document.activeElement.id || document.activeElement.tagName)")}
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(document.activeElement.id || document.activeElement.tagName)"))
    assert {"find", "all", "none", "INPUT", "SUMMARY"} <= reached
    (tmp_path / "broken.png").write_bytes(picture()[:60])
    page.locator("#file").set_input_files(tmp_path / "broken.png")
    page.locator("#notice", has_text="cannot be decoded").wait_for()
    page.get_by_label("Ask about a digit").click()
    page.locator("#notice").wait_for(state="hidden")


@cache
def dense_patches() -> list[Patch]:
    """A patch for masks and one for boxes."""
    return [fit(network(), data, ScaleBias(), epochs=1, batch_size=4) for data in (square_task(4), box_task(4, 16))]


def test_masks_and_boxes_are_laid_over_the_image(page: Any, server: Serving, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    for patch in dense_patches():
        server.store.publish(patch.task.name, patch)
    page.reload()
    page.locator("#patches tr").nth(len(drafts()) + 2).wait_for()
    (tmp_path / "photo.png").write_bytes(picture(pixels=64))
    page.locator("#file").set_input_files(tmp_path / "photo.png")
    mask = page.locator(".card", has=page.locator("h3", has_text="squares"))
    mask.locator("img.mask").wait_for()
    assert mask.locator("img.mask").evaluate("one => one.naturalWidth") == 16
    shown, over = (mask.locator(one).bounding_box() for one in (".seen > img:first-child", "img.mask"))
    assert over == pytest.approx(shown, abs=1.5), "stretched images are covered whole"
    assert 1 <= mask.locator("li").count() <= 3
    boxes = page.locator(".card", has=page.locator("h3", has_text="boxes"))
    boxes.locator("svg").wait_for()
    assert boxes.locator("svg rect").count() == boxes.locator("li").count()
