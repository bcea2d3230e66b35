"""Promises of both pages in a real browser: no wider than its window, nothing loaded from elsewhere."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from synthetic_audit import SCRIPT, synthetic_audit
from synthetic_locality import records

from dori.locality.page.render import render as render_locality
from dori.report.render import render

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)
# The page's own policy forbids scripts, so a copy without it is measured, everything unfolded, in a frame as wide as
# asked (a window cannot be narrower than 500 px). The frame reports to its parent, whose title is read.
MEASURE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll > *")
    && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName + "." + e.className);
  parent.postMessage({width: innerWidth, page: document.documentElement.scrollWidth, wide: wide.slice(0, 5),
    height: document.documentElement.scrollHeight}, "*");
});</script>"""
OUTER = """<title>nothing</title><body style="margin:0"><script>addEventListener("message", e => {
  document.title = JSON.stringify(e.data); });</script>
<iframe src="inner.html" style="border:0;width:%dpx;height:900px"></iframe>"""


@pytest.fixture(scope="module", params=["audit", "locality"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    if request.param == "locality":
        return render_locality(records(6), folder)
    audit = synthetic_audit(
        folder, edits=(("none", ""), ("NeMo", "joint")), texts=(SCRIPT, "w" * 300), distrust=("x" * 200,)
    )
    return render(audit, folder)


@contextmanager
def proxy(pages: dict[str, str]) -> Iterator[tuple[int, list[str]]]:
    """A proxy that holds these pages and nothing else: its port, and the list of everything asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = pages.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()


def measured(page: str, folder: Path, width: int) -> dict:
    """What the page says of itself in a frame of this width, and under "asked" all that the browser asked for."""
    bare, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1 and BROWSER
    pages = {
        "http://dori.test/outer.html": OUTER % width,
        "http://dori.test/inner.html": bare.replace("</body>", MEASURE + "</body>"),
    }
    with proxy(pages) as (port, asked):
        done = subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={folder / 'profile'}",
                f"--proxy-server=http://127.0.0.1:{port}",
                "--window-size=1300,950",
                "--virtual-time-budget=10000",
                "--dump-dom",
                "http://dori.test/outer.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title
    others = {url for url in asked if url not in pages and not OWN.search(url)}
    return json.loads(unescape(title[1])) | {"asked": others}


OWN = re.compile(r"(google|gvt1|googleapis)\.com[:/]|favicon\.ico")  # what the browser asks on its own account


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_no_wider_than_its_window_and_asks_for_nothing(page: str, tmp_path: Path, width: int) -> None:
    found = measured(page, tmp_path, width)
    assert found["width"] == width
    assert found["page"] <= width and found["wide"] == []
    assert found["asked"] == set()
    assert found["height"] > 3000  # the report was there to be measured


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_measurement_sees_what_is_too_wide_and_what_is_asked_for(page: str, tmp_path: Path) -> None:
    added = (
        '<div style="width: 2000px">wide</div><img src="http://elsewhere.test/a.png" alt="">'
        '<img src="https://secret.test/b.png" alt="">'
    )
    broken = page.replace("</main>", added + "</main>")
    found = measured(broken, tmp_path, 400)
    assert found["page"] >= 2000 and found["wide"]
    assert found["asked"] == {"http://elsewhere.test/a.png", "secret.test:443"}
