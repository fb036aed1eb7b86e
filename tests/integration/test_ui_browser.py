"""The local page in a real browser: headless Chromium, one for all tests; skipped where there is none."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from selftrans.ui.serve import listening
from selftrans.ui.server import Page, application
from tests.support import toy
from tests.support.browser import browser, window  # noqa: F401 - a fixture
from tests.support.toy import quicken
from tests.support.ui_runs import begun, ids, line, preview, write_log

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[ui]'")
FIGURES = Path(__file__).parents[2] / "docs" / "figures"
TOKEN = "a-token-of-tests"
#: whether two tiles have been drawn, and are not black
DRAWN = """() => [...document.querySelectorAll(".tiles canvas")].filter((each) => {
    const { data } = each.getContext("2d").getImageData(0, 0, each.width, each.height);
    return data.some((value, i) => i % 4 === 0 && value);
}).length === 2"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run, two with previews of which one is being written, a damaged one, and a comparison."""
    quicken()
    root = tmp_path_factory.mktemp("runs")
    run = toy.copy(toy.finished(), root / "finished")
    for step in (4, 8):
        preview(run, step)
    live = begun(root / "live", {"train.steps": 100})
    write_log(live / "stage2" / "log.jsonl", [line(step, flow=1 / step) for step in range(1, 21)])
    for step in (4, 8, 12):
        preview(live, step)
    (begun(root / "damaged") / "config.json").write_text("{")
    (root / "compared").mkdir()
    shutil.copy(FIGURES / "moving-compare.json", root / "compared" / "compare.json")
    return root


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    """The page of that folder, served as the command does it."""
    listener = listening("127.0.0.1", 0)
    app = application(Page([folder, toy.digits()]), token=TOKEN)
    served = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    served.should_exit = True
    thread.join(10)


@pytest.fixture
def page(browser, address) -> Iterator:  # noqa: F811
    """A new window, with the token."""
    with window(browser, address) as found:
        found.goto(f"{address}/?token={TOKEN}")
        yield found


def until(page, condition: str) -> None:
    """Wait for a condition; Playwright's own way needs eval in the page, which its policy forbids."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def go(page, place: str) -> None:
    page.evaluate("place => { location.hash = place; }", place)


def test_runs_are_listed_live_and_a_damaged_one_costs_a_line(page, folder):
    page.get_by_text("damaged/config.json cannot be read").wait_for()
    live = page.locator(".line", has_text="live")
    assert "20 / 100" in live.inner_text() and "running" in live.inner_text()
    assert page.url.endswith("/") and "token" not in page.evaluate("location.href")
    with (folder / "live" / "stage2" / "log.jsonl").open("a") as log:
        log.write(json.dumps(line(21)) + "\n")
    live.get_by_text("21 / 100").wait_for()
    counts = [int(text.split()[-1]) for text in page.locator(".tabs button").all_inner_texts()]
    assert counts[0] == sum(counts[1:]), "every state can be chosen"
    page.get_by_label("filter").fill("finish")
    assert page.locator(".line:not(.head)").count() == 1


def test_a_run_has_curves_and_a_slider_over_previews(page, folder):
    go(page, f"#/run/{ids(folder)['live']}")
    picture = page.locator(".paper img")
    picture.wait_for()
    assert picture.get_attribute("alt") == "samples at step 12"
    page.get_by_label("step of the preview").fill("0")
    assert picture.get_attribute("alt") == "samples at step 4"
    until(page, "document.querySelector('.paper img').naturalWidth === 40")
    loss = page.locator(".chart", has_text="Loss terms")
    assert loss.locator("path.series").count() == 2
    box = loss.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "flow" in loss.locator(".tip").inner_text()
    loss.get_by_role("button", name="flow").click()
    assert loss.locator("path.series").count() == 1
    assert "None: no update skipped" in page.locator("section", has_text="Interruptions and changes").last.inner_text()


def test_values_that_no_run_has_are_drawn(page):
    """Steps and values of a damaged log: a browser that computes ticks of them for ever would show nothing any more."""
    drawn = page.evaluate("""async () => {
        const { Chart } = await import("/chart.js");
        const all = [[1e17, 1e17], [1e17, 1e17 + 16], [1e-320, 1], [1e299, -1e299], [3, 3]];
        return all.flatMap((y) => [false, true].map((log) => all.map((x) => {
            const chart = new Chart("a name", { log });
            document.querySelector("main").append(chart.node);
            chart.show([{ name: "a", x, y, points: true }]);
            return chart.plot.querySelectorAll("circle").length;
        })));
    }""")
    assert drawn == [[2] * 5] * 10
    said = page.evaluate("""async () => {
        const { duration } = await import("/dom.js");
        return [89.4, 5300, 5400, 172000, 172800, 3 * 86400 - 600].map(duration);
    }""")
    assert said == ["89 s", "88 min", "1 h 30 min", "47 h 47 min", "2 d 0 h", "3 d 0 h"]
    numbers = page.evaluate("""async () => {
        const { short } = await import("/dom.js");
        return [short(5e-5, 6), short(-1.23456789e-5, 6), short(2e6), short(5e-5, 3, true), short(0.0005, 6)];
    }""")
    assert numbers == ["5e-5", "-1.23457e-5", "2e6", "5.00e-5", "0.0005"]


def test_marks_of_a_chart_are_explained(page):
    said = page.evaluate("""async () => {
        const { Chart } = await import("/chart.js");
        return [[], [{ x: 1 }]].map((marks) => {
            const chart = new Chart("a name");
            document.querySelector("main").append(chart.node);
            chart.show([{ name: "a", x: [1, 2], y: [1, 2] }], { marks });
            return chart.legend.textContent;
        });
    }""")
    assert said == ["a", "updates skippeda"]


def test_labels_of_large_and_small_values_are_not_cut_off(page):
    """Fréchet distances of raw pixels have six digits; a label that loses its first one is read as another number."""
    cut = page.evaluate("""async () => {
        const { Chart } = await import("/chart.js");
        return [[577000, 615000], [-615000, -577000], [0.000123, 0.000187], [1.21e-5, 1.87e-5]].map((y) => {
            const chart = new Chart("a name");
            document.querySelector("main").append(chart.node);
            chart.show([{ name: "a", x: [1, 2], y, points: true }]);
            const left = chart.plot.querySelector("svg").getBoundingClientRect().left;
            const labels = [...chart.plot.querySelectorAll("text")];
            return [labels.length > 2, labels.filter((each) => each.getBoundingClientRect().left < left).length];
        });
    }""")
    assert cut == [[True, 0]] * 4


def test_side_by_side_shows_equal_steps(page, folder):
    keys = ids(folder)
    go(page, f"#/side?run={keys['live']}&run={keys['finished']}")
    pictures = page.locator(".sides img")
    pictures.nth(1).wait_for()
    shown = [pictures.nth(i).get_attribute("alt") for i in range(2)]
    assert shown == ["samples of live at step 8", "samples of finished at step 8"], "12 has one run only"
    tops = page.evaluate("""() => {
        document.querySelector(".sides a").textContent = "a name of two lines, ".repeat(4);
        return [...document.querySelectorAll(".sides .paper")].map((each) => each.getBoundingClientRect().top);
    }""")
    assert tops[0] == tops[1], "pictures are at one height"
    page.get_by_label("step", exact=True).fill("0")
    assert [pictures.nth(i).get_attribute("alt")[-6:] for i in range(2)] == ["step 4"] * 2


def test_a_page_that_is_left_while_it_loads_logs_no_error(page):
    for place in ("play", "maps", "side", "play"):
        go(page, f"#/{place}")
    page.get_by_label("pictures", exact=True).wait_for()  # `window` looks for errors


def test_samples_side_by_side_stay_where_the_next_ones_are_refused(browser, address, folder):  # noqa: F811
    context = browser.new_context()  # not a `window`: the refusal is logged as an error
    page = context.new_page()
    page.goto(f"{address}/?token={TOKEN}")
    go(page, f"#/side?run={ids(folder)['finished']}")
    page.get_by_role("button", name="Sampled from checkpoints").click()
    page.get_by_label("pictures", exact=True).fill("2")
    page.get_by_label("time steps", exact=True).fill("2")
    sample = page.get_by_role("button", name="Sample at")
    sample.click()
    until(page, DRAWN)
    page.get_by_label("time steps", exact=True).fill("0")
    sample.click()  # when the job has ended
    page.locator(".note").wait_for()
    page.get_by_role("button", name="Sampled from checkpoints").click()  # draws the pictures anew
    until(page, DRAWN)
    context.close()


def test_the_playground_samples_and_cancels(page, folder):
    go(page, f"#/play?run={ids(folder)['finished']}")
    page.get_by_role("button", name="3", exact=True).click()
    number, slider = (page.get_by_label(name, exact=True).bounding_box() for name in ("guidance (1: none)", "guidance"))
    middle = slider["y"] + slider["height"] / 2
    assert abs(number["y"] + number["height"] / 2 - middle) < 4, "the slider is next to its number"
    page.get_by_label("pictures").fill("2")
    page.get_by_label("time steps").fill("2")
    sample = page.get_by_role("button", name="Sample", exact=True)
    sample.click()
    until(page, DRAWN)
    assert page.locator(".tiles figcaption").all_inner_texts() == ["3", "3"]
    page.get_by_label("time steps").fill("1000")
    page.get_by_label("pictures").fill("64")
    until(page, "!document.querySelector('form button.main').disabled")
    sample.click()
    page.locator("main").get_by_role("button", name="Cancel").dispatch_event("click")  # it is drawn anew often
    page.get_by_text("cancelled").wait_for()


def test_features_of_teacher_and_student(page, folder):
    go(page, f"#/maps?run={ids(folder)['finished']}")
    page.get_by_label("t (0 is data)").fill("0.3, 0.7")
    page.locator("select", has_text="stage1").last.wait_for()
    page.get_by_role("button", name="Draw the maps").click()
    page.get_by_text("What the student sees").wait_for()
    assert page.locator(".maps canvas").count() == 2 * 3 * 2, "two models, three blocks, two t"
    assert page.locator(".at.guided").all_inner_texts() == ["guides ▸ block 2", "guided ▸ block 1"]


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_every_page_fits_the_window(page, folder, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    keys = ids(folder)
    places = {
        "#/": ".runs .line:not(.head)",
        f"#/run/{keys['finished']}": ".facts",
        f"#/side?run={keys['live']}&run={keys['finished']}": ".sides img",
        f"#/play?run={keys['finished']}": ".classes button",
        f"#/maps?run={keys['finished']}": "form select",
        "#/tables": ".results",
    }
    for place, sign in places.items():
        go(page, place)
        page.locator(sign).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.get_by_role("button", name="colours").click()
    assert page.evaluate("document.documentElement.dataset.theme") != scheme


def test_without_its_token_nothing_is_shown(browser, address):  # noqa: F811
    context = browser.new_context()
    window = context.new_page()
    assert window.goto(f"{address}/").status == 401 and window.goto(f"{address}/?token=wrong").status == 401
    assert window.goto(f"{address}/api/runs").status == 401
    context.close()
