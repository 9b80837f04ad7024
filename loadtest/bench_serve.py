"""vLLM's own benchmark client, `vllm bench serve`, against a running service.

    python loadtest/bench_serve.py --model demo --tokenizer models/demo-main \
        --backend openai-chat --endpoint /v1/chat/completions \
        --dataset-name random --random-input-len 3000 --random-output-len 16 \
        --request-rate 1 --num-prompts 20 --goodput ttft:2000

All options are vLLM's. This file exists because the `vllm` command of the CPU build looks for
a package named vllm, which that build is not. Exits 1 when any request failed.
"""

from __future__ import annotations

import sys

from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(argv: list[str]) -> int:
    """Run the benchmark; its table goes to standard output."""
    parser = FlexibleArgumentParser(description="vLLM's serving benchmark")
    serve.add_cli_args(parser)
    result = serve.main(parser.parse_args(argv))
    return 1 if result is not None and result.get("failed", 0) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
