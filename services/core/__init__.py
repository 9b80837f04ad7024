"""One request's life: values, ports, the pipeline, selection. Imports no framework."""
