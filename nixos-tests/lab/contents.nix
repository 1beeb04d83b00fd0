# Derivations that a machine builds during the test. Their outputs have random bytes, so they exist on no other machine.
# They refer only to each other, so a client needs no other paths.
{ bash, coreutils }:
let
  build =
    name: attributes: script:
    derivation (
      attributes
      // {
        inherit name;
        system = builtins.currentSystem;
        builder = "${bash}/bin/bash";
        PATH = "${coreutils}/bin";
        # "exit" keeps bash from running the last command by exec: coreutils close their output before they exit, and
        # Nix kills a builder that closes its output.
        args = [
          "-euc"
          "${script}exit"
        ];
      }
    );
in
rec {
  greeting = build "greeting" { } ''
    echo "building a greeting"
    echo "hello $(head -c 16 /dev/urandom | base64)" >$out
  '';

  hello = build "hello" { inherit greeting; } ''
    mkdir -p $out/bin
    printf '#!/bin/sh\nexec cat %s\n' $greeting >$out/bin/hello
    chmod +x $out/bin/hello
  '';

  names = build "names" { } ''
    mkdir $out
    head -c 16 /dev/urandom | base64 >$out/grüße-日本-😀
    head -c 16 /dev/urandom | base64 >"$out/$(printf 'not-UTF-8-\377\376')"
    echo >"$out/with space & 100%"
  '';

  # 7 MB that compress well.
  text = build "text" { } ''
    mkdir $out
    head -c 16 /dev/urandom | base64 >$out/id
    seq 1000000 >$out/numbers
  '';

  # 40 MiB that do not compress.
  noise = build "noise" { } ''
    head -c 41943040 /dev/urandom >$out
  '';

  # A floating content-addressed derivation: its output path is unknown before the build.
  floating =
    build "floating"
      {
        __contentAddressed = true;
        outputHashMode = "recursive";
        outputHashAlgo = "sha256";
      }
      ''
        head -c 16 /dev/urandom | base64 >$out
      '';
}
