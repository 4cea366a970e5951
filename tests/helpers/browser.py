"""Debian's chromium without a window, controlled over pipes with the DevTools protocol."""

import base64
import io
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

from PIL import Image

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


@contextmanager
def browser(profile):
    """Start a Browser with a new profile in the folder `profile`, and end it afterwards."""
    program = shutil.which("chromium")
    if program is None:
        raise RuntimeError("These tests need chromium, which is not installed. Run apt-get install -y chromium.")
    commands, answers = os.pipe(), os.pipe()
    # Chromium reads commands from file descriptor 3 and answers on 4.
    script = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", program, *OPTIONS, f"--user-data-dir={profile}"],
        pass_fds=(commands[0], answers[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        with open(commands[1], "wb", 0) as write, open(answers[0], "rb") as read:  # noqa: PTH123
            yield Browser(write, read)
            write.write(b'{"id": 0, "method": "Browser.close"}\0')
            process.wait(30)
    finally:
        process.kill()
        process.wait()


class Browser:
    """One tab. `logged` collects what a page logs and throws, `requested` the addresses that it requests."""

    def __init__(self, write, read):
        self.write, self.read = write, read
        self.number, self.session = 0, None
        self.logged, self.requested, self.events = [], [], []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Return the result of a command; raise RuntimeError if the browser refuses it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self):
        data = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("chromium has ended")
            data += byte
        message = json.loads(data)
        params = message.get("params", {})
        method = message.get("method", "")
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.logged.append(params)
        self.events.append(method)
        return message

    def open(self, path, width, height, dark=False, phone=False):
        """Open a file in a window of this size."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = "dark" if dark else "light"
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.logged, self.requested, self.events = [], [], []
        self("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._receive()

    def evaluate(self, expression):
        """Return the value of a JavaScript expression in the page, awaited."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def drag(self, start, end, touch=False):
        """Press the mouse or a finger at `start`, move to `end` (x, y), and release."""
        for kind, (x, y) in zip(("start", "move", "end"), (start, end, end), strict=True):
            if touch:
                points = [] if kind == "end" else [{"x": x, "y": y}]
                self("Input.dispatchTouchEvent", type=f"touch{kind.title()}", touchPoints=points)
            else:
                mouse = {"start": "mousePressed", "move": "mouseMoved", "end": "mouseReleased"}[kind]
                self("Input.dispatchMouseEvent", type=mouse, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"ArrowRight": 39}[key])

    def screenshot(self):
        """Return a PNG of the whole page."""
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pixel(self, x, y):
        """Return the RGB color at a point of the window."""
        shot = Image.open(io.BytesIO(base64.b64decode(self("Page.captureScreenshot")["data"])))
        return shot.convert("RGB").getpixel((round(x), round(y)))

    def pdf(self):
        """Return the page as it is printed."""
        return base64.b64decode(self("Page.printToPDF", printBackground=True)["data"])

    def faults(self, path, width, height, dark=False, phone=False):
        """Open a page and return what is wrong with it, as a list of texts."""
        self.open(path, width, height, dark, phone)
        broken = self.evaluate(
            "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth ? [] : [i.alt], "
            "() => [i.alt]))).then(found => found.flat())"
        )
        wide = self.evaluate("document.documentElement.scrollWidth") > width
        foreign = [url for url in self.requested if url != path.resolve().as_uri() and not url.startswith("data:")]
        return [
            *(f"logged {entry}" for entry in self.logged),
            *(f"picture {alt!r} did not load" for alt in broken),
            *(f"requested {url}" for url in foreign),
            *(["wider than the window"] if wide else []),
        ]
