"""The local Nix store, read-only: database, files, build logs, publish policy, temporary GC roots."""
