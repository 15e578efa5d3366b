"""The page in a real browser, without a network: typed, dropped, moved through, opened; on wide and narrow screens."""

import base64
import os
import shutil
import threading
import time

import pytest
import uvicorn
from search_fixtures import GOOD, picture

from clip_jax.search.index import SearchIndex
from clip_jax.search.query import Searcher
from clip_jax.search.serve import ServeOptions, Service, make_app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: apt-get install chromium)"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def address(model, index_dir, texts_dir):
    images, texts = (Searcher(SearchIndex(folder), model) for folder in (index_dir, texts_dir))
    app = make_app(Service(images, texts), ServeOptions(rate=1e6))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, headless=True, args=FLAGS.split()
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, address):
    """The page, whose every request must stay at home and whose console must stay empty."""
    opened = browser.new_page()
    opened.set_default_timeout(20_000)
    opened.set_viewport_size({"width": 1280, "height": 800})
    requests, problems = [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(address)
    yield opened
    screenshots = os.environ.get("CLIP_JAX_SCREENSHOTS")
    if screenshots:
        opened.screenshot(path=f"{screenshots}/{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}.png")
    opened.close()
    assert {url.split("/")[2] for url in requests if not url.startswith("blob:")} == {address.split("/")[2]}
    assert [each for each in problems if "422" not in each] == []  # which is how an upload is refused


def seen(page):
    """Pictures of results that are really there: decoded, with a size on the screen."""
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#results img')]; "
        "return all.length && all.every(img => img.complete) }"
    )
    return page.evaluate(
        "() => [...document.querySelectorAll('#results img')]"
        ".filter(img => img.naturalWidth > 0 && img.getBoundingClientRect().width > 40).map(img => img.alt)"
    )


def searched(page, query):
    page.fill("#text", query)
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text('nearest to')")


def drop(page, content, name="dropped.png"):
    page.evaluate(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            for (const kind of ["dragenter", "dragover", "drop"])
                document.querySelector("main").dispatchEvent(
                    new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [base64.b64encode(content).decode(), name],
    )


def test_a_typed_query_shows_pictures(page, model, index_dir):
    page.keyboard.press("/")
    page.select_option("#top", "12")
    searched(page, "red car at night")
    names = seen(page)
    [hits] = Searcher(SearchIndex(index_dir), model).by_text(["red car at night"], top=12)
    assert names == [hit.item.caption for hit in hits]
    assert page.text_content("#results .score") == f"cosine {hits[0].score:.3f}"
    assert "12 nearest to “red car at night”" in page.text_content("#status")


def test_the_keyboard_is_enough(page):
    searched(page, "anything")
    seen(page)
    focused = "() => [...document.querySelectorAll('#results button')].indexOf(document.activeElement)"
    columns = page.evaluate(
        "() => { const all = [...document.querySelectorAll('#results button')];"
        " return all.filter(b => b.offsetTop === all[0].offsetTop).length }"
    )
    places = []
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
        places.append(page.evaluate(focused))
    assert places == [0, 1, 2, 1, 1 + columns, 1]
    page.keyboard.press("Enter")
    page.wait_for_selector("#viewer[open]")
    page.wait_for_function("() => document.getElementById('viewer-image').naturalWidth > 0")
    assert page.get_attribute("#viewer-image", "alt") == page.text_content("#viewer-title")
    assert page.evaluate("() => document.getElementById('viewer-image').src").endswith("?original=1")
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")
    assert page.evaluate(focused) == 1
    page.keyboard.press("/")
    assert page.evaluate("() => document.activeElement.id") == "text"
    page.keyboard.type("a/b")
    assert page.input_value("#text") == "a/b"


def test_a_dropped_picture_is_searched_with_and_classified(page):
    drop(page, picture(6))
    page.wait_for_selector("#status:has-text('nearest to the picture')")
    assert seen(page)[0] == "picture number 6"
    assert page.text_content("#results .score") == "cosine 1.000"
    assert len(page.query_selector_all("#captions li")) == 5
    assert page.evaluate("() => document.getElementById('preview').naturalWidth") == 40
    page.fill("#labels", "a cat\n\n a dog \n")
    page.click("#classify button[type=submit]")
    page.wait_for_selector("#shares li")
    shares = page.eval_on_selector_all("#shares meter", "all => all.map(meter => meter.value)")
    assert sum(shares) == pytest.approx(1)
    assert shares[0] >= shares[1]
    labels = page.locator("#shares li span:first-child").all_text_contents()
    assert {label.strip() for label in labels} == {"a cat", "a dog"}
    page.click("#results button >> nth=2")
    page.click("#similar")
    page.wait_for_function("() => document.getElementById('preview').alt.endsWith('.png')")
    page.click("#remove")
    assert not page.is_visible("#picture")


def test_a_search_by_text_has_an_address(page, address):
    searched(page, "a b & c")
    assert page.url == f"{address}/?text=a+b+%26+c"
    searched(page, "second")
    drop(page, picture(6))
    page.wait_for_selector("#status:has-text('nearest to the picture')")
    assert page.url == f"{address}/"
    for query in ("second", "a b & c"):
        page.go_back()
        page.wait_for_selector(f"#status:has-text('nearest to “{query}”')")
        assert page.input_value("#text") == query
    page.goto(f"{address}/?text=linked")
    page.wait_for_selector("#status:has-text('nearest to “linked”')")


def test_the_same_picture_can_be_chosen_again(page):
    for _ in range(2):
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": picture(6)})
        page.wait_for_selector("#status:has-text('nearest to the picture')")
        assert page.input_value("#file") == ""
        page.click("#remove")


def test_what_is_no_picture_is_said(page):
    drop(page, b"no picture at all")
    page.wait_for_selector("#status.error:has-text('not an image')")
    page.evaluate("() => window.fetch = () => Promise.reject(new TypeError('down'))")
    page.fill("#text", "a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.error:has-text('The server does not answer')")


def test_captions_are_text_and_never_markup(page):
    page.evaluate(
        """() => window.fetch = async () => new Response(JSON.stringify({ milliseconds: 1, hits: [
            { number: 0, score: 1, key: "k", record: 0, caption: "<img src=x onerror=document.title='run'><b>x</b>" }]
        }))"""
    )
    page.fill("#text", "a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results li")
    assert page.text_content("#results .text").startswith("<img src=x")
    assert page.query_selector("#results b") is None
    assert page.title() == f"Search {GOOD} images"


@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_the_screen_and_everything_has_a_name(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    drop(page, picture(2))
    page.wait_for_selector("#status:has-text('nearest to the picture')")
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, img")].filter((each) => {
            const label = each.labels?.length || each.getAttribute("aria-label") || each.alt || each.textContent.trim();
            return each.checkVisibility() && !label;
        }).map((each) => each.outerHTML)"""
    )
    assert nameless == []
