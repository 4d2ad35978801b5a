"""The page in a headless Chromium: type, stream, stop, second turn, new chat, a phone, a key, a model that does not converse.

    page.py URL KEY URL-OF-A-MODEL-WITHOUT-TEMPLATE [FOLDER for pictures]

Needs Debian's chromium and chromium-driver, and nothing of Python's but its library: WebDriver is JSON over HTTP.
"""
import base64
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

URL, KEY, PLAIN, PICTURES = (sys.argv[1:] + [None])[:4]
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,800"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    def __init__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.driver.stdout:
            if "started successfully on port" in line:
                self.base = "http://127.0.0.1:" + line.split("port ")[-1].strip().rstrip(".")
                break
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": OPTIONS}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += "/session/" + session["sessionId"]

    def ask(self, method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def run(self, script, *args):
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def find(self, css):
        return self.ask("POST", "/element", {"using": "css selector", "value": css})[ELEMENT]

    def type(self, css, text):
        self.ask("POST", f"/element/{self.find(css)}/value", {"text": text})

    def click(self, css):
        self.ask("POST", f"/element/{self.find(css)}/click", {})

    def said(self, kind):
        return self.run(f"return [...document.querySelectorAll('main .{kind}')].map(p => p.textContent)")

    def shown(self, css):
        return self.run("return document.querySelector(arguments[0]).offsetParent !== null", css)

    def picture(self, name):
        if PICTURES:
            with open(f"{PICTURES}/{name}.png", "wb") as file:
                file.write(base64.b64decode(self.ask("GET", "/screenshot")))

    def size(self, width, height):
        self.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}})

    def dark(self, scheme):
        self.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]}})


def wait(what, come, seconds=30):
    end = time.time() + seconds
    while time.time() < end:
        if come():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


def check(browser):
    browser.ask("POST", "/url", {"url": URL})
    wait("it asks for the key", lambda: browser.shown("#key"))
    browser.type("#key", KEY + "\n")
    wait("the model's name", lambda: browser.run("return document.title") and
         browser.run("return document.getElementById('memory').textContent") != "")
    assert not browser.shown("#stop") and browser.shown("#send")

    # Type and stream: the text grows.
    browser.run("window.changes = 0; new MutationObserver(() => window.changes += 1).observe("
                "document.getElementById('log'), { childList: true, subtree: true })")
    browser.type("#text", "Who is the king?\n")
    wait("the first words", lambda: browser.said("assistant") and browser.said("assistant")[0])
    assert browser.said("user") == ["Who is the king?"]
    wait("the answer ends", lambda: browser.shown("#send"))
    changes = browser.run("return window.changes")
    assert changes > 20, f"it came in {changes} pieces"
    first = browser.said("assistant")[0]
    speed = browser.run("return document.getElementById('speed').textContent")
    assert "tokens/s" in speed and "read" in speed, speed

    # The second turn knows the first: what is sent is the whole conversation.
    browser.type("#text", "And his daughter?\n")
    wait("the second answer", lambda: len(browser.said("assistant")) == 2 and browser.shown("#send"))
    assert browser.said("assistant")[0] == first and browser.said("user")[1] == "And his daughter?"
    turns = browser.run("return state.messages.map(m => m.role)")
    assert turns == ["user", "assistant", "user", "assistant"], turns

    # Stop in the middle: what came stays, and the server gives the rest up.
    browser.run("window.before = state.messages.length")
    browser.type("#text", "Tell me all\n")
    wait("it writes", lambda: browser.shown("#stop") and len(browser.said("assistant")) == 3 and
         len(browser.said("assistant")[2]) > 5)
    browser.click("#stop")
    wait("it stops", lambda: browser.shown("#send"))
    kept = browser.said("assistant")[2]
    time.sleep(0.5)
    assert browser.said("assistant")[2] == kept and not browser.said("wrong"), browser.said("wrong")
    wait("nothing runs", lambda: json.loads(browser.run(
        "const r = new XMLHttpRequest(); r.open('GET', '/stats', false);"
        "for (const [k, v] of Object.entries(headers())) r.setRequestHeader(k, v); r.send(); return r.responseText;"
    ))["running"] == 0)

    # The picture has what the server says.
    wait("bars", lambda: browser.run("return document.querySelectorAll('#neurons i').length") > 0)
    heights = browser.run("return [...document.querySelectorAll('#neurons i')].map(i => i.offsetHeight)")
    assert min(heights) > 5 and "%" in browser.run("return document.getElementById('neurons-text').textContent"), heights
    assert browser.run("return document.querySelector('#tiers .hot').offsetWidth") > 100, "no hot pages"
    assert "known" in browser.run("return document.getElementById('prefixes').textContent")
    browser.picture("chat")
    browser.dark("dark")
    browser.picture("dark")
    back = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(22, 22, 24)", back
    browser.dark("light")
    browser.size(360, 700)
    browser.picture("phone")
    assert browser.run("return document.documentElement.scrollWidth") <= 360, "it is wider than a phone"
    assert browser.run("return document.getElementById('send').offsetHeight") >= 44

    # Every control has a name, and the tab key reaches it.
    unnamed = browser.run("return [...document.querySelectorAll('button, textarea, input')].filter("
                          "e => !(e.textContent.trim() || e.getAttribute('aria-label'))).map(e => e.id)")
    assert unnamed == [], unnamed

    # Markup in what is said is text.
    browser.click("#anew")
    assert browser.said("user") == [] and browser.run("return state.messages.length") == 0
    browser.type("#text", "<img src=x onerror=alert(1)><b>bold</b>\n")
    wait("the answer", lambda: browser.shown("#stop"))
    browser.click("#anew")
    wait("it is given up", lambda: browser.shown("#send"))
    assert browser.run("return document.querySelectorAll('main img, main b').length") == 0
    assert browser.run("return state.messages.length") == 0

    # What the server refuses is shown in its words.
    browser.run("window.fetch = (f => (url, o) => f(url, o && o.body ? {...o, body: '{}'} : o))(window.fetch)")
    browser.type("#text", "hi\n")
    wait("its words", lambda: any("is missing" in text for text in browser.said("wrong")))
    assert browser.run("return document.getElementById('text').value") == "hi"

    # No script failed, and the policy stopped nothing; refusals were asked for.
    log = browser.ask("POST", "/se/log", {"type": "browser"})
    wrong = [e for e in log if e["level"] != "INFO" and "(Bad Request)" not in e["message"] and "(Unauthorized)" not in e["message"]]
    assert not wrong, wrong


def check_plain(browser):
    """Without a template the text goes on, and what was said before is its beginning."""
    browser.ask("POST", "/url", {"url": PLAIN})
    wait("it says so", lambda: "does not converse" in browser.run("return document.getElementById('text').placeholder"))
    assert not browser.shown("#key")
    for number, text in enumerate(["Once upon a time", " Then"], 1):
        browser.type("#text", text + "\n")
        wait("the text goes on", lambda: len(browser.said("assistant")) == number and browser.shown("#send"))
        assert browser.said("assistant")[-1] and not browser.said("wrong"), browser.said("wrong")
    assert "read" in browser.run("return document.getElementById('speed').textContent")


browser = Browser()
try:
    check(browser)
    check_plain(browser)
    print("page ok")
finally:
    try:
        browser.ask("DELETE", "")
    finally:
        browser.driver.terminate()
