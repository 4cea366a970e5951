"""Stub."""


def render_comparison(c):
    return "<html></html>"
