# A small module system with the interface of nixpkgs' one: options, types, priorities, submodules, renamed options.
# Never stricter than nixpkgs, sometimes laxer; a real `nix flake check` reports the difference. Definitions are evaluated
# lazily, so a module can read any part of `config`.
lib:
let
  inherit (builtins)
    all
    attrNames
    concatMap
    elem
    filter
    foldl'
    functionArgs
    head
    isAttrs
    isList
    isPath
    isString
    length
    listToAttrs
    mapAttrs
    match
    ;
  inherit (lib)
    findFirst
    genAttrs
    getAttrFromPath
    isDerivation
    isFunction
    last
    nameValuePair
    optional
    optionals
    setAttrByPath
    toList
    unique
    ;

  kind = value: if isAttrs value then value._type or "" else "";
  isOption = value: kind value == "option";
  showOption = builtins.concatStringsSep ".";

  # The part of a definition, not evaluated yet, for one attribute; and the attributes that a definition has.
  below =
    name: value:
    {
      "if" = map (mkIf value.condition) (below name value.content);
      merge = concatMap (below name) value.contents;
      override = map (mkOverride value.priority) (below name value.content);
      order = map (mkOrder value.order) (below name value.content);
    }
    .${kind value} or (optional (value ? ${name}) value.${name});
  namesIn =
    value:
    if kind value == "merge" then
      concatMap namesIn value.contents
    else if kind value == "if" then
      optionals value.condition (namesIn value.content)
    else if
      elem (kind value) [
        "override"
        "order"
      ]
    then
      namesIn value.content
    else
      attrNames value;

  # Plain values in a definition, each with its priority and order.
  discharge =
    priority: order: value:
    {
      "if" = optionals value.condition (discharge priority order value.content);
      merge = concatMap (discharge priority order) value.contents;
      override = discharge value.priority order value.content;
      order = discharge priority value.order value.content;
    }
    .${kind value} or [ { inherit priority order value; } ];

  # Values with the best priority, in order.
  decide =
    default: definitions:
    let
      given = concatMap (discharge 100 1000) definitions;
      candidates = given ++ concatMap (discharge 1500 1000) default;
      best = foldl' lib.min 10000 (map (d: d.priority) candidates);
    in
    map (d: d.value) (
      builtins.sort (a: b: a.order < b.order) (filter (d: d.priority == best) candidates)
    );

  mergeTyped =
    loc: type: values:
    if all type.check values then
      type.merge loc values
    else
      throw "A definition for option `${showOption loc}' is not of type `${type.description}'.";

  evalOption =
    loc: option: definitions:
    let
      type = option.type or types.anything;
      values = decide (optional (option ? default) option.default) definitions;
    in
    (option.apply or lib.id) (
      if values != [ ] then
        mergeTyped loc type values
      else if type ? emptyValue then
        type.emptyValue
      else
        throw "The option `${showOption loc}' is used but not defined."
    );

  evalTree =
    loc: freeform: tree: definitions:
    let
      free = filter (name: !(tree ? ${name}) && name != "_module") (
        unique (concatMap namesIn definitions)
      );
      at = name: f: f (loc ++ [ name ]) (concatMap (below name) definitions);
    in
    (
      if freeform == null then
        { }
      else
        genAttrs free (name: at name (inner: evalOption inner { type = freeform.nested or freeform; }))
    )
    // mapAttrs (
      name: option:
      at name (inner: if isOption option then evalOption inner option else evalTree inner null option)
    ) tree;

  undeclared =
    loc: tree: definitions:
    concatMap (
      name:
      if name == "_module" || isOption (tree.${name} or null) then
        [ ]
      else if !(tree ? ${name}) then
        [ (showOption (loc ++ [ name ])) ]
      else
        undeclared (loc ++ [ name ]) tree.${name} (concatMap (below name) definitions)
    ) (unique (concatMap namesIn definitions));

  # Options with their definitions, which are not evaluated here.
  withDefinitions =
    tree: definitions:
    mapAttrs (
      name: option:
      let
        inner = concatMap (below name) definitions;
      in
      if isOption option then
        option
        // {
          definitions = inner;
          isDefined = concatMap (discharge 100 1000) inner != [ ];
        }
      else
        withDefinitions option inner
    ) tree;

  mergeTrees =
    a: b:
    if isOption a || isOption b then
      a // b
    else
      a // mapAttrs (name: value: if a ? ${name} then mergeTrees a.${name} value else value) b;

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      known = {
        inherit lib config;
        options = withDefinitions options definitions;
      }
      // specialArgs;
      fromModules = foldl' (set: more: set // more) { } (
        concatMap (value: concatMap (below "args") (below "_module" value)) definitions
      );
      call =
        f:
        let
          wanted = functionArgs f;
          given = name: known.${name} or (fromModules.${name} or (throw "no module argument `${name}'"));
        in
        f (if wanted == { } then known else mapAttrs (name: _: given name) wanted);
      load = foldl' (
        loaded: module:
        let
          key = if isPath module || isString module then toString module else null;
          file = if key != null then import module else module;
          value = if isFunction file then call file else file;
          withImports = load {
            seen = loaded.seen ++ optional (key != null) key;
            inherit (loaded) modules;
          } (value.imports or [ ]);
        in
        if key != null && elem key loaded.seen then
          loaded
        else
          {
            inherit (withImports) seen;
            modules = withImports.modules ++ [
              {
                options = value.options or { };
                freeformType = value.freeformType or null;
                config =
                  value.config or (
                    if value ? options then
                      { }
                    else
                      removeAttrs value [
                        "imports"
                        "disabledModules"
                        "freeformType"
                        "_file"
                      ]
                  );
              }
            ];
          }
      );
      loaded =
        (load {
          seen = [ ];
          modules = [ ];
        } modules).modules;
      definitions = map (module: module.config) loaded;
      options = foldl' mergeTrees { } (map (module: module.options) loaded);
      freeform = findFirst (type: type != null) null (map (module: module.freeformType) loaded);
      config = evalTree prefix freeform options definitions;
      unknown = optionals (freeform == null) (undeclared prefix options definitions);
    in
    {
      inherit options freeform;
      config = if unknown == [ ] then config else throw "The option `${head unknown}' does not exist.";
    };

  mkOption = attributes: attributes // { _type = "option"; };
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkOrder = order: content: {
    _type = "order";
    inherit order content;
  };

  type = name: description: check: merge: {
    _type = "option-type";
    inherit
      name
      description
      check
      merge
      ;
  };
  same =
    loc: values:
    if all (value: value == head values) values then
      head values
    else
      throw "The option `${showOption loc}' has conflicting definitions.";
  # Unlike `anything` in nixpkgs, which treats lists like other leaves, this concatenates lists.
  deep =
    loc: values:
    if all isList values then
      builtins.concatLists values
    else if all (value: isAttrs value && !(isDerivation value)) values then
      genAttrs (unique (concatMap namesIn values)) (
        name: deep (loc ++ [ name ]) (decide [ ] (concatMap (below name) values))
      )
    else
      same loc values;
  integer =
    description: check: type "int" description (value: builtins.isInt value && check value) same;

  types = rec {
    anything = type "anything" "anything" (_: true) deep;
    unspecified = anything;
    raw = type "raw" "raw value" (_: true) same;
    attrs = type "attrs" "attribute set" isAttrs deep;
    bool = type "bool" "boolean" builtins.isBool same;
    int = integer "signed integer" (_: true);
    float = type "float" "floating point number" builtins.isFloat same;
    number = either int float;
    ints = {
      unsigned = integer "unsigned integer, meaning >=0" (value: value >= 0);
      positive = integer "positive integer, meaning >0" (value: value > 0);
      between =
        low: high:
        integer "integer between ${toString low} and ${toString high} (both inclusive)" (
          value: value >= low && value <= high
        );
    };
    port = ints.between 0 65535;
    str = type "str" "string" isString same;
    singleLineStr = str;
    strMatching =
      pattern:
      type "strMatching" "string matching the pattern ${pattern}" (
        value: isString value && match pattern value != null
      ) same;
    lines = type "lines" "strings concatenated with \"\\n\"" isString (
      _: builtins.concatStringsSep "\n"
    );
    path = type "path" "absolute path" (
      value: isPath value || isDerivation value || (isString value && lib.hasPrefix "/" value)
    ) same;
    package = type "package" "package" (
      value: isDerivation value || (isString value && lib.hasPrefix "/nix/store/" value)
    ) same;
    enum =
      words:
      type "enum" "one of ${lib.concatMapStringsSep ", " builtins.toJSON words}" (
        value: elem value words
      ) same;
    nullOr =
      inner:
      type "nullOr" "null or ${inner.description}" (value: value == null || inner.check value) (
        loc: values:
        if all (value: value == null) values then null else inner.merge loc (filter (v: v != null) values)
      )
      // {
        emptyValue = null;
      };
    listOf =
      inner:
      type "listOf" "list of ${inner.description}" isList (
        loc: values:
        map (value: mergeTyped loc inner [ value ]) (
          concatMap (list: concatMap (item: map (d: d.value) (discharge 100 1000 item)) list) values
        )
      )
      // {
        emptyValue = [ ];
      };
    attrsOf =
      inner:
      type "attrsOf" "attribute set of ${inner.description}" isAttrs (
        loc: values:
        listToAttrs (
          concatMap (
            name:
            let
              found = decide [ ] (concatMap (below name) values);
            in
            optional (found != [ ]) (nameValuePair name (mergeTyped (loc ++ [ name ]) inner found))
          ) (unique (concatMap namesIn values))
        )
      )
      // {
        emptyValue = { };
        nested = inner;
      };
    either =
      a: b:
      type "either" "${a.description} or ${b.description}" (value: a.check value || b.check value) (
        loc: values:
        if all a.check values then
          a.merge loc values
        else if all b.check values then
          b.merge loc values
        else
          same loc values
      );
    oneOf = list: foldl' either (head list) (builtins.tail list);
    coercedTo =
      from: change: to:
      type "coercedTo" to.description (value: from.check value || to.check value) (
        loc: values: to.merge loc (map (value: if from.check value then change value else value) values)
      );
    submodule = module: submoduleWith { modules = toList module; };
    submoduleWith =
      {
        modules,
        specialArgs ? { },
        ...
      }:
      let
        eval =
          loc: values:
          evalModules {
            modules = modules ++ map (value: if isFunction value then value else { config = value; }) values;
            specialArgs = specialArgs // {
              name = last loc;
            };
            prefix = loc;
          };
      in
      type "submodule" "submodule" (value: isAttrs value || isFunction value) (
        loc: values: (eval loc values).config
      )
      // {
        emptyValue = { };
        getSubOptions = loc: (eval loc [ ]).options;
      };
  };
in
{
  inherit
    evalModules
    isOption
    mkIf
    mkMerge
    mkOption
    mkOrder
    mkOverride
    showOption
    types
    ;
  mkOptionDefault = mkOverride 1500;
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  mkVMOverride = mkOverride 10;
  mkBefore = mkOrder 500;
  mkAfter = mkOrder 1500;
  mkEnableOption =
    what:
    mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether to enable ${what}.";
    };
  literalExpression = text: {
    _type = "literalExpression";
    inherit text;
  };
  literalMD = text: {
    _type = "literalMD";
    inherit text;
  };
  # Alias of an option: a definition of the alias defines `to`.
  doRename =
    {
      from,
      to,
      visible,
      warn,
      use,
    }:
    { config, options, ... }:
    let
      given = getAttrFromPath from options;
    in
    {
      options = setAttrByPath from (mkOption {
        inherit visible;
        apply = _: use (getAttrFromPath to config);
      });
      config = lib.recursiveUpdate (setAttrByPath to (mkIf given.isDefined (mkMerge given.definitions))) {
        warnings = optional (
          warn && given.isDefined
        ) "The option `${showOption from}' has been renamed to `${showOption to}'.";
      };
    };
}
