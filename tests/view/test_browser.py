"""The page in a real browser: it opens, zooms, finds a layer, opens and closes modules, and asks for nothing else."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosparse_fx

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.act, self.narrow = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.act(self.wide(x)))


class Net(nn.Module):
    """Names that are words of JavaScript and of HTML among others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.body = nn.Sequential(*(Block() for _ in range(6)))
        self.add_module("constructor", nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._modules["constructor"](self.body(self.stem(x)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = autosparse_fx.sparsify(Net())
    made = {kind: tmp_path_factory.mktemp("pages") / f"{kind}.html" for kind in ("forward", "joint")}
    for kind, path in made.items():
        autosparse_fx.visualize(model, torch.zeros(2, 4), path, graph=kind, depth=1)
    return made


@pytest.fixture
def page(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """The page of the forward graph; whatever it logs or asks the network for is an error in the end."""
    yield from opened(browser, pages["forward"])


def opened(browser: Any, path: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(f"asked for {request.url}"))
    page.goto(path.as_uri())
    wait_until(page, "globalThis.autosparse !== undefined")
    yield page
    page.close()
    assert said == [f"asked for {path.as_uri()}"]


def wait_until(page: Any, condition: str) -> None:
    """As ``page.wait_for_function``, which the page's own security policy forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


def boxes(page: Any) -> list[str]:
    return page.evaluate("autosparse.cy.nodes('.box').map((n) => n.id())")


def centre(page: Any, identity: str) -> tuple[float, float]:
    frame = page.locator("#view").bounding_box()
    at = page.evaluate("(id) => autosparse.cy.getElementById(id).renderedPosition()", identity)
    return frame["x"] + at["x"], frame["y"] + at["y"]


def test_the_page_opens_with_every_module_of_the_first_level(page: Any) -> None:
    assert page.title() == page.inner_text("h1") == "Net: forward graph"
    shown = set(boxes(page))
    assert {"m:stem", "m:constructor"} <= shown
    assert {f"m:body.{i}" for i in range(6)} <= shown
    assert not any(box.startswith("n:") and "linear" in box for box in shown)
    assert "weights are zero" in page.inner_text("#note")


def test_a_click_opens_a_module_and_a_click_on_its_heading_closes_it(page: Any) -> None:
    before = boxes(page)
    page.mouse.click(*centre(page, "m:body.2"))
    after = boxes(page)
    assert "m:body.2" not in after and {"m:body.2.wide", "m:body.2.act", "m:body.2.narrow"} <= set(after)
    assert len(after) == len(before) + 3  # three layers and the sum, instead of the block
    page.mouse.click(*centre(page, "h:body.2:0"))
    assert boxes(page) == before


def test_buttons_open_and_close_a_level(page: Any) -> None:
    counts = [len(boxes(page))]
    for button in ("#expand", "#expand", "#collapse", "#collapse"):
        page.click(button)
        counts.append(len(boxes(page)))
    assert counts[0] < counts[1] < counts[2] > counts[3] > counts[4]
    assert (counts[1], counts[0]) == (counts[3], counts[4])


def test_wheel_and_buttons_zoom(page: Any) -> None:
    zoom = "autosparse.cy.zoom()"
    first = page.evaluate(zoom)
    page.mouse.move(*centre(page, "m:stem"))
    for _ in range(8):  # it takes some for Cytoscape to know which device it is
        page.mouse.wheel(0, -120)
    wait_until(page, f"{zoom} > {first} * 1.05")
    nearer = page.evaluate(zoom)
    page.click("#out")
    assert page.evaluate(zoom) < nearer
    page.click("#fit")
    assert page.evaluate(zoom) == pytest.approx(first)


def test_search_finds_a_layer_opens_the_way_to_it_and_shows_it(page: Any) -> None:
    assert "m:body.4.narrow" not in boxes(page)
    page.keyboard.press("/")
    page.keyboard.type("body.4.narrow")
    assert page.inner_text("#found li >> nth=0").startswith("body.4.narrow")
    page.keyboard.press("Enter")
    assert "m:body.4.narrow" in boxes(page)
    assert page.evaluate("autosparse.cy.nodes('.hit').map((n) => n.id())") == ["m:body.4.narrow"]
    x, y = centre(page, "m:body.4.narrow")
    view = page.locator("#view").bounding_box()
    assert view["x"] < x < view["x"] + view["width"] and view["y"] < y < view["y"] + view["height"]
    assert "Linear" in page.inner_text("#details") and "body.4.narrow" in page.inner_text("#details")
    page.fill("#search", "no such layer")
    assert not page.is_visible("#found")


def test_pointing_at_a_box_shows_what_is_known_of_it(page: Any) -> None:
    page.click("#expand")
    page.click("#expand")
    mask = page.evaluate("autosparse.cy.nodes('.mask').map((n) => n.id())[0]")
    page.mouse.move(*centre(page, mask))
    wait_until(page, "document.querySelector('#details h2')?.textContent === 'threshold_mask'")
    details = page.inner_text("#details")
    for known in ("stem.weight", "8\u00d74", "float32", "zeros", "threshold", "test_browser.py:"):
        assert known in details, details
    layer = page.evaluate(
        "autosparse.cy.nodes().filter((n) => n.data('label')?.startsWith('linear')).map((n) => n.id())[0]"
    )
    page.mouse.move(*centre(page, layer))
    wait_until(page, "document.querySelector('#details h2')?.textContent === 'linear'")
    assert "FLOPs\n128" in page.inner_text("#details")


def test_parameters_are_drawn_on_request_and_versions_are_switched(page: Any) -> None:
    page.click("#expand")
    page.click("#expand")
    before = len(boxes(page))
    page.check("#folded")
    assert len(boxes(page)) > before + 10
    page.uncheck("#folded")
    page.click("#versions button >> nth=0")
    assert page.get_attribute("#versions button >> nth=0", "aria-pressed") == "true"
    assert page.evaluate("autosparse.state.version") == "before"
    assert len(boxes(page)) == before


def test_the_joint_graph_marks_masks_and_gradients(browser: Any, pages: dict[str, Path]) -> None:
    for page in opened(browser, pages["joint"]):
        page.click("#expand")
        page.click("#expand")
        counts = page.evaluate("['.mask', '.gradient'].map((kind) => autosparse.cy.nodes(kind).length)")
        assert counts == [14, 14]


def test_many_graphs_can_be_chosen_from(browser: Any, tmp_path: Path) -> None:
    from autosparse_fx.view import capture_graphs
    from autosparse_fx.view.html import page as page_of

    versions = capture_graphs(Net(), torch.zeros(2, 4)).graphs[0]
    path = tmp_path / "two.html"
    path.write_text(
        page_of([("graph 1 of 2", versions), ("graph 2 of 2", versions)], version="after"), encoding="utf-8"
    )
    for page in opened(browser, path):
        page.select_option("#graph", "1")
        assert page.inner_text("h1") == "graph 2 of 2"
        assert boxes(page)
