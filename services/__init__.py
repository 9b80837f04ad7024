"""specprefill: disaggregated speculative prefill on Ray Serve."""

if __name__ != "specprefill":
    # The folder is `services`, the package is `specprefill` (see pyproject.toml). Importing it
    # under a second name would load every module twice, with two copies of every class.
    raise ImportError(f"import this package as 'specprefill', not as {__name__!r}")

__version__ = "0.1.0"
