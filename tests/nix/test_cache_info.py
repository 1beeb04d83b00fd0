"""`nix-cache-info` is parsed like by Nix."""

from harmonia.nix.cache_info import parse


def test_values_are_trimmed_and_the_last_one_counts() -> None:
    text = b"StoreDir: /nix/store\r\nPriority:10\nPriority: 30\n indented: 1\nno colon\n\xff: a\n"
    fields = parse(text)
    assert (fields["StoreDir"], fields["Priority"]) == ("/nix/store", "30")
    assert "indented" not in fields
