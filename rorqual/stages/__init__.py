"""Floor 5: small programs, each Config and main(); nobody imports a stage but a command."""
