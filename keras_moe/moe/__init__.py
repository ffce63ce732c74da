"""Layers that join routers, dispatch, experts and losses."""
