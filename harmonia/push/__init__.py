"""Push: `nix copy --to` into the local store, through the Nix daemon, as a user that the daemon need not trust."""
