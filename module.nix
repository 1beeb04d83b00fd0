# NixOS: services.harmonia, in place of the module of that name in nixpkgs, whose configurations keep working.
# The options below `settings` come from nix/module-settings.json, which a test holds to harmonia/config/settings.py.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.harmonia;
  inherit (lib) mkOption types;
  format = pkgs.formats.toml { };
  # Settings: an option for each key we know. Null is not written, nor a table of that, so that Harmonia's own default
  # holds.
  keys = lib.recursiveUpdate (lib.importJSON ./nix/module-settings.json) {
    # Values that other modules read, as in nixpkgs' module. Clients ask cache.nixos.org first, which has priority 40.
    bind.nixosDefault = if cfg.nginx.enable then "unix:/run/harmonia/socket" else "[::]:5000";
    priority.nixosDefault = 50;
    workers.nixosDefault = 4;
  };
  given =
    table:
    lib.filterAttrs (_: value: value != null && value != { }) (
      lib.mapAttrs (_: value: if lib.isAttrs value then given value else value) table
    );
  # A path literal is copied to the Nix store, as NixOS does elsewhere.
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
        description = "${key.description} Where null, the default is ${key.default}.";
      }
    else
      mkOption {
        type = settingType key;
        inherit (key) description;
      };

  # Where to listen: systemd does, so that the service needs no network and a restart refuses no connection.
  # The forms are those of harmonia/config/value_types.py.
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
  listenStreams =
    if onUnixSocket then
      [ (lib.removePrefix "//" (lib.removePrefix "unix:" bind)) ]
    # A port alone means IPv6 and IPv4, and works where there is no IPv6.
    else if onAnyAddress then
      [ (toString port) ]
    else if host == "localhost" then
      [
        "127.0.0.1:${toString port}"
        "[::1]:${toString port}"
      ]
    else
      [ "${host}:${toString port}" ];

  # Files that may be for nobody else to read: root's systemd does, and hands them over.
  credential = name: "/run/credentials/harmonia.service/${name}";
  handOver =
    prefix: keys: values:
    let
      files = lib.filterAttrs (key: _: keys.${key}.type or null == "file") (given values);
    in
    {
      credentials = lib.mapAttrsToList (key: path: {
        name = "${prefix}${key}";
        inherit path;
      }) files;
      settings = given values // lib.mapAttrs (key: _: credential "${prefix}${key}") files;
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
    number: handOver "upstream-${toString number}-" keys.upstream.keys
  ) cfg.settings.upstream;
  others = handOver "" keys (
    removeAttrs cfg.settings [
      "sign_key_path"
      "sign_key_paths"
      "upstream"
    ]
  );
  credentials = signKeys ++ lib.concatMap (each: each.credentials) ([ others ] ++ upstreams);
  withLists =
    settings: upstream: sign_key_paths:
    settings // lib.filterAttrs (_: list: list != [ ]) { inherit upstream sign_key_paths; };
  settings = withLists others.settings (map (each: each.settings) upstreams) (
    map (key: credential key.name) signKeys
  );
  # For commands outside the service: the same files under their own names, and the cache that systemd made.
  settingsOutside = withLists (given (
    removeAttrs cfg.settings [
      "sign_key_path"
      "sign_key_paths"
      "upstream"
    ]
    // {
      cache_dir = "/var/cache/harmonia";
    }
  )) (map given cfg.settings.upstream) (map (key: key.path) signKeys);
  inStore = lib.filter (key: lib.hasPrefix "${builtins.storeDir}/" key.path) signKeys;

  unchecked = format.generate "harmonia.toml" settings;
  # A wrong setting stops the build, not the service.
  checked =
    if pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
      pkgs.runCommand "harmonia.toml" { passthru = { inherit settings; }; } ''
        ${lib.getExe package} --config ${unchecked} check-config --text-only
        cp ${unchecked} "$out"
      ''
    else
      unchecked;

  # A store in a directory that the sandbox hides is shown read-only, and nothing else of that directory.
  store =
    if cfg.settings.real_nix_store != null then
      cfg.settings.real_nix_store
    else
      cfg.settings.virtual_nix_store;
  storePaths = map toString (
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

  # Metrics of their own address are the one thing that Harmonia listens for itself, upstreams what it asks.
  needsNetwork = cfg.settings.metrics_bind != null || upstreams != [ ];
  shutdownGrace = if cfg.settings.shutdown_grace == null then 30 else cfg.settings.shutdown_grace;

  # The Harmonia written in Rust cannot run with these arguments; it would even start a server in the build.
  ownPackage = pkgs.callPackage ./package.nix { };
  isRust =
    cfg.package ? cargoDeps
    || cfg.package ? cargoArtifacts
    || cfg.package.meta.mainProgram or "" == "harmonia-cache";
  package = if isRust then ownPackage else cfg.package;

  # A configuration that sets one of these as well has precedence, without mkForce. Lists are joined.
  yielding = lib.mapAttrs (_: value: if lib.isList value then value else lib.mkDefault value);
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
      description = "The Harmonia to run. Not nixpkgs' `pkgs.harmonia`, which is the one written in Rust.";
    };

    signKeyPaths = mkOption {
      type = types.listOf types.path;
      default = [ ];
      example = [ "/var/lib/secrets/cache.secret" ];
      description = ''
        Files with the secret keys that sign what is served, made by `nix-store --generate-binary-cache-key`. Only root
        needs to be able to read them. Keep them out of the Nix store, where everyone can.
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
        The settings, as docs/reference/configuration.md explains them. They are checked when the system is built. Key files
        named here are handed over like `signKeyPaths`: the service need not be able to read them.
      '';
    };

    configFile = mkOption {
      type = types.path;
      default = checked;
      defaultText = lib.literalMD "made from `settings`";
      readOnly = true;
      description = ''
        The file that the service is started with. Keys and certificates are systemd's copies in it. For `harmonia doctor`
        and other commands, `/etc/harmonia/harmonia.toml` has the same settings with the files themselves.
      '';
    };

    cacheSize = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "50G";
      description = ''
        How much compressed NARs may take in /var/cache/harmonia: the same as `settings.cache_size`. Where null, it is half
        of the free space, at most 20G.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to let other machines reach the cache: its port, or with `nginx.enable` ports 80 and 443.";
    };

    nginx = {
      enable = lib.mkEnableOption ''
        a virtual host of nginx in front of the cache, with TLS and HTTP/2. The cache then listens on a unix socket
        that nginx alone can open, unless `settings.bind` says otherwise'';
      hostName = mkOption {
        type = types.str;
        example = "cache.example.org";
        description = ''
          The name of the virtual host. Certificates come by ACME; for others, set
          `services.nginx.virtualHosts.<name>.enableACME = false`, `sslCertificate` and `sslCertificateKey`.
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
        Caches that this machine substitutes from, and their public keys: an addition to the `substituters` and
        `trusted-public-keys` in `nix.settings`. It needs no `enable`.
      '';
    };
  };

  config = lib.mkMerge [
    (lib.mkIf (cfg.client.caches != { }) {
      nix.settings = {
        substituters = lib.attrNames cfg.client.caches;
        trusted-public-keys = lib.concatLists (lib.attrValues cfg.client.caches);
      };
    })

    (lib.mkIf cfg.enable {
      assertions = [
        {
          assertion =
            onUnixSocket || onAnyAddress || host == "localhost" || builtins.match "[0-9.]+|\\[.*]" host != null;
          message = ''
            services.harmonia.settings.bind: systemd listens on IP addresses and unix sockets, not on the name in "${bind}".
          '';
        }
        {
          assertion = cfg.settings.cache_dir == null;
          message = ''
            services.harmonia.settings.cache_dir: the cache is in /var/cache/harmonia, which systemd makes for the service.
            To have it on another disk, mount that at /var/cache/private/harmonia.
          '';
        }
        {
          assertion = cfg.settings.metrics_bind == null || !isUnixSocket cfg.settings.metrics_bind;
          message = "services.harmonia.settings.metrics_bind: nobody could reach a unix socket in there; give host:port.";
        }
        {
          assertion = cfg.openFirewall -> cfg.nginx.enable || !onUnixSocket;
          message = "services.harmonia.openFirewall: there is no port to open, settings.bind is a unix socket.";
        }
        {
          assertion = cfg.nginx.enable -> cfg.settings.tls_cert_path == null;
          message = "services.harmonia.nginx: TLS ends at nginx; remove tls_cert_path and tls_key_path from the settings.";
        }
      ];
      warnings =
        map (key: ''
          services.harmonia: the secret key ${key.path} is in the Nix store, where everyone on this machine can read it.
        '') inStore
        ++ lib.optional isRust "services.harmonia.package is the Harmonia written in Rust, and is not used: remove it.";

      services.harmonia.settings = lib.mkMerge [
        (lib.mkIf (cfg.cacheSize != null) { cache_size = cfg.cacheSize; })
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
      ];

      # harmonia doctor, top, warm, token …, which look there for their settings
      environment.systemPackages = [ package ];
      environment.etc."harmonia/harmonia.toml".source = lib.mkDefault (
        format.generate "harmonia.toml" settingsOutside
      );

      # Temporary roots are asked for by the name of the service's user.
      nix.settings.extra-allowed-users = lib.mkIf (cfg.settings.daemon_socket != "") [ "harmonia" ];

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
        socketConfig = yielding (
          {
            # As harmonia/process/sockets.py does where it listens by itself.
            Backlog = 4096;
            # The address may come later than this socket, such as that of a VPN.
            FreeBind = true;
            ListenStream = listenStreams;
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
        # Not only when somebody asks: a start that fails is then seen at once, and the first client need not wait.
        wantedBy = [ "multi-user.target" ];
        # The socket stays open meanwhile: no connection is refused.
        stopIfChanged = false;
        unitConfig = yielding (
          {
            # A service that cannot start is given up, with its socket, on which clients would wait otherwise.
            StartLimitIntervalSec = 120;
            StartLimitBurst = 20;
          }
          // lib.optionalAttrs (storePaths != [ ]) { RequiresMountsFor = toString storePaths; }
        );

        serviceConfig = yielding {
          Type = "notify";
          # No ExecReload: systemd copies credentials at a start alone, so a new certificate needs a restart.
          ExecStart = "${lib.getExe package} --config ${cfg.configFile} serve";
          WatchdogSec = 30;
          # The main process ends its workers, after their downloads.
          KillMode = "mixed";
          Restart = "on-failure";
          RestartSec = 1;
          # Downloads under way get shutdown_grace, and the workers a moment to end.
          TimeoutStopSec = shutdownGrace + 10;
          LimitNOFILE = 65536;

          DynamicUser = true;
          User = "harmonia";
          Group = "harmonia";
          LoadCredential = map (file: "${file.name}:${file.path}") credentials;
          CacheDirectory = "harmonia";
          CacheDirectoryMode = "0700";
          UMask = "0077";

          # No capability at all. Not CAP_DAC_READ_SEARCH either, for databases that only root can read: access(2) does
          # not know of it, SQLite asks that, and then takes the wrong way to open the database.
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
          # setpriority, of @resources: the threads that compress step back behind those that serve.
          SystemCallFilter = [
            "@system-service"
            "~@privileged"
            "~@resources"
            "setpriority"
          ];

          # The store is anywhere, so the root directory stays (no RootDirectory, no NoExecPaths); it is read-only.
          ProtectSystem = "strict";
          ProtectHome = if inHomes == [ ] then true else "tmpfs";
          BindReadOnlyPaths = inHomes ++ inTmp;
          PrivateTmp = true;
          PrivateMounts = true;
          # It asks the Nix daemon, as any user may, to keep what is being sent. That one would also build for it.
          InaccessiblePaths = lib.mkIf (cfg.settings.daemon_socket == "") [ "-/nix/var/nix/daemon-socket" ];
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

          # Connections come through systemd's socket, which is of the machine's own network. AF_UNIX tells systemd that
          # we are ready. With an address of the metrics' own, or upstreams, it is in the machine's network itself.
          PrivateNetwork = !needsNetwork;
          RestrictAddressFamilies = [
            "AF_UNIX"
          ]
          ++ lib.optionals needsNetwork [
            "AF_INET"
            "AF_INET6"
          ];
          IPAddressDeny = lib.mkIf (!needsNetwork) "any";
        };
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
          locations."/" = {
            proxyPass = "http://harmonia";
            # Set below: nginx takes all headers of a place or none.
            recommendedProxySettings = false;
            extraConfig = ''
              proxy_http_version 1.1;
              proxy_set_header Connection "";
              proxy_set_header Host $host;
              proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
              proxy_set_header X-Forwarded-Host $host;
              proxy_set_header X-Forwarded-Proto $scheme;
              # NARs are large: they go to the client as they come, not to nginx' disk first.
              proxy_buffering off;
              # A client may pause for as long as it does without nginx (docs/reference/limits.md).
              proxy_read_timeout 1h;
              send_timeout 1h;
            '';
          };
        };
      };
    })
  ];
}
