"""Where pictures come from: folders, zips, tables, the built-in digits."""
