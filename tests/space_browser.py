"""Start a Space, use it in a headless Chromium: FOLDER TEXT PICTURE. Prints what the page showed, as a line of JSON."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

from playwright.sync_api import sync_playwright


def main(folder: str, text: str, picture: str) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    page_process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=env, stdout=sys.stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, page_process)
        with sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(url)
            page.locator("#given textarea").fill(text)
            page.locator("#answer-button").click()
            page.wait_for_function("document.querySelector('#answer textarea')?.value")
            page.locator("#weights").get_by_text("%").first.wait_for()
            page.wait_for_function("document.querySelector('#table').innerText.includes('the shared model')")
            bars = page.locator("#weights").inner_text().split("\n")
            percents = {
                bars[i - 1].strip(): bars[i].strip() for i in range(1, len(bars)) if bars[i].strip().endswith("%")
            }
            shown = {
                "answer": page.locator("#answer textarea").input_value(),
                "bars": percents,
                "table": page.locator("#table").inner_text().split("\n"),
            }
            page.screenshot(path=picture)
            browser.close()
    finally:
        page_process.terminate()
        page_process.wait(20)
    shown["table"] = [cell.strip() for line in shown["table"] for cell in line.split("\t") if cell.strip()]
    print(json.dumps(shown))


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the page ended with code {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the page did not start")


if __name__ == "__main__":
    main(*sys.argv[1:])
