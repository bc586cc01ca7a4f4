"""From result files to sentences, figures and pages."""
