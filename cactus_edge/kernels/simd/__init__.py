"""Vector instructions in compiled code: what a CPU has, and kernels emitted as LLVM IR for it."""
