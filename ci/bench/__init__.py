"""What is fast or slow: ratios within one run."""
