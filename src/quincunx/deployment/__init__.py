"""Networks as files for other engines: plain operators or our kernels, verified and timed; ONNX files in."""
