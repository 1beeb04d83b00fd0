# Store objects of every shape that a NAR can hold, built by /bin/sh alone.
let
  system = builtins.currentSystem;
  build =
    name: extra: script:
    derivation (
      {
        inherit name system;
        builder = "/bin/sh";
        args = [
          "-euc"
          ''
            echo "building $name"
            ${script}
          ''
        ];
        PATH = "/usr/bin:/bin";
        LC_ALL = "C";
      }
      // extra
    );
in
rec {
  dep = build "dep-1.0" { } ''
    mkdir -p $out/bin
    printf '#!/bin/sh\necho dep\n' > $out/bin/dep
    chmod +x $out/bin/dep
  '';

  # Everything at once; refers to dep and to itself.
  tree = build "tree-1.0" { } ''
    mkdir -p $out/bin $out/empty-dir
    cd $out
    printf '#!/bin/sh\nexec ${dep}/bin/dep\n' > bin/tree
    chmod +x bin/tree
    echo $out > self
    : > empty
    : > empty-executable
    chmod +x empty-executable
    seq 1 400000 > big

    ln -s bin/tree relative
    ln -s ${dep}/bin/dep absolute
    ln -s nowhere/at/all dangling
    ln bin/tree hard-link

    mkdir padding
    for size in 1 7 8 9; do
      head -c $size /dev/zero > padding/$size
    done

    # Nix 2.34.7 and later accept fewer than 64 levels.
    deep=deep
    for level in $(seq 58); do
      deep=$deep/$level
    done
    mkdir -p $deep
    echo bottom > $deep/bottom

    # NARs sort names by bytes, and "a" does not sort as "a/".
    mkdir sort sort/a sort/a.d
    touch sort/a/z sort/a.d/z sort/a.b sort/a-b sort/a0 sort/a_b sort/A sort/B sort/aa 'sort/a b' sort/a+b sort/~ sort/é

    mkdir names
    touch "names/$(printf '\377\376 not UTF-8')" "names/$(printf '\355\240\200 surrogate')"
    touch "names/$(printf 'new\nline')" "names/$(printf 'control\001\033\177')"
    touch names/ünï-日本-😀 "names/$(printf 'e\314\201')" "names/$(printf '\303\251')"
    touch 'names/"quote"' 'names/back\slash' 'names/per%2Fcent' 'names/q?a=b&c#d' 'names/<i>' names/.hidden names/... 'names/ space '
    touch names/$(printf %0255d 0) names/README names/readme
  '';

  # Roots that are no directories, or have nothing in them.
  empty-dir = build "empty-dir-1.0" { } "mkdir $out";
  empty-file = build "empty-file-1.0" { } ": > $out";
  file = build "file-1.0" { } "echo ${dep} > $out";
  program = build "program-1.0" { } "printf '#!/bin/sh\necho program\n' > $out; chmod +x $out";
  link = build "link-1.0" { } "ln -s ${dep}/bin $out";

  multi =
    build "multi-1.0"
      {
        outputs = [
          "out"
          "dev"
        ];
      }
      ''
        mkdir $out $dev
        echo $out > $dev/out
      '';
  multi-dev = multi.dev;

  # Refers to all of the above.
  top = build "top-1.0" { } ''
    mkdir $out
    cd $out
    ln -s ${tree} ${empty-dir} ${empty-file} ${file} ${program} ${link} ${multi.dev} .
  '';

  # Content-addressed by its derivation's choice: has a realisation.
  floating =
    build "floating-1.0"
      {
        __contentAddressed = true;
        outputHashMode = "recursive";
        outputHashAlgo = "sha256";
      }
      ''
        mkdir $out
        echo $out > $out/self
      '';
}
