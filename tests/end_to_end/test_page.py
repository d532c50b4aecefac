"""The live page on a deployment of real processes: one is killed, and the page shows it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from browser import FLAGS, chromium
from served import deployment, serve

# Split whatever the workers' measured times say: the answer's steps have a hand-over among them.
SIMULATED = """
model: {path: tiny, load: dummy}
engine: simulated
pools:
  prefill: {workers: 1, device: cpu}
  decode: {workers: 1, device: cpu}
router: {policy: disaggregated}
"""


def test_a_worker_that_is_killed_shows_within_three_seconds_and_then_its_next_life(
    tmp_path: Path,
) -> None:
    executable = chromium()
    from playwright.sync_api import expect, sync_playwright

    with serve(deployment(tmp_path, SIMULATED)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*FLAGS])
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator(".worker .status")).to_have_text(["✓ ready", "✓ ready"])
        page.fill("#prompt", "hello")
        page.click("#send")
        expect(page.locator(".steps th")).to_have_count(7, timeout=15_000)
        os.kill(server.workers()["decode-0"]["pid"], signal.SIGKILL)
        died = page.locator("#events li", has_text="✕ decode-0 died")
        died.wait_for(timeout=3000)
        again = page.locator("#events li").first
        expect(again).to_have_text(re.compile(r"\+ decode-0 joined"), timeout=20_000)
        expect(page.locator("#decode .worker .status")).to_have_text("✓ ready")
        browser.close()
