"""A discrete-event simulation of the service, with the same rules and the same stage models."""
