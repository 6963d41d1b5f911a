"""GPU kernels in Triton for networks of integer codes (docs/integer.md); `convert.to_kernels` puts them in place."""
