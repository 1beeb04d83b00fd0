# NixOS module services.harmonia. It replaces the module of that name in nixpkgs, and accepts its configurations.
# The options below `settings` come from nix/module-settings.json, which is generated from harmonia/config.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:
let
  cfg = config.services.harmonia;
  inherit (lib) mkOption types;
  format = pkgs.formats.toml { };
  # Each known setting is an option. Null values and empty tables are not written, so that Harmonia's default applies.
  keys = lib.recursiveUpdate (lib.importJSON ./nix/module-settings.json) {
    # Never null, because other modules read these, as in nixpkgs. Clients ask cache.nixos.org (priority 40) first.
    bind.nixosDefault = if cfg.nginx.enable then "unix:/run/harmonia/socket" else "[::]:5000";
    priority.nixosDefault = 50;
    workers.nixosDefault = 4;
  };
  given =
    table:
    lib.filterAttrs (_: value: value != null && value != { }) (
      lib.mapAttrs (_: value: if lib.isAttrs value then given value else value) table
    );
  # Copy a path literal to the Nix store, as elsewhere in NixOS.
  file = types.coercedTo types.path (path: "${path}") types.str;
  settingType =
    key:
    {
      bool = types.bool;
      enum = types.enum key.words;
      inherit file;
      files = types.listOf file;
      int = if key.max == null then types.ints.unsigned else types.ints.between key.min key.max;
      number = types.number;
      string = types.str;
      strings = types.listOf types.str;
    }
    .${key.type};
  table =
    key:
    types.submodule {
      freeformType = format.type;
      options = lib.mapAttrs (_: settingOption) key.keys;
    };
  settingOption =
    key:
    if key.type == "table" then
      mkOption {
        type = table key;
        default = { };
        inherit (key) description;
      }
    else if key.type == "tables" then
      mkOption {
        type = types.listOf (table key);
        default = [ ];
        inherit (key) description;
      }
    else if key ? nixosDefault then
      mkOption {
        type = settingType key;
        default = key.nixosDefault;
        inherit (key) description;
      }
    else if key ? default then
      mkOption {
        type = types.nullOr (settingType key);
        default = null;
        description = "${key.description} If null, the default is ${key.default}.";
      }
    else
      mkOption {
        type = settingType key;
        inherit (key) description;
      };

  # systemd listens, so that the service needs no network and a restart refuses no connection. The accepted formats of
  # an address are those of harmonia/config/value_types.py.
  isUnixSocket = bind: builtins.match "(unix:|/).*" bind != null;
  onUnixSocket = isUnixSocket cfg.settings.bind;
  bind =
    if builtins.match "[0-9]+" cfg.settings.bind != null then
      ":${cfg.settings.bind}"
    else if !onUnixSocket && builtins.match "[^][]*:[^][]*:[^][]*" cfg.settings.bind != null then
      "[${cfg.settings.bind}]"
    else
      cfg.settings.bind;
  address = builtins.match "(.*):([0-9]+)" bind;
  host = if address == null then bind else builtins.elemAt address 0;
  port = if address == null then 5000 else lib.toInt (builtins.elemAt address 1);
  onAnyAddress = lib.elem host [
    ""
    "*"
    "[::]"
  ];
  # A location of nginx that passes requests on. `sendfileType` asks Harmonia to let nginx send files itself.
  proxied = proxyPass: sendfileType: {
    inherit proxyPass;
    # The headers are set below, because nginx inherits either all headers or none.
    recommendedProxySettings = false;
    extraConfig = ''
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Host $host;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header X-Sendfile-Type "${sendfileType}";
      # NARs are large: send them to the client as they arrive, without buffering on nginx's disk.
      proxy_buffering off;
      # With larger reads, nginx needs half of the processor time; `proxy_buffers` only has to fit.
      proxy_buffer_size 64k;
      proxy_buffers 4 64k;
      # NARs that are pushed are large as well: pass them on as they arrive.
      ${lib.optionalString pushes ''
        client_max_body_size 0;
        proxy_request_buffering off;
      ''}# A client may pause as long as without nginx (docs/reference/limits.md).
      proxy_read_timeout 1h;
      send_timeout 1h;
    '';
  };
  listenStreams =
    if onUnixSocket then
      [ (lib.removePrefix "//" (lib.removePrefix "unix:" bind)) ]
    # A port alone means IPv6 and IPv4. It also works on a machine without IPv6.
    else if onAnyAddress then
      [ (toString port) ]
    else if host == "localhost" then
      [
        "127.0.0.1:${toString port}"
        "[::1]:${toString port}"
      ]
    else
      [ "${host}:${toString port}" ];

  # systemd replaces `%` and a letter by a value of its own in all unit files.
  escapeSpecifiers = lib.replaceStrings [ "%" ] [ "%%" ];

  # Files that may be readable only to root: systemd reads them, and passes copies to the service.
  credential = credentialOf "harmonia";
  loadCredentials = map (file: "${file.name}:${escapeSpecifiers file.path}");
  credentialOf = service: name: "/run/credentials/${service}.service/${name}";
  withCredentials = withCredentialsOf "harmonia";
  withCredentialsOf =
    service: prefix: keys: values:
    let
      files = lib.filterAttrs (key: _: keys.${key}.type or null == "file") (given values);
    in
    {
      credentials = lib.mapAttrsToList (key: path: {
        name = "${prefix}${key}";
        inherit path;
      }) files;
      settings = given values // lib.mapAttrs (key: _: credentialOf service "${prefix}${key}") files;
    };
  signKeys =
    lib.imap0
      (number: path: {
        name = "sign-key-${toString number}";
        path = "${path}";
      })
      (
        cfg.signKeyPaths
        ++ lib.optional (cfg.signKeyPath != null) cfg.signKeyPath
        ++ lib.optionals (cfg.settings.sign_key_paths != null) cfg.settings.sign_key_paths
        ++ lib.optional (cfg.settings.sign_key_path != null) cfg.settings.sign_key_path
      );
  upstreams = lib.imap0 (
    number: withCredentials "upstream-${toString number}-" keys.upstream.keys
  ) cfg.settings.upstream;
  push = withCredentials "push-" keys.push.keys cfg.settings.push;
  mirror = withCredentials "mirror-" keys.mirror.keys cfg.settings.mirror;
  others = withCredentials "" keys (
    removeAttrs cfg.settings [
      "mirror"
      "push"
      "sign_key_path"
      "sign_key_paths"
      "upstream"
      "watch"
    ]
  );
  credentials =
    signKeys
    ++ lib.concatMap (each: each.credentials) (
      [
        others
        push
        mirror
      ]
      ++ upstreams
    );
  withLists =
    settings: upstream: sign_key_paths:
    settings // lib.filterAttrs (_: list: list != [ ]) { inherit upstream sign_key_paths; };
  settings = withLists (
    others.settings
    // given {
      push = push.settings;
      mirror = mirror.settings;
    }
  ) (map (each: each.settings) upstreams) (map (key: credential key.name) signKeys);
  # For commands outside the service: the original files, and the cache directory of the service.
  settingsOutside = withLists (given (
    removeAttrs cfg.settings [
      "sign_key_path"
      "sign_key_paths"
      "upstream"
    ]
    // {
      cache_dir = "/var/cache/harmonia";
    }
    // lib.optionalAttrs pushes {
      push = cfg.settings.push // {
        state_dir = "/var/lib/harmonia";
      };
    }
  )) (map given cfg.settings.upstream) (map (key: key.path) signKeys);
  inStore = lib.filter (key: lib.hasPrefix "${builtins.storeDir}/" key.path) signKeys;

  # The settings of services that upload, which need neither the other settings of the server nor its credentials.
  uploadSettings =
    service:
    lib.filterAttrs (
      key: _:
      lib.elem key [
        "log_format"
        "log_level"
        "nix_db_path"
        "real_nix_store"
        "virtual_nix_store"
        "zstd"
      ]
    ) (given cfg.settings)
    // lib.optionalAttrs (signKeys != [ ]) {
      sign_key_paths = map (key: credentialOf service key.name) signKeys;
    };
  watch = withCredentialsOf "harmonia-watch" "watch-" keys.watch.keys cfg.settings.watch;
  mirrorOf = service: withCredentialsOf service "mirror-" keys.mirror.keys cfg.settings.mirror;
  # The settings of services that write to the bucket of the mirror, with the rules that they must not break.
  mirrorSettings =
    service:
    given {
      inherit (cfg.settings) publish;
      mirror = (mirrorOf service).settings;
    };
  watchesMirror = cfg.settings.watch.url == "mirror";
  watchSettings =
    uploadSettings "harmonia-watch"
    // lib.optionalAttrs watchesMirror (mirrorSettings "harmonia-watch")
    // {
      watch = watch.settings;
    };
  mirrorJobSettings = uploadSettings "harmonia-mirror" // mirrorSettings "harmonia-mirror";

  mirrorWithoutBucket = "services.harmonia: set settings.mirror.bucket and endpoint to those of the S3 service.";

  pushes = cfg.settings.push.enable == true;

  # An invalid setting fails the build, not the service.
  checked =
    name: settings:
    let
      unchecked = format.generate name settings;
    in
    if pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
      pkgs.runCommand name { passthru = { inherit settings; }; } ''
        ${lib.getExe package} --config ${unchecked} check-config --text-only
        cp ${unchecked} "$out"
      ''
    else
      unchecked;

  # If the store is in a directory that the sandbox hides, the service sees the store read-only, and nothing else there.
  store =
    if cfg.settings.real_nix_store != null then
      cfg.settings.real_nix_store
    else
      cfg.settings.virtual_nix_store;
  storePaths = map (path: escapeSpecifiers (toString path)) (
    lib.optional (store != null) (dirOf store)
    ++ lib.optional (cfg.settings.nix_db_path != null) (dirOf cfg.settings.nix_db_path)
    ++ lib.optional (cfg.settings.log_dir != null) cfg.settings.log_dir
  );
  below =
    directories: path: lib.any (directory: lib.hasPrefix "${directory}/" "${path}/") directories;
  homes = [
    "/home"
    "/root"
    "/run/user"
  ];
  inHomes = lib.filter (below homes) storePaths;
  inTmp = lib.filter (below [
    "/tmp"
    "/var/tmp"
  ]) storePaths;

  # Harmonia itself listens only on metrics_bind, and connects only to upstreams and the bucket of the mirror.
  needsNetwork =
    cfg.settings.metrics_bind != null
    || upstreams != [ ]
    || cfg.settings.mirror.bucket != null
    || hasSiblings;
  # Multicast DNS, UDP port 5353. zeroconf reads the addresses of this machine by AF_NETLINK.
  hasSiblings = cfg.settings.lan.announce == true || asksSiblings cfg.settings.lan.public_keys;
  asksSiblings = publicKeys: publicKeys != null && publicKeys != [ ];
  shutdownGrace = if cfg.settings.shutdown_grace == null then 30 else cfg.settings.shutdown_grace;

  # The Rust Harmonia does not understand these arguments, and would start a server during the build.
  ownPackage = pkgs.callPackage ./package.nix {
    withLan = hasSiblings || asksSiblings accelerate.siblingKeys;
    withS3 = cfg.settings.mirror.bucket != null;
  };
  isRust =
    cfg.package ? cargoDeps
    || cfg.package ? cargoArtifacts
    || cfg.package.meta.mainProgram or "" == "harmonia-cache";
  package = if isRust then ownPackage else cfg.package;

  # The sandbox of all services.
  sandbox = {
    # No capabilities. CAP_DAC_READ_SEARCH would not help with a database that only root can read: SQLite checks
    # with access(2), which ignores the capability, and then opens the database in the wrong mode.
    CapabilityBoundingSet = "";
    AmbientCapabilities = "";
    NoNewPrivileges = true;
    PrivateUsers = true;
    RestrictSUIDSGID = true;
    LockPersonality = true;
    MemoryDenyWriteExecute = true;
    RestrictRealtime = true;
    RestrictNamespaces = true;
    RemoveIPC = true;
    PrivateIPC = true;
    KeyringMode = "private";
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM";
    # setpriority and sched_setscheduler of @resources: compression threads run at a lower priority than request threads,
    # and those of warm = "new" at idle priority.
    SystemCallFilter = [
      "@system-service"
      "~@privileged"
      "~@resources"
      "setpriority"
      "sched_setscheduler"
    ];

    # The store can be anywhere, so there is no RootDirectory and no NoExecPaths. Everything is read-only.
    ProtectSystem = "strict";
    ProtectHome = if inHomes == [ ] then true else "tmpfs";
    BindReadOnlyPaths = inHomes ++ inTmp;
    PrivateTmp = true;
    PrivateMounts = true;
    PrivateDevices = true;
    DevicePolicy = "closed";
    DeviceAllow = "";
    ProcSubset = "pid";
    ProtectProc = "invisible";
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
  };

  # Settings of a service that uploads with the files in `credentials`.
  uploading =
    credentials:
    sandbox
    // {
      # Builds and downloads come first.
      CPUWeight = 20;
      IOWeight = 20;

      # The server's user, to read its cache of compressed NARs.
      DynamicUser = true;
      User = "harmonia";
      Group = "harmonia";
      LoadCredential = loadCredentials (signKeys ++ credentials);
      CacheDirectory = lib.mkIf cfg.enable "harmonia";
      CacheDirectoryMode = lib.mkIf cfg.enable "0700";

      InaccessiblePaths = [ "-/nix/var/nix/daemon-socket" ];
      RestrictAddressFamilies = [
        "AF_UNIX"
        "AF_INET"
        "AF_INET6"
      ];
    };

  # A Harmonia between this machine's Nix and its caches.
  accelerate = cfg.client.accelerate;
  accelerateUrl = "http://127.0.0.1:${toString accelerate.port}";
  accelerateSettings =
    {
      workers = 1;
      # Nix asks the cache with the lowest number first.
      priority = 10;
      idle_exit = accelerate.idleExit;
      upstream_timeout = 5;
      # The store of this machine needs no cache: Nix asks for paths that are not in it.
      daemon_socket = "";
      enable_compression = false;
      debug_info = false;
      landing = false;
      serve_files = false;
      metrics = false;
      upstream = lib.mapAttrsToList (
        url: public_keys:
        { inherit url public_keys; }
        // lib.optionalAttrs (accelerate.netrc != null) {
          netrc = "/run/credentials/harmonia-accelerate.service/netrc";
        }
      ) cfg.client.caches;
    }
    // lib.optionalAttrs (accelerate.cacheSize != null) { cache_size = accelerate.cacheSize; }
    // lib.optionalAttrs (asksSiblings accelerate.siblingKeys) {
      lan.public_keys = accelerate.siblingKeys;
    };

  # Defaults that the user's configuration overrides without mkForce. Lists are concatenated.
  overridable = lib.mapAttrs (_: value: if lib.isList value then value else lib.mkDefault value);
in
{
  disabledModules = [ "services/networking/harmonia.nix" ];

  imports = [ ./nix/compatibility.nix ];

  options.services.harmonia = {
    enable = lib.mkEnableOption "Harmonia, a Nix binary cache that serves this machine's store";

    package = mkOption {
      type = types.package;
      default = ownPackage;
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "Package to run. nixpkgs' `pkgs.harmonia` is the Harmonia written in Rust: it is ignored, with a warning.";
    };

    signKeyPaths = mkOption {
      type = types.listOf types.path;
      default = [ ];
      example = [ "/var/lib/secrets/cache.secret" ];
      description = ''
        Files with the secret keys that sign the served paths, created by `nix-store --generate-binary-cache-key`. They
        can be readable only to root. Keep them out of the Nix store, which is readable to everyone.
      '';
    };

    settings = mkOption {
      type = types.submodule {
        freeformType = format.type;
        options = lib.mapAttrs (_: settingOption) keys;
      };
      default = { };
      example = lib.literalExpression ''
        {
          bind = "[::]:5000";
          priority = 35;
          zstd.level = 6;
        }
      '';
      description = ''
        Settings of docs/reference/configuration.md. They are checked when the system is built.
        The module does not accept `cache_dir`, `push.state_dir`, a unix socket in `metrics_bind`, or a host name
        other than `localhost` in `bind`. Key files named here can
        be readable only to root, like `signKeyPaths`.
      '';
    };

    configFile = mkOption {
      type = types.path;
      default = checked "harmonia.toml" settings;
      defaultText = lib.literalMD "generated from `settings`";
      readOnly = true;
      description = ''
        Settings file of the service. It names the copies of keys and certificates that systemd makes for the service.
        For `harmonia doctor` and other commands, `/etc/harmonia/harmonia.toml` has the same settings with the original
        files.
      '';
    };

    cacheSize = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "50G";
      description = ''
        Maximum size of the compressed NARs in /var/cache/harmonia, the same as `settings.cache_size`. If null, it is half
        of the free space, at most 20G.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to open the port of the cache in the firewall, or ports 80 and 443 with `nginx.enable`; and UDP port 5353 with `settings.lan`.";
    };

    push = {
      enable = lib.mkEnableOption ''
        pushes with `nix copy --to` at `/push`, the same as `settings.push.enable`. They need `settings.tokens_path`, and
        TLS or `nginx.enable`'';
      publicKeys = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "ci-1:GOTMCXKgN8cX8Q0TODIXpSfxmqCyDGsNnP6DJpTBu2M=" ];
        description = ''
          Public keys of the pushers. The Nix of this machine trusts them, for all purposes (`trusted-public-keys`): it
          accepts only paths that a trusted key signed.
        '';
      };
    };

    watch = {
      enable = lib.mkEnableOption ''
        the upload of each store path that becomes valid to another cache, by `harmonia watch`. It works without
        `enable`, on a machine that builds and serves nothing. `settings.watch` chooses the paths, and `signKeyPaths`
        sign them'';
      url = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "https://cache.example.org/push";
        description = "URL of the other cache, or `mirror`, the bucket of `settings.mirror`; the same as `settings.watch.url`.";
      };
      hook = mkOption {
        type = types.bool;
        default = false;
        description = ''
          Whether Nix hands the results of each build to the service, by `post-build-hook`. With
          `settings.watch.new_paths = false`, only these are uploaded.
        '';
      };
      configFile = mkOption {
        type = types.path;
        default = checked "harmonia-watch.toml" watchSettings;
        defaultText = lib.literalMD "generated from `settings`";
        readOnly = true;
        description = "Settings file of the service, a part of `settings`.";
      };
    };

    mirror = {
      roots = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "/run/current-system" ];
        description = ''
          Store paths, or symlinks to them. Their closures are written to the bucket of `settings.mirror` at the times
          of `startAt`, by `harmonia mirror`. It works without `enable`. `signKeyPaths` sign them.
        '';
      };
      keep = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "90d";
        description = ''
          If set, `harmonia mirror gc` deletes paths from the bucket that were neither written nor named for this time.
          Set it on one machine.
        '';
      };
      startAt = mkOption {
        type = types.str;
        default = "daily";
        description = "When to write `roots` and to delete old paths, in the format of {manpage}`systemd.time(7)`.";
      };
    };

    nginx = {
      enable = lib.mkEnableOption ''
        a virtual host of nginx in front of the cache, with TLS and HTTP/2. The cache then listens on a unix socket that
        only nginx can open, unless `settings.bind` is set'';
      hostName = mkOption {
        type = types.str;
        example = "cache.example.org";
        description = ''
          Name of the virtual host. Its certificate comes from ACME. To use another one, set
          `services.nginx.virtualHosts.<name>.enableACME = false`, `sslCertificate` and `sslCertificateKey`.
        '';
      };
      sendCachedFiles = mkOption {
        type = types.bool;
        default = false;
        description = ''
          Whether nginx sends large NARs of the cache itself, after Harmonia has checked the request. It sets
          `settings.nginx_location`, and lets nginx read the cache.
        '';
      };
    };

    client.caches = mkOption {
      type = types.attrsOf (types.listOf types.str);
      default = { };
      example = {
        "https://cache.example.org" = [
          "cache.example.org-1:GOTMCXKgN8cX8Q0TODIXpSfxmqCyDGsNnP6DJpTBu2M="
        ];
      };
      description = ''
        Caches that this machine substitutes from, and their public keys. They are added to `substituters` and
        `trusted-public-keys` in `nix.settings`. Works without `enable`.
      '';
    };

    client.accelerate = {
      enable = lib.mkEnableOption ''
        a Harmonia between this machine's Nix and `client.caches`, at 127.0.0.1. It fetches the narinfos of a whole
        closure at once from caches that are Harmonias, and NARs before Nix requests them. The caches stay in
        `substituters` after it, and `fallback` is set, so that Nix goes on without it. Works without `enable`'';
      port = mkOption {
        type = types.port;
        default = 5017;
        description = "Port on 127.0.0.1.";
      };
      idleExit = mkOption {
        type = types.ints.positive;
        default = 300;
        description = "Seconds without a request after which it ends. Its socket starts it again.";
      };
      cacheSize = mkOption {
        type = types.nullOr types.str;
        default = "2G";
        description = "Maximum size of the NARs that it keeps in /var/cache/harmonia-accelerate. If null, half of the free space, at most 20G.";
      };
      configFile = mkOption {
        type = types.path;
        default = checked "harmonia-accelerate.toml" accelerateSettings;
        defaultText = lib.literalMD "generated from `client.caches` and these options";
        readOnly = true;
        description = "Settings file of the service.";
      };
      siblingKeys = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "cache.example.org-1:GOTMCXKgN8cX8Q0TODIXpSfxmqCyDGsNnP6DJpTBu2M=" ];
        description = ''
          Public keys. With at least one, binary caches that announce themselves in the local network
          (`settings.lan.announce`) are asked for paths that one of these keys signed. They learn which paths this
          machine lacks. Opens UDP port 5353 in the firewall.
        '';
      };
      netrc = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "/etc/nix/netrc";
        description = "netrc file with the tokens for the caches. It can be readable only to root.";
      };
    };
  };

  config = lib.mkMerge [
    (lib.mkIf (cfg.client.caches != { }) {
      nix.settings = {
        substituters = lib.attrNames cfg.client.caches;
        trusted-public-keys = lib.concatLists (lib.attrValues cfg.client.caches);
      };
    })

    (lib.mkIf accelerate.enable {
      assertions = [
        {
          assertion = cfg.client.caches != { };
          message = "services.harmonia.client.accelerate: there are no caches behind it; set services.harmonia.client.caches.";
        }
      ];

      nix.settings = {
        substituters = lib.mkBefore [ accelerateUrl ];
        # If it is stopped, Nix up to 2.31 would fail instead of using the next cache.
        fallback = lib.mkDefault true;
      };

      systemd.sockets.harmonia-accelerate = {
        description = "Harmonia between Nix and its caches, socket";
        wantedBy = [ "sockets.target" ];
        socketConfig = overridable {
          Backlog = 4096;
          ListenStream = [ "127.0.0.1:${toString accelerate.port}" ];
        };
      };

      systemd.services.harmonia-accelerate = {
        description = "Harmonia between Nix and its caches";
        requires = [ "harmonia-accelerate.socket" ];
        after = [
          "harmonia-accelerate.socket"
          "network.target"
        ];
        stopIfChanged = false;
        unitConfig = overridable {
          # If it cannot start, it and its socket fail, and Nix uses its next cache. The default limit, 5 starts in 10 s,
          # is reached if it is killed a few times.
          StartLimitIntervalSec = 120;
          StartLimitBurst = 20;
        };
        serviceConfig =
          overridable {
            Type = "notify";
            ExecStart = "${lib.getExe package} --config ${accelerate.configFile} serve";
            WatchdogSec = 30;
            KillMode = "mixed";
            Restart = "on-failure";
            RestartSec = 1;
            TimeoutStopSec = 40;
            LimitNOFILE = 65536;
            DynamicUser = true;
            LoadCredential = lib.mkIf (accelerate.netrc != null) (loadCredentials [
              {
                name = "netrc";
                path = accelerate.netrc;
              }
            ]);
            CacheDirectory = "harmonia-accelerate";
            CacheDirectoryMode = "0700";
            UMask = "0077";
            InaccessiblePaths = [ "-/nix/var/nix/daemon-socket" ];
            RestrictAddressFamilies = [
              "AF_UNIX"
              "AF_INET"
              "AF_INET6"
            ]
            ++ lib.optional (asksSiblings accelerate.siblingKeys) "AF_NETLINK";
          }
          // overridable sandbox;
      };

      networking.firewall.allowedUDPPorts = lib.mkIf (asksSiblings accelerate.siblingKeys) [ 5353 ];
    })

    (lib.mkIf cfg.enable {
      assertions = [
        {
          assertion =
            onUnixSocket || onAnyAddress || host == "localhost" || builtins.match "[0-9.]+|\\[.*]" host != null;
          message = ''
            services.harmonia.settings.bind: systemd cannot listen on the name in "${bind}".
            Use an IP address or a unix socket.
          '';
        }
        {
          assertion = cfg.settings.cache_dir == null;
          message = ''
            services.harmonia.settings.cache_dir: systemd creates the cache in /var/cache/harmonia. Remove the setting.
            To use another disk, mount it at /var/cache/private/harmonia.
          '';
        }
        {
          assertion = cfg.settings.metrics_bind == null || !isUnixSocket cfg.settings.metrics_bind;
          message = "services.harmonia.settings.metrics_bind: a unix socket is unreachable inside the sandbox; use host:port.";
        }
        {
          assertion = cfg.openFirewall -> cfg.nginx.enable || !onUnixSocket;
          message = "services.harmonia.openFirewall: settings.bind is a unix socket, which has no port; remove openFirewall.";
        }
        {
          assertion = cfg.settings.push.state_dir == null;
          message = ''
            services.harmonia.settings.push.state_dir: systemd creates the directory /var/lib/harmonia. Remove the setting.
          '';
        }
        {
          assertion = cfg.nginx.enable -> cfg.settings.tls_cert_path == null;
          message = "services.harmonia.nginx: nginx terminates TLS; remove tls_cert_path and tls_key_path from the settings.";
        }
      ];
      warnings =
        map (key: ''
          services.harmonia: the secret key ${key.path} is in the Nix store, where everyone on this machine can read it.
          Move it out of the store.
        '') inStore
        ++ lib.optional isRust "services.harmonia.package is the Harmonia written in Rust, and is not used: remove it.";

      services.harmonia.settings = lib.mkMerge [
        (lib.mkIf (cfg.cacheSize != null) { cache_size = cfg.cacheSize; })
        (lib.mkIf cfg.push.enable { push.enable = true; })
        (lib.mkIf cfg.nginx.enable {
          trusted_proxies =
            if onUnixSocket then
              [ "unix" ]
            else
              [
                "127.0.0.1"
                "::1"
              ];
        })
        (lib.mkIf (cfg.nginx.enable && cfg.nginx.sendCachedFiles) { nginx_location = "/harmonia-nar/"; })
      ];

      # harmonia doctor, top, warm, token … read their settings from /etc/harmonia
      environment.systemPackages = [ package ];
      environment.etc."harmonia/harmonia.toml".source = lib.mkDefault (
        format.generate "harmonia.toml" settingsOutside
      );

      # The service's user registers temporary roots with the Nix daemon.
      nix.settings.trusted-public-keys = lib.mkIf cfg.push.enable cfg.push.publicKeys;
      nix.settings.extra-allowed-users = lib.mkIf (cfg.settings.daemon_socket != "") [ "harmonia" ];

      networking.firewall.allowedUDPPorts = lib.mkIf (cfg.openFirewall && hasSiblings) [ 5353 ];
      networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall (
        if cfg.nginx.enable then
          [
            80
            443
          ]
        else
          lib.optional (!onUnixSocket) port
      );

      systemd.sockets.harmonia = {
        description = "Harmonia binary cache, socket";
        wantedBy = [ "sockets.target" ];
        socketConfig = overridable (
          {
            # The same as in harmonia/process/sockets.py.
            Backlog = 4096;
            # The address may appear later than this socket, for example that of a VPN.
            FreeBind = true;
            ListenStream = map escapeSpecifiers listenStreams;
          }
          // lib.optionalAttrs onUnixSocket (
            if cfg.settings.unix_socket_mode != null then
              { SocketMode = cfg.settings.unix_socket_mode; }
            else if cfg.nginx.enable then
              {
                SocketGroup = config.services.nginx.group;
                SocketMode = "0660";
              }
            else
              { SocketMode = "0666"; }
          )
        );
      };

      systemd.services.harmonia = {
        description = "Harmonia binary cache";
        requires = [ "harmonia.socket" ];
        after = [
          "harmonia.socket"
          "network.target"
        ];
        # Start at boot, not at the first connection: failures show at once, and the first client does not wait.
        wantedBy = [ "multi-user.target" ];
        # Restart instead of stop and start. The socket stays open, so no connection is refused.
        stopIfChanged = false;
        unitConfig = overridable (
          {
            # If the service cannot start, it and its socket fail, so that clients do not wait.
            StartLimitIntervalSec = 120;
            StartLimitBurst = 20;
          }
          // lib.optionalAttrs (storePaths != [ ]) { RequiresMountsFor = toString storePaths; }
        );

        serviceConfig = overridable {
          Type = "notify";
          # No ExecReload: systemd copies credentials only at the start, so a new certificate needs a restart.
          ExecStart = "${lib.getExe package} --config ${cfg.configFile} serve";
          WatchdogSec = 30;
          # Only the main process gets SIGTERM. It ends its workers after their downloads.
          KillMode = "mixed";
          Restart = "on-failure";
          RestartSec = 1;
          # shutdown_grace for running downloads, then 10 s for the workers to exit.
          TimeoutStopSec = shutdownGrace + 10;
          LimitNOFILE = 65536;

          DynamicUser = true;
          User = "harmonia";
          Group = "harmonia";
          LoadCredential = loadCredentials credentials;
          CacheDirectory = "harmonia";
          CacheDirectoryMode = "0700";
          # The GC roots and logs of pushed paths.
          StateDirectory = lib.mkIf pushes "harmonia";
          StateDirectoryMode = lib.mkIf pushes "0700";
          UMask = "0077";

          # The service registers temporary roots with the Nix daemon. The daemon would also build for it, so hide the
          # daemon if roots are off.
          InaccessiblePaths = lib.mkIf (cfg.settings.daemon_socket == "") [ "-/nix/var/nix/daemon-socket" ];

          # Connections arrive through systemd's socket, which is in the network of the machine. AF_UNIX is for sd_notify.
          # With metrics_bind or upstreams, the service is in the network of the machine as well.
          PrivateNetwork = !needsNetwork;
          RestrictAddressFamilies = [
            "AF_UNIX"
          ]
          ++ lib.optionals needsNetwork [
            "AF_INET"
            "AF_INET6"
          ]
          ++ lib.optional hasSiblings "AF_NETLINK";
          IPAddressDeny = lib.mkIf (!needsNetwork) "any";
        }
        // overridable sandbox;
      };
    })

    (lib.mkIf cfg.watch.enable {
      assertions = [
        {
          assertion = cfg.settings.watch.url != null;
          message = "services.harmonia.watch: set url to that of the cache to upload to.";
        }
        {
          assertion = watchesMirror -> cfg.settings.mirror.bucket != null;
          message = mirrorWithoutBucket;
        }
      ]
      ++
        map
          (key: {
            assertion = cfg.settings.watch.${key} == null;
            message = "services.harmonia.settings.watch.${key}: systemd creates the file's directory. Remove the setting.";
          })
          [
            "metrics_file"
            "socket"
            "state_dir"
          ];

      services.harmonia.settings.watch.url = lib.mkIf (cfg.watch.url != null) cfg.watch.url;
      environment.systemPackages = [ package ];
      nix.settings.post-build-hook = lib.mkIf cfg.watch.hook "${package}/bin/harmonia-hook";

      systemd.services.harmonia-watch = {
        description = "Harmonia, uploads of new store paths";
        after = [ "network.target" ];
        wantedBy = [ "multi-user.target" ];
        unitConfig = overridable (
          {
            StartLimitIntervalSec = 0;
          }
          // lib.optionalAttrs (storePaths != [ ]) { RequiresMountsFor = toString storePaths; }
        );
        serviceConfig =
          overridable {
            Type = "notify";
            ExecStart = "${lib.getExe package} --config ${cfg.watch.configFile} watch";
            WatchdogSec = 60;
            Restart = "on-failure";
            RestartSec = 5;
            TimeoutStopSec = 10;
            StateDirectory = "harmonia-watch";
            StateDirectoryMode = "0700";
            # The socket of the post-build hook, which only root can open, and the metrics, which everyone can read.
            RuntimeDirectory = "harmonia-watch";
            UMask = "0022";
          }
          // overridable (
            uploading (
              watch.credentials ++ lib.optionals watchesMirror (mirrorOf "harmonia-watch").credentials
            )
          );
      };
    })

    (lib.mkIf (cfg.mirror.roots != [ ] || cfg.mirror.keep != null) {
      assertions = [
        {
          assertion = cfg.settings.mirror.bucket != null;
          message = mirrorWithoutBucket;
        }
      ];
      environment.systemPackages = [ package ];

      systemd.timers.harmonia-mirror = {
        wantedBy = [ "timers.target" ];
        timerConfig = {
          OnCalendar = cfg.mirror.startAt;
          Persistent = true;
        };
      };
      systemd.services.harmonia-mirror = {
        description = "Harmonia, uploads to the mirror's bucket and its garbage collection";
        after = [ "network-online.target" ];
        wants = [ "network-online.target" ];
        unitConfig = overridable (
          lib.optionalAttrs (storePaths != [ ]) { RequiresMountsFor = toString storePaths; }
        );
        serviceConfig =
          let
            configFile = checked "harmonia-mirror.toml" mirrorJobSettings;
            mirror =
              arguments:
              "${lib.getExe package} --config ${configFile} mirror ${utils.escapeSystemdExecArgs arguments}";
          in
          overridable {
            Type = "oneshot";
            ExecStart =
              lib.optional (cfg.mirror.roots != [ ]) (mirror ([ "write" ] ++ cfg.mirror.roots))
              ++ lib.optional (cfg.mirror.keep != null) (mirror [
                "gc"
                "--keep"
                cfg.mirror.keep
              ]);
            UMask = "0077";
          }
          // overridable (uploading (mirrorOf "harmonia-mirror").credentials);
      };
    })

    (lib.mkIf (cfg.enable && cfg.nginx.enable) {
      services.nginx = {
        enable = true;
        upstreams.harmonia = {
          servers.${
            if onUnixSocket then
              "unix:${lib.head listenStreams}"
            else if onAnyAddress then
              "127.0.0.1:${toString port}"
            else
              lib.head listenStreams
          } =
            { };
          extraConfig = "keepalive 32;\n";
        };
        virtualHosts.${cfg.nginx.hostName} = {
          forceSSL = lib.mkDefault true;
          enableACME = lib.mkDefault true;
          http2 = lib.mkDefault true;
          locations = {
            "/" = proxied "http://harmonia" (lib.optionalString cfg.nginx.sendCachedFiles "X-Accel-Redirect");
          }
          // lib.optionalAttrs cfg.nginx.sendCachedFiles {
            ${cfg.settings.nginx_location} = {
              extraConfig = ''
                internal;
                alias /run/harmonia-nar/;
                etag off;
                add_header ETag $upstream_http_etag;
                add_header Cache-Control $upstream_http_x_cache_control;
                add_header Last-Modified "";
                sendfile on;
                tcp_nopush on;
                send_timeout 1h;
                # The file was evicted, or nginx may not read it: ask Harmonia for the bytes.
                error_page 403 404 = @harmonia-bytes;
              '';
            };
            "@harmonia-bytes" = proxied "http://harmonia$request_uri" "";
          };
        };
      };
      systemd.services.nginx = lib.mkIf cfg.nginx.sendCachedFiles {
        after = [ "harmonia.service" ];
        # /var/cache/private is closed to all users. If the directory does not exist yet, Harmonia sends all NARs.
        serviceConfig.BindReadOnlyPaths = [ "-/var/cache/private/harmonia/nar:/run/harmonia-nar" ];
      };
    })
  ];
}
