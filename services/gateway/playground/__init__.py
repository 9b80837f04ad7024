"""The playground: one page over the HTTP API. It needs no build, and no server of its own."""
