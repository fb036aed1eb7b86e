"""Sources of pictures: folders, zips, tables, the built-in digits."""
