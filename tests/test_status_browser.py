"""The status page in a browser: live, in the numbers of the rpc, and legible on every screen.

Pictures of it go to the folder that MOORAGE_SCREENSHOTS names.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import moorage
from checkpoints import GOLDEN, mesh_of, open_folder
from engine_double import EngineDouble
from moorage_models.checkpoint import Checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_server import status_page
from moorage_server.engine import Device, EngineInfo, Need
from status_server import status_server

playwright = pytest.importorskip("playwright.async_api", reason="needs pip install playwright")
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<img src=x onerror=\"document.title='mine'\">"
SCREENS = [(1280, "light"), (1280, "dark"), (800, "light"), (400, "light"), (400, "dark")]
#: The labels of tiles whose drawing lies over them.
COVERED = """() => [...document.querySelectorAll(".tile")].filter((tile) => {
  const drawing = tile.querySelector("svg, meter")?.getBoundingClientRect();
  const text = document.createRange();
  text.selectNodeContents(tile.querySelector("dt"));
  const label = text.getBoundingClientRect();
  return drawing && drawing.left < label.right && drawing.top < label.bottom;
}).map((tile) => tile.querySelector("dt").textContent)"""

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no chromium in PATH: apt-get install chromium"
)


class Sized(EngineDouble):
    """Holds as much of each model as its plan says, on a mesh of two times two."""

    MESH = {"fsdp": 2, "tp": 2}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def info(self) -> EngineInfo:
        devices = tuple(Device(number, "double") for number in range(4))
        info = super().info()
        return EngineInfo("cpu", devices, self.MESH, info.buckets, 1 << 20, info.profiles)

    def need(self, plan: Any, compute_dtype: str) -> Need:
        return Need(plan.device_bytes(self.MESH), 100 << 10)

    def live_bytes(self) -> dict[int, int]:
        return dict.fromkeys(range(4), sum(self.sizes[handle] for handle in self.loaded))

    def load(self, handle: str, checkpoint: Checkpoint, monitor: LoadMonitor) -> dict[int, int]:
        self.sizes[handle] = checkpoint.plan.device_bytes(self.MESH)
        super().load(handle, checkpoint, monitor)
        return dict.fromkeys(range(4), self.sizes[handle])


class Chromium:
    """One browser for all tests, in an event loop that outlives each."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.run = runner.run
        self.play = self.run(playwright.async_playwright().start())
        self.browser = self.run(self.play.chromium.launch(executable_path=CHROMIUM, args=FLAGS))

    @asynccontextmanager
    async def opened(self, url, width=1280, scheme="light", **options):
        """The page in a window of a width that knows no other, and what went wrong in it."""
        viewport = {"width": width, "height": 900}
        page = await self.browser.new_page(viewport=viewport, color_scheme=scheme, **options)
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        await page.goto(url)
        yield page
        await page.close()

    async def close(self):
        await self.browser.close()
        await self.play.stop()


@pytest.fixture(scope="module")
def chromium():
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr(status_page, "_TICK_SECONDS", 0.1)  # rather than wait for each second
        browser = Chromium(runner)
        yield browser
        browser.run(browser.close())


async def shows(page, selector, wanted):
    """Waits for the texts of all such elements, or for one that has a text in it."""
    found = page.locator(selector)
    if isinstance(wanted, str):
        await found.filter(has_text=wanted).first.wait_for(timeout=10_000)
    else:
        await playwright.expect(found).to_have_text(wanted, timeout=10_000, use_inner_text=True)


def tile(name):
    return f'.tile:has(dt:text-is("{name}")) [data-part=value]'


def test_the_page_is_live_and_has_the_numbers_of_the_rpc(chromium):
    async def run():
        engine = Sized()
        async with (
            status_server(engine, GOLDEN) as server,
            moorage.aio.connect(server.address) as client,
            chromium.opened(server.page.url) as page,
        ):
            await shows(page, "#live", "live")
            await shows(page, "#no-models", "No model is loaded.")
            await page.evaluate("window.sameDocument = true")
            one = await client.load("llama3", "internal", "llama3", lease=600, client_name="grpo-7")
            await shows(page, ".state", "READY")
            engine.hold("place")
            loading = asyncio.create_task(client.load(EVIL, "internal", "qwen3_moe"))
            await shows(page, ".state", "LOADING")
            await shows(page, ".stage-name", ["fetch", "place"])
            await shows(
                page, ".stage-text", [re.compile("^100 B of 100 B"), re.compile("^50 B of")]
            )
            with pytest.raises(moorage.NotFound):
                await client.load(EVIL, "internal", "nowhere")
            for _ in range(3):
                await one.forward([[1, 2, 3], [4, 5]])
            engine.release()
            await loading
            await shows(page, '.state[data-state="ready"] >> nth=1', "READY")
            await shows(page, "#errors", "CHECKPOINT_NOT_FOUND")
            await shows(page, ".tile", "15 in 3 forward passes")
            info, models = await client.info(), await client.models()
            assert info.activity.leases == 1
            await shows(page, tile("Leases"), ["1"])
            await shows(page, tile("Batch fill"), ["0.98 %"])
            await shows(page, tile("Loads"), ["2"])
            assert models[1].model_id == EVIL
            await shows(page, ".model h3", [model.model_id for model in models])
            assert await page.title() == "moorage"
            assert await page.locator("main img").count() == 0
            used = models[0].device_bytes[0] + models[1].device_bytes[0] + (100 << 10)
            assert info.memory.reserved_bytes == used
            shown = f"{used / 1024:.0f} KiB of 1 MiB"
            await shows(page, ".device-sum", [shown] * 4)
            await shows(page, "#errors tbody tr >> nth=0", info.activity.errors[-1].request_id)
            await shows(page, "#leases tbody td >> nth=0", ["grpo-7"])
            assert await page.evaluate("window.sameDocument")
            assert page.problems == []
            assert {url.startswith(server.page.url) for url in page.asked} == {True}

    chromium.run(run())


@pytest.mark.parametrize("name", ["llama3", "qwen3_moe"])
def test_the_picture_shows_the_slices_that_jax_would_give_each_device(name, chromium):
    mesh = mesh_of(2, 2)
    expected = {}
    for parameter in open_folder(GOLDEN / name).plan.parameters:
        spec = PartitionSpec(*(axes or None for axes in parameter.spec(dict(mesh.shape))))
        indices = NamedSharding(mesh, spec).devices_indices_map(parameter.shape)
        holders: dict[str, list[int]] = {}
        for device in mesh.devices.flat:
            text = ", ".join(
                ":" if part == slice(None) else f"{part.start}:{part.stop}"
                for part in indices[device]
            )
            holders.setdefault(f"[{text}]", []).append(device.id)
        expected[parameter.name] = {
            f"device{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}: {text}"
            for text, ids in holders.items()
        }

    async def run():
        async with (
            status_server(Sized(), GOLDEN) as server,
            moorage.aio.connect(server.address) as client,
            chromium.opened(server.page.url) as page,
        ):
            await client.load(name, "internal", name)
            await page.locator("summary").click()
            rows = page.locator(".parameter")
            for i in range(await rows.count()):
                parameter = await rows.nth(i).locator("code").inner_text()
                cells = rows.nth(i).locator(".cell")
                titles = {
                    await cells.nth(j).get_attribute("title") for j in range(await cells.count())
                }
                assert titles == expected[parameter]
            assert await rows.count() >= 7
            await page.locator(".choice", has_text="3").click()
            said = await rows.nth(0).locator("[data-part=holds]").inner_text()
            assert said.partition(", ")[0].startswith("device 3: [")
            return said

    chromium.run(run())
    assert jax.device_count() == 8


def test_a_browser_gives_its_token_as_a_password(tmp_path, chromium):
    tokens = tmp_path / "tokens"
    tokens.write_text("me score my-token-0123456789\n")

    async def run(password):
        async with (
            status_server(Sized(), tokens=tokens) as server,
            chromium.opened(
                server.page.url, http_credentials={"username": "", "password": password}
            ) as page,
        ):
            if password.startswith("my"):
                await shows(page, "#live", "live")
            return await page.locator("body").inner_text()

    assert "Device memory" in chromium.run(run("my-token-0123456789"))
    assert "does not know that token" in chromium.run(run("guessed-0123456789"))


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_it_is_legible_on_every_screen(width, scheme, tmp_path, chromium):
    folder = Path(os.environ.get("MOORAGE_SCREENSHOTS", tmp_path))

    async def run():
        engine = Sized()
        async with (
            status_server(engine, GOLDEN) as server,
            moorage.aio.connect(server.address) as client,
            chromium.opened(server.page.url, width, scheme) as page,
        ):
            for name in ("llama3", "gemma2"):
                model = await client.load(name, "internal", name, lease=600, client_name="grpo-7")
                await model.forward([[1, 2, 3]] * 5)
            engine.hold("place")
            loading = asyncio.create_task(
                client.load("Qwen/Qwen3-MoE-tiny", "internal", "qwen3_moe")
            )
            with pytest.raises(moorage.Error):
                await client.load("nobody/nothing", "internal", "nothing")
            await shows(page, ".state", "LOADING")
            await shows(page, "#errors", "CHECKPOINT_NOT_FOUND")
            await shows(page, ".tile", "30 in 2 forward passes")
            for name in ("status", "layout"):
                path = folder / f"{name}-{width}-{scheme}.png"
                await page.screenshot(path=path, full_page=True, animations="disabled")
                await page.locator("summary").first.click()
            wide = await page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width
            assert await page.evaluate(COVERED) == []
            engine.release()
            await loading

    chromium.run(run())
