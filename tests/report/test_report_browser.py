"""The page of a report in a real browser: headless Chromium, opened from a file.

Pictures of the page at every width, light and dark, are left in the folder that the environment
variable ``OPD_JAX_SCREENSHOTS`` names.
"""

import base64
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import rocks_out

from opd_jax.report import build

pytestmark = pytest.mark.ci
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [rocks_out.make_run(folder / "one"), rocks_out.make_answers(folder / "two")]
    out = folder / "report.html"
    rocks = rocks_out.make_out(folder / "out")
    build.report(runs, out, rocks=rocks, sweep=rocks_out.make_sweep(folder / "sweep"))
    return out


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver

    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    needed = "install chromium and chromium-driver"
    assert browser, f"found none of {', '.join(BROWSERS)} on PATH; {needed}"
    assert shutil.which("chromedriver"), f"found no chromedriver on PATH; {needed}"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses a sandbox to root
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Named, so that selenium does not look for a driver on the network.
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    started = webdriver.Chrome(options=options, service=service)
    yield started
    started.quit()


@pytest.fixture
def open_page(driver, page):
    """Open the page afresh at a width and in a colour scheme; afterwards, nothing went wrong."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    def open_at(width=1280, scheme="light", height=900, motion="reduce"):
        # Motion is off unless a test is about it: a page that still scrolls takes no click.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        # On a busy machine ``get`` comes back while the page of before still stands.
        driver.execute_script("window.standing = true")
        driver.get(page.as_uri())
        WebDriverWait(driver, 60, 0.05, [WebDriverException]).until(is_afresh)
        return driver

    driver.get_log("browser")
    driver.get_log("performance")
    yield open_at
    assert [entry["message"] for entry in driver.get_log("browser")] == []
    messages = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
    asked = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {m["params"]["request"]["url"] for m in asked}
    assert all(url.startswith("data:") or url == page.as_uri() for url in urls), urls


def is_afresh(driver) -> bool:
    """Whether the page that was asked for stands whole in the place of the one before."""
    return driver.execute_script("return !window.standing && document.readyState === 'complete'")


def find(driver, selector):
    return driver.find_element("css selector", selector)


def column(driver, number):
    """The texts of a column of the shown rows."""
    script = (
        "return [...document.querySelectorAll('#types tbody tr:not([hidden])')]"
        ".map(r => r.cells[arguments[0]].textContent)"
    )
    return driver.execute_script(script, number)


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def named_key(name):
    from selenium.webdriver.common.keys import Keys

    return getattr(Keys, name)


def luminance(rgb):
    parts = [c / 255 for c in rgb]
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    """WCAG 2 contrast ratio of two sRGB colours."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def variable(driver, name):
    """A colour of the style sheet as the browser resolves it, sRGB 0 to 255."""
    script = """
      const probe = document.body.appendChild(document.createElement("i"));
      probe.style.color = `var(--${arguments[0]})`;
      const color = getComputedStyle(probe).color;
      probe.remove();
      return color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    """
    return driver.execute_script(script, name)


def test_a_heading_sorts_by_click_and_by_key(open_page):
    driver = open_page()
    assert column(driver, 0)[:3] == ["1", "2", "3"]
    count = find(driver, "#types th:nth-child(6) button")
    assert count.text.startswith("count")
    count.click()
    falling = [int(text.replace(",", "")) for text in column(driver, 5)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > falling[-1]
    count.send_keys(named_key("ENTER"))
    assert column(driver, 5) == [f"{value:,}" for value in sorted(falling)]
    assert find(driver, "#types th:nth-child(6)").get_attribute("aria-sort") == "ascending"
    assert find(driver, "#types th:nth-child(1)").get_attribute("aria-sort") is None


def test_search_finds_tokens_kinds_and_ids(open_page):
    driver = open_page()
    search = find(driver, "#types-search")
    search.send_keys(" the")  # a space finds the sign that is shown for it
    assert column(driver, 1) == ["␣the"]
    assert find(driver, "#types-said").text == "1 of 300 types"
    search.clear()
    search.send_keys("</SCRIPT")
    assert column(driver, 1) == ["</script>"]
    search.clear()
    search.send_keys("whitespace mark")  # as a kind is shown, with a space
    assert set(column(driver, 3)) == {"whitespace markup"}
    search.clear()
    search.send_keys("digit")
    assert set(column(driver, 3)) == {"digit"}
    find(driver, "#types-rocks").click()
    assert set(column(driver, 4)) == {"yes"}


def test_tokens_are_text_and_whitespace_is_seen(open_page):
    driver = open_page()
    texts = [t.text for t in driver.find_elements("css selector", "#tokens .t")[:4]]
    assert texts == ["</script><b>&amp;", "␣$x_1$", "⏎", "⏎"]
    assert driver.find_elements("css selector", "#tokens b") == []
    tops = driver.execute_script(
        "return [...document.querySelectorAll('#tokens .t')].slice(0, 5)"
        ".map(t => Math.round(t.getBoundingClientRect().top))"
    )
    assert tops[0] == tops[1] == tops[2] < tops[3] < tops[4]  # a line end breaks its line


def test_hover_shows_the_numbers_of_a_token(open_page, page):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = open_page()
    reader = json.loads((page.parent / "out" / "reader.json").read_text())["answers"][0]["tokens"]
    token = driver.find_elements("css selector", "#tokens .t")[7]
    ActionChains(driver).move_to_element(token).perform()
    said = find(driver, "#inspector").text
    assert f"KL {reader['kl'][7]:#.3g} nats" in said
    assert "-0.5" in said
    assert "60.7%" in said  # exp(-0.5)
    assert f"id {reader['id'][7]}, 8 of 90" in said
    assert "gate weight" in said
    # What was in focus comes back when the pointer goes.
    ActionChains(driver).move_to_element(find(driver, "#reader-title")).perform()
    assert "1 of 90" in find(driver, "#inspector").text


def test_the_keyboard_moves_between_tokens_and_answers(open_page):
    driver = open_page()
    marks = driver.find_elements("css selector", "#tokens .t")
    marks[0].click()
    for key, wanted in (("ARROW_RIGHT", 1), ("ARROW_RIGHT", 2), ("ARROW_LEFT", 1), ("END", 89)):
        press(driver, named_key(key))
        active = driver.switch_to.active_element
        assert active.get_attribute("data-index") == str(wanted)
        assert active.get_attribute("aria-selected") == "true"
        assert f"{wanted + 1} of 90" in find(driver, "#inspector").text
    press(driver, named_key("HOME"), named_key("ARROW_DOWN"))
    assert driver.switch_to.active_element.get_attribute("data-index") == "3"  # the second line
    press(driver, "j")
    assert find(driver, "#answer-about").text.startswith("problem 1:")
    assert driver.switch_to.active_element.get_attribute("data-index") == "0"
    press(driver, "j", "j")
    assert "cut by length" in find(driver, "#answer-about").text  # the last one: no further
    press(driver, "k")
    assert find(driver, "#answer-about").text.startswith("problem 1:")
    assert len(driver.find_elements("css selector", "#tokens [tabindex='0']")) == 1


def test_colour_follows_kl_on_a_log_scale(open_page, page):
    driver = open_page()
    kl = json.loads((page.parent / "out" / "reader.json").read_text())["answers"][0]["tokens"]["kl"]
    shown = driver.execute_script(
        "return [...document.querySelectorAll('#tokens .t')]"
        ".map(t => Number(t.style.getPropertyValue('--k')))"
    )
    wanted = [min(1.0, max(0.0, (math.log10(value) + 2) / 3)) for value in kl]
    assert shown == pytest.approx(wanted, abs=1e-3)
    assert len({round(share, 2) for share in shown}) > 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(open_page, scheme):
    driver = open_page(scheme=scheme)
    paper, wash, heat = (variable(driver, name) for name in ("paper", "wash", "heat"))
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    for name in ("ink", "soft", "blue", "orange", "green", "purple"):
        assert contrast(variable(driver, name), paper) >= 4.5, name
    assert contrast(variable(driver, "soft"), wash) >= 4.5
    assert contrast(variable(driver, "ink"), heat) >= 4.5  # a token with the highest KL
    for name in ("green", "orange"):  # verdicts on answers
        assert contrast(variable(driver, name), wash) >= 4.5, name
    text = driver.execute_script(
        "return getComputedStyle(document.querySelector('.plate svg text')).fill"
    )
    ink = variable(driver, "ink")
    assert [int(part) for part in text.removeprefix("rgb(").rstrip(")").split(",")] == ink


def test_the_switch_turns_the_theme(open_page):
    driver = open_page(scheme="dark")
    button = find(driver, "#theme")
    assert (button.text, button.get_attribute("aria-pressed")) == ("Light", "true")
    dark = variable(driver, "paper")
    button.click()
    assert (button.text, button.get_attribute("aria-pressed")) == ("Dark", "false")
    assert luminance(variable(driver, "paper")) > 0.9 > luminance(dark)


WIDTHS = (360, 768, 1280)
# What is wider than its place: the page itself, boxes that scroll, and texts outside of figures.
OVERFLOW = """
  const name = (e) => `${e.tagName} ${e.getAttribute("class")} ${e.textContent.slice(0, 40)}`;
  const wide = [...document.querySelectorAll("body *")].filter((e) =>
    e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "visible");
  const shown = [...document.querySelectorAll(".fig svg")].filter((e) => e.clientWidth);
  const cut = shown.flatMap((svg) => {
    const room = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter((e) => {
      const box = e.getBoundingClientRect();
      return box.left < room.left - 2 || box.right > room.right + 2;
    });
  });
  return [...wide, ...cut].map(name);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_scrolls_sideways_and_no_figure_is_cropped(open_page, page, width, scheme):
    driver = open_page(width=width, scheme=scheme)
    driver.execute_script("document.querySelectorAll('details').forEach((e) => (e.open = true))")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script(OVERFLOW) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_figure_is_shown_in_the_drawing_that_fits(open_page, width):
    driver = open_page(width=width)
    shown = driver.execute_script("""
      const scale = ({ a, b }) => Math.hypot(a, b); // also of a text that is turned
      return [...document.querySelectorAll(".fig")].map((e) => [
        [...e.querySelectorAll("svg")].filter((s) => s.clientWidth).map((s) => s.className.baseVal),
        e.className,
        Math.min(...[...e.querySelectorAll("svg text")]
          .filter((t) => t.getBoundingClientRect().width)
          .map((t) => parseFloat(getComputedStyle(t).fontSize) * scale(t.getScreenCTM()))),
      ]);
    """)
    assert len(shown) == 14
    wanted = {360: {"middle": "narrow", "broad": "narrow"}, 768: {"middle": "wide"}}
    for kinds, figure, size in shown:
        (kind,) = kinds  # one of the two
        assert kind == wanted.get(width, {}).get(figure.split()[-1], kind), figure
        assert size > 7, (figure, size)  # pixels of its smallest text
    if width == 1280:
        assert {kind for kinds, *_ in shown for kind in kinds} == {"wide"}


def test_the_scale_shows_the_accuracies(open_page, page):
    """Before, after and teacher stand where their numbers say, from 0 to 100% of the track."""
    driver = open_page()
    summary = json.loads((page.parent / "two" / "summary.json").read_text())
    places = driver.execute_script("""
      return [...document.querySelectorAll("#better .scale:last-of-type i")].map((e) => {
        const [band, at] = ["::before", "::after"].map((p) => getComputedStyle(e, p));
        return [at.left, band.left, band.width].map((v) => parseFloat(v) / e.clientWidth);
      });
    """)
    assert len(places) == 3
    for place, side in zip(places, ("before", "after", "teacher"), strict=True):
        told = summary[side]
        low, high = told["accuracy_low"], told["accuracy_high"]
        assert place == pytest.approx([told["accuracy"], low, high - low], abs=0.01)


def test_motion_is_reduced_on_request(open_page):
    behaviour = "return getComputedStyle(document.documentElement).scrollBehavior"
    assert open_page(motion="no-preference").execute_script(behaviour) == "smooth"
    assert open_page(motion="reduce").execute_script(behaviour) == "auto"


def test_headings_labels_and_ids_are_in_order(open_page):
    driver = open_page()
    found = driver.execute_script("""
      const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
      return {
        twice: ids.filter((id, i) => ids.indexOf(id) !== i),
        mains: document.querySelectorAll("main").length,
        levels: [...document.querySelectorAll("h1, h2, h3")].map(h => Number(h.tagName[1])),
        unnamed: [...document.querySelectorAll("svg, [role=region], input, select")].filter(e =>
          !e.getAttribute("aria-label") && !e.closest("label")).length,
        lost: [...document.querySelectorAll("use")].map(u => u.getAttribute("xlink:href").slice(1))
          .filter(id => !document.getElementById(id)),
      };
    """)
    assert found["twice"] == []
    assert found["lost"] == []
    assert found["mains"] == 1
    assert found["unnamed"] == 0
    levels = found["levels"]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_of_the_page_is_kept(open_page, tmp_path, width, scheme):
    driver = open_page(width=width, scheme=scheme)
    height = driver.execute_script("return document.documentElement.scrollHeight")
    driver = open_page(width=width, scheme=scheme, height=height)
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    kept = Path(os.environ.get("OPD_JAX_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    picture = kept / f"report-{width}-{scheme}.png"
    picture.write_bytes(base64.b64decode(shot))
    assert picture.stat().st_size > 50_000
