"""Drives the gateway's chat page in Chromium. Fails at the first surprise.

Usage: drive.py SCENARIO BASE_URL [KEY | PICTURES], where SCENARIO is a function below that has no
leading underscore.
"""

import json
import shutil
import sys
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

WITHIN = 60
# Reads bytes one by one where the network would bring many at once.
SLICE = """
const whole = window.fetch;
window.fetch = async (...request) => {
  const reply = await whole(...request);
  const slice = new TransformStream({
    transform: (bytes, out) => bytes.forEach((byte) => out.enqueue(Uint8Array.of(byte))),
  });
  const { status, statusText, headers } = reply;
  return new Response(reply.body.pipeThrough(slice), { status, statusText, headers });
};
"""


class _Page:
    def __init__(self, base: str, size=(1200, 860)) -> None:
        self.base = base
        options = webdriver.ChromeOptions()
        options.binary_location = _program("chromium")
        # As root, and in containers with little shared memory. No host but this one is found.
        for flag in [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--no-proxy-server",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = Service(_program("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.resize(*size)
        self.driver.get(base)

    def __enter__(self) -> "_Page":
        return self

    def __exit__(self, failed, *_) -> None:
        if failed:
            print(self.driver.find_element(By.TAG_NAME, "body").text, file=sys.stderr)
            print(self.driver.get_log("browser"), file=sys.stderr)
        self.driver.quit()

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def ready(self) -> "_Page":
        self.until("a model", lambda: self.value("#model"))
        return self

    def one(self, selector: str):
        found = self.all(selector)
        assert len(found) == 1, f"{len(found)} of {selector}"
        return found[0]

    def texts(self, selector: str) -> list[str]:
        # As the page's nodes hold it; what the driver reads is trimmed.
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return self.driver.execute_script(script, selector)

    def value(self, selector: str) -> str:
        return self.one(selector).get_property("value")

    def until(self, what: str, condition, within: float = WITHIN):
        wait = WebDriverWait(self.driver, within, poll_frequency=0.05)
        return wait.until(lambda _: condition(), f"never: {what}")

    def set(self, **settings) -> None:
        self.one("#settings summary").click()
        for field, value in settings.items():
            element = self.one(f"#{field.replace('_', '-')}")
            element.clear()
            element.send_keys(value)
        self.one("#settings summary").click()

    def send(self, text: str) -> None:
        # Shift and Enter makes a line, Enter alone sends.
        lines = text.split("\n")
        for line in lines[:-1]:
            self.one("#input").send_keys(line, Keys.SHIFT + Keys.ENTER)
        self.one("#input").send_keys(lines[-1], Keys.ENTER)

    def answered(self, n: int) -> str:
        """The `n`th answer, when it is there to its end."""
        self.until(f"answer {n} begins", lambda: len(self.all(".answer")) == n)
        self.until(f"answer {n} ends", lambda: not self.all(".answer[aria-busy=true]"))
        return self.texts(".answer > .text")[n - 1]

    def number(self, selector: str) -> float:
        """The last number of this kind that is shown."""
        text = self.texts(selector)[-1]
        return float(next(word for word in text.split() if word[0].isdigit()).replace(",", ""))

    def cluster(self) -> dict:
        return _open(urllib.request.Request(self.base + "/cluster"))

    def running(self) -> int:
        return sum(worker["status"]["running"] for worker in self.cluster()["workers"])

    def clean(self, allowed: str = "") -> None:
        """No complaint of the browser but those that hold `allowed`, and no word to other hosts."""
        complaints = [entry for entry in self.driver.get_log("browser") if entry["level"] != "DEBUG"]
        bad = [entry for entry in complaints if not allowed or allowed not in entry["message"]]
        assert not bad, bad
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert self.base + "/v1/chat/completions" in asked, asked
        strange = [url for url in asked if not url.startswith((self.base + "/", "data:"))]
        assert not strange, strange


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is missing: install Debian's chromium and chromium-driver"
    return path


def _open(request: urllib.request.Request) -> dict:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=WITHIN) as reply:
        return json.load(reply)


def _whole(base: str, messages: list[dict]) -> str:
    """The answer to a conversation, asked for without a page and without a stream."""
    body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": 40}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(base + "/v1/chat/completions", body, headers)
    return _open(request)["choices"][0]["message"]["content"]


def answers(base: str) -> None:
    """Asks, reads the numbers, compares the picture with /cluster, goes on asking."""
    with _Page(base) as page:
        page.ready()
        page.set(temperature="0", max_tokens="80")
        page.send("What is the capital of France?")
        assert "Paris" in page.answered(1), page.texts(".answer")
        assert page.number(".ttft") > 0 and page.number(".rate") > 0 and page.number(".tokens") > 1
        page.until("where it was computed", lambda: page.all(".where"))

        view = page.cluster()
        placed = view["recent"][0]
        roles = {worker["id"]: worker["role"] for worker in view["workers"]}
        assert sorted(roles.values()) == ["decode", "prefill"], roles
        cards = {card.get_attribute("data-id"): card for card in page.all(".worker")}
        assert cards.keys() == roles.keys(), (cards.keys(), roles)
        assert roles[placed["prefill"]] == "prefill" and roles[placed["decode"]] == "decode", placed
        did = {id: card.get_attribute("data-did") for id, card in cards.items()}
        assert did == {placed["prefill"]: "prefill", placed["decode"]: "decode"}, (did, placed)
        where = page.texts(".where")[0]
        assert f"{placed['handed_off_tokens']} tokens" in where and "shared memory" in where, where
        for worker in view["workers"]:
            blocks = worker["status"]["kv_blocks"]
            assert sum(blocks.values()) == 2 * blocks["total"] > 0, blocks

        # The second turn knows the first, whose blocks are cached.
        page.send("What language is spoken\nthere?")
        assert "French" in page.answered(2), page.texts(".answer")
        assert page.texts(".user .text")[1] == "What language is spoken\nthere?"
        second = page.until(
            "the second is placed",
            lambda: next((r for r in [page.cluster()["recent"][0]] if r["id"] != placed["id"]), None),
        )
        assert second["cached_tokens"] > 0, second
        page.until("both are placed", lambda: len(page.all(".where")) == 2)
        assert f"{second['cached_tokens']} of {second['prompt_tokens']}" in page.texts(".where")[1]
        # The picture shows the answer that is chosen.
        first, last = page.all(".where")
        assert last.get_attribute("aria-pressed") == "true"
        first.click()
        assert first.get_attribute("aria-pressed") == "true"
        assert last.get_attribute("aria-pressed") == "false"

        page.one("#new").click()
        assert not page.all(".answer") and page.one("#empty").is_displayed()
        page.clean()


def text_stays_text(base: str) -> None:
    """Text that looks like markup is shown as it is, in whatever pieces it arrives."""
    with _Page(base) as page:
        page.ready()
        page.driver.execute_script(SLICE)
        page.set(temperature="0", max_tokens="40", system="You are an echo.")
        messages = [{"role": "system", "content": "You are an echo."}]
        users = ["<p>é</p>", "<b>ü 😀</b>", "<img src=x onerror=alert(1)> 你好 <script>alert(2)</script>"]
        for n, user in enumerate(users, 1):
            # The driver types no emoji.
            page.driver.execute_script(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
                page.one("#input"),
                user,
            )
            page.one("#send").click()
            shown = page.answered(n)
            messages.append({"role": "user", "content": user})
            assert shown == _whole(base, messages), messages
            messages.append({"role": "assistant", "content": shown})
        assert page.texts(".user .text") == users
        assert not page.all(".text *"), page.texts(".text")
        written = "".join(page.texts(".answer > .text"))
        assert "<p>" in written and not written.isascii(), f"this tests nothing: {written}"
        page.clean()


def stops(base: str) -> None:
    """Stop ends the answer here and on the workers, and the chat goes on."""
    with _Page(base) as page:
        page.ready()
        page.set(temperature="0")
        for how in ["button", "escape", "new"]:
            page.one("#new").click()
            page.send("Write a very long story about the sea, with many chapters.")
            page.until("it runs", lambda: page.running() == 1)
            page.until("text comes", lambda: len(page.texts(".answer > .text")[0]) > 20)
            assert page.one("#stop").is_displayed() and not page.one("#send").is_displayed()
            match how:
                case "button":
                    page.one("#stop").click()
                case "escape":
                    page.one("#input").send_keys(Keys.ESCAPE)
                case "new":
                    page.one("#new").click()
            # Workers report four times a second.
            page.until("nothing runs", lambda: page.running() == 0, within=3)
            assert page.one("#send").is_displayed() and not page.one("#stop").is_displayed()
            if how != "new":
                assert "stopped" in page.texts(".facts")[0]
        page.set(max_tokens="8")
        page.send("And now?")
        assert page.answered(1)
        page.clean()


def errors(base: str) -> None:
    """What the server refuses is said in its words, and the conversation goes on without it."""
    with _Page(base) as page:
        page.ready()
        page.set(temperature="9", max_tokens="8")
        page.send("Hello")
        page.answered(1)
        assert "temperature" in page.texts(".error")[0], page.texts(".error")
        page.set(temperature="0")
        page.one(".error button").click()
        assert page.answered(1) and not page.all(".error")
        # Without its picture the page still chats.
        page.driver.execute_script(
            """
            const whole = window.fetch;
            window.fetch = (path, ...rest) =>
              whole(path === "cluster" ? "cluster/not-there" : path, ...rest);
            """
        )
        page.until("the trouble is said", lambda: page.one("#trouble").is_displayed())
        page.send("Hello again")
        assert page.answered(2) and not page.all(".error")
        page.clean(allowed="Failed to load resource")


def asks_for_the_key(base: str, key: str) -> None:
    """With keys, the page asks for one, again when it is wrong, and remembers it."""
    with _Page(base) as page:
        page.until("the key is asked for", lambda: page.one("#ask").is_displayed())
        assert page.value("#model") == ""
        page.one("#ask-key").send_keys("wrong", Keys.ENTER)
        page.until("and again", lambda: "does not know" in page.one("#ask-why").text)
        page.one("#ask-key").send_keys(key, Keys.ENTER)
        page.ready()
        page.set(temperature="0", max_tokens="40")
        page.send("What is the capital of France?")
        assert "Paris" in page.answered(1), page.texts(".answer")
        page.until("the picture comes", lambda: page.all(".worker[data-did]:not([data-did=''])"))
        page.driver.refresh()
        page.ready()
        assert not page.one("#ask").is_displayed()
        # A key that is gone is asked for when a message wants it, and the message is not lost.
        page.one("#settings summary").click()
        page.one("#key").send_keys(Keys.CONTROL + "a")
        page.one("#key").send_keys("gone", Keys.TAB)
        page.until("the key is asked for", lambda: page.one("#ask").is_displayed())
        page.one("#ask button[type=button]").click()
        page.until("the question is gone", lambda: not page.one("#ask").is_displayed())
        page.set(temperature="0", max_tokens="8")
        page.send("Hello")
        page.until("the key is asked for", lambda: page.one("#ask").is_displayed())
        page.one("#ask-key").send_keys(key, Keys.ENTER)
        assert page.answered(1) and not page.all(".error"), page.texts(".error")
        page.ready()
        page.clean(allowed="401 (Unauthorized)")


def pictures(base: str, folder: str) -> None:
    """Takes pictures of the page, for the README and for who works on it."""
    with _Page(base) as page:
        page.ready()
        page.set(temperature="0", max_tokens="200")
        page.send("What is the capital of France?")
        page.answered(1)
        page.send(
            "A friend of mine is going to visit it for two days. She likes museums and long walks "
            "along the river, and does not want to spend much. What should she see on the first day, "
            "and what on the second?"
        )
        page.until("text comes", lambda: len(page.texts(".answer > .text")[-1]) > 400)
        page.until("placed", lambda: len(page.all(".where")) == 2)
        page.one("#stop").click()
        time.sleep(1.5)
        for scheme in ["light", "dark"]:
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            for name, size in [("wide", (1200, 760)), ("phone", (390, 780))]:
                page.resize(*size)
                time.sleep(0.5)
                page.driver.save_screenshot(str(Path(folder) / f"{name}-{scheme}.png"))


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    globals()[scenario](*arguments)
    print(f"{scenario}: as it should be")
