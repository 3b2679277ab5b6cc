"""Linear layers with weights of few bits: stored forms, arithmetic in torch, kernels in Triton."""
