# Subset of services.nginx that a cache behind nginx needs: virtual hosts, TLS, locations, upstreams.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib)
    concatMapStrings
    mapAttrsToList
    mkOption
    optionalString
    types
    ;
  cfg = config.services.nginx;
  option = type: default: mkOption { inherit type default; };
  lines = option types.lines "";
  off = option types.bool false;
  text = option (types.nullOr types.str) null;

  location = types.submodule {
    options = {
      proxyPass = text;
      proxyWebsockets = off;
      recommendedProxySettings = option types.bool cfg.recommendedProxySettings;
      root = text;
      return = text;
      extraConfig = lines;
    };
  };
  host = types.submodule (
    { name, ... }:
    {
      options = {
        serverName = option types.str name;
        serverAliases = option (types.listOf types.str) [ ];
        default = off;
        addSSL = off;
        onlySSL = off;
        forceSSL = off;
        enableACME = off;
        useACMEHost = text;
        http2 = option types.bool true;
        sslCertificate = option (types.nullOr types.path) null;
        sslCertificateKey = option (types.nullOr types.path) null;
        extraConfig = lines;
        locations = option (types.attrsOf location) { };
      };
    }
  );

  forwarded = ''
    proxy_set_header Host $host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Host $host;
  '';
  locationText = path: location: ''
    location ${path} {
    ${optionalString (location.proxyPass != null) "proxy_pass ${location.proxyPass};\n"}${
      optionalString (location.proxyPass != null && location.recommendedProxySettings) forwarded
    }${optionalString (location.root != null) "root ${location.root};\n"}${
      optionalString (location.return != null) "return ${location.return};\n"
    }${location.extraConfig}}
  '';
  hostText =
    name: host:
    let
      tls = host.addSSL || host.onlySSL || host.forceSSL;
      acme = "/var/lib/acme/${if host.useACMEHost != null then host.useACMEHost else name}";
      default = optionalString host.default " default_server";
      names = lib.concatStringsSep " " ([ host.serverName ] ++ host.serverAliases);
      listen =
        optionalString (!host.onlySSL && !host.forceSSL) "listen 80${default};\nlisten [::]:80${default};\n"
        + optionalString tls ''
          listen 443 ssl${optionalString host.http2 " http2"}${default};
          listen [::]:443 ssl${optionalString host.http2 " http2"}${default};
          ssl_certificate ${
            if host.sslCertificate != null then host.sslCertificate else "${acme}/fullchain.pem"
          };
          ssl_certificate_key ${
            if host.sslCertificateKey != null then host.sslCertificateKey else "${acme}/key.pem"
          };
        '';
    in
    optionalString host.forceSSL ''
      server {
      listen 80${default};
      listen [::]:80${default};
      server_name ${names};
      location / { return 301 https://$host$request_uri; }
      }
    ''
    + ''
      server {
      ${listen}server_name ${names};
      ${host.extraConfig}${lib.concatStrings (mapAttrsToList locationText host.locations)}}
    '';
  upstreamText = name: upstream: ''
    upstream ${name} {
    ${
      concatMapStrings (server: "server ${server};\n") (builtins.attrNames upstream.servers)
    }${upstream.extraConfig or ""}}
  '';

  file = pkgs.writeText "nginx.conf" ''
    user ${cfg.user} ${cfg.group};
    pid /run/nginx/nginx.pid;
    error_log stderr;
    daemon off;
    events { }
    http {
    access_log off;
    client_body_temp_path /run/nginx/body;
    proxy_temp_path /run/nginx/proxy;
    fastcgi_temp_path /run/nginx/fastcgi;
    uwsgi_temp_path /run/nginx/uwsgi;
    scgi_temp_path /run/nginx/scgi;
    ${cfg.commonHttpConfig}${cfg.appendHttpConfig}${lib.concatStrings (mapAttrsToList upstreamText cfg.upstreams)}${lib.concatStrings (mapAttrsToList hostText cfg.virtualHosts)}}
  '';
in
{
  options.services.nginx = {
    enable = off;
    package = option types.package pkgs.nginx;
    user = option types.str "nginx";
    group = option types.str "nginx";
    recommendedProxySettings = off;
    recommendedTlsSettings = off;
    recommendedOptimisation = off;
    commonHttpConfig = lines;
    appendHttpConfig = lines;
    upstreams = option (types.attrsOf types.attrs) { };
    virtualHosts = option (types.attrsOf host) { };
  };
  config = lib.mkIf cfg.enable {
    users.users.${cfg.user} = {
      isSystemUser = true;
      inherit (cfg) group;
    };
    users.groups.${cfg.group} = { };
    systemd.services.nginx = {
      description = "Nginx Web Server";
      after = [ "network.target" ];
      wantedBy = [ "multi-user.target" ];
      serviceConfig = {
        ExecStart = "${cfg.package}/sbin/nginx -c ${file}";
        RuntimeDirectory = "nginx";
        Restart = "always";
      };
    };
  };
}
