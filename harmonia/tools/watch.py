"""Service that uploads new store paths to another cache: the watcher with its files, signals, metrics and watchdog."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, closing

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from harmonia.config import credentials
from harmonia.config.settings import Settings
from harmonia.config.tables.publish import PublishRules
from harmonia.config.tables.watch import Watch
from harmonia.config.value_types import MIRROR
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.mirror.connection import QUEUED_RETRY, open_bucket
from harmonia.mirror.target import BucketTarget
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.process import systemd
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store
from harmonia.upload.http_target import HttpTarget
from harmonia.upload.nar_files import NarFiles
from harmonia.upload.queue import Statistics, UploadQueue
from harmonia.upload.queue_uploader import QueueUploader
from harmonia.upload.target import Target
from harmonia.upload.uploader import Uploader
from harmonia.upload.watcher import Watcher

_ATTEMPTS = 3  # of a request; the queue repeats what fails
_REPORT_S = 15.0  # between two writes of the metrics

_log = logging.getLogger("harmonia")


async def serve(settings: Settings, url: str, keys: Sequence[SecretKey], jobs: int) -> None:
    """Upload to the cache at `url` until SIGTERM or SIGINT.

    Raises ConfigError if a file of the settings cannot be used, FormatError if the URL is malformed.
    """
    watch = settings.watch
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    state_dir = str(watch.state_dir)
    os.makedirs(state_dir, mode=0o700, exist_ok=True)
    store = Store.of(settings)
    async with AsyncExitStack() as stack:
        queue = stack.enter_context(closing(UploadQueue(os.path.join(state_dir, "watch.sqlite"))))
        target = _open_target(settings, url)
        stack.push_async_callback(target.close)
        nars = stack.enter_context(closing(NarFiles(settings, store.real_dir, os.path.join(state_dir, "upload"))))
        wanted, excluded = filters(watch, store)
        uploader = Uploader(store, target, nars, jobs=jobs, keys=keys, excluded=excluded)
        stack.enter_context(closing(uploader))
        uploads = stack.enter_context(closing(QueueUploader(store, queue, target, uploader)))
        watcher = Watcher(
            store,
            settings.database,
            uploader,
            uploads,
            wanted=wanted,
            new_paths=watch.new_paths,
            roots=watch.gc_roots,
        )
        if watch.socket is not None:
            await stack.enter_async_context(watcher.listening(watch.socket))

        def ready() -> None:
            _log.info("uploading new paths of %s to %s", store.store_dir, target.name)
            systemd.notify("READY=1")

        running = [
            asyncio.create_task(watcher.run(ready)),
            asyncio.create_task(_report(uploads, uploader, watch.metrics_file)),
            asyncio.create_task(stop.wait()),
        ]
        try:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            systemd.notify("STOPPING=1")
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        _log.info("stopped; the queue keeps what was not uploaded")


def _open_target(settings: Settings, url: str) -> Target:
    """Return the cache at `url`, or the bucket of the mirror. Raises WrongSettingError if a setting excludes that."""
    if url != MIRROR:
        authorization = credentials.watch_authorization(settings, url)
        return HttpTarget(url, settings.virtual_nix_store, attempts=_ATTEMPTS, authorization=authorization)
    if settings.watch.not_signed_by:
        what = "leaves out references, which the bucket of [mirror] needs; remove it"
        raise WrongSettingError(what, "watch", "not_signed_by")
    if settings.publish != PublishRules():
        raise WrongSettingError("the rules do not apply to uploads to the bucket of [mirror]; remove them", "publish")
    return BucketTarget(settings, open_bucket(settings, QUEUED_RETRY))


def filters(watch: Watch, store: Store) -> tuple[Callable[[PathInfo], bool], Callable[[PathInfo], bool]]:
    """Return a function that chooses the paths to upload, and one for those that are left out even as references."""
    names = PublishPolicy(PublishRules(allow=watch.allow, deny=watch.deny), store)
    keys = [PublicKey.parse(key) for key in watch.not_signed_by]

    def excluded(info: PathInfo) -> bool:
        message = info.fingerprint(store.store_dir) if keys and info.sigs else b""
        return any(key.verify(message, sig) for key in keys for sig in info.sigs)

    def wanted(info: PathInfo) -> bool:
        return names.permits_name(info.path) and not excluded(info)

    return wanted, excluded


async def _report(uploads: QueueUploader, uploader: Uploader, metrics_file: str | None) -> None:
    """Write the metrics, and feed the watchdog, as long as the event loop and the thread of the queue work."""
    watchdog = systemd.watchdog_interval()
    pause = min(_REPORT_S, watchdog / 2) if watchdog else _REPORT_S
    is_failing = False
    while True:
        statistics = await uploads.statistics()
        if watchdog:
            systemd.notify("WATCHDOG=1")
        if metrics_file is not None:
            try:
                await asyncio.to_thread(write_metrics, metrics_file, uploads, uploader, statistics)
                is_failing = False
            except OSError as error:
                if not is_failing:
                    _log.warning("watch.metrics_file: cannot write %r: %s", metrics_file, error.strerror)
                is_failing = True
        await asyncio.sleep(pause)


def write_metrics(path: str, uploads: QueueUploader, uploader: Uploader, statistics: Statistics) -> None:
    """Write the metrics to a file, atomically. Raises OSError if that fails."""
    registry = CollectorRegistry()
    registry.register(_Families(uploads, uploader, statistics))
    write_to_textfile(path, registry)


class _Families(Collector):
    def __init__(self, uploads: QueueUploader, uploader: Uploader, statistics: Statistics) -> None:
        self._uploads = uploads
        self._uploader = uploader
        self._statistics = statistics

    def collect(self) -> list[Metric]:
        counts, (items, failing, oldest) = self._uploads.counts, self._statistics
        age = 0.0 if oldest is None else max(time.time() - oldest, 0.0)
        answers = float(self._uploads.target_answers)
        return [
            GaugeMetricFamily("harmonia_watch_queued_paths", "Store paths in the queue.", items),
            GaugeMetricFamily("harmonia_watch_failing_paths", "Queued paths that failed at least once.", failing),
            GaugeMetricFamily("harmonia_watch_oldest_seconds", "Age of the oldest queued path.", age),
            GaugeMetricFamily("harmonia_watch_target_up", "1 if the target takes uploads, otherwise 0.", answers),
            CounterMetricFamily("harmonia_watch_uploaded_paths", "Queued paths uploaded.", counts["uploaded"]),
            CounterMetricFamily(
                "harmonia_watch_collected_paths", "Queued paths garbage-collected.", counts["collected"]
            ),
            CounterMetricFamily("harmonia_watch_failures", "Failed attempts to upload a path.", counts["failed"]),
            CounterMetricFamily("harmonia_watch_uploaded_nars", "NARs sent.", self._uploader.uploaded_nars),
            CounterMetricFamily("harmonia_watch_uploaded_bytes", "Bytes of NARs sent.", self._uploader.uploaded_bytes),
        ]
