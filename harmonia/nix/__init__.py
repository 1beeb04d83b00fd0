"""The facts of Nix, pure and sync: formats and names, with no server and no event loop anywhere near."""
