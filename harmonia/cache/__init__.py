"""Cache of NAR files on disk: zstd frames, single-flight fills, LRU eviction."""
