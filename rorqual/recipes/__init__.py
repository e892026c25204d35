"""Package data: recipes in TOML."""
