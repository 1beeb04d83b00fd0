"""Narinfos that every Nix accepts, and narinfos that every Nix rejects. Tests with real Nix check this."""

from harmonia.nix import base32

# Written by Nix 2.8. The key is for tests only.
GOLDEN = """\
StorePath: /nix/store/1dvdsyn9d7z6wfrkpxw28nj59kflfxyz-top-1.0
URL: nar/1mx17j51kwn7kb7rf1fgm5cr9sk8lyrl69f9brqa4d02bn2gjaj6.nar
Compression: none
FileHash: sha256:1mx17j51kwn7kb7rf1fgm5cr9sk8lyrl69f9brqa4d02bn2gjaj6
FileSize: 5000768
NarHash: sha256:1mx17j51kwn7kb7rf1fgm5cr9sk8lyrl69f9brqa4d02bn2gjaj6
NarSize: 5000768
References: 1dvdsyn9d7z6wfrkpxw28nj59kflfxyz-top-1.0 pays67jzjqfi6vmvngybskaiqsww24a0-dep-1.0
Deriver: 0cbibmsh8gdw1fwnjvh2n9fghv0ggxfk-top-1.0.drv
Sig: test-1:33AouZhAz8/7tSw1acMeA3zZG7zB+rupulnk/vDUbRs69Y+xHqOxTDVfGjZ/L2sxnSArc8OEfwKH+KGEz8ZlBA==
"""
PATH = "/nix/store/1dvdsyn9d7z6wfrkpxw28nj59kflfxyz-top-1.0"
_DIGEST = base32.decode("1mx17j51kwn7kb7rf1fgm5cr9sk8lyrl69f9brqa4d02bn2gjaj6")
_DEP = "pays67jzjqfi6vmvngybskaiqsww24a0-dep-1.0"


def changed(name: str, *lines: str) -> str:
    """Return the golden narinfo with these lines instead of the line with that name."""
    return "".join(
        "".join(f"{new}\n" for new in lines) if line.startswith(f"{name}:") else f"{line}\n"
        for line in GOLDEN.splitlines()
    )


def added(*lines: str) -> str:
    return GOLDEN + "".join(f"{line}\n" for line in lines)


ACCEPTED = {
    "golden": GOLDEN,
    "unknown fields": added("Unknown: x", "System: x86_64-linux", "Nix-Link: a:b: c", ": ", "X: "),
    "line without a colon": changed("Deriver", "no colon here", "swallowed: yes"),
    "character after the colon": changed("URL", "URL:xnar/x.nar"),
    "StorePath not canonical": changed("StorePath", f"StorePath: //nix/./x/../store//{PATH[11:]}/"),
    "URL long": changed("URL", "URL: nar/" + "x" * 9000),
    "URL not ASCII": changed("URL", "URL: nar/ü.nar"),
    "URL with a query": changed("URL", "URL: nar/x.nar?hash=abc&x=%20#f"),
    "compression absent": changed("Compression"),
    "compression empty": changed("Compression", "Compression: "),
    "FileHash absent": changed("FileHash"),
    "FileHash sha512": changed("FileHash", "FileHash: sha512:" + "0" * 103),
    "FileHash md5 in base 16": changed("FileHash", "FileHash: md5:" + "aB" * 16),
    "FileHash SRI without padding": changed("FileHash", "FileHash: sha256-" + "A" * 43),
    "FileSize absent": changed("FileSize"),
    "FileSize 0": changed("FileSize", "FileSize: 0"),
    "FileSize 64 bits": changed("FileSize", f"FileSize: {(1 << 64) - 1}"),
    "NarHash base 16": changed("NarHash", f"NarHash: sha256:{_DIGEST.hex()}"),
    "NarSize twice": changed("NarSize", "NarSize: 1", "NarSize: 2"),
    "NarSize plus": changed("NarSize", "NarSize: +7"),
    "NarSize leading zeros": changed("NarSize", "NarSize: " + "0" * 30 + "7"),
    "references absent": changed("References"),
    "references empty": changed("References", "References: "),
    "references spaced": changed("References", f"References:   {_DEP}  {_DEP} "),
    "references twice, first empty": changed("References", "References: ", f"References: {_DEP}"),
    "deriver absent": changed("Deriver"),
    "deriver unknown": changed("Deriver", "Deriver: unknown-deriver"),
    "deriver not a derivation": changed("Deriver", f"Deriver: {_DEP}"),
    "Sig absent": changed("Sig"),
    "Sig odd beside a good one": added("Sig: odd-1:YQ=="),
    "CA empty": added("CA: "),
    "CA empty, then one": added("CA: ", f"CA: text:sha256:{_DIGEST.hex()}"),
    "CA text": added(f"CA: text:sha256:{base32.encode(_DIGEST)}"),
    "CA flat": added("CA: fixed:sha1:" + "0" * 32),
    "CA flat md5": added("CA: fixed:md5:" + "0" * 26),
    "CA recursive base 16": added("CA: fixed:r:sha512:" + "0" * 128),
    "CA recursive base 64": added("CA: fixed:r:sha256:" + "A" * 43 + "="),
}
"""Accepted narinfos by their peculiarity."""

REJECTED = {
    "empty": "",
    "no newline at the end": GOLDEN[:-1],
    "CRLF": GOLDEN.replace("\n", "\r\n"),
    "empty line at the end": GOLDEN + "\n",
    "empty line before NarHash": changed("NarHash", "", f"NarHash: sha256:{_DIGEST.hex()}"),
    "StorePath absent": changed("StorePath"),
    "StorePath empty": changed("StorePath", "StorePath: "),
    "StorePath elsewhere": changed("StorePath", f"StorePath: /gnu/store/{PATH[11:]}"),
    "StorePath deeper": changed("StorePath", f"StorePath: {PATH}/bin"),
    "StorePath relative": changed("StorePath", f"StorePath: {PATH[1:]}"),
    "StorePath is no store path": changed("StorePath", "StorePath: /nix/store/top-1.0"),
    "URL absent": changed("URL"),
    "URL empty": changed("URL", "URL: "),
    "FileHash empty": changed("FileHash", "FileHash: "),
    "FileHash without algorithm": changed("FileHash", f"FileHash: {base32.encode(_DIGEST)}"),
    "FileHash short": changed("FileHash", "FileHash: sha256:" + "0" * 51),
    "FileHash of no digits": changed("FileHash", "FileHash: sha256:" + "e" * 52),
    "FileHash unknown algorithm": changed("FileHash", "FileHash: sha3:" + "0" * 52),
    "FileSize empty": changed("FileSize", "FileSize: "),
    "FileSize with a unit": changed("FileSize", "FileSize: 12K"),
    "FileSize negative": changed("FileSize", "FileSize: -1"),
    "FileSize 65 bits": changed("FileSize", f"FileSize: {1 << 64}"),
    "FileSize with a space": changed("FileSize", "FileSize:  12"),
    "FileSize other digits": changed("FileSize", "FileSize: \u0661\u0662"),
    "FileSize underscore": changed("FileSize", "FileSize: 1_000"),
    "NarHash absent": changed("NarHash"),
    "NarHash empty": changed("NarHash", "NarHash: "),
    "NarHash without algorithm": changed("NarHash", f"NarHash: {base32.encode(_DIGEST)}"),
    "NarHash too large for base 32": changed("NarHash", "NarHash: sha256:" + "z" * 52),
    "NarSize absent": changed("NarSize"),
    "NarSize 0": changed("NarSize", "NarSize: 0"),
    "NarSize with junk": changed("NarSize", "NarSize: 12x"),
    "NarSize negative": changed("NarSize", "NarSize: -1"),
    "NarSize long": changed("NarSize", "NarSize: " + "9" * 5000),
    "References without a space": changed("References", "References:"),
    "References short": changed("References", "References: a"),
    "References in full": changed("References", f"References: /nix/store/{_DEP}"),
    "References twice": changed("References", f"References: {_DEP}", f"References: {_DEP}"),
    "References with a tab": changed("References", f"References: {_DEP}\t{_DEP}"),
    "Deriver empty": changed("Deriver", "Deriver: "),
    "Deriver in full": changed("Deriver", f"Deriver: {PATH}.drv"),
    "CA without hash": added("CA: text"),
    "CA of no kind": added("CA: x:sha256:" + "0" * 52),
    "CA malformed hash": added("CA: fixed:r:sha256:x"),
    "CA unknown algorithm": added("CA: fixed:r:sha0:" + "0" * 52),
    "CA SRI": added("CA: fixed:r:sha256-" + "A" * 43 + "="),
    "CA twice": added(*["CA: fixed:sha1:" + "0" * 32] * 2),
}

UNUSABLE = {
    "Compression unknown": changed("Compression", "Compression: rot13"),
    "NarHash sha1": changed("NarHash", "NarHash: sha1:" + "0" * 32),
    "URL with control characters": changed("URL", "URL: a\x01b"),
    "URL endless": changed("URL", "URL: " + "x" * 70_000),
    "CA text with sha1": added("CA: text:sha1:" + "0" * 32),
}
"""Narinfos that some versions of Nix accept, but whose NAR they cannot use."""
