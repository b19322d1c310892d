"""Who the ranks of a launch are, and where they meet."""
