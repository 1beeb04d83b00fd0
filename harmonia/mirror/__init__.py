"""Mirror: a plain Nix binary cache in a bucket of an S3 service, which several servers share."""
