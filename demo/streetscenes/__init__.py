"""The demo's renderer: `scenes` writes rendered street scenes as a folder in Cityscapes' layout."""
