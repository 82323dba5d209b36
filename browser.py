"""Chromium without a window, over the DevTools protocol: what a report looks like to a reader, for tests and pictures.

python browser.py RUN FOLDER        # report-light.png and report-dark.png of a finished run, for the README
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}


class Browser:
    """A page of its own. Commands go through file descriptors 3 and 4, as --remote-debugging-pipe has it.

    Args:
        width, height: of the window, in pixels.
        dark: whether the reader prefers dark pages.
    """

    def __init__(self, width: int = 1400, height: int = 900, dark: bool = False):
        self.folder, self.count, self.rest, self.events = tempfile.mkdtemp(), 0, b"", []
        ours, theirs = os.pipe(), os.pipe()  # (their input's ends, their output's ends)
        os.set_inheritable(ours[0], True), os.set_inheritable(theirs[1], True)
        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"
        command = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(ours[0], theirs[1]))
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *flags.split(), f"--user-data-dir={self.folder}"], **quiet
        )
        os.close(ours[0]), os.close(theirs[1])
        self.into, self.out, self.session = ours[1], theirs[0], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.into), os.close(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, method: str, **given: Any) -> dict:
        """The result of a command; events on the way are kept."""
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        sent = json.dumps({"id": self.count, "method": method, "params": given, **session}).encode() + b"\0"
        while sent:
            sent = sent[os.write(self.into, sent) :]
        while (message := self.read()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def read(self) -> dict:
        while b"\0" not in self.rest:
            more = os.read(self.out, 2**20)
            assert more, "the browser is gone"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, mark: str = "") -> float:
        """Open a report and wait until it is drawn. Returns the seconds it took, by the clock on the wall."""
        started, self.events = time.perf_counter(), []
        self("Page.navigate", url="about:blank")  # another mark alone would not load it again
        self("Page.navigate", url=page.resolve().as_uri() + mark)
        while not self.js("document.documentElement?.dataset.ready"):
            assert time.perf_counter() - started < 60, self.events[-5:]
            time.sleep(0.01)
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return time.perf_counter() - started

    def js(self, code: str) -> Any:
        """What this expression gives in the page."""
        answer = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        given = dict(key=key, windowsVirtualKeyCode=KEYS.get(key, ord(key[0].upper())))
        given |= {"text": key} if len(key) == 1 else {}
        self("Input.dispatchKeyEvent", type="keyDown", **given)
        self("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))


def take_pictures(run: Path, folder: Path, step: int | None = None) -> None:
    """The report at its curves, light, and at a step's groups, dark."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dark, scroll in (
        ("light", False, ""),
        ("dark", True, "document.getElementById('steps').scrollIntoView()"),
    ):
        with Browser(1280, 860, dark) as browser:
            browser.open(run / "report.html", f"#step-{step}" if step else "")
            browser.js(scroll or "0")
            time.sleep(0.3)
            browser.picture(file := folder / f"report-{name}.png")
            Image.open(file).quantize(128).save(file, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
