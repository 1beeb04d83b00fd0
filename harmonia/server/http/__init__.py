"""HTTP on top of Sanic: conditions, ranges, encodings, bodies, access, limits."""
