"""A vLLM platform plug-in for engines on CPUs: development, tests and the demo.

It is inert unless SPECPREFILL_CPU_ENGINE=1, since a platform plug-in applies to every vLLM
of the environment. It keeps a single-worker engine in one process (start-up and idle cost),
and lets vLLM's Ray executor place CPU workers, which it finds by the resource key GPU.
"""

from __future__ import annotations

import os

ENV_SWITCH = "SPECPREFILL_CPU_ENGINE"
_PLATFORM = "specprefill.engine.cpu.platform.CpuEnginePlatform"


def register() -> str | None:
    """Return the platform's class name: the entry point of the group `vllm.platform_plugins`."""
    return _PLATFORM if os.environ.get(ENV_SWITCH) == "1" else None
