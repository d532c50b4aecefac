"""The live page in a real browser: what it shows of a deployment, and its chat."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import FLAGS, chromium
from fake_worker import FakeWorker
from router_net import Router, router, run, split, until

from pdserve.core.api_keys import add_key
from pdserve.core.ids import Role
from pdserve.router.page import PAGE

if TYPE_CHECKING:
    from playwright.async_api import Locator, Page


@contextlib.asynccontextmanager
async def opened(up: Router, **context: Any) -> AsyncIterator[Page]:
    """The page, loaded. Fails at the end where the browser had anything to complain about."""
    executable = chromium()
    from playwright.async_api import async_playwright

    complaints: list[str] = []
    outside: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=[*FLAGS])
        page = await (await browser.new_context(**context)).new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if is_bad(said) else None)
        page.on("request", lambda asked: outside.append(asked.url))
        await page.goto(up.url)
        yield page
        await browser.close()
    assert complaints == []
    assert [url for url in outside if not url.startswith((up.url, "data:"))] == []


def is_bad(said: Any) -> bool:
    return said.type in ("error", "warning") and "status of" not in said.text


async def written(place: Locator, pattern: str) -> None:
    from playwright.async_api import expect

    await expect(place).to_have_text(re.compile(f"^{pattern}$"))


def browse(main: Any) -> None:
    chromium()  # skips before anything is started
    run(main(), limit_s=60)


def test_it_loads_and_shows_both_workers() -> None:
    async def main() -> None:
        async with split() as (up, _, _), opened(up) as page:
            for pool, name in (("prefill", "prefill-0"), ("decode", "decode-0")):
                card = page.locator(f"#{pool} .worker")
                await card.wait_for()
                assert await card.count() == 1
                assert await card.locator("h3").inner_text() == name
                assert await card.locator(".status").inner_text() == "✓ ready"
            assert await page.locator("#state").inner_text() == "✓ Ready"
            assert await page.locator("#lost").is_hidden()
            assert "decode-0 joined" in await page.locator("#events").inner_text()

    browse(main)


def test_it_streams_an_answer_and_shows_what_its_request_went_through() -> None:
    async def main() -> None:
        async with split() as (up, _, decode), opened(up) as page:
            decode.hold_after = 3
            await page.locator(".worker").first.wait_for()
            await page.fill("#prompt", "hello <b>you</b>")
            await page.select_option("#max", "32")
            await page.click("#send")
            said = page.locator(".said.assistant")
            await until(lambda: len(decode.placed) == 1)
            await written(said, "[a-z]{3}")  # as far as it has come, and not at its end
            assert await page.locator("#send").inner_text() == "Stop"
            decode.release()
            await page.locator(".steps").wait_for()
            assert re.fullmatch("[a-z]{32}", await said.inner_text())
            assert await page.locator(".said.user").inner_text() == "hello <b>you</b>"
            names = await page.locator(".steps th").all_inner_texts()
            assert names == [
                "Tokenize",
                "Router's queue",
                "Wait for prefill",
                "Prefill",
                "KV hand-over",
                "Join the batch",
                "Decode",
            ]
            head = await page.locator(".steps div").first.inner_text()
            assert "prefill-0 → decode-0" in head and "32 out" in head
            await written(page.locator("#goodput"), r"\d+\.\d+ /s")

    browse(main)


def test_stop_ends_the_request_at_its_workers() -> None:
    async def main() -> None:
        async with split() as (up, _, decode), opened(up) as page:
            decode.hold_after = 2
            await page.locator(".worker").first.wait_for()
            await page.fill("#prompt", "hello")
            await page.press("#prompt", "Enter")
            await until(lambda: up.service.num_tokens == 2)
            await page.click("#send")
            await until(lambda: len(decode.aborted) == 1)
            await page.get_by_text("■ stopped").wait_for()

    browse(main)


def test_an_error_is_shown_in_words() -> None:
    async def main() -> None:
        async with split() as (up, _, _), opened(up) as page:
            await page.locator(".worker").first.wait_for()
            await page.select_option("#max", "512")  # more than the context of 256
            await page.fill("#prompt", "hello")
            await page.press("#prompt", "Enter")
            failed = page.locator(".said.failed")
            await failed.wait_for()
            assert "✕ max_tokens is 512" in await failed.inner_text()

    browse(main)


def test_a_server_with_keys_asks_for_one(tmp_path: Path) -> None:
    made = add_key(tmp_path / "keys.yaml", "alice", None, None)

    async def main() -> None:
        security = {"api_keys": str(tmp_path / "keys.yaml")}
        async with split(security=security) as (up, _, _), opened(up) as page:
            await page.locator("#locked").wait_for()
            assert await page.locator("main").is_hidden()
            for key, shown in (("wrong", "#wrong"), (made.secret, ".worker")):
                await page.fill("#key", key)
                await page.press("#key", "Enter")
                await page.locator(shown).first.wait_for()
            assert await page.locator("#locked").is_hidden()
            await page.fill("#prompt", "hello")
            await page.press("#prompt", "Enter")
            await page.locator(".steps").wait_for()
            await page.reload()
            await page.locator(".worker").first.wait_for()

    browse(main)


def test_a_workers_death_shows_within_three_seconds() -> None:
    async def main() -> None:
        async with split() as (up, _, decode), opened(up) as page:
            await page.locator("#decode .worker").wait_for()
            await decode.kill()
            dead = page.locator("#decode .worker.down")
            await dead.wait_for(timeout=3000)
            assert await dead.locator(".status").inner_text() == "✕ dead"
            await page.get_by_text("✕ decode-0 died").wait_for()
            async with FakeWorker(up.net, "decode-0", Role.DECODE):
                await page.locator("#decode .worker:not(.down)").wait_for()
                assert await page.locator("#decode .worker").count() == 1

    browse(main)


def test_a_worker_that_falls_silent_shows_within_three_seconds() -> None:
    async def main() -> None:
        async with split() as (up, _, decode), opened(up) as page:
            await page.locator("#decode .worker").wait_for()
            decode.silent = True
            await page.get_by_text("✕ does not answer").wait_for(timeout=3000)

    browse(main)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_need_to_scroll_sideways(scheme: str) -> None:
    async def main() -> None:
        viewport = {"width": 360, "height": 740}
        async with (
            router() as up,
            FakeWorker(up.net, "a-worker-with-a-name-that-is-long-" * 3, Role.MIXED),
            opened(up, viewport=viewport, color_scheme=scheme) as page,
        ):
            await page.locator("#mixed .worker").wait_for()
            width = await page.evaluate("document.documentElement.scrollWidth")
            assert width == 360
            assert await page.locator("#split").is_hidden()
            ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == {"light": "rgb(244, 245, 247)", "dark": "rgb(15, 18, 24)"}[scheme]

    browse(main)


def test_the_page_is_one_file_that_may_load_nothing_else() -> None:
    assert not re.search(r"""(src|href)="(?!data:)|@import|url\(|<script """, PAGE.text)
    policy = PAGE.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2


def test_what_is_live_says_how_many_requests_are_where() -> None:
    async def main() -> None:
        async with split() as (up, prefill, decode):
            prefill.hold_tokens = True
            asked = asyncio.create_task(up.complete())
            await until(lambda: up.service.live()["stages"]["prefill"] == 1)
            live = (await up.get("/live"))[1]
            assert live["transfers"] == [{"from": "prefill-0", "to": "decode-0", "requests": 1}]
            decode.hold_after = 4
            prefill.release()
            await until(lambda: up.service.live()["stages"]["decode"] == 1)
            decode.release()
            assert (await asked)[0] == 200
            await until(lambda: up.service.live()["recent"]["good"] == 1)
            live = (await up.get("/live"))[1]
            assert sum(live["stages"].values()) == 0 and live["output_tokens"] == 8
            assert live["recent"]["attainment"] == 1.0
            assert set(live["recent"]["ttft_ms"]) == {"p50", "p90", "p99"}

    run(main())
