"""`[zstd]`: options of zstd compression."""

from typing import Annotated

import msgspec
from msgspec import Meta

from harmonia.config import value_types
from harmonia.config.value_types import Count, WindowLog
from harmonia.config.wrong_setting import check_values


class Zstd(msgspec.Struct, frozen=True, kw_only=True):
    level: Annotated[
        int, Meta(ge=-7, le=22, description="Higher levels are slower and compress more; 0 is libzstd's default (3).")
    ] = 3
    long_distance_matching: Annotated[
        bool, Meta(description="Find repetitions that are far apart. Needs four times the memory.")
    ] = False
    window_log: Annotated[
        WindowLog,
        Meta(
            description="log2 of the match window in bytes; 0 is the default of the level, or 25 (32 MiB) with"
            " `long_distance_matching`. NARs are compressed in pieces of this size, but at least 8 MiB."
        ),
    ] = 0
    max_ldm_encoders_per_worker: Annotated[
        Count, Meta(description="Threads of each worker that compress with `long_distance_matching`; 0 is one per CPU.")
    ] = 16

    def __post_init__(self) -> None:
        check_values(value_types.check_window_log, [self.window_log], "zstd", "window_log")
