"""What a person does on the page: a token, a dictionary, a text, a token's features, one feature, steering."""

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.conftest import WORDS
from tests.serve.texts import STEERER, TEXT

pytestmark = pytest.mark.slow


@pytest.fixture
def reading(page: Any) -> Any:
    """The page with a text read by an SAE."""
    page.get_by_label("Token", exact=True).fill(STEERER)
    page.get_by_label("Token", exact=True).press("Tab")
    expect(page.get_by_role("status")).to_have_text("8 dictionaries")
    page.get_by_label("Dictionary", exact=True).select_option("of-texts.sae")
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.get_by_role("button", name="Read").click()
    expect(page.locator("#tokens .token")).to_have_count(1 + len(TEXT.split()))
    return page


def look(page: Any, name: str) -> None:
    """Leaves a picture where SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_without_a_token__it_says_what_is_missing(page: Any) -> None:
    expect(page.get_by_role("alert")).to_contain_text("401: send Authorization")
    expect(page.get_by_label("Dictionary", exact=True).locator("option")).to_have_count(0)


def test_dictionary__is_described(reading: Any) -> None:
    expect(reading.locator("#about")).to_have_text("sae, 24 features, reads resid_post.1, about 4 active a token")


def test_tokens__are_shaded_and_the_first_is_masked(reading: Any) -> None:
    tokens = reading.locator("#tokens .token")
    assert [tokens.nth(n).inner_text() for n in range(1, 5)] == WORDS[10:14]
    assert tokens.nth(0).is_disabled()
    assert reading.locator("#tokens .s5").count() >= 1
    look(reading, "reading")


def test_token__shows_its_features_and_a_feature_where_it_is_active(reading: Any) -> None:
    reading.locator("#tokens .token").nth(3).click()
    rows = reading.locator("#features tbody tr")
    values = [float(rows.nth(n).locator("td").nth(1).inner_text()) for n in range(rows.count())]
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0
    number = rows.first.get_by_role("button").inner_text()
    rows.first.get_by_role("button").click()
    expect(reading.get_by_role("heading", name=f"Feature {number}")).to_be_visible()
    expect(reading.locator("#facts")).to_contain_text("Writes to resid_post.1")
    shaded = reading.locator("#where .token")
    assert "s" in shaded.nth(3).get_attribute("class").split()[-1]
    look(reading, "feature")


def test_steering__shows_both_answers(reading: Any) -> None:
    reading.locator("#tokens .token").nth(3).click()
    reading.locator("#features tbody tr").first.get_by_role("button").click()
    reading.get_by_label("Change", exact=True).select_option("clamp")
    reading.get_by_label("Value", exact=True).fill("80")
    reading.get_by_label("New tokens", exact=True).fill("10")
    reading.get_by_role("button", name="Steer").click()
    expect(reading.get_by_role("button", name="Steer")).to_be_enabled()
    steered, plain = (reading.locator(f"#{which}").inner_text().split() for which in ("steered", "plain"))
    assert 0 < len(plain) <= 10
    assert steered != plain
    look(reading, "steering")


def test_what_comes_is_shown_as_text(reading: Any) -> None:
    """A token, a dictionary's name and a refusal that look like HTML: none of them becomes a part of the page."""
    planted = '<img src="x">'
    answer = {"tokens": [{"id": 5, "text": planted, "masked": False}],
              "dictionaries": [{"features": [{"indices": [3], "values": [1.0]}]}]}  # fmt: skip
    refusal = {"detail": planted, "request_id": "1"}
    told = iter([(200, answer), (422, refusal)])

    def fulfil(route: Any) -> None:
        status, body = next(told)
        route.fulfill(status=status, json=body)

    reading.route("**/v1/features", fulfil)
    reading.get_by_role("button", name="Read").click()
    expect(reading.locator("#tokens .token")).to_have_text([planted])
    reading.locator("#tokens .token").click()
    expect(reading.locator("#features caption")).to_contain_text(planted)
    reading.get_by_role("button", name="Read").click()
    expect(reading.get_by_role("alert")).to_contain_text(planted)
    assert reading.locator("img").count() == 0


def test_too_long_a_text__is_told(reading: Any) -> None:
    reading.get_by_label("Text", exact=True).fill("a " * 3000)
    reading.get_by_role("button", name="Read").click()
    expect(reading.get_by_role("alert")).to_contain_text("413: a text has at most 1024 tokens")
