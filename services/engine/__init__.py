"""vLLM, loaded at its extension points; its private names stand in `vllm_internals`."""
