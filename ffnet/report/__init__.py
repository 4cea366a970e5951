"""Print and write results: tables and charts, the report on the console and as a page, CSV files."""
