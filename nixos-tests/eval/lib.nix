# Subset of nixpkgs' `lib` that module.nix, package.nix, flake.nix and the tests use, for machines without nixpkgs.
# Names and behaviour are those of the nixpkgs manual. The module system is in ./modules.nix.
let
  inherit (builtins)
    attrNames
    concatLists
    concatMap
    elem
    elemAt
    filter
    foldl'
    genList
    head
    isAttrs
    isList
    isString
    length
    listToAttrs
    mapAttrs
    match
    removeAttrs
    replaceStrings
    stringLength
    substring
    tail
    ;

  lib = rec {
    inherit (builtins)
      all
      any
      attrNames
      attrValues
      compareVersions
      concatLists
      concatMap
      concatStringsSep
      elem
      elemAt
      filter
      foldl'
      fromJSON
      functionArgs
      genList
      head
      isAttrs
      isBool
      isInt
      isList
      isPath
      isString
      length
      listToAttrs
      mapAttrs
      match
      pathExists
      readDir
      readFile
      removeAttrs
      replaceStrings
      stringLength
      substring
      tail
      toJSON
      ;

    id = x: x;
    const = x: _: x;
    fix =
      f:
      let
        x = f x;
      in
      x;
    isFunction = f: builtins.isFunction f || (isAttrs f && f ? __functor);
    min = a: b: if a < b then a else b;
    max = a: b: if a > b then a else b;
    toInt = builtins.fromJSON;
    boolToString = b: if b then "true" else "false";
    importJSON = path: builtins.fromJSON (builtins.readFile path);
    warn = message: builtins.trace "warning: ${message}";

    # Lists
    optional = condition: x: if condition then [ x ] else [ ];
    optionals = condition: xs: if condition then xs else [ ];
    toList = x: if isList x then x else [ x ];
    last = xs: elemAt xs (length xs - 1);
    imap0 = f: xs: genList (n: f n (elemAt xs n)) (length xs);
    imap1 = f: imap0 (n: f (n + 1));
    range = from: to: if from > to then [ ] else genList (n: from + n) (to - from + 1);
    unique = foldl' (seen: x: if elem x seen then seen else seen ++ [ x ]) [ ];
    flatten = x: if isList x then concatMap flatten x else [ x ];
    subtractLists = those: filter (x: !(elem x those));
    findFirst =
      wanted: default: xs:
      let
        found = filter wanted xs;
      in
      if found == [ ] then default else head found;

    # Attribute sets
    nameValuePair = name: value: { inherit name value; };
    genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
    mapAttrs' = f: set: listToAttrs (map (name: f name set.${name}) (attrNames set));
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    filterAttrs =
      wanted: set: removeAttrs set (filter (name: !(wanted name set.${name})) (attrNames set));
    concatMapAttrs = f: set: foldl' (merged: more: merged // more) { } (mapAttrsToList f set);
    mergeAttrsList = foldl' (merged: more: merged // more) { };
    optionalAttrs = condition: set: if condition then set else { };
    getAttrFromPath = path: set: foldl' (found: name: found.${name}) set path;
    attrByPath =
      path: default: set:
      if path == [ ] then
        set
      else if isAttrs set && set ? ${head path} then
        attrByPath (tail path) default set.${head path}
      else
        default;
    hasAttrByPath =
      path: set: path == [ ] || (set ? ${head path} && hasAttrByPath (tail path) set.${head path});
    setAttrByPath =
      path: value: if path == [ ] then value else { ${head path} = setAttrByPath (tail path) value; };
    recursiveUpdate =
      old: new:
      old
      // mapAttrs (
        name: value:
        if isAttrs value && isAttrs (old.${name} or null) then recursiveUpdate old.${name} value else value
      ) new;
    isDerivation = x: isAttrs x && x.type or null == "derivation";

    # Strings
    optionalString = condition: s: if condition then s else "";
    concatStrings = builtins.concatStringsSep "";
    concatMapStrings = f: xs: concatStrings (map f xs);
    concatMapStringsSep =
      separator: f: xs:
      builtins.concatStringsSep separator (map f xs);
    concatLines = concatMapStrings (line: line + "\n");
    hasPrefix = prefix: s: substring 0 (stringLength prefix) s == prefix;
    hasSuffix =
      suffix: s:
      stringLength s >= stringLength suffix
      && substring (stringLength s - stringLength suffix) (-1) s == suffix;
    hasInfix = infix: s: replaceStrings [ infix ] [ "" ] s != s;
    removePrefix = prefix: s: if hasPrefix prefix s then substring (stringLength prefix) (-1) s else s;
    removeSuffix =
      suffix: s: if hasSuffix suffix s then substring 0 (stringLength s - stringLength suffix) s else s;
    escapeRegex =
      let
        special = [
          "\\"
          "^"
          "$"
          "."
          "|"
          "?"
          "*"
          "+"
          "("
          ")"
          "["
          "]"
          "{"
          "}"
        ];
      in
      replaceStrings special (map (c: "\\" + c) special);
    splitString = separator: s: filter isString (builtins.split (escapeRegex separator) s);
    escapeShellArg =
      arg:
      let
        s = toString arg;
      in
      if match "[[:alnum:],._+:@%/-]+" s != null then s else "'${replaceStrings [ "'" ] [ "'\\''" ] s}'";
    escapeShellArgs = concatMapStringsSep " " escapeShellArg;
    versionAtLeast = a: b: builtins.compareVersions a b >= 0;
    versionOlder = a: b: builtins.compareVersions a b < 0;
    sanitizeDerivationName =
      s:
      concatMapStrings (part: if isString part then part else "-") (
        builtins.split "[^[:alnum:]+._?=-]+" (removePrefix "." (builtins.unsafeDiscardStringContext s))
      );
    strings = { inherit sanitizeDerivationName; };

    # Packages
    makeSearchPath = sub: packages: concatMapStringsSep ":" (package: "${package}/${sub}") packages;
    makeBinPath = makeSearchPath "bin";
    getBin = package: package;
    getExe = package: "${package}/bin/${package.meta.mainProgram or package.pname}";
    getExe' = package: name: "${package}/bin/${name}";
    callPackageWith =
      all: file: args:
      let
        f = if isFunction file then file else import file;
      in
      f (builtins.intersectAttrs (builtins.functionArgs f) all // args);
    composeManyExtensions =
      overlays: final: prev:
      foldl' (all: overlay: all // overlay final (prev // all)) { } overlays;
    licenses = genAttrs [ "mit" ] (spdxId: {
      inherit spdxId;
    });
    platforms = genAttrs [ "all" "linux" "unix" ] (_: [
      "x86_64-linux"
      "aarch64-linux"
    ]);
    systems.elaborate = system: {
      inherit system;
      isLinux = true;
      isDarwin = false;
    };

    # The result is the same; filters on files are ignored here.
    fileset = {
      toSource = { root, ... }: root;
      unions = id;
      maybeMissing = id;
      fileFilter = _: id;
      intersection = _: id;
      difference = kept: _: kept;
    };
  }
  // import ./modules.nix lib;
in
lib
