"""The log of changes: numbered, resumable, and honest about what was missed."""

import asyncio

from moorage_server import changes as module
from moorage_server.changes import Changes


async def take(changes, sequence, count, heartbeat=5.0):
    found = []
    async for change in changes.after(sequence, heartbeat):
        found.append((change.sequence, change.value) if change else None)
        if len(found) == count:
            break
    return found


def test_a_watcher_gets_what_came_before_and_what_comes():
    async def run():
        changes = Changes()
        for value in "ab":
            changes.add(value)
        watching = asyncio.create_task(take(changes, 0, 4))
        await asyncio.sleep(0)
        for value in "cd":
            changes.add(value)
        assert await watching == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
        assert await take(changes, 3, 1) == [(4, "d")]

    asyncio.run(run())


def test_silence_is_broken_by_heartbeats():
    async def run():
        changes = Changes()
        assert await take(changes, 0, 2, heartbeat=0.01) == [None, None]
        changes.add("a")
        assert await take(changes, 0, 2, heartbeat=0.01) == [(1, "a"), None]

    asyncio.run(run())


def test_who_is_too_slow_is_not_deceived(monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 3)

    async def run():
        changes = module.Changes()
        for value in range(5):
            changes.add(value)
        assert await take(changes, 1, 9) == []
        assert [changes.covers(changes.epoch, n) for n in range(7)] == [False] * 2 + [True] * 4 + [
            False
        ]
        assert not changes.covers("another", 5)
        watching = changes.after(5, 5.0)
        changes.add(5)
        assert (await anext(watching)).value == 5
        for value in range(6, 12):
            changes.add(value)
        assert [change.value async for change in watching] == []

    asyncio.run(run())
