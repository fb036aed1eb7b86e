"""A method and a backbone for selftrans. The entry points in pyproject.toml name their records; nothing runs at import."""
