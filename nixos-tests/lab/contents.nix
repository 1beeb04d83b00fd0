# What a machine builds itself while the test runs, with random bytes in it: it can be nowhere else. Its parts refer to
# each other alone, so that a client needs nothing but what it is served.
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
        # What bash is done with, it becomes; and coreutils close their output before they end, on which Nix kills them.
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

  # Content-addressed by the derivation's choice: where it lies is not known before it is built.
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
