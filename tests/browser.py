"""Debian's chromium, headless, spoken to over pipes in the language of its developer tools."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

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
    """A running Browser with a new profile in the folder `profile`."""
    program = shutil.which("chromium")
    if program is None:
        raise RuntimeError("these tests open the report in chromium, which is missing: apt-get install -y chromium")
    commands, answers = os.pipe(), os.pipe()
    # It reads commands from file descriptor 3 and answers on 4.
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
    """One tab; `said` collects what a page logs and throws, `asked` the addresses it asks for."""

    def __init__(self, write, read):
        self.write, self.read = write, read
        self.number, self.session = 0, None
        self.said, self.asked, self.events = [], [], []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """The result of a command; RuntimeError where the browser refuses it."""
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
                raise RuntimeError("chromium ended")
            data += byte
        message = json.loads(data)
        params = message.get("params", {})
        method = message.get("method", "")
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(params)
        self.events.append(method)
        return message

    def open(self, path, width, height, dark=False, phone=False):
        """Opens a file in a window of this size."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = "dark" if dark else "light"
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.said, self.asked, self.events = [], [], []
        self("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._receive()

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page, awaited."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self):
        """PNG of the whole page."""
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self):
        """The page as it is printed."""
        return base64.b64decode(self("Page.printToPDF", printBackground=True)["data"])

    def faults(self, path, width, height, dark=False, phone=False):
        """What is wrong with a page when it is opened: a list of texts, empty where all is well."""
        self.open(path, width, height, dark, phone)
        broken = self.evaluate(
            "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth ? [] : [i.alt], "
            "() => [i.alt]))).then(found => found.flat())"
        )
        wide = self.evaluate("document.documentElement.scrollWidth") > width
        left = [url for url in self.asked if url != path.resolve().as_uri() and not url.startswith("data:")]
        return [
            *(f"said {entry}" for entry in self.said),
            *(f"picture {alt!r} did not load" for alt in broken),
            *(f"asked for {url}" for url in left),
            *(["wider than the window"] if wide else []),
        ]
