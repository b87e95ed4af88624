"""
Uses the page of a Space in a real browser, which reaches nothing outside of this machine: uploads a picture and tells
what the page then says, as JSON; a screenshot on the side.

    python tests/space_browser.py URL PICTURE SCREENSHOT.png WIDTH BROWSER
"""

import json
import sys
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright


def labels(page, name):
    """Class names and percentages of a prediction, as shown, from the top."""
    return [line.split("\n") for line in page.locator(f'#{name} [data-testid$="-confidence-set"]').all_inner_texts()]


def main():
    url, picture, screenshot, width, browser = sys.argv[1:]
    strangers, errors = [], []
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": int(width), "height": 1000})
        page.on("pageerror", lambda error: errors.append(str(error)))

        def route(way):
            if urlsplit(way.request.url).hostname in ("127.0.0.1", None):
                return way.continue_()
            strangers.append(way.request.url)
            return way.abort()

        page.route("**/*", route)
        page.goto(url)
        page.locator(".nose-strip").wait_for()
        before = page.locator("body").inner_text()
        page.locator('input[type="file"]').first.set_input_files(picture)
        page.locator(".nose-verdict").wait_for(timeout=120_000)
        # Bars grow and progress fades.
        page.wait_for_timeout(1500)
        said = {
            "before": before,
            "body": page.locator("body").inner_text(),
            **{name: labels(page, name) for name in ("dense", "compressed")},
            "times": page.locator(".nose-time").all_inner_texts(),
            "verdict": page.locator(".nose-verdict").inner_text(),
            "gone": [
                index
                for index, block in enumerate(page.locator(".nose-block").all())
                if block.locator(".nose-gone").count()
            ],
            "overflow": page.evaluate("document.documentElement.scrollWidth - window.innerWidth"),
            "strangers": strangers,
            "errors": errors,
        }
        page.screenshot(path=screenshot, full_page=True)
        chromium.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
