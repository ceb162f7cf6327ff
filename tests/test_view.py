"""The view of trees in a real browser: what it says of a clicked node is what the tables say."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from av1nb import costs, joint, steering, view
from av1nb.sample import load_sample

selenium = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = Path(__file__).parent.parent
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def browser(*arguments):
    "A headless Chromium that reaches this machine only."
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        *arguments,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Shown:
    "A view on the screen."

    def __init__(self, driver):
        self.driver = driver
        self.wait(lambda: self.all(".av1nb-view[data-ready]"))

    def wait(self, condition, seconds=60):
        return WebDriverWait(self.driver, seconds).until(lambda _: condition())

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        [found] = self.all(selector)
        return found

    def click(self, pane, row, col, width):
        "Click a place of a pane, in pixels of the picture that is shown whole."
        canvas = self.all("canvas")[pane]
        scale = canvas.size["width"] / width
        x, y = col * scale - canvas.size["width"] / 2, row * scale - canvas.size["height"] / 2
        ActionChains(self.driver).move_to_element_with_offset(canvas, x, y).click().perform()

    @property
    def node(self):
        "size, row and column of the node whose numbers are shown."
        info = self.one(".info")
        return tuple(int(info.get_attribute(f"data-{key}")) for key in ("size", "row", "col"))

    def numbers(self):
        "type → column → text."
        return {
            row.get_attribute("data-type"): {
                cell.get_attribute("data-column"): cell.text
                for cell in row.find_elements(By.TAG_NAME, "td")
            }
            for row in self.all(".info tbody tr")
        }

    def key(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A page of a small picture at two quantisers, with two networks and costs made by hand, and
    what it was made of.
    """
    [picture] = load_sample(["text"])
    height, width = picture.luma[0].shape
    networks = {
        "joint": joint.JointPredictor.load(),
        "regret": joint.JointPredictor.load(steering.shipped_weights()),
    }
    frames = view.sample_frames(picture, [80, 220])
    nodes = frames[0].coded.query("size <= 64")[["size", "row", "col", "type"]].assign(frame=0)
    rng = np.random.default_rng(42)
    prices = rng.uniform(1e4, 2e4, (len(nodes), 10)).astype(np.float32)
    prices[:, 1], prices[:, 2] = np.nan, np.inf
    settings = dict(width=width, height=height)
    frames[0].log = costs.SearchLog(nodes.reset_index(drop=True), prices, prices / 1e8, settings)
    path = view.write_page(
        view.view_page(frames, networks, "trees of text"),
        tmp_path_factory.mktemp("view") / "page.html",
    )
    return path, frames, networks


@pytest.fixture(scope="module")
def driver():
    if not (BROWSER and DRIVER):
        pytest.skip("no browser: install the Debian packages chromium and chromium-driver")
    with browser() as found:
        yield found


@pytest.fixture()
def shown(driver, told):
    driver.get(told[0].as_uri())
    yield Shown(driver)
    assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def table_row(table, node):
    rows = table[(table[["size", "row", "col"]] == list(node)).all(axis=1)]
    return None if rows.empty else rows.iloc[0]


def require_numbers(shown, frame, network, number, row):
    "The numbers of a node on the screen are those of a row of `joint.tree_table`."
    for name, cells in shown.numbers().items():
        # four decimals of steps of 1/65535
        assert abs(float(cells[f"p{number}"]) - row[f"p_{name}"]) < 6e-5, (network, name)
        assert (cells[f"set{number}"] == "✓") == (name in row["set"].split("|"))
    assert f"{network}: {row['type']}, set {row['set']}" in shown.one(".info .said").text


def test_clicked_nodes_have_the_numbers_of_the_tables(shown, told):
    _, frames, networks = told
    frame = frames[0]
    height, width = frame.luma.shape
    assert shown.one("h1").text == "trees of text" and len(shown.all("canvas")) == 3
    tables = [joint.tree_table(n, frame.luma[None], frame.qindex) for n in networks.values()]
    leaves = tables[0][tables[0]["type"] != "SPLIT"]
    inside = leaves[(leaves["row"] + leaves["size"] <= height)]
    chosen = inside.groupby("size").first().reset_index()
    assert len(chosen) > 1
    for size, row, col in chosen[["size", "row", "col"]].itertuples(index=False):
        shown.click(1, row + size / 2 + 0.5, col + size / 2 + 0.5, width)
        assert shown.node == (size, row, col)
        for number, (name, table) in enumerate(zip(networks, tables)):
            found = table_row(table, shown.node)
            if found is not None:
                require_numbers(shown, frame, name, number, found)


def test_costs_are_those_of_the_log(shown, told):
    frame = told[1][0]
    at = frame.log.nodes.query("size == 16").index[3]
    size, row, col, coded = frame.log.nodes.loc[at, ["size", "row", "col", "type"]]
    Select(shown.one("#level")).select_by_value("16")
    shown.click(0, row + 8.5, col + 8.5, frame.luma.shape[1])
    assert shown.node == (16, row, col)
    numbers = shown.numbers()
    assert [name for name, c in numbers.items() if c["coded"] == "✓"] == [joint.TYPE_NAMES[coded]]
    assert numbers["HORZ"]["cost"] == "not tried" and numbers["VERT"]["cost"] == "given up"
    regrets = costs.regret(np.repeat(frame.log.costs[[at]], 10, axis=0), np.arange(10))
    for number, name in enumerate(joint.TYPE_NAMES):
        if number not in (1, 2):
            assert np.isclose(float(numbers[name]["cost"]), frame.log.costs[at, number], rtol=1e-5)
            assert numbers[name]["regret"] == f"{100 * regrets[number]:.3f} %"
            seconds = float(numbers[name]["time"]) / 1000
            assert abs(seconds - frame.log.seconds[at, number]) < 1e-6


def test_what_is_right_is_counted_as_evaluate_counts(shown, told):
    _, frames, networks = told
    frame = frames[0]
    for level in ("64", "16", "8"):
        Select(shown.one("#level")).select_by_value(level)
        nodes = frame.coded.query(f"size == {level}")
        nodes = nodes[view_inside(nodes, frame)]
        for name, network in networks.items():
            right = (joint.node_answers(network, frame.luma, nodes)[0] == nodes["type"]).sum()
            said = f"{name}: most probable type right at {right} of {len(nodes)} coded nodes"
            assert said in shown.one(".status").text


def view_inside(nodes, frame):
    height, width = frame.luma.shape
    return (nodes["row"] + nodes["size"] <= height) & (nodes["col"] + nodes["size"] <= width)


def test_the_keyboard_reaches_every_node_and_switch(shown, told):
    frame = told[1][0]
    shown.driver.execute_script("document.querySelector('canvas').focus()")
    shown.key("0", Keys.ARROW_RIGHT)
    assert shown.node[1:] == (0, 0)
    shown.key("l")  # superblocks
    shown.key(Keys.ARROW_RIGHT)
    first = shown.node
    shown.key(Keys.ENTER)
    assert shown.node == (first[0] // 2, *first[1:])
    shown.key(Keys.BACKSPACE)
    assert shown.node == first
    assert [b.text for b in shown.all(".path button")] == ["64×64"][
        : len(shown.all(".path button"))
    ]
    shown.key("e", "r")
    assert all(box.is_selected() for box in shown.all("input[type=checkbox]"))
    assert "given up by the search" in shown.one(".legend").text
    assert len(shown.all("canvas:focus")) == 1


def picture_of(shown, pane):
    return shown.driver.execute_script(
        "return document.querySelectorAll('canvas')[arguments[0]].toDataURL()", pane
    )


def settled(shown):
    shown.driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    )


def test_one_zoom_moves_all_pictures_and_switches_change_them(shown):
    settled(shown)
    seen = [[picture_of(shown, pane) for pane in range(3)]]
    for action in (
        lambda: shown.one("button[aria-label='zoom in']").click(),
        lambda: shown.one("input[data-name=errors]").click(),
        lambda: shown.one("input[data-name=regret]").click(),
    ):
        action()
        settled(shown)
        seen.append([picture_of(shown, pane) for pane in range(3)])
    whole, near, errors, regret = seen
    assert all(a != b for a, b in zip(whole, near))
    assert all(a != b for a, b in zip(near, errors))
    assert all(a != b for a, b in zip(errors[1:], regret[1:]))
    shown.one("button[aria-label='show the whole picture']").click()
    Select(shown.one("#frame")).select_by_index(1)
    shown.wait(lambda: shown.one(".av1nb-view").get_attribute("data-ready") == "2")
    # the second quantiser has no costs
    assert not shown.one("input[data-name=regret]").is_enabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(shown, told, scheme):
    "Contrast of every text with the background behind it, as WCAG 2 defines it, is at least 4.5."
    driver = shown.driver
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    shown.click(0, 20, 20, told[1][0].luma.shape[1])
    colours = driver.execute_script("""
        const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
        const texts = [...document.querySelectorAll(
          "h1, h2, p, label, td, th, button, select, summary, figcaption, .legend span")];
        const behind = (e) => {
          for (; e; e = e.parentElement) {
            const c = numbers(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] > 0) return c;
          }
          return [255, 255, 255];
        };
        return texts.map((e) => [numbers(getComputedStyle(e).color), behind(e)]);
        """)

    def luminance(colour):
        c = np.array(colour[:3]) / 255
        c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(c @ (0.2126, 0.7152, 0.0722))

    assert len(colours) > 20
    for text, background in colours:
        low, high = sorted([luminance(text), luminance(background)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, background)
    dark = luminance(colours[0][1]) < 0.1
    assert dark == (scheme == "dark")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_of_the_site_has_the_script_of_today():
    text = (ROOT / "nbs/images/view.html").read_text()
    assert all(view.view_source(name) in text for name in ("view.js", "view.css"))
    assert text.count("<script") == 2 and not re.search(r"(src|href)=|url\(|https?:", text)


@pytest.fixture()
def lab(tmp_path):
    "Address of a JupyterLab that serves a copy of the notebook `explore`."
    shutil.copy(ROOT / "nbs/explore.ipynb", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = (
        "--no-browser",
        "--allow-root",
        f"--ServerApp.port={port}",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={tmp_path}",
        "--IdentityProvider.token=view",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
    )
    places = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | places | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=view"
    finally:
        process.terminate()
        process.wait(60)


def wait_for_server(address, seconds=120):
    until = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(address, timeout=5).status
        except OSError:
            assert time.monotonic() < until, "JupyterLab does not answer"
            time.sleep(0.5)


def test_jupyterlab_shows_the_numbers_and_a_training(lab, driver):
    "The notebook `explore` run in JupyterLab: a node clicked, its table, a training of seconds."
    wait_for_server(lab)
    driver.get(lab)
    shown = Shown.__new__(Shown)
    shown.driver = driver
    ask = driver.execute_script
    ready = "return !!window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    shown.wait(lambda: ask(ready), 300)
    ask("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    shown.wait(lambda: shown.all(".jp-OutputArea .av1nb-view[data-ready]"), 300)
    [picture] = load_sample(["coffee"])
    frame = view.encoded_frame(picture.luma[0], 128, 4)
    table = joint.tree_table(joint.JointPredictor.load(), picture.luma, 128)
    row = table.query("size == 16 and type != 'SPLIT'").iloc[7]
    ask("document.querySelectorAll('canvas')[1].scrollIntoView({block: 'center'})")
    shown.click(1, row["row"] + 8.5, row["col"] + 8.5, frame.luma.shape[1])
    assert shown.node == (16, row["row"], row["col"])
    require_numbers(shown, frame, "shipped", 0, row)
    # what Python knows of the click
    ask("""
        const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex = notebook.widgets.findIndex(
          (cell) => cell.model.sharedModel.getSource().startsWith("shown.chosen()"));
        window.jupyterapp.commands.execute("notebook:run-cell");
        """)
    shown.wait(lambda: any(f"<td>{row['set']}</td>" in part for part in outputs(shown)))
    seconds = "input[aria-label='seconds'], .widget-inline-hbox input[type=number]"
    field = shown.all(seconds)[-1]
    field.send_keys(Keys.CONTROL + "a")
    field.send_keys("3" + Keys.TAB)
    before = int(shown.one(".av1nb-view").get_attribute("data-ready"))
    ask(
        "[...document.querySelectorAll('button')].find(b =>"
        " b.textContent.startsWith('Train')).click()"
    )
    shown.wait(lambda: "steps, loss" in ask("return document.body.innerText"), 300)
    shown.wait(lambda: int(shown.one(".av1nb-view").get_attribute("data-ready")) > before)
    assert [c.text for c in shown.all("figcaption")][-1] == "predicted: trained here"


def outputs(shown):
    return [part.get_attribute("innerHTML") for part in shown.all(".jp-RenderedHTMLCommon")]
