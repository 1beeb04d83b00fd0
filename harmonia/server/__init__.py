"""HTTP server. The only package that imports Sanic."""
