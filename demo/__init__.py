"""The demo's trained networks and the scripts that made them."""
