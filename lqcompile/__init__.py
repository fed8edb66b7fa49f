"""torch.compile(model, backend="lq"): every matmul against a quantized weight, on fused low-bit kernels."""
