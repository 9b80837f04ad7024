"""The `specprefill` command: one module per subcommand, and the demo."""
