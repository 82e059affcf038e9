"""A headless Chromium that opens pages of this machine: WebDriver's HTTP protocol to its driver, as far as needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)

# The contrast of every text with what is behind it, by WCAG 2.1's formula; the smallest, and the text.
LEAST_CONTRAST = """
const channel = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const read = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
const behind = node => {
  for (let at = node; at; at = at.parentElement) {
    const colour = read(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
let least = [99, ''];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement;
  if (!text || !node.getClientRects().length) continue;
  const style = getComputedStyle(node);
  const svg = node instanceof SVGElement;
  const one = light(read(svg ? style.fill : style.color)), two = light(behind(node));
  const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  if (ratio < least[0]) least = [ratio, text];
}
return least;
"""


class Browser:
    """A browser. Close it, or use it as a context.

    Args:
        folder: an empty one, for its profile.
    """

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        assert CHROMEDRIVER is not None
        self._process = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        port = next(m[1] for line in self._process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        self._url = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={folder}"], "binary": CHROMIUM}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._url += "/" + self._ask("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("", method="DELETE")
        finally:
            self._process.terminate()
            self._process.wait(30)

    def _ask(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if method == "DELETE" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def open(self, page: Path) -> None:
        """Show a page."""
        self._ask("/url", {"url": page.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; return what it returns."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Click on what is there, as a user does: it must be in sight."""
        found = self._ask("/element", {"using": "css selector", "value": selector})
        self._ask(f"/element/{next(iter(found.values()))}/click")

    def complaints(self) -> list[str]:
        """Return what the console has said since the last time."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]

    def emulate(self, scheme: str, width: int) -> None:
        """Prefer a colour scheme, light or dark, on a screen of a width in pixels."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        for command, params in (
            ("Emulation.setEmulatedMedia", {"features": features}),
            ("Emulation.setDeviceMetricsOverride", screen),
        ):
            self._ask("/goog/cdp/execute", {"cmd": command, "params": params})
