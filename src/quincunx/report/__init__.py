"""Turn result files into sentences, figures and pages."""
