"""Results of a run: what they are, how they are printed, and which files hold them.

In reading order: `result` (the schema of `result.json`), `images` (comparisons of single images), `console`,
`csv_files`, `charts` and `html` (presentations of a result), `comparison` (several models of one run), which
`comparison_console`, `comparison_charts` and `comparison_html` present, `predictions` (PNG files), `delivery` (prints
and writes).
"""
