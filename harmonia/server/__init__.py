"""The HTTP side, and the only place that knows Sanic: a file for each resource, and a few that all of them share."""
