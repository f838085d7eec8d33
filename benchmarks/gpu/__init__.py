"""vlmq beside raw lmdeploy on a machine with NVIDIA GPUs. docs/benchmarks.md says what and how."""
