"""The page of `evomoe report` in a real browser, where there is one: Chromium, without a window."""

import html
import json
import re
import shutil
import subprocess

import pytest

from support.cli import LM, evomoe

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

PROBE = """<script>
// what a reader would find: errors, sections, colours, overflow, and whether tables sort
addEventListener("load", () => {
  const large = (x, width, height) => {
    const box = x.getBoundingClientRect();
    return box.width > width && box.height > height;
  };
  const tables = [...document.querySelectorAll("table.sortable")];
  const table = tables.sort((a, b) => b.rows.length - a.rows.length)[0], head = table.tHead.rows[0].cells[3];
  const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[3].dataset.value));
  head.querySelector("button").click();
  const down = column(), sorted = head.getAttribute("aria-sort");
  head.querySelector("button").click();
  const up = column();
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const found = {
    errors, down, up, sorted,
    sections: [...document.querySelectorAll("main section")].map((x) => [x.id, large(x, 200, 60)]),
    pictures: [...document.querySelectorAll("figure svg")].map((x) => large(x, 100, 40)),
    wider: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    focus: [...document.querySelectorAll("a, button, summary, [tabindex]")].every((x) => x.tabIndex >= 0),
    text: getComputedStyle(document.querySelector("figure svg text")).fill,
  };
  const told = document.createElement("pre");
  told.id = "probe";
  told.textContent = JSON.stringify(found);
  parent.document.body.append(told);
});
</script>"""
LISTEN = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)), true);
console.error = (...words) => errors.push(words.join(" "));
</script>"""


@pytest.fixture(scope="module")
def page(trained, lm_data, tmp_path_factory):
    run, folder = trained(LM), tmp_path_factory.mktemp("browser")
    (folder / "log").write_text(run.result.output)
    evomoe("report", run.at(9), run.last, "--data", lm_data, "--out", folder / "out", "--log", folder / "log")
    return folder / "out" / "report.html"


def visit(page, folder, width, dark):
    """What the probe finds, at a width and with a colour scheme."""
    text = page.read_text(encoding="utf-8")
    head, body = text.replace("<head>", "<head>" + LISTEN, 1), "</body>"
    inside = html.escape(head.replace(body, PROBE + body))
    # in a frame, since no window is as narrow as a phone
    frame = f'<iframe style="border:0" width="{width}" height="900" srcdoc="{inside}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}", encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --enable-logging=stderr".split(),
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            "--virtual-time-budget=5000",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)[1]))


def brightness(color):
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_reader_finds_everything(page, tmp_path, width, dark):
    found = visit(page, tmp_path, width, dark)
    assert found["errors"] == [] and found["width"] == width
    assert len(found["sections"]) == 7 and all(shown for _, shown in found["sections"]), found["sections"]
    assert len(found["pictures"]) > 8 and all(found["pictures"])
    assert found["wider"] <= 0, "the page must not scroll sideways"
    assert len(set(found["down"])) > 3 and found["down"] == sorted(found["down"], reverse=True)
    assert found["sorted"] == "descending" and found["up"] == sorted(found["up"]) and found["focus"]
    paper, ink = brightness(found["paper"]), brightness(found["ink"])
    assert (paper < 60 and ink > 200) if dark else (paper > 200 and ink < 60)
    assert abs(brightness(found["text"]) - paper) > 80  # the letters of the pictures, too
