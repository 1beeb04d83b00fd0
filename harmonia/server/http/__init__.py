"""HTTP on top of Sanic: conditional requests, ranges, content codings, bodies, access control, limits."""
