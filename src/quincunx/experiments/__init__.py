"""The experiments that the project publishes: comparisons, the papers' tables, benchmarks, the demo."""
