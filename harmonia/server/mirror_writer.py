"""Process that writes the closures of served store paths to the mirror's bucket (`mirror.write_served`).

It is one more process of the supervisor, which replaces it if it ends. Its queue is on disk: while the bucket cannot be
written, paths wait there. It has an interpreter of its own, in which all threads that write have the lowest priority,
so that no worker waits for it. SIGTERM ends it at any moment, like kill -9, which uploads survive.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing

from harmonia.cache.warmer import lower_priority
from harmonia.errors import ConfigError
from harmonia.mirror.connection import QUEUED_RETRY, open_bucket
from harmonia.mirror.target import BucketTarget
from harmonia.server.context import ServerContext
from harmonia.server.resources import metrics
from harmonia.server.served_paths import ServedPaths
from harmonia.store.store import Store
from harmonia.upload.nar_files import NarFiles
from harmonia.upload.queue import UploadQueue
from harmonia.upload.queue_uploader import QueueUploader
from harmonia.upload.task_group import task_group
from harmonia.upload.uploader import Uploader

_JOBS = 4  # NARs at once: 16 MiB of memory for each
_RETRY_S = 10.0  # after an error of the queue's disk
_SAMPLE_S = 1.0

_log = logging.getLogger("harmonia")


def start(context: ServerContext) -> tuple[threading.Thread, Callable[[], object]]:
    """Start the thread that writes paths. Return it, and what to call with each heartbeat: nothing."""
    writing = threading.Thread(target=_run, args=[context], name="mirror", daemon=True)
    writing.start()
    return writing, lambda: None


def _run(context: ServerContext) -> None:
    lower_priority()  # of this thread, and of the threads that it starts
    assert context.served_paths is not None  # noqa: S101 (the setting is on)
    asyncio.run(_write(context, context.served_paths))


async def _write(context: ServerContext, served: ServedPaths) -> None:
    """Write paths. While the queue cannot be used, the server works on without it."""
    failure = ""
    while True:
        began = time.monotonic()
        try:
            await _write_queued(context, served)
        except (ConfigError, OSError) as error:
            context.metrics.own.mirror_up = 0
            if failure != str(error) or time.monotonic() - began > _RETRY_S:
                _log.error("cannot write served paths to the bucket: %s; trying again", error)
            failure = str(error)
            await asyncio.sleep(_RETRY_S)


async def _write_queued(context: ServerContext, served: ServedPaths) -> None:
    settings = context.settings
    directory = os.path.join(str(settings.cache_dir), "mirror")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    store = Store.of(settings)
    async with AsyncExitStack() as stack:
        path = os.path.join(directory, "queue.sqlite")
        queue = stack.enter_context(closing(UploadQueue(path, setting="cache_dir")))
        target = BucketTarget(settings, open_bucket(settings, retry=QUEUED_RETRY))
        stack.push_async_callback(target.close)
        nars = stack.enter_context(closing(NarFiles(settings, store.real_dir, directory)))
        uploader = Uploader(store, target, nars, jobs=_JOBS, keys=context.keys)
        stack.enter_context(closing(uploader))
        uploads = stack.enter_context(closing(QueueUploader(store, queue, target, uploader)))
        async with task_group() as group:
            group.create_task(uploads.run())
            group.create_task(_queue(uploads, served))
            group.create_task(_sample(context, uploads, uploader))


async def _queue(uploads: QueueUploader, served: ServedPaths) -> None:
    while True:
        await uploads.add(await served.take())


async def _sample(context: ServerContext, uploads: QueueUploader, uploader: Uploader) -> None:
    """Copy the counters into shared memory, where the workers read them."""
    while True:
        metrics.sample_mirror(context, uploads, uploader, await uploads.statistics())
        await asyncio.sleep(_SAMPLE_S)
