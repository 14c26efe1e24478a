"""Headless Chromium, driven as a person would drive it: its DevTools protocol over a pipe."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

KEYS = {" ": ("Space", 32), "ArrowLeft": ("ArrowLeft", 37), "ArrowRight": ("ArrowRight", 39), "Escape": ("Escape", 27)}
KEYS |= {"Enter": ("Enter", 13)}


def find_chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class ScriptError(Exception):
    """An expression failed, or the page was replaced meanwhile."""


class Browser:
    def __init__(self, profile):
        theirs, ours = zip(make_pipe(0), make_pipe(1), strict=True)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(  # Chromium reads commands from file descriptor 3 and writes answers to 4
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}', find_chromium(), *options],
            pass_fds=theirs,
            stderr=subprocess.DEVNULL,
        )
        for file in theirs:
            os.close(file)
        self.commands, self.answers = os.fdopen(ours[0], "wb"), ours[1]
        self.numbers, self.received, self.session = itertools.count(1), b"", {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.resize(1200, 900)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.commands.close()
        os.close(self.answers)

    def send(self, method, **params):
        """Sends a command and returns its answer."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params} | self.session
        self.commands.write(json.dumps(command).encode() + b"\0")
        self.commands.flush()
        while True:
            while b"\0" not in self.received:
                assert select.select([self.answers], [], [], 60)[0], f"Chromium does not answer to {method}"
                part = os.read(self.answers, 1 << 20)
                assert part, "Chromium has ended"
                self.received += part
            message, self.received = self.received.split(b"\0", 1)
            message = json.loads(message)
            if message.get("id") == number:  # the others are events
                if "error" in message:
                    raise ScriptError(message["error"])
                return message["result"]

    def open(self, path):
        self.send("Page.navigate", url=Path(path).as_uri())
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page; a promise is awaited."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise ScriptError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def wait_for(self, expression, seconds=30):
        """Waits until an expression is true, also while the page reloads."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(ScriptError):
                if self.evaluate(expression):
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{expression} is not true after {seconds} s")

    def resize(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def press(self, key, control=False):
        code, number = KEYS[key]
        options = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 2 * control}
        if key in (" ", "Enter"):
            options["text"] = key.replace("Enter", "\r")
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

    def middle(self, selector):
        """Where the middle of an element is on the screen, after scrolling it into view."""
        box = "(e => { e.scrollIntoView({block: 'center'}); return e.getBoundingClientRect(); })"
        x, y = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"({box}(document.querySelector({json.dumps(selector)})))"
        )
        return x, y

    def click(self, selector):
        self.drag(self.middle(selector))

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


def make_pipe(end):
    """A pipe, of which the browser gets `end`, with a number above 4, and we the other one."""
    import fcntl  # not on Windows

    ends = os.pipe()
    theirs = fcntl.fcntl(ends[end], fcntl.F_DUPFD, 10)
    os.close(ends[end])
    return theirs, ends[1 - end]
