"""Training loops for small language models: torch, numpy, pydantic, pyyaml and safetensors alone."""
