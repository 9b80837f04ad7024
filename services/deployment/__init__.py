"""The deployment file, the front that it configures, and a local Ray cluster."""
