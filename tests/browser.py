"""Headless Chromium, driven as a person would drive it: its DevTools protocol over a pipe."""

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

KEYS = {" ": 32, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13}
MODIFIERS = {None: 0, "Alt": 1, "Control": 2, "Meta": 4}


def find_chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Chromium with a page. It ends with `close`, and also when this process ends, since its pipe is closed then."""

    def __init__(self, profile):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(  # Chromium reads commands from file descriptor 3 and writes answers to 4
            ["bash", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', find_chromium(), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a process group, to end all of its processes at once
        )
        self.numbers, self.received, self.session = itertools.count(1), b"", {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def close(self):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def send(self, method, **params):
        """Sends a command and returns its answer."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params} | self.session
        self.process.stdin.write(json.dumps(command).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            while b"\0" not in self.received:
                assert select.select([self.process.stdout], [], [], 60)[0], f"Chromium does not answer to {method}"
                part = self.process.stdout.read1(1 << 20)
                assert part, "Chromium has ended"
                self.received += part
            message, self.received = self.received.split(b"\0", 1)
            message = json.loads(message)
            if message.get("id") == number:  # the others are events
                if "error" in message:
                    raise RuntimeError(message["error"])
                return message["result"]

    def open(self, address, width=1200, height=900):
        """Opens a file or a URL, in a window of a size in pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.evaluate("globalThis.left = true")
        self.send("Page.navigate", url=address.as_uri() if isinstance(address, Path) else address)
        self.wait_for("!globalThis.left && document.readyState === 'complete'")

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page; a promise is awaited. An exception is a RuntimeError."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def wait_for(self, expression, seconds=30):
        """Waits until an expression is true, also while the page reloads."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):
                if self.evaluate(expression):
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{expression} is not true after {seconds} s")

    def press(self, key, modifier=None):
        options = {"key": key, "code": key.replace(" ", "Space"), "windowsVirtualKeyCode": KEYS[key]}
        options |= {"modifiers": MODIFIERS[modifier], "text": {" ": " ", "Enter": "\r"}.get(key, "")}
        self.send("Input.dispatchKeyEvent", type="keyDown", **options)
        self.send("Input.dispatchKeyEvent", type="keyUp", **options)

    def drag(self, *points, button="left"):
        """Presses a mouse button at the first point (x, y), moves to the others, and releases it."""
        mask = {"left": 1, "right": 2}[button]
        for index, (x, y) in enumerate(points):
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=mask * (index > 0))
            if index == 0:
                self.send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button=button, clickCount=1)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button=button, clickCount=1)

    def click(self, selector):
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"{element}.getBoundingClientRect().toJSON()")
        self.drag((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2))
