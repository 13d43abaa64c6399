"""TensorBoard's pages in a browser: what was logged is there to see. Run with ``make test-browser``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from tests.models import classifier, quick, train

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no chromium with its chromedriver"),
]

# Everything in a page, through the shadow roots that its parts hide in.
COLLECT = """
const found = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE) found.push(node.textContent.trim());
  if (node.nodeName === "IMG") found.push(`picture ${node.naturalWidth}x${node.naturalHeight}`);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) if (!["STYLE", "SCRIPT"].includes(child.nodeName)) walk(child);
};
walk(document.body);
return found.filter(Boolean).join("\\n");
"""


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.5)
    return False


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def history() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, history: list[dict[str, Any]]) -> Iterator[str]:
    """TensorBoard, on the log directory of a run with two cycles."""
    directory, dendrites = tmp_path_factory.mktemp("logs"), quick()
    train(classifier(), dendrites, logger=TensorBoardLogger(directory), log_every_n_steps=1)
    history += dendrites.history
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: answers(port)), "TensorBoard did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1500,1300",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


CORRELATIONS = [f"dendrites/correlation_{kind}/{name}" for kind in ("mean", "max") for name in ("net.0", "net.4")]
STATE = [f"dendrites/{name}" for name in ("best_score", "candidates_lr", "count", "cycle", "parameters", "phase")]
PAGES = {
    "scalars": ["val_loss", *STATE, *CORRELATIONS, "dendrites/seconds_epoch", "dendrites/seconds_phase"],
    "custom_scalars": ["score, and the best so far", "correlation, mean of a layer", "phase: 0 base, 1 correlation"],
    "images": ["dendrites/growth", "picture 960x690"],
    "text": ["Best val_loss so far", "Why each phase ended", "correlation phase of cycle 2"],
    "histograms": ["dendrites/correlation/net.0", "dendrites/correlation/net.4"],
    "hparams": ["dendrites/candidates", "hidden", "dendrites/best_score", "dendrites/count", "dendrites/parameters"],
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_was_logged(page: str, address: str, browser: Any, history: list[dict[str, Any]]) -> None:
    expected = list(PAGES[page])
    if page == "text":
        expected += [record["reason"] for record in history]
    if page == "hparams":
        expected.append(f"{history[-1]['best_score']:.5g}")
    browser.get("about:blank")  # TensorBoard does not notice that only the fragment of its address changes
    browser.get(f"{address}/#{page}")

    def missing() -> list[str]:
        shown = browser.execute_script(COLLECT)
        return [text for text in expected if text not in shown]

    complete = wait_for(lambda: not missing())
    pictures = os.environ.get("SCREENSHOTS")
    if pictures:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(pictures) / f"{page}.png"))
    assert complete, missing()
